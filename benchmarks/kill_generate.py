"""generate.py killed at random moments, with one rank and with two in turns: does the file end as in a calm run?

    OMP_NUM_THREADS=1 python benchmarks/kill_generate.py [--kills 20] [--seed 0] [--prompts 2048] [--chunk 16]

Samples the demo's iteration 0 once undisturbed, by one process. Then starts it again and again in another directory,
with 1 and 2 ranks in turns, and kills all its processes (kill -9): every fourth time at a random moment of its
start, else once it has written its first chunk, after a random time so short that the run hardly
ends before the last kill. At last it may finish. The file must hold every prompt once, and the calm run's bytes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def start(run: Path, ranks: int, flags):
    launch = (
        []
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"]
    )
    return subprocess.Popen(
        [
            sys.executable,
            *launch,
            "generate.py",
            "--recipe",
            "demo",
            "--iter",
            "0",
            "--run",
            str(run),
            *flags,
        ],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def family(pid: int) -> list[int]:
    """The process and all that it has started: torchrun gives each rank a process group of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [p for child in children for p in family(int(child))]


def parts(run: Path) -> int:
    return len(list((run / "iter0" / "generated.part").glob("*.jsonl")))


def wait_for_more(process, run: Path, before: int) -> bool:
    """Wait until a chunk more than before lies there; False where the process ended first."""
    while parts(run) <= before:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("--kills", 20), ("--seed", 0), ("--prompts", 2048), ("--chunk", 16)):
        parser.add_argument(name, type=int, default=value)
    args = parser.parse_args()
    flags = ["--num-prompts", str(args.prompts), "--chunk", str(args.chunk)]
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, hunted = Path(folder) / "calm", Path(folder) / "hunted"
        begun, process = time.perf_counter(), start(calm, 1, flags)
        assert wait_for_more(process, calm, 0)
        first = time.perf_counter()
        assert process.wait() == 0
        startup, sampling = first - begun, time.perf_counter() - first
        print("| kill | ranks | when | chunks there |\n|---|---|---|---|", flush=True)
        for kill in range(args.kills):
            ranks, before = 1 + kill % 2, parts(hunted)
            process, early = start(hunted, ranks, flags), kill % 4 == 3
            if not early:
                wait_for_more(process, hunted, before)
            pause = chance.uniform(0, startup if early else 0.8 * sampling / args.kills)
            time.sleep(pause)
            assert process.poll() is None, "the run ended before it could be killed"
            for pid in family(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            when = f"{pause:.2f} s after its {'start' if early else 'first chunk'}"
            print(
                f"| {kill + 1} | {ranks} | {when} | {before} + {parts(hunted) - before} |",
                flush=True,
            )
        assert start(hunted, 1 + args.kills % 2, flags).wait() == 0
        one, other = ((run / "iter0" / "generated.jsonl").read_bytes() for run in (calm, hunted))
        ids = [json.loads(line)["id"] for line in other.splitlines()]
        print(
            f"{args.kills} kills; {len(ids)} rows, {len(set(ids))} different prompts of {args.prompts}; "
            f"{'the same bytes' if one == other else 'OTHER BYTES'} as in the calm run"
        )
        return 0 if one == other and len(set(ids)) == len(ids) == args.prompts else 1


if __name__ == "__main__":
    sys.exit(main())
