"""--track: what a logger holds after a stage, beside the run's files. trackio is the real one, in
forks, since it takes its folder when it is imported; wandb, which needs a server, is a stub."""

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
import types

import pytest
from conftest import MICRO, as_in_a_shell, shell, stage
from test_faults import weights
from test_publish import a_hub
from test_train import fresh

import train
from spin.files import read_json, read_jsonl
from spin.recipe import parse
from spin.report.tracking import follow

TRACK = ("--track", "trackio")
STEPS = 8  # of iteration 0 of the micro recipe


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of trackio's databases."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


def tracked(tmp_path, name, run, *flags, code=0) -> str:
    """A stage with --track trackio in a fork; what it shows on stderr."""
    found, shown = as_in_a_shell(lambda: stage(name, run, *flags, *TRACK), tmp_path / "stderr")
    assert found == code, shown
    return shown


def held(home) -> dict[str, list[tuple]]:
    """{name of a run: its (step, metrics) in order} in trackio's database."""
    found = {}
    with sqlite3.connect(home / "spin.db") as database:
        asked = "select run_name, step, metrics from metrics order by run_name, step, id"
        for name, step, text in database.execute(asked):
            found.setdefault(name, []).append((step, json.loads(text)))
    return found


def numbers(kind: str, t: int, row: dict) -> dict:
    """A row of metrics.jsonl or eval.json as a logger should have it."""
    found = {"iteration": t}
    for name, value in row.items():
        if type(value) in (int, float) and "stderr" not in name:
            found[f"{kind}/{name}"] = value
    return found


def expected(run) -> list[tuple]:
    """What a logger should hold after iteration 0: θ_0's figures, its steps, θ_1's figures. The
    step after figures is that of benchmarks."""
    rows = [(0, numbers("heldout", 0, read_json(run / "eval.json", "")))]
    for step, row in enumerate(read_jsonl(run / "iter0" / "metrics.jsonl")):
        rows.append((2 + step, numbers("train", 0, row)))
    figures = read_json(run / "iter0" / "eval.json", "")
    return [*rows, (len(rows) + 1, numbers("heldout", 1, figures))]


def test_a_logger_holds_the_metrics_and_the_figures_of_an_iteration(played, tmp_path, home):
    run = fresh(played, tmp_path / "mine")
    tracked(tmp_path, "evaluate", run, "--theta0")
    tracked(tmp_path, "train", run, "--iter", 0)
    tracked(tmp_path, "evaluate", run, "--iter", 0)
    ((name, rows),) = held(home).items()
    assert name.startswith("mine-") and rows == expected(run) and len(rows) == STEPS + 2
    assert {"train/loss", "train/margin", "train/win_rate", "train/logratio_real"} < rows[1][
        1
    ].keys()
    assert {"heldout/win_rate", "heldout/nll_per_token"} < rows[-1][1].keys()
    with sqlite3.connect(home / "spin.db") as database:
        ((config,),) = database.execute("select config from configs")
    recipe = read_json(run / "recipe.json", "")
    del recipe["theta_0"]
    assert recipe.items() <= json.loads(config).items() and recipe["track"] == "trackio"
    # it changes no result, and may change within a run
    assert weights(run / "iter0") == weights(played / "iter0")
    stage("evaluate", run, "--iter", 0)


def test_a_killed_run_goes_on_in_the_same_run_and_no_step_is_sent_twice(played, tmp_path, home):
    run = fresh(played, tmp_path / "mine")
    clip, calls = train.clip_gradients, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:  # after five steps, of which a checkpoint has four
            time.sleep(1.5)  # trackio writes twice a second
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clip_gradients", killed)
        tracked(tmp_path, "train", run, "--iter", 0, code=-signal.SIGKILL)
    ((_, before),) = held(home).items()
    assert [step for step, _ in before] == [2, 3, 4, 5, 6]
    tracked(tmp_path, "train", run, "--iter", 0)
    ((_, rows),) = held(home).items()
    assert [step for step, _ in rows] == list(range(2, 2 + STEPS)) and rows[:5] == before
    later = [numbers("train", 0, row) for row in read_jsonl(run / "iter0" / "metrics.jsonl")][5:]
    assert [row for _, row in rows[5:]] == later


def test_what_was_not_sent_before_is_sent_from_the_files(played, tmp_path, home):
    run = shutil.copytree(played, tmp_path / "mine")
    for _ in range(2):  # the second time nothing is lacking
        tracked(tmp_path, "evaluate", run, "--iter", 0)
        ((_, rows),) = held(home).items()
        assert rows == expected(run)
    (run / "iter0" / "benchmarks.json").write_text('{"tasks": {"piqa": {"acc,none": 0.5}}}')
    tracked(tmp_path, "evaluate", run, "--iter", 1)
    ((_, rows),) = held(home).items()
    assert (3 + STEPS, {"iteration": 1, "benchmarks/piqa/acc,none": 0.5}) in rows
    steps = [step for step, _ in rows]
    assert (
        len(set(steps))
        == len(steps)
        == len(expected(run)) + 1 + 1 + sum(1 for _ in read_jsonl(run / "iter1" / "metrics.jsonl"))
    )


def test_sft_is_another_run_and_so_is_a_directory_that_is_begun_again(played, tmp_path, home):
    run = fresh(played, tmp_path / "mine")
    tracked(tmp_path, "train", run, "--iter", 0)
    tracked(tmp_path, "train", run, "--iter", 0, "--objective", "sft")
    first, second = held(home)
    assert second == f"{first}-sft"
    shutil.rmtree(run)
    fresh(played, run)
    tracked(tmp_path, "train", run, "--iter", 0)
    assert [len(rows) for rows in held(home).values()] == [STEPS] * 3


def test_rank_0_alone_sends(played, tmp_path, home, monkeypatch):
    run = shutil.copytree(played, tmp_path / "mine")
    recipe, _ = parse([*MICRO, "--run", str(run), *TRACK])

    def send():
        with follow(recipe, run, 1, trains=False) as send_row:
            send_row({"loss": 0.5})

    for rank, sent in (("1", False), ("0", True)):  # the second is the control
        monkeypatch.setenv("RANK", rank)
        code, shown = as_in_a_shell(send, tmp_path / "stderr")
        assert code == 0 and home.exists() == sent, shown


def test_trackio_asks_no_hub_who_is_logged_in(played, tmp_path):
    shutil.copytree(played, tmp_path / "mine")
    with a_hub() as (address, seen):
        env = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "evaluate.py", *MICRO, "--run", tmp_path / "mine"]
        done = shell(*command, "--iter", "0", *TRACK, env=env)
        assert done.returncode == 0 and seen == [], done.stderr
        shell(sys.executable, "-c", "import trackio; trackio.init('x', 'y')", env=env)
    assert "/api/whoami-v2" in {path for path, _ in seen}  # control


def test_wandb_gets_the_same_calls_and_no_step_again(played, tmp_path, monkeypatch):
    run, calls = shutil.copytree(played, tmp_path / "mine"), []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None)
    wandb.init = lambda **how: calls.append(how) or types.SimpleNamespace(step=4)
    wandb.log = lambda values, step: calls.append((step, values))
    wandb.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe, _ = parse([*MICRO, "--run", str(run), "--track", "wandb"])
    with follow(recipe, run, 1, trains=False):
        pass
    how, *sent, end = calls
    assert how["id"] in how["name"] and how["resume"] == "allow" and how["project"] == "spin"
    assert how["config"] == vars(recipe) and end == "finish"
    assert sent == expected(run)[3:]  # the service holds steps 0 to 3


@pytest.mark.parametrize("script", ["generate", "train", "evaluate"])
def test_a_missing_logger_is_a_line_before_anything_is_computed(
    script, tmp_path, refused, monkeypatch
):
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        line = refused(lambda n=name: stage(script, tmp_path / "run", "--iter", 0, "--track", n))
        assert line.endswith(f"--track {name} needs the package {name}: pip install {name}")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_does_not_begin_is_a_line(played, tmp_path, monkeypatch):
    run = shutil.copytree(played, tmp_path / "mine")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    shown = tracked(tmp_path, "evaluate", run, "--iter", 0, code=2)
    assert shown.splitlines()[-1].startswith("error: --track trackio cannot begin: ValueError: ")
    assert "Traceback" not in shown
