"""spin/packing.py: sequences in a row stay apart, in any attention; bins are full, even, whole."""

import functools
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from loss import sequence_logps, token_logps
from spin import attention
from spin.attention import packed_attention
from spin.packing import balanced_bins, pack, packed

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SMALL_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SMALL_MAMBA = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SMALL_GEMMA = {
    **GROUPED,
    "head_dim": 8,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 2.0,
}
CONVOLVING = ["conv", "full_attention"]
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "grouped queries": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=7)),
    "learnt positions": lambda: GPT2LMHeadModel(GPT2Config(**SMALL_GPT2)),
    "older make": lambda: StableLmForCausalLM(StableLmConfig(**GROUPED)),
    "state space": lambda: MambaForCausalLM(MambaConfig(**SMALL_MAMBA)),
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**GROUPED, layer_types=CONVOLVING)),
    "windows in some layers, softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL_GEMMA)),
}
WAYS = {  # with --attention auto, and otherwise
    "older make": ("rows", "rows"),
    "state space": ("rows", "rows"),
    "convolutions": ("rows", "rows"),
    "windows in some layers, softcap": ("masks", "masks"),
}


def build(kind):
    torch.manual_seed(0)
    model = KINDS[kind]()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # so that attention is far from even
    return model.eval()


def rows(seed=0, lengths=(30, 9, 1 + 3, 21)):
    """Sequences of random ids, each a prompt of three tokens and its response."""
    rng = random.Random(seed)
    return [([rng.randrange(61) for _ in range(n)], [0] * 3 + [1] * (n - 3)) for n in lengths]


def one_by_one(model, sequences):
    """The oracle: each sequence alone, log-softmax of all logits, the response's picked by hand."""
    result = []
    for ids, mask in sequences:
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        result.append(sum(logps[t - 1, ids[t]] for t in range(len(ids)) if mask[t]))
    return torch.stack(result)


def gradient(values, model):
    """The gradient of a sum in which each value has a weight of its own, flat."""
    weights = torch.arange(1.0, len(values) + 1)
    gradients = torch.autograd.grad((weights * values).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_log_probs_and_gradients_are_those_of_each_sequence_alone(kind, attention):
    model = build(kind)
    sequences = rows()
    wanted = one_by_one(model, sequences)
    if attention == "sdpa" and not model._supports_sdpa:
        return  # refused: test_probe.py
    if attention != "auto" and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    before = model.config._attn_implementation
    with packed(model, attention) as way:
        assert way == WAYS.get(kind, ("packed", "masks"))[attention != "auto"]
        assert model.config._attn_implementation == ("packed" if way == "packed" else before)
        got = sequence_logps(model, **pack(sequences, "cpu"))
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)
        wanted_gradient = gradient(wanted, model)
        error = gradient(got, model) - wanted_gradient
        assert error.norm() < 1e-4 * wanted_gradient.norm()
    # as it was, for sampling
    assert model.config._attn_implementation == before and "forward" not in vars(model)


LOST = [("position_ids", "cu_seq_lens_q", "cu_seq_lens_k"), ("position_ids",)]


@pytest.mark.parametrize("lost", LOST)
def test_controls_plain_causal_attention_over_the_row_or_running_positions_give_other_log_probs(
    lost,
):
    model = build("learnt positions")
    sequences = rows()

    def forgetful(**kwargs):
        return model(**{k: v for k, v in kwargs.items() if k not in lost})

    wanted = one_by_one(model, sequences)
    if len(lost) == 1:
        with packed(model):
            got = sequence_logps(forgetful, **pack(sequences, "cpu"))
    else:
        got = sequence_logps(forgetful, **pack(sequences, "cpu"))
    # the first sequence has nothing before it
    assert got[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
    assert not torch.isclose(got[1:], wanted[1:], rtol=1e-3).any()


def test_a_neighbour_in_the_row_changes_nothing():
    model = build("sliding window")
    a, b, c, d = rows()
    with packed(model), torch.no_grad():
        first = sequence_logps(model, **pack([a, b, c], "cpu"))
        second = sequence_logps(model, **pack([d, b, d], "cpu"))
    assert first[1].item() == pytest.approx(second[1].item(), rel=1e-5)


def test_a_mask_of_the_models_own_is_refused_and_not_overlooked(refused):
    """One that forbids nothing more, too: packed_attention cannot know."""
    model = build("llama")
    layer = model.model.layers[0].self_attn
    own = layer.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "attention_mask": torch.zeros(1, 1, 64, 64)},
        ),
        with_kwargs=True,
    )
    model.set_attn_implementation("packed")
    line = refused(lambda: sequence_logps(model, **pack(rows(), "cpu")))
    assert "attention has a mask of its own, which --attention auto does not know" in line
    model.set_attn_implementation("sdpa")
    with packed(model) as way:  # the model was asked beforehand, and said so
        assert way == "rows"
    own.remove()
    with packed(model) as way:  # control
        assert way == "packed"


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_softmax_is_refused_by_packed_attention(name, refused):
    x = torch.randn(1, 2, 5, 8)
    row = pack([([0] * n, [0, 1, 1][:n]) for n in (2, 3)], "cpu")
    known = row["attention"]
    line = refused(lambda: packed_attention(None, x, x, x, None, **known, **{name: x}))
    assert f"this model's attention has {name}, which" in line
    assert packed_attention(None, x, x, x, None, **known, **{name: None})[0].shape == (1, 5, 2, 8)


# ---- a prompt that stands in the row once --------------------------------------------------------


def pairs_with_prompts(seed=1, lengths=((9, 14, 5), (1, 3, 20), (17, 1, 2), (4, 9, 9))):
    """Pairs (real, generated) of sequences (ids, mask), of (prompt, real, generated) tokens."""
    rng = random.Random(seed)

    def some(n):
        return [rng.randrange(61) for _ in range(n)]

    pairs = []
    for p, r, g in lengths:
        prompt = some(p)
        pairs.append([(prompt + some(n), [0] * p + [1] * n) for n in (r, g)])
    return pairs


def branched(pairs):
    """All real ones, all generated ones; and what pack has to know of their prompts."""
    sequences = [pair[half] for half in (0, 1) for pair in pairs]
    shared = [(k, 0) for k in range(len(pairs))]
    shared += [(k, mask.count(0)) for k, (_, (_, mask)) in enumerate(pairs)]
    return sequences, shared


def bottom_right(q, k, v, ranges, scaling, sides, softcap, aligned="bottom right"):
    """What FlashAttention's variable-length kernels compute, by their definition: sequence by
    sequence, each query at the place that the alignment gives it among its keys."""
    q_bounds, k_bounds, q_longest, k_longest = ranges
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    lengths = [(b[1:] - b[:-1]).tolist() for b in (q_bounds, k_bounds)]
    assert (q_longest, k_longest) == tuple(map(max, lengths))
    out = []
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    for one_q, one_k, one_v in parts:
        behind = len(one_k) - len(one_q) if aligned == "bottom right" else 0
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) * scaling
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        for i in range(len(one_q)):
            last = i + behind + sides[1]
            scores[:, i, last + 1 :] = -torch.inf
            if sides[0] >= 0:
                scores[:, i, : max(0, i + behind - sides[0])] = -torch.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(out)


PACKABLE = [kind for kind in KINDS if kind not in WAYS]


@pytest.mark.parametrize("kernel", ["padded", "torch"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_log_probs_and_gradients_with_each_prompt_once_are_those_of_each_sequence_alone(
    kind, kernel, monkeypatch
):
    """ "torch" stands for both kernels of CUDA, by their definition."""
    monkeypatch.setattr(attention, "kernel_for", lambda *args: kernel)
    monkeypatch.setitem(attention.KERNELS, "torch", bottom_right)
    model = build(kind)
    sequences, shared = branched(pairs_with_prompts())
    row = pack(sequences, "cpu", shared)
    prompts = sum(skip for _, skip in shared)
    assert row["input_ids"].shape[1] == sum(len(ids) for ids, _ in sequences) - prompts
    wanted = one_by_one(model, sequences)
    with packed(model):
        got = sequence_logps(model, **row)
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)
        wanted_gradient = gradient(wanted, model)
        error = gradient(got, model) - wanted_gradient
        assert error.norm() < 1e-4 * wanted_gradient.norm()
    # control: aligned top left, as SDPA's own causal mask is, a branch would see too little
    with packed(model), torch.no_grad():
        top_left = functools.partial(bottom_right, aligned="top left")
        monkeypatch.setattr(attention, "kernel_for", lambda *args: "torch")
        monkeypatch.setitem(attention.KERNELS, "torch", top_left)
        got = sequence_logps(model, **row)
        assert torch.allclose(got[:4], wanted[:4], rtol=1e-5, atol=1e-4)
        assert not torch.isclose(got[4:], wanted[4:], rtol=1e-3).any()


def test_the_real_answer_is_not_seen_by_the_generated_one_nor_the_other_way_round():
    model = build("grouped queries")
    pairs, others = pairs_with_prompts(1), pairs_with_prompts(2)
    mixed = []
    for (real, generated), (other, _) in zip(pairs, others, strict=True):
        n = real[1].count(0)
        mixed.append([(real[0][:n] + other[0][n:], real[1]), generated])
    with packed(model), torch.no_grad():
        first, second = (
            sequence_logps(model, **pack(sequences, "cpu", shared))
            for sequences, shared in map(branched, (pairs, mixed))
        )
    assert torch.equal(first[4:], second[4:]) and (first[:4] != second[:4]).all()


@pytest.mark.parametrize("window", [None, 3])
def test_a_padded_branch_gives_no_nan_where_some_are_short_and_others_long(window):
    """Queries that only pad must not see nothing: softmax over nothing is NaN, and 0 × NaN too."""
    model = build("sliding window" if window else "llama")
    if window:
        model.config.sliding_window = window
        for layer in model.model.layers:
            layer.self_attn.sliding_window = window
    sequences, shared = branched(pairs_with_prompts(lengths=((30, 2, 1), (2, 3, 25))))
    with packed(model):
        got = gradient(sequence_logps(model, **pack(sequences, "cpu", shared)), model)
    wanted = gradient(one_by_one(model, sequences), model)
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
        assert torch.allclose(got, wanted, atol=1e-12 if dtype is torch.float64 else 1e-5)
        weights = torch.randn(3, 1500).to(wide.dtype)
        ours, theirs = (
            torch.autograd.grad((weights * x).sum(), logits, retain_graph=True)[0]
            for x in (got, wanted)
        )
        assert ours.dtype == dtype and torch.allclose(ours, theirs, atol=tolerance)
        del ours, theirs


def test_token_logps_keep_no_second_copy_of_the_logits():
    """What is saved for the backward pass besides the logits themselves: two numbers a token."""
    logits = torch.randn(64, 5000, requires_grad=True)
    labels = torch.randint(0, 5000, (64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_logps(logits, labels)
        ours = {x.data_ptr(): x.numel() for x in saved}
        saved.clear()
        logits.log_softmax(-1).gather(-1, labels[:, None])
        plain = {x.data_ptr(): x.numel() for x in saved}
    assert sum(ours.values()) - ours[logits.data_ptr()] == 2 * 64
    # control: log_softmax keeps a copy
    assert sum(plain.values()) >= logits.numel() and logits.data_ptr() not in plain


def test_bins_of_a_few_sizes():
    """Of any sizes: tests/test_fuzz.py."""
    assert balanced_bins([1] * 8, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert balanced_bins([9, 1], 4) == [[0], [1]]
    assert balanced_bins([3], 9, 2) == [[0], []]


def test_an_exported_model_does_not_ask_for_packed_attention(played):
    model = AutoModelForCausalLM.from_pretrained(played / "iter0" / "model")
    assert model.config._attn_implementation == "sdpa"
