"""Where an SFT set lies → its rows: files of several kinds, folders of them, a hub id.
Every cell stays the text that stands in the file: an answer "007" or "NA" is no number and no gap,
so JSON is read by Python's json, and CSV with every column as text."""

import csv
import gzip
import json
import re
import zlib
from pathlib import Path

from spin.data import shape_of
from spin.files import fail, locate, read_jsonl

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
WANTED = "a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub id"
CONVERT = "convert it, for one by datasets.load_dataset(…).to_json('set.jsonl')"
# words in the names of files, or of folders in it
SPLITS = {"train", "test", "val", "valid", "validation"}
SPLITS |= {"dev", "eval", "held", "heldout", "holdout"}
TORN = (csv.Error, zlib.error)


def read_rows(source: str, split: str = "train"):
    """The rows of an SFT set, in order, as a sequence. source: a file, several with commas between
    them, a folder of files or of save_to_disk, or a hub id, with :CONFIG where a set has several.
    Ends with one line where they cannot be read."""
    names = [source] if Path(locate(source)).exists() else source.split(",")
    names = [name.strip() for name in names]
    if not all(names):
        fail(f"no data at {source!r}: a name is missing between commas")
    paths = [Path(locate(name)) for name in names]
    if not any(path.exists() for path in paths) and not looks_like_a_file(source):
        return from_hub(source, split)
    rows = []
    for path in paths:
        if path.is_dir():
            rows += rows_of_folder(path, split)
        elif not path.exists() or kind_of(path) not in ENDINGS:
            fail(f"no data at {path}: {WANTED} is wanted; of another kind, {CONVERT}")
        else:
            rows += rows_of_file(path)
    if not any(isinstance(row, dict) for row in rows):
        fail(f"{source} holds no rows: a list of objects is wanted")
    return rows


def looks_like_a_file(source: str) -> bool:
    """Whether a source that is not there was meant as a path: a hub id is NAME or OWNER/NAME."""
    ending = source.lower().removesuffix(".gz").endswith(ENDINGS)
    return ending or source.count("/") > 1 or source.startswith((".", "/", "~"))


def kind_of(path: Path) -> str:
    """The ending that says what is in a file; .gz around it does not matter."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def rows_of_folder(folder: Path, split: str) -> list:
    """The rows of a folder that save_to_disk has written, or of all data files in it."""
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        import datasets

        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as problem:  # arrow's, json's, its own: each: not a whole set
            fail(f"cannot read {folder}: {problem}")
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                fail(f"{folder} has no split {split}: give --split, one of {', '.join(found)}")
            found = found[split]
        return found.to_list()
    files = []
    for pattern in ("*", "*/*"):  # those of the folder itself, else one deeper, such as data/
        found = [path for path in sorted(folder.glob(pattern)) if kind_of(path) in ENDINGS]
        hidden = [path for path in found if "/." in f"/{path.relative_to(folder)}"]
        about = [path for path in found if path.name.startswith(("dataset_info", "metadata."))]
        files = files or [path for path in found if path not in hidden + about]
    words = [words_of(path.relative_to(folder)) for path in files]
    if len({frozenset(w & SPLITS) for w in words}) > 1:
        # training on the test set would be the worst of readings
        files = [path for path, w in zip(files, words, strict=True) if words_of(split) == w]
    is_model = (folder / "config.json").exists()
    if not files or is_model:
        which = f"named as the split {split} (--split)" if words and not is_model else "of data"
        fail(f"{folder} holds no file {which}: {WANTED} is wanted")
    return [row for path in files for row in rows_of_file(path)]


def words_of(name) -> set[str]:
    """The words in the name of a split or of a file, without its ending: {"train", "sft"}."""
    stem = re.sub(r"(\.[a-z]+)+$", "", str(name).lower())
    return set(re.findall("[a-z]+", stem)) - {"of", "data", "shard", "part"}


def rows_of_file(path: Path) -> list:
    """The rows of one file, by its ending."""
    kind = kind_of(path)
    try:
        if kind in (".csv", ".tsv"):
            return rows_of_table(path, "\t" if kind == ".tsv" else ",")
        if kind == ".parquet":
            import pyarrow.parquet  # comes with datasets

            return pyarrow.parquet.read_table(path).to_pylist()
        if kind == ".json":
            return rows_of_json(path)
        return list(read_jsonl(path))
    except (OSError, EOFError, ValueError, RecursionError, OverflowError, *TORN) as problem:
        fail(f"cannot read {path}: {problem}")


def rows_of_json(path: Path) -> list:
    """The rows of a list of objects, alone or as "data" of an object; or of JSON lines,
    which Dataset.to_json writes under this ending, too."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        text = file.read().decode("utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as problem:
        if problem.msg != "Extra data":
            raise
        return list(read_jsonl(path))
    if isinstance(found, dict) and shape_of(found):
        return [found]
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        return found["data"]
    if isinstance(found, dict):  # one line of JSON lines, or {"train": […]} with another name
        only = list(found.values())[0] if len(found) == 1 else None
        return only if isinstance(only, list) else [found]
    return found if isinstance(found, list) else []


def rows_of_table(path: Path, separator: str) -> list[dict]:
    """The rows of a CSV file, every cell as its text: "007", "NA", and nothing as "".
    Not by pandas, as the package datasets has it: where rows have a cell too many, that takes the
    first column for their names, and all others move."""
    csv.field_size_limit(2**31 - 1)
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    rows = []
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError("two columns have one name")
        for cells in filter(None, reader):
            if len(cells) != len(names):
                wrong = f"{len(cells)} cells under {len(names)} names"
                raise ValueError(f"line {reader.line_num}: {wrong}")
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


def from_hub(source: str, split: str):
    """The rows of a set on the hub: OWNER/NAME, or OWNER/NAME:CONFIG."""
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as problem:  # the hub client raises many kinds; each: not to be had
        cause = f"{type(problem).__name__}: {str(problem)[:300]}"
        fail(f"cannot load {source} (split {split}) from the hub: {cause}")
