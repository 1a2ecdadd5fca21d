"""y' ~ p_θ(·|x): sampling whose random numbers belong to the prompt, not to the machine. Used by stages 1 and 3.

Each token of an answer costs one uniform number u in [0, 1), turned into a token by the inverse of the cumulative
distribution. The numbers come from a generator seeded with (seed, iteration, prompt id), so an answer does not depend
on its neighbours, the number of ranks, or how often the run was killed. What remains is floating-point noise: a
probability that differs in its last bits (another batch shape, thread count, GPU) turns a token over when u falls
between the two values, about once in 10^6 tokens in fp32, once in 10^2 to 10^3 in bf16; the distribution is the same.
"""

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


def uniforms(*key: int, number: int) -> np.ndarray:
    """`number` uniform numbers in [0, 1) that depend on the key (seed, iteration, prompt id, …) only. float64."""
    return np.random.default_rng(key).random(number)


class InverseCDF(LogitsProcessor):
    """Leaves one token of each row: the first whose cumulative probability exceeds the row's uniform number."""

    def __init__(self, u: torch.Tensor, prompt_length: int, temperature: float, top_p: float):
        self.u, self.prompt_length, self.temperature = u, prompt_length, temperature  # u: (B, max_new_tokens)
        self.warp = TopPLogitsWarper(top_p) if top_p < 1 else lambda ids, scores: scores

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        scores = self.warp(input_ids, scores.float() / self.temperature)  # (B, V)
        cdf = scores.softmax(-1).double().cumsum(-1)
        u = self.u[:, step, None]
        token = (cdf <= u * cdf[:, -1:]).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token.clamp(max=scores.shape[-1] - 1), 0.0)


@torch.no_grad()
def sample(model, prompts: list[list[int]], eos: int, max_new_tokens: int, u: np.ndarray | None = None,
           temperature: float = 1.0, top_p: float = 1.0) -> list[tuple[list[int], str]]:
    """One answer to each prompt: (token ids, why it ended). Ids end with the EOS exactly when the reason is "eos".

    prompts: B lists of ids. u: (B, max_new_tokens) uniform numbers; None, or temperature 0, is greedy.
    The model's own generation_config is not asked: temperature 1 means p_θ and nothing else.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=model.device)  # (B, T), padded on the left
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    processors = LogitsProcessorList()
    if u is not None and temperature > 0:
        processors.append(InverseCDF(torch.as_tensor(u, device=model.device), length, temperature, top_p))
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    own, model.generation_config = model.generation_config, GenerationConfig()  # transformers fills gaps from the model's
    try:
        out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    finally:
        model.generation_config = own
    answers = []
    for row in out[:, length:].tolist():
        ended = eos in row
        answers.append((row[:row.index(eos) + 1] if ended else row, "eos" if ended else "length"))
    return answers
