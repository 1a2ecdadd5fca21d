"""spin/compare.py: two models on the same prompts, from what evaluate.py has written."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import THETA0, shell

from spin import compare
from spin.files import write_jsonl
from spin.report import summary
from spin.report.summary import COLUMNS, COMPARED


def rows_of(exact, nll, tokens) -> list[dict]:
    """Rows of by_prompt.jsonl with these values, (N,) each; the greedy answer is right in half."""
    rows = []
    for i, (match, nats, length) in enumerate(zip(exact, nll, tokens, strict=True)):
        row = {**dict.fromkeys(COLUMNS, 0.0), "id": i, "greedy_exact_match": i % 2}
        row |= {"expected_exact_match": float(match), "nll": float(nats), "tokens": float(length)}
        rows.append(row)
    return rows


def two_models(gain=0.05, n=400):
    """n prompts of very different difficulty, and two models; the second is a little better."""
    rng = np.random.default_rng(0)
    hard, tokens = rng.random(n), rng.integers(3, 30, n)
    a, b = (hard + g + 0.02 * rng.standard_normal(n) for g in (0, gain))
    nll_a, nll_b = (tokens * (1 + hard - g) + rng.random(n) for g in (0, gain))
    return rows_of(a, nll_a, tokens), rows_of(b, nll_b, tokens)


def test_two_models_of_a_run_are_compared_without_running_either(played):
    folders = [str(played), str(played / "iter0")]
    script = "import sys; from spin.compare import main\n"
    script += f"main({folders}); print('torch' in sys.modules)"
    done = shell(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    *_, prompts, exact, nll, greedy, torch_loaded = done.stdout.splitlines()
    assert prompts == "12 held-out prompts" and torch_loaded == "False"
    start, end = (json.loads(Path(folder, "eval.json").read_text()) for folder in folders)
    for key, line in zip(COMPARED, (exact, nll, greedy), strict=True):
        gain = end[key] - start[key]
        assert line.split()[0] == key
        assert f"A {start[key]:.4f}   B {end[key]:.4f}   B − A {gain:+.4f} (standard error" in line


def test_the_paired_standard_error_is_the_textbooks_and_the_pairing_makes_it_small():
    a, b = two_models()
    found = summary.compare(a, b[::-1])  # joined by id, in whatever order
    exact = np.array([[row["expected_exact_match"] for row in rows] for rows in (a, b)])
    spread = (exact[1] - exact[0]).std(ddof=1) / math.sqrt(400)
    row = found["expected_exact_match"]
    assert row["difference"] == pytest.approx(np.diff(exact.mean(1))[0])
    assert row["difference"] == pytest.approx(row["B"] - row["A"])
    assert row["error"] == pytest.approx(spread)
    assert found["greedy_exact_match"]["error"] == 0
    # control: without the pairing
    unpaired = math.hypot(*exact.std(1, ddof=1)) / math.sqrt(400)
    assert unpaired > 5 * row["error"]


def test_the_error_of_the_nll_is_the_spread_of_the_ratio_over_resampled_prompts():
    """The delta method against a bootstrap: total nats over total tokens, prompts drawn anew."""
    a, b = two_models()
    values = [np.array([[row["nll"], row["tokens"]] for row in rows]) for rows in (a, b)]
    row = summary.compare(a, b)["nll_per_token"]
    ratios = [table[:, 0].sum() / table[:, 1].sum() for table in values]
    assert [row["A"], row["B"]] == pytest.approx(ratios)
    times = np.random.default_rng(1).multinomial(400, np.full(400, 1 / 400), size=4000)
    draws = [times @ table for table in values]
    spread = np.std([y[:, 0] / y[:, 1] for y in draws][1] - draws[0][:, 0] / draws[0][:, 1])
    assert row["error"] == pytest.approx(spread, rel=0.05)
    # control: the mean of the ratios is another figure, with another error
    naive = [table[:, 0] / table[:, 1] for table in values]
    assert abs(np.std(naive[1] - naive[0]) / 20 - spread) > 0.1 * spread


def test_of_fewer_than_20_prompts_no_standard_error_is_shown_and_no_verdict(tmp_path, capsys):
    for number, few in ((2, True), (19, True), (20, False)):
        better = rows_of([0.9] * number, [1.0] * number, [3] * number)
        worse = rows_of([0.1 + k / 99 for k in range(number)], [2.0] * number, [3] * number)
        folders = [tmp_path / f"{name}{number}" for name in "ab"]
        for folder, rows in zip(folders, (worse, better), strict=True):
            folder.mkdir()
            write_jsonl(folder / "by_prompt.jsonl", rows)
        compare.main([*map(str, folders)])
        line = capsys.readouterr().out.splitlines()[3]
        assert ("(standard error none: too few prompts)" in line) == few
        assert (summary.verdict("expected_exact_match", 1, better, worse) is None) == few


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows[:-1], rows[0]],
        lambda rows: [{**rows[0], "tokens": 99.0}, *rows[1:]],  # another tokenizer
        lambda rows: [{"id": row["id"], "tokens": row["tokens"]} for row in rows],
        lambda rows: [{"answer": "x"}],
        lambda rows: [],
    ],
)
def test_results_on_other_prompts_are_refused_in_one_line(other, tmp_path, refused):
    rows = rows_of([0.5] * 4, [1.0] * 4, [3] * 4)
    sets = {"a": rows, "b": other(rows), "same": rows, "one": rows[:1], "another": rows[:1]}
    for name, content in sets.items():
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "by_prompt.jsonl", content)
    a, b, same, *single = (str(tmp_path / name) for name in sets)
    for folders in ([a, b], [b, a], single):
        assert "same prompts, two or more" in refused(lambda f=folders: compare.main(f))
    compare.main([a, same])  # control


@pytest.mark.parametrize(
    "flags, word",
    [
        ([str(THETA0), str(THETA0)], "holds no by_prompt.jsonl"),
        (["no/such/folder", str(THETA0)], "no/such/folder"),
        ([str(THETA0)], "required: B"),
        ([str(THETA0), str(THETA0), "--recipe", "demo"], "unrecognized arguments: --recipe"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(flags, word, refused):
    assert word in refused(lambda: compare.main(flags))
