"""The page: what changed from θ_0 to θ_T. Reads a run's JSON files; runs no model.

    python -m spin.report --recipe demo [--run DIR]    writes report.html there

The template page.html beside this file makes one self-contained page: evaluation metrics,
benchmarks and the paper's, training curves, answers, and warnings in words."""

import itertools
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spin.bench import paper_tables
from spin.files import fail, io_errors_in_one_line, read_json, read_jsonl, write_whole
from spin.recipe import parse
from spin.report.diagnose import warnings_about
from spin.report.pictures import STYLES, Line, as_image, theta
from spin.report.summary import FEW_PROMPTS, NAMES, last_iteration, leading_metric, verdict
from spin.run.folders import RESTORE, iteration_folder

EVALUATE = "delete it and run evaluate.py again"
LABELS = {"spin": "SPIN", "sft": "continued SFT"}
CURVES = (  # a picture's title, what it shows, and its keys of metrics.jsonl
    ("loss", "ℓ of the margin, Eq. (4.7); it starts at ℓ(0)", ["loss"]),
    ("margin (λ·nats)", "the human answer's lead over the opponent's", ["margin"]),
    ("log-ratio (nats)", "the real one should not fall", ["logratio_real", "logratio_generated"]),
    ("length (tokens)", "of the answers", ["length_real", "length_generated"]),
    ("gradient norm", "before clipping", ["grad_norm"]),
    ("tokens per second", "through the model", ["tokens_per_s"]),
)


@io_errors_in_one_line()
def main(argv=None):
    _, args = parse(argv, __doc__)
    found = read_run(args.run)
    write_whole(args.run / "report.html", page(found) + "\n")
    for problem in found["problems"]:
        print(f"note: {problem}")
    print(f"{args.run / 'report.html'}\n{NAMES[found['leads']]}:")
    for model in found["models"]:
        print(f"{model['name']:17}{model[found['leads']]:.3f}")
    for sentence in found["verdicts"]:
        print(sentence)


def read_run(run: Path) -> dict:
    """All that the page shows of a run. Refuses a run without an evaluation, and a damaged file."""
    recipe = read_json(run / "recipe.json", RESTORE)
    spin, sft = (read_models(run, objective) for objective in LABELS)
    if not spin or not recipe:
        fail(f"{run} holds no eval.json or no recipe.json: run evaluate.py --theta0 first")
    models = spin + sft[1:]  # θ_0, from which both begin, only once
    leads = leading_metric(models)
    last = min(len(spin), len(sft)) - 1
    rows = spin[last]["by_prompt"], sft[last]["by_prompt"]
    exact = leads == "expected_exact_match"
    verdicts = [last_iteration(spin)] if exact and len(spin) > 1 else []
    verdicts += [verdict(leads, last, *rows)] if last else []
    made_from = read_json(iteration_folder(run, 0) / "made_from.json", RESTORE)
    return {
        "run": run.name,
        "recipe": recipe,
        "spin": spin,
        "sft": sft if len(sft) > 1 else [],  # θ_0 alone: there is no baseline
        "models": models,
        "leads": leads,
        "verdicts": [sentence for sentence in verdicts if sentence],
        "left_out": {"SFT set": made_from.get("left_out"), "held-out set": spin[0].get("left_out")},
        "problems": warnings_about(recipe, spin),
    }


def read_models(run: Path, objective: str) -> list[dict]:
    """For θ_0, θ_1, … while an eval.json is there: its keys, and the files beside it."""
    found = []
    for t in itertools.count():
        folder = iteration_folder(run, t - 1, objective) if t else run
        model = read_json(folder / "eval.json", EVALUATE)
        if not model:
            return found
        model["name"] = f"{theta(t)} {LABELS[objective]}" if t else "θ₀"
        benchmarks = read_json(folder / "benchmarks.json", EVALUATE)
        model |= {"tasks": benchmarks.get("tasks", {}), "limit": benchmarks.get("limit")}
        for key in ("metrics", "answers", "by_prompt"):
            path = folder / f"{key}.jsonl"
            model[key] = list(read_jsonl(path)) if path.exists() else []
        found.append(model)


def page(found: dict) -> str:
    """The HTML of what read_run has found.
    The template escapes every text, whatever a data set or a model wrote (autoescape)."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, loader=folder, undefined=StrictUndefined)
    tasks = {model["name"]: model["tasks"] for model in found["models"]}
    tables = [paper_tables.beside_the_paper(name, tasks) for name in paper_tables.TABLES]
    answers = [model["answers"] for model in found["spin"]]  # to the same prompts, in one order
    return environment.get_template("page.html").render(
        found,
        charts={key: chart(found, key) for key in NAMES},
        curves=curves([model["metrics"] for model in found["spin"][1:]]),
        tables=[table for table in tables if table],
        differs=paper_tables.DIFFERS,
        answers=list(zip(*answers, strict=False)),  # none where a model's are missing
    )


def chart(found: dict, key: str) -> dict:
    """The picture of a metric of eval.json: a line for SPIN, and one for continued SFT."""
    lines = []
    for (objective, label), style in zip(LABELS.items(), STYLES, strict=False):
        models = enumerate(found[objective])
        points = [(t, m[key], m["n"] >= FEW_PROMPTS and m[f"{key}_stderr"]) for t, m in models]
        if points:
            lines.append(Line(label, points, f"{style}o"))
    return as_image(NAMES[key], lines, "model")


def curves(steps: list[list[dict]]) -> list[tuple]:
    """(title, caption, picture) of CURVES, all iterations one after another; none of fewer than
    two steps. steps: each iteration's rows of metrics.jsonl."""
    rows = [row for iteration in steps for row in iteration]
    if len(rows) < 2:
        return []
    begins = {}  # {first step of an iteration: its name}, at most nine, which fit
    for t in range(0, len(steps), 1 + len(steps) // 9):
        begins[sum(map(len, steps[:t]))] = f"iter {t}"
    size = 1 + len(rows) // 400  # a point of a curve is the mean of so many steps
    starts = range(0, len(rows), size)
    pictures = []
    for title, caption, keys in CURVES:
        lines = []
        for key, style in zip(keys, STYLES, strict=False):
            points = [(k, fmean(row[key] for row in rows[k : k + size]), 0) for k in starts]
            lines.append(Line(key, points, style))
        pictures.append((title, caption, as_image(title, lines, "optimizer step", begins)))
    return pictures
