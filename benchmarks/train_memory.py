"""The memory of train.py: against pairs, the length of prompts, the size of the model, ranks.

    OMP_NUM_THREADS=1 python benchmarks/train_memory.py [pairs] [prompts] [sizes] [ranks]
    python benchmarks/train_memory.py formula      what a GPU needs by the formula, computed only

The formula is that of benchmarks/RESULTS.md. Each other figure is the largest resident size of a
process of its own that scores and trains (and exports), on the CPU in fp32: real runs of the stage.
pairs: the demo's model. prompts: 30M parameters, answers of 300 tokens, prompts of 100 and of 400.
sizes: one step of 8 pairs for three sizes with the demo's tokenizer, beside the formula. ranks:
what rank 0 of 1, 2 and 4 ranks needs to load the largest of them.
"""

import os
import random
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpu import SHAPES

import train
from spin.files import write_jsonl
from spin.model.weights import load_empty, read_weights
from spin.recipe import Recipe
from spin.run.ranks import process_group

DEMO = Path(__file__).resolve().parent.parent / "demo" / "theta0"
SIZES = ("30m", "100m", "360m")


def resident() -> float:
    """The largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- processes that are measured -------------------------------------------------------------


def child(*command) -> float:
    """Run a command of this Python's; the MiB that it prints last, the largest of its ranks."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("MiB ")]
    return max(map(float, found))


def trained(model: Path, pairs: Path, flags: str) -> float:
    """Train for one epoch in a process of its own; MiB."""
    with tempfile.TemporaryDirectory() as run:
        common = shlex.split("--train --recipe demo --iter 0 --epochs 1 --max-length 2048 --run")
        paths = [run, "--model", model, "--pairs", pairs]
        return child(__file__, *common, *paths, *flags.split())


def loaded(model: Path, ranks: int) -> float:
    """Load a model on so many ranks; MiB that the largest of them needs more than before."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {ranks} --".split()
    return child(*torchrun, __file__, "--load", model)


def train_here(flags: list[str]):
    """What trained() starts."""
    torch.zeros(1).log_softmax(-1)
    print("MiB-before", resident())
    train.main(flags)
    print("MiB", resident())


def load_here(name: str):
    """What loaded() starts."""
    recipe = Recipe()
    with process_group() as world:
        before = resident()
        model = load_empty(name, recipe)
        train.shard(model, recipe, world)
        read_weights(model, name, recipe, world)
        # in one write: whole, beside the other ranks' lines
        sys.stdout.write(f"MiB {resident() - before:.0f}\n")


# ---- what they are given ---------------------------------------------------------------------


def make_model(shape: str, folder: Path) -> Path:
    """Random weights of a shape, with the demo's tokenizer beside them; returns the folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    LlamaForCausalLM(SHAPES[shape]()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def make_pairs(path: Path, n: int, prompt: int, answer: int) -> Path:
    """n pairs of random letters; the demo's tokenizer makes a letter a token. Returns the path."""
    rng = random.Random(0)
    lengths = {"prompt": prompt, "real": answer, "generated": answer}
    rows = []
    for _ in range(n):
        rows.append({name: random_letters(rng, length) for name, length in lengths.items()})
    write_jsonl(path, rows)
    return path


def random_letters(rng: random.Random, number: int) -> str:
    return "".join(rng.choice("abdefiklmnoprstu") for _ in range(number))


# ---- the tables ------------------------------------------------------------------------------


def print_pairs(folder: Path):
    print("| pairs | largest resident MiB |\n|---|---|")
    for n in (1_000, 10_000):
        pairs = make_pairs(folder / "pairs.jsonl", n, 12, 10)
        print(f"| {n:,} | {trained(DEMO, pairs, '--max-length 64'):,.0f} |", flush=True)


def print_prompts(folder: Path):
    model = make_model("30m", folder / "30m")
    print("| tokens a prompt | largest resident MiB |\n|---|---|")
    for n in (100, 400):
        pairs = make_pairs(folder / "pairs.jsonl", 8, n, 300)
        peak = trained(model, pairs, "--batch-size 8 --micro-tokens 2048")
        print(f"| {n} | {peak:,.0f} |", flush=True)


def print_sizes(folder: Path):
    print("| parameters | largest resident MiB | formula |\n|---|---|---|")
    pairs = make_pairs(folder / "pairs.jsonl", 8, 50, 200)
    for shape in SIZES:
        model = make_model(shape, folder / shape)
        peak = trained(model, pairs, "--batch-size 8 --micro-tokens 1100 --recompute")
        need = formula(SHAPES[shape](), 1100, 800)
        print(f"| {shape} | {peak:,.0f} | {need:,.0f} |", flush=True)


def print_ranks(folder: Path):
    model = make_model(SIZES[-1], folder / "large")
    print("| ranks | MiB a rank, to load |\n|---|---|")
    for ranks in (1, 2, 4):
        print(f"| {ranks} | {loaded(model, ranks):,.0f} |", flush=True)


def formula(
    config,
    tokens: int,
    responses: int,
    ranks: int = 1,
    wide: int = 4,
    process: float = 500,
    offload: bool = False,
) -> float:
    """What one rank with --recompute needs, MiB (benchmarks/RESULTS.md).

    tokens: of a micro-batch; responses: those of answers among them. wide: bytes of the compute
    dtype. process: MiB of Python and torch."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = weights - block * config.num_hidden_layers  # embedding, last norm and head
    kept = 0 if offload else 12 * weights / ranks
    gathered = (wide + 4) * (2 * block + root)
    width = config.hidden_size * (config.num_hidden_layers + 16) + 5 * config.intermediate_size
    inside = wide * tokens * width
    logits = wide * responses * config.vocab_size  # their gradient takes their place
    return process + (kept + gathered + inside + logits) / 2**20


def print_formula():
    """What a GPU needs by the formula, in bf16: not measured."""
    print("| shape | GPUs | --micro-tokens | a GPU needs, GB | with --offload |")
    print("|---|---|---|---|---|")
    settings = [("360m", 1, 2048), ("1b", 1, 8192), ("7b", 1, 2048)]
    settings += [("7b", 8, 2048), ("7b", 8, 8192), ("7b", 16, 8192)]
    for shape, ranks, tokens in settings:
        config = SHAPES[shape]()
        cells = [shape, str(ranks), str(tokens)]
        for offload in (False, True):
            mib = formula(config, tokens, tokens * 3 // 4, ranks, 2, 1000, offload)
            cells.append(f"{mib * 2**20 / 1e9:.0f}")
        print(f"| {' | '.join(cells)} |")


def main():
    tables = {
        "pairs": print_pairs,
        "prompts": print_prompts,
        "sizes": print_sizes,
        "ranks": print_ranks,
    }
    asked = sys.argv[1:]
    if asked[:1] == ["--train"]:
        train_here(asked[1:])
    elif asked[:1] == ["--load"]:
        load_here(asked[1])
    elif asked == ["formula"]:
        print_formula()
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name, print_table in tables.items():
                if not asked or name in asked:
                    print_table(Path(folder))


if __name__ == "__main__":
    main()
