"""Two models on the same held-out prompts: B − A, with 95% intervals.

    python -m spin.compare A B [--recipe demo] [--out FILE.json]
    torchrun --nproc_per_node 8 -m spin.compare A B
A, B: folders or hub ids, such as runs/demo/iter0/model. Started in the repository's root. Prints
(and writes to --out), for each figure of COMPARED, "A", "B", "B-A", and its "interval": a paired
bootstrap over prompts (Efron and Tibshirani, 1993)."""

from pathlib import Path

from spin import checks
from spin.distributed import process_group
from spin.figures import figures_by_prompt, read_held_out, same_tokens
from spin.files import check_out, fail, io_errors_in_one_line, write_json
from spin.flags import parse
from spin.intervals import COMPARED, RESAMPLES, compare
from spin.run import hash_of_data, made_by

A = ("A", {"help": "a model: a transformers folder or a hub id"})
B = ("B", {"help": "the model that it is compared with"})
OUT = ("--out", {"type": Path, "help": "write the result to this file"})


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, A, B, OUT)
    check_out(args.out)
    a, b = checks.model_folder(args.A), checks.model_folder(args.B)
    asked = {"program": "spin.compare", "eval_data": hash_of_data(recipe.eval_data)}
    made_from = made_by(recipe, a, b, asked)
    if args.out and args.out.exists():
        checks.same_result(args.out, made_from)
        return print(f"{args.out} is there already: nothing to do")
    held_out = read_held_out(a, recipe)
    if not same_tokens(held_out, read_held_out(b, recipe)):
        fail(f"{a} and {b} have different tokenizers: their figures are not about the same tokens")
    with process_group() as world:
        table_a, _ = figures_by_prompt(a, None, held_out, recipe, 0, world)
        table_b, _ = figures_by_prompt(b, None, held_out, recipe, 0, world)
        if world.rank > 0:
            return
    result = {"A": a, "B": b, **compare(table_a, table_b, recipe.seed)}
    resamples = f"{RESAMPLES:,} paired resamples of them"
    print(
        f"A {a}\nB {b}\n{len(table_a)} held-out prompts; B − A with the 95% interval of {resamples}"
    )
    for name in COMPARED:
        r = result[name]
        low, high = r["interval"]
        values = f"A {r['A']:.4f}   B {r['B']:.4f}   B − A {r['B-A']:+.4f}"
        print(f"{name:22}{values}   [{low:+.4f}, {high:+.4f}]")
    if args.out:
        write_json(args.out, {**result, "made_from": made_from}, indent=1)


if __name__ == "__main__":
    main()
