"""Figures of a model from its figures prompt by prompt: means, standard errors, intervals.

A table has a row for each held-out prompt and the columns of COLUMNS; figures.py computes it."""

import math

import numpy as np

# the figures of one prompt, in the order of a row of the table; eval.json has their means
COLUMNS = (
    "expected_exact_match",  # p_θ(y, EOS | x) of the human answer
    "expected_exact_match_cooler",  # the same where each token is sampled at --eval-temperature
    "greedy_exact_match",  # 1 if the greedy answer is the human one
    "nll",  # −log p_θ(y|x), in nats
    "tokens",  # of the human answer
    "win_rate",  # 1 for a positive margin, ½ for a tie
    "margin",  # the argument of ℓ in (4.7); 0 without an opponent
    "eos_rate",  # 1 if the model's own sample ended by EOS
    "mean_length",  # tokens of that sample
)
COMPARED = ("expected_exact_match", "nll_per_token", "greedy_exact_match")
RESAMPLES = 10_000


def summarise(table: np.ndarray, game: bool) -> dict:
    """eval.json from a table of COLUMNS, (N, columns): means, and standard errors over prompts.
    game: whether an opponent played; without one, win_rate and margin are null."""
    n = len(table)
    values_of = dict(zip(COLUMNS, table.T, strict=True))
    nll, tokens = values_of.pop("nll"), values_of.pop("tokens")
    ratio = nll.sum() / tokens.sum()
    # a ratio of sums: its first-order deviation a prompt (the delta method)
    values_of["nll_per_token"] = ratio + (nll - ratio * tokens) / tokens.mean()
    result = {}
    for name, values in values_of.items():
        known = game or name not in ("win_rate", "margin")
        spread = values.std(ddof=1) / math.sqrt(n) if known and n > 1 else None
        result[name] = float(values.mean()) if known else None
        result[f"{name}_stderr"] = None if spread is None else float(spread)
    return {**result, "n": n}


def compare(a: np.ndarray, b: np.ndarray, seed: int) -> dict:
    """{"n", and for each figure its value for A, for B, the difference and its 95% interval}.
    a, b: (N, columns), a row of COLUMNS a prompt, both in the same order."""
    of_a, of_b = (compared(table.sum(0), len(table)).tolist() for table in (a, b))
    intervals = np.quantile(paired_bootstrap(a, b, seed), (0.025, 0.975), axis=0).T  # (3, 2)
    result = {"n": len(a)}
    for name, one, two, interval in zip(COMPARED, of_a, of_b, intervals.tolist(), strict=True):
        result[name] = {"A": one, "B": two, "B-A": two - one, "interval": interval}
    return result


def compared(sums: np.ndarray, n: int) -> np.ndarray:
    """The figures of COMPARED, (…, 3), from the sums of COLUMNS over n prompts, (…, columns)."""
    total = dict(zip(COLUMNS, np.moveaxis(sums, -1, 0), strict=True))
    exact, greedy = total["expected_exact_match"] / n, total["greedy_exact_match"] / n
    return np.stack((exact, total["nll"] / total["tokens"], greedy), -1)


def paired_bootstrap(a, b, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """compared(b) − compared(a), (resamples, 3): prompts drawn with replacement, the same for both.
    a, b: (N, columns), the rows of both in the same order. That pairing is what makes the interval
    narrow: most of the spread over prompts is that some prompts are harder, for both."""
    rng, n = np.random.default_rng(seed), len(a)
    differences = []
    for _ in range(math.ceil(resamples / 500)):
        times = rng.multinomial(n, np.full(n, 1 / n), size=500)  # how often each prompt is drawn
        differences.append(compared(times @ b, n) - compared(times @ a, n))
    return np.concatenate(differences)[:resamples]
