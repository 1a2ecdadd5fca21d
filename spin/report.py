"""The page: what changed from θ_0 to θ_T. Reads a run's JSON files; no model, no torch.

    python -m spin.report --recipe demo [--run DIR]    writes summary.json and report.html there

report.html is one self-contained page, made by the template of that name beside this file: figures
of eval.json, benchmarks beside the paper's, curves of metrics.jsonl, answers of answers.jsonl, and
in words where something known to go wrong is seen."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spin import paper_tables
from spin.checksums import check_run_files
from spin.files import fail, io_errors_in_one_line, read_json, write_json, write_whole
from spin.flags import parse
from spin.pictures import STYLES, Line, as_image, draw_lines, level
from spin.run import iteration_folder
from spin.signs import signs_of_trouble, thinned
from spin.verdict import NAMES, last_of_both, leading_figure, verdict

RESTORE = "restore it, or choose another --run"
EVALUATE = "delete it and run evaluate.py again"
LABELS = {"spin": "SPIN", "sft": "continued SFT, same steps"}
CURVES = {  # of metrics.jsonl: a picture's axis and its keys
    "loss": ("loss, ℓ of the margin", ["loss"]),
    "margin": ("margin (λ·nats)", ["margin"]),
    "logratio": ("log-ratio (nats)", ["logratio_real", "logratio_generated"]),
    "length": ("length (tokens)", ["length_real", "length_generated"]),
    "grad_norm": ("gradient norm", ["grad_norm"]),
    "tokens_per_s": ("tokens per second", ["tokens_per_s"]),
}


@io_errors_in_one_line()
def main(argv=None):
    _, args = parse(argv, __doc__)
    check_run_files(args.run)
    summary = {"recipe": read_json(args.run / "recipe.json", RESTORE), **collect(args.run)}
    if not summary["spin"]:
        fail(f"{args.run} holds no eval.json: run evaluate.py first")
    summary["benchmarks"] = benchmarks(args.run, summary)
    summary["rows"] = rows_of_sets(args.run, summary)
    summary["leads"] = leading_figure(summary)
    if last := last_of_both(summary):
        folders = [iteration_folder(args.run, last - 1, objective) for objective in LABELS]
        tables = [lines_of(folder / "by_prompt.jsonl") for folder in folders]
        summary["verdict"] = verdict(summary, *tables)
    write_json(args.run / "summary.json", summary, indent=1)
    iterations = range(len(summary["spin"]) - 1)
    steps = [lines_of(iteration_folder(args.run, t) / "metrics.jsonl") for t in iterations]
    problems = signs_of_trouble(summary, steps)
    for problem in problems:
        print(f"note: {problem}")
    html = page(summary, args.run.name, steps, answers(args.run, summary), problems)
    write_whole(args.run / "report.html", html + "\n")
    print(args.run / "report.html", *text_table(summary), sep="\n")
    if summary.get("verdict"):
        print(summary["verdict"], "In brackets: 95% interval over prompts (paired bootstrap).")


def collect(run: Path) -> dict[str, list[dict]]:
    """{"spin": the eval.json of θ_0, θ_1, … up to the first that is missing, "sft": likewise, from
    the same θ_0; empty where nothing was trained}."""
    found = {}
    for objective in LABELS:
        models = [read_json(run / "eval.json", EVALUATE)]
        while models[-1]:
            folder = iteration_folder(run, len(models) - 1, objective)
            models.append(read_json(folder / "eval.json", EVALUATE))
        found[objective] = models[:-1]  # without the {} of the one that is missing
    return {**found, "sft": found["sft"] if len(found["sft"]) > 1 else []}


def named_models(summary: dict):
    """(objective, t, name, figures) of all models; θ_0, which both objectives share, only once."""
    for objective, label in LABELS.items():
        for t, figures in enumerate(summary[objective]):
            if t or objective == "spin":
                yield objective, t, label.split(",")[0] if t else "SFT model", figures


def benchmarks(run: Path, summary: dict) -> dict[str, dict]:
    """{"θ_t …": the tasks of its benchmarks.json} where evaluate.py --tasks has written one."""
    found = {}
    for objective, t, label, _ in named_models(summary):
        folder = iteration_folder(run, t - 1, objective) if t else run
        if written := read_json(folder / "benchmarks.json", EVALUATE):
            found[f"θ_{t} {label}"] = written["tasks"]
    return found


def rows_of_sets(run: Path, summary: dict) -> dict[str, dict]:
    """{"SFT set": the numbers of its rows that were read, and left out by each rule, …}."""
    sampled = read_json(iteration_folder(run, 0) / "generated.json", RESTORE)
    counts = {
        "SFT set": sampled.get("left_out"),
        "held-out set": summary["spin"][0].get("left_out"),
    }
    return {name: found for name, found in counts.items() if found}


def lines_of(path: Path) -> list[dict]:
    """The rows of a JSONL file, none where there is no file; refuses one that was cut off."""
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except ValueError as problem:
        mend = "restore or delete it, this page is all that is made from it"
        fail(f"{path} is damaged ({problem}): {mend}")


def answers(run: Path, summary: dict) -> list[tuple[dict, list]]:
    """(prompt and human answer, [answer of θ_0, θ_1, …]) by answers.jsonl; None where one lacks."""
    models = []
    for t in range(len(summary["spin"])):
        folder = iteration_folder(run, t - 1) if t else run
        models.append({row["id"]: row for row in lines_of(folder / "answers.jsonl")})
    return [(row, [model.get(key) for model in models]) for key, row in models[0].items()]


def text_table(summary: dict):
    """The leading figure, iteration by iteration, as lines for the terminal."""
    key = summary["leads"]
    yield f"{NAMES[key]}:"
    for objective, label in LABELS.items():
        models = summary[objective]
        cells = [f"θ_{t} {figures[key]:.3f}" for t, figures in enumerate(models)]
        if key == "expected_exact_match" and cells:
            cooler = models[-1][f"{key}_cooler"]
            cells.append(f"(temperature {summary['recipe']['eval_temperature']}: {cooler:.3f})")
        if cells:
            yield f"{label:28}" + "  ".join(cells)


def page(summary: dict, name: str, steps=(), shown=(), problems=()) -> str:
    """The HTML of the run called `name`; steps: its metrics, shown: its answers.
    The template escapes every text, whatever a data set or a model wrote (autoescape)."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, loader=folder, undefined=StrictUndefined)
    results = summary.get("benchmarks") or {}
    tables = [paper_tables.beside_the_paper(table, results) for table in paper_tables.TABLES]
    given = {"name": name, "summary": summary, "problems": problems, "shown": shown}
    leads = leading_figure(summary)
    given |= {"leads": leads, "verdict": summary.get("verdict"), "curves": curves(steps)}
    given["models"] = list(named_models(summary))
    given["rows"] = summary.get("rows") or {}
    charts = {"expected_exact_match": "expected exact match", "nll_per_token": "nats per token"}
    first = sorted(charts, key=lambda key: key != leads)  # the leading figure's picture
    given["charts"] = {key: chart(summary, key, charts[key]) for key in first}
    given |= {"benchmarks": [table for table in tables if table], "differs": paper_tables.DIFFERS}
    return environment.get_template("report.html").render(given)


def chart(summary: dict, key: str, axis: str) -> dict:
    """The picture of a figure of eval.json: a line for each objective that has it."""
    lines = []
    for (objective, label), style in zip(LABELS.items(), STYLES, strict=False):
        points = []
        for t, figures in enumerate(summary[objective]):
            if figures[key] is not None:
                points.append((t, figures[key], figures.get(f"{key}_stderr") or 0))
        if points:
            lines.append(Line(label, points, *style))
    share = summary["recipe"].get("right_share")
    if share and key == "expected_exact_match":
        last = len(summary["spin"]) - 1
        lines.append(level("right answers in the SFT set", [(0, share), (last, share)]))
    return as_image(draw_lines(axis, lines, "model", axis), lines)


def curves(steps: list[list[dict]]) -> dict[str, dict]:
    """The pictures of CURVES, all iterations one after another; none of less than two steps."""
    rows = [row for iteration in steps for row in iteration]
    if len(rows) < 2:
        return {}
    begins = {}  # of each iteration: its first step
    for t, iteration in enumerate(steps):
        if iteration and t % (1 + len(steps) // 9) == 0:  # nine labels have room
            begins[sum(map(len, steps[:t]))] = f"iter {t}"
    pictures = {}
    for name, (axis, keys) in CURVES.items():
        lines = []
        for key, style in zip(keys, STYLES, strict=False):
            if points := thinned(rows, key):
                lines.append(Line(key.removeprefix(f"{name}_"), points, *style))
        if lines:
            svg = draw_lines(axis, lines, "optimizer step", axis, ticks=begins, dots=False)
            pictures[name] = as_image(svg, lines)
    return pictures


if __name__ == "__main__":
    main()
