"""Faults that people have met in the field: a result made from something else is not "done", a
model edited between stages is noticed, several chat templates survive training, and what libraries
log does not stand before a refusal."""

import io
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MICRO, THETA0, shell, stage, torchrun
from test_faults import train_up_to_the_export
from test_train import fresh
from transformers import AutoTokenizer

from spin import checks
from spin import compare as spin_compare
from spin.bench import harness
from spin.files import write_jsonl
from spin.report import page

PAIRS = [{"prompt": f"Spell {w}", "real": "-".join(w), "generated": w} for w in ("tin", "kola")]
CHAT = (
    "<s>{% for m in messages %}{{ '### Instruction: ' if m.role == 'user' else ' ' }}"
    "{{ m.content }}{{ '\n\n### Response:' if m.role == 'user' else '</s>' }}{% endfor %}"
)
TOOLS = "{{ raise_exception('no tools') }}"


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


def test_a_model_edited_between_stages_is_noticed_unlike_other_files_beside_it(tmp_path, refused):
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


def test_pairs_for_an_iteration_of_others_are_refused(played, tmp_path, refused, monkeypatch):
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


def test_the_result_of_something_else_is_not_taken(played, tmp_path, refused, capsys, monkeypatch):
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


def test_benchmarks_of_other_tasks_are_not_taken_for_these(tmp_path, refused, monkeypatch, capsys):
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


def test_a_result_of_another_day_is_another_where_a_template_may_write_it(tmp_path, refused):
    flags = [*chat_model(tmp_path / "theta"), "--out", tmp_path / "result.json", "--date"]
    stage("evaluate", tmp_path, *flags, "2026-01-31")
    stage("evaluate", tmp_path, *flags, "2026-01-31")  # nothing to do
    line = refused(lambda: stage("evaluate", tmp_path, *flags, "2026-02-01"))
    assert "made with another recipe" in line


WHOLE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HALF = [
    *({name: value} for name, value in WHOLE.items() if name in ("RANK", "WORLD_SIZE")),
    *({**WHOLE, name: None} for name in WHOLE),
    *({**WHOLE, name: "" if name == "MASTER_ADDR" else "x"} for name in WHOLE),
    {"RANK": "1", "WORLD_SIZE": "2"},
    {**WHOLE, "RANK": "1"},
    {**WHOLE, "LOCAL_RANK": "1"},
    {**WHOLE, "MASTER_PORT": "99999"},
    {**WHOLE, "LOCAL_WORLD_SIZE": "x"},
    {"LOCAL_RANK": "0"},
]


@pytest.mark.parametrize("variables", HALF)
def test_half_a_launch_is_one_line_at_once_and_no_wait_for_ranks(variables, monkeypatch, refused):
    def call():
        spin_compare.main(["no", "such"])

    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert "no holds no by_prompt.jsonl" in refused(call)  # the control
    for name in WHOLE:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert "MASTER_PORT do not fit together: start several ranks with torchrun" in refused(call)


def test_what_a_terminal_cannot_show_is_replaced(played, monkeypatch):
    folders = [str(played), str(played / "iter0")]
    for call in (lambda: spin_compare.main(folders), lambda: page.main(["--run", str(played)])):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(UnicodeEncodeError):
            print("θ₀")  # the control
        call()
        terminal.flush()
        assert b"?" in terminal.buffer.getvalue()


# ---- what a shell shows of a refusal; of one rank: test_bad_input.py, test_faults.py ------------


@pytest.mark.long
def test_of_two_ranks_a_refusal_is_one_line_before_torchruns_report(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    train_up_to_the_export(run, 0, monkeypatch)
    (index,) = (run / "iter0" / "checkpoint").glob("*/.metadata")
    index.unlink()
    done = torchrun(2, "train.py", *MICRO, "--run", run, "--iter", 0)
    ours = re.split(r"^[WE]\d{4} ", done.stderr, flags=re.MULTILINE)[0]
    assert re.fullmatch(r"error: .*/checkpoint/\d+ is damaged .*: delete .*\n", ours), ours


@pytest.mark.long
def test_a_hub_that_cannot_be_reached_is_one_line_unless_one_asks_for_its_retries(tmp_path):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "generate.py", *MICRO, "--iter", 0, "--run"]
    loud = {**nowhere, "HF_HUB_VERBOSITY": "info"}
    cases = [("--model", nowhere), ("--data", nowhere), ("--model", loud)]
    with ThreadPoolExecutor() as pool:  # each waits for its retries
        runs = []
        for number, (what, env) in enumerate(cases):  # a run has one process at a time
            folder = tmp_path / str(number)
            runs.append(pool.submit(shell, *command, folder, what, "no-such/thing", env=env))
    *quiet, control = (run.result() for run in runs)
    for done in quiet:
        assert done.returncode == 2
        assert re.fullmatch(r"error: cannot (load|read) [^\n]*\n", done.stderr), done.stderr
    assert "Retrying in" in control.stderr
