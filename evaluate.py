"""Stage 3 of an iteration: what changed. Figures of θ_{t+1} on held-out prompts (Section 6).

    python evaluate.py --iter 0 --recipe demo          θ_1 and its game against θ_0
    python evaluate.py --theta0 --recipe demo          θ_0 itself
    python evaluate.py --model DIR                     any model; the result goes to --out, if given
    python evaluate.py --iter 3 --tasks paper          the paper's benchmarks (Table 4)
    torchrun --nproc_per_node 8 evaluate.py --iter 0   each rank takes its share of the prompts

Reads the held-out set (--eval-data), θ_{t+1} and its opponent θ_t. Writes into RUN/iter{t}/
eval.json (means), by_prompt.jsonl (metrics of each prompt) and answers.jsonl (six answers); with
--theta0 it writes them into RUN. With --tasks (paper, extra for Table 6, or task names of the LM
Evaluation Harness) it writes benchmarks.json instead.
Two models on the same prompts: spin/compare.py. Answers for MT-Bench: spin/mt_bench.py.
docs/evaluation.md explains the keys of eval.json."""

import sys
from pathlib import Path

sys.path.insert(0, __file__.rpartition("/")[0])  # this folder, missing under PYTHONSAFEPATH

from spin import checks
from spin.bench import harness
from spin.data.selection import counts_line
from spin.files import check_out, fail, io_errors_in_one_line, write_json, write_jsonl
from spin.model.scoring_check import refuse_what_cannot_be_trained
from spin.recipe import parse
from spin.report import diagnose, tracking
from spin.report.evaluation_metrics import metrics_by_prompt, read_held_out
from spin.report.summary import COLUMNS, summarise
from spin.run.folders import hash_of_source, iteration_folder, made_by, save_recipe, starting_model
from spin.run.ranks import process_group, run_lock

FLAGS = (
    ("--iter", {"type": int, "help": "evaluate theta_{t+1}, the model that iteration t made"}),
    ("--theta0", {"action": "store_true", "help": "evaluate theta_0"}),
    ("--tasks", {"nargs": "+", "metavar": "NAME", "help": "paper, extra, or lm_eval task names"}),
    ("--limit", {"type": int, "help": "with --tasks: at most this many questions per task"}),
    ("--out", {"type": Path, "help": "with --model: write the result to this file"}),
)


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, *FLAGS)
    of_a_run = args.iter is not None or args.theta0
    join = run_lock if args.tasks else process_group  # lm_eval joins the ranks itself
    with join(args.run if of_a_run else None) as world:
        evaluate(recipe, args, of_a_run, world)
        if of_a_run:
            tracking.send_evaluation(recipe, args.run, 0 if args.theta0 else args.iter + 1)


def evaluate(recipe, args, of_a_run: bool, world):
    """Evaluate the model of the flags. of_a_run: it belongs to a run. world: None with --tasks."""
    policy, opponent, out = whom_to_evaluate(recipe, args)
    asked = {"tasks": args.tasks, "limit": args.limit}
    asked |= {} if args.tasks else {"eval_data": hash_of_source(recipe.eval_data)}
    made_from = made_by(recipe, policy, opponent, asked)
    if out and out.exists():
        checks.same_result(out, made_from)
        beside = ["by_prompt.jsonl", "answers.jsonl"] if of_a_run and not args.tasks else []
        if all(out.with_name(name).exists() for name in beside):  # else missing files are remade
            return print(f"{out} is there already: nothing to do")
    if args.tasks:
        result = harness.run_benchmarks(policy, recipe, args.tasks, args.limit)
        if out and result:  # rank 0's
            write_json(out, {**result, "made_from": made_from}, indent=1)
        return

    if args.theta0:  # the first stage of a run
        refuse_what_cannot_be_trained(policy, recipe)
    renderer, pairs, left_out = read_held_out(policy, recipe)
    if of_a_run:  # all its iterations are measured on the same prompts
        prompts = checks.same_prompts(args.run / "heldout.json", pairs, recipe.eval_data)

    if world.rank == 0:
        print(f"evaluates {policy} on {len(pairs)} held-out prompts ({counts_line(left_out)})")
        if of_a_run:
            answered = iteration_folder(args.run, args.iter or 0) / "generated.jsonl"
            diagnose.warn(diagnose.not_held_out(pairs, answered))
    t = args.iter or 0  # the iteration whose λ and random numbers are used
    table, shown = metrics_by_prompt(policy, opponent, renderer, pairs, recipe, t, world)
    if world.rank > 0:
        return

    result = summarise(table, has_opponent=bool(opponent))
    means = {k: v for k, v in result.items() if v is not None and not k.endswith("_stderr")}
    print("  ".join(f"{name} {value:.4g}" for name, value in means.items()))
    if of_a_run:
        save_recipe(recipe, args.run)
        write_json(args.run / "heldout.json", prompts)
        rows = []
        for pair, figures in zip(pairs, table.tolist(), strict=True):
            rows.append({"id": pair["id"], **dict(zip(COLUMNS, figures, strict=True))})
        write_jsonl(out.with_name("by_prompt.jsonl"), rows)
        write_jsonl(out.with_name("answers.jsonl"), shown)
    if out:  # written last: its existence means that the evaluation is complete
        write_json(out, {**result, "left_out": left_out, "made_from": made_from}, indent=1)


def whom_to_evaluate(recipe, args) -> tuple:
    """(policy, opponent or None, file to write or None). Refuses flags that do not go together."""
    if args.iter is not None and args.theta0:
        fail("--iter T and --theta0 exclude each other")
    if (args.iter is not None or args.theta0) and args.out:
        fail("--out goes with --model alone; a run's iteration has its own eval.json")
    check_out(args.out)
    if args.limit is not None and (args.limit < 1 or not args.tasks):
        fail("--limit goes with --tasks, and must be positive")
    run, t = args.run, args.iter
    name = "benchmarks.json" if args.tasks else "eval.json"
    if t is not None:
        checks.before_evaluating(recipe, run, t)
        policy, opponent = (starting_model(recipe, run, s, recipe.objective) for s in (t + 1, t))
        return policy, opponent, iteration_folder(run, t, recipe.objective) / name
    if args.theta0:
        checks.before_evaluating(recipe, run, None)
        return starting_model(recipe, run, 0), None, run / name
    return checks.model_folder(recipe.model), None, args.out


if __name__ == "__main__":
    main()
