"""Figures of a model, prompt by prompt, on held-out pairs. Used by evaluate.py and compare.py.
Two kinds: what the model makes of the human answers (their probability, its greedy answer, a sample
of its own), and its game of Eq. (4.7) against an opponent, on prompts that were never trained on.
Each rank takes its share of the prompts and holds one model at a time."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from loss import sequence_logps, spin_margin
from spin.codec import Codec, load_codec
from spin.distributed import sum_over_ranks
from spin.intervals import COLUMNS
from spin.models import load_frozen
from spin.packing import balanced_bins, pack, packed
from spin.probe import probe
from spin.run import SHOWN
from spin.sampling import sample, uniforms
from spin.selection import select
from spin.sources import read_rows
from spin.tokens import decode, encode


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs as one model's tokenizer sees them."""

    pairs: list[dict]  # as selection.select gives them, with "real_tokens": y's ids and mask
    codec: Codec
    counts: dict  # of the rows that were left out, by reason


def read_held_out(model_name: str, recipe) -> HeldOut:
    """The held-out pairs of the recipe, in the tokens of this model."""
    codec = load_codec(model_name, recipe)
    rows = read_rows(recipe.eval_data, recipe.eval_split)
    pairs, counts = select(rows, recipe.eval_data, codec, recipe, recipe.eval_prompts)
    for pair in pairs:
        real = encode(codec, pair, pair["real"], recipe.max_length)
        pair["real_tokens"] = real
    return HeldOut(pairs, codec, counts)


def same_tokens(a: HeldOut, b: HeldOut) -> bool:
    """Whether two models see the same held-out pairs in the same tokens."""
    return [p["real_tokens"] for p in a.pairs] == [p["real_tokens"] for p in b.pairs]


@torch.no_grad()
def figures_by_prompt(policy: str, opponent: str | None, held_out: HeldOut, recipe, t: int, world):
    """(N, columns) on every rank, a row of COLUMNS a pair; and on rank 0 the rows of answers.jsonl.
    t: the iteration of the game, which names its λ and the random numbers of y'."""
    pairs = held_out.pairs
    codec = held_out.codec
    # longest first, and dealt out in turn, so that all ranks have as much to do
    order = [(-len(pair["real_tokens"][0]), pair["id"], i) for i, pair in enumerate(pairs)]
    mine = [i for *_, i in sorted(order)][world.rank :: world.size]
    starts = range(0, len(mine), recipe.chunk)
    chunks = [[pairs[i] for i in mine[k : k + recipe.chunk]] for k in starts]
    total = len(chunks) * (2 if opponent else 1)
    bar = tqdm(total=total, desc="evaluate", unit="chunk", disable=world.rank > 0, delay=1e-9)
    # the opponent first: when it has answered and scored, it leaves the memory to the policy
    games = [None] * len(chunks)
    if opponent:
        games = opponent_plays(opponent, chunks, codec, recipe, t, world, bar)
    model = load_probed(policy, recipe, world, bar)
    rows = []
    for chunk, game in zip(chunks, games, strict=True):
        rows += figures_of_chunk(model, codec, chunk, game, recipe, t)
        bar.update()
    shown = answers_in_words(model, codec, pairs[:SHOWN], recipe, t + 1) if world.rank == 0 else []
    table = torch.zeros(len(pairs), len(COLUMNS), dtype=torch.float64)
    table[mine] = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(COLUMNS))
    return sum_over_ranks(table).numpy(), shown  # each row was filled by one rank


def load_probed(name: str, recipe, world, bar):
    """A model to score with; the bar is drawn only then, for a refusal has a line of its own."""
    model = load_frozen(name, recipe, world)
    probe(model, recipe, world)
    bar.refresh()
    return model


def opponent_plays(opponent: str, chunks, codec, recipe, t: int, world, bar) -> list[tuple]:
    """The opponent's game with each chunk of B pairs: its answers y' ~ p_θt, as (ids, mask) each,
    log p_θt(y|x) (B,) and log p_θt(y'|x) (B,)."""
    model = load_probed(opponent, recipe, world, bar)
    played = []
    for chunk in chunks:
        answers = zip(chunk, sample_answers(model, codec, chunk, recipe, t), strict=True)
        generated = [encode(codec, pair, ids) for pair, (ids, _) in answers]
        real = [pair["real_tokens"] for pair in chunk]
        played.append((generated, logps(model, real, recipe), logps(model, generated, recipe)))
        bar.update()
    return played


def figures_of_chunk(model, codec, chunk, game: tuple | None, recipe, t: int) -> list[list]:
    """The policy's row of COLUMNS for each of B pairs; game: what opponent_plays says of them."""
    real = [pair["real_tokens"] for pair in chunk]
    logp_real = logps(model, real, recipe)  # (B,)
    with sampled_at(model, recipe.eval_temperature):
        cooler = logps(model, real, recipe)  # (B,)
    margin = torch.zeros(len(chunk))
    if game:
        generated, *opponent = game
        policy = [logp_real, logps(model, generated, recipe)]
        margin = spin_margin(*policy, *opponent, recipe.at(t).lam)
        same = [a == b for a, b in zip(real, generated, strict=True)]
        margin[torch.tensor(same)] = 0.0  # a tie, which rounding would decide one way or the other
    greedy = sample_answers(model, codec, chunk, recipe, None)
    own = sample_answers(model, codec, chunk, recipe, t + 1)
    rows = []
    for i in range(len(chunk)):
        y = [token for token, in_response in zip(*real[i], strict=True) if in_response]
        is_human = greedy[i][0] == y
        ids, finish = own[i]
        logp = logp_real[i].item()
        exact = [math.exp(logp), math.exp(cooler[i].item()), is_human]
        m = margin[i].item()
        win = (m > 0) + 0.5 * (m == 0)
        rows.append([*exact, -logp, len(y), win, m, finish == "eos", len(ids)])
    return rows


def sample_answers(model, codec, pairs, recipe, t: int | None) -> list[tuple]:
    """The model's own answers to held-out prompts: (ids, why it ended) each.
    At temperature 1, y ~ p_θ(·|x), by the random numbers of iteration t; greedy where t is None."""
    most = recipe.max_new_tokens
    uniform = None
    if t is not None:  # 1: another stream than generate.py's
        uniform = np.stack([uniforms(recipe.seed, t, p["id"], 1, number=most) for p in pairs])
    prompts = [pair["prompt_ids"] for pair in pairs]
    return sample(model, prompts, codec.end, most, uniform, slots=recipe.slots)


def answers_in_words(model, codec, pairs, recipe, t: int) -> list[dict]:
    """The rows of answers.jsonl: samples of the model for the pairs that the report shows."""
    rows = []
    answers = sample_answers(model, codec, pairs, recipe, t)
    for pair, (ids, finish) in zip(pairs, answers, strict=True):
        row = {"id": pair["id"], "prompt": pair["prompt"], "real": pair["real"], "finish": finish}
        rows.append({**row, "answer": decode(codec, ids)})
    return rows


def logps(model, sequences, recipe) -> torch.Tensor:
    """log p_θ(y|x) of each of B sequences (ids, mask), packed as train.py packs them. (B,)"""
    result = torch.zeros(len(sequences))
    with packed(model, recipe.attention):
        for row in balanced_bins([len(ids) for ids, _ in sequences], recipe.micro_tokens):
            batch = pack([sequences[i] for i in row], model.device)
            result[row] = sequence_logps(model, **batch).cpu()
    return result


@contextlib.contextmanager
def sampled_at(model, temperature: float):
    """Inside, the model's probabilities are those by which tokens at a temperature are sampled."""

    def divide(module, inputs, output):
        output.logits.div_(temperature)

    hook = model.register_forward_hook(divide)
    try:
        yield
    finally:
        hook.remove()
