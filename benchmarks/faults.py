"""Random faults in the stages of a micro recipe: does the same command fix them afterwards?

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--faults 60] [--seed 0]
                                                  [--ranks 1 2] [--workers 1]

Runs the stages of two iterations calmly, with each number of ranks, and keeps the run directory as
each stage left it. Then, again and again: a stage starts from what the one before it left, or (for
damage) its finished directory is taken, or one that was killed during its training; a fault of a
random kind comes at a random moment, at a random place; the same command is given again, and for
damage to what another stage reads, that stage's. It must end with exit code 0 and the calm run's
bytes (metrics.jsonl without its speeds, and without the damaged file itself, if the stage does not
read it), or with exit code 2 and, besides progress bars and torchrun's own report, exactly one line
on stderr, which names the damaged file or its folder.

kill one rank, kill all    SIGKILL; with one rank the same. The job must be down within a minute
SIGTERM                    to the command, as a machine that is taken away sends it. It must have
                           left within 30 s
disk full                  a limit on the size of files (RLIMIT_FSIZE): one line, exit code 2
cut, cut at a line, remove a random file, at a random byte; behind a random line; whole
"""

import argparse
import collections
import contextlib
import functools
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MICRO = shlex.split(
    "--recipe demo --num-prompts 96 --batch-size 12 --micro-tokens 400 --chunk 4 --slots 2"
    " --checkpoint-every 2 --eval-prompts 48"
)
STAGES = [("generate", 0), ("train", 0), ("generate", 1), ("train", 1), ("evaluate", 1)]
DAMAGE = ["cut", "cut at a line", "remove"]
KINDS = ["kill one rank", "kill all", "SIGTERM", "disk full", *DAMAGE]


@dataclass
class Calm:
    """What a calm run on so many ranks left, and how long each of its stages worked."""

    ranks: int
    # (stage, t, when) -> a run directory; when: before, after, amid (killed while it trained)
    kept: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)  # (stage, t) -> seconds of work


# ---- processes -------------------------------------------------------------------------------


def launcher(ranks: int) -> list[str]:
    """What runs a script on so many ranks: python, or torchrun."""
    if ranks == 1:
        return [sys.executable]
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {ranks} --"
    return [sys.executable, *torchrun.split()]


def start(stage: str, t: int, run: Path, ranks: int, largest: int | None = None):
    """The stage's command; largest: the size in bytes that no file may exceed."""
    limit = None
    if largest:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    return subprocess.Popen(
        [*launcher(ranks), f"{stage}.py", *MICRO, "--iter", str(t), "--run", str(run)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
    )


def finish(process, within: float = 300):
    """(exit code, the lines that it said, seconds). Kills and gives up after `within` seconds."""
    begun = time.perf_counter()
    try:
        err = process.communicate(timeout=within)[1]
    except subprocess.TimeoutExpired:
        kill(family(process.pid))
        raise AssertionError(f"a command was still running after {within} s") from None
    return process.returncode, lines_of(err), time.perf_counter() - begun


def lines_of(err: str) -> list[str]:
    """What a command has said on stderr, without progress bars and torchrun's own report."""
    err = err.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    lines = re.split("[\r\n]+", err)
    torchrun = r"[WE]\d{4} .* torch/distributed/elastic/"
    bar = r"[^|]*: +\d+%\|"
    return [line for line in lines if line.strip() and not re.match(f"{torchrun}|{bar}", line)]


def family(pid: int) -> list[int]:
    """The process and all that it has started: torchrun gives each rank a group of its own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [p for child in children for p in family(int(child))]


def kill(pids: list[int]):
    """kill -9."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(seen, process):
    """Wait until seen() is true, or the process has ended."""
    while not seen() and process.poll() is None:
        time.sleep(0.002)


def at_work(folder: Path, stage: str) -> bool:
    """Whether it has begun to leave files.

    evaluate.py leaves none before its end, and counts as at work from its start."""
    if stage == "evaluate":
        return True
    name = "generated.part" if stage == "generate" else "checkpoint"
    return any((folder / name).glob("*"))


def has_checkpoint(folder: Path) -> bool:
    """Whether a whole checkpoint lies there."""
    return any(path.name.isdigit() for path in (folder / "checkpoint").glob("*"))


# ---- run directories -------------------------------------------------------------------------


def contents(run: Path) -> dict:
    """What must be the same: every file's bytes, but for speeds; work in progress left out."""
    speed = re.compile(rb', "tokens_per_s": [^}]*')
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and ".part" not in str(path) and "checkpoint" not in path.parts:
            found[str(path.relative_to(run))] = speed.sub(b"", path.read_bytes())
    return found


def run_calmly(root: Path, ranks: int) -> Calm:
    """All stages without a fault, and last a training that is killed at its first checkpoint."""
    run = root / "calm"
    run.mkdir(parents=True)
    calm = Calm(ranks)
    for stage, t in STAGES:
        calm.kept[stage, t, "before"] = shutil.copytree(run, root / f"before-{stage}{t}")
        process = start(stage, t, run, ranks)
        wait_until(functools.partial(at_work, run / f"iter{t}", stage), process)
        begun = time.perf_counter()
        assert finish(process)[:2] == (0, [])
        calm.seconds[stage, t] = time.perf_counter() - begun
        calm.kept[stage, t, "after"] = shutil.copytree(run, root / f"after-{stage}{t}")
    stopped = shutil.copytree(calm.kept["train", 1, "before"], root / "amid")
    process = start("train", 1, stopped, ranks)
    wait_until(functools.partial(has_checkpoint, stopped / "iter1"), process)
    kill(family(process.pid))
    process.wait()
    calm.kept["train", 1, "amid"] = stopped
    return calm


# ---- faults ----------------------------------------------------------------------------------


def disturb(kind: str, stage: str, t: int, run: Path, calm: Calm, chance: random.Random) -> str:
    """Start the stage and let the fault come; says when. Asserts how the command must end."""
    wanted = calm.kept[stage, t, "after"]
    new = sorted(contents(wanted).keys() - contents(run).keys())  # what it will write
    size = (wanted / chance.choice(new)).stat().st_size
    if kind == "disk full":
        largest = max(1, int(size * chance.uniform(0.02, 0.95)))
        code, lines, _ = finish(start(stage, t, run, calm.ranks, largest))
        one = len(lines) == 1 and lines[0].startswith("error: ")
        assert code == exit_code(calm.ranks) and one, (code, lines)
        return "when a file grew too large"

    # a random moment, now and then one before its work
    process = start(stage, t, run, calm.ranks)
    early = chance.random() < 0.2
    if not early:
        wait_until(functools.partial(at_work, run / f"iter{t}", stage), process)
    pause = chance.uniform(0, 4.0 if early else 0.9 * calm.seconds[stage, t])
    time.sleep(pause)
    late = process.poll() is not None

    if kind == "SIGTERM":
        process.terminate()
    else:
        pids = family(process.pid)
        kill(pids[-1:] if kind == "kill one rank" else pids)
    code, _, took = finish(process, 60)
    if kind == "SIGTERM" and not late:
        may_be = [0, 143, -15]  # 0: it was all but done
        if calm.ranks > 1:
            may_be.append(1)  # torchrun's
        assert took < 30 and code in may_be, (took, code)
    when = f"{pause:.1f} s into its {'start' if early else 'work'}"
    return f"{when} (it was done)" if late else when


def exit_code(ranks: int) -> int:
    """Of a stage that refuses: 2, or torchrun's own 1."""
    return 2 if ranks == 1 else 1


def choose_damaged(stage: str, t: int, calm: Calm, chance: random.Random):
    """(the stage that finds the damage, its t, the directory to damage, what that is)."""
    source = calm.kept[stage, t, "after"]
    if stage == "train" and chance.random() < 0.5:
        return "train", 1, calm.kept["train", 1, "amid"], "amid training"
    if (stage, t) != STAGES[-1] and chance.random() < 0.5:  # the stage that comes next
        stage, t = STAGES[STAGES.index((stage, t)) + 1]
    return stage, t, source, "finished"


def reader(damaged: Path, run: Path, stage: str, t: int) -> tuple[str, int]:
    """The stage that is asked to find the damage, and its t: a model is read where something is to
    be made from it, all else by every stage."""
    if "model" not in damaged.parts or stage == "evaluate":
        return stage, t
    for name, result in (("generate", "generated.jsonl"), ("train", "model")):
        if not (run / "iter1" / result).exists():
            return name, 1
    return "evaluate", 1


def damage(kind: str, run: Path, chance: random.Random) -> Path:
    """Cut or remove one of the files that the stage left; returns which."""
    files = []
    for path in sorted(run.rglob("*")):
        whole = path.is_file() and path.stat().st_size > 1 and ".part" not in str(path)
        lines = kind != "cut at a line" or path.suffix == ".jsonl"
        if whole and lines and path.suffix != ".md":
            files.append(path)
    path = chance.choice(files)
    if kind == "remove":
        path.unlink()
    elif kind == "cut at a line":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: chance.randrange(len(lines))]))
    else:
        os.truncate(path, chance.randrange(path.stat().st_size))
    return path


def differences(run: Path, wanted: Path, damaged: Path | None) -> list[str]:
    """The files that are not the calm run's, and those that a finished stage clears away. The
    damaged file may stay as it is: whatever depends on it must still be the calm run's."""
    here = contents(run)
    there = contents(wanted)
    other = [n for n in there if here.get(n) != there[n] and damaged != run / n]
    for path in run.rglob("*"):
        if path.name in ("checkpoint", "generated.part"):
            other.append(str(path.relative_to(run)))
    return other + sorted(here.keys() - there.keys())


def judge(code: int, lines: list[str], run: Path, wanted: Path, damaged, ranks: int) -> str:
    """How the command after the fault ended, in words."""
    if code == 0 and not lines:
        other = differences(run, wanted, damaged)
        return f"OTHER BYTES in {', '.join(other)}" if other else "the same bytes"
    said = "".join(lines)
    named = damaged and (str(damaged) in said or str(damaged.parent) in said)
    if code == exit_code(ranks) and len(lines) == 1 and lines[0].startswith("error: ") and named:
        return f"refused: {lines[0].replace(str(run), 'RUN')}"
    return f"BROKEN: exit code {code}, {lines}"


def good(result: str) -> bool:
    """Whether a fault may end so."""
    return result.startswith(("the same", "refused"))


def one_fault(number: int, chance: random.Random, calm: Calm, root: Path):
    """One fault; returns its row of the table, whatever comes of it."""
    kind = KINDS[number % len(KINDS)]
    stage, t = STAGES[number % len(STAGES)]  # 5 of them and 8 kinds: 40 faults see every pair
    run = root / f"fault{number}"
    try:
        stage, t, when, result = result_of(kind, stage, t, run, calm, chance)
    except AssertionError as problem:
        when, result = "amid it", f"BROKEN: {problem}"
    if good(result):
        shutil.rmtree(run)
    return kind, stage, t, calm.ranks, when, result


def result_of(kind: str, stage: str, t: int, run: Path, calm: Calm, chance: random.Random):
    """Let the fault come and give the command after it: (stage, t, when it came, how it ended)."""
    damaged = None
    if kind in DAMAGE:
        stage, t, source, what = choose_damaged(stage, t, calm, chance)
        shutil.copytree(source, run)
        damaged = damage(kind, run, chance)
        stage, t = reader(damaged, run, stage, t)
        when = f"{damaged.relative_to(run)}, {what}"
    else:
        shutil.copytree(calm.kept[stage, t, "before"], run)
        when = disturb(kind, stage, t, run, calm, chance)

    # the same command again
    code, lines, _ = finish(start(stage, t, run, calm.ranks))
    lost = damaged and damaged.name == "generated.jsonl" and not damaged.exists()
    if code == 0 and lost:  # nobody wanted it yet: the loop makes it again
        again = int(damaged.parent.name[-1])
        code, lines, _ = finish(start("generate", again, run, calm.ranks))
    result = judge(code, lines, run, calm.kept[stage, t, "after"], damaged, calm.ranks)
    return stage, t, when, result


def print_faults(args, root: Path) -> list[tuple[str, str]]:
    """All faults, a line each as they end; returns (kind, result) of each."""
    calm = {ranks: run_calmly(root / f"ranks{ranks}", ranks) for ranks in set(args.ranks)}

    def fault(number):
        ranks = args.ranks[number // len(KINDS) % len(args.ranks)]
        return one_fault(number, random.Random(f"{args.seed} {number}"), calm[ranks], root)

    results = []
    with ThreadPoolExecutor(args.workers) as pool:
        for number, row in enumerate(pool.map(fault, range(args.faults)), 1):
            kind, stage, t, ranks, when, result = row
            on = f"{ranks} rank{'s' if ranks > 1 else ''}"
            print(f"{number}. {kind}, {stage} {t}, {on}, {when}: {result}", flush=True)
            results.append((kind, result))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, default=1, help="faults at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = print_faults(args, Path(folder))
    count = collections.Counter((kind, result.split(":")[0]) for kind, result in results)
    times = collections.Counter(kind for kind, _ in results)
    print("\n| fault | times | the same bytes | refused, in one line |\n|---|---|---|---|")
    for kind in KINDS:
        same = count[kind, "the same bytes"]
        print(f"| {kind} | {times[kind]} | {same} | {count[kind, 'refused']} |")
    bad = sum(not good(result) for _, result in results)
    print(f"\n{args.faults} faults, {bad} that ended in any other way")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
