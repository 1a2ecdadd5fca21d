"""recipe.py: the paper's numbers, one default a knob, and what is refused before anything is loaded or written."""

import dataclasses
import shutil

import pytest
from conftest import THETA0, shell, stage

from spin import recipe as recipes
from spin.recipe import RECIPES, Recipe, at, parse


def test_the_default_recipe_is_the_papers():
    recipe, args = parse([])
    assert str(args.run) == "runs/paper" and recipe == Recipe() and RECIPES["paper"] == {}
    assert [at(recipe.lr, t) for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]  # Appendix B.1
    assert [at(recipe.lam, t) for t in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert [at(recipe.mix, t) for t in range(4)] == [1, 2, 2, 2]  # 50k, then 100k: Section 6.1
    assert (
        recipe.num_prompts,
        recipe.batch_size,
        recipe.epochs,
        recipe.warmup,
        recipe.max_length,
    ) == (50_000, 64, 2, 0.1, 2048)
    assert (recipe.temperature, recipe.top_p, recipe.ell, recipe.iterations) == (
        1.0,
        1.0,
        "logistic",
        4,
    )
    assert recipe.model == "alignment-handbook/zephyr-7b-sft-full" and recipe.revision.startswith(
        "ac6e600e"
    )


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


@pytest.fixture()
def data(tmp_path):
    """data(text) -> the --data flag for a JSONL file of that text."""

    def write(text):
        (tmp_path / "set.jsonl").write_text(text)
        return ["--data", str(tmp_path / "set.jsonl")]

    return write


@pytest.mark.parametrize("stage_name", ["generate", "train", "evaluate"])
def test_an_iteration_whose_predecessor_is_missing_is_refused(stage_name, played, refused):
    line = refused(lambda: stage(stage_name, played, "--iter", "4"))
    assert "theta_" in line and "train.py --iter" in line


def test_a_run_of_another_recipe_is_refused_with_the_differing_knobs_named(played, refused):
    before = (played / "recipe.json").read_bytes()
    line = refused(lambda: stage("generate", played, "--iter", "2", "--lam", "3", "--seed", "7"))
    assert (
        "lam: [5.0, 4.0] there, [3.0] asked" in line
        and "seed: 0 there, 7 asked" in line
        and "lr" not in line.split("(")[1].split(")")[0]
    )
    assert (played / "recipe.json").read_bytes() == before
    stage(
        "generate", played, "--iter", "0", "--micro-tokens", "99", "--dtype", "bf16"
    )  # the machine's knobs may change


def test_an_sft_set_that_changed_since_the_run_began_is_refused(played, tmp_path, refused, data):
    flags = data("".join(f'{{"prompt": "p {i}", "response": "r"}}\n' for i in range(50)))
    stage("generate", tmp_path / "run", "--iter", "0", *flags)
    shutil.copytree(THETA0, tmp_path / "run" / "iter0" / "model")
    stage("generate", tmp_path / "run", "--iter", "1", *flags)
    shutil.rmtree(tmp_path / "run" / "iter1")
    data("".join(f'{{"prompt": "p {i}", "response": "other"}}\n' for i in range(50)))
    assert "has changed since" in refused(
        lambda: stage("generate", tmp_path / "run", "--iter", "1", *flags)
    )


def test_a_run_that_is_a_file_and_an_out_that_has_no_directory_are_refused(tmp_path, refused):
    (tmp_path / "run").write_text("")
    assert "is a file" in refused(lambda: stage("generate", tmp_path / "run", "--iter", "0"))
    assert "no directory" in refused(
        lambda: stage(
            "evaluate", tmp_path / "r", "--model", THETA0, "--out", tmp_path / "no" / "x.json"
        )
    )


@pytest.mark.parametrize("flags", [["--recipe", "demo"], ["--objective", "sft"], ["--iter", "1"]])
def test_the_loop_refuses_flags_that_it_decides_itself(flags):
    done = shell("bash", "run_iterations.sh", *flags)
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and flags[0] in done.stderr
    )


def test_the_shell_gives_exit_code_2_and_one_line():
    done = shell("bash", "run_iterations.sh", "demo", "--lr", "0")
    assert done.returncode == 2 and done.stderr.strip() == "error: --lr must be positive, got 0.0"
    assert recipes.locate("demo/theta0").endswith("demo/theta0")
