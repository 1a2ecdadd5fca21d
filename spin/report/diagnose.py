"""What a bad run looks like, in words: for the stages as they run, and for the report."""

import math
import sys
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from loss import ELL
from spin.files import read_jsonl


def warn(message: str | None):
    """A line on stderr that is a warning, and no error."""
    if message:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def ended_alike(rows) -> str | None:
    """In words, what is wrong if all answers of generated.jsonl ended alike; else None."""
    ends = {row["finish"] if row["generated"].strip() else "empty" for row in rows}
    if ends == {"length"}:
        return (
            "every answer was cut off at --max-new-tokens: is this the model's --template? SPIN "
            "cannot teach the model to end its answers"
        )
    if ends == {"empty"}:
        return "every answer is empty: is this the model's --template? was it trained too far?"
    return None


def not_held_out(pairs, answered: Path) -> str | None:
    """In words, how many held-out prompts are in a generated.jsonl, if any; else None."""
    rows = read_jsonl(answered) if answered.exists() else ()
    asked = {" ".join(row["prompt"].split()) for row in rows}
    shared = sum(" ".join(pair["prompt"].split()) in asked for pair in pairs)
    why = f"{shared} of the {len(pairs)} held-out prompts are trained on: these metrics say little"
    return f"{why} about others, so choose another --eval-data" if shared else None


def new_collapse(rows, t: int) -> str | None:
    """all_less_likely of the latest five rows of iteration t, if it held of no earlier ones."""
    found = all_less_likely(rows[-5:])
    if not found or any(all_less_likely(rows[i : i + 5]) for i in range(len(rows) - 5)):
        return None
    return f"step {rows[-1]['step']} of iteration {t}: {found}"


def all_less_likely(rows) -> str | None:
    """A warning if the policy wins by making everything less likely, else None. rows: five steps of
    metrics.jsonl. The warning is due if every pair is won, while the log-ratio of the human answers
    is negative and fell by more than a nat."""
    if len(rows) < 5 or not all(row["win_rate"] == 1 for row in rows):
        return None
    first, last = rows[0]["logratio_real"], rows[-1]["logratio_real"]
    if last >= 0 or first - last <= 1:
        return None
    return (
        f"every pair is won, and the human answers lost {first - last:.1f} nats in 5 steps: the "
        "policy makes all answers less likely; try a lower --lr, fewer --epochs or a larger --lam"
    )


def warnings_about(recipe: dict, models: list[dict]) -> list[str]:
    """The known problems that a run shows, each in a sentence or two. models: eval.json of
    θ_0, θ_1, …, with the rows of metrics.jsonl as "metrics", of which the last tenth is judged."""
    start = float(ELL[recipe["ell"]](torch.zeros(())))  # ℓ(0): nothing is distinguished
    found = []
    for t, model in enumerate(models):
        if model["eos_rate"] < 0.9:
            cut = f"{1 - model['eos_rate']:.0%} of its answers were cut off at --max-new-tokens"
            found.append(f"θ_{t}: {cut}. They have no end to learn from.")
        if model.get("limit"):
            found.append(
                f"θ_{t}: its benchmarks have at most {model['limit']} questions per task. "
                "Do not compare them with the paper's."
            )
        steps = model["metrics"]
        if not steps:
            continue
        late = steps[-max(1, len(steps) // 10) :]
        keys = ("loss", "logratio_real", "length_real")
        loss, logratio, human = (fmean(row[key] for row in late) for key in keys)
        began = f"Iteration {t - 1}: the loss began at {start:.3f}, as for any model"
        if loss > 1.03 * start:
            found.append(
                f"{began}, and rose to {loss:.3f}: some margins are on the wrong side, or beyond "
                "what this loss wants. Try a lower learning rate or a smaller λ."
            )
        elif loss > 0.97 * start:
            found.append(
                f"{began}, and ended at {loss:.3f}. The policy hardly distinguishes human from "
                "generated answers. Try another learning rate or more steps, unless nothing is "
                "left to learn."
            )
        if logratio < 0:
            found.append(
                f"Iteration {t - 1}: the human answers became less likely, by {-logratio:.2f} nats "
                "on average. A lower learning rate, a larger λ or fewer epochs help."
            )
        # as ratios: half as long is as far off as twice as long
        lengths = [models[0]["mean_length"], model["mean_length"]]
        before, after = (abs(math.log(max(length, 0.1) / human)) for length in lengths)
        if after > before + math.log(1.25):
            found.append(
                f"θ_{t}: its answers have {lengths[1]:.1f} tokens on average, those of θ_0 "
                f"{lengths[0]:.1f}, the human ones {human:.1f}: the lengths drift away."
            )
    return found
