"""Ranks, devices, FSDP2, checkpoint and resume, export: all that differs between one process and many GPUs.

Every collective of the project is in this file, and a world of one process takes the same path as a world of 64.
`python STAGE.py` is a world of one; `torchrun --nproc_per_node N STAGE.py` is one of N, on GPUs (nccl) or CPU (gloo).
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from spin.files import LOGS, cannot, check_json, fail, weight_files, write_whole


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def join():
    """Join the process group for the length of a `with`; yields the World."""
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        fail(
            f"this node runs more ranks than it has GPUs ({torch.cuda.device_count()}): lower --nproc_per_node"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    store = None if "RANK" in os.environ else dist.HashStore()  # plain python: nobody to meet
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=2),
    )  # ranks may finish sampling that far apart
    try:
        yield World(rank, size, device)
    except (OSError, SafetensorError, CheckpointException) as problem:
        cannot(_cause(problem))
    except (
        RuntimeError
    ) as problem:  # gloo's, and of a type that says no more; nccl lets torchrun end the rank
        if "onnection closed by peer" not in str(problem):
            raise
        raise SystemExit(f"rank {rank}: another rank has left, see its message") from None
    finally:
        dist.destroy_process_group()


def _keep_freed_memory():
    """Ask glibc to keep large freed blocks: returned to the kernel, they come back as zeroed pages, a sixth of a step on a CPU."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _cause(problem):
    """The first rank's exception, where torch has gathered those of all ranks, tracebacks and all."""
    return (
        next(iter(problem.failures.values()))[0]
        if isinstance(problem, CheckpointException)
        else problem
    )


@contextlib.contextmanager
def preemption():
    """A list that is empty until SIGTERM comes: the machine will soon be taken away. Without this, SIGTERM ends the process."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all ranks, on all ranks; in place."""
    dist.all_reduce(x)
    return x


def on_all(flags: list[bool], world: World) -> torch.Tensor:
    """This rank's flags beside those of the others: (len(flags), ranks) of bool, the same on all ranks."""
    table = torch.zeros(len(flags), world.size)
    table[:, world.rank] = torch.tensor(flags)
    return all_sum(table).bool()


def barrier():
    """Wait until every rank is here."""
    all_sum(torch.zeros(1))


def queue(number: int):
    """0, 1, … number − 1, each to one rank, whichever asks first: an atomic counter in the process group's store."""
    store = dist.distributed_c10d._get_default_store()
    while (taken := store.add("queue", 1)) <= number:
        yield taken - 1


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, where auto is bf16 on CUDA and fp32 elsewhere."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(
        name, torch.bfloat16 if device.type == "cuda" else torch.float32
    )


def attention(recipe, world: World) -> str:
    """transformers' name of the attention: --attention, where auto is flash-attn where it can be used, else torch's SDPA."""
    from transformers.utils import is_flash_attn_2_available

    half = (
        compute_dtype(recipe.dtype, world.device) is torch.bfloat16
    )  # FlashAttention knows 16-bit numbers only
    best = (
        "flash_attention_2"
        if world.device.type == "cuda" and half and is_flash_attn_2_available()
        else "sdpa"
    )
    return best if recipe.attention == "auto" else recipe.attention


def load_model(name: str, recipe, world: World, dtype: torch.dtype):
    """A transformers model in dtype, whole, on the CPU. Ends with one line if it cannot be loaded, or not all of it.

    In eval mode, and it stays so: with dropout on, the policy before its first update would not be the opponent.
    """
    from transformers import AutoModelForCausalLM

    revision = (recipe.revision if name == recipe.model else "") or None
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention(recipe, world),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )  # a .bin is a pickle; mismatches: below
    except (
        Exception
    ) as problem:  # safetensors, json, OS and hub errors: each means there is no usable model
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")
    for kind in (
        "missing_keys",
        "mismatched_keys",
        "unexpected_keys",
    ):  # which transformers would only warn of
        if report[kind]:
            fail(
                f"the weights in {name} are not those of its config.json: {kind.replace('_', ' ')} {sorted(report[kind])[:3]}; "
                "copy or download it again"
            )
    return model.eval()


def load_frozen(name: str, recipe, world: World):
    """A model to sample from or to score with, whole on this rank's device, in the compute dtype."""
    model = load_model(name, recipe, world, compute_dtype(recipe.dtype, world.device)).to(
        world.device
    )
    if broken(model.parameters()):
        fail(
            f"the weights in {name} hold NaN or infinity: it can be neither sampled from nor evaluated, choose another model"
        )
    return model


def load_sharded(name: str, recipe, world: World):
    """A model to train, sharded, from safetensors: each rank reads its own share of each weight, and no rank holds it all.

    Where the names in the files are not the modules' (transformers renames or merges weights of some families), or files
    or weights lie there that it would not read, every rank lets transformers read the whole model into host memory first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        folder = (
            name
            if Path(name).is_dir()
            else snapshot_download(
                name,
                revision=(recipe.revision if name == recipe.model else "") or None,
                allow_patterns=["*.json", "model*.safetensors"],
            )
        )
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=False),
                dtype=torch.float32,
                attn_implementation=attention(recipe, world),
            ).eval()
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        stored = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception as problem:
        fail(f"cannot load the model {name}: {type(problem).__name__}: {str(problem)[:300]}")
    tied = _tied(model)
    shapes = {n: w.shape for n, w in model.state_dict().items() if n not in tied}
    if shapes != {n: w.size for n, w in stored.items()} or weight_files(Path(folder)) != sorted(
        Path(folder).glob("*.safetensors")
    ):
        return shard(load_model(name, recipe, world, torch.float32), recipe, world)
    model = shard(model, recipe, world)
    buffers = [
        (m, n, b.to(world.device))
        for m in model.modules()
        for n, b in m.named_buffers(recurse=False)
    ]
    model.to_empty(device="cpu" if recipe.offload else world.device)
    for module, n, buffer in buffers:
        setattr(module, n, buffer)
    dcp.load(
        {n: w for n, w in get_model_state_dict(model).items() if n in shapes},
        storage_reader=HuggingFaceStorageReader(folder),
    )
    return model


def _tied(model) -> set[str]:
    """Names that are second names of a weight, such as lm_head.weight where the embedding serves as the head."""
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }


@contextlib.contextmanager
def _parameters_on_meta():
    """Modules made inside have no memory for their parameters, but keep their buffers: those are computed, not stored."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if (
            parameter is not None and not parameter.is_meta
        ):  # tied ones come a second time, and must stay one object
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def shard(model, recipe, world: World):
    """FSDP2: fp32 master weights split over the ranks, gathered block by block in the compute dtype; fp32 gradients."""
    is_block = lambda m: type(m).__name__ in (model._no_split_modules or ())  # noqa: E731
    blocks = [m for m in model.modules() if is_block(m)]
    if not blocks:
        fail(
            f"{type(model).__name__} does not name its blocks (_no_split_modules): FSDP cannot shard it block by block"
        )
    if world.size % recipe.replicas:
        fail(f"--replicas {recipe.replicas} does not divide the number of ranks, {world.size}")
    if recipe.recompute:  # activation checkpointing, block by block
        apply_activation_checkpointing(model, check_fn=is_block)
        blocks = [m for m in model.modules() if isinstance(m, CheckpointWrapper)]
    mesh = init_device_mesh(
        world.device.type,
        (recipe.replicas, world.size // recipe.replicas),
        mesh_dim_names=("copy", "shard"),
    )
    how = dict(
        mesh=mesh if recipe.replicas > 1 else mesh["shard"],
        mp_policy=MixedPrecisionPolicy(
            compute_dtype(recipe.dtype, world.device), reduce_dtype=torch.float32
        ),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        if recipe.offload
        else OffloadPolicy(),
    )
    for block in blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def clip_gradients(model, largest: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all ranks is at most `largest`; returns the norm before. ()"""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest).full_tensor()


def broken(tensors) -> bool:
    """Whether NaN or infinity is in what this rank holds of some tensors (None: of no tensor)."""
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x is not None]
    mine = [
        x for x in mine if x.numel()
    ]  # of a weight with fewer rows than there are ranks, some hold nothing
    return not torch.nn.utils.get_total_norm(mine, math.inf).isfinite().item()


# ---- checkpoint, resume, export --------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, note: dict, model, optimizer, world: World):
    """folder/{step}: sharded weights, optimizer state, and note. It appears whole; then the older ones go."""
    part = folder / f"{step}.part"
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    if world.rank == 0:
        write_whole(part / "note.json", json.dumps(note))
        shutil.rmtree(folder / str(step), ignore_errors=True)
        part.rename(folder / str(step))
        for old in folder.iterdir():
            if old.name != str(step):
                shutil.rmtree(old)
    barrier()


def load_checkpoint(folder: Path, note: dict, model, optimizer) -> int:
    """Load the newest checkpoint in folder, if any; returns the number of steps taken. Any number of ranks will do.

    Ends with one line if the checkpoint was made for another note (other pairs, another start).
    The files are torch's own format (a pickled index): read none but your own run's.
    """
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    if not steps:
        return 0
    newest = folder / str(max(steps))
    if (
        check_json(newest / "note.json", again := f"delete {folder} to start this iteration anew")
        != note
    ):
        fail(f"{newest} belongs to other pairs or another starting model: {again}")
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=newest)
    except (OSError, ValueError, CheckpointException) as problem:
        fail(
            f"{newest} is damaged ({type(_cause(problem)).__name__}: {str(_cause(problem))[:200]}): {again}"
        )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return max(steps)


def export(model, tokenizer, folder: Path, world: World):
    """θ_{t+1} as a transformers folder, in fp32: bf16 would round away what an iteration changed. Appears whole.

    files.json beside it holds the sizes of all that the training leaves, by which check_files tells a damaged file later.
    """
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    tied = _tied(model)
    weights = {
        name: w for name, w in weights.items() if name not in tied
    }  # gathered, they no longer share storage
    if world.rank == 0:
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=weights)
        try:
            tokenizer.save_pretrained(part)
        except Exception as problem:  # Rust's OSError is none
            raise OSError(problem) from None
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # before the checkpoint goes
        logs = [path for name in LOGS if (path := folder.with_name(name)).exists()]
        sizes = {
            f"{folder.name}/{path.name}": path.stat().st_size for path in sorted(part.iterdir())
        }
        sizes |= {path.name: path.stat().st_size for path in logs}
        write_whole(folder.with_name("files.json"), json.dumps(sizes, indent=1) + "\n")
        part.rename(folder)
    barrier()
