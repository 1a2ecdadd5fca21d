"""What a run has done, in numbers, in words and as a page.

metrics.py: the metrics of a training step. figures.py: what evaluate.py measures on each held-out
prompt. summary.py: means, standard errors, which model is ahead. trouble.py: warnings in words.
page.py draws it all: python -m spin.report. Read them in this order."""
