"""Stage 3: what changed. Figures of a model on held-out prompts, its game against its opponent, and the paper's benchmarks.

    python evaluate.py --iter 0 --recipe demo          θ_1, against θ_0: writes RUN/iter0/eval.json and answers.jsonl
    python evaluate.py --theta0 --recipe demo          θ_0 itself: writes RUN/eval.json and RUN/answers.jsonl
    python evaluate.py --model DIR [--opponent DIR]    any model; prints, and writes only where --out says
    torchrun --nproc_per_node 8 evaluate.py --iter 0   data-parallel: each rank takes its share of the prompts
    python evaluate.py --compare A B                   two models on the same held-out prompts: B − A, with 95% intervals
    python evaluate.py --iter 3 --tasks paper          Table 4 by the LM Evaluation Harness: RUN/iter3/benchmarks.json;
                                                       or --tasks extra (Table 6), or the harness's own names; see lm_harness.py
    python evaluate.py --model DIR --mt-bench question.jsonl --out NAME.jsonl    answers for FastChat's judge

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

from loss import sequence_logps, spin_margin
from spin import distributed, lm_harness, mt_bench
from spin.data import (
    check_prompts,
    counts_line,
    decode,
    encode,
    load_tokenizer,
    read_rows,
    select,
    write_jsonl,
)
from spin.files import SHOWN, fail, one_line, write_whole
from spin.packing import pack, packed, share
from spin.recipe import at, check_model, check_run, iter_dir, parse, save_run, theta
from spin.sampling import sample, uniforms

COLUMNS = (
    "exact_probability",
    "greedy",
    "nll",
    "tokens",
    "win",
    "margin",
    "eos",
    "length",
)  # a row of figures a prompt
FLAGS = (
    ("--iter", dict(type=int, help="evaluate what iteration t made")),
    ("--theta0", dict(action="store_true", help="evaluate theta_0")),
    ("--opponent", dict(help="with --model: the model that plays y'")),
    (
        "--compare",
        dict(nargs=2, metavar=("A", "B"), help="two models on the same held-out prompts"),
    ),
    (
        "--tasks",
        dict(
            nargs="+",
            metavar="NAME",
            help="benchmarks: paper, extra, or names of the harness's tasks",
        ),
    ),
    (
        "--tasks-data",
        dict(
            type=Path,
            metavar="DIR",
            help="with --tasks: copies of the data sets, in folders of their hub ids",
        ),
    ),
    ("--limit", dict(type=int, help="with --tasks: at most so many questions a task")),
    (
        "--mt-bench",
        dict(metavar="FILE", help="answer these questions in FastChat's format (needs --out)"),
    ),
    (
        "--out",
        dict(
            type=Path, help="with --model, --compare or --mt-bench: write the result to this file"
        ),
    ),
)


@one_line
def main(argv=None):
    recipe, args = parse(argv, __doc__.split("\n")[0], *FLAGS)
    check_flags(args)
    if args.compare:
        return compare(*map(check_model, args.compare), recipe, args.out)
    policy, opponent, t, out = contestants(recipe, args)
    if out and out.exists():
        return print(f"{out} is there already: nothing to do")
    if args.tasks:
        return benchmark(policy, recipe, args, out)
    if args.mt_bench:
        return mt_bench.answer(policy, recipe, args.mt_bench, out)
    pairs, tokenizer, counts = held_out(policy, recipe)
    own = args.iter is not None or args.theta0
    key = own and check_prompts(
        args.run / "heldout.json",
        ({**pair, "real": pair["text"]} for pair in pairs),
        recipe.eval_data,
    )
    if args.opponent and [pair["real"] for pair in pairs] != [
        pair["real"] for pair in held_out(opponent, recipe)[0]
    ]:
        fail(f"{policy} and {opponent} have different tokenizers: they cannot play")
    with distributed.join() as world:
        if world.rank == 0:
            print(f"evaluates {policy} on {len(pairs)} held-out prompts ({counts_line(counts)})")
        table, shown = figures_by_prompt(policy, opponent, pairs, tokenizer, recipe, t, world)
        if world.rank == 0:
            result = summarise(table, bool(opponent))
            print(
                "  ".join(
                    f"{k} {v:.4g}"
                    for k, v in result.items()
                    if v is not None and not k.endswith("_stderr")
                )
            )
            if own:
                save_run(recipe, args.run)
                write_whole(args.run / "heldout.json", key)
                write_jsonl(out.with_name("answers.jsonl"), shown)
            if out:
                write_whole(out, json.dumps(result, indent=1) + "\n")


def check_flags(args):
    """Refuse flags that do not go together, before anything is read."""
    if (args.iter is not None) + args.theta0 + bool(args.compare) > 1:
        fail("--iter T, --theta0 and --compare exclude each other")
    if bool(args.tasks) + bool(args.mt_bench) + bool(args.compare) + bool(args.opponent) > 1:
        fail("--tasks, --mt-bench, --compare and --opponent exclude each other")
    if (args.iter is not None or args.theta0) and (args.opponent or args.out and not args.mt_bench):
        fail(
            "--opponent and --out go with --model alone; a run's iteration has its own opponent and its own eval.json"
        )
    if args.out and not args.out.parent.is_dir():
        fail(f"--out {args.out}: there is no directory {args.out.parent}")
    if args.mt_bench and (not args.out or args.out.suffix != ".jsonl"):
        fail("--mt-bench needs --out NAME.jsonl: FastChat takes the file's name for the model's")
    if not args.tasks and (args.limit is not None or args.tasks_data):
        fail("--limit and --tasks-data go with --tasks")
    if args.limit is not None and args.limit < 1:
        fail(f"--limit must be positive, got {args.limit}")
    if args.tasks_data and not args.tasks_data.is_dir():
        fail(f"--tasks-data {args.tasks_data}: there is no such directory")


def contestants(recipe, args):
    """(policy, opponent or None, iteration of the policy's λ, file to write or None)."""
    if args.iter is None and not args.theta0:
        return check_model(recipe.model), args.opponent and check_model(args.opponent), 0, args.out
    check_run(recipe, args.run)
    name = "benchmarks.json" if args.tasks else "eval.json"
    if args.theta0:
        return theta(recipe, args.run, 0), None, 0, args.out or args.run / name
    t = args.iter
    return (
        theta(recipe, args.run, t + 1, recipe.objective),
        theta(recipe, args.run, t, recipe.objective),
        t,
        args.out or iter_dir(args.run, t, recipe.objective) / name,
    )


# ---- held-out prompts --------------------------------------------------------------------------------------------


def held_out(policy, recipe):
    """The held-out pairs in policy's tokens, its tokenizer, and the counts of what was left out."""
    tokenizer, _ = load_tokenizer(policy, recipe)
    pairs, counts = select(
        read_rows(recipe.eval_data, recipe.eval_split),
        recipe.eval_data,
        tokenizer,
        recipe.template,
        recipe.eval_prompts,
        recipe.seed,
        recipe.max_length,
        recipe.max_new_tokens,
    )
    for pair in pairs:
        pair["text"], pair["real"] = (
            pair["real"],
            encode(tokenizer, recipe.template, pair, pair["real"], recipe.max_length),
        )
    return pairs, tokenizer, counts


def figures_by_prompt(policy, opponent, pairs, tokenizer, recipe, t, world):
    """One row of COLUMNS a prompt, (N, columns), in the order of pairs on every rank; and on rank 0 the rows of answers.jsonl."""
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i]["real"][0]), pairs[i]["id"]))[
        world.rank :: world.size
    ]
    table = torch.zeros(len(pairs), len(COLUMNS), dtype=torch.float64)
    rows, shown = play_held_out(
        policy, opponent, [pairs[i] for i in order], pairs[:SHOWN], tokenizer, recipe, t, world
    )
    table[order] = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(COLUMNS))
    return distributed.all_sum(table).numpy(), shown  # each row was filled by one rank


@torch.no_grad()
def play_held_out(policy, opponent, pairs, show, tokenizer, recipe, t, world) -> tuple[list, list]:
    """A row of COLUMNS for each pair of this rank, and the policy's answers to `show` in words (on rank 0).

    One model is in memory at a time: the opponent plays first.
    """
    chunks = [pairs[i : i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
    bar = tqdm(
        total=len(chunks) * (2 if opponent else 1),
        desc="evaluate",
        unit="chunk",
        disable=world.rank > 0,
    )
    played = []  # of each chunk: the opponent's answers, log p_θt of the real and of the generated
    if opponent:
        model = distributed.load_frozen(opponent, recipe, world)
        for chunk in chunks:
            generated = [
                encode(tokenizer, recipe.template, pair, ids)
                for pair, (ids, _) in zip(chunk, draw(model, tokenizer, chunk, recipe, t))
            ]
            played.append(
                (
                    generated,
                    logps(model, [p["real"] for p in chunk], recipe),
                    logps(model, generated, recipe),
                )
            )
            bar.update()
        del model
    model = distributed.load_frozen(policy, recipe, world)
    rows = []
    for k, chunk in enumerate(chunks):
        real = logps(model, [pair["real"] for pair in chunk], recipe)
        greedy = sample(
            model,
            [pair["prompt_ids"] for pair in chunk],
            tokenizer.eos_token_id,
            recipe.max_new_tokens,
            slots=recipe.slots,
        )
        own = draw(model, tokenizer, chunk, recipe, t + 1)
        if opponent:
            generated, opponent_real, opponent_generated = played[k]
            margin = spin_margin(
                real,
                logps(model, generated, recipe),
                opponent_real,
                opponent_generated,
                at(recipe.lam, t),
            )
            tie = torch.tensor([y == pair["real"] for y, pair in zip(generated, chunk)])
            margin[tie] = 0.0  # which rounding would decide one way or the other
        else:
            margin = torch.zeros(len(chunk))
        for pair, logp, (answer, _), (drawn, finish), m in zip(
            chunk, real.tolist(), greedy, own, margin.tolist()
        ):
            y = [i for i, in_response in zip(*pair["real"]) if in_response]
            rows.append(
                [
                    math.exp(logp),
                    answer == y,
                    -logp,
                    len(y),
                    (m > 0) + 0.5 * (m == 0),
                    m,
                    finish == "eos",
                    len(drawn),
                ]
            )
        bar.update()
    shown = (
        [
            {
                "id": pair["id"],
                "prompt": pair["prompt"],
                "real": pair["text"],
                "finish": finish,
                "answer": decode(tokenizer, recipe.template, ids),
            }
            for pair, (ids, finish) in zip(show, draw(model, tokenizer, show, recipe, t + 1))
        ]
        if world.rank == 0
        else []
    )
    return rows, shown


def draw(model, tokenizer, chunk, recipe, t):
    """The model's own answers to held-out prompts at temperature 1: y' ~ p_θ."""
    u = np.stack(
        [uniforms(recipe.seed, t, pair["id"], 1, number=recipe.max_new_tokens) for pair in chunk]
    )
    return sample(
        model,
        [p["prompt_ids"] for p in chunk],
        tokenizer.eos_token_id,
        recipe.max_new_tokens,
        u,
        slots=recipe.slots,
    )


def logps(model, sequences, recipe):
    """log p_θ(y|x) of each sequence, (B,), packed as train.py packs them."""
    result = torch.zeros(len(sequences))
    with packed(model, recipe.attention):
        for row in share([len(ids) for ids, _ in sequences], recipe.micro_tokens):
            result[row] = sequence_logps(
                model, *pack([sequences[i] for i in row], model.device)
            ).cpu()
    return result


def summarise(table: np.ndarray, game: bool) -> dict:
    """eval.json from one row of COLUMNS a prompt: means and their standard errors over prompts."""
    column = dict(zip(COLUMNS, table.T))
    n, ratio = len(table), column["nll"].sum() / column["tokens"].sum()
    spread = {
        "expected_exact_match": column["exact_probability"],
        "greedy_exact_match": column["greedy"],
        "win_rate": column["win"],
        "margin": column["margin"],
        "eos_rate": column["eos"],
        "mean_length": column["length"],
        # a ratio of sums: its first-order deviation a prompt (the delta method)
        "nll_per_token": ratio
        + (column["nll"] - ratio * column["tokens"]) / column["tokens"].mean(),
    }
    result = {}
    for name, values in spread.items():
        known = game or name not in ("win_rate", "margin")
        result[name] = float(values.mean()) if known else None
        result[name + "_stderr"] = (
            float(values.std(ddof=1) / math.sqrt(n)) if known and n > 1 else None
        )
    return {**result, "n": n}


# ---- two models --------------------------------------------------------------------------------------------------

COMPARED = ("expected_exact_match", "nll_per_token", "greedy_exact_match")


def compare(a, b, recipe, out):
    """B − A on the same held-out prompts, with the 95% interval of a paired bootstrap over prompts."""
    (pairs, tokenizer, _), (others, _, _) = held_out(a, recipe), held_out(b, recipe)
    if [p["real"] for p in pairs] != [p["real"] for p in others]:
        fail(f"{a} and {b} have different tokenizers: their figures are not about the same tokens")
    with distributed.join() as world:
        tables = [
            figures_by_prompt(name, None, pairs, tokenizer, recipe, 0, world)[0] for name in (a, b)
        ]
    draws = paired_bootstrap(*tables, recipe.seed)
    result = {"A": a, "B": b, "n": len(pairs)}
    for k, name in enumerate(COMPARED):
        one, two = (float(compared(table.sum(0), len(pairs))[k]) for table in tables)
        result[name] = {
            "A": one,
            "B": two,
            "B-A": two - one,
            "interval": np.quantile(draws[:, k], (0.025, 0.975)).tolist(),
        }
    if world.rank == 0:
        print(
            f"A {a}\nB {b}\n{len(pairs)} held-out prompts; B − A with the 95% interval of 10,000 paired resamples of them"
        )
        for name in COMPARED:
            r = result[name]
            print(
                f"{name:22}A {r['A']:.4f}   B {r['B']:.4f}   B − A {r['B-A']:+.4f}   [{r['interval'][0]:+.4f}, {r['interval'][1]:+.4f}]"
            )
        if out:
            write_whole(out, json.dumps(result, indent=1) + "\n")


def compared(sums, n: int):
    """The figures of COMPARED, (…, 3), from the sums of COLUMNS over n prompts, (…, columns)."""
    total = dict(zip(COLUMNS, np.moveaxis(sums, -1, 0)))
    return np.stack(
        [total["exact_probability"] / n, total["nll"] / total["tokens"], total["greedy"] / n], -1
    )


def paired_bootstrap(a, b, seed: int, resamples: int = 10_000):
    """compared(b) − compared(a), (resamples, 3): prompts drawn with replacement, each time the same ones for both.

    a, b: (N, columns), the rows of both in the same order. That pairing is what makes the interval narrow: most of the
    spread over prompts is that some prompts are harder, for both.
    """
    rng, n = np.random.default_rng(seed), len(a)
    blocks = [
        rng.multinomial(n, np.full(n, 1 / n), size=500) for _ in range(-(-resamples // 500))
    ]  # how often each is drawn
    return np.concatenate([compared(times @ b, n) - compared(times @ a, n) for times in blocks])[
        :resamples
    ]


# ---- benchmarks --------------------------------------------------------------------------------------------------


def benchmark(policy, recipe, args, out):
    """--tasks: the harness's figures of the model, printed beside the paper's and written to out."""
    tokenizer, _ = load_tokenizer(policy, recipe)
    manager, tasks = lm_harness.load_tasks(
        args.tasks, args.tasks_data, lm_harness.positions(policy, recipe)
    )
    with distributed.join() as world:
        model = distributed.load_frozen(policy, recipe, world)
        found = lm_harness.run(
            model, tokenizer, manager, tasks, args.limit, recipe.slots, world, distributed.all_sum
        )
    if world.rank == 0:
        for name in lm_harness.TABLES:
            if table := lm_harness.beside_the_paper(name, {policy: found}):
                print(*lm_harness.text_table(*table), lm_harness.DIFFERS, sep="\n")
        if args.limit:
            print(f"--limit {args.limit}: a quick look, not the benchmark")
        if out:
            write_whole(
                out,
                json.dumps({"model": policy, "limit": args.limit, "tasks": found}, indent=1) + "\n",
            )


if __name__ == "__main__":
    main()
