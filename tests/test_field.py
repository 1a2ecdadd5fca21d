"""Faults that people have met in the field: a result made from something else is not "done", a
model edited between stages is noticed, and several chat templates survive training."""

import json
import shutil
import sys

import pytest
from conftest import MICRO, THETA0, shell, stage
from transformers import AutoTokenizer

from spin import checkpoint, compare, mt_bench
from spin.files import write_jsonl

PAIRS = [{"prompt": f"Spell {w}", "real": "-".join(w), "generated": w} for w in ("tin", "kola")]
CHAT = (
    "<s>{% for m in messages %}{{ '### Instruction: ' if m.role == 'user' else ' ' }}"
    "{{ m.content }}{{ '\n\n### Response:' if m.role == 'user' else '</s>' }}{% endfor %}"
)


@pytest.fixture()
def chat_model(tmp_path):
    """θ_0 with two named chat templates; the default one writes what the paper's does."""
    folder = shutil.copytree(THETA0, tmp_path / "theta")
    path = folder / "tokenizer_config.json"
    named = [
        {"name": "default", "template": CHAT},
        {"name": "tool_use", "template": CHAT + "{{ tools }}"},
    ]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    return folder


def test_a_tokenizer_with_several_chat_templates_is_exported_with_all_of_them(chat_model, tmp_path):
    run = tmp_path / "run"
    flags = ["--model", chat_model, "--template", "chat"]
    for t in (0, 1):
        stage("generate", run, "--iter", t, *flags)
        stage("train", run, "--iter", t, *flags)
    exported = AutoTokenizer.from_pretrained(run / "iter1" / "model").chat_template
    assert exported == {"default": CHAT, "tool_use": CHAT + "{{ tools }}"}


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("t", [0, 1])
def test_a_model_edited_between_stages_is_noticed(name, t, chat_model, tmp_path, refused):
    run = tmp_path / "run"
    flags = ["--model", chat_model, "--template", "chat"]
    stage("generate", run, "--iter", 0, *flags)
    if t == 1:
        stage("train", run, "--iter", 0, *flags)
    folder = run / "iter0" / "model" if t else chat_model
    if t == 0 and name == "chat_template.jinja":
        (folder / name).write_text(CHAT)  # where there was none
    text = (folder / name).read_text()
    # an edit that keeps the size, which no number of bytes tells
    edited = text.replace("Response", "Renponse") if "jinja" in name else text.replace("e", "E", 1)
    (folder / name).write_text(edited)
    line = refused(lambda: stage("generate" if t else "train", run, "--iter", t, *flags))
    assert "not those that" in line
    if t:
        (folder / name).write_text(text)
        stage("generate", run, "--iter", t, *flags)  # control: as it was


def test_pairs_given_to_an_iteration_that_was_made_from_others_are_refused(tmp_path, refused):
    for name, rows in (("a", PAIRS), ("b", PAIRS[:1])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    run = tmp_path / "run"
    a, b = (["--iter", 0, "--pairs", tmp_path / f"{name}.jsonl"] for name in "ab")
    stage("train", run, *a)
    stage("train", run, *a)  # nothing to do
    for other in (b, ["--iter", 0]):
        assert "was made from other pairs" in refused(lambda o=other: stage("train", run, *o))
    own = tmp_path / "own"
    stage("generate", own, "--iter", 0)
    stage("train", own, "--iter", 0)
    assert "was made from other pairs" in refused(lambda: stage("train", own, *a))
    stage("train", own, "--iter", 0)  # nothing to do


def test_a_result_of_another_model_or_recipe_is_not_taken_for_this_one(
    played, tmp_path, refused, capfd
):
    out = tmp_path / "result.json"
    theta_1 = played / "iter0" / "model"
    flags = ["--model", THETA0, "--out", out]
    stage("evaluate", tmp_path, *flags)
    before = out.read_text()
    stage("evaluate", tmp_path, *flags)
    assert "nothing to do" in capfd.readouterr().out
    for other, word in (
        (["--model", theta_1], "another model"),
        (["--opponent", theta_1], "another opponent"),
        (["--eval-prompts", 5], "another recipe"),
    ):
        line = refused(lambda o=other: stage("evaluate", tmp_path, *flags, *o))
        assert f"{out} is there already, made with {word}" in line
    assert out.read_text() == before


def test_a_comparison_of_other_models_is_not_taken_for_this_one(played, tmp_path, refused, capfd):
    out = str(tmp_path / "result.json")
    theta_1, theta_2 = (str(played / f"iter{t}" / "model") for t in (0, 1))
    compare.main([str(THETA0), theta_1, *MICRO, "--out", out])
    compare.main([str(THETA0), theta_1, *MICRO, "--out", out])
    assert "nothing to do" in capfd.readouterr().out
    line = refused(lambda: compare.main([str(THETA0), theta_2, *MICRO, "--out", out]))
    assert "made with another opponent" in line


def test_answers_for_mt_bench_of_another_model_are_not_taken_for_its(
    played, long_theta, tmp_path, refused, capfd
):
    write_jsonl(tmp_path / "question.jsonl", [{"question_id": 1, "turns": ["Spell tin"]}])
    flags = [str(tmp_path / "question.jsonl"), *MICRO, "--out", str(tmp_path / "m.jsonl")]
    mt_bench.main([*flags, "--model", str(long_theta)])
    mt_bench.main([*flags, "--model", str(long_theta)])
    assert "nothing to do" in capfd.readouterr().out
    line = refused(lambda: mt_bench.main([*flags, "--model", str(THETA0)]))
    assert "made with another model" in line


# ---- what libraries write on the way to a refusal ----


def lost_metadata(tmp_path, monkeypatch):
    def killed(*_):
        raise RuntimeError

    stage("generate", tmp_path, "--iter", 0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint, "export", killed)
        stage("train", tmp_path, "--iter", 0)
    (index,) = tmp_path.glob("iter0/checkpoint/*/.metadata")
    index.unlink()
    return "train", "is damaged"


def lost_model(tmp_path, monkeypatch):
    return "generate", "cannot load", "--model", "someone/nothing"


def lost_set(tmp_path, monkeypatch):
    return "generate", "cannot load", "--data", "someone/nothing"


def lost_weight(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(THETA0, tmp_path / "theta")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return "generate", "missing keys", "--model", folder


def broken_tokenizer(tmp_path, monkeypatch):
    folder = shutil.copytree(THETA0, tmp_path / "theta")
    (folder / "tokenizer.json").write_text("{")
    return "generate", "cannot load the tokenizer", "--model", folder


@pytest.mark.parametrize(
    "lay_out", [lost_metadata, lost_model, lost_set, lost_weight, broken_tokenizer]
)
def test_a_refusal_stands_alone_on_stderr_whatever_libraries_log(lay_out, tmp_path, monkeypatch):
    name, word, *flags = lay_out(tmp_path, monkeypatch)
    flags = [*MICRO, "--run", tmp_path, "--iter", 0, *flags]
    done = shell(sys.executable, f"{name}.py", *flags)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and word in line
    if lay_out is lost_metadata:  # control: libraries that may log
        loud = "import logging, sys, train; logging.disable = print; train.main(sys.argv[1:])"
        assert "Traceback" in shell(sys.executable, "-c", loud, *flags).stderr
