"""Faults while the stages run, and numbers that go wrong: nothing is lost, nothing wrong looks
right."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import MICRO, REPO, on_ranks, shell, stage, start_two_nodes
from test_train import fresh, metrics, weights

import generate
import train
from spin.files import read_jsonl
from spin.model.weights import has_nonfinite
from spin.report import diagnose
from spin.run.folders import record
from spin.sampling.slots import pick_token


def error_lines(err: str) -> list[str]:
    return re.findall("^error: .*", err, re.MULTILINE)


@pytest.mark.long
def test_seven_random_faults_end_with_the_same_bytes_or_a_named_refusal():
    """The long form, 60 of them with one rank and two, is the script's default."""
    flags = ["--faults", "7", "--ranks", "1", "--seed", "1", "--workers", "2"]
    done = shell(sys.executable, "benchmarks/faults.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 faults, 0 that ended in any other way" in done.stdout


def train_up_to_the_export(run, t, monkeypatch, *flags):
    """Train iteration t and end as if by Ctrl-C, before the model is written."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stage("train", run, "--iter", t, *flags)


def interrupt(*args, **keywords):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def up_to_the_export(played, tmp_path_factory):
    """A run whose iteration 1 has its last checkpoint and no model, for reading only."""
    run = fresh(played, tmp_path_factory.mktemp("runs") / "stopped", (0, 1))
    train_up_to_the_export(run, 1, pytest.MonkeyPatch())
    return run


@pytest.fixture()
def stopped(up_to_the_export, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(up_to_the_export, tmp_path / "run")


# ---- kills ---------------------------------------------------------------------------------------


def test_a_kill_between_scores_and_their_record_does_not_mix_them_up(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path, (0, 1))
    record(run / "iter1", pairs="others")  # opponent.jsonl belongs to other pairs
    shutil.copy(played / "iter0" / "opponent.jsonl", run / "iter1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "record", interrupt)
        stage("train", run, "--iter", 1)
    # the new scores are there, but no record says whose they are
    assert json.loads((run / "iter1" / "made_from.json").read_text())["pairs"] is None
    stage("train", run, "--iter", 1)
    assert weights(run / "iter1") == weights(played / "iter1")


def test_no_rank_answers_before_the_recipe_is_written(tmp_path, monkeypatch):
    save_recipe = generate.save_recipe

    def slow(recipe, run):
        time.sleep(1)
        assert not list(run.glob("iter0/generated.part/*.jsonl"))
        save_recipe(recipe, run)

    monkeypatch.setattr(generate, "save_recipe", slow)
    code, err = on_ranks(2, lambda: stage("generate", tmp_path / "run", "--iter", 0), tmp_path)
    assert code == 0, err


def test_the_rest_of_a_checkpoint_is_gone_before_any_rank_looks(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    part = run / "iter0" / "checkpoint" / "2.part"
    part.mkdir(parents=True)
    (part / ".metadata").touch()
    rmtree = shutil.rmtree

    def slow(path, **keywords):
        time.sleep(1 if path.name == "2.part" else 0)
        rmtree(path, **keywords)

    monkeypatch.setattr(shutil, "rmtree", slow)
    code, err = on_ranks(2, lambda: stage("train", run, "--iter", 0), tmp_path)
    assert code == 0 and "existing checkpoint" not in err, err


# ---- a machine that is taken away, a disk that is full, a rank that dies -------------------------


def test_sigterm_makes_a_checkpoint_and_the_end_is_the_same_bytes(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path)
    clip = train.clip_gradients
    calls = []

    def taken_away(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "clip_gradients", taken_away)
        # --checkpoint-every would write none
        stage("train", run, "--iter", 0, "--checkpoint-every", "999")
    assert stop.value.code == 143 and len(metrics(run / "iter0")) == 3
    assert [path.name for path in (run / "iter0" / "checkpoint").iterdir()] == ["3"]
    assert not (run / "iter0" / "model").exists()
    stage("train", run, "--iter", 0)
    assert weights(run / "iter0") == weights(played / "iter0")


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
def test_a_full_disk_is_one_line_and_nothing_half_counts(name, size, played, tmp_path, capsys):
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


@pytest.mark.parametrize("name", ["by_prompt.jsonl", "answers.jsonl", "eval.json"])
def test_figures_that_were_lost_are_made_again(name, played, tmp_path, capsys):
    run = shutil.copytree(played, tmp_path / "run")
    kept = {path: path.read_bytes() for path in (run / "iter0").glob("*.*")}
    (run / "iter0" / name).unlink()
    stage("evaluate", run, "--iter", 0)
    assert "nothing to do" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (run / "iter0").glob("*.*")} == kept
    stage("evaluate", run, "--iter", 0)
    assert "nothing to do" in capsys.readouterr().out


def two_nodes(program, run):
    """Iteration 0 on two nodes of one rank each: their exit codes, and what they say on stderr."""
    nodes = start_two_nodes(program, 1, *MICRO, "--run", run, "--iter", 0)
    errors = [node.communicate(timeout=280)[1] for node in nodes]
    return [node.returncode for node in nodes], errors


@pytest.fixture(scope="module")
def calm_nodes(played, tmp_path_factory):
    """Iteration 0 as two nodes train it that nobody disturbs; for reading only."""
    run = fresh(played, tmp_path_factory.mktemp("nodes") / "run")
    assert two_nodes("train.py", run)[0] == [0, 0]
    return run / "iter0"


@pytest.mark.long
@pytest.mark.parametrize("moment, lost", [("dcp.FileSystemWriter.write_data", 1), ("dcp.save", 0)])
def test_a_node_lost_amid_a_checkpoint_leaves_one(moment, lost, calm_nodes, played, tmp_path):
    run = fresh(played, tmp_path / "run")
    program = tmp_path / "lost.py"
    program.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, signal, torch, train
from spin.model import checkpoint
real, calls = checkpoint.{moment}, []
def dies(*args, **keywords):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "{lost}":  # of the second checkpoint
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **keywords)
checkpoint.{moment} = dies
train.main()""")
    codes, errors = two_nodes(program, run)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] not in (0, -signal.SIGKILL), errors
    checkpoints = run / "iter0" / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4.part"]
    before = metrics(checkpoints / "2")
    assert two_nodes("train.py", run)[0] == [0, 0]
    assert weights(run / "iter0") == weights(calm_nodes)
    after = metrics(run / "iter0")
    assert [row["step"] for row in after] == [row["step"] for row in metrics(calm_nodes)]
    assert len(before) == 2 and after[:2] == before  # speeds included: these were not taken again


@pytest.mark.parametrize(
    "name, how",
    [
        ("made_from.json", "cut"),
        ("made_from.json", "remove"),
        (".metadata", "remove"),
        ("__0_0.distcp", "cut"),
        ("metrics.jsonl", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_refused(name, how, stopped, refused):
    folder = stopped / "iter1" / "checkpoint"
    path = folder / "12" / name
    if how == "remove":
        path.unlink()
    elif name == "metrics.jsonl":  # at a line's end
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    else:
        os.truncate(path, path.stat().st_size // 2)
    line = refused(lambda: stage("train", stopped, "--iter", 1))
    assert "delete" in line and str(folder) in line


@pytest.mark.parametrize("left", ["nothing", "the rest of an older one"])
def test_without_its_checkpoint_or_beside_an_older_one_the_end_is_the_same(left, stopped, played):
    folder = stopped / "iter1" / "checkpoint"
    if left == "nothing":
        shutil.rmtree(folder)
    else:
        shutil.copytree(folder / "12", folder / "10")
        (folder / "10" / "metrics.jsonl").unlink()  # a kill came while it was deleted
    stage("train", stopped, "--iter", 1)
    assert weights(stopped / "iter1") == weights(played / "iter1")


def test_a_checkpoint_without_a_recipe_is_not_used_under_another(stopped, played, refused):
    (stopped / "recipe.json").unlink()
    line = refused(lambda: stage("train", stopped, "--iter", 1, "--lr", "9e-5"))
    assert "belongs to other pairs" in line
    stage("train", stopped, "--iter", 1)
    assert weights(stopped / "iter1") == weights(played / "iter1")


# ---- numbers that go wrong -----------------------------------------------------------------------


def spoil(what, run, monkeypatch):
    """Something goes wrong in step 2, the first after the checkpoint. Returns a list whose only
    element will be the pair whose loss it was."""
    spin_loss, packed_pairs, clip = train.spin_loss, train.packed_pairs, train.clip_gradients
    last, guilty, steps = [], [], []

    def watched(rows, *rest):
        last[:] = rows
        return packed_pairs(rows, *rest)

    def bad_loss(*args):
        losses = spin_loss(*args)
        if what == "the loss" and not guilty and len(steps) == 2:
            guilty.append(last[0])
            losses = losses * torch.tensor([math.nan] + [1.0] * (len(losses) - 1))
        return losses

    def bad_gradient(model, largest):
        steps.append(1)
        gradient = next(model.parameters()).grad.to_local().view(-1)
        if what == "the gradient" and len(steps) == 3:
            gradient[0] = math.nan
        norm = clip(model, largest)
        if what == "a weight" and len(steps) == 3:
            gradient[0] = math.inf  # which the optimizer turns into NaN in a weight
        return norm

    monkeypatch.setattr(train, "packed_pairs", watched)
    monkeypatch.setattr(train, "spin_loss", bad_loss)
    monkeypatch.setattr(train, "clip_gradients", bad_gradient)
    return guilty


@pytest.mark.parametrize("what", ["the loss", "the gradient", "a weight"])
def test_nan_stops_its_step_and_keeps_the_checkpoint(what, played, tmp_path, monkeypatch, capsys):
    run = fresh(played, tmp_path)
    guilty = spoil(what, run, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    line = error_lines(capsys.readouterr().err)[-1]
    begins = f"error: step 2 of iteration 0: {what} is NaN or infinite, on rank 0; "
    assert stop.value.code == 2 and line.startswith(begins)
    if what == "the loss":
        assert f"1 pairs (iter, id): [(0, {guilty[0]['id']})];" in line
    assert [path.name for path in (run / "iter0" / "checkpoint").iterdir()] == ["2"]
    assert f"checkpoint: {run / 'iter0' / 'checkpoint' / '2'});" in line
    assert len(metrics(run / "iter0")) == 2
    monkeypatch.undo()
    stage("train", run, "--iter", 0)  # the checkpoint is good: from there the same end
    assert weights(run / "iter0") == weights(played / "iter0")


def test_of_two_ranks_the_one_whose_loss_is_nan_is_named_once(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    spin_loss = train.spin_loss

    def bad(*args):
        losses = spin_loss(*args)
        return losses * math.nan if os.environ["RANK"] == "1" else losses

    monkeypatch.setattr(train, "spin_loss", bad)
    _, err = on_ranks(2, lambda: stage("train", run, "--iter", 0), tmp_path)
    (line,) = error_lines(err)
    assert "step 0 of iteration 0: the loss is NaN or infinite, on rank 1; " in line
    assert "checkpoint: none yet" in line
    assert 1 <= int(re.search(r"(\d+) pairs", line)[1]) < 12  # those of rank 1


def test_a_rank_that_holds_nothing_of_a_weight_can_tell_too():
    nothing = torch.empty(0, 4)
    fine = torch.ones(3)
    bad = torch.tensor([1.0, -math.inf])
    assert not has_nonfinite([nothing, None, fine])
    assert has_nonfinite([nothing, bad])
    assert not has_nonfinite([nothing])


def test_an_opponent_whose_scores_are_nan_is_refused(played, tmp_path, monkeypatch, capsys):
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
    assert not (run / "iter0" / "opponent.jsonl").exists()


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
        assert "less likely" in diagnose.all_less_likely(steps(1.0, fall))
    assert diagnose.all_less_likely(steps(0.99, [-1, -2, -3, -4, -5])) is None
    assert diagnose.all_less_likely(steps(None, [None] * 5)) is None
    for well in ([9, 8, 7, 6, 5], [-1, -1.2, -1.3, -1.4, -1.5], [-1, -2, -3, -4]):
        assert diagnose.all_less_likely(steps(1.0, well)) is None


def test_a_collapse_and_nothing_else_is_warned_about(played, tmp_path, capsys, monkeypatch):
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


def test_answers_that_are_all_cut_off_or_all_empty_are_warned_about(tmp_path, capsys, monkeypatch):
    def sample(model, prompts, *rest):
        return [([5, 6, 7], "length") for _ in prompts]

    monkeypatch.setattr(generate, "sample", sample)
    stage("generate", tmp_path / "run", "--iter", 0)
    (warning,) = re.findall("^warning: .*", capsys.readouterr().err, re.MULTILINE)
    assert "cut off" in warning
    cut = {"generated": "tin", "finish": "length"}
    empty = {"generated": "", "finish": "eos"}
    well = {"generated": "tin", "finish": "eos"}
    assert diagnose.ended_alike([cut] * 9 + [well]) is None
    assert "empty" in diagnose.ended_alike([empty] * 9)
    assert diagnose.ended_alike([empty] * 9 + [well]) is None
