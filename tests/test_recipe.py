"""recipe.py: the paper's numbers, one default a knob, and what is refused before anything is loaded or written."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import MICRO, THETA0, shell, stage, torchrun

from safetensors.torch import load_file

import recipe as recipes
from data import read_jsonl, write_jsonl
from recipe import RECIPES, Recipe, at, parse


def test_the_default_recipe_is_the_papers():
    recipe, args = parse([])
    assert str(args.run) == "runs/paper" and recipe == Recipe() and RECIPES["paper"] == {}
    assert [at(recipe.lr, t) for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]  # Appendix B.1
    assert [at(recipe.lam, t) for t in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert [at(recipe.mix, t) for t in range(4)] == [1, 2, 2, 2]  # 50k, then 100k: Section 6.1
    assert (recipe.num_prompts, recipe.batch_size, recipe.epochs, recipe.warmup, recipe.max_length) == (50_000, 64, 2, 0.1, 2048)
    assert (recipe.temperature, recipe.top_p, recipe.ell, recipe.iterations) == (1.0, 1.0, "logistic", 4)
    assert recipe.model == "alignment-handbook/zephyr-7b-sft-full" and recipe.revision.startswith("ac6e600e")


def test_every_knob_has_a_flag_and_a_help_line():
    for f in dataclasses.fields(Recipe):
        assert f.metadata["help"]
        if isinstance(f.default, bool):
            flags = ["--" + f.name.replace("_", "-")]
        else:
            value = f.default[0] if isinstance(f.default, tuple) else f.default
            flags = ["--" + f.name.replace("_", "-"), str(value)]
        parse(flags)


def test_a_model_of_ones_own_does_not_take_the_papers_revision():
    assert parse(["--model", "someone/else"])[0].revision == ""


@pytest.mark.parametrize("flags, word", [
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"), (["--lam", "-1"], "--lam"),
    (["--batch-size", "0"], "--batch-size"), (["--epochs", "-2"], "--epochs"), (["--warmup", "1.5"], "--warmup"),
    (["--top-p", "0"], "--top-p"), (["--temperature", "-1"], "--temperature"), (["--num-prompts", "0"], "--num-prompts"),
    (["--max-new-tokens", "64"], "--max-new-tokens"), (["--micro-tokens", "0"], "--micro-tokens"), (["--mix", "0"], "--mix"),
    (["--clip", "0"], "--clip"), (["--seed", "-1"], "--seed"), (["--lr", "fast"], "--lr"), (["--ell", "square"], "--ell"),
    (["--template", "no place"], "--template"), (["--nonsense"], "--nonsense"), (["--iter", "-1"], "--iter"),
    (["--chunk", "2.5"], "--chunk"), (["--model", "no/such/model"], "no model"), (["--data", "no/such.jsonl"], "no/such.jsonl"),
    (["--max-length", "65"], "64 positions"), (["--data", str(THETA0)], "no data"), (["--dtype", "int8"], "--dtype"), (["--alpha", "1"], "--alpha"),
])
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_on_disk(flags, word, tmp_path, refused):
    run = tmp_path / "run"
    wants_iter = [] if "--iter" in flags else ["--iter", "0"]
    assert word in refused(lambda: stage("generate", run, *wants_iter, *flags))
    assert not run.exists()


@pytest.fixture()
def data(tmp_path):
    """data(text) -> the --data flag for a JSONL file of that text."""
    def write(text):
        (tmp_path / "set.jsonl").write_text(text)
        return ["--data", str(tmp_path / "set.jsonl")]
    return write


@pytest.mark.parametrize("text, word", [("", "no rows"), ("{}\n", "unknown shape"), ('{"a": 1}\n', "fields a"),
                                        ('{"prompt": "a", "response": ""}\n', "no usable rows"), ("[1]\n", "line 1"),
                                        ('{"prompt": "a", "response": "b"}\n{oops\n', "line 2")])
def test_unusable_data_is_refused_before_a_model_is_loaded(text, word, data, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("parallel.load_model", lambda *a: pytest.fail("the model was loaded"))
    assert word in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0", *data(text)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage_name", ["generate", "train", "evaluate"])
def test_an_iteration_whose_predecessor_is_missing_is_refused(stage_name, played, refused):
    line = refused(lambda: stage(stage_name, played, "--iter", "4"))
    assert "theta_" in line and "train.py --iter" in line


def test_training_before_generating_is_refused(tmp_path, refused):
    assert "generate.py --iter 0" in refused(lambda: stage("train", tmp_path / "run", "--iter", "0"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_recipe_is_refused_with_the_differing_knobs_named(played, refused):
    before = (played / "recipe.json").read_bytes()
    line = refused(lambda: stage("generate", played, "--iter", "2", "--lam", "3", "--seed", "7"))
    assert "lam: [5.0, 4.0] there, [3.0] asked" in line and "seed: 0 there, 7 asked" in line and "lr" not in line.split("(")[1].split(")")[0]
    assert (played / "recipe.json").read_bytes() == before
    stage("generate", played, "--iter", "0", "--micro-tokens", "99", "--dtype", "bf16")  # the machine's knobs may change


def test_a_damaged_or_newer_recipe_is_refused(played, tmp_path, refused):
    saved = json.loads((played / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**saved, "new_knob": 1}))
    assert "new_knob" in refused(lambda: stage("generate", tmp_path, "--iter", "0"))
    (tmp_path / "recipe.json").write_text("{")
    assert "recipe.json" in refused(lambda: stage("generate", tmp_path, "--iter", "0"))


@pytest.mark.parametrize("change, word", [
    (lambda rows: rows[0].update(iter=1), "iteration 1"), (lambda rows: rows.append(rows[0]), "not those of"),
    (lambda rows: rows[0].pop("generated_ids"), "generated_ids"), (lambda rows: rows[3].update(finish="length"), "tokenizer"),
    (lambda rows: rows[0].update(generated_ids=[10**6]), "token ids"), (lambda rows: rows[0].update(generated_ids=[]), "token ids"),
    (lambda rows: rows[0].update(generated_ids="ab"), "token ids"), (lambda rows: rows[0].update(generated_ids=[True, 2]), "token ids"),
    (lambda rows: rows[0].update(real=None), "line 1"), (lambda rows: rows[0].update(id=[1]), "id [1]"),
    (lambda rows: rows.pop(), "not those of"), (lambda rows: rows.clear(), "not those of"),  # cut off, or emptied
    (lambda rows: rows[0].update(prompt="zzz 0"), "not those of"),
])
def test_pairs_that_do_not_belong_to_this_run_are_refused(change, word, played, tmp_path, refused):
    rows = list(read_jsonl(played / "iter0" / "generated.jsonl"))
    change(rows)
    (tmp_path / "iter0").mkdir()
    shutil.copy(played / "prompts.json", tmp_path)
    write_jsonl(tmp_path / "iter0" / "generated.jsonl", rows)
    assert word in refused(lambda: stage("train", tmp_path, "--iter", "0"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["generated.jsonl", "iter0", "prompts.json"]


def test_pairs_of_two_iterations_must_be_of_one_sft_set(played, tmp_path, refused):
    shutil.copytree(played / "iter0", tmp_path / "iter0")
    (tmp_path / "iter1").mkdir()
    rows = list(read_jsonl(played / "iter1" / "generated.jsonl"))
    shutil.copy(played / "prompts.json", tmp_path)
    rows[5]["prompt"] = "Reverse other"
    write_jsonl(tmp_path / "iter1" / "generated.jsonl", rows)
    assert "not those of" in refused(lambda: stage("train", tmp_path, "--iter", "1"))


def test_a_damaged_prompts_json_is_refused(played, tmp_path, refused):
    shutil.copytree(played / "iter0", tmp_path / "iter0")
    shutil.rmtree(tmp_path / "iter0" / "model")
    (tmp_path / "prompts.json").write_bytes(b'{"prom\xff')
    assert "not those of" in refused(lambda: stage("train", tmp_path, "--iter", "0"))


def test_an_sft_set_that_changed_since_the_run_began_is_refused(played, tmp_path, refused, data):
    flags = data("".join(f'{{"prompt": "p {i}", "response": "r"}}\n' for i in range(50)))
    stage("generate", tmp_path / "run", "--iter", "0", *flags)
    shutil.copytree(THETA0, tmp_path / "run" / "iter0" / "model")
    stage("generate", tmp_path / "run", "--iter", "1", *flags)
    shutil.rmtree(tmp_path / "run" / "iter1")
    data("".join(f'{{"prompt": "p {i}", "response": "other"}}\n' for i in range(50)))
    assert "has changed since" in refused(lambda: stage("generate", tmp_path / "run", "--iter", "1", *flags))


def broken_model(tmp_path, change):
    shutil.copytree(THETA0, tmp_path / "model")
    change(tmp_path / "model")
    return ["--model", str(tmp_path / "model")]


@pytest.mark.parametrize("change, word", [
    (lambda m: (m / "config.json").unlink(), "config.json"),
    (lambda m: (m / "model.safetensors").write_bytes(b"x" * 50), "cannot load the model"),
    (lambda m: (m / "model.safetensors").unlink(), "cannot load the model"),
    (lambda m: (m / "config.json").write_text("{"), "cannot load the tokenizer and config"),
    (lambda m: (m / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'), "no EOS"),
])
def test_an_unreadable_model_is_refused(change, word, tmp_path, refused):
    flags = broken_model(tmp_path, change)
    assert word in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0", *flags))
    assert not (tmp_path / "run").exists()


def test_a_pickled_model_is_not_read(tmp_path, refused, monkeypatch):
    def repack(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert "cannot load the model" in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0", *broken_model(tmp_path, repack)))


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path, refused):
    def shrink(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    assert "not a pair" in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0", *broken_model(tmp_path, shrink)))


def test_under_torchrun_only_rank_0_speaks(tmp_path):
    done = torchrun(2, "train.py", *MICRO, "--run", tmp_path / "run", "--iter", "3")
    assert done.returncode != 0 and done.stderr.count("error: theta_3 is missing") == 1
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


def test_a_run_that_is_a_file_and_an_out_that_has_no_directory_are_refused(tmp_path, refused):
    (tmp_path / "run").write_text("")
    assert "is a file" in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0"))
    assert "no directory" in refused(lambda: stage("evaluate", tmp_path / "r", "--model", THETA0, "--out", tmp_path / "no" / "x.json"))


@pytest.mark.parametrize("flags", [["--recipe", "demo"], ["--objective", "sft"], ["--iter", "1"]])
def test_the_loop_refuses_flags_that_it_decides_itself(flags):
    done = shell("bash", "run_iterations.sh", *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and flags[0] in done.stderr


def test_the_shell_gives_exit_code_2_and_one_line():
    done = shell("bash", "run_iterations.sh", "demo", "--lr", "0")
    assert done.returncode == 2 and done.stderr.strip() == "error: --lr must be positive, got 0.0"
    assert recipes.locate("demo/theta0").endswith("demo/theta0")
