"""The demo's four iterations for several seeds, and continued SFT on the same batches: held-out expected exact match.

    OMP_NUM_THREADS=1 python benchmarks/demo_seeds.py [--seeds 0 1 2] [any flag of the stages]

Calls the stages' main(argv) in one process, each seed in a run directory of its own under --runs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import generate
import train


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--no-sft", action="store_true")
    args, flags = parser.parse_known_args()
    table = []
    for seed in args.seeds:
        run = args.runs / f"seed{seed}"
        common = ["--recipe", "demo", "--run", str(run), "--seed", str(seed), *flags]
        evaluate.main(["--theta0", *common])
        for objective in ["spin"] + ["sft"] * (not args.no_sft):
            figures, begun = [json.loads((run / "eval.json").read_text())], time.perf_counter()
            for t in range(4):
                this = ["--iter", str(t), "--objective", objective, *common]
                if objective == "spin":
                    generate.main(this)
                train.main(this)
                evaluate.main(this)
                figures.append(
                    json.loads(
                        (
                            run / ("sft" if objective == "sft" else "") / f"iter{t}" / "eval.json"
                        ).read_text()
                    )
                )
            values = " | ".join(f"{f['expected_exact_match']:.3f}" for f in figures)
            table.append(
                f"| {objective} | {seed} | {values} | {time.perf_counter() - begun:.0f} s |"
            )
    print(
        "| objective | seed | θ_0 | θ_1 | θ_2 | θ_3 | θ_4 | time |\n|---|---|---|---|---|---|---|---|",
        *table,
        sep="\n",
    )


if __name__ == "__main__":
    main()
