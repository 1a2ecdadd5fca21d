"""loss.py against oracles written from the paper: Eq. (3.1), (4.7), Section 3, Assumption 5.1."""

import contextlib
import math
import shutil
import sys

import pytest
import torch
from conftest import MICRO, REPO, shell

import loss as loss_module
import train
from loss import ELL, sequence_logps, sft_loss, spin_loss, token_logps, unmet_assumptions
from spin.data.text import encode, make_renderer
from spin.files import read_jsonl
from spin.model.packing import pack

torch.manual_seed(0)
# log-probabilities of six pairs: policy real, policy generated, opponent real, opponent generated
FOUR = torch.randn(4, 6, dtype=torch.float64) * 3


BY_HAND = {
    "logistic": lambda t: math.log(1 + math.exp(-t)),
    "hinge": lambda t: max(0.0, 1 - t),
    "correlation": lambda t: 1 - t,
    "exponential": lambda t: math.exp(-t),
}


@pytest.mark.parametrize("ell", BY_HAND)
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_spin_loss_is_equation_4_7_for_every_ell(ell, lam):
    losses = spin_loss(*FOUR, lam=lam, ell=ell)
    for loss, (pr, pg, o_r, og) in zip(losses.tolist(), FOUR.T.tolist(), strict=True):
        wanted = BY_HAND[ell](lam * (pr - o_r) - lam * (pg - og))
        assert loss == pytest.approx(wanted, rel=1e-12)
    # control: generated preferred to real
    swapped = spin_loss(*FOUR[[1, 0, 3, 2]], lam=lam, ell=ell)
    assert not torch.allclose(losses, swapped)


@pytest.mark.parametrize("ell", BY_HAND)
def test_every_ell_of_the_paper_is_convex_and_decreasing_with_negative_slope_at_zero(ell):
    t = torch.linspace(-4, 4, 81, dtype=torch.float64)
    values = ELL[ell](t)
    assert (values.diff() <= 0).all() and (values.diff().diff() >= -1e-12).all()
    assert ELL[ell](t[41]) < ELL[ell](t[40]) < ELL[ell](t[39])
    assert unmet_assumptions(ell) == []


@pytest.mark.parametrize(
    "loss, missing",
    [
        (lambda t: (t - 0.5) ** 2, ["decreasing"]),
        (lambda t: torch.relu(-t), ["slope"]),  # flat from 0 on
        (lambda t: -torch.atan(t), ["convex"]),
        (lambda t: torch.cos(t), ["decreasing", "slope", "convex"]),
        (lambda t: (t - 30) ** 2, []),  # rises where no margin is looked at
        (lambda t: -torch.sqrt(t), ["decreasing", "convex"]),  # its slope is NaN below 0
    ],
)
def test_what_a_new_ell_lacks_is_found(loss, missing, monkeypatch):
    monkeypatch.setitem(ELL, "new", loss)
    found = unmet_assumptions("new")
    assert len(found) == len(missing)
    assert all(word in sentence for word, sentence in zip(missing, found, strict=True))


def test_loss_is_log2_when_policy_is_opponent():
    same = torch.randn(5)
    log2 = torch.full((5,), math.log(2))
    assert torch.allclose(spin_loss(same, same - 1, same, same - 1), log2)
    assert not torch.allclose(spin_loss(same, same - 1, same, same), log2)  # control
    # the defaults are the paper's
    assert torch.equal(spin_loss(*FOUR), spin_loss(*FOUR, lam=0.1, ell="logistic"))


@pytest.mark.parametrize("ell", BY_HAND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_of_10000_are_finite_but_for_the_exponential_which_overflows_at_88(ell, dtype):
    zero = torch.zeros(2, dtype=dtype)
    real = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    losses = spin_loss(real, zero, zero, zero, lam=1.0, ell=ell)
    losses.sum().backward()
    fine = losses.isfinite() & real.grad.isfinite()
    assert losses.dtype == torch.float32 and fine.tolist() == [True, ell != "exponential"]
    # where it overflows in fp32, as loss.py says
    edge = ELL["exponential"](torch.tensor([-88.7, -88.8]))
    assert edge.isfinite().tolist() == [True, False]


def test_bf16_log_probs_are_computed_in_fp32_and_float64_stays():
    four = (FOUR * 100).bfloat16()
    losses = spin_loss(*four)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, spin_loss(*four.float()))
    # control: what must not be done
    in_bf16, in_fp32 = (0.1 * (x[0] - x[2]) - 0.1 * (x[1] - x[3]) for x in (four, four.float()))
    assert (in_bf16.float() - in_fp32).abs().max() > 0.01
    assert spin_loss(*FOUR).dtype == sft_loss(FOUR[0]).dtype == torch.float64
    assert torch.equal(sft_loss(FOUR[0]), -FOUR[0])


def chain_rule(model, ids, mask, average=False):
    """log p(y|x) a token at a time: the oracle.

    It feeds the prefix alone and reads the next token's probability."""
    terms = []
    for j in range(1, len(ids)):
        if mask[j]:
            logits = model(torch.tensor([ids[:j]])).logits[0, -1]
            terms.append(logits.double().log_softmax(-1)[ids[j]])
    terms = torch.stack(terms)
    return (terms.mean() if average else terms.sum()).item()


@pytest.fixture()
def sequences(tokenizer):
    answers = {"Reverse kola": "alok", "Larger of 12 and 93": "93", "Spell tin": "t-i-n, ok"}
    return [encode(make_renderer(tokenizer, "paper"), {"prompt": x}, y) for x, y in answers.items()]


@torch.no_grad()
def test_sequence_logps_is_a_sum_over_response_tokens_shifted_by_one(model, sequences):
    together = sequence_logps(model, **pack(sequences, "cpu"))
    for (ids, mask), logp in zip(sequences, together.tolist(), strict=True):
        assert logp == pytest.approx(chain_rule(model, ids, mask), abs=1e-4)
        # controls: a mean, the prompt counted, no shift
        mean = chain_rule(model, ids, mask, average=True)
        assert logp != pytest.approx(mean, abs=1e-2)
        with_prompt = chain_rule(model, ids, [1] * len(ids))
        assert logp != pytest.approx(with_prompt, abs=1e-2)
        logps = token_logps(model(torch.tensor([ids])).logits[0], torch.tensor(ids))
        unshifted = (logps * torch.tensor(mask)).sum().item()
        assert logp != pytest.approx(unshifted, abs=1e-2)


def test_logits_are_computed_for_response_tokens_only(model, sequences):
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    row = pack(sequences, "cpu")
    sequence_logps(model, **row)
    assert seen[0][1] == sum(sum(mask) for _, mask in sequences) < row["input_ids"].shape[1]


def test_the_first_gradient_of_spin_is_half_lambda_times_two_scores(model, sequences):
    """At θ = θ_t, ∇L = −λ/2 (∇log p(y|x) − ∇log p(y'|x)) for the logistic ℓ."""

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def scores():
        return [sequence_logps(model, **pack([s], "cpu")) for s in sequences[:2]]

    real, generated = scores()
    got = gradient(spin_loss(real, generated, real.detach(), generated.detach(), lam=0.3).sum())
    real, generated = scores()
    wanted = -0.15 * gradient(real.sum()) + 0.15 * gradient(generated.sum())
    assert torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max())


def test_the_gradient_takes_the_place_of_the_logits_and_what_still_needs_them_is_refused():
    hidden, head = torch.randn(5, 8), torch.randn(8, 30, requires_grad=True)
    labels = torch.randint(30, (5,))

    def gradient(in_place):
        logits = hidden @ head
        before = logits.detach().clone()
        loss = -loss_module._TokenLogps.apply(logits, labels, in_place).sum()
        (found,) = torch.autograd.grad(loss, head)
        assert torch.equal(logits, before) is not in_place
        return found

    assert torch.equal(gradient(True), gradient(False))
    logits = hidden @ head
    both = (logits**2).sum() + loss_module._TokenLogps.apply(logits, labels, True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


@pytest.mark.parametrize("hooks", [False, True])
def test_a_second_backward_pass_is_right_or_refused(model, sequences, hooks):
    """Also where hooks keep what is saved, and torch does not see that it was overwritten."""
    (weight,) = model.lm_head.parameters()

    def gradients(loss):
        return [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2)]

    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with keep if hooks else contextlib.nullcontext():
        with pytest.raises(RuntimeError, match="only one backward pass"):
            gradients(sequence_logps(model, **pack(sequences, "cpu")).sum())
        ids = torch.tensor([sequences[0][0]])
        once, again = gradients(token_logps(model(ids).logits[:, :-1], ids[:, 1:]).sum())
    assert torch.equal(once, again) and once.abs().max() > 0


@pytest.mark.long
def test_a_loss_is_added_in_one_line_of_code(tmp_path, refused):
    """IPO's, up to 1/λ², which rises from t = 1/2 on. An iteration runs, with a warning."""
    copy = tmp_path / "copy"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".*", "runs", "tests", "benchmarks"))
    last = '    "exponential": lambda t: torch.exp(-t),\n'
    text = (copy / "loss.py").read_text()
    assert text.count(last) == 1
    (copy / "loss.py").write_text(
        text.replace(last, last + '    "ipo": lambda t: (t - 0.5) ** 2,\n')
    )
    run = [*MICRO, "--run", str(tmp_path / "run"), "--ell", "ipo", "--lam", "0.5"]
    calls = f"""import evaluate, generate, train, spin.report.page
evaluate.main({[*run, "--theta0"]})
for stage in (generate, train, evaluate):
    stage.main({[*run, "--iter", "0"]})
spin.report.page.main({run})"""
    done = shell(sys.executable, "-c", calls, cwd=copy)
    assert done.returncode == 0, done.stderr
    warning = "warning: Assumption 5.1 does not hold: --ell ipo is not decreasing everywhere"
    assert done.stderr.count("warning: Assumption 5.1") == done.stderr.count(warning) == 1
    rows = [*read_jsonl(tmp_path / "run" / "iter0" / "metrics.jsonl")]
    assert rows[0]["loss"] == pytest.approx(0.25) and rows[-1]["loss"] < 0.25
    assert (tmp_path / "run" / "report.html").exists()
    # control: here there is no such loss
    assert "invalid choice: 'ipo'" in refused(lambda: train.main([*run, "--iter", "0"]))
