"""y' ~ p_θ(·|x) by vLLM, an optional package: ids in, ids out, sampled as our own loop samples. Its
scheduler works in this process, its workers in processes of their own, which end with this one."""

import os
from unittest.mock import patch

import numpy as np
import torch

from spin.files import fail

# torchrun's variables, by which vLLM's workers would wait for our ranks
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


def load_vllm():
    """The package; ends with one line if it cannot be imported."""
    # in another process batches would depend on arrival times; gloo's threads do not survive a fork
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    settings |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        # GiB; by default each rank takes most of the memory, and the same cores
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        settings["TORCH_COMPILE_DISABLE"] = "1"  # it would take longer than it saves
    os.environ.update(settings | os.environ)  # a user's own values are kept
    try:
        import vllm
    except ImportError as problem:
        where = "pip install vllm, in an environment of its own (GENERATE_PYTHON)"
        fail(f"--engine vllm needs the package vllm ({problem}): {where}")
    return vllm


def start(name: str, recipe, device: torch.device, **more):
    """vLLM's engine for a model. device: the rank's first GPU, or the CPU. more: for vLLM."""
    how = {"dtype": {"bf16": "bfloat16"}.get(recipe.dtype, "float32"), "load_format": "safetensors"}
    how |= {"revision": recipe.revision_of(name), "tensor_parallel_size": recipe.tensor_parallel}
    how |= {"max_model_len": recipe.max_length, "max_num_seqs": recipe.slots}
    # prefill a prompt in one piece: each piece but the last would use up one of its random numbers
    how |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192 + recipe.max_length}
    how |= {"skip_tokenizer_init": True, "generation_config": "vllm", "use_tqdm_on_load": False}
    # a worker here would join our group; with cached prefixes, rounding depends on earlier prompts
    how |= {"distributed_executor_backend": "mp", "enable_prefix_caching": False}
    seen = {k: v for k, v in os.environ.items() if not k.startswith(OF_TORCHRUN)}
    if device.type == "cuda":
        visible = seen.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
        mine = visible.split(",")[device.index : device.index + recipe.tensor_parallel]
        seen["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    try:
        with patch.dict(os.environ, seen, clear=True):  # for the workers
            return load_vllm().LLM(name, **how, **more)
    except Exception as problem:  # vLLM raises many kinds
        fix = "lower --slots or --max-length, raise --tensor-parallel, or take --engine own"
        fail(f"vLLM cannot start with {name} ({str(problem)[:300]}): {fix}")


def sample(engine, prompts, eos, max_new_tokens, keys, temperature=1.0, top_p=1.0, logprobs=None):
    """An answer to each prompt: (ids, why they ended, their log-probabilities); see engines.sample.
    keys: one per prompt, as for uniforms. logprobs: 0 for the tokens' log-probabilities, at
    temperature 1; None for no log-probabilities. If a worker breaks down, one line says so."""
    how = {"temperature": temperature, "top_p": top_p, "top_k": 0, "max_tokens": max_new_tokens}
    how |= {"ignore_eos": True, "stop_token_ids": [*eos], "detokenize": False}
    seeds = [int(np.random.default_rng(key).integers(2**63)) for key in keys]
    vllm = load_vllm()
    params = [vllm.SamplingParams(**how, logprobs=logprobs, seed=seed) for seed in seeds]
    answers = []
    try:
        prompts = [{"prompt_token_ids": ids} for ids in prompts]
        for request in engine.generate(prompts, params, use_tqdm=False):
            (one,) = request.outputs
            finish = {"stop": "eos", "length": "length"}[one.finish_reason]
            logps = [logp.logprob for token in one.logprobs or () for logp in token.values()]
            answers.append(([*one.token_ids], finish, torch.tensor(logps)))
    except Exception as problem:
        fail(f"vLLM broke down ({problem!r:.200}): finished chunks were kept; run it again")
    return answers
