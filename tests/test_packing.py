"""spin/model/packing.py and the bins of spin/data/pairs.py: sequences in a row stay apart."""

import functools

import pytest
import torch
from families import alone, gradient, random_pairs, random_sequences, tiny

from loss import sequence_logps, token_logps
from spin.data.pairs import bins_of, micro_batches, packed_pairs
from spin.model import attention
from spin.model.attention import packed_attention
from spin.model.packing import pack, packed
from spin.recipe import Recipe
from spin.run.ranks import World

# That a row has the log-probabilities and gradients of each sequence alone: test_families.py


@pytest.mark.parametrize("lost", ["position_ids", "position_ids cu_seq_lens_q cu_seq_lens_k"])
def test_controls_causal_attention_over_the_row_or_running_positions_differ(lost):
    model = tiny("GPT-2")
    sequences = random_sequences()

    def forgetful(**kwargs):
        return model(**{k: v for k, v in kwargs.items() if k not in lost.split()})

    wanted = alone(model, sequences)
    if lost == "position_ids":
        with packed(model):
            got = sequence_logps(forgetful, **pack(sequences, "cpu"))
    else:
        got = sequence_logps(forgetful, **pack(sequences, "cpu"))
    # the first sequence has nothing before it
    assert got[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
    assert not torch.isclose(got[1:].double(), wanted[1:], rtol=1e-3).any()


def test_a_mask_of_the_models_own_is_refused_and_not_overlooked(refused):
    """One that forbids nothing more, too: packed_attention cannot know."""
    model = tiny("Llama")
    mask = {"attention_mask": torch.zeros(1, 1, 64, 64)}
    own = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | mask), with_kwargs=True
    )
    model.set_attn_implementation("packed")
    line = refused(lambda: sequence_logps(model, **pack(random_sequences(), "cpu")))
    assert "attention has a mask of its own, which --attention auto does not know" in line
    model.set_attn_implementation("sdpa")
    with packed(model) as method:  # the model was asked beforehand, and said so
        assert method == "padded"
    own.remove()
    with packed(model) as method:  # control
        assert method == "packed"


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_softmax_is_refused_by_packed_attention(name, refused):
    x = torch.randn(1, 2, 5, 8)
    row = pack([([0] * n, [0, 1, 1][:n]) for n in (2, 3)], "cpu")
    known = row["attention"]
    line = refused(lambda: packed_attention(None, x, x, x, None, **known, **{name: x}))
    assert f"this model's attention has {name}, which" in line
    assert packed_attention(None, x, x, x, None, **known, **{name: None})[0].shape == (1, 5, 2, 8)


# ---- a prompt that stands in the row once --------------------------------------------------------


LENGTHS = ((9, 14, 5), (1, 3, 20), (17, 1, 2), (4, 9, 9))  # prompt, real and generated answer


def sequences_of(pairs) -> list[tuple]:
    """(ids, mask) of all real answers, then of all generated ones."""
    return [pair[half] for half in ("real", "generated") for pair in pairs]


def bottom_right(q, k, v, ranges, scaling, sides, aligned="bottom right"):
    """What FlashAttention's variable-length kernels compute, by their definition: sequence by
    sequence, each query at the place that the alignment gives it among its keys."""
    q_bounds, k_bounds, q_longest, k_longest = ranges
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    lengths = [b.diff().tolist() for b in (q_bounds, k_bounds)]
    assert (q_longest, k_longest) == tuple(map(max, lengths))
    out = []
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    for one_q, one_k, one_v in parts:
        behind = len(one_k) - len(one_q) if aligned == "bottom right" else 0
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) * scaling
        for i in range(len(one_q)):
            scores[:, i, i + behind + sides[1] + 1 :] = -torch.inf
            if sides[0] >= 0:
                scores[:, i, : max(0, i + behind - sides[0])] = -torch.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(out)


# the second is the definition of both kernels of CUDA
@pytest.mark.parametrize("kernel", [None, bottom_right])
@pytest.mark.parametrize("name", ["Llama", "Mistral, window", "GPT-2"])
def test_with_each_prompt_once_a_row_is_as_each_sequence_alone(name, kernel, monkeypatch):
    monkeypatch.setattr(attention, "kernel_for", lambda *args: kernel)
    model = tiny(name)
    pairs = random_pairs(LENGTHS)
    row = packed_pairs(pairs, "spin", "cpu")
    assert row["input_ids"].shape[1] == sum(map(sum, LENGTHS))
    wanted = alone(model, sequences_of(pairs))
    with packed(model):
        got = sequence_logps(model, **row)
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-4)
        wanted_gradient = gradient(wanted, model)
        error = gradient(got, model) - wanted_gradient
        assert error.norm() < 1e-4 * wanted_gradient.norm()
    # control: aligned top left, as SDPA's own causal mask is, a branch would see too little
    with packed(model), torch.no_grad():
        top_left = functools.partial(bottom_right, aligned="top left")
        monkeypatch.setattr(attention, "kernel_for", lambda *args: top_left)
        got = sequence_logps(model, **row).double()
        assert torch.allclose(got[:4], wanted[:4], rtol=1e-5, atol=1e-4)
        assert not torch.isclose(got[4:], wanted[4:], rtol=1e-3).any()


@pytest.mark.parametrize("name", ["Llama", "Mistral, window"])
def test_a_padded_branch_gives_no_nan_where_some_are_short_and_others_long(name):
    """Queries that only pad must not see nothing: softmax over nothing is NaN, and 0 × NaN too."""
    model = tiny(name, **({"sliding_window": 3} if "window" in name else {}))
    pairs = random_pairs(((30, 2, 1), (2, 3, 25)))
    with packed(model):
        got = gradient(sequence_logps(model, **packed_pairs(pairs, "spin", "cpu")), model)
    wanted = gradient(alone(model, sequences_of(pairs)), model)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_token_logps_are_log_softmax_and_so_is_their_gradient_in_blocks_of_any_size():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        # 4 blocks and a bit
        logits = 5 * torch.randn(3, 1500, 4099, dtype=torch.float64)
        logits = logits.to(dtype).requires_grad_()
        labels = torch.randint(0, 4099, (3, 1500))
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        wanted = wide.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        got = token_logps(logits, labels)
        assert got.dtype == wide.dtype
        if dtype is torch.bfloat16:  # control: log-softmax in bf16
            careless = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            assert (careless - wanted).abs().max() > 1e-3
        assert torch.allclose(got, wanted, atol=1e-12 if dtype is torch.float64 else 1e-5)
        weights = torch.randn(3, 1500).to(wide.dtype)
        ours, theirs = (
            torch.autograd.grad((weights * x).sum(), logits, retain_graph=True)[0]
            for x in (got, wanted)
        )
        assert ours.dtype == dtype and torch.allclose(ours, theirs, atol=tolerance)
        del ours, theirs


# ---- bins; of any sizes: tests/test_fuzz.py ------------------------------------------------------


def test_bins_of_a_few_sizes_and_widths():
    assert bins_of([1] * 8, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert bins_of([9, 1], 4) == [[0], [1]]
    assert bins_of([3], 9, 2) == [[0], []]
    # padding counts, but where it fits the bins are the same as without
    assert bins_of([4, 1, 4, 1], 10) == [[0, 2, 1, 3]]
    assert bins_of([4, 1, 4, 1], 16, widths=[4, 1, 4, 1]) == [[0, 2, 1, 3]]
    assert bins_of([4, 1, 4, 1], 10, widths=[4, 1, 4, 1]) == [[0, 2], [1, 3]]
    assert bins_of([9, 1], 4, widths=[9, 1]) == [[0], [1]]  # a width above the budget is alone
    assert bins_of([3, 3, 3, 1], 9, 4, [6, 3, 3, 1]) == [[0], [1], [2], [3]]  # no rank idle


@pytest.mark.parametrize("objective", ["spin", "sft"])
def test_micro_batches_of_a_padded_model_count_padding_and_all_ranks_make_as_many(objective):
    """61 short sequences beside one of 2,048 tokens hold 8,148 tokens, and 126,976 with padding."""
    recipe = Recipe(micro_tokens=8192, objective=objective)
    pairs = []
    for n in [2048] + [100] * 61:
        pairs.append({"real": (range(n), 0), "generated": (range(9), 0), "shared": 0})

    def largest(ranks, padded):
        passes = []
        for rank in range(ranks):
            world = World(rank, ranks, None)
            passes.append(list(micro_batches(range(62), pairs, recipe, world, padded)))
        assert len({len(own) for own in passes}) == 1
        whole = [rows for own in passes for rows, weight in own if weight]
        assert sorted(id(row) for rows in whole for row in rows) == sorted(map(id, pairs))
        answers = 1 if objective == "sft" else 2
        return max(answers * len(rows) * max(len(row["real"][0]) for row in rows) for rows in whole)

    assert all(largest(ranks, True) <= 8192 for ranks in (1, 2, 3, 8))
    assert largest(1, False) > 60_000  # control
