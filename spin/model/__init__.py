"""A model: its weights in and out, and log-probabilities of many sequences in one pass.

Read attention.py and packing.py for a micro-batch as one row without padding; weights.py for how
θ_t is read, sharded and written as θ_{t+1}; lora.py for adapters; probe.py for the check, at the
start of each stage, that a micro-batch gives what each sequence has alone; checkpoint.py for
resuming."""
