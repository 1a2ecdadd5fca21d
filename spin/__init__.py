"""What the stages stand on: one idea a file. Nothing here imports a stage."""

import os

# A stage's own line says what is amiss. Libraries would say it before, over and over: they read
# their levels here when they are imported, and a user's own stay.
for _library in ("HF_HUB", "DATASETS", "TRANSFORMERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
