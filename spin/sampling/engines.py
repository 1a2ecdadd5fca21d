"""y' ~ p_θ(·|x): sampling whose random numbers belong to the prompt, not to the machine.

Each token of an answer costs one uniform number in [0, 1). pick_token in spin/sampling/slots.py
turns it into a token by the inverse of the cumulative distribution. A prompt's numbers come from a
generator seeded with (seed, iteration, prompt id). So the numbers do not depend on an answer's
neighbours, on the number of ranks, or on how often the run was killed.

The probabilities do change, by rounding alone. Another batch shape, thread count or GPU changes a
probability in its last bits. Where the uniform number falls between the two values, another token
is drawn: about once in 10^6 tokens in fp32, once in 10^2 to 10^3 in bf16. The distribution is the
same.
"""

from collections.abc import Sequence
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
    eos: int | Sequence[int],
    max_new_tokens: int,
    uniform: np.ndarray | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 64,
    pick=None,
) -> list[tuple[list[int], str]]:
    """One answer to each prompt: (token ids, why it ended), as cut_at_eos gives them.

    prompts: N lists of ids, of any length. eos: the id that ends an answer, or several. uniform:
    (N, max_new_tokens) uniform numbers; None, or temperature 0, is greedy. slots: answers in
    progress at once. pick: gives the tokens instead, from (logits (n, V), which prompt (n,), which
    token of its answer (n,)). The decode loop is the choice of
    check_sampling in spin/model/, else the first of `ways`.
    The model's generation_config is ignored: temperature 1 is p_θ and nothing else."""
    eos = [eos] if isinstance(eos, int) else [*eos]
    longest = max(map(len, prompts)) + max_new_tokens
    decode = getattr(model, "decode_loop", None) or ways(model, longest)[0]
    if uniform is not None:
        uniform = torch.as_tensor(uniform, device=model.device)

    def by_number(logits, which, step):
        numbers = None if uniform is None else uniform[which, step]
        return pick_token(logits, numbers, temperature, top_p)

    try:
        rows = decode(model, prompts, eos, max_new_tokens, pick or by_number, slots)
    except torch.OutOfMemoryError:
        fail(f"the GPU's memory is too small for --slots {slots}: lower it, or --max-new-tokens")
    return [cut_at_eos(eos, ids) for ids in rows]


def ways(model, longest: int) -> list:
    """The decode loops for a model, the fastest first. Our own comes first, unless it cannot hold
    the model's cache: a state space, a sliding window of less than `longest`."""
    if keeps_every_key(model, longest):
        return [decode_in_slots, plain_generate]
    return [plain_generate]


def cut_at_eos(eos: Sequence[int], ids: list[int]) -> tuple[list[int], str]:
    """(ids, why they ended): they end with one of eos exactly when the reason is "eos"."""
    for place, token in enumerate(ids, 1):
        if token in eos:
            return ids[:place], "eos"
    return ids, "length"


def plain_generate(model, prompts, eos, max_new_tokens, pick, slots):
    """What decode_in_slots does, by model.generate: a batch waits for its longest answer."""
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": [*eos], "pad_token_id": eos[0]}
    config = GenerationConfig(do_sample=False, **ends)
    own = model.generation_config
    model.generation_config = GenerationConfig()  # transformers fills gaps from the model's
    answers = []
    for i in range(0, len(prompts), slots):
        batch = prompts[i : i + slots]
        which = torch.arange(i, i + len(batch), device=model.device)
        length = max(map(len, batch))
        padded = [[0] * (length - len(p)) + p for p in batch]
        real = [[0] * (length - len(p)) + [1] * len(p) for p in batch]
        ids, mask = torch.tensor([padded, real], device=model.device)  # (B, T), padded on the left
        picking = LogitsProcessorList([partial(_only_picked, pick, which, length)])
        answers += model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=picking
        )[:, length:].tolist()
    model.generation_config = own
    return answers


def _only_picked(pick, which, length: int, ids, scores):
    """Leaves generate no choice: the picked token's score is 0, the others' −∞. scores: (B, V)."""
    token = pick(scores, which, torch.full_like(which, ids.shape[1] - length))
    return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)
