"""spin/mt_bench.py: answers to both turns, in the format that FastChat reads."""

import json
import shutil

import pytest
from conftest import MICRO, THETA0, torchrun
from test_field import CHAT

from spin import mt_bench
from spin.files import read_jsonl, write_jsonl

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Spell tin", "Reverse it"]},
    {
        "question_id": 101,
        "category": "reasoning",
        "turns": ["Larger of 12 and 93", "Add 1 and 2"],
        "reference": ["93", "3"],
    },
    {"question_id": 161, "turns": ["Twice tin", "Spell kola"]},
]


def turns_in(path) -> dict:
    """{question_id: its answers} of a file that has what FastChat asks for: load_model_answers
    keys by question_id, the judge reads choices[0]["turns"][i], show_result and dedup the rest."""
    rows = list(read_jsonl(path))
    assert [row["question_id"] for row in rows] == [q["question_id"] for q in QUESTIONS]
    assert len({row["answer_id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == path.stem and row["tstamp"] > 1.6e9
        (choice,) = row["choices"]
        assert choice["index"] == 0 and [*map(type, choice["turns"])] == [str, str]
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


@pytest.fixture()
def questions(tmp_path):
    """question.jsonl"""
    write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    return str(tmp_path / "question.jsonl")


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_answers_have_both_turns_in_fastchats_format(template, long_theta, tmp_path, questions):
    model = shutil.copytree(long_theta, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT)
    flags = [questions, *MICRO, "--model", str(model), "--template", template]
    for name, seed in (("one", 0), ("again", 0), ("other", 2)):
        mt_bench.main([*flags, "--seed", str(seed), "--out", str(tmp_path / f"{name}.jsonl")])
    one, again, other = (turns_in(tmp_path / f"{n}.jsonl") for n in ("one", "again", "other"))
    assert one == again and one != other  # the seed decides
    assert one[101] == other[101] and one[101][0].strip() == "93"  # reasoning is greedy


def test_the_second_turn_sees_the_first(long_theta, tmp_path, monkeypatch, tokenizer, questions):
    seen = []

    def answering(model, prompts, eos, most, u, temperature):
        seen.append((temperature, *prompts))
        return [([5, 6, eos[0]], "eos")]

    monkeypatch.setattr(mt_bench, "sample", answering)
    out = str(tmp_path / "m.jsonl")
    mt_bench.main([questions, *MICRO, "--model", str(long_theta), "--out", out])
    assert [t for t, _ in seen] == [0.7, 0.7, 0.0, 0.0, 0.7, 0.7]  # FastChat's temperatures
    (_, first), (_, second), *_ = seen
    text = tokenizer.decode(second, skip_special_tokens=False)
    assert second[: len(first) + 3] == [*first, 5, 6, tokenizer.eos_token_id]
    assert "Spell tin" in text and "Reverse it" in text
    bos = tokenizer.bos_token_id
    assert second.count(bos) == first.count(bos) <= 1


@pytest.mark.long
def test_two_ranks_write_the_mt_bench_answers_of_one(long_theta, tmp_path, questions):
    flags = [questions, *MICRO, "--model", str(long_theta), "--out"]
    done = torchrun(2, "spin.mt_bench", *flags, tmp_path / "two.jsonl")
    assert done.returncode == 0, done.stderr
    mt_bench.main([*flags, str(tmp_path / "one.jsonl")])
    assert turns_in(tmp_path / "one.jsonl") == turns_in(tmp_path / "two.jsonl")


def test_a_conversation_that_does_not_fit_the_model_is_refused(tmp_path, refused, questions):
    """θ_0 has 64 positions: the first turn fits, with its answer, and the second does not."""
    out = tmp_path / "m.jsonl"
    flags = [*MICRO, "--model", str(THETA0), "--out", str(out), "--max-new-tokens", "8"]
    long = {"question_id": 1, "turns": ["Spell tin", "Reverse " + "it " * 40]}
    write_jsonl(tmp_path / "long.jsonl", [long])
    line = refused(lambda: mt_bench.main([str(tmp_path / "long.jsonl"), *flags]))
    assert "may need" in line and "has 64" in line and not out.exists()
    mt_bench.main([questions, *flags])  # control
    assert out.exists()
    # these answers are not taken for another model's
    assert f"{out} is there already" in refused(lambda: mt_bench.main([questions, *flags]))


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1, "turns": "no list"},
        {"question_id": 1, "turns": []},
        {"question_id": 1, "turns": ["a", 2]},
        {"question_id": 1, "turns": ["half of a pair: \ud800"]},
        {"question_id": 1, "turns": ["a"], "category": None},
        {"turns": ["a", "b"]},
    ],
)
def test_a_file_with_a_row_that_is_no_question_is_refused(row, tmp_path, refused):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(row) + "\n")
    flags = [str(tmp_path / "q.jsonl"), *MICRO, "--model", str(THETA0)]
    line = refused(lambda: mt_bench.main([*flags, "--out", str(tmp_path / "m.jsonl")]))
    assert "each row has a question_id and turns" in line


@pytest.mark.parametrize(
    "flags, word",
    [
        (["q.jsonl"], "needs --out NAME.jsonl"),
        (["q.jsonl", "--out", "m.json"], "needs --out NAME.jsonl"),
        (["q.jsonl", "--out", "no/such/folder/m.jsonl"], "no directory"),
        (["--out", "m.jsonl"], "required: QUESTIONS"),
        (["q.jsonl", "--out", "m.jsonl", "--model", "no/such/model"], "no/such/model"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(flags, word, refused):
    assert word in refused(lambda: mt_bench.main([*flags, *MICRO]))
