"""Fixtures: the demo model as θ_0, and a micro recipe that runs an iteration in a second."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import generate
import train

torch.set_num_threads(1)
THETA0 = REPO / "demo" / "theta0"
MICRO = [
    "--recipe",
    "demo",
    "--num-prompts",
    "40",
    "--eval-prompts",
    "12",
    "--batch-size",
    "12",
    "--micro-tokens",
    "200",
    "--chunk",
    "16",
    "--checkpoint-every",
    "2",
    "--no-sft-baseline",
    "--lam",
    "5",
    "4",
    "--lr",
    "3e-5",
    "2e-5",
]


def stage(name: str, run: Path, *flags: str):
    """Call a stage's main(argv) in this process on the micro recipe."""
    {"generate": generate, "train": train, "evaluate": evaluate}[name].main(
        [*MICRO, "--run", str(run), *map(str, flags)]
    )


def shell(*command: str, **kwargs) -> subprocess.CompletedProcess:
    """Run a command from the repository root, as a user would; one thread a process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **kwargs.pop("env", {})}
    return subprocess.run(
        [str(c) for c in command],
        cwd=REPO,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        **kwargs,
    )


def torchrun(ranks: int, script: str, *flags: str) -> subprocess.CompletedProcess:
    return shell(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        ranks,
        "--",
        script,
        *flags,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA0)


@pytest.fixture()
def model():
    return AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def played(tmp_path_factory):
    """A run of two iterations of the micro recipe, for reading only."""
    run = tmp_path_factory.mktemp("runs") / "played"
    stage("evaluate", run, "--theta0")
    for t in (0, 1):
        for name in ("generate", "train", "evaluate"):
            stage(name, run, "--iter", t)
    return run


@pytest.fixture()
def refused(capsys):
    """refused(call) runs call, checks exit code 2 and one line without a traceback, and returns the line."""

    def check(call) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return check
