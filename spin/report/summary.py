"""Evaluation metrics of a model, from its metrics on each prompt: means, standard errors, and
whether one model is ahead of another. A prompt is a row with the names of COLUMNS, which
evaluation_metrics.py computes and by_prompt.jsonl holds. docs/evaluation.md explains each."""

import math

import numpy as np

COLUMNS = (
    "expected_exact_match",
    "expected_exact_match_cooler",
    "greedy_exact_match",
    "nll",  # of the whole human answer, in nats
    "tokens",  # of the human answer
    "win_rate",
    "margin",
    "eos_rate",
    "mean_length",
)
NAMES = {"expected_exact_match": "expected exact match", "nll_per_token": "NLL per token (nats)"}
COMPARED = (*NAMES, "greedy_exact_match")
FREE_TEXT = 0.01  # below this, exact matches are too rare to distinguish models
FEW_PROMPTS = 20  # below this, a standard error is itself too uncertain to judge by


def by_prompt(table: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: a value for each prompt, (N,)}, whose mean is the metric of the model, and whose
    spread gives its standard error. table: (N, columns), a row of COLUMNS for each prompt."""
    values = dict(zip(COLUMNS, table.T, strict=True))
    nll, tokens = values.pop("nll"), values.pop("tokens")
    # a ratio of two sums: its first-order deviation for each prompt (the delta method)
    ratio = nll.sum() / tokens.sum()
    values["nll_per_token"] = ratio + (nll - ratio * tokens) / tokens.mean()
    return values


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of values, (N,); None for a single one."""
    n = len(values)
    return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def summarise(table: np.ndarray, has_opponent: bool) -> dict:
    """The metrics of eval.json, from the table of by_prompt: means over prompts, and standard
    errors. Without an opponent, win_rate and margin are null."""
    result = {}
    for name, values in by_prompt(table).items():
        known = has_opponent or name not in ("win_rate", "margin")
        result[name] = float(values.mean()) if known else None
        result[f"{name}_stderr"] = standard_error(values) if known else None
    return {**result, "n": len(table)}


def compare(a: list[dict], b: list[dict]) -> dict[str, dict]:
    """{metric: {"A", "B", "difference": B − A, "error": its paired standard error}} for COMPARED.
    The error is None for fewer than FEW_PROMPTS.
    a, b: the rows of two by_prompt.jsonl, joined by id. Raises ValueError where they are not of the
    same prompts in the same tokens."""
    a, b = (sorted(rows, key=lambda row: row.get("id", -1)) for rows in (a, b))
    prompts = [[(row.get("id"), row.get("tokens")) for row in rows] for rows in (a, b)]
    complete = all(row.keys() >= {"id", *COLUMNS} for row in (*a, *b))
    if len(a) < 2 or prompts[0] != prompts[1] or not complete:
        raise ValueError("metrics of the same prompts, two or more, in the same tokens are wanted")
    tables = [np.array([[row[name] for name in COLUMNS] for row in rows], float) for rows in (a, b)]
    values_a, values_b = map(by_prompt, tables)
    found = {}
    for name in COMPARED:
        # Some prompts are harder for both models. The difference on each prompt is free of that.
        difference = values_b[name] - values_a[name]
        found[name] = {
            "A": values_a[name].mean(),
            "B": values_b[name].mean(),
            "difference": difference.mean(),
            "error": standard_error(difference) if len(a) >= FEW_PROMPTS else None,
        }
    return found


def leading_metric(models: list[dict]) -> str:
    """The metric that a run is judged by, from all its models' eval.json."""
    best = max(model["expected_exact_match"] for model in models)
    return "nll_per_token" if best < FREE_TEXT else "expected_exact_match"


def verdict(metric: str, t: int, spin: list[dict], sft: list[dict]) -> str | None:
    """In words: whether SPIN or continued SFT is ahead at θ_t, by more than two standard errors of
    a metric of NAMES. spin, sft: the rows of by_prompt.jsonl of both θ_t. None for fewer than
    FEW_PROMPTS, or where compare cannot join them."""
    try:
        found = compare(sft, spin)[metric]
    except ValueError:
        return None
    if found["error"] is None:
        return None
    gain = -found["difference"] if metric == "nll_per_token" else found["difference"]
    who = "neither SPIN nor continued SFT is ahead"
    if abs(gain) > 2 * found["error"]:
        who = "SPIN is ahead of continued SFT" if gain > 0 else "continued SFT is ahead of SPIN"
    values = f"{NAMES[metric]}, {found['B']:.3f} against {found['A']:.3f} of continued SFT"
    difference = f"a difference of {found['difference']:+.4f} (standard error {found['error']:.4f})"
    return f"At θ_{t} {who}: {values}, {difference}."
