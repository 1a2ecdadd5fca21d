"""A model: its weights in and out, and log-probabilities of many sequences in one pass.

attention.py and packing.py: a micro-batch as one row without padding; weights.py: how θ_t is read,
sharded and written as θ_{t+1}; lora.py: adapters; checkpoint.py: resuming. scoring_check.py and
sampling_check.py check, when a stage starts, that micro-batches and sampling give each sequence
the log-probabilities that it has alone."""
