"""Steps 1 to 3 of gpu_check.py: are attention, packed rows and their check right on this device?

`here` has: device; dtype, the compute dtype; short: few, short sequences and small models. Each
step returns its figures, or raises AssertionError with what is wrong."""

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpu

from loss import sequence_logps, token_logps
from spin.data.pairs import packed_pairs, share_prompts
from spin.model import attention
from spin.model.packing import pack, packed
from spin.model.scoring_check import check_scoring
from spin.recipe import Recipe
from spin.run.ranks import World


class NotRun(Exception):
    """Something that a step needs is not here."""


def hold(condition, message: str):
    if not condition:
        raise AssertionError(message)


def refusal(call, *args) -> str:
    """The line with which a call ends, as a stage ends; '' if it does not."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            call(*args)
        except SystemExit:
            return said.getvalue().strip()
    return ""


def small_llama(here):
    """The config of a few wide layers, whose bf16 is off by about 0.01 nats per token."""
    sizes = (64, 128, 2, 4, 2, 512) if here.short else (2048, 5632, 4, 32, 4, 32000)
    return train_gpu.llama(*sizes, False)


def random_model(here, config):
    """In the compute dtype, with weights so large that a token depends on all that it sees."""
    config.initializer_range = config.hidden_size**-0.5
    torch.manual_seed(0)
    with here.device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=here.dtype).eval()


def kernels(here) -> str:
    """Each kernel's output and gradients against softmax in fp32."""
    wholes, branches = [1, 2, 17, 64, 127, 129, 1000, 3000], [(2, 16, 1), (5, 128, 300)]
    branches += [(6, 999, 64), (7, 1500, 1)]  # (whole sequence, tokens shared with it, own tokens)
    sizes, windows = (16, 32, 64, 96, 128, 192, 256), (None, 7, 1024)
    if here.short:
        wholes, branches, sizes, windows = wholes[:6], branches[:2], (16, 128), (None, 7)
    lengths = wholes + [shared + own for _, shared, own in branches]
    shared = [(k, 0) for k in range(len(wholes))] + [(k, n) for k, n, _ in branches]
    row = pack([([0] * n, [0] * (n - 1) + [1]) for n in lengths], here.device, shared)["attention"]
    tokens = sum(wholes) + sum(own for *_, own in branches)
    limit = 1e-2 if here.dtype is torch.bfloat16 else 1e-4  # bf16 explains 0.003
    worst = {}  # of each kernel
    torch.manual_seed(0)
    for size in sizes:
        for heads, key_heads in ((32, 8), (8, 8), (4, 1)):
            shapes = [(1, n, tokens, size) for n in (heads, key_heads, key_heads, heads)]
            q, k, v, g = (torch.randn(x, device=here.device, dtype=here.dtype) for x in shapes)
            usual = attention.kernel_for(q, v)
            for window in windows:
                how = row | {"scaling": 1.2 / size**0.5, "sliding_window": window}
                wanted = with_gradients(eager, (x.float() for x in (q, k, v, g)), how)
                for kernel in dict.fromkeys((None, usual, usual and attention.by_torch)):
                    spoil_free_memory(here)
                    with mock.patch.object(attention, "kernel_for", lambda *_, x=kernel: x):
                        got = with_gradients(attention.packed_attention, (q, k, v, g), how)
                    off = max(map(error, got, wanted))
                    name = kernel.__name__ if kernel else "padded"
                    worst[name] = max(worst.get(name, 0), off)
                    where = f"{name}, head dimension {size}, heads {heads}/{key_heads}, {window=}"
                    hold(off < limit, f"{where}: off by {off:.2g} of the norm")
    return ", ".join(f"{name} {off:.1g}" for name, off in worst.items())


def with_gradients(function, tensors, how) -> list[torch.Tensor]:
    """[output, gradients of q, k and v], all (1, T, H, D)."""
    *leaves, g = (x.detach().requires_grad_() for x in tensors)
    out, _ = function(None, *leaves, None, **how)
    gradients = torch.autograd.grad(out, leaves, g.transpose(1, 2))
    return [out.detach(), *(x.transpose(1, 2) for x in gradients)]


def eager(module, q, k, v, mask, scaling, sliding_window, layout, **_):
    """What packed_attention computes, in plain products, each sequence by itself."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    own = layout.wholes + [n for *_, n in layout.branches]
    q, k, v = (x.split(own, 2) for x in (q, k, v))
    seen = list(zip(k, v, strict=True))
    for i, (whole, n, _) in enumerate(layout.branches, len(layout.wholes)):
        seen[i] = [torch.cat([x[whole][:, :, :n], x[i]], 2) for x in (k, v)]
    out = []
    for queries, (keys, values) in zip(q, seen, strict=True):
        place = torch.arange(keys.shape[2], device=keys.device)
        back = place[-queries.shape[2] :, None] - place
        unseen = (back < 0) | (back >= (sliding_window or len(place)))
        scores = (scaling * queries @ keys.mT).masked_fill_(unseen, -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(1, 2))
    return torch.cat(out, 1), None


def error(got, wanted) -> float:
    """The relative error by norms, or a fifth of the largest one of a token, against its own norm
    and the usual one: a single token must not vanish among 3,000. NaN is infinite. (1, T, H, D)."""
    off, norms = (x.norm(dim=(2, 3)) for x in (got - wanted, wanted))
    token = (off / (norms + norms.square().mean().sqrt())).max()
    return torch.stack([off.norm() / norms.norm(), token / 5]).nan_to_num(torch.inf).max().item()


def spoil_free_memory(here):
    """What the allocator gives out next is NaN: a kernel must not read what it has not written."""
    sizes = [2**20 if here.short else 2**29] + [2**17] * 32  # its large blocks, and its small ones
    blocks = [torch.full((n,), torch.nan, device=here.device, dtype=torch.bfloat16) for n in sizes]
    del blocks


def model_checks(here) -> str:
    """The check of scoring passes three shapes, and refuses attention that is not causal."""
    recipe = Recipe(max_length=128 if here.short else 2048)
    world = World(0, 1, here.device)
    grouped, alike = small_llama(here), small_llama(here)
    alike.num_key_value_heads = alike.num_attention_heads
    window = {"sliding_window": 7 if here.short else 256}
    windowed = transformers.MistralConfig(**grouped.to_dict() | window)
    for name, config in (("grouped", grouped), ("alike", alike), ("windowed", windowed)):
        line = refusal(check_scoring, random_model(here, config), recipe, world)
        hold(not line, f"{name}: {line}")
    sdpa = F.scaled_dot_product_attention
    ours = SimpleNamespace(scaled_dot_product_attention=lambda *x, is_causal, **y: sdpa(*x, **y))
    with (
        mock.patch.object(attention, "kernel_for", lambda *_: None),
        mock.patch.object(attention, "F", ours),
    ):
        line = refusal(check_scoring, random_model(here, grouped), recipe, world)
    hold("cannot keep sequences apart" in line, f"attention without its causal flag passes: {line}")
    return f"three models pass; causal flag off: {line.partition('apart: ')[2][:70]} …"


def precision(here) -> str:
    """A packed row of eight pairs, prompts once, against each sequence alone in fp32."""
    model, exact = (random_model(here, small_llama(here)) for _ in range(2))
    exact.float()
    pairs = train_gpu.make_pairs(8, model.config.vocab_size)
    for pair in pairs:
        for half in ("real", "generated"):
            pair[half] = tuple(x[: 90 if here.short else None] for x in pair[half])
    share_prompts(pairs)
    row = packed_pairs(pairs, "spin", here.device)
    # SPIN's gradient where all margins are zero: along Σ log p(y) − Σ log p(y')
    signs = [1] * 8 + [-1] * 8
    with packed(model) as method:
        hold(method == "packed", "the model takes no packed rows")
        got = sequence_logps(model, **{**row, "counts": [1] * sum(row["counts"])})  # of each token
        sum(s * x.sum() for s, x in zip(signs, got.split(row["counts"]), strict=True)).backward()
    alone = []
    halves = [pair[half] for half in ("real", "generated") for pair in pairs]
    for sign, (ids, mask) in zip(signs, halves, strict=True):
        ids = torch.as_tensor(ids, device=here.device).long()
        logps = token_logps(exact(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])
        alone.append(logps[torch.as_tensor(mask[1:] == 1, device=here.device)])
        (sign * alone[-1].sum()).backward()
    off = (got - torch.cat(alone)).abs().mean().item()
    hold(off < 0.02, f"packed in {here.dtype} and alone in fp32 differ by {off:.2g} nats per token")
    a, b = (torch.cat([w.grad.flatten().double() for w in m.parameters()]) for m in (model, exact))
    cosine = F.cosine_similarity(a, b, dim=0).item()
    hold(cosine > 0.999, f"the cosine of the gradients is {cosine:.6f}")
    return f"{off:.2g} nats per token, cosine of the gradients {cosine:.6f}"
