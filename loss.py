"""The mathematics of SPIN: log-probabilities, the objective (4.7), and the SFT objective (3.1).

Chen et al., "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models", ICML 2024,
arXiv 2401.01335v3. Pure functions of tensors; this file imports nothing but torch, and can be taken as it is.
"""

import torch
import torch.nn.functional as F

# ℓ of Assumption 5.1: convex, decreasing, ℓ'(0) < 0. Each maps a margin t of any shape to a loss of that shape.
# The paper trains with the logistic one: it is non-negative, smooth, and its tail keeps f from growing without
# bound. The exponential overflows fp32 (to inf) for t < -88.7.
ELL = {
    "logistic": lambda t: F.softplus(-t),  # log(1 + exp(-t)), stable for any t
    "hinge": lambda t: F.relu(1 - t),
    "correlation": lambda t: 1 - t,
    "exponential": lambda t: torch.exp(-t),
}


def _wide(x: torch.Tensor) -> torch.Tensor:
    """fp32, or wider where x is: in bf16 neighbouring numbers near 256 are 2.0 apart, so sums must not live there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(y_t | y_<t, x) of each label, in nats.

    logits (…, T, V) of any float dtype; labels (…, T), already shifted: logits[…, t, :] predicts labels[…, t].
    Returns (…, T) in fp32 (float64 for float64 logits).
    """
    logps = F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return -logps.view(labels.shape)


def sequence_logps(model, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                   response_mask: torch.Tensor) -> torch.Tensor:
    """log p_θ(y|x) = Σ_j log p_θ(y_j | x, y_<j) (Section 3): a sum over the response's tokens, not a mean.

    input_ids, attention_mask, response_mask: (B, T), padded on the right; response_mask is 1 on the tokens of y
    (its EOS among them), 0 on the prompt and the padding. model: any causal transformers model. Returns (B,).
    """
    start = int(response_mask.any(0).int().argmax())  # the first column that holds a response token in any row
    keep = input_ids.shape[1] - start + 1  # no logits for the columns of prompt alone: vocabulary × prompt is waste
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep,
                   use_cache=False).logits  # (B, keep, V)
    logps = token_logps(logits[:, :-1], input_ids[:, start:])  # position t predicts token t + 1
    return (logps * response_mask[:, start:]).sum(-1)


def spin_loss(policy_real: torch.Tensor, policy_generated: torch.Tensor,
              opponent_real: torch.Tensor, opponent_generated: torch.Tensor,
              lam: float = 0.1, ell: str = "logistic") -> torch.Tensor:
    """The SPIN objective, Eq. (4.7), pair by pair; its mean over pairs is L_SPIN(θ, θ_t).

    policy_real, policy_generated: (B,) log p_θ(y|x) and log p_θ(y'|x), which carry the gradient.
    opponent_real, opponent_generated: (B,) log p_θt(y|x) and log p_θt(y'|x), the frozen opponent's.
    lam: λ of the paper's text, β of its experiments. ell: a name of ELL. Returns (B,), fp32 or wider.
    Raises KeyError for an unknown ell.
    """
    margin = spin_margin(policy_real, policy_generated, opponent_real, opponent_generated, lam)
    return ELL[ell](margin)  # Eq. (4.7): ℓ(margin)


def spin_margin(policy_real, policy_generated, opponent_real, opponent_generated, lam: float = 0.1) -> torch.Tensor:
    """The argument of ℓ in Eq. (4.7), f(x, y) − f(x, y') with f = λ log p_θ/p_θt (4.6). Shapes as in spin_loss."""
    logratio_real = _wide(policy_real) - _wide(opponent_real)  # log p_θ(y|x) / p_θt(y|x)
    logratio_generated = _wide(policy_generated) - _wide(opponent_generated)  # log p_θ(y'|x) / p_θt(y'|x)
    return lam * logratio_real - lam * logratio_generated


def sft_loss(policy_real: torch.Tensor) -> torch.Tensor:
    """The SFT objective, Eq. (3.1), per example: −log p_θ(y|x), the sum over tokens. (B,) in, (B,) out, fp32 or wider."""
    return -_wide(policy_real)
