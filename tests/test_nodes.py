"""Two nodes: two torchrun agents on this machine, with one disk between them."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import MICRO, start_two_nodes
from test_train import fresh, metrics

pytestmark = pytest.mark.long


def start_two(run, *flags) -> list[subprocess.Popen]:
    """Iteration 0 of train.py on two nodes of two ranks each, --replicas 2: a copy a node."""
    return start_two_nodes(
        "train.py", 2, *MICRO, "--run", run, "--iter", 0, "--replicas", 2, *flags
    )


def wait_for_steps(run, number: int):
    """Until so many steps were taken."""
    path = run / "iter0" / "metrics.jsonl"
    begun = time.monotonic()
    while not path.exists() or len(metrics(run / "iter0")) < number:
        assert time.monotonic() - begun < 200
        time.sleep(0.02)


def ranks_of(node) -> list[int]:
    """The processes of an agent's ranks."""
    found = subprocess.run(["pgrep", "-P", str(node.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_sigterm_to_one_node_makes_both_checkpoint_and_leave(played, tmp_path):
    run = fresh(played, tmp_path / "run")
    nodes = start_two(run, "--checkpoint-every", "999", "--epochs", "40")
    wait_for_steps(run, 3)
    nodes[1].terminate()
    said = [node.communicate(timeout=60)[1] for node in nodes]
    (done,) = (path.name for path in (run / "iter0" / "checkpoint").iterdir())
    assert int(done) == len(metrics(run / "iter0")) >= 3
    assert not (run / "iter0" / "model").exists()
    # the agents' own exit code is 1; the ranks' stand in torchrun's report
    assert [node.returncode for node in nodes] == [1, 1]
    assert set(re.findall(r"exitcode *: (\d+)", said[0])) == {"143"}
    assert sum("SIGTERM: stopped after" in text for text in said) == 1  # rank 0 speaks


def test_where_a_node_is_killed_the_ranks_of_the_other_end_within_a_minute(played, tmp_path):
    run = fresh(played, tmp_path / "run")
    nodes = start_two(run, "--checkpoint-every", "2", "--epochs", "40")
    wait_for_steps(run, 5)
    left = ranks_of(nodes[0])
    assert len(left) == 2
    lost = [nodes[1].pid, *ranks_of(nodes[1])]
    begun = time.monotonic()
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    while any(os.path.exists(f"/proc/{pid}") for pid in left):
        assert time.monotonic() - begun < 60
        time.sleep(0.1)
    said = nodes[0].communicate(timeout=400)[1]
    assert nodes[0].returncode == 1
    assert said.count("another rank has left") == 1
    assert "Traceback" not in said.split("another rank has left")[0]
