"""Stage 3 of an iteration: what changed. Figures of θ_{t+1} on held-out prompts (Section 6).

    python evaluate.py --iter 0 --recipe demo          θ_1 and its game against θ_0
    python evaluate.py --theta0 --recipe demo          θ_0 itself
    python evaluate.py --model DIR [--opponent DIR]    any model; written only where --out says
    python evaluate.py --iter 3 --tasks paper          the paper's benchmarks (Table 4)
    torchrun --nproc_per_node 8 evaluate.py --iter 0   each rank takes its share of the prompts

Reads the held-out set (--eval-data), θ_{t+1} and its opponent θ_t. Writes RUN/iter{t}/eval.json,
figures by prompt, by_prompt.jsonl, and six answers to look at, answers.jsonl; for --theta0
the same three in RUN. --tasks paper, --tasks extra (Table 6), or names of the LM Evaluation
Harness's own tasks: writes benchmarks.json.
Two models on the same prompts: spin/compare.py. Answers for MT-Bench: spin/mt_bench.py.

Keys of eval.json, each but the last three with its standard error over prompts (_stderr):
expected_exact_match    mean of p_θ(y, EOS | x), the chance that a sample at temperature 1 is the
                        human answer; computed, not sampled, so free of sampling noise
expected_exact_match_cooler   the same where each token is sampled at --eval-temperature
greedy_exact_match      share of prompts whose greedy answer is the human one, token for token
nll_per_token           −log p_θ(y|x) over the tokens of the human answers, in nats
win_rate, margin        the game of Eq. (4.7) on held-out pairs, y' ~ opponent; null without one
eos_rate, mean_length   of the model's own samples at temperature 1: the share that end by EOS, and
                        their tokens
n                       held-out prompts
left_out, made_from     rows of the set that were left out, by reason; hashes of models and recipe
"""

from pathlib import Path

from spin import checks, lm_harness
from spin.checksums import write_listed
from spin.distributed import process_group
from spin.figures import figures_by_prompt, read_held_out, same_tokens
from spin.files import check_out, fail, io_errors_in_one_line, write_json, write_jsonl, write_whole
from spin.flags import parse
from spin.intervals import COLUMNS, summarise
from spin.probe import refuse_what_cannot_be_trained
from spin.run import hash_of_data, iteration_folder, made_by, save_recipe, starting_model
from spin.selection import counts_line

BESIDE = ("by_prompt.jsonl", "answers.jsonl")  # what a run has beside eval.json
FLAGS = (
    ("--iter", {"type": int, "help": "evaluate what iteration t made"}),
    ("--theta0", {"action": "store_true", "help": "evaluate theta_0"}),
    ("--opponent", {"help": "with --model: the model that answers y'"}),
    ("--tasks", {"nargs": "+", "metavar": "NAME", "help": "paper, extra, or lm_eval's own"}),
    ("--limit", {"type": int, "help": "with --tasks: at most so many questions a task"}),
    ("--out", {"type": Path, "help": "with --model: write the result to this file"}),
)


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, *FLAGS)
    policy, opponent, t, out = whom_to_evaluate(recipe, args)
    of_a_run = args.iter is not None or args.theta0
    write = write_listed if of_a_run else write_whole
    asked = {"tasks": args.tasks, "limit": args.limit}
    asked |= {} if args.tasks else {"eval_data": hash_of_data(recipe.eval_data)}
    made_from = made_by(recipe, policy, opponent, asked)
    if out and out.exists():
        checks.same_result(out, made_from)
        beside = [out.with_name(name) for name in BESIDE if of_a_run and not args.tasks]
        if all(path.exists() for path in beside):  # one that was lost is made again
            return print(f"{out} is there already: nothing to do")
    if args.tasks:
        result = lm_harness.run_benchmarks(policy, recipe, args.tasks, args.limit)
        if out and result:  # rank 0's
            write_json(out, {**result, "made_from": made_from}, indent=1, write=write)
        return

    if args.theta0:  # the first stage of a run
        refuse_what_cannot_be_trained(policy, recipe)
    held_out = read_held_out(policy, recipe)
    if args.opponent and not same_tokens(held_out, read_held_out(opponent, recipe)):
        fail(f"{policy} and {opponent} have different tokenizers: they cannot play")
    if of_a_run:  # all its iterations are measured on the same prompts
        seal = checks.same_prompts(args.run / "heldout.json", held_out.pairs, recipe.eval_data)

    with process_group() as world:
        if world.rank == 0:
            prompts = f"{len(held_out.pairs)} held-out prompts ({counts_line(held_out.counts)})"
            print(f"evaluates {policy} on {prompts}")
        table, shown = figures_by_prompt(policy, opponent, held_out, recipe, t, world)
        if world.rank > 0:
            return

    result = summarise(table, game=bool(opponent))
    means = {k: v for k, v in result.items() if v is not None and not k.endswith("_stderr")}
    print("  ".join(f"{name} {value:.4g}" for name, value in means.items()))
    if of_a_run:
        save_recipe(recipe, args.run)
        write_listed(args.run / "heldout.json", seal)
        write_by_prompt(out, held_out.pairs, table, shown)
    if out:  # last: it says that all is there
        result |= {"left_out": held_out.counts, "made_from": made_from}
        write_json(out, result, indent=1, write=write)


def write_by_prompt(out, pairs, table, shown):
    """Beside eval.json: the figures of each prompt, and the answers to a few."""
    rows = []
    for pair, figures in zip(pairs, table.tolist(), strict=True):
        rows.append({"id": pair["id"], **dict(zip(COLUMNS, figures, strict=True))})
    for name, content in zip(BESIDE, (rows, shown), strict=True):
        write_jsonl(out.with_name(name), content, write=write_listed)


def check_flags(args):
    """Refuse flags that do not go together, before anything is read."""
    if args.iter is not None and args.theta0:
        fail("--iter T and --theta0 exclude each other")
    if args.tasks and args.opponent:
        fail("--tasks and --opponent exclude each other")
    if (args.iter is not None or args.theta0) and (args.opponent or args.out):
        fail(
            "--opponent and --out go with --model alone; a run's iteration has its own opponent "
            "and its own eval.json"
        )
    check_out(args.out)
    if args.limit is not None and not args.tasks:
        fail("--limit goes with --tasks")
    if args.limit is not None and args.limit < 1:
        fail(f"--limit must be positive, got {args.limit}")


def whom_to_evaluate(recipe, args):
    """(policy, opponent or None, t of the game's λ and random numbers, file to write or None)."""
    check_flags(args)
    run, t = args.run, args.iter
    if t is None and not args.theta0:
        opponent = args.opponent and checks.model_folder(args.opponent)
        return checks.model_folder(recipe.model), opponent, 0, args.out
    checks.before_evaluating(recipe, run, t)
    name = "benchmarks.json" if args.tasks else "eval.json"
    if t is None:
        return starting_model(recipe, run, 0), None, 0, run / name
    policy = starting_model(recipe, run, t + 1, recipe.objective)
    opponent = starting_model(recipe, run, t, recipe.objective)
    return policy, opponent, t, iteration_folder(run, t, recipe.objective) / name


if __name__ == "__main__":
    main()
