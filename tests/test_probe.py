"""spin/probe.py: it finds a leak of one token, a lost mask, a wrong window, angles that move; it
passes what only rounds otherwise."""

import contextlib

import pytest
import torch
from conftest import MICRO, THETA0, load, stage
from families import FAMILIES, LONGROPE, save, tiny
from transformers import AttentionInterface, GPT2Config, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers.masking_utils import create_masks_for_generate

import train
from spin import models, packing, probe
from spin.attention import Layout, packed_attention
from spin.distributed import World, process_group
from spin.flags import parse

QUICK = ["Mistral, window", "Qwen3-MoE", "GPT-OSS", "Gemma 2", "OPT", "Falcon", "Mamba"]
QUICK_AND_LONG = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FAMILIES
]
HERE = World(0, 1, torch.device("cpu"))
MOVES = "other tokens in one move another"  # what (a) says
DIFFERS = "one differs from the same sequence alone"  # what (b) says


def probed(model, *flags):
    probe.probe(model, parse([*MICRO, *flags])[0], HERE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", QUICK_AND_LONG)
def test_families_of_all_kinds_pass_in_every_attention_and_dtype(name, dtype):
    model = tiny(name)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    attentions = ["eager", "sdpa"] if model._supports_sdpa else ["eager"]
    probed(model, "--dtype", dtype)
    for attention in attentions:
        model.config._attn_implementation = attention
        probed(model, "--dtype", dtype, "--attention", attention)


# ---- faults --------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention_that(change):
    """Inside the `with`, packed_attention gets arguments that `change` has altered."""

    def broken(module, query, key, value, mask, **kwargs):
        return packed_attention(module, query, key, value, mask, **{**kwargs, **change(kwargs)})

    AttentionInterface.register("packed", broken)
    try:
        yield
    finally:
        AttentionInterface.register("packed", packed_attention)


def bounds_moved_by(step):
    """Where one sequence ends and the next begins is told wrong by a token."""

    def change(kwargs):
        first, *others, last = kwargs["layout"].wholes
        wholes = [first + step, *others, last - step]
        return {"layout": Layout(wholes, kwargs["layout"].branches)}

    return change


def no_bounds(kwargs):
    """All tokens of the row as one sequence."""
    tokens = int(kwargs["cu_seq_lens_q"][-1])
    bounds = torch.tensor([0, tokens])
    return {"layout": Layout([tokens], []), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}


def branches_moved_by(step):
    """A branch sees a token too much of its prompt's sequence, or one too little."""

    def change(kwargs):
        layout = kwargs["layout"]
        branches = [(whole, shared + step, own) for whole, shared, own in layout.branches]
        bounds = kwargs["cu_seq_lens_k"].clone()
        bounds[-1] += step * len(branches)
        return {"layout": Layout(layout.wholes, branches), "cu_seq_lens_k": bounds}

    return change


def another_prompt(kwargs):
    """A branch sees the beginning of another sequence."""
    layout = kwargs["layout"]
    branches = [(0, layout.wholes[0] - 1, own) for *_, own in layout.branches]
    bounds = kwargs["cu_seq_lens_k"].clone()
    for (_, is_now, _), (_, was, _) in zip(branches, layout.branches, strict=True):
        bounds[-1] += is_now - was
    return {"layout": Layout(layout.wholes, branches), "cu_seq_lens_k": bounds}


def top_left(kwargs):
    """A branch's first query stands beside its prompt's first key."""
    return {"cu_seq_lens_k": kwargs["cu_seq_lens_q"]}


def window_of(size):
    return lambda kwargs: {"sliding_window": size}


FAULTS_OF_ATTENTION = {
    "a sequence begins a token early": ("Llama", bounds_moved_by(-1), MOVES),
    "a sequence begins a token late": ("Llama", bounds_moved_by(1), MOVES),
    "no bounds": ("Llama", no_bounds, MOVES),
    "a generated answer sees a token of the real one": ("Llama", branches_moved_by(1), MOVES),
    "a generated answer misses a token of its prompt": ("Llama", branches_moved_by(-1), DIFFERS),
    "a generated answer sees another prompt": ("Llama", another_prompt, DIFFERS),
    "a generated answer is aligned top left": ("Llama", top_left, DIFFERS),
    "a window too small": ("Mistral, window", window_of(6), DIFFERS),
    "a window too large": ("Mistral, window", window_of(8), DIFFERS),
    "no window": ("Mistral, window", window_of(None), DIFFERS),
    "a window where there is none": ("Llama", window_of(40), DIFFERS),
    "one window for all layers": ("Gemma 3", window_of(7), DIFFERS),
    "another scale": ("Llama", lambda kwargs: {"scaling": 1.1 * kwargs["scaling"]}, DIFFERS),
}


@pytest.mark.parametrize("fault", FAULTS_OF_ATTENTION)
def test_a_fault_of_packed_attention_is_found_and_named(fault, refused):
    name, change, finding = FAULTS_OF_ATTENTION[fault]
    with attention_that(change):
        line = refused(lambda: probed(tiny(name)))
    assert finding in line and line.startswith(f"error: {type(tiny(name)).__name__} cannot keep")
    assert "try --attention eager, or another model" in line
    with attention_that(lambda kwargs: {}):  # control
        probed(tiny(name))


def seen_from_behind(masks):
    """A token sees the first one behind its sequence's end."""
    for mask in masks.values():
        mask[..., 5, 8] = 0.0  # the first of three sequences has 64 / 8 tokens
    return masks


def one_for_all(masks):
    return masks["full_attention"]


FAULTS_OF_MASKS = {
    "a token sees the next sequence": ("Gemma 2", seen_from_behind, MOVES),
    "the masks are lost": ("GPT-OSS", lambda masks: None, MOVES),
    "one mask for all kinds of layers": ("Gemma 2", one_for_all, DIFFERS),
}


@pytest.mark.parametrize("fault", FAULTS_OF_MASKS)
def test_a_fault_of_explicit_masks_is_found_and_named(fault, refused, monkeypatch):
    name, change, finding = FAULTS_OF_MASKS[fault]

    def broken(*args, **kwargs):
        return change(create_masks_for_generate(*args, **kwargs))

    monkeypatch.setattr(packing, "create_masks_for_generate", broken)
    line = refused(lambda: probed(tiny(name)))
    assert finding in line
    monkeypatch.undo()
    probed(tiny(name))  # control


def test_a_leak_is_found_between_experts_too_whose_bits_may_differ(refused):
    with attention_that(bounds_moved_by(-1)):
        assert MOVES in refused(lambda: probed(tiny("Mixtral")))


def test_a_leak_is_found_in_bf16(refused):
    with attention_that(bounds_moved_by(-1)):
        model = tiny("Llama").to(torch.bfloat16)
        assert MOVES in refused(lambda: probed(model, "--dtype", "bf16"))
    with attention_that(window_of(None)):
        model = tiny("Mistral, window").to(torch.bfloat16)
        assert DIFFERS in refused(lambda: probed(model, "--dtype", "bf16"))


# ---- rotary angles that move ---------------------------------------------------------------------


def long_phi():
    return tiny("Phi-3, longrope", original_max_position_embeddings=20)


def test_angles_that_the_longest_sequence_of_a_pass_decides_are_found(refused, monkeypatch):
    monkeypatch.setattr(probe, "refuse_moving_angles", lambda *args: None)
    model = long_phi()
    assert DIFFERS in refused(lambda: probed(model))


@pytest.mark.parametrize("script", ["generate", "evaluate"])
def test_lengths_beyond_such_a_limit_are_refused_by_the_first_stage(script, tmp_path, refused):
    theta = save(long_phi(), tmp_path / "theta")
    which = ["--iter", 0] if script == "generate" else ["--theta0"]
    line = refused(lambda: stage(script, tmp_path / "run", *which, "--model", theta))
    limit = "beyond 20 positions this model's rotary angles (longrope) change"
    assert line == f"error: --max-length 64: {limit} for all sequences of a pass; lower it to 20"
    assert not (tmp_path / "run").exists()
    short = ["--max-length", 20, "--max-new-tokens", 4]  # as it advises
    stage(script, tmp_path / "run", *which, "--model", theta, *short)


@pytest.mark.parametrize(
    "settings, length, fine",
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, True),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 65, False),
        ({"rope_type": "default", "rope_theta": 1e4}, 65, True),
        ({**LONGROPE, "original_max_position_embeddings": 32}, 32, True),
        ({**LONGROPE, "original_max_position_embeddings": 32}, 33, False),
    ],
)
def test_only_angles_that_move_have_a_limit(settings, length, fine, refused):
    config = tiny("Llama", rope_parameters=settings).config
    if fine:
        return models.refuse_moving_angles(config, length)
    assert "lower it to" in refused(lambda: models.refuse_moving_angles(config, length))
    kinds = {"full_attention": settings, "sliding_attention": {"rope_type": "default"}}
    config.rope_parameters = kinds  # one for each kind of layer
    assert "lower it to" in refused(lambda: models.refuse_moving_angles(config, length))


# ---- in the stages -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["generate", "train", "evaluate"])
def test_each_stage_probes_before_it_writes_anything(script, tmp_path, refused):
    run = tmp_path / "run"
    flags = ["--num-prompts", 6, "--eval-prompts", 3]
    if script == "train":
        stage("generate", run, "--iter", 0, *flags)
    which = ["--theta0"] if script == "evaluate" else ["--iter", 0]
    before = sorted(run.rglob("*"))
    with attention_that(bounds_moved_by(-1)):
        line = refused(lambda: stage(script, run, *which, *flags))
    assert MOVES in line and line.startswith("error: LlamaForCausalLM cannot keep sequences")
    assert sorted(run.rglob("*")) == before
    stage(script, run, *which, *flags)  # control


def test_a_sharded_model_goes_the_same_way_as_a_whole_one():
    """Every score and gradient of train.py takes the way that generate.py has probed."""
    recipe = parse([*MICRO, "--dtype", "bf16"])[0]
    with process_group() as world:
        model, folder = models.load_empty(str(THETA0), recipe, world)
        train.shard(model, recipe, world)
        models.read_weights(model, folder, recipe, world)
        assert packing.way_to_pack(model, "auto") == "packed"
        probe.probe(model, recipe, world)
        assert not isinstance(model.model.embed_tokens.weight, torch.nn.Buffer)
        # sharded again: an optimizer's step would otherwise not reach the next pass
        assert {type(w).__name__ for w in model.parameters()} == {"DTensor"}
    assert packing.way_to_pack(load(THETA0), "auto") == "packed"


@pytest.mark.parametrize("name, times", [("Llama", 6), ("Gemma 2", 4)])
def test_it_costs_a_few_times_the_longest_sequence_and_no_random_number(name, times):
    """More where a branch has to be tried too."""
    model = tiny(name)
    passed = []
    hook = lambda module, inputs, output: passed.append(inputs[0].numel())  # noqa: E731 – one line
    model.get_input_embeddings().register_forward_hook(hook)
    before = torch.get_rng_state()
    probed(model)
    assert torch.equal(torch.get_rng_state(), before)
    passed.remove(4)  # the trial of way_to_pack
    assert (times - 1) * 64 < sum(passed) <= times * 64


def test_random_sequences_hold_no_special_token_and_differ_in_every_place():
    config = tiny("GPT-2", eos_token_id=[2, 7]).config
    a, long, b, other = probe.random_sequences(config, 64)
    assert [len(x) for x in (a, long, b, other)] == [8, 64, 8, 64]
    assert not {1, 2, 7} & {*a, *long, *b, *other} and max(a + long + b + other) < 88
    assert all(x != y for x, y in zip(long, other, strict=True))
    again = probe.random_sequences(GPT2Config(vocab_size=88, bos_token_id=1, eos_token_id=2), 64)
    assert len(again[1]) == 64


# ---- models that no run can finish with ----------------------------------------------------------


@pytest.mark.parametrize("script", ["generate", "evaluate"])
def test_a_model_that_cannot_be_sharded_is_refused_by_the_first_stage_by_name(
    script, tmp_path, refused
):
    config = OpenAIGPTConfig(vocab_size=88, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    theta = save(OpenAIGPTLMHeadModel(config), tmp_path / "theta")
    which = ["--iter", 0] if script == "generate" else ["--theta0"]
    line = refused(lambda: stage(script, tmp_path / "run", *which, "--model", theta))
    assert line.startswith("error: OpenAIGPTLMHeadModel does not name its blocks")
    assert not (tmp_path / "run").exists()


def test_an_attention_that_a_family_lacks_is_refused(tmp_path, refused):
    theta = save(tiny("Gemma 2"), tmp_path / "theta")
    flags = ["--iter", 0, "--model", theta, "--num-prompts", 6]
    line = refused(lambda: stage("generate", tmp_path / "run", *flags, "--attention", "sdpa"))
    mend = "cannot use --attention sdpa: use --attention auto"
    assert line == f"error: Gemma2ForCausalLM {mend}"
    stage("generate", tmp_path / "run", *flags)  # auto takes what the family has
