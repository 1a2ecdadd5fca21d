"""Ranks: the process group, sums over ranks, chunks of work, SIGTERM.
A world of one process takes the same path as a world of 64. `python STAGE.py` is a world of one;
`torchrun --nproc_per_node N STAGE.py` is one of N, on GPUs (nccl) or on the CPU (gloo)."""

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from spin.files import fail, fail_for_io

# what gloo says where another rank is gone
LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class World:
    """This process among its peers: its rank, how many there are, the device it computes on."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def process_group():
    """Join the other ranks for the length of a `with`; yields the World.
    Ends with one line where a file cannot be read or written, or another rank has left."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=None if "RANK" in os.environ else dist.HashStore(),  # plain python: nobody to meet
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=2),  # ranks may finish sampling that far apart
    )
    try:
        yield World(rank, size, device)
    except (OSError, SafetensorError, CheckpointException) as problem:
        fail_for_io(first_cause(problem))
    except RuntimeError as problem:  # gloo's, whose type says no more; nccl lets torchrun end us
        if not any(words in str(problem) for words in LOST):
            raise
        # if it was of this node, torchrun ends this one before; else one a node speaks
        time.sleep(10 if os.environ.get("LOCAL_RANK") == "0" else 30)
        raise SystemExit(f"rank {rank}: another rank has left, see its message") from None
    finally:
        dist.destroy_process_group()


def device_of_rank(local_rank: int) -> torch.device:
    """A rank's GPU, made ready, or the CPU; refuses more ranks than GPUs."""
    if not torch.cuda.is_available():
        # glibc should keep large freed blocks: returned to the kernel, they come back as zeroed
        # pages, which costs a sixth of a step on a CPU
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        fail(f"this node runs more ranks than it has GPUs ({gpus}): lower --nproc_per_node")
    prepare_cuda()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def prepare_cuda():
    """Settings by which a GPU would lose time or memory otherwise, and no result changes. From
    reading torch's sources: not run."""
    # batches differ in width: without it, freed memory lies in pieces that fit none of them
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention would make a plan for every new width
    torch.backends.cuda.enable_cudnn_sdp(False)
    # torchrun gives each rank one CPU thread; with --offload the optimizer works there
    if os.environ.get("OMP_NUM_THREADS") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def first_cause(problem: Exception) -> Exception:
    """The first rank's exception, where torch has gathered those of all, tracebacks and all."""
    gathered = isinstance(problem, CheckpointException)
    return next(iter(problem.failures.values()))[0] if gathered else problem


@contextlib.contextmanager
def catch_sigterm():
    """Yields a list; SIGTERM (the machine will soon be taken away) fills it instead of killing."""
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, before)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all ranks, on all ranks; in place."""
    dist.all_reduce(x)
    return x


def flags_of_all_ranks(flags: list[bool], world: World) -> torch.Tensor:
    """This rank's flags beside those of the others: (len(flags), ranks) of bool, on all ranks."""
    table = torch.zeros(len(flags), world.size)
    table[:, world.rank] = torch.tensor(flags)
    return sum_over_ranks(table).bool()


def gather(value, world: World) -> list:
    """Every rank's value, by rank, on all ranks; any Python object."""
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def device_mesh(replicas: int, world: World):
    """The mesh that FSDP shards over: all ranks, or `replicas` groups that each hold a copy."""
    if world.size % replicas:
        fail(f"--replicas {replicas} does not divide the number of ranks, {world.size}")
    shape = (replicas, world.size // replicas)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("copy", "shard"))
    return mesh if replicas > 1 else mesh["shard"]


def barrier():
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1))


def next_chunk(number: int):
    """0, 1, … number − 1, each to one rank, whichever asks first: by an atomic counter."""
    store = dist.distributed_c10d._get_default_store()
    while (taken := store.add("chunks", 1)) <= number:
        yield taken - 1
