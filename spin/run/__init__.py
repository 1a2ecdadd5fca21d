"""A run: its ranks and its folder.

ranks.py     the processes that train together: joining, sums, chunks of work, SIGTERM
folders.py   where the files of a run lie, and how a run recognises its models and its data
launch.sh    finds the GPUs and starts a stage; run_iterations.sh sources it
Read folders.py with docs/run-directory.md beside it; ranks.py when you run more than one process.
"""
