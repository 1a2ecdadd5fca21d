"""Adapters of low rank (LoRA, arXiv 2106.09685) in the place of full fine-tuning: --lora-rank R.

    W_{t+1} = W_t + (alpha / R) B A         W: (out, in), B: (out, R), A: (R, in)

W is frozen and in the compute dtype; A and B are fp32, and so are their gradients and moments.
At the start B = 0, so the policy is the opponent. What comes out is a model as any other, θ_t with
its adapters merged. The adapters alone lie beside it, in peft's format."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from spin.files import AGAIN, fail, read_json, weight_files, write_json
from spin.models import blocks_of, compute_dtype, local_folder, stored_shapes

OTHERS = "name other layers with --lora-targets"
# matrix products and no more: other classes that inherit from Linear route or split too
LINEAR = ("Linear", "Conv1D", "FalconLinear")


def add_adapters(model, name: str, recipe, t: int, world=None):
    """With --lora-rank: freeze θ_t, not sharded yet, and give it adapters. Without world: only
    refuse what train.py would refuse, before hours of sampling."""
    if not recipe.lora_rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        fail("--lora-rank needs the package peft: pip install peft==0.21.2")
    theta_t = Path(local_folder(name, recipe.revision_of(name)))
    layers = layers_to_adapt(model, theta_t, name, recipe)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=layers,
        fan_in_fan_out=all(isinstance(model.get_submodule(n), Conv1D) for n in layers),
        base_model_name_or_path=name,
        revision=recipe.revision_of(name),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # what it refuses is told in one line
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # see draw
        # for some families peft replaces names such as gate_proj by its experts' parameters
        if more := getattr(config, "target_parameters", None):
            raise ValueError(f"it would adapt {sorted(more)} too")
    except ValueError as problem:
        fail(f"peft cannot adapt {name} ({str(problem)[:300]}): {OTHERS}")
    if world is None:
        return
    for weight in model.parameters():
        weight.data = weight.data.to(compute_dtype(recipe.dtype, world.device))
    for layer in layers:
        draw(model.get_submodule(layer), (recipe.seed, t, *layer.encode()))
    model.theta_t = theta_t, files_of(theta_t)
    if world.rank == 0:
        tell(model)


def layers_to_adapt(model, theta_t: Path, name: str, recipe) -> list[str]:
    """Names of the blocks' linear layers, or of those in --lora-targets; refuses what cannot be."""
    inside = {part for block in blocks_of(model, recompute=False) for part in block.modules()}
    named = [(n, type(part).__name__) for n, part in model.named_modules() if part in inside]
    linear = [n for n, kind in named if kind in LINEAR]
    for target in recipe.lora_targets:
        if not any(f".{n}".endswith(f".{target}") for n in linear):
            there = ", ".join(sorted({n.rpartition(".")[2] for n in linear}))
            fail(f"--lora-targets {target!r} is no linear layer of the blocks, which are: {there}")
    ends = tuple(f".{target}" for target in recipe.lora_targets) or ("",)  # every name ends so
    layers = [n for n in linear if f".{n}".endswith(ends)]
    stored = stored_shapes(str(theta_t))
    if not stored:
        fail(f"cannot load the model {name}: there are no safetensors files")
    times = Counter(w for _, w in model.named_parameters(remove_duplicate=False))
    for n in layers:
        weight = model.get_submodule(n).weight
        if min(weight.shape) < recipe.lora_rank:
            smaller = f"more than {min(weight.shape)}, the smaller side of {n}"
            fail(f"--lora-rank {recipe.lora_rank} is {smaller}: lower it, or {OTHERS}")
        if stored.get(f"{n}.weight") != weight.shape or times[weight] > 1:
            lost = f"the files of {name} do not hold {n} alone under this name"
            fail(f"{lost}: save the model anew with transformers, or {OTHERS}")
    return layers


def draw(layer, key: tuple[int, ...]):
    """An adapter's first values, fp32 and whole: A at random, by a generator of its own, so that
    they are the same on any number of ranks; B zero."""
    first, second = layer.lora_A["default"], layer.lora_B["default"]
    limit = first.in_features**-0.5  # as peft has it
    drawn = np.random.default_rng(key).uniform(-limit, limit, first.weight.shape)
    first.weight = torch.nn.Parameter(torch.from_numpy(drawn).float())
    second.weight = torch.nn.Parameter(torch.zeros(second.weight.shape))


def tell(model):
    """Print what is trained, and the matrices that are not, such as experts in one parameter."""
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    frozen = [w for w in model.parameters() if not w.requires_grad]
    print(f"adapters of {trained:,} weights, on {sum(map(torch.numel, frozen)):,} frozen ones")
    matrices = [n for n, w in model.named_parameters() if w.dim() > 1 and not w.requires_grad]
    others = [n.removesuffix(".weight").split(".") for n in matrices if ".base_layer." not in n]
    print("without adapters:", ", ".join(sorted({".".join(n[-2:]) for n in others})))


def files_of(folder: Path) -> dict:
    """{file: (bytes, time of its last change)} of a model's weights."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)}


def is_adapted(model) -> bool:
    """Whether adapters are trained, and nothing else."""
    return hasattr(model, "peft_config")


def adapters_in(model, weights: dict) -> dict:
    """The adapters among a model's weights, without what torch leaves beside them (buffers, a
    frozen weight's second name); all weights where there are no adapters."""
    return {n: w for n, w in weights.items() if ".lora_" in n} if is_adapted(model) else weights


def write_merged(model, adapters: dict, folder: Path):
    """θ_{t+1}: config, and each of θ_t's files again, in fp32 with adapters merged; one file is in
    memory at a time. adapters: the trained weights, whole. Refuses files that have changed."""
    theta_t, files = model.theta_t
    if files_of(theta_t) != files:
        changed = f"the weights in {theta_t} have changed since training began"
        fail(f"{changed}: put back what was there, and run the same command again")
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for path in weight_files(theta_t):
        merged = {}
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                merged[name] = merge(model, name, file.get_tensor(name), adapters)
        save_file(merged, folder / path.name, metadata={"format": "pt"})
    index = "model.safetensors.index.json"
    if (theta_t / index).exists():
        shards = read_json(theta_t / index, AGAIN)["weight_map"]
        write_json(folder / index, {"metadata": {}, "weight_map": shards})


def merge(model, name: str, weight, adapters: dict):
    """A weight of θ_t in fp32, with its adapters in it if it has some."""
    weight = weight.float() if weight.is_floating_point() else weight
    layer_name = name.removesuffix(".weight")
    first, second = (adapters.get(f"{layer_name}.lora_{x}.default.weight") for x in "AB")
    if first is None:
        return weight
    layer = model.get_submodule(layer_name)
    change = layer.scaling["default"] * (second @ first)  # (out, in)
    return weight + (change.T if layer.fan_in_fan_out else change)


def write_adapters(model, adapters: dict, folder: Path):
    """The adapters alone, as peft.PeftModel.from_pretrained reads them on θ_t."""
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set has no order
    config.save_pretrained(folder)
    named = {f"base_model.model.{n.replace('.default', '')}": w for n, w in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
