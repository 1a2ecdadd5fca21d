"""Evaluation metrics of a model on each held-out prompt. Used by evaluate.py.
Two kinds: the model alone (the probability of the human answer, its greedy answer, a sample of its
own), and its margin of Eq. (4.7) against an opponent, on prompts that were never trained on. Each
rank takes its share of the prompts and holds one model at a time."""

import math

import numpy as np
import torch
from tqdm import tqdm

from loss import sequence_logps, spin_margin
from spin.data.pairs import bins_of
from spin.data.rows import read_rows
from spin.data.selection import select
from spin.data.text import Renderer, decode, encode, load_renderer
from spin.model.packing import pack, packed
from spin.model.sampling_check import check_sampling
from spin.model.scoring_check import check_scoring
from spin.model.weights import load_frozen
from spin.recipe import STREAM
from spin.report.summary import COLUMNS
from spin.run.folders import SHOWN
from spin.run.ranks import sum_over_ranks
from spin.sampling.engines import sample, uniforms


def read_held_out(model_name: str, recipe) -> tuple[Renderer, list[dict], dict]:
    """The model's renderer, the held-out pairs as selection.select gives them, with "real_tokens"
    (y's ids and mask), and the counts of the rows that were left out."""
    renderer = load_renderer(model_name, recipe)
    rows = read_rows(recipe.eval_data, recipe.eval_split)
    pairs, counts = select(rows, recipe.eval_data, renderer, recipe, recipe.eval_prompts)
    for pair in pairs:
        pair["real_tokens"] = encode(renderer, pair, pair["real"], recipe.max_length)
    return renderer, pairs, counts


@torch.no_grad()
def metrics_by_prompt(policy: str, opponent: str | None, renderer, pairs, recipe, t: int, world):
    """(N, columns) on every rank: for each pair the values of COLUMNS. And the rows of
    answers.jsonl, on rank 0 only. renderer, pairs: by read_held_out. t: the iteration, for its λ
    and the random numbers of y'."""
    # sorted by length and dealt out in turn, so that all ranks have as much to do
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]["real_tokens"][0]))
    mine = order[world.rank :: world.size]
    starts = range(0, len(mine), recipe.chunk)
    chunks = [[pairs[i] for i in mine[k : k + recipe.chunk]] for k in starts]
    # the opponent first; its memory is free again before the policy is loaded
    of_opponent = [None] * len(chunks)
    if opponent:
        of_opponent = sample_and_score(opponent, chunks, renderer, recipe, t, world)
    model = load_frozen(policy, recipe, world)
    check_scoring(model, recipe, world)
    check_sampling(model, recipe, world)
    rows = []
    bar = tqdm(chunks, "evaluate", unit="chunk", disable=world.rank > 0)
    for chunk, found in zip(bar, of_opponent, strict=True):
        rows += metrics_of_chunk(model, renderer, chunk, found, recipe, t)
    shown = []
    if world.rank == 0:
        answers = sample_answers(model, renderer, pairs[:SHOWN], recipe, t + 1)
        for pair, (ids, finish) in zip(pairs, answers, strict=False):
            row = {name: pair[name] for name in ("id", "prompt", "real")}
            shown.append({**row, "finish": finish, "answer": decode(renderer, ids)})
    table = torch.zeros(len(pairs), len(COLUMNS), dtype=torch.float64)
    table[mine] = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(COLUMNS))
    return sum_over_ranks(table).numpy(), shown  # each row was filled by one rank


def sample_and_score(opponent: str, chunks, renderer, recipe, t: int, world) -> list[tuple]:
    """For each chunk of B pairs: the opponent's answers y' ~ p_θt, as (ids, mask) each,
    log p_θt(y|x) (B,) and log p_θt(y'|x) (B,)."""
    model = load_frozen(opponent, recipe, world)
    check_scoring(model, recipe, world)
    check_sampling(model, recipe, world)
    found = []
    for chunk in tqdm(chunks, "opponent", unit="chunk", disable=world.rank > 0):
        answers = zip(chunk, sample_answers(model, renderer, chunk, recipe, t), strict=True)
        generated = [encode(renderer, pair, ids) for pair, (ids, _) in answers]
        real = [pair["real_tokens"] for pair in chunk]
        found.append((generated, logps(model, real, recipe), logps(model, generated, recipe)))
    return found


def metrics_of_chunk(
    model, renderer, chunk, of_opponent: tuple | None, recipe, t: int
) -> list[list]:
    """The policy's values of COLUMNS for each of B pairs; of_opponent: by sample_and_score."""
    real = [pair["real_tokens"] for pair in chunk]
    logp_real = logps(model, real, recipe)  # (B,)
    cooler = logps(model, real, recipe, recipe.eval_temperature)  # (B,)
    margin = torch.zeros(len(chunk))
    if of_opponent:
        generated, *opponent = of_opponent
        policy = [logp_real, logps(model, generated, recipe)]
        margin = spin_margin(*policy, *opponent, recipe.at(t).lam)
        same = [a == b for a, b in zip(real, generated, strict=True)]
        margin[torch.tensor(same)] = 0.0  # a tie: rounding must not decide it
    greedy = sample_answers(model, renderer, chunk, recipe, None)
    own = sample_answers(model, renderer, chunk, recipe, t + 1)
    rows = []
    for i, (tokens, mask) in enumerate(real):
        y = [token for token, in_response in zip(tokens, mask, strict=True) if in_response]
        ids, finish = own[i]
        logp, m = logp_real[i].item(), margin[i].item()
        win = (m > 0) + 0.5 * (m == 0)
        exact = [math.exp(logp), math.exp(cooler[i].item()), greedy[i][0] == y]
        rows.append([*exact, -logp, len(y), win, m, finish == "eos", len(ids)])
    return rows


def sample_answers(model, renderer, pairs, recipe, t: int | None) -> list[tuple]:
    """The model's own answers to held-out prompts, as (ids, finish) each: at temperature 1,
    y ~ p_θ(·|x), with the random numbers of iteration t; greedy where t is None."""
    most = recipe.max_new_tokens
    uniform = None
    if t is not None:
        keys = [(recipe.seed, t, pair["id"], STREAM["evaluate"]) for pair in pairs]
        uniform = np.stack([uniforms(*key, number=most) for key in keys])
    prompts = [pair["prompt_ids"] for pair in pairs]
    return sample(model, prompts, renderer.end_ids, most, uniform, slots=recipe.slots)


def logps(model, sequences, recipe, temperature: float = 1.0) -> torch.Tensor:
    """log p_θ(y|x) of each of B sequences (ids, mask), packed as train.py packs them, (B,); or with
    the logits divided by a temperature, as when tokens are sampled at it."""

    def cooled(**inputs):
        output = model(**inputs)
        output.logits.div_(temperature)
        return output

    result = torch.zeros(len(sequences))
    with packed(model, recipe.attention) as method:
        sizes = [len(ids) for ids, _ in sequences]
        widths = None if method == "packed" else sizes
        for row in bins_of(sizes, recipe.micro_tokens, widths=widths):
            batch = pack([sequences[i] for i in row], model.device)
            result[row] = sequence_logps(cooled, **batch).cpu()
    return result
