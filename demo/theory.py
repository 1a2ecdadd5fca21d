"""The theory of SPIN, checked by running it: a world so small that every expectation is a finite sum.

    python demo/theory.py          prints the figures and draws demo/theory_optimum.svg and demo/theory_steps.svg

Four prompts, three letters and an EOS, and all 40 responses of up to three tokens (those of three letters are cut off and
have no EOS, so the probabilities of the 40 add up to one). Distributions are tables of log p(y|x), (X, Y); a policy is
a table of logits, or a one-layer transformer over the same space. The loss is the spin_loss of loss.py, averaged over
all (x, y, y') with their probabilities instead of samples. float64 throughout. tests/test_theory.py asserts what is printed here.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from loss import ELL, sequence_logps, sft_loss, spin_loss
from spin.packing import pack, packed
from spin.report import chart

PROMPTS, LETTERS, LONGEST, EOS = (
    4,
    3,
    3,
    3,
)  # tokens 0 to 2 are letters, 3 the EOS; prompt x is the tokens (EOS, x)
RESPONSES = [
    letters + (EOS,) * (n < LONGEST)
    for n in range(LONGEST + 1)
    for letters in itertools.product(range(LETTERS), repeat=n)
]
ELL_SLOPE = {"logistic": -0.5, "hinge": -1.0, "correlation": -1.0, "exponential": -1.0}  # ℓ'(0)


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
    """L_SPIN(θ, θ_t) of Eq. (4.7) as a finite sum. Tables (X, Y) of log-probabilities; y' ~ generated, or the opponent."""
    generated = opponent if generated is None else generated
    weight = (
        data.exp()[:, :, None] * generated.exp()[:, None, :] / PROMPTS
    )  # q(x) p_data(y|x) p_θt(y'|x), (X, Y, Y')
    losses = spin_loss(
        policy[:, :, None], policy[:, None, :], opponent[:, :, None], opponent[:, None, :], lam, ell
    )
    return (weight * losses).sum()


def expected_sft_loss(policy, data) -> torch.Tensor:
    """L_SFT(θ) of Eq. (3.1) as a finite sum."""
    return (data.exp() * sft_loss(policy)).sum() / PROMPTS


def best_response(opponent, data, lam, ell="logistic", steps=40) -> torch.Tensor:
    """θ_{t+1} = argmin_θ L_SPIN(θ, θ_t) over all tables, from θ_t: Newton's method, as L_SPIN is convex in the logits. (X, Y)"""
    logits = opponent.clone()
    loss = lambda z: expected_loss(z.view_as(opponent).log_softmax(-1), opponent, data, lam, ell)  # noqa: E731
    for _ in range(steps):
        flat = logits.flatten().requires_grad_()
        (slope,) = torch.autograd.grad(loss(flat), flat)
        curvature = torch.autograd.functional.hessian(loss, flat.detach(), vectorize=True)
        move = (
            torch.linalg.pinv(curvature, rcond=1e-13, hermitian=True) @ slope
        )  # singular: a constant per prompt is free
        size = 1.0
        while loss(flat - size * move) > loss(flat) and size > 1e-9:
            size /= 2  # far from the optimum a whole Newton step overshoots
        logits = (flat - size * move).detach().view_as(opponent)
        if slope.abs().max() < 1e-15:
            break
    return logits.log_softmax(-1)


def theorem_5_4(opponent, data, lam) -> torch.Tensor:
    """p_θt(y|x) (p_data(y|x) / p_θt(y|x))^(1/λ), normalised: where the logistic ℓ lands. (X, Y)"""
    return (opponent + (data - opponent) / lam).log_softmax(-1)


# ---- a one-layer transformer over the same space -----------------------------------------------------------------


def transformer(seed: int) -> GPT2LMHeadModel:
    """About 3,500 random parameters in float64."""
    torch.manual_seed(seed)
    return (
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=LETTERS + 1,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=LONGEST + 2,
                initializer_range=0.3,
                bos_token_id=EOS,
                eos_token_id=EOS,
            )
        )
        .double()
        .eval()
    )


def tabulate(model) -> torch.Tensor:
    """log p_θ(y|x) of every prompt and response, by sequence_logps of loss.py. (X, Y)"""
    rows = [((EOS, x, *y), (0, 0, *(1 for _ in y))) for x in range(PROMPTS) for y in RESPONSES]
    with packed(model):
        return sequence_logps(model, *pack(rows, "cpu")).view(PROMPTS, -1)


def gradient(loss, model) -> torch.Tensor:
    """The gradient of a scalar with respect to all of the model's parameters, flat. (P,)"""
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ]
    )


def scores(model) -> torch.Tensor:
    """∇log p_θ(y|x) of every prompt and response. (X, Y, P)"""
    rows = [gradient(logp, model) for logp in tabulate(model).flatten()]
    return torch.stack(rows).view(PROMPTS, len(RESPONSES), -1)


# ---- whole iterations --------------------------------------------------------------------------------------------


def to_the_optimum(start, data, lam, iterations: int = 4, minimiser=theorem_5_4) -> list[float]:
    """KL(p_data ‖ p_θt) for t = 0 … iterations, each trained to the optimum over all tables.

    By Theorem 5.4, since λ = 0.1 leads to probabilities that float64 cannot hold; best_response finds the same by minimising.
    """
    policy, distances = start, [kl(data, start).item()]
    for _ in range(iterations):
        policy = minimiser(policy, data, lam)
        distances.append(kl(data, policy).item())
    return distances


def few_steps(
    seed: int, data, lam=None, iterations: int = 4, steps: int = 20, rate: float = 1e-3
) -> list[float]:
    """The same for the transformer and `steps` steps of RMSProp on the exact loss; lam None is continued SFT."""
    model, distances = transformer(seed), []
    for _ in range(iterations):
        optimizer, opponent = (
            torch.optim.RMSprop(model.parameters(), lr=rate),
            tabulate(model).detach(),
        )
        distances.append(kl(data, opponent).item())
        for _ in range(steps):
            policy = tabulate(model)
            loss = (
                expected_sft_loss(policy, data)
                if lam is None
                else expected_loss(policy, opponent, data, lam)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [*distances, kl(data, tabulate(model)).item()]


def gradient_error(model, data, lam, generated) -> float:
    """‖g_SPIN − λ/2 g_SFT‖ / ‖λ/2 g_SFT‖ at θ = θ_t, for y' ~ generated (a table): 0 where SPIN's first step is SFT's."""
    policy = tabulate(model)
    spin = gradient(expected_loss(policy, policy.detach(), data, lam, generated=generated), model)
    sft = lam / 2 * gradient(expected_sft_loss(tabulate(model), data), model)
    return ((spin - sft).norm() / sft.norm()).item()


def greedy(table) -> torch.Tensor:
    """All probability on the likeliest response to each prompt."""
    return torch.nn.functional.one_hot(table.argmax(-1), len(RESPONSES)).double().log()


def gradient_noise(model, data, lam, batch: int = 1) -> tuple[float, float]:
    """E‖g − E g‖² of a minibatch gradient at θ = θ_t, for λ/2 times SFT and for SPIN with y' ~ p_θt.

    A pair's gradient is −λ/2 (s_y − s_y'), with s = ∇log p_θ; s_y' has mean zero, so y' adds λ²/4 · E‖s_y'‖² / batch.
    """
    s, policy = scores(model).detach(), tabulate(model).detach()
    square = (s**2).sum(-1)
    mean = torch.einsum("xy,xyp->p", data.exp(), s) / PROMPTS
    sft = (data.exp() * square).sum() / PROMPTS - mean @ mean
    added = (policy.exp() * square).sum() / PROMPTS
    return (lam**2 / 4 * sft / batch).item(), (lam**2 / 4 * (sft + added) / batch).item()


COLOURS = {
    "λ = 0.1": "#1f5fa8",
    "λ = 0.5": "#2a8a57",
    "λ = 0.7": "#148a9c",
    "λ = 1.0": "#8a4fb0",
    "λ = 2.0": "#c2571a",
    "λ = 5.0": "#b01f4f",
    "SFT": "#777777",
}


def draw(name: str, title: str, curves: dict):
    lines = [
        (label, COLOURS[label], "", [(t, v, 0) for t, v in enumerate(values)])
        for label, values in curves.items()
    ]
    (HERE / name).write_text(chart(lines, title, log=True) + "\n")


def main():
    data, start, model = random_table(1), random_table(2), transformer(0)
    print(
        "Theorem 5.2: at p_θt = p_data the loss is ℓ(0) and the gradient zero; elsewhere g'(0) < 0"
    )
    for ell in ELL:
        slope = (
            expected_loss(data, start, data, 1e-5, ell)
            - expected_loss(data, start, data, -1e-5, ell)
        ) / 2e-5
        print(
            f"  {ell:12} ℓ(0) {expected_loss(data, data, data, 1.0, ell):.6f}   g'(0) {slope:.6f}   "
            f"ℓ'(0)·[KL + KL] {ELL_SLOPE[ell] * (kl(data, start) + kl(start, data)):.6f}"
        )
    print("Theorem 5.4: largest error of the exact minimiser against p_θt (p_data/p_θt)^(1/λ)")
    for lam in (0.5, 1.0, 2.0, 5.0):
        error = (
            (best_response(start, data, lam).exp() - theorem_5_4(start, data, lam).exp())
            .abs()
            .max()
        )
        print(f"  λ {lam:<4} {error:.1e}")
    print("The first step: ‖g_SPIN − λ/2 g_SFT‖ / ‖λ/2 g_SFT‖, by where y' comes from")
    table, before = tabulate(model).detach(), tabulate(transformer(1)).detach()
    for name, generated in (
        ("p_θt", table),
        ("greedy", greedy(table)),
        ("temperature 0.5", (2 * table).log_softmax(-1)),
        ("p_θt-1", before),
        ("half p_θt, half p_θt-1", (table.exp() / 2 + before.exp() / 2).log()),
    ):
        print(f"  {name:24} {gradient_error(model, data, 0.1, generated):.2e}")
    print("Its noise: E‖g − E g‖ over ‖E g‖, for λ/2·SFT and for SPIN")
    signal = 0.05 * gradient(expected_sft_loss(tabulate(model), data), model).norm()
    for batch in (1, 16, 64, 512):
        sft, spin = (math.sqrt(v) / signal for v in gradient_noise(model, data, 0.1, batch))
        print(f"  batch {batch:<4} SFT {sft:.3f}   SPIN {spin:.3f}")
    optimum = {f"λ = {lam}": to_the_optimum(start, data, lam) for lam in (0.1, 0.5, 0.7, 2.0, 5.0)}
    steps = {f"λ = {lam}": few_steps(0, data, lam) for lam in (0.1, 0.5, 1.0, 2.0, 5.0)} | {
        "SFT": few_steps(0, data)
    }
    for title, curves in (
        ("trained to the optimum", optimum),
        ("trained for 20 steps an iteration", steps),
    ):
        print(f"KL(p_data ‖ p_θt) over the iterations, {title}")
        for label, values in curves.items():
            print(f"  {label:8}", "  ".join(f"{v:.3g}" for v in values))
    draw("theory_optimum.svg", "KL divergence, each iteration to the optimum", optimum)
    draw("theory_steps.svg", "KL divergence, 20 steps an iteration", steps)


if __name__ == "__main__":
    main()
