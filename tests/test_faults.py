"""Faults while the stages run, and numbers that go wrong: nothing is lost, nothing wrong looks right."""

import collections
import html
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from conftest import MICRO, REPO, THETA0, shell, stage, torchrun
from safetensors.torch import load_file, save_file
from test_train import fresh, metrics, weights

import generate
import train
from spin import distributed, report, sampling
from spin.data import read_jsonl, write_jsonl


def test_ten_random_faults_end_with_the_same_bytes_or_a_named_refusal():
    """The long form, 60 of them with one rank and two, is the script's default."""
    done = shell(
        sys.executable,
        "benchmarks/faults.py",
        "--faults",
        "10",
        "--ranks",
        "1",
        "--seed",
        "1",
        "--workers",
        "2",
    )
    assert done.returncode == 0 and "10 faults, 0 that ended in any other way" in done.stdout, (
        done.stdout + done.stderr
    )


# ---- a machine that is taken away, a disk that is full, a rank that dies ----------------------------------------


def start(run, *command):
    return subprocess.Popen(
        [*map(str, command)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(process, *paths):
    while not all(path.exists() for path in paths) and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None


def test_sigterm_makes_training_checkpoint_after_its_step_and_the_end_is_the_same_bytes(
    played, tmp_path
):
    run = fresh(played, tmp_path)
    command = [
        sys.executable,
        "train.py",
        *MICRO,
        "--checkpoint-every",
        "999",
        "--epochs",
        "8",
        "--run",
        run,
        "--iter",
        "0",
    ]
    process = start(run, *command)
    wait_for(process, run / "iter0" / "metrics.jsonl")
    while not metrics(run / "iter0"):
        time.sleep(0.005)
    begun = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and time.perf_counter() - begun < 30
    (done,) = (
        int(p.name) for p in (run / "iter0" / "checkpoint").iterdir()
    )  # which --checkpoint-every would not have written
    assert done == len(metrics(run / "iter0")) and not (run / "iter0" / "model").exists()
    assert shell(*command).returncode == 0
    calm = fresh(played, tmp_path / "calm")
    stage("train", calm, "--iter", 0, "--checkpoint-every", 999, "--epochs", 8)
    assert weights(run / "iter0") == weights(calm / "iter0")


def test_sigterm_to_torchrun_or_to_the_loop_reaches_the_ranks(played, tmp_path):
    flags = [*MICRO, "--checkpoint-every", "999", "--epochs", "20"]
    ranks = fresh(played, tmp_path / "ranks")
    process = start(
        ranks,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "--",
        "train.py",
        *flags,
        "--run",
        ranks,
        "--iter",
        0,
    )
    wait_for(process, ranks / "iter0" / "metrics.jsonl")
    process.terminate()
    process.communicate(timeout=30)
    loop = fresh(played, tmp_path / "loop")
    for name in ("eval.json", "answers.jsonl"):
        shutil.copy(played / name, loop)
    other = start(loop, "bash", "run_iterations.sh", "demo", "--run", loop, *flags[2:])
    wait_for(other, loop / "iter0" / "metrics.jsonl")
    other.terminate()
    assert other.wait(timeout=30) == 143 and process.returncode == 1  # torchrun's own
    for run in (ranks, loop):
        (done,) = (p.name for p in (run / "iter0" / "checkpoint").iterdir())
        assert int(done) == len(metrics(run / "iter0")) >= 1


@pytest.mark.parametrize("name, size", [("train", 100_000), ("train", 5_000), ("generate", 2_000)])
def test_a_full_disk_is_one_line_and_what_was_half_written_is_not_taken_for_finished(
    name, size, played, tmp_path, capsys, monkeypatch
):
    run = fresh(played, tmp_path) if name == "train" else tmp_path
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            stage(name, run, "--iter", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert (
        stop.value.code == 2
        and len(lines) == 1
        and "make room" in lines[0]
        and "Traceback" not in lines[0]
    )
    stage(name, run, "--iter", 0)
    assert (run / "iter0" / "generated.jsonl").read_bytes() == (
        played / "iter0" / "generated.jsonl"
    ).read_bytes()
    assert name == "generate" or weights(run / "iter0") == weights(played / "iter0")


def test_without_its_logs_a_finished_iteration_is_whole_and_a_damaged_one_is_named_with_what_to_do(
    played, tmp_path, refused
):
    run = tmp_path / "run"
    shutil.copytree(played, run)
    for name in ("metrics.jsonl", "opponent.jsonl", "opponent.json", "generated.json"):
        (run / "iter0" / name).unlink()
    stage("generate", run, "--iter", 2)  # for which nothing of them is wanted
    report.main([*MICRO, "--run", str(run)])
    os.truncate(run / "iter1" / "metrics.jsonl", 900)
    assert "restore or delete it, it is but a log" in refused(
        lambda: stage("generate", run, "--iter", 3)
    )
    (run / "iter1" / "metrics.jsonl").unlink()  # as told
    report.main([*MICRO, "--run", str(run)])


@pytest.mark.parametrize("name", ["report", "evaluate"])
def test_a_full_disk_is_one_line_where_no_ranks_have_met_too(name, played, tmp_path, capsys):
    shutil.copytree(played, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            if name == "report":
                report.main([*MICRO, "--run", str(tmp_path / "run")])
            else:
                stage(
                    "evaluate",
                    tmp_path / "run",
                    "--compare",
                    THETA0,
                    THETA0,
                    "--out",
                    tmp_path / "out.json",
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert stop.value.code == 2 and "make room" in line and not (tmp_path / "out.json").exists()


def test_a_rank_that_dies_takes_the_job_down_within_a_minute_with_its_own_message(played, tmp_path):
    run, script = fresh(played, tmp_path), tmp_path / "dying.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, train
from spin import distributed
clip, calls = distributed.clip_gradients, []
def dying(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1": raise RuntimeError("the memory of this card is gone")
    return clip(*args)
distributed.clip_gradients = dying
train.main()""")
    begun = time.perf_counter()
    done = torchrun(2, script, *MICRO, "--run", run, "--iter", "0")
    assert done.returncode == 1 and "RuntimeError: the memory of this card is gone" in done.stderr
    assert time.perf_counter() - begun < 60 + 30  # the start included
    assert not (run / "iter0" / "model").exists()


@pytest.mark.parametrize(
    "name, word",
    [
        ("note.json", "note.json is damaged"),
        (".metadata", "is damaged"),
        ("__0_0.distcp", "is damaged"),
        ("metrics.jsonl", "it has less than the 12 steps"),
    ],
)
@pytest.mark.parametrize("how", ["cut", "remove"])
def test_a_damaged_checkpoint_is_refused_and_without_it_the_iteration_ends_with_the_same_bytes(
    name, word, how, played, tmp_path, monkeypatch, refused
):
    run = fresh(played, tmp_path, (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage("train", run, "--iter", 1)
    folder = run / "iter1" / "checkpoint"
    path = run / "iter1" / name if name == "metrics.jsonl" else folder / "12" / name
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    line = refused(lambda: stage("train", run, "--iter", 1))
    assert word in line or how == "remove" and "belongs to other pairs" in line
    assert "delete" in line
    shutil.rmtree(folder)
    stage("train", run, "--iter", 1)
    assert weights(run / "iter1") == weights(played / "iter1")


def test_a_checkpoint_whose_recipe_was_lost_is_not_gone_on_with_under_another(
    played, tmp_path, monkeypatch, refused
):
    run = fresh(played, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage("train", run, "--iter", 0)
    (run / "recipe.json").unlink()
    assert "belongs to other pairs" in refused(
        lambda: stage("train", run, "--iter", 0, "--lr", "9e-5")
    )
    stage("train", run, "--iter", 0)
    assert weights(run / "iter0") == weights(played / "iter0")


# ---- numbers that go wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the loss", "the gradient", "a weight"])
def test_nan_in_loss_gradient_or_weights_stops_at_that_step_and_keeps_the_last_good_checkpoint(
    what, played, tmp_path, monkeypatch, capsys
):
    run, guilty = fresh(played, tmp_path), []
    if what == "the loss":
        play = train.play

        def bad(logps, *rest):
            values = play(logps, *rest)
            if len(guilty) == 0 and (run / "iter0" / "checkpoint").exists():
                values["loss"] = values["loss"] * torch.tensor(
                    [math.nan] + [1.0] * (len(values["loss"]) - 1)
                )
                guilty.append(1)
            return values

        monkeypatch.setattr(train, "play", bad)
        score = train.score
        monkeypatch.setattr(
            train,
            "score",
            lambda model, rows, *rest: (
                (guilty or seen.append(rows[0])) and None or score(model, rows, *rest)
            ),
        )
        seen = []
    else:
        clip, calls = distributed.clip_gradients, []

        def bad(model, largest):
            calls.append(1)
            norm = clip(model, largest)
            if len(calls) == 3:
                next(model.parameters()).grad.to_local().view(-1)[0] = (
                    math.inf
                )  # which the optimizer turns into NaN in a weight
            return norm

        if what == "a weight":
            monkeypatch.setattr(distributed, "clip_gradients", bad)
        else:
            real = train.micro_batches

            def poison(batch, *rest):
                calls.append(1)
                yield from real(batch, *rest)
                if (
                    len(calls) == 4 + 3
                ):  # the opponent's four batches came before; after the last backward pass of step 2
                    next(iter(models[0].parameters())).grad.to_local().view(-1)[0] = math.nan

            models, inner = [], train.train
            monkeypatch.setattr(
                train, "train", lambda model, *rest: models.append(model) or inner(model, *rest)
            )
            monkeypatch.setattr(train, "micro_batches", poison)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    line = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)[-1]
    assert stop.value.code == 2 and line.startswith(
        f"error: step 2 of iteration 0: {what} is NaN or infinite, on rank 0; "
    )
    assert (
        f"1 pairs (iter, id): (0, {seen[-1]['id']});"
        if what == "the loss"
        else "12 pairs (iter, id): (0, "
    ) in line
    assert [p.name for p in (run / "iter0" / "checkpoint").iterdir()] == [
        "2"
    ] and "checkpoint is in" in line
    assert len(metrics(run / "iter0")) == 2
    monkeypatch.undo()
    stage("train", run, "--iter", 0)  # the checkpoint is good: from there the same end
    assert weights(run / "iter0") == weights(played / "iter0")


def test_of_two_ranks_the_one_whose_loss_is_nan_is_named_once(played, tmp_path):
    run, script = fresh(played, tmp_path), tmp_path / "nan.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, train
play = train.play
def bad(*args):
    values = play(*args)
    return {{**values, "loss": values["loss"] * float("nan")}} if os.environ["RANK"] == "1" else values
train.play = bad
train.main()""")
    done = torchrun(2, script, *MICRO, "--run", run, "--iter", "0")
    (line,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert (
        "step 0 of iteration 0: the loss is NaN or infinite, on rank 1; " in line
        and "there was no checkpoint yet" in line
    )
    assert 1 <= int(re.search(r"(\d+) pairs", line)[1]) < 12  # those of rank 1


def test_a_rank_that_holds_nothing_of_a_weight_can_tell_too():
    nothing, fine, bad = torch.empty(0, 4), torch.ones(3), torch.tensor([1.0, -math.inf])
    assert (
        not distributed.broken([nothing, None, fine])
        and distributed.broken([nothing, bad])
        and not distributed.broken([nothing])
    )


def test_an_opponent_whose_scores_are_nan_is_refused_and_they_are_not_kept(
    played, tmp_path, monkeypatch, capsys
):
    run, score = fresh(played, tmp_path), train.score_opponent
    monkeypatch.setattr(
        train,
        "score_opponent",
        lambda model, pairs, *rest: score(model, pairs, *rest).index_fill_(
            0, torch.tensor([7]), math.nan
        ),
    )
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    line = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)[-1]
    seventh = list(read_jsonl(run / "iter0" / "generated.jsonl"))[7]["id"]
    assert (
        stop.value.code == 2
        and f"of 1 pairs are NaN or infinite, (iter, id): [(0, {seventh})]" in line
    )
    assert [path.name for path in (run / "iter0").iterdir()] == ["generated.jsonl"]


def test_weights_that_are_nan_are_not_sampled_from(tmp_path, refused, capsys):
    shutil.copytree(THETA0, tmp_path / "model")
    state = load_file(THETA0 / "model.safetensors")
    state["model.norm.weight"][0] = math.inf
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinity" in refused(
        lambda: stage("generate", tmp_path / "run", "--iter", 0, "--model", tmp_path / "model")
    )


@pytest.mark.parametrize("u", [None, torch.tensor([0.5], dtype=torch.float64)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_token(u, bad, refused):
    fine = torch.tensor([[-math.inf, 2.0, 1.0]])  # a token may be impossible
    assert sampling.choose(fine, u).item() == 1
    assert "logits are NaN" in refused(lambda: sampling.choose(torch.tensor([[0.0, bad, 1.0]]), u))


def steps(win_rate, logratios):
    return collections.deque(
        [{"win_rate": win_rate, "logratio_real": x} for x in logratios], maxlen=5
    )


def test_a_policy_that_wins_by_making_everything_less_likely_is_told_of():
    assert "less likely" in train.collapse(steps(1.0, [-1, -2, -3, -4, -5]))
    assert "less likely" in train.collapse(steps(1.0, [2, 1, 0, -1, -1.5]))
    for well in (
        steps(0.99, [-1, -2, -3, -4, -5]),
        steps(1.0, [1, 2, 3, 4, 5]),
        steps(1.0, [9, 8, 7, 6, 5]),
        steps(1.0, [-1, -1.2, -1.3, -1.4, -1.5]),
        steps(1.0, [-1, -2, -3, -4]),
        steps(None, [None] * 5),
    ):
        assert train.collapse(well) is None


def test_a_collapse_is_warned_about_once_in_an_iteration_and_a_run_that_is_well_warns_of_nothing(
    played, tmp_path, capsys, monkeypatch
):
    run = fresh(played, tmp_path)
    capsys.readouterr()
    stage("train", run, "--iter", 0)
    assert "warning" not in capsys.readouterr().err
    shutil.rmtree(run / "iter0" / "model")
    play, steps = train.play, []

    def falling(*args):
        steps.append(1)
        values = play(*args)
        return {
            **values,
            "win_rate": torch.ones_like(values["margin"]),
            "logratio_real": values["margin"] * 0 - len(steps),
        }

    monkeypatch.setattr(train, "play", falling)
    stage("train", run, "--iter", 0)
    err = capsys.readouterr().err
    warnings = re.findall("^warning: .*", err.replace("\r", "\n"), re.MULTILINE)
    assert len(warnings) == 1 and "step 4 of iteration 0: every pair is won" in warnings[0]


@pytest.mark.parametrize(
    "ids, word",
    [
        (lambda eos: ([5, 6, 7], "length"), "cut off"),
        (lambda eos: ([eos], "eos"), "empty"),
        (lambda eos: ([5, eos], "eos"), None),
    ],
)
def test_answers_that_are_all_cut_off_or_all_empty_are_warned_about(
    ids, word, tmp_path, capsys, monkeypatch
):
    one = lambda model, prompts, eos, *rest: [ids(eos) for _ in prompts]  # noqa: E731
    monkeypatch.setitem(generate.ENGINES, "generate", one)
    stage("generate", tmp_path / "run", "--iter", 0)
    warnings = re.findall("^warning: .*", capsys.readouterr().err, re.MULTILINE)
    assert len(warnings) == bool(word) and (not word or word in warnings[0])
    assert (
        generate.collapse(collections.Counter(length=9, eos=1))
        is generate.collapse(collections.Counter(empty=9, eos=1))
        is None
    )


# ---- no code from files ----------------------------------------------------------------------------------------

EVIL = """"'><script>alert(1)</script><img src=x onerror=alert(2)>{{x}} {prompt} </table></svg>&lt;b&gt;\u2028"""


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
        shutil.copytree(played, folder, ignore=shutil.ignore_patterns("model"))
    for path in run.rglob("*.json*"):
        if path.suffix == ".jsonl":
            write_jsonl(path, [poisoned(row) for row in read_jsonl(path)])
        else:
            path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    report.main([*MICRO, "--run", str(run)])
    report.main([*MICRO, "--run", str(calm)])
    (tags, text), (wanted, _) = (
        parsed((folder / "report.html").read_text()) for folder in (run, calm)
    )
    assert (
        tags == wanted and EVIL in text
    )  # it is there, as text, and added no element and no attribute
    assert parsed(f"<td>{html.escape(EVIL)}</td>")[0] != parsed(f"<td>{EVIL}</td>")[0]


def parsed(page: str):
    """How often each tag with its attributes' names occurs in a page, and its text."""
    tags, texts = collections.Counter(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags[tag, *(name for name, _ in attrs)] += 1

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(page)
    return tags, "".join(texts)
