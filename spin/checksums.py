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

CHECKS_FILES = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank a node looks at checksums
GUARDS = ("recipe", "prompts", "heldout")  # by which a run knows what it is made from


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


def read_list(listed: Path) -> dict[str, str]:
    """{name: SHA-256} of a list. Where a line of it is damaged it names the list itself, which is
    then like no checksum."""
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.exists() else ""
    known = {name: digest for digest, name in re.findall("^([0-9a-f]{64})  (.+)$", text, re.M)}
    return known if len(known) == len(text.splitlines()) else {**known, listed.name: "none"}


def unlike(folder: Path, wanted: dict[str, str]) -> str | None:
    """The first of a folder's files that is missing, or has another checksum."""
    paths = {name: Path(os.path.normpath(folder / name)) for name in wanted}
    there = [name for name in wanted if paths[name].exists()]
    other = [name for name in there if sha256(paths[name]) != wanted[name]]
    return min(other + list(wanted.keys() - there), default=None)


def check_list(folder: Path, listed: Path, names, otherwise: str):
    """Refuse these files of a folder where they are not as listed."""
    known = read_list(listed)
    wanted = {name: known.get(name, "none") for name in names}
    if CHECKS_FILES and (name := unlike(folder, wanted)):
        path = Path(os.path.normpath(folder / name))
        how = "damaged, or was changed" if name in known else "new"
        how = how if path.exists() else "missing"
        if name.endswith(".sha256"):
            anew = f"if the model was trained anew delete {listed.parent}"
            otherwise = f"write it anew (docs/run-directory.md); {anew}"
        mend = f"restore what was there, or {otherwise}"
        fail(f"{path} is {how}, by the checksums in {listed}: {mend}")


def check_run_files(run: Path):
    """Refuse a listed file that has changed: the first look of each stage and of the loop. Models
    and checkpoints are large, so who reads one checks it; a missing file is its reader's to refuse.
    """
    numbered = [*run.glob("iter*"), *run.glob("sft/iter*")]
    folders = [run, *(path for path in numbered if path.name[4:].isdigit())]  # not a user's copy
    for listed in sorted(x for folder in folders for x in folder.glob("*.sha256")):
        # what model.sha256 lists lies in model/, so none of it is found here
        paths = {name: Path(os.path.normpath(listed.parent / name)) for name in read_list(listed)}
        there = [name for name, path in paths.items() if path.exists()]
        otherwise = f"delete {listed.with_suffix('.*')} to have what is needed made again"
        if listed.stem in GUARDS:
            otherwise = "choose another --run"
        check_list(listed.parent, listed, there, otherwise)


def is_whole(path: Path) -> bool:
    """Whether a file is there, and it and what it was made from are as listed."""
    wanted = read_list(path.with_suffix(".sha256"))
    return path.exists() and path.name in wanted and not unlike(path.parent, wanted)


def write_list(listed: Path, folder: Path, names):
    """List files of a folder."""
    write_whole(listed, "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names)))


def write_listed(path: Path, text, made_from: Path | None = None):
    """Write a file, and NAME.sha256 of it, of the other of NAME.json and NAME.jsonl, and of what it
    was made from. For write_json and write_jsonl, in the place of write_whole."""
    if is_whole(path) and path.read_text(encoding="utf-8") == text:
        return
    part = Path(f"{path}.part")
    write_whole(part, text)
    path.unlink(missing_ok=True)  # a kill must not leave the old file with the new one's checksum
    others = [path.with_suffix(".json"), path.with_suffix(".jsonl"), made_from]
    sums = {path.name: sha256(part)}
    sums |= {os.path.relpath(x, path.parent): sha256(x) for x in others if x and x.exists()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_whole(path.with_suffix(".sha256"), lines)
    part.replace(path)
