"""How fast train.py trains, and in how much memory: a table with a row for each setting.

    python benchmarks/train_gpu.py --shape 7b    Mistral-7B's shape (80 GB or more); else 1b
    torchrun --nproc_per_node 8 benchmarks/train_gpu.py --shape 7b
    python benchmarks/train_gpu.py --shape 30m --steps 2 --pairs 8     also on a CPU

Random weights, which change neither speed nor memory. Pair lengths are log-normal, like UltraChat's
first rounds: prompts of a median of 60 tokens, human answers of 270, generated ones of at most 256.
Steps are those of train.py: micro-batches, backward, clipping, RMSProp; the first one is not
counted.

MFU counts what the pairs need, not what was computed: 6 × (weights of the blocks) FLOPs for each
real token, forward and backward; 6 × (weights of the head) for each response token;
6 × layers × width × T² for the causal attention of a sequence of T tokens. Padding and
recomputation do not count. It is a share of the rate of a large matrix product in the compute
dtype, measured in the same run.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from loss import sequence_logps, spin_loss
from spin.data.pairs import (
    batches,
    micro_batches,
    opponent_of,
    packed_pairs,
    share_prompts,
    tokens_of,
)
from spin.model import lora
from spin.model.packing import is_padded, packed
from spin.model.weights import clip_gradients, compute_dtype, make_room, without_weights
from spin.recipe import Recipe
from spin.run.ranks import process_group


def llama(
    width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    """A Llama of this shape; tied: the embedding is the head too."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


SHAPES = {  # a name -> what makes its config
    "7b": MistralConfig,  # 7.24B parameters
    "1b": partial(llama, 2048, 5632, 22, 32, 4, 32000, False),  # 1.1B
    "360m": partial(llama, 960, 2560, 32, 15, 5, 49152, True),
    "100m": partial(llama, 768, 2048, 12, 12, 12, 16384, True),
    "30m": partial(llama, 384, 1024, 6, 6, 6, 49152, True),
    "tiny": partial(llama, 64, 128, 2, 4, 4, 512, False),
}
KNOBS = {  # a row of the table -> what differs from --recompute --micro-tokens 8192
    "as by default": {},
    "no recompute, 4096 tokens": {"recompute": False, "micro_tokens": 4096},
    "2048 tokens": {"micro_tokens": 2048},
    "16384 tokens": {"micro_tokens": 16384},
    "padded batches": {"attention": "sdpa"},
    "offload": {"offload": True},
}


def pair_of(i: int, prompt, lengths, rng, vocabulary: int) -> dict:
    """A pair as spin.data.pairs.encode_pairs gives it, with answers of these lengths."""
    pair = {"id": i, "iter": 0, "index": i, "shared": 0}
    for name, length in zip(("real", "generated"), lengths, strict=True):
        ids = np.concatenate([prompt, rng.integers(3, vocabulary, length)]).astype(np.int32)
        pair[name] = ids, (np.arange(len(ids)) >= len(prompt)).astype(np.int8)
    return pair


def make_pairs(n: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """n pairs of random ids, as spin.data.pairs.encode_pairs gives them."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        prompt = draw_length(rng, 60, 1, 800)
        real = draw_length(rng, 270, 0.7, 1200)
        generated = draw_length(rng, 220, 0.7, 256)
        x = rng.integers(3, vocabulary, prompt)
        pairs.append(pair_of(i, x, (real, generated), rng, vocabulary))
    return pairs


def draw_length(rng, median: float, spread: float, most: int) -> int:
    """A number of tokens, log-normal, between 8 and most."""
    return int(np.clip(rng.lognormal(np.log(median), spread), 8, most))


def flops(model_config, block_weights: int, pairs, backward=True) -> float:
    """What the pairs need in one pass, by the formula above.

    A third of it without the backward pass."""
    halves = [pair[half] for pair in pairs for half in ("real", "generated")]
    all_tokens = sum(tokens_of(pair, "spin") for pair in pairs)
    responses = sum(int(mask.sum()) for _, mask in halves)
    # a prompt that stands in the row once asks its queries once
    squares = sum(len(ids) ** 2 for ids, _ in halves) - sum(p["shared"] ** 2 for p in pairs)
    head = model_config.vocab_size * model_config.hidden_size
    attention = model_config.num_hidden_layers * model_config.hidden_size * squares
    return (6 if backward else 2) * (block_weights * all_tokens + head * responses + attention)


def matmul_rate(device, dtype, n: int) -> float:
    """FLOPs a second of the product of two n × n matrices, the median of nine."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(a, b)
        wait_for_device(device)
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / statistics.median(times[1:])


def wait_for_device(device):
    """A GPU computes behind Python's back: wait until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_step(model, optimizer, batch: list[int], pairs, recipe, world):
    """One step on a global batch, as train.py takes it."""
    # what the opponent says makes no difference to the speed
    opponent = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for rows, _ in micro_batches(batch, pairs, recipe, world, is_padded(model)):
        policy = sequence_logps(model, **packed_pairs(rows, "spin", world.device))
        policy_real, policy_generated = policy.chunk(2)
        opponent_real, opponent_generated = opponent_of(rows, opponent, policy)
        losses = spin_loss(
            policy_real, policy_generated, opponent_real, opponent_generated, lam=1e-4
        )
        (losses.sum() / len(batch)).backward()
    clip_gradients(model, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    wait_for_device(world.device)


def sharded_model(config, recipe, world):
    """(a model of random weights as train.py shards it, its optimizer)."""
    model = without_weights(config)
    if recipe.lora_rank:
        lora.add_adapters(model, "", recipe, 0, compute_dtype(recipe.dtype, world.device))
    train.shard(model, recipe, world)
    make_room(model, recipe, world)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.to_local(), std=0.02)
    return model, torch.optim.RMSprop(model.parameters(), lr=1e-9, foreach=False)


def measure(config, recipe, pairs, world) -> tuple[float, float, float]:
    """(real tokens a second and rank, FLOPs a second and rank, GiB at the peak or 0).

    Of steps over all pairs, the first left out."""
    cuda = world.device.type == "cuda"
    model, optimizer = sharded_model(config, recipe, world)
    block_weights = sum(p.numel() for p in model.model.layers.parameters())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    speeds = []  # of each step: tokens and FLOPs, a second and rank
    with packed(model, recipe.attention) as method:
        for pair in pairs:
            pair["shared"] = 0
        if method == "packed":
            share_prompts(pairs)
        for batch in batches(len(pairs), recipe, 0, 0):
            begun = time.perf_counter()
            take_step(model, optimizer, batch, pairs, recipe, world)
            seconds = time.perf_counter() - begun
            some = [pairs[i] for i in batch]
            work = [
                sum(tokens_of(pair, "spin") for pair in some),
                flops(config, block_weights, some),
            ]
            speeds.append(np.array(work) / seconds / world.size)
    tokens_per_s, flops_per_s = np.median(speeds[1:], axis=0)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
    del model, optimizer
    gc.collect()
    return tokens_per_s, flops_per_s, peak


def describe(device) -> str:
    """Hardware and versions."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            answer = subprocess.run(asked, capture_output=True, text=True).stdout
            name += f", driver {answer.splitlines()[0] if answer else 'unknown'}"
        name += f", CUDA {torch.version.cuda}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["flash-attn"] = "none"
    if importlib.util.find_spec("flash_attn"):
        versions["flash-attn"] = importlib.metadata.version("flash-attn")
    return ", ".join([name, *(f"{package} {version}" for package, version in versions.items())])


def print_head(shape: str, world, dtype, ceiling: float):
    """Where it runs, and the head of the table."""
    print(
        f"{shape}, {world.size} × {describe(world.device)}, {str(dtype)[6:]}; "
        f"a large matrix product: {ceiling / 1e12:.3g} TFLOP/s"
    )
    print("| setting | real tokens/s a rank | MFU of the measured ceiling | peak GiB |")
    print("|---|---|---|---|")


def print_row(name: str, config, recipe, pairs, ceiling: float, world):
    """Measure one setting and print its row."""
    try:
        speed, rate, peak = measure(config, recipe, pairs, world)
        line = f"{speed:,.0f} | {rate / ceiling:.0%} | {peak:.1f}"
    except torch.OutOfMemoryError:
        line = "out of memory | | "
        gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    if world.rank == 0:
        print(f"| {name} | {line} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "(default: %(default)s)"
    parser.add_argument("--shape", choices=list(SHAPES), default="7b", help=default)
    about = f"steps for each row {default}, after one to warm up"
    parser.add_argument("--steps", type=int, default=4, help=about)
    about = f"pairs in a step and rank {default}"
    parser.add_argument("--pairs", type=int, default=16, help=about)
    parser.add_argument("--rows", nargs="+", choices=list(KNOBS), default=list(KNOBS))
    args = parser.parse_args()
    with process_group() as world:
        config = SHAPES[args.shape]()
        dtype = compute_dtype("auto", world.device)
        batch = args.pairs * world.size
        pairs = make_pairs(batch * (args.steps + 1), config.vocab_size)
        ceiling = matmul_rate(world.device, dtype, 8192 if world.device.type == "cuda" else 2048)
        if world.rank == 0:
            print_head(args.shape, world, dtype, ceiling)
        for name in args.rows:
            recipe = Recipe(batch_size=batch, **KNOBS[name])
            print_row(name, config, recipe, pairs, ceiling, world)


if __name__ == "__main__":
    main()
