"""--lora-rank: the update of the adapters, what is written, and that peft reads it, each held up
against peft and transformers alone."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import MICRO, REPO, THETA0, load, stage, torchrun
from families import FAMILIES, save, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bad_input import LISTED
from test_train import Killed, die_at, fresh, metrics, recipe_and_pairs
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import train
from loss import sequence_logps
from spin import lora, models
from spin.checksums import read_list, unlike
from spin.distributed import World, process_group
from spin.packing import pack
from spin.pairs import batches
from spin.recipe import Recipe

RANK = ["--lora-rank", "4", "--lr", "1e-3"]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = World(0, 1, torch.device("cpu"))


def begun(played, folder, iterations=(0,)):
    """A run that has its answers, and nothing else of the run in full."""
    run = fresh(played, folder, iterations)
    shutil.rmtree(run / "iter0" / "model", ignore_errors=True)
    return run


@pytest.fixture(scope="module")
def adapted(played, tmp_path_factory):
    """Two iterations with adapters, on the answers of the run in full; for reading only."""
    run = begun(played, tmp_path_factory.mktemp("runs") / "adapted", (0, 1))
    for t in (0, 1):
        stage("train", run, "--iter", t, *RANK)
    return run


def adapters(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def theta(run, t):
    return run / f"iter{t - 1}" / "model" if t else THETA0


def logps(model, run, t):
    """log p of each pair's answers, (2 N,)."""
    _, pairs = recipe_and_pairs(run, t)
    with torch.no_grad():
        halves = [pack([p[half] for p in pairs], "cpu") for half in ("real", "generated")]
        return torch.cat([sequence_logps(model, **half) for half in halves])


# ---- the start and the update --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--dtype", "bf16", "--recompute"]])
def test_the_first_loss_is_log2_and_its_margin_zero_for_b_is_zero(flags, adapted, played, tmp_path):
    run = adapted
    if flags:
        run = begun(played, tmp_path)
        stage("train", run, "--iter", 0, *RANK, *flags)
    for folder in sorted(run.glob("iter*")):
        if (folder / "model").exists():
            first, second = metrics(folder)[:2]
            assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert first["margin"] == first["margin_std"] == first["logratio_real"] == 0
            assert second["margin_std"] > 0  # control: after an update there is a margin


def first_values(name, t, wide, seed=0):
    """A of a layer as the documentation says it is drawn, (4, wide)."""
    rng = np.random.default_rng((seed, t, *name.encode()))
    return torch.from_numpy(rng.uniform(-(wide**-0.5), wide**-0.5, (4, wide))).float()


def adapted_by_peft(start, t):
    """θ_t with peft's own adapters of the same first values, the oracle's model."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(LAYERS), task_type="CAUSAL_LM")
    model = get_peft_model(load(start), config).eval()
    for name, layer in model.named_modules():
        if name.endswith(".lora_A.default"):
            name = name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            with torch.no_grad():
                layer.weight.copy_(first_values(name, t, layer.in_features))
    return model


@pytest.mark.parametrize("t", [0, 1])
def test_the_adapters_move_as_in_plain_pytorch_and_peft(adapted, t):
    """Algorithm 1 without our code: peft's model in one process, one batch a step, torch's RMSProp
    and its clipping. The losses of the first steps."""
    recipe, pairs = recipe_and_pairs(adapted, t)
    model = adapted_by_peft(theta(adapted, t), t)
    lam = (5.0, 4.0)[t]
    total = 2 * math.ceil(len(pairs) / 12)
    warm = math.ceil(0.1 * total)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=0.0)
    frozen = logps(model, adapted, t).view(2, -1)
    losses = []
    for step in range(4):
        batch = batches(len(pairs), recipe, t, 0)[step]
        halves = [pack([pairs[i][half] for i in batch], "cpu") for half in ("real", "generated")]
        real, generated = (sequence_logps(model, **half) for half in halves)
        margin = lam * (real - frozen[0][batch] - generated + frozen[1][batch])
        loss = torch.log1p(torch.exp(-margin)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rate = (step + 1) / warm if step < warm else (total - step) / (total - warm + 1)
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
    assert [row["loss"] for row in metrics(adapted / f"iter{t}")[:4]] == pytest.approx(losses, 1e-4)


def test_first_values_differ_between_layers_iterations_and_seeds():
    a = first_values("x", 0, 8)
    for other in (("y", 0, 8), ("x", 1, 8), ("x", 0, 8, 1)):
        assert not torch.equal(first_values(*other), a)
    layer = get_peft_model(load(THETA0), LoraConfig(r=4, target_modules=["q_proj"]))
    layer = layer.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    lora.draw(layer, (0, 0, *b"x"))
    assert torch.equal(layer.lora_A["default"].weight, first_values("x", 0, layer.in_features))
    assert layer.lora_B["default"].weight.abs().max() == 0


def test_the_base_is_read_shard_by_shard_and_frozen_in_the_compute_dtype(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load_whole", lambda *a: pytest.fail("the model was read whole"))
    start = load_file(THETA0 / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        recipe = Recipe(model=str(THETA0), lora_rank=4, dtype=name, recompute=True)
        with process_group() as world:
            model, folder = models.load_empty(str(THETA0), recipe, world)
            lora.add_adapters(model, str(THETA0), recipe, 0, world)
            train.shard(model, recipe, world)
            models.read_weights(model, folder, recipe, world)
            state = models.get_model_state_dict(model)
            kinds = {n: (w.dtype, w.requires_grad) for n, w in model.named_parameters()}
        own = {n.replace("base_layer.", ""): w for n, w in state.items() if "lora_" not in n}
        assert own.keys() >= start.keys()
        assert all(torch.equal(own[n].full_tensor(), start[n].to(dtype)) for n in start)
        of_adapters = {kind for n, kind in kinds.items() if "lora_" in n}
        assert of_adapters == {(torch.float32, True)}
        assert {kind for n, kind in kinds.items() if "lora_" not in n} == {(dtype, False)}
        assert len(state) - len(own) == 2 * len(LAYERS) * model.config.num_hidden_layers


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1])
def test_the_merged_model_is_the_start_with_its_adapters_by_peft(adapted, t):
    """To 1e-5 relative, by plain transformers and plain peft; the adapters' config names θ_t."""
    folder = adapted / f"iter{t}"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    named = REPO / config["base_model_name_or_path"]
    assert named == theta(adapted, t) and (config["r"], config["lora_alpha"]) == (4, 16)
    merged = logps(load(folder / "model"), adapted, t)
    by_peft = logps(PeftModel.from_pretrained(load(named), folder / "adapter").eval(), adapted, t)
    assert torch.allclose(merged, by_peft, rtol=1e-5, atol=0)
    # controls: θ_t alone; for t = 1 the adapters on θ_0, which need those of iteration 0 too
    others = [load(theta(adapted, t))]
    if t:
        others.append(PeftModel.from_pretrained(load(THETA0), folder / "adapter").eval())
    for other in others:
        assert not torch.allclose(merged, logps(other, adapted, t), rtol=1e-3)


def test_the_next_model_is_a_plain_folder_in_fp32_with_checksums_beside_it(adapted):
    folder = adapted / "iter0"
    state = load_file(folder / "model" / "model.safetensors")
    start = load_file(THETA0 / "model.safetensors")
    assert {n: w.shape for n, w in state.items()} == {n: w.shape for n, w in start.items()}
    assert {w.dtype for w in state.values()} == {torch.float32}
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    moved = {n for n in start if not torch.equal(state[n], start[n])}
    assert moved == {n for n in start if n.split(".")[-2] in LAYERS}
    for name in ("model", "adapter"):
        listed = folder / f"{name}.sha256"
        assert {path.name for path in (folder / name).iterdir()} >= set(read_list(listed))
        assert len(read_list(listed)) >= 2 and unlike(folder / name, listed) is None
    assert {w.dtype for w in adapters(folder).values()} == {torch.float32}


def test_a_start_in_several_files_of_bf16_gives_several_files_of_fp32(played, tmp_path):
    plain = load(THETA0).to(torch.bfloat16)
    shutil.copytree(THETA0, tmp_path / "theta", ignore=shutil.ignore_patterns("*.safetensors"))
    plain.save_pretrained(tmp_path / "theta", max_shard_size="100KB")
    files = sorted(path.name for path in (tmp_path / "theta").glob("*.safetensors*"))
    assert len(files) > 3
    run = begun(played, tmp_path / "run")
    stage("train", run, "--iter", 0, *RANK, "--model", tmp_path / "theta")
    folder = run / "iter0"
    assert sorted(path.name for path in (folder / "model").glob("*.safetensors*")) == files
    base = PeftModel.from_pretrained(load(tmp_path / "theta"), folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "model").eval()  # in its config's dtype
    assert merged.dtype == torch.float32
    assert torch.allclose(logps(merged, run, 0), logps(base, run, 0), rtol=1e-5, atol=0)


def test_alpha_over_the_rank_and_named_layers_count(played, tmp_path):
    run = begun(played, tmp_path)
    flags = ["--lora-alpha", "32", "--lora-targets", "q_proj", "layers.1.mlp.up_proj"]
    stage("train", run, "--iter", 0, *RANK, *flags)
    names = {
        n.split(".lora_")[0].removeprefix("base_model.model.") for n in adapters(run / "iter0")
    }
    layers = range(load(THETA0).config.num_hidden_layers)
    queries = {f"model.layers.{k}.self_attn.q_proj" for k in layers}
    assert names == queries | {"model.layers.1.mlp.up_proj"}
    found = load_file(run / "iter0" / "model" / "model.safetensors")
    start = load_file(THETA0 / "model.safetensors")
    for name in names:
        a, b = (adapters(run / "iter0")[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        change = found[f"{name}.weight"] - start[f"{name}.weight"]
        assert torch.allclose(change, 32 / 4 * b @ a, atol=1e-6) and change.abs().max() > 1e-4


# ---- ranks, kills --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], pytest.param(["--offload"], marks=pytest.mark.long)])
def test_two_ranks_give_the_adapters_of_one(adapted, played, tmp_path, flags):
    run = begun(played, tmp_path)
    done = torchrun(2, "train.py", *MICRO, *RANK, "--run", run, "--iter", "0", *flags)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(adapted / "iter0"), metrics(run / "iter0"), strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
    one, two = adapters(adapted / "iter0"), adapters(run / "iter0")
    assert one.keys() == two.keys()
    off = math.sqrt(sum((one[n] - two[n]).square().sum() for n in one))
    # B began as zero: its length is how far it moved
    moved = math.sqrt(sum(one[n].square().sum() for n in one if "lora_B" in n))
    assert off < 1e-3 * moved


@pytest.mark.parametrize("moment", ["step 3", "export"])
def test_a_killed_iteration_ends_with_the_same_bytes_and_its_checkpoint_holds_adapters_alone(
    adapted, played, tmp_path, monkeypatch, moment
):
    run = begun(played, tmp_path)
    die_at(moment, monkeypatch)
    with pytest.raises(Killed):
        stage("train", run, "--iter", 0, *RANK)
    (checkpoint,) = (run / "iter0" / "checkpoint").iterdir()
    held = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {n for n in held if n.startswith("model.")}
    assert len(weights) == len(adapters(adapted / "iter0"))
    assert all(".lora_" in n for n in weights) and not any("square_avg" in n for n in weights)
    moments = {n for n in held if n.endswith("square_avg")}
    assert len(moments) == len(weights) and all(".lora_" in n for n in moments)
    monkeypatch.undo()
    (run / "iter0" / "adapter.part").mkdir(exist_ok=True)  # of a kill in the export
    stage("train", run, "--iter", 0, *RANK)
    for name in ("model.sha256", "adapter.sha256"):
        assert read_list(run / "iter0" / name) == read_list(adapted / "iter0" / name), name
    assert not list((run / "iter0").glob("*.part"))


def test_a_run_of_another_rank_is_refused_and_so_is_one_without_peft(adapted, refused, monkeypatch):
    for flags, word in (
        (["--lora-rank", "8", "--lr", "1e-3"], "lora_rank: 4 there, 8 asked"),
        ([*RANK, "--lora-alpha", "8"], "lora_alpha: 16.0 there, 8.0 asked"),
        (["--lr", "1e-3"], "lora_rank: 4 there, 0 asked"),
    ):
        assert word in refused(lambda f=flags: stage("train", adapted, "--iter", 1, *f))


def test_without_peft_one_line_says_how_to_install_it(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refused(lambda: stage("generate", tmp_path, "--iter", 0, *RANK))
    (version,) = re.findall(r"^peft==(.*)$", (REPO / "requirements-dev.txt").read_text(), re.M)
    assert line.endswith(f"pip install peft=={version}") and not list(tmp_path.iterdir())
    assert f"pip install peft=={version}" in (REPO / "requirements.txt").read_text()
    assert any(re.fullmatch("error: " + pattern, line) for pattern in LISTED)


@pytest.mark.parametrize("harm", ["another", "gone"])
def test_a_start_that_has_changed_during_training_is_not_merged(
    harm, played, tmp_path, monkeypatch, capsys
):
    shutil.copytree(THETA0, tmp_path / "theta")
    weights = tmp_path / "theta" / "model.safetensors"
    run = begun(played, tmp_path / "run")
    export = train.checkpoint.export

    def after_a_change(*args):
        if harm == "another":
            state = load_file(weights)
            save_file({n: w * 1.01 for n, w in state.items()}, weights, metadata={"format": "pt"})
        else:
            weights.unlink()
        export(*args)

    monkeypatch.setattr(train.checkpoint, "export", after_a_change)
    flags = ["--iter", 0, *RANK, "--model", tmp_path / "theta"]
    with pytest.raises(SystemExit) as stop:
        stage("train", run, *flags)
    (line,) = re.findall("^error: .*", capsys.readouterr().err, re.M)  # behind the progress bars
    assert stop.value.code == 2
    assert "have changed since training began: put back what was there" in line
    assert not (run / "iter0" / "model").exists() and (run / "iter0" / "checkpoint").exists()
    assert any(re.fullmatch("error: " + pattern, line) for pattern in LISTED)


# ---- families ------------------------------------------------------------------------------------

# what to say to adapt all that can be: of routers and gates with few outputs, of Mamba's layers
TARGETS = {
    "Qwen2-MoE": ("q_proj", "v_proj"),
    "Qwen2-MoE, full and window": ("q_proj", "v_proj"),
    "DeepSeek-V3": ("o_proj",),
    "Mamba": ("in_proj",),
    "Jamba": ("q_proj", "in_proj"),
    "Falcon-H1": ("q_proj", "up_proj"),
}


def in_place_and_written(name, folder, tmp_path):
    """Logits of a family's model with random adapters as trained, and its two folders."""
    targets = TARGETS.get(name, ())
    recipe = Recipe(model=str(folder), revision="", lora_rank=4, lora_targets=targets)
    ids = torch.arange(3, 23)[None]
    with process_group() as world, torch.no_grad():
        model, files = models.load_empty(str(folder), recipe, world)
        lora.add_adapters(model, str(folder), recipe, 0, world)
        train.shard(model, recipe, world)
        models.read_weights(model, files, recipe, world)
        for n, w in model.named_parameters():
            if "lora_B" in n:
                w.to_local().normal_(std=0.1)
        logits = model(ids).logits
        model.reshard()
        options = train.checkpoint.state_options(model, whole=True)
        weights = train.checkpoint.states.get_model_state_dict(model, options=options)
        weights = lora.adapters_in(model, weights)
        lora.write_merged(model, weights, tmp_path / "model")
        lora.write_adapters(model, weights, tmp_path / "adapter")
    return ids, logits


MANY = [pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Llama 4, chunks", *MANY])
def test_other_families_are_adapted_merged_and_read_by_peft(name, tmp_path):
    """GPT-2's weights lie transposed; Mixtral keeps its experts in one parameter; Llama 4's router
    is a linear layer that returns more than a product."""
    start = save(tiny(name), tmp_path / "theta")
    (tmp_path / "out").mkdir()
    ids, in_place = in_place_and_written(name, start, tmp_path / "out")
    with torch.no_grad():
        merged = load(tmp_path / "out" / "model")(ids).logits
        base = load(start)(ids).logits
        peft = PeftModel.from_pretrained(load(start), tmp_path / "out" / "adapter").eval()
        by_peft = peft(ids).logits
    scale = by_peft.abs().max()
    for logits in (in_place, merged):
        assert (logits - by_peft).abs().max() < 1e-5 * scale
    assert (base - by_peft).abs().max() > 1e-2 * scale  # control
