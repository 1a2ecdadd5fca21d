"""train.py beside TRL's DPOTrainer: the same model, pairs, batches, optimizer and rates; losses, speed, memory.

    pip install -r requirements-dev.txt
    OMP_NUM_THREADS=2 python benchmarks/train_vs_trl.py [--steps 3] [--runs 3]

A Llama-shaped model of 30M random parameters with a vocabulary of 49,152; pairs of 200 to 600 tokens a half; batches of 8
pairs; fp32 on the CPU; RMSProp. Every run is a process of its own, in turns. SPIN's loss is DPO's, with θ_0 as the
reference and λ for β, so the losses must agree. TRL runs as it comes, with reference scores computed beforehand,
and with those and gradient accumulation, which is its best here. Tokens are real ones, padding not counted; the time is
that of the steps and of scoring the reference; memory is the largest resident size of the process.
"""

import argparse
import json
import os
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
sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_gpu import SHAPES, flops, matmul_rate

import train
from spin import distributed
from spin.packing import packed
from spin.recipe import Recipe

SYSTEMS = ("ours", "trl", "trl, scores beforehand", "trl, scores beforehand, 4 × 2 pairs")
BATCH = 8


def make_pairs(n: int, vocabulary: int, prompt=(50, 150), half=(200, 601)) -> list[dict]:
    """n pairs of random ids; a prompt's tokens, and those of prompt and answer together, are uniform in these ranges."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(n):
        x, lengths = rng.integers(3, vocabulary, rng.integers(*prompt)), rng.integers(*half, 2)
        halves = [
            np.concatenate([x, rng.integers(3, vocabulary, n - len(x))]).astype(np.int32)
            for n in lengths
        ]
        real, generated = ((ids, (np.arange(len(ids)) >= len(x)).astype(np.int8)) for ids in halves)
        pairs.append({"id": i, "iter": 0, "index": i, "real": real, "generated": generated})
    return pairs


def ours(model_dir, pairs, recipe, out) -> tuple[list[float], float]:
    """(losses, seconds) of one epoch, by train.py's own functions."""
    with distributed.join() as world:
        model = distributed.load_sharded(model_dir, recipe, world)
        optimizer = torch.optim.RMSprop(
            model.parameters(), lr=0.0, alpha=recipe.alpha, foreach=False
        )
        begun = time.perf_counter()
        with packed(model, recipe.attention):
            opponent = train.score_opponent(model, pairs, recipe, 0, world)
            scored = time.perf_counter()
            train.train(model, optimizer, pairs, opponent, recipe, 0, world, out, {}, 0)
        seconds = time.perf_counter() - begun
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    rate = flops(model.config, blocks, pairs) / (begun + seconds - scored)
    print(
        f"train.py reaches {rate / matmul_rate(world.device, torch.float32, 2048):.0%} of a large matrix product",
        file=sys.stderr,
    )
    return [row["loss"] for row in rows], seconds


def trl(
    model_dir, pairs, recipe, out, beforehand: bool, size: int, texts=None
) -> tuple[list[float], float]:
    """(losses, seconds) of one epoch of TRL's DPOTrainer over the same batches.

    texts: the pairs as prompt, chosen and rejected, which TRL then tokenises itself with the model's own tokenizer.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it is tokenised already

    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "</s>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    order, steps = sum(train.batches(len(pairs), recipe, 0, 0), []), len(pairs) // recipe.batch_size
    split = lambda half: (half[0][half[1] == 0].tolist(), half[0][half[1] == 1].tolist())  # noqa: E731
    rows = [
        dict(
            zip(
                ("prompt_ids", "chosen_ids", "rejected_ids"),
                (*split(pairs[i]["real"]), split(pairs[i]["generated"])[1]),
            )
        )
        for i in order
    ]
    if texts:
        OnIds, tokenizer, rows = (
            DPOTrainer,
            AutoTokenizer.from_pretrained(model_dir),
            [texts[i] for i in order],
        )  # noqa: N806
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = (
        None if beforehand else AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    )
    optimizer = torch.optim.RMSprop(model.parameters(), lr=recipe.lr[0], alpha=recipe.alpha)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: train.learning_rate(s, steps, 1.0, recipe.warmup)
    )
    args = DPOConfig(
        output_dir=str(out),
        beta=recipe.lam[0],
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
    begun = time.perf_counter()
    trainer = OnIds(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    seconds = time.perf_counter() - begun
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row], seconds


def child(system: str, folder: Path, steps: int):
    recipe = Recipe(
        batch_size=BATCH,
        epochs=1,
        lr=(5e-6,),
        micro_tokens=1024,
        recompute=False,
        checkpoint_every=10**6,
    )
    pairs = make_pairs(BATCH * steps, SHAPES["30m"]().vocab_size)
    with tempfile.TemporaryDirectory() as out:
        if system == "ours":
            losses, seconds = ours(str(folder), pairs, recipe, Path(out))
        else:
            losses, seconds = trl(
                str(folder),
                pairs,
                recipe,
                Path(out),
                "beforehand" in system,
                2 if "4 ×" in system else BATCH,
            )
    tokens = sum(len(pair[half][0]) for pair in pairs for half in ("real", "generated"))
    print(
        json.dumps(
            {
                "losses": losses,
                "tokens_per_s": tokens / seconds,
                "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of 8 pairs (default: %(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="runs of each, in turns; medians are shown (default: %(default)s)",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), args.steps)
    from transformers import LlamaForCausalLM

    results = {system: [] for system in args.systems}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(SHAPES["30m"]()).save_pretrained(folder)
        for _ in range(args.runs):
            for system in args.systems:
                done = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--steps",
                        str(args.steps),
                        "--child",
                        system,
                        folder,
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
                results[system].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{torch.get_num_threads()} threads, {args.steps} steps, medians of {args.runs}\n"
        "| | tokens/s | ours is faster by | largest resident MiB | ours takes | losses |\n|---|---|---|---|---|---|"
    )
    middle = {
        s: {k: statistics.median(run[k] for run in runs) for k in ("tokens_per_s", "MiB")}
        for s, runs in results.items()
    }
    for system, m in middle.items():
        print(
            f"| {system} | {m['tokens_per_s']:.0f} | {middle['ours']['tokens_per_s'] / m['tokens_per_s']:.1f} | {m['MiB']:,.0f} | "
            f"{middle['ours']['MiB'] / m['MiB']:.2f} | {' '.join(f'{x:.6f}' for x in results[system][0]['losses'])} |"
        )


if __name__ == "__main__":
    main()
