"""benchmarks/: the scripts run to the end, and count what they say they count."""

import sys

import pytest
import torch
from conftest import REPO, shell
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

sys.path.insert(0, str(REPO / "benchmarks"))
import train_gpu

from loss import sequence_logps
from spin.packing import pack


def test_the_training_benchmark_prints_a_row_for_each_setting():
    done = shell(
        sys.executable, "benchmarks/train_gpu.py", "--shape", "tiny", "--steps", "1", "--pairs", "2"
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()[3:]
    ]
    assert [row[0] for row in rows] == list(train_gpu.KNOBS)
    assert all(
        float(row[1].replace(",", "")) > 0 and 0 < int(row[2].rstrip("%")) < 100 for row in rows
    )


def test_the_flops_of_the_formula_are_those_that_a_pass_over_packed_pairs_executes():
    """By torch's counter, on pairs so short that attention hardly counts. A padded batch with logits for prompts executes more."""
    config = train_gpu.SHAPES["tiny"]()
    model = LlamaForCausalLM(config).eval()
    pairs = train_gpu.make_pairs(6, config.vocab_size)
    for pair in pairs:
        for half in ("real", "generated"):
            ids, mask = pair[half]
            pair[half] = ids[:40], mask[:40] | (torch.arange(len(mask[:40])).numpy() >= 20)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    with FlopCounterMode(display=False) as counter:
        sequence_logps(
            model, *pack([pair[half] for pair in pairs for half in ("real", "generated")], "cpu")
        ).sum().backward()
    counted = counter.get_total_flops()
    assert train_gpu.flops(config, blocks, pairs) == pytest.approx(counted, rel=0.08)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(12, 64, dtype=torch.long)).logits.sum().backward()
    assert counter.get_total_flops() > 1.5 * counted  # control
