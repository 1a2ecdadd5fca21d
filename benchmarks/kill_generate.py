"""generate.py killed at random moments, on one rank and on two in turns: are the bytes the same?

    OMP_NUM_THREADS=1 python benchmarks/kill_generate.py [--kills 20] [--seed 0]
                                                         [--prompts 2048] [--chunk 16]

Samples the demo's iteration 0 once undisturbed, by one process. Then starts it again and again in
another directory, with 1 and 2 ranks in turns, and kills all its processes (kill -9): every fourth
time at a random moment of its start, else once it has written its first chunk, after a random time
so short that the run hardly ends before the last kill. At last it may finish. The file must hold
every prompt once, and the calm run's bytes.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import REPO, family, kill, launcher


def start(run: Path, ranks: int, flags: list[str]) -> subprocess.Popen:
    """The demo's iteration 0 on so many ranks, in silence."""
    command = [*launcher(ranks), *shlex.split("generate.py --recipe demo --iter 0 --run"), str(run)]
    return subprocess.Popen(
        [*command, *flags],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def parts(run: Path) -> int:
    """How many chunks lie there."""
    return len(list((run / "iter0" / "generated.part").glob("*.jsonl")))


def wait_for_more(process, run: Path, before: int) -> bool:
    """Wait until a chunk more than before lies there; False where the process ended first."""
    while parts(run) <= before:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def run_calmly(run: Path, flags: list[str]) -> tuple[float, float]:
    """Seconds until the first chunk lies there, and from there to the end."""
    begun = time.perf_counter()
    process = start(run, 1, flags)
    assert wait_for_more(process, run, 0)
    first = time.perf_counter()
    assert process.wait() == 0
    return first - begun, time.perf_counter() - first


def hunt(run: Path, flags: list[str], kills: int, seconds, chance: random.Random, chunks: int):
    """Start and kill so many times, and print a row for each; then let it finish.

    seconds: of the calm run, as run_calmly gives them. chunks: how many there are in all; a machine
    that has become faster since is not left to finish them."""
    startup, sampling = seconds
    print("| kill | ranks | when | chunks there |\n|---|---|---|---|", flush=True)
    for number in range(kills):
        ranks = 1 + number % 2
        before = parts(run)
        process = start(run, ranks, flags)
        early = number % 4 == 3
        if not early:
            wait_for_more(process, run, before)
        pause = chance.uniform(0, startup if early else 0.8 * sampling / kills)
        until = time.perf_counter() + pause
        most = before + 0.6 * (chunks - before)
        while time.perf_counter() < until and parts(run) < most:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        kill(family(process.pid))
        process.wait()
        when = f"{pause:.2f} s after its {'start' if early else 'first chunk'}"
        there = f"{before} + {parts(run) - before}"
        print(f"| {number + 1} | {ranks} | {when} | {there} |", flush=True)
    assert start(run, 1 + kills % 2, flags).wait() == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=16)
    args = parser.parse_args()
    flags = ["--num-prompts", str(args.prompts), "--chunk", str(args.chunk)]
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder) / "calm"
        hunted = Path(folder) / "hunted"
        seconds = run_calmly(calm, flags)
        chunks = args.prompts // args.chunk
        hunt(hunted, flags, args.kills, seconds, random.Random(args.seed), chunks)
        wanted = (calm / "iter0" / "generated.jsonl").read_bytes()
        found = (hunted / "iter0" / "generated.jsonl").read_bytes()
    ids = [json.loads(line)["id"] for line in found.splitlines()]
    print(
        f"{args.kills} kills; {len(ids)} rows, {len(set(ids))} different prompts of "
        f"{args.prompts}; {'the same bytes' if wanted == found else 'OTHER BYTES'} "
        "as in the calm run"
    )
    return 0 if wanted == found and len(set(ids)) == len(ids) == args.prompts else 1


if __name__ == "__main__":
    sys.exit(main())
