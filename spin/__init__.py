"""What the stages stand on: one idea a file. Nothing here imports a stage."""
