"""What a training step computes and what it waits for, counted and not timed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import THETA0, stage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import train
from loss import sequence_logps
from spin import attention
from spin.distributed import process_group
from spin.files import read_jsonl
from spin.packing import packed
from spin.pairs import packed_pairs, share_prompts, tokens_of
from spin.recipe import Recipe
from spin.run import Iteration

# ---- each prompt once ----------------------------------------------------------------------------

P, R, G = 200, 300, 200  # tokens of prompt, real and generated answer


def some_pairs(n: int, vocabulary: int, lengths=(P, R, G)) -> list[dict]:
    """n pairs of random ids, as encode_pairs gives them."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(n):
        prompt = rng.integers(3, vocabulary, lengths[0])
        pair = {"id": i, "iter": 0, "index": i, "shared": 0}
        for half, length in zip(("real", "generated"), lengths[1:], strict=True):
            ids = np.concatenate([prompt, rng.integers(3, vocabulary, length)])
            mask = np.array([0] * len(prompt) + [1] * length)
            pair[half] = ids.astype(np.int32), mask.astype(np.int8)
        pairs.append(pair)
    return pairs


@pytest.fixture()
def small_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def flops_of_blocks(model, pairs, backward: bool) -> int:
    """Of the matrix products in the blocks, as torch counts them in a pass over all pairs."""
    with packed(model), FlopCounterMode(display=False) as counter:
        logps = sequence_logps(model, **packed_pairs(pairs, "spin", "cpu"))
        if backward:
            logps.sum().backward()
    layers = [f"LlamaForCausalLM.model.layers.{i}" for i in range(2)]
    return sum(sum(counter.get_flop_counts()[name].values()) for name in layers)


@pytest.mark.parametrize("backward", [False, True])
def test_the_blocks_multiply_each_prompt_once(small_llama, backward):
    pairs = some_pairs(3, 100)
    twice = flops_of_blocks(small_llama, pairs, backward)
    share_prompts(pairs)
    once = flops_of_blocks(small_llama, pairs, backward)
    assert once <= 1.01 * twice * (P + R + G) / (2 * P + R + G)
    assert once >= 0.99 * twice * (P + R + G) / (2 * P + R + G)
    assert sum(tokens_of(pair, "spin") for pair in pairs) == 3 * (P + R + G)


@pytest.mark.parametrize("lengths", [(P, R, G), (900, 20, 30), (5, 300, 200)])
def test_attention_asks_no_more_of_padded_rows_than_a_batch_of_whole_sequences(
    small_llama, lengths, monkeypatch
):
    asked = []

    def counting(q, k, v, **kwargs):
        asked.append(q.shape[0] * q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **kwargs)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    pairs = some_pairs(3, 100, lengths) + some_pairs(2, 100, (3, 9, 7))
    share_prompts(pairs)
    with packed(small_llama), torch.no_grad():
        sequence_logps(small_llama, **packed_pairs(pairs, "spin", "cpu"))
    longest = max(len(pair[half][0]) for pair in pairs for half in ("real", "generated"))
    assert sum(asked) <= 2 * 2 * len(pairs) * longest**2  # two layers, two sequences a pair


def test_the_kernels_of_cuda_are_asked_for_each_prompt_once(small_llama, monkeypatch):
    """By the arguments alone: queries [P + R, G], keys [P + R, P + G], the longest of each."""
    asked = []

    def kernel(q, k, v, ranges, scaling, sides, softcap):
        q_bounds, k_bounds, q_longest, k_longest = ranges
        asked.append((q_bounds.diff(), k_bounds.diff(), q_longest, k_longest))
        assert len(q) == q_bounds[-1] and len(k) == len(v) == k_bounds[-1]
        assert sides == (-1, 0) and softcap is None
        return torch.zeros_like(q)

    pairs = some_pairs(2, 100)
    share_prompts(pairs)
    with packed(small_llama), torch.no_grad():
        monkeypatch.setattr(attention, "kernel_for", lambda *args: "torch")
        monkeypatch.setitem(attention.KERNELS, "torch", kernel)
        sequence_logps(small_llama, **packed_pairs(pairs, "spin", "cpu"))
    queries, keys, q_longest, k_longest = asked[0]
    assert queries.tolist() == [P + R, P + R, G, G]
    assert keys.tolist() == [P + R, P + R, P + G, P + G]
    assert (q_longest, k_longest) == (P + R, P + R)
    assert int((queries * keys).sum()) == 2 * ((P + R) ** 2 + G * (P + G))


def test_twenty_steps_have_the_losses_of_steps_that_compute_each_prompt_twice(
    played, tmp_path, monkeypatch
):
    flags = ["--iter", 0, "--epochs", 5]  # of four steps each
    widths = {}
    row_of = train.packed_pairs

    def run(name):
        widths[name] = []

        def watched(*args):
            row = row_of(*args)
            widths[name].append(row["input_ids"].shape[1])
            return row

        monkeypatch.setattr(train, "packed_pairs", watched)
        folder = tmp_path / name
        (folder / "iter0").mkdir(parents=True)
        for file in ("prompts.json", "iter0/generated.jsonl", "iter0/generated.json"):
            (folder / file).write_bytes((played / file).read_bytes())
        stage("train", folder, *flags)
        return [row["loss"] for row in read_jsonl(folder / "iter0" / "metrics.jsonl")]

    once = run("once")
    monkeypatch.setattr(train, "share_prompts", lambda pairs: None)
    twice = run("twice")
    assert len(once) == 20 and once == pytest.approx(twice, rel=1e-5)
    assert once[0] == pytest.approx(math.log(2), rel=1e-6)
    assert sum(widths["once"]) < 0.9 * sum(widths["twice"])  # control: it was not the same


# ---- waits ---------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, were the device a GPU."""

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


def count_transfers(waits: Waits, monkeypatch):
    """Calls that move a tensor to the model's device, or from it, count as waits too."""

    def counting(function, is_transfer):
        def call(*args, **kwargs):
            waits.number += is_transfer(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    def names_a_device(*args, **kwargs):
        return any(isinstance(x, torch.device | str | torch.Tensor) for x in args[1:]) or bool(
            kwargs.get("device")
        )

    def always(*args, **kwargs):
        return True

    def in_a_device(*args, **kwargs):
        return bool(kwargs.get("device"))

    for name in ("cpu", "cuda", "tolist", "numpy"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, counting(whole, always))
    monkeypatch.setattr(torch.Tensor, "to", counting(torch.Tensor.to, names_a_device))
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name), in_a_device))


def waits_of_a_step(pairs_in_each: int, micro_batches: int, tmp_path) -> int:
    """Of one step of train.train, on so many micro-batches of so many pairs."""
    number = pairs_in_each * micro_batches
    pairs = some_pairs(number, 60, (6, 9, 5))
    share_prompts(pairs)
    recipe = Recipe(
        model=str(THETA0),
        batch_size=number,
        micro_tokens=20 * pairs_in_each,
        epochs=1,
        recompute=False,
    ).at(0)
    folder = tmp_path / f"{pairs_in_each}x{micro_batches}"
    folder.mkdir()
    with process_group() as world, pytest.MonkeyPatch.context() as monkeypatch:
        model, files = train.load_empty(recipe.model, recipe, world)
        train.shard(model, recipe, world)
        train.read_weights(model, files, recipe, world)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0, foreach=False)
        scores = torch.zeros(number, 2, dtype=torch.float64)
        with packed(model), Waits() as waits:
            count_transfers(waits, monkeypatch)
            iteration = Iteration(0, folder, {})
            train.train(model, optimizer, pairs, scores, recipe, iteration, world)
            return waits.number


@pytest.mark.parametrize("harm", [None, "item", "cpu"])
def test_a_micro_batch_makes_the_host_wait_at_most_four_times_whatever_the_number_of_pairs(
    harm, tmp_path, monkeypatch
):
    spin_loss = train.spin_loss

    def waiting(*args):
        losses = spin_loss(*args)
        getattr(losses.sum(), harm)()
        return losses

    if harm:  # controls: each is seen
        monkeypatch.setattr(train, "spin_loss", waiting)
    found = []
    for pairs in (2, 8):
        one, three = (waits_of_a_step(pairs, n, tmp_path) for n in (1, 3))
        found.append((three - one) / 2)
        # the rest of the step; torch's norms ask twice for each of 29 weights, in vain
        assert one - found[-1] <= 2 * 29 + 12
    # a row, its opponent's scores, and what asks in vain: transformers' rotary angles
    assert found[0] == found[1] == (3 if harm is None else 4)
