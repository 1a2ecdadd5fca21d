"""Models of many families through two iterations: the opponent's scores are those of each sequence
alone, by transformers, and sampled tokens those that it gives alone, or the first stage refuses the
model in one line."""

import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO, stage, torchrun
from families import CACHES, FAMILIES, alone, gradient, quick_and_long, random_sequences, save, tiny
from test_model_checks import HERE
from transformers import AutoModelForCausalLM, AutoTokenizer

from loss import sequence_logps
from spin.files import read_jsonl
from spin.model.packing import is_padded, pack, packed
from spin.model.sampling_check import check_sampling
from spin.recipe import parse
from spin.sampling.engines import plain_generate, sample
from spin.sampling.slots import decode_in_slots

# a packed row with a window, a packed row without, padded batches of several kinds
QUICK = ["Mistral, window", "GPT-OSS", "OPT", "Falcon", "Nemotron"]
# three that are packed, and all kinds that are not: sinks, ALiBi, no layer that asks, state space,
# convolutions, softcap
PACKED = ["Mistral, window", "OPT", "GPT-2"]
PADDED = ["GPT-OSS", "Falcon", "Nemotron", "Mamba", "LFM2", "Gemma 2"]
FLAGS = shlex.split(
    "--num-prompts 6 --eval-prompts 3 --batch-size 6 --epochs 1 --max-new-tokens 12"
)


def sequences_of(row: dict, tokenizer) -> list[tuple]:
    """(ids, mask) of a row's human and generated answer, in tokens made here."""
    text = f"### Instruction: {row['prompt']}\n\n### Response:"
    prompt = tokenizer(text)["input_ids"]
    real = tokenizer(f"{text} {row['real']}")["input_ids"]
    assert real[: len(prompt)] == prompt
    answers = real[len(prompt) :] + [2], row["generated_ids"]
    return [(prompt + y, [0] * len(prompt) + [1] * len(y)) for y in answers]


def scores_and_oracle(run, t: int, theta_t, sources: range):
    """log p of each pair's two answers: opponent.jsonl's, and the plain model's, (N, 2) each."""
    rows = {}
    for s in sources:
        rows |= {(s, r["id"]): r for r in read_jsonl(run / f"iter{s}" / "generated.jsonl")}
    scores = list(read_jsonl(run / f"iter{t}" / "opponent.jsonl"))
    assert len(scores) == len(rows) == 6 * len(sources)
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(theta_t, **how).eval()
    tokenizer = AutoTokenizer.from_pretrained(theta_t)
    with torch.no_grad():
        wanted = [alone(model, sequences_of(rows[s["iter"], s["id"]], tokenizer)) for s in scores]
    got = [[s["logp_real"], s["logp_generated"]] for s in scores]
    return torch.tensor(got, dtype=torch.float64), torch.stack(wanted)


@pytest.mark.parametrize("name", quick_and_long(*QUICK))
def test_two_iterations_score_every_sequence_as_if_it_were_alone(name, tmp_path):
    theta = save(tiny(name), tmp_path / "theta")
    run = tmp_path / "run"
    flags = [*FLAGS, "--model", theta]
    for t in (0, 1):
        stage("generate", run, "--iter", t, *flags)
        recompute = "--recompute" if t else "--no-recompute"
        stage("train", run, "--iter", t, recompute, *flags)
        if t == 0:
            stage("evaluate", run, "--iter", t, *flags)
        got, wanted = scores_and_oracle(run, t, theta, range(max(0, t - 1), t + 1))
        assert (got - wanted).abs().max() < 1e-3
        # the opponent scored in the very micro-batches of the first epoch
        assert next(read_jsonl(run / f"iter{t}" / "metrics.jsonl"))["margin_std"] == 0
        # control: another sequence's score is far away
        assert ((got - wanted.flip(0)).abs().max(1).values > 1).any()
        theta = run / f"iter{t}" / "model"


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_any_attention_a_row_has_log_probs_and_gradients_of_each_alone(name, attention):
    model = tiny(name)
    sequences = random_sequences()
    if attention == "sdpa" and not model._supports_sdpa:
        return  # refused: test_model_checks.py
    if attention != "auto":
        model.config._attn_implementation = attention
    before = model.config._attn_implementation
    wanted = alone(model, sequences)
    wanted_gradient = gradient(wanted, model)
    with packed(model, attention) as method:
        assert is_padded(model) == (method == "padded")
        if attention == "auto" and name in PACKED + PADDED:
            assert method == ("packed" if name in PACKED else "padded")
        assert method == "padded" or attention == "auto"
        got = sequence_logps(model, **pack(sequences, "cpu"))
        got_gradient = gradient(got, model)
    assert (got - wanted).abs().max() < 1e-3
    assert (got_gradient - wanted_gradient).norm() < 1e-3 * wanted_gradient.norm()
    # as it was, for sampling
    assert model.config._attn_implementation == before and "forward" not in vars(model)
    with torch.no_grad():  # control: the same row, and nothing keeps its sequences apart
        names = ("input_ids", "logits_to_keep")
        together = sequence_logps(
            lambda **row: model(**{n: row[n] for n in names}), **pack(sequences, "cpu")
        )
    assert ((together - wanted).abs() > 1e-2).any()


def wrong_tokens(model, decode_loop=None, slots=64) -> tuple[int, int]:
    """Of 24 answers to prompts of 1 to 40 tokens: the number of tokens that are not those that
    transformers gives by the same uniform number, each sequence alone, without a cache; and of all.
    """
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 88, 1 + 7 * k % 40).tolist() for k in range(24)]
    uniform = rng.random((24, 24))
    model.decode_loop = decode_loop or model.decode_loop
    answers = sample(model, prompts, 2, 24, uniform, slots=slots)
    right = []
    for prompt, (ids, _), numbers in zip(prompts, answers, uniform, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0]
        for p, token, u in zip(logits[len(prompt) - 1 :], ids, numbers, strict=False):
            cdf = p.double().softmax(-1).cumsum(-1).numpy()
            right.append(np.searchsorted(cdf, u * cdf[-1], side="right") == token)
    return len(right) - sum(right), len(right)


# one of each kind of cache: full, chunks, local, recurrent, hybrid, sparse
KINDS = ["Llama", "Llama 4, chunks", "GPT-Neo, local", "RWKV", "Falcon-H1", "DeepSeek-V3.2"]
# passes with a cache and without differ; a prompt of one token goes on with another's state
REFUSED = ["DeepSeek-V3.2", "Doge", "RecurrentGemma"]
ALONE = ["RWKV", "RoFormer"]  # unless each prompt is alone: they ignore padding on the left


@pytest.mark.parametrize("name", quick_and_long(*KINDS, of=FAMILIES | CACHES))
def test_every_sampled_token_is_that_of_one_pass_alone_or_the_model_is_refused(name, refused):
    model = tiny(name)
    slots = ["--slots", "1"] * (name in ALONE)
    recipe = parse([*MICRO, *slots])[0]
    if name in REFUSED + ALONE:
        line = refused(lambda: check_sampling(model, parse(MICRO)[0], HERE))
        assert "cannot be sampled from as it is scored: off by" in line and "--slots 1 or" in line
    if name not in REFUSED:
        check_sampling(model, recipe, HERE)
        wrong, tokens = wrong_tokens(model, slots=recipe.slots)
        assert wrong == 0 and tokens > 300
    if name == "GPT-Neo, local":  # control
        assert wrong_tokens(model, decode_in_slots)[0] > 10
    if name in [*REFUSED[:2], *ALONE[:1]]:  # control
        assert wrong_tokens(model, plain_generate, 64 if name in ALONE else 1)[0] > 10


@pytest.mark.long
def test_two_ranks_score_and_train_as_one_does_in_padded_batches(tmp_path):
    """Every rank must make as many passes, those of the probe included, or the run would hang."""
    theta = save(tiny("GPT-OSS"), tmp_path / "theta")
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--iter", 0, *FLAGS, "--model", theta]
    stage("generate", one, *flags)
    shutil.copytree(one, two)
    stage("train", one, *flags)
    done = torchrun(2, "train.py", *MICRO, "--run-dir", two, *flags)
    assert done.returncode == 0, done.stderr
    folders = theta, one / "iter0" / "model", two / "iter0" / "model"
    start, *weights = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in folders)
    moved = max((w - start[n]).abs().max() for n, w in weights[0].items())
    for n, w in weights[0].items():
        assert (w - weights[1][n]).abs().max() < 0.05 * moved  # RMSProp's first step: signs
    scores = [list(read_jsonl(run / "iter0" / "opponent.jsonl")) for run in (one, two)]
    for a, b in zip(*scores, strict=True):
        assert a["logp_real"] == pytest.approx(b["logp_real"], abs=1e-3)
        assert a["logp_generated"] == pytest.approx(b["logp_generated"], abs=1e-3)
