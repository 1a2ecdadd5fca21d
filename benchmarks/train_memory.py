"""The memory of train.py: against the number of pairs, the length of prompts, the size of the model. Real runs of the stage.

    OMP_NUM_THREADS=1 python benchmarks/train_memory.py [pairs] [prompts] [sizes] [ranks]
    python benchmarks/train_memory.py formula          what a GPU needs by the README's formula, computed only

Each figure is the largest resident size of a process of its own that scores and trains (and exports), on the CPU in
fp32. pairs: the demo's model. prompts: 30M parameters, answers of 300 tokens, prompts of 100 and of 400. sizes: one step of
8 pairs for three sizes with the demo's tokenizer, beside the README's formula. ranks: what each of 1, 2 and 4 ranks needs to
load the largest of them.
"""

import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from train_gpu import SHAPES

import train
from spin import distributed
from spin.data import write_jsonl
from spin.recipe import Recipe

DEMO = HERE.parent / "demo" / "theta0"


def resident() -> float:
    """The largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_model(shape: str, folder: Path):
    """Random weights of a shape, with the demo's tokenizer beside them."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    LlamaForCausalLM(SHAPES[shape]()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def make_pairs(path: Path, n: int, prompt: int, answer: int):
    """n pairs of random letters; the demo's tokenizer makes a letter a token."""
    rng = random.Random(0)
    text = lambda k: "".join(rng.choice("abdefiklmnoprstu") for _ in range(k))  # noqa: E731
    write_jsonl(
        path,
        (
            {"prompt": text(prompt), "real": text(answer), "generated": text(answer)}
            for _ in range(n)
        ),
    )


def child(*command) -> float:
    """Run this file again as a child; the MiB that it prints last, the largest of its ranks."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return max(
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("MiB ")
    )


def trained(model, pairs, *flags) -> float:
    with tempfile.TemporaryDirectory() as run:
        return child(
            __file__,
            "--train",
            "--recipe",
            "demo",
            "--iter",
            0,
            "--epochs",
            1,
            "--run",
            run,
            "--model",
            model,
            "--pairs",
            pairs,
            "--max-length",
            2048,
            *flags,
        )


def main():
    if sys.argv[1:2] == ["--train"]:
        torch.zeros(1).log_softmax(-1)
        print("MiB-before", resident())
        train.main(sys.argv[2:])
        return print("MiB", resident())
    if sys.argv[1:2] == ["--load"]:
        with distributed.join() as world:
            before = resident()
            distributed.load_sharded(sys.argv[2], Recipe(), world)
            return sys.stdout.write(
                f"MiB {resident() - before:.0f}\n"
            )  # whole, beside the other ranks' lines
    if sys.argv[1:] == ["formula"]:
        return print_formula()
    asked = sys.argv[1:] or ["pairs", "prompts", "sizes", "ranks"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if "pairs" in asked:
            print("| pairs | largest resident MiB |\n|---|---|")
            for n in (1_000, 10_000):
                make_pairs(folder / "pairs.jsonl", n, 12, 10)
                print(
                    f"| {n:,} | {trained(DEMO, folder / 'pairs.jsonl', '--max-length', 64):,.0f} |",
                    flush=True,
                )
        if "prompts" in asked:
            make_model("30m", folder / "30m")
            print("| tokens a prompt | largest resident MiB |\n|---|---|")
            for n in (100, 400):
                make_pairs(folder / "pairs.jsonl", 8, n, 300)
                peak = trained(
                    folder / "30m",
                    folder / "pairs.jsonl",
                    "--batch-size",
                    8,
                    "--micro-tokens",
                    2048,
                )
                print(f"| {n} | {peak:,.0f} |", flush=True)
        sizes = ("30m", "100m", "360m")
        if "sizes" in asked:
            print("| parameters | largest resident MiB | formula |\n|---|---|---|")
            make_pairs(folder / "pairs.jsonl", 8, 50, 200)
            for shape in sizes:
                make_model(shape, folder / shape)
                peak = trained(
                    folder / shape,
                    folder / "pairs.jsonl",
                    "--batch-size",
                    8,
                    "--micro-tokens",
                    1100,
                    "--recompute",
                )
                print(
                    f"| {shape} | {peak:,.0f} | {formula(SHAPES[shape](), 1100, 800):,.0f} |",
                    flush=True,
                )
        if "ranks" in asked:
            make_model(sizes[-1], folder / "large")
            print("| ranks | MiB a rank, to load |\n|---|---|")
            for n in (1, 2, 4):
                print(
                    f"| {n} | {child('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n, '--', __file__, '--load', folder / 'large'):,.0f} |",
                    flush=True,
                )


def formula(
    config,
    tokens: int,
    responses: int,
    ranks: int = 1,
    wide: int = 4,
    process: float = 500,
    offload: bool = False,
) -> float:
    """The README's formula for one rank with --recompute, MiB. wide: bytes of the compute dtype."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = weights - block * config.num_hidden_layers  # embedding, last norm and head
    kept = 0 if offload else 12 * weights / ranks
    gathered = (wide + 4) * (2 * block + root)
    inside = (
        wide
        * tokens
        * (config.hidden_size * (config.num_hidden_layers + 16) + 5 * config.intermediate_size)
    )
    logits = 2 * wide * responses * config.vocab_size
    return process + (kept + gathered + inside + logits) / 2**20


def print_formula():
    """What a GPU needs by the formula, in bf16: not measured."""
    print(
        "| shape | GPUs | --micro-tokens | a GPU needs, GB | with --offload |\n|---|---|---|---|---|"
    )
    for shape, ranks, tokens in (
        ("360m", 1, 2048),
        ("1b", 1, 8192),
        ("7b", 1, 2048),
        ("7b", 8, 2048),
        ("7b", 8, 8192),
        ("7b", 16, 8192),
    ):
        need = [
            formula(SHAPES[shape](), tokens, tokens * 3 // 4, ranks, 2, 1000, offload) * 2**20 / 1e9
            for offload in (False, True)
        ]
        print(f"| {shape} | {ranks} | {tokens} | {need[0]:.0f} | {need[1]:.0f} |")


if __name__ == "__main__":
    main()
