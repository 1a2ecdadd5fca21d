"""What a bad run looks like, in words: for the stages as they run, and for the report."""

import math
import sys

from tqdm import tqdm

# ℓ(0), the loss where real and generated answers are not told apart.
LOSS_AT_0 = {"logistic": math.log(2), "hinge": 1.0, "correlation": 1.0, "exponential": 1.0}


def warn(message: str | None):
    """A line on stderr that is a warning, and no error."""
    if message:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def ended_alike(rows) -> str | None:
    """In words, what is wrong if all answers of generated.jsonl ended alike; None if it is well."""
    ends = {row["finish"] if row["generated"].strip() else "empty" for row in rows}
    if ends == {"length"}:
        ask = "has it learnt to, and in this --template? SPIN cannot teach it to stop"
        cut = "every answer was cut off at --max-new-tokens: the model never ends one"
        return f"{cut}; {ask}"
    if ends == {"empty"}:
        ask = "is this its --template, and was theta_t trained too far?"
        return f"every answer is empty: the model ends at once; {ask}"
    return None


def new_collapse(rows, t: int) -> str | None:
    """all_less_likely of the latest five rows of iteration t, if it held of no earlier ones."""
    found = all_less_likely(rows[-5:])
    if not found or any(all_less_likely(rows[i : i + 5]) for i in range(len(rows) - 5)):
        return None
    return f"step {rows[-1]['step']} of iteration {t}: {found}"


def all_less_likely(rows) -> str | None:
    """In words, what is wrong when the policy wins by making everything less likely; else None.
    rows: the latest five rows of metrics.jsonl. The rule: five steps that win every pair, while the
    log-ratio of the human answers is negative and fell by more than a nat."""
    if len(rows) < 5 or not all(row["win_rate"] == 1 for row in rows):
        return None
    first, last = rows[0]["logratio_real"], rows[-1]["logratio_real"]
    fall = first - last
    if fall <= max(1, first):
        return None
    found = f"every pair is won, and the human answers lost {fall:.1f} nats in 5 steps"
    mend = "a lower --lr, fewer --epochs or a larger --lam would hold it back"
    return f"{found}: the policy makes all answers less likely; {mend}"


def signs_of_trouble(summary: dict, steps: list[list[dict]]) -> list[str]:
    """What is known to go wrong and is seen in a run, a sentence or two each.
    summary: "recipe" and, under "spin", the eval.json of θ_0, θ_1, … steps: the rows of
    metrics.jsonl, iteration by iteration. An iteration is judged by the last tenth of its steps."""
    start = LOSS_AT_0[summary["recipe"].get("ell", "logistic")]
    models = summary["spin"]
    found = []
    for t, rows in enumerate(steps):
        if rows:
            late = rows[-max(1, len(rows) // 10) :]
            keys = ("loss", "logratio_real", "length_real")
            loss, logratio, human = (sum(row[key] for row in late) / len(late) for key in keys)
            if loss > 0.97 * start:
                found.append(
                    f"Iteration {t}: the loss ended at {loss:.3f} and began at {start:.3f}, where "
                    "real and generated answers are not told apart. The learning rate or the "
                    "number of steps may be too small, or too large; or nothing is left to learn."
                )
            if logratio < 0:
                found.append(
                    f"Iteration {t}: the human answers became less likely, by {-logratio:.2f} nats "
                    "on average: the policy wins by making the generated ones less likely still. "
                    "A lower learning rate, a larger λ or fewer epochs help."
                )
            found += drifting_lengths(t + 1, models, human)
    for t, share in enumerate(1 - figures["eos_rate"] for figures in models):
        if share > 0.1:
            cut = f"θ_{t}: {share:.0%} of its answers were cut off at --max-new-tokens"
            found.append(f"{cut}; they have no end to learn from.")
    return found


def drifting_lengths(t: int, models: list[dict], human: float) -> list[str]:
    """Of θ_t: its answers' mean length is further from the human one, in tokens, than θ_0's was.
    Distances are ratios, so half as long is as far as twice as long; a quarter more is allowed."""
    mine = models[t]["mean_length"]
    first = models[0]["mean_length"]
    distance, before = (abs(math.log(max(length, 0.1) / human)) for length in (mine, first))
    if distance <= before + math.log(1.25):
        return []
    found = f"its answers have {mine:.1f} tokens on average, the human ones {human:.1f}"
    return [f"θ_{t}: {found}: the lengths drift away from them (θ_0: {first:.1f})."]


def thinned(rows: list[dict], key: str, most: int = 400) -> list[tuple[float, float, float]]:
    """(step, value, 0) of a key, at most so many: each the mean over as many steps as it takes."""
    size = -(-len(rows) // most)  # rounded up
    points = []
    for first in range(0, len(rows), size):
        values = [row[key] for row in rows[first : first + size] if row.get(key) is not None]
        if values:
            points.append((first + (size - 1) / 2, sum(values) / len(values), 0))
    return points
