"""spin/data.py, sources.py, selection.py: the sets that people have, and what is left out."""

import gzip
import json

import pytest
from conftest import THETA0, stage

from spin.codec import make_codec
from spin.data import Unusable, to_pair
from spin.files import read_jsonl, write_jsonl
from spin.recipe import Recipe
from spin.selection import select
from spin.sources import read_rows


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def from_value(who: str, value) -> dict:
    return {"from": who, "value": value}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


USER, BOT, OTHER = said("user", "Hi?"), said("assistant", "Hello."), said("assistant", "Yo")
SYSTEM = said("system", "Be kind.")
PAIR = {"prompt": "Hi?", "real": "Hello."}
KIND = PAIR | {"system": "Be kind."}
EMPTY = PAIR | {"system": ""}
TWO = PAIR | {"generated": "Yo"}
DOCUMENT = "Ann is 7.\n\nHow old is Ann?"


# name: a row, and the pair in it
READ = {
    "ShareGPT": (
        {"conversations": [from_value("human", "Hi?"), from_value("gpt", "Hello.")]},
        PAIR,
    ),
    "ShareGPT with a system turn": (
        {
            "conversations": [
                from_value("system", "Be kind."),
                from_value("human", "Hi?"),
                from_value("gpt", "Hello."),
            ]
        },
        KIND,
    ),
    "ShareGPT with a column system": (
        {"system": "Be kind.", "conversations": [from_value("human", "Hi?"), BOT]},
        KIND,
    ),
    "OpenAI's roles under conversations": ({"conversations": [USER, BOT]}, PAIR),
    "query/response": ({"query": "Hi?", "response": "Hello."}, PAIR),
    "input/output": ({"input": "Hi?", "output": "Hello."}, PAIR),
    "Dolly without context": ({"instruction": "Hi?", "context": "", "response": "Hello."}, PAIR),
    "Dolly": (
        {"instruction": "Ann is 7.", "context": "How old is Ann?", "response": "7"},
        {"prompt": DOCUMENT, "real": "7"},
    ),
    "Alpaca": (
        {"instruction": "Ann is 7.", "input": "How old is Ann?", "output": "7", "history": []},
        {"prompt": DOCUMENT, "real": "7"},
    ),
    "Alpaca whose input is null": ({"instruction": "Hi?", "input": None, "output": "Hello."}, PAIR),
    "content in parts": (
        {"messages": [said("user", parts("H", "i?")), said("assistant", parts("Hello."))]},
        PAIR,
    ),
    "TRL's conversational prompt and completion": ({"prompt": [USER], "completion": [BOT]}, PAIR),
    "the same with a system turn": ({"prompt": [SYSTEM, USER], "completion": [BOT]}, KIND),
    "preferences with a prompt of messages": (
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
        TWO,
    ),
    "preferences without a prompt": ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, TWO),
    "preferences with a system turn inside": (
        {"prompt": "Hi?", "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER]},
        TWO | KIND,
    ),
    "Orca": ({"system_prompt": "Be kind.", "question": "Hi?", "response": "Hello."}, KIND),
    "Orca's pairs": (
        {"system": "Be kind.", "question": "Hi?", "chosen": "Hello.", "rejected": "Yo"},
        TWO | KIND,
    ),
    "a system column beside prompt and response": (
        {"system": "Be kind.", "prompt": "Hi?", "response": "Hello."},
        KIND,
    ),
    "an empty system column": ({"system": "", "prompt": "Hi?", "response": "Hello."}, EMPTY),
    "an empty system turn": ({"messages": [said("system", ""), USER, BOT]}, EMPTY),
    "a null system column": ({"system": None, "prompt": "Hi?", "response": "Hello."}, PAIR),
    "an empty system column beside a system turn": (
        {"system": "", "messages": [SYSTEM, USER, BOT]},
        KIND,
    ),
    "a system turn in the prompt and no other": (
        {"prompt": [SYSTEM, USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        TWO | KIND,
    ),
    "a system turn in the prompt and in the answers": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, BOT], "rejected": [SYSTEM, OTHER]},
        TWO | KIND,
    ),
    "an instruction that is empty": ({"instruction": [], "input": "Hi?", "output": "Hello."}, PAIR),
    "conversations as real and generated beside a prompt": (
        {"prompt": "Hi?", "real": [USER, BOT], "generated": [USER, OTHER]},
        TWO,
    ),
    "merged schemas of messages": (
        {"messages": [{**from_value("human", "Hi?"), "role": None, "content": None}, BOT]},
        PAIR,
    ),
    "roles in capitals": ({"messages": [said("User", "Hi?"), said("Assistant", "Hello.")]}, PAIR),
    "tools that are none": ({"tools": "[]", "messages": [USER, BOT]}, PAIR),
    "several shapes, one not null": (
        {"prompt": None, "response": None, "messages": [USER, BOT], "input": None, "output": None},
        PAIR,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_of_a_known_shape_is_the_pair_that_stands_in_it(name):
    row, wanted = READ[name]
    assert to_pair(row, "set")[0] == wanted


# name: a row, and a word of the reason why it cannot be used
LEFT_OUT = {
    "a prompt that holds more than its conversation": (
        {"prompt": [SYSTEM, USER, BOT, USER], "completion": [USER, BOT]},
        "several rounds",
    ),
    "a conversation written as text": (
        {"prompt": "Hi?", "chosen": '[{"role": "user"}]', "rejected": "[{'role': 'user'}]"},
        "written as text",
    ),
    "thoughts beside the answer": ({"messages": [USER, {**BOT, "thinking": "Hm."}]}, "reasoning"),
    "a picture beside the question": (
        {"messages": [{**USER, "images": ["a.png"]}, BOT]},
        "pictures",
    ),
    "a picture with text": (
        {"messages": [USER, said("assistant", [{"type": "image_url", "text": "a"}])]},
        "without text",
    ),
    "an answer in two turns": ({"messages": [USER, BOT, OTHER]}, "several turns"),
    "a role that is a list": ({"messages": [said(["user"], "Hi?"), BOT]}, "a turn by"),
    "an input that is the number 0": (
        {"instruction": "Square it.", "input": 0, "output": "0"},
        "prompt is no text",
    ),
    "two system columns": (
        {"system": "Be kind.", "system_prompt": "Be rude.", "prompt": "Hi?", "response": "Yo"},
        "two system",
    ),
    "a tool call": (
        {"messages": [USER, {**BOT, "content": None, "tool_calls": [{"name": "f"}]}]},
        "tool calls",
    ),
    "a turn without text": ({"messages": [USER, said("assistant", None)]}, "without text"),
    "a picture": ({"messages": [USER, said("assistant", [{"type": "image"}])]}, "without text"),
    "the assistant first": ({"messages": [BOT, USER, BOT]}, "no prompt first"),
    "no assistant": ({"messages": [USER]}, "without an answer"),
    "two users": ({"messages": [USER, USER, BOT]}, "several rounds"),
    "an empty list": ({"messages": []}, "nothing in messages"),
    "a null answer": ({"prompt": "Hi?", "response": None}, "nothing in response"),
    "an answer that is a number": ({"prompt": "Hi?", "response": 7}, "real is no text"),
    "an unknown role": ({"messages": [USER, said("tool", "7"), BOT]}, "a turn by 'tool'"),
    "a message that is text": ({"messages": ["Hi?", "Hello."]}, "no list of messages"),
    "a lone surrogate": ({"prompt": "Hi?", "response": "\ud800"}, "no valid Unicode"),
    "no object": ([1], "no object"),
    "other fields": ({"text": "Hi?"}, "unknown shape"),
    "several rounds before preferences": (
        {
            "prompt": "and 7?",
            "chosen": [said("user", "Add"), BOT, said("user", "and 7?"), said("assistant", "9")],
            "rejected": [said("user", "Add"), BOT, said("user", "and 7?"), said("assistant", "8")],
        },
        "several rounds",
    ),
    "several rounds in the prompt": (
        {"prompt": [USER, BOT, said("user", "and 7?")], "completion": [BOT]},
        "several rounds",
    ),
    "preferences about another prompt": (
        {"prompt": "Spell tin", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        "not that of the conversation",
    ),
    "preferences of two prompts": (
        {"chosen": [USER, BOT], "rejected": [said("user", "Spell tin"), OTHER]},
        "the same prompt",
    ),
    "preferences under two system messages": (
        {"chosen": [SYSTEM, USER, BOT], "rejected": [said("system", "Be rude."), USER, OTHER]},
        "the same prompt",
    ),
    "equal answers": ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "Hello."}, "equal"),
    "equal conversations": ({"real": [USER, BOT], "generated": [USER, BOT]}, "equal"),
    "two system messages": ({"system": "Be rude.", "messages": [SYSTEM, USER, BOT]}, "two system"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_that_is_no_pair_is_left_out_by_its_reason(name):
    row, reason = LEFT_OUT[name]
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
    ],
)
def test_a_column_of_the_prompt_that_would_be_lost_refuses_the_set(column, content, refused):
    row = {"prompt": "Hi?", "response": "Hello."}
    line = refused(lambda: to_pair({**row, column: content}, "set.jsonl"))
    assert f"set.jsonl has the shape prompt/response, and {column} would be lost" in line
    empty = type(content)()
    assert to_pair({**row, column: empty}, "set.jsonl")[0] == PAIR  # control: nothing in it


def test_columns_that_are_not_used_are_named():
    row = {"messages": [USER, BOT], "prompt": "Hi?", "prompt_id": 7, "nothing": None}
    assert to_pair(row, "set") == (PAIR, ["prompt", "prompt_id"])


# ---- files ----

STRINGS = ["007", "NA", "null", "2024-01-01", "None", "", "1e5", "nan", "true", " x "]
ROWS = [{"prompt": f"p {i}", "response": text} for i, text in enumerate(STRINGS)]


def jsonl_text() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def csv_text(separator: str) -> str:
    lines = ["prompt" + separator + "response"]
    return "\n".join([*lines, *(f"{r['prompt']}{separator}{r['response']}" for r in ROWS)]) + "\n"


def dataset():
    import datasets

    return datasets.Dataset.from_list(ROWS)


def write_shards(folder):
    folder.mkdir()
    dataset().select(range(4)).to_parquet(folder / "data-00000-of-00002.parquet")
    dataset().select(range(4, 10)).to_parquet(folder / "data-00001-of-00002.parquet")


def write_splits(folder):
    import datasets

    datasets.DatasetDict({"train": dataset(), "test": dataset().select([0])}).save_to_disk(folder)


FILES = {
    "set.jsonl": lambda path: path.write_text(jsonl_text()),
    "SET.JSONL": lambda path: path.write_text(jsonl_text()),
    "set.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl_text().encode())),
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: path.write_text(jsonl_text()),
    "to_json.json": lambda path: dataset().to_json(path),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "train.json": lambda path: path.write_text(json.dumps({"train": ROWS})),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "set.csv": lambda path: path.write_text(csv_text(",")),
    "set.Csv": lambda path: path.write_text(csv_text(",")),
    "set.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text(",").encode())),
    "set.tsv": lambda path: path.write_text(csv_text("\t")),
    "set.parquet": lambda path: dataset().to_parquet(path),
    "shards": write_shards,
    "saved": lambda path: dataset().save_to_disk(path),
    "splits": write_splits,
}


@pytest.mark.parametrize("name", FILES)
def test_every_cell_is_the_text_that_stands_in_the_file(name, tmp_path):
    FILES[name](tmp_path / name)
    assert list(read_rows(str(tmp_path / name), "train")) == ROWS


def test_several_files_are_read_in_their_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "a.jsonl", ROWS[3:])
    assert read_rows(f"{tmp_path / 'b.jsonl'},{tmp_path / 'a.jsonl'}") == ROWS


def test_a_folder_that_holds_a_test_set_too_gives_the_split_that_is_asked_for(tmp_path, refused):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    assert read_rows(str(tmp_path), "train") == ROWS
    line = refused(lambda: read_rows(str(tmp_path), "train_sft"))
    assert "holds no file named as the split train_sft" in line


@pytest.mark.parametrize(
    "train, test",
    [("train/0", "test/0"), ("Train", "Test"), ("train", "holdout"), ("train", "train_test")],
)
def test_a_test_set_beside_the_training_set_is_never_read_as_one(train, test, tmp_path):
    for name, rows in ((train, ROWS), (test, ROWS[:1])):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, rows)
    assert read_rows(str(tmp_path), "train") == ROWS


def test_a_folder_of_a_hub_set_is_read_without_what_is_about_it(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "latest-0.jsonl", ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "x.jsonl", ROWS)
    assert read_rows(str(tmp_path), "train") == ROWS


def test_one_conversation_as_json_is_a_row_and_not_its_messages(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"messages": [USER, BOT]}))
    assert read_rows(str(tmp_path / "one.json")) == [{"messages": [USER, BOT]}]


def test_a_prompt_is_no_repeat_of_one_that_was_left_out(tokenizer):
    rows = [{"prompt": "Spell tin", "response": text} for text in ("\ud800", "t-i-n", " ")]
    codec = make_codec(tokenizer, "paper")
    pairs, _ = select(rows, "set", codec, Recipe(max_length=64, max_new_tokens=24), 9)
    assert [pair["real"] for pair in pairs] == ["t-i-n"]


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path, refused):
    write_splits(tmp_path / "splits")
    line = refused(lambda: read_rows(str(tmp_path / "splits"), "valid"))
    assert "has no split valid: give --split, one of train, test" in line


def test_a_hub_set_is_loaded_with_its_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("someone/maths:main", "train") == read_rows("someone/maths", "train") == ROWS
    assert asked == [("someone/maths", "main", "train"), ("someone/maths", None, "train")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.jsonl", ""),
        ("empty.json", "[]"),
        ("empty.csv", ""),
        ("torn.csv", 'a,b\n"x,1\n'),
        ("wide.csv", "prompt,response\nWhat is 1, 2?,three\nIs a, b?,yes\n"),
        ("narrow.csv", "prompt,response\nHi?\n"),
        ("no.jsonl.gz", "\x1f\x8b no gzip"),
        ("some.jsonl,", ""),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(name, content, tmp_path, refused):
    (tmp_path / name).write_text(content)
    assert name in refused(lambda: read_rows(str(tmp_path / name)))


# ---- a whole set ----

NAMES = ["a tool call", "a turn without text", "the assistant first", "no assistant", "two users"]
NAMES += ["a null answer", "an answer that is a number", "an unknown role"]
BAD_ROWS = [LEFT_OUT[name][0] for name in NAMES]
BAD_ROWS += [{"prompt": "p", "response": " "}, {"text": "other fields"}]


def mixed_set() -> list:
    """1,000 rows: every tenth cannot be used, in ten ways."""
    rows = [{"prompt": f"Spell {i}", "response": "-".join(str(i))} for i in range(1000)]
    for k in range(100):
        rows[10 * k + 3] = BAD_ROWS[k % 10]
    return rows


def test_of_1000_rows_100_that_cannot_be_used_are_left_out_and_counted(tokenizer):
    codec = make_codec(tokenizer, "paper")
    recipe = Recipe(max_length=64, max_new_tokens=24)
    pairs, counts = select(mixed_set(), "set", codec, recipe, 5000)
    assert len(pairs) == 900 and counts.pop("read") == 1000
    assert sum(counts.values()) == 100 and all(number == 10 for number in counts.values())
    assert len(counts) == 10


@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_a_set_with_unusable_rows_trains_on_the_others_and_says_why(number, tmp_path, capsys):
    from spin import report

    write_jsonl(tmp_path / "set.jsonl", mixed_set()[:number])
    flags = ["--iter", 0, "--data", tmp_path / "set.jsonl", "--model", THETA0]
    flags += ["--num-prompts", 5000, "--batch-size", 60, "--micro-tokens", 4096]
    run = tmp_path / "run"
    stage("evaluate", run, "--theta0", *flags[2:])
    stage("generate", run, *flags)
    tenth = 1 if number == 40 else 10
    said = f"a turn with tool calls, reasoning or pictures beside its text: {tenth}"
    assert said in capsys.readouterr().out
    stage("train", run, *flags)
    assert len(list(read_jsonl(run / "iter0" / "opponent.jsonl"))) == number * 9 // 10
    report.main(["--recipe", "demo", "--run", str(run)])
    page = (run / "report.html").read_text()
    for reason in (
        f"read: {number}",
        "a turn with tool calls",
        "a turn without text",
        "no prompt first",
    ):
        assert reason in page


def test_answers_sampled_elsewhere_are_trained_on(tmp_path, tokenizer, refused):
    """As docs/data.md says: written by hand, with no prompts.json and no generated.json."""
    end = tokenizer.eos_token_id
    rows = []
    for i, word in enumerate(("tin", "kola", "amu")):
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        row = {"id": i, "iter": 0, "prompt": f"Spell {word}", "real": "-".join(word)}
        row |= {"generated": word, "generated_ids": [*ids, end], "finish": "eos"}
        rows.append(row)
    folder = tmp_path / "run" / "iter0"
    folder.mkdir(parents=True)
    write_jsonl(folder / "generated.jsonl", rows)
    stage("train", tmp_path / "run", "--iter", 0)
    assert len(list(read_jsonl(folder / "opponent.jsonl"))) == 3 and (folder / "model").is_dir()
    # control: ids that do not end as `finish` says
    other = tmp_path / "other" / "iter0"
    other.mkdir(parents=True)
    write_jsonl(other / "generated.jsonl", [{**rows[0], "finish": "length"}])
    assert "finish" in refused(lambda: stage("train", tmp_path / "other", "--iter", 0))
