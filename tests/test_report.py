"""The report: what its page and pictures show, its warnings, and texts that stay texts."""

import base64
import collections
import html
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jinja2
import pytest
import torch
from conftest import MICRO, REPO, shell

from loss import ELL
from spin.files import read_jsonl, write_jsonl
from spin.report import page as report
from spin.report.diagnose import warnings_about
from spin.report.pictures import Line, draw_lines
from spin.report.summary import COLUMNS, last_iteration, leading_metric, verdict

SVG = "{http://www.w3.org/2000/svg}"
INLINE = "data:image/svg+xml;base64,"
XLINK = "{http://www.w3.org/1999/xlink}"


def parsed(page: str):
    """How often each tag with its attributes' names occurs in a page, its text, and its images:
    [(alternative text, root element of the SVG)]."""
    tags, texts, images = collections.Counter(), [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags[tag, *(name for name, _ in attrs)] += 1
            source = dict(attrs).get("src") or ""
            if tag == "img" and source.startswith(INLINE):
                svg = ET.fromstring(base64.b64decode(source.removeprefix(INLINE)))
                images.append((dict(attrs)["alt"], svg))

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(page)
    return tags, "".join(texts), images


def dots(svg) -> list:
    """The points of a picture's lines that are drawn as dots."""
    (axes,) = (group for group in svg.iter(f"{SVG}g") if group.get("id") == "axes_1")
    lines = [group for group in axes if group.get("id", "").startswith("line2d")]
    assert lines
    return [dot for line in lines for dot in line.iter(f"{SVG}use")]


def words(svg) -> list[str]:
    """What is written in a picture."""
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def test_the_report_shows_every_iteration_and_loads_nothing_from_elsewhere(played, capsys):
    report.main([*MICRO, "--run", str(played)])
    said = capsys.readouterr().out
    models = report.read_run(played)["models"]
    assert [model["n"] for model in models] == [12, 12, 12]
    page = (played / "report.html").read_text()
    for model in models:
        value = f"{model['expected_exact_match']:.3f}"
        assert value in page and re.search(rf"{model['name']} +{value}", said)
    _, _, images = parsed(page)
    assert len(images) == page.count("<img") == 2 + 6  # charts of metrics, and training curves
    assert [len(dots(svg)) for _, svg in images] == [3, 3] + [0] * 6
    assert all(alt.strip() for alt, _ in images) and len({alt for alt, _ in images}) == 8
    assert all("θ₂" in words(svg) for _, svg in images[:2])
    assert all("iter 1" in words(svg) for _, svg in images[2:])
    shown = [
        [row["answer"] for row in read_jsonl(folder / "answers.jsonl")]
        for folder in (played, played / "iter0", played / "iter1")
    ]
    assert [len(rows) for rows in shown] == [6, 6, 6] and shown[0] != shown[2]
    assert page.count('class="answers"') == 6 and page.count("θ<sub>2</sub></b>") == 6
    assert all(html.escape(answer) in page for rows in shown for answer in rows)
    assert "http" not in page and "<script" not in page
    for _, svg in images:
        elements = list(svg.iter())
        assert f"{SVG}script" not in {element.tag for element in elements}
        links = [e.get(name) for e in elements for name in ("href", f"{XLINK}href") if e.get(name)]
        assert links and all(link.startswith("#") for link in links)
        assert not re.search(rb"url\((?!#)|@import", ET.tostring(svg))


def without_curves(run) -> dict:
    """What read_run finds, without the training curves, which take a second to draw."""
    found = report.read_run(run)
    every(found["spin"], metrics=[])
    return found


def healthy(played):
    """A run with nothing to warn of: its recipe, and θ_0 to θ_2 with twenty steps an iteration."""
    figures = json.loads((played / "iter0" / "eval.json").read_text())
    step = {"loss": 0.5, "logratio_real": 1.0, "length_real": 5.0}
    models = []
    for t in range(3):
        steps = [dict(step) for _ in range(20)] if t else []
        models.append({**figures, "mean_length": 5.0, "eos_rate": 1.0, "metrics": steps})
    return {"ell": "logistic"}, models


def every(rows: list[dict], **values):
    """Give all rows these values."""
    for row in rows:
        row.update(values)


HARMS = [
    (lambda models: every(models[2]["metrics"], loss=0.69), "Iteration 1: the loss began at 0.693"),
    (lambda models: every(models[2]["metrics"], loss=0.8), "for any model, and rose to 0.800"),
    (lambda models: every(models[1]["metrics"], logratio_real=-3.0), "less likely, by 3.00 nats"),
    (lambda models: models[2].update(mean_length=8.0), "θ_2: its answers have 8.0 tokens"),
    (lambda models: models[1].update(mean_length=2.0), "θ_1: its answers have 2.0 tokens"),
    (lambda models: models[1].update(limit=2), "θ_1: its benchmarks have at most 2 questions"),
    (lambda models: models[0].update(eos_rate=0.6), "θ_0: 40% of its answers were cut off"),
]


@pytest.mark.parametrize("harm, word", HARMS)
def test_the_report_warns_in_words_of_what_is_known_to_go_wrong(harm, word, played):
    recipe, models = healthy(played)
    assert warnings_about(recipe, models) == []  # control
    harm(models)
    (line,) = warnings_about(recipe, models)
    page = report.page({**without_curves(played), "problems": [line]})
    assert word in line and line in html.unescape(page)


@pytest.mark.parametrize("ell", ELL)
def test_a_loss_that_stays_where_it_began_is_seen_for_every_loss_of_the_table(ell, played):
    start = float(ELL[ell](torch.zeros(())))
    _, models = healthy(played)
    for share, warnings in ((0.9, 0), (1, 2)):
        for model in models:
            every(model["metrics"], loss=share * start)
        assert len(warnings_about({"ell": ell}, models)) == warnings


# ---- which is ahead ------------------------------------------------------------------------------


def by_prompt(exact: float, nll: float, gain=0.0, n: int = 42) -> list[dict]:
    """Rows of by_prompt.jsonl of n prompts, some harder than others; `gain` lowers their NLL."""
    rows = []
    for i in range(n):
        row = {**dict.fromkeys(COLUMNS, 0.0), "id": i, "tokens": 1.0}
        row |= {"expected_exact_match": exact + 0.01 * (i % 7), "nll": nll + 0.1 * (i % 5)}
        rows.append({**row, "nll": row["nll"] - gain * (1 + i % 3)})
    return rows


def test_the_verdict_says_who_is_ahead_and_neither_within_two_standard_errors():
    good, bad = by_prompt(0.8, 1.0), by_prompt(0.6, 1.0)
    said = verdict("expected_exact_match", 1, good, bad)
    assert "At θ_1 SPIN is ahead of continued SFT: expected exact match, 0.8" in said
    assert "a difference of +0.2000 (standard error 0.0000)" in said
    said = verdict("expected_exact_match", 1, bad, good)
    assert "continued SFT is ahead of SPIN" in said and "-0.200" in said
    # the differences of 42 prompts are ±0.1 around a gain: the standard error is 0.0156
    for gain, word in ((0.03, "neither SPIN nor continued SFT is"), (0.033, "SPIN is")):
        mixed = by_prompt(0.6 + gain, 1.0)
        for i, row in enumerate(mixed):
            row["expected_exact_match"] += 0.1 * (-1) ** i
        assert f"At θ_1 {word} ahead" in verdict("expected_exact_match", 1, mixed, bad)
    # the NLL: lower is better
    low, high = by_prompt(0.0, 2.0, gain=0.1), by_prompt(0.0, 2.0)
    said = verdict("nll_per_token", 4, low, high)
    assert "SPIN is ahead of continued SFT: NLL per token" in said and "-0.200" in said
    assert "continued SFT is ahead" in verdict("nll_per_token", 4, high, low)
    # silent about other prompts; about few: test_compare.py
    for spin, sft in ((good, bad[:-1]), ([{"id": 0}] * 20, [{"id": 0}] * 20)):
        assert verdict("expected_exact_match", 1, spin, sft) is None


def test_the_report_says_whether_to_go_on_after_the_last_iteration():
    def said(*levels: float, spread=0.0) -> str | None:
        """Of models with these levels; the last one's prompts differ by ± spread from it."""
        models = []
        for level in levels:
            rows = by_prompt(level, 1.0)
            models.append({"expected_exact_match": level, "by_prompt": rows})
        for i, row in enumerate(rows):
            row["expected_exact_match"] += spread * (-1) ** i
            row["greedy_exact_match"] = i % 2  # half of them; none before
        return last_iteration(models)

    assert said(0.6, 0.8).startswith("θ_1 is ahead of θ_0, the best model before it, so another")
    greedy = "Greedy answers: +0.5000 (standard error 0.0781)."
    assert "expected exact match, 0.830 against 0.630, a difference of +0.2000" in said(0.6, 0.8)
    assert said(0.6, 0.8).endswith(greedy)
    # the standard error is 0.0156, as above
    for gain, word in ((0.033, "ahead"), (0.03, "within"), (-0.03, "within"), (-0.033, "behind")):
        assert said(0.6, 0.6 + gain, spread=0.1).startswith(f"θ_1 is {word}")
    # beside the best model before it: θ_2 gains on θ_1, but not on θ_0
    assert said(0.8, 0.6, 0.7).startswith("θ_2 is behind θ_0, so use θ_0; a lower --lr")
    assert said(0.6, 0.8, 0.8).startswith("θ_2 is within noise of θ_1, the best model before it")
    models = [{"expected_exact_match": 0.6, "by_prompt": by_prompt(0.6, 1, n=n)} for n in (41, 42)]
    assert last_iteration(models) is None


@pytest.mark.parametrize("best, leads", [(0.0099, "nll_per_token"), (0.01, "expected_exact_match")])
def test_a_run_without_a_hundredth_of_exact_matches_is_led_by_the_nll(best, leads, played):
    found = without_curves(played)
    every(found["spin"], expected_exact_match=best)
    assert leading_metric(found["spin"]) == leads
    page = report.page({**found, "leads": leads})
    exact = leads == "expected_exact_match"
    assert ("the expected exact match went from" in page) == exact
    assert ("the negative log-likelihood went from" in page) == (not exact)


def test_the_report_shows_a_baseline_the_verdict_and_benchmarks(played, tmp_path, capsys):
    run = shutil.copytree(played, tmp_path / "run")
    for t in (0, 1):  # a baseline that is as good as the model before
        (run / "sft" / f"iter{t}").mkdir(parents=True)
        for name in ("eval.json", "by_prompt.jsonl", "answers.jsonl"):
            before = run if t == 0 else run / "iter0"
            shutil.copy(before / name, run / "sft" / f"iter{t}")
    for folder in ("iter0", "iter1", "sft/iter1"):  # 12 prompts would be too few
        path = run / folder / "by_prompt.jsonl"
        rows = list(read_jsonl(path))
        write_jsonl(path, [{**row, "id": 99 * k + row["id"]} for k in (0, 1) for row in rows])
    metrics = {"acc_norm,none": 0.4321, "acc_norm_stderr,none": 0.0123}
    written = {"model": "m", "limit": None, "tasks": {"arc_challenge": metrics}}
    (run / "iter1" / "benchmarks.json").write_text(json.dumps(written))
    report.main([*MICRO, "--run", str(run)])
    page = (run / "report.html").read_text()
    said = report.read_run(run)["verdicts"]
    assert len(said) == 2 and said[0].startswith("θ_2 is ahead of θ_1, the best model before it")
    assert said[1].startswith("At θ_2 SPIN is ahead of continued SFT")
    printed = capsys.readouterr().out
    assert all(line in html.unescape(page) and line in printed for line in said)
    for path in run.rglob("eval.json"):  # where the NLL leads, there is no sentence on θ_2 and θ_1
        figures = json.loads(path.read_text())
        figures["expected_exact_match"] /= 1000
        path.write_text(json.dumps(figures))
    (line,) = report.read_run(run)["verdicts"]
    assert "continued SFT: NLL per token" in line
    assert "<td>θ₂ continued SFT</td>" in page
    _, _, images = parsed(page)
    assert len(dots(images[0][1])) == 6 and "continued SFT" in words(images[0][1])
    (row,) = [row for row in page.split("<tr>") if "43.21&nbsp;<small>± 1.23" in row]
    assert "<td>θ₂ SPIN</td>" in row
    assert "63.16" in page and "weighted by subject" in page


def test_a_report_without_training_curves_or_answers_says_so(played):
    found = without_curves(played)
    assert "There is no metrics.jsonl." in report.page(found)
    found["spin"][1]["answers"] = []
    assert "A model of this run has no answers.jsonl." in report.page(found)
    row = {"prompt": "x", "real": "x", "answer": "x", "finish": "length"}
    every(found["spin"], answers=[row])  # control
    assert "x … (cut off)" in report.page(found)


@pytest.mark.parametrize("name", ["iter1/metrics.jsonl", "iter0/answers.jsonl", "iter1/eval.json"])
def test_a_file_that_was_cut_off_is_refused_by_name(name, played, tmp_path, refused):
    run = shutil.copytree(played, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    report.read_run(run)  # control
    (run / name).write_text((run / name).read_text()[:-9])
    assert str(run / name) in refused(lambda: report.main([*MICRO, "--run", str(run)]))


def test_a_run_without_an_evaluation_is_refused(tmp_path, refused):
    assert "holds no eval.json" in refused(lambda: report.main(["--run", str(tmp_path)]))


EVIL = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{x}} {{ 7 * 6 }} {% if x %} {# y #} "
    "{prompt} </table></svg>&lt;b&gt;\u2028"
)


def poisoned(value, key=""):
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    return EVIL if isinstance(value, str) and key not in ("finish", "objective", "ell") else value


def test_a_report_of_texts_full_of_markup_shows_them_as_text(played, tmp_path, monkeypatch):
    """Every text in every file of the run is poisoned, whatever the page shows of them."""
    run, calm = tmp_path / "<script>alert(0)<", tmp_path / "calm"
    for folder in (run, calm):
        shutil.copytree(played, folder, ignore=shutil.ignore_patterns("model"))
    for path in run.rglob("*.json*"):
        if path.suffix == ".jsonl":
            write_jsonl(path, [poisoned(row) for row in read_jsonl(path)])
        else:
            path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    report.main([*MICRO, "--run", str(run)])
    report.main([*MICRO, "--run", str(calm)])
    (tags, text, images), (wanted, _, pictures) = (
        parsed((folder / "report.html").read_text()) for folder in (run, calm)
    )
    # It is there, as text, and added no element and no attribute.
    assert tags == wanted and EVIL in text
    # The pictures are made from numbers alone.
    assert [(alt, words(svg)) for alt, svg in images] == [(alt, words(p)) for alt, p in pictures]
    assert not any(b"alert" in ET.tostring(svg) for _, svg in images)

    def careless(**settings):
        return jinja2.Environment(**{**settings, "autoescape": False})

    monkeypatch.setattr(report, "Environment", careless)  # control
    assert parsed(report.page(without_curves(run)))[0]["script",] >= 8


# ---- pictures ------------------------------------------------------------------------------------


def test_a_picture_shows_its_points_with_their_errors_at_the_right_height():
    """Heights are read from the dots; on a logarithmic axis the ratios are equal, not the steps."""

    def heights(log):
        points = [(0, 1.0, 0.1), (1, 10.0, 1.0), (2, 100.0, 10.0)]
        svg = ET.fromstring(draw_lines("title", [Line("a", points)], "model", "nats", log=log))
        assert svg.find(f"{SVG}title").text == "title"
        assert {"model", "nats", "θ₀", "θ₁", "θ₂"} <= set(words(svg))
        assert len(list(next(g for g in svg.iter() if "LineColl" in g.get("id", "")))) == 3
        return [-float(dot.get("y")) for dot in dots(svg)]

    low, middle, high = heights(log=True)
    assert high - middle == pytest.approx(middle - low) and low < middle
    low, middle, high = heights(log=False)
    assert high - middle == pytest.approx(10 * (middle - low), rel=1e-3) and low < middle


def test_many_iterations_leave_room_for_their_names():
    points = [(t, 0.5, 0.1) for t in range(31)]
    drawn = [draw_lines("title", [Line("a", points)], "model", "value") for _ in range(2)]
    assert drawn[0] == drawn[1]  # no date, no random names: a picture changes only with its lines
    svg = ET.fromstring(drawn[0])
    names = [word for word in words(svg) if "θ" in word]
    assert names[0] == "θ₀" and "θ₁₂" in names and 5 <= len(names) <= 9 and len(dots(svg)) == 31
    keys = [key for *_, keys in report.CURVES for key in keys]
    (_, _, image), *_ = report.curves([[dict.fromkeys(keys, 0.5)] * 40] * 31)
    ((_, svg),) = parsed(f'<img src="{image["src"]}" alt="x">')[2]
    names = [word for word in words(svg) if "iter" in word]
    assert names[0] == "iter 0" and 5 <= len(names) <= 9


@pytest.mark.long
def test_the_ablations_tables_in_results_and_docs_are_those_of_their_figures(tmp_path):
    def tables() -> str:
        command = ("benchmarks/ablations.py", "--redraw", "--out", tmp_path)
        done = shell(sys.executable, *command)
        assert done.returncode == 0 and len([*tmp_path.glob("*.svg")]) == 6, done.stderr
        return done.stdout

    shutil.copy(REPO / "benchmarks" / "ablations.jsonl", tmp_path)
    printed = tables()
    results = (REPO / "benchmarks" / "RESULTS.md").read_text()
    assert all(table in results for table in printed.strip().split("\n\n"))
    # a page of docs/ shows no figure that was not printed
    page = (REPO / "docs" / "ablations.md").read_text()
    shown, known = (set(re.findall(r"0\.\d+ ± 0\.\d+", text)) for text in (page, printed))
    assert len(shown) > 20 and shown <= known
    # control: another figure of SPIN in the demo
    rows = list(read_jsonl(tmp_path / "ablations.jsonl"))
    for row in rows:
        if (row["arm"], row["objective"]) == ("25", "spin"):
            row["figures"][-1] -= 0.1
    write_jsonl(tmp_path / "ablations.jsonl", rows)
    assert tables().strip().split("\n\n")[0] not in results
