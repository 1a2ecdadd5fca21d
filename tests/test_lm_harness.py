"""spin/lm_harness.py, spin/paper_tables.py: our benchmarks equal the harness's own command line."""

import ast
import json
import random
import sys

import pytest
from conftest import MICRO, REPO, THETA0, shell, torchrun

import evaluate
from spin import lm_harness, paper_tables
from spin.files import write_jsonl

PAPER, EXTRA = (paper_tables.TABLES[name]["tasks"] for name in ("paper", "extra"))

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
    """lm_eval reads the 10,000 files of its tasks when it starts, for six seconds; here once."""
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
    """A data set as the hub keeps it: a JSONL file for each configuration and split.

    The README lists them.
    """
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
    """A dozen questions for each task, in its own fields, and others to serve as examples."""
    folder, rng = tmp_path_factory.mktemp("benchmarks"), random.Random(0)

    def word():
        letters = ("bdfklmnprst", "aeiou")
        return "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(3, 6)))

    def words(n):
        return " ".join(word() for _ in range(n))

    def choices():
        return {"label": list("ABCD"), "text": [words(rng.randint(1, 2)) for _ in range(4)]}

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


@pytest.fixture()
def in_data(data, monkeypatch):
    """Where the data sets lie in folders of their hub ids, which datasets reads before the hub."""
    monkeypatch.chdir(data)


def flags_of(model, out, *tasks) -> list[str]:
    return [*MICRO, "--model", str(model), "--slots", "16", "--out", str(out), "--tasks", *tasks]


def run_tasks(model, out, *tasks) -> dict:
    """What evaluate.py --tasks writes, in this process."""
    evaluate.main(flags_of(model, out, *tasks))
    return json.loads(out.read_text())


COMMANDS = [
    (25, ["arc_challenge"]),
    (None, ["truthfulqa_mc2"]),
    (5, ["winogrande", "gsm8k", "mmlu_social_sciences"]),
    (10, ["hellaswag"]),
]


@pytest.fixture(scope="session")
def ours(data, long_theta, tmp_path_factory):
    """evaluate.py --tasks paper, once.

    MMLU's social sciences (12 subjects) stand for all 57: reading those takes a minute.
    """
    out = tmp_path_factory.mktemp("out") / "benchmarks.json"
    with pytest.MonkeyPatch.context() as patch:
        few = [*PAPER[:-1], ("MMLU", "mmlu_social_sciences", 5, "acc,none")]
        patch.setitem(paper_tables.TABLES["paper"], "tasks", few)
        patch.chdir(data)
        return run_tasks(long_theta, out, "paper")


def test_the_six_tasks_equal_the_harness_command_line_digit_for_digit(
    ours, in_data, long_theta, tmp_path, monkeypatch
):
    """lm_eval's own command, started in the same folder."""
    from lm_eval.__main__ import cli_evaluate

    theirs = {}
    for shots, tasks in COMMANDS:
        command = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"]
        command += ["--model_args", f"pretrained={long_theta},dtype=float32"]
        command += ["--output_path", str(tmp_path / f"{tasks[0]}.json"), "--tasks", *tasks]
        command += ["--num_fewshot", str(shots)] if shots else []
        monkeypatch.setattr(sys, "argv", command)
        cli_evaluate()
        (written,) = tmp_path.glob(f"{tasks[0]}_*.json")
        found = json.loads(written.read_text())
        theirs.update({task: found["results"][task] for task in tasks})
    assert [(task, shots) for _, task, shots, _ in PAPER] == [
        ("arc_challenge", 25),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
        ("hellaswag", 10),
        ("mmlu", 5),
    ]  # the paper's
    values = []
    for _, task, shots, metric in PAPER:
        task = "mmlu_social_sciences" if task == "mmlu" else task
        mine = ours["tasks"][task]
        assert mine["shots"] == shots and mine["n"] == theirs[task]["sample_len"] >= 12
        value, error = mine["figures"][metric]
        assert value == theirs[task][metric], task  # equal, not close
        name, how = metric.split(",")
        assert error == theirs[task][f"{name}_stderr,{how}"] and error is not None
        values.append(value)
    assert sum(0 < value < 1 for value in values) >= 3  # not all trivial


def test_other_few_shot_counts_give_other_figures(ours, in_data, long_theta, tmp_path):
    """Control: the harness's default counts (0 for ARC), asked for by name; --limit, its errors."""
    asked = ["arc_challenge", "hellaswag", "--limit", "10"]
    found = run_tasks(long_theta, tmp_path / "out.json", *asked)
    assert found["limit"] == 10
    for task in found["tasks"].values():
        assert task["n"] == 10 and len(task["figures"]) == 2
        assert all(error > 0 for value, error in task["figures"].values() if 0 < value < 1)
    assert found["tasks"]["arc_challenge"]["shots"] is None
    zero_shot = run_tasks(long_theta, tmp_path / "all.json", "arc_challenge")["tasks"]
    arc = ours["tasks"]["arc_challenge"]["figures"]
    assert zero_shot["arc_challenge"]["figures"] != arc


def test_a_tag_gives_the_figures_of_each_of_its_tasks(in_data, long_theta, tmp_path):
    asked = ["mmlu_social_sciences_tasks", "--limit", "2"]
    found = run_tasks(long_theta, tmp_path / "out.json", *asked)["tasks"]
    assert set(found) == {f"mmlu_{subject}" for subject in SUBJECTS}
    assert all(task["n"] == 2 and "acc,none" in task["figures"] for task in found.values())


def test_the_table_stands_beside_the_papers_row_for_row():
    found = {task: {"shots": s, "n": 4, "figures": {m: [0.5, 0.03]}} for _, task, s, m in PAPER}
    columns, rows = paper_tables.beside_the_paper("paper", {"mine": found})
    assert columns[0] == ("Arc", 25, "acc_norm") and columns[5] == ("MMLU", 5, "acc")
    assert columns[6][0] == "average"
    model, cells = rows[0]
    assert model == "mine" and cells[0] == (50, 3)
    assert cells[6] == (50, pytest.approx(3 / 6**0.5))
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
    # Table 3 prints 64.05, which its own row is not
    assert paper["SPIN iteration 3 + DPO"] == pytest.approx(64.74, abs=0.01)
    assert paper_tables.beside_the_paper("extra", {"mine": found}) is None
    one = {"arc_challenge": found["arc_challenge"]}
    assert paper_tables.beside_the_paper("paper", {"mine": one})[1][0][1] == [(50, 3)] + [None] * 6


@pytest.mark.long
def test_two_ranks_give_the_benchmarks_of_one(ours, data, in_data, long_theta, tmp_path):
    """11 questions do not divide by 2; lm_eval by itself would give both ranks all, on a CPU."""
    asked = ["truthfulqa_mc2", "--limit", "11"]
    flags = flags_of(long_theta, tmp_path / "two.json", *asked)
    done = torchrun(2, REPO / "evaluate.py", *flags, cwd=data)
    assert done.returncode == 0, done.stderr
    one = run_tasks(long_theta, tmp_path / "one.json", *asked)["tasks"]["truthfulqa_mc2"]
    two = json.loads((tmp_path / "two.json").read_text())["tasks"]["truthfulqa_mc2"]
    assert one["n"] == two["n"] == 11
    assert two["figures"]["acc,none"] == pytest.approx(one["figures"]["acc,none"], rel=1e-5)
    assert done.stdout.count("truthfulqa_mc2") == 1  # rank 0 alone speaks


@pytest.mark.long
def test_the_further_tasks_run_with_the_papers_few_shot_examples(in_data, long_theta, tmp_path):
    found = run_tasks(long_theta, tmp_path / "out.json", "extra", "--limit", "1")["tasks"]
    assert [found[task]["shots"] for _, task, _, _ in EXTRA] == [3, 3, 3, 1]
    assert all(metric in found[task]["figures"] for _, task, _, metric in EXTRA)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--limit", "3"], "--tasks"),
        (["--tasks", "arc_challenge", "--limit", "0"], "--limit"),
        (["--tasks", "paper", "--opponent", "a"], "exclude"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, word, refused, monkeypatch):
    monkeypatch.setattr("spin.models.load_whole", lambda *a: pytest.fail("the model was loaded"))
    assert word in refused(lambda: evaluate.main([*MICRO, "--model", str(THETA0), *flags]))


def test_without_a_hub_or_local_copies_one_line_says_what_is_missing(
    tmp_path, refused, monkeypatch
):
    """HF_HUB_OFFLINE (conftest.py): what a machine without a network comes to after its retries."""
    monkeypatch.setattr("spin.models.load_whole", lambda *a: pytest.fail("the model was loaded"))
    flags = flags_of(THETA0, tmp_path / "out.json", "paper")
    line = refused(lambda: evaluate.main(flags))
    assert "allenai/ai2_arc" in line and "hf download" in line and not list(tmp_path.iterdir())


def test_where_lm_eval_is_missing_one_line_names_the_command_that_installs_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    line = refused(lambda: evaluate.main([*MICRO, "--model", str(THETA0), "--tasks", "paper"]))
    command = lm_harness.INSTALL
    needed = (REPO / "requirements-dev.txt").read_text().splitlines()
    assert command in line and command.split("'")[1] in needed


def test_nothing_else_imports_lm_eval():
    importers = [
        p.name
        for p in [*REPO.glob("*.py"), *REPO.glob("spin/*.py")]
        if "import lm_eval" in p.read_text() or "from lm_eval" in p.read_text()
    ]
    assert importers == ["lm_harness.py"]
    code = "import sys, evaluate; from spin import report; print('lm_eval' in sys.modules)"
    done = shell(sys.executable, "-c", code)
    assert done.stdout.strip() == "False", done.stderr


def underscored(source: str) -> list[str]:
    """Private names, such as _rank, that a module imports or asks an object for."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            names += [part for module in modules for part in module.split(".")]
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


def test_only_the_public_names_of_lm_eval_are_used():
    assert underscored((REPO / "spin" / "lm_harness.py").read_text()) == []
    private = "from lm_eval.tasks._index import Entry\nlm._rank = 1"
    assert underscored(private) == ["_index", "_rank"]  # control


def test_a_task_that_writes_more_than_the_model_has_positions_is_refused(in_data, refused):
    flags = [*MICRO, "--model", str(THETA0), "--tasks", "gsm8k"]
    line = refused(lambda: evaluate.main(flags))
    assert "gsm8k" in line and "256" in line and "64 positions" in line
