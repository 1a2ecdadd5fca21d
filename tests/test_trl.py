"""SPIN's loss on given pairs is DPO's: train.py beside TRL's DPOTrainer."""

import dataclasses
import json
import math
import random

import pytest
import train_vs_trl
from conftest import MICRO, REPO, THETA0, stage
from test_data import talk

import train
from spin.data.pairs import encode_pairs
from spin.data.rows import read_rows
from spin.data.text import make_renderer, render
from spin.files import read_jsonl, write_jsonl
from spin.recipe import ITER, Recipe, parse

DPO = ["--lam", "0.5", "--lr", "1e-4"]


@pytest.mark.parametrize("beforehand", [True, pytest.param(False, marks=pytest.mark.long)])
def test_twenty_losses_are_those_of_trls_dpo_trainer_on_the_same_ids(tmp_path, beforehand):
    recipe = Recipe(batch_size=8, epochs=1, lam=(0.5,), lr=(1e-4,), warmup=0.1)
    recipe = dataclasses.replace(recipe, micro_tokens=128, recompute=False)
    pairs = train_vs_trl.make_pairs(8 * 20, 60, prompt=(4, 12), half=(16, 60))
    losses, _ = train_vs_trl.ours(str(THETA0), pairs, recipe, tmp_path)
    trls, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, beforehand, 4)
    assert len(losses) == len(trls) == 20
    assert losses == pytest.approx(trls, rel=1e-3)
    assert max(losses) - min(losses) > 0.05  # control: they move, by far more than they may differ
    # control: another λ
    other = dataclasses.replace(recipe, lam=(0.45,))
    others, _ = train_vs_trl.ours(str(THETA0), pairs, other, tmp_path)
    assert others != pytest.approx(trls, rel=1e-3)


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """160 preferences in UltraFeedback-binarized's shape: the human answer, and a careless one.

    The prompt is text, both sides are messages."""
    rng = random.Random(0)
    rows = []
    for i, row in enumerate(read_rows(str(REPO / "demo" / "heldout.jsonl"))[:160]):
        x, y = row["prompt"], row["response"]
        careless = rng.choice((f"um, {y}", f"{y} {y}", y[::-1] + "..."))
        sides = {"chosen": talk(x, y), "rejected": talk(x, careless)}
        scores = {"score_chosen": 8.0, "score_rejected": 3.0}
        rows.append({"prompt": x, "prompt_id": str(i), **sides, **scores})
    path = tmp_path_factory.mktemp("pairs") / "preferences.jsonl"
    write_jsonl(path, rows)
    return path


def test_dpo_from_the_same_texts_has_trls_losses(tmp_path, preferences, tokenizer):
    """Each side reads the file and tokenises for itself."""
    flags = ["--batch-size", "8", "--epochs", "1", "--micro-tokens", "128", "--iter", "0"]
    flags += [*DPO, "--pairs", str(preferences)]
    recipe, args = parse([*MICRO, *flags], "", ITER, train.PAIRS)
    renderer = make_renderer(tokenizer, "paper")
    rows = train.rows_to_train_on(recipe, args, renderer)
    pairs = encode_pairs(rows, renderer, recipe)
    texts = []
    for row in read_jsonl(preferences):
        answers = {side: " " + row[side][1]["content"] for side in ("chosen", "rejected")}
        prompt = render(renderer, {"prompt": row["prompt"]}).rstrip(" ")
        texts.append({"prompt": prompt, **answers})

    losses, _ = train_vs_trl.ours(str(THETA0), pairs, recipe, tmp_path)
    trls, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, True, 8, texts)
    assert len(losses) == len(trls) == 20 and losses == pytest.approx(trls, rel=1e-3)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(losses) - min(losses) > 0.05  # control: they move
    # control: without the answer's space
    other = [{**row, "chosen": row["chosen"].strip()} for row in texts]
    others, _ = train_vs_trl.trl(str(THETA0), pairs, recipe, tmp_path, True, 8, other)
    assert others != pytest.approx(trls, rel=1e-3)


def test_spin_then_dpo_runs_on_the_demo(played, preferences, tmp_path):
    """The paper's Table 3: θ_1 of SPIN starts and is the opponent, preferences are the pairs."""
    theta_1 = played / "iter0" / "model"
    run = tmp_path / "dpo"
    stage("train", run, "--iter", 0, "--model", theta_1, "--pairs", preferences, *DPO)
    steps = list(read_jsonl(run / "iter0" / "metrics.jsonl"))
    assert len(steps) == 2 * math.ceil(160 / 12)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # its opponent is θ_1
    assert sum(s["win_rate"] for s in steps[-5:]) / 5 > 0.8 and steps[-1]["loss"] < 0.6
    stage("evaluate", run, "--theta0", "--model", theta_1, *DPO)
    stage("evaluate", run, "--iter", 0, "--model", theta_1, *DPO)

    def exact_match(folder):
        return json.loads((folder / "eval.json").read_text())["expected_exact_match"]

    # it is θ_1 that began
    assert exact_match(run) == pytest.approx(exact_match(played / "iter0"), rel=1e-6)
    assert exact_match(run / "iter0") > exact_match(run)
