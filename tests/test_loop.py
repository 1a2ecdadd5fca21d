"""run_iterations.sh: the whole loop on one command, on GPUs, on ranks of the CPU, on two nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import MICRO, REPO, shell, user_environment
from safetensors.torch import load_file


def loop(run, *flags):
    """The command of the loop on the micro recipe."""
    return ["bash", "run_iterations.sh", "demo", "--run", str(run), *MICRO[2:], *flags]


def with_gpus(folder, number: int) -> dict:
    """An environment whose nvidia-smi lists so many GPUs."""
    fake = folder / "nvidia-smi"
    listing = "".join(f"echo 'GPU {i}: NVIDIA A100-SXM4-80GB'\n" for i in range(number))
    fake.write_text("#!/bin/sh\n" + listing)
    fake.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def times_of_change(run) -> dict:
    """When each file of a run was written; the report, which is made each time, is left out."""
    files = [path for path in run.rglob("*") if path.is_file()]
    made_each_time = ("report.html", "summary.json")
    return {p: p.stat().st_mtime_ns for p in files if p.name not in made_each_time}


def distance(a, b) -> float:
    """The largest difference of a weight of θ_1 between two runs."""
    left, right = (load_file(run / "iter0" / "model" / "model.safetensors") for run in (a, b))
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_the_whole_loop_on_one_command_and_again_does_nothing(tmp_path):
    command = loop(tmp_path / "run", "--iterations", "1")
    done = shell(*command)
    assert done.returncode == 0, done.stderr
    for name in ("eval.json", "iter0/eval.json", "report.html"):  # θ_0, θ_1
        assert (tmp_path / "run" / name).exists()
    assert "generate 0" in done.stderr and "spin 0" in done.stderr  # progress bars
    before = times_of_change(tmp_path / "run")
    again = shell(*command)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert times_of_change(tmp_path / "run") == before


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


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_of_the_loops_processes_reaches_a_stage_once(sent, tmp_path):
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
    os.killpg(process.pid, sent)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "told").read_text() == "1"


@pytest.mark.long
def test_more_iterations_are_added_to_a_finished_run_and_what_a_kill_left_is_cleared_away(
    played, tmp_path
):
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


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_paper_recipe_without_enough_gpus_stops_with_one_line_that_names_the_demo(
    gpus, tmp_path
):
    command = ["bash", "run_iterations.sh", "--run", tmp_path / "run"]
    done = shell(*command, env=with_gpus(tmp_path, gpus))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the paper recipe needs 8 GPUs")
    assert f"found {gpus}" in line and "demo" in line
    if gpus:  # with adapters one is enough: what stops it now is the model
        command += ["--lora-rank", "16", "--model", tmp_path]
        line = shell(*command, env=with_gpus(tmp_path, gpus)).stderr
        assert (
            line == f"error: {tmp_path} holds no config.json: --model wants a transformers"
            " folder or a hub id\n"
        )


@pytest.mark.long
def test_with_two_gpus_two_ranks_run_the_loop_and_come_to_the_same_theta_1(played, tmp_path):
    """nvidia-smi lists two; the ranks find no CUDA here and run on the CPU."""
    run = tmp_path / "run"
    env = {**with_gpus(tmp_path, 2), "CUDA_VISIBLE_DEVICES": "-1,-1"}
    done = shell(*loop(run, "--iterations", "1"), env=env)
    assert done.returncode == 0, done.stderr
    answers = (run / "iter0" / "generated.jsonl").read_bytes()
    assert answers == (played / "iter0" / "generated.jsonl").read_bytes()
    # another order of sums; and the control: an iteration moves weights by far more
    assert distance(run, played) < 1e-5 < 1e-4 < moved_by_training(played)


@pytest.mark.long
def test_two_shells_on_one_machine_are_two_nodes(played, tmp_path):
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for rank in ("0", "1"):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank}
        env = {**user_environment(), **where, "NNODES": "2", "NPROC_PER_NODE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(loop(run, "--iterations", "1"), cwd=REPO, env=env, **pipes))
    said = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert distance(run, played) < 1e-5
    assert "report.html" in said[0] and "report.html" not in said[1]


def moved_by_training(run) -> float:
    """The largest difference of a weight between θ_0 and θ_1."""
    start = load_file(REPO / "demo" / "theta0" / "model.safetensors")
    end = load_file(run / "iter0" / "model" / "model.safetensors")
    return max((start[name].float() - end[name]).abs().max().item() for name in end)


@pytest.mark.parametrize("flags", [["--recipe", "demo"], ["--objective", "sft"], ["--iter", "1"]])
def test_the_loop_refuses_flags_that_it_decides_itself(flags):
    done = shell("bash", "run_iterations.sh", *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert flags[0] in done.stderr
