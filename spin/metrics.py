"""The figures of a training step: names, sums over pairs and ranks."""

import math

import torch

from loss import spin_margin
from spin.distributed import sum_over_ranks
from spin.pairs import tokens

# of metrics.jsonl: means over the pairs of the global batch; null where the objective has none
MEANS = ("loss", "margin", "margin_std", "win_rate", "logratio_real", "logratio_generated")


def of_step(passes, opponent, recipe) -> dict:
    """The means of one optimizer step over the pairs of its global batch, and its tokens.
    passes: what this rank's micro-batches left, (rows, weight (B,), losses (B,), policy) each;
    policy (2B,) is log p_θ, the real ones first; (B,) for SFT. opponent: (N, 2), log p_θt."""
    sums = 0.0
    for rows, weight, losses, policy in passes:
        # the columns of figures, (B,) each
        columns = {"loss": losses}
        if recipe.objective == "spin":
            real, generated = policy.chunk(2)
            opponent_real, opponent_generated = opponent_of(rows, opponent, policy)
            margin = spin_margin(real, generated, opponent_real, opponent_generated, recipe.lam)
            columns |= {"margin": margin, "margin_std": margin**2}
            columns["win_rate"] = (margin > 0) + 0.5 * (margin == 0)
            columns["logratio_real"] = real - opponent_real
            columns["logratio_generated"] = generated - opponent_generated
        for half in ("real", "generated"):
            columns[f"length_{half}"] = torch.tensor([int(row[half][1].sum()) for row in rows])
        columns["pairs"] = torch.ones(len(rows))
        columns["tokens"] = torch.tensor([tokens(row, recipe.objective) for row in rows])
        values = torch.stack([column.double().cpu() for column in columns.values()])
        sums += values @ weight.double()
    sums = dict(zip(columns, sum_over_ranks(sums).tolist(), strict=True))
    pairs = sums.pop("pairs")
    means = {name: total / pairs for name, total in sums.items()}
    if "margin" in means:  # margin_std was the mean square
        means["margin_std"] = math.sqrt(max(0.0, means["margin_std"] - means["margin"] ** 2))
    means["tokens"] *= pairs
    return {**dict.fromkeys(MEANS), **means}


def opponent_of(rows, opponent, like) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_θt of the rows' real and generated answers, (B,) each, as `like` is."""
    return opponent[[row["index"] for row in rows]].to(like).unbind(1)
