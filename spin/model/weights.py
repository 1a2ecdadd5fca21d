"""θ_t in, θ_{t+1} out: folders of safetensors.

To sample or evaluate, every rank reads a model whole. To train, every rank builds it on the meta
device and shards it. Rank 0, which alone reads the files, sends the others their shards."""

import contextlib
import itertools
import math
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrap
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from spin.files import AGAIN, fail, weight_files
from spin.model import lora
from spin.run.ranks import World, barrier


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, where auto is bf16 on CUDA and fp32 elsewhere."""
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name, automatic)


@contextlib.contextmanager
def loading(name: str):
    """Inside the `with`, any error ends the stage with one line that names the model."""
    try:
        yield
    except Exception as problem:
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")


def attention_of(recipe) -> str | None:
    """transformers' name of the attention that samples; None: SDPA if the model has it, else eager.
    FlashAttention is for packed rows only: in decoding it would wait for the GPU in each layer."""
    return recipe.attention if recipe.attention in ("sdpa", "eager") else None


def load_whole(name: str, recipe, dtype: torch.dtype, fix: str = AGAIN):
    """A transformers model in dtype, whole, on the CPU. If not all of it can be loaded, a line that
    ends with `fix` refuses it.
    It is in eval mode: with dropout the untrained policy would not be the opponent."""
    with loading(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=recipe.revision_of(name),
            dtype=dtype,
            attn_implementation=attention_of(recipe),
            output_loading_info=True,
            use_safetensors=True,  # a .bin is a pickle
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below
        )
    # of all these transformers only warns. It does not tie weights that differ in the files
    meant = model.get_expanded_tied_weights_keys(all_submodels=True)
    report["tied_keys_that_differ"] = meant.keys() - model.all_tied_weights_keys.keys()
    report["adapters_beside_them"] = getattr(model, "peft_config", {})
    for kind, names in report.items():
        if names:
            found = f"{kind.replace('_', ' ')} {sorted(names)[:3]}"
            fail(f"the weights in {name} are not those of its config.json: {found}; {fix}")
    return model.eval()


def load_frozen(name: str, recipe, world: World):
    """A model to sample from or to score with, whole on this rank's device, compute dtype."""
    dtype = compute_dtype(recipe.dtype, world.device)
    model = load_whole(name, recipe, dtype).to(world.device)
    if has_nonfinite(model.parameters()):
        fail(f"the weights in {name} hold NaN or infinity: choose another model")
    return model


def load_empty(name: str, recipe):
    """A model to train, its weights on the meta device; read_weights fills it when sharded."""
    with loading(name):
        revision = recipe.revision_of(name)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        return without_weights(config, attention_of(recipe))


def without_weights(config, attention: str | None = None):
    """A model in eval mode and fp32 whose parameters have no memory; its buffers have."""

    def on_meta(module, name, parameter):
        # shared parameters come a second time, and must stay one object
        if not parameter.is_meta:
            return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    how = {"dtype": torch.float32, "attn_implementation": attention}
    with register_module_parameter_registration_hook(on_meta):
        return AutoModelForCausalLM.from_config(config, **how).eval()


def read_weights(model, name: str, recipe, world: World):
    """Fill a sharded model: rank 0 reads θ_t whole, and sends the ranks their shards."""
    # make_room comes first: torch would replace parameters on the meta device by new tensors. Tied
    # weights would no longer be tied, and a frozen base in bf16 would become fp32.
    make_room(model, recipe, world)
    weights = {}
    if world.rank == 0:
        whole = load_whole(name, recipe, torch.float32)
        model.generation_config = whole.generation_config
        read = whole.state_dict()
        # the adapters have their first values; an adapted layer has its own weight one level down
        names = [n for n in model.state_dict() if ".lora_" not in n]
        weights = {n: read[n.replace(".base_layer.", ".")] for n in names}
    how = {"full_state_dict": True, "broadcast_from_rank0": True}
    options = states.StateDictOptions(**how, strict=not lora.is_adapted(model))
    states.set_model_state_dict(model, weights, options=options)


def parts_not_kept(model, name: str, recipe) -> str | None:
    """In words: the parts of a checkpoint that its model lacks, such as the vision tower of a
    multimodal model. transformers silently drops those that a model family lists."""
    listed = "|".join(model._keys_to_ignore_on_load_unexpected or ())
    if not listed:
        return None
    there = {n for top in (model, model.base_model) for n, _ in top.named_modules()}
    folder = Path(cached_file(name, "config.json", revision=recipe.revision_of(name))).parent
    lost = Counter()
    for path in weight_files(folder):
        for key in filter(re.compile(listed).search, safe_open(path, "pt").keys()):
            # of the key's "a", "a.b", … the first that is no module; none for GPT-2's old masks
            levels = itertools.accumulate(key.split(".")[:-1], "{}.{}".format)
            lost.update([n for n in levels if n not in there][:1])
    if lost:
        named = ", ".join(f"{n} ({number} tensors)" for n, number in lost.most_common(5))
        return f"{name} has parts that its causal model drops; theta_1 will lack them too: {named}"
    return None


def make_room(model, recipe, world: World):
    """Give memory to the weights of a sharded model that is still on the meta device."""
    device = "cpu" if recipe.offload else world.device
    # like to_empty, but buffers and adapters, which are computed and not stored, stay
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)


def has_nonfinite(tensors) -> bool:
    """Whether any of the tensors has NaN or infinity in this rank's part of it; skips None."""
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x is not None]
    mine = [x for x in mine if x.numel()]  # of a weight with few rows, some ranks hold nothing
    return not torch.nn.utils.get_total_norm(mine, math.inf).isfinite().item()


def blocks_of(model, recompute: bool) -> list:
    """The blocks that FSDP gathers one by one; inside activation checkpointing if recompute."""
    names = model._no_split_modules or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    # some families name a part of their blocks too: the outermost are taken
    inner = {part for block in blocks for part in block.modules() if part is not block}
    blocks = [block for block in blocks if block not in inner]
    if not blocks:
        fail(f"{name_of(model)} does not name its blocks for FSDP, as _no_split_modules")
    if recompute:
        # without dropout there is no random state to keep, for which the host would wait
        wrapper = partial(wrap.checkpoint_wrapper, preserve_rng_state=False)
        wrap.apply_activation_checkpointing(model, wrapper, lambda module: module in blocks)
        blocks = [block for block in model.modules() if isinstance(block, wrap.CheckpointWrapper)]
    return blocks


def name_of(model) -> str:
    """The class of a model, without the prefix of FSDP's."""
    return type(model).__name__.removeprefix("FSDP")


def clip_gradients(model, largest: float) -> torch.Tensor:
    """Scale the gradients of all ranks to a norm of at most `largest`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest).full_tensor()


def state_options(model, whole: bool = False):
    """torch's options for reading and setting weights: all of them, or with adapters these alone.
    whole: gathered in rank 0's host memory."""
    adapted = lora.is_adapted(model)
    where = {"full_state_dict": whole, "cpu_offload": whole}
    return states.StateDictOptions(**where, ignore_frozen_params=adapted, strict=not adapted)


def export(model, tokenizer, folder: Path, theta_t: str, recipe, world: World):
    """Write θ_{t+1} as a folder, in fp32: bf16 would round away what an iteration changed. Adapters
    go to adapter/; then θ_t is read again, and written with the adapters merged into it."""
    weights = states.get_model_state_dict(model, options=state_options(model, whole=True))
    weights = lora.adapters_in(model, weights)
    # a second name of a weight is left out, such as lm_head.weight where the embedding is the head
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for second in every - {name for name, _ in model.named_parameters()}:
        weights.pop(second, None)
    if world.rank == 0:
        if lora.is_adapted(model):
            adapter = folder.with_name("adapter")
            with whole_folder(adapter) as part:
                lora.write_adapters(model, weights, part)
            model = lora.merged(load_whole(theta_t, recipe, torch.float32), adapter)
            weights = None  # so save_pretrained takes all weights of the merged model
        with whole_folder(folder) as part:
            model.save_pretrained(part, state_dict=weights)
            try:
                # several templates stay in one file: a name such as "tools/v2" is none of a file
                several = isinstance(tokenizer.chat_template, dict)
                tokenizer.save_pretrained(part, save_jinja_files=not several)
            except Exception as problem:  # Rust's errors are no OSError
                raise OSError(problem) from None
            model = weights = None  # frees the memory that the same weights need to be read back
            fix = "transformers cannot read what it saved; the last checkpoint is kept"
            load_whole(str(part), recipe, torch.float32, fix)
    barrier()


@contextlib.contextmanager
def whole_folder(folder: Path):
    """Yields a folder to write into, which gets its name when all its files are on disk."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    yield part
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
