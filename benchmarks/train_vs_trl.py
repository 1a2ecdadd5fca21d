"""train.py beside TRL's DPOTrainer: losses, speed, memory.

    pip install -r requirements-dev.txt
    OMP_NUM_THREADS=2 python benchmarks/train_vs_trl.py [--steps 3] [--runs 3]
        [--lengths even|ultrachat|P,R,G] [--before DIR]

The same model, pairs, batches, optimizer and rates: a Llama-shaped model of 30M random parameters
with a vocabulary of 49,152; batches of 8 pairs; fp32 on the CPU; RMSProp. Pairs are of random
tokens: with --lengths even of 200 to 600 a half, 50 to 149 of them the prompt; of lengths as in
UltraChat; or all of P tokens of prompt and R and G of answers. --before: a checkout of an earlier
commit, which runs beside. Every run is a process of its own, in turns.

SPIN's loss is DPO's, with θ_0 as the reference and λ for β, so the losses must agree. TRL runs as
it comes, with reference scores computed beforehand, and with those and gradient accumulation, which
is its best here. The time is that of the steps and of scoring the reference; memory is the largest
resident size of the process.
"""

import argparse
import itertools
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpu
from train_gpu import SHAPES, flops, matmul_rate, pair_of

import train
from spin.data.pairs import batches, share_prompts
from spin.model.packing import packed
from spin.model.weights import load_empty, read_weights
from spin.recipe import Recipe
from spin.run.folders import Iteration
from spin.run.ranks import process_group

BEFORE = "ours before"
SYSTEMS = ("ours", "trl", "trl, scores beforehand", "trl, scores beforehand, 4 × 2 pairs")
BATCH = 8


def make_pairs(n: int, vocabulary: int, prompt=(50, 150), half=(200, 601)) -> list[dict]:
    """n pairs of random ids.

    A prompt's tokens, and those of prompt and answer together, are uniform in these ranges."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(n):
        x = rng.integers(3, vocabulary, rng.integers(*prompt))
        pairs.append(pair_of(i, x, rng.integers(*half, 2) - len(x), rng, vocabulary))
    return pairs


def pairs_of_lengths(lengths: str, n: int, vocabulary: int) -> list[dict]:
    """n pairs of random ids; lengths as for --lengths."""
    if lengths == "even":
        return make_pairs(n, vocabulary)
    if lengths == "ultrachat":
        return train_gpu.make_pairs(n, vocabulary)
    p, r, g = map(int, lengths.split(","))
    rng = np.random.default_rng(0)
    return [pair_of(i, rng.integers(3, vocabulary, p), (r, g), rng, vocabulary) for i in range(n)]


def ours(model_dir: str, pairs, recipe, out: Path) -> tuple[list[float], float]:
    """(losses, seconds) of one epoch, by train.py's own functions."""

    with process_group() as world:
        model = load_empty(model_dir, recipe)
        train.shard(model, recipe, world)
        read_weights(model, model_dir, recipe, world)
        optimizer = torch.optim.RMSprop(
            model.parameters(), lr=0.0, alpha=recipe.alpha, foreach=False
        )
        begun = time.perf_counter()
        with packed(model, recipe.attention):
            share_prompts(pairs)
            opponent = train.score_opponent(model, pairs, recipe, 0, world)
            scored = time.perf_counter()
            train.train(model, optimizer, pairs, opponent, recipe, Iteration(0, out, {}), world)
        done = time.perf_counter()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    rate = flops(model.config, blocks, pairs) / (done - scored)
    share = rate / matmul_rate(world.device, torch.float32, 2048)
    print(f"train.py reaches {share:.0%} of a large matrix product", file=sys.stderr)
    return [row["loss"] for row in rows], done - begun


def trl(
    model_dir: str, pairs, recipe, out: Path, beforehand: bool, size: int, texts=None
) -> tuple[list[float], float]:
    """(losses, seconds) of one epoch of TRL's DPOTrainer over the same batches.

    size: pairs in a pass. texts: the pairs as prompt, chosen and rejected, which TRL then tokenises
    itself with the model's own tokenizer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    order = list(itertools.chain(*batches(len(pairs), recipe, 0, 0)))
    if texts:
        kind = DPOTrainer
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        rows = [texts[i] for i in order]
    else:
        kind = trainer_on_ids()
        tokenizer = any_tokenizer()
        rows = [trl_row(pairs[i]) for i in order]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = None
    if not beforehand:
        reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    args = trl_config(recipe, out, beforehand, size)
    optimizers = optimizer_and_schedule(model, recipe, len(pairs) // recipe.batch_size)
    begun = time.perf_counter()
    trainer = kind(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=optimizers,
    )
    trainer.train()
    seconds = time.perf_counter() - begun
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row], seconds


def trainer_on_ids():
    """DPOTrainer, for pairs that are token ids already."""
    from trl import DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    return OnIds


def any_tokenizer():
    """TRL wants one, though it has nothing to do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "</s>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def trl_row(pair: dict) -> dict:
    """A pair as TRL's trainer has it once it is tokenised."""
    real, mask = pair["real"]
    generated, generated_mask = pair["generated"]
    return {
        "prompt_ids": real[mask == 0].tolist(),
        "chosen_ids": real[mask == 1].tolist(),
        "rejected_ids": generated[generated_mask == 1].tolist(),
    }


def optimizer_and_schedule(model, recipe, steps: int):
    """train.py's own, over so many steps."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=recipe.at(0).lr, alpha=recipe.alpha)

    def share_of_peak(step: int) -> float:
        return train.learning_rate(step, steps, 1.0, recipe.warmup)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def trl_config(recipe, out: Path, beforehand: bool, size: int):
    """One epoch on the CPU, in the order of the rows; no checkpoints, a loss for each step."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(out),
        beta=recipe.at(0).lam,
        max_length=None,
        num_train_epochs=1,
        max_grad_norm=recipe.clip,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=recipe.batch_size // size,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=beforehand,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        logging_strategy="steps",
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def run_here(system: str, folder: str):
    """One run, in this process; prints its figures as JSON. folder: holds model and pairs."""
    recipe = Recipe(
        batch_size=BATCH,
        epochs=1,
        lr=(5e-6,),
        micro_tokens=900,  # as many answers a pass as 1024 with each prompt twice
        recompute=False,
        checkpoint_every=10**6,
    )
    pairs = pickle.loads((Path(folder) / "pairs").read_bytes())
    with tempfile.TemporaryDirectory() as out:
        if system == "ours":
            losses, seconds = ours(folder, pairs, recipe, Path(out))
        else:
            beforehand = "beforehand" in system
            size = 2 if "4 ×" in system else BATCH
            losses, seconds = trl(folder, pairs, recipe, Path(out), beforehand, size)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"losses": losses, "pairs_per_s": len(pairs) / seconds, "MiB": mib}))


# What runs in a checkout of an earlier commit: its own `ours`, on the same pairs.
IN_CHECKOUT = """
import json, pickle, resource, sys, tempfile
from pathlib import Path
checkout, folder = sys.argv[1:]
sys.path.insert(0, checkout + "/benchmarks")
import train_vs_trl as before
knobs = {"batch_size": before.BATCH, "epochs": 1, "lr": (5e-6,), "micro_tokens": 1024}
recipe = before.Recipe(**knobs, recompute=False, checkpoint_every=10**6)
pairs = pickle.loads((Path(folder) / "pairs").read_bytes())
with tempfile.TemporaryDirectory() as out:
    losses, seconds = before.ours(folder, pairs, recipe, Path(out))
mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"losses": losses, "pairs_per_s": len(pairs) / seconds, "MiB": mib}))
"""


def run_apart(system: str, folder: str, checkout: str) -> dict:
    """One run, in a process of its own; its figures."""
    command = [__file__, "--child", system, folder]
    if system == BEFORE:
        command = ["-c", IN_CHECKOUT, checkout, folder]
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: dict[str, list[dict]]):
    """results: the figures of each system's runs."""
    print(
        "| | pairs/s | ours is faster by | largest resident MiB | ours takes | losses |\n"
        "|---|---|---|---|---|---|"
    )
    speed = {}
    mib = {}
    for system, runs in results.items():
        speed[system] = statistics.median(run["pairs_per_s"] for run in runs)
        mib[system] = statistics.median(run["MiB"] for run in runs)
    for system, runs in results.items():
        faster = speed["ours"] / speed[system]
        takes = mib["ours"] / mib[system]
        losses = " ".join(f"{x:.6f}" for x in runs[0]["losses"])
        print(
            f"| {system} | {speed[system]:.3f} | {faster:.2f} | {mib[system]:,.0f} | "
            f"{takes:.2f} | {losses} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    about = f"steps of {BATCH} pairs (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=3, help=about)
    about = "runs of each, in turns; medians are shown (default: %(default)s)"
    parser.add_argument("--runs", type=int, default=3, help=about)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--lengths", default="even")
    parser.add_argument("--before", default="", metavar="DIR")
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_here(*args.child)
    from transformers import LlamaForCausalLM

    systems = [*args.systems, *([BEFORE] if args.before else [])]
    results = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(SHAPES["30m"]()).save_pretrained(folder)
        vocabulary = SHAPES["30m"]().vocab_size
        pairs = pairs_of_lengths(args.lengths, BATCH * args.steps, vocabulary)
        (Path(folder) / "pairs").write_bytes(pickle.dumps(pairs))
        for _ in range(args.runs):
            for system in systems:
                results[system].append(run_apart(system, folder, args.before))
    how = f"{args.steps} steps, lengths {args.lengths}, medians of {args.runs}"
    print(f"{torch.get_num_threads()} threads, {how}")
    print_table(results)


if __name__ == "__main__":
    main()
