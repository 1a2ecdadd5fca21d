"""SPIN's loss on given pairs is DPO's: train.py beside TRL's DPOTrainer."""

import json
import math
import random
import sys

import pytest
from conftest import MICRO, REPO, THETA0, stage

sys.path.insert(0, str(REPO / "benchmarks"))
import train_vs_trl

import train
from spin.data import read_jsonl, read_rows, render, write_jsonl
from spin.recipe import Recipe, parse


@pytest.mark.parametrize("beforehand", [True, False])
def test_twenty_losses_are_those_of_trls_dpo_trainer_on_the_same_ids(tmp_path, beforehand):
    recipe = Recipe(
        batch_size=8,
        epochs=1,
        lam=(0.5,),
        lr=(1e-4,),
        micro_tokens=128,
        recompute=False,
        warmup=0.1,
    )
    pairs = train_vs_trl.make_pairs(8 * 20, 60, prompt=(4, 12), half=(16, 60))
    losses, _ = train_vs_trl.ours(str(THETA0), pairs, recipe, tmp_path)
    trls, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, beforehand, 4)
    assert len(losses) == len(trls) == 20
    assert losses == pytest.approx(trls, rel=1e-3)
    assert max(losses) - min(losses) > 0.05  # control: they move, by far more than they may differ
    other = Recipe(**{**vars(recipe), "lam": (0.45,)})
    assert train_vs_trl.ours(str(THETA0), pairs, other, tmp_path)[0] != pytest.approx(
        trls, rel=1e-3
    )  # control: another λ


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """160 preferences in UltraFeedback-binarized's shape, prompt as text and both sides as messages: the human answer, and a careless one."""
    path, rng = tmp_path_factory.mktemp("pairs") / "preferences.jsonl", random.Random(0)
    rows = [
        (row["prompt"], row["response"])
        for row in read_rows(str(REPO / "demo" / "heldout.jsonl"))[:160]
    ]
    talk = lambda x, y: [{"role": "user", "content": x}, {"role": "assistant", "content": y}]  # noqa: E731
    write_jsonl(
        path,
        (
            {
                "prompt": x,
                "prompt_id": str(i),
                "chosen": talk(x, y),
                "rejected": talk(x, rng.choice((f"um, {y}", f"{y} {y}", y[::-1] + "..."))),
                "score_chosen": 8.0,
                "score_rejected": 3.0,
            }
            for i, (x, y) in enumerate(rows)
        ),
    )
    return path


def test_dpo_from_the_same_texts_has_trls_losses(tmp_path, preferences, tokenizer):
    """Each side reads the file and tokenises for itself: template, BOS, EOS, the space before the answer, the mask."""
    flags = [
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--lam",
        "0.5",
        "--lr",
        "1e-4",
        "--micro-tokens",
        "128",
    ]
    recipe, args = parse([*MICRO, *flags])
    args.pairs, args.iter = [str(preferences)], 0
    pairs = train.load_pairs(recipe, args, tokenizer, len(tokenizer))
    texts = [
        {
            "prompt": render(tokenizer, "paper", row["prompt"]).rstrip(" "),
            "chosen": " " + row["chosen"][1]["content"],
            "rejected": " " + row["rejected"][1]["content"],
        }
        for row in read_jsonl(preferences)
    ]
    losses, _ = train_vs_trl.ours(str(THETA0), pairs, recipe, tmp_path)
    trls, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, True, 8, texts)
    assert len(losses) == len(trls) == 20 and losses == pytest.approx(trls, rel=1e-3)
    assert (
        losses[0] == pytest.approx(math.log(2), abs=1e-6) and max(losses) - min(losses) > 0.05
    )  # control: they move
    other = [
        {**row, "chosen": row["chosen"].strip()} for row in texts
    ]  # control: without the answer's space
    assert train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, True, 8, other)[
        0
    ] != pytest.approx(trls, rel=1e-3)


def test_spin_then_dpo_runs_on_the_demo(played, preferences, tmp_path):
    """The paper's Table 3: θ_1 of SPIN as the starting model and the opponent, preferences as pairs."""
    theta_1 = played / "iter0" / "model"
    stage(
        "train",
        tmp_path / "dpo",
        "--iter",
        0,
        "--model",
        theta_1,
        "--pairs",
        preferences,
        "--lam",
        "0.5",
        "--lr",
        "1e-4",
    )
    steps = list(read_jsonl(tmp_path / "dpo" / "iter0" / "metrics.jsonl"))
    assert len(steps) == 2 * math.ceil(160 / 12) and steps[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )  # its opponent is θ_1
    assert sum(s["win_rate"] for s in steps[-5:]) / 5 > 0.8 and steps[-1]["loss"] < 0.6
    stage(
        "evaluate", tmp_path / "dpo", "--theta0", "--model", theta_1, "--lam", "0.5", "--lr", "1e-4"
    )
    stage(
        "evaluate",
        tmp_path / "dpo",
        "--iter",
        0,
        "--model",
        theta_1,
        "--lam",
        "0.5",
        "--lr",
        "1e-4",
    )
    before, after = (
        json.loads((tmp_path / "dpo" / where / "eval.json").read_text()) for where in ("", "iter0")
    )
    spin = json.loads((played / "iter0" / "eval.json").read_text())
    assert before["expected_exact_match"] == pytest.approx(
        spin["expected_exact_match"], rel=1e-6
    )  # it is θ_1 that began
    assert after["expected_exact_match"] > before["expected_exact_match"]
