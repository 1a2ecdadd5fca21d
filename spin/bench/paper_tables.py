"""The paper's benchmark figures (Tables 3 to 6 of arXiv 2401.01335v3, in paper_tables.json), and
ours above them, for the report."""

import json
from pathlib import Path

# name: {"tasks": [our column, the harness's task, few-shot examples, the harness's metric],
#        "models": {model: its figures, in the order of the tasks}, "source"}
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
DIFFERS = TABLES.pop("differs")  # in words: why ours and theirs are not quite the same


def beside_the_paper(name: str, results: dict) -> tuple[list, list] | None:
    """(columns, rows) of the paper's table `name` with our models above, in percent; None if ours
    have none of its tasks. results: {model: {task: lm_eval's metrics}}. A column is ("Arc", 25,
    "acc_norm"), the last one the mean. A row is (model, [(value, standard error), …])."""
    tasks = TABLES[name]["tasks"]
    rows = []
    for model, found in results.items():
        cells = [percent(found.get(task, {}), metric) for _, task, _, metric in tasks]
        if any(cells):
            rows.append((model, with_mean(cells)))
    if not rows:
        return None
    columns = [(column, shots, metric.split(",")[0]) for column, _, shots, metric in tasks]
    for model, values in TABLES[name]["models"].items():
        rows.append((f"paper: {model}", with_mean([(value, None) for value in values])))
    return [*columns, ("average", "", "")], rows


def percent(metrics: dict, name: str) -> tuple | None:
    """(value, standard error or None) of lm_eval's metric `name`, such as "acc,none"."""
    value, error = metrics.get(name), metrics.get(name.replace(",", "_stderr,"))
    known = isinstance(error, float) and error == error  # neither "N/A" nor NaN
    return None if value is None else (100 * value, 100 * error if known else None)


def with_mean(cells: list) -> list:
    """The cells and their mean; its standard error is that of independent figures."""
    if not all(cells):
        return [*cells, None]
    values, errors = zip(*cells, strict=True)
    n = len(cells)
    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / n
    return [*cells, (sum(values) / n, error)]
