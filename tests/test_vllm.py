"""generate.py --engine vllm, with the real vLLM: y' ~ p_θt, as by our own loop.

    OMP_NUM_THREADS=1 DIR/bin/python -m pytest -o addopts= -m vllm tests/test_vllm.py

in an environment that has vLLM (.ci/run makes one). TRAIN_PYTHON is the Python of the other stages,
by default the same."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MICRO, REPO, load, shell, stage, torchrun, user_environment
from families import save, tiny
from test_generate import chi_square, generated, numbers_of, rows_of

from spin.files import fail
from spin.model import sampling_check
from spin.recipe import parse
from spin.run.ranks import World
from spin.sampling import vllm_engine
from spin.sampling.engines import sample

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
TRAIN_PYTHON = os.environ.get("TRAIN_PYTHON", sys.executable)
needs_vllm = pytest.mark.vllm
ENDS = [2, 1]
WORD = 30  # the model's configs list it too, but it is no end
PROMPT = [1, 9, 5]


@pytest.fixture(scope="module")
def theta(tmp_path_factory):
    """Heads of 64 numbers, as SmolLM2's; of smaller ones vLLM knows none on a CPU."""
    wide = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    model = tiny("Llama", **wide, num_key_value_heads=1)
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    model.lm_head.weight.data *= 5 / logits.std().item()
    for config in (model.config, model.generation_config):
        config.eos_token_id = [*ENDS, WORD]
    return save(model, tmp_path_factory.mktemp("models") / "theta")


def flags(theta):
    return ["--iter", 0, "--engine", "vllm", "--model", theta, "--slots", 2]


@pytest.fixture(scope="module")
def sampled(theta, tmp_path_factory):
    """A run whose answers vLLM has sampled, in three chunks."""
    run = tmp_path_factory.mktemp("runs") / "sampled"
    stage("generate", run, *flags(theta))
    return run


@needs_vllm
def test_an_answer_ends_with_an_end_token_and_not_with_a_word_that_is_listed(sampled):
    rows = rows_of(sampled)
    assert len(rows) == 40
    for row in rows:
        *inner, last = row["generated_ids"]
        assert not {*ENDS} & {*inner}
        assert (last in ENDS) == (row["finish"] == "eos")
        assert row["finish"] == "eos" or len(row["generated_ids"]) == 24
    assert {row["finish"] for row in rows} == {"eos", "length"}
    assert {row["generated_ids"][-1] for row in rows} > {*ENDS}
    # controls: the word was sampled; prompts that are alike in nothing but their key differ
    assert any(WORD in row["generated_ids"][:-1] for row in rows)
    assert len({tuple(row["generated_ids"]) for row in rows}) == 40


@needs_vllm
def test_a_killed_run_of_a_split_model_is_finished_by_two_ranks_as_if_whole(
    sampled, theta, tmp_path
):
    run = tmp_path / "run"
    command = [*MICRO, "--run-dir", run, *flags(theta)]
    split = [*command, "--tensor-parallel", 2]
    split = [*map(str, (sys.executable, "generate.py", *split))]
    process = subprocess.Popen(split, cwd=REPO, env=user_environment())
    parts = run / "iter0" / "generated.part"
    while not [*parts.glob("*.jsonl")]:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len([*parts.glob("*.jsonl")]) < 3
    done = torchrun(2, "generate.py", *command)
    assert done.returncode == 0, done.stderr
    assert "devices: 2 × CPU" in done.stdout
    assert generated(run) == generated(sampled)


@needs_vllm
def test_train_takes_the_answers_and_begins_at_log_2(sampled, theta):
    command = [*MICRO, "--run", sampled, *flags(theta)]
    done = shell(TRAIN_PYTHON, "train.py", *command)
    assert done.returncode == 0, done.stderr
    first = json.loads((sampled / "iter0" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (sampled / "iter0" / "model").is_dir()


@needs_vllm
def test_the_loop_runs_two_iterations_with_vllm_in_another_environment(theta, tmp_path):
    command = ["bash", "run_iterations.sh", "demo", "--run", tmp_path / "run", *MICRO[2:]]
    env = {"PYTHON": TRAIN_PYTHON, "GENERATE_PYTHON": sys.executable}
    more = ["--iterations", "2", *flags(theta)[2:]]
    done = shell(*command, *more, env=env)
    assert done.returncode == 0, done.stderr
    for t in (0, 1):
        assert (tmp_path / "run" / f"iter{t}" / "eval.json").exists()
    assert len(rows_of(tmp_path / "run", 1)) == 40


# ---- the distribution ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(theta):
    return parse([*MICRO, "--engine", "vllm", "--model", str(theta), "--dtype", "fp32"])[0]


@pytest.fixture(scope="module")
def engine(theta, recipe):
    vllm_engine.load_vllm()
    return vllm_engine.start(str(theta), recipe, torch.device("cpu"))


def first_and_second(model) -> torch.Tensor:
    """The probabilities of the first and the second token after PROMPT, by transformers: (2, V)."""
    with torch.no_grad():
        first = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)
        ids = torch.tensor([[*PROMPT, token] for token in range(len(first))])
        second = model(ids).logits[:, -1].double().softmax(-1)
    return torch.stack([first, first @ second])


def chi_squares(answers, p) -> list[tuple[float, float]]:
    """For the first and the second token: (chi-square, its 0.999 quantile). Tokens expected less
    than five times are one cell."""
    found = []
    for tokens, expected in zip(np.array([ids for ids, *_ in answers]).T, p.numpy(), strict=True):
        counts = np.bincount(tokens, minlength=len(expected))
        rare = expected * len(answers) < 5
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        k = len(expected) - 1
        limit = k * (1 - 2 / (9 * k) + 3.09 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty
        assert k > 8
        found.append((chi_square(counts, expected), limit))
    return found


@needs_vllm
def test_2000_answers_of_either_engine_are_distributed_as_p_theta(theta, engine):
    """(Two tokens and no end: the second is drawn after every first one.)"""
    n = 2000
    model = load(theta)
    p = first_and_second(model)
    for temperature in (1.0, 0.9):
        keys = [(0, 0, i) for i in range(n)]
        theirs = vllm_engine.sample(engine, [PROMPT] * n, (), 2, keys, temperature)
        ours = sample(model, [PROMPT] * n, [-1], 2, numbers_of(n, 2), temperature, slots=500)
        for answers in (theirs, ours):
            for chi, limit in chi_squares(answers, p):
                assert (chi < limit) == (temperature == 1.0), (chi, limit)


@needs_vllm
def test_prompts_of_more_tokens_than_one_pass_holds_are_answered_alike_each_time(engine):
    """A prompt in pieces would have to draw a number again, which vLLM cannot on a CPU. And the
    recipe's knobs reach vLLM."""
    prompts = [[1, *(3 + (k * i) % 80 for i in range(49))] for k in range(200)]  # 10,000 tokens
    keys = [(0, 0, k) for k in range(200)]
    once, again = (vllm_engine.sample(engine, prompts, ENDS, 8, keys) for _ in range(2))
    assert [x[:2] for x in once] == [x[:2] for x in again]
    other = vllm_engine.sample(engine, prompts, ENDS, 8, [(1, 0, k) for k in range(200)])
    assert [x[:2] for x in other] != [x[:2] for x in once]  # control
    nucleus = vllm_engine.sample(engine, prompts, ENDS, 8, keys, 1.0, 1e-6)
    greedy = vllm_engine.sample(engine, prompts, ENDS, 8, keys, 0.0)
    assert [x[0] for x in nucleus] == [x[0] for x in greedy] != [x[0] for x in once]


@needs_vllm
def test_an_engine_with_other_weights_is_refused_and_with_these_taken(
    theta, recipe, engine, tmp_path, monkeypatch, refused, capsys
):
    monkeypatch.setattr(vllm_engine, "start", lambda *_: engine)
    prompts = [[1, 5 + k % 60, 9] for k in range(40)]
    world = World(0, 1, torch.device("cpu"))
    assert sampling_check.start_vllm(str(theta), prompts, recipe, world) is engine
    assert "vLLM is off by" in capsys.readouterr().out
    other = load(theta)
    other.model.layers[0].mlp.down_proj.weight.data *= 1.01
    other = str(save(other, tmp_path / "other"))
    line = refused(lambda: sampling_check.start_vllm(other, prompts, recipe, world))
    assert "LlamaForCausalLM is not scored as vLLM samples: off by 0." in line
    assert "--engine own" in line


# ---- refusals ------------------------------------------------------------------------------------


@needs_vllm
def test_a_worker_killed_while_it_samples_ends_in_one_line(engine, refused):
    """(It comes after what needs the engine.)"""
    keys = [(0, 0, i) for i in range(2000)]

    def kill():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    def killed():
        threading.Timer(0.5, kill).start()
        vllm_engine.sample(engine, [PROMPT] * 2000, (), 24, keys)
        fail("it was over before the kill")

    line = refused(killed)
    assert line.startswith("error: vLLM broke down (") and "run it again" in line


@needs_vllm
def test_a_family_that_vllm_does_not_know_is_refused(tmp_path, refused):
    save(tiny("GPT-Neo, local"), tmp_path / "theta")
    line = refused(lambda: stage("generate", tmp_path / "run", *flags(tmp_path / "theta")))
    assert "vLLM cannot start with" in line and "GPTNeoForCausalLM" in line
    assert "take --engine own" in line and not (tmp_path / "run" / "iter0").exists()


@needs_vllm
def test_too_little_memory_for_the_cache_is_refused(theta, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0")
    line = refused(lambda: stage("generate", tmp_path / "run", *flags(theta)))
    assert "No available memory for the cache" in line and "lower --slots" in line
    assert not (tmp_path / "run" / "iter0").exists()


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "vllm", None)
    line = refused(lambda: stage("generate", tmp_path / "run", "--iter", 0, "--engine", "vllm"))
    assert "pip install vllm" in line and "GENERATE_PYTHON" in line
    assert not (tmp_path / "run").exists()


def test_knobs_that_vllm_or_our_loop_would_not_follow_are_refused(tmp_path, refused):
    for knobs, words in (
        (["--engine", "vllm", "--temperature", "0.005"], "--temperature 0.005: vLLM would take"),
        (["--tensor-parallel", "2"], "--tensor-parallel needs --engine vllm"),
    ):
        call = lambda knobs=knobs: stage("generate", tmp_path / "run", "--iter", 0, *knobs)  # noqa: E731 – a line is enough
        assert words in refused(call)


@pytest.mark.parametrize(
    "visible, second",
    [(None, "2,3"), ("7,6,5,4", "5,4"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")],
)
def test_a_worker_sees_the_gpus_of_its_rank_and_nothing_of_torchrun(visible, second, monkeypatch):
    """(A stand-in for vLLM: no GPU is here.)"""
    seen = {}

    class LLM:
        def __init__(self, name, **how):
            seen.update(os.environ, **how)

    monkeypatch.setattr(vllm_engine, "load_vllm", lambda: SimpleNamespace(LLM=LLM))
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    recipe = parse(["--engine", "vllm", "--tensor-parallel", "2", "--dtype", "bf16"])[0]
    vllm_engine.start("DIR", recipe, torch.device("cuda", 2))
    assert seen["CUDA_VISIBLE_DEVICES"] == second and seen["HOME"]
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & seen.keys()
    assert seen["tensor_parallel_size"] == 2 and seen["dtype"] == "bfloat16"
    assert os.environ["RANK"] == "1" and os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_chunks_of_another_engine_are_not_taken(played, tmp_path, refused):
    run = tmp_path / "run"
    stage("generate", run, "--iter", 0)
    line = refused(lambda: stage("generate", run, "--iter", 0, "--engine", "vllm"))
    assert "engine: 'own' there, 'vllm' asked" in line
