"""A source of data (a file, a folder or a hub id) → its rows → pairs {"prompt", "real"}, with
"system" and "generated" if a row has them.

Every cell of a file stays text: the answer "007" is no number, and "NA" is no gap. So the package
datasets only says which files of a folder belong to a split. If it read them, it would write an
answer "1.50" as "1.5" where other answers are words."""

import csv
import glob
import gzip
import json
import os
import re
import unicodedata
from pathlib import Path

from spin.files import fail, locate, read_jsonl

# ---- a source → rows -----------------------------------------------------------------------------

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
WANTED = "a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub id is wanted"
# names of files that may hold rows, including kinds that we cannot read
DATA = r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather|zip|tar)(\.(gz|zst|bz2|xz|lz4))?$"
# in the name of a file that is not for training
HELD_OUT = r"(?<![a-z])(test(ing)?|val(id(ation)?)?|dev|eval(uation)?|held(out)?|holdout)(?![a-z])"


def read_rows(source: str, split: str = "train"):
    """The rows of a data set, in order, as a sequence of dicts.
    source: a file, a folder of files or of save_to_disk, or a hub id, OWNER/NAME or
    OWNER/NAME:CONFIG. split: for a folder or a hub id. Ends with one line if it cannot be read."""
    path = Path(locate(source))
    is_hub_id = re.fullmatch(r"[\w-][^/~]*(/[^/]+)?", source) and kind_of(path) not in ENDINGS
    if not path.exists() and not is_hub_id:
        fail(f"no data at {source}: {WANTED}")
    try:
        if path.is_dir():
            rows = rows_of_folder(path.resolve(), split)
        elif path.exists():
            rows = rows_of_file(path)
        else:
            import datasets

            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as cause:  # of the hub client, pyarrow, json: many kinds
        fail(f"cannot read {source} (split {split}): {type(cause).__name__}: {str(cause)[:300]}")
    if not any(isinstance(row, dict) for row in rows):
        fail(f"{source} holds no rows: a list of objects is wanted")
    return rows


def kind_of(path: Path) -> str:
    """The ending that says what is in a file: ".jsonl" for set.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def rows_of_folder(folder: Path, split: str):
    """The rows of a split in a folder: of save_to_disk, or of data files. Refuses what the package
    datasets would do in silence: take a held-out set for training data, or leave a file out."""
    import datasets

    if (folder / "dataset_info.json").exists():  # one saved set, without splits
        return datasets.load_from_disk(str(folder))
    saved = (folder / "dataset_dict.json").exists()
    if saved:
        splits = datasets.load_from_disk(str(folder))
    else:
        splits = datasets.load_dataset_builder(str(folder)).config.data_files
        # files named as on the hub, in its folder data or elsewhere
        shard = (
            rf"(.*/)?{re.escape(split)}(-\d+-of-\d+(-\w+)?|/[^/]*)?\.(jsonl?|csv|parquet)(\.gz)?"
        )
        named = [path for path in sorted(folder.rglob("*")) if re.fullmatch(shard, str(path))]
        if len({path.parent for path in named}) == 1:  # else which of them is meant?
            splits = {split: [*map(str, named)], **splits}
    if split not in splits:
        there = ", ".join(map(str, splits))
        fail(f"{folder} has no split {split}: give --split or --eval-split, one of {there}")
    if saved:
        return splits[split]
    files = [Path(file) for file in splits[split]]
    known = {Path(file) for of_one in splits.values() for file in of_one}
    folders = {file.parent for file in known}
    for path in sorted(path for one in folders for path in one.iterdir()):
        held_out = re.search(HELD_OUT, str(path.relative_to(folder)).lower())
        if path in files and held_out and not re.search(HELD_OUT, split.lower()):
            fail(f"{path} would be read as {split}, but its name says held-out: rename or move it")
        is_data = kind_of(path) in (*ENDINGS, ".tsv") and path.name != "dataset_infos.json"
        if is_data and path not in known and not held_out:
            fail(f"{path} would be left out: rename or move it")
    if os.environ.get("RANK", "0") == "0":
        read = [str(path.relative_to(folder)) for path in files]
        data = sorted(glob.glob("**/*.*", root_dir=folder, recursive=True))  # none that are hidden
        rest = [name for name in data if name not in read and re.search(DATA, name.lower())]
        print(f"{folder}: {split} is {first_six(read)}; not read: {first_six(rest)}")
    return [row for path in files for row in rows_of_file(path)]


def first_six(names: list[str]) -> str:
    """Names of files for a line; of many the first six, and their number."""
    more = f", … ({len(names)} files)" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "none"


def rows_of_file(path: Path) -> list:
    """The rows of one file, by its ending. JSON is a list of objects, or lines."""
    kind = kind_of(path)
    if kind == ".parquet":
        import pyarrow.parquet  # comes with datasets

        return pyarrow.parquet.read_table(path).to_pylist()
    if kind == ".jsonl":
        return list(read_jsonl(path))
    if kind not in ENDINGS:
        fail(f"no data at {path}: {WANTED}")
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind == ".csv":
            return list(rows_of_csv(file))
        text = file.read()
    # Dataset.to_json writes lines under the ending .json
    return json.loads(text) if text.lstrip().startswith("[") else list(read_jsonl(path))


def rows_of_csv(file):
    """The rows of an open CSV file, each cell as its text. A row with a cell too many or too few is
    an error: pandas would take the first column for the rows' names, and all others would move."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of {file.name} have one name")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{file.name}, line {reader.line_num}: a cell too many or too few")
        yield row


# ---- a row → a pair ------------------------------------------------------------------------------

TEXTS = ("system", "prompt", "real", "generated")
LONGEST = 1_000_000  # characters of a text: to tokenize 50 MB, only to cut them, takes a minute
# The key names the columns of the prompt ("": the conversation holds it), the real answer, maybe a
# generated one; the value, a column that is appended to the prompt, or "". The first fit is taken.
SHAPES = {
    ("prompt", "real", "generated"): "",  # generated.jsonl itself, or pairs as plain text
    ("", "real", "generated"): "",  # the authors' published sets, conversations
    ("prompt", "chosen", "rejected"): "",  # with --pairs this is DPO
    ("question", "chosen", "rejected"): "",  # Orca's pairs
    ("", "chosen", "rejected"): "",  # conversations
    ("", "messages"): "",  # UltraChat
    ("", "conversations"): "",  # ShareGPT
    ("instruction", "output"): "input",  # Alpaca
    ("instruction", "response"): "context",  # Dolly
    ("prompt", "response"): "",
    ("prompt", "completion"): "",  # TRL
    ("query", "response"): "",
    ("question", "response"): "",  # Orca
    ("question", "answer"): "",
    ("input", "output"): "",
}
SYSTEM = ("system", "system_prompt", "system_message")  # a column that any shape may have
OURS = ("id", "iter", "generated_ids", "finish")  # of generated.jsonl
FINISH = ("finish", "finish_reason", "stop_reason", "done_reason")  # why an answer ended
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# columns of other shapes that the model should see before it answers
OF_THE_PROMPT = ("history", "context", "input", "instruction", "tools", "functions", "documents")
OF_THE_PROMPT += ("passage", "document", "article", "choices", "options", "hint", *MEDIA)
# and what changes how a row is rendered, or trained on
OF_THE_PROMPT += ("chat_template", "enable_thinking", "reasoning_effort", "custom_instructions")
ALIKE = r".*(kwargs|_args|tools|history|contexts|(loss|train)\w*_masks?|loss_weights)"
# in the name of what a message may hold besides its text
MORE_OF_A_TURN = r"tool|function|reason|think|thought|image|audio|video|attachment|kwargs"
TEXT_PARTS = ("text", "input_text", "output_text")  # of a message that is a list of parts
# a mark that a message is not to be trained: of OpenAI, axolotl, ms-swift, tinker or torchtune
UNTRAINED = (
    r"(weight|(compute_)?loss(_weight|_mask|_scale)?|(is_)?train(ing|able|ed)?)=(0|0\.0|false|no)"
    r"|((is_)?mask(ed)?|(mask|ignore|no)_loss|ignore|do_not_train)=(1|1\.0|true|yes)"
)
# they look empty, though Unicode calls them letters or signs
BLANKS = "\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159"
EMPTY = ("", "[]", "{}", "null", "None", [], {})  # what a column holds if it holds nothing
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)\b""")  # '[{"role": …'


class Unusable(ValueError):
    """A row that is no pair, or that a template or a model cannot take. Its text is the reason."""


def to_pair(row: dict, source: str) -> tuple[dict, list[str]]:
    """(the pair in a row, its columns that are not used). Raises Unusable. Ends with one line if a
    column that belongs to the prompt would be lost. A conversation may have "later_rounds", too.

    {"question": "1+1?", "answer": "2", "level": 3}  →  {"prompt": "1+1?", "real": "2"}, ["level"]
    """
    if not isinstance(row, dict):
        raise Unusable("no object with fields")
    there = without_nulls(row)
    # a column "loss" holds the loss that someone measured, not a mark
    if is_untrained({name: value for name, value in there.items() if name != "loss"}):
        raise Unusable("an answer that is marked as not to be trained")
    fits = (shape for shape in SHAPES if all(name in there for name in shape if name))
    shape = next(fits, None)
    if not shape:
        fields = [f"{name}" if name in there else f"empty {name}" for name in row]
        raise Unusable(f"unknown shape with fields {', '.join(fields) or '(none)'}")
    used = {*shape, SHAPES[shape], *SYSTEM, *OURS, *FINISH}
    unused = [name for name in there if name not in used]
    pair = read_pair(there, shape)
    for name in TEXTS:
        text = pair.get(name, "")
        if not isinstance(text, str):
            raise Unusable(f"{name} is no text")
        if text.encode(errors="replace").decode() != text:
            raise Unusable(f"{name} is no valid Unicode")
        if len(text) > LONGEST and name in ("system", "prompt"):
            raise Unusable("prompt too long")
    for name, value in there.items():
        asks = name in unused and (name in OF_THE_PROMPT or re.fullmatch(ALIKE, name))
        if asks and not (is_nothing(value) or repeats(pair, value)):
            columns = "/".join(filter(None, shape))
            fix = f"put what it says into the prompt, or remove the column {name}"
            fail(f"{source} has the shape {columns}, and {name} would be lost: {fix}")
    return pair, unused


def without_nulls(row: dict) -> dict:
    """The fields of a row that hold something. NaN holds nothing: pandas writes it for a null."""
    return {name: x for name, x in row.items() if x not in (None, []) and x == x}


def is_nothing(value) -> bool:
    """Whether a value is null, NaN or EMPTY, or holds only such."""
    if isinstance(value, list | dict):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return value in (None, *EMPTY) or value != value or str(value).strip() in ("", "[ ]")


def is_untrained(marked: dict) -> bool:
    """Whether a row or a message is marked as not to be trained: "weight": 0."""
    return any(re.fullmatch(UNTRAINED, f"{name}={value}".lower()) for name, value in marked.items())


def repeats(pair: dict, value) -> bool:
    """Whether a text stands in a pair, as lines of its own: then nothing of it is lost."""
    if not isinstance(value, str):
        return False
    lines = rf"^\s*{re.escape(value.strip())}\s*$"
    return any(re.search(lines, pair.get(name, ""), re.MULTILINE) for name in TEXTS)


def is_blank(text: str) -> bool:
    """Whether a text looks empty: only spaces, U+200B, lone combining marks and the like."""
    unseen = ("Cc", "Cf", "Cn", "Co", "Zs", "Zl", "Zp", "Mn", "Me")
    return all(c in BLANKS or unicodedata.category(c) in unseen for c in text)


def read_pair(row: dict, shape: tuple) -> dict:
    """The pair in a row of this shape without nulls, its system message included."""
    if shape == TEXTS[1:] and all(isinstance(row[name], str) for name in shape):
        pair = {name: row[name] for name in (*shape, *OURS) if name in row}
    else:
        asked, *answers = (turns_of(row[name], name) if name else [] for name in shape)
        more = row.get(SHAPES[shape], "")
        if more not in EMPTY:  # the prompt of these shapes is text
            texts = [text for text in (row[shape[0]], more) if text not in EMPTY]
            if not all(isinstance(text, str) for text in texts):
                raise Unusable("prompt is no text")
            asked = [("user", "\n\n".join(texts))]
        pair = pair_of_turns(asked, *answers)
    if any(str(row.get(name)).lower() in ("length", "max_tokens", "max_length") for name in FINISH):
        pair["finish"] = "length"  # the generated answer was cut off, so it has no end of turn
    systems = [one[name] for one in (row, pair) for name in SYSTEM if name in one]
    texts = [text for text in systems if text != ""] or systems  # "" counts if there is no other
    if any(text != texts[0] for text in texts):
        raise Unusable("two system messages")
    return {**pair, "system": texts[0]} if texts else pair


def turns_of(value, column: str) -> list[tuple[str, str]]:
    """A column as turns (role, text). value: a text; messages of OpenAI's kind, whose content may
    be a list of parts; or ShareGPT's: {"from": "human", "value": "Hi?"} → ("user", "Hi?")."""
    if isinstance(value, str) and WRITTEN_OUT.match(value):
        raise Unusable(f"{column} is a conversation written as text")
    if not isinstance(value, list):
        asks = column in ("prompt", "question", "query", "instruction", "input")
        return [("user" if asks else "assistant", value)]
    turns = []
    for message in value:
        if not isinstance(message, dict):
            raise Unusable(f"{column} is no list of messages")
        message = without_nulls(message)
        role = str(message.get("role") or message.get("from"))
        if role.lower() not in ROLES:
            raise Unusable(f"a turn by {ascii(role[:20])}")
        more = [name for name in message if re.search(MORE_OF_A_TURN, name.lower())]
        if not all(is_nothing(message[name]) for name in more):
            raise Unusable("a turn with tool calls, reasoning or pictures beside its text")
        content = message.get("content", message.get("value"))
        texts, marked = [], [message]
        for part in content if isinstance(content, list) else [{"text": content}]:
            part = without_nulls(part) if isinstance(part, dict) else {"type": "unknown"}
            known = part.get("type", "text") in TEXT_PARTS
            texts.append(part.get("text") if known else None)
            marked.append(part)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise Unusable("a turn without text")
        role = ROLES[role.lower()]
        untrained = role == "assistant" and any(map(is_untrained, marked))
        turns.append((role, None if untrained else "".join(texts)))
    return turns


def pair_of_turns(asked: list, real: list, *others: list) -> dict:
    """The pair that turns hold. asked: the turns of the prompt's own column. real, others: those of
    the real and maybe a generated answer, alone or in a whole conversation. Of several rounds the
    first is used (Appendix B.1). Two conversations: the first turn that differs is the answer."""
    if real in others:
        raise Unusable("equal answers")
    is_answer = [role == "assistant" for role, _ in real]
    for generated in others:
        is_answer = [a != b for a, b in zip(real, generated, strict=False)]
    cut = [*is_answer, True].index(True)  # how many turns come before the answer
    answers = zip(TEXTS[2:], (real, *others), strict=False)
    pair = {name: answer_of(turns[cut:]) for name, turns in answers}
    if any(role == "assistant" for role, _ in real[cut + 1 :]):
        pair["later_rounds"] = True
    # the prompt's column and the conversation may both hold the turns before the answer
    before = max(asked, real[:cut], key=len)
    if any(turn not in before for turn in asked + real[:cut]):
        raise Unusable("the prompt is not that of the conversation")
    systems = [text for role, text in before if role == "system"]
    rest = before[len(systems) :]
    if [role for role, _ in rest] != ["user"]:
        raise Unusable("several turns before the answer" if len(rest) > 1 else "no prompt first")
    pair["prompt"] = rest[0][1]
    if systems:
        pair["system"] = "\n".join(systems)
    return pair


def answer_of(turns: list) -> str:
    """The answer with which these turns begin."""
    roles = [role for role, _ in turns[:2]]
    if not roles:
        raise Unusable("a conversation without an answer")
    if roles[0] != "assistant":
        raise Unusable("the answers do not answer the same prompt")
    if roles == ["assistant", "assistant"]:
        raise Unusable("an answer in several turns")
    if turns[0][1] is None:
        raise Unusable("an answer that is marked as not to be trained")
    return turns[0][1]


def sampled_rows(path: Path, t: int, renderer):
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
        check_ids(row, where, renderer)
        yield row


def check_ids(row: dict, where: str, renderer):
    """Refuse generated_ids that this model cannot have sampled, or that do not fit their finish."""
    ids = row.get("generated_ids")
    known = isinstance(ids, list) and all(
        type(i) is int and 0 <= i < renderer.vocabulary for i in ids
    )
    if not known or not ids:
        fail(f"{where}: generated_ids are not token ids of this model")
    if (ids[-1] in renderer.end_ids) != (row.get("finish") == "eos"):
        fail(f"{where}: finish {row.get('finish')!r} does not fit the ids: another tokenizer's?")
