"""loss.py against oracles written from the paper: Eq. (3.1), (4.7), Section 3, Assumption 5.1."""

import math

import pytest
import torch

import loss as loss_module
from loss import ELL, sequence_logps, sft_loss, spin_loss, token_logps
from spin.codec import make_codec
from spin.packing import pack
from spin.tokens import encode

torch.manual_seed(0)
# log-probabilities of six pairs: policy real, policy generated, opponent real, opponent generated
FOUR = torch.randn(4, 6, dtype=torch.float64) * 3


def by_hand(name, t):
    return {
        "logistic": math.log(1 + math.exp(-t)),
        "hinge": max(0.0, 1 - t),
        "correlation": 1 - t,
        "exponential": math.exp(-t),
    }[name]


@pytest.mark.parametrize("ell", ELL)
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_spin_loss_is_equation_4_7_for_every_ell(ell, lam):
    losses = spin_loss(*FOUR, lam=lam, ell=ell)
    for loss, (pr, pg, o_r, og) in zip(losses.tolist(), FOUR.T.tolist(), strict=True):
        wanted = by_hand(ell, lam * (pr - o_r) - lam * (pg - og))
        assert loss == pytest.approx(wanted, rel=1e-12)
    # control: generated preferred to real
    swapped = spin_loss(*FOUR[[1, 0, 3, 2]], lam=lam, ell=ell)
    assert not torch.allclose(losses, swapped)


def test_the_defaults_are_the_papers_beta_and_logistic_loss():
    assert torch.equal(spin_loss(*FOUR), spin_loss(*FOUR, lam=0.1, ell="logistic"))


@pytest.mark.parametrize("ell", ELL)
def test_every_ell_is_convex_and_decreasing_with_negative_slope_at_zero(ell):
    t = torch.linspace(-4, 4, 81, dtype=torch.float64)
    values = ELL[ell](t)
    assert (values.diff() <= 0).all() and (values.diff().diff() >= -1e-12).all()
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ELL[ell](zero).backward()
    assert zero.grad < 0
    rising = 1 + t  # control: no ell
    assert not (rising.diff() <= 0).all()


def test_loss_is_log2_when_policy_is_opponent():
    same = torch.randn(5)
    log2 = torch.full((5,), math.log(2))
    assert torch.allclose(spin_loss(same, same - 1, same, same - 1), log2)
    assert not torch.allclose(spin_loss(same, same - 1, same, same), log2)  # control


def test_the_logistic_loss_is_stable_for_margins_of_10000():
    big = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    losses = spin_loss(big, zero, zero, zero, lam=1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4] and big.grad.tolist() == [0.0, -1.0]


def test_bf16_log_probs_are_computed_in_fp32_and_float64_stays():
    four = (FOUR * 100).bfloat16()
    losses = spin_loss(*four)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, spin_loss(*four.float()))
    # control: what must not be done
    in_bf16, in_fp32 = (0.1 * (x[0] - x[2]) - 0.1 * (x[1] - x[3]) for x in (four, four.float()))
    assert (in_bf16.float() - in_fp32).abs().max() > 0.01
    assert spin_loss(*FOUR).dtype == sft_loss(FOUR[0]).dtype == torch.float64


def test_sft_loss_is_the_negative_sum_of_log_probs():
    assert sft_loss(torch.tensor([-3.0, -0.5])).tolist() == [3.0, 0.5]


def test_token_logps_are_log_softmax_at_the_labels_in_fp32():
    def by_log_softmax(logits):
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    logits = torch.randn(2, 5, 7) * 4
    labels = torch.randint(7, (2, 5))
    wanted = by_log_softmax(logits.double())
    got = token_logps(logits, labels)
    assert got.shape == (2, 5) and got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, atol=1e-6)
    rounded = logits.bfloat16()
    wanted = by_log_softmax(rounded.double())
    assert (token_logps(rounded, labels) - wanted).abs().max() < 1e-5
    careless = by_log_softmax(rounded)  # control: log-softmax in bf16
    assert (careless - wanted).abs().max() > 1e-3


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
    return [encode(make_codec(tokenizer, "paper"), {"prompt": x}, y) for x, y in answers.items()]


@torch.no_grad()
def test_sequence_logps_is_a_sum_over_response_tokens_shifted_by_one_whatever_shares_the_row(
    model, sequences
):
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


def test_the_first_gradient_of_spin_is_half_lambda_times_sfts_less_the_score_of_the_generated(
    model, sequences
):
    """At θ = θ_t, ∇L = −λ/2 (∇log p(y|x) − ∇log p(y'|x)) for the logistic ℓ."""

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    real, generated = (sequence_logps(model, **pack([s], "cpu")) for s in sequences[:2])
    got = gradient(spin_loss(real, generated, real.detach(), generated.detach(), lam=0.3).sum())
    real, generated = (sequence_logps(model, **pack([s], "cpu")) for s in sequences[:2])
    wanted = -0.15 * gradient(real.sum()) + 0.15 * gradient(generated.sum())
    assert torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max())


def test_the_gradient_takes_the_place_of_the_logits_and_what_still_needs_them_is_refused():
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8), torch.randn(8, 30, requires_grad=True)
    labels = torch.randint(30, (5,))
    grads = []
    for in_place in (False, True):
        logits = hidden @ head
        before = logits.detach().clone()
        loss = -loss_module._TokenLogps.apply(logits, labels, in_place).sum()
        grads += torch.autograd.grad(loss, head, retain_graph=True)
        assert torch.equal(logits, before)  # as long as the graph is kept
        grads += torch.autograd.grad(loss, head)
        assert torch.equal(logits, before) is not in_place
    assert all(torch.equal(grads[0], other) for other in grads[1:])
    logits = hidden @ head
    square = (logits**2).sum()
    both = square + loss_module._TokenLogps.apply(logits, labels, True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()
