"""spin/compare.py: two models on the same held-out prompts; the interval is the textbook's."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import MICRO, THETA0, torchrun

from spin import compare
from spin.intervals import COLUMNS, COMPARED, paired_bootstrap


def test_two_models_are_compared_prompt_by_prompt(played, tmp_path, capsys):
    theta_1 = str(played / "iter0" / "model")
    for name, models in (("two", (str(THETA0), theta_1)), ("same", (theta_1, theta_1))):
        compare.main([*models, *MICRO, "--out", str(tmp_path / f"{name}.json")])
    two, same = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "same"))
    start, end = (
        json.loads((folder / "eval.json").read_text()) for folder in (played, played / "iter0")
    )
    for key in COMPARED:
        assert two[key]["A"] == pytest.approx(start[key], rel=1e-6)
        assert two[key]["B"] == pytest.approx(end[key], rel=1e-6)
        low, high = two[key]["interval"]
        assert low <= two[key]["B-A"] <= high
        assert two[key]["B-A"] == pytest.approx(end[key] - start[key])
        assert same[key]["interval"] == [0, 0]
    assert two["n"] == 12
    assert two["expected_exact_match"]["interval"][0] > 0  # every prompt gained a little
    assert "95% interval" in capsys.readouterr().out


@pytest.mark.long
def test_two_ranks_compare_as_one_does(played, tmp_path):
    flags = [THETA0, played / "iter0" / "model", *MICRO, "--out"]
    done = torchrun(2, "spin.compare", *flags, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    compare.main([*map(str, flags), str(tmp_path / "one.json")])
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert done.stdout.count("95% interval") == 1  # rank 0 alone speaks
    for key in COMPARED:
        assert two[key]["B-A"] == pytest.approx(one[key]["B-A"], rel=1e-4, abs=1e-6)
        assert two[key]["interval"] == pytest.approx(one[key]["interval"], rel=1e-4, abs=1e-6)


def test_the_paired_interval_is_the_textbooks_and_the_pairing_is_what_makes_it_narrow():
    """400 prompts of very different difficulty; B is a little better on each."""
    rng, n = np.random.default_rng(0), 400
    a, b = np.zeros((2, n, len(COLUMNS)))
    hard, tokens = rng.random(n), rng.integers(3, 30, n)
    names = ("expected_exact_match", "greedy_exact_match", "nll", "tokens")
    exact, greedy, nll, count = map(COLUMNS.index, names)
    for table, gain in ((a, 0.0), (b, 0.05)):
        table[:, exact] = hard + gain + 0.02 * rng.standard_normal(n)
        table[:, greedy] = rng.random(n) < hard
        table[:, nll], table[:, count] = tokens * (1 + hard - gain), tokens
    draws = paired_bootstrap(a, b, seed=0)
    assert draws.shape == (10_000, 3) and (draws == paired_bootstrap(a, b, seed=0)).all()
    assert (draws != paired_bootstrap(a, b, seed=1)).any()
    for k, column in (
        (0, exact),
        (2, greedy),
    ):  # means: the standard error of the mean of the differences
        spread = (b - a)[:, column].std(ddof=1) / math.sqrt(n)
        assert draws[:, k].std() == pytest.approx(spread, rel=0.05)
        assert np.quantile(draws[:, k], (0.025, 0.975)) == pytest.approx(
            (b - a)[:, column].mean() + spread * np.array([-1.96, 1.96]), abs=spread / 5
        )
    # a gain of 0.05 nats on every token
    assert draws[:, 1].mean() == pytest.approx(-0.05) and draws[:, 1].std() < 1e-12
    unpaired = paired_bootstrap(a, b[rng.permutation(n)], seed=0)
    assert unpaired[:, 0].std() > 5 * draws[:, 0].std()  # control


def test_models_with_different_tokenizers_are_not_compared(tmp_path, refused):
    other = shutil.copytree(THETA0, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert "tokenizers" in refused(lambda: compare.main([str(THETA0), str(other), *MICRO]))


@pytest.mark.parametrize(
    "flags, word",
    [
        (["no/such/model", str(THETA0)], "no/such/model"),
        ([str(THETA0), "no/such/model"], "no/such/model"),
        ([str(THETA0)], "required: B"),
        ([str(THETA0), str(THETA0), "--out", "no/such/folder/x.json"], "no directory"),
        ([str(THETA0), str(THETA0), "--lr", "0"], "--lr must be positive"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, word, refused, monkeypatch):
    monkeypatch.setattr("spin.models.load_whole", lambda *a: pytest.fail("the model was loaded"))
    assert word in refused(lambda: compare.main([*flags, *MICRO[:2]]))
