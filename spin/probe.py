"""Does a row's every sequence get the log-probabilities that it has alone? Asked of the model, on
this run's own device, dtype and attention, at the start of each stage that samples or scores.

A row is packed of sequences of random tokens: a short one, one of --max-length tokens, so that
windows and rotary limits come into play wherever the run's sequences reach them, a short one. Where
a pair's prompt will stand in a row once, a branch goes on from the first half of the long one, as
the generated answer goes on from the prompt.

(a) The row is scored twice, the second time with other tokens in the long one, behind the prompt if
    there is a branch. The other sequences' log-probabilities must have the same bits: nothing of a
    neighbour may get through, from before or from behind, nor of the real answer into the generated
    one. (Where tokens choose experts, these compute batches of another shape: then (b)'s
    tolerance.)
(b) Each sequence is scored alone too, by the model as transformers gives it. What rounding may do
    is measured, not guessed: every embedding is moved by one unit in its last place, so that all
    that is computed from it is rounded anew. Rounding differs between row and alone in the same
    places, so what is more than 8 times as far away is no rounding.

Compared are medians over stretches of 16 tokens: a fault such as a wrong window moves a stretch as
a whole; a token that chooses another expert by a hair is one alone.

The passes take 6 × --max-length tokens, padding not counted: no more than three micro-batches, each
of a pair of the longest.
"""

import contextlib

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig

from loss import sequence_logps, token_logps
from spin.files import fail
from spin.lora import add_adapters
from spin.models import (
    blocks_of,
    compute_dtype,
    name_of,
    refuse_missing_attention,
    refuse_moving_angles,
    without_weights,
)
from spin.packing import pack, packed

FACTOR = 8  # times the measured rounding; the models of tests/families.py stay below 1
STRETCH = 16  # tokens


def refuse_what_cannot_be_trained(name: str, recipe):
    """End with one line where no run can finish with a model, for the stages that come before
    train.py: by its config, and with --lora-rank by the names in its files."""
    revision = recipe.revision_of(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        refuse_missing_attention(config, recipe.attention)
        model = without_weights(config, None)
    except Exception as problem:
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")
    blocks_of(model, recompute=False)
    add_adapters(model, name, recipe, t=0)
    refuse_moving_angles(config, recipe.max_length)


@torch.no_grad()
def probe(model, recipe, world):
    """Refuse, in one line, a model that scores a sequence otherwise in a row than alone.
    model: whole or sharded; all ranks take part, with the same tokens."""
    refuse_moving_angles(model.config, recipe.max_length)
    before, middle, behind, other = random_sequences(model.config, recipe.max_length)
    with packed(model, recipe.attention) as way:
        half = len(middle) // 2 if way == "packed" else 0
        other = middle[:half] + other[half:]
        branches = [middle[:half] + other[:half:-1]] if half else []
        row = [before, middle, behind, *branches]
        in_row = packed_logps(model, row, half, world.device)
        beside_other = packed_logps(model, [before, other, *row[2:]], half, world.device)
    alone = []
    for ids, ours in zip(row, in_row, strict=True):
        alone.append(plain_logps(model, ids, world.device)[-len(ours) :])
    eps = torch.finfo(compute_dtype(recipe.dtype, world.device)).eps
    with moved_embeddings(model, eps):
        moved = plain_logps(model, before, world.device)
    if way == "rows" and world.rank == 0:
        price = "each sequence gets a padded row of its own, which needs more memory"
        print(f"{name_of(model)}: {price}")
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP2 leaves the root unsharded after a pass without gradient

    if not torch.cat(alone).isfinite().all():
        return  # sampling and scoring have a line of their own for that
    experts = "expert" in str(model.config.to_dict())
    # measured, and the last place of the numbers themselves, which a few tokens may hide
    rounding = largest(moved, alone[0]) + eps + torch.finfo(torch.float32).eps * -alone[1].min()
    # a choice of experts that turns over in one layer is felt a little by all later tokens
    tolerance = FACTOR * rounding + 1e-3 * experts
    for k in [k for k in range(len(row)) if k != 1]:
        same = torch.equal(in_row[k], beside_other[k])
        if not same and not (experts and largest(in_row[k], beside_other[k]) <= tolerance):
            moved_by = (in_row[k] - beside_other[k]).abs().max()
            refuse(model, recipe, f"other tokens in one move another by up to {moved_by:.1g} nats")
    for packed_one, alone_one in zip(in_row, alone, strict=True):
        off = largest(packed_one, alone_one)
        if not off <= tolerance:  # NaN too
            much = f"{off:.1g} nats a token, where rounding explains {rounding:.1g}"
            refuse(model, recipe, f"one differs from the same sequence alone by {much}")


def refuse(model, recipe, finding: str):
    """End with a line that names the finding and the remedy."""
    try_this = "auto" if recipe.attention == "eager" else "eager"
    mend = f"try --attention {try_this}, or another model"
    fail(f"{name_of(model)} cannot keep sequences in one row apart: {finding}; {mend}")


def random_sequences(config, longest: int) -> list[list[int]]:
    """A short sequence, the longest, a short one, and other tokens for the longest: none special.
    The same on every rank and in every run; no other random number of the run changes."""
    settings = config.get_text_config().to_dict() | config.to_dict()
    found = [value for name, value in settings.items() if name.endswith(("token_id", "index"))]
    special = {i for value in found for i in (value if isinstance(value, list) else [value])}
    usable = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    short = max(2, longest // 8)
    picked = np.random.default_rng(0).integers(len(usable), size=(4, longest))
    # another token in every place
    picked[3] = (picked[1] + 1 + picked[3] % (len(usable) - 1)) % len(usable)
    lengths = (short, longest, short, longest)
    return [[usable[i] for i in row[:n]] for row, n in zip(picked.tolist(), lengths, strict=True)]


def packed_logps(model, sequences: list[list[int]], shared: int, device) -> list[torch.Tensor]:
    """log p of each sequence's tokens from the second on, by the very call that trains. The fourth,
    if there is one, is a branch: its first `shared` tokens are the second's. These tokens are not
    looked at, so that there are no more logits than without a branch."""
    kept = []  # the model's output: sequence_logps gives sums, in which a small leak may vanish
    begins = [1, max(1, shared), 1, max(1, shared)][: len(sequences)]
    masks = [[0] * n + [1] * (len(ids) - n) for ids, n in zip(sequences, begins, strict=True)]
    prompts = [(0, 0), (1, 0), (2, 0), (1, shared)][: len(sequences)]
    row = pack(list(zip(sequences, masks, strict=True)), device, prompts)
    sequence_logps(lambda **inputs: kept.append(model(**inputs)) or kept[0], **row)
    return list(token_logps(kept[0].logits[0], row["labels"]).cpu().split(row["counts"]))


def plain_logps(model, ids: list[int], device) -> torch.Tensor:
    """The same of one sequence alone: what transformers does, and nothing of ours."""
    row = torch.tensor([ids], device=device)
    return token_logps(model(input_ids=row, use_cache=False).logits[0, :-1], row[0, 1:]).cpu()


@contextlib.contextmanager
def moved_embeddings(model, eps: float):
    """Inside the `with`, embeddings differ by one unit in the last place, upward and downward."""

    def move(module, inputs, output):
        signs = torch.ones_like(output)
        signs[..., ::2] = -1
        return output * (1 + eps * signs)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest median of |a − b| in a stretch of tokens. a, b: (T,)."""
    off = (a - b).abs()
    stretches = off.tensor_split(max(1, len(off) // STRETCH))
    return max((stretch.median() for stretch in stretches), key=lambda x: x.nan_to_num(1e9)).item()
