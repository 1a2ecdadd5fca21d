"""SFT sets → pairs: {"prompt", "real"}, and where a row has them "system" and "generated".
An SFT set is a hub id, or a .jsonl, .json or .parquet file, in one of the shapes of SHAPES."""

import json
from pathlib import Path

from spin.files import fail, locate, read_jsonl


def read_rows(source: str, split: str = "train"):
    """The rows (dicts) of an SFT set, in order. Ends with one line where they cannot be read."""
    path = Path(locate(source))
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        if Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
            fail(f"no data at {source}: a .jsonl, .json or .parquet file is wanted, or a hub id")
        import datasets

        try:
            return datasets.load_dataset(source, split=split)
        except Exception as problem:  # the hub client raises many kinds; each: not to be had
            cause = f"{type(problem).__name__}: {str(problem)[:200]}"
            fail(f"cannot load {source} (split {split}) from the hub: {cause}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # comes with datasets

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            rows = list(read_jsonl(path))
    except (OSError, ValueError, RecursionError, OverflowError) as problem:
        fail(f"cannot read {path}: {problem}")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        fail(f"{path} holds no rows: a list of objects is wanted")
    return rows


def _first_round(messages) -> dict:
    """The first round of a conversation (Appendix B.1); a system message stays with the prompt."""
    turns = [m for m in messages if m["role"] != "system"]
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    if [m["role"] for m in turns[:2]] != ["user", "assistant"]:
        raise ValueError("the conversation does not begin with a user and an assistant turn")
    pair = {"prompt": turns[0]["content"], "real": turns[1]["content"]}
    return {**pair, "system": system} if system else pair


def _two_conversations(row) -> dict:
    pair, other = _first_round(row["real"]), _first_round(row["generated"])
    if other["prompt"] != pair["prompt"]:
        raise ValueError("real and generated answer different prompts")
    return {**pair, "generated": other["real"]}


def _alpaca(row) -> dict:
    more = "\n\n" + row["input"] if row.get("input") else ""
    return {"prompt": row["instruction"] + more, "real": row["output"]}


def _preference(row) -> dict:
    answers = {"real": row["chosen"], "generated": row["rejected"]}
    for name, answer in answers.items():
        if not isinstance(answer, str):
            answers[name] = _first_round(answer)["real"]
    return {"prompt": row["prompt"], **answers}


# the fields that tell a shape -> the pair in it; the first whose fields are all there is taken
SHAPES = {
    ("prompt", "real", "generated"): dict,  # generated.jsonl itself, or pairs as plain text
    ("real", "generated"): _two_conversations,  # the authors' published sets
    ("prompt", "chosen", "rejected"): _preference,  # with --pairs this is DPO
    ("messages",): lambda row: _first_round(row["messages"]),  # UltraChat
    ("instruction", "output"): _alpaca,
    ("prompt", "response"): lambda row: {"prompt": row["prompt"], "real": row["response"]},
    ("prompt", "completion"): lambda row: {"prompt": row["prompt"], "real": row["completion"]},
    ("question", "answer"): lambda row: {"prompt": row["question"], "real": row["answer"]},
}


def to_pair(row: dict, where: str) -> dict:
    """The pair in a row of any known shape. Ends with one line that begins with `where` if none."""
    for names, read in SHAPES.items():
        if all(name in row for name in names):
            try:
                pair = read(row)
                for name in ("prompt", "real", "system", "generated"):
                    if not isinstance(pair.get(name, ""), str):
                        raise TypeError(f"its {name} is no text")
                    pair.get(name, "").encode()  # without lone surrogates
                return pair
            except (KeyError, TypeError, ValueError, AttributeError) as problem:
                cause = f"{type(problem).__name__}: {problem}"
                fail(f"{where}: the row has the shape {'/'.join(names)}, but {cause}")
    fields = ", ".join(map(str, row)) or "(none)"
    known = "; ".join("/".join(names) for names in SHAPES)
    fail(f"{where}: unknown shape with fields {fields}; known: {known}")
