"""Random faults in the stages of a micro recipe: does the same command afterwards end with the bytes of a calm run?

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--faults 60] [--seed 0] [--ranks 1 2] [--workers 1]

Runs the stages of two iterations calmly, with each number of ranks, and keeps the run directory as each stage left it. Then, again
and again: a stage starts from what the one before it left, or (for damage) its finished directory is taken, or one that was killed
amid its training; a fault of a random kind comes at a random moment, at a random place; the same command is given again, and for
damage to what another stage reads, that stage's. It must end with exit code 0 and the calm run's bytes (metrics.jsonl without its
speeds; a log, or a file by which others are checked, may stay lost: GUARDS), or with exit code 2 and one line that names the damaged
file or its folder.

kill one rank, kill all    SIGKILL; with one rank the same. The job must be down within a minute
SIGTERM                    to the command, as a machine that is taken away sends it. It must have left within 30 s
disk full                  a limit on the size of files (RLIMIT_FSIZE): one line, exit code 2
cut, cut at a line, remove a random file, at a random byte; behind a random line; whole
"""

import argparse
import collections
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MICRO = [
    "--recipe",
    "demo",
    "--num-prompts",
    "96",
    "--batch-size",
    "12",
    "--micro-tokens",
    "400",
    "--chunk",
    "4",
    "--slots",
    "2",
    "--checkpoint-every",
    "2",
    "--eval-prompts",
    "48",
]
STAGES = [("generate", 0), ("train", 0), ("generate", 1), ("train", 1), ("evaluate", 1)]
KINDS = ["kill one rank", "kill all", "SIGTERM", "disk full", "cut", "cut at a line", "remove"]
GUARDS = [
    "recipe.json",
    "prompts.json",
    "heldout.json",
    *(
        f"iter{t}/{name}"
        for t in (0, 1)
        for name in (
            "generated.json",
            "opponent.json",
            "opponent.jsonl",
            "metrics.jsonl",
            "files.json",
        )
    ),
]


def start(stage, t, run: Path, ranks: int, largest=None):
    """The stage's command; largest: the size in bytes that no file may exceed."""
    limit = (
        (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))) if largest else None
    )
    launch = (
        []
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"]
    )
    command = [sys.executable, *launch, f"{stage}.py", *MICRO, "--iter", str(t), "--run", str(run)]
    return subprocess.Popen(
        command,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
    )


def finish(process, within=300, calm=True):
    """(exit code, its lines that begin with error:, seconds); kills and gives up after `within` seconds.

    calm: no rank may leave a traceback.
    """
    begun = time.perf_counter()
    try:
        err = process.communicate(timeout=within)[1]
    except subprocess.TimeoutExpired:
        kill(family(process.pid))
        raise SystemExit(f"a command was still running after {within} s") from None
    lines = re.findall(r"^error: .*", err, re.MULTILINE)
    assert not calm or "Traceback" not in err.split("torch/distributed/elastic")[0], (
        err
    )  # where torchrun's own report begins
    return process.returncode, lines, time.perf_counter() - begun


def family(pid: int) -> list[int]:
    """The process and all that it has started: torchrun gives each rank a process group of its own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [p for child in children for p in family(int(child))]


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def contents(run: Path) -> dict:
    """What must be the same: every file's bytes, but for speeds; work in progress left out."""
    speed = re.compile(
        rb', "tokens_per_s": [^}]*|"metrics.jsonl": [0-9]+'
    )  # and with them its size, in files.json
    return {
        str(path.relative_to(run)): speed.sub(b"", path.read_bytes())
        for path in sorted(run.rglob("*"))
        if path.is_file() and ".part" not in str(path) and "checkpoint" not in path.parts
    }


def at_work(folder: Path, stage: str) -> bool:
    """Whether it has begun to leave files; evaluate.py leaves none before its end, and counts as at work from its start."""
    return stage == "evaluate" or any(
        (folder / ("generated.part" if stage == "generate" else "checkpoint")).glob("*")
    )


def calm(root: Path, ranks: int):
    """{(stage, t, when): a run directory}, when: before, after, amid (killed while it trained); and seconds of work, by stage."""
    run, kept, seconds = root / "calm", {}, {}

    def keep(name):
        shutil.copytree(run, root / name)
        return root / name

    run.mkdir(parents=True)
    for stage, t in STAGES:
        kept[stage, t, "before"] = keep(f"before-{stage}{t}")
        process = start(stage, t, run, ranks)
        while not at_work(run / f"iter{t}", stage) and process.poll() is None:
            time.sleep(0.005)
        begun = time.perf_counter()
        assert finish(process)[0] == 0
        seconds[stage, t] = time.perf_counter() - begun
        kept[stage, t, "after"] = keep(f"after-{stage}{t}")
    stopped = root / "amid"
    shutil.copytree(kept["train", 1, "before"], stopped)
    process = start("train", 1, stopped, ranks)
    while (
        not any(p.name.isdigit() for p in (stopped / "iter1" / "checkpoint").glob("*"))
        and process.poll() is None
    ):
        time.sleep(0.005)
    kill(family(process.pid))
    process.wait()
    return kept | {("train", 1, "amid"): stopped}, seconds


def disturb(kind, stage, t, run, ranks, chance, seconds, wanted) -> str:
    """Start the stage and let the fault come; says when. Asserts how the command must end."""
    size = (
        (wanted / chance.choice(sorted(contents(wanted).keys() - contents(run).keys())))
        .stat()
        .st_size
    )  # of what it will write
    process = start(
        stage,
        t,
        run,
        ranks,
        int(size * chance.uniform(0.02, 0.95)) if kind == "disk full" else None,
    )
    if kind == "disk full":
        code, lines, _ = finish(process)
        assert code == (2 if ranks == 1 else 1) and len(lines) == 1, (code, lines)
        return "when a file grew too large"
    early = chance.random() < 0.2
    while not early and not at_work(run / f"iter{t}", stage) and process.poll() is None:
        time.sleep(0.002)
    pause = chance.uniform(0, 4.0 if early else 0.9 * seconds)
    time.sleep(pause)
    when, late = (
        f"{pause:.1f} s into its {'start' if early else 'work'}",
        process.poll() is not None,
    )
    if kind == "SIGTERM":
        process.terminate()
    else:
        pids = family(process.pid)
        kill(pids[-1:] if kind == "kill one rank" else pids)
    code, _, took = finish(process, 60, calm=False)
    if not late and kind == "SIGTERM":
        assert took < 30 and code in (0, 143, -15, *[1] * (ranks > 1)), (
            took,
            code,
        )  # 1 is torchrun's; 0: it was all but done
    return when + " (it was done)" * late


def damage(kind, stage, run, chance) -> Path:
    """Cut or remove one of the files that the stage left; returns which."""
    files = [
        path
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.stat().st_size > 1
        and ".part" not in str(path)
        and (kind != "cut at a line" or path.suffix == ".jsonl")
    ]
    path = chance.choice([p for p in files if p.suffix != ".md"])
    if kind == "remove":
        path.unlink()
    elif kind == "cut at a line":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: chance.randrange(len(lines))]))
    else:
        os.truncate(path, chance.randrange(path.stat().st_size))
    return path


def one(number, chance, ranks, kept, seconds, root):
    """One fault; returns its row of the table."""
    kind, run = KINDS[number % len(KINDS)], root / f"fault{number}"
    stage, t = STAGES[number % len(STAGES)]  # 5 of them and 7 kinds: 35 faults see every pair
    wanted, path = kept[stage, t, "after"], None
    if kind in KINDS[4:]:
        when, here = "finished", (stage, t)
        source = kept[stage, t, "after"]
        if stage == "train" and chance.random() < 0.5:
            stage, t, source, when = "train", 1, kept["train", 1, "amid"], "amid training"
        elif (
            here != STAGES[-1] and chance.random() < 0.5
        ):  # the damage is found by the stage that comes next
            stage, t = STAGES[STAGES.index(here) + 1]
        wanted = kept[stage, t, "after"]
        shutil.copytree(source, run)
        path = damage(kind, stage, run, chance)
        when = f"{path.relative_to(run)}, {when}"
    else:
        shutil.copytree(kept[stage, t, "before"], run)
        when = disturb(kind, stage, t, run, ranks, chance, seconds[stage, t], wanted)
    code, lines, _ = finish(start(stage, t, run, ranks))
    if code == 0 and path and path.name == "generated.jsonl" and not path.exists():
        code, lines, _ = finish(
            start("generate", int(path.parent.name[-1]), run, ranks)
        )  # nobody wanted it yet: the loop makes it again
    if code == 0:
        here, there = contents(run), contents(wanted)
        other = [
            name
            for name in there
            if here.get(name) != there[name]
            and not (path and name in GUARDS and path == run / name)
        ]
        other += [
            str(p.relative_to(run))
            for p in run.rglob("*")
            if p.name in ("checkpoint", "generated.part")
        ]  # cleared away
        other += sorted(here.keys() - there.keys())
        result = "the same bytes" if not other else f"OTHER BYTES in {', '.join(other)}"
    else:
        named = path and any(part in "".join(lines) for part in (str(path), str(path.parent)))
        good = code == (2 if ranks == 1 else 1) and len(lines) == 1 and named
        result = (
            f"refused: {lines[0].replace(str(run), 'RUN')}"
            if good
            else f"BROKEN: exit code {code}, {lines}"
        )
    if result.startswith(("the same", "refused")):
        shutil.rmtree(run)
    return kind, stage, t, ranks, when, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, default=1, help="faults at a time")
    args = parser.parse_args()
    table, bad = collections.defaultdict(collections.Counter), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kept = {ranks: calm(root / f"ranks{ranks}", ranks) for ranks in set(args.ranks)}

        def fault(number):
            ranks = args.ranks[number % len(args.ranks)]
            return one(number, random.Random(f"{args.seed} {number}"), ranks, *kept[ranks], root)

        with ThreadPoolExecutor(args.workers) as pool:
            for number, row in enumerate(pool.map(fault, range(args.faults)), 1):
                kind, stage, t, ranks, when, result = row
                print(
                    f"{number}. {kind}, {stage} {t}, {ranks} rank{'s' * (ranks > 1)}, {when}: {result}",
                    flush=True,
                )
                table[kind][result.split(":")[0]] += 1
                bad += not result.startswith(("the same", "refused"))
    print("\n| fault | times | the same bytes | refused, in one line |\n|---|---|---|---|")
    for kind in KINDS:
        print(
            f"| {kind} | {table[kind].total()} | {table[kind]['the same bytes']} | {table[kind]['refused']} |"
        )
    print(f"\n{args.faults} faults, {bad} that ended in any other way")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
