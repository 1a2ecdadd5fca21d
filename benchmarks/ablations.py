"""The paper's ablations on the demo: Figures 2, 4 and 5, and a table of λ, ℓ and temperature.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py [--workers 2] [--runs DIR] [stages' flags]
    python benchmarks/ablations.py --redraw       pictures and table, from ablations.jsonl

Calls the stages' main(argv), each arm in a run directory of its own under --runs (runs/ablations);
a rerun does only what is missing. Writes the figures, ablations.jsonl, and the pictures,
ablation_iterations.svg, ablation_epochs.svg and ablation_size.svg, beside this file (or to --out),
and prints the table. All arms share θ_0, seed and prompts, and where only the training differs also
the y' of iteration 0. One seed: the bars in the pictures are standard errors over held-out prompts,
not over seeds.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from spin.pictures import STYLES, Line, draw_lines

HERE = Path(__file__).resolve().parent
KEY = "expected_exact_match"
AXIS = "expected exact match"
THETA_0 = "θ_0"
SPIN = "SPIN: λ = 5, logistic ℓ, temperature 1, 2 epochs"
SFT = "continued SFT, same steps"
# Two iterations of SPIN each, with these flags.
OTHER_KNOBS = {
    "λ = 0.1": ["--lam", "0.1"],
    "λ = 1": ["--lam", "1"],
    "λ = 20": ["--lam", "20"],
    "ℓ = hinge": ["--ell", "hinge"],
    "ℓ = correlation": ["--ell", "correlation"],
    "ℓ = exponential": ["--ell", "exponential"],
    "temperature of y' = 0": ["--temperature", "0"],
    "temperature of y' = 0.5": ["--temperature", "0.5"],
    "temperature of y' = 1.5": ["--temperature", "1.5"],
}
# One iteration each. Two epochs of iteration 0 are not there: SPIN's own θ_1 is that.
EPOCHS = {e: f"SPIN, {e} epoch{'s' * (e > 1)} in iteration 0" for e in (1, 4, 6)}
SIZES = {n: f"SPIN, {n} prompts, 1 epoch" for n in (256, 512, 1024, 2048)}
SFT_EPOCHS = {e: f"SFT, {e} epoch{'s' * (e > 1)} of all" for e in (1, 2, 3)}


# ---- running -------------------------------------------------------------------------------------


def arm(
    run: Path, flags: list[str], iterations: int, objective: str, shared: Path | None
) -> list[list[float]]:
    """Iterations 0 … of one run; returns [value, standard error] of θ_1, θ_2, …

    shared: a run whose y' of iteration 0 are taken over.
    """
    import torch

    import evaluate
    import generate
    import train

    torch.set_num_threads(1)
    (run / "iter0").mkdir(parents=True, exist_ok=True)
    for name in ("prompts.json", "iter0/generated.jsonl"):
        if shared and not (run / name).exists():
            shutil.copy(shared / name, run / name)
    stages = (generate, train, evaluate) if objective == "spin" else (train, evaluate)
    found = []
    with (
        open(run / f"{objective}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        for t in range(iterations):
            common = ["--recipe", "demo", "--run", str(run), "--iter", str(t)]
            for stage in stages:
                stage.main([*common, "--objective", objective, *flags])
            parent = run / "sft" if objective == "sft" else run
            found.append(figure(parent / f"iter{t}" / "eval.json"))
    return found


def start(run: Path, flags: list[str]) -> list[float]:
    """[value, standard error] of θ_0; and its y', for the arms that share them."""
    import evaluate
    import generate

    common = ["--recipe", "demo", "--run", str(run), *flags]
    evaluate.main(["--theta0", *common])
    generate.main(["--iter", "0", *common])
    return figure(run / "eval.json")


def figure(path: Path) -> list[float]:
    """[value, standard error] in an eval.json."""
    found = json.loads(path.read_text())
    return [found[KEY], found[f"{KEY}_stderr"]]


def run_all(runs: Path, flags: list[str], workers: int) -> dict[str, list]:
    """{label: [value, standard error] of θ_1, θ_2, …} of all arms, `workers` at once; and θ_0."""
    base = runs / "base"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        theta_0 = pool.submit(start, base, flags).result()
        # The longest first. Its label comes first in the table too, and SFT's second.
        jobs = {SPIN: pool.submit(arm, base, flags, 4, "spin", None), SFT: None}
        for label, more in OTHER_KNOBS.items():
            run = runs / "_".join(more).strip("-")
            shared = None if "--temperature" in more else base
            jobs[label] = pool.submit(arm, run, flags + more, 2, "spin", shared)
        for epochs, label in EPOCHS.items():
            more = ["--epochs", str(epochs)]
            run = runs / f"epochs{epochs}"
            jobs[label] = pool.submit(arm, run, flags + more, 1, "spin", base)
        for size, label in SIZES.items():
            more = ["--num-prompts", str(size), "--epochs", "1"]
            run = runs / f"size{size}"
            jobs[label] = pool.submit(arm, run, flags + more, 1, "spin", None)
        for epochs, label in SFT_EPOCHS.items():
            more = ["--epochs", str(epochs)]
            run = runs / f"sft{epochs}"
            jobs[label] = pool.submit(arm, run, flags + more, 1, "sft", base)
        # The baseline shares its directory with SPIN, which must have finished.
        jobs[SPIN].result()
        jobs[SFT] = pool.submit(arm, base, flags, 4, "sft", None)
        return {THETA_0: [theta_0], **{label: job.result() for label, job in jobs.items()}}


# ---- showing -------------------------------------------------------------------------------------


def iterations_picture(found: dict) -> str:
    """By iteration, the counterpart of Figure 2."""
    spin = [(t, *pair) for t, pair in enumerate(found[THETA_0] + found[SPIN])]
    sft = [(t, *pair) for t, pair in enumerate(found[THETA_0] + found[SFT])]
    lines = [Line("SPIN", spin, *STYLES[0]), Line(SFT, sft, *STYLES[1])]
    return draw_lines("Expected exact match by iteration", lines, "model", AXIS)


def epochs_picture(found: dict) -> str:
    """By epochs, the counterpart of Figure 4."""
    by_epochs = {epochs: found[label][0] for epochs, label in EPOCHS.items()}
    by_epochs[0] = found[THETA_0][0]
    by_epochs[2] = found[SPIN][0]
    more = [(epochs, *by_epochs[epochs]) for epochs in sorted(by_epochs)]
    # Two epochs of iteration 0, then two of iteration 1 on twice as many pairs: the steps of six.
    instead = [(2, *found[SPIN][0]), (6, *found[SPIN][1])]
    lines = [
        Line("iteration 0, more epochs", more, *STYLES[0]),
        Line("iteration 1 instead", instead, *STYLES[1]),
    ]
    x_label = "epochs of iteration 0, or as many steps"
    ticks = {epochs: str(epochs) for epochs in sorted(by_epochs)}
    return draw_lines("Expected exact match by epochs", lines, x_label, AXIS, ticks=ticks)


def size_picture(found: dict) -> str:
    """By training size, the counterpart of Figure 5."""
    begin = (0, *found[THETA_0][0])
    spin = [(size, *found[label][0]) for size, label in SIZES.items()]
    sft = [(2048 * epochs, *found[label][0]) for epochs, label in SFT_EPOCHS.items()]
    lines = [
        Line("SPIN, one epoch", [begin, *spin], *STYLES[0]),
        Line("SFT, 1 to 3 epochs of all", [begin, *sft], *STYLES[1]),
    ]
    ticks = {pairs: str(pairs) for pairs in (0, 1024, 2048, 4096, 6144)}
    title = "Expected exact match by training size"
    return draw_lines(title, lines, "pairs seen", AXIS, ticks=ticks)


def table(found: dict):
    """θ_0, and the table of all arms, line by line."""
    for label, pairs in found.items():
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
        if label == THETA_0:
            yield f"{label}: {cells[0]}"
            yield ""
            yield "| arm | θ_1 | θ_2 | θ_3 | θ_4 |"
            yield "|---|---|---|---|---|"
        else:
            cells += [""] * (4 - len(cells))
            yield f"| {label} | {' | '.join(cells)} |".replace("  ", " ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--workers", type=int, default=2, help="arms at a time (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/ablations"))
    add("--out", type=Path, default=HERE)
    add("--redraw", action="store_true", help="from ablations.jsonl; runs nothing")
    args, flags = parser.parse_known_args()
    figures = args.out / "ablations.jsonl"
    if args.redraw:
        rows = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
        found = {row["arm"]: row["figures"] for row in rows}
    else:
        begun = time.perf_counter()
        found = run_all(args.runs, flags, args.workers)
        rows = [{"arm": label, "figures": pairs} for label, pairs in found.items()]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        figures.write_text("".join(lines), encoding="utf-8")
        print(f"{time.perf_counter() - begun:.0f} s with {args.workers} workers")

    pictures = {
        "iterations": iterations_picture(found),
        "epochs": epochs_picture(found),
        "size": size_picture(found),
    }
    for name, svg in pictures.items():
        (args.out / f"ablation_{name}.svg").write_text(svg, encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
