"""spin/model/weights.py: θ_t reaches the shards of every rank, and θ_{t+1} is written as it is."""

import json
import shutil

import pytest
import torch
import train_vs_trl
from conftest import THETA0, load, on_ranks, stage
from families import save, tiny, tiny_multimodal
from safetensors.torch import load_file, save_file
from test_train import fresh
from torch.distributed.checkpoint import state_dict as states
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import train
from spin.data.pairs import share_prompts
from spin.model import lora, weights
from spin.model.packing import packed
from spin.recipe import Recipe
from spin.run.folders import Iteration
from spin.run.ranks import process_group

# what two ranks are asked, and what one rank is asked to compare with
CASES = {
    "tied": {},
    "untied": {"model": "untied"},
    "GPT-OSS, whose names transformers converts": {"model": "GPT-OSS"},
    "replicas": {"replicas": 2},
    "offload": {"offload": True},
    "adapters on a base in bf16": {"lora_rank": 4, "dtype": "bf16"},
}
CONTROLS = ("tied", "adapters on a base in bf16")  # of which torch would make something else


def make_models(folder):
    """θ_0 with a head of its own, in bf16; a tiny model of a family whose names are converted."""
    untied = AutoModelForCausalLM.from_pretrained(
        THETA0, dtype=torch.bfloat16, tie_word_embeddings=False
    )
    torch.nn.init.normal_(untied.lm_head.weight, std=0.02)
    untied.save_pretrained(folder / "untied")
    tiny("GPT-OSS").save_pretrained(folder / "GPT-OSS")


def recipe_of(case: str, folder, ranks: int) -> Recipe:
    knobs = {"replicas": 1, **CASES[case]} if ranks > 1 else {**CASES[case], "replicas": 1}
    model = str(folder / knobs.pop("model")) if "model" in knobs else str(THETA0)
    how = {"batch_size": 8, "micro_tokens": 200, "epochs": 1, "lr": (1e-3,), "recompute": True}
    return Recipe(model=model, revision="", **how, **knobs)


def kinds_of(model) -> dict:
    """{name: (first name of the same object, dtype, whether it is trained)} of all parameters."""
    first = {}
    kinds = {}
    for name, w in model.named_parameters(remove_duplicate=False):
        name = name.replace("_checkpoint_wrapped_module.", "")
        kinds[name] = first.setdefault(id(w), name), w.dtype, w.requires_grad
    return kinds


def whole_weights(model) -> dict:
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = states.get_model_state_dict(model, options=options)
    return {name: w.clone() for name, w in found.items()}  # one rank's are those in use


def load_and_train(case: str, folder, world, make_room=weights.make_room) -> dict:
    """What a model is when it is loaded, and its weights then and after three steps."""
    recipe = recipe_of(case, folder, world.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "make_room", make_room)
        model = weights.load_empty(recipe.model, recipe)
        if recipe.lora_rank:
            dtype = weights.compute_dtype(recipe.dtype, world.device)
            lora.add_adapters(model, recipe.model, recipe, 0, dtype)
        train.shard(model, recipe, world)
        weights.read_weights(model, recipe.model, recipe, world)
    found = {"kinds": kinds_of(model), "loaded": whole_weights(model)}
    if make_room is not weights.make_room:
        return found
    pairs = train_vs_trl.make_pairs(24, 60, prompt=(4, 12), half=(16, 40))
    out = folder / f"{case}, {world.size} ranks"
    out.mkdir(exist_ok=True)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0, foreach=False)
    with packed(model) as method:
        if method == "packed":
            share_prompts(pairs)
        scores = train.score_opponent(model, pairs, recipe, 0, world)
        train.train(model, optimizer, pairs, scores, recipe, Iteration(0, out, {}), world)
    return {**found, "trained": whole_weights(model)}


def on_every_rank(folder):
    with process_group() as world:
        found = {case: load_and_train(case, folder, world) for case in CASES}
        for case in CONTROLS:
            nothing = load_and_train(case, folder, world, make_room=lambda *args: None)
            found["without room: " + case] = nothing
    torch.save(found, folder / f"rank {world.rank}")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(what one rank finds in each case, what each of two ranks does), and the models' folder."""
    folder = tmp_path_factory.mktemp("loading")
    make_models(folder)
    code, err = on_ranks(2, lambda: on_every_rank(folder), folder)
    assert code == 0, err
    with process_group() as world:
        one = {case: load_and_train(case, folder, world) for case in CASES}
    return one, [torch.load(folder / f"rank {rank}") for rank in range(2)], folder


def length(tensors) -> float:
    return torch.cat([x.float().flatten() for x in tensors]).norm().item()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_load_and_train_as_one_does(case, both):
    one, two, folder = both
    one = one[case]
    plain = load(recipe_of(case, folder, 1).model)
    for name, w in plain.state_dict().items():
        loaded = one["loaded"].get(name, one["loaded"].get(base_name(name)))
        assert torch.equal(loaded, w.to(loaded.dtype)), name
    for rank in (0, 1):
        assert two[rank][case]["kinds"] == one["kinds"]
    # rank 0 alone gathers
    loaded, trained = two[0][case]["loaded"], two[0][case]["trained"]
    assert all(torch.equal(loaded[n], one["loaded"][n]) for n in one["loaded"])
    off = length(trained[n] - w for n, w in one["trained"].items())
    moved = length(w - one["loaded"][n] for n, w in one["trained"].items())
    assert moved > 0 and off < 2e-3 * moved


def base_name(name: str) -> str:
    """Of a weight in a layer with an adapter."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.base_layer.{last}"


def test_ties_dtypes_and_what_is_trained_are_as_they_should_be(both):
    one, _, _ = both
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert one["tied"]["kinds"][head][0] == embedding
    assert one["untied"]["kinds"][head][0] == head
    assert {kind[1:] for kind in one["tied"]["kinds"].values()} == {(torch.float32, True)}
    for name, kind in one["adapters on a base in bf16"]["kinds"].items():
        assert kind[1:] == ((torch.float32, True) if ".lora_" in name else (torch.bfloat16, False))


@pytest.mark.parametrize("case", CONTROLS)
def test_control_without_memory_torch_puts_other_tensors_in_the_place_of_the_parameters(case, both):
    """The weights are right even then, and so would the first logits be."""
    one, two, _ = both
    for rank in (0, 1):
        assert two[rank]["without room: " + case]["kinds"] != one[case]["kinds"]
    loaded = two[0]["without room: " + case]["loaded"]
    assert all(torch.equal(loaded[n].to(w.dtype), w) for n, w in one[case]["loaded"].items())


@pytest.mark.parametrize("kind", ["base", "older", "several"])
def test_a_sharded_model_is_what_transformers_reads_from_a_folder(kind, tmp_path):
    start = shutil.copytree(THETA0, tmp_path / "theta")
    theta_0 = load(THETA0)
    if kind == "base":  # the file's names are not the module's
        config = (start / "config.json").read_text()
        theta_0.model.save_pretrained(start)
        (start / "config.json").write_text(config)
    if kind == "older":  # what transformers would not read, beside what it does
        older = {name: w + 1 for name, w in theta_0.model.state_dict().items()}
        save_file(older, start / "model-older.safetensors", metadata={"format": "pt"})
    if kind == "several":
        (start / "model.safetensors").unlink()
        theta_0.save_pretrained(start, max_shard_size="100KB")
        assert len(list(start.glob("*.safetensors"))) > 1
    recipe = Recipe(model=str(start), revision="", recompute=False)
    with process_group() as world:
        model = weights.load_empty(recipe.model, recipe)
        train.shard(model, recipe, world)
        weights.read_weights(model, recipe.model, recipe, world)
        ids = torch.arange(1, 20)[None]
        # the rotary frequencies, which no file holds, too
        assert torch.equal(model(ids).logits, theta_0(ids).logits)
        model.reshard()
        loaded = {n: w.full_tensor() for n, w in model.named_parameters()}
    assert all(torch.equal(loaded[n], w) for n, w in theta_0.named_parameters())
    assert {w.dtype for w in loaded.values()} == {torch.float32}


def test_two_weights_that_the_config_calls_one_are_refused(tmp_path, refused):
    """transformers would not tie them, and the ranks' shards would be of a tied model."""
    make_models(tmp_path)
    start = shutil.copytree(THETA0, tmp_path / "theta")
    shutil.copy(tmp_path / "untied" / "model.safetensors", start)
    flags = ["--iter", 0, "--model", start]
    line = refused(lambda: stage("generate", tmp_path / "run", *flags))
    assert "not those of its config.json: tied keys that differ ['lm_head.weight']" in line
    assert not (tmp_path / "run").exists()


def test_weights_that_rank_0_cannot_read_end_both_ranks_in_one_line(played, tmp_path):
    run = fresh(played, tmp_path / "run")
    shutil.copytree(THETA0, tmp_path / "theta")
    file = tmp_path / "theta" / "model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    flags = ["--iter", 0, "--model", tmp_path / "theta"]
    code, err = on_ranks(2, lambda: stage("train", run, *flags), tmp_path)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, err
    assert "missing keys ['model.norm.weight']" in lines[0]
    assert "has left" not in err and not (run / "iter0" / "opponent.jsonl").exists()


def test_the_next_model_is_exported_in_fp32_with_its_tokenizer_and_generation_config(played):
    folder = played / "iter0" / "model"
    state = load_file(folder / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    start = load_file(THETA0 / "model.safetensors")
    assert set(state) == set(start) and any(not torch.equal(state[k], start[k]) for k in state)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"  # not packed_attention
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("### Instruction: Twice kola\n\n### Response:", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    assert "kolakola" in tokenizer.decode(answer)


def test_a_bf16_model_is_trained_in_fp32_and_keeps_its_generation_config(played, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(THETA0).save_pretrained(tmp_path / "half")
    GenerationConfig(eos_token_id=2, repetition_penalty=1.5).save_pretrained(tmp_path / "half")
    run = fresh(played, tmp_path / "run")
    flags = ["--model", tmp_path / "half", "--lr", "1e-7", "--dtype", "bf16"]
    stage("train", run, "--iter", 0, *flags)
    exported = run / "iter0" / "model"
    start, end = (load_file(x / "model.safetensors") for x in (tmp_path / "half", exported))
    a, b = (torch.cat([state[k].float().flatten() for k in sorted(end)]) for state in (start, end))
    assert end["model.norm.weight"].dtype == torch.float32 and (a != b).float().mean() > 0.9
    # control: weights in bf16 would not have moved at all
    assert (a != b.bfloat16().float()).float().mean() < 0.1
    assert GenerationConfig.from_pretrained(exported).repetition_penalty == 1.5


def test_a_model_that_cannot_be_read_back_gets_no_name(played, tmp_path, monkeypatch, capsys):
    run = fresh(played, tmp_path / "run")
    save_all = PreTrainedModel.save_pretrained

    def save_fewer(model, folder, state_dict):
        del state_dict["model.norm.weight"]
        save_all(model, folder, state_dict=state_dict)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save_fewer)
        with pytest.raises(SystemExit) as stop:
            stage("train", run, "--iter", 0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ")
    assert "missing keys ['model.norm.weight']; transformers cannot read what it saved" in line
    assert not (run / "iter0" / "model").exists() and (run / "iter0" / "checkpoint").exists()
    stage("train", run, "--iter", 0)  # the control, from the last checkpoint
    ours, theirs = (r / "iter0" / "model" / "model.safetensors" for r in (run, played))
    assert ours.read_bytes() == theirs.read_bytes()


LOST = {  # a family, what its file holds besides, and how it is named
    "Qwen3.5": ((), "model.visual (21 tensors)"),
    "DeepSeek-V3": (
        ("model.layers.61.eh_proj", "model.layers.61.norm"),
        "model.layers.61 (2 tensors)",
    ),
    "GPT-2": (("transformer.h.0.attn.bias", "transformer.h.1.attn.bias"), None),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_checkpoint_has_and_theta_1_will_lack_is_named_once(name, tmp_path, capsys):
    """A vision tower; a layer for the token after next. The causal masks of GPT-2 are no loss."""
    more, named = LOST[name]
    theta_0 = save(tiny_multimodal(name) if name == "Qwen3.5" else tiny(name), tmp_path / "theta")
    held = load_file(theta_0 / "model.safetensors") | {n: torch.zeros(2) for n in more}
    save_file(held, theta_0 / "model.safetensors", metadata={"format": "pt"})
    said = f"warning: {theta_0} has parts that its causal model drops; theta_1 will lack them too: "
    said += str(named)
    for t, part in ((0, "generate"), (0, "train"), (1, "generate")):
        capsys.readouterr()
        stage(part, tmp_path / "run", "--iter", t, "--model", theta_0, "--max-new-tokens", 8)
        lines = [x for x in capsys.readouterr().err.splitlines() if "theta_1" in x]
        assert lines == ([said] if named and t == 0 else [])
