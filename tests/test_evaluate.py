"""evaluate.py and report.py: the figures against oracles, and the page."""

import html
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO, REPO, THETA0, shell, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from loss import sequence_logps
from spin import recipe as recipes
from spin import report
from spin.data import encode, read_jsonl, read_rows, select
from spin.packing import pack
from spin.sampling import sample, uniforms


def held_out():
    recipe = recipes.parse(MICRO)[0]
    tokenizer = AutoTokenizer.from_pretrained(THETA0)
    return tokenizer, select(
        read_rows(recipe.eval_data), recipe.eval_data, tokenizer, "paper", 12, 0, 64, 24
    )[0]


def test_expected_exact_match_and_nll_are_what_the_chain_rule_gives(played):
    figures = json.loads((played / "eval.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.float64).eval()
    tokenizer, pairs = held_out()
    chances, nll, tokens, greedy = [], 0.0, 0, []
    for pair in pairs:
        ids, mask = encode(tokenizer, "paper", pair, pair["real"])
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms = [logps[j - 1, ids[j]].item() for j in range(len(ids)) if mask[j]]
        best = [logps[j - 1].argmax().item() == ids[j] for j in range(len(ids)) if mask[j]]
        chances.append(math.exp(sum(terms)))
        greedy.append(all(best))
        nll, tokens = nll - sum(terms), tokens + len(terms)
    assert figures["n"] == 12
    assert figures["expected_exact_match"] == pytest.approx(sum(chances) / 12, rel=1e-4)
    assert figures["greedy_exact_match"] == pytest.approx(sum(greedy) / 12)
    assert figures["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    spread = torch.tensor(chances).std().item() / math.sqrt(12)
    assert figures["expected_exact_match_stderr"] == pytest.approx(spread, rel=1e-3)
    assert figures["win_rate"] is None and figures["margin"] is None  # nobody to play against


def test_a_model_against_itself_wins_half_with_margin_zero(tmp_path, capsys):
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(THETA0),
            "--opponent",
            str(THETA0),
            "--out",
            str(tmp_path / "out.json"),
        ]
    )
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
    tokenizer, pairs = held_out()
    theta_1, theta_2 = (
        AutoModelForCausalLM.from_pretrained(
            played / f"iter{t}" / "model", dtype=torch.float32
        ).eval()
        for t in (0, 1)
    )
    u = np.stack([uniforms(0, 1, pair["id"], 1, number=24) for pair in pairs])
    drawn = sample(theta_1, [pair["prompt_ids"] for pair in pairs], tokenizer.eos_token_id, 24, u)
    margins = []
    for pair, (y, _) in zip(pairs, drawn):
        two = [encode(tokenizer, "paper", pair, response) for response in (pair["real"], y)]
        new, old = (
            [sequence_logps(m, *pack([s], "cpu")).item() for s in two] for m in (theta_2, theta_1)
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
    assert two == {
        k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in one.items()
    }


def test_a_one_off_evaluation_leaves_no_run_behind(tmp_path, capsys):
    evaluate.main([*MICRO, "--run", str(tmp_path / "run"), "--model", str(THETA0)])
    assert "expected_exact_match" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_report_shows_every_iteration_and_loads_nothing_from_elsewhere(played, capsys):
    report.main([*MICRO, "--run", str(played)])
    summary = json.loads((played / "summary.json").read_text())
    assert [f["n"] for f in summary["spin"]] == [12, 12, 12] and summary["sft"] == []
    page = (played / "report.html").read_text()
    assert (
        page.count("<svg") == 2 + 6 and page.count("<circle") == 6
    )  # two charts of figures, six of training curves
    assert all(
        f"<b>{title}</b>" in page
        for title in ("Loss", "Margin", "Log-ratios", "Lengths", "Gradient norm", "Speed")
    )
    shown = [
        [row["answer"] for row in read_jsonl(folder / "answers.jsonl")]
        for folder in (played, played / "iter0", played / "iter1")
    ]
    assert [len(rows) for rows in shown] == [6, 6, 6] and shown[0] != shown[2]
    assert page.count('class="answers"') == 6 and page.count("θ<sub>2</sub></b>") == 6
    assert all(html.escape(answer) in page for rows in shown for answer in rows)
    assert f"{summary['spin'][2]['expected_exact_match']:.3f}" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "<script" not in page


def test_the_report_escapes_what_came_from_outside(played):
    evil = "<script>alert(1)</script>"
    summary = {
        "recipe": {"template": f"{evil}{{prompt}}"},
        "spin": [json.loads((played / "eval.json").read_text())] * 2,
        "sft": [],
        "benchmarks": {
            evil: {"arc_challenge": {"shots": 25, "n": 2, "figures": {"acc_norm,none": [0.5, 0.1]}}}
        },
    }
    row = {"prompt": evil, "real": evil, "answer": evil, "finish": "eos"}
    page = report.page(summary, evil, [], [(row, [row, row])], [evil])
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8


def healthy(played):
    """A run with nothing to warn of: θ_0, θ_1 and θ_2's figures, and twenty steps an iteration."""
    figures = json.loads((played / "iter0" / "eval.json").read_text())
    spin = [{**figures, "mean_length": 5.0, "eos_rate": 1.0} for _ in range(3)]
    step = {"loss": 0.5, "logratio_real": 1.0, "length_real": 5.0}
    return {"recipe": {"ell": "logistic"}, "spin": spin, "sft": []}, [
        [dict(step) for _ in range(20)] for _ in range(2)
    ]


@pytest.mark.parametrize(
    "harm, word",
    [
        (
            lambda summary, steps: [s.update(loss=0.69) for s in steps[1]],
            "Iteration 1: the loss ended at 0.690",
        ),
        (
            lambda summary, steps: (
                [s.update(loss=1.01) for s in steps[0]] + [summary["recipe"].update(ell="hinge")]
            ),
            "Iteration 0: the loss",
        ),
        (
            lambda summary, steps: [s.update(logratio_real=-3.0) for s in steps[0]],
            "less likely, by 3.00 nats",
        ),
        (
            lambda summary, steps: summary["spin"][2].update(mean_length=8.0),
            "θ_2: its answers have 8.0 tokens",
        ),
        (
            lambda summary, steps: summary["spin"][1].update(mean_length=2.0),
            "θ_1: its answers have 2.0 tokens",
        ),
        (
            lambda summary, steps: summary["spin"][0].update(eos_rate=0.6),
            "θ_0: 40% of its answers were cut off",
        ),
    ],
)
def test_the_report_warns_in_words_of_what_is_known_to_go_wrong(harm, word, played):
    assert report.warnings(*healthy(played)) == []  # control
    summary, steps = healthy(played)
    harm(summary, steps)
    found = [line for line in report.warnings(summary, steps) if word in line]
    assert found and found[0] in html.unescape(
        report.page(summary, "x", steps, [], report.warnings(summary, steps))
    )


def test_the_report_puts_benchmarks_beside_the_papers(played, tmp_path):
    run = shutil.copytree(played, tmp_path / "run")
    found = {
        "arc_challenge": {"shots": 25, "n": 12, "figures": {"acc_norm,none": [0.4321, 0.0123]}}
    }
    (run / "iter1" / "benchmarks.json").write_text(
        json.dumps({"model": "m", "limit": None, "tasks": found})
    )
    report.main([*MICRO, "--run", str(run)])
    page = (run / "report.html").read_text()
    assert (
        "43.21&nbsp;<small>± 1.23" in page
        and "θ_2 SPIN" in page
        and "63.16" in page
        and "weighted by subject" in page
    )
    assert json.loads((run / "summary.json").read_text())["benchmarks"] == {"θ_2 SPIN": found}


# ---- two models on the same prompts ------------------------------------------------------------------------------


def test_two_models_are_compared_prompt_by_prompt(played, tmp_path, capsys):
    theta_1 = str(played / "iter0" / "model")
    for name, models in (("two", (str(THETA0), theta_1)), ("same", (theta_1, theta_1))):
        evaluate.main([*MICRO, "--compare", *models, "--out", str(tmp_path / f"{name}.json")])
    two, same = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "same"))
    start, end = (
        json.loads((folder / "eval.json").read_text()) for folder in (played, played / "iter0")
    )
    for key in evaluate.COMPARED:
        assert two[key]["A"] == pytest.approx(start[key], rel=1e-6) and two[key][
            "B"
        ] == pytest.approx(end[key], rel=1e-6)
        low, high = two[key]["interval"]
        assert low <= two[key]["B-A"] <= high and two[key]["B-A"] == pytest.approx(
            end[key] - start[key]
        )
        assert same[key]["interval"] == [0, 0]
    assert (
        two["n"] == 12 and two["expected_exact_match"]["interval"][0] > 0
    )  # every prompt gained a little
    assert "95% interval" in capsys.readouterr().out


def test_the_paired_interval_is_the_textbooks_and_the_pairing_is_what_makes_it_narrow():
    """400 prompts of very different difficulty; B is a little better on each."""
    rng, n = np.random.default_rng(0), 400
    a, b = np.zeros((2, n, len(evaluate.COLUMNS)))
    hard, tokens = rng.random(n), rng.integers(3, 30, n)
    for table, gain in ((a, 0.0), (b, 0.05)):
        table[:, 0] = hard + gain + 0.02 * rng.standard_normal(n)
        table[:, 1] = rng.random(n) < hard
        table[:, 2], table[:, 3] = tokens * (1 + hard - gain), tokens
    draws = evaluate.paired_bootstrap(a, b, seed=0)
    assert draws.shape == (10_000, 3) and (draws == evaluate.paired_bootstrap(a, b, seed=0)).all()
    assert (draws != evaluate.paired_bootstrap(a, b, seed=1)).any()
    for k, column in ((0, 0), (2, 1)):  # means: the standard error of the mean of the differences
        spread = (b - a)[:, column].std(ddof=1) / math.sqrt(n)
        assert draws[:, k].std() == pytest.approx(spread, rel=0.05)
        assert np.quantile(draws[:, k], (0.025, 0.975)) == pytest.approx(
            (b - a)[:, column].mean() + spread * np.array([-1.96, 1.96]), abs=spread / 5
        )
    assert (
        draws[:, 1].mean() == pytest.approx(-0.05) and draws[:, 1].std() < 1e-12
    )  # a gain of 0.05 nats on every token
    unpaired = evaluate.paired_bootstrap(a, b[rng.permutation(n)], seed=0)
    assert unpaired[:, 0].std() > 5 * draws[:, 0].std()  # control


def test_models_with_different_tokenizers_are_not_compared(tmp_path, refused):
    other = shutil.copytree(THETA0, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert "tokenizers" in refused(
        lambda: evaluate.main([*MICRO, "--compare", str(THETA0), str(other)])
    )


def test_the_whole_loop_on_one_command_and_again_does_nothing(tmp_path):
    command = [
        "bash",
        "run_iterations.sh",
        "demo",
        "--run",
        tmp_path / "run",
        *MICRO[2:],
        "--sft-baseline",
        "--iterations",
        "2",
    ]
    done = shell(*command)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        len(summary["spin"]) == len(summary["sft"]) == 3
    )  # θ_0, θ_1, θ_2; the baseline is part of the demo
    assert "generate 0" in done.stderr and "spin 1" in done.stderr  # progress bars
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = shell(*command)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    report, left = tmp_path / "run" / "report.html", tmp_path / "run" / "iter1" / "checkpoint"
    os.utime(
        tmp_path / "run" / "iter1" / "eval.json"
    )  # as if a kill had come before the report was made,
    assert "report.html" in shell(*command).stdout and report.stat().st_mtime_ns > before[report]
    left.mkdir()  # or before this was cleared away
    assert shell(*command).returncode == 0 and not left.exists()


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_paper_recipe_without_enough_gpus_stops_with_one_line_that_names_the_demo(
    gpus, tmp_path
):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f"#!/bin/sh\nfor i in $(seq {gpus}); do echo GPU $i: NVIDIA A100-SXM4-80GB; done\n"
    )
    fake.chmod(0o755)
    done = shell(
        "bash",
        "run_iterations.sh",
        "--run",
        tmp_path / "run",
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.strip().splitlines()
    assert (
        line.startswith("error: the paper recipe needs 8 GPUs")
        and f"found {gpus}" in line
        and "demo" in line
    )


def test_with_gpus_the_stages_are_launched_by_torchrun_with_one_rank_a_gpu(tmp_path):
    """A node whose nvidia-smi lists two GPUs; the ranks themselves find no CUDA here and run on the CPU."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    fake.chmod(0o755)
    done = shell(
        "bash",
        "run_iterations.sh",
        "demo",
        "--run",
        tmp_path / "run",
        *MICRO[2:],
        "--iterations",
        "1",
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1,-1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "iter0" / "model").is_dir() and (
        tmp_path / "run" / "report.html"
    ).exists()


def test_the_readme_quotes_the_code_that_runs():
    quoted = (REPO / "README.md").read_text().split("```python\n")[1].split("```")[0].splitlines()
    code = [line.strip() for line in (REPO / "loss.py").read_text().splitlines()]
    assert len(quoted) == 5 and all(line in code for line in quoted if line != "...")
    readme, tests = (
        (REPO / "README.md").read_text(),
        "".join(p.read_text() for p in (REPO / "tests").glob("*.py")),
    )
    for file, line in re.findall(r"`([\w/]+\.py)`: `([^`]+)` \|", readme):
        assert line in (REPO / file).read_text(), line
    named = re.findall(r"`(test_\w+)(…?)`", readme)
    assert len(named) > 12 and all(f"def {name}" in tests for name, _ in named)
