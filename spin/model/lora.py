"""Adapters of low rank instead of full fine-tuning (LoRA, arXiv 2106.09685): --lora-rank R.

    W_{t+1} = W_t + (alpha / R) B A         W: (out, in), B: (out, R), A: (R, in)

W is frozen and in the compute dtype; A and B are fp32. At the start B = 0, so the policy is the
opponent. peft puts the adapters into the model, and merges them into θ_t at the end, in fp32:
rounded to bf16, W would lose the steps of earlier iterations."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spin.files import fail

OTHERS = "name other layers with --lora-targets"


def inject_adapters(model, name: str, recipe) -> list[str]:
    """Let peft add adapters to a model on the meta device; returns the names of their layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        fail("--lora-rank needs the package peft: pip install peft==0.21.2")
    layers = layers_to_adapt(model, recipe.lora_targets)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=layers,
        base_model_name_or_path=name,
        revision=recipe.revision_of(name),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # on meta
        # for some families peft replaces names such as gate_proj by their experts' parameters
        if more := getattr(config, "target_parameters", None):
            raise ValueError(f"it would adapt {sorted(more)} too")
    except ValueError as problem:
        fail(f"peft cannot adapt {name} ({str(problem)[:300]}): {OTHERS}")
    return layers


def layers_to_adapt(model, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers except the head, or of those whose names end with a target. In a
    multimodal model only the text model's layers count: nothing else is in the loss."""
    inside = {*model.get_decoder().modules()} - {model.get_output_embeddings()}
    parts = [(n, part) for n, part in model.named_modules() if part in inside]
    # by name: other classes that inherit from Linear route or split too
    known = ("Linear", "Conv1D", "FalconLinear")
    linear = [n for n, part in parts if type(part).__name__ in known]
    layers = [] if targets else linear
    for target in targets:
        found = [n for n in linear if f".{n}".endswith(f".{target}")]
        if not found:
            there = sorted({n.rpartition(".")[2] for n in linear})
            fail(f"--lora-targets {target!r} is no linear layer of the model; there are: {there}")
        layers += found
    times = Counter(w for _, w in model.named_parameters(remove_duplicate=False))
    for n in layers:
        if times[model.get_submodule(n).weight] > 1:
            fail(f"{n} shares its weight with another layer, so peft would merge twice: {OTHERS}")
    return layers


def add_adapters(model, name: str, recipe, t: int, dtype: torch.dtype):
    """Freeze a model on the meta device, in dtype, and add the adapters of iteration t: B zero,
    A random. Each layer has a generator of its own, so any number of ranks draws the same."""
    layers = inject_adapters(model, name, recipe)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    for layer in layers:
        adapted = model.get_submodule(layer)
        first, second = adapted.lora_A["default"], adapted.lora_B["default"]
        rng = np.random.default_rng((recipe.seed, t, *layer.encode()))
        limit = first.in_features**-0.5  # as peft has it
        drawn = rng.uniform(-limit, limit, first.weight.shape)
        first.weight = torch.nn.Parameter(torch.from_numpy(drawn).float())
        second.weight = torch.nn.Parameter(torch.zeros(second.weight.shape))


def is_adapted(model) -> bool:
    """Whether adapters are trained, and nothing else."""
    return hasattr(model, "peft_config")


def adapters_in(model, weights: dict) -> dict:
    """A model's weights that are trained: the adapters alone, or all if there are none."""
    return {n: w for n, w in weights.items() if ".lora_" in n} if is_adapted(model) else weights


def write_adapters(model, adapters: dict, folder: Path):
    """The adapters alone, as peft.PeftModel.from_pretrained reads them on θ_t."""
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set has no order
    config.save_pretrained(folder)
    named = {f"base_model.model.{n.replace('.default', '')}": w for n, w in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged(theta_t, folder: Path):
    """θ_t, whole and in fp32, with the adapters of a folder merged into it."""
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"):  # peft asks transformers for deprecated names
        return PeftModel.from_pretrained(theta_t, folder).merge_and_unload()
