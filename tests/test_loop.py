"""run_iterations.sh: the whole loop on one command, on GPUs, on ranks of the CPU, on two nodes."""

import json
import os
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


def distance(a, b) -> float:
    """The largest difference of a weight of θ_1 between two runs."""
    left, right = (load_file(run / "iter0" / "model" / "model.safetensors") for run in (a, b))
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_the_whole_loop_on_one_command_and_again_does_nothing(tmp_path):
    command = loop(tmp_path / "run", "--sft-baseline", "--iterations", "1")
    done = shell(*command)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["spin"]) == len(summary["sft"]) == 2  # θ_0, θ_1, and the baseline's
    assert "generate 0" in done.stderr and "spin 0" in done.stderr  # progress bars
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = shell(*command)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


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


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_of_the_loops_processes_reaches_a_stage_once(sent, tmp_path):
    """torchrun, told twice, leaves at once, without its ranks. Ctrl-C goes to all, and so does the
    end of an ssh."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, run=str(tmp_path)))
    stub.chmod(0o755)
    environment = {**user_environment(), "PYTHON": str(stub)}
    command = loop(tmp_path)
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
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
def test_the_loop_goes_on_and_makes_the_report_that_a_kill_has_kept_it_from_making(tmp_path):
    run = tmp_path / "run"
    assert shell(*loop(run, "--iterations", "1")).returncode == 0
    report = run / "report.html"
    before = report.stat().st_mtime_ns
    done = shell(*loop(run, "--sft-baseline", "--iterations", "2"))  # more of the same run
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["spin"]) == len(summary["sft"]) == 3
    assert report.stat().st_mtime_ns > before
    # as if a kill had come before the report was made,
    before = report.stat().st_mtime_ns
    os.utime(run / "iter1" / "eval.json")
    command = loop(run, "--sft-baseline", "--iterations", "2")
    assert "report.html" in shell(*command).stdout and report.stat().st_mtime_ns > before
    # or before this was cleared away
    left = run / "iter1" / "checkpoint"
    left.mkdir()
    assert shell(*command).returncode == 0 and not left.exists()


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
def test_with_gpus_the_stages_are_launched_by_torchrun_with_one_rank_a_gpu(tmp_path):
    """A node whose nvidia-smi lists two GPUs; the ranks find no CUDA here and run on the CPU."""
    env = {**with_gpus(tmp_path, 2), "CUDA_VISIBLE_DEVICES": "-1,-1"}
    done = shell(*loop(tmp_path / "run", "--iterations", "1"), env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "iter0" / "model").is_dir()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.long
def test_two_ranks_of_the_cpu_run_the_loop_and_come_to_the_same_theta_1(played, tmp_path):
    run = tmp_path / "run"
    done = shell(*loop(run, "--iterations", "1"), env={"NPROC_PER_NODE": "2"})
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


def test_the_loop_has_its_plan_before_torch_is_loaded():
    """Five seconds a start, and a mistake in a flag is told at once."""
    say = "import sys; {}; print('torch' in sys.modules)"
    loaded = [
        shell(sys.executable, "-c", say.format(f"import {name}")).stdout.strip()
        for name in ("spin.checks", "spin.models")  # the second is the control
    ]
    assert loaded == ["False", "True"]
