"""Starts a stage on a GPU that is not as a stage expects it: for benchmarks/gpu_check.py.

    torchrun --nproc_per_node 2 benchmarks/one_gpu.py shared train.py --iter 0 …
    python benchmarks/one_gpu.py small train.py --iter 0 …

shared: all ranks compute on the first GPU, which NCCL refuses. So each collective's tensors are
copied to the CPU, where gloo computes, and back. small: the GPU has 16 MB for tensors.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from spin.run import ranks

device_of_rank = ranks.device_of_rank


class OverTheCpu(TorchDispatchMode):
    """Inside its `with`, collectives of GPU tensors are gloo's, of copies on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        values, form = tree_flatten((args, kwargs or {}))
        on_gpu = {i for i, x in enumerate(values) if isinstance(x, torch.Tensor) and x.is_cuda}
        if func.namespace not in ("c10d", "_c10d_functional") or not on_gpu:
            return func(*args, **(kwargs or {}))
        copies = [x.cpu() if i in on_gpu else x for i, x in enumerate(values)]
        args, kwargs = tree_unflatten(copies, form)
        out = func(*args, **kwargs)
        if func.namespace == "c10d":  # in place: (its arguments, what waits for it)
            dist.Work.unbox(out[-1]).wait()
            with torch.no_grad():
                for i in on_gpu:
                    values[i].copy_(copies[i])
            return tree_map(lambda x: self.original(x, values, copies), out)
        wait = torch.ops._c10d_functional.wait_tensor
        return tree_map(lambda x: wait(x).cuda() if isinstance(x, torch.Tensor) else x, out)

    def original(self, x, values, copies):
        """The GPU tensor that a copy among a collective's results stands for."""
        return next((old for old, new in zip(values, copies, strict=True) if new is x), x)


def share():
    """All ranks on the first GPU."""
    ranks.device_of_rank = lambda _: device_of_rank(0)
    init = dist.init_process_group
    dist.init_process_group = lambda _, **how: init("cpu:gloo,cuda:gloo", **how)
    OverTheCpu().__enter__()


def shrink():
    """A GPU with 16 MB, which is less than the allocator takes for its first large tensor."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**24 / total, 0)


if __name__ == "__main__":
    how, script, *flags = sys.argv[1:]
    {"shared": share, "small": shrink}[how]()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
