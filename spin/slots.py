"""A decode loop that never waits for the longest answer, and how a uniform number becomes a token.
A finished answer leaves its slot at once, and a waiting prompt takes it."""

import inspect

import torch
from transformers import TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spin.files import fail

# prompts enter when an eighth of the slots is free: a pass for one takes as long as a step for all
REFILL = 8


def pick_token(logits, uniform, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """The first token whose cumulative probability exceeds the uniform number: y_j ~ p_θ.
    logits (B, V); uniform (B,) in float64, or None for greedy. Returns (B,)."""
    if not logits.amax(-1).isfinite().all():
        mend = "choose another model, or try --dtype fp32"
        fail(f"the model's logits are NaN or infinite, though its weights are not: {mend}")
    if uniform is None or temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature  # (B, V)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    # float64: near 1, adding less than 6e-8 would not change an fp32 sum: rare tokens were lost
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # times the total, which rounding leaves off 1: some token always exceeds it
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


class Slots(DynamicLayer):
    """The keys and values of one layer: prompt, then answer, in its slot from column 0 on.
    transformers fixes update's arguments: forward_in_slots sets first, columns, width before."""

    def __init__(self, slots: int, length: int, layers: int):
        super().__init__()
        self.slots = slots
        self.length = length
        self.layers = layers  # from this one on

    def update(self, keys, values, *_, **__):  # (b, heads, T, dim) each
        if not self.is_initialized:
            self.refuse_too_many(keys, values)
            self.keys, self.values = (
                x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (keys, values)
            )
            self.is_initialized = True
        rows = slice(self.first, self.first + len(keys))
        each = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[rows][each, :, self.columns] = keys.transpose(1, 2)
        self.values[rows][each, :, self.columns] = values.transpose(1, 2)
        return self.keys[rows, :, : self.width], self.values[rows, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width - self.columns.shape[1]

    def refuse_too_many(self, keys, values):
        """End with one line where the slots of this layer and the later ones do not fit on the GPU.
        keys, values: as this layer has them, (b, heads, T, dim)."""
        token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (keys, values))  # bytes
        a_slot = token * self.length * self.layers
        free = free_bytes(keys.device)
        fits = 0.9 * free // a_slot  # a tenth is left for the pass itself
        if fits < self.slots:
            needs = f"{self.slots * a_slot / 1e9:.1f} GB for keys and values"
            mend = f"--slots {fits:.0f} fits"
            if not fits:
                mend = "lower --max-new-tokens, or take shorter prompts"
            fail(f"--slots {self.slots} needs {needs}, and {free / 1e9:.1f} GB are free: {mend}")


def free_bytes(device) -> float:
    """What a GPU has left, with what torch holds in reserve; of host memory nothing is known."""
    if device.type != "cuda":
        return torch.inf
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def keeps_every_key(model, length: int) -> bool:
    """What Slots can hold: each layer sees all of `length`, and position_ids tell the order."""
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


def forward_in_slots(model, cache, ids, first: int, columns, width: int) -> torch.Tensor:
    """One pass for tokens whose columns are their positions. ids, columns: (b, T) → (b, V)."""
    for layer in cache.layers:
        layer.first = first  # slot
        layer.columns = columns  # (b, T), those to write
        layer.width = width  # of the columns to see
    seen = torch.arange(width, device=ids.device) <= columns[:, -1:]
    return model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=columns,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def enter(model, cache, prompts: list[list[int]], first: int):
    """Write the keys and values of new prompts into the slots from `first` on, without each
    prompt's last token: the loop feeds that one, as it feeds every sampled token."""
    longest = max(map(len, prompts)) - 1
    if longest:
        # the padding is written over later
        padded = [p[:-1] + [0] * (longest + 1 - len(p)) for p in prompts]
        ids = torch.tensor(padded, dtype=torch.long, device=model.device)
        columns = torch.arange(longest, device=model.device).expand_as(ids)
        forward_in_slots(model, cache, ids, first, columns, longest)


def close_gaps(cache, state, done, width: int):
    """The last slots in use move into those that fell free. state (3, n) → (3, n still in use)."""
    left = len(done) - int(done.sum())
    hole = done[:left].nonzero()[:, 0]
    mover = (~done[left:]).nonzero()[:, 0] + left
    for layer in cache.layers:
        layer.keys[hole, :, :width] = layer.keys[mover, :, :width]
        layer.values[hole, :, :width] = layer.values[mover, :, :width]
    state[:, hole] = state[:, mover]
    return state[:, :left]


def decode_in_slots(model, prompts, eos, max_new_tokens, uniform, temperature, top_p, slots):
    """max_new_tokens ids for each prompt: those sampled, then EOS to fill the row.
    When a prompt enters and which slot it has depends on the arguments and the answers only."""
    slots = min(slots, len(prompts))
    length = max(map(len, prompts)) + max_new_tokens
    number = len(DynamicCache(config=model.config).layers)
    layers = [Slots(slots, length, number - i) for i in range(number)]
    cache = Cache(layers=layers)
    answers = torch.full((len(prompts), max_new_tokens), eos, device=model.device)
    start = torch.tensor([len(p) - 1 for p in prompts], device=model.device)
    # (3, n), the slots in use: which prompt, its last token, that token's column
    state = torch.empty(3, 0, dtype=torch.long, device=model.device)
    taken = 0
    while taken < len(prompts) or state.shape[1]:
        # waiting prompts take the free slots
        free = slots - state.shape[1]
        new = prompts[taken : taken + free] if free * REFILL >= slots else []
        if new:
            enter(model, cache, new, slots - free)
            rows = [[taken + i, p[-1], len(p) - 1] for i, p in enumerate(new)]
            state = torch.cat([state, torch.tensor(rows, device=model.device).T], 1)
            taken += len(new)

        # one token for every answer in progress
        which, token, column = state
        step = column - start[which]
        width = int(column.max()) + 1
        logits = forward_in_slots(model, cache, token[:, None], 0, column[:, None], width)  # (n, V)
        numbers = None if uniform is None else uniform[which, step]
        token = pick_token(logits, numbers, temperature, top_p)
        answers[which, step] = token

        # finished answers leave
        done = (token == eos) | (step + 1 == max_new_tokens)
        state = torch.stack([which, token, column + 1])
        if done.any():
            state = close_gaps(cache, state, done, width)
    return answers.tolist()
