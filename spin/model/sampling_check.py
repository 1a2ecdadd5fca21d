"""A check before a model is sampled: does each token of an answer have the log-probability that one
pass over the whole sequence gives it? It uses the run's own device, dtype and decode loop.

The loop computes an answer with a cache, next to answers of other lengths. In some model families a
token then sees too few tokens, or padding, and train.py would score it differently."""

import re
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from loss import token_logps
from spin.files import fail
from spin.model.scoring_check import (
    check_scoring,
    largest,
    logps_alone,
    random_sequences,
    tolerated,
)
from spin.model.weights import compute_dtype, load_frozen, name_of
from spin.sampling import vllm_engine
from spin.sampling.engines import plain_generate, sample, ways

# matches config entries that may limit what a token sees, such as 'sliding_window': 4096
LIMIT = r"'\w*(?:window|chunk|top_?k|block|local|stride|segment|compress|context|span)\w*': "
LIMIT += r"(\d+|[\[({][^\])}]*)"


@torch.no_grad()
def check_sampling(model, recipe, world):
    """Give the model the decode loop that `sample` will take: the first of `ways` in which each
    token of an answer has the log-probability that one pass alone, without cache and padding, gives
    it. Ends with one line if none has.

    The answers are random tokens, six or three at a time. Some end together, and others follow."""
    longest = recipe.max_length
    lengths = lengths_to_sample(model.config, recipe)
    _, (eos, *tokens), *_ = random_sequences(model.config, 2 * longest + 100)
    tokens = [token for token in tokens if token != eos]
    sequences = [tokens[7 * k :][:length] for k, length in enumerate(lengths)]
    # answers have 11 to 16 tokens, where there is room; a batch may go on for 16
    starts = [n - (11, 16, 13)[k % 3] for k, n in enumerate(lengths)]
    starts = [max(1, min(start, longest - 16)) for start in starts]
    prompts = [ids[:start] for ids, start in zip(sequences, starts, strict=True)]
    answers = [torch.tensor([*ids[n:], eos]) for ids, n in zip(sequences, starts, strict=True)]
    answers = pad_sequence(answers, batch_first=True, padding_value=eos).to(world.device)
    alone = [logps_alone(model, ids, world.device) for ids in sequences]
    if not torch.cat(alone).isfinite().all():
        return  # pick_token refuses that, with an error message of its own
    _, rounding, tolerance = tolerated(model, recipe, world, sequences[:3], alone[:3])
    found = torch.zeros(answers.shape, device=world.device)

    def pick(logits, which, step):
        found[which, step] = token_logps(logits, answers[which, step])
        return answers[which, step]

    # a batch of model.generate is as wide as its longest sequence
    slots = 6 if 12 * max(lengths) <= recipe.micro_tokens else 3
    finding = "our decode loop cannot hold its cache"
    for decode_loop in ways(model, longest):
        model.decode_loop = decode_loop
        found.fill_(torch.nan)
        try:
            sample(model, prompts, eos, answers.shape[1], slots=min(slots, recipe.slots), pick=pick)
        except Exception as problem:  # a family's own code, which does not know such a cache
            finding = f"{type(problem).__name__}: {str(problem)[:200]}"
            continue
        rows = zip(found.cpu(), alone, starts, strict=True)
        off = [largest(row[: len(logps) + 1 - n], logps[n - 1 :]) for row, logps, n in rows]
        off = torch.tensor(off).max().item()  # NaN too
        if off <= tolerance / 2:  # answers are short: a correct loop stays far below that
            if decode_loop is plain_generate and world.rank == 0:
                how = "by model.generate, where a batch waits for its longest answer"
                print(f"{name_of(model)} is sampled {how} ({finding})")
            return
        finding = f"off by {off:.1g} nats per token, where rounding explains {rounding:.1g}"
    fix = "try --slots 1 or --attention eager, or choose another model"
    fail(f"{name_of(model)} cannot be sampled from as it is scored: {finding}; {fix}")


@torch.no_grad()
def start_vllm(theta_t: str, prompts: list[list[int]], recipe, world):
    """Start vLLM with θ_t. Rank 0 first checks the transformers model, and keeps it in host memory.
    vLLM then samples about 256 tokens, and is refused if that model scores them differently."""
    vllm_engine.load_vllm()  # before a model is loaded
    half = compute_dtype(recipe.dtype, world.device) is torch.bfloat16
    recipe = replace(recipe, dtype="bf16" if half else "fp32")  # auto would mean fp32 on the host
    host = replace(world, device=torch.device("cpu"))
    if world.rank == 0:
        model = load_frozen(theta_t, recipe, host)
        if recipe.tensor_parallel == 1:
            check_scoring(model.to(world.device), recipe, world)
            model.cpu()
            torch.cuda.empty_cache()
        else:
            print(f"{name_of(model)} is checked only by train.py, which shards it")
    engine = vllm_engine.start(theta_t, recipe, world.device)
    if world.rank == 0:
        tokens = min(32, recipe.max_new_tokens)
        prompts = prompts[-256 // tokens :]
        answers = vllm_engine.sample(engine, prompts, (), tokens, range(len(prompts)), logprobs=0)
        sequences = [x + ids for x, (ids, *_) in zip(prompts, answers, strict=True)]
        alone = [logps_alone(model, ids, host.device) for ids in sequences]
        _, rounding, tolerance = tolerated(model, recipe, host, sequences[:3], alone[:3])
        off = [largest(told, x[-tokens:]) for (*_, told), x in zip(answers, alone, strict=True)]
        off = torch.tensor(off).max().item()  # NaN too
        finding = f"off by {off:.1g} nats per token, where rounding explains {rounding:.1g}"
        if not off <= tolerance / 2:
            fail(f"{name_of(model)} is not scored as vLLM samples: {finding}; take --engine own")
        print(f"vLLM is {finding}")
    return engine


def lengths_to_sample(config, recipe) -> list[int]:
    """The sequences' lengths. The answers of eight short ones pass every length up to 60; for each
    larger limit that LIMIT finds, one more sequence passes it. If 2 × --micro-tokens leave room,
    some go far beyond. Long ones stand between short ones, whose padding must not matter."""
    longest = recipe.max_length
    named = " ".join(re.findall(LIMIT, str(config.get_text_config().to_dict())))
    limits = [n for n in map(int, re.findall(r"\d+", named)) if n < longest - 1]
    lengths = {max(2, min(n, longest - k)) for k, n in enumerate(range(12, 64, 7))}
    lengths |= {min(n + 6, longest) for n in limits if n > 60}
    for more in (min(max(limits, default=0) + 70, longest), longest):
        if 5 * (sum(lengths) + more) <= 2 * recipe.micro_tokens:
            lengths.add(more)
    # a prompt of one token comes later: it shows whether a family's state outlives a sequence
    rest = sorted(lengths)
    order, rest = rest[:3][::-1], rest[3:]
    while rest:
        order.append(rest.pop(0))  # the shortest that is left, then the longest
        if rest:
            order.append(rest.pop())
    return order
