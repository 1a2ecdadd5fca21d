"""Two models on the same held-out prompts: is B better than A? No model is run.

    python -m spin.compare runs/demo/iter3 runs/demo/sft/iter3

A, B: the folders with the by_prompt.jsonl of two evaluations. Prints A, B, B − A and its standard
error, for three metrics. A difference of less than two standard errors may be chance."""

import argparse
from pathlib import Path

from spin.files import fail, io_errors_in_one_line, read_jsonl
from spin.report.summary import compare


@io_errors_in_one_line()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # one line, as of every command
    parser.add_argument("A", type=Path, help="an evaluation's folder, such as runs/demo/iter3")
    parser.add_argument("B", type=Path, help="that of another model")
    args = parser.parse_args(argv)
    for folder in (args.A, args.B):
        if not (folder / "by_prompt.jsonl").is_file():
            fail(f"{folder} holds no by_prompt.jsonl: give the folder of an iteration, not a model")
    a, b = (list(read_jsonl(folder / "by_prompt.jsonl")) for folder in (args.A, args.B))
    try:
        found = compare(a, b)
    except ValueError as problem:
        fail(f"{args.A} and {args.B} cannot be compared: {problem}")
    print(f"A {args.A}\nB {args.B}\n{len(a)} held-out prompts")
    for name, row in found.items():
        error = f"{row['error']:.4f}" if row["error"] is not None else "none: too few prompts"
        difference = f"{row['difference']:+.4f} (standard error {error})"
        print(f"{name:22}A {row['A']:.4f}   B {row['B']:.4f}   B − A {difference}")


if __name__ == "__main__":
    main()
