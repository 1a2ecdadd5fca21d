"""run_iterations.sh: the whole loop on one command, on GPUs, on ranks of the CPU, on two nodes; and
one stage at a time in a run."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import MICRO, REPO, THETA0, fork, free_port, on_ranks, shell, stage, user_environment
from test_train import distance, fresh, moved

from spin.run.ranks import run_lock


def loop(run, *flags):
    """The command of the loop on the micro recipe."""
    return ["bash", "run_iterations.sh", "demo", "--run", str(run), *MICRO[2:], *flags]


def with_gpus(folder, number: int, memory: int = 24564) -> dict:
    """An environment whose nvidia-smi lists so many GPUs, with so many MiB each."""
    fake = folder / "nvidia-smi"
    listing = "".join(f"echo 'GPU {i}: NVIDIA GeForce RTX 4090'\n" for i in range(number))
    memories = f"echo {memory}\n" * number or "exit 9\n"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n{listing}exit; fi\n{memories}')
    fake.chmod(0o755)
    seen = ",".join(map(str, range(number)))
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": seen}


def times_of_change(run) -> dict:
    """When each file of a run was written; the report, which is made each time, is left out."""
    files = [path for path in run.rglob("*") if path.is_file()]
    made_each_time = ("report.html", "summary.json")
    return {p: p.stat().st_mtime_ns for p in files if p.name not in made_each_time}


def test_the_whole_loop_on_one_command_and_again_does_nothing(tmp_path):
    command = loop(tmp_path / "run", "--iterations", "1")
    done = shell(*command)
    assert done.returncode == 0, done.stderr
    for name in ("eval.json", "iter0/eval.json", "report.html"):  # θ_0, θ_1
        assert (tmp_path / "run" / name).exists()
    assert "generate 0" in done.stderr and "spin 0" in done.stderr  # progress bars
    before = times_of_change(tmp_path / "run")
    # by another shell, to a terminal of 127 characters
    odd = {"PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1"}
    again = shell("sh", *command[1:], env=odd)
    assert "SPIN" in again.stdout and again.stdout.isascii()  # of the report: θ₁ SPIN
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert times_of_change(tmp_path / "run") == before


# ---- one stage at a time writes into a run -------------------------------------------------------


def start(run, **environment) -> subprocess.Popen:
    """The loop of one iteration, as somebody starts it; what it says is kept."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**user_environment(), **environment}
    return subprocess.Popen(loop(run, "--iterations", "1"), cwd=REPO, env=env, **pipes)


def same_iteration(run, other) -> bool:
    names = ("generated.jsonl", "opponent.jsonl", "model/model.safetensors")
    files = [(folder / "iter0" / name for name in names) for folder in (run, other)]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def wait_for(path):
    begun = time.monotonic()
    while not path.exists() or not path.read_text():
        assert time.monotonic() - begun < 100
        time.sleep(0.005)


@pytest.fixture()
def held(tmp_path):
    """A run that another process writes into."""

    def hold():
        with run_lock(tmp_path / "run"):
            time.sleep(100)

    pid = fork(hold, tmp_path / "shown")
    wait_for(tmp_path / "run" / "lock")
    yield tmp_path / "run"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.long
def test_of_two_loops_in_one_run_one_ends_with_a_line_and_the_other_as_if_alone(played, tmp_path):
    run = tmp_path / "run"
    both = [start(run) for _ in range(2)]
    said = [process.communicate(timeout=280)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    last = said[codes.index(2)].splitlines()[-1]
    assert last.startswith(f"error: {run} is in use by process ") and "error: " not in last[1:]
    assert same_iteration(run, played)


@pytest.mark.long
def test_a_stage_killed_amid_training_leaves_a_lock_that_blocks_nobody(played, tmp_path, refused):
    run = fresh(played, tmp_path / "run")
    process = start(run)
    wait_for(run / "iter0" / "metrics.jsonl")
    pid = int((run / "lock").read_text().split()[1])
    os.kill(pid, signal.SIGSTOP)
    assert not (run / "iter0" / "model").exists()
    line = refused(lambda: stage("train", run, "--iter", 0))
    assert f"{run} is in use by process {pid} on {socket.gethostname()}: wait" in line
    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=60) == 137 and (run / "lock").exists()
    done = shell(*loop(run, "--iterations", "1"))
    assert done.returncode == 0, done.stderr
    assert same_iteration(run, played) and not (run / "lock").exists()


def test_where_rank_0_is_refused_all_ranks_end_and_nothing_is_written(held, tmp_path):
    code, err = on_ranks(2, lambda: stage("generate", held, "--iter", 0), tmp_path)
    assert code == 2 and err.count("\n") == 1 and "is in use by process" in err
    assert os.listdir(held) == ["lock"]
    stage("generate", tmp_path / "another", "--iter", 0)  # the control


def test_a_model_of_no_run_is_evaluated_without_a_lock(held, tmp_path, refused):
    stage("evaluate", held, "--model", THETA0, "--out", tmp_path / "result.json")
    for flags in (["--theta0"], ["--theta0", "--tasks", "paper"]):
        assert "is in use" in refused(lambda f=flags: stage("evaluate", held, *f))


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path / "run"):
        pass
    assert "cannot be locked (No locks available): start nothing else" in capsys.readouterr().err


# In the place of Python: the plan of a run, and stages that note each SIGTERM.
STUB = """#!{python}
import os, signal, sys, time
if "spin.checks" in sys.argv:
    print({run!r}, 1, 0, sep="\\t")
else:
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.time()))
    open({run!r} + "/begun", "w").close()
    while not told or time.time() < told[0] + 1:
        time.sleep(0.01)
    open({run!r} + "/told", "w").write(str(len(told)))
"""


@pytest.mark.parametrize(
    "sent, send",
    [(signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGINT, os.killpg)],
)
def test_a_signal_to_the_loop_or_to_all_of_it_reaches_a_stage_once(sent, send, tmp_path):
    """torchrun, told twice, leaves at once, without its ranks. Ctrl-C goes to all."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, run=str(tmp_path)))
    stub.chmod(0o755)
    process = subprocess.Popen(
        loop(tmp_path),
        cwd=REPO,
        env={**user_environment(), "PYTHON": str(stub)},
        start_new_session=True,
        # under nohup, or behind an &, the tests themselves were started with it ignored
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    send(process.pid, sent)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "told").read_text() == "1"


# In the place of Python: the plan of a run, with two GPUs for each vLLM; others note how they run.
NOTES = """#!{python}
import sys
if "spin.checks" in sys.argv:
    print({run!r}, 1, 0, 2, sep="\\t")
else:
    print({name!r}, *sys.argv[1:], file=open({run!r} + "/noted", "a"))
"""


def test_stage_1_has_its_own_python_and_a_rank_for_the_gpus_of_each_vllm(tmp_path):
    pythons = {}
    for name in ("PYTHON", "GENERATE_PYTHON"):
        stub = pythons[name] = tmp_path / name
        stub.write_text(NOTES.format(python=sys.executable, run=str(tmp_path), name=name))
        stub.chmod(0o755)
    for gpus, ranks in ((4, 2), (1, 1)):  # of one GPU generate.py says that it is too few
        env = {**pythons, **with_gpus(tmp_path, gpus)}
        assert shell(*loop(tmp_path), env=env).returncode == 0
        noted = (tmp_path / "noted").read_text().splitlines()
        (tmp_path / "noted").unlink()
        expected = [
            ("PYTHON", gpus, "evaluate.py"),
            ("GENERATE_PYTHON", ranks, "generate.py"),
            ("PYTHON", gpus, "train.py"),
            ("PYTHON", gpus, "evaluate.py"),
        ]
        for line, (name, number, script) in zip(noted, expected, strict=False):
            assert line.startswith(f"{name} -m torch.distributed.run --standalone ")
            assert f"--nproc_per_node {number} -- {REPO}/{script} " in line


@pytest.mark.long
def test_more_iterations_follow_a_finished_run_and_the_rest_of_a_kill_goes(played, tmp_path):
    run = shutil.copytree(played, tmp_path / "run")
    shutil.rmtree(run / "iter1")
    more = loop(run, "--sft-baseline", "--iterations", "2")
    done = shell(*more)
    assert done.returncode == 0, done.stderr
    assert (run / "iter1" / "eval.json").exists() and (run / "sft/iter1/eval.json").exists()
    # as if a kill had come before this was cleared away
    left = run / "iter1" / "checkpoint"
    left.mkdir()
    assert shell(*more).returncode == 0 and not left.exists()


@pytest.mark.parametrize("gpus", [0, pytest.param(4, marks=pytest.mark.long)])
def test_the_paper_recipe_without_enough_gpus_is_one_line_that_names_the_demo(gpus, tmp_path):
    command = ["bash", "run_iterations.sh", "--run", tmp_path / "run"]
    done = shell(*command, env=with_gpus(tmp_path, gpus))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the paper recipe needs 88 GB on GPUs")
    assert f"found {gpus * 24564 // 954} on {gpus}" in line and "demo" in line
    # with adapters one is enough, and so is one H200: what stops it now is the model
    command += ["--model", tmp_path]
    for more, here in (([], (1, 143771)), (["--lora-rank", "16"], (1, 24564))):
        line = shell(*command, *more, env=with_gpus(tmp_path, *here)).stderr
        assert line.startswith(f"error: {tmp_path} holds no config.json"), line


@pytest.mark.long
def test_with_two_gpus_two_ranks_run_the_loop_and_come_to_the_same_theta_1(played, tmp_path):
    """nvidia-smi lists two; the ranks find no CUDA here and run on the CPU."""
    run = tmp_path / "run"
    env = {**with_gpus(tmp_path, 2), "CUDA_VISIBLE_DEVICES": "-1,-1"}
    done = shell(*loop(run, "--iterations", "1"), env=env)
    assert done.returncode == 0, done.stderr
    answers = (run / "iter0" / "generated.jsonl").read_bytes()
    assert answers == (played / "iter0" / "generated.jsonl").read_bytes()
    # another order of sums
    assert distance(run / "iter0", played / "iter0") < 1e-3 * moved(played)


@pytest.mark.long
def test_two_shells_on_one_machine_are_two_nodes(played, tmp_path):
    run = tmp_path / "run"
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    where |= {"NNODES": "2", "NPROC_PER_NODE": "1"}
    nodes = [start(run, **where, NODE_RANK=rank) for rank in "01"]
    said = ["".join(node.communicate(timeout=280)) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert distance(run / "iter0", played / "iter0") < 1e-3 * moved(played)
    assert "report.html" in said[0] and "report.html" not in said[1]


@pytest.mark.parametrize("flags", [["--recipe", "demo"], ["--objective", "sft"], ["--iter", "1"]])
def test_the_loop_refuses_flags_that_it_decides_itself(flags):
    done = shell("bash", "run_iterations.sh", *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert flags[0] in done.stderr
