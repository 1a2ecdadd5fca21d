"""spin/bench/: our benchmarks equal the harness's own command line."""

import json
import random
import shutil
import sys
from functools import partial

import pytest
from conftest import MICRO, REPO, THETA0, torchrun
from safetensors.torch import load_file, save_file

import evaluate
from spin.bench import harness, paper_tables
from spin.files import write_jsonl

PAPER, EXTRA = (paper_tables.TABLES[name]["tasks"] for name in ("paper", "extra"))

# the subjects of MMLU's social sciences
SOCIAL = """econometrics high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
professional_psychology public_relations security_studies sociology us_foreign_policy"""


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
    """A data set as the hub keeps it: a JSONL file for each configuration and split, listed in a
    README."""
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

    def words(n=1):
        letters = ("bdfklmnprst", "aeiou")
        made = ((rng.choice(letters[i % 2]) for i in range(rng.randint(3, 6))) for _ in range(n))
        return " ".join("".join(word) for word in made)

    def rows(make, n=12):
        return [make() for _ in range(n)]

    def splits(make, test="test"):
        return {"train": rows(make, 30), test: rows(make)}

    def four():
        return rows(lambda: words(rng.randint(1, 2)), 4)

    def with_choices(question):
        choices = {"label": list("ABCD"), "text": four()}
        row = {"id": words(), question: words(4) + "?", "choices": choices}
        return {**row, "answerKey": rng.choice("ABCD")}

    def truthfulqa():
        targets = {"choices": rows(words, 3), "labels": [1, rng.randint(0, 1), 0]}
        return {"question": words(3) + "?", "mc1_targets": targets, "mc2_targets": targets}

    def winogrande():
        options = {"option1": words(), "option2": words(), "answer": rng.choice("12")}
        return {"sentence": f"{words(2)} _ {words(2)}.", **options}

    def gsm8k():
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        answer = f"{a} and {b} is <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        return {"question": f"Add {a} and {b}", "answer": answer}

    def hellaswag():
        row = {"ind": 0, "activity_label": words(), "ctx": "", "ctx_a": words(3) + "."}
        row |= {"ctx_b": words(), "endings": four(), "label": str(rng.randint(0, 3))}
        return {**row, "split": "val", "split_type": "indomain", "source_id": words()}

    def mmlu(subject):
        row = {"question": words(4), "subject": subject, "choices": four()}
        return {**row, "answer": rng.randint(0, 3)}

    def bbh():
        return {"input": words(4) + "?", "target": rng.choice(("Yes", "No"))}

    arc = splits(lambda: with_choices("question"))
    book = splits(lambda: with_choices("question_stem"))
    subjects = {}
    for s in SOCIAL.split():
        n = 12 if s == "sociology" else 2
        subjects[s] = {"dev": rows(partial(mmlu, s), 5), "test": rows(partial(mmlu, s), n)}
    bbh_tasks = ("causal_judgement", "formal_fallacies", "sports_understanding")
    sets = {
        "allenai/ai2_arc": {"ARC-Challenge": {**arc, "validation": arc["train"][:3]}},
        "truthfulqa/truthful_qa": {"multiple_choice": {"validation": rows(truthfulqa)}},
        "allenai/winogrande": {"winogrande_xl": splits(winogrande, "validation")},
        "openai/gsm8k": {"main": splits(gsm8k)},
        "Rowan/hellaswag": {"default": splits(hellaswag, "validation")},
        "cais/mmlu": subjects,
        "allenai/openbookqa": {"main": {**book, "validation": book["test"]}},
        "SaylorTwift/bbh": {task: {"test": rows(bbh, 3)} for task in bbh_tasks},
    }
    for name, configs in sets.items():
        write_set(folder / name, configs)
    return folder


@pytest.fixture()
def in_data(data, monkeypatch):
    """Where the data sets lie in folders of their hub ids, which datasets reads before the hub."""
    monkeypatch.chdir(data)


@pytest.fixture()
def no_model(monkeypatch):
    """No model may be loaded: it would take minutes before a mistake is seen."""
    monkeypatch.setattr(
        "spin.model.weights.load_whole", lambda *_: pytest.fail("the model was loaded")
    )


def flags_of(model, out, *tasks) -> list[str]:
    return [*MICRO, "--model", str(model), "--out", str(out), "--tasks", *tasks]


def run_tasks(model, out, *tasks) -> dict:
    """What evaluate.py --tasks writes, in this process."""
    evaluate.main(flags_of(model, out, *tasks))
    return json.loads(out.read_text())


@pytest.fixture(scope="session")
def ours(data, long_theta, tmp_path_factory):
    """evaluate.py --tasks paper, once, with MMLU's social sciences in the place of all subjects. A
    task that is asked for by name, too, keeps the paper's number of examples."""
    out = tmp_path_factory.mktemp("out") / "benchmarks.json"
    with pytest.MonkeyPatch.context() as patch:
        few = [*PAPER[:-1], ("MMLU", "mmlu_social_sciences", 5, "acc,none")]
        patch.setitem(paper_tables.TABLES["paper"], "tasks", few)
        patch.chdir(data)
        return run_tasks(long_theta, out, "paper", "arc_challenge")


def test_the_six_tasks_equal_the_harness_exactly(ours, in_data, long_theta, tmp_path, monkeypatch):
    from lm_eval.__main__ import cli_evaluate

    theirs = {}
    for shots, tasks in (
        (25, ["arc_challenge"]),
        (0, ["truthfulqa_mc2"]),
        (5, ["winogrande", "gsm8k", "mmlu_social_sciences"]),
        (10, ["hellaswag"]),
    ):  # the paper's
        command = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
        command += ["--model_args", f"pretrained={long_theta},dtype=float32"]
        command += ["--output_path", str(tmp_path / f"{tasks[0]}.json"), "--tasks", *tasks]
        command += ["--num_fewshot", str(shots)]
        monkeypatch.setattr(sys, "argv", command)
        cli_evaluate()
        (written,) = tmp_path.glob(f"{tasks[0]}_*.json")
        found = json.loads(written.read_text())["results"]
        theirs |= {task: {"shots": shots, **found[task]} for task in tasks}
    for _, task, _, metric in PAPER:
        task = "mmlu_social_sciences" if task == "mmlu" else task
        assert ours["tasks"][task] == theirs[task]  # equal, not close
        assert theirs[task]["sample_len"] >= 12 and metric in theirs[task]
    values = [ours["tasks"][task][metric] for _, task, _, metric in PAPER[:-1]]
    assert sum(0 < value < 1 for value in values) >= 3  # not all trivial


def test_other_shots_give_other_figures_and_a_tag_its_tasks(ours, in_data, long_theta, tmp_path):
    """Control: the harness's default count (0 for ARC), asked for by name."""
    zero_shot = run_tasks(long_theta, tmp_path / "all.json", "arc_challenge")["tasks"]
    differ = ("acc,none", "acc_norm,none")
    assert any(zero_shot["arc_challenge"][m] != ours["tasks"]["arc_challenge"][m] for m in differ)
    asked = ["mmlu_social_sciences_tasks", "--limit", "2"]
    found = run_tasks(long_theta, tmp_path / "out.json", *asked)
    assert found["limit"] == 2
    subjects = {f"mmlu_{subject}" for subject in SOCIAL.split()}
    assert found["tasks"].keys() == subjects  # without a mean
    assert all(task["sample_len"] == 2 and "acc,none" in task for task in found["tasks"].values())


def test_the_table_stands_beside_the_papers_row_for_row():
    found = {task: {m: 0.5, m.replace(",", "_stderr,"): 0.03} for _, task, _, m in PAPER}
    columns, rows = paper_tables.beside_the_paper("paper", {"mine": found})
    assert columns[0] == ("Arc", 25, "acc_norm") and columns[5] == ("MMLU", 5, "acc")
    assert columns[6][0] == "average"
    model, cells = rows[0]
    assert model == "mine" and cells[0] == (50, 3)
    assert cells[6] == (50, pytest.approx(3 / 6**0.5))
    paper = [cells[6][0] for _, cells in rows[1:]]
    # as the paper prints them; its 64.05 for SPIN + DPO is not the mean of that row
    means = [58.14, 60.80, 62.12, 62.97, 63.16, 61.31, 64.74, 57.23]
    assert paper == pytest.approx(means, abs=0.011)
    assert paper_tables.beside_the_paper("extra", {"mine": found}) is None
    del found["mmlu"]
    (_, cells), *_ = paper_tables.beside_the_paper("paper", {"mine": found})[1]
    assert cells == [(50, 3)] * 5 + [None] * 2  # no average either


AS_WITH_TWO_GPUS = """
import torch
torch.cuda.device_count = lambda: 2  # else lm_eval shares no questions between ranks
from lm_eval.api.task import Task
build = Task.build_all_requests

def build_and_say(self, rank, world_size, **how):
    print("rank", rank, "of", world_size, flush=True)
    return build(self, rank=rank, world_size=world_size, **how)

Task.build_all_requests = build_and_say
import evaluate
evaluate.main()
"""


@pytest.mark.long
def test_two_ranks_give_the_figures_of_one(ours, data, in_data, long_theta, tmp_path, monkeypatch):
    """lm_eval is made to believe that there are two GPUs. 11 questions do not divide by 2."""
    (tmp_path / "start.py").write_text(AS_WITH_TWO_GPUS)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    asked = ["truthfulqa_mc2", "--limit", "11"]
    flags = flags_of(long_theta, tmp_path / "two.json", *asked)
    done = torchrun(2, tmp_path / "start.py", *flags, cwd=data)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2" in done.stdout and "rank 1 of 2" in done.stdout
    monkeypatch.undo()
    monkeypatch.chdir(data)
    one = run_tasks(long_theta, tmp_path / "one.json", *asked)["tasks"]["truthfulqa_mc2"]
    two = json.loads((tmp_path / "two.json").read_text())["tasks"]["truthfulqa_mc2"]
    assert one["sample_len"] == two["sample_len"] == 11
    for metric in ("acc,none", "acc_stderr,none"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-5)
    assert done.stdout.count("truthfulqa_mc2") == 1  # rank 0 alone prints


def test_a_model_that_lacks_a_weight_is_not_made_up(in_data, long_theta, tmp_path, refused):
    other = shutil.copytree(long_theta, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    flags = flags_of(other, tmp_path / "out.json", "truthfulqa_mc2", "--limit", "1")
    assert "missing keys ['model.norm.weight']" in refused(lambda: evaluate.main(flags))


@pytest.mark.long
def test_the_further_tasks_run_with_the_papers_few_shot_examples(in_data, long_theta, tmp_path):
    found = run_tasks(long_theta, tmp_path / "out.json", "extra", "--limit", "1")["tasks"]
    assert [found[task]["shots"] for _, task, _, _ in EXTRA] == [3, 3, 3, 1]
    assert all(metric in found[task] for _, task, _, metric in EXTRA)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--tasks no_such_task", "no task of this name"),
        ("--limit 3", "--tasks"),
        ("--tasks arc_challenge --limit 0", "--limit"),
        ("--tasks paper --opponent a", "unrecognized arguments: --opponent"),
        ("--tasks gsm8k", "gsm8k generates up to 256 tokens, and the model has 64 positions"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, word, in_data, refused, no_model):
    flags = [*MICRO, "--model", str(THETA0), *flags.split()]
    assert word in refused(lambda: evaluate.main(flags))


def test_without_a_hub_or_local_copies_one_line_says_what_is_missing(tmp_path, refused, no_model):
    """HF_HUB_OFFLINE (conftest.py): what a machine without a network comes to after its retries."""
    line = refused(lambda: evaluate.main(flags_of(THETA0, tmp_path / "out.json", "paper")))
    assert "allenai/ai2_arc" in line and "hf download" in line and not list(tmp_path.iterdir())


def test_where_lm_eval_is_missing_one_line_names_the_command_that_installs_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    line = refused(lambda: evaluate.main([*MICRO, "--model", str(THETA0), "--tasks", "paper"]))
    needed = (REPO / "requirements-dev.txt").read_text().splitlines()
    assert harness.INSTALL in line and harness.INSTALL.split("'")[1] in needed


@pytest.mark.parametrize("vocabulary, batch", [(88, 8), (32000, 8), (128256, 2), (262144, 1)])
def test_the_logits_of_a_batch_fit_whatever_the_vocabulary(vocabulary, batch):
    assert harness.batch_that_fits(vocabulary) == batch
    assert batch == 1 or 2 * batch * 2048 * vocabulary < 1.1e9


def test_ranks_of_several_nodes_are_refused(refused, monkeypatch):
    where = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**where, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    flags = [*MICRO, "--model", str(THETA0), "--tasks", "paper"]
    assert "--tasks runs on one node" in refused(lambda: evaluate.main(flags))
