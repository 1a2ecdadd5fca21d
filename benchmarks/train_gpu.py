"""How fast train.py trains, and in how much memory: one table, a row for each setting of its knobs.

    python benchmarks/train_gpu.py --shape 7b          Mistral-7B's shape (80 GB or more); 1b for smaller cards
    torchrun --nproc_per_node 8 benchmarks/train_gpu.py --shape 7b
    python benchmarks/train_gpu.py --shape 30m --steps 2 --pairs 8     also on a CPU

Random weights, which change neither speed nor memory. Pair lengths are log-normal, like UltraChat's first rounds: prompts
of a median of 60 tokens, human answers of 270, generated ones of at most 256. Steps are train.py's own: micro-batches,
backward, clipping, RMSProp; the first one is not counted.

MFU counts what the pairs need, not what was computed: 6 × (weights of the blocks) FLOPs for each real token, forward and
backward; 6 × (weights of the head) for each response token; 6 × layers × width × T² for the causal attention of a
sequence of T tokens. Padding and recomputation do not count. It is a share of the rate of a large matrix product in
the compute dtype, measured in the same run.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from spin import distributed
from spin.packing import packed
from spin.recipe import Recipe

SHAPES = {
    "7b": lambda: MistralConfig(),  # 7.24B parameters
    "1b": lambda: LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),  # 1.1B
    "360m": lambda: LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "100m": lambda: LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=16384,
        tie_word_embeddings=True,
    ),
    "30m": lambda: LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    ),
}
KNOBS = {  # a row of the table -> what differs from --recompute --micro-tokens 8192
    "as by default": {},
    "no recompute, 4096 tokens": dict(recompute=False, micro_tokens=4096),
    "2048 tokens": dict(micro_tokens=2048),
    "16384 tokens": dict(micro_tokens=16384),
    "transformers' SDPA and its mask": dict(attention="sdpa"),
    "offload": dict(offload=True),
}


def make_pairs(n: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """n pairs of random ids, as train.load_pairs gives them."""
    rng, pairs = np.random.default_rng(seed), []
    for i in range(n):
        prompt, real, generated = (
            int(np.clip(rng.lognormal(np.log(median), spread), 8, most))
            for median, spread, most in ((60, 1, 800), (270, 0.7, 1200), (220, 0.7, 256))
        )
        x = rng.integers(3, vocabulary, prompt)
        half = lambda k: (
            np.concatenate([x, rng.integers(3, vocabulary, k)]).astype(np.int32),  # noqa: E731
            np.array([0] * prompt + [1] * k, np.int8),
        )
        pairs.append(
            {"id": i, "iter": 0, "index": i, "real": half(real), "generated": half(generated)}
        )
    return pairs


def flops(model_config, block_weights: int, pairs, backward=True) -> float:
    """What the pairs need in one pass, by the formula above; a third of it without the backward pass."""
    halves = [pair[half] for pair in pairs for half in ("real", "generated")]
    head = model_config.vocab_size * model_config.hidden_size
    attention = (
        model_config.num_hidden_layers
        * model_config.hidden_size
        * sum(len(ids) ** 2 for ids, _ in halves)
    )
    tokens, responses = (
        sum(len(ids) for ids, _ in halves),
        sum(int(mask.sum()) for _, mask in halves),
    )
    return (6 if backward else 2) * (block_weights * tokens + head * responses + attention)


def matmul_rate(device, dtype, n: int) -> float:
    """FLOPs a second of the product of two n × n matrices, the median of nine."""
    a, b, times = (
        torch.randn(n, n, device=device, dtype=dtype),
        torch.randn(n, n, device=device, dtype=dtype),
        [],
    )
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / statistics.median(times[1:])


def measure(config, recipe, pairs, world) -> tuple[float, float, float]:
    """(real tokens a second and rank, FLOPs a second and rank, GiB at the peak or 0) of steps over all pairs."""
    with torch.device(world.device):
        model = (MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM)(
            config
        ).eval()
    block_weights = sum(p.numel() for p in model.model.layers.parameters())
    model = distributed.shard(model, recipe, world)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-9, foreach=False)
    tokens, seconds = [], []
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with packed(model, recipe.attention):
        opponent = torch.zeros(
            len(pairs), 2, dtype=torch.float64
        )  # what it says makes no difference to the speed
        for batch in train.batches(len(pairs), recipe, 0, 0):
            begun = time.perf_counter()
            for rows, weight in train.micro_batches(batch, pairs, recipe, world):
                logps = train.score(model, rows, "spin", world.device)
                values = train.play(
                    logps, opponent[[row["index"] for row in rows]].to(logps), 1e-4, "logistic"
                )
                (values["loss"].sum() / len(batch)).backward()
            distributed.clip_gradients(model, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            tokens.append(
                (
                    sum(len(pairs[i][h][0]) for i in batch for h in ("real", "generated")),
                    flops(config, block_weights, [pairs[i] for i in batch]),
                )
            )
    rate = np.median(
        [np.array(t) / s / world.size for t, s in zip(tokens[1:], seconds[1:])], axis=0
    )
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0
    del model, optimizer
    gc.collect()
    return rate[0], rate[1], peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="7b", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="steps for each row (default: %(default)s), after one to warm up",
    )
    parser.add_argument(
        "--pairs", type=int, default=16, help="pairs in a step and rank (default: %(default)s)"
    )
    parser.add_argument("--rows", nargs="+", choices=list(KNOBS), default=list(KNOBS))
    args = parser.parse_args()
    with distributed.join() as world:
        config, dtype = SHAPES[args.shape](), distributed.compute_dtype("auto", world.device)
        pairs = make_pairs(args.pairs * world.size * (args.steps + 1), config.vocab_size)
        ceiling = matmul_rate(world.device, dtype, 8192 if world.device.type == "cuda" else 2048)
        if world.rank == 0:
            name = (
                torch.cuda.get_device_name()
                if world.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads"
            )
            print(
                f"{args.shape}, {world.size} × {name}, torch {torch.__version__}, {str(dtype)[6:]}; a large matrix product: "
                f"{ceiling / 1e12:.3g} TFLOP/s\n| setting | real tokens/s a rank | MFU of the measured ceiling | peak GiB |\n|---|---|---|---|"
            )
        for name in args.rows:
            recipe = Recipe(batch_size=args.pairs * world.size, **KNOBS[name])
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


if __name__ == "__main__":
    main()
