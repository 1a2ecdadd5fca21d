"""Sampling: the authors' way against ours, in one run; and the memory of generate.py.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--shape demo|30m|7b] [--prompts 512]
                                  [--slots 64] [--median 100] [--repeats 3]
    OMP_NUM_THREADS=1 python benchmarks/generate.py --memory 50000

Both have the same prompts, model and answer lengths. Authors' way: batches of 16 in the order of
the data, padded on the left, model.generate with do_sample, at most 256 new tokens; a batch waits
for its longest answer. Ours: `sample` of spin/sampling/engines.py on all prompts at once, longest
first as in generate.py.

A random model ends at random, so lengths are set: log-normal (--median tokens, sigma 0.8, cut at
256). The EOS is forced there and forbidden before, in both by one write per step into the logits'
EOS column. Prompts: random tokens, log-normal too (median 64, at most 512).

`idle`: share of slots × decode steps without a token of an answer. Medians of --repeats,
interleaved. On a GPU also the limit: the time in which a copy moves the weights once per step of
full slots, and each token's keys and values, and the share reached.
--memory: generate.py itself on N short prompts with the demo model, and its resident memory as it
goes.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpu import llama, wait_for_device

from spin.model.weights import compute_dtype
from spin.run.ranks import device_of_rank
from spin.sampling import engines
from spin.sampling.engines import cut_at_eos, sample

REPO = Path(__file__).resolve().parent.parent
SHAPES = {  # the numbers of train_gpu.llama
    "demo": (64, 128, 3, 4, 4, 88, False),
    "30m": (384, 1024, 7, 6, 2, 49152, True),
    "7b": (4096, 14336, 32, 32, 8, 32000, False),
}
EOS = 2
LONGEST = 256
AUTHORS_BATCH = 16


# ---- the ways: each returns (the answers' lengths, decode steps, slots) ----------------------


def authors(model, prompts, lengths, slots):
    """model.generate in batches that wait for their longest answer."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=LONGEST, eos_token_id=EOS, pad_token_id=EOS
    )
    answers = []
    steps = 0
    for i in range(0, len(prompts), AUTHORS_BATCH):
        batch = prompts[i : i + AUTHORS_BATCH]
        width = max(map(len, batch))
        padded = [[0] * (width - len(p)) + p for p in batch]
        real = [[0] * (width - len(p)) + [1] * len(p) for p in batch]
        out = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(real, device=model.device),
            generation_config=config,
            logits_processor=ending_at(lengths[i : i + AUTHORS_BATCH], width, model.device),
        )
        answers += [len(cut_at_eos([EOS], row)[0]) for row in out[:, width:].tolist()]
        steps += out.shape[1] - width
    return answers, steps, AUTHORS_BATCH


def ending_at(lengths, width: int, device) -> LogitsProcessorList:
    """What ends the answers of a batch at their lengths, behind prompts of `width` columns."""
    last = torch.tensor(lengths, device=device) - 1

    def force(ids, scores):
        scores[:, EOS] = torch.where(last == ids.shape[1] - width, 1e9, -torch.inf)
        return scores

    return LogitsProcessorList([force])


def generate(model, prompts, lengths, slots):
    """Ours; the uniform number 2, which does not occur otherwise, stands for the end."""
    uniform = np.random.default_rng(0).random((len(prompts), LONGEST))
    uniform[np.arange(len(prompts)), np.asarray(lengths) - 1] = 2
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pick_token = engines.pick_token
    steps = 0

    def forced(logits, numbers, *rest):
        nonlocal steps
        steps += 1
        logits[:, EOS] = torch.where(numbers == 2, 1e9, -torch.inf)
        # where it ends, any number gives the EOS; elsewhere the token does not matter
        return pick_token(logits, numbers.clamp(max=0.5), *rest)

    with mock.patch.object(engines, "pick_token", forced):
        longest_first = [prompts[i] for i in order]
        found = sample(model, longest_first, EOS, LONGEST, uniform[order], slots=slots)
    answers = [0] * len(prompts)
    for i, (ids, _) in zip(order, found, strict=True):
        answers[i] = len(ids)
    return answers, steps, slots


WAYS = {"authors": authors, "generate": generate}


# ---- the limit of a GPU ----------------------------------------------------------------------


def bandwidth(device) -> float:
    """Bytes read and written in a second by a copy of 1 GiB."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(20):
        wait_for_device(device)
        begun = time.perf_counter()
        y.copy_(x)
        wait_for_device(device)
        times.append(time.perf_counter() - begun)
    return 2 * x.numel() / statistics.median(times)


def least_seconds(model, prompts, lengths, slots) -> float:
    """Reading the weights in each of tokens / slots steps, and at each token the keys and values
    before it."""
    c = model.config
    of_a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    seen = 0
    for prompt, n in zip(prompts, lengths, strict=True):
        seen += n * len(prompt) + n * (n - 1) / 2
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (sum(lengths) / slots * weights + seen * of_a_token) / bandwidth(model.device)


def share_of_bandwidth(model, number: int, slots: int = 64) -> tuple[float, float]:
    """Ours on `number` prompts: (tokens a second, the share of this limit that they reach)."""
    prompts, lengths = draw(number)
    generate(model, prompts, lengths, slots)  # the first time is slower
    begun = time.perf_counter()
    answers, *_ = generate(model, prompts, lengths, slots)
    seconds = time.perf_counter() - begun
    assert answers == lengths
    return sum(lengths) / seconds, least_seconds(model, prompts, lengths, slots) / seconds


# ---- side by side ----------------------------------------------------------------------------


def random_model(shape: str):
    """On a GPU, in bf16, where there is one."""
    device = device_of_rank(0)
    torch.manual_seed(0)
    dtype = compute_dtype("auto", device)
    with device:
        return AutoModelForCausalLM.from_config(llama(*SHAPES[shape]), dtype=dtype).eval()


def draw_lengths(chance, median: float, most: int, number: int) -> list[int]:
    """Log-normal, between 1 and most."""
    drawn = np.rint(chance.lognormal(np.log(median), 0.8, number))
    return np.clip(drawn, 1, most).astype(int).tolist()


def draw(number: int, median: float = 100) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how long their answers will be."""
    chance = np.random.default_rng(1)
    lengths = draw_lengths(chance, median, LONGEST, number)
    of_prompts = draw_lengths(chance, 64, 512, number)
    return [chance.integers(3, 80, n).tolist() for n in of_prompts], lengths


def side_by_side(args):
    """Run both ways in turns on the same prompts, and print the table."""
    cuda = torch.cuda.is_available()
    if args.shape == "7b" and not cuda:
        sys.exit("error: the 7b shape is for a GPU")
    logging.set_verbosity_error()
    model = random_model(args.shape)
    prompts, lengths = draw(args.prompts, args.median)
    least = least_seconds(model, prompts, lengths, args.slots) if cuda else None
    seconds = {name: [] for name in WAYS}
    idle = {}
    for _ in range(args.repeats):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            answers, steps, slots = way(model, prompts, lengths, args.slots)
            seconds[name].append(time.perf_counter() - begun)
            assert answers == lengths
            idle[name] = f"{1 - sum(lengths) / (slots * steps):.0%}"
    print_head(args.shape, model, prompts, lengths)
    print_rows(seconds, idle, sum(lengths), args.slots, least)


def print_head(shape: str, model, prompts, lengths):
    """What both have in common."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{shape}: {parameters:.2f}M parameters, {model.dtype}, {len(prompts)} prompts of "
        f"{np.mean([*map(len, prompts)]):.0f} tokens on average, {sum(lengths)} answer tokens "
        f"({np.mean(lengths):.0f} on average, {np.mean(np.array(lengths) == LONGEST):.0%} "
        "at the limit)"
    )


def print_rows(seconds: dict[str, list[float]], idle: dict, tokens: int, slots: int, least):
    """The table. least: seconds at the limit of a GPU, or None."""
    print(
        "| way | slots | tokens/s | slowest, fastest run | to the authors' | idle | "
        "of the bandwidth limit |\n|---|---|---|---|---|---|---|"
    )
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(rate.values()))
    for name, times in seconds.items():
        spread = f"{tokens / max(times):,.0f}, {tokens / min(times):,.0f}"
        reached = "not run" if least is None else f"{least * rate[name] / tokens:.0%}"
        print(
            f"| {name} | {AUTHORS_BATCH if name == 'authors' else slots} | {rate[name]:,.0f} | "
            f"{spread} | {rate[name] / first:.2f} | {idle[name]} | {reached} |"
        )


# ---- memory ----------------------------------------------------------------------------------


def memory(prompts: int):
    """The resident memory of generate.py, read from outside."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        run = Path(folder) / "run"
        write_prompts(data, prompts)
        rows = watch(data, run, prompts)
        with open(run / "iter0" / "generated.jsonl") as file:
            assert sum(1 for _ in file) == prompts
    print("| seconds | chunks written | MiB |\n|---|---|---|")
    sampling = [row for row in rows if row[1]]
    for seconds, chunks, mib in sampling[:: max(1, len(sampling) // 10)] + rows[-1:]:
        print(f"| {seconds:.0f} | {chunks} | {mib:.0f} |")
    largest = max(mib for _, _, mib in rows)
    before = max(mib for _, chunks, mib in rows if not chunks)
    print(f"largest: {largest:.0f} MiB; before the first chunk {before:.0f} MiB")


def write_prompts(path: Path, number: int):
    """So many short prompts, all different."""
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice([*"abdeiklnoprstu"], 6)) for _ in range(number)]
    with open(path, "w") as file:
        for i, word in enumerate(words):
            file.write(json.dumps({"prompt": f"Spell {word} {i}", "response": word}) + "\n")


def watch(data: Path, run: Path, prompts: int) -> list[tuple[float, int, float]]:
    """Run generate.py; (seconds, chunks there, MiB) five times a second."""
    command = [sys.executable, *shlex.split("generate.py --recipe demo --iter 0 --num-prompts")]
    process = subprocess.Popen(
        [*command, str(prompts), "--data", str(data), "--run", str(run)], cwd=REPO
    )
    rows = []
    begun = time.perf_counter()
    while process.poll() is None:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1] or 0)
        chunks = len([*run.glob("iter0/generated.part/*.jsonl")])
        rows.append((time.perf_counter() - begun, chunks, pages * 4096 / 2**20))
        time.sleep(0.2)
    assert process.returncode == 0
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--median", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="N")
    args = parser.parse_args()
    if args.memory:
        memory(args.memory)
    else:
        side_by_side(args)


if __name__ == "__main__":
    main()
