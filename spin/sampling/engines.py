"""y' ~ p_θ(·|x): sampling whose random numbers belong to the prompt, not to the machine.

Each token of an answer costs one uniform number in [0, 1). pick_token in spin/sampling/slots.py
turns it into a token by the inverse of the cumulative distribution. A prompt's numbers come from a
generator seeded with (seed, iteration, prompt id). So an answer does not depend on its neighbours,
on the number of ranks, or on how often the run was killed.

What remains is rounding. Another batch shape, thread count or GPU changes a probability in its last
bits, and where the uniform number falls between the two values, another token is drawn: about once
in 10^6 tokens in fp32, once in 10^2 to 10^3 in bf16. The distribution is the same.
"""

from functools import partial

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList

from spin.files import fail
from spin.sampling.slots import decode_in_slots, keeps_every_key, pick_token


def uniforms(*key: int, number: int) -> np.ndarray:
    """`number` uniform numbers in [0, 1), float64, of this key alone."""
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
) -> list[tuple[list[int], str]]:
    """One answer to each prompt: (token ids, why it ended), as cut_at_eos gives them.

    prompts: N lists of ids, of any length. uniform: (N, max_new_tokens) uniform numbers; None, or
    temperature 0, is greedy. slots: answers in progress at once. Our own loop samples; a model
    whose cache it cannot hold (a state space, a short sliding window) uses model.generate. The
    model's generation_config is not asked: temperature 1 is p_θ and nothing else."""
    longest = max(map(len, prompts)) + max_new_tokens
    decode = decode_in_slots if keeps_every_key(model, longest) else plain_generate
    if uniform is not None:
        uniform = torch.as_tensor(uniform, device=model.device)
    try:
        rows = decode(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots)
    except torch.OutOfMemoryError:
        fail(f"the GPU's memory is too small for --slots {slots}: lower it, or --max-new-tokens")
    return [cut_at_eos(eos, ids) for ids in rows]


def cut_at_eos(eos: int, ids: list[int]) -> tuple[list[int], str]:
    """(ids, why they ended): they end with the EOS exactly when the reason is "eos"."""
    if eos in ids:
        return ids[: ids.index(eos) + 1], "eos"
    return ids, "length"


def plain_generate(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots):
    """What decode_in_slots does, by model.generate: a batch waits for its longest answer."""
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
