"""Whether a finished file is whole, and a row of it can be what it says. Used by spin/checks.py."""

import json
from pathlib import Path

from spin.data import Unusable, to_pair
from spin.files import AGAIN, fail, read_json, read_jsonl, weight_files
from spin.run import LOGS, SHOWN, hash_of_model


def check_lines(path: Path, wanted: int | None, mend: str):
    """Refuse a JSONL file whose last line has no end, or that has not `wanted` lines; None: any."""
    number = 0
    last = b""
    if path.exists():
        with open(path, "rb") as file:
            for number, last in enumerate(file, 1):  # noqa: B007 – both are wanted after the loop
                pass
    if not last.endswith(b"\n") or wanted not in (None, number):
        lines = f"{number} lines" if wanted is None else f"{number} lines of {wanted}"
        fail(f"{path} is missing, or damaged: it has {lines}, or half of the last: {mend}")


def check_size(path: Path, size: int, mend: str):
    """Refuse a file that is not there, or not of this size."""
    if not path.exists() or path.stat().st_size != size:
        fail(f"{path} is missing, or damaged: it had {size} bytes; {mend}")


def check_weights(folder: Path):
    """Refuse safetensors whose length is not what their header says: a copy that was cut off."""
    for path in weight_files(folder):
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            fail(f"{path} is missing, or empty: {AGAIN}")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length if length < size else 0))
                header.pop("__metadata__", None)
                ends = [weight["data_offsets"][1] for weight in header.values()]
                wanted = 8 + length + max([0, *ends])
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                fail(f"{path} is damaged, its header cannot be read: {AGAIN}")
        if size != wanted:
            fail(f"{path} is damaged, it has {size} bytes where its header says {wanted}: {AGAIN}")


def check_run_files(run: Path):
    """Every stage's first look: refuse a run with a finished file that was cut off or lost."""
    restore = "restore it, or, if {} is what it was, delete it"
    prompts = read_json(run / "prompts.json", restore.format("the SFT set")).get("prompts")
    read_json(run / "heldout.json", restore.format("--eval-data"))
    for folder in [run, *run.glob("iter[0-9]*"), *run.glob("sft/iter[0-9]*")]:
        sft = " --objective sft" if folder.parent.name == "sft" else ""
        mend = "restore it, or delete it{} and run generate.py again"
        read_json(folder / "generated.json", mend.format(" and generated.jsonl"))
        if (folder / "generated.jsonl").exists():
            check_lines(folder / "generated.jsonl", prompts, mend.format(""))
        again = f"restore it, or delete all but generated.json and generated.jsonl in {folder} "
        again += f"and run train.py{sft} again"
        if (folder / "model").is_dir():
            for name, size in read_json(folder / "files.json", again).items():
                if name == "hash":
                    continue  # of the model, which the stage looks at that reads it
                if name not in LOGS:
                    check_size(folder / name, size, again)
                elif (folder / name).exists():
                    check_size(folder / name, size, "restore or delete it, it is but a log")
        elif (folder / "opponent.jsonl").exists():
            number = read_json(folder / "opponent.json", again).get("number")
            check_lines(folder / "opponent.jsonl", number, again)
        again = f"run evaluate.py{sft}"
        read_json(folder / "benchmarks.json", f"delete it and {again} --tasks again")
        shown = read_json(folder / "eval.json", f"delete it and {again} again").get("n")
        if shown:
            mend = f"delete {folder / 'eval.json'} and {again} again"
            check_lines(folder / "answers.jsonl", min(SHOWN, int(shown)), mend)


def chunks_done(parts: list[Path], chunks, opponent: str, revision: str) -> set[int]:
    """The numbers of the chunks that were answered before. Refuses parts of other prompts, or of
    another model than this opponent, which generated.json beside their folder tells."""
    folder = parts[0].parent
    again = f"delete {folder} and run this again"
    done = set()
    for k, (part, chunk) in enumerate(zip(parts, chunks, strict=True)):
        if part.exists():
            check_lines(part, len(chunk), again)
            if [row.get("id") for row in read_jsonl(part)] != [pair["id"] for pair in chunk]:
                fail(f"{part} does not hold the prompts of its chunk: {again}")
            done.add(k)
    made_by = read_json(folder.with_name("generated.json"), "delete it").get("model")
    if done and made_by != hash_of_model(opponent, revision):
        mend = "delete that folder and run this again"
        fail(f"the answers in {folder} are not known to be those of {opponent}: {mend}")
    return done


def sampled_rows(path: Path, t: int, codec):
    """The rows of an iteration's generated.jsonl, one by one; refuses any that is not of it."""
    if not path.exists():
        fail(f"{path} is missing: run generate.py --iter {t} first")
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        try:
            to_pair(row, where)
        except Unusable as problem:
            fail(f"{where}: {problem}")
        if type(row.get("id")) is not int or row.get("iter") != t:
            found = f"id {row.get('id')!r} of iteration {row.get('iter')!r}"
            fail(f"{where}: {found} in the file of iteration {t}")
        check_ids(row, where, codec)
        yield row


def check_ids(row: dict, where: str, codec):
    """Refuse generated_ids that this model cannot have sampled, or that do not fit their finish."""
    ids = row.get("generated_ids")
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < codec.vocabulary for i in ids)
    if not known or not ids:
        fail(f"{where}: generated_ids are not token ids of this model")
    if (ids[-1] == codec.end) != (row.get("finish") == "eos"):
        found = f"finish is {row.get('finish')!r}, but the ids say otherwise"
        fail(f"{where}: {found}; they are of another tokenizer")
