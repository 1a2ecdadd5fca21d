"""lm_harness.py and mt_bench.py: the paper's benchmarks equal the harness's own command line; answers that FastChat can read."""

import json
import random
import shutil
import string
import sys

import pytest
from conftest import MICRO, REPO, THETA0, shell, torchrun

import evaluate
from spin import lm_harness
from spin.data import read_jsonl, write_jsonl

SUBJECTS = (
    "econometrics",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_microeconomics",
    "high_school_psychology",
    "human_sexuality",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
)  # the social sciences of MMLU


@pytest.fixture(scope="module", autouse=True)
def read_tasks_once():
    """The harness reads the 10,000 files of its tasks each time it starts, for six seconds; here once for all tests."""
    from lm_eval.tasks.manager import TaskIndex

    build, known = TaskIndex.build, {}

    def once(paths):
        key = tuple(map(str, paths))
        known[key] = known.get(key) or build(paths)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(once))
        yield


def write_set(folder, configs: dict):
    """A data set as the hub keeps it: a JSONL file for each configuration and split, and the README that lists them."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            folder.joinpath(config).mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / config / f"{split}.jsonl", rows)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A dozen questions for each task, in its own fields, and enough others to serve as examples."""
    folder, rng = tmp_path_factory.mktemp("benchmarks"), random.Random(0)
    word = lambda: "".join(
        rng.choice("aeiou" if i % 2 else "bdfklmnprst") for i in range(rng.randint(3, 6))
    )  # noqa: E731
    words = lambda n: " ".join(word() for _ in range(n))  # noqa: E731
    choices = lambda: {"label": list("ABCD"), "text": [words(rng.randint(1, 2)) for _ in range(4)]}  # noqa: E731

    def splits(make, train="train", test="test"):
        return {train: [make() for _ in range(30)], test: [make() for _ in range(12)]}

    def gsm8k():
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return {
            "question": f"Add {a} and {b}",
            "answer": f"{a} and {b} is <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }

    def hellaswag():
        return {
            "ind": rng.randint(0, 99),
            "activity_label": word(),
            "ctx_a": words(3) + ".",
            "ctx_b": word(),
            "ctx": "",
            "endings": [words(rng.randint(1, 4)) for _ in range(4)],
            "label": str(rng.randint(0, 3)),
            "source_id": word(),
            "split": "val",
            "split_type": "indomain",
        }

    def targets(k):
        return {
            "choices": [words(2) for _ in range(k)],
            "labels": [1] + [rng.randint(0, 1) for _ in range(k - 2)] + [0],
        }

    arc = splits(
        lambda: {
            "id": word(),
            "question": words(4) + "?",
            "choices": choices(),
            "answerKey": rng.choice("ABCD"),
        }
    )
    arc["validation"] = arc["train"][:3]
    write_set(folder / "allenai/ai2_arc", {"ARC-Challenge": arc})
    write_set(
        folder / "truthfulqa/truthful_qa",
        {
            "multiple_choice": {
                "validation": [
                    {
                        "question": words(3) + "?",
                        "mc1_targets": targets(3),
                        "mc2_targets": targets(4),
                    }
                    for _ in range(12)
                ]
            }
        },
    )
    write_set(
        folder / "allenai/winogrande",
        {
            "winogrande_xl": splits(
                lambda: {
                    "sentence": f"{words(2)} _ {words(2)}.",
                    "option1": word(),
                    "option2": word(),
                    "answer": rng.choice("12"),
                },
                test="validation",
            )
        },
    )
    write_set(folder / "openai/gsm8k", {"main": splits(gsm8k)})
    write_set(folder / "Rowan/hellaswag", {"default": splits(hellaswag, test="validation")})
    write_set(
        folder / "cais/mmlu",
        {
            s: {
                split: [
                    {
                        "question": words(4),
                        "subject": s,
                        "choices": choices()["text"],
                        "answer": rng.randint(0, 3),
                    }
                    for _ in range(n)
                ]
                for split, n in (("dev", 5), ("test", 12 if s == "sociology" else 2))
            }
            for s in SUBJECTS
        },
    )
    openbook = splits(
        lambda: {
            "id": word(),
            "question_stem": words(4),
            "choices": choices(),
            "answerKey": rng.choice("ABCD"),
        }
    )
    write_set(folder / "allenai/openbookqa", {"main": {**openbook, "validation": openbook["test"]}})
    write_set(
        folder / "SaylorTwift/bbh",
        {
            t: {
                "test": [
                    {"input": words(4) + "?", "target": rng.choice(("Yes", "No"))} for _ in range(3)
                ]
            }
            for t in ("causal_judgement", "formal_fallacies", "sports_understanding")
        },
    )
    return folder


@pytest.fixture(scope="session")
def theta(tmp_path_factory):
    """The demo's θ_0 with room for 4,096 positions, which rotary embeddings do not mind: few-shot prompts are long."""
    return longer(tmp_path_factory.mktemp("models") / "theta", 4096)


def longer(folder, positions):
    shutil.copytree(THETA0, folder)
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: positions}))
    return folder


COMMANDS = [
    (25, ["arc_challenge"]),
    (None, ["truthfulqa_mc2"]),
    (5, ["winogrande", "gsm8k", "mmlu_social_sciences"]),
    (10, ["hellaswag"]),
]


@pytest.fixture(scope="session")
def ours(data, theta, tmp_path_factory):
    """evaluate.py --tasks paper, once, with MMLU's social sciences (12 subjects) for all 57: reading those takes a minute."""
    out = tmp_path_factory.mktemp("out") / "benchmarks.json"
    with pytest.MonkeyPatch.context() as patch:
        few = (*lm_harness.PAPER[:-1], ("MMLU", "mmlu_social_sciences", 5, "acc,none"))
        patch.setitem(lm_harness.TABLES, "paper", (few, lm_harness.TABLES["paper"][1]))
        evaluate.main(
            [
                *MICRO,
                "--model",
                str(theta),
                "--tasks",
                "paper",
                "--tasks-data",
                str(data),
                "--slots",
                "16",
                "--out",
                str(out),
            ]
        )
    return json.loads(out.read_text())


def test_the_six_tasks_equal_the_harness_command_line_digit_for_digit(
    ours, data, theta, tmp_path, monkeypatch
):
    """lm_eval's own command, started where the data sets lie in folders of their hub ids, which datasets reads before the hub."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.chdir(data)
    theirs = {}
    for shots, tasks in COMMANDS:
        out = tmp_path / f"{tasks[0]}.json"
        command = [
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={theta},dtype=float32",
            "--device",
            "cpu",
            "--batch_size",
            "16",
            "--tasks",
            *tasks,
            "--output_path",
            str(out),
            *(["--num_fewshot", str(shots)] if shots else []),
        ]
        monkeypatch.setattr(sys, "argv", command)
        cli_evaluate()
        (written,) = tmp_path.glob(f"{tasks[0]}_*.json")
        found = json.loads(written.read_text())
        theirs.update({task: found["results"][task] for task in tasks})
    assert [(task, shots) for _, task, shots, _ in lm_harness.PAPER] == [
        ("arc_challenge", 25),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
        ("hellaswag", 10),
        ("mmlu", 5),
    ]  # the paper's
    for column, task, shots, metric in lm_harness.PAPER:
        task = "mmlu_social_sciences" if task == "mmlu" else task
        mine = ours["tasks"][task]
        assert mine["shots"] == shots and mine["n"] == theirs[task]["sample_len"] >= 12
        value, error = mine["figures"][metric]
        assert value == theirs[task][metric], task  # equal, not close
        assert (
            error == theirs[task]["{}_stderr,{}".format(*metric.split(","))] and error is not None
        )
    assert (
        sum(
            0 < ours["tasks"][t]["figures"][m][0] < 1
            for t in ours["tasks"]
            for _, u, _, m in lm_harness.PAPER
            if t == u
        )
        >= 3
    )  # not all trivial


def test_other_few_shot_counts_give_other_figures(ours, data, theta, tmp_path):
    """Control: the harness's default counts (0 for ARC), asked for by name; and --limit with its standard error."""
    out = tmp_path / "out.json"
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(theta),
            "--tasks",
            "arc_challenge",
            "hellaswag",
            "--tasks-data",
            str(data),
            "--slots",
            "16",
            "--limit",
            "10",
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())
    assert found["limit"] == 10 and all(
        task["n"] == 10 and len(task["figures"]) == 2 for task in found["tasks"].values()
    )
    assert all(
        error > 0
        for task in found["tasks"].values()
        for value, error in task["figures"].values()
        if 0 < value < 1
    )
    assert found["tasks"]["arc_challenge"]["shots"] is None
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(theta),
            "--tasks",
            "arc_challenge",
            "--tasks-data",
            str(data),
            "--slots",
            "16",
            "--out",
            str(tmp_path / "all.json"),
        ]
    )
    zero_shot = json.loads((tmp_path / "all.json").read_text())["tasks"]["arc_challenge"]["figures"]
    assert zero_shot != ours["tasks"]["arc_challenge"]["figures"]


def test_the_table_stands_beside_the_papers_row_for_row():
    found = {
        task: {"shots": s, "n": 4, "figures": {m: [0.5, 0.03]}}
        for _, task, s, m in lm_harness.PAPER
    }
    columns, rows = lm_harness.beside_the_paper("paper", {"mine": found})
    assert (
        columns[0] == ("Arc", 25, "acc_norm")
        and columns[5] == ("MMLU", 5, "acc")
        and columns[6][0] == "average"
    )
    assert (
        rows[0][0] == "mine"
        and rows[0][1][0] == (50, 3)
        and rows[0][1][6] == (50, pytest.approx(3 / 6**0.5))
    )
    means = {
        "zephyr-7b-sft-full": 58.14,
        "SPIN iteration 0": 60.80,
        "SPIN iteration 1": 62.12,
        "SPIN iteration 2": 62.97,
        "SPIN iteration 3": 63.16,
        "zephyr-7b-dpo-full": 61.31,
        "SFT, one more epoch": 57.23,
    }  # as the paper prints them
    paper = {model.removeprefix("paper: "): cells[6][0] for model, cells in rows[1:]}
    assert {m: paper[m] for m in means} == {
        m: pytest.approx(v, abs=0.011) for m, v in means.items()
    } and len(paper) == 8
    assert paper["SPIN iteration 3 + DPO"] == pytest.approx(
        64.74, abs=0.01
    )  # Table 3 prints 64.05, which its own row is not
    assert lm_harness.beside_the_paper("extra", {"mine": found}) is None
    one = {"arc_challenge": found["arc_challenge"]}
    assert lm_harness.beside_the_paper("paper", {"mine": one})[1][0][1] == [(50, 3)] + [None] * 6


def test_two_ranks_give_the_benchmarks_of_one(ours, data, theta, tmp_path):
    """11 questions do not divide by 2; the harness's own sharing out would leave both ranks with all of them on a CPU."""
    done = torchrun(
        2,
        "evaluate.py",
        *MICRO,
        "--model",
        theta,
        "--tasks",
        "truthfulqa_mc2",
        "--limit",
        "11",
        "--tasks-data",
        data,
        "--slots",
        "16",
        "--out",
        tmp_path / "two.json",
    )
    assert done.returncode == 0, done.stderr
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(theta),
            "--tasks",
            "truthfulqa_mc2",
            "--limit",
            "11",
            "--tasks-data",
            str(data),
            "--slots",
            "16",
            "--out",
            str(tmp_path / "one.json"),
        ]
    )
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["tasks"] for n in ("one", "two"))
    assert one["truthfulqa_mc2"]["n"] == two["truthfulqa_mc2"]["n"] == 11
    assert two["truthfulqa_mc2"]["figures"]["acc,none"] == pytest.approx(
        one["truthfulqa_mc2"]["figures"]["acc,none"], rel=1e-5
    )
    assert done.stdout.count("truthfulqa_mc2") == 1  # rank 0 alone speaks


def test_the_further_tasks_run_with_the_papers_few_shot_examples(data, theta, tmp_path):
    out = tmp_path / "out.json"
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(theta),
            "--tasks",
            "extra",
            "--limit",
            "1",
            "--tasks-data",
            str(data),
            "--slots",
            "16",
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())["tasks"]
    assert [found[task]["shots"] for _, task, _, _ in lm_harness.EXTRA] == [3, 3, 3, 1]
    assert all(metric in found[task]["figures"] for _, task, _, metric in lm_harness.EXTRA)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--tasks", "arc_challenge", "--tasks-data", "no/such/folder"], "no/such/folder"),
        (["--tasks", "arc_challenge", "--tasks-data", str(REPO / "demo")], "allenai/ai2_arc"),
        (["--limit", "3"], "--tasks"),
        (["--tasks", "arc_challenge", "--limit", "0"], "--limit"),
        (["--mt-bench", "q.jsonl"], "--out"),
        (["--tasks", "paper", "--compare", "a", "b"], "exclude"),
        (["--tasks", "paper", "--mt-bench", "q"], "exclude"),
        (["--compare", "no/such/model", str(THETA0)], "no/such/model"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, word, refused, monkeypatch):
    monkeypatch.setattr(
        "spin.distributed.load_model", lambda *a: pytest.fail("the model was loaded")
    )
    assert word in refused(lambda: evaluate.main([*MICRO, "--model", str(THETA0), *flags]))


def test_without_a_hub_or_local_copies_one_line_says_what_is_missing(
    tmp_path, refused, monkeypatch
):
    """HF_HUB_OFFLINE (conftest.py) is what a machine without a network comes to after its retries."""
    monkeypatch.setattr(
        "spin.distributed.load_model", lambda *a: pytest.fail("the model was loaded")
    )
    line = refused(
        lambda: evaluate.main(
            [
                *MICRO,
                "--model",
                str(THETA0),
                "--tasks",
                "paper",
                "--out",
                str(tmp_path / "out.json"),
            ]
        )
    )
    assert "allenai/ai2_arc" in line and "--tasks-data" in line and not list(tmp_path.iterdir())


def test_where_lm_eval_is_missing_one_line_names_the_command_that_installs_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    line = refused(lambda: evaluate.main([*MICRO, "--model", str(THETA0), "--tasks", "paper"]))
    command = lm_harness.INSTALL
    assert (
        command in line
        and command.split("'")[1] in (REPO / "requirements-dev.txt").read_text().splitlines()
    )


def test_nothing_else_imports_lm_eval():
    importers = [
        p.name
        for p in [*REPO.glob("*.py"), *REPO.glob("spin/*.py")]
        if "import lm_eval" in p.read_text() or "from lm_eval" in p.read_text()
    ]
    assert importers == ["lm_harness.py"]
    done = shell(
        sys.executable,
        "-c",
        "import sys, evaluate; from spin import report; print('lm_eval' in sys.modules)",
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_task_that_writes_more_than_the_model_has_positions_is_refused(data, refused):
    line = refused(
        lambda: evaluate.main(
            [*MICRO, "--model", str(THETA0), "--tasks", "gsm8k", "--tasks-data", str(data)]
        )
    )
    assert "gsm8k" in line and "256" in line and "64 positions" in line


# ---- MT-Bench ----------------------------------------------------------------------------------------------------

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
    """What FastChat asks of an answer file: load_model_answers keys by question_id, check_data wants every question answered,
    and the judge reads choices[0]["turns"][i] of each turn; show_result and dedup read model_id, answer_id and tstamp."""
    answers = {
        row["question_id"]: row
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }
    assert set(answers) == {q["question_id"] for q in questions} and len(
        {a["answer_id"] for a in answers.values()}
    ) == len(questions)
    for q in questions:
        a = answers[q["question_id"]]
        assert set(a) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (
            a["model_id"] == path.stem
            and isinstance(a["answer_id"], str)
            and len(a["answer_id"]) == 22
        )  # shortuuid's length
        assert type(a["tstamp"]) is float and a["tstamp"] > 1.6e9
        assert [c["index"] for c in a["choices"]] == [0] and len(a["choices"][0]["turns"]) == len(
            q["turns"]
        )
        assert all(isinstance(turn, str) for turn in a["choices"][0]["turns"])
        assert set(string.hexdigits.lower()) >= set(a["answer_id"])
    return answers


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_mt_bench_answers_have_both_turns_in_fastchats_format(template, theta, tmp_path, tokenizer):
    model, questions = theta, tmp_path / "question.jsonl"
    if template == "chat":
        model = shutil.copytree(theta, tmp_path / "chat")
        (model / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ '### Instruction: ' if m.role == 'user' else '' }}{{ m.content }}"
            "{{ '\n\n### Response:' if m.role == 'user' else '</s>' }}{% endfor %}"
        )
    write_jsonl(questions, QUESTIONS)
    flags = [
        *MICRO,
        "--model",
        str(model),
        "--mt-bench",
        str(questions),
        "--template",
        template,
        "--max-new-tokens",
        "24",
    ]
    for name in ("spin_iter1", "again"):
        evaluate.main([*flags, "--out", str(tmp_path / f"{name}.jsonl")])
    answers, again = (
        check_answers(tmp_path / f"{name}.jsonl", QUESTIONS) for name in ("spin_iter1", "again")
    )
    assert [a["choices"] for a in answers.values()] == [
        a["choices"] for a in again.values()
    ]  # the seed decides
    assert (
        answers[101]["choices"][0]["turns"][0].strip() == "93"
    )  # reasoning is greedy in FastChat's table
    broken = [
        {**row, "choices": [{"index": 0, "turns": row["choices"][0]["turns"][:1]}]}
        for row in answers.values()
    ]
    write_jsonl(tmp_path / "spin_iter1.jsonl", broken)
    with pytest.raises(AssertionError):
        check_answers(tmp_path / "spin_iter1.jsonl", QUESTIONS)  # control: one turn is missing


def test_the_second_turn_sees_the_first(theta, tmp_path, monkeypatch, tokenizer):
    from spin import mt_bench

    seen = []

    def answering(model, prompts, eos, most, u, temperature, slots):
        seen.append((temperature, prompts))
        return [([5, 6, eos], "eos") for _ in prompts]

    monkeypatch.setattr(mt_bench, "sample", answering)
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    evaluate.main(
        [
            *MICRO,
            "--model",
            str(theta),
            "--mt-bench",
            str(tmp_path / "q.jsonl"),
            "--out",
            str(tmp_path / "m.jsonl"),
        ]
    )
    assert [t for t, _ in seen] == [0.0, 0.7, 0.0, 0.7]  # turn by turn; FastChat's temperatures
    (_, (first, _)), (_, (second, _)) = seen[1], seen[3]
    text = tokenizer.decode(second, skip_special_tokens=False)
    assert second[: len(first) + 3] == [*first, 5, 6, tokenizer.eos_token_id]
    assert (
        "Spell tin" in text
        and "Reverse it" in text
        and second.count(tokenizer.bos_token_id) == first.count(tokenizer.bos_token_id) <= 1
    )


def test_two_ranks_write_the_mt_bench_answers_of_one(theta, tmp_path):
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    flags = [*MICRO, "--model", theta, "--mt-bench", tmp_path / "q.jsonl"]
    done = torchrun(2, "evaluate.py", *flags, "--out", tmp_path / "two.jsonl")
    assert done.returncode == 0, done.stderr
    evaluate.main([*map(str, flags), "--out", str(tmp_path / "one.jsonl")])
    one, two = (
        [row["choices"] for row in read_jsonl(tmp_path / f"{n}.jsonl")] for n in ("one", "two")
    )
    assert one == two


def test_mt_bench_questions_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(
        "spin.distributed.load_model", lambda *a: pytest.fail("the model was loaded")
    )
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    flags = [
        *MICRO,
        "--model",
        str(THETA0),
        "--out",
        str(tmp_path / "m.jsonl"),
        "--mt-bench",
        str(tmp_path / "q.jsonl"),
    ]
    line = refused(lambda: evaluate.main([*flags, "--max-new-tokens", "60", "--max-length", "64"]))
    assert "3 of 3 questions" in line and "has 64" in line and "--max-new-tokens" in line
    write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "turns": "no list"}])
    assert "row 1" in refused(lambda: evaluate.main(flags))
