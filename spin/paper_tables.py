"""The paper's benchmark figures (Tables 3 to 6 of arXiv 2401.01335v3, in paper_tables.json), and
ours beside them. Used by spin/lm_harness.py, which makes ours, and by the report."""

import json
from pathlib import Path

# name: {"tasks": [our column, the harness's task, few-shot examples, the harness's metric],
#        "models": {model: its figures, in the order of the tasks}, "source"}
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
DIFFERS = TABLES.pop("differs")  # in words: why ours and theirs are not quite the same


def beside_the_paper(name: str, results: dict) -> tuple[list, list] | None:
    """(columns, rows) of the paper's table `name` with our models above, in percent.
    results: {model: {task: …}} as lm_harness gives them. A column is ("Arc", 25, "acc_norm"), the
    last one the mean of all, where all are there. A row is (model, [(value, error), …]).
    None if no figure is there."""
    tasks = TABLES[name]["tasks"]
    rows = []
    for model, found in results.items():
        cells = []
        for _, task, _, metric in tasks:
            cell = found[task]["figures"].get(metric) if task in found else None
            cells.append(cell and (100 * cell[0], None if cell[1] is None else 100 * cell[1]))
        if any(cells):
            rows.append((model, with_mean(cells)))
    if not rows:
        return None
    columns = [(column, shots, metric.split(",")[0]) for column, _, shots, metric in tasks]
    for model, values in TABLES[name]["models"].items():
        rows.append((f"paper: {model}", with_mean([(value, None) for value in values])))
    return [*columns, ("average", "", "")], rows


def with_mean(cells: list) -> list:
    """The cells and their mean; its standard error is that of independent figures."""
    if not all(cells):
        return [*cells, None]
    values, errors = zip(*cells, strict=True)
    n = len(cells)
    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / n
    return [*cells, (sum(values) / n, error)]


def text_table(columns, rows) -> list[str]:
    """What beside_the_paper gives, as lines of text."""
    texts = []
    for k, head in enumerate(("", "few-shot examples", "metric")):
        texts.append(f"{head:32}" + "".join(f"{column[k]!s:>15}" for column in columns))
    for model, cells in rows:
        line = f"{model[-32:]:32}"
        for value, error in (cell or (None, None) for cell in cells):
            word = "–" if value is None else f"{value:.2f}"
            line += f"{word if error is None else f'{word} ±{error:.2f}':>15}"
        texts.append(line)
    return texts
