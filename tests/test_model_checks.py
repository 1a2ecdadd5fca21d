"""The checks of a model, scoring_check.py and sampling_check.py: they find a leak of one token, a
wrong window, angles that move, a decode loop that sees something else; they pass what is only
rounded differently."""

import contextlib
import functools

import pytest
import torch
from conftest import MICRO, THETA0, load, stage
from families import CACHES, FAMILIES, LONGROPE, tiny
from test_packing import bottom_right
from transformers import AttentionInterface
from transformers.cache_utils import Cache

import train
from spin.model import attention, packing, sampling_check, scoring_check, weights
from spin.model.attention import Layout, packed_attention
from spin.recipe import parse
from spin.run.ranks import World, process_group
from spin.sampling import engines, slots

HERE = World(0, 1, torch.device("cpu"))
MOVES = "changing one moves another's log p"  # what (a) says
DIFFERS = "one differs from the same sequence alone"  # what (b) says


def probed(model, *flags):
    scoring_check.check_scoring(model, parse([*MICRO, *flags])[0], HERE)


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


def attention_with(change, *args, **kwargs):
    """packed_attention of arguments that `change` has altered."""
    return packed_attention(*args, **{**kwargs, **change(kwargs)})


@contextlib.contextmanager
def attention_that(change):
    AttentionInterface.register("packed", functools.partial(attention_with, change))
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


def test_a_branch_whose_first_query_stands_beside_the_first_key_is_found(refused, monkeypatch):
    top_left = functools.partial(bottom_right, aligned="top left")
    monkeypatch.setattr(attention, "kernel_for", lambda *args: top_left)
    assert DIFFERS in refused(lambda: probed(tiny("Llama")))
    monkeypatch.setattr(attention, "kernel_for", lambda *args: bottom_right)
    probed(tiny("Llama"))  # control


# ---- rotary angles that move; in the stages: test_bad_input.py -----------------------------------


def test_angles_that_the_longest_sequence_of_a_pass_decides_are_found(refused, monkeypatch):
    monkeypatch.setattr(scoring_check, "refuse_moving_angles", lambda *args: None)
    model = tiny("Phi-3, longrope", original_max_position_embeddings=20)
    assert DIFFERS in refused(lambda: probed(model))


@pytest.mark.parametrize(
    "settings, length, fine",
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, True),
        ({"rope_type": "default", "rope_theta": 1e4}, 65, True),
        ({**LONGROPE, "original_max_position_embeddings": 32}, 32, True),
        ({**LONGROPE, "original_max_position_embeddings": 32}, 33, False),
    ],
)
def test_only_angles_that_move_have_a_limit(settings, length, fine, refused):
    config = tiny("Llama", rope_parameters=settings).config
    if fine:
        return scoring_check.refuse_moving_angles(config, length)
    assert "lower it to" in refused(lambda: scoring_check.refuse_moving_angles(config, length))
    kinds = {"full_attention": settings, "sliding_attention": {"rope_type": "default"}}
    config.rope_parameters = kinds  # one for each kind of layer
    assert "lower it to" in refused(lambda: scoring_check.refuse_moving_angles(config, length))


def test_sequences_whose_sum_depends_on_the_width_of_a_padded_batch_are_found(refused):
    """Doge keeps the keys of largest value; where values are equal, the width decides."""
    for kept in (4, 16):
        assert DIFFERS in refused(lambda: probed(tiny("Doge", keep_window_size=kept)))  # noqa: B023 – called at once
    probed(tiny("Doge", keep_window_size=64))  # control: all keys


# ---- sampling ------------------------------------------------------------------------------------


def sampled_by(model, *flags):
    """The decode loop that the probe gives a model."""
    sampling_check.check_sampling(model, parse([*MICRO, *flags])[0], HERE)
    return model.decode_loop


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", sorted({*FAMILIES, *CACHES} - {"Doge", "DeepSeek-V3.2", "RecurrentGemma"})
)
def test_families_of_all_kinds_are_sampled_in_both_dtypes(name, dtype, capsys):
    """By the fastest loop that can hold their cache. In test_families.py: are the tokens right, and
    are those three refused?"""
    alone = name in ("RWKV", "RoFormer")  # a padding on the left would change what they say
    model = tiny(name).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    before = torch.get_rng_state()
    loop = sampled_by(model, "--dtype", dtype, *["--slots", "1"] * alone)
    assert torch.equal(torch.get_rng_state(), before)
    needed = {"GPT-Neo, local": engines.plain_generate, "OpenAI GPT": engines.plain_generate}
    assert loop is needed.get(name, engines.ways(model, 64)[0])
    said = capsys.readouterr().out
    assert ("is sampled " in said) == (loop is not slots.decode_in_slots)


def decoding(change):
    """A fault of a decode step, whose ids are (n, 1), and not of a prefill."""

    def broken(forward):
        def of_step(model, cache, ids, first, columns, width):
            if ids.shape[1] == 1:
                ids, columns, width = change(ids, columns, width)
            return forward(model, cache, ids, first, columns, width)

        return of_step

    return broken


def swapping(close):
    """Two answers that move at once come into each other's slots."""

    def broken(cache, state, done, width):
        (empty,) = done[: len(done) - int(done.sum())].nonzero(as_tuple=True)
        state = close(cache, state, done, width)
        state[:, empty] = state[:, empty.flip(0)]
        return state

    return broken


FAULTS_OF_DECODING = {
    "answers that change places": ("close_gaps", swapping),
    "a column off by one": ("forward_in_slots", decoding(lambda i, c, w: (i, c + 1, w + 1))),
    "a width too small": ("forward_in_slots", decoding(lambda i, c, w: (i, c, w - 1))),
    "a token fed twice": ("forward_in_slots", decoding(lambda i, c, w: (i, (c - 1).relu(), w))),
    "another token at place 90": (
        "forward_in_slots",
        decoding(lambda i, c, w: (i.where(c != 90, 5), c, w)),
    ),
    "a prompt in its neighbour's slot": (
        "prefill",
        lambda fill: lambda model, cache, new, first: fill(model, cache, new, max(0, first - 1)),
    ),
    "stale keys in a slot that changed hands": (
        "close_gaps",
        lambda close: lambda cache, *rest: close(Cache(layers=[]), *rest),
    ),
    "the newest key is left behind": (
        "close_gaps",
        lambda close: lambda cache, state, done, width: close(cache, state, done, width - 1),
    ),
}


# in bf16 these are of the size of rounding
SMALL_FAULTS = {"a width too small", "another token at place 90", "the newest key is left behind"}


@pytest.mark.parametrize(
    "fault, dtype",
    [
        *((fault, "fp32") for fault in FAULTS_OF_DECODING),
        *((fault, "bf16") for fault in FAULTS_OF_DECODING if fault not in SMALL_FAULTS),
    ],
)
def test_where_the_decode_loop_is_wrong_generate_is_taken(fault, dtype, capsys, monkeypatch):
    name, broken = FAULTS_OF_DECODING[fault]
    more = {"max_position_embeddings": 256, "some_window": 90}
    model = tiny("Llama", **more).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    flags = ["--max-length", 256, "--micro-tokens", 8192, "--dtype", dtype]
    monkeypatch.setattr(slots, name, broken(getattr(slots, name)))
    assert sampled_by(model, *map(str, flags)) is engines.plain_generate
    said = capsys.readouterr().out
    assert "LlamaForCausalLM is sampled by model.generate, where a batch waits" in said
    monkeypatch.undo()
    assert sampled_by(model, *map(str, flags)) is slots.decode_in_slots  # control
    assert "is sampled" not in capsys.readouterr().out


def test_answers_cross_each_number_up_to_60_and_each_larger_one_that_the_config_names(monkeypatch):
    places = set()  # of tokens that a decode step has fed
    note = decoding(lambda i, c, w: places.update(c.flatten().tolist()) or (i, c, w))
    monkeypatch.setattr(slots, "forward_in_slots", note(slots.forward_in_slots))
    sampled_by(tiny("Llama", max_position_embeddings=512), "--max-length", "512")
    assert places >= set(range(61)) and 90 not in places
    names = {"sizes": {"attention_spans": [4, 90]}, "index_topk": 200, "max_chunks": 512}
    sampled_by(tiny("Llama", max_position_embeddings=512, **names), "--max-length", "512")
    assert places >= {89, 90, 91, 199, 200, 201} and 300 not in places


def test_the_probe_of_sampling_takes_any_length_one_slot_and_few_tokens():
    model = tiny("Llama")
    for longest in (2, 3, 5, 12, 13, 20, 64):
        flags = ["--max-length", str(longest), "--max-new-tokens", "1", "--micro-tokens", "2000"]
        assert sampled_by(model, *flags) is slots.decode_in_slots
        # no pass may leave the learned positions
        other = tiny("GPT-Neo, local", max_position_embeddings=longest)
        assert (sampled_by(other, *flags) is engines.plain_generate) == (longest > 5)
    assert sampled_by(model, "--slots", "1") is slots.decode_in_slots
    passed = []
    for flags in (["--recipe", "paper"], ["--recipe", "small"]):
        model = tiny("GPT-Neo, local", window_size=256, max_position_embeddings=2048)
        count = lambda _, inputs, __: passed.append(inputs[0].numel())  # noqa: E731 – a line is enough
        model.get_input_embeddings().register_forward_hook(count)
        recipe = parse(flags)[0]
        sampling_check.check_sampling(model, recipe, HERE)
        assert model.decode_loop is engines.plain_generate
        assert 1000 < sum(passed) <= 2 * recipe.micro_tokens
        passed.clear()


# ---- in the stages -------------------------------------------------------------------------------


def scored_wrongly(monkeypatch):
    moved = functools.partial(attention_with, bounds_moved_by(-1))
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", moved)


def sampled_wrongly(monkeypatch):
    """And by no other loop."""
    for module in (engines, sampling_check):
        monkeypatch.setattr(module, "ways", lambda *args: [slots.decode_in_slots])
    _, broken = FAULTS_OF_DECODING["a column off by one"]
    monkeypatch.setattr(slots, "forward_in_slots", broken(slots.forward_in_slots))


@pytest.mark.parametrize(
    "script, fault, words",
    [
        ("generate", scored_wrongly, f"cannot keep sequences apart: {MOVES}"),
        ("train", scored_wrongly, f"cannot keep sequences apart: {MOVES}"),
        ("evaluate", scored_wrongly, f"cannot keep sequences apart: {MOVES}"),
        ("generate", sampled_wrongly, "cannot be sampled from as it is scored: off by"),
        ("evaluate", sampled_wrongly, "cannot be sampled from as it is scored: off by"),
    ],
)
def test_each_stage_probes_before_it_writes(script, fault, words, tmp_path, refused, monkeypatch):
    run = tmp_path / "run"
    flags = ["--num-prompts", 6, "--eval-prompts", 3]
    if script == "train":
        stage("generate", run, "--iter", 0, *flags)
    flags += ["--theta0"] if script == "evaluate" else ["--iter", 0]
    before = sorted(run.rglob("*"))
    fault(monkeypatch)
    assert f"LlamaForCausalLM {words}" in refused(lambda: stage(script, run, *flags))
    assert sorted(run.rglob("*")) == before
    monkeypatch.undo()
    stage(script, run, *flags)  # control


def test_a_sharded_model_goes_the_same_way_as_a_whole_one():
    """Every score and gradient of train.py takes the way that generate.py has probed."""
    recipe = parse([*MICRO, "--dtype", "bf16"])[0]
    with process_group() as world:
        model = weights.load_empty(str(THETA0), recipe)
        train.shard(model, recipe, world)
        weights.read_weights(model, str(THETA0), recipe, world)
        assert packing.can_pack(model)
        scoring_check.check_scoring(model, recipe, world)
        assert not isinstance(model.model.embed_tokens.weight, torch.nn.Buffer)
        # sharded again: an optimizer's step would otherwise not reach the next pass
        assert {type(w).__name__ for w in model.parameters()} == {"DTensor"}
    assert packing.can_pack(load(THETA0))


def test_random_sequences_hold_no_special_token_and_differ_in_every_place():
    config = tiny("GPT-2", eos_token_id=[2, 7]).config
    a, long, b, other = scoring_check.random_sequences(config, 64)
    assert [len(x) for x in (a, long, b, other)] == [8, 64, 56, 64]
    assert not {1, 2, 7} & {*a, *long, *b, *other} and max(a + long + b + other) < 88
    assert all(x != y for x, y in zip(long, other, strict=True))
