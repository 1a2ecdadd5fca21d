"""The theory of SPIN, checked by running it: a world so small that expectations are finite sums.

    python demo/theory.py          prints the figures, and draws theory_optimum.svg,
                                   theory_steps.svg and theory_mistakes.svg beside this file

Four prompts, three letters and an EOS, and all 40 responses of up to three tokens (those of three
letters are cut off and have no EOS, so the probabilities of the 40 add up to one). Distributions
are tables of log p(y|x), (X, Y); a policy is a table of logits, or a one-layer transformer over the
same space. The loss is the spin_loss of loss.py, averaged over all (x, y, y') with their
probabilities instead of samples. float64 throughout. tests/test_theory.py asserts what is printed.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loss import ELL, sequence_logps, sft_loss, spin_loss
from spin.model.packing import pack, packed
from spin.report.pictures import STYLES, Line, draw_lines

HERE = Path(__file__).resolve().parent
PROMPTS = 4  # prompt x is the tokens (EOS, x)
LETTERS = 3  # the tokens 0 to 2
EOS = 3
LONGEST = 3  # letters of a response
RESPONSES = [
    letters + (EOS,) * (n < LONGEST)
    for n in range(LONGEST + 1)
    for letters in itertools.product(range(LETTERS), repeat=n)
]


def slope_at_0(ell: str) -> float:
    """ℓ'(0) of a loss of loss.py."""
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(ELL[ell](zero), zero)[0].item()


def random_table(seed: int, scale: float = 1.0) -> torch.Tensor:
    """A random distribution over the responses to each prompt, as log p(y|x). (X, Y)"""
    logits = torch.randn(
        PROMPTS, len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return (scale * logits).log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """E_x KL(p(·|x) ‖ q(·|x)) of two tables of log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1).mean()


def expected_loss(policy, opponent, data, lam, ell="logistic", generated=None) -> torch.Tensor:
    """L_SPIN(θ, θ_t) of Eq. (4.7) as a finite sum. Tables (X, Y) of log-probabilities.

    y' comes from `generated`, or from the opponent where that is None.
    """
    generated = opponent if generated is None else generated
    # q(x) p_data(y|x) p_θt(y'|x), (X, Y, Y')
    weight = data.exp()[:, :, None] * generated.exp()[:, None, :] / PROMPTS
    losses = spin_loss(
        policy[:, :, None], policy[:, None, :], opponent[:, :, None], opponent[:, None, :], lam, ell
    )
    return (weight * losses).sum()


def expected_sft_loss(policy, data) -> torch.Tensor:
    """L_SFT(θ) of Eq. (3.1) as a finite sum."""
    return (data.exp() * sft_loss(policy)).sum() / PROMPTS


def best_response(opponent, data, lam, ell="logistic", steps=40) -> torch.Tensor:
    """θ_{t+1} = argmin_θ L_SPIN(θ, θ_t) over all tables, from θ_t. (X, Y)

    By Newton's method, as L_SPIN is convex in the logits.
    """

    def loss(flat):
        policy = flat.view_as(opponent).log_softmax(-1)
        return expected_loss(policy, opponent, data, lam, ell)

    logits = opponent.clone()
    for _ in range(steps):
        flat = logits.flatten().requires_grad_()
        (slope,) = torch.autograd.grad(loss(flat), flat)
        # The curvature is singular, a constant per prompt being free: hence the pseudo-inverse.
        curvature = torch.autograd.functional.hessian(loss, flat.detach(), vectorize=True)
        move = torch.linalg.pinv(curvature, rcond=1e-13, hermitian=True) @ slope
        # Far from the optimum a whole Newton step overshoots.
        size = 1.0
        while loss(flat - size * move) > loss(flat) and size > 1e-9:
            size /= 2
        logits = (flat - size * move).detach().view_as(opponent)
        if slope.abs().max() < 1e-15:
            break
    return logits.log_softmax(-1)


def theorem_5_4(opponent, data, lam) -> torch.Tensor:
    """p_θt(y|x) (p_data(y|x) / p_θt(y|x))^(1/λ), normalised: where the logistic ℓ lands. (X, Y)"""
    return (opponent + (data - opponent) / lam).log_softmax(-1)


# ---- a one-layer transformer over the same space -------------------------------------------------


def transformer(seed: int) -> GPT2LMHeadModel:
    """About 3,500 random parameters in float64."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=LETTERS + 1,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=LONGEST + 2,
        initializer_range=0.3,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).double().eval()


def log_probs(model, answers) -> torch.Tensor:
    """log p_θ(y|x) of pairs (x, y), by sequence_logps of loss.py. (N,)"""
    rows = [((EOS, x, *y), (0, 0, *(1 for _ in y))) for x, y in answers]
    with packed(model):
        return sequence_logps(model, **pack(rows, "cpu"))


def tabulate(model) -> torch.Tensor:
    """log p_θ(y|x) of every prompt and response. (X, Y)"""
    return log_probs(model, itertools.product(range(PROMPTS), RESPONSES)).view(PROMPTS, -1)


def gradient(loss, model) -> torch.Tensor:
    """The gradient of a scalar with respect to all of the model's parameters, flat. (P,)"""
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def scores(model) -> torch.Tensor:
    """∇log p_θ(y|x) of every prompt and response. (X, Y, P)"""
    pairs = itertools.product(range(PROMPTS), RESPONSES)
    rows = [gradient(log_probs(model, [pair]).sum(), model) for pair in pairs]
    return torch.stack(rows).view(PROMPTS, len(RESPONSES), -1)


# ---- whole iterations ----------------------------------------------------------------------------


def to_the_optimum(start, data, lam, iterations: int = 4, minimiser=theorem_5_4) -> list[float]:
    """KL(p_data ‖ p_θt) in nats for t = 0 … iterations, each trained to the optimum of all tables.

    By Theorem 5.4, since λ = 0.1 leads to probabilities that float64 cannot hold; best_response
    finds the same by minimising.
    """
    policy = start
    distances = [kl(data, start).item()]
    for _ in range(iterations):
        policy = minimiser(policy, data, lam)
        distances.append(kl(data, policy).item())
    return distances


def few_steps(
    seed: int, data, lam=None, iterations: int = 4, steps: int = 20, rate: float = 1e-3
) -> list[float]:
    """The same for the transformer and `steps` steps of RMSProp on the exact loss.

    lam None is continued SFT.
    """
    model = transformer(seed)
    distances = []
    for _ in range(iterations):
        optimizer = torch.optim.RMSprop(model.parameters(), lr=rate)
        opponent = tabulate(model).detach()
        distances.append(kl(data, opponent).item())
        for _ in range(steps):
            policy = tabulate(model)
            if lam is None:
                loss = expected_sft_loss(policy, data)
            else:
                loss = expected_loss(policy, opponent, data, lam)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [*distances, kl(data, tabulate(model)).item()]


def gradient_error(model, data, lam, generated) -> float:
    """‖g_SPIN − λ/2 g_SFT‖ / ‖λ/2 g_SFT‖ at θ = θ_t, for y' ~ generated (a table).

    0 where SPIN's first step is SFT's.
    """
    policy = tabulate(model)
    spin = gradient(expected_loss(policy, policy.detach(), data, lam, generated=generated), model)
    sft = lam / 2 * gradient(expected_sft_loss(tabulate(model), data), model)
    return ((spin - sft).norm() / sft.norm()).item()


def greedy(table) -> torch.Tensor:
    """All probability on the likeliest response to each prompt."""
    return torch.nn.functional.one_hot(table.argmax(-1), len(RESPONSES)).double().log()


def noisy(table, nats: float, seed: int) -> torch.Tensor:
    """log p with normal noise of this standard deviation, as rounding brings, normalised again."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(table.shape, generator=chance, dtype=table.dtype)
    return (table + nats * noise).log_softmax(-1)


def gradient_noise(model, data, lam, batch: int = 1) -> tuple[float, float]:
    """E‖g − E g‖² of a minibatch gradient at θ = θ_t: of λ/2 times SFT, and of SPIN with y' ~ p_θt.

    A pair's gradient is −λ/2 (s_y − s_y'), with s = ∇log p_θ; s_y' has mean zero, so y' adds
    λ²/4 · E‖s_y'‖² / batch.
    """
    s = scores(model).detach()
    policy = tabulate(model).detach()
    square = (s**2).sum(-1)
    mean = torch.einsum("xy,xyp->p", data.exp(), s) / PROMPTS
    sft = (data.exp() * square).sum() / PROMPTS - mean @ mean
    added = (policy.exp() * square).sum() / PROMPTS
    return (lam**2 / 4 * sft / batch).item(), (lam**2 / 4 * (sft + added) / batch).item()


# ---- a world with mistakes -----------------------------------------------------------------------

WRONG = len(RESPONSES) - 2  # answers to a prompt, besides the right one and the careless one


def table_of(right: float, careless: float, wrong: float) -> torch.Tensor:
    """A table with the same three probabilities for each prompt, normalised, as logs. (X, Y)

    The right answer to prompt x is response x. The careless one is the last response, to whatever
    prompt, as a habit is. Each of the others is wrong.
    """
    table = torch.full((PROMPTS, len(RESPONSES)), wrong, dtype=torch.float64)
    table[:, -1] = careless
    table.fill_diagonal_(right)
    return table.log().log_softmax(-1)


# Half of the model's answers are right, and half are careless. It finds wrong ones implausible.
HALF_CARELESS = table_of(0.5, 0.5, 1e-6)
# A quarter of the data's answers are wrong, no two alike. A careless one hardly ever occurs.
QUARTER_WRONG = table_of(0.75, 1e-9, 0.25 / WRONG)
# Here it is careless ones that make up the quarter: model and data share the habit.
QUARTER_CARELESS = table_of(0.75, 0.25, 1e-6)


def product_form(start, data, lam, t: int) -> torch.Tensor:
    """p_θ0^a p_data^(1−a), normalised, with a = (1 − 1/λ)^t: p_θt after t exact iterations. (X, Y)

    Theorem 5.4, t times: each multiplies the exponent of p_θ0 by 1 − 1/λ.
    """
    a = (1 - 1 / lam) ** t
    return (a * start + (1 - a) * data).log_softmax(-1)


def share_right(table) -> float:
    """The probability of the right answer, averaged over the prompts of a table_of."""
    return table.diagonal().exp().mean().item()


def shares_right(start, data, lam, iterations: int = 12) -> list[float]:
    """The share of right answers of p_θt for t = 0 … iterations, each trained to the optimum."""
    return [share_right(product_form(start, data, lam, t)) for t in range(iterations + 1)]


# ---- what is printed and drawn -------------------------------------------------------------------

LABELS = ("λ = 0.1", "λ = 0.5", "λ = 0.7", "λ = 1.0", "λ = 2.0", "λ = 5.0", "SFT")
STYLE_OF = dict(zip(LABELS, STYLES, strict=True))
# Names of the last picture, which has none of those whose style they take.
STYLE_OF |= {"λ = 20.0": STYLES[0], "λ = 1.0, SFT": STYLES[3], "data": STYLES[6]}


def print_theorem_5_2(data, start):
    """At p_data the loss is ℓ(0); elsewhere the slope g'(0) in λ, by a difference, is negative."""
    print(
        "Theorem 5.2: at p_θt = p_data the loss is ℓ(0) and the gradient zero; elsewhere g'(0) < 0"
    )
    h = 1e-5
    distance = kl(data, start) + kl(start, data)
    for ell in ELL:
        at_data = expected_loss(data, data, data, 1.0, ell)
        rise = expected_loss(data, start, data, h, ell)
        rise -= expected_loss(data, start, data, -h, ell)
        print(
            f"  {ell:12} ℓ(0) {at_data:.6f}   g'(0) {rise / (2 * h):.6f}   "
            f"ℓ'(0)·[KL + KL] {slope_at_0(ell) * distance:.6f}"
        )


def print_theorem_5_4(data, start):
    """The minimiser that Newton's method finds is the one that the theorem names."""
    print("Theorem 5.4: largest error of the exact minimiser against p_θt (p_data/p_θt)^(1/λ)")
    for lam in (0.5, 1.0, 2.0, 5.0):
        found = best_response(start, data, lam).exp()
        error = (found - theorem_5_4(start, data, lam).exp()).abs().max()
        print(f"  λ {lam:<4} {error:.1e}")


def print_first_step(data, model):
    """Whether SPIN's first step is SFT's, by where y' comes from, and how noisy it is."""
    print("The first step: ‖g_SPIN − λ/2 g_SFT‖ / ‖λ/2 g_SFT‖, by where y' comes from")
    table = tabulate(model).detach()
    before = tabulate(transformer(1)).detach()
    sources = {
        "p_θt": table,
        "greedy": greedy(table),
        "temperature 0.5": (2 * table).log_softmax(-1),
        "p_θt-1": before,
        "half p_θt, half p_θt-1": (table.exp() / 2 + before.exp() / 2).log(),
    }
    for name, generated in sources.items():
        print(f"  {name:24} {gradient_error(model, data, 0.1, generated):.2e}")
    for nats in (0.5, 5e-4):  # an engine's in bf16 and fp32 (benchmarks/RESULTS.md)
        errors = [gradient_error(model, data, 0.1, noisy(table, nats, k)) for k in range(20)]
        print(f"  p_θt, {nats:g} nats of noise  {sum(errors) / 20:.2e}")

    print("Its noise: E‖g − E g‖ over ‖E g‖, for λ/2·SFT and for SPIN")
    signal = 0.05 * gradient(expected_sft_loss(tabulate(model), data), model).norm()
    for batch in (1, 16, 64, 512):
        sft, spin = gradient_noise(model, data, 0.1, batch)
        print(
            f"  batch {batch:<4} SFT {math.sqrt(sft) / signal:.3f}   "
            f"SPIN {math.sqrt(spin) / signal:.3f}"
        )


def show(name: str, title: str, curves: dict[str, list[float]], y_label: str, log: bool = True):
    """Print curves over the iterations t = 0, 1, …, and draw them into a file of this folder."""
    print(f"{title}, over the iterations")
    lines = []
    for label, values in curves.items():
        print(f"  {label:12}", "  ".join(f"{v:.3g}" for v in values))
        points = [(t, value, 0) for t, value in enumerate(values)]
        dots = "" if label == "data" else "o"
        lines.append(Line(label, points, STYLE_OF[label] + dots))
    svg = draw_lines(title, lines, "model", y_label, log=log)
    (HERE / name).write_text(svg, encoding="utf-8")


def show_distances(data, start):
    """The distance to the data, trained to the optimum and for a few steps."""
    kl_to_data = "KL divergence to the data"
    y_label = "KL to the data (nats)"
    # λ = 1 is at zero after one iteration: nothing to draw on a logarithmic axis.
    optimum = {f"λ = {lam}": to_the_optimum(start, data, lam) for lam in (0.1, 0.5, 0.7, 2.0, 5.0)}
    steps = {f"λ = {lam}": few_steps(0, data, lam) for lam in (0.1, 0.5, 1.0, 2.0, 5.0)}
    steps["SFT"] = few_steps(0, data)
    show("theory_optimum.svg", f"{kl_to_data}, trained to the optimum", optimum, y_label)
    few = f"{kl_to_data}, trained for 20 steps an iteration"
    show("theory_steps.svg", few, steps, y_label)


def show_mistakes():
    """The share of right answers where a quarter of the data is wrong, and the limits of that."""
    iterations = 12
    curves = {"data": [share_right(QUARTER_WRONG)] * (iterations + 1)}
    # SFT's optimum is p_data too, where λ = 1 lands at once.
    for label, lam in {"λ = 1.0, SFT": 1, "λ = 2.0": 2, "λ = 5.0": 5, "λ = 20.0": 20}.items():
        curves[label] = shares_right(HALF_CARELESS, QUARTER_WRONG, lam, iterations)
    title = "Share of right answers where a quarter of the data is wrong, trained to the optimum"
    show("theory_mistakes.svg", title, curves, "share of right answers", log=False)

    def row(start, data, lam):
        return "  ".join(f"{share:.3g}" for share in shares_right(start, data, lam, 4))

    print("The same, λ = 0.5:", row(HALF_CARELESS, QUARTER_WRONG, 0.5))
    print("The same, λ = 5, the quarter careless:", row(HALF_CARELESS, QUARTER_CARELESS, 5.0))
    print("The same, λ = 5, vetoes of 0:", row(table_of(0.5, 0.5, 0), QUARTER_WRONG, 5.0))
    cooled = share_right((2 * QUARTER_WRONG).log_softmax(-1))
    print(f"p_data at temperature 0.5: {cooled:.3g}")


def main():
    data = random_table(1)
    start = random_table(2)
    print_theorem_5_2(data, start)
    print_theorem_5_4(data, start)
    print_first_step(data, transformer(0))
    show_distances(data, start)
    show_mistakes()


if __name__ == "__main__":
    main()
