"""SPIN's loss on given pairs is DPO's: train.py beside TRL's DPOTrainer."""

import sys

import pytest
from conftest import REPO, THETA0

sys.path.insert(0, str(REPO / "benchmarks"))
import train_vs_trl  # noqa: E402

from recipe import Recipe  # noqa: E402


@pytest.mark.parametrize("beforehand", [True, False])
def test_twenty_losses_are_those_of_trls_dpo_trainer_on_the_same_ids(tmp_path, beforehand):
    recipe = Recipe(batch_size=8, epochs=1, lam=(0.5,), lr=(1e-4,), micro_tokens=128, recompute=False, warmup=0.1)
    pairs = train_vs_trl.make_pairs(8 * 20, 60, prompt=(4, 12), half=(16, 60))
    losses, _ = train_vs_trl.ours(str(THETA0), pairs, recipe, tmp_path)
    trls, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, beforehand, 4)
    assert len(losses) == len(trls) == 20
    assert losses == pytest.approx(trls, rel=1e-3)
    assert max(losses) - min(losses) > 0.05  # control: they move, by far more than they may differ
    other = Recipe(**{**vars(recipe), "lam": (0.45,)})
    assert train_vs_trl.ours(str(THETA0), pairs, other, tmp_path)[0] != pytest.approx(trls, rel=1e-3)  # control: another λ
