"""What a run has done, in numbers, in words and as a page.

metrics.py: the metrics of a training step. evaluation_metrics.py: what evaluate.py measures on each
held-out prompt. summary.py: means, standard errors, which model is ahead. diagnose.py: warnings in
words. page.py draws it all: python -m spin.report. tracking.py: a live logger."""
