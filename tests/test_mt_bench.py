"""spin/mt_bench.py: answers to both turns, in the format that FastChat reads."""

import json
import shutil
import string

import pytest
from conftest import MICRO, THETA0, torchrun

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
    {"question_id": 161, "category": "other", "turns": ["Twice tin", "Spell kola"]},
]


def check_answers(path, questions):
    """What FastChat asks of an answer file.

    load_model_answers keys by question_id, check_data wants every question answered, and the judge
    reads choices[0]["turns"][i] of each turn; show_result and dedup read model_id, answer_id and
    tstamp.
    """
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    answers = {row["question_id"]: row for row in rows}
    assert set(answers) == {q["question_id"] for q in questions}
    assert len({a["answer_id"] for a in answers.values()}) == len(questions)
    for q in questions:
        a = answers[q["question_id"]]
        assert set(a) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert a["model_id"] == path.stem
        assert isinstance(a["answer_id"], str) and len(a["answer_id"]) == 22  # shortuuid's length
        assert type(a["tstamp"]) is float and a["tstamp"] > 1.6e9
        assert [c["index"] for c in a["choices"]] == [0]
        assert len(a["choices"][0]["turns"]) == len(q["turns"])
        assert all(isinstance(turn, str) for turn in a["choices"][0]["turns"])
        assert set(string.hexdigits.lower()) >= set(a["answer_id"])
    return answers


@pytest.fixture()
def questions(tmp_path):
    """question.jsonl"""
    write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    return str(tmp_path / "question.jsonl")


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_mt_bench_answers_have_both_turns_in_fastchats_format(
    template, long_theta, tmp_path, questions
):
    model = long_theta
    if template == "chat":
        model = shutil.copytree(long_theta, tmp_path / "chat")
        (model / "chat_template.jinja").write_text(
            "<s>{% for m in messages %}{{ '### Instruction: ' if m.role == 'user' else ' ' }}"
            "{{ m.content }}{{ '\n\n### Response:' if m.role == 'user' else '</s>' }}{% endfor %}"
        )
    flags = [questions, *MICRO, "--model", str(model), "--template", template]
    flags += ["--max-new-tokens", "24"]
    for name in ("spin_iter1", "again"):
        mt_bench.main([*flags, "--out", str(tmp_path / f"{name}.jsonl")])
    answers, again = (
        check_answers(tmp_path / f"{name}.jsonl", QUESTIONS) for name in ("spin_iter1", "again")
    )
    # the seed decides
    assert [a["choices"] for a in answers.values()] == [a["choices"] for a in again.values()]
    # reasoning is greedy in FastChat's table
    assert answers[101]["choices"][0]["turns"][0].strip() == "93"
    broken = [
        {**row, "choices": [{"index": 0, "turns": row["choices"][0]["turns"][:1]}]}
        for row in answers.values()
    ]
    write_jsonl(tmp_path / "spin_iter1.jsonl", broken)
    with pytest.raises(AssertionError):
        check_answers(tmp_path / "spin_iter1.jsonl", QUESTIONS)  # control: one turn is missing


def test_the_second_turn_sees_the_first(long_theta, tmp_path, monkeypatch, tokenizer, questions):
    seen = []

    def answering(model, prompts, eos, most, u, temperature, slots):
        seen.append((temperature, prompts))
        return [([5, 6, eos], "eos") for _ in prompts]

    monkeypatch.setattr(mt_bench, "sample", answering)
    out = str(tmp_path / "m.jsonl")
    mt_bench.main([questions, *MICRO, "--model", str(long_theta), "--out", out])
    assert [t for t, _ in seen] == [0.0, 0.7, 0.0, 0.7]  # turn by turn; FastChat's temperatures
    (_, (first, _)), (_, (second, _)) = seen[1], seen[3]
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
    one, two = (
        [row["choices"] for row in read_jsonl(tmp_path / f"{n}.jsonl")] for n in ("one", "two")
    )
    assert one == two


def test_mt_bench_questions_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tmp_path, refused, monkeypatch, questions
):
    monkeypatch.setattr("spin.models.load_whole", lambda *a: pytest.fail("the model was loaded"))
    flags = [questions, *MICRO, "--model", str(THETA0), "--out", str(tmp_path / "m.jsonl")]
    longer = ["--max-new-tokens", "60", "--max-length", "64"]
    line = refused(lambda: mt_bench.main([*flags, *longer]))
    assert "3 of 3 questions" in line and "has 64" in line and "--max-new-tokens" in line


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1, "turns": "no list"},
        {"question_id": 1, "turns": []},
        {"question_id": 1, "turns": ["", "b"]},
        {"question_id": 1, "turns": ["a", 2]},
        {"question_id": 1, "turns": ["half of a pair: \ud800"]},
        {"question_id": 1, "turns": ["a"], "category": None},
        {"question_id": 1},
        {"turns": ["a", "b"]},
    ],
)
def test_a_row_that_is_no_question_is_refused_by_its_number(row, tmp_path, refused):
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    flags = [str(tmp_path / "q.jsonl"), *MICRO, "--model", str(THETA0)]
    line = refused(lambda: mt_bench.main([*flags, "--out", str(tmp_path / "m.jsonl")]))
    assert "row 1: a question has a question_id and turns" in line


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
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, word, refused, monkeypatch):
    monkeypatch.setattr("spin.models.load_whole", lambda *a: pytest.fail("the model was loaded"))
    assert word in refused(lambda: mt_bench.main([*flags, *MICRO]))
