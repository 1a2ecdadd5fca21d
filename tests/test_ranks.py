"""How ranks join, what one that fails does to the others, and GPUs that are not as one would like.

What a GPU itself must show is benchmarks/gpu_check.py's."""

import ctypes
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks, stage
from test_train import fresh
from transformers import PreTrainedModel

from spin.model import attention, packing
from spin.run import ranks

# ---- one rank fails ------------------------------------------------------------------------------


def fail_on_one_rank(waits: Path, by_hand: bool = False):
    """Rank 1 raises while rank 0 waits for it. Destroying the group waits for the other rank, as
    NCCL does, here for three seconds; then a file says so."""

    def destroy():
        try:
            store.set(f"rank {os.environ['RANK']} leaves", "")
            store.wait([f"rank {1 - int(os.environ['RANK'])} leaves"], ranks.timedelta(seconds=3))
        except dist.DistStoreError:
            waits.touch()

    ranks.dist.destroy_process_group = destroy
    ranks.time.sleep = lambda seconds: None
    with ranks.process_group() as world:
        store = dist.distributed_c10d._get_default_store()
        if world.rank == 1:
            if by_hand:
                destroy()
            raise ValueError("a fault of rank 1")
        ranks.barrier()


def test_an_error_on_one_rank_ends_it_without_waiting_for_the_others(tmp_path, monkeypatch):
    waits = tmp_path / "it has waited"
    code, shown = on_ranks(2, lambda: fail_on_one_rank(waits), tmp_path)
    assert code != 0 and "a fault of rank 1" in shown and not waits.exists()
    on_ranks(2, lambda: fail_on_one_rank(waits, by_hand=True), tmp_path)
    assert waits.exists()  # control


@pytest.mark.parametrize(
    "problem, word",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--micro-tokens"),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"), "memory of cpu is too small"),
        (OSError("No space left on device"), "No space left"),
    ],
)
def test_too_little_memory_or_disk_on_a_rank_is_one_line(problem, word, refused):
    def run():
        with ranks.process_group():
            raise problem

    line = refused(run)
    assert word in line and str(problem) in line
    with ranks.process_group() as world:  # a world of one leaves no group behind
        assert world.size == 1


# ---- joining -------------------------------------------------------------------------------------

ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0100A8C0 0003 0 0 100 00000000 0 0 0
eth1 0000000A 00000000 0001 0 0 100 000000FF 0 0 0
ib0 0000010A 00000000 0001 0 0 100 0000FFFF 0 0 0
"""


@pytest.mark.parametrize(
    "address, interface",
    [
        ("10.1.2.3", "ib0"),  # of two routes that fit the more specific one
        ("10.2.2.3", "eth1"),
        ("203.0.113.5", "eth0"),
        ("127.0.1.1", "eth0"),  # Debian's address of a host's own name: never the loopback
    ],
)
def test_the_interface_is_that_of_the_most_specific_route(address, interface, tmp_path):
    (tmp_path / "route").write_text(ROUTES)
    assert ranks.interface_to(address, tmp_path / "route") == interface
    (tmp_path / "route").write_text(ROUTES.splitlines()[0])
    for file in ("route", "no such file"):
        assert ranks.interface_to(address, tmp_path / file) == ""


def test_only_ranks_of_several_nodes_name_an_interface(monkeypatch):
    monkeypatch.setattr(ranks, "interface_to", lambda address: "eth7")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    seen = []
    monkeypatch.setattr(
        ranks.dist, "init_process_group", lambda *_, **__: seen.append({**os.environ})
    )
    monkeypatch.setattr(ranks, "barrier", lambda: None)
    backend = types.SimpleNamespace(_set_default_timeout=lambda limit: None)
    world = types.SimpleNamespace(WORLD=types.SimpleNamespace(_get_backend=lambda _: backend))
    monkeypatch.setattr(ranks.dist, "group", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks.join(0, 2, torch.device("cpu"))
    ranks.join(0, 4, torch.device("cpu"))
    assert "GLOO_SOCKET_IFNAME" not in seen[0]
    assert seen[1]["GLOO_SOCKET_IFNAME"] == seen[1]["NCCL_SOCKET_IFNAME"] == "eth7"


def test_a_rank_that_reaches_nobody_ends_with_one_line(monkeypatch, refused):
    def nobody(*args, **kwargs):
        raise dist.DistNetworkError("connect() to 127.0.1.1 timed out")

    monkeypatch.setattr(ranks.dist, "init_process_group", nobody)
    assert "GLOO_SOCKET_IFNAME" in refused(lambda: ranks.join(0, 1, torch.device("cpu")))
    monkeypatch.undo()
    for name, value in {"RANK": "0", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "cannot join no.such.host" in refused(lambda: ranks.join(0, 1, torch.device("cpu")))


# ---- GPUs ----------------------------------------------------------------------------------------


def test_gpus_that_torch_cannot_use_are_refused_unless_hidden(tmp_path, monkeypatch, refused):
    """Otherwise a 7B model would be trained on the CPU, without a word."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for hides in ("-1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hides)
        assert ranks.device_of_rank(0) == torch.device("cpu")
    for shows in ("0", None):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if shows:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shows)
        line = refused(lambda: ranks.device_of_rank(0))
        assert "driver" in line and "--index-url" in line and "CUDA_VISIBLE_DEVICES=-1" in line
    fake.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert ranks.device_of_rank(0) == torch.device("cpu")


def test_a_rank_of_several_gpus_computes_on_the_first_and_too_few_are_refused(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(ranks, "prepare_cuda", lambda device: None)
    assert [ranks.device_of_rank(k, 2).index for k in (0, 1)] == [0, 2]
    for rank, each in ((2, 2), (0, 6), (5, 1)):
        line = refused(lambda r=rank, e=each: ranks.device_of_rank(r, e))
        assert "more ranks than it has GPUs (5)" in line


@pytest.mark.parametrize("lacks", ["nothing", "expandable segments", "libnvidia-ml"])
def test_a_gpu_without_expandable_segments_falls_back_in_one_line(lacks, monkeypatch, capsys):
    def first_allocation(*args, **kwargs):
        if lacks == "expandable segments":
            raise RuntimeError("CUDA driver error: operation not supported")

    def load(name):
        if lacks == "libnvidia-ml" and name == "libnvidia-ml.so.1":
            raise OSError(f"{name}: cannot open shared object file")

    settings = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for module, name in ((torch.cuda, "set_device"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda value: None)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    monkeypatch.setattr(torch, "empty", first_allocation)
    monkeypatch.setattr(ctypes, "CDLL", load)
    ranks.prepare_cuda(torch.device("cuda", 0))
    said = capsys.readouterr().out
    if lacks == "nothing":
        assert settings == ["expandable_segments:True"] and not said
    else:
        assert settings[-1] == "expandable_segments:False" and said.count("\n") == 1
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    ranks.prepare_cuda(torch.device("cuda", 0))
    assert len(settings) == (1 if lacks != "expandable segments" else 2)  # the user's own stays


def query(size: int, dtype=torch.bfloat16):
    """What kernel_for looks at, of a tensor on a GPU."""
    return types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, 9, size), device="cuda")


@pytest.fixture()
def ampere(monkeypatch):
    """A GPU of 2020, with flash-attn installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    ask = attention.flash_attn_loads
    ask.cache_clear()
    yield
    ask.cache_clear()


def write_flash_attn(folder: Path, text: str, monkeypatch):
    """A package flash_attn, which `import` finds."""
    (folder / "flash_attn.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def test_without_a_sound_flash_attn_torchs_serves(ampere, tmp_path, monkeypatch, capsys, refused):
    write_flash_attn(tmp_path, "raise ImportError('undefined symbol: _ZN3c10')", monkeypatch)
    for _ in range(2):
        assert attention.kernel_for(query(64), query(64)) is attention.by_torch
    said = capsys.readouterr()
    assert (said.out + said.err).count("undefined symbol") == 1
    asked = ["--attention", "flash_attention_2", "--dtype", "bf16"]
    assert "flash-attn" in refused(lambda: stage("generate", tmp_path / "run", "--iter", 0, *asked))


def test_each_kernel_gets_only_what_it_can_do(ampere, tmp_path, monkeypatch):
    write_flash_attn(tmp_path, "", monkeypatch)
    kernel = attention.kernel_for
    assert kernel(query(64), query(64)) is kernel(query(60), query(60)) is attention.by_flash_attn
    for none in (query(320), query(64, torch.float32)):
        assert kernel(none, none) is None
    monkeypatch.setattr(attention, "flash_attn_loads", lambda: False)
    assert kernel(query(64), query(64)) is attention.by_torch
    assert kernel(query(60), query(60)) is None  # torch's wants multiples of 8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernel(query(64), query(64)) is None  # Turing


def test_a_model_is_trained_where_the_rank_computes(played, tmp_path, monkeypatch):
    """--offload: model.device is the host's, the rank computes on a GPU."""
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("meta")))
    run = fresh(played, tmp_path / "run")
    stage("train", run, "--iter", 0)
    for name in ("opponent.jsonl", "model/model.safetensors"):
        assert (run / "iter0" / name).read_bytes() == (played / "iter0" / name).read_bytes()
    model = types.SimpleNamespace(device=torch.device("meta"))
    with pytest.raises(Exception):  # noqa: B017 – control: the trial's tensors are on the meta device
        packing.can_pack(model)
