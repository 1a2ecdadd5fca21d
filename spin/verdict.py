"""Whether SPIN or continued SFT is ahead in a run that has both, and by which figure."""

import numpy as np

from spin.intervals import COLUMNS, compare

NAMES = {
    "expected_exact_match": "expected exact match",
    "nll_per_token": "NLL per token of the human answers, in nats",
}
# Below this, exact matches are too rare to tell models apart: the answers are free text.
FREE_TEXT = 0.01


def leading_figure(summary: dict) -> str:
    """The figure that a run is judged by: the expected exact match, or, where no model of the run
    reaches 1% of it, the NLL per token of the human answers."""
    models = summary["spin"] + summary["sft"]
    best = max(figures["expected_exact_match"] for figures in models)
    return "nll_per_token" if best < FREE_TEXT else "expected_exact_match"


def last_of_both(summary: dict) -> int:
    """T of the last θ_T that SPIN and continued SFT both have; 0 without a baseline."""
    return max(0, min(len(summary["spin"]), len(summary["sft"])) - 1)


def verdict(summary: dict, spin: list[dict], sft: list[dict]) -> str | None:
    """In words: which is ahead at θ_T, by how much, and the 95% interval over prompts.
    spin, sft: the rows of by_prompt.jsonl of both θ_T. None where they are not whole, or not of the
    same prompts."""
    whole = all(row.keys() >= {"id", *COLUMNS} for row in spin + sft)
    if not (spin and whole and [row["id"] for row in spin] == [row["id"] for row in sft]):
        return None
    tables = [np.array([[row[name] for name in COLUMNS] for row in rows]) for rows in (sft, spin)]
    key = leading_figure(summary)
    found = compare(*tables, seed=summary["recipe"]["seed"])[key]
    low, high = found["interval"]
    lead = -found["B-A"] if key == "nll_per_token" else found["B-A"]
    who = "SPIN is ahead of continued SFT" if lead > 0 else "continued SFT is ahead of SPIN"
    if low <= 0 <= high:
        who = "neither SPIN nor continued SFT is ahead"
    values = f"{NAMES[key]}, {found['B']:.3f} against {found['A']:.3f} of continued SFT"
    interval = f"a difference of {found['B-A']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"At θ_{last_of_both(summary)} {who}: {values}, {interval}."
