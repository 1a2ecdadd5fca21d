"""spin/recipe.py: the paper's numbers, one default per knob, and what is refused before
anything is loaded or written."""

import dataclasses
import shutil

from conftest import THETA0, stage

from spin.files import write_jsonl
from spin.recipe import RECIPES, Recipe, parse


def test_the_default_recipe_is_the_papers():
    recipe, args = parse([])
    assert str(args.run) == "runs/paper" and RECIPES["paper"] == ""
    assert recipe == Recipe(date=recipe.date)  # today, or the day the run began
    iterations = [recipe.at(t) for t in range(4)]
    assert [r.lr for r in iterations] == [5e-7, 5e-7, 1e-7, 1e-7]  # Appendix B.1
    assert [r.lam for r in iterations] == [0.1, 0.1, 0.1, 5.0]
    assert [r.mix for r in iterations] == [1, 2, 2, 2]  # 50k, then 100k: Section 6.1
    assert recipe.num_prompts == 50_000 and recipe.batch_size == 64 and recipe.epochs == 2
    assert recipe.warmup == 0.1 and recipe.max_length == 2048
    assert recipe.temperature == 1.0 and recipe.top_p == 1.0
    assert recipe.ell == "logistic" and recipe.iterations == 4
    assert recipe.model == "alignment-handbook/zephyr-7b-sft-full"
    assert recipe.revision.startswith("ac6e600e")


def test_every_knob_has_a_flag_and_a_help_line():
    for f in dataclasses.fields(Recipe):
        assert f.metadata["help"]
        name = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            parse([name])
        else:
            value = (*f.default, "")[0] if isinstance(f.default, tuple) else f.default
            parse([name, str(value)] if f.default != () else [])


def test_a_model_of_ones_own_does_not_take_the_papers_revision():
    assert parse(["--model", "someone/else"])[0].revision == ""


def test_the_machines_knobs_may_change_within_a_run(played):
    """And others may not: test_bad_input.py."""
    before = (played / "recipe.json").read_bytes()
    stage("generate", played, "--iter", "0", "--micro-tokens", "99", "--dtype", "bf16")
    assert (played / "recipe.json").read_bytes() == before


def test_an_sft_set_that_changed_since_the_run_began_is_refused(tmp_path, refused):
    def rows(response):
        return ({"prompt": f"p {i}", "response": response} for i in range(50))

    run, data = tmp_path / "run", tmp_path / "set.jsonl"
    write_jsonl(data, rows("r"))
    stage("generate", run, "--iter", "0", "--data", data)
    shutil.copytree(THETA0, run / "iter0" / "model")
    write_jsonl(data, rows("other"))
    line = refused(lambda: stage("generate", run, "--iter", "1", "--data", data))
    assert "has changed since" in line
