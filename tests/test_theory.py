"""The paper's theorems in the exact world of demo/theory.py, to 1e-6 in float64.

The loss is that of loss.py, which trains models.
"""

import itertools
import math
import sys

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / "demo"))
from theory import (
    ELL_SLOPE,
    RESPONSES,
    best_response,
    expected_loss,
    expected_sft_loss,
    few_steps,
    gradient,
    gradient_error,
    gradient_noise,
    greedy,
    kl,
    random_table,
    scores,
    tabulate,
    theorem_5_4,
    to_the_optimum,
    transformer,
)

from loss import ELL, spin_loss

DATA = random_table(1)
START = random_table(2)
LAMBDAS = (0.5, 1.0, 2.0, 5.0)


def close(a, b, tolerance=1e-6) -> bool:
    return abs(float(a) - float(b)) < tolerance


def apart(table, other) -> float:
    """The largest difference of a probability in two tables of log p(y|x)."""
    return (table.exp() - other.exp()).abs().max().item()


@pytest.fixture(scope="module")
def model():
    return transformer(0)


def test_the_world_is_exact_the_responses_are_all_there_are_and_their_probabilities_add_up_to_one(
    model,
):
    assert len(RESPONSES) == len(set(RESPONSES)) == 1 + 3 + 9 + 27
    for table in (DATA, START, tabulate(model)):
        assert table.dtype == torch.float64
        assert (table.exp().sum(-1) - 1).abs().max() < 1e-12


# ---- 1: Theorem 5.2 ----


@pytest.mark.parametrize("ell", ELL)
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_if_the_opponent_is_the_data_the_gradient_vanishes_and_nothing_is_below_ell_of_0(ell, lam):
    def loss_and_slope(opponent):
        logits = opponent.clone().requires_grad_()
        loss = expected_loss(logits.log_softmax(-1), opponent, DATA, lam, ell)
        return loss.item(), torch.autograd.grad(loss, logits)[0].abs().max().item()

    loss, slope = loss_and_slope(DATA)
    assert close(loss, ELL[ell](torch.zeros(()))) and slope < 1e-12
    # L is convex in the logits, so a zero gradient is the global minimum; probed all the same
    for seed in range(20):
        policy = (DATA + 0.3 * random_table(seed)).log_softmax(-1)
        assert expected_loss(policy, DATA, DATA, lam, ell) > loss - 1e-12
    assert loss_and_slope(START)[1] > 1e-3  # control: another opponent


@pytest.mark.parametrize("ell", ELL)
def test_if_the_opponent_is_not_the_data_the_slope_is_ells_times_both_kls_and_some_lambda_gains(
    ell,
):
    def g(lam):  # g(λ) of the proof: the policy is p_data
        return expected_loss(DATA, START, DATA, lam, ell)

    slope = (g(1e-5) - g(-1e-5)) / 2e-5
    both = kl(DATA, START) + kl(START, DATA)
    assert close(slope, ELL_SLOPE[ell] * both) and slope < 0
    assert not close(slope, ELL_SLOPE[ell] * kl(DATA, START), 1e-2)  # control: one KL alone
    assert g(0.1) < g(0.0) - 1e-3 and close(g(0.0), ELL[ell](torch.zeros(())))
    # control: no slope at p_θt = p_data
    assert close(expected_loss(DATA, DATA, DATA, 1e-5, ell) - g(0.0), 0)


# ---- 2: Theorem 5.4 ----


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_exact_minimiser_is_the_opponent_times_the_ratio_to_the_power_one_over_lambda(
    lam,
):
    found = best_response(START, DATA, lam)
    assert apart(found, theorem_5_4(START, DATA, lam)) < 1e-6
    assert apart(found, theorem_5_4(START, DATA, 1.1 * lam)) > 1e-4  # control: a wrong λ
    # control: not normalised (with λ = 1 there is nothing to do)
    unnormalised = START + (DATA - START) / lam
    assert lam == 1 or apart(found, unnormalised) > 1e-4


def test_with_lambda_1_one_exact_iteration_lands_on_the_data():
    assert apart(best_response(START, DATA, 1.0), DATA) < 1e-6
    # control: another ℓ
    assert apart(best_response(START, DATA, 1.0, ell="exponential"), DATA) > 1e-3


# ---- 3: Lemma C.2 ----


def jensen_shannon() -> torch.Tensor:
    """JSD(p+ ‖ p−) of Lemma C.2, with p+ = q p_data(y) p_θt(y') and p− the two swapped."""
    plus = DATA.exp()[:, :, None] * START.exp()[:, None, :] / len(DATA)
    minus = plus.transpose(1, 2)
    middle = (plus + minus) / 2
    divergences = [(p * (p / middle).log()).sum() for p in (plus, minus)]
    return sum(divergences) / 2


def free(f) -> torch.Tensor:
    """E ℓ(f(x, y) − f(x, y')): spin_loss with any f in the place of λ log p_θ/p_θt."""
    return expected_loss(f, torch.zeros_like(f), DATA, 1.0, generated=START)


def test_the_minimum_over_free_f_is_log_2_minus_jsd_reached_at_the_log_ratio_plus_any_z_of_x():
    floor = math.log(2) - jensen_shannon()
    best = DATA - START
    z = torch.tensor([[3.0], [-2.0], [0.5], [7.0]], dtype=torch.float64)
    assert close(free(best), floor) and close(free(best + z), floor)
    for seed in range(20):
        assert free(best + 0.1 * random_table(seed)) > floor + 1e-5
    # controls: a shift that depends on y, another sign, another scale
    assert not close(free(best + 3.0 * torch.arange(40)), floor)
    assert not close(free(START - DATA), floor)
    assert not close(free(0.9 * best), floor, 1e-5)


# ---- 4: Eq. (4.4) and (4.6) ----


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_ideal_opponent_is_the_opponent_times_exp_of_f_over_lambda_and_the_trained_policy(
    lam,
):
    def objective(p, f):  # Eq. (4.3)
        return (p.exp() * f).sum(-1).mean() - lam * kl(p, START)

    trained = best_response(START, DATA, lam)
    f = lam * (trained - START)  # Eq. (4.6)
    ideal = (START + f / lam).log_softmax(-1)  # Eq. (4.4)
    assert apart(ideal, trained) < 1e-6
    # f is known up to Z(x) only (Lemma C.2), and that is enough
    shifted = (START + (f + 5.0) / lam).log_softmax(-1)
    assert apart(shifted, trained) < 1e-6
    for g in (f, random_table(9)):
        best = (START + g / lam).log_softmax(-1)
        logits = best.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1), g), logits)
        assert slope.abs().max() < 1e-12
        for seed in range(10):
            other = (best + 0.2 * random_table(seed)).log_softmax(-1)
            assert objective(other, g) < objective(best, g)
    # control: λ for 1/λ, which is the same thing for λ = 1 only
    wrong = (START + f * lam).log_softmax(-1)
    assert lam == 1 or apart(wrong, trained) > 1e-3


# ---- 5: the first step ----


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_the_first_expected_spin_gradient_is_lambda_half_times_sfts_if_y_is_sampled_exactly(
    model, lam
):
    table = tabulate(model).detach()
    before = tabulate(transformer(1)).detach()
    half_before = (table.exp() / 2 + before.exp() / 2).log()
    assert gradient_error(model, DATA, lam, table) < 1e-6
    # controls: greedy y', temperature 1/2, y' of θ_{t−1}
    assert gradient_error(model, DATA, lam, greedy(table)) > 0.1
    assert gradient_error(model, DATA, lam, (2 * table).log_softmax(-1)) > 0.1
    stale = gradient_error(model, DATA, lam, before)
    assert stale > 0.1
    # iterations t ≥ 1 mix the two, and half of the error stays
    assert close(gradient_error(model, DATA, lam, half_before), stale / 2)
    # control: not λ, but λ/2
    policy = tabulate(model)
    spin = gradient(expected_loss(policy, policy.detach(), DATA, lam), model)
    sft = gradient(expected_sft_loss(tabulate(model), DATA), model)
    assert (spin - lam * sft).norm() > 0.1 * spin.norm()


def test_responses_cut_at_the_limit_do_no_harm_as_long_as_no_eos_is_added(model):
    """A third of the 40 responses' mass is cut off here.

    Turning each into its first two letters and an EOS breaks the identity."""
    table = tabulate(model).detach()
    cut = [i for i, y in enumerate(RESPONSES) if y[-1] != 3]
    assert table.exp()[:, cut].sum(-1).min() > 0.05
    ended = table.exp().clone()
    for i in cut:
        ended[:, RESPONSES.index((*RESPONSES[i][:2], 3))] += ended[:, i]
    ended[:, cut] = 1e-300
    assert gradient_error(model, DATA, 0.1, ended.log()) > 0.1


def gradients_of_pairs(model, few, lam) -> torch.Tensor:
    """∇spin_loss by autograd, for each prompt and pair of the few responses. (N, P)"""
    gradients = []
    for policy in tabulate(model)[:, few]:
        frozen = policy.detach()
        losses = spin_loss(policy[:, None], policy[None], frozen[:, None], frozen[None], lam)
        gradients += [gradient(loss, model) for loss in losses.flatten()]
    return torch.stack(gradients)


@pytest.mark.long
def test_the_generated_response_adds_noise_of_lambda_squared_over_4_that_falls_with_the_batch(
    model,
):
    lam = 0.7
    s = scores(model).detach()
    table = tabulate(model).detach()
    # the mean score is zero: no bias, only noise
    assert torch.einsum("xy,xyp->xp", table.exp(), s).abs().max() < 1e-6
    sft, spin = gradient_noise(model, DATA, lam)

    # the oracle: all pairs of eight responses a prompt, renormalised
    few = torch.arange(0, 40, 5)
    p = DATA[:, few].log_softmax(-1).exp()
    q = table[:, few].log_softmax(-1).exp()
    weights = (p[:, :, None] * q[:, None, :] / 4).flatten()
    g = gradients_of_pairs(model, few, lam)
    # a pair's gradient is what gradient_noise takes it to be
    by_scores = -lam / 2 * (s[:, few][:, :, None] - s[:, few][:, None, :]).flatten(0, 2)
    assert (g - by_scores).abs().max() < 1e-6

    # a batch of two, over all pairs of pairs
    deviation = g - weights @ g
    gram = deviation @ deviation.T
    square = gram.diagonal()
    one = weights @ square
    weights_of_two = weights[:, None] * weights[None, :]
    two = (weights_of_two * (square[:, None] + square[None, :] + 2 * gram)).sum() / 4
    assert close(two, one / 2)
    assert not close(two, one, 1e-3)

    added = lam**2 / 4 * (table.exp() * (s**2).sum(-1)).sum() / 4
    assert close(spin - sft, added) and added > 0
    assert close(gradient_noise(model, DATA, lam, 64)[1], spin / 64)


# ---- 6: whole iterations ----


def test_trained_to_the_optimum_the_log_ratio_to_the_data_shrinks_by_1_minus_1_over_lambda():
    """From Theorem 5.4.

    λ > 1/2 converges, λ = 1 at once; λ < 1 overshoots, λ = 1/2 swings for ever, less diverges."""

    def centre(d):  # the normaliser is a constant per prompt
        return d - d.mean(-1, keepdim=True)

    for lam in (0.5, 0.7, 2.0, 5.0):
        after = centre(best_response(START, DATA, lam) - DATA)
        assert (after - (1 - 1 / lam) * centre(START - DATA)).abs().max() < 1e-6
        assert (after - (1 + 1 / lam) * centre(START - DATA)).abs().max() > 0.1  # control
    lambdas = (0.1, 0.4, 0.5, 0.7, 1.0, 2.0, 5.0)
    curves = {lam: to_the_optimum(START, DATA, lam, 3) for lam in lambdas}
    # the curves are those of minimising, where float64 lets one
    for lam, times in ((0.1, 1), (0.4, 2), (0.7, 3), (2.0, 3)):
        minimised = to_the_optimum(START, DATA, lam, times, best_response)
        assert minimised == pytest.approx(curves[lam][: times + 1], rel=1e-6)
    assert close(curves[1.0][1], 0)
    for lam in (0.7, 2.0, 5.0):
        assert all(a > b for a, b in itertools.pairwise(curves[lam]))
    assert close(curves[0.5][2], curves[0.5][0]) and close(curves[0.5][3], curves[0.5][1])
    assert all(a < b for a, b in itertools.pairwise(curves[0.1]))
    assert curves[0.4][3] > curves[0.4][0]


def test_in_few_steps_a_small_lambda_overshoots_a_large_one_crawls_and_sft_is_ahead():
    small, middle, large, sft = (few_steps(0, DATA, lam) for lam in (0.1, 1.0, 5.0, None))
    assert small[-1] > small[0] and all(a > b for a, b in itertools.pairwise(large))
    assert sft[-1] < middle[-1] < large[-1] < large[0]


# ---- 7: every ℓ ----


@pytest.mark.parametrize("ell", ELL)
def test_every_ell_is_convex_decreasing_and_has_the_slope_at_0_that_differences_give(
    ell,
):
    t = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ELL[ell](t).sum(), t)
    assert (slope <= 0).all() and (slope.diff() >= -1e-9).all()
    smooth = (t.detach() - 1).abs() > 1e-3  # the hinge has a corner at 1
    differences = (ELL[ell](t.detach() + 1e-6) - ELL[ell](t.detach() - 1e-6)) / 2e-6
    assert (slope - differences)[smooth].abs().max() < 1e-6
    assert close(slope[300], ELL_SLOPE[ell]) and t[300].abs() < 1e-12
    # control: turned around, it rises
    assert not (slope.diff() <= -1e-9).any() and (ELL[ell](-t.detach()).diff() >= 0).all()


@pytest.mark.parametrize("ell", ELL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_ell_is_finite_for_margins_of_10000_but_the_exponential_which_overflows_at_88(
    ell, dtype
):
    zero = torch.zeros(2, dtype=dtype)
    real = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    losses = spin_loss(real, zero, zero, zero, lam=1.0, ell=ell)
    losses.sum().backward()
    fine = losses.isfinite() & real.grad.isfinite()
    assert losses.dtype == torch.float32 and fine.tolist() == [True, ell != "exponential"]
    # where it overflows in fp32, as loss.py says
    edge = ELL["exponential"](torch.tensor([-88.7, -88.8]))
    assert edge.isfinite().tolist() == [True, False]
