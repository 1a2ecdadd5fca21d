"""spin/model/probe.py: it finds a leak of one token, a wrong window, angles that move; it passes
what is only rounded differently."""

import contextlib
import functools

import pytest
import torch
from conftest import MICRO, THETA0, load, stage
from families import FAMILIES, LONGROPE, tiny
from test_packing import bottom_right
from transformers import AttentionInterface

import train
from spin.model import attention, packing, probe, weights
from spin.model.attention import Layout, packed_attention
from spin.recipe import parse
from spin.run.ranks import World, process_group

HERE = World(0, 1, torch.device("cpu"))
MOVES = "other tokens in one move another"  # what (a) says
DIFFERS = "one differs from the same sequence alone"  # what (b) says


def probed(model, *flags):
    probe.probe(model, parse([*MICRO, *flags])[0], HERE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_all_kinds_pass_in_every_attention_and_dtype(name, dtype):
    model = tiny(name)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    attentions = ["eager", "sdpa"] if model._supports_sdpa else ["eager"]
    before = torch.get_rng_state()
    probed(model, "--dtype", dtype)
    assert torch.equal(torch.get_rng_state(), before)
    for implementation in attentions:
        model.config._attn_implementation = implementation
        probed(model, "--dtype", dtype, "--attention", implementation)


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
    return {"layout": Layout([int(kwargs["cu_seq_lens_q"][-1])], [])}


def branches_moved_by(step):
    """A branch sees a token too much of its prompt's sequence, or one too little."""

    def change(kwargs):
        layout = kwargs["layout"]
        branches = [(whole, shared + step, own) for whole, shared, own in layout.branches]
        return {"layout": Layout(layout.wholes, branches)}

    return change


def another_prompt(kwargs):
    """A branch sees the beginning of another sequence."""
    layout = kwargs["layout"]
    branches = [(0, layout.wholes[0] - 1, own) for *_, own in layout.branches]
    return {"layout": Layout(layout.wholes, branches)}


def window_of(size):
    return lambda kwargs: {"sliding_window": size}


FAULTS_OF_ATTENTION = {
    "a sequence begins a token early": ("Llama", bounds_moved_by(-1), MOVES),
    "a sequence begins a token late": ("Llama", bounds_moved_by(1), MOVES),
    "no bounds": ("Llama", no_bounds, MOVES),
    "a generated answer sees a token of the real one": ("Llama", branches_moved_by(1), MOVES),
    "a generated answer misses a token of its prompt": ("Llama", branches_moved_by(-1), DIFFERS),
    "a generated answer sees another prompt": ("Llama", another_prompt, DIFFERS),
    "a window too small": ("Mistral, window", window_of(6), DIFFERS),
    "a window too large": ("Mistral, window", window_of(8), DIFFERS),
    "no window": ("Mistral, window", window_of(None), DIFFERS),
    "a window where there is none": ("Llama", window_of(40), DIFFERS),
    "one window for all layers": ("Gemma 3", window_of(7), DIFFERS),
    "another scale": ("Llama", lambda kwargs: {"scaling": 1.1 * kwargs["scaling"]}, DIFFERS),
    "a leak between experts, whose bits may differ": ("Mixtral", bounds_moved_by(-1), MOVES),
    "bf16: a leak": ("Llama", bounds_moved_by(-1), MOVES),
    "bf16: no window": ("Mistral, window", window_of(None), DIFFERS),
}


@pytest.mark.parametrize("fault", FAULTS_OF_ATTENTION)
def test_a_fault_of_packed_attention_is_found_and_named(fault, refused):
    name, change, finding = FAULTS_OF_ATTENTION[fault]
    half = fault.startswith("bf16")
    model = tiny(name).to(torch.bfloat16 if half else torch.float32)
    dtype = ["--dtype", "bf16" if half else "fp32"]
    with attention_that(change):
        line = refused(lambda: probed(model, *dtype))
    assert finding in line and line.startswith(f"error: {type(model).__name__} cannot keep")
    assert "try another --attention, or another model" in line
    probed(model, *dtype)  # control


def columns_moved(forward, **row):
    """The padded batch is right, but its logits are taken a place too late."""
    return packing_forward(forward, **{**row, "logits_to_keep": row["logits_to_keep"] + 1})


def neighbours_mixed(forward, **row):
    """A padded batch in which each sequence sees a token of the one before it."""
    ids = row["input_ids"].clone()
    starts = row["cu_seq_lens_q"][1:-1].long()
    ids[0, starts] = ids[0, starts - 1]
    return packing_forward(forward, **{**row, "input_ids": ids})


packing_forward = packing.forward_padded
FAULTS_OF_PADDING = {
    "logits of another place": ("Falcon", columns_moved, DIFFERS),
    "a token of another sequence": ("GPT-OSS", neighbours_mixed, MOVES),
}


@pytest.mark.parametrize("fault", FAULTS_OF_PADDING)
def test_a_fault_of_padded_batches_is_found_and_named(fault, refused, monkeypatch):
    name, broken, finding = FAULTS_OF_PADDING[fault]
    monkeypatch.setattr(packing, "forward_padded", broken)
    assert finding in refused(lambda: probed(tiny(name)))
    monkeypatch.undo()
    probed(tiny(name))  # control


def test_a_branch_whose_first_query_stands_beside_its_prompts_first_key_is_found(
    refused, monkeypatch
):
    top_left = functools.partial(bottom_right, aligned="top left")
    monkeypatch.setattr(attention, "kernel_for", lambda *args: top_left)
    assert DIFFERS in refused(lambda: probed(tiny("Llama")))
    monkeypatch.setattr(attention, "kernel_for", lambda *args: bottom_right)
    probed(tiny("Llama"))  # control


# ---- rotary angles that move; in the stages: test_bad_input.py -----------------------------------


def test_angles_that_the_longest_sequence_of_a_pass_decides_are_found(refused, monkeypatch):
    monkeypatch.setattr(probe, "refuse_moving_angles", lambda *args: None)
    model = tiny("Phi-3, longrope", original_max_position_embeddings=20)
    assert DIFFERS in refused(lambda: probed(model))


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
        return probe.refuse_moving_angles(config, length)
    assert "lower it to" in refused(lambda: probe.refuse_moving_angles(config, length))
    kinds = {"full_attention": settings, "sliding_attention": {"rope_type": "default"}}
    config.rope_parameters = kinds  # one for each kind of layer
    assert "lower it to" in refused(lambda: probe.refuse_moving_angles(config, length))


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
        model = weights.load_empty(str(THETA0), recipe)
        train.shard(model, recipe, world)
        weights.read_weights(model, str(THETA0), recipe, world)
        assert packing.can_pack(model)
        probe.probe(model, recipe, world)
        assert not isinstance(model.model.embed_tokens.weight, torch.nn.Buffer)
        # sharded again: an optimizer's step would otherwise not reach the next pass
        assert {type(w).__name__ for w in model.parameters()} == {"DTensor"}
    assert packing.can_pack(load(THETA0))


def test_random_sequences_hold_no_special_token_and_differ_in_every_place():
    config = tiny("GPT-2", eos_token_id=[2, 7]).config
    a, long, b, other = probe.random_sequences(config, 64)
    assert [len(x) for x in (a, long, b, other)] == [8, 64, 8, 64]
    assert not {1, 2, 7} & {*a, *long, *b, *other} and max(a + long + b + other) < 88
    assert all(x != y for x, y in zip(long, other, strict=True))
