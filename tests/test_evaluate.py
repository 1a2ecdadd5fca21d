"""evaluate.py: the figures against oracles."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import MICRO, THETA0, torchrun
from transformers import AutoModelForCausalLM

import evaluate
from loss import sequence_logps
from spin.codec import load_codec
from spin.files import read_jsonl
from spin.flags import parse
from spin.intervals import COLUMNS
from spin.packing import pack
from spin.sampling import sample, uniforms
from spin.selection import select
from spin.sources import read_rows
from spin.tokens import encode


def held_out():
    recipe, _ = parse(MICRO)
    codec = load_codec(str(THETA0), recipe)
    return codec, select(read_rows(recipe.eval_data), "held-out", codec, recipe, 12)[0]


def test_expected_exact_match_and_nll_are_what_the_chain_rule_gives(played):
    figures = json.loads((played / "eval.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.float64).eval()
    codec, pairs = held_out()
    chances, cooler, nll, tokens, greedy = [], [], 0.0, 0, []
    for pair in pairs:
        ids, mask = encode(codec, pair, pair["real"])
        logits = model(torch.tensor([ids])).logits[0]
        cool = (logits / 0.6).softmax(-1)
        factors = [cool[j - 1, ids[j]].item() for j in range(len(ids)) if mask[j]]
        cooler.append(math.prod(factors))
        logps = logits.log_softmax(-1)
        terms = [logps[j - 1, ids[j]].item() for j in range(len(ids)) if mask[j]]
        best = [logps[j - 1].argmax().item() == ids[j] for j in range(len(ids)) if mask[j]]
        chances.append(math.exp(sum(terms)))
        greedy.append(all(best))
        nll, tokens = nll - sum(terms), tokens + len(terms)
    assert figures["n"] == 12
    assert figures["expected_exact_match"] == pytest.approx(sum(chances) / 12, rel=1e-4)
    assert figures["expected_exact_match_cooler"] == pytest.approx(sum(cooler) / 12, rel=1e-4)
    assert sum(cooler) > 1.1 * sum(chances)  # control: the temperature makes a difference
    assert figures["greedy_exact_match"] == pytest.approx(sum(greedy) / 12)
    assert figures["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    spread = torch.tensor(chances).std().item() / math.sqrt(12)
    assert figures["expected_exact_match_stderr"] == pytest.approx(spread, rel=1e-3)
    assert figures["win_rate"] is None and figures["margin"] is None  # nobody to play against


def test_a_model_against_itself_wins_half_with_margin_zero(tmp_path, capsys):
    out, model = str(tmp_path / "out.json"), str(THETA0)
    evaluate.main([*MICRO, "--model", model, "--opponent", model, "--out", out])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["win_rate"] == 0.5 and figures["margin"] == pytest.approx(0, abs=1e-5)


def test_theta_1_is_evaluated_against_theta_0_and_wins(played):
    figures = json.loads((played / "iter0" / "eval.json").read_text())
    assert figures["win_rate"] > 0.5 and figures["margin"] > 0
    start = json.loads((played / "eval.json").read_text())
    assert figures["expected_exact_match"] > start["expected_exact_match"]


@torch.no_grad()
def test_the_held_out_margin_is_the_papers_with_the_iterations_own_lambda(played):
    """λ (log p_θ2/p_θ1 (y|x) − log p_θ2/p_θ1 (y'|x)), y' ~ p_θ1, a sequence at a time."""
    codec, pairs = held_out()
    theta_1, theta_2 = (
        AutoModelForCausalLM.from_pretrained(
            played / f"iter{t}" / "model", dtype=torch.float32
        ).eval()
        for t in (0, 1)
    )
    u = np.stack([uniforms(0, 1, pair["id"], 1, number=24) for pair in pairs])
    drawn = sample(theta_1, [pair["prompt_ids"] for pair in pairs], codec.end, 24, u)
    margins = []
    for pair, (y, _) in zip(pairs, drawn, strict=True):
        two = [encode(codec, pair, response) for response in (pair["real"], y)]
        new, old = (
            [sequence_logps(m, **pack([s], "cpu")).item() for s in two] for m in (theta_2, theta_1)
        )
        margins.append(4.0 * ((new[0] - old[0]) - (new[1] - old[1])))
    figures = json.loads((played / "iter1" / "eval.json").read_text())
    assert figures["margin"] == pytest.approx(sum(margins) / 12, rel=1e-3, abs=1e-4)
    assert figures["margin"] != pytest.approx(
        sum(margins) / 12 * 5 / 4, rel=1e-2
    )  # control: iteration 0's λ
    assert figures["win_rate"] == pytest.approx(sum((m > 0) + 0.5 * (m == 0) for m in margins) / 12)


def test_two_ranks_give_the_figures_of_one(played, tmp_path):
    done = torchrun(2, "evaluate.py", *MICRO, "--run", tmp_path, "--theta0")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((run / "eval.json").read_text()) for run in (played, tmp_path))
    for key in ("left_out", "made_from"):
        assert two.pop(key) == one.pop(key)
    assert two == {
        k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in one.items()
    }


def test_the_figures_by_prompt_have_the_means_of_eval_json_and_temperature_1_is_temperature_1(
    played, tmp_path
):
    figures = json.loads((played / "iter0" / "eval.json").read_text())
    rows = list(read_jsonl(played / "iter0" / "by_prompt.jsonl"))
    assert [row["id"] for row in rows] == [pair["id"] for pair in held_out()[1]]
    for key in COLUMNS:
        if key not in ("nll", "tokens"):
            assert sum(row[key] for row in rows) / 12 == pytest.approx(figures[key])
    assert sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows) == pytest.approx(
        figures["nll_per_token"]
    )
    out = tmp_path / "out.json"
    evaluate.main([*MICRO, "--model", str(THETA0), "--eval-temperature", "1", "--out", str(out)])
    at_1 = json.loads(out.read_text())
    assert at_1["expected_exact_match_cooler"] == pytest.approx(at_1["expected_exact_match"])


def test_a_one_off_evaluation_leaves_no_run_behind(tmp_path, capsys):
    evaluate.main([*MICRO, "--run", str(tmp_path / "run"), "--model", str(THETA0)])
    assert "expected_exact_match" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--iter", "0", "--theta0"], "exclude each other"),
        (["--iter", "0", "--opponent", str(THETA0)], "go with --model alone"),
        (["--theta0", "--out", "out.json"], "go with --model alone"),
        (["--model", str(THETA0), "--opponent", "no/such/model"], "no model at no/such/model"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, word, tmp_path, refused):
    assert word in refused(lambda: evaluate.main([*MICRO, "--run", str(tmp_path / "run"), *flags]))
    assert not (tmp_path / "run").exists()
