"""A decode loop that never waits for the longest answer, and how a uniform number becomes a token.

A slot is a row of the cache of keys and values. A finished answer leaves its slot at once, and a
waiting prompt takes it.
"""

import inspect

import torch
from transformers import TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spin.files import fail

# Prompts enter when at least 1/8 of the slots are empty: a prefill costs about as much as a decode
# step, however few prompts are in it.
REFILL = 8
PREFILL = 2**14  # tokens of a prefill, about: its memory grows with them


def pick_token(logits, uniform, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """The first token whose cumulative probability exceeds the uniform number: y_j ~ p_θ.

    logits: (B, V). uniform: (B,) in float64, or None for greedy. Returns (B,)."""
    if not logits.amax(-1).isfinite().all():
        fix = "choose another model, or try --dtype fp32"
        fail(f"the model's logits are NaN or infinite, though its weights are not: {fix}")
    if uniform is None or temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature  # (B, V)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    # float64: near 1 an fp32 sum ignores terms below 6e-8, so rare tokens would never be drawn
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # scale the number by the last sum, which rounding may leave slightly off 1
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


def keeps_every_key(model, length: int) -> bool:
    """Whether Slots fits a model: each layer sees `length` tokens, in the order of position_ids."""
    if model._is_stateful:
        return False
    for layer in DynamicCache(config=model.config).layers:
        wide = type(layer) is DynamicSlidingWindowLayer and length <= layer.sliding_window
        if not wide and type(layer) is not DynamicLayer:
            return False
    # 'dynamic' and 'longrope' compute their angles from the longest row of the batch
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    fixed = "'dynamic'" not in rope and "'longrope'" not in rope
    return fixed and "position_ids" in inspect.signature(model.forward).parameters


class Slots(DynamicLayer):
    """The keys and values of one layer: prompt, then answer, in its slot from column 0 on.

    transformers prescribes the arguments of update. So before every pass forward_in_slots sets the
    attributes `first`, `columns`, `width` and `each`."""

    def __init__(self, slots: int, length: int):
        super().__init__()
        self.slots = slots
        self.length = length

    def update(self, keys, values, *_, **__):  # (b, heads, T, dim) each
        if not self.is_initialized:
            self.keys, self.values = (
                x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (keys, values)
            )
            self.is_initialized = True
        rows = slice(self.first, self.first + len(keys))
        self.keys[rows][self.each, :, self.columns] = keys.transpose(1, 2)
        self.values[rows][self.each, :, self.columns] = values.transpose(1, 2)
        return self.keys[rows, :, : self.width], self.values[rows, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width - self.columns.shape[1]


def forward_in_slots(model, cache, ids, first: int, columns, width: int) -> torch.Tensor:
    """One pass for the slots from `first` on. ids, columns: (b, T) → logits of the last, (b, V).

    A token's column in its slot is its position. width: how many columns attention looks at."""
    each = torch.arange(len(ids), device=ids.device)[:, None]
    for layer in cache.layers:
        layer.first = first
        layer.columns = columns
        layer.width = width
        layer.each = each
    seen = torch.arange(width, device=ids.device) <= columns[:, -1:]
    return model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=columns,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def prefill(model, cache, prompts: list[list[int]], first: int):
    """Write the keys and values of new prompts into the slots from `first` on.

    A prompt's last token is left out: the loop feeds it, as it feeds every sampled token."""
    longest = max(map(len, prompts)) - 1
    together = max(1, PREFILL // max(1, longest))
    for i in range(0, len(prompts) if longest else 0, together):
        # answers overwrite the padding later
        padded = [p[:-1] + [0] * (longest + 1 - len(p)) for p in prompts[i : i + together]]
        ids = torch.tensor(padded, dtype=torch.long, device=model.device)
        columns = torch.arange(longest, device=model.device).expand_as(ids)
        forward_in_slots(model, cache, ids, first + i, columns, longest)


def close_gaps(cache, state, done, width: int):
    """The answers in the last slots move into the slots of finished ones, so that no gap is left.

    state: (3, n), done: (n,) → state of the answers still in progress."""
    left = len(done) - int(done.sum())
    empty = done[:left].nonzero()[:, 0]
    last = (~done[left:]).nonzero()[:, 0] + left
    for layer in cache.layers:
        layer.keys[empty, :, :width] = layer.keys[last, :, :width]
        layer.values[empty, :, :width] = layer.values[last, :, :width]
    state[:, empty] = state[:, last]
    return state[:, :left]


def decode_in_slots(model, prompts, eos, max_new_tokens, pick, slots):
    """max_new_tokens ids for each prompt: those of pick (see engines.sample), then EOS to fill up.

    When a prompt enters and which slot it has depends on the arguments and the answers only."""
    slots = min(slots, len(prompts))
    length = max(map(len, prompts)) + max_new_tokens
    layers = DynamicCache(config=model.config).layers
    cache = Cache(layers=[Slots(slots, length) for _ in layers])
    answers = torch.full((len(prompts), max_new_tokens), eos[0], device=model.device)
    ends = torch.tensor(eos, device=model.device)
    start = torch.tensor([len(p) - 1 for p in prompts], device=model.device)
    # (3, n), for each of the n answers in progress, in slots 0 to n − 1:
    # the index of its prompt, the token to feed next, and that token's column
    state = torch.empty(3, 0, dtype=torch.long, device=model.device)
    entered = 0  # prompts so far
    while entered < len(prompts) or state.shape[1]:
        # 1. Waiting prompts enter the empty slots.
        empty = slots - state.shape[1]
        new = prompts[entered : entered + empty] if empty * REFILL >= slots else []
        if new:
            prefill(model, cache, new, slots - empty)
            rows = [[entered + i, p[-1], len(p) - 1] for i, p in enumerate(new)]
            state = torch.cat([state, torch.tensor(rows, device=model.device).T], 1)
            entered += len(new)

        # 2. Each answer in progress gets a token.
        which, token, column = state
        step = column - start[which]
        width = int(column.max()) + 1
        logits = forward_in_slots(model, cache, token[:, None], 0, column[:, None], width)  # (n, V)
        token = pick(logits, which, step)
        answers[which, step] = token

        # 3. Finished answers leave their slots.
        done = torch.isin(token, ends) | (step + 1 == max_new_tokens)
        state = torch.stack([which, token, column + 1])
        if done.any():
            state = close_gaps(cache, state, done, width)
    return answers.tolist()
