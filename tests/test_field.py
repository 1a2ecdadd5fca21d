"""Faults that people have met in the field: a result made from something else is not "done", a
model edited between stages is noticed, several chat templates survive training, and what libraries
log does not stand before a refusal."""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MICRO, THETA0, as_in_a_shell, shell, stage, torchrun
from safetensors.torch import load_file, save_file
from test_faults import train_up_to_the_export
from test_train import fresh
from transformers import AutoTokenizer

from spin import checks
from spin.bench import harness
from spin.files import write_jsonl

PAIRS = [{"prompt": f"Spell {w}", "real": "-".join(w), "generated": w} for w in ("tin", "kola")]
CHAT = (
    "<s>{% for m in messages %}{{ '### Instruction: ' if m.role == 'user' else ' ' }}"
    "{{ m.content }}{{ '\n\n### Response:' if m.role == 'user' else '</s>' }}{% endfor %}"
)
TOOLS = CHAT + "{{ tools }}"


def chat_model(folder, names=()):
    """θ_0 with a chat template that writes what the paper's does, in chat_template.jinja; or with
    several, of these names, in tokenizer_config.json. Returns the flags that name it."""
    shutil.copytree(THETA0, folder)
    path = folder / "tokenizer_config.json"
    if names:
        named = [{"name": n, "template": CHAT if n == "default" else TOOLS} for n in names]
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    else:
        (folder / "chat_template.jinja").write_text(CHAT)
    return ["--model", folder, "--template", "chat"]


# ---- a model's own files -------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["tool_use", "tools/v2"])
def test_a_tokenizer_with_several_chat_templates_is_exported_with_all_of_them(other, tmp_path):
    run = tmp_path / "run"
    flags = chat_model(tmp_path / "theta", ["default", other])
    for t in (0, 1):
        stage("generate", run, "--iter", t, *flags)
        stage("train", run, "--iter", t, *flags)
    exported = AutoTokenizer.from_pretrained(run / "iter1" / "model").chat_template
    assert exported == {"default": CHAT, other: TOOLS}


FILES_OF_A_MODEL = (
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json"),
    *("tekken.json", "added_tokens.json", "source.spm", "bpe.codes"),
)


def test_a_model_edited_between_stages_is_noticed_and_other_files_beside_it_do_not_matter(
    tmp_path, refused
):
    run = tmp_path / "run"
    flags = chat_model(tmp_path / "theta")
    for t, folder in enumerate((tmp_path / "theta", run / "iter0" / "model")):
        stage("generate", run, "--iter", t, *flags)
        for text in FILES_OF_A_MODEL:
            path = folder / text
            before = path.read_text() if path.exists() else None
            path.parent.mkdir(exist_ok=True)
            # an edit that keeps the size, which no number of bytes tells
            path.write_text(before.replace("s", "S") if before else TOOLS)
            line = refused(lambda i=t: stage("train", run, "--iter", i, *flags))
            assert f"{folder} is not the model" in line or f"another model than {folder}" in line
            path.write_text(before) if before else path.unlink()
        (folder / "README.md").write_text("Mine.")
        (folder / "result.json").write_text("{}")
        stage("train", run, "--iter", t, *flags)  # the control


# ---- a result made from something else -----------------------------------------------------------


def test_pairs_given_to_an_iteration_that_was_made_from_others_are_refused(
    played, tmp_path, refused, monkeypatch
):
    """Pairs are known by what is in the files, whatever path names them."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", PAIRS), ("b", PAIRS[:1])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows)
    run = tmp_path / "run"
    flags = ["--iter", 0, "--split", "train"]
    a, b, again = ([*flags, "--pairs", name] for name in ("a", "b", tmp_path / "a"))
    stage("train", run, *a)
    stage("train", run, *again)  # nothing to do
    for other in (b, flags):
        assert "not trained on these pairs" in refused(lambda o=other: stage("train", run, *o))
    line = refused(lambda: checks.main([*MICRO, "--split", "train", "--run", str(run)]))
    assert "not trained on these pairs" in line  # the loop's own have no --pairs
    shutil.copy(tmp_path / "b" / "train.jsonl", tmp_path / "a")
    assert "not trained on these pairs" in refused(lambda: stage("train", run, *a))
    checks.main([*MICRO, "--run", str(played)])  # the control
    line = refused(lambda: stage("train", played, "--iter", 0, "--pairs", "b"))
    assert "not trained on these pairs" in line
    stage("train", played, "--iter", 0)  # nothing to do


def test_a_result_made_from_something_else_is_not_taken_for_this_one(
    played, tmp_path, refused, capsys, monkeypatch
):
    out = tmp_path / "result.json"
    theta_1 = played / "iter0" / "model"
    shutil.copytree(THETA0, tmp_path / "theta")
    held_out = tmp_path / "held.jsonl"
    write_jsonl(held_out, [{"prompt": "Spell tin", "response": "t-i-n"}])
    flags = ["--out", out, "--eval-data", held_out, "--model"]
    monkeypatch.chdir(tmp_path)
    stage("evaluate", tmp_path, *flags, "theta")
    before = out.read_text()
    stage("evaluate", tmp_path, *flags, tmp_path / "theta")  # the same by another path
    assert "nothing to do" in capsys.readouterr().out
    theta = [*flags, "theta"]
    for other, word in (
        ([*flags, theta_1], "another model"),
        ([*theta, "--eval-prompts", 5], "another recipe"),
    ):
        line = refused(lambda o=other: stage("evaluate", tmp_path, *o))
        assert f"{out} is there already, made with {word}" in line
    write_jsonl(held_out, [{"prompt": "Spell tin", "response": "tin"}])
    line = refused(lambda: stage("evaluate", tmp_path, *theta))
    assert "made with another eval_data" in line
    assert out.read_text() == before
    out.write_text('{"expected_exact_match": 1.0}')  # of unknown origin
    assert "made with another model" in refused(lambda: stage("evaluate", tmp_path, *theta))


def test_benchmarks_of_other_tasks_or_fewer_questions_are_not_taken_for_those_asked_for(
    tmp_path, refused, monkeypatch, capsys
):
    def run_benchmarks(policy, recipe, asked, limit):
        return {"tasks": {}}

    monkeypatch.setattr(harness, "run_benchmarks", run_benchmarks)
    flags = ["--theta0", "--tasks"]
    stage("evaluate", tmp_path, *flags, "paper")
    stage("evaluate", tmp_path, *flags, "paper")
    assert "nothing to do" in capsys.readouterr().out
    for other, word in ((["extra"], "tasks"), (["paper", "--limit", 9], "limit")):
        line = refused(lambda o=other: stage("evaluate", tmp_path, *flags, *o))
        assert f"benchmarks.json is there already, made with another {word}: " in line


def test_a_result_of_another_day_is_another_one_where_a_chat_template_may_write_the_day(
    tmp_path, refused
):
    flags = [*chat_model(tmp_path / "theta"), "--out", tmp_path / "result.json", "--date"]
    stage("evaluate", tmp_path, *flags, "2026-01-31")
    stage("evaluate", tmp_path, *flags, "2026-01-31")  # nothing to do
    line = refused(lambda: stage("evaluate", tmp_path, *flags, "2026-02-01"))
    assert "made with another recipe" in line


# ---- what a shell shows of a refusal -------------------------------------------------------------


INDEX_LOST = r"error: .*/checkpoint/\d+ is damaged .*: delete .*\n"


def foreign_weights(folder):
    """Weights of which one is missing, one is too many and one of another shape."""
    state = load_file(THETA0 / "model.safetensors")
    norm = state.pop("model.norm.weight")
    state["model.layers.0.input_layernorm.weight"] = norm[:-1].clone()
    save_file({**state, "model.other.weight": norm}, folder / "model.safetensors")


def cut_weights(folder):
    os.truncate(folder / "model.safetensors", 400_000)


def cut_tokenizer(folder):
    os.truncate(folder / "tokenizer.json", 900)


@pytest.fixture()
def checkpoint_without_index(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    train_up_to_the_export(run, 0, monkeypatch)
    (index,) = (run / "iter0" / "checkpoint").glob("*/.metadata")
    index.unlink()
    return [*MICRO, "--run", run, "--iter", 0]


def test_a_checkpoint_without_its_index_is_one_line_and_no_traceback(checkpoint_without_index):
    done = shell(sys.executable, "train.py", *checkpoint_without_index)
    assert done.returncode == 2
    assert re.fullmatch(INDEX_LOST, done.stderr), done.stderr


def test_of_two_ranks_it_is_one_line_too_before_the_report_of_torchrun(checkpoint_without_index):
    done = torchrun(2, "train.py", *checkpoint_without_index)
    ours = re.split(r"^[WE]\d{4} ", done.stderr, flags=re.MULTILINE)[0]
    assert re.fullmatch(INDEX_LOST, ours), ours


@pytest.mark.parametrize("change", [foreign_weights, cut_weights, cut_tokenizer])
def test_a_model_that_is_not_whole_is_one_line_of_a_shell(change, tmp_path):
    shutil.copytree(THETA0, tmp_path / "theta")
    change(tmp_path / "theta")

    def generate():
        stage("generate", tmp_path / "run", "--iter", 0, "--model", tmp_path / "theta")

    code, shown = as_in_a_shell(generate, tmp_path / "stderr")
    assert code == 2
    assert re.fullmatch(r"error: [^\n]*\n", shown), shown


@pytest.mark.long
def test_a_hub_that_cannot_be_reached_is_one_line_unless_one_asks_for_its_retries(tmp_path):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "generate.py", *MICRO, "--run", tmp_path, "--iter", 0]
    loud = {**nowhere, "HF_HUB_VERBOSITY": "info"}
    cases = [("--model", nowhere), ("--data", nowhere), ("--model", loud)]
    with ThreadPoolExecutor() as pool:  # each waits for its retries
        runs = [pool.submit(shell, *command, what, "no-such/thing", env=e) for what, e in cases]
    *quiet, control = (run.result() for run in runs)
    for done in quiet:
        assert done.returncode == 2
        assert re.fullmatch(r"error: cannot (load|read) [^\n]*\n", done.stderr), done.stderr
    assert "Retrying in" in control.stderr
