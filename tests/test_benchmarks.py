"""benchmarks/: the scripts run to the end, and count what they say they count."""

import sys

import numpy as np
import pytest
import torch
import train_gpu
from conftest import shell
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from loss import sequence_logps
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
