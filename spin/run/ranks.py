"""Ranks: the process group, sums over ranks, chunks of work, SIGTERM.
A world of one process takes the same path as a world of 64. `python STAGE.py` is a world of one;
`torchrun --nproc_per_node N STAGE.py` is one of N, on GPUs (nccl) or on the CPU (gloo)."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import which

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from spin.files import fail, fail_for_io

# gloo's words when another rank has left; "connection" is written with C or c
LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class World:
    """This process among its peers: its rank, how many there are, the device it computes on."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def run_lock(run: Path | None):
    """Hold RUN/lock for the length of a `with`, so that one stage at a time writes there; rank 0
    holds it for all. run: None if there is none. Refused if another process holds it. The system
    frees the lock of a process that has ended, so a file that a kill has left blocks nobody."""
    if run is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    folders = [run, *run.parents]
    there = next(folder for folder in folders if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"--run {run}: {there} is no directory that can be written to")
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # its holder has just removed it
                raise BlockingIOError
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            fail(f"{run} is in use by {holder}: wait until that has ended, or choose another --run")
        except OSError as problem:  # a file system without locks
            lack = f"{run} cannot be locked ({problem.strerror}): start nothing else in it"
            print(f"warning: {lack}", file=sys.stderr)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        try:
            yield
        finally:
            (run / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a stage that was refused leaves no empty folder
                for folder in folders[: folders.index(there)]:
                    folder.rmdir()


@contextlib.contextmanager
def process_group(run: Path | None = None, gpus: int = 1):
    """Join the other ranks for the length of a `with`, and hold a run's lock; yields the World.
    gpus: the number per rank; the first is its device. Ends with one line if the ranks cannot join,
    one has left, a GPU's memory is too small, or a file cannot be read or written."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", 0)), gpus)
    join(rank, size, device)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"devices: {size} × {name}")
    clean = size == 1
    try:
        with run_lock(run):
            barrier()  # where the lock is refused, all ranks end here
            yield World(rank, size, device)
        clean = True
    except (OSError, SafetensorError, CheckpointException) as problem:
        fail_for_io(first_cause(problem))
    except RuntimeError as problem:
        # where NVML lists no processes (MIG, WSL), torch fails while it reports that memory is full
        if isinstance(problem, torch.OutOfMemoryError) or "NVML_SUCCESS == r" in str(problem):
            lower = "lower --micro-tokens, or --slots where answers are sampled, or use more GPUs"
            fail(f"the memory of {device} is too small ({str(problem)[:150]} …): {lower}")
        # gloo reports a lost rank as a plain RuntimeError; with nccl, torchrun ends this process
        if not any(words in str(problem) for words in LOST):
            raise
        # a rank lost on this node: torchrun ends us first; on another: one rank per node reports it
        time.sleep(10 if os.environ.get("LOCAL_RANK") == "0" else 30)
        raise SystemExit(f"rank {rank}: another rank has left, see its message") from None
    finally:
        if clean:  # after an error it would wait for collectives that the other ranks never enter
            dist.destroy_process_group()


def join(rank: int, size: int, device: torch.device):
    """Meet the other ranks, within five minutes, or end with one line."""
    master = os.environ.get("MASTER_ADDR", "")
    several = int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size  # nodes
    if several and (interface := interface_to(master)):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    by_torchrun = "RANK" in os.environ
    try:
        if by_torchrun:
            socket.getaddrinfo(master, None)  # torch would try for minutes
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=None if by_torchrun else dist.HashStore(),
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=5),
        )
        barrier()
    except (RuntimeError, OSError) as problem:
        by = os.environ.get("GLOO_SOCKET_IFNAME") or "the default interface"
        fix = "look whether this node reaches it, or name another interface as GLOO_SOCKET_IFNAME"
        fail(f"rank {rank} cannot join {master} by {by} ({str(problem)[:200]}): {fix}")
    # from now on ranks may be hours apart where they sample, but not where GPUs work together
    for kind, minutes in {device.type: 30, "cpu": 120}.items():
        backend = dist.group.WORLD._get_backend(torch.device(kind))
        backend._set_default_timeout(timedelta(minutes=minutes))


def interface_to(address: str, routes: Path = Path("/proc/net/route")) -> str:
    """The network interface by which a host is reached: of its most specific route; '' if unknown.
    By default gloo takes the one that this host's own name resolves to, which on Debian is the
    loopback (127.0.1.1), where no other node is."""
    try:
        wanted = int.from_bytes(socket.inet_aton(socket.gethostbyname(address)), sys.byteorder)
        table = [line.split() for line in routes.read_text().splitlines()[1:]]
    except OSError:
        return ""
    fitting = {}
    for name, network, *_, mask, _, _, _ in table:
        if wanted & int(mask, 16) == int(network, 16):
            fitting.setdefault(int(mask, 16).bit_count(), name)
    return fitting[max(fitting)] if fitting else ""


def device_of_rank(local_rank: int, each: int = 1) -> torch.device:
    """The device of a rank: the first of its `each` GPUs, made ready, or the CPU. Refuses ranks for
    which there are too few GPUs, and GPUs that torch cannot use."""
    if not torch.cuda.is_available():
        refuse_idle_gpus()
        # glibc should keep large freed blocks: returned to the kernel, they come back as zeroed
        # pages, which costs a sixth of a step on a CPU
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if (local_rank + 1) * each > gpus:
        fail(f"this node runs more ranks than it has GPUs ({gpus}): lower --nproc_per_node")
    device = torch.device("cuda", local_rank * each)
    prepare_cuda(device)
    return device


def refuse_idle_gpus():
    """Refuse to compute on the CPU where nvidia-smi lists GPUs, unless the user hides them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all")[:2] in ("", "-1")
    if hidden or not which("nvidia-smi"):
        return
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    if listed.startswith("GPU"):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        fail(
            f"nvidia-smi lists GPUs, which torch {torch.__version__} (for {built}) cannot use: "
            "install a newer driver, or torch for an older CUDA, such as pip install torch "
            "--index-url https://download.pytorch.org/whl/cu126; CUDA_VISIBLE_DEVICES=-1 means "
            "the CPU"
        )


def prepare_cuda(device: torch.device):
    """Settings that save a GPU's time or memory and change no result. They follow from torch's
    sources, and were tried on an emulated GPU, never on a real one."""
    torch.cuda.set_device(device)
    # batches differ in width: unless segments can expand, freed memory lies in pieces too small
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        configure = torch._C._accelerator_setAllocatorSettings
        try:
            ctypes.CDLL("libnvidia-ml.so.1")  # without it torch ends by a segmentation fault
            configure("expandable_segments:True")
            torch.empty(1, device=device)  # the first allocation shows whether this GPU can
        except (OSError, RuntimeError) as problem:
            configure("expandable_segments:False")
            print(f"{device} allocates memory in fixed segments ({str(problem)[:80]})", flush=True)
    # cuDNN's attention would make a plan for every new width
    torch.backends.cuda.enable_cudnn_sdp(False)
    # torchrun gives each rank one CPU thread; with --offload the optimizer works there
    if os.environ.get("OMP_NUM_THREADS") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def first_cause(problem: Exception) -> Exception:
    """The problem itself, or if torch has gathered those of several ranks, the first of them."""
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
    if replicas == 1:  # a dimension of one would make a group for each rank
        return init_device_mesh(world.device.type, (world.size,))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("copy", "shard"))


def barrier():
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1))


def next_chunk(number: int):
    """0, 1, … number − 1, each to one rank, whichever asks first: by an atomic counter."""
    store = dist.distributed_c10d._get_default_store()
    while (taken := store.add("chunks", 1)) <= number:
        yield taken - 1
