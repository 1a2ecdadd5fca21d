"""The mathematics of SPIN: the objective (4.7), the SFT objective (3.1), log-probabilities.

Chen et al., "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
ICML 2024, arXiv 2401.01335v3. This file imports nothing but torch. The losses are pure functions of
tensors. sequence_logps runs the model, and its backward pass reuses the memory of the logits.
"""

import torch
import torch.nn.functional as F

# The losses ℓ of Assumption 5.1, by the name that --ell takes. To add a loss, add a line here.
# Each maps a margin t of any shape to a loss of that shape. The paper trains with the logistic one:
# it is non-negative, smooth, and flat where the margin is large, so pairs that are won no longer
# pull. The exponential overflows fp32 (inf) for t < -88.7.
ELL = {
    "logistic": lambda t: F.softplus(-t),  # log(1 + exp(-t)), stable for any t
    "hinge": lambda t: F.relu(1 - t),
    "correlation": lambda t: 1 - t,
    "exponential": lambda t: torch.exp(-t),
}


def unmet_assumptions(ell: str) -> list[str]:
    """The conditions of Assumption 5.1 (decreasing, ℓ'(0) < 0, convex) that a loss of ELL violates.

    Autograd tests them on [−20, 20]. Returns them in words; [] for the paper's four losses."""
    t = (torch.arange(-2000, 2001, dtype=torch.float64) / 100).requires_grad_()
    (slope,) = torch.autograd.grad(ELL[ell](t).sum(), t)
    found = []
    # with "not", NaN counts as a violation
    if not (slope <= 0).all():
        found.append("is not decreasing everywhere on [−20, 20]")
    if not slope[2000] < 0:
        found.append("has no negative slope at 0")
    if not (slope.diff() >= -1e-9).all():  # more than rounding
        found.append("is not convex on [−20, 20]")
    return found


def spin_loss(
    policy_real: torch.Tensor,
    policy_generated: torch.Tensor,
    opponent_real: torch.Tensor,
    opponent_generated: torch.Tensor,
    lam: float = 0.1,
    ell: str = "logistic",
) -> torch.Tensor:
    """The SPIN objective, Eq. (4.7), pair by pair; its mean over pairs is L_SPIN(θ, θ_t).

    policy_real, policy_generated: (B,) log p_θ(y|x) and log p_θ(y'|x), which carry the gradient.
    opponent_real, opponent_generated: (B,) log p_θt(y|x), log p_θt(y'|x), the frozen opponent's.
    lam: λ of the paper's text, β of its experiments. ell: a name of ELL. Returns (B,), fp32 or
    wider. Raises KeyError for an unknown ell."""
    margin = spin_margin(policy_real, policy_generated, opponent_real, opponent_generated, lam)
    return ELL[ell](margin)  # Eq. (4.7): ℓ(margin)


def spin_margin(
    policy_real, policy_generated, opponent_real, opponent_generated, lam: float = 0.1
) -> torch.Tensor:
    """The argument of ℓ in Eq. (4.7): f(x, y) − f(x, y') with f = λ log(p_θ/p_θt) (4.6).

    Shapes as in spin_loss."""
    # log(p_θ(y|x) / p_θt(y|x)), and the same of y'
    logratio_real = at_least_fp32(policy_real) - at_least_fp32(opponent_real)
    logratio_generated = at_least_fp32(policy_generated) - at_least_fp32(opponent_generated)
    return lam * logratio_real - lam * logratio_generated


def sft_loss(policy_real: torch.Tensor) -> torch.Tensor:
    """The SFT objective, Eq. (3.1), per example: −log p_θ(y|x), a sum over tokens. (B,) → (B,)."""
    return -at_least_fp32(policy_real)


def sft_loss_per_token(policy_real: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """sft_loss, (B,), each divided by the number of its own answer's tokens. A sum would outweigh
    (4.7) where answers are long. One mean over the tokens of a batch would depend on how the batch
    is cut into micro-batches and ranks."""
    return sft_loss(policy_real) / policy_real.new_tensor(lengths)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or unchanged if it is wider. Log-probabilities of answers are often below −256,
    and there bf16 holds even numbers only."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sequence_logps(
    model,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    predictors: torch.Tensor,
    labels: torch.Tensor,
    counts: list[int],
    attention: dict,
) -> torch.Tensor:
    """log p_θ(y|x) = Σ_j log p_θ(y_j | x, y_<j) (Section 3): a sum over y's tokens, not a mean.

    model: a causal transformers model inside spin.model.packing.packed, so that it takes such rows.
    input_ids: (1, T), N sequences "prompt, answer" in one row. The row may hold the prompt of y and
    y' once for both.
    position_ids: (1, T), the place of each token in its own sequence.
    labels: (K,), the tokens of all N answers; prompts are not among them.
    predictors: (K,), predictors[k] is the index in the row of the token just before labels[k].
    counts: how many of the K labels belong to each answer; N numbers that add up to K.
    attention: where each sequence begins and ends, as arguments of the model.

    spin.model.packing.pack returns all arguments except model. Returns (N,), fp32 or wider. Raises
    RuntimeError in a second backward pass: the gradient of the first has overwritten the logits."""
    logits = model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        # Logits that predict no answer token would only take memory.
        logits_to_keep=predictors,
        **attention,
    ).logits.squeeze(0)  # (K, V)
    # in_place: no other code holds these logits
    logps = _TokenLogps.apply(logits, labels, True)  # (K,)
    # not index_add: on a GPU its order, and so its sum, varies
    return torch.stack([y.sum() for y in logps.split(counts)])


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(y_t | y_<t, x) of each label, in nats: its logit − log Σ_v exp(logit_v).

    logits: (…, T, V), of any float dtype. labels: (…, T), already shifted: logits[…, t, :] predicts
    labels[…, t]. Returns (…, T) in fp32 (float64 for float64 logits)."""
    return _TokenLogps.apply(logits.flatten(0, -2), labels.flatten(), False).view(labels.shape)


class _TokenLogps(torch.autograd.Function):
    """log_softmax and gather, gradient included, without their fp32 copies of the logits.

    With a large vocabulary those copies are the first thing to exhaust the memory. Here only a
    block of tokens at a time is in fp32. in_place: the gradient overwrites the logits. Where other
    code has saved them for its own gradient, torch raises RuntimeError."""

    @staticmethod
    def forward(ctx, logits, labels, in_place):  # (N, V), (N,)
        ctx.in_place = in_place
        ctx.overwritten = False
        # tokens per block: 16 MiB of fp32 logits, on a GPU 64 MiB, or launches would dominate
        ctx.block = max(1, 2 ** (24 if logits.is_cuda else 22) // logits.shape[-1])
        blocks = logits.split(ctx.block)
        normaliser = torch.cat([at_least_fp32(block).logsumexp(-1) for block in blocks])  # (N,)
        ctx.save_for_backward(logits, labels, normaliser)
        return at_least_fp32(logits.gather(-1, labels[:, None]).squeeze(-1)) - normaliser

    @staticmethod
    def backward(ctx, gradient):  # d log p(y) / d logit_v = 1[v = y] − p(v)
        if ctx.overwritten:
            raise RuntimeError("these logits hold a gradient by now: only one backward pass")
        ctx.overwritten = ctx.in_place
        logits, labels, normaliser = ctx.saved_tensors
        result = logits if ctx.in_place else torch.empty_like(logits)
        for start in range(0, len(logits), ctx.block):
            block = slice(start, start + ctx.block)
            g = gradient[block, None]
            p = (at_least_fp32(logits[block]) - normaliser[block, None]).exp_()
            result[block] = p.mul_(-g).scatter_add_(-1, labels[block, None], g)
        return result, None, None
