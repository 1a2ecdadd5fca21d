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
        raise ValueError("they need metrics of the same prompts, two or more, tokenized alike")
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


def ahead(metric: str, a: list[dict], b: list[dict]) -> tuple[int, str] | None:
    """(1 if b is ahead of a by more than two standard errors of a metric of NAMES, -1 if it is
    behind by as much, else 0; the figures in words). a, b: the rows of two by_prompt.jsonl. None
    for fewer than FEW_PROMPTS, or if compare cannot join them."""
    try:
        found = compare(a, b)[metric]
    except ValueError:
        return None
    if found["error"] is None:
        return None
    gain = -found["difference"] if metric == "nll_per_token" else found["difference"]
    sign = 0 if abs(gain) <= 2 * found["error"] else 1 if gain > 0 else -1
    values = f"{NAMES[metric]}, {found['B']:.3f} against {found['A']:.3f}"
    difference = f"a difference of {found['difference']:+.4f} (standard error {found['error']:.4f})"
    return sign, f"{values}, {difference}"


def verdict(metric: str, t: int, spin: list[dict], sft: list[dict]) -> str | None:
    """In words: whether SPIN or continued SFT is ahead at θ_t. spin, sft: as b and a of ahead."""
    found = ahead(metric, sft, spin)
    who = {
        1: "SPIN is ahead of continued SFT",
        0: "neither SPIN nor continued SFT is ahead",
        -1: "continued SFT is ahead of SPIN",
    }
    return f"At θ_{t} {who[found[0]]}: {found[1]}." if found else None


def last_iteration(models: list[dict]) -> str | None:
    """In words: whether θ_t is ahead of the best model before it, and so whether to go on.
    models: of θ_0 to θ_t the keys of eval.json, and the rows of by_prompt.jsonl as "by_prompt".

    It judges by the expected exact match. There is no such sentence on the NLL, which may fall
    where answers get worse (docs/real-model.md). None where ahead gives None."""
    t = len(models) - 1
    best = max(range(t), key=lambda s: models[s]["expected_exact_match"])
    rows = models[best]["by_prompt"], models[t]["by_prompt"]
    found = ahead("expected_exact_match", *rows)
    if not found:
        return None
    name = f"θ_{best}"
    what = {
        1: f"ahead of {name}, the best model before it, so another iteration may help",
        0: f"within noise of {name}, the best model before it, so stop here",
        -1: f"behind {name}, so use {name}; a lower --lr or a larger --lam may help",
    }
    greedy = compare(*rows)["greedy_exact_match"]
    greedy = f"{greedy['difference']:+.4f} (standard error {greedy['error']:.4f})"
    return f"θ_{t} is {what[found[0]]}: {found[1]}. Greedy answers: {greedy}."
