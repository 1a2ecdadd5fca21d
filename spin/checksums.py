"""Checksums of what a stage has finished and a later one reads: NAME.sha256 beside NAME.jsonl (and
NAME.json), as sha256sum lists them; model.sha256 for the folder model, theta_0.sha256 for --model.
A list is written just before the last of its files gets its name; its first line, a comment, is
the checksum of the others. What has no list is not checked. Who looks: docs/run-directory.md."""

import functools
import hashlib
import os
from pathlib import Path

from tqdm import tqdm

from spin.files import fail, write_whole

CHECKS_FILES = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank a node looks at checksums
MODEL_LISTS = ("theta_0.sha256", "model.sha256")
GUARDS = ("recipe", "prompts", "heldout", "pairs")  # by which a run knows what it is made from


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


def as_list(known: dict[str, str]) -> str:
    """The text of a list of {name: SHA-256}; its first line is the checksum of the others."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in known.items())
    return f"# {hashlib.sha256(lines.encode()).hexdigest()}\n{lines}"


def read_list(listed: Path) -> dict[str, str] | None:
    """{name: SHA-256} of a list, ours or sha256sum's; empty without one, None if it is damaged."""
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.exists() else as_list({})
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    known = {line[66:]: line[:64] for line in lines}  # 64 digits, 2 spaces, a name
    ours, theirs = as_list(known), as_list(known).partition("\n")[2]
    return known if text == ours or text == theirs != "" else None


def unlike(folder: Path, listed: Path, more=(), missing: bool = True) -> Path | None:
    """The first of a folder's listed files, and of more, that is not as listed or, if missing is
    true, not there; the list itself where it is damaged."""
    known = read_list(listed)
    if known is None:
        return listed
    for name in sorted({*known, *more}):
        path = Path(os.path.normpath(folder / name))  # by names alone: iter1 may be a link
        amiss = sha256(path) != known.get(name) if path.exists() else missing
        if amiss:
            return path
    return None


def check_list(folder: Path, listed: Path, otherwise: str, more=(), missing: bool = True):
    """Refuse a folder whose files are not as listed. more, missing: as for unlike."""
    if CHECKS_FILES and (path := unlike(folder, listed, more, missing)):
        how = "damaged, changed or new" if path.exists() else "missing"
        if path == listed:
            otherwise = "delete it: its files are taken as they are"
        elif path.name in MODEL_LISTS:  # that of θ_t, which was trained anew
            otherwise = f"delete {listed.parent}, which is of an earlier model"
        mend = f"restore what was there, or {otherwise}"
        fail(f"{path} is {how}, by the checksums in {listed}: {mend}")


def check_run_files(run: Path):
    """Refuse a listed file that has changed: the first look of each stage and of the loop. Models
    and checkpoints, which are large, and missing files are left to the stage that reads them."""
    numbered = [*run.glob("iter*"), *run.glob("sft/iter*")]
    folders = [run, *(path for path in numbered if path.name[4:].isdigit())]  # not a user's copy
    lists = [listed for folder in folders for listed in folder.glob("*.sha256")]
    for listed in sorted(lists, key=lambda x: (x.name not in MODEL_LISTS, x)):  # also in lists
        again = f"delete {listed.with_suffix('.*')} to have what is needed made again"
        otherwise = "choose another --run" if listed.stem in GUARDS else again
        check_list(listed.parent, listed, otherwise, missing=False)  # a model's are not here


def is_whole(path: Path) -> bool:
    """Whether a file is there, and it and what it was made from are as listed."""
    return not unlike(path.parent, path.with_suffix(".sha256"), [path.name])


def write_list(listed: Path, folder: Path, names):
    """List files of a folder."""
    write_whole(listed, as_list({name: sha256(folder / name) for name in sorted(names)}))


def write_listed(path: Path, text, made_from: Path | None = None):
    """Write a file, and NAME.sha256 of NAME.json, NAME.jsonl and what it was made from."""
    if is_whole(path) and path.read_text(encoding="utf-8") == text:
        return
    part = Path(f"{path}.part")
    write_whole(part, text)
    path.unlink(missing_ok=True)  # a kill must not leave the old file with the new one's checksum
    others = [path.with_suffix(".json"), path.with_suffix(".jsonl"), made_from]
    known = {os.path.relpath(x, path.parent): sha256(x) for x in others if x and x.exists()}
    write_whole(path.with_suffix(".sha256"), as_list({**known, path.name: sha256(part)}))
    part.replace(path)
