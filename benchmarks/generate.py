"""Sampling: the authors' way against ours, in one run, on the same prompts, model and answer lengths; and its memory.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--shape demo|30m|7b] [--prompts 512] [--slots 64] [--median 100] [--engines …]
    OMP_NUM_THREADS=1 python benchmarks/generate.py --memory 50000

Authors' way: batches of 16 in the order of the data, padded on the left, model.generate with do_sample, at most 256 new
tokens; a batch waits for its longest answer. Ours: the engines of sampling.py on all prompts at once, longest first as in
generate.py. A random model ends at random, so lengths are set: log-normal (--median tokens, sigma 0.8, cut at 256). The EOS
is forced there and forbidden before, in both by one write a step into the logits' EOS column; `paged` lets no processor
know its rows, and gets each length as its request's own limit. Prompts: random tokens, log-normal too (median 64, at most 512).
`idle`: share of slots × decode steps without a token of an answer. Medians of --repeats, interleaved. On a GPU also the limit: the
time in which a copy moves the weights once a step of full slots, and each token's keys and values, and the share reached.
--memory: generate.py itself on N short prompts with the demo model, and its resident memory as it goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessorList,
    logging,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from spin import sampling

SHAPES = {
    "demo": dict(
        vocab_size=88,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    ),
    "30m": dict(
        vocab_size=49152,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
EOS, LONGEST = 2, 256


def authors(model, prompts, lengths, slots):
    """-> (answers' lengths, decode steps, slots)"""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=LONGEST, eos_token_id=EOS, pad_token_id=EOS
    )
    answers, steps = [], 0
    for i in range(0, len(prompts), 16):
        batch, last = (
            prompts[i : i + 16],
            torch.tensor(lengths[i : i + 16], device=model.device) - 1,
        )
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device
        )

        def end(ids, scores):
            scores[:, EOS] = torch.where(last == ids.shape[1] - width, 1e9, -torch.inf)
            return scores

        out = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([end]),
        )
        answers += [len(sampling.until(EOS, row)[0]) for row in out[:, width:].tolist()]
        steps += out.shape[1] - width
    return answers, steps, 16


def generate(model, prompts, lengths, slots):
    """Ours; the uniform number 2, which does not occur otherwise, stands for the end."""
    u, steps, choose = np.random.default_rng(0).random((len(prompts), LONGEST)), [], sampling.choose
    u[np.arange(len(prompts)), np.asarray(lengths) - 1] = 2

    def forced(logits, u, *rest):
        steps.append(1)
        logits[:, EOS] = torch.where(u == 2, 1e9, -torch.inf)
        return choose(
            logits, u.clamp(max=0.5), *rest
        )  # where it ends, any u gives the EOS; elsewhere the token does not matter

    sampling.choose = forced
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = sampling.sample(
        model, [prompts[i] for i in order], EOS, LONGEST, u[order], slots=slots
    )
    sampling.choose = choose
    return [n for _, n in sorted(zip(order, [len(ids) for ids, _ in answers]))], len(steps), slots


def paged(model, prompts, lengths, slots):
    """generate_batch; its steps are not told."""
    limit, add = (
        {tuple(p): n for p, n in zip(prompts, lengths)},
        ContinuousBatchingManager.add_request,
    )
    ContinuousBatchingManager.add_request = lambda self, input_ids, **rest: add(
        self, input_ids, **{**rest, "max_new_tokens": limit[tuple(input_ids)]}
    )
    answers = sampling.paged(
        model, prompts, -1, LONGEST, np.random.default_rng(0).random((1, 1)), slots=slots
    )
    ContinuousBatchingManager.add_request = add
    return [len(ids) for ids, _ in answers], None, slots


def bandwidth(device) -> float:
    """Bytes read and written in a second by a copy of 1 GiB."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * x.numel() / statistics.median(times)


def least_seconds(model, prompts, lengths, slots) -> float:
    """Reading the weights in each of tokens / slots steps, and at each token the keys and values before it."""
    c = model.config
    of_a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    seen = sum(n * len(p) + n * (n - 1) / 2 for p, n in zip(prompts, lengths))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (sum(lengths) / slots * weights + seen * of_a_token) / bandwidth(model.device)


def side_by_side(args):
    cuda = torch.cuda.is_available()
    if args.shape == "7b" and not cuda:
        sys.exit("error: the 7b shape is for a GPU")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[args.shape]), dtype=torch.bfloat16 if cuda else torch.float32
        ).eval()
    chance = np.random.default_rng(1)
    draw = lambda median, most: (
        np.clip(np.rint(chance.lognormal(np.log(median), 0.8, args.prompts)), 1, most)
        .astype(int)
        .tolist()
    )  # noqa: E731
    lengths, prompts = (
        draw(args.median, LONGEST),
        [chance.integers(3, 80, n).tolist() for n in draw(64, 512)],
    )
    least = least_seconds(model, prompts, lengths, args.slots) if cuda else None
    names = args.engines or ["authors", "generate"] + ["paged"] * cuda
    seconds, idle = {name: [] for name in names}, {}
    for _ in range(args.repeats):
        for name in names:
            begun = time.perf_counter()
            answers, steps, slots = globals()[name](model, prompts, lengths, args.slots)
            seconds[name].append(time.perf_counter() - begun)
            assert answers == lengths
            idle[name] = f"{1 - sum(lengths) / (slots * steps):.0%}" if steps else "–"
    print(
        f"{args.shape}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {model.dtype}, {args.prompts} prompts of "
        f"{np.mean([*map(len, prompts)]):.0f} tokens on average, {sum(lengths)} answer tokens ({np.mean(lengths):.0f} on average, "
        f"{np.mean(np.array(lengths) == LONGEST):.0%} at the limit)"
    )
    print(
        "| way | slots | tokens/s | slowest, fastest run | to the authors' | idle | of the bandwidth limit |\n|---|---|---|---|---|---|---|"
    )
    rate = {name: sum(lengths) / statistics.median(times) for name, times in seconds.items()}
    for name in names:
        spread = ", ".join(f"{sum(lengths) / f(seconds[name]):,.0f}" for f in (max, min))
        reached = f"{least * rate[name] / sum(lengths):.0%}" if cuda else "not run"
        print(
            f"| {name} | {16 if name == 'authors' else args.slots} | {rate[name]:,.0f} | {spread} | {rate[name] / rate[names[0]]:.2f} | "
            f"{idle[name]} | {reached} |"
        )


def memory(args):
    """RSS of generate.py, read from outside."""
    chance = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data.jsonl", Path(folder) / "run"
        words = ["".join(chance.choice([*"abdeiklnoprstu"], 6)) for _ in range(args.memory)]
        data.write_text(
            "".join(
                json.dumps({"prompt": f"Spell {word} {i}", "response": word}) + "\n"
                for i, word in enumerate(words)
            )
        )
        process = subprocess.Popen(
            [
                sys.executable,
                "generate.py",
                "--recipe",
                "demo",
                "--iter",
                "0",
                "--data",
                str(data),
                "--run",
                str(run),
                "--num-prompts",
                str(args.memory),
            ],
            cwd=REPO,
        )
        rows, begun = [], time.perf_counter()
        while process.poll() is None:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1] or 0)
            rows.append(
                (
                    time.perf_counter() - begun,
                    len([*run.glob("iter0/generated.part/*.jsonl")]),
                    pages * 4096 / 2**20,
                )
            )
            time.sleep(0.2)
        assert process.returncode == 0
        with open(run / "iter0" / "generated.jsonl") as file:
            assert sum(1 for _ in file) == args.memory
    print("| seconds | chunks written | MiB |\n|---|---|---|")
    sampling = [row for row in rows if row[1]]
    for row in sampling[:: max(1, len(sampling) // 10)] + rows[-1:]:
        print(f"| {row[0]:.0f} | {row[1]} | {row[2]:.0f} |")
    print(
        f"largest: {max(row[2] for row in rows):.0f} MiB; before the first chunk {max(row[2] for row in rows if not row[1]):.0f} MiB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--median", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=["authors", "generate", "paged"])
    parser.add_argument("--memory", type=int, metavar="N")
    args = parser.parse_args()
    memory(args) if args.memory else side_by_side(args)


if __name__ == "__main__":
    main()
