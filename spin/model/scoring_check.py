"""A check of the model at the start of each stage: are its log-probabilities in a micro-batch those
that each sequence has alone? It runs on this run's own device, dtype and attention.

The micro-batch holds a short sequence of random tokens, one of --max-length tokens, and a shorter
one. In a packed row, a fourth branches off after the first half of the long one, as a generated
answer after its prompt.

(a) Nothing leaks. If the long sequence's tokens change (after the branch's prompt), the remaining
    sequences must keep their values bit by bit. In mixtures of experts, (b)'s tolerance holds.
(b) Nothing is missing. Alone, in plain transformers, each sequence has the same log-probabilities
    but for rounding, which is measured: every embedding is moved by one unit in its last place. A
    difference of more than 8 times this cannot be rounding.

It compares medians over stretches of 16 tokens, which a wrong window moves, and the mean, which
single wrong tokens move. A single token that just tips to another expert is not a fault."""

import re

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from loss import sequence_logps, token_logps
from spin.files import fail
from spin.model import lora
from spin.model.attention import flash_attn_loads
from spin.model.packing import pack, packed
from spin.model.weights import blocks_of, compute_dtype, load_empty, name_of


def refuse_what_cannot_be_trained(name: str, recipe):
    """End with one line, before any sampling, if train.py would refuse this model later."""
    model = load_empty(name, recipe)
    blocks_of(model, recompute=False)
    if recipe.lora_rank:
        lora.inject_adapters(model, name, recipe)
    refuse_moving_angles(model.config, recipe.max_length)


def refuse_moving_angles(config, longest: int):
    """Refuse lengths at which the longest sequence of a pass changes the rotary angles of all. The
    kind 'dynamic' changes them beyond the model's positions, which load_renderer refuses."""
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))
    limit = re.search(r"'original_max_position_embeddings': (\d+)", rope)
    if "'longrope'" in rope and longest > int(limit[1]):
        beyond = f"beyond {limit[1]} positions this model's rotary angles (longrope) change"
        fail(f"--max-length {longest}: {beyond} for all sequences; lower it to {limit[1]}")


@torch.no_grad()
def check_scoring(model, recipe, world):
    """Refuse, in one line, a model that scores a sequence otherwise in a micro-batch than alone.
    model: whole or sharded; all ranks take part, with the same tokens."""
    refuse_moving_angles(model.config, recipe.max_length)
    half = compute_dtype(recipe.dtype, world.device) is torch.bfloat16
    if recipe.attention == "flash_attention_2" and not (half and flash_attn_loads()):
        needed = "a GPU, bf16 and the package flash-attn"
        fail(f"--attention flash_attention_2 needs {needed}: use --attention auto")
    before, long, behind, other = random_sequences(model.config, recipe.max_length)
    long_alone = logps_alone(model, long, world.device)  # first: it refuses what is too long
    with packed(model, recipe.attention, world.device) as method:
        row = [before, long, behind]
        prompt = 1  # tokens of the long sequence that are not scored
        if method == "packed":
            prompt = len(long) // 2  # which the branch shares; its own tokens are other's, reversed
            other = long[:prompt] + other[prompt:]
            row[2:] = behind[: len(before)], long[:prompt] + other[:prompt:-1]
        together = logps_together(model, row, prompt, world.device)
        beside_other = logps_together(model, [before, other, *row[2:]], prompt, world.device)
    alone = [logps_alone(model, ids, world.device) for ids in row if ids is not long]
    alone.insert(1, long_alone)
    experts, rounding, tolerance = tolerated(model, recipe, world, [long], [long_alone])
    if method == "padded" and world.rank == 0:
        print(f"{name_of(model)}: padded batches, which need more time and memory than packed rows")
    if isinstance(model, FSDPModule):
        model.reshard()  # after a pass without gradient FSDP2 keeps the root's weights gathered
    if not torch.cat(alone).isfinite().all():
        return  # sampling and scoring refuse that, with error messages of their own

    apart = f"{name_of(model)} cannot keep sequences apart"
    fix = "try another --attention, or another model"
    for k, (in_row, other) in enumerate(zip(together, beside_other, strict=True)):
        leak = (in_row - other).abs().max()
        if k != 1 and leak != 0 and not (experts and largest(in_row, other) <= tolerance):
            fail(f"{apart}: changing one moves another's log p by up to {leak:.1g} nats; {fix}")
    for in_row, by_itself in zip(together, alone, strict=True):
        off = largest(in_row, by_itself[-len(in_row) :])
        if not off <= tolerance:  # NaN too
            much = f"{off:.1g} nats per token, where rounding explains {rounding:.1g}"
            fail(f"{apart}: one differs from the same sequence alone by {much}; {fix}")


def tolerated(model, recipe, world, sequences, alone) -> tuple[bool, float, float]:
    """Returns whether tokens choose experts, how far rounding moves log-probabilities (in nats per
    token), and the largest difference that is tolerated. alone: the sequences' logps_alone."""
    experts = bool(re.search("expert|moe", str(model).lower()))
    eps = torch.finfo(compute_dtype(recipe.dtype, world.device)).eps
    moved = [logps_alone(model, ids, world.device, eps) for ids in sequences]
    # what is measured, and on top the last place of the log-probabilities themselves
    rounding = max(map(largest, moved, alone)) + eps
    rounding -= torch.finfo(torch.float32).eps * torch.cat(alone).min().item()
    # if one layer chooses another expert, all later tokens feel it a little
    return experts, rounding, 8 * rounding + 1e-3 * experts


def random_sequences(config, longest: int) -> list[list[int]]:
    """A short sequence, the longest, a shorter one, and another token in each place of the longest.
    The same on every rank; no other random number of the run changes."""
    settings = config.get_text_config().to_dict() | config.to_dict()
    special = [x for name, x in settings.items() if name.endswith(("token_id", "index"))]
    special = np.hstack([-1, *(x for x in special if x is not None)])
    usable = np.setdiff1d(range(config.get_text_config().vocab_size), special)
    picked = np.random.default_rng(0).integers(len(usable), size=(3, longest))
    before, long, behind = usable[picked].tolist()
    other = usable[(picked[1] + 1) % len(usable)].tolist()
    short = max(2, longest // 8)
    return [before[:short], long, behind[: longest - longest // 8], other]


def logps_together(model, sequences: list[list[int]], prompt: int, device) -> list[torch.Tensor]:
    """log p of each token in one micro-batch; not the sums, in which a small leak may vanish. The
    fourth sequence, if there is one, shares its first `prompt` tokens with the second."""
    masked = []
    for ids, skip in zip(sequences, (1, prompt, 1, prompt), strict=False):
        masked.append((ids, [0] * skip + [1] * (len(ids) - skip)))
    shared = [(0, 0), (1, 0), (2, 0), (1, prompt)][: len(sequences)]
    row = pack(masked, device, shared)
    counts = row["counts"]
    row["counts"] = [1] * sum(counts)
    return list(sequence_logps(model, **row).cpu().split(counts))


def logps_alone(model, ids: list[int], device, moved: float = 0.0) -> torch.Tensor:
    """log p of a sequence's tokens from the second on, in plain transformers. moved: the entries of
    the embeddings are multiplied by 1 − moved and 1 + moved in turn."""

    def move(module, inputs, output):
        signs = torch.ones_like(output)
        signs[..., ::2] = -1
        return output * (1 + moved * signs)

    row = torch.tensor([ids], device=device)
    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "out of bounds" not in str(problem):
            raise  # out of memory, or another rank is lost
        why = f"{type(problem).__name__}: {str(problem)[:200]}"
        fail(f"{name_of(model)} cannot score {len(ids)} tokens ({why}): choose another model")
    finally:
        hook.remove()
    return token_logps(logits, row[0, 1:]).cpu()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest median of |a − b| in a stretch of tokens, or their mean over all. a, b: (T,)."""
    off = (a - b).abs()
    stretches = off.tensor_split(max(1, len(off) // 16))
    return torch.stack([off.mean(), *(stretch.median() for stretch in stretches)]).max().item()
