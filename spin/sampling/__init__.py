"""y' ~ p_θ(·|x): how a model answers prompts.

engines.py  read this first: `sample` answers prompts, `uniforms` draws their random numbers
slots.py    our decode loop, and `pick_token`, which turns a random number into a token
vllm_engine.py  the same by vLLM, with --engine vllm
"""
