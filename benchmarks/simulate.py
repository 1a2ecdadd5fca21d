"""What train.py needs on GPUs that are not here: its own steps, on tensors without numbers.

    OMP_NUM_THREADS=1 python benchmarks/simulate.py                 all tables; minutes on one core
    python benchmarks/simulate.py --shape 7b --ranks 8 --micro-tokens 4096 --no-recompute
    python benchmarks/simulate.py --shape 7b --ranks 1 --micro-tokens 4096 --lora-rank 16
    python benchmarks/simulate.py --lengths 200 300 200 --batch-size 64 --shape 7b --ranks 16

Nothing is copied from train.py: its train() runs, with FSDP's sharding, its micro-batches, its
optimizer. torch's fake tensors have a shape and a storage, but no memory; torch's fake process
group answers collectives at once. So one process plays rank 0 of as many as wanted. Each storage
is followed from the operation that makes it until it is freed.

What comes out is a lower bound ("at least"):
- memory: tensors only, without Python, CUDA, NCCL and what the allocator cannot use again;
- FLOPs: what the operations' arguments say; causal attention counts half of its square;
- times: by a roofline, not measured. Each operation takes its FLOPs at the peak rate or its bytes
  at the memory's bandwidth, whichever is longer; a step takes this sum or the time of its
  collectives, whichever is longer, as if they overlapped perfectly. The defaults are the data sheet
  of the paper's A100 80GB SXM: 312 TFLOP/s in bf16, 2039 GB/s of memory, 300 GB/s of NVLink each
  way, and 8 network cards of 200 Gb/s a node, which are 200 GB/s.
"""

import argparse
import contextlib
import functools
import io
import math
import resource
import sys
import tempfile
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim import RMSprop
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the group "fake")
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpu
from train_memory import formula

import train
from spin.data.pairs import share_prompts
from spin.model import attention, lora
from spin.model.packing import packed
from spin.model.weights import compute_dtype, make_room, without_weights
from spin.recipe import Recipe
from spin.run.folders import Iteration
from spin.run.ranks import World

SHAPES = {
    **train_gpu.SHAPES,
    "70b": functools.partial(train_gpu.llama, 8192, 28672, 80, 64, 8, 32000, False),
}
# mean tokens of train_gpu's prompts, human and generated answers, which are like UltraChat's
LENGTHS = (98, 339, 194)
GPUS_A_NODE = 8
NESTED = (list, tuple, dict)
KINDS = ("weights", "gradients", "moments", "gathered", "activations", "logits", "temporary")
FREE = ("_unsafe_view", "detach", "lift_fresh")  # these move no bytes
# of these the first argument is not read whole: a table of which rows are taken, or overwritten
UNREAD = ("embedding", "gather", "index", "copy_", "zero_", "fill_", "_foreach_copy_")
RING_TRIPS = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allreduce_": 2,
}  # passes of the data


# ---- what is followed ------------------------------------------------------------------------


@dataclass
class Storage:
    """The memory of some tensors: bytes now, and what it serves; None: nothing that is named."""

    size: int
    kind: str | None = None


class Meter(TorchDispatchMode):
    """Follows what runs inside its `with`, on real or fake tensors: storages, FLOPs, transfers."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.alive = {}  # address of a storage -> (Storage, weak reference)
        self.events = []  # (Storage, change in bytes), in their order
        self.work = []  # (FLOPs, bytes read and written) of each operation
        self.flops = Counter()  # "products": of matrices; "attention": with the whole square
        self.sent = Counter()  # ranks of a group -> bytes that each of them sends
        self.largest_logits = 0  # bytes
        self.backward = -1  # the backward pass that was seen last

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def followed(storage, size):  # FSDP frees and takes gathered weights so
            resize(storage, size)
            if storage._cdata in self.alive:
                record = self.alive[storage._cdata][0]
                record.kind = "gathered"
                self.change(record, storage.nbytes() - record.size)
            return storage

        # DTensor works out the shapes of whole weights on fake tensors: no memory of this rank
        shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def unfollowed(*args):
            with _disable_current_modes():
                return shapes(*args)

        self.patches = contextlib.ExitStack()
        for owner, name, new in (
            (torch.UntypedStorage, "resize_", followed),
            (ShardingPropagator, shapes.__name__, unfollowed),
        ):
            self.patches.enter_context(mock.patch.object(owner, name, new))
        return super().__enter__()

    def __exit__(self, *problem):
        self.patches.close()
        return super().__exit__(*problem)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its operation on this rank's part comes next
        if func.namespace == "prim":
            return func(*args)  # what Python asks about a tensor
        kwargs = kwargs or {}
        self.notice_backward()
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = tensors((args, kwargs))
        outputs = tensors((out, kwargs.get("out")))
        for x in outputs:
            self.follow(x)
        if func.namespace in ("fsdp", "c10d"):
            for x in (*inputs, *outputs):
                if x.numel() > 1 and self.follow(x).kind != "weights":
                    self.follow(x).kind = "gathered"
        if func.namespace == "c10d":
            self.send(name, args)
        elif not (func.is_view or name in FREE or name.startswith("empty")):
            self.count(func, args, kwargs, out, inputs, outputs)
        return out

    def follow(self, x: torch.Tensor, kind: str | None = None) -> Storage:
        """The record of a tensor's storage, a new one if need be; kind: what it serves."""
        storage = x.untyped_storage()
        address = storage._cdata
        if address not in self.alive:
            logits = x.dim() > 1 and x.shape[-1] == self.vocabulary
            record = Storage(0, "logits" if logits else None)
            self.alive[address] = record, weakref.ref(storage, lambda _: self.free(address))
            self.change(record, storage.nbytes())
            if logits:
                self.largest_logits = max(self.largest_logits, storage.nbytes())
        record = self.alive[address][0]
        record.kind = kind or record.kind
        return record

    def free(self, address: int):
        record, _ = self.alive.pop(address)
        self.change(record, -record.size)

    def change(self, record: Storage, by: int):
        record.size += by
        self.events.append((record, by))

    def notice_backward(self):
        """What has no name and is alive when a backward pass begins was kept for it."""
        task = torch._C._current_graph_task_id()
        if task not in (-1, self.backward):
            self.backward = task
            for record, _ in self.alive.values():
                record.kind = record.kind or "activations"

    def send(self, name: str, args):
        """Count a collective: what each rank of its group sends around a ring."""
        handle = next(x for x in args if isinstance(x, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(handle)))
        largest = max(x.nbytes for x in tensors(args))
        self.sent[ranks] += RING_TRIPS[name] * largest * (len(ranks) - 1) / len(ranks)

    def count(self, func, args, kwargs, out, inputs, outputs):
        """FLOPs of an operation by torch's formulas, and the bytes it reads and writes."""
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            attention = "attn" in str(func) or "attention" in str(func)
            self.flops["attention" if attention else "products"] += flops
            flops = flops / 2 if attention else flops  # causal
        if func.overloadpacket.__name__ in UNREAD:
            inputs = [x for x in inputs if not any(x is first for first in tensors(args[0]))]
        self.work.append((flops, sum(map(bytes_of, (*inputs, *outputs)))))

    def peak(self) -> dict[str, int]:
        """Bytes of each kind at the moment at which all together were most."""
        total = 0
        totals = [total := total + by for _, by in self.events]
        until = totals.index(max(totals)) + 1
        at_peak = Counter(dict.fromkeys(KINDS, 0))
        for record, by in self.events[:until]:
            at_peak[record.kind or "temporary"] += by
        return dict(at_peak)


def tensors(tree) -> list[torch.Tensor]:
    """The tensors in a tensor, or in a list, tuple or dict of such."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    inside = tree.values() if isinstance(tree, dict) else tree
    return [x for part in inside for x in tensors(part)] if isinstance(tree, NESTED) else []


def bytes_of(x: torch.Tensor) -> int:
    """Bytes that are read for a tensor: an expanded one is smaller than it looks."""
    return min(x.nbytes, x.untyped_storage().nbytes())


# ---- tensors without numbers, ranks that are not there ----------------------------------------


class WithoutNumbers(FakeTensorMode):
    """Uninitialised memory is fake, and so is what is computed from it; ids and lengths are real,
    so they may decide what is computed. Where a number of a fake tensor is asked for, it is 1."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # most of what is asked, so answered at once
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        fake = any(isinstance(x, FakeTensor) or x.is_meta for x in tensors((args, kwargs)))
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if fake or func.overloadpacket.__name__.startswith("empty"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended(ranks: int, as_on_gpu: bool = True):
    """Yields the World of rank 0 of so many, whose tensors have no numbers."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        with contextlib.ExitStack() as patches:
            # what asks where such a tensor is takes its way for GPUs, and torch's kernel there
            for owner, name, new in (
                (FakeTensor, "is_cuda", as_on_gpu),
                (torch.cuda, "get_device_capability", lambda *_: (8, 0)),
                (attention, "flash_attn_loads", lambda: False),
            ):
                patches.enter_context(mock.patch.object(owner, name, new, create=True))
            patches.enter_context(WithoutNumbers())
            yield World(0, ranks, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def follow_steps(config, recipe: Recipe, pairs, world, scoring: bool = False) -> Meter:
    """train.train on all pairs, or with scoring the opponent's passes before it, followed.
    Runs on fake tensors inside pretended, else on real ones with random weights."""

    model = without_weights(config)
    if recipe.lora_rank:
        with _disable_current_modes():
            lora.add_adapters(model, "", recipe, 0, compute_dtype(recipe.dtype, world.device))
    train.shard(model, recipe, world)
    make_room(model, recipe, world)
    optimizer = RMSprop(model.parameters(), lr=0.0, alpha=recipe.alpha, foreach=False)
    meter = Meter(config.vocab_size)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.to_local(), std=0.02)
        meter.follow(weight.to_local(), "weights")
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes the moments, which every step but a run's first finds there
    optimizer.zero_grad()
    for x in tensors([list(state.values()) for state in optimizer.state.values()]):
        meter.follow(x.to_local() if isinstance(x, DTensor) else x, "moments")

    def name_gradients(*_):
        for weight in model.parameters():
            if weight.requires_grad:
                meter.follow(weight.grad.to_local(), "gradients")

    optimizer.register_step_pre_hook(name_gradients)
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
    said = io.StringIO()
    with packed(model, recipe.attention), tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stderr(said), meter:  # no progress bar
                if scoring:
                    train.score_opponent(model, pairs, recipe, 0, world)
                else:
                    iteration = Iteration(0, Path(folder), {})
                    train.train(model, optimizer, pairs, scores, recipe, iteration, world)
        except SystemExit:
            sys.exit(said.getvalue())
    return meter


def make_pairs(n: int, lengths, vocabulary: int) -> list[dict]:
    """n pairs of random ids, as spin.data.pairs.encode_pairs gives them, all of the same lengths:
    (prompt, human answer, generated answer), in tokens."""
    prompt, *answers = lengths
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(n):
        x = rng.integers(3, vocabulary, prompt)
        pairs.append(train_gpu.pair_of(i, x, answers, rng, vocabulary))
    return pairs


# ---- one setting -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is simulated: a step of batch_size pairs; 0: as many as fill two micro-batches."""

    shape: str = "7b"
    ranks: int = 8
    replicas: int = 1
    micro_tokens: int = 8192
    recompute: bool = True
    batch_size: int = 0
    lengths: tuple[int, int, int] = LENGTHS
    lora_rank: int = 0


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at most; the defaults are an A100's, see above."""

    rate: float = 312e12  # FLOP/s of matrix products
    memory: float = 2039e9  # bytes a second, read or written
    inside: float = 300e9  # bytes a second that a GPU sends inside a node
    between: float = 200e9  # bytes a second that a node sends, over all its network cards

    def compute(self, meter: Meter) -> float:
        """Seconds of all operations, one after the other."""
        return sum(max(flops / self.rate, moved / self.memory) for flops, moved in meter.work)

    def transfer(self, meter: Meter) -> float:
        """Seconds of all collectives, one after the other."""
        return sum(sent / self.bandwidth(ranks) for ranks, sent in meter.sent.items())

    def bandwidth(self, ranks: tuple[int, ...]) -> float:
        """Bytes a second that each rank of a group can send around a ring. The groups of a node's
        other ranks share its network cards."""
        nodes = Counter(rank // GPUS_A_NODE for rank in ranks)
        if len(nodes) == 1:
            return self.inside
        return min(self.inside, self.between * nodes[ranks[0] // GPUS_A_NODE] / GPUS_A_NODE)


def prepared(setting: Setting):
    """(config, recipe, pairs) of a setting."""
    config = SHAPES[setting.shape]()
    a_pass = max(1, setting.micro_tokens // sum(setting.lengths))
    batch = setting.batch_size or 2 * setting.ranks * a_pass
    recipe = Recipe(
        batch_size=batch,
        epochs=1,
        dtype="bf16",
        micro_tokens=setting.micro_tokens,
        replicas=setting.replicas,
        recompute=setting.recompute,
        lora_rank=setting.lora_rank,
    )
    pairs = make_pairs(batch, setting.lengths, config.vocab_size)
    share_prompts(pairs)
    return config, recipe, pairs


@functools.cache
def simulate(setting: Setting, scoring: bool = False) -> Meter:
    """A step of rank 0 on a GPU that is not here; scoring: the opponent's passes instead."""
    config, recipe, pairs = prepared(setting)
    with pretended(setting.ranks) as world:
        return follow_steps(config, recipe, pairs, world, scoring)


# ---- tables ----------------------------------------------------------------------------------


MEMORY_ROWS = (
    Setting("360m", 1, micro_tokens=2048),
    Setting("1b", 1),
    Setting("7b", 1, micro_tokens=2048),
    Setting("7b", 1, micro_tokens=4096, lora_rank=16),
    Setting("7b", 8, micro_tokens=2048),
    Setting("7b", 8),
    Setting("7b", 8, micro_tokens=4096, recompute=False),
    Setting("7b", 16),
    Setting("7b", 16, replicas=2),
    Setting("7b", 64),
    Setting("70b", 64),
)
STEP_ROWS = tuple(
    Setting("7b", ranks, replicas, batch_size=64)
    for ranks, replicas in ((8, 1), (16, 1), (16, 2), (32, 1), (64, 1))
)


def gpus(setting: Setting) -> str:
    """How many GPUs, as replicas × shards where there are several."""
    shards = setting.ranks // setting.replicas
    return f"{setting.replicas} × {shards}" if setting.replicas > 1 else str(shards)


def by_formula(setting: Setting) -> str:
    """GB a rank by the formula of benchmarks/RESULTS.md, without the process."""
    if not setting.recompute or setting.lora_rank:
        return "none"
    config = SHAPES[setting.shape]()
    number = max(1, setting.micro_tokens // sum(setting.lengths))  # of pairs in a pass
    if setting.batch_size:
        number = min(number, math.ceil(setting.batch_size / setting.ranks))
    answers = number * sum(setting.lengths[1:])
    shards = setting.ranks // setting.replicas
    mib = formula(config, number * sum(setting.lengths), answers, shards, 2, 0)
    return f"{mib * 2**20 / 1e9:.1f}"


def needed_flops(setting: Setting) -> float:
    """What a rank's pairs of a step need, by train_gpu's formula: nothing computed twice."""
    config, _, pairs = prepared(setting)
    model = without_weights(config)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    return train_gpu.flops(config, blocks, pairs) / setting.ranks


def print_memory(rows):
    """GB at the peak of a rank."""
    print("At the peak a rank needs at least, in GB:\n")
    kinds = " | ".join(KINDS)
    print(f"| shape | GPUs | micro-tokens | recompute | all tensors | {kinds} | formula |")
    print("|---" * (6 + len(KINDS)) + "|")
    for setting in rows:
        peak = simulate(setting).peak()
        name = setting.shape + f", rank {setting.lora_rank}" * bool(setting.lora_rank)
        cells = [name, gpus(setting), str(setting.micro_tokens)]
        cells.append("yes" if setting.recompute else "no")
        cells += [f"{x / 1e9:.1f}" for x in (sum(peak.values()), *peak.values())]
        cells.append(by_formula(setting))
        print(f"| {' | '.join(cells)} |", flush=True)


def print_steps(rows, roofline: Roofline):
    """Work of a step, and how long it takes at least by the roofline."""
    print("\nA step; times by a roofline, not measured:\n")
    head = "pairs a step | TFLOPs a rank | ÷ needed | GB sent inside a node | between nodes"
    head += " | GB of logits, read once: ms"
    times = "s, operations | s, collectives | s a step, at least"
    print(f"| shape | GPUs | {head} | {times} |\n" + "|---" * 11 + "|")
    for setting in rows:
        meter = simulate(setting)
        flops = meter.flops["products"] + meter.flops["attention"] / 2
        inside = sum(b for r, b in meter.sent.items() if max(r) < GPUS_A_NODE)
        between = sum(meter.sent.values()) - inside
        seconds = [roofline.compute(meter), roofline.transfer(meter)]
        cells = [setting.shape, gpus(setting), str(prepared(setting)[1].batch_size)]
        cells += [f"{flops / 1e12:.1f}", f"{flops / needed_flops(setting):.2f}"]
        cells += [f"{x / 1e9:.1f}" for x in (inside, between)]
        logits = meter.largest_logits
        cells.append(f"{logits / 1e9:.2f}: {logits / roofline.memory * 1e3:.2f}")
        cells += [f"{x:.2f}" for x in (*seconds, max(seconds))]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_sampling(setting: Setting, slots: int = 16, length: int = 2048):
    """What generate.py and evaluate.py need of the same GPU: by a formula, not simulated."""
    config = SHAPES[setting.shape]()
    weights = sum(p.numel() for p in without_weights(config).parameters())
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * width  # keys and values
    cells = [2 * weights, 2 * a_token * length * slots]  # bf16
    weights, keys = (f"{x / 1e9:.1f} GB" for x in cells)
    print(f"\nSampling, in turn with training, needs at least {weights} of weights and {keys} of")
    print(f"keys and values, for {slots} slots of {length:,} tokens.")


def print_iterations(roofline: Roofline):
    """The paper's run, 7B on 8 GPUs, beside its Table 2 (Appendix B.2)."""
    step, scores = (
        max(roofline.compute(meter), roofline.transfer(meter))
        for meter in (simulate(STEP_ROWS[0]), simulate(STEP_ROWS[0], scoring=True))
    )
    print("\nThe paper's iterations, 7B on 8 GPUs, two epochs, without sampling:\n")
    print("| iteration | pairs | at least, h, by a roofline | Table 2, h |\n|---|---|---|---|")
    for t, n, paper in (("0", 50_000, 4.32), ("1 to 3", 100_000, 8.64)):
        print(f"| {t} | {n:,} | {n / 64 * (2 * step + scores) / 3600:.2f} | {paper} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "(default: %(default)s)"
    parser.add_argument("--shape", choices=list(SHAPES), help="this shape alone, not all tables")
    for name, about in (
        ("ranks", "GPUs"),
        ("replicas", "whole copies of the sharded model"),
        ("micro_tokens", "tokens of a rank in a pass"),
        ("batch_size", "pairs in a step; 0: as many as fill two passes of each rank"),
        ("lora_rank", "rank of LoRA's adapters; 0: all weights are trained"),
    ):
        flag = "--" + name.replace("_", "-")
        usual = getattr(Setting, name)
        parser.add_argument(flag, type=int, default=usual, help=f"{about} {default}")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    about = f"tokens of prompt, human and generated answer {default}"
    parser.add_argument("--lengths", type=int, nargs=3, default=LENGTHS, help=about)
    for name, about in (
        ("rate", "FLOP/s of matrix products"),
        ("memory", "bytes a second of a GPU's memory"),
        ("inside", "bytes a second that a GPU sends inside a node"),
        ("between", "bytes a second that a node sends over all its network cards"),
    ):
        usual = getattr(Roofline, name)
        parser.add_argument(f"--{name}", type=float, default=usual, help=f"{about} {default}")
    args = parser.parse_args(argv)
    roofline = Roofline(args.rate, args.memory, args.inside, args.between)
    begun = time.process_time()
    if args.shape:
        numbers = (args.ranks, args.replicas, args.micro_tokens, args.recompute, args.batch_size)
        rows = [Setting(args.shape, *numbers, tuple(args.lengths), args.lora_rank)]
        print_memory(rows)
        print_steps(rows, roofline)
        print_sampling(rows[0])
    else:
        print_memory(MEMORY_ROWS)
        for rows in (MEMORY_ROWS, STEP_ROWS):
            print_steps(rows, roofline)
        print_iterations(roofline)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{time.process_time() - begun:.0f} s of one core, {resident:.1f} GiB resident")


if __name__ == "__main__":
    main()
