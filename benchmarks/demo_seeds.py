"""The demo's four iterations for several seeds, and continued SFT on the same batches.

    OMP_NUM_THREADS=1 python benchmarks/demo_seeds.py [--seeds 0 1 2] [any flag of the stages]

Prints the held-out expected exact match of each θ_t, of θ_4 at the lower temperature too, and how
far SPIN ends above θ_0, above the best continued SFT, and above the share of right answers in the
SFT set. Calls the stages' main(argv) in one process, each seed in a run directory of its own.
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
from spin.run.folders import iteration_folder

RIGHT = 0.75  # share of right answers in the demo's SFT set


def figures_in(folder: Path) -> dict:
    """What evaluate.py found."""
    return json.loads((folder / "eval.json").read_text())


def iterate(run: Path, objective: str, common: list[str]) -> list[dict]:
    """Four iterations of SPIN or SFT; the figures of θ_1 … θ_4."""
    figures = []
    for t in range(4):
        flags = ["--iter", str(t), "--objective", objective, *common]
        if objective == "spin":
            generate.main(flags)
        train.main(flags)
        evaluate.main(flags)
        figures.append(figures_in(iteration_folder(run, t, objective)))
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--no-sft", action="store_true")
    args, flags = parser.parse_known_args()
    rows = []
    leads = []
    for seed in args.seeds:
        run = args.runs / f"seed{seed}"
        common = ["--recipe", "demo", "--run", str(run), "--seed", str(seed), *flags]
        evaluate.main(["--theta0", *common])
        ends = {}
        for objective in ["spin"] if args.no_sft else ["spin", "sft"]:
            begun = time.perf_counter()
            figures = [figures_in(run), *iterate(run, objective, common)]
            seconds = time.perf_counter() - begun
            found = [f["expected_exact_match"] for f in figures]
            values = " | ".join(f"{value:.3f}" for value in found)
            cooler = f"{figures[-1]['expected_exact_match_cooler']:.3f}"
            rows.append(f"| {objective} | {seed} | {values} | {cooler} | {seconds:.0f} s |")
            ends[objective] = found
        marks = [ends["spin"][0], max(ends.get("sft", [float("nan")])), RIGHT]
        lead = " | ".join(f"{ends['spin'][-1] - mark:+.3f}" for mark in marks)
        leads.append(f"| {seed} | {lead} |")
    print("| objective | seed | θ_0 | θ_1 | θ_2 | θ_3 | θ_4 | θ_4, cooler | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")
    print("\n| seed | SPIN's θ_4 − θ_0 | − best continued SFT | − share of right answers |")
    print("|---|---|---|---|")
    print(*leads, sep="\n")


if __name__ == "__main__":
    main()
