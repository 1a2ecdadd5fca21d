"""The paper's ablations on the demo: Figures 2, 4 and 5, and λ, the four ℓ, and the temperature of y' as a table.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py [--workers 2] [--runs runs/ablations] [any flag of the stages]

Calls the stages' main(argv), each arm in a run directory of its own under --runs; a rerun does only what is missing. Writes
ablation_iterations.svg, ablation_epochs.svg and ablation_size.svg beside this file (or to --out), and prints the table.
All arms share θ_0, seed and prompts, and where only the training differs also the y' of iteration 0. One seed: the bars
in the pictures are standard errors over held-out prompts, not over seeds.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from spin.report import BLUE, ORANGE, chart

KEY = "expected_exact_match"
SIZES, EPOCHS = (256, 512, 1024, 2048), (1, 2, 4, 6)
TABLE = (
    [(f"λ = {v}", ["--lam", v]) for v in ("0.1", "1", "20")]
    + [(f"ℓ = {v}", ["--ell", v]) for v in ("hinge", "correlation", "exponential")]
    + [(f"temperature of y' = {v}", ["--temperature", v]) for v in ("0", "0.5", "1.5")]
)


def arm(
    run: Path,
    flags: list[str],
    iterations: int,
    objective: str = "spin",
    shared: Path | None = None,
) -> list[dict]:
    """Iterations 0 … of one run; returns the eval.json of θ_1, θ_2, … . shared: a run whose y' of iteration 0 are taken over."""
    import torch

    import evaluate
    import generate
    import train

    torch.set_num_threads(1)
    (run / "iter0").mkdir(parents=True, exist_ok=True)
    for name in ("prompts.json", "iter0/generated.jsonl"):
        if shared and not (run / name).exists():
            shutil.copy(shared / name, run / name)
    figures = []
    with (
        open(run / f"{objective}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        for t in range(iterations):
            this = [
                "--recipe",
                "demo",
                "--run",
                str(run),
                "--iter",
                str(t),
                "--objective",
                objective,
                *flags,
            ]
            for stage in ((generate,) if objective == "spin" else ()) + (train, evaluate):
                stage.main(this)
            figures.append(
                json.loads(
                    (
                        run / ("sft" if objective == "sft" else "") / f"iter{t}" / "eval.json"
                    ).read_text()
                )
            )
    return figures


def start(run: Path, flags: list[str]) -> dict:
    """θ_0's figures, and its y' for the arms that share them."""
    import evaluate
    import generate

    common = ["--recipe", "demo", "--run", str(run), *flags]
    evaluate.main(["--theta0", *common])
    generate.main(["--iter", "0", *common])
    return json.loads((run / "eval.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workers", type=int, default=2, help="arms at a time (default: %(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=HERE)
    args, flags = parser.parse_known_args()
    begun, base = time.perf_counter(), args.runs / "base"
    with concurrent.futures.ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn")
    ) as pool:
        theta0 = pool.submit(start, base, flags).result()
        jobs = {"spin": pool.submit(arm, base, flags, 4)}  # the longest first
        for name, more in TABLE:
            other = None if "--temperature" in more else base
            jobs[name] = pool.submit(
                arm, args.runs / "_".join(more).strip("-"), flags + more, 2, "spin", other
            )
        for epochs in EPOCHS:
            jobs[epochs] = pool.submit(
                arm,
                args.runs / f"epochs{epochs}",
                [*flags, "--epochs", str(epochs)],
                1,
                "spin",
                base,
            )
        for size in SIZES:
            more = [*flags, "--num-prompts", str(size), "--epochs", "1"]
            jobs["size", size] = pool.submit(arm, args.runs / f"size{size}", more, 1)
        for epochs in (1, 2, 3):
            more = [*flags, "--epochs", str(epochs)]
            jobs["sft", epochs] = pool.submit(arm, args.runs / f"sft{epochs}", more, 1, "sft", base)
        spin = jobs["spin"].result()
        jobs["sft"] = pool.submit(arm, base, flags, 4, "sft")
        found = {name: job.result() for name, job in jobs.items()}
    point = lambda x, figures: (x, figures[KEY], figures[KEY + "_stderr"])  # noqa: E731
    line = lambda pairs: [point(x, f) for x, f in pairs]  # noqa: E731
    spin_line, sft_line = ([(0, theta0), *enumerate(found[name], 1)] for name in ("spin", "sft"))
    pictures = {
        "iterations": chart(
            [
                ("SPIN", BLUE, "", line(spin_line)),
                ("continued SFT, same steps", ORANGE, "6 4", line(sft_line)),
            ],
            "Expected exact match by iteration, the counterpart of Figure 2",
        ),
        "epochs": chart(
            [
                (
                    "iteration 0, more epochs",
                    BLUE,
                    "",
                    line([(0, theta0)] + [(e, found[e][0]) for e in EPOCHS]),
                ),
                ("iteration 1 instead", ORANGE, "6 4", line([(2, spin[0]), (6, spin[1])])),
            ],
            "Expected exact match by epochs, the counterpart of Figure 4",
            ticks={e: f"{e} epochs" if e == 6 else str(e) for e in (0, *EPOCHS)},
        ),
        "size": chart(
            [
                (
                    "SPIN, one epoch",
                    BLUE,
                    "",
                    line([(0, theta0)] + [(s, found["size", s][0]) for s in SIZES]),
                ),
                (
                    "SFT, 1 to 3 epochs of all",
                    ORANGE,
                    "6 4",
                    line([(0, theta0)] + [(2048 * e, found["sft", e][0]) for e in (1, 2, 3)]),
                ),
            ],
            "Expected exact match by training size, the counterpart of Figure 5",
            ticks={x: str(x) for x in (0, 512, 1024, 2048, 4096, 6144)},
        ),
    }
    for name, picture in pictures.items():
        (args.out / f"ablation_{name}.svg").write_text(picture + "\n", encoding="utf-8")
    value = lambda f: f"{f[KEY]:.3f} ± {f[KEY + '_stderr']:.3f}"  # noqa: E731
    names = {
        "spin": "SPIN: λ = 5, logistic ℓ, temperature 1, 2 epochs",
        "sft": "continued SFT, same steps",
        **{e: f"SPIN, {e} epochs in iteration 0" for e in EPOCHS},
        **{("sft", e): f"SFT, {e} epochs of all" for e in (1, 2, 3)},
        **{("size", s): f"SPIN, {s} prompts, 1 epoch" for s in SIZES},
    }
    print(f"θ_0: {value(theta0)}\n\n| arm | θ_1 | θ_2 | θ_3 | θ_4 |\n|---|---|---|---|---|")
    for name in sorted(found, key=lambda name: name not in ("spin", "sft")):
        print(
            f"| {names.get(name, name)} | "
            + " | ".join((list(map(value, found[name])) + [""] * 4)[:4])
            + " |"
        )
    print(f"{time.perf_counter() - begun:.0f} s with {args.workers} workers")


if __name__ == "__main__":
    main()
