"""Ablations on the demo: mistakes in the SFT set, the paper's Figures 2, 4 and 5, and other knobs.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py [--workers 2] [--seeds 0 1 2] [--runs DIR]
    python benchmarks/ablations.py --redraw       pictures and tables, from ablations.jsonl

Calls the stages' main(argv), each arm in a run directory of its own under --runs (runs/ablations);
a rerun does only what is missing. Writes the figures, ablations.jsonl, and the pictures beside this
file (or to --out), and prints the tables. A seed draws the mistakes, the y' and the order of the
pairs; θ_0 and the held-out prompts are always the demo's. Where only the training differs, the arms
of a seed share the y' of iteration 0. Errors are standard errors of the mean over the seeds.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import make_demo

from spin.files import read_jsonl, write_jsonl
from spin.report.pictures import STYLES, Line, draw_lines

HERE = Path(__file__).resolve().parent
KEY = "expected_exact_match"
AXIS = "expected exact match"
SHARES = (0, 10, 25, 40)  # wrong answers of a hundred
HABIT = "habit"  # the set where as many answers as in the demo's have one careless habit
TEMPERATURES = (1.0, 0.8, 0.6, 0.45, 0.3)
RATES = ("1e-5", "3e-5", "1e-4")
SFT_EPOCHS = (1, 2, 3, 4, 6, 8, 16)
SIZES = (256, 512, 1024, 2048)
EPOCHS = (1, 2, 4, 6)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Some iterations of the demo's recipe, with one thing changed."""

    name: str  # of its run directory, and of its rows
    flags: str = ""  # of the stages
    data: str | int = 25  # one of SHARES, or HABIT
    iterations: int = 4
    objectives: tuple[str, ...] = ("spin",)  # "sft" after "spin": continued SFT, same steps
    shares: bool = True  # takes the y' of iteration 0 from the arm BASE
    start: str = ""  # the arm whose SFT model is its θ_0


BOTH = ("spin", "sft")
BASE = Arm("25", objectives=BOTH, shares=False)  # the demo itself
# Long enough that more of it does not help.
SATURATED = Arm("saturate", "--epochs 32", iterations=1, objectives=("sft",), shares=False)
FIRST = [BASE, SATURATED]
LATER = [Arm(str(p), data=p, objectives=BOTH, shares=False) for p in SHARES if p != 25]
LATER += [Arm(HABIT, data=HABIT, objectives=BOTH, shares=False)]
LATER += [
    Arm(
        "from saturated", "--lr 3e-5", iterations=6, objectives=BOTH, shares=False, start="saturate"
    )
]
LATER += [Arm(f"λ = {lam}", f"--lam {lam}") for lam in ("0.1", "1", "20")]
LATER += [Arm(f"ℓ = {e}", f"--ell {e}") for e in ("hinge", "correlation", "exponential")]
LATER += [Arm(f"SFT term {w}", f"--sft-weight {w}") for w in ("1", "10")]
LATER += [Arm(f"y' at {t}", f"--temperature {t}", shares=False) for t in ("0", "0.5", "1.5")]
LATER += [Arm(f"SPIN, {e} epochs", f"--epochs {e}", iterations=1) for e in EPOCHS if e != 2]
LATER += [
    Arm(f"SPIN, {n} prompts", f"--num-prompts {n} --epochs 1", iterations=1, shares=False)
    for n in SIZES
]
LATER += [
    Arm(f"SFT, {rate}, {e} epochs", f"--lr {rate} --epochs {e}", iterations=1, objectives=("sft",))
    for rate in RATES
    for e in SFT_EPOCHS
]


# ---- running -------------------------------------------------------------------------------------


def write_set(path: Path, kind: str | int, seed: int):
    """The demo's SFT set with other mistakes in it; seed 0 and 25 are the demo's own."""
    rows, _ = make_demo.sft_set(random.Random(0))
    if kind == HABIT:
        number = round(make_demo.MISTAKES * len(rows))
        for row in random.Random(seed).sample(rows, number):
            row["response"] = f"um, {row['response']}"
    else:
        rows = make_demo.with_mistakes(rows, kind / 100, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def play(arm: Arm, runs: Path, seed: int) -> list[dict]:
    """An arm with one seed; returns its rows of ablations.jsonl."""
    import torch

    torch.set_num_threads(1)
    run = runs / f"seed{seed}" / arm.name.replace(" ", "_")
    data = runs / f"seed{seed}" / f"{arm.data}.jsonl"
    if not data.exists():
        write_set(data, arm.data, seed)
    (run / "iter0").mkdir(parents=True, exist_ok=True)
    for name in ("prompts.json", "iter0/generated.jsonl"):
        if arm.shares and not (run / name).exists():
            shutil.copy(runs / f"seed{seed}" / BASE.name / name, run / name)
    flags = ["--recipe", "demo", "--run", str(run), "--data", str(data), "--seed", str(seed)]
    if arm.start:
        flags += ["--model", str(runs / f"seed{seed}" / arm.start / "sft" / "iter0" / "model")]
    flags += arm.flags.split()
    with (
        open(run / "log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        rows = [iterate(arm, objective, run, flags) for objective in arm.objectives]
        if arm == BASE:
            rows += by_temperature(run, flags)
    return [{"arm": arm.name, "seed": seed, **row} for row in rows]


def iterate(arm: Arm, objective: str, run: Path, flags: list[str]) -> dict:
    """The figures of θ_0, θ_1, … of one objective, as the row of ablations.jsonl."""
    import evaluate
    import generate
    import train

    evaluate.main(["--theta0", *flags])
    found = [json.loads((run / "eval.json").read_text())[KEY]]
    parent = run / "sft" if objective == "sft" else run
    for t in range(arm.iterations):
        common = ["--iter", str(t), "--objective", objective, *flags]
        generate.main(common)
        train.main(common)
        evaluate.main(common)
        found.append(json.loads((parent / f"iter{t}" / "eval.json").read_text())[KEY])
    return {"objective": objective, "figures": found}


def by_temperature(run: Path, flags: list[str]) -> list[dict]:
    """The rows of θ_0 and of both θ_4: their figures where tokens are sampled at TEMPERATURES."""
    import evaluate

    rows = []

    models = {"θ_0": "demo/theta0", "spin": run / "iter3/model", "sft": run / "sft/iter3/model"}
    for name, model in models.items():
        found = []
        for temperature in TEMPERATURES:
            out = run / f"{name}_{temperature}.json"
            more = ["--model", str(model), "--eval-temperature", str(temperature)]
            evaluate.main([*flags, *more, "--out", str(out)])
            found.append(json.loads(out.read_text())[f"{KEY}_cooler"])
        rows.append({"objective": f"temperatures, {name}", "figures": found})
    return rows


def run_all(runs: Path, seeds: list[int], workers: int) -> list[dict]:
    """The rows of ablations.jsonl: all arms with all seeds, `workers` at once."""
    context = multiprocessing.get_context("spawn")
    rows = []
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for arms in (FIRST, LATER):  # the later ones take something from the first
            jobs = [pool.submit(play, arm, runs, seed) for arm in arms for seed in seeds]
            for job in jobs:
                rows += job.result()
    return rows


# ---- showing -------------------------------------------------------------------------------------


def over_seeds(rows: list[dict]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """{(arm, objective): (mean, standard error) over the seeds of θ_0, θ_1, …}."""
    by_arm = {}
    for row in rows:
        by_arm.setdefault((row["arm"], row["objective"]), []).append(row["figures"])
    found = {}
    for key, seeds in by_arm.items():
        found[key] = []
        for values in zip(*seeds, strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[key].append((statistics.mean(values), spread / len(values) ** 0.5))
    return found


def line(label: str, xs, pairs, style: int) -> Line:
    """(mean, standard error) at each x, as a line of a picture."""
    return Line(label, [(x, *pair) for x, pair in zip(xs, pairs, strict=True)], STYLES[style] + "o")


def right_answers(points: list[tuple]) -> Line:
    """A line to compare with. points: x and the share of right answers in the SFT set."""
    points = [(x, share, 0) for x, share in points]
    return Line("right answers in the SFT set", points, STYLES[-1])


def pictures(found: dict) -> dict[str, str]:
    """{name: SVG} of every picture."""
    spin, sft = found["25", "spin"], found["25", "sft"]
    return {
        "mistakes": mistakes_picture(found),
        "iterations": iterations_picture(spin, sft, "Expected exact match by iteration"),
        "saturated": iterations_picture(
            found["from saturated", "spin"],
            found["from saturated", "sft"],
            "Expected exact match from a model that SFT has nothing more to give",
        ),
        "temperature": temperature_picture(found),
        "epochs": epochs_picture(found),
        "size": size_picture(found),
    }


def mistakes_picture(found: dict) -> str:
    """θ_4 by the share of wrong answers in the SFT set."""
    lines = [
        line("SPIN, θ₄", SHARES, [found[str(p), "spin"][-1] for p in SHARES], 0),
        line("continued SFT, θ₄", SHARES, [found[str(p), "sft"][-1] for p in SHARES], 1),
        right_answers([(p, 1 - p / 100) for p in SHARES]),
    ]
    ticks = {share: f"{share}%" for share in SHARES}
    title = "Expected exact match by the share of mistakes"
    return draw_lines(title, lines, "wrong answers in the SFT set", AXIS, ticks=ticks)


def iterations_picture(spin, sft, title: str) -> str:
    """By iteration, the counterpart of Figure 2. spin, sft: θ_0, θ_1, … of each."""
    models = range(len(spin))
    right = 1 - make_demo.MISTAKES
    lines = [
        line("SPIN", models, spin, 0),
        line("continued SFT, same steps", models, sft, 1),
        right_answers([(0, right), (models[-1], right)]),
    ]
    return draw_lines(title, lines, "model", AXIS)


def temperature_picture(found: dict) -> str:
    """θ_0 and both θ_4 by the temperature at which their tokens are sampled."""
    labels = {"spin": "SPIN, θ₄", "sft": "continued SFT, θ₄", "θ_0": "θ₀"}
    lines = [
        line(label, TEMPERATURES, found["25", f"temperatures, {name}"], number)
        for number, (name, label) in enumerate(labels.items())
    ]
    ticks = {t: str(t) for t in TEMPERATURES}
    title = "Expected exact match by temperature"
    return draw_lines(title, lines, "temperature", AXIS, ticks=ticks)


def epochs_picture(found: dict) -> str:
    """By epochs, the counterpart of Figure 4."""
    base = found["25", "spin"]
    more = [base[0]]
    more += [base[1] if e == 2 else found[f"SPIN, {e} epochs", "spin"][1] for e in EPOCHS]
    # Two epochs of iteration 0, then two of iteration 1 on twice as many pairs: the steps of six.
    lines = [
        line("iteration 0, more epochs", (0, *EPOCHS), more, 0),
        line("iteration 1 instead", (2, 6), base[1:3], 1),
    ]
    x_label = "epochs of iteration 0, or as many steps"
    ticks = {epochs: str(epochs) for epochs in (0, *EPOCHS)}
    return draw_lines("Expected exact match by epochs", lines, x_label, AXIS, ticks=ticks)


def size_picture(found: dict) -> str:
    """By training size, the counterpart of Figure 5."""
    begin = found["25", "spin"][0]
    spin = [found[f"SPIN, {size} prompts", "spin"][1] for size in SIZES]
    sft = [found[f"SFT, 3e-5, {epochs} epochs", "sft"][1] for epochs in (1, 2, 3)]
    lines = [
        line("SPIN, one epoch", (0, *SIZES), [begin, *spin], 0),
        line("SFT, 1 to 3 epochs of all", (0, 2048, 4096, 6144), [begin, *sft], 1),
    ]
    ticks = {pairs: str(pairs) for pairs in (0, 1024, 2048, 4096, 6144)}
    title = "Expected exact match by training size"
    return draw_lines(title, lines, "pairs seen", AXIS, ticks=ticks)


def table(head: list[str], rows: dict[str, list[tuple[float, float]]]):
    """A table of mean ± standard error, line by line, with an empty line behind it."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for label, pairs in rows.items():
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
        cells += [""] * (len(head) - 1 - len(cells))
        yield f"| {label} | {' | '.join(cells)} |".replace("  ", " ")
    yield ""


def tables(found: dict):
    """All tables, line by line."""
    models = [f"θ_{t}" for t in range(7)]
    both = {"spin": "SPIN", "sft": "continued SFT"}
    rows = {}
    for arm, said in [*((str(p), f"{p}% wrong") for p in SHARES), (HABIT, "25% with one habit")]:
        rows |= {f"{said}: {name}": found[arm, o][1:] for o, name in both.items()}
    yield from table(["SFT set: trained by", *models[1:5]], rows)
    arm = "from saturated"
    rows = {name: found[arm, objective] for objective, name in both.items()}
    yield from table(["from a θ_0 that SFT has saturated", *models], rows)
    names = {"θ_0": "θ_0", **{o: f"{name}, θ_4" for o, name in both.items()}}
    rows = {name: found["25", f"temperatures, {o}"] for o, name in names.items()}
    yield from table(["sampled at temperature", *map(str, TEMPERATURES)], rows)
    rows = {}
    for rate in RATES:
        rows[rate] = [found[f"SFT, {rate}, {e} epochs", "sft"][1] for e in SFT_EPOCHS]
    yield from table(["SFT: peak rate, epochs", *map(str, SFT_EPOCHS)], rows)
    knobs = [arm.name for arm in LATER if arm.name.startswith(("λ ", "ℓ ", "SFT term ", "y'"))]
    rows = {"none (λ = 5, logistic, y' at 1)": found["25", "spin"][1:]}
    rows |= {name: found[name, "spin"][1:] for name in knobs}
    yield from table(["change", *models[1:5]], rows)
    arms = [f"SPIN, {e} epochs" for e in EPOCHS if e != 2] + [f"SPIN, {n} prompts" for n in SIZES]
    yield from table(["one iteration", "θ_1"], {name: found[name, "spin"][1:] for name in arms})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--workers", type=int, default=2, help="arms at a time (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--runs", type=Path, default=Path("runs/ablations"))
    add("--out", type=Path, default=HERE)
    add("--redraw", action="store_true", help="from ablations.jsonl; runs nothing")
    args = parser.parse_args()
    figures = args.out / "ablations.jsonl"
    if not args.redraw:
        begun = time.perf_counter()
        write_jsonl(figures, run_all(args.runs, args.seeds, args.workers))
        print(f"{time.perf_counter() - begun:.0f} s with {args.workers} workers")
    found = over_seeds(list(read_jsonl(figures)))
    for name, svg in pictures(found).items():
        (args.out / f"ablation_{name}.svg").write_text(svg, encoding="utf-8")
    print("\n".join(tables(found)), end="")


if __name__ == "__main__":
    main()
