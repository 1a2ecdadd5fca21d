"""Faults while the stages run, and numbers that go wrong: nothing is lost, nothing wrong looks
right."""

import contextlib
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    MICRO,
    REPO,
    THETA0,
    shell,
    stage,
    torchrun,
    torchrun_command,
    user_environment,
)
from safetensors.torch import load_file, save_file
from test_train import fresh, metrics, weights

import generate
import train
from spin import checkpoint, compare, report, signs
from spin.files import read_jsonl
from spin.models import has_nonfinite
from spin.slots import pick_token


def error_lines(err: str) -> list[str]:
    return re.findall("^error: .*", err, re.MULTILINE)


def random_faults(number: int) -> str:
    """The last lines of benchmarks/faults.py with so many faults and one rank."""
    flags = ["--faults", number, "--ranks", "1", "--seed", "1", "--workers", "2"]
    done = shell(sys.executable, "benchmarks/faults.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_random_faults_end_with_the_same_bytes_or_a_named_refusal():
    """The short form of the next test."""
    assert "2 faults, 0 that ended in any other way" in random_faults(2)


@pytest.mark.long
def test_ten_random_faults_end_with_the_same_bytes_or_a_named_refusal():
    """The long form, 60 of them with one rank and two, is the script's default."""
    assert "10 faults, 0 that ended in any other way" in random_faults(10)


# ---- a machine that is taken away, a disk that is full, a rank that dies -------------------------


def start(*command):
    """Start a command from the repository root, as a user would, and do not wait for it."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=REPO,
        env=user_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(process, path):
    """Wait until a running command has made a file."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None


def test_sigterm_makes_training_checkpoint_after_its_step_and_the_end_is_the_same_bytes(
    played, tmp_path
):
    run = fresh(played, tmp_path)
    flags = ["--iter", "0", "--checkpoint-every", "999", "--epochs", "8"]
    command = [sys.executable, "train.py", *MICRO, "--run", run, *flags]
    process = start(*command)
    wait_for(process, run / "iter0" / "metrics.jsonl")
    while not metrics(run / "iter0"):
        time.sleep(0.005)
    begun = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and time.perf_counter() - begun < 30
    # --checkpoint-every would not have written this one
    (done,) = (int(path.name) for path in (run / "iter0" / "checkpoint").iterdir())
    assert done == len(metrics(run / "iter0")) and not (run / "iter0" / "model").exists()
    assert shell(*command).returncode == 0
    calm = fresh(played, tmp_path / "calm")
    stage("train", calm, *flags)
    assert weights(run / "iter0") == weights(calm / "iter0")


@pytest.mark.long
def test_sigterm_to_torchrun_or_to_the_loop_reaches_the_ranks(played, tmp_path):
    flags = [*MICRO, "--checkpoint-every", "999", "--epochs", "20"]
    ranks = fresh(played, tmp_path / "ranks")
    process = start(*torchrun_command(2, "train.py", *flags, "--run", ranks, "--iter", 0))
    wait_for(process, ranks / "iter0" / "metrics.jsonl")
    process.terminate()
    process.communicate(timeout=30)
    loop = fresh(played, tmp_path / "loop")
    for name in ("eval.json", "answers.jsonl"):
        shutil.copy(played / name, loop)
    other = start("bash", "run_iterations.sh", "demo", "--run", loop, *flags[2:])
    wait_for(other, loop / "iter0" / "metrics.jsonl")
    other.terminate()
    assert other.wait(timeout=30) == 143 and process.returncode == 1  # torchrun's own
    for run in (ranks, loop):
        (done,) = (path.name for path in (run / "iter0" / "checkpoint").iterdir())
        assert int(done) == len(metrics(run / "iter0")) >= 1


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A full disk: inside, no file of this process can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name, size", [("train", 100_000), ("train", 5_000), ("generate", 2_000)])
def test_a_full_disk_is_one_line_and_what_was_half_written_is_not_taken_for_finished(
    name, size, played, tmp_path, capsys
):
    run = fresh(played, tmp_path) if name == "train" else tmp_path
    capsys.readouterr()
    with files_of_at_most(size), pytest.raises(SystemExit) as stop:
        stage(name, run, "--iter", 0)
    (line,) = error_lines(capsys.readouterr().err)
    assert stop.value.code == 2
    assert "make room" in line and "Traceback" not in line
    stage(name, run, "--iter", 0)
    answers = (run / "iter0" / "generated.jsonl").read_bytes()
    assert answers == (played / "iter0" / "generated.jsonl").read_bytes()
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
    line = refused(lambda: stage("generate", run, "--iter", 3))
    assert "restore or delete it, it is but a log" in line
    (run / "iter1" / "metrics.jsonl").unlink()  # as told
    report.main([*MICRO, "--run", str(run)])


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_full_disk_is_one_line_where_no_ranks_have_met_too(name, played, tmp_path, capsys):
    shutil.copytree(played, tmp_path / "run")
    flags = [*MICRO, "--run", str(tmp_path / "run")]
    out = tmp_path / "out.json"
    capsys.readouterr()
    with files_of_at_most(100), pytest.raises(SystemExit) as stop:
        if name == "report":
            report.main(flags)
        else:
            compare.main([str(THETA0), str(THETA0), *flags, "--out", str(out)])
    (line,) = error_lines(capsys.readouterr().err)
    assert stop.value.code == 2 and "make room" in line and not out.exists()


@pytest.mark.long
def test_a_rank_that_dies_takes_the_job_down_within_a_minute_with_its_own_message(played, tmp_path):
    run = fresh(played, tmp_path)
    script = tmp_path / "dying.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, train
clip, calls = train.clip_gradients, []
def dying(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("the memory of this card is gone")
    return clip(*args)
train.clip_gradients = dying
train.main()""")
    begun = time.perf_counter()
    done = torchrun(2, script, *MICRO, "--run", run, "--iter", "0")
    assert done.returncode == 1 and "RuntimeError: the memory of this card is gone" in done.stderr
    assert time.perf_counter() - begun < 60 + 30  # the start included
    assert not (run / "iter0" / "model").exists()


def train_up_to_the_export(run, t, monkeypatch):
    """Train iteration t and end as if by Ctrl-C, before the model is written."""

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stage("train", run, "--iter", t)


@pytest.mark.parametrize(
    "name, word",
    [
        ("made_from.json", "made_from.json is damaged"),
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
    train_up_to_the_export(run, 1, monkeypatch)
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
    train_up_to_the_export(run, 0, monkeypatch)
    (run / "recipe.json").unlink()
    line = refused(lambda: stage("train", run, "--iter", 0, "--lr", "9e-5"))
    assert "belongs to other pairs" in line
    stage("train", run, "--iter", 0)
    assert weights(run / "iter0") == weights(played / "iter0")


# ---- numbers that go wrong -----------------------------------------------------------------------


def spoil_a_loss(run, monkeypatch):
    """Make the loss of one pair NaN in step 2, the first after the checkpoint. Returns a list whose
    last element will be that pair."""
    spin_loss = train.spin_loss
    sequences = train.sequences
    first = []  # of each micro-batch up to the one that goes wrong
    done = []

    def watched(rows, objective):
        if not done:
            first.append(rows[0])
        return sequences(rows, objective)

    def bad(*args):
        losses = spin_loss(*args)
        if not done and (run / "iter0" / "checkpoint").exists():
            losses = losses * torch.tensor([math.nan] + [1.0] * (len(losses) - 1))
            done.append(True)
        return losses

    monkeypatch.setattr(train, "sequences", watched)
    monkeypatch.setattr(train, "spin_loss", bad)
    return first


def spoil_a_gradient(monkeypatch):
    """Make an element of the gradient NaN after the last backward pass of step 2."""
    steps = train.train
    micro_batches = train.micro_batches
    models = []
    calls = []

    def watched(model, *rest):
        models.append(model)
        return steps(model, *rest)

    def poison(batch, *rest):
        calls.append(1)
        yield from micro_batches(batch, *rest)
        if len(calls) == 4 + 3:  # the opponent's four batches came before
            next(models[0].parameters()).grad.to_local().view(-1)[0] = math.nan

    monkeypatch.setattr(train, "train", watched)
    monkeypatch.setattr(train, "micro_batches", poison)


def spoil_a_weight(monkeypatch):
    """Make an element of the clipped gradient of step 2 infinite, which the optimizer turns into
    NaN in a weight."""
    clip = train.clip_gradients
    calls = []

    def bad(model, largest):
        calls.append(1)
        norm = clip(model, largest)
        if len(calls) == 3:
            next(model.parameters()).grad.to_local().view(-1)[0] = math.inf
        return norm

    monkeypatch.setattr(train, "clip_gradients", bad)


@pytest.mark.parametrize("what", ["the loss", "the gradient", "a weight"])
def test_nan_in_loss_gradient_or_weights_stops_at_that_step_and_keeps_the_last_good_checkpoint(
    what, played, tmp_path, monkeypatch, capsys
):
    run = fresh(played, tmp_path)
    if what == "the loss":
        seen = spoil_a_loss(run, monkeypatch)
    elif what == "the gradient":
        spoil_a_gradient(monkeypatch)
    else:
        spoil_a_weight(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    line = error_lines(capsys.readouterr().err)[-1]
    begins = f"error: step 2 of iteration 0: {what} is NaN or infinite, on rank 0; "
    assert stop.value.code == 2 and line.startswith(begins)
    if what == "the loss":
        assert f"1 pairs (iter, id): (0, {seen[-1]['id']});" in line
    else:
        assert "12 pairs (iter, id): (0, " in line
    assert [path.name for path in (run / "iter0" / "checkpoint").iterdir()] == ["2"]
    assert "checkpoint is in" in line
    assert len(metrics(run / "iter0")) == 2
    monkeypatch.undo()
    stage("train", run, "--iter", 0)  # the checkpoint is good: from there the same end
    assert weights(run / "iter0") == weights(played / "iter0")


def test_of_two_ranks_the_one_whose_loss_is_nan_is_named_once(played, tmp_path):
    run = fresh(played, tmp_path)
    script = tmp_path / "nan.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, train
spin_loss = train.spin_loss
def bad(*args):
    losses = spin_loss(*args)
    return losses * float("nan") if os.environ["RANK"] == "1" else losses
train.spin_loss = bad
train.main()""")
    done = torchrun(2, script, *MICRO, "--run", run, "--iter", "0")
    (line,) = error_lines(done.stderr)
    assert "step 0 of iteration 0: the loss is NaN or infinite, on rank 1; " in line
    assert "there was no checkpoint yet" in line
    assert 1 <= int(re.search(r"(\d+) pairs", line)[1]) < 12  # those of rank 1


def test_a_rank_that_holds_nothing_of_a_weight_can_tell_too():
    nothing = torch.empty(0, 4)
    fine = torch.ones(3)
    bad = torch.tensor([1.0, -math.inf])
    assert not has_nonfinite([nothing, None, fine])
    assert has_nonfinite([nothing, bad])
    assert not has_nonfinite([nothing])


def test_an_opponent_whose_scores_are_nan_is_refused_and_they_are_not_kept(
    played, tmp_path, monkeypatch, capsys
):
    run = fresh(played, tmp_path)
    score_opponent = train.score_opponent

    def bad(*args):
        scores = score_opponent(*args)
        scores[7] = math.nan
        return scores

    monkeypatch.setattr(train, "score_opponent", bad)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    line = error_lines(capsys.readouterr().err)[-1]
    id = list(read_jsonl(run / "iter0" / "generated.jsonl"))[7]["id"]
    assert stop.value.code == 2
    assert f"of 1 pairs are NaN or infinite, (iter, id): [(0, {id})]" in line
    assert [path.name for path in (run / "iter0").iterdir()] == ["generated.jsonl"]


def test_weights_that_are_nan_are_not_sampled_from(tmp_path, refused):
    folder = tmp_path / "model"
    shutil.copytree(THETA0, folder)
    state = load_file(THETA0 / "model.safetensors")
    state["model.norm.weight"][0] = math.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(lambda: stage("generate", tmp_path / "run", "--iter", 0, "--model", folder))
    assert "NaN or infinity" in line


@pytest.mark.parametrize("u", [None, torch.tensor([0.5], dtype=torch.float64)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_token(u, bad, refused):
    fine = torch.tensor([[-math.inf, 2.0, 1.0]])  # a token may be impossible
    assert pick_token(fine, u).item() == 1
    assert "logits are NaN" in refused(lambda: pick_token(torch.tensor([[0.0, bad, 1.0]]), u))


def steps(win_rate, logratios):
    """Rows of metrics.jsonl."""
    return [{"win_rate": win_rate, "logratio_real": x} for x in logratios]


def test_a_policy_that_wins_by_making_everything_less_likely_is_told_of():
    for fall in ([-1, -2, -3, -4, -5], [2, 1, 0, -1, -1.5]):
        assert "less likely" in signs.all_less_likely(steps(1.0, fall))
    for well in (
        steps(0.99, [-1, -2, -3, -4, -5]),
        steps(1.0, [1, 2, 3, 4, 5]),
        steps(1.0, [9, 8, 7, 6, 5]),
        steps(1.0, [-1, -1.2, -1.3, -1.4, -1.5]),
        steps(1.0, [-1, -2, -3, -4]),
        steps(None, [None] * 5),
    ):
        assert signs.all_less_likely(well) is None


def test_a_collapse_is_warned_about_once_in_an_iteration_and_a_run_that_is_well_warns_of_nothing(
    played, tmp_path, capsys, monkeypatch
):
    run = fresh(played, tmp_path)
    capsys.readouterr()
    stage("train", run, "--iter", 0)
    assert "warning" not in capsys.readouterr().err
    shutil.rmtree(run / "iter0" / "model")
    of_step = train.metrics.of_step
    calls = []

    def falling(*args):
        calls.append(1)
        return {**of_step(*args), "win_rate": 1.0, "logratio_real": -len(calls)}

    monkeypatch.setattr(train.metrics, "of_step", falling)
    stage("train", run, "--iter", 0)
    err = capsys.readouterr().err
    (warning,) = re.findall("^warning: .*", err.replace("\r", "\n"), re.MULTILINE)
    assert "step 4 of iteration 0: every pair is won" in warning


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
    def sample(model, prompts, eos, *rest):
        return [ids(eos) for _ in prompts]

    monkeypatch.setattr(generate, "sample", sample)
    stage("generate", tmp_path / "run", "--iter", 0)
    warnings = re.findall("^warning: .*", capsys.readouterr().err, re.MULTILINE)
    assert len(warnings) == bool(word) and (not word or word in warnings[0])
    cut = {"generated": "tin", "finish": "length"}
    empty = {"generated": "", "finish": "eos"}
    well = {"generated": "tin", "finish": "eos"}
    assert signs.ended_alike([cut] * 9 + [well]) is None
    assert signs.ended_alike([empty] * 9 + [well]) is None
