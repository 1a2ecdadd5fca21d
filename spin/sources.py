"""Where an SFT set lies → its rows: files of several kinds, folders of them, a hub id.
Every cell stays the text that stands in the file: an answer "007" or "NA" is no number and no gap,
so JSON is read by Python's json, and CSV with every column as text."""

import gzip
import json
from pathlib import Path

from spin.files import fail, locate, read_jsonl

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
WANTED = "a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub id"
CONVERT = "convert it, for one by datasets.load_dataset(…).to_json('set.jsonl')"
SPLITS = ("train", "test", "val", "dev", "held")  # words in the names of files


def read_rows(source: str, split: str = "train"):
    """The rows of an SFT set, in order, as a sequence. source: a file, several with commas between
    them, a folder of files or of save_to_disk, or a hub id, with :CONFIG where a set has several.
    Ends with one line where they cannot be read."""
    names = [source] if Path(locate(source)).exists() else source.split(",")
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
        files = files or [path for path in found if not path.name.startswith(".")]
    words = {word for word in SPLITS for path in files if word in path.stem}
    if len(words) > 1:  # training on the test set would be the worst of readings
        files = [path for path in files if path.name.startswith(split)]
    if not files or (folder / "config.json").exists():  # a model's folder
        which = f"of the split {split} (--split)" if words else "of data"
        fail(f"{folder} holds no file {which}: {WANTED} is wanted")
    return [row for path in files for row in rows_of_file(path)]


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
    except (OSError, EOFError, ValueError, RecursionError, OverflowError) as problem:
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
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        return found["data"]
    if isinstance(found, dict):  # one line of JSON lines, or {"train": […]} with another name
        only = list(found.values())[0] if len(found) == 1 else None
        return only if isinstance(only, list) else [found]
    return found if isinstance(found, list) else []


def rows_of_table(path: Path, separator: str) -> list[dict]:
    """The rows of a CSV file, every cell as its text: "007", "NA", and nothing as ""."""
    import pandas  # comes with datasets, which reads CSV by it, but not all cells as text

    as_text = {"dtype": str, "keep_default_na": False, "na_filter": False}
    return pandas.read_csv(path, sep=separator, **as_text).to_dict("records")


def from_hub(source: str, split: str):
    """The rows of a set on the hub: OWNER/NAME, or OWNER/NAME:CONFIG."""
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as problem:  # the hub client raises many kinds; each: not to be had
        cause = f"{type(problem).__name__}: {str(problem)[:300]}"
        fail(f"cannot load {source} (split {split}) from the hub: {cause}")
