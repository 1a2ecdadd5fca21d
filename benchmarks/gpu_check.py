"""Would a long run work on this machine? One GPU, ten minutes, one line a step.

    python benchmarks/gpu_check.py --quick                    steps 0 to 2, in under two minutes
    python benchmarks/gpu_check.py                            all steps, and a table for RESULTS.md
    python benchmarks/gpu_check.py --device cpu --steps 1,3   steps 1 to 4 need no GPU

Each step, a function of STEPS, ends with ok, with FAIL, or with "not run", which is not ok:
something that it needs is not here. After a FAIL the exit code is 1. An illegal access to memory
makes all later steps fail too: read the first traceback.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simulate
import train_gpu
from numerics import NotRun, hold, kernels, model_checks, precision, random_model, refusal

from spin.files import fail, read_json, read_jsonl
from spin.model.packing import packed
from spin.model.weights import compute_dtype
from spin.recipe import Recipe
from spin.run import ranks
from spin.sampling.engines import sample

REPO = Path(__file__).resolve().parent.parent
DEMO = ["--recipe", "demo", "--num-prompts", "256", "--micro-tokens", "1024"]


# ---- 0: the machine; 1 to 3 are in numerics.py ---------------------------------------------------


def machine(here) -> str:
    """The first allocation, a product of matrices, and a setting that every stage makes."""
    x = torch.arange(1024.0, device=here.device).view(32, 32).to(here.dtype)
    hold(torch.equal(x @ torch.eye(32).to(x), x), "a product with the identity changes a matrix")
    hold(not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN's attention is on")
    return f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free, computes in {here.dtype}"


# ---- 4, 5, 9: the stages, started as a user starts them ------------------------------------------


def stage(script: str, *flags, start=(), code: int = 0) -> str:
    """Run a stage to its end; returns what it says. start: what stands before it."""
    line = [*map(str, (sys.executable, *start, script, *DEMO, *flags))]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr[-200:]]
    hold(done.returncode == code, f"{' '.join(line[1:])}: exit code {done.returncode}: {errors[0]}")
    return done.stdout + done.stderr


def steps_of(run: Path, number: int) -> list[float]:
    """The losses in metrics.jsonl, so many, and before them the log of the first gradient's norm.
    The first loss must be that of θ_t, where all margins are zero."""
    rows = list(read_jsonl(run / "iter0" / "metrics.jsonl"))
    hold(len(rows) == number, f"{run.name}: {len(rows)} steps, not {number}")
    first = rows[0]
    hold(abs(first["loss"] - np.log(2)) < 1e-6, f"{run.name}: the first loss is {first['loss']}")
    hold(first["margin"] == first["margin_std"] == 0, f"{run.name}: margins in step 0: {first}")
    hold(rows[1]["margin_std"] > 0, f"{run.name}: the first update moves nothing")
    return [np.log(first["grad_norm"]), *(row["loss"] for row in rows)]


def largest_gap(a: list[float], b: list[float]) -> float:
    """Between what steps_of gives of two runs."""
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    hold(gap < 0.05, f"two runs differ by {gap:.2g} in a loss or the first gradient")
    return gap


def demo(here) -> str:
    """An iteration of the demo; stopped by SIGTERM and resumed; four steps in each other way."""
    run, again = here.folder / "demo", here.folder / "again"
    stage("evaluate.py", "--theta0", "--run", run)
    stage("generate.py", "--iter", 0, "--run", run)
    shutil.copytree(run, again)
    stage("train.py", "--iter", 0, "--run", run)
    stage("evaluate.py", "--iter", 0, "--run", run)
    results = [read_json(run / name, "") for name in ("eval.json", "iter0/eval.json")]
    before, after = (result["expected_exact_match"] for result in results)
    hold(after > before, f"the expected exact match does not rise: {before:.3f}, {after:.3f}")
    done = interrupt(again)
    stage("train.py", "--iter", 0, "--run", again)
    gap = largest_gap(steps_of(run, 8), steps_of(again, 8))
    model = "iter0/model/model.safetensors"
    same = (run / model).read_bytes() == (again / model).read_bytes()
    hold(same or here.device.type == "cuda", "a run that was resumed ends with other weights")
    ended = "ends with the same bytes" if same else f"has as many steps, losses within {gap:.1g}"
    left = "" if importlib.util.find_spec("peft") else "--lora-rank needs the package peft; else "
    for way in ["--offload", "--dtype fp32", "--recompute"] + ["--lora-rank 8"] * (not left):
        other = here.folder / way.split()[0][2:]
        pairs = ["--epochs", 1, "--pairs", run / "iter0" / "generated.jsonl", "--run", other]
        stage("train.py", "--iter", 0, *way.split(), *pairs)
        steps_of(other, 4)
    figure = f"{left}exact match {before:.3f} → {after:.3f}; resumed after {done} steps, it {ended}"
    if left:
        raise NotRun(figure)
    return figure


def interrupt(run: Path) -> int:
    """Send SIGTERM to train.py when it has taken a step; returns the steps taken in the end."""
    line = [sys.executable, "train.py", *DEMO, "--iter", "0", "--run", run]
    process = subprocess.Popen(line, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    log = run / "iter0" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    hold(process.wait(60) == 143, f"SIGTERM after a step: exit code {process.returncode}")
    return len(log.read_text().splitlines())


def two_ranks(here) -> str:
    """Two ranks share the GPU, collectives staged over gloo; training is that of one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    start = [*torchrun, "benchmarks/one_gpu.py", "shared"]
    made, one, two = (here.folder / name for name in ("made", "one", "two"))
    stage("generate.py", "--iter", 0, "--run-dir", made, start=start)
    pairs = ["--epochs", 1, "--pairs", made / "iter0" / "generated.jsonl", "--run-dir"]
    stage("train.py", "--iter", 0, *pairs, one)
    said = stage("train.py", "--iter", 0, *pairs, two, start=start)
    hold("devices: 2 ×" in said, "it ran on one rank")
    return f"losses within {largest_gap(steps_of(one, 4), steps_of(two, 4)):.1g} of one rank's"


def out_of_memory(here) -> str:
    """On a GPU with 16 MB each stage ends in one line."""
    lines, flags = [], ["--iter", 0, "--batch-size", 256, "--micro-tokens", 10**5, "--run"]
    stage("generate.py", *flags, here.folder / "large")
    for script, folder in (("generate.py", "small"), ("train.py", "large")):
        how = {"start": ["benchmarks/one_gpu.py", "small"], "code": 2}
        said = stage(script, *flags, here.folder / folder, **how)
        lines.append(said.partition("error: ")[2].partition("\n")[0])  # behind a progress bar
        hold("memory" in lines[-1] and "Traceback" not in said, f"{script} says {said[-500:]}")
    return "; ".join(line[:60] for line in lines)


# ---- 6 to 8: waits and speed ---------------------------------------------------------------------


def count_waits(call, *args) -> int:
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def waits(here) -> str:
    """Host waits in a micro-batch and in a decode step, by torch's sync debug mode."""
    if count_waits(torch.ones(1, device=here.device).item) != 1:
        raise NotRun("torch's sync debug mode sees no wait here: it needs a GPU")
    config = train_gpu.SHAPES["tiny"]()
    recipe = Recipe(micro_tokens=1)  # so that each pair has a micro-batch of its own
    pairs = train_gpu.make_pairs(3, config.vocab_size)
    model = random_model(here, config)

    def answer(tokens: int):  # in as many decode steps: no token is the EOS
        sample(model, [[5, 6, 7, 8]] * 4, -1, tokens, np.full((4, tokens), 0.5))

    with ranks.process_group() as world:
        trained, optimizer = train_gpu.sharded_model(config, recipe, world)
        take_step = partial(train_gpu.take_step, trained, optimizer)
        with packed(trained):
            take_step([0], pairs, recipe, world)  # the first one makes the optimizer's moments
            one, three = (count_waits(take_step, b, pairs, recipe, world) for b in ([0], [0, 1, 2]))
    few, more = (count_waits(answer, n) for n in (4, 12))
    micro, decode = (three - one) / 2, (more - few) / 8
    figure = f"{micro:g} waits a micro-batch, {decode:g} a decode step"
    hold(micro <= 4 and decode <= 8, figure)
    return figure


def speed(here) -> str:
    """Training speed and peak, beside the peak that simulate.py finds for the same steps."""
    settings = [("1b", 8192, 0), ("7b", 2048, 0), ("7b", 4096, 16)]  # shape, micro-tokens, LoRA
    if here.short:
        settings = [("tiny", 8192, 0)]
    ceiling = train_gpu.matmul_rate(here.device, here.dtype, 512 if here.short else 8192)
    figures = [f"matrix product {ceiling / 1e12:.3g} TFLOP/s"]
    for shape, micro_tokens, rank in settings:
        setting = simulate.Setting(shape, 1, micro_tokens=micro_tokens, lora_rank=rank)
        expected = sum(simulate.simulate(setting).peak().values())
        if expected > 0.9 * torch.cuda.mem_get_info()[1] or (rank and len(figures) == 3):
            continue  # too large, or adapters where all of 7b fits
        config, recipe, pairs = simulate.prepared(setting)
        pairs = simulate.make_pairs(5 * len(pairs), setting.lengths, config.vocab_size)
        with ranks.process_group() as world:
            tokens, rate, peak = train_gpu.measure(config, recipe, pairs, world)
        how = f"LoRA of rank {rank}" if rank else f"MFU {rate / ceiling:.0%}"
        sizes = f"peak {peak * 2**30 / 1e9:.3g} GB (simulated: {expected / 1e9:.3g})"
        figures.append(
            f"{shape}, {micro_tokens} micro-tokens: {tokens:,.0f} tokens/s, {how}, {sizes}"
        )
    if len(figures) == 1:
        raise NotRun("the memory is too small for the 1b shape and for LoRA's 7b")
    return "; ".join(figures)


def sampling(here) -> str:
    """Sampling beside the limit of a copy's bandwidth; the largest --slots that runs."""
    # benchmarks/generate.py, not the stage of this name
    bench = SimpleNamespace(**runpy.run_path(REPO / "benchmarks" / "generate.py"))
    shape = "7b" if torch.cuda.mem_get_info()[1] > 30e9 else "30m"
    shape, number, most = ("demo", 32, 256) if here.short else (shape, 256, 4096)
    model = bench.random_model(shape)
    rate, share = bench.share_of_bandwidth(model, number)
    slots, line = 64, ""
    while not line and slots < most:
        slots *= 2
        uniform = np.full((slots, 6), 0.5)
        line = refusal(partial(sample, model, [[5] * 250] * slots, -1, 6, uniform, slots=slots))
    hold(not line or "--slots" in line, line)
    largest = f"--slots {slots // 2} runs, {slots} does not" if line else f"--slots {slots} runs"
    return f"{shape}: {rate:,.0f} tokens/s, {share:.0%} of the bandwidth's limit; {largest}"


# ---- all -----------------------------------------------------------------------------------------

STEPS = [machine, kernels, model_checks, precision, demo, two_ranks, waits, speed, sampling]
STEPS += [out_of_memory]


def take(number: int, here) -> list[str]:
    """Take a step and print its line; returns the cells of its row."""
    name, begun, problem, said = STEPS[number].__name__, time.perf_counter(), "", io.StringIO()
    print(f"{number} {name.replace('_', ' ')}: ", end="", flush=True)
    try:
        if number not in (1, 2, 3, 4) and here.device.type == "cpu":
            raise NotRun("it needs a GPU")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            torch.cuda.empty_cache()  # of the step before
            here.device = ranks.device_of_rank(0)
            outcome, figure = "ok", STEPS[number](here)
    except NotRun as missing:
        outcome, figure = "not run", str(missing)
    except (Exception, SystemExit) as error:
        outcome, figure = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        problem = f"{traceback.format_exc()}\n{said.getvalue()[-1000:]}\n"
    seconds = f"{time.perf_counter() - begun:.0f} s"
    print(f"{outcome}, {seconds}: {figure}", flush=True)
    print(problem, end="", file=sys.stderr, flush=True)
    return [f"{number} {name}", outcome, seconds, figure.replace("|", "/")]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--steps", default="0,1,2,3,4,5,6,7,8,9", help="some, as 1,3")
    steps.add_argument("--quick", action="store_const", dest="steps", const="0,1,2")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="short and small, as on a CPU")
    here = parser.parse_args(argv)
    if not set(here.steps.split(",")) <= set("0123456789"):
        parser.error("--steps takes numbers from 0 to 9, as 1,3")
    if here.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    elif not torch.cuda.is_available():
        ranks.refuse_idle_gpus()
        fail("torch sees no GPU: --device cpu takes steps 1 to 4 without one")
    here.short = here.short or here.device == "cpu"
    here.device = torch.device(here.device)
    here.dtype = compute_dtype("auto", here.device)
    print(where := train_gpu.describe(here.device), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        here.folder = Path(folder)
        rows = [take(int(number), here) for number in here.steps.split(",")]
    print(f"\n`python benchmarks/gpu_check.py {' '.join(argv)}`: {where}\n")
    print("| step | | time | figures |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return int(any(outcome == "FAIL" for _, outcome, *_ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
