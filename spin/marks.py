"""Checksums of what a stage has finished and a later one reads: NAME.sha256 beside NAME.jsonl (and
NAME.json), as sha256sum lists them; model.sha256 for the folder model, theta_0.sha256 for --model.
A list is written before its file appears, so that none is without. What has no list, such as
answers sampled elsewhere, is not checked. Who looks when: docs/run-directory.md."""

import functools
import hashlib
import os
import re
from pathlib import Path

from tqdm import tqdm

from spin.files import fail, write_whole

LOOKS = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank a node looks at checksums


def sha256(path: Path) -> str:
    """The SHA-256 of a whole file; one of many gigabytes is read once in a process."""
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    bar = tqdm(total=size, desc=f"checks {path.name}", unit="B", unit_scale=True, delay=3)
    with open(path, "rb") as file, bar:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def marks(listed: Path) -> dict[str, str]:
    """{name: SHA-256} of a list; a torn line of it says nothing."""
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.exists() else ""
    return {name: mark for mark, name in re.findall("^([0-9a-f]{64})  (.+)$", text, re.M)}


def unlike(folder: Path, wanted: dict[str, str]) -> str | None:
    """The first of a folder's files that is missing, or has another checksum."""
    there = [name for name in wanted if (folder / name).exists()]
    other = [name for name in there if sha256(folder / name) != wanted[name]]
    return min(other + list(wanted.keys() - there), default=None)


def check_sums(folder: Path, listed: Path, names, mend: str):
    """Refuse these files of a folder where they are not as listed."""
    known = marks(listed)
    if LOOKS and (name := unlike(folder, {name: known.get(name, "none") for name in names})):
        path = Path(os.path.normpath(folder / name))
        how = "damaged, or was changed" if path.exists() else "missing"
        fail(f"{path} is {how}, by its checksum in {listed}: {mend}")


def check_run_files(run: Path):
    """Every stage's first look, and the loop's: refuse a file of the run that has changed. A lost
    one is refused where it is read, and so are models and checkpoints, which are large."""
    for folder in ("", "iter[0-9]*/", "sft/iter[0-9]*/"):
        for listed in sorted(run.glob(f"{folder}*.sha256")):
            # a model's own lie a folder deeper
            there = [name for name in marks(listed) if (listed.parent / name).exists()]
            mend = f"restore it, or delete {listed.with_suffix('.*')}"
            check_sums(listed.parent, listed, there, f"{mend} to have what is needed made again")


def is_whole(path: Path) -> bool:
    """Whether a file is there, and it and what it was made from are as listed."""
    wanted = marks(path.with_suffix(".sha256"))
    return path.exists() and path.name in wanted and not unlike(path.parent, wanted)


def write_marks(listed: Path, folder: Path, names):
    """List files of a folder."""
    write_whole(listed, "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names)))


def write_marked(path: Path, text, made_from: Path | None = None):
    """As write_whole, and listed: with the other of NAME.json and NAME.jsonl, and what it was made
    from. A write for write_json and write_jsonl."""
    part = Path(f"{path}.part")
    write_whole(part, text)
    path.unlink(missing_ok=True)  # a kill must not leave the old file with the new one's mark
    others = [path.with_suffix(".json"), path.with_suffix(".jsonl"), made_from]
    sums = {path.name: sha256(part)}
    sums |= {os.path.relpath(x, path.parent): sha256(x) for x in others if x and x.exists()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_whole(path.with_suffix(".sha256"), lines)
    part.replace(path)
