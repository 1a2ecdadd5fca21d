"""benchmarks/gpu_check.py without a GPU: its steps pass here, and each of its assertions fails when
what it asserts is broken."""

import json
import math
import re
import sys
from types import SimpleNamespace

import gpu_check
import numerics
import pytest
import torch
from conftest import MICRO, shell
from test_model_checks import attention_that, branches_moved_by, no_bounds

from loss import sequence_logps
from spin.files import write_jsonl
from spin.model import attention

HERE = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, short=True)


def check(steps: str, capsys) -> tuple[int, list[str], str]:
    """(exit code, the outcome of each step, all that is said)"""
    code = gpu_check.main(["--device", "cpu", "--steps", steps])
    said = "".join(capsys.readouterr())
    return code, re.findall(r"^\d [a-z ]+: (ok|FAIL|not run), \d+ s: .+$", said, re.M), said


def test_steps_1_to_3_pass_without_a_gpu_and_the_others_are_not_run(capsys):
    code, outcomes, said = check("0,1,2,3,5,6,7,8,9", capsys)
    assert code == 0 and outcomes == ["not run"] + 3 * ["ok"] + 5 * ["not run"]
    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table[1:4]] == ["| 0 machine", "| 1 kernels", "| 2 model_checks"]
    assert "`python benchmarks/gpu_check.py --device cpu --steps 0,1,2" in said
    assert f"torch {torch.__version__}" in said


@pytest.mark.long
def test_step_4_plays_an_iteration_of_the_demo_and_resumes_it(capsys):
    code, outcomes, said = check("4", capsys)
    assert (code, outcomes) == (0, ["ok"]) and "it ends with the same bytes" in said


def test_a_step_that_fails_says_why_and_the_next_one_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", [None, lambda here: 1 / 0, lambda here: "all is well"])
    monkeypatch.setattr(gpu_check.STEPS[1], "__name__", "broken")
    monkeypatch.setattr(gpu_check.STEPS[2], "__name__", "sound")
    code, outcomes, said = check("1,2", capsys)
    assert (code, outcomes) == (1, ["FAIL", "ok"])
    assert "1 broken: FAIL, 0 s: ZeroDivisionError" in said and "Traceback" in said


def test_a_step_that_does_not_exist_or_a_gpu_that_does_not_is_one_line(capsys):
    for flags, line in ((["--steps", "10"], "from 0 to 9"), ([], "torch sees no GPU")):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(flags)
        assert stop.value.code == 2 and line in capsys.readouterr().err


PADDED = attention.padded
BROKEN_KERNELS = {
    "no window": lambda *x: PADDED(*x[:-1], None),
    "the usual scale, not the model's": lambda *x: PADDED(*x[:-2], None, x[-1]),
    "one token is not written": lambda *x: torch.cat([PADDED(*x)[:-1], torch.nan * x[0][-1:]]),
    "one token is zero": lambda *x: torch.cat([PADDED(*x)[:-1], 0 * x[0][-1:]]),
    "the gradient of the keys is lost": lambda q, k, *rest: PADDED(q, k.detach() + 0 * k, *rest),
}


@pytest.mark.parametrize("fault", BROKEN_KERNELS)
def test_a_broken_kernel_fails(fault, monkeypatch):
    monkeypatch.setattr(attention, "padded", BROKEN_KERNELS[fault])
    with pytest.raises(AssertionError, match="padded, head dimension 16, heads 32/8, .+ off"):
        numerics.kernels(HERE)


def test_the_kernel_that_a_gpu_would_take_is_tried_too(monkeypatch):
    def zeros(q, *rest):
        return 0 * q + sum(0 * x.sum() for x in rest[:2])

    monkeypatch.setattr(attention, "kernel_for", lambda *_: zeros)
    with pytest.raises(AssertionError, match="zeros, head dimension 16"):
        numerics.kernels(HERE)


def test_a_lost_mask_fails_the_checks_and_the_precision():
    for change in (no_bounds, branches_moved_by(-1)):
        with attention_that(change), pytest.raises(AssertionError, match="cannot keep sequences"):
            numerics.model_checks(HERE)
    with (
        attention_that(branches_moved_by(-1)),
        pytest.raises(AssertionError, match="nats per token"),
    ):
        numerics.precision(HERE)


def test_a_probe_that_refuses_nothing_fails(monkeypatch):
    monkeypatch.setattr(numerics, "check_scoring", lambda *_: None)
    with pytest.raises(AssertionError, match="without its causal flag passes"):
        numerics.model_checks(HERE)


def test_a_gradient_of_another_direction_fails(monkeypatch):
    def other_gradient(model, **row):
        logps = sequence_logps(model, **row)
        noise = torch.randn_like(logps) * logps
        return logps + noise - noise.detach()

    monkeypatch.setattr(numerics, "sequence_logps", other_gradient)
    with pytest.raises(AssertionError, match="the cosine of the gradients is 0.[0-8]"):
        numerics.precision(HERE)


ROWS = [
    {"loss": math.log(2), "margin": 0.0, "margin_std": 0.0, "grad_norm": 1.0},
    {"loss": 0.6, "margin": 0.1, "margin_std": 0.2},
]


@pytest.mark.parametrize(
    "step, change, finding",
    [
        (0, {"loss": math.log(2) + 2e-6}, "the first loss is"),
        (0, {"margin": 1e-3}, "margins in step 0"),
        (0, {"margin_std": 1e-3}, "margins in step 0"),
        (1, {"margin_std": 0.0}, "the first update moves nothing"),
        (1, {}, "1 steps, not 2"),
    ],
)
def test_first_steps_that_are_not_those_of_theta_t_fail(step, change, finding, tmp_path):
    log = tmp_path / "iter0" / "metrics.jsonl"
    log.parent.mkdir()
    write_jsonl(log, ROWS)
    assert gpu_check.steps_of(tmp_path, 2) == [0, math.log(2), 0.6]
    write_jsonl(log, ROWS[:step] + [ROWS[step] | change] * bool(change) + ROWS[step + 1 :])
    with pytest.raises(AssertionError, match=finding):
        gpu_check.steps_of(tmp_path, 2)


@pytest.mark.parametrize(
    "fault, finding",
    [
        ("", None),
        ("exact match", "the expected exact match does not rise"),
        ("weights", "a run that was resumed ends with other weights"),
        ("losses", "two runs differ by 0.1 in a loss"),
        ("peft", "--lora-rank needs the package peft; else exact match 0.500"),
    ],
)
def test_what_step_4_asserts_of_its_runs(fault, finding, tmp_path, monkeypatch):
    def pretend(script, *flags, **_):
        run = flags[flags.index("--run") + 1]
        (run / "iter0" / "model").mkdir(parents=True, exist_ok=True)
        resumed = run.name == "again"
        result = 0.5 + ("--iter" in flags and fault != "exact match") / 10
        name = "iter0/eval.json" if "--iter" in flags else "eval.json"
        (run / name).write_text(json.dumps({"expected_exact_match": result}))
        (run / "iter0/model/model.safetensors").write_text(str(resumed and fault == "weights"))
        number = 4 if "--pairs" in flags else 8
        last = [ROWS[1] | {"loss": 0.6 + 0.1 * (resumed and fault == "losses")}] * (number - 1)
        write_jsonl(run / "iter0" / "metrics.jsonl", [ROWS[0], *last])

    monkeypatch.setattr(gpu_check, "stage", pretend)
    monkeypatch.setattr(gpu_check, "interrupt", lambda run: 3)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: fault != "peft" or None)
    here = SimpleNamespace(device=HERE.device, folder=tmp_path)
    if not finding:
        figure = "exact match 0.500 → 0.600; resumed after 3 steps, it ends with the same bytes"
        assert gpu_check.demo(here) == figure
        return
    with pytest.raises(gpu_check.NotRun if fault == "peft" else AssertionError, match=finding):
        gpu_check.demo(here)


def test_a_stage_that_ends_otherwise_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "true")
    assert gpu_check.stage("train.py") == ""
    with pytest.raises(AssertionError, match="train.py .+: exit code 0"):
        gpu_check.stage("train.py", code=2)
    with pytest.raises(AssertionError, match="SIGTERM after a step: exit code 0"):
        gpu_check.interrupt(tmp_path)


@pytest.mark.long
def test_the_stages_need_no_optional_package_for_jsonl(tmp_path):
    missing = "datasets", "peft", "flash_attn", "lm_eval", "matplotlib"
    flags = [*MICRO, "--run", str(tmp_path)]
    program = f"""import sys
sys.modules.update(dict.fromkeys({missing}))
import evaluate, generate, train
evaluate.main({flags} + ["--theta0"])
for stage in generate, train, evaluate:
    stage.main({flags} + ["--iter", "0"])
"""
    done = shell(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
