"""benchmarks/: the scripts run to the end, and count what they say they count."""

import math
import sys

import numpy as np
import pytest
import real_model
import torch
import train_gpu
from conftest import shell
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from loss import sequence_logps
from spin.files import append_jsonl, read_jsonl
from spin.model.packing import pack


@pytest.mark.long
def test_the_training_benchmark_prints_a_row_for_each_setting():
    script = "benchmarks/train_gpu.py"
    done = shell(sys.executable, script, "--shape", "tiny", "--steps", "1", "--pairs", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("|---|---|---|---|\n")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == list(train_gpu.KNOBS)
    for _, speed, share, *_ in rows:
        assert float(speed.replace(",", "")) > 0
        assert 0 < int(share.rstrip("%")) < 100


def test_the_flops_of_the_formula_are_those_that_a_pass_over_packed_pairs_executes():
    """By torch's counter, on pairs so short that attention hardly counts."""
    config = train_gpu.SHAPES["tiny"]()
    model = LlamaForCausalLM(config).eval()
    pairs = train_gpu.make_pairs(6, config.vocab_size)
    for pair in pairs:
        for half in ("real", "generated"):
            ids, mask = (x[:40] for x in pair[half])
            pair[half] = ids, mask | (np.arange(len(mask)) >= 20)
    halves = [pair[half] for pair in pairs for half in ("real", "generated")]
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    with FlopCounterMode(display=False) as counter:
        sequence_logps(model, **pack(halves, "cpu")).sum().backward()
    counted = counter.get_total_flops()
    assert train_gpu.flops(config, blocks, pairs) == pytest.approx(counted, rel=0.08)
    # control: the padded batch
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(12, 64, dtype=torch.long)).logits.sum().backward()
    assert counter.get_total_flops() > 1.5 * counted


# ---- real_model.py -------------------------------------------------------------------------------


def test_the_splits_of_the_real_models_questions_share_no_question():
    rows = list(read_jsonl(real_model.QUESTIONS))
    splits = {name: real_model.split(name) for name in ("sft", "train", "choose", "report")}
    assert [*map(len, splits.values())] == [192, 768, 128, 256]
    assert len({row["prompt"] for row in rows}) == len(rows) == sum(map(len, splits.values()))
    kinds = {row["kind"] for row in rows}
    for of_split in splits.values():  # each holds all kinds
        assert {row["kind"] for row in of_split} == kinds
    assert {row["kind"] for row in splits["sft"][:40]} == kinds  # θ_0 "form" too


@pytest.mark.parametrize("share, seed", [(0.3, 0), (0.3, 1), (0, 0)])
def test_mistakes_are_the_share_that_was_asked_for_and_answers_of_the_same_kind(share, seed):
    clean = real_model.split("train")
    rows = real_model.with_mistakes(clean, share, seed)
    assert rows == real_model.with_mistakes(clean, share, seed)
    changed = [(a, b) for a, b in zip(clean, rows, strict=True) if a["response"] != b["response"]]
    assert len(changed) == round(share * len(clean)) == sum("right" in row for row in rows)
    for before, after in changed:
        assert after["right"] == before["response"] and after["prompt"] == before["prompt"]
        assert after["response"] in {x["response"] for x in clean if x["kind"] == before["kind"]}
    # control: another seed draws others
    assert not share or rows != real_model.with_mistakes(clean, share, seed + 5)


def a_line(arm, objective, t, p, seed=0):
    """A line of the log; p: the probability of every right answer at temperature 1."""
    line = {"arm": arm, "seed": seed, "objective": objective, "t": t}
    line |= {"nll": [-math.log(p)] * 384, "cooler": [p / 2] * 384, "greedy": "01" * 192}
    line |= {"clean_report": 0.5, "noisy_report": p, "right": [0.25, 0.75], "wrong": [0.5, 0.5]}
    line |= {"cpu_s": {"train": 3600}, "evaluated": {"mean_length": 3 + p}}
    last = {"win_rate": p, "margin": p, "logratio_real": -p, "logratio_generated": 2 * p}
    return {**line, "training": {"last": last}}


def test_a_rerun_skips_the_arms_whose_lines_are_in_the_log(tmp_path):
    both = real_model.Arm("both", sft=True)
    arms = [both, real_model.Arm("one")]
    path = tmp_path / "log.jsonl"
    everything = [(arm, seed) for seed in (0, 1) for arm in arms]
    assert real_model.missing(everything, real_model.Log(path)) == everything
    log = real_model.Log(path)
    for name, _, objective, t in both.keys(0):
        assert (both, 0) in real_model.missing(everything, log)  # half done
        for _ in range(2):  # the second is not kept
            log.append(a_line(name, objective, t, 0.5))
    # read again, as another sitting would
    assert real_model.missing(everything, real_model.Log(path)) == everything[1:]
    assert len(list(read_jsonl(path))) == 4


def test_differences_are_paired_over_questions_and_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 50))
    mean, error = real_model.difference(a.tolist(), b.tolist())
    d = b - a
    wanted = d.mean(0).var(ddof=1) / 50 + d.mean(1).var(ddof=1) / 3
    assert (mean, error) == pytest.approx((d.mean(), wanted**0.5))
    assert real_model.difference(a[:1].tolist(), (a[:1] + 0.5).tolist()) == pytest.approx((0.5, 0))


def test_the_tables_hold_the_figures_of_the_log(tmp_path, capsys, monkeypatch):
    arms = [real_model.Arm("1e-6", sft=True), real_model.Arm("b", lam="1")]
    lines = [a_line("form", "theta0", 0, 0.5)]
    lines += [a_line("1e-6", "spin", 1, 0.625), a_line("1e-6", "spin", 2, 0.75)]
    lines += [
        a_line("1e-6", "sft", 1, 0.375),
        a_line("1e-6", "sft", 2, 0.25),
        a_line("b", "spin", 1, 1),
    ]
    lines += [a_line("b", "spin", 2, 0.25)]
    lines[-1]["clean_report"] = 0.25
    for line in lines:
        append_jsonl(tmp_path / "log.jsonl", line)
    monkeypatch.setattr(real_model, "ARMS", arms)
    monkeypatch.setattr(sys, "argv", ["", "--tables", "--log", str(tmp_path / "log.jsonl")])
    real_model.main()
    shown = capsys.readouterr().out
    assert "| 1e-6 | +0.125 | +0.250 | -0.125 | -0.250 |" in shown
    # b is shown beside the continued SFT of the other arm
    assert "| b | +0.500 | -0.250 | -0.125 | -0.250 |" in shown
    a = ("0.500 (0.250; 0.500)", "0.625 (0.312; 0.500)", "0.750 (0.375; 0.500)")
    assert f"| 1e-6: SPIN | 1 | {' | '.join(a)} |" in shown
    sft = (a[0], "0.375 (0.188; 0.500)", "0.250 (0.125; 0.500)")
    assert f"| 1e-6: continued SFT | 1 | {' | '.join(sft)} |" in shown
    assert f"| b: SPIN | 1 | {a[0]} | 1.000 (0.500; 0.500) | 0.250 (0.125; 0.500) |" in shown
    # its best iterations are θ_2 and θ_1; b takes its continued SFT from a
    assert "| 1e-6 | 1 | SPIN − SFT (θ_2, θ_1) | +0.375 ± 0.000 | +0.188 ± 0.000 |" in shown
    assert "| b | 1 | SPIN − SFT (θ_1, θ_1) | +0.625 ± 0.000 |" in shown
    assert "| 1e-6 | 1 | SFT − θ_0 (θ_1, θ_0) | -0.125 ± 0.000 |" in shown
    assert "| 1e-6: SPIN θ_2 | 0.500 | 0.500 | 0.500 |" in shown
    # rises by 1/8, 1/8 and 1/2, a fall by 3/4. A noisy set has the right answer to 178 of the 256
    assert "| figure | rose (3) | fell (1) | correlation |" in shown
    right = (
        sum(
            "right" not in row
            for row in real_model.with_mistakes(real_model.held_out(), 0.3, 0)[128:]
        )
        / 256
    )
    noisy = f"{0.25 * right:+.3f} | {-0.75 * right:+.3f} | +1.00 |"
    assert 0.65 < right < 0.75 and f"| exact match, noisy answers | {noisy}" in shown
    assert "| NLL per token, right answers | +0.000 | -0.250 | +0.94 |" in shown
    assert "| training: logratio_real | -0.792 | -0.250 | -0.97 |" in shown
    picture = (tmp_path / "mistakes.svg").read_text()
    assert (
        "SPIN, 30% wrong" in picture and "SFT, 30% wrong" in picture and ", 0% wrong" not in picture
    )
    assert "7 models, 7.0 core-hours" in shown
