"""A check before a model is sampled: does each token of an answer have the log-probability that one
pass alone gives it? It runs on this run's own device and dtype, by the decode loop that is meant.

An answer is fed in that loop, with a cache, among answers of other lengths. A family may then see
too few tokens, or see padding. What is sampled would not be what train.py scores."""

import re

import torch
from torch.nn.utils.rnn import pad_sequence

from loss import token_logps
from spin.files import fail
from spin.model.probe import largest, logps_alone, random_sequences, tolerated
from spin.model.weights import name_of
from spin.sampling.engines import plain_generate, sample, ways

# what a config calls numbers that may limit what a token sees, and such a number or its list
LIMIT = r"'\w*(?:window|chunk|top_?k|block|local|stride|segment|compress|context|span)\w*': "
LIMIT += r"(\d+|[\[({][^\])}]*)"


@torch.no_grad()
def probe_sampling(model, recipe, world):
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
        return  # sampling has a line of its own for that
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
        if off <= tolerance / 2:  # answers are short, and honest ones stay below a tenth of it
            if decode_loop is plain_generate and world.rank == 0:
                how = "by model.generate, where a batch waits for its longest answer"
                print(f"{name_of(model)} is sampled {how} ({finding})")
            return
        finding = f"off by {off:.1g} nats a token, where rounding explains {rounding:.1g}"
    mend = "try --slots 1 or --attention eager, or choose another model"
    fail(f"{name_of(model)} cannot be sampled from as it is scored: {finding}; {mend}")


def lengths_to_sample(config, recipe) -> list[int]:
    """Tokens of the sequences. The answers of eight short ones cross every number up to 60, and one
    more crosses each larger number of LIMIT. If there is room in 2 × --micro-tokens for all passes,
    others go far beyond them. Long ones stand between short ones, whose padding must not matter."""
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
