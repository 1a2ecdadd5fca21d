"""Sampling: the authors' way against ours and vLLM, in one run; and the memory of generate.py.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--shape demo|30m|7b] [--prompts 512]
                                  [--slots 64] [--median 100] [--repeats 3] [--longest 256]
    OMP_NUM_THREADS=1 python benchmarks/generate.py --model DIR --engines generate vllm
    OMP_NUM_THREADS=1 python benchmarks/generate.py --memory 50000
    OMP_NUM_THREADS=1 python benchmarks/generate.py --model DIR --distance 256

All have the same prompts, model and answer lengths. Authors' way: batches of 16 in the order of
the data, padded on the left, model.generate with do_sample, at most 256 new tokens; a batch waits
for its longest answer. Ours: `sample` of spin/sampling/engines.py on all prompts at once, longest
first as in generate.py.

A random model ends at random, so lengths are set: log-normal (--median tokens, sigma 0.8, cut at
256). The EOS is forced there and forbidden before, in both by one write per step into the logits'
EOS column; vLLM gets the length as max_tokens. It runs where vLLM is installed, and its engine is
that of generate.py. Prompts: random tokens, log-normal too (median 64, at most 512).

`idle`: share of slots × decode steps without a token of an answer. Medians of --repeats,
interleaved. On a GPU also the limit: the time in which a copy moves the weights once per step of
full slots, and each token's keys and values, and the share reached.
--distance: the log-probabilities that vLLM and our own loop give N answers while generate.py
samples them, against train.py's opponent.jsonl, which scores them again.
--memory: generate.py itself on N short prompts with the demo model, and its resident memory as it
goes.
"""

import argparse
import itertools
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

from spin.files import read_jsonl
from spin.model.weights import compute_dtype
from spin.recipe import Recipe
from spin.run.ranks import device_of_rank
from spin.sampling import engines, vllm_engine
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


def vllm(engine, prompts, lengths, slots):
    """generate.py's --engine vllm, whose decode steps are not known."""
    knobs = {"ignore_eos": True, "detokenize": False}
    texts = [{"prompt_token_ids": ids} for ids in prompts]
    params = []
    for seed, length in enumerate(lengths):
        params.append(vllm_engine.load_vllm().SamplingParams(**knobs, seed=seed, max_tokens=length))
    found = engine.generate(texts, params, use_tqdm=False)
    return [len(request.outputs[0].token_ids) for request in found], None, slots


WAYS = {"authors": authors, "generate": generate, "vllm": vllm}


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


def random_model(shape: str, dtype: str = "auto"):
    """On a GPU, in bf16, where there is one."""
    device = device_of_rank(0)
    torch.manual_seed(0)
    dtype = compute_dtype(dtype, device)
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
    """Run the ways in turns on the same prompts, and print the table."""
    cuda = torch.cuda.is_available()
    if args.shape == "7b" and not cuda:
        sys.exit("error: the 7b shape is for a GPU")
    logging.set_verbosity_error()
    if args.model:
        device = device_of_rank(0)
        dtype = compute_dtype(args.dtype, device)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    else:
        model = random_model(args.shape, args.dtype)
    engines = dict.fromkeys(args.engines, model)
    if "vllm" in args.engines:
        engines["vllm"] = vllm_beside(model, args)
    prompts, lengths = draw(args.prompts, args.median)
    least = least_seconds(model, prompts, lengths, args.slots) if cuda else None
    seconds = {name: [] for name in engines}
    idle = {}
    for _ in range(args.repeats):
        for name, engine in engines.items():
            begun = time.perf_counter()
            answers, steps, slots = WAYS[name](engine, prompts, lengths, args.slots)
            seconds[name].append(time.perf_counter() - begun)
            assert answers == lengths
            idle[name] = f"{1 - sum(lengths) / (slots * steps):.0%}" if steps else "–"
    print_head(args.shape if not args.model else "a folder", model, prompts, lengths)
    print_rows(seconds, idle, sum(lengths), args.slots, least)


def vllm_beside(model, args):
    """vLLM with the same weights, which it reads from a folder. On a GPU it gets half the memory:
    not run."""
    vllm_engine.load_vllm()
    dtype = "bf16" if model.dtype is torch.bfloat16 else "fp32"
    recipe = Recipe(max_length=512 + LONGEST, slots=args.slots, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        half = {"gpu_memory_utilization": 0.5} if model.device.type == "cuda" else {}
        return vllm_engine.start(args.model or folder, recipe, model.device, **half)


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
        "| way | slots | tokens/s | slowest, fastest run | to the first | idle | "
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


# ---- vLLM's log-probabilities and train.py's ---------------------------------------------------


def distance(model: str, prompts: int):
    """log p(y'|x) of the engine that samples minus that of opponent.jsonl, for vLLM and for our own
    loop. The mean, with its sign, is an estimate of the KL divergence of the engine's p from the
    model's."""
    import generate as stage
    import train

    print(
        "| engine | answers | tokens | nats per token: median | largest | per answer: median | "
        "largest | mean, with its sign |\n|---|---|---|---|---|---|---|---|"
    )
    for engine, dtype in itertools.product(("vllm", "own"), ("fp32", "bf16")):
        told = {}  # (seed, t, id): what vLLM says; our own loop: by a token's uniform number

        def noting(*args, own=vllm_engine.sample, told=told, **_):
            answers = own(*args, logprobs=0)
            told |= {key: logps for key, (*_, logps) in zip(args[4], answers, strict=True)}
            return answers

        def noting_own(logits, numbers, *rest, own=engines.pick_token, told=told):
            token = own(logits, numbers, *rest)
            logps = logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
            told |= dict(zip(numbers.tolist(), logps.tolist(), strict=True))
            return token

        with tempfile.TemporaryDirectory() as run:
            flags = f"--iter 0 --recipe demo --revision= --template chat --engine {engine}"
            flags += f" --num-prompts {prompts} --max-length 256 --max-new-tokens 64 --slots 64"
            flags += f" --dtype {dtype} --micro-tokens 2048 --model {model} --run {run}"
            with (
                mock.patch.object(vllm_engine, "sample", noting),
                mock.patch.object(engines, "pick_token", noting_own),
            ):
                stage.main(shlex.split(flags))
            with mock.patch.object(train, "train"), mock.patch.object(train, "export"):
                train.main(shlex.split(flags))
            scored = {}
            for row in read_jsonl(Path(run) / "iter0" / "opponent.jsonl"):
                scored[row["id"]] = row["logp_generated"]
            rows = [*read_jsonl(Path(run) / "iter0" / "generated.jsonl")]
        off = []
        for row in rows:
            key = (0, 0, row["id"])
            logps = told.get(key)
            if engine == "own":
                numbers = engines.uniforms(*key, number=len(row["generated_ids"]))
                logps = torch.tensor([told[number] for number in numbers.tolist()])
            off.append(logps.double().sum().item() - scored[row["id"]])
        off = torch.tensor(off).double()
        tokens = torch.tensor([len(row["generated_ids"]) for row in rows])
        each = (off / tokens).abs()
        print(
            f"| {engine}, {dtype} | {len(rows)} | {tokens.sum()} | {each.median():.1e} | "
            f"{each.max():.1e} | {off.abs().median():.1e} | {off.abs().max():.1e} | "
            f"{off.mean():+.1e} |"
        )


def main():
    global LONGEST
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--model", metavar="DIR", help="a model's folder in the place of a shape")
    parser.add_argument("--engines", nargs="+", choices=WAYS, default=["authors", "generate"])
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--median", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="N")
    parser.add_argument("--distance", type=int, metavar="N")
    args = parser.parse_args()
    LONGEST = args.longest
    if args.memory:
        memory(args.memory)
    elif args.distance:
        distance(args.model, args.distance)
    else:
        side_by_side(args)


if __name__ == "__main__":
    main()
