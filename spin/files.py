"""Files between the stages: written whole, looked at before they are used; and how a stage ends where something is amiss.

A finished file that was cut off, lost or swapped since is told by the number of its lines, by its
size (files.json), by the header of safetensors, or by a mark of the model that made it (recipe.json, generated.json).
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

RESTORE, AGAIN = "restore it, or choose another --run", "copy or download it again"
LOGS = (
    "metrics.jsonl",
    "opponent.jsonl",
)  # of a finished iteration: nothing is made from them any more, but pictures
SHOWN = 6  # held-out prompts whose answers evaluate.py keeps in answers.jsonl, for the report


def fail(message: str):
    """End the stage as a user's mistake: one line on stderr, exit code 2. Under torchrun rank 0 alone speaks."""
    if int(os.environ.get("RANK", 0)) != 0:
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # by which torchrun ends all ranks when one has left;
        time.sleep(10)  # and rank 0 should get its line out first
    line = " ".join(str(message).split())
    print(
        "error: " + (line if len(line) < 1000 else line[:1000] + " …"), file=sys.stderr, flush=True
    )
    raise SystemExit(2)


def cannot(problem: Exception):
    """End the stage because a file cannot be read or written: a full disk, mostly."""
    print(file=sys.stderr)  # a progress bar may have left its line open
    fail(
        f"cannot read or write: {problem}; mend that (make room, where a disk is full), and run the same command again: "
        "what is finished was kept"
    )


def one_line(main):
    """For a stage's main: an OSError ends it in one line."""

    @functools.wraps(main)
    def careful(argv=None):
        try:
            return main(argv)
        except OSError as problem:
            cannot(problem)

    return careful


def write_whole(path: Path, text):
    """Write a file whole or not at all: a .part file, renamed when it is on disk. text: a string, or some one by one."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def identity(name: str, revision: str) -> str:
    """A short mark of a model's weights, by which a run knows where it began: hub name, or a hash of the files' ends.

    Two trainings of one model differ in the last megabyte; hashing 29 GB on every rank would cost minutes. The tokenizer counts.
    """
    digest = hashlib.sha256()
    for path in [*weight_files(Path(name)), *sorted(Path(name).glob("tokenizer*.json"))]:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest() if Path(name).is_dir() else f"{name}@{revision}"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights in a folder from."""
    index = check_json(folder / "model.safetensors.index.json", AGAIN)
    whole = folder / "model.safetensors"
    return (
        [whole]
        if whole.is_file()
        else sorted({folder / name for name in index.get("weight_map", {}).values()})
    )


def check_weights(folder: Path):
    """Refuse safetensors whose length is not what their header says: a copy, or a download, that was cut off."""
    for path in weight_files(folder):
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            fail(f"{path} is missing, or empty: {AGAIN}")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length if length < size else 0))
                end = max(
                    [
                        0,
                        *(
                            w["data_offsets"][1]
                            for name, w in header.items()
                            if name != "__metadata__"
                        ),
                    ]
                )
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                fail(f"{path} is damaged, its header cannot be read: {AGAIN}")
        if size != 8 + length + end:
            fail(
                f"{path} is damaged, it has {size} bytes where its header says {8 + length + end}: {AGAIN}"
            )


def check_json(path: Path, mend: str = "delete it and run evaluate.py again") -> dict:
    """The object in a JSON file of the run, {} where there is no file; refuses one that was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except ValueError as problem:
        fail(f"{path} is damaged ({problem}): {mend}")


def check_lines(path: Path, wanted: int | None, mend: str):
    """Refuse a JSONL file of the run whose last line has no end, or that has other than `wanted` lines (None: any number)."""
    number, last = 0, b""
    with open(path, "rb") if path.exists() else contextlib.nullcontext(()) as file:
        for number, last in enumerate(file, 1):
            pass
    if not last.endswith(b"\n") or wanted not in (None, number):
        fail(
            f"{path} is missing, or damaged: it has {number} lines{f' of {wanted}' * bool(wanted)}, or half of the last: {mend}"
        )


def check_size(path: Path, size: int, mend: str):
    """Refuse a file that is not there, or not of this size."""
    if not path.exists() or path.stat().st_size != size:
        fail(f"{path} is missing, or damaged: it had {size} bytes; {mend}")


def check_files(run: Path):
    """Refuse a run with a finished file that was cut off or lost since. Every stage looks, before it uses or writes anything."""
    prompts = check_json(
        run / "prompts.json", "restore it, or, if the SFT set is what it was, delete it"
    ).get("prompts")
    check_json(run / "heldout.json", "restore it, or, if --eval-data is what it was, delete it")
    for folder in [run, *run.glob("iter[0-9]*"), *run.glob("sft/iter[0-9]*")]:
        sft = " --objective sft" * (folder.parent.name == "sft")
        again = f"restore it, or delete all but generated.json and generated.jsonl in {folder} and run train.py{sft} again"
        trained = (folder / "model").is_dir()
        for name, size in (
            check_json(folder / "files.json", again if trained else "delete it").items()
            if trained
            else ()
        ):
            mend = "restore or delete it, it is but a log" if name in LOGS else again
            if (folder / name).exists() or name not in LOGS:
                check_size(folder / name, size, mend)
        check_json(
            folder / "generated.json",
            "restore it, or delete it and generated.jsonl and run generate.py again",
        )
        if (folder / "generated.jsonl").exists():
            check_lines(
                folder / "generated.jsonl",
                prompts,
                "restore it, or delete it and run generate.py again",
            )
        if (folder / "opponent.jsonl").exists() and not trained:
            check_lines(
                folder / "opponent.jsonl",
                check_json(folder / "opponent.json", again).get("number"),
                again,
            )
        check_json(folder / "benchmarks.json", f"delete it and run evaluate.py{sft} --tasks again")
        if n := check_json(folder / "eval.json", f"delete it and run evaluate.py{sft} again").get(
            "n"
        ):
            check_lines(
                folder / "answers.jsonl",
                min(SHOWN, int(n)),
                f"delete {folder / 'eval.json'} and run evaluate.py{sft} again",
            )
