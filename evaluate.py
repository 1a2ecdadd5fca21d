"""Stage 3: what changed. Figures of a model on held-out prompts, and its game against its opponent.

    python evaluate.py --iter 0 --recipe demo          θ_1, against θ_0: writes RUN/iter0/eval.json
    python evaluate.py --theta0 --recipe demo          θ_0 itself: writes RUN/eval.json
    python evaluate.py --model DIR [--opponent DIR]    any model; prints, and writes only where --out says
    torchrun --nproc_per_node 8 evaluate.py --iter 0   data-parallel: each rank takes its share of the prompts

Keys of the result, each but n with its standard error over prompts (_stderr):
expected_exact_match: mean of p_θ(y, EOS | x), the chance that a sample at temperature 1 is the human answer; computed
    from the log-probability, not sampled, so free of sampling noise. greedy_exact_match: share of prompts whose
    greedy answer is the human one, token for token. nll_per_token: −log p_θ(y|x) over the tokens of the human answers.
win_rate, margin: the game of Eq. (4.7) on held-out pairs, y' ~ opponent (null without an opponent).
eos_rate, mean_length: of the model's own samples at temperature 1, the share that end by EOS, and their tokens.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
from data import counts_line, encode, load_tokenizer, read_rows, select
from loss import sequence_logps, spin_margin
from packing import pack, packed, share
from recipe import at, check_model, check_run, fail, iter_dir, parse, save_run, theta, write_whole
from sample import sample, uniforms

COLUMNS = ("exact_probability", "greedy", "nll", "tokens", "win", "margin", "eos", "length")  # a row of figures a prompt
FLAGS = (("--iter", dict(type=int, help="evaluate what iteration t made")),
         ("--theta0", dict(action="store_true", help="evaluate theta_0")),
         ("--opponent", dict(help="with --model: the model that plays y'")),
         ("--out", dict(type=Path, help="with --model: write the figures to this file")))


def main(argv=None):
    recipe, args = parse(argv, __doc__.split("\n")[0], *FLAGS)
    policy, opponent, t, out = contestants(recipe, args)
    if out and out.exists():
        return print(f"{out} is there already: nothing to do")
    tokenizer, _ = load_tokenizer(policy, recipe)
    pairs, counts = select(read_rows(recipe.eval_data, recipe.eval_split), recipe.eval_data, tokenizer,
                           recipe.template, recipe.eval_prompts, recipe.seed, recipe.max_length, recipe.max_new_tokens)
    for pair in pairs:
        pair["real"] = encode(tokenizer, recipe.template, pair, pair["real"], recipe.max_length)
    pairs.sort(key=lambda pair: (-len(pair["real"][0]), pair["id"]))

    with parallel.join() as world:
        if world.rank == 0:
            print(f"evaluates {policy} on {len(pairs)} held-out prompts ({counts_line(counts)})")
        mine = pairs[world.rank::world.size]
        table = torch.zeros(len(pairs), len(COLUMNS), dtype=torch.float64)
        rows = play_held_out(policy, opponent, mine, tokenizer, recipe, t, world)
        table[world.rank::world.size] = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(COLUMNS))
        table = parallel.all_sum(table).numpy()  # each row was filled by one rank
        if world.rank == 0:
            result = summarise(table, bool(opponent))
            print("  ".join(f"{k} {v:.4g}" for k, v in result.items() if v is not None and not k.endswith("_stderr")))
            if args.iter is not None or args.theta0:
                save_run(recipe, args.run)
            if out:
                write_whole(out, json.dumps(result, indent=1) + "\n")


def contestants(recipe, args):
    """(policy, opponent or None, iteration of the policy's λ, file to write or None)."""
    if args.iter is not None and args.theta0:
        fail("--iter T and --theta0 exclude each other")
    if args.iter is None and not args.theta0:
        if args.out and not args.out.parent.is_dir():
            fail(f"--out {args.out}: there is no directory {args.out.parent}")
        return check_model(recipe.model), args.opponent and check_model(args.opponent), 0, args.out
    if args.opponent or args.out:
        fail("--opponent and --out go with --model alone; a run's iteration has its own opponent and its own eval.json")
    check_run(recipe, args.run)
    if args.theta0:
        return theta(recipe, args.run, 0), None, 0, args.run / "eval.json"
    t = args.iter
    return (theta(recipe, args.run, t + 1, recipe.objective), theta(recipe, args.run, t, recipe.objective), t,
            iter_dir(args.run, t, recipe.objective) / "eval.json")


@torch.no_grad()
def play_held_out(policy, opponent, pairs, tokenizer, recipe, t, world) -> list[list[float]]:
    """One row of COLUMNS for each pair of this rank. One model is in memory at a time: the opponent plays first."""
    chunks = [pairs[i:i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
    bar = tqdm(total=len(chunks) * (2 if opponent else 1), desc="evaluate", unit="chunk", disable=world.rank > 0)
    played = []  # of each chunk: the opponent's answers, log p_θt of the real and of the generated
    if opponent:
        model = parallel.load_frozen(opponent, recipe, world)
        for chunk in chunks:
            generated = [encode(tokenizer, recipe.template, pair, ids)
                         for pair, (ids, _) in zip(chunk, draw(model, tokenizer, chunk, recipe, t))]
            played.append((generated, logps(model, [p["real"] for p in chunk], recipe), logps(model, generated, recipe)))
            bar.update()
        del model
    model = parallel.load_frozen(policy, recipe, world)
    rows = []
    for k, chunk in enumerate(chunks):
        real = logps(model, [pair["real"] for pair in chunk], recipe)
        greedy = sample(model, [pair["prompt_ids"] for pair in chunk], tokenizer.eos_token_id, recipe.max_new_tokens,
                        slots=recipe.slots)
        own = draw(model, tokenizer, chunk, recipe, t + 1)
        if opponent:
            generated, opponent_real, opponent_generated = played[k]
            margin = spin_margin(real, logps(model, generated, recipe), opponent_real, opponent_generated, at(recipe.lam, t))
            tie = torch.tensor([y == pair["real"] for y, pair in zip(generated, chunk)])
            margin[tie] = 0.0  # which rounding would decide one way or the other
        else:
            margin = torch.zeros(len(chunk))
        for pair, logp, (answer, _), (drawn, finish), m in zip(chunk, real.tolist(), greedy, own, margin.tolist()):
            y = [i for i, in_response in zip(*pair["real"]) if in_response]
            rows.append([math.exp(logp), answer == y, -logp, len(y), (m > 0) + 0.5 * (m == 0), m, finish == "eos", len(drawn)])
        bar.update()
    return rows


def draw(model, tokenizer, chunk, recipe, t):
    """The model's own answers to held-out prompts at temperature 1: y' ~ p_θ."""
    u = np.stack([uniforms(recipe.seed, t, pair["id"], 1, number=recipe.max_new_tokens) for pair in chunk])
    return sample(model, [p["prompt_ids"] for p in chunk], tokenizer.eos_token_id, recipe.max_new_tokens, u,
                  slots=recipe.slots)


def logps(model, sequences, recipe):
    """log p_θ(y|x) of each sequence, (B,), packed as train.py packs them."""
    result = torch.zeros(len(sequences))
    with packed(model, recipe.attention):
        for row in share([len(ids) for ids, _ in sequences], recipe.micro_tokens):
            result[row] = sequence_logps(model, *pack([sequences[i] for i in row], model.device)).cpu()
    return result


def summarise(table: np.ndarray, game: bool) -> dict:
    """eval.json from one row of COLUMNS a prompt: means and their standard errors over prompts."""
    column = dict(zip(COLUMNS, table.T))
    n, ratio = len(table), column["nll"].sum() / column["tokens"].sum()
    spread = {"expected_exact_match": column["exact_probability"], "greedy_exact_match": column["greedy"],
              "win_rate": column["win"], "margin": column["margin"], "eos_rate": column["eos"], "mean_length": column["length"],
              # a ratio of sums: its first-order deviation a prompt (the delta method)
              "nll_per_token": ratio + (column["nll"] - ratio * column["tokens"]) / column["tokens"].mean()}
    result = {}
    for name, values in spread.items():
        known = game or name not in ("win_rate", "margin")
        result[name] = float(values.mean()) if known else None
        result[name + "_stderr"] = float(values.std(ddof=1) / math.sqrt(n)) if known and n > 1 else None
    return {**result, "n": n}


if __name__ == "__main__":
    main()
