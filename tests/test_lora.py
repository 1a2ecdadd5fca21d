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
from conftest import REPO, THETA0, load, stage
from families import MULTIMODAL, quick_and_long, save, tiny, tiny_multimodal
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bad_input import LISTED
from test_train import Killed, die_at, fresh, metrics, recipe_and_pairs
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoTokenizer

import train
from loss import sequence_logps
from spin.data.pairs import batches
from spin.model import lora
from spin.model import weights as models
from spin.model.packing import pack
from spin.recipe import Recipe
from spin.run.ranks import process_group

RANK = ["--lora-rank", "4", "--lr", "1e-3"]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def first_values(name, t, wide):
    """A of a layer as the documentation says it is drawn, (4, wide)."""
    rng = np.random.default_rng((0, t, *name.encode()))
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


@pytest.mark.parametrize("t", [0, 1])
def test_the_merged_model_is_the_start_with_its_adapters_by_peft(adapted, t):
    folder = adapted / f"iter{t}"
    assert not any("adapter" in path.name for path in (folder / "model").iterdir())
    assert {w.dtype for w in adapters(folder).values()} == {torch.float32}
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


BF16 = ["--dtype", "bf16", "--lora-alpha", "32", "--lora-targets", "q_proj", "layers.1.mlp.up_proj"]


@pytest.mark.parametrize("flags, alpha, ends", [([], 16, LAYERS), (BF16, 32, (BF16[-2], BF16[-1]))])
def test_two_iterations_are_w_plus_all_ba_in_fp32(flags, alpha, ends, adapted, played, tmp_path):
    """With a base in bf16 too: merging that base would round the first iteration's steps away."""
    run = adapted
    if flags:
        run = begun(played, tmp_path, (0, 1))
        for t in (0, 1):
            stage("train", run, "--iter", t, *RANK, *flags)
    start = load_file(THETA0 / "model.safetensors")
    end = load_file(run / "iter1" / "model" / "model.safetensors")
    assert end.keys() == start.keys() and {w.dtype for w in end.values()} == {torch.float32}
    for name, w in start.items():
        layer = name.removesuffix(".weight")
        moved = layer.endswith(ends)
        change = torch.zeros_like(w)
        for t in (0, 1):
            found = adapters(run / f"iter{t}")
            keys = [f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"]
            assert all((key in found) == moved for key in keys)
            if moved:
                first, second = (found[key] for key in keys)
                change += alpha / 4 * second @ first
        assert (end[name] - w - change).abs().max() < 1e-6, name
        assert (change.abs().max() > 1e-4) == moved
        # control: θ_0 rounded to bf16
        assert not moved or (end[name] - w.bfloat16() - change).abs().max() > 1e-5


# ---- kills; on two ranks: test_weights.py --------------------------------------------------------


@pytest.mark.parametrize("moment", ["step 3", "export 1"])
def test_a_killed_iteration_ends_in_the_same_bytes(adapted, played, tmp_path, monkeypatch, moment):
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
    for file in (adapted / "iter0").glob("[am]*/*"):
        assert file.read_bytes() == (run / "iter0" / file.parent.name / file.name).read_bytes()
    assert not list((run / "iter0").glob("*.part"))


def test_without_peft_one_line_says_how_to_install_it(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refused(lambda: stage("generate", tmp_path, "--iter", 0, *RANK))
    (version,) = re.findall(r"^peft==(.*)$", (REPO / "requirements-dev.txt").read_text(), re.M)
    assert line.endswith(f"pip install peft=={version}") and not list(tmp_path.iterdir())
    assert f"pip install peft=={version}" in (REPO / "requirements.txt").read_text()
    assert any(re.fullmatch("error: " + pattern, line) for pattern in LISTED)


def test_a_start_that_changed_during_training_is_not_merged(played, tmp_path, monkeypatch, capsys):
    theta = shutil.copytree(THETA0, tmp_path / "theta")
    run = begun(played, tmp_path / "run")
    train_steps = train.train

    def and_change(*args):
        train_steps(*args)
        state = load_file(theta / "model.safetensors")
        other = {n: w * 1.01 for n, w in state.items()}
        save_file(other, theta / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(train, "train", and_change)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0, *RANK, "--model", theta)
    (line,) = re.findall("^error: .*", capsys.readouterr().err, re.M)  # behind the progress bars
    assert stop.value.code == 2 and "was made from another model than" in line
    assert not (run / "iter0" / "model").exists() and (run / "iter0" / "checkpoint").exists()


# ---- families ------------------------------------------------------------------------------------

# what to say where peft cannot adapt all linear layers; Jamba's dt_proj is never called, only its
# weight is used: there the random adapters of this test would have no effect before they are merged
TARGETS = {
    "DeepSeek-V3": ("o_proj",),
    "Mamba": ("in_proj",),
    "Jamba": ("q_proj", "in_proj"),
    "Falcon-H1": ("q_proj", "up_proj"),
}


def in_place_and_written(name, folder, out):
    """Logits of a family's model with random adapters as trained; its two folders in out."""
    targets = TARGETS.get(name, ())
    recipe = Recipe(model=str(folder), revision="", lora_rank=4, lora_targets=targets)
    ids = torch.arange(3, 23)[None]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with process_group() as world, torch.no_grad():
        model = models.load_empty(str(folder), recipe)
        lora.add_adapters(model, str(folder), recipe, 0, torch.float32)
        train.shard(model, recipe, world)
        models.read_weights(model, str(folder), recipe, world)
        for n, w in model.named_parameters():
            if "lora_B" in n:
                w.to_local().normal_(std=0.1)
        logits = model(ids).logits
        model.reshard()
        models.export(model, tokenizer, out / "model", str(folder), recipe, world)
    return ids, logits


def test_a_weight_of_two_layers_gets_no_adapters(refused):
    """peft would merge both adapters into it."""
    model = tiny("Llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    line = refused(lambda: lora.inject_adapters(model, "a model", Recipe(lora_rank=4)))
    assert "model.layers.0.mlp.up_proj shares its weight with another layer" in line
    others = Recipe(lora_rank=4, lora_targets=("q_proj",))
    assert len(lora.inject_adapters(model, "a model", others)) == 2  # control


# GPT-2's weights are transposed; Mixtral keeps its experts in one parameter; Llama 4's router is a
# linear layer that returns more than a product
@pytest.mark.parametrize("name", ["base", *quick_and_long("GPT-2", "Mixtral", "Llama 4, chunks")])
def test_other_families_are_adapted_merged_and_read_by_peft(name, tmp_path):
    """ "base": a base model saved alone, so that the files name the weights otherwise."""
    whole = tiny("Llama", tie_word_embeddings=True).model if name == "base" else tiny(name)
    start = save(whole, tmp_path / "theta")
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


@pytest.mark.parametrize("name", quick_and_long("Qwen3.5", "Gemma 3", of=MULTIMODAL))
def test_of_a_multimodal_model_the_text_model_alone_is_adapted(name, tmp_path):
    theta_0 = save(tiny_multimodal(name), tmp_path / "theta")
    run = tmp_path / "run"
    for part in ("generate", "train"):
        stage(part, run, "--iter", 0, "--model", theta_0, *RANK, "--max-new-tokens", 8)
    adapters = load_file(run / "iter0" / "adapter" / "adapter_model.safetensors")
    assert adapters and all(w.any() for w in adapters.values())  # each was trained
    before, after = (load_file(f / "model.safetensors") for f in (theta_0, run / "iter0" / "model"))
    moved = {n for n, w in after.items() if not torch.equal(w, before[n].float())}
    assert len(moved) == len(adapters) / 2
    assert not [n for n in moved if "language_model" not in n]
    assert [n for n in before if "language_model" not in n and n.endswith("proj.weight")]  # control


def test_an_adapter_that_transformers_would_take_beside_weights_is_refused(tmp_path, refused):
    """In a folder before anything is read; from a hub, when it is loaded."""
    theta_0 = shutil.copytree(THETA0, tmp_path / "theta")
    models.load_whole(str(theta_0), Recipe(), torch.float32)  # the control
    get_peft_model(load(theta_0), LoraConfig(target_modules=["q_proj"])).save_pretrained(theta_0)
    line = refused(lambda: stage("generate", tmp_path, "--iter", 0, "--model", theta_0))
    assert f"{theta_0} holds an adapter" in line
    line = refused(lambda: models.load_whole(str(theta_0), Recipe(), torch.float32))
    assert "adapters beside them ['default']" in line
