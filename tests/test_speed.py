"""What a training step computes and what it waits for, counted and not timed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import THETA0
from families import random_pairs, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from loss import sequence_logps
from spin.data.pairs import packed_pairs, tokens_of
from spin.model import attention
from spin.model.packing import packed
from spin.recipe import Recipe
from spin.run.folders import Iteration
from spin.run.ranks import process_group

P, R, G = 200, 300, 200  # tokens of prompt, real and generated answer


def flops_of_blocks(model, pairs, backward: bool) -> int:
    """Of the matrix products in the blocks, as torch counts them in a pass over all pairs."""
    with packed(model), FlopCounterMode(display=False) as counter:
        logps = sequence_logps(model, **packed_pairs(pairs, "spin", "cpu"))
        if backward:
            logps.sum().backward()
    layers = [f"LlamaForCausalLM.model.layers.{i}" for i in range(2)]
    return sum(sum(counter.get_flop_counts()[name].values()) for name in layers)


@pytest.mark.parametrize("backward", [False, True])
def test_the_blocks_multiply_each_prompt_once(backward):
    model = tiny("Llama", max_position_embeddings=1024)
    pairs = random_pairs([(P, R, G)] * 3)
    once = flops_of_blocks(model, pairs, backward)
    twice = flops_of_blocks(model, [pair | {"shared": 0} for pair in pairs], backward)
    assert once == pytest.approx(twice * (P + R + G) / (2 * P + R + G), rel=0.01)
    assert sum(tokens_of(pair, "spin") for pair in pairs) == 3 * (P + R + G)


@pytest.mark.parametrize("lengths", [(P, R, G), (900, 20, 30), (5, 300, 200)])
def test_attention_asks_no_more_of_padded_rows_than_a_batch_of_sequences(lengths, monkeypatch):
    asked = []

    def counting(q, k, v, **kwargs):
        asked.append(q.shape[0] * q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **kwargs)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    pairs = random_pairs([lengths] * 3 + [(3, 9, 7)] * 2)
    model = tiny("Llama", max_position_embeddings=1024)
    with packed(model), torch.no_grad():
        sequence_logps(model, **packed_pairs(pairs, "spin", "cpu"))
    longest = max(len(pair[half][0]) for pair in pairs for half in ("real", "generated"))
    assert sum(asked) <= 2 * 2 * len(pairs) * longest**2  # two layers, two sequences a pair


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for the device, were the device a GPU."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        self.number += name in self.OPERATIONS or by_mask
        return function(*args, **(kwargs or {}))


def waits_of_a_step(pairs_in_each: int, micro_batches: int, tmp_path) -> int:
    """Of one step of train.train, on so many micro-batches of so many pairs."""
    number = pairs_in_each * micro_batches
    pairs = random_pairs([(6, 9, 5)] * number)
    sizes = {"batch_size": number, "micro_tokens": 20 * pairs_in_each}
    recipe = Recipe(model=str(THETA0), epochs=1, recompute=False, **sizes)
    folder = tmp_path / f"{pairs_in_each}x{micro_batches}"
    folder.mkdir()
    with process_group() as world:
        model = train.load_empty(recipe.model, recipe)
        train.shard(model, recipe, world)
        train.read_weights(model, recipe.model, recipe, world)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0, foreach=False)
        scores = torch.zeros(number, 2, dtype=torch.float64)
        with packed(model), Waits() as waits:
            iteration = Iteration(0, folder, {})
            train.train(model, optimizer, pairs, scores, recipe, iteration, world)
            return waits.number


@pytest.mark.parametrize("waits", [0, 1])
def test_a_micro_batch_asks_for_no_number_of_however_many_pairs(waits, tmp_path, monkeypatch):
    spin_loss = train.spin_loss

    def waiting(*args):
        losses = spin_loss(*args)
        losses.sum().item()
        return losses

    if waits:  # control
        monkeypatch.setattr(train, "spin_loss", waiting)
    for pairs in (2, 8):
        one, three = (waits_of_a_step(pairs, n, tmp_path) for n in (1, 3))
        assert (three - one) / 2 == waits
