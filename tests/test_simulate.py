"""benchmarks/simulate.py: what it says of GPUs that are not here is what a real run does here."""

import dataclasses
import functools
import sys
from collections import Counter

import pytest
import torch
from conftest import REPO
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(REPO / "benchmarks"))
import simulate
from simulate import Roofline, Setting, follow_steps, prepared, pretended

from spin.distributed import process_group

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


def test_the_simulated_flops_are_those_that_torch_counts_in_a_real_run(monkeypatch):
    products = simulated(SMALL).flops["products"]
    monkeypatch.setattr(simulate, "Meter", TorchsCounter)
    assert products == real(SMALL).get_total_flops() > 0
    # control: a run that computes nothing twice
    other = dataclasses.replace(SMALL, recompute=False)
    assert products > 1.1 * real(other).get_total_flops()


def test_the_simulated_peak_is_that_of_a_real_run(monkeypatch):
    peak = total(simulated(SMALL))
    assert peak == pytest.approx(total(real(SMALL)), rel=0.02)
    # controls: a real run with other micro-batches; FSDP's freeing of gathered weights not seen
    other = dataclasses.replace(SMALL, micro_tokens=600)
    assert peak != pytest.approx(total(real(other)), rel=0.02)
    monkeypatch.setattr(simulate.Meter, "change", only_births(simulate.Meter.change))
    assert total(simulated.__wrapped__(SMALL)) > 1.02 * peak


def test_the_simulated_peak_and_flops_with_adapters_are_those_of_a_real_run(monkeypatch):
    adapted = dataclasses.replace(SMALL, lora_rank=8)
    found = simulated(adapted)
    assert total(found) == pytest.approx(total(real(adapted)), rel=0.02)
    assert total(found) < 0.8 * total(simulated(SMALL))  # control
    at_peak = found.peak()
    assert at_peak["moments"] < 1.2 * at_peak["gradients"] < 0.5 * at_peak["weights"]
    monkeypatch.setattr(simulate, "Meter", TorchsCounter)
    assert found.flops["products"] == real(adapted).get_total_flops()


@pytest.mark.long
def test_7b_with_adapters_fits_a_card_of_24_gb():
    setting = Setting("7b", 1, micro_tokens=4096, lora_rank=16)
    assert total(simulate.simulate(setting)) < 22e9


def only_births(change):
    """Meter.change, but what is given back while its storage lives on is not noticed."""

    def unaware(self, record, by):
        alive = any(record is one for one, _ in self.alive.values())
        if by > 0 or not alive:
            change(self, record, by)

    return unaware


@pytest.mark.long
@pytest.mark.parametrize("shape", ["30m", "100m"])
def test_the_simulated_peak_of_a_larger_model_is_that_of_a_real_run(shape):
    setting = Setting(shape, 1, micro_tokens=600, batch_size=4, lengths=(50, 100, 100))
    assert total(simulated(setting)) == pytest.approx(total(real(setting)), rel=0.02)


@pytest.mark.parametrize("ranks, replicas", [(8, 1), (16, 2)])
def test_a_rank_holds_its_part_of_weights_gradients_and_moments_and_sends_as_fsdp_does(
    ranks, replicas
):
    meter = simulate.simulate(of_ranks(ranks, replicas))
    config = simulate.SHAPES["tiny"]()
    model = simulate.without_weights(config, None)
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


def test_a_prompt_that_is_shared_is_computed_once():
    apart = dataclasses.replace(SMALL, share=False)
    prompt, *answers = SMALL.lengths
    config = simulate.SHAPES["tiny"]()
    head = 6 * config.vocab_size * config.hidden_size * sum(answers) * SMALL.batch_size
    once, twice = (simulated(one).flops["products"] - head for one in (SMALL, apart))
    tokens = prompt + sum(answers)
    assert once / twice == pytest.approx(tokens / (tokens + prompt), rel=1e-6)


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
