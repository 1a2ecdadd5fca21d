"""y' ~ p_θ(·|x): sampling whose random numbers belong to the prompt, not to the machine. Used by stages 1 and 3.

Each token of an answer costs one uniform number u in [0, 1), turned into a token by the inverse of the cumulative
distribution. The numbers come from a generator seeded with (seed, iteration, prompt id), so an answer does not depend
on its neighbours, the number of ranks, or how often the run was killed. What remains is floating-point noise: a
probability that differs in its last bits (another batch shape, thread count, GPU) turns a token over when u falls
between the two values, about once in 10^6 tokens in fp32, once in 10^2 to 10^3 in bf16; the distribution is the same.
An engine is one function, prompts as token ids -> (token ids, why they ended): see ENGINES at the end.
"""

import inspect
from types import SimpleNamespace

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import ContinuousBatchingConfig

from spin.files import fail


def uniforms(*key: int, number: int) -> np.ndarray:
    """`number` uniform numbers in [0, 1) that depend on the key (seed, iteration, prompt id, …) only. float64."""
    return np.random.default_rng(key).random(number)


def choose(
    logits: torch.Tensor, u: torch.Tensor | None, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """The first token whose cumulative probability exceeds u. logits (B, V), u (B,) float64 or None (greedy) -> (B,)."""
    if not logits.amax(-1).isfinite().all():
        fail(
            "the model's logits are NaN or infinite, though its weights are not: choose another model, or try --dtype fp32"
        )
    if u is None or temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature  # (B, V)
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    cdf = scores.softmax(-1).cumsum(
        -1, dtype=torch.float64
    )  # near 1, fp32 would swallow every token rarer than 6e-8
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[
        :, 0
    ]  # u < 1, so there is always such a token


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    eos: int,
    max_new_tokens: int,
    u: np.ndarray | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 64,
) -> list[tuple[list[int], str]]:
    """One answer to each prompt: (token ids, why it ended). Ids end with the EOS exactly when the reason is "eos".

    prompts: N lists of ids, of any length. u: (N, max_new_tokens) uniform numbers; None, or temperature 0, is greedy.
    slots: answers in progress at once. The model's generation_config is not asked: temperature 1 is p_θ and nothing else.
    """
    u = None if u is None else torch.as_tensor(u, device=model.device)
    loop = (
        decode_in_slots
        if keeps_every_key(model, max(map(len, prompts)) + max_new_tokens)
        else plain_generate
    )
    return [
        until(eos, row)
        for row in loop(model, prompts, eos, max_new_tokens, u, temperature, top_p, slots)
    ]


def until(eos: int, ids: list[int]) -> tuple[list[int], str]:
    return (ids[: ids.index(eos) + 1], "eos") if eos in ids else (ids, "length")


# ---- the loop of our own: a finished answer leaves its slot at once, and a waiting prompt takes it -----------------

REFILL = 8  # prompts enter when this fraction of the slots is free: a pass for one prompt takes as long as a step for all


class Slots(DynamicLayer):
    """The keys and values of one layer, (slots, heads, length, dim): an answer lies in its slot from column 0 on.

    `now` says what the running forward pass is about: `first` slot, `at` (b, T) columns to write, `width` columns to see.
    """

    def __init__(self, slots: int, length: int, now: SimpleNamespace):
        super().__init__()
        self.slots, self.length, self.now = slots, length, now

    def update(self, keys, values, *_, **__):  # (b, heads, T, dim) each
        if not self.is_initialized:
            self.keys, self.values = (
                x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (keys, values)
            )
            self.is_initialized = True
        rows = slice(self.now.first, self.now.first + len(keys))
        for mine, new in ((self.keys[rows], keys), (self.values[rows], values)):
            mine[torch.arange(len(new), device=new.device)[:, None], :, self.now.at] = (
                new.transpose(1, 2)
            )
        return self.keys[rows, :, : self.now.width], self.values[rows, :, : self.now.width]

    def get_seq_length(self) -> int:
        return self.now.width - self.now.at.shape[1]


def keeps_every_key(model, length: int) -> bool:
    """Whether each layer sees all earlier tokens of `length`, their order told by position_ids alone: what Slots can hold."""
    full = lambda layer: (
        type(layer) is DynamicLayer
        or (  # noqa: E731
            type(layer) is DynamicSlidingWindowLayer and length <= layer.sliding_window
        )
    )
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    return (
        all(map(full, DynamicCache(config=model.config).layers))
        and not model._is_stateful
        and "position_ids" in inspect.signature(model.forward).parameters
        and "'dynamic'" not in rope
        and "'longrope'" not in rope
    )  # their angles follow the longest row of the batch


def decode_in_slots(
    model, prompts, eos, max_new_tokens, u, temperature, top_p, slots
) -> list[list[int]]:
    """The ids sampled for each prompt. When a prompt enters and which slot it has depends on the arguments and the answers."""
    slots, length, now = (
        min(slots, len(prompts)),
        max(map(len, prompts)) + max_new_tokens,
        SimpleNamespace(),
    )
    cache = Cache(
        layers=[Slots(slots, length, now) for _ in DynamicCache(config=model.config).layers]
    )
    tokens = lambda rows: torch.tensor(rows, dtype=torch.long, device=model.device)  # noqa: E731

    def forward(
        ids, first, at, width
    ):  # ids, at: (b, T), tokens and their columns, which are their positions -> (b, V)
        now.first, now.at, now.width = first, at, width
        return model(
            input_ids=ids,
            attention_mask=torch.arange(width, device=model.device) <= at[:, -1:],
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    answers = torch.full((len(prompts), max_new_tokens), eos, device=model.device)
    start = tokens([len(p) - 1 for p in prompts])
    state, taken = (
        tokens([[], [], []]),
        0,
    )  # (3, n), the slots in use: prompt, its last token, that token's column
    while taken < len(prompts) or state.shape[1]:
        free = slots - state.shape[1]
        if free * REFILL >= slots and (new := prompts[taken : taken + free]):
            if (
                longest := max(map(len, new)) - 1
            ):  # all but the last token, which then goes the way of any other
                ids = tokens(
                    [p[:-1] + [0] * (longest + 1 - len(p)) for p in new]
                )  # the padding is written over later
                forward(
                    ids,
                    slots - free,
                    torch.arange(longest, device=model.device).expand_as(ids),
                    longest,
                )
            state = torch.cat(
                [state, tokens([[taken + i, p[-1], len(p) - 1] for i, p in enumerate(new)]).T], 1
            )
            taken += len(new)
        which, token, column = state
        step, width = column - start[which], int(column.max()) + 1
        logits = forward(token[:, None], 0, column[:, None], width)  # (n, V)
        answers[which, step] = token = choose(
            logits, None if u is None else u[which, step], temperature, top_p
        )
        done = (token == eos) | (step + 1 == max_new_tokens)
        state = torch.stack([which, token, column + 1])
        if done.any():  # the last slots in use move into those that fell free
            left = len(done) - int(done.sum())
            hole, mover = done[:left].nonzero()[:, 0], (~done[left:]).nonzero()[:, 0] + left
            for x in [
                x[:, :, :width] for layer in cache.layers for x in (layer.keys, layer.values)
            ] + [state.T]:
                x[hole] = x[mover]
            state = state[:, :left]
    return answers.tolist()


# ---- transformers' own loops ---------------------------------------------------------------------------------------


def plain_generate(
    model, prompts, eos, max_new_tokens, u, temperature, top_p, slots
) -> list[list[int]]:
    """The same by model.generate, in batches that wait for their longest answer: for caches that Slots cannot hold."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # transformers fills gaps from the model's
    answers = []
    for i in range(0, len(prompts), slots):
        batch = prompts[i : i + slots]
        length = max(map(len, batch))
        ids = torch.tensor(
            [[0] * (length - len(p)) + p for p in batch], device=model.device
        )  # (B, T), padded on the left
        mask = torch.tensor(
            [[0] * (length - len(p)) + [1] * len(p) for p in batch], device=model.device
        )

        def only_the_chosen(ids, scores):  # (B, V): the chosen token's score is 0, the others' −∞
            token = choose(
                scores,
                None if u is None else u[i : i + slots, ids.shape[1] - length],
                temperature,
                top_p,
            )
            return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)

        answers += model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([only_the_chosen]),
        )[:, length:].tolist()
    model.generation_config = own
    return answers


@torch.no_grad()
def paged(
    model, prompts, eos, max_new_tokens, u=None, temperature=1.0, top_p=1.0, slots=64
) -> list[tuple[list[int], str]]:
    """As `sample`, by transformers' generate_batch: continuous batching over a paged cache, with CUDA graphs on a GPU.

    It draws from torch's generator, seeded with the first of u: the distribution is p_θ's, the rows are not sample's.
    """
    greedy = u is None or temperature == 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        eos_token_id=eos,
        pad_token_id=eos,
        temperature=None if greedy else temperature,
        top_p=None if greedy else top_p,
        top_k=0,
    )
    sizes = dict(max_requests_per_batch=slots)
    if model.device.type != "cuda":  # else it would take all memory
        sizes.update(
            num_blocks=slots * -(-(max(map(len, prompts)) + max_new_tokens) // 256),
            max_batch_tokens=1024,
        )
    out = model.generate_batch(
        prompts,
        config,
        ContinuousBatchingConfig(seed=0 if greedy else int(u[0][0] * 2**31), **sizes),
    )
    if len(out) != len(prompts) or any(
        answer.error for answer in out.values()
    ):  # it only logs what went wrong
        raise RuntimeError("transformers' generate_batch lost answers: try --engine generate")
    return [until(eos, answer.generated_tokens) for answer in out.values()]


ENGINES = {"generate": sample, "paged": paged}
