"""The paper's theorems in the exact world of demo/theory.py, to 1e-6 in float64.

The loss is that of loss.py, which trains models.
"""

import functools
import itertools
import math

import pytest
import torch
from theory import (
    HALF_CARELESS,
    QUARTER_CARELESS,
    QUARTER_WRONG,
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
    log_probs,
    noisy,
    product_form,
    random_table,
    scores,
    share_right,
    shares_right,
    slope_at_0,
    table_of,
    tabulate,
    theorem_5_4,
    to_the_optimum,
    transformer,
)

from loss import ELL, spin_loss, unmet_assumptions

DATA = random_table(1)
START = random_table(2)
LAMBDAS = (0.5, 1.0, 2.0, 5.0)
exact = functools.cache(best_response)  # Newton's method takes half a second
MEET_5_1 = [ell for ell in ELL if not unmet_assumptions(ell)]  # the theorems are about these


def close(a, b, tolerance=1e-6) -> bool:
    return abs(float(a) - float(b)) < tolerance


def apart(table, other) -> float:
    """The largest difference of a probability in two tables of log p(y|x)."""
    return (table.exp() - other.exp()).abs().max().item()


@pytest.fixture(scope="module")
def model():
    return transformer(0)


def test_the_world_is_exact_the_probabilities_of_all_responses_add_up_to_one(model):
    assert len(RESPONSES) == len(set(RESPONSES)) == 1 + 3 + 9 + 27
    for table in (DATA, START, tabulate(model)):
        assert table.dtype == torch.float64
        assert (table.exp().sum(-1) - 1).abs().max() < 1e-12


# ---- 1: Theorem 5.2 ----


@pytest.mark.parametrize("ell", MEET_5_1)
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


@pytest.mark.parametrize("ell", MEET_5_1)
def test_if_the_opponent_is_not_the_data_the_slope_is_ells_times_both_kls(ell):
    def g(lam):  # g(λ) of the proof: the policy is p_data
        return expected_loss(DATA, START, DATA, lam, ell)

    slope = (g(1e-5) - g(-1e-5)) / 2e-5
    both = kl(DATA, START) + kl(START, DATA)
    assert close(slope, slope_at_0(ell) * both) and slope < 0
    assert not close(slope, slope_at_0(ell) * kl(DATA, START), 1e-2)  # control: one KL alone
    assert g(0.1) < g(0.0) - 1e-3 and close(g(0.0), ELL[ell](torch.zeros(())))
    # control: no slope at p_θt = p_data
    assert close(expected_loss(DATA, DATA, DATA, 1e-5, ell) - g(0.0), 0)


# ---- 2: Theorem 5.4 ----


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_exact_minimiser_is_the_opponent_times_the_ratio_to_the_power_one_over_lambda(lam):
    found = exact(START, DATA, lam)
    assert apart(found, theorem_5_4(START, DATA, lam)) < 1e-6
    # controls: a wrong λ; not normalised (with λ = 1 there is nothing to do)
    assert apart(found, theorem_5_4(START, DATA, 1.1 * lam)) > 1e-4
    assert lam == 1 or apart(found, START + (DATA - START) / lam) > 1e-4


def test_with_lambda_1_one_exact_iteration_lands_on_the_data():
    assert apart(exact(START, DATA, 1.0), DATA) < 1e-6
    # control: another ℓ
    assert apart(exact(START, DATA, 1.0, ell="exponential"), DATA) > 1e-3


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
def test_the_ideal_opponent_is_the_opponent_times_exp_of_f_over_lambda(lam):
    def objective(p, f):  # Eq. (4.3)
        return (p.exp() * f).sum(-1).mean() - lam * kl(p, START)

    trained = exact(START, DATA, lam)
    f = lam * (trained - START)  # Eq. (4.6)
    # f is known up to Z(x) only (Lemma C.2), and that is enough
    for shift in (0.0, 5.0):
        ideal = (START + (f + shift) / lam).log_softmax(-1)  # Eq. (4.4)
        assert apart(ideal, trained) < 1e-6
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
def test_the_first_expected_spin_gradient_is_lambda_half_times_sfts(model, lam):
    table = tabulate(model).detach()
    before = tabulate(transformer(1)).detach()
    half_before = (table.exp() / 2 + before.exp() / 2).log()
    assert gradient_error(model, DATA, lam, table) < 1e-6
    # controls: greedy y', temperature 1/2, y' of θ_{t−1}
    assert gradient_error(model, DATA, lam, greedy(table)) > 0.1
    assert gradient_error(model, DATA, lam, (2 * table).log_softmax(-1)) > 0.1
    stale = gradient_error(model, DATA, lam, before)
    assert stale > 0.1
    # rounding of another engine: the error is proportional to it, and small
    small, large = (gradient_error(model, DATA, lam, noisy(table, x, 0)) for x in (1e-3, 2e-3))
    assert 0 < small < 1e-3 and large == pytest.approx(2 * small, rel=0.01)
    # iterations t ≥ 1 mix the two, and half of the error stays
    assert close(gradient_error(model, DATA, lam, half_before), stale / 2)
    # control: not λ, but λ/2
    policy = tabulate(model)
    spin = gradient(expected_loss(policy, policy.detach(), DATA, lam), model)
    sft = gradient(expected_sft_loss(tabulate(model), DATA), model)
    assert (spin - lam * sft).norm() > 0.1 * spin.norm()


def gradients_of_pairs(model, few, lam) -> torch.Tensor:
    """∇spin_loss by autograd, for each prompt and pair of the few responses. (N, P)"""
    gradients = []
    for x, real, generated in itertools.product(range(4), few, few):
        policy = log_probs(model, [(x, RESPONSES[real]), (x, RESPONSES[generated])])
        gradients.append(gradient(spin_loss(*policy, *policy.detach(), lam), model))
    return torch.stack(gradients)


@pytest.mark.long
def test_the_generated_response_adds_noise_that_falls_with_the_batch(model):
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

    for lam in (0.5, 2.0, 5.0):
        after = centre(exact(START, DATA, lam) - DATA)
        assert (after - (1 - 1 / lam) * centre(START - DATA)).abs().max() < 1e-6
        assert (after - (1 + 1 / lam) * centre(START - DATA)).abs().max() > 0.1  # control
    curves = {lam: to_the_optimum(START, DATA, lam, 3) for lam in (0.1, 0.4, *LAMBDAS)}
    # the curves are those of minimising, where float64 lets one
    for lam, times in ((0.1, 1), (0.5, 2), (2.0, 2)):
        minimised = to_the_optimum(START, DATA, lam, times, exact)
        assert minimised == pytest.approx(curves[lam][: times + 1], rel=1e-6)
    assert close(curves[1.0][1], 0)
    for lam in (2.0, 5.0):
        assert all(a > b for a, b in itertools.pairwise(curves[lam]))
    assert close(curves[0.5][2], curves[0.5][0]) and close(curves[0.5][3], curves[0.5][1])
    assert all(a < b for a, b in itertools.pairwise(curves[0.1]))
    assert curves[0.4][3] > curves[0.4][0]


def test_in_few_steps_a_small_lambda_overshoots_a_large_one_crawls_and_sft_is_ahead():
    small, middle, large, sft = (few_steps(0, DATA, lam, 2) for lam in (0.1, 1.0, 5.0, None))
    assert small[-1] > small[0] and all(a > b for a, b in itertools.pairwise(large))
    assert sft[-1] < middle[-1] < large[-1] < large[0]


# ---- 7: the product form, and data with mistakes ----


def product(start, data, a) -> torch.Tensor:
    """p_θ0^a p_data^(1−a) by powers of probabilities, normalised by a division; as logs. (X, Y)"""
    powers = start.exp() ** a * data.exp() ** (1 - a)
    return (powers / powers.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("lam", [0.7, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("start, data", [(START, DATA), (HALF_CARELESS, QUARTER_WRONG)])
def test_t_exact_iterations_are_the_product_of_p_0_and_p_data_to_powers(start, data, lam):
    policy, a = start, 1.0
    for t in range(1, 7):
        policy, a = theorem_5_4(policy, data, lam), a * (1 - 1 / lam)
        assert apart(policy, product(start, data, a)) < 1e-6
        assert apart(policy, product_form(start, data, lam, t)) < 1e-6
    # controls: wrong exponents (with λ = 1 all that vanish at t = 6 are right)
    wrong = [exponent for exponent in (1 - 6 / lam, (1 - 1 / lam) ** 5) if exponent != a]
    assert wrong and min(apart(policy, product(start, data, w)) for w in wrong) > 1e-3


def test_iterations_that_minimise_the_loss_follow_the_path_and_pass_the_data():
    policy = HALF_CARELESS
    for t in range(1, 4):
        policy = best_response(policy, QUARTER_WRONG, 5.0)
        assert apart(policy, product(HALF_CARELESS, QUARTER_WRONG, 0.8**t)) < 1e-6
        # controls: the opponent of the iteration before, another λ
        assert apart(policy, product(HALF_CARELESS, QUARTER_WRONG, 0.8 ** (t - 1))) > 1e-4
        assert apart(policy, product(HALF_CARELESS, QUARTER_WRONG, 0.75**t)) > 1e-4
    assert share_right(policy) > share_right(QUARTER_WRONG) + 0.05


def test_the_share_of_right_answers_rises_above_both_ends_and_comes_back_to_the_datas():
    ends = 0.5 / (1 + 38e-6), 0.75 / (1 + 1e-9)
    for lam in (2.0, 5.0, 20.0):
        shares = shares_right(HALF_CARELESS, QUARTER_WRONG, lam, 1000)
        for t in range(13):  # the oracle: three kinds of answers, without logarithms
            a = (1 - 1 / lam) ** t
            right, careless, wrong = (
                p**a * q ** (1 - a) for p, q in ((0.5, 0.75), (0.5, 1e-9), (1e-6, 0.25 / 38))
            )
            assert close(shares[t], right / (right + careless + 38 * wrong))
        assert close(shares[0], ends[0]) and close(shares[-1], ends[1])
        best = shares.index(max(shares))
        assert shares[best] > 0.99
        assert all(a <= b for a, b in itertools.pairwise(shares[: best + 1]))
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(shares[best:]))
    # λ = 1 is there at once
    once = shares_right(HALF_CARELESS, QUARTER_WRONG, 1.0)
    assert all(close(share, ends[1]) for share in once[1:])
    # control: a mixture that adds the two, as training on both sets would, passes neither
    mixed = ((HALF_CARELESS.exp() + QUARTER_WRONG.exp()) / 2).log()
    assert ends[0] < share_right(mixed) < ends[1]


def test_the_optimum_of_sft_is_the_data_itself_mistakes_included():
    def slope(table):
        logits = table.clone().requires_grad_()
        loss = expected_sft_loss(logits.log_softmax(-1), QUARTER_WRONG)  # convex in the logits
        return torch.autograd.grad(loss, logits)[0].abs().max()

    assert slope(QUARTER_WRONG) < 1e-12
    right_only = table_of(1.0, 1e-9, 1e-9)
    assert slope(HALF_CARELESS) > 1e-3 and slope(right_only) > 1e-3  # controls


def test_a_lower_temperature_vetoes_scattered_mistakes_too_but_not_a_habit():
    cooled = share_right((QUARTER_WRONG / 0.5).log_softmax(-1))
    assert close(cooled, 0.75**2 / (0.75**2 + 38 * (0.25 / 38) ** 2)) and cooled > 0.99
    # of the model's own habit it knows nothing
    assert close(share_right((HALF_CARELESS / 0.5).log_softmax(-1)), 0.5)


def test_a_habit_that_model_and_data_share_is_vetoed_by_neither():
    right = share_right(QUARTER_CARELESS)
    for lam in (1.0, 2.0, 5.0, 20.0):
        shares = shares_right(HALF_CARELESS, QUARTER_CARELESS, lam)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))
        assert max(shares) < right + 1e-6
        last = product_form(HALF_CARELESS, QUARTER_CARELESS, lam, 12)
        assert last[:, -1].exp().min() > 0.25 - 1e-4
    # control: one that is the model's alone goes
    assert product_form(HALF_CARELESS, QUARTER_WRONG, 5.0, 3)[:, -1].exp().max() < 1e-3
    assert max(shares_right(HALF_CARELESS, QUARTER_WRONG, 5.0)) > right + 0.2


def test_a_probability_of_0_is_a_veto_for_ever():
    never_wrong = table_of(0.5, 0.5, 0)
    assert share_right(product_form(never_wrong, QUARTER_WRONG, 5.0, 100)) > 1 - 1e-6
    never_right = table_of(0, 1, 1e-6)
    assert max(shares_right(never_right, QUARTER_WRONG, 5.0)) == 0
    # control: with some mass on all, the path ends at the data
    hardly_right = table_of(1e-6, 1, 1e-6)
    for start in (HALF_CARELESS, hardly_right):
        assert close(share_right(product_form(start, QUARTER_WRONG, 5.0, 100)), 0.75)


def test_with_lambda_below_1_an_iteration_goes_past_the_data_to_what_the_model_finds_implausible():
    for lam in (0.5, 0.9):
        past = best_response(HALF_CARELESS, QUARTER_WRONG, lam)
        assert apart(past, product_form(HALF_CARELESS, QUARTER_WRONG, lam, 1)) < 1e-6
        assert past[0, 1] > QUARTER_WRONG[0, 1] > HALF_CARELESS[0, 1]  # wrong
        assert past[0, -1] < QUARTER_WRONG[0, -1] < HALF_CARELESS[0, -1]  # careless
        assert share_right(past) < share_right(QUARTER_WRONG) - 0.1
        # control: λ > 1 stays between
        short = product_form(HALF_CARELESS, QUARTER_WRONG, 1 / lam, 1)
        assert QUARTER_WRONG[0, 1] > short[0, 1] > HALF_CARELESS[0, 1]
        assert QUARTER_WRONG[0, -1] < short[0, -1] < HALF_CARELESS[0, -1]
