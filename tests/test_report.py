"""report.py, its page and its pictures: what they show, texts that stay texts, the same bytes."""

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
from conftest import MICRO, REPO, shell

from spin import report
from spin.files import read_jsonl, write_jsonl
from spin.intervals import COLUMNS
from spin.pictures import STYLES, Line, draw_lines
from spin.signs import signs_of_trouble
from spin.verdict import leading_figure, verdict

SVG = "{http://www.w3.org/2000/svg}"
INLINE = "data:image/svg+xml;base64,"
XLINK = "{http://www.w3.org/1999/xlink}"


def parsed(page: str):
    """How often each tag with its attributes' names occurs in a page, its text, and its images.

    images: [(alternative text, root element of the SVG)].
    """
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


def dots(svg) -> int:
    """The points of a picture's lines that are drawn as dots."""
    lines = [group for group in svg.iter(f"{SVG}g") if group.get("id", "").startswith("line-")]
    assert lines
    return sum(len(list(line.iter(f"{SVG}use"))) for line in lines)


def words(svg) -> list[str]:
    """What is written in a picture."""
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def test_the_report_shows_every_iteration_and_loads_nothing_from_elsewhere(played, capsys):
    report.main([*MICRO, "--run", str(played)])
    summary = json.loads((played / "summary.json").read_text())
    assert [f["n"] for f in summary["spin"]] == [12, 12, 12] and summary["sft"] == []
    page = (played / "report.html").read_text()
    tags, _, images = parsed(page)
    assert len(images) == page.count("<img") == 2 + 6  # charts of figures, and training curves
    assert [dots(svg) for _, svg in images] == [3, 3] + [0] * 6
    assert all(alt.strip() for alt, _ in images) and len({alt for alt, _ in images}) == 8
    assert all("θ₂" in words(svg) for _, svg in images[:2])
    assert all("iter 1" in words(svg) for _, svg in images[2:])
    titles = ("Loss", "Margin", "Log-ratios", "Lengths", "Gradient norm", "Speed")
    assert all(f"<b>{title}</b>" in page for title in titles)
    shown = [
        [row["answer"] for row in read_jsonl(folder / "answers.jsonl")]
        for folder in (played, played / "iter0", played / "iter1")
    ]
    assert [len(rows) for rows in shown] == [6, 6, 6] and shown[0] != shown[2]
    assert page.count('class="answers"') == 6 and page.count("θ<sub>2</sub></b>") == 6
    assert all(html.escape(answer) in page for rows in shown for answer in rows)
    assert f"{summary['spin'][2]['expected_exact_match']:.3f}" in page
    assert "http" not in page and "<script" not in page
    for _, svg in images:
        elements = list(svg.iter())
        assert f"{SVG}script" not in {element.tag for element in elements}
        links = [e.get(name) for e in elements for name in ("href", f"{XLINK}href") if e.get(name)]
        assert links and all(link.startswith("#") for link in links)
        assert not re.search(rb"url\((?!#)|@import", ET.tostring(svg))


def outside(played, evil: str) -> dict:
    """A summary whose texts, where they came from outside, are `evil`."""
    results = {"shots": 25, "n": 2, "figures": {"acc_norm,none": [0.5, 0.1]}}
    return {
        "recipe": {"template": f"{evil}{{prompt}}", "eval_temperature": 0.6},
        "spin": [json.loads((played / "eval.json").read_text())] * 2,
        "sft": [],
        "benchmarks": {evil: {"arc_challenge": results}},
    }


def test_the_report_escapes_what_came_from_outside(played, monkeypatch):
    evil = "<script>alert(1)</script>"
    summary = outside(played, evil)
    row = {"prompt": evil, "real": evil, "answer": evil, "finish": "eos"}
    page = report.page(summary, evil, [], [(row, [row, row])], [evil])
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8

    def careless(**settings):
        return jinja2.Environment(**{**settings, "autoescape": False})

    monkeypatch.setattr(report, "Environment", careless)  # control
    page = report.page(summary, evil, [], [(row, [row, row])], [evil])
    assert page.count("<script") >= 8


def healthy(played):
    """A run with nothing to warn of: θ_0, θ_1 and θ_2's figures, and twenty steps an iteration."""
    figures = json.loads((played / "iter0" / "eval.json").read_text())
    spin = [{**figures, "mean_length": 5.0, "eos_rate": 1.0} for _ in range(3)]
    step = {"loss": 0.5, "logratio_real": 1.0, "length_real": 5.0}
    steps = [[dict(step) for _ in range(20)] for _ in range(2)]
    recipe = {"ell": "logistic", "eval_temperature": 0.6}
    return {"recipe": recipe, "spin": spin, "sft": []}, steps


def every(rows: list[dict], **values):
    """Give all rows these values."""
    for row in rows:
        row.update(values)


HARMS = [
    (lambda _, steps: every(steps[1], loss=0.69), "Iteration 1: the loss ended at 0.690"),
    (
        lambda run, steps: (run["recipe"].update(ell="hinge"), every(steps[0], loss=1.01)),
        "Iteration 0: the loss",
    ),
    (lambda _, steps: every(steps[0], logratio_real=-3.0), "less likely, by 3.00 nats"),
    (lambda run, _: run["spin"][2].update(mean_length=8.0), "θ_2: its answers have 8.0 tokens"),
    (lambda run, _: run["spin"][1].update(mean_length=2.0), "θ_1: its answers have 2.0 tokens"),
    (lambda run, _: run["spin"][0].update(eos_rate=0.6), "θ_0: 40% of its answers were cut off"),
]


@pytest.mark.parametrize("harm, word", HARMS)
def test_the_report_warns_in_words_of_what_is_known_to_go_wrong(harm, word, played):
    assert signs_of_trouble(*healthy(played)) == []  # control
    summary, steps = healthy(played)
    harm(summary, steps)
    found = [line for line in signs_of_trouble(summary, steps) if word in line]
    page = report.page(summary, "x", steps, [], signs_of_trouble(summary, steps))
    assert found and found[0] in html.unescape(page)


# ---- which is ahead ------------------------------------------------------------------------------


def by_prompt(exact: float, nll: float, gain=0.0, n: int = 42) -> list[dict]:
    """Rows of by_prompt.jsonl of n prompts, some harder than others; `gain` adds to both."""
    rows = []
    for i in range(n):
        row = {**dict.fromkeys(COLUMNS, 0.0), "id": i, "tokens": 1.0}
        row |= {"expected_exact_match": exact + 0.01 * (i % 7), "nll": nll + 0.1 * (i % 5)}
        rows.append({**row, "nll": row["nll"] - gain * (1 + i % 3)})
    return rows


def run_of(*exact: float) -> dict:
    """A summary of two models each, whose last have these expected exact matches."""
    models = [[{"expected_exact_match": 0.0}, {"expected_exact_match": e}] for e in exact]
    return {"spin": models[0], "sft": models[1], "recipe": {"seed": 0}}


def test_the_verdict_says_who_is_ahead_by_how_much_and_neither_where_the_interval_holds_zero():
    exact = run_of(0.8, 0.6)
    said = verdict(exact, by_prompt(0.8, 1.0), by_prompt(0.6, 1.0))
    assert "At θ_1 SPIN is ahead of continued SFT: expected exact match" in said
    assert "a difference of +0.200 [+0.200, +0.200]" in said
    said = verdict(exact, by_prompt(0.6, 1.0), by_prompt(0.8, 1.0))
    assert "continued SFT is ahead of SPIN" in said and "-0.200" in said
    mixed = by_prompt(0.6, 1.0)
    for i, row in enumerate(mixed):
        row["expected_exact_match"] += 0.1 * (-1) ** i
    assert "neither SPIN nor continued SFT is ahead" in verdict(exact, mixed, by_prompt(0.6, 1.0))
    # the NLL: lower is better
    text = run_of(0.0, 0.001)
    said = verdict(text, by_prompt(0.0, 2.0, gain=0.1), by_prompt(0.0, 2.0))
    assert "SPIN is ahead of continued SFT: NLL per token" in said and "-0.200" in said
    assert "continued SFT is ahead" in verdict(
        text, by_prompt(0.0, 2.0), by_prompt(0.0, 2.0, gain=0.1)
    )
    # other prompts, or none: nothing is said
    assert verdict(exact, by_prompt(0.8, 1.0), by_prompt(0.6, 1.0, n=39)) is None
    assert verdict(exact, [], []) is None
    assert verdict(exact, [{"id": 0}], [{"id": 0}]) is None


@pytest.mark.parametrize("best, leads", [(0.0099, "nll_per_token"), (0.01, "expected_exact_match")])
def test_a_run_without_a_hundredth_of_exact_matches_is_led_by_the_nll_in_words_table_and_picture(
    best, leads, played
):
    assert leading_figure(run_of(0.002, best)) == leading_figure(run_of(best, 0.002)) == leads
    figures = json.loads((played / "eval.json").read_text())
    summary = outside(played, "x")
    summary["spin"] = [{**figures, "expected_exact_match": value} for value in (0.0, best)]
    summary["leads"] = leading_figure(summary)
    page = report.page(summary, "x")
    exact = leads == "expected_exact_match"
    titles = ("Expected exact match", "Negative log-likelihood")
    first, second = (page.index(f"<b>{title}</b>") for title in titles)
    assert (first < second) == exact
    assert ("the expected exact match went from" in page) == exact
    assert ("the negative log-likelihood went from" in page) == (not exact)
    lines = list(report.text_table(summary))
    assert lines[0].startswith("expected exact match" if exact else "NLL per token")
    assert f"{best if exact else figures['nll_per_token']:.3f}" in lines[1]


def test_the_report_of_a_run_with_a_baseline_says_who_is_ahead_and_draws_the_known_share(
    played, tmp_path, capsys
):
    run = shutil.copytree(played, tmp_path / "run")
    for t in (0, 1):  # a baseline that is as good as the model before
        (run / "sft" / f"iter{t}").mkdir(parents=True)
        for name in ("eval.json", "by_prompt.jsonl", "answers.jsonl"):
            before = run if t == 0 else run / "iter0"
            shutil.copy(before / name, run / "sft" / f"iter{t}")
    report.main([*MICRO, "--run", str(run)])
    said = json.loads((run / "summary.json").read_text())["verdict"]
    assert "At θ_2 SPIN is ahead of continued SFT" in said
    page = (run / "report.html").read_text()
    assert said in html.unescape(page) and said in capsys.readouterr().out
    _, _, images = parsed(page)
    assert "right answers in the SFT set" in words(images[0][1])
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.sha256").unlink()
    (run / "recipe.json").write_text(json.dumps({**recipe, "right_share": 0.0}))  # control
    report.main([*MICRO, "--run", str(run)])
    _, _, images = parsed((run / "report.html").read_text())
    assert "right answers in the SFT set" not in words(images[0][1])


def test_the_report_puts_benchmarks_beside_the_papers(played, tmp_path):
    run = shutil.copytree(played, tmp_path / "run")
    figures = {"acc_norm,none": [0.4321, 0.0123]}
    found = {"arc_challenge": {"shots": 25, "n": 12, "figures": figures}}
    written = {"model": "m", "limit": None, "tasks": found}
    (run / "iter1" / "benchmarks.json").write_text(json.dumps(written))
    report.main([*MICRO, "--run", str(run)])
    page = (run / "report.html").read_text()
    assert "43.21&nbsp;<small>± 1.23" in page and "θ_2 SPIN" in page
    assert "63.16" in page and "weighted by subject" in page
    assert json.loads((run / "summary.json").read_text())["benchmarks"] == {"θ_2 SPIN": found}


def test_a_report_without_training_curves_or_answers_says_so(played):
    summary = outside(played, "x")
    page = report.page(summary, "x")
    assert "No metrics.jsonl is there." in page and "No answers.jsonl is there." in page
    row = {"prompt": "x", "real": "x", "answer": "x", "finish": "length"}
    steps = [[{"loss": 0.5}, {"loss": 0.4}]]
    page = report.page(summary, "x", steps, [(row, [row, None])])  # the answer of θ_1 is lost
    assert "is there." not in page and "x … (cut off)" in page  # control
    assert page.count("<img") == 2 + 1 and page.count('class="answers"') == 1


# ---- no code from files --------------------------------------------------------------------------

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


def test_a_report_of_prompts_and_answers_full_of_markup_shows_them_as_text(played, tmp_path):
    """Every text in every file of the run is poisoned, whatever the page shows of them."""
    run, calm = tmp_path / "<script>alert(0)<", tmp_path / "calm"
    for folder in (run, calm):
        shutil.copytree(played, folder, ignore=shutil.ignore_patterns("model", "*.sha256"))
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
    assert [ET.tostring(svg) for _, svg in images] == [ET.tostring(svg) for _, svg in pictures]
    assert [alt for alt, _ in images] == [alt for alt, _ in pictures]
    assert parsed(f"<td>{html.escape(EVIL)}</td>")[0] != parsed(f"<td>{EVIL}</td>")[0]  # control


# ---- pictures ------------------------------------------------------------------------------------

TWO_LINES = [
    Line("SPIN", [(0, 0.5, 0.01), (1, 0.7, 0.01)], *STYLES[0]),
    Line("SFT", [(0, 0.5, 0.01), (1, 0.9, 0.0)], *STYLES[1]),
]


def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    svg = draw_lines("title", TWO_LINES, "model", "value")
    assert svg == draw_lines("title", TWO_LINES, "model", "value")
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.hashsalt: mine\naxes.grid: False\n")
    there = (
        "from spin.pictures import Line, draw_lines\n"
        "import matplotlib; assert matplotlib.rcParams['font.size'] == 20\n"
        f"print(draw_lines('title', {TWO_LINES!r}, 'model', 'value'), end='')"
    )
    env = {"MPLCONFIGDIR": str(tmp_path), "MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7"}
    done = shell(sys.executable, "-c", there, env=env)
    assert done.stdout == svg, done.stderr
    assert draw_lines("title", TWO_LINES[:1], "model", "value") != svg  # control


def test_the_same_run_gives_the_same_page(played, tmp_path):
    pages = []
    for folder in ("first", "second"):
        run = shutil.copytree(played, tmp_path / folder / "run")
        report.main([*MICRO, "--run", str(run)])
        pages.append((run / "report.html").read_bytes())
    assert pages[0] == pages[1]
    rows = list(read_jsonl(run / "iter1" / "metrics.jsonl"))
    write_jsonl(run / "iter1" / "metrics.jsonl", [{**row, "loss": 9.0} for row in rows])
    (run / "iter1" / "metrics.sha256").unlink()
    report.main([*MICRO, "--run", str(run)])
    assert (run / "report.html").read_bytes() != pages[0]  # control


def test_a_picture_shows_its_points_with_their_errors_at_the_right_height():
    """Heights are read from the dots; on a logarithmic axis the ratios are equal, not the steps."""

    def heights(log):
        points = [(0, 1.0, 0.1), (1, 10.0, 1.0), (2, 100.0, 10.0)]
        svg = ET.fromstring(draw_lines("title", [Line("a", points)], "model", "nats", log=log))
        assert [svg.find(f"{SVG}title").text, *words(svg)][0] == "title"
        assert {"model", "nats", "θ₀", "θ₁", "θ₂"} <= set(words(svg)) and dots(svg) == 3
        assert len(list(next(g for g in svg.iter() if "LineColl" in g.get("id", "")))) == 3
        (line,) = (g for g in svg.iter() if g.get("id") == "line-0")
        return [-float(dot.get("y")) for dot in line.iter(f"{SVG}use")]

    low, middle, high = heights(log=True)
    assert high - middle == pytest.approx(middle - low) and low < middle
    low, middle, high = heights(log=False)
    assert high - middle == pytest.approx(10 * (middle - low), rel=1e-3) and low < middle


def test_lines_can_be_told_apart_without_colour():
    assert len({str(dash) for _, dash in STYLES}) == len({colour for colour, _ in STYLES}) == 7
    lines = [Line(f"{i}", [(0, i, 0), (1, i, 0)], *style) for i, style in enumerate(STYLES)]
    svg = ET.fromstring(draw_lines("title", lines, "model", "value"))
    dashes = set()
    for number in range(7):
        (line,) = (g for g in svg.iter() if g.get("id") == f"line-{number}")
        style = next(line.iter(f"{SVG}path")).get("style")
        dashes.add(" ".join(re.findall("stroke-dasharray: ([^;]*)", style)))
    assert len(dashes) == 7


def test_many_iterations_leave_room_for_their_names():
    points = [(t, 0.5, 0.1) for t in range(31)]
    svg = ET.fromstring(draw_lines("title", [Line("a", points)], "model", "value"))
    names = [word for word in words(svg) if "θ" in word]
    assert names[0] == "θ₀" and "θ₁₂" in names and 5 <= len(names) <= 9 and dots(svg) == 31
    steps = [[{"loss": 0.5}] * 4] * 31
    ((_, svg),) = parsed(f'<img src="{report.curves(steps)["loss"]["src"]}" alt="x">')[2]
    names = [word for word in words(svg) if "iter" in word]
    assert names[0] == "iter 0" and 5 <= len(names) <= 9


def test_no_stage_loads_matplotlib():
    script = (
        "import sys, generate, train, evaluate\n"
        "print('matplotlib' in sys.modules, 'spin.pictures' in sys.modules)\n"
        "from spin import report\n"
        "report.curves([[{'loss': 0.5}] * 2])\n"
        "print('matplotlib' in sys.modules, 'spin.pictures' in sys.modules)"  # control
    )
    done = shell(sys.executable, "-c", script)
    assert done.stdout.splitlines() == ["False False", "True True"], done.stderr


@pytest.mark.long
def test_the_ablations_pictures_and_tables_are_those_of_their_figures(tmp_path):
    shutil.copy(REPO / "benchmarks" / "ablations.jsonl", tmp_path)
    done = shell(sys.executable, "benchmarks/ablations.py", "--redraw", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip().split("\n\n")
    results = (REPO / "benchmarks" / "RESULTS.md").read_text()
    assert len(printed) == 6 and all(table in results for table in printed)
    # a page of docs/ shows no row that was not printed
    page = (REPO / "docs" / "ablations.md").read_text()
    shown = [line for line in page.splitlines() if " ± " in line and line.startswith("|")]
    assert len(shown) > 20 and set(shown) <= set(done.stdout.splitlines())

    def numbers(folder, name):
        text = (folder / f"ablation_{name}.svg").read_text()
        return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]

    names = ("mistakes", "iterations", "saturated", "temperature", "epochs", "size")
    for name in names:
        kept = numbers(REPO / "benchmarks", name)
        assert numbers(tmp_path, name) == pytest.approx(kept, abs=0.01)
    # control: another figure of SPIN in the demo
    rows = list(read_jsonl(tmp_path / "ablations.jsonl"))
    for row in rows:
        if (row["arm"], row["objective"]) == ("25", "spin"):
            row["figures"][-1] -= 0.1
    write_jsonl(tmp_path / "ablations.jsonl", rows)
    other = shell(sys.executable, "benchmarks/ablations.py", "--redraw", "--out", tmp_path)
    assert other.stdout.strip().split("\n\n")[0] not in results
    for name in ("mistakes", "iterations"):
        kept = numbers(REPO / "benchmarks", name)
        assert numbers(tmp_path, name) != pytest.approx(kept, abs=0.01)
