"""Files are written whole or not at all; an error in one names the line. If something is wrong, a
stage "ends with one line": `error:` and what to do on stderr, and exit code 2."""

import contextlib
import gzip
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
AGAIN = "copy or download it again"  # what helps when a model's file is damaged


def fail(message: str):
    """End the stage because of a user's mistake: one line on stderr, exit code 2. Rank 0 prints it;
    another rank prints it only if that rank is still running half a minute later."""
    if int(os.environ.get("RANK", 0)) != 0:
        # torchrun ends all ranks by SIGTERM when one has left; rank 0 should get its line out first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)
    line = " ".join(str(message).split())
    line = line if len(line) < 1000 else line[:1000] + " …"
    print("error: " + line, file=sys.stderr, flush=True)
    raise SystemExit(2)


def fail_for_io(problem: Exception):
    """End the stage because a file cannot be read or written: a full disk, mostly."""
    print(file=sys.stderr)  # a progress bar may have left its line open
    fix = "fix that (make room, where a disk is full), and run the same command again"
    fail(f"cannot read or write: {problem}; {fix}: what is finished was kept")


@contextlib.contextmanager
def io_errors_in_one_line():
    """Around a command's main: an OSError ends it in one line. A character that a terminal cannot
    show is replaced."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    refuse_half_a_launch()
    try:
        yield
    except OSError as problem:
        fail_for_io(problem)


def refuse_half_a_launch():
    """Refuse torchrun's variables if one is missing or they contradict each other: torch would wait
    for the other ranks for hours."""
    rank, size, port = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local, on_node = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    numbers = rank, size, port, local, on_node
    fits = os.environ.get("MASTER_ADDR") and all(map(str.isdecimal, numbers))
    here = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if here and not (fits and int(local) <= int(rank) < int(size) and 0 < int(port) < 2**16):
        os.environ["RANK"] = "0"  # else fail would wait half a minute for rank 0
        wanted = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT do not fit together"
        fail(f"{wanted}: start several ranks with torchrun; for one, first unset {' '.join(here)}")


def write_whole(path: Path, text: str):
    """Write a file whole or not at all: a .part file, renamed when it is on disk."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value, indent: int | None = None):
    """Write one value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=indent) + "\n")


def write_jsonl(path: Path, rows):
    """Write rows as JSONL, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict):
    """Add one row to a JSONL file."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_json(path: Path, fix: str) -> dict:
    """The object in a JSON file of the run; {} if there is no file. A damaged file is refused, in
    a line that ends with `fix`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except ValueError as problem:
        fail(f"{path} is damaged ({problem}): {fix}")


def read_jsonl(path: Path):
    """The objects of a JSONL file. Any other line ends the stage; the message gives its number."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as problem:  # brackets a thousand deep
                    fail(f"{path}, line {number}: {problem}")
                yield row


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder from which transformers reads the weights."""
    index = read_json(folder / "model.safetensors.index.json", AGAIN)
    parts = {folder / name for name in index.get("weight_map", {}).values()}
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(parts)


def locate(name: str) -> str:
    """A path as the user means it: from the working directory, else from this repository."""
    ours = not Path(name).exists() and (REPOSITORY / name).exists()
    return str(REPOSITORY / name) if ours else name


def check_out(out: Path | None):
    """Refuse --out in a directory that is not there, before anything is computed for it."""
    if out and not out.parent.is_dir():
        fail(f"--out {out}: there is no directory {out.parent}")
