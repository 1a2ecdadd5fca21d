"""θ_t from its safetensors: whole, to sample from; or empty, and then read into the shards.
The master weights of training are fp32; matrix products are in the compute dtype."""

import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrap
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from spin.distributed import World
from spin.files import AGAIN, fail, weight_files


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, where auto is bf16 on CUDA and fp32 elsewhere."""
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name, automatic)


def attention_name(recipe, world: World, config) -> str | None:
    """transformers' name of the attention that samples; None: SDPA where the model has it, else
    eager. FlashAttention serves packed rows only (spin/attention.py): in transformers' decoding it
    would unpad in every layer, and wait for the GPU each time. Refuses what a model lacks."""
    refuse_missing_attention(config, recipe.attention)
    if recipe.attention in ("sdpa", "eager"):
        return recipe.attention
    half = compute_dtype(recipe.dtype, world.device) is torch.bfloat16
    usable = world.device.type == "cuda" and half and is_flash_attn_2_available()
    if recipe.attention == "flash_attention_2" and not usable:
        needs = "a CUDA GPU, bf16 and the package flash-attn"
        fail(f"--attention flash_attention_2 needs {needs}: use --attention auto")
    return None


def refuse_missing_attention(config, attention: str):
    """Refuse an --attention that a model's family does not have."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # some attention has parts that the package flash-attn lacks
    has_flash = family._supports_flash_attn and not family._compatible_flash_implementations
    lacks = {"sdpa": not family._supports_sdpa, "flash_attention_2": not has_flash}
    if lacks.get(attention):
        fail(f"{family.__name__} cannot use --attention {attention}: use --attention auto")


def load_whole(name: str, recipe, world: World, dtype: torch.dtype):
    """A transformers model in dtype, whole, on the CPU; refused if not all of it can be loaded.
    It stays in eval mode: with dropout the untrained policy would not be the opponent."""
    revision = recipe.revision_of(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention_name(recipe, world, config),
            output_loading_info=True,
            use_safetensors=True,  # a .bin is a pickle
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below
        )
    except Exception as problem:  # safetensors, json, OS and hub errors: each: no usable model
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):  # transformers only warns
        if report[kind]:
            found = f"{kind.replace('_', ' ')} {sorted(report[kind])[:3]}"
            fail(f"the weights in {name} are not those of its config.json: {found}; {AGAIN}")
    return model.eval()


def load_frozen(name: str, recipe, world: World):
    """A model to sample from or to score with, whole on this rank's device, compute dtype."""
    dtype = compute_dtype(recipe.dtype, world.device)
    model = load_whole(name, recipe, world, dtype).to(world.device)
    if has_nonfinite(model.parameters()):
        mend = "it can be neither sampled from nor evaluated, choose another model"
        fail(f"the weights in {name} hold NaN or infinity: {mend}")
    return model


def local_folder(name: str, revision: str | None) -> str:
    """The folder of a model's config and weights; those of a hub model are downloaded."""
    if Path(name).is_dir():
        return name
    files = ["*.json", "model*.safetensors"]
    try:
        return snapshot_download(name, revision=revision, allow_patterns=files)
    except Exception as problem:
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")


def stored_shapes(folder: str) -> dict:
    """{name: shape} of the weights in a model's files."""
    try:
        stored = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception as problem:
        fail(f"cannot load the model {folder}: {type(problem).__name__}: {str(problem)[:300]}")
    return {name: weight.size for name, weight in stored.items()}


def load_empty(name: str, recipe, world: World):
    """A model to train, without memory for its weights, and the folder for read_weights.
    Where the names in the files are not the modules' (transformers renames or merges weights of
    some families), or files or weights lie there that it would not read, every rank lets
    transformers read the whole model into host memory first."""
    folder = local_folder(name, recipe.revision_of(name))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = without_weights(config, attention_name(recipe, world, config))
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        stored = stored_shapes(folder)
    except Exception as problem:
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")
    second = second_names(model)
    shapes = {n: w.shape for n, w in model.state_dict().items() if n not in second}
    if shapes != stored or weight_files(Path(folder)) != sorted(Path(folder).glob("*.safetensors")):
        return load_whole(name, recipe, world, torch.float32), folder
    return model, folder


def refuse_moving_angles(config, longest: int):
    """Refuse lengths from which on a model computes all its rotary angles anew: by the longest
    sequence of a pass, so that the others' log-probabilities would depend on their neighbours."""
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each kind of layer
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        limit = config.max_position_embeddings if kind == "dynamic" else longest
        if kind == "longrope":
            limit = rope["original_max_position_embeddings"]
        if longest > limit:
            beyond = f"beyond {limit} positions this model's rotary angles ({kind}) change"
            fail(
                f"--max-length {longest}: {beyond} for all sequences of a pass; lower it to {limit}"
            )


def name_of(model) -> str:
    """The class of a model, without the prefix of FSDP's."""
    return type(model).__name__.removeprefix("FSDP")


def without_weights(config, attention: str | None):
    """A model in eval mode and fp32, its parameters without memory."""
    how = {"dtype": torch.float32, "attn_implementation": attention}
    with register_module_parameter_registration_hook(_on_meta):
        return AutoModelForCausalLM.from_config(config, **how).eval()


def read_weights(model, folder: str, recipe, world: World):
    """Fill a sharded model: each rank reads its own part of each weight, and none holds all."""
    if not any(w.is_meta for w in model.parameters()):
        return  # it was loaded whole
    make_room(model, recipe, world)
    second = second_names(model)
    weights = {n: w for n, w in get_model_state_dict(model).items() if n not in second}
    # a layer with adapters (spin/lora.py) has its own weight one level down
    weights = {n.replace(".base_layer.", "."): w for n, w in weights.items() if ".lora_" not in n}
    dcp.load(weights, storage_reader=HuggingFaceStorageReader(folder))


def make_room(model, recipe, world: World):
    """Memory for the weights of a sharded model that was made without; nothing is read into it."""
    device = "cpu" if recipe.offload else world.device
    # as to_empty, but buffers and adapters, which are computed and not stored, stay
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)


def blocks_of(model, recompute: bool) -> list:
    """The blocks that FSDP gathers one by one; inside activation checkpointing if recompute."""
    names = model._no_split_modules or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    # some families name a part of their blocks too: the outermost are taken
    inner = {part for block in blocks for part in block.modules() if part is not block}
    blocks = [block for block in blocks if block not in inner]
    if not blocks:
        unnamed = f"{name_of(model)} does not name its blocks (_no_split_modules)"
        fail(f"{unnamed}: FSDP cannot shard it block by block")
    if recompute:
        # without dropout there is no random state to keep, for which the host would wait
        wrapper = partial(wrap.checkpoint_wrapper, preserve_rng_state=False)
        wrap.apply_activation_checkpointing(model, wrapper, lambda module: module in blocks)
        blocks = [block for block in model.modules() if isinstance(block, wrap.CheckpointWrapper)]
    return blocks


def clip_gradients(model, largest: float) -> torch.Tensor:
    """Scale the gradients to a norm of at most `largest` over all ranks; returns it before, ()."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest).full_tensor()


def second_names(model) -> set[str]:
    """Second names of a weight, such as lm_head.weight where the embedding serves as the head."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _on_meta(module, name, parameter):
    """Modules made under this hook have no memory for their parameters, but keep their buffers."""
    # shared ones come a second time, and must stay one object
    if not parameter.is_meta:
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def has_nonfinite(tensors) -> bool:
    """Whether NaN or infinity is in what this rank holds of some tensors (None: of no tensor)."""
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x is not None]
    mine = [x for x in mine if x.numel()]  # of a weight with few rows, some ranks hold nothing
    return not torch.nn.utils.get_total_norm(mine, math.inf).isfinite().item()
