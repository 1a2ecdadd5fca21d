"""Faults that people have met in the field: a result made from something else is not "done", a
model edited between stages is noticed, several chat templates survive training, and what libraries
log does not stand before a refusal."""

import json
import os
import re
import shutil
import sys

import pytest
from conftest import MICRO, THETA0, shell, stage, torchrun
from safetensors.torch import load_file, save_file
from test_faults import train_up_to_the_export
from test_train import fresh
from transformers import AutoTokenizer

from spin import checks, compare, lm_harness, mt_bench
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


def test_a_model_edited_between_stages_is_noticed_and_other_files_beside_it_do_not_matter(
    tmp_path, refused
):
    run = tmp_path / "run"
    flags = chat_model(tmp_path / "theta")
    stage("generate", run, "--iter", 0, *flags)
    for t, folder in enumerate((tmp_path / "theta", run / "iter0" / "model")):
        name = "generate" if t else "train"
        for text in (
            *("config.json", "tokenizer.json", "tokenizer_config.json"),
            *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
            *("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json"),
            *("tekken.json", "added_tokens.json", "source.spm", "bpe.codes"),
        ):
            path = folder / text
            before = path.read_text() if path.exists() else None
            path.parent.mkdir(exist_ok=True)
            # an edit that keeps the size, which no number of bytes tells
            path.write_text(before.replace("s", "S") if before else TOOLS)
            line = refused(lambda n=name, i=t: stage(n, run, "--iter", i, *flags))
            assert f"{path} is damaged, changed or new, by the checksums in " in line
            path.write_text(before) if before else path.unlink()
        (folder / "README.md").write_text("Mine.")
        (folder / "result.json").write_text("{}")
        stage(name, run, "--iter", t, *flags)  # the control


# ---- a result made from something else -----------------------------------------------------------


def test_pairs_given_to_an_iteration_that_was_made_from_others_are_refused(tmp_path, refused):
    for name, rows in (("a", PAIRS), ("b", PAIRS[:1])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    run = tmp_path / "run"
    a, b = (["--iter", 0, "--pairs", tmp_path / f"{name}.jsonl"] for name in "ab")
    stage("train", run, *a)
    stage("train", run, *a)  # nothing to do
    for other in (b, ["--iter", 0]):
        assert "was made from these pairs" in refused(lambda o=other: stage("train", run, *o))
    own = tmp_path / "own"
    stage("generate", own, "--iter", 0)
    stage("train", own, "--iter", 0)
    assert "was made from these pairs" in refused(lambda: stage("train", own, *a))
    stage("train", own, "--iter", 0)  # nothing to do


def test_a_folder_of_pairs_is_known_by_what_is_in_it(tmp_path, refused, monkeypatch):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", PAIRS)
    run = tmp_path / "run"
    stage("train", run, "--iter", 0, "--pairs", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    stage("train", run, "--iter", 0, "--pairs", "set")  # nothing to do
    write_jsonl(tmp_path / "set" / "a.jsonl", PAIRS[:1])
    line = refused(lambda: stage("train", run, "--iter", 0, "--pairs", "set"))
    assert "was made from these pairs" in line


def test_the_loop_does_not_take_an_iteration_of_other_pairs_for_its_own(played, tmp_path, refused):
    checks.main([*MICRO, "--run", str(played)])  # the control
    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    stage("train", tmp_path / "run", "--iter", 0, "--pairs", tmp_path / "a.jsonl")
    for _ in range(2):
        line = refused(lambda: checks.main([*MICRO, "--run", str(tmp_path / "run")]))
        assert "was made from these pairs" in line
        for lost in (tmp_path / "run" / "iter0").glob("pairs.*"):  # which makes them no other ones
            lost.unlink()


def test_a_result_of_another_model_or_recipe_is_not_taken_for_this_one(
    played, tmp_path, refused, capsys
):
    out = tmp_path / "result.json"
    theta_1 = played / "iter0" / "model"
    flags = ["--model", THETA0, "--out", out]
    stage("evaluate", tmp_path, *flags)
    before = out.read_text()
    stage("evaluate", tmp_path, *flags)
    assert "nothing to do" in capsys.readouterr().out
    for other, word in (
        (["--model", theta_1], "another model"),
        (["--opponent", theta_1], "another opponent"),
        (["--eval-prompts", 5], "another recipe"),
    ):
        line = refused(lambda o=other: stage("evaluate", tmp_path, *flags, *o))
        assert f"{out} is there already, made with {word}" in line
    assert out.read_text() == before


def test_a_result_of_another_held_out_set_or_of_unknown_origin_is_not_taken_for_this_one(
    tmp_path, refused
):
    held_out = tmp_path / "held.jsonl"
    write_jsonl(held_out, [{"prompt": "Spell tin", "response": "t-i-n"}])
    flags = ["--theta0", "--eval-data", held_out]
    stage("evaluate", tmp_path / "run", *flags)
    stage("evaluate", tmp_path / "run", *flags)  # nothing to do
    write_jsonl(held_out, [{"prompt": "Spell tin", "response": "tin"}])
    line = refused(lambda: stage("evaluate", tmp_path / "run", *flags))
    assert "eval.json is there already, made with another eval_data" in line
    (tmp_path / "mine.json").write_text('{"expected_exact_match": 1.0}')
    flags = ["--model", THETA0, "--out", tmp_path / "mine.json"]
    assert "made with another model" in refused(lambda: stage("evaluate", tmp_path, *flags))


def test_benchmarks_of_other_tasks_or_fewer_questions_are_not_taken_for_those_asked_for(
    tmp_path, refused, monkeypatch, capsys
):
    def run_benchmarks(policy, recipe, asked, limit):
        return {"tasks": {}}

    monkeypatch.setattr(lm_harness, "run_benchmarks", run_benchmarks)
    flags = ["--theta0", "--tasks"]
    stage("evaluate", tmp_path, *flags, "paper")
    stage("evaluate", tmp_path, *flags, "paper")
    assert "nothing to do" in capsys.readouterr().out
    for other, word in ((["extra"], "tasks"), (["paper", "--limit", 9], "limit")):
        line = refused(lambda o=other: stage("evaluate", tmp_path, *flags, *o))
        assert f"benchmarks.json is there already, made with another {word}: " in line


def test_a_comparison_of_other_models_is_not_taken_for_this_one(played, tmp_path, refused, capsys):
    out = str(tmp_path / "result.json")
    theta_1, theta_2 = (str(played / f"iter{t}" / "model") for t in (0, 1))
    compare.main([str(THETA0), theta_1, *MICRO, "--out", out])
    compare.main([str(THETA0), theta_1, *MICRO, "--out", out])
    assert "nothing to do" in capsys.readouterr().out
    line = refused(lambda: compare.main([str(THETA0), theta_2, *MICRO, "--out", out]))
    assert "made with another opponent" in line


def test_an_evaluation_is_not_taken_for_a_comparison_of_the_same_models(played, tmp_path, refused):
    """Nor the other way round; both read the same models, recipe and set."""
    one, two = (tmp_path / f"{name}.json" for name in ("evaluation", "comparison"))
    models = ["--model", str(THETA0), "--opponent", str(played / "iter0" / "model")]
    stage("evaluate", tmp_path, *models, "--out", one)
    same = [models[1], models[3], *MICRO]
    assert "another program" in refused(lambda: compare.main([*same, "--out", str(one)]))
    compare.main([*same, "--out", str(two)])
    assert "another tasks" in refused(lambda: stage("evaluate", tmp_path, *models, "--out", two))


@pytest.mark.parametrize("writes_date", [True, False])
def test_a_result_of_another_day_is_another_one_where_the_chat_template_writes_the_day(
    writes_date, tmp_path, refused
):
    flags = [*chat_model(tmp_path / "theta"), "--out", tmp_path / "result.json"]
    if writes_date:
        template = "{{ strftime_now('%d') }}" + CHAT
        (tmp_path / "theta" / "chat_template.jinja").write_text(template)
    stage("evaluate", tmp_path, *flags, "--date", "2026-01-31")
    stage("evaluate", tmp_path, *flags, "--date", "2026-01-31")  # nothing to do

    def next_day():
        stage("evaluate", tmp_path, *flags, "--date", "2026-02-01")

    if writes_date:
        assert "made with another date" in refused(next_day)
    else:
        next_day()  # nothing to do


def test_a_result_is_known_by_whatever_path_its_model_is_named(tmp_path, capsys, monkeypatch):
    shutil.copytree(THETA0, tmp_path / "theta")
    flags = ["--eval-prompts", 4, "--out", tmp_path / "result.json"]
    stage("evaluate", tmp_path, "--model", tmp_path / "theta", *flags)
    monkeypatch.chdir(tmp_path)
    stage("evaluate", tmp_path, "--model", "theta", *flags)
    assert "nothing to do" in capsys.readouterr().out


def test_answers_for_mt_bench_of_another_model_are_not_taken_for_its(
    played, long_theta, tmp_path, refused, capsys
):
    write_jsonl(tmp_path / "question.jsonl", [{"question_id": 1, "turns": ["Spell tin"]}])
    flags = [str(tmp_path / "question.jsonl"), *MICRO, "--out", str(tmp_path / "m.jsonl")]
    mt_bench.main([*flags, "--model", str(long_theta)])
    mt_bench.main([*flags, "--model", str(long_theta)])
    assert "nothing to do" in capsys.readouterr().out
    line = refused(lambda: mt_bench.main([*flags, "--model", str(THETA0)]))
    assert "made with another model" in line
    (tmp_path / "m.json").unlink()
    assert "m.jsonl is there already" in refused(
        lambda: mt_bench.main([*flags, "--model", str(long_theta)])
    )


# ---- what a shell shows of a refusal -------------------------------------------------------------


INDEX_LOST = r"error: .*/checkpoint/\d+ is damaged .*: delete .*\n"


def no_index(run):
    """A checkpoint without its .metadata, and without the checksums that would tell of it first."""
    (index,) = (run / "iter0" / "checkpoint").glob("*/.metadata")
    index.unlink()
    for listed in index.parent.glob("*.sha256"):
        listed.unlink()


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


def changed(change, tmp_path):
    shutil.copytree(THETA0, tmp_path / "theta")
    change(tmp_path / "theta")
    return ["--model", tmp_path / "theta"]


@pytest.fixture()
def checkpoint_without_index(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    train_up_to_the_export(run, 0, monkeypatch)
    no_index(run)
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
    flags = [*MICRO, "--run", tmp_path / "run", "--iter", 0, *changed(change, tmp_path)]
    done = shell(sys.executable, "generate.py", *flags)
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr), done.stderr


@pytest.mark.long
def test_a_hub_that_cannot_be_reached_is_one_line_unless_one_asks_for_its_retries(tmp_path):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "generate.py", *MICRO, "--run", tmp_path, "--iter", 0]
    for what in ("--model", "--data"):
        done = shell(*command, what, "no-such/thing", env=nowhere)
        assert done.returncode == 2
        assert re.fullmatch(r"error: cannot load [^\n]*\n", done.stderr), done.stderr
    done = shell(*command, "--model", "no-such/thing", env={**nowhere, "HF_HUB_VERBOSITY": "info"})
    assert "Retrying in" in done.stderr  # the control
