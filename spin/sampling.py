"""y' ~ p_θ(·|x): sampling whose random numbers belong to the prompt, not to the machine.
Each token of an answer costs one uniform number in [0, 1), turned into a token by the inverse of
the cumulative distribution (pick_token in spin/slots.py). The numbers come from a generator seeded
with (seed, iteration, prompt id), so an answer does not depend on its neighbours, the number of
ranks, or how often the run was killed. What remains is floating-point noise: a probability that
differs in its last bits (another batch shape, thread count, GPU) turns a token over when the number
falls between the two values, about once in 10^6 tokens in fp32, once in 10^2 to 10^3 in bf16; the
distribution is the same."""

import math
from functools import partial

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig

from spin.slots import decode_in_slots, keeps_every_key, pick_token


def uniforms(*key: int, number: int) -> np.ndarray:
    """`number` uniform numbers in [0, 1), float64, of this key only: (seed, iteration, id, …)."""
    return np.random.default_rng(key).random(number)


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    eos: int,
    max_new_tokens: int,
    uniform: np.ndarray | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 64,
    engine: str = "auto",
) -> list[tuple[list[int], str]]:
    """One answer to each prompt: (token ids, why it ended), as cut_at_eos gives them.
    prompts: N lists of ids, of any length. uniform: (N, max_new_tokens) uniform numbers; None, or
    temperature 0, is greedy. slots: answers in progress at once. engine: "paged" is transformers'
    generate_batch, anything else the loop of our own or, where a model's layers forget, plain
    generate. The model's generation_config is not asked: temperature 1 is p_θ and nothing else."""
    if engine == "paged":
        decode = paged
    elif keeps_every_key(model, max(map(len, prompts)) + max_new_tokens):
        decode = decode_in_slots
    else:
        decode = plain_generate
    if uniform is not None:
        uniform = torch.as_tensor(uniform, device=model.device)
    rows = decode(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots)
    return [cut_at_eos(eos, ids) for ids in rows]


def cut_at_eos(eos: int, ids: list[int]) -> tuple[list[int], str]:
    """(ids, why they ended): they end with the EOS exactly when the reason is "eos"."""
    if eos in ids:
        return ids[: ids.index(eos) + 1], "eos"
    return ids, "length"


def plain_generate(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots):
    """The same by model.generate, in batches that wait for their longest answer.
    For models whose layers forget, which Slots cannot hold."""
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    config = GenerationConfig(do_sample=False, **ends)
    own = model.generation_config
    model.generation_config = GenerationConfig()  # transformers fills gaps from the model's
    answers = []
    for i in range(0, len(prompts), slots):
        batch = prompts[i : i + slots]
        numbers = None if uniform is None else uniform[i : i + slots]
        length = max(map(len, batch))
        padded = [[0] * (length - len(p)) + p for p in batch]
        real = [[0] * (length - len(p)) + [1] * len(p) for p in batch]
        ids, mask = torch.tensor([padded, real], device=model.device)  # (B, T), padded on the left
        picking = LogitsProcessorList([partial(_only_picked, numbers, length, temperature, top_p)])
        answers += model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=picking
        )[:, length:].tolist()
    model.generation_config = own
    return answers


def _only_picked(uniform, length: int, temperature, top_p, ids, scores):
    """Leaves generate no choice: the picked token's score is 0, the others' −∞. scores: (B, V)."""
    numbers = None if uniform is None else uniform[:, ids.shape[1] - length]
    token = pick_token(scores, numbers, temperature, top_p)
    return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)


def paged(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots):
    """The same by transformers' generate_batch: a paged cache, with CUDA graphs on a GPU.
    Draws from torch's generator, seeded with the first uniform number: from p_θ, but other rows."""
    greedy = uniform is None or temperature == 0
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    draws = {"temperature": None if greedy else temperature, "top_p": None if greedy else top_p}
    config = GenerationConfig(do_sample=not greedy, top_k=0, **ends, **draws)
    limits = {"max_requests_per_batch": slots}
    if model.device.type != "cuda":  # else it would take all memory
        pages = math.ceil((max(map(len, prompts)) + max_new_tokens) / 256)
        limits |= {"num_blocks": slots * pages, "max_batch_tokens": 1024}
    seed = 0 if greedy else int(uniform[0][0] * 2**31)
    found = model.generate_batch(prompts, config, ContinuousBatchingConfig(seed=seed, **limits))
    # it only logs what went wrong
    if len(found) != len(prompts) or any(answer.error for answer in found.values()):
        raise RuntimeError("transformers' generate_batch lost answers: try --engine generate")
    return [answer.generated_tokens for answer in found.values()]
