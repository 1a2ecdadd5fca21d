"""benchmarks/simulate.py: what it says of GPUs that are not here is what a real run does here."""

import dataclasses
import functools
from collections import Counter

import pytest
import simulate
import torch
from simulate import Roofline, Setting, follow_steps, prepared, pretended
from torch.utils.flop_counter import FlopCounterMode

from spin.run.ranks import process_group

SMALL = Setting("tiny", 1, micro_tokens=300, batch_size=4, lengths=(20, 60, 50))


def of_ranks(ranks: int, replicas: int = 1) -> Setting:
    """SMALL, as much of it for each rank."""
    batch = SMALL.batch_size * ranks
    return dataclasses.replace(SMALL, ranks=ranks, replicas=replicas, batch_size=batch)


def in_fp32(setting: Setting):
    """A setting's (config, recipe, pairs), in the dtype that a CPU computes in."""
    config, recipe, pairs = prepared(setting)
    return config, dataclasses.replace(recipe, dtype="fp32"), pairs


@functools.cache
def simulated(setting: Setting):
    with pretended(setting.ranks, as_on_gpu=False) as world:
        return follow_steps(*in_fp32(setting), world)


def real(setting: Setting):
    with process_group() as world:
        return follow_steps(*in_fp32(setting), world)


def total(meter) -> int:
    """Bytes of all kinds at the peak."""
    return sum(meter.peak().values())


class TorchsCounter(FlopCounterMode):
    """torch's own counter in the place of the Meter."""

    def __init__(self, vocabulary):
        super().__init__(display=False)

    def follow(self, *_):
        pass


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_simulated_peak_and_flops_are_those_of_a_real_run(lora_rank, monkeypatch):
    setting = dataclasses.replace(SMALL, lora_rank=lora_rank)
    found = simulated(setting)
    assert total(found) == pytest.approx(total(real(setting)), rel=0.02)
    if lora_rank:  # control
        assert total(found) < 0.8 * total(simulated(SMALL))
    monkeypatch.setattr(simulate, "Meter", TorchsCounter)
    assert found.flops["products"] == real(setting).get_total_flops() > 0


def test_controls_other_micro_batches_nothing_computed_twice_fsdps_freeing_not_seen(monkeypatch):
    found = simulated(SMALL)
    other = dataclasses.replace(SMALL, micro_tokens=600)
    assert total(found) != pytest.approx(total(real(other)), rel=0.02)
    other = dataclasses.replace(SMALL, recompute=False)
    assert found.flops["products"] > 1.1 * real(other).flops["products"]
    monkeypatch.setattr(simulate.Meter, "change", only_births(simulate.Meter.change))
    assert total(simulated.__wrapped__(SMALL)) > 1.02 * total(found)


def only_births(change):
    """Meter.change, but what is given back while its storage lives on is not noticed."""

    def unaware(self, record, by):
        alive = any(record is one for one, _ in self.alive.values())
        if by > 0 or not alive:
            change(self, record, by)

    return unaware


@pytest.mark.parametrize("ranks, replicas", [(8, 1), (16, 2)])
def test_a_rank_holds_its_part_of_all_that_is_trained_and_sends_as_fsdp_does(ranks, replicas):
    meter = simulate.simulate(of_ranks(ranks, replicas))
    config = simulate.SHAPES["tiny"]()
    model = simulate.without_weights(config)
    weights = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    shards = ranks // replicas
    at_peak = meter.peak()
    for kind in ("weights", "gradients"):
        assert at_peak[kind] == 4 * weights / shards
    assert at_peak["moments"] == pytest.approx(4 * weights / shards, rel=0.01)  # and steps
    # two passes: in bf16 blocks are gathered twice and the rest once; gradients leave in fp32
    gathered = 2 * (2 * blocks + weights - blocks)
    inside = 2 * (gathered + 4 * weights) * (shards - 1) / shards
    # the copies' gradients are summed once or in each pass, by twice the way around a ring
    between = 2 * 4 * weights / shards * (replicas - 1) / replicas
    sent = Counter()
    for group, sent_bytes in meter.sent.items():
        sent[len(group)] += sent_bytes  # norms and flags too
    assert sent[shards] == pytest.approx(inside, rel=0.01)
    assert replicas == 1 or between <= sent[replicas] <= 2.01 * between


def test_fake_tensors_take_the_way_of_gpus_unless_told_otherwise():
    config = simulate.SHAPES["tiny"]()
    prompt, real, generated = SMALL.lengths
    # a generated answer's queries see the prompt's keys and its own
    area = (prompt + real) ** 2 + generated * (prompt + generated)
    # two products forward, the same again to recompute, and five in FlashAttention's backward
    each = 2 * (2 + 2 + 5) * config.hidden_size * config.num_hidden_layers
    found = simulate.simulate(of_ranks(8)).flops["attention"]
    assert found == SMALL.batch_size * each * area
    assert simulated(SMALL).flops["attention"] == 0  # torch's counter does not know the CPU's


def test_the_roofline_takes_the_slower_of_two_for_each_operation():
    meter = simulate.Meter(vocabulary=10)
    meter.work = [(6.0, 1.0), (1.0, 8.0)]
    meter.sent = {(0, 1): 30.0, tuple(range(16)): 40.0, (0, 8): 5.0}
    roofline = Roofline(rate=2.0, memory=4.0, inside=10.0, between=8.0)
    assert roofline.compute(meter) == 3 + 2
    # inside a node; over its eight cards; over one of them
    assert roofline.transfer(meter) == 3 + 5 + 5


def test_the_script_prints_a_table_and_leaves_nothing_behind(capsys):
    simulate.main(["--shape", "tiny", "--ranks", "2", "--batch-size", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2
    assert not torch.distributed.is_initialized()
    assert not torch.zeros(1).is_cuda
