"""evaluate.py: the figures against oracles."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO, THETA0, load, on_ranks, stage
from transformers import AutoModelForCausalLM

import evaluate
from loss import sequence_logps
from spin.data.rows import read_rows
from spin.data.selection import select
from spin.data.text import encode, load_renderer
from spin.files import read_jsonl, write_jsonl
from spin.model.packing import pack
from spin.recipe import parse
from spin.report import evaluation_metrics
from spin.report.summary import summarise
from spin.run.ranks import process_group
from spin.sampling.engines import sample, uniforms


def held_out():
    recipe, _ = parse(MICRO)
    renderer = load_renderer(str(THETA0), recipe)
    return renderer, select(read_rows(recipe.eval_data), "held-out", renderer, recipe, 12)[0]


def test_expected_exact_match_and_nll_are_what_the_chain_rule_gives(played):
    found = json.loads((played / "eval.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.float64).eval()
    renderer, pairs = held_out()
    chances, cooler, nll, tokens, greedy = [], [], 0.0, 0, []
    for pair in pairs:
        ids, mask = encode(renderer, pair, pair["real"])
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
    assert found["n"] == 12
    assert found["expected_exact_match"] == pytest.approx(sum(chances) / 12, rel=1e-4)
    assert found["expected_exact_match_cooler"] == pytest.approx(sum(cooler) / 12, rel=1e-4)
    assert sum(cooler) > 1.1 * sum(chances)  # control: the temperature makes a difference
    assert found["greedy_exact_match"] == pytest.approx(sum(greedy) / 12)
    assert found["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    spread = torch.tensor(chances).std().item() / math.sqrt(12)
    assert found["expected_exact_match_stderr"] == pytest.approx(spread, rel=1e-3)
    assert found["win_rate"] is None and found["margin"] is None  # nobody to play against


def test_a_model_against_itself_wins_half_with_margin_zero(played):
    recipe, _ = parse(MICRO)
    theta = str(THETA0)
    with process_group() as world:
        read = evaluation_metrics.read_held_out(theta, recipe)[:2]
        table, _ = evaluation_metrics.metrics_by_prompt(theta, theta, *read, recipe, 0, world)
    result = summarise(table, has_opponent=True)
    assert result["win_rate"] == 0.5 and result["margin"] == pytest.approx(0, abs=1e-5)


def test_the_figures_of_any_model_go_where_out_says_and_leave_no_run(played, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--run", str(tmp_path / "run"), "--model", str(played / "iter0" / "model")]
    evaluate.main([*MICRO, *flags, "--out", str(out)])
    ours, of_run = (json.loads(p.read_text()) for p in (out, played / "iter0" / "eval.json"))
    for key, value in ours.items():
        if key not in ("win_rate", "margin", "made_from") and not key.endswith("_stderr"):
            assert value == of_run[key]
    assert ours["win_rate"] is None and ours["margin"] is None
    assert "expected_exact_match" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@torch.no_grad()
def test_the_held_out_margin_is_the_papers_with_the_iterations_own_lambda(played):
    """λ (log p_θ2/p_θ1 (y|x) − log p_θ2/p_θ1 (y'|x)), y' ~ p_θ1, a sequence at a time."""
    renderer, pairs = held_out()
    theta_1, theta_2 = (load(played / f"iter{t}" / "model") for t in (0, 1))
    u = np.stack([uniforms(0, 1, pair["id"], 1, number=24) for pair in pairs])
    drawn = sample(theta_1, [pair["prompt_ids"] for pair in pairs], renderer.eot_id, 24, u)
    margins = []
    for pair, (y, _) in zip(pairs, drawn, strict=True):
        two = [encode(renderer, pair, response) for response in (pair["real"], y)]
        new, old = (
            [sequence_logps(m, **pack([s], "cpu")).item() for s in two] for m in (theta_2, theta_1)
        )
        margins.append(4.0 * ((new[0] - old[0]) - (new[1] - old[1])))
    found = json.loads((played / "iter1" / "eval.json").read_text())
    mean = sum(margins) / 12
    assert found["margin"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    assert found["margin"] != pytest.approx(mean * 5 / 4, rel=1e-2)  # control: iteration 0's λ
    assert found["win_rate"] == pytest.approx(sum((m > 0) + 0.5 * (m == 0) for m in margins) / 12)
    assert found["win_rate"] > 0.5


def test_two_ranks_give_the_figures_of_one(played, tmp_path):
    run = tmp_path / "run"
    code, err = on_ranks(2, lambda: stage("evaluate", run, "--theta0"), tmp_path)
    assert code == 0, err
    one, two = (json.loads((folder / "eval.json").read_text()) for folder in (played, run))
    for key in ("left_out", "made_from"):
        assert two.pop(key) == one.pop(key)
    assert two == {
        k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in one.items()
    }


def test_held_out_prompts_that_are_trained_on_are_counted_in_a_warning(tmp_path, capsys, played):
    rows = list(read_jsonl(played / "iter0" / "generated.jsonl"))[:3]
    rows = [{"prompt": row["prompt"] + " ", "response": "else"} for row in rows]
    rows += list(read_rows("demo/heldout.jsonl"))[:5]
    write_jsonl(tmp_path / "held.jsonl", rows)
    flags = ["--iter", 0, "--eval-data", tmp_path / "held.jsonl"]
    for name in ("generate", "train", "evaluate"):
        stage(name, tmp_path / "run", *flags)
    warning = capsys.readouterr().err
    assert "warning: 3 of the 8 held-out prompts are trained on" in warning
    write_jsonl(tmp_path / "other.jsonl", rows[3:])  # control
    shutil.copytree(tmp_path / "run" / "iter0", tmp_path / "other" / "iter0")
    (tmp_path / "other" / "iter0" / "eval.json").unlink()
    stage("evaluate", tmp_path / "other", "--iter", 0, "--eval-data", tmp_path / "other.jsonl")
    assert "held-out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--iter", "0", "--theta0"], "exclude each other"),
        (["--iter", "0", "--out", "out.json"], "goes with --model alone"),
        (["--theta0", "--out", "out.json"], "goes with --model alone"),
        (["--model", str(THETA0), "--out", "no/such/out.json"], "no directory"),
        (["--model", str(THETA0), "--opponent", str(THETA0)], "unrecognized arguments: --opponent"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, word, tmp_path, refused):
    assert word in refused(lambda: evaluate.main([*MICRO, "--run", str(tmp_path / "run"), *flags]))
    assert not (tmp_path / "run").exists()
