"""spin/data/rows.py, selection.py: the sets that people have, and what is left out."""

import copy
import gzip
import json
from dataclasses import replace

import datasets
import pytest
from conftest import THETA0, stage
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spin.data.pairs import encode_pairs
from spin.data.rows import Unusable, is_blank, read_rows, to_pair
from spin.data.selection import select, select_pairs
from spin.data.text import make_renderer
from spin.files import read_jsonl, write_jsonl
from spin.recipe import Recipe
from spin.report import page

SHORT = Recipe(max_length=64, max_new_tokens=24)


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def from_value(who: str, value) -> dict:
    return {"from": who, "value": value}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


NAN = float("nan")
USER, BOT, OTHER = said("user", "Hi?"), said("assistant", "Hello."), said("assistant", "Yo")
SYSTEM, MORE = said("system", "Be kind."), said("user", "and 7?")
RUDE, ROUND = said("system", "Be rude."), [USER, BOT]
HUMAN, GPT = from_value("human", "Hi?"), from_value("gpt", "Hello.")
PICTURE = {"type": "image_url", "text": "a"}
PAIRS, PREFERENCES = "prompt real generated", "prompt chosen rejected"
PLAIN = {"prompt": "Hi?", "response": "Hello."}
PAIR = {"prompt": "Hi?", "real": "Hello."}
KIND = PAIR | {"system": "Be kind."}
EMPTY = PAIR | {"system": ""}
TWO = PAIR | {"generated": "Yo"}
SUM = {"prompt": "Sum\n\n1 2", "real": "3"}
SUM_TALK = [said("user", "Sum\n\n1 2"), said("assistant", "3")]


def row(columns: str, *values) -> dict:
    """row("prompt response", "Hi?", "Hello.")"""
    return dict(zip(columns.split(), values, strict=True))


# (the pair, a row that holds it)
READ = [
    (PAIR, PLAIN),
    (PAIR, row("prompt completion", "Hi?", "Hello.")),
    (PAIR, row("question answer", "Hi?", "Hello.")),
    (PAIR, row("query response", "Hi?", "Hello.")),
    (PAIR, row("input output", "Hi?", "Hello.")),
    (PAIR, row("instruction context response", "Hi?", "", "Hello.")),
    (PAIR, row("instruction input output", "Hi?", "", "Hello.")),
    (PAIR, row("instruction input output", "Hi?", None, "Hello.")),
    (PAIR, row("instruction input output", [], "Hi?", "Hello.")),
    (PAIR, row("prompt prompt_id messages", "Hi?", "7", ROUND)),  # UltraChat
    (PAIR, {"conversations": [HUMAN, GPT]}),  # ShareGPT
    (PAIR, {"conversations": ROUND}),
    (PAIR, row("prompt completion", [USER], [BOT])),
    (PAIR, {"messages": [said("user", parts("H", "i?")), BOT]}),
    (PAIR, {"messages": [{**HUMAN, "role": None, "content": None}, BOT]}),  # merged schemas
    (PAIR, {"messages": [said("User", "Hi?"), BOT | {"role": "Assistant"}]}),
    (PAIR, row("tools messages", "[]", ROUND)),
    (PAIR, {"system": None} | PLAIN),
    (PAIR, row("prompt output messages", None, None, ROUND)),
    (PAIR | {"later_rounds": True}, {"messages": [USER, BOT, MORE, BOT]}),
    (PAIR, row("system context query response", NAN, NAN, "Hi?", "Hello.")),  # NaN of pandas
    (PAIR, {"messages": [USER | {"weight": 0}, BOT | {"weight": 1, "tool_calls": NAN}]}),
    (PAIR | {"later_rounds": True}, {"messages": [*ROUND, MORE, BOT | {"train": False}]}),
    (PAIR, {"messages": [USER, BOT | {"weight": NAN, "train": None, "masked": False}]}),
    (PAIR, PLAIN | {"train_id": 0, "loss": 0.0, "weight": 1, "masked": 0}),
    (PAIR, {"messages": [USER, BOT | {"function_call": {"name": None, "arguments": NAN}}]}),
    (PAIR, PLAIN | {"images": [None], "tools": "[ ]", "template_kwargs": {"x": {"y": None}}}),
    (
        TWO | {"finish": "length"},
        row(f"{PREFERENCES} stop_reason", "Hi?", "Hello.", "Yo", "length"),
    ),
    (PAIR, row("instruction input conversations", "Hi?", "", [HUMAN, GPT])),  # Magpie
    (SUM, row("instruction input messages", "Sum", "1 2", SUM_TALK)),
    (KIND, row("instruction context messages", " Hi?", "Be kind.", [SYSTEM, *ROUND])),
    (TWO | {"finish": "length"}, row(f"{PREFERENCES} finish", "Hi?", "Hello.", "Yo", "length")),
    (KIND, {"system": "Be kind."} | PLAIN),
    (KIND, row("system_prompt question response", "Be kind.", "Hi?", "Hello.")),  # Orca
    (KIND, {"conversations": [SYSTEM, HUMAN, GPT]}),
    (KIND, row("system conversations", "Be kind.", [HUMAN, BOT])),
    (KIND, row("prompt completion", [SYSTEM, USER], [BOT])),
    (KIND, row("system messages", "", [SYSTEM, *ROUND])),
    (EMPTY, {"system": ""} | PLAIN),
    (EMPTY, {"messages": [said("system", ""), *ROUND]}),
    (SUM, row("instruction context response", "Sum", "1 2", "3")),  # Dolly
    (SUM, row("instruction input output history", "Sum", "1 2", "3", [])),  # Alpaca
    (TWO, row("prompt real generated", "Hi?", "Hello.", "Yo")),
    (TWO, row("real generated", ROUND, [USER, OTHER])),  # the authors' sets
    (TWO, row(PAIRS, "Hi?", ROUND, [USER, OTHER])),
    (TWO, row(PREFERENCES, "Hi?", "Hello.", "Yo")),
    (TWO, row(PREFERENCES, [USER], [BOT], [OTHER])),
    (TWO, row("chosen rejected", ROUND, [USER, OTHER])),
    (TWO, row(PREFERENCES, "Hi?", ROUND, [USER, OTHER]) | {"messages": []}),  # UltraFeedback
    (TWO | KIND, row(f"system {PREFERENCES}", "Be kind.", "Hi?", "Hello.", "Yo")),
    (TWO | KIND, row(PREFERENCES, "Hi?", [SYSTEM, *ROUND], [SYSTEM, USER, OTHER])),
    (TWO | KIND, row(PREFERENCES, [SYSTEM, USER], ROUND, [USER, OTHER])),
    (TWO | KIND, row(PREFERENCES, [SYSTEM, USER], [SYSTEM, BOT], [SYSTEM, OTHER])),
]


@pytest.mark.parametrize("pair, row", READ)
def test_a_row_of_a_known_shape_is_the_pair_that_stands_in_it(pair, row):
    assert to_pair(row, "set")[0] == pair


# (a part of the reason why a row cannot be used, such a row)
UNTRAINED_PART = [{"type": "text", "text": "No.", "train": False}, {"type": "text", "text": "Yo"}]
LEFT_OUT = [
    ("written as text", row(PREFERENCES, "Hi?", '[{"role": "user"}]', "[{'from': 'a'}]")),
    ("reasoning", {"messages": [USER, {**BOT, "thinking": "Hm."}]}),
    ("pictures", {"messages": [{**USER, "images": ["a.png"]}, BOT]}),
    ("tool calls", {"messages": [USER, {**BOT, "tool_calls": [{"name": "f"}]}]}),
    ("without text", {"messages": [USER, said("assistant", [{"type": "image"}])]}),
    ("without text", {"messages": [USER, said("assistant", [PICTURE])]}),
    ("without text", {"messages": [USER, said("assistant", ["Yo"])]}),
    ("without text", {"messages": [USER, said("assistant", parts(None))]}),
    ("without text", {"messages": [USER, said("assistant", [])]}),
    ("without text", {"messages": [USER, said("assistant", None)]}),
    ("an answer in several turns", {"messages": [USER, BOT, OTHER]}),
    ("a turn by", {"messages": [said(["user"], "Hi?"), BOT]}),
    ("a turn by 'tool'", {"messages": [USER, said("tool", "7"), BOT]}),
    ("no list of messages", {"messages": ["Hi?", "Hello."]}),
    ("without an answer", {"messages": [USER]}),
    ("no prompt first", {"messages": [BOT, USER, BOT]}),
    ("no prompt first", {"messages": [USER, SYSTEM, BOT]}),
    ("several turns", {"messages": [USER, USER, BOT]}),
    ("several turns", row(PREFERENCES, "and 7?", [*ROUND, MORE, BOT], [*ROUND, MORE, OTHER])),
    ("several turns", row("prompt completion", [*ROUND, MORE], [BOT])),
    ("several turns", row("prompt completion", [*ROUND, USER], ROUND)),
    ("not that of the conv", row(PREFERENCES, "Spell tin", ROUND, [USER, OTHER])),
    ("not that of the conv", row(PREFERENCES, "Hi?", [SYSTEM, BOT], [SYSTEM, OTHER])),
    ("the same prompt", row("chosen rejected", ROUND, [MORE, OTHER])),
    ("the same prompt", row("chosen rejected", [SYSTEM, *ROUND], [RUDE, *ROUND])),
    ("equal answers", row(PREFERENCES, "Hi?", "Hello.", "Hello.")),
    ("equal answers", row("real generated", ROUND, ROUND)),
    ("two system messages", {"system": "Be kind.", "system_prompt": "Be rude."} | PLAIN),
    ("two system messages", row("system messages", "Be rude.", [SYSTEM, *ROUND])),
    ("prompt is no text", row("instruction input output", "Square it.", 0, "0")),
    ("real is no text", row("prompt response", "Hi?", 7)),
    ("prompt too long", row("prompt response", "x" * 1_000_001, "Hello.")),
    ("no valid Unicode", row("prompt response", "Hi?", "\ud800")),
    ("prompt, empty response", row("prompt response", "Hi?", None)),
    ("empty messages", {"messages": []}),
    ("not to be trained", {"messages": [USER, BOT | {"weight": 0}, MORE, OTHER | {"weight": 1}]}),
    ("not to be trained", {"messages": [USER, BOT | {"train": False}]}),
    ("not to be trained", {"conversations": [HUMAN, GPT | {"loss_weight": 0.0}]}),
    ("not to be trained", {"messages": [USER, BOT | {"masked": True}]}),
    ("not to be trained", {"messages": [USER, BOT | {"trainable": "false"}]}),
    ("not to be trained", {"messages": [USER, BOT | {"loss": 0}]}),
    ("not to be trained", {"messages": [USER, BOT | {"ignore_loss": True}]}),
    ("not to be trained", {"messages": [USER, {"role": "assistant", "content": UNTRAINED_PART}]}),
    ("beside its text", {"messages": [USER, BOT | {"function_calls": "f(1)"}]}),
    ("not to be trained", row(PREFERENCES, [USER], [BOT | {"loss_mask": 0}], [OTHER])),
    ("not to be trained", PLAIN | {"weight": 0}),
    ("no object", [1]),
    ("unknown shape", {"text": "Hi?"}),
]


@pytest.mark.parametrize("reason, row", LEFT_OUT)
def test_a_row_that_is_no_pair_is_left_out_by_its_reason(reason, row):
    with pytest.raises(Unusable, match=reason):
        to_pair(row, "set")


@pytest.mark.parametrize(
    "column, content",
    [
        ("history", [["Hi?", "Hello."]]),
        ("context", "Ann is 7."),
        ("input", "Ann is 7."),
        ("tools", [{"name": "f"}]),
        ("images", ["a.png"]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("reasoning_effort", "high"),
        ("xml_tools", "f"),
        ("loss_mask", [0, 1]),
        ("hint", "Hi"),  # "Hi?" does not repeat it
    ],
)
def test_a_column_of_the_prompt_that_would_be_lost_refuses_the_set(column, content, refused):
    line = refused(lambda: to_pair({**PLAIN, column: content}, "set.jsonl"))
    assert f"set.jsonl has the shape prompt/response, and {column} would be lost" in line
    empty = type(content)()
    for nothing in (empty, {"enable_thinking": None, "tools": []}, NAN):
        assert to_pair({**PLAIN, column: nothing}, "set.jsonl")[0] == PAIR  # control


def test_columns_that_are_not_used_are_named():
    row = {"messages": [USER, BOT], "prompt": "Hi?", "prompt_id": 7, "nothing": None}
    assert to_pair(row, "set") == (PAIR, ["prompt", "prompt_id"])


# ---- files ----

STRINGS = ["007", "NA", "null", "2024-01-01", "None", "", "1e5", "nan", "true", " x "]
ROWS = [{"prompt": f"p {i}", "response": text} for i, text in enumerate(STRINGS)]
TALK = [{"messages": [USER, BOT]}]


def jsonl_text(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows=ROWS) -> str:
    lines = [("prompt", "response"), *(row.values() for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def lay(folder, files: dict) -> str:
    """A folder with these files, {name: text, or rows as JSON lines or parquet}; its path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(content).to_parquet(path)
        else:
            path.write_text(content if isinstance(content, str) else jsonl_text(content))
    return str(folder)


def dataset():
    return datasets.Dataset.from_list(ROWS)


def write_splits(folder):
    datasets.DatasetDict({"train": dataset(), "test": dataset().select([0])}).save_to_disk(folder)


FILES = {
    "set.jsonl": jsonl_text(),
    "SET.JSONL": jsonl_text(),
    "odd.jsonl": "\ufeff" + jsonl_text().replace("\n", "\r\n\n").replace("p", "\\u0070")[:-3],
    "set.jsonl.gz": gzip.compress(jsonl_text().encode()),
    "list.json": json.dumps(ROWS),
    "lines.json": jsonl_text(),
    "to_json.json": lambda path: dataset().to_json(path),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "set.csv": "\ufeff" + csv_text(),
    "set.Csv": csv_text(),
    "set.csv.gz": gzip.compress(csv_text().encode()),
    "set.parquet": lambda path: dataset().to_parquet(path),
    "saved": lambda path: dataset().save_to_disk(path),
    "splits": write_splits,
}
FOLDERS = {
    "of JSON lines": {"a.jsonl": ROWS[:4], "b.jsonl": ROWS[4:]},
    "of JSON": {"a.json": json.dumps(ROWS)},
    "of CSV": {"a.csv": csv_text(rows=ROWS[:4]), "b.csv": csv_text(rows=ROWS[4:])},
    "of parquet": {"x-00000-of-2.parquet": ROWS[:4], "x-00001-of-2.parquet": ROWS[4:]},
    "of the hub, with what is about it": {
        "data/latest-0.jsonl": ROWS,
        "dataset_infos.json": "{}",
        ".cache/x.jsonl": ROWS[:1],
        "README.md": "A set.",
    },
    "with a test set": {"train.jsonl": ROWS, "test.jsonl": ROWS[:1]},
    "of folders": {"train/0.jsonl": ROWS, "test/0.jsonl": ROWS[:1]},
    "with a held-out set": {"train.jsonl": ROWS, "holdout.jsonl": ROWS[:1]},
}


@pytest.mark.parametrize("name", FILES)
def test_every_cell_is_the_text_that_stands_in_the_file(name, tmp_path):
    content, path = FILES[name], tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(read_rows(str(path), "train")) == ROWS


@pytest.mark.parametrize("name", FOLDERS)
def test_every_cell_is_the_text_that_stands_in_a_file_of_a_folder(name, tmp_path):
    assert read_rows(lay(tmp_path, FOLDERS[name]), "train") == ROWS


LIKE_NUMBERS = {
    "csv": ["prompt,response\np 0,yes\n", "prompt,response\np 1,1.50\np 2,007\n"],
    "jsonl": [jsonl_text(ROWS[:1]), jsonl_text([{"prompt": "p", "response": "2024-01-01"}])],
}


@pytest.mark.parametrize("kind", LIKE_NUMBERS)
def test_texts_like_numbers_or_dates_stay_though_the_library_changes_them(kind, tmp_path):
    """It finds the types of each file, and writes numbers as texts if another file has texts."""
    first, second = LIKE_NUMBERS[kind]
    folder = lay(tmp_path / "set", {f"a.{kind}": first, f"b.{kind}": second})
    answers = [row["response"] for row in read_rows(folder)]
    assert answers == (["yes", "1.50", "007"] if kind == "csv" else ["007", "2024-01-01"])
    cache = str(tmp_path / "cache")
    by_library = datasets.load_dataset(folder, split="train", cache_dir=cache)["response"]
    changed = ["yes", "1.5", "7"] if kind == "csv" else ["007", "2024-01-01 00:00:00"]
    assert list(by_library) == changed  # control


CONFIGS = """---
configs:
- {config_name: a, data_files: a/*.jsonl}
- {config_name: b, data_files: b/*.jsonl}
---
"""
TWO_CONFIGS = {"README.md": CONFIGS, "a/train.jsonl": ROWS, "b/train.jsonl": ROWS}
# (a part of the line, the files of a folder)
REFUSED_FOLDERS = [
    ("has no split train: give --split or --eval-split, one of valid", {"valid.jsonl": ROWS}),
    ("one of test", {"data.jsonl": ROWS, "test.jsonl": ROWS}),
    ("its name says held-out", {"Train.jsonl": ROWS, "Test.jsonl": ROWS}),
    ("train_test", {"train.jsonl": ROWS, "train_test.jsonl": ROWS}),
    ("its name says held-out", {"data.jsonl": ROWS, "held_out.jsonl": ROWS}),
    ("b.csv would be left", {"a.jsonl": ROWS, "b.csv": csv_text()}),
    ("a.jsonl would be left", {"train.jsonl": ROWS, "a.jsonl": ROWS}),
    ("B.JSONL would be left", {"a.jsonl": ROWS, "B.JSONL": ROWS}),
    ("b.tsv would be left", {"a.jsonl": ROWS, "b.tsv": ""}),
    ("no data at", {"a.tsv": "prompt\n"}),
    ("no data at", {"a.txt": "Hi?"}),
    ("cannot read", {"a.py": "x = 1"}),
    ("Config name is missing", TWO_CONFIGS),
    ("config.json would be left", {"config.json": "{}", "a.jsonl": ROWS}),
]


@pytest.mark.parametrize("word, files", REFUSED_FOLDERS)
def test_a_folder_whose_files_could_be_taken_for_others_is_refused(word, files, tmp_path, refused):
    folder = lay(tmp_path, files)
    assert word in refused(lambda: read_rows(folder, "train"))


def test_shards_named_as_the_hub_names_them_are_read_by_their_split(tmp_path, capsys):
    hash_ = "-a3ecf92756993583"
    for mark, where in (("", "data/"), (hash_, "data/"), (hash_, ""), ("", "default/")):
        names = [f"{where}train_sft-0000{k}-of-00002{mark}.parquet" for k in range(2)]
        rest = [f"{where}{name}-00000-of-00001{mark}.parquet" for name in ("test_sft", "train_gen")]
        files = dict(zip([*names, *rest], [ROWS[:4], ROWS[4:], ROWS[:2], ROWS[:1]], strict=True))
        folder = lay(tmp_path / f"of the hub {where} {mark}", files)
        assert read_rows(folder, "train_sft") == ROWS
        line = capsys.readouterr().out
        assert f"train_sft is {', '.join(names)}; not read: {', '.join(rest)}\n" in line
        assert read_rows(folder, "test_sft") == ROWS[:2]


def test_the_files_of_a_folder_that_are_read_and_those_that_are_not_are_named(tmp_path, capsys):
    names = ["train-en.jsonl", "train.jsonl", "train_extra.jsonl", "test.jsonl", ".cache/x.jsonl"]
    folder = lay(tmp_path / ".hidden", dict.fromkeys(names, TALK))
    assert read_rows(folder, "train") == TALK * 3
    read = "train-en.jsonl, train.jsonl, train_extra.jsonl"
    assert capsys.readouterr().out == f"{folder}: train is {read}; not read: test.jsonl\n"
    folder = lay(tmp_path / "many", {f"{k:02}.jsonl": TALK for k in range(99)})
    read_rows(folder, "train")
    assert "04.jsonl, 05.jsonl, … (99 files); not read: none\n" in capsys.readouterr().out
    read_rows(
        lay(tmp_path / "sets", {"train_sft.jsonl": TALK, "train_gen.jsonl": ROWS}), "train_sft"
    )
    assert "train_sft is train_sft.jsonl; not read: train_gen.jsonl\n" in capsys.readouterr().out
    other = ["more/x.jsonl.zst", "x.ndjson"]
    read_rows(lay(tmp_path / "packed", {"train.jsonl": TALK, **dict.fromkeys(other, "")}), "train")
    assert f"not read: {', '.join(other)}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_conversation_is_one_row_in_files_and_folders(kind, tmp_path):
    content = json.dumps(TALK[0]) if kind == "json" else TALK
    folder = lay(tmp_path, {f"one.{kind}": content})
    for source in (folder, f"{folder}/one.{kind}"):
        assert read_rows(source) == TALK


def test_a_saved_split_that_is_not_there_is_named_with_those_that_are(tmp_path, refused):
    write_splits(tmp_path / "splits")
    line = refused(lambda: read_rows(str(tmp_path / "splits"), "valid"))
    assert "has no split valid: give --split or --eval-split, one of train, test" in line


def test_a_hub_set_is_loaded_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("someone/maths:main", "train") == read_rows("someone/maths", "train") == ROWS
    assert asked == [("someone/maths", "main", "train"), ("someone/maths", None, "train")]


UNREADABLE = {
    "empty.jsonl": "",
    "empty.json": "[]",
    "named.json": '{"train": [{"prompt": "p"}]}',
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "empty.csv": "",
    "torn.csv": 'a,b\n"x,1\n',
    "twice.csv": "prompt,prompt\na,b\n",
    "wide.csv": "prompt,response\nWhat is 1, 2?,three\nIs a, b?,yes\n",
    "narrow.csv": "prompt,response\nHi?\n",
    "no.jsonl.gz": "\x1f\x8b no gzip",
    "no.parquet": "PAR1",
    "set.tsv": "prompt\tresponse\nHi?\tHello.\n",
    "set.ndjson": jsonl_text(),
}


@pytest.mark.parametrize("name", [*UNREADABLE, "a.jsonl,b.jsonl"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(name, tmp_path, refused, tokenizer):
    if name in UNREADABLE:
        (tmp_path / name).write_text(UNREADABLE[name])
    path = str(tmp_path / name)
    assert name in refused(lambda: selected(read_rows(path), tokenizer, source=name))


# ---- selection ----


def rows_of(n):
    return [{"prompt": f"p {i}", "response": f"r {i}"} for i in range(n)]


def selected(rows, tokenizer, number=5000, recipe=SHORT, source="set"):
    return select(rows, source, make_renderer(tokenizer, recipe.template), recipe, number)


def test_a_smaller_number_of_prompts_is_a_subset_of_a_larger_under_one_seed(tokenizer):
    def ids_of(number, recipe=SHORT):
        pairs, _ = selected(rows_of(100), tokenizer, number, recipe)
        return {pair["id"] for pair in pairs}

    assert ids_of(14) < ids_of(26) < ids_of(50) and len(ids_of(50)) == 50
    assert ids_of(14) != ids_of(14, replace(SHORT, seed=1))  # control: another seed


def test_what_is_left_out_is_counted_by_rule(tokenizer):
    rows = rows_of(3) + [
        {"prompt": "p 0", "response": "again"},
        {"prompt": "q", "response": " "},
        {"prompt": "q", "response": "no repeat of one that was left out"},
        {"prompt": "q", "response": "\ud800"},
        {"prompt": "", "response": "r"},
        {"prompt": "w" * 60, "response": "r"},
        {"prompt": "z", "response": "y" * 60},
    ]
    pairs, counts = selected(rows, tokenizer)
    assert {p["prompt"] for p in pairs} == {"p 0", "p 1", "p 2", "q", "z"}
    assert counts == {
        "read": 10,
        "real is no valid Unicode": 1,
        "duplicate prompt": 1,
        "empty prompt or response": 2,
        "prompt too long": 1,
        "response cut at max_length": 1,
    }


def test_rows_of_several_shapes_with_ids_of_their_own_are_the_pairs_of_plain_rows(tokenizer):
    mixed = [
        PLAIN | {"prompt": "p 0", "id": 1},
        {"question": "p 1", "answer": "Hello.", "id": 1},
        {"messages": [said("user", "p 2"), BOT, MORE]},
        row(f"id iter {PAIRS}", "x", 7, "p 3", "Hello.", "y"),
    ]
    plain = [{"prompt": f"p {i}", "response": "Hello."} for i in range(4)]
    found, wanted = (
        [(pair["id"], pair["prompt"], pair["real"]) for pair in selected(rows, tokenizer)[0]]
        for rows in (mixed, plain)
    )
    assert found == wanted and len(found) == 4


def test_with_a_template_of_special_tokens_text_that_spells_one_is_left_out_and_counted(tokenizer):
    rows = rows_of(2) + [{"prompt": "what is </s>?", "response": "r"}]
    _, counts = selected(rows, tokenizer, recipe=replace(SHORT, template="{prompt}</s>A:"))
    assert counts["text of a special token"] == 1
    _, counts = selected(rows, tokenizer)
    assert counts["text of a special token"] == 0  # the paper's template is plain text


NO_TOKEN = "text that the tokenizer has no token for"
NUMBERS = {"</s>": 0, "<unk>": 1, "a": 2, "b": 3, " ": 4}
AS_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LATIN = trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)


def core_with(model, cut=None, decoder=None, lines=None) -> Tokenizer:
    core = Tokenizer(model)
    core.pre_tokenizer, core.decoder = cut, decoder
    if lines:
        core.train_from_iterator(lines, LATIN)
    return core


# tokenizers that know "a" and "b" alone: what they make of another character
POOR = {
    "nothing": core_with(models.BPE(NUMBERS, [])),
    "an unknown token": core_with(models.BPE(NUMBERS, [], unk_token="<unk>")),
    "an error": core_with(models.WordLevel(NUMBERS), pre_tokenizers.WhitespaceSplit()),
    "an unknown word": core_with(models.WordLevel(NUMBERS, "<unk>"), pre_tokenizers.Whitespace()),
    "some of its bytes": core_with(models.BPE(), AS_BYTES, decoders.ByteLevel(), ["a b é"]),
    "an unknown piece": core_with(
        models.Unigram([("</s>", 0), ("<unk>", 0), ("a", -1), ("b", -1)], 1)
    ),
}
RICH = core_with(models.BPE(), AS_BYTES, decoders.ByteLevel())
ALL_BYTES = trainers.BpeTrainer(
    special_tokens=["<eot>"], initial_alphabet=AS_BYTES.alphabet(), show_progress=False
)
RICH.train_from_iterator(["a b"], ALL_BYTES)


@pytest.mark.parametrize("name", POOR)
def test_text_for_which_the_tokenizer_has_no_token_is_left_out_and_counted(name):
    tok = PreTrainedTokenizerFast(tokenizer_object=POOR[name], eos_token="</s>")
    rows = [{"prompt": "a", "response": "本"}, {"prompt": "b 本", "response": "b"}]
    rows += [{"prompt": "a", "response": "b", "system": "è"}, {"prompt": "a b", "response": "b"}]
    wanted = replace(SHORT, template="{prompt}" if name != "an error" else "{prompt} a")
    pairs, counts = selected(rows, tok, recipe=wanted)
    assert [pair["prompt"] for pair in pairs] == ["a b"] and counts[NO_TOKEN] == 3
    # control: with all bytes; its unknown token is its EOS, as of GPT-2, and text alone is none
    same = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<eot>")
    rich = PreTrainedTokenizerFast(tokenizer_object=RICH, **same)
    pairs, counts = selected([*rows, row("prompt response", "x", "<eot>")], rich, recipe=wanted)
    assert len(pairs) == 5 and NO_TOKEN not in counts


def test_text_that_a_normalizer_writes_otherwise_is_not_lost():
    core = copy.deepcopy(RICH)
    core.normalizer = normalizers.NFKC()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eot>")
    rows = [{"prompt": f"{k}", "response": x} for k, x in enumerate(("Acme™", "20 ℃", "𝐀bc", "é"))]
    assert NO_TOKEN not in selected(rows, tok, recipe=replace(SHORT, template="{prompt}"))[1]


def test_a_letter_of_the_demo_that_it_does_not_know_leaves_out_its_row(tokenizer):
    rows = [
        *rows_of(2),
        *({"prompt": "Name a day", "response": x} for x in ("本日", "t\ti", "e\u0301")),
    ]
    assert selected(rows, tokenizer)[1] == {"read": 5, NO_TOKEN: 3}


UNSEEN = ["\u200b", "\ufeff \u2060", "\u00ad\ufe0f", "\u3164", "\u2800\n", "\u202e\u0301", "\x00"]
UNSEEN += ["\u2065", "\ue000", "\ufffc"]


@pytest.mark.parametrize("text", UNSEEN)
def test_a_text_of_which_nothing_can_be_seen_counts_as_empty(text, tokenizer):
    rows = [row("prompt response", *texts) for texts in (("p", text), (text, "r"), ("p", "r"))]
    pairs, counts = selected(rows, tokenizer)
    assert len(pairs) == 1 and counts["empty prompt or response"] == 2
    assert not is_blank(text + "é") and not is_blank("本") and not is_blank("🙂")  # control


def test_a_set_without_a_usable_row_is_refused_with_the_counts_or_its_fields(tokenizer, refused):
    rows = [{"prompt": "", "response": "x"}] * 2
    assert "empty prompt or response: 2" in refused(lambda: selected(rows, tokenizer))
    line = refused(lambda: selected([{"text": "a", "label": 1}], tokenizer))
    assert "text, label" in line and "instruction/output" in line and "set holds no" in line


@pytest.mark.parametrize("columns", ["prompt real generated finish", f"{PREFERENCES} finish"])
def test_an_answer_cut_off_gets_no_end_of_turn_from_text_alone(columns, tokenizer, tmp_path):
    ends = ("length", "eos", None)
    rows = [row(columns, f"p {end}", "tin", "kola", end) for end in ends]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    renderer = make_renderer(tokenizer, "paper")
    pairs, _ = select_pairs([str(tmp_path / "pairs.jsonl")], renderer, SHORT)
    pairs = encode_pairs([{**pair, "iter": 0} for pair in pairs], renderer, SHORT)
    last = [
        [pair[half][0][-1] == renderer.eot_id for half in ("real", "generated")] for pair in pairs
    ]
    assert last == [[True, False], [True, True], [True, True]]


def test_an_sft_set_that_has_answers_of_an_opponent_too_is_not_judged_by_them(tokenizer):
    """Empty, or a special token spelt out: only train.py --pairs uses them."""
    bare = [{"prompt": f"Spell {w}", "response": w} for w in ("tin", "kola", "bel", "amu")]
    poor = []
    for row, answer in zip(bare, ("", "</s>", " ", "x"), strict=True):
        theirs = {"generated": answer, "generated_ids": [5]}
        poor.append({"prompt": row["prompt"], "real": row["response"], **theirs})
    ids = [[pair["id"] for pair in selected(rows, tokenizer)[0]] for rows in (bare, poor)]
    assert ids[0] == ids[1] and len(ids[0]) == 4
    poor[3]["real"] = ""  # control
    assert len(selected(poor, tokenizer)[0]) == 3


def test_every_row_that_cannot_be_used_is_counted_by_its_reason_among_others(tokenizer):
    rows = rows_of(100) + [row for _, row in LEFT_OUT]
    pairs, counts = selected(rows, tokenizer)
    assert len(pairs) == 100 and counts.pop("read") == len(rows)
    reasons = {name: number for name, number in counts.items() if "column" not in name}
    assert sum(reasons.values()) == len(LEFT_OUT)
    assert all(any(reason in name for name in reasons) for reason, _ in LEFT_OUT)


def test_a_set_with_unusable_rows_trains_on_the_others_and_says_why(tmp_path, capsys):
    reasons = ["tool calls", "without text", "no prompt first"]
    bad = [row for reason, row in LEFT_OUT if reason in reasons]
    write_jsonl(tmp_path / "set.jsonl", rows_of(36) + bad)
    flags = ["--iter", 0, "--data", tmp_path / "set.jsonl", "--model", THETA0]
    flags += ["--num-prompts", 5000, "--batch-size", 60, "--micro-tokens", 4096]
    run = tmp_path / "run"
    stage("evaluate", run, "--theta0", *flags[2:])
    stage("generate", run, *flags)
    assert "reasoning or pictures beside its text: 1" in capsys.readouterr().out
    stage("train", run, *flags)
    assert len(list(read_jsonl(run / "iter0" / "opponent.jsonl"))) == 36
    page.main(["--recipe", "demo", "--run", str(run)])
    text = (run / "report.html").read_text()
    assert all(word in text for word in (f"read: {36 + len(bad)}", *reasons))
