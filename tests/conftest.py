"""Fixtures: the demo model as θ_0, and a micro recipe that runs an iteration in a second."""

import gc
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # what a GPU must show: benchmarks/gpu_check.py
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers would warn of as_in_a_shell's fork

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import generate
import train

torch.set_num_threads(1)
REPO = Path(__file__).resolve().parent.parent
THETA0 = REPO / "demo" / "theta0"
sys.path += [str(REPO / "benchmarks"), str(REPO / "demo")]  # behind our own generate.py
MICRO = shlex.split(
    "--recipe demo --num-prompts 40 --eval-prompts 12 --batch-size 12 --micro-tokens 200"
    " --chunk 16 --checkpoint-every 2 --no-sft-baseline --lam 5 4 --lr 3e-5 2e-5"
)
STAGES = {"generate": generate, "train": train, "evaluate": evaluate}


def pytest_collection_modifyitems(items):
    """Simulated ranks come last: torch keeps something of them, which later forks would inherit."""
    items.sort(key=lambda item: item.path.name == "test_simulate.py")


def stage(name: str, run: Path, *flags: str):
    """Call a stage's main(argv) in this process on the micro recipe."""
    STAGES[name].main([*MICRO, "--run", str(run), *map(str, flags)])


def user_environment() -> dict:
    """What a command that a user starts sees: one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def shell(*command: str, env: dict | None = None, input: str | None = None, cwd: Path = REPO):
    """Run a command from the repository root, as a user would; env is added to the environment.

    Returns a subprocess.CompletedProcess with its output as text.
    """
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**user_environment(), **(env or {})},
        input=input,
        text=True,
        capture_output=True,
        timeout=300,
    )


def fork(call, shown: Path, **environment) -> int:
    """The process id of a fork that makes a call. All that a shell would show of it on stderr is
    written to the file `shown`, what libraries log included, which pytest keeps from there. Seconds
    faster than a shell: all modules are loaded."""
    gc.collect()  # a process group that a fork collects waits for threads that it does not have
    gc.freeze()  # the next call need not look through all that is loaded by now
    if pid := os.fork():
        return pid
    gc.disable()
    signal.alarm(200)  # ends a fork that hangs
    os.environ.update(environment)
    code = 1
    try:
        sys.stderr = open(shown, "w")  # noqa: SIM115 – open until the process ends
        os.dup2(sys.stderr.fileno(), 2)
        for name in ("root", *logging.root.manager.loggerDict):
            logger = logging.getLogger(name)
            ours = [x for x in logger.handlers if not type(x).__module__.startswith("_pytest")]
            logger.handlers = ours
            for handler in ours:
                if getattr(handler, "stream", sys.stderr) is not sys.stderr:
                    handler.stream = sys.stderr  # setStream would flush one that is closed
        warnings.resetwarnings()
        for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", quiet)  # as Python does by itself
        warnings.showwarning = lambda text, *_: print("warning:", text, file=sys.stderr)
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # Python prints it, and ends with 1
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_in_a_shell(call, shown: Path) -> tuple[int, str]:
    """A call's exit code and what a shell shows of it on stderr. shown: a file for that."""
    return exit_code(fork(call, shown)), shown.read_text()


def on_ranks(number: int, call, folder: Path) -> tuple[int, str]:
    """A call on so many ranks, as torchrun would start them, but without loading all again: the
    first exit code that is not 0, and what all show on stderr. folder: for files of that. Where
    rank 0 fails, the others get SIGTERM."""
    shown = [folder / f"stderr of rank {rank}" for rank in range(number)]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pids = []
    for rank, path in enumerate(shown):
        pids.append(fork(call, path, RANK=str(rank), LOCAL_RANK=str(rank), **common))
    code = exit_code(pids[0])
    for pid in pids[1:]:
        if code:
            os.kill(pid, signal.SIGTERM)
        other = exit_code(pid)
        code = code or other
    return code, "".join(path.read_text() for path in shown)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two_nodes(script, ranks: int, *flags) -> list[subprocess.Popen]:
    """A script on two nodes with a shared disk: two torchrun agents on this machine, each with so
    many ranks; stderr is kept."""
    where = f"--nnodes 2 --master_addr 127.0.0.1 --master_port {free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", *where.split()]
    nodes = []
    for rank in ("0", "1"):
        own = ["--node_rank", rank, "--nproc_per_node", ranks, "--", script, *flags]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        node = [*map(str, (*command, *own))]
        nodes.append(subprocess.Popen(node, cwd=REPO, env=user_environment(), **pipes))
    return nodes


def torchrun(ranks: int, program: str, *flags: str, cwd: Path = REPO):
    """Run a script (evaluate.py), or a module (spin.compare), on so many ranks."""
    launch = shlex.split(f"-m torch.distributed.run --standalone --nproc_per_node {ranks}")
    module = [] if str(program).endswith(".py") else ["-m"]
    return shell(sys.executable, *launch, *module, "--", program, *flags, cwd=cwd)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA0)


def load(folder: Path):
    """The model in a transformers folder, in fp32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture()
def model():
    return load(THETA0)


@pytest.fixture(scope="session")
def long_theta(tmp_path_factory):
    """θ_0 with room for 4,096 positions, which rotary embeddings do not mind: for long prompts."""
    folder = tmp_path_factory.mktemp("models") / "theta"
    shutil.copytree(THETA0, folder)
    limits = {"config.json": "max_position_embeddings", "tokenizer_config.json": "model_max_length"}
    for name, key in limits.items():
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: 4096}))
    return folder


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
def refused(capsys, caplog):
    """refused(call) runs call, checks exit code 2 and one line without a traceback, returns it.
    No library may have logged something before: pytest keeps that from stderr, a shell does not."""

    def check(call) -> str:
        capsys.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as stop:
            call()
        # what a shell would show: not torch's own logs, which go to a NullHandler
        loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert not [record for record in loud if "NullHandler" not in record.name]
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return check
