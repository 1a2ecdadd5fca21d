"""Training metrics: the means of one optimizer step over its pairs, on all ranks."""

import math

import torch

from loss import sft_loss_per_token, spin_margin
from spin.data.pairs import answer_lengths, opponent_of, tokens_of
from spin.run.ranks import sum_over_ranks

# of metrics.jsonl (docs/metrics.md); null where the objective has none
MEANS = ("loss", "margin", "margin_std", "win_rate", "logratio_real", "logratio_generated")


def of_step(passes, opponent, objective: str, lam: float, sft_weight: float = 0.0) -> dict:
    """The means of one optimizer step over the pairs of its global batch, and its tokens.
    passes: of each micro-batch of this rank (its pairs, their weight, losses (B,), policy), where
    policy is log p_θ: (2B,), the real answers first; for SFT (B,). opponent: (N, 2), log p_θt."""
    pairs = [pair for part, *_ in passes for pair in part]
    losses = torch.cat([losses for *_, losses, _ in passes])  # (B,)
    weights = torch.cat([torch.full_like(losses, weight) for _, weight, losses, _ in passes])
    columns = {"loss": losses}  # (B,) each
    if objective == "spin":
        halves = [policy.chunk(2) for *_, policy in passes]
        real, generated = (torch.cat(half) for half in zip(*halves, strict=True))
        opponent_real, opponent_generated = opponent_of(pairs, opponent, real)
        margin = spin_margin(real, generated, opponent_real, opponent_generated, lam)
        columns |= {"margin": margin, "margin_squared": margin**2}
        columns["win_rate"] = (margin > 0) + 0.5 * (margin == 0)
        columns["logratio_real"] = real - opponent_real
        columns["logratio_generated"] = generated - opponent_generated
        if sft_weight:
            columns["sft_loss"] = sft_loss_per_token(real, answer_lengths(pairs))
    values = torch.stack([column.double() for column in columns.values()])
    sums = (values @ weights.double()).cpu()
    counts = dict.fromkeys(("length_real", "length_generated", "pairs", "tokens"), 0.0)
    for part, weight, *_ in passes:
        for half in ("real", "generated"):
            counts[f"length_{half}"] += weight * sum(answer_lengths(part, half))
        counts["pairs"] += weight * len(part)
        counts["tokens"] += weight * sum(tokens_of(pair, objective) for pair in part)
    sums = torch.cat([sums, torch.tensor([*counts.values()], dtype=torch.float64)])
    sums = dict(zip([*columns, *counts], sum_over_ranks(sums).tolist(), strict=True))
    number = sums.pop("pairs")
    means = {name: total / number for name, total in sums.items()}
    if "margin" in means:
        variance = means.pop("margin_squared") - means["margin"] ** 2
        means["margin_std"] = math.sqrt(max(0.0, variance))
    means["tokens"] *= number
    return {**dict.fromkeys(MEANS), **means}
