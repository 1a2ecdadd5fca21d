"""kill -9 in every stage of two iterations, the same command again each time: the same bytes as an undisturbed run?

    OMP_NUM_THREADS=1 python benchmarks/kill_stages.py [--iterations 0 2] [flags of the stages]

Runs the demo once undisturbed and once with a kill -9 of the whole process group in each of generate, train and
evaluate of the two iterations, a moment after that stage has begun to write (for evaluate: to run), and compares
generated.jsonl and the weights of all iterations byte for byte.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def start(run: Path, flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(["bash", "run_iterations.sh", "demo", "--run", str(run), "--no-sft-baseline", *flags], cwd=REPO,
                            env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digests(run: Path) -> dict:
    files = [*run.glob("iter*/generated.jsonl"), *run.glob("iter*/model/model.safetensors")]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def begun(folder: Path, stage: str) -> bool:
    """Whether the stage is at work: it has written some of its output, but not all."""
    if stage == "generate":
        return any((folder / "generated.part").glob("*.jsonl"))
    if stage == "train":
        return any((folder / "checkpoint").glob("*"))
    return (folder / "model").is_dir()  # evaluate follows at once


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, nargs=2, default=[0, 2])
    parser.add_argument("--runs", type=Path, default=REPO / "runs" / "kill")
    args, flags = parser.parse_known_args()
    calm, hunted = args.runs / "calm", args.runs / "hunted"
    assert start(calm, flags).wait() == 0
    print("| iteration | stage | killed while these lay there |\n|---|---|---|", flush=True)
    for t in args.iterations:
        for stage, result in (("generate", "generated.jsonl"), ("train", "model"), ("evaluate", "eval.json")):
            folder, process = hunted / f"iter{t}", start(hunted, flags)
            while not begun(folder, stage):
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.002)
            time.sleep(3 if stage == "evaluate" else 0.2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (folder / result).exists(), f"{stage} {t} was finished before the kill"
            print(f"| {t} | {stage} | {', '.join(sorted(p.name for p in folder.iterdir()))} |", flush=True)
    assert start(hunted, flags).wait() == 0
    one, other = digests(calm), digests(hunted)
    print(f"{len(one)} files, {sum(one[f] == other.get(f) for f in one)} the same byte for byte")
    return 0 if one == other else 1


if __name__ == "__main__":
    sys.exit(main())
