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
    start_two_nodes,
    torchrun,
    torchrun_command,
    user_environment,
)
from safetensors.torch import load_file, save_file
from test_train import fresh, metrics, weights

import evaluate
import generate
import train
from spin import checkpoint, checks, compare, mt_bench, report, signs
from spin.checksums import check_list, check_run_files, is_whole, write_list, write_listed
from spin.files import read_jsonl, write_json
from spin.models import has_nonfinite
from spin.slots import pick_token


def error_lines(err: str) -> list[str]:
    return re.findall("^error: .*", err, re.MULTILINE)


@pytest.mark.long
def test_ten_random_faults_end_with_the_same_bytes_or_a_named_refusal():
    """The long form, 60 of them with one rank and two, is the script's default."""
    flags = ["--faults", "10", "--ranks", "1", "--seed", "1", "--workers", "2"]
    done = shell(sys.executable, "benchmarks/faults.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 faults, 0 that ended in any other way" in done.stdout


# ---- bits that rot -------------------------------------------------------------------------------

CHECKPOINT = "run/iter1/checkpoint/12"
# the kind of file -> where it lies, what stands before the byte whose lowest bit is flipped
# (nothing: the middle of the file), the stage that reads it
ROT = {
    "theta_0's weights": ("theta/model.safetensors", None, "evaluate 0"),
    "theta_0's tokenizer": ("theta/tokenizer.json", rb'"vocab": {\s*"<', "evaluate 0"),
    "weights": ("run/iter0/model/model.safetensors", None, "generate 1"),
    "a tokenizer": ("run/iter0/model/tokenizer.json", rb'"model": {\s*"', "train 1"),
    "a chat template": ("run/iter0/model/chat_template.jinja", rb"m\.role }}", "train 1"),
    "a model's config": ("run/iter0/model/config.json", rb'rms_norm_eps": \d', "train 1"),
    "answers": ("run/iter1/generated.jsonl", rb'"generated_ids": \[\d', "train 1"),
    "the answers before": ("run/iter0/generated.jsonl", rb'"generated_ids": \[\d', "train 1"),
    "the opponent's scores": ("run/iter1/opponent.jsonl", rb"logp_real\S+ -\d\.", "train 1"),
    "a checkpoint's weights": (f"{CHECKPOINT}/__0_0.distcp", None, "train 1"),
    "a checkpoint's index": (f"{CHECKPOINT}/.metadata", None, "train 1"),
    "a checkpoint's metrics": (f"{CHECKPOINT}/metrics.jsonl", rb'"loss": \d\.', "train 1"),
    "a hash of foreign pairs": ("run/iter0/pairs.json", rb'"pairs": ', "train 1"),
    "a recipe": ("run/recipe.json", rb'"chunk": ', "train 1"),
    "prompts": ("run/prompts.json", rb'"prompts": ', "generate 1"),
    "figures": ("run/iter0/eval.json", rb'"margin": \d\.', "report"),
    "figures by prompt": ("run/iter0/by_prompt.jsonl", rb'"nll": \d', "report"),
    "answers to look at": ("run/iter0/answers.jsonl", rb'"real": "', "report"),
    "metrics": ("run/iter0/metrics.jsonl", rb'"loss": \d\.', "report"),
}
# what nothing else would tell
UNSEEN = ["weights", "answers", "the opponent's scores", "a checkpoint's metrics", "figures"]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A folder with a θ_0 that has a chat template, and a run of it that was killed at the end of
    iteration 1; for reading only."""
    folder = tmp_path_factory.mktemp("rot")
    shutil.copytree(THETA0, folder / "theta")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (folder / "theta" / "chat_template.jinja").write_text(template)
    flags = ["--model", folder / "theta"]
    with pytest.MonkeyPatch.context() as patch:
        stage("evaluate", folder / "run", "--theta0", *flags)
        for name in ("generate 0", "train 0", "evaluate 0", "generate 1"):
            call(name, folder / "run", flags)
        train_up_to_the_export(folder / "run", 1, patch, *flags)
    return folder


def call(name, run, flags):
    """A stage and its iteration in one word, or the report."""
    if name == "report":
        return report.main([*MICRO, "--run", str(run), *map(str, flags)])
    name, t = name.split()
    stage(name, run, "--iter", t, *flags)


def flip(path, before=None):
    """Flip the lowest bit of a byte: of the one behind a pattern, or of that in the middle."""
    content = bytearray(path.read_bytes())
    content[re.search(before, content).end() if before else len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ROT)
def test_a_flipped_bit_in_each_kind_of_file_that_is_read_again_is_refused_by_name(
    kind, unfinished, tmp_path, refused
):
    name, before, reader = ROT[kind]
    run = tmp_path / "run"
    shutil.copytree(unfinished / "run", run)
    for made in run.glob("iter1/generated.*") if reader == "generate 1" else ():
        made.unlink()
    path = (unfinished if name.startswith("theta") else tmp_path) / name
    good = path.read_bytes()
    try:
        flip(path, before)
        line = refused(lambda: call(reader, run, ["--model", unfinished / "theta"]))
        assert f"{path} is damaged, changed or new, by the checksums in " in line
        assert "restore what was there, or " in line
        if kind in UNSEEN:  # the control: without checksums it is read
            for listed in run.rglob("*.sha256"):
                listed.unlink()
            if kind == "answers":  # of which a checkpoint knows the hash
                shutil.rmtree(run / "iter1" / "checkpoint")
            call(reader, run, ["--model", unfinished / "theta"])
    finally:
        (unfinished / name).write_bytes(good)  # θ_0's, which is not a copy


@pytest.mark.parametrize("program", ["evaluate", "compare", "mt_bench"])
def test_a_flipped_bit_in_a_model_of_a_run_is_refused_by_whatever_program_takes_it(
    program, played, tmp_path, refused
):
    shutil.copytree(played / "iter0", tmp_path / "iter0")
    model = tmp_path / "iter0" / "model"
    lost = str(tmp_path / "lost.jsonl")
    main, flags = {
        "evaluate": (evaluate.main, ["--model", model, "--eval-data", lost]),
        "compare": (compare.main, [THETA0, model, "--eval-data", lost]),
        "mt_bench": (mt_bench.main, [lost, "--model", model, "--out", tmp_path / "a.jsonl"]),
    }[program]
    flags += MICRO
    flip(model / "model.safetensors")
    line = refused(lambda: main([*map(str, flags)]))
    assert f"{model / 'model.safetensors'} is damaged, changed or new, by the checksums in" in line
    (tmp_path / "iter0" / "model.sha256").unlink()  # as the line says; so it is the control, too
    assert lost in refused(lambda: main([*map(str, flags)]))


@pytest.mark.parametrize("kind", ["answers", "a model", "a checkpoint"])
def test_any_flipped_bit_in_a_list_is_refused_and_so_is_a_list_that_was_cut(kind, tmp_path, capsys):
    folder = tmp_path / "iter0"
    listed = folder / "generated.sha256" if kind == "answers" else tmp_path / "iter0.sha256"
    names = ["config.json", "generated.json", "generated.jsonl"]
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    write_list(listed, folder, names)
    sound = listed.read_bytes()
    look = {
        "answers": lambda: check_run_files(tmp_path),
        "a model": lambda: checks.model_folder(str(folder), listed),
        "a checkpoint": lambda: check_list(folder, listed, "delete it"),
    }[kind]
    look()
    for place in range(8 * len(sound)):
        content = bytearray(sound)
        content[place // 8] ^= 1 << place % 8
        listed.write_bytes(content)
        with contextlib.suppress(SystemExit):
            look()
            pytest.fail(f"bit {place} went unseen")
    for size in range(len(sound)):
        listed.write_bytes(sound[:size])
        with pytest.raises(SystemExit):
            look()
    lines = set(capsys.readouterr().err.splitlines())
    mend = "restore what was there, or delete it: its files are taken as they are"
    assert lines == {
        f"error: {listed} is damaged, changed or new, by the checksums in {listed}: {mend}"
    }
    listed.unlink()  # as told
    look()


@pytest.mark.parametrize("text", [f"{'0' * 64}  config.json\n", "# as released\n", "\n\n"])
def test_a_users_own_list_beside_a_model_is_no_list_of_ours(text, tmp_path, refused):
    folder = tmp_path / "llama"
    shutil.copytree(THETA0, folder)
    (tmp_path / "llama.sha256").write_text(text)
    assert checks.model_folder(str(folder))
    (tmp_path / "pairs.json").touch()  # control
    write_list(tmp_path / "llama.sha256", folder, ["config.json"])
    assert "generation_config.json is damaged, changed or new" in refused(
        lambda: checks.model_folder(str(folder))
    )


def test_a_model_behind_a_link_is_checked_too(played, tmp_path, refused):
    shutil.copytree(played / "iter0", tmp_path / "iter0")
    (tmp_path / "link").symlink_to(tmp_path / "iter0" / "model")
    assert checks.model_folder(str(tmp_path / "link"))
    flip(tmp_path / "iter0" / "model" / "model.safetensors")
    line = refused(lambda: checks.model_folder(str(tmp_path / "link")))
    assert "delete the list, if you changed it yourself" in line


def test_a_listed_file_is_not_written_twice_and_its_list_holds_the_new_one(tmp_path):
    path = tmp_path / "prompts.json"
    write_listed(path, "a")
    before = path.stat().st_ino
    write_listed(path, "a")  # a kill here would lose it
    assert path.stat().st_ino == before and is_whole(path)
    write_listed(path, "b")
    assert path.read_text() == "b" and is_whole(path)
    path.write_text("c")  # control
    assert not is_whole(path)


def test_ruins_of_an_older_checkpoint_and_of_a_users_copy_do_not_stop_a_run(
    played, tmp_path, monkeypatch
):
    run = fresh(played, tmp_path, (0, 1))
    train_up_to_the_export(run, 1, monkeypatch)
    older = run / "iter1" / "checkpoint" / "10"
    shutil.copytree(older.with_name("12"), older)
    (older / "metrics.jsonl").unlink()  # a kill came while it was deleted
    shutil.copytree(run / "iter0", run / "iter0.bak")
    os.truncate(run / "iter0.bak" / "generated.jsonl", 9)
    stage("train", run, "--iter", 1)
    assert weights(run / "iter1") == weights(played / "iter1")


def test_a_kill_between_new_scores_and_what_they_are_made_from_does_not_stop_a_run(
    played, tmp_path, monkeypatch
):
    run = fresh(played, tmp_path, (0, 1))
    for path in (played / "iter1").glob("opponent.*"):
        shutil.copy(path, run / "iter1")
    write_json(run / "iter1" / "opponent.json", {"pairs": "others"}, write=write_listed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_json", lambda *args, **keywords: interrupt())
        stage("train", run, "--iter", 1)
    stage("train", run, "--iter", 1)
    assert weights(run / "iter1") == weights(played / "iter1")


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.long
def test_no_rank_answers_before_the_recipe_is_written(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import time, generate
save_recipe = generate.save_recipe
def slow(recipe, run):
    time.sleep(5)
    assert not list(run.glob("iter0/generated.part/*.jsonl"))
    save_recipe(recipe, run)
generate.save_recipe = slow
generate.main()""")
    done = torchrun(2, str(script), *MICRO, "--run", tmp_path / "run", "--iter", "0")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_what_a_kill_left_of_a_checkpoint_is_gone_before_any_rank_looks(played, tmp_path):
    run = fresh(played, tmp_path / "run")
    part = run / "iter0" / "checkpoint" / "2.part"
    part.mkdir(parents=True)
    (part / ".metadata").touch()
    script = tmp_path / "slow.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import shutil, time, train
rmtree = shutil.rmtree
shutil.rmtree = lambda *args, **keywords: (time.sleep(1), rmtree(*args, **keywords))
train.main()""")
    done = torchrun(2, str(script), *MICRO, "--run", run, "--iter", "0")
    assert done.returncode == 0 and "existing checkpoint" not in done.stderr, done.stderr


# ---- a machine that is taken away, a disk that is full, a rank that dies -------------------------


def start(*command, env=None):
    """Start a command from the repository root, as a user would, and do not wait for it. Its
    process group is its own."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=REPO,
        env={**user_environment(), **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
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
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_to_the_loop_or_to_all_its_processes_makes_the_ranks_checkpoint(
    ranks, to_all, played, tmp_path
):
    run = fresh(played, tmp_path / "run")
    for name in ("eval.json", "answers.jsonl"):
        shutil.copy(played / name, run)
    flags = [*MICRO[2:], "--checkpoint-every", "999", "--epochs", "40"]
    env = {"NPROC_PER_NODE": str(ranks)}
    loop = start("bash", "run_iterations.sh", "demo", "--run", run, *flags, env=env)
    wait_for(loop, run / "iter0" / "metrics.jsonl")
    (os.killpg if to_all else os.kill)(loop.pid, signal.SIGTERM)
    assert loop.wait(timeout=30) == 143
    (done,) = (path.name for path in (run / "iter0" / "checkpoint").iterdir())
    assert int(done) == len(metrics(run / "iter0")) >= 1


@pytest.mark.long
def test_sigterm_to_torchrun_reaches_the_ranks(played, tmp_path):
    flags = [*MICRO, "--checkpoint-every", "999", "--epochs", "20"]
    run = fresh(played, tmp_path / "run")
    process = start(*torchrun_command(2, "train.py", *flags, "--run", run, "--iter", 0))
    wait_for(process, run / "iter0" / "metrics.jsonl")
    process.terminate()
    assert process.wait(timeout=30) == 1  # torchrun's own
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
    for name in ("metrics.jsonl", "opponent.jsonl", "opponent.json", "answers.jsonl"):
        (run / "iter0" / name).unlink()
    (run / "iter0" / "generated.json").unlink()
    stage("generate", run, "--iter", 2)  # for which nothing of them is wanted
    report.main([*MICRO, "--run", str(run)])
    os.truncate(run / "iter1" / "metrics.jsonl", 900)
    line = refused(lambda: stage("generate", run, "--iter", 3))
    assert f"or delete {run / 'iter1' / 'metrics.*'}" in line
    (run / "iter1" / "metrics.jsonl").unlink()  # as told
    report.main([*MICRO, "--run", str(run)])


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


def two_nodes(script, run):
    """Iteration 0 on two nodes of one rank each: their exit codes, and what they say on stderr."""
    nodes = start_two_nodes(script, 1, *MICRO, "--run", run, "--iter", 0)
    errors = [node.communicate(timeout=280)[1] for node in nodes]
    return [node.returncode for node in nodes], errors


@pytest.fixture(scope="module")
def calm_nodes(played, tmp_path_factory):
    """Iteration 0 as two nodes train it that nobody disturbs; for reading only."""
    run = fresh(played, tmp_path_factory.mktemp("nodes") / "run")
    assert two_nodes("train.py", run)[0] == [0, 0]
    return run / "iter0"


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("moment", ["dcp.FileSystemWriter.write_data", "write_list"])
def test_a_node_lost_while_it_writes_a_checkpoint_leaves_the_one_before_for_both(
    moment, lost, calm_nodes, played, tmp_path
):
    run = fresh(played, tmp_path / "run")
    script = tmp_path / "lost.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, signal, torch, train
from spin import checkpoint
real, calls = checkpoint.{moment}, []
def dies(*args, **keywords):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "{lost}":  # of the second checkpoint
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **keywords)
checkpoint.{moment} = dies
train.main()""")
    codes, errors = two_nodes(script, run)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] not in (0, -signal.SIGKILL), errors
    checkpoints = run / "iter0" / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4.part"]
    before = metrics(checkpoints / "2")
    assert two_nodes("train.py", run)[0] == [0, 0]
    assert weights(run / "iter0") == weights(calm_nodes)
    after = metrics(run / "iter0")
    assert [row["step"] for row in after] == [row["step"] for row in metrics(calm_nodes)]
    assert len(before) == 2 and after[:2] == before  # speeds included: these were not taken again


def train_up_to_the_export(run, t, monkeypatch, *flags):
    """Train iteration t and end as if by Ctrl-C, before the model is written."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stage("train", run, "--iter", t, *flags)


@pytest.mark.parametrize("name", ["made_from.json", ".metadata", "__0_0.distcp", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["cut", "remove", "cut, unlisted", "remove, unlisted"])
def test_a_damaged_checkpoint_is_refused_and_without_it_the_iteration_ends_with_the_same_bytes(
    name, how, played, tmp_path, monkeypatch, refused
):
    run = fresh(played, tmp_path, (0, 1))
    train_up_to_the_export(run, 1, monkeypatch)
    folder = run / "iter1" / "checkpoint"
    path = folder / "12" / name
    if how.startswith("cut"):
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    for listed in folder.rglob("*.sha256") if "unlisted" in how else ():
        listed.unlink()
    if name == "metrics.jsonl" and how == "cut, unlisted":
        return  # whole lines may have gone: nothing tells
    line = refused(lambda: stage("train", run, "--iter", 1))
    if "unlisted" not in how:
        found = "damaged, changed or new" if how == "cut" else "missing"
        assert f"{path} is {found}, by the checksums in " in line
    assert "delete" in line or "mend that" in line
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
    packed_pairs = train.packed_pairs
    first = []  # of each micro-batch up to the one that goes wrong
    done = []

    def watched(rows, objective, device):
        if not done:
            first.append(rows[0])
        return packed_pairs(rows, objective, device)

    def bad(*args):
        losses = spin_loss(*args)
        if not done and (run / "iter0" / "checkpoint").exists():
            losses = losses * torch.tensor([math.nan] + [1.0] * (len(losses) - 1))
            done.append(True)
        return losses

    monkeypatch.setattr(train, "packed_pairs", watched)
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
