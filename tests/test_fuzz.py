"""Any text in any shape, any lengths, any number of ranks: what the tokens, the selection, the bins
and the batches promise of all of them.

200 examples each, the same ones every time. FUZZ=10000 python -m pytest -q tests/test_fuzz.py
tries that many new ones.
"""

import collections
import itertools
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_data import spaced_tokenizer, talk

from spin.data.pairs import batches, bins_of, micro_batches
from spin.data.rows import to_pair
from spin.data.selection import select
from spin.data.text import decode, encode, holds_special, make_renderer, parses_specials
from spin.model.packing import pack
from spin.recipe import Recipe
from spin.run.ranks import World

NUMBER = int(os.environ.get("FUZZ", 200))
many = settings(
    max_examples=NUMBER,
    derandomize=NUMBER == 200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = [
    *("</s>", "<s>", "<unk>", "<|im_end|>", "### Response:", "### Instruction:", "{prompt}"),
    *("Hello", "Sort ", "tin", "▁", " ", "  ", "\n", "\r\n", "\0", "\u200b", "\u2028", "\ufeff"),
    *("é", "e\u0301", "ﷺ", "👩‍👩‍👧"),
]
text = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=8).map("".join)
template = st.one_of(
    st.just("paper"),
    st.just("<s>[INST] {prompt} [/INST]"),
    st.tuples(text, text).map("{prompt}".join),
)
SHAPES = {
    "prompt/response": lambda q, a: {"prompt": q, "response": a},
    "prompt/completion": lambda q, a: {"prompt": q, "completion": a},
    "question": lambda q, a: {"question": q, "answer": a},
    "alpaca": lambda q, a: {"instruction": q, "output": a, "input": ""},
    "messages": lambda q, a: {"messages": talk(q, a)},
    "own": lambda q, a: {"prompt": q, "real": a, "generated": a},
    "preference": lambda q, a: {"prompt": q, "chosen": talk(q, a), "rejected": talk(q, a + "!")},
}


@pytest.fixture(scope="module", params=["demo", "spaced", "without BOS"])
def tok(request, tokenizer):
    return {
        "demo": tokenizer,
        "spaced": spaced_tokenizer(),
        "without BOS": spaced_tokenizer(adds_bos=False),
    }[request.param]


# found by 10,000: a word of the vocabulary, though split as text
@example(shape="question", template="paper", prompt="\n</s>", response="", other="", cut=1)
@example(shape="question", template="paper", prompt="", response="\n</s>", other="", cut=1)
@many
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    template=template,
    prompt=text,
    response=text,
    other=text,
    cut=st.integers(1, 60),
)
def test_ids_and_masks_of_any_text(tok, shape, template, prompt, response, other, cut):
    renderer = make_renderer(tok, template)
    pair = to_pair(SHAPES[shape](prompt, response), "set")[0]
    assert (pair["prompt"], pair["real"]) == (prompt, response)
    spelt = any(holds_special(renderer, part) for part in (prompt, response, other))
    if spelt and parses_specials(renderer):
        return  # select leaves these out, and counts them
    start, start_mask = encode(renderer, pair)
    ids, mask = encode(renderer, pair, response)
    # one BOS; more only where the template is written with them
    written = 0 if template == "paper" else template.count(tok.bos_token or "\0\0")
    if not renderer.bos_ids:
        assert ids.count(tok.bos_token_id) == written
    else:
        there = written > 0 and template.replace("{prompt}", prompt).startswith(tok.bos_token)
        assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == written + (not there)
    # one EOS, at the end
    eos = ids[len(start) :].count(tok.eos_token_id)
    assert eos == 1 and ids[-1] == tok.eos_token_id
    assert written or holds_special(renderer, template) or ids.count(tok.eos_token_id) == 1
    # the mask covers the response, and the prompt's ids do not depend on it
    assert mask == [0] * len(start) + [1] * (len(ids) - len(start)) and not any(start_mask)
    assert ids[: len(start)] == start == encode(renderer, pair, other)[0][: len(start)]
    # what is cut has no EOS
    short, short_mask = encode(renderer, pair, response, cut)
    assert short == ids[:cut] and short_mask == mask[:cut]
    ends_by_eos = short[-1:] == [tok.eos_token_id]
    assert len(ids) <= cut or not ends_by_eos or holds_special(renderer, template)
    # ids are taken as they are
    sampled = ids[len(start) :]
    assert encode(renderer, pair, sampled) == (ids, mask)
    assert isinstance(decode(renderer, sampled), str)


@many
@given(
    rows=st.lists(st.tuples(text, text), min_size=1, max_size=12),
    number=st.integers(1, 12),
    seed=st.integers(0, 9),
    length=st.integers(20, 80),
)
def test_selected_pairs_fit_and_occur_once(tokenizer, rows, number, seed, length):
    rows = [{"prompt": q, "response": a} for q, a in [*rows, ("Spell a", "a")]]
    recipe = Recipe(template="{prompt}", seed=seed, max_length=length, max_new_tokens=8)
    try:
        pairs, counts = select(rows, "set", make_renderer(tokenizer, "paper"), recipe, number)
    except SystemExit:
        return  # none that fits
    assert 1 <= len(pairs) <= number
    for name in ("prompt", "id"):
        assert len({pair[name] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert rows[pair["id"]]["prompt"] == pair["prompt"]
        assert pair["prompt"].strip() and pair["real"].strip()
        assert 0 < len(pair["prompt_ids"]) <= length - 8
    used = ("read", "response cut at max_length")
    left_out = sum(n for name, n in counts.items() if name not in used)
    assert counts["read"] == len(pairs) + left_out


sizes = st.lists(st.one_of(st.integers(1, 40), st.integers(0, 5000)), min_size=1, max_size=60)


@many
@given(sizes=sizes, budget=st.integers(1, 3000), parts=st.integers(1, 17))
def test_bins_hold_everything_once(sizes, budget, parts):
    bins = bins_of(sizes, budget, parts)
    load = [sum(sizes[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert len(bins) % parts == 0 and load == sorted(load, reverse=True)
    assert all(full <= budget or len(b) == 1 for full, b in zip(load, bins, strict=True))
    if budget >= max(sizes) and len(sizes) > 4 * len(bins):
        assert load[0] - load[-1] <= max(sizes)  # as even as the largest piece allows


token = st.integers(0, 99)
# prompt, rest of it and real answer, the same and generated answer; (id, mask) of each token behind
# the prompt, whose first is never an answer's
behind = st.lists(st.tuples(token, st.integers(0, 1)), min_size=1, max_size=20)
one_pair = st.tuples(st.lists(token, min_size=1, max_size=20), behind, behind, st.booleans())


@many
@given(pairs=st.lists(one_pair, min_size=1, max_size=6))
def test_a_packed_row_holds_every_sequence_and_tells_where_each_answer_token_is_predicted(pairs):
    """Whether a prompt is there once for both answers or twice."""
    sequences = [
        (pair[0] + [i for i, _ in pair[half]], [0] * len(pair[0]) + [m for _, m in pair[half]])
        for half in (1, 2)
        for pair in pairs
    ]
    n = len(pairs)
    shared = [(k, 0) for k in range(n)]
    shared += [(k, len(p[0])) if p[3] else (n + k, 0) for k, p in enumerate(pairs)]
    row = pack(sequences, "cpu", shared)
    ids, positions = row["input_ids"][0].tolist(), row["position_ids"][0].tolist()
    skipped = sum(skip for _, skip in shared)
    assert len(ids) == len(positions) == sum(len(s) for s, _ in sequences) - skipped
    places = iter(row["predictors"].tolist())
    labels = iter(row["labels"].tolist())
    for (tokens, mask), count in zip(sequences, row["counts"], strict=True):
        answer = [j for j, m in enumerate(mask) if m]
        assert count == len(answer)
        for j in answer:
            place = next(places)
            assert (ids[place], positions[place]) == (tokens[j - 1], j - 1)
            assert next(labels) == tokens[j]
    assert next(places, None) is None


@many
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=50),
    ranks=st.integers(1, 9),
    batch=st.integers(1, 70),
    budget=st.integers(1, 900),
    order=st.tuples(st.integers(0, 2**40), st.integers(0, 5), st.integers(0, 3)),
    sft=st.booleans(),
)
def test_each_pair_is_trained_on_once_in_as_many_passes(lengths, ranks, batch, budget, order, sft):
    seed, t, epoch = order
    pairs = [
        {"real": ([0] * real, 0), "generated": ([0] * generated, 0), "index": i, "shared": 0}
        for i, (real, generated) in enumerate(lengths)
    ]
    objective = "sft" if sft else "spin"
    recipe = Recipe(batch_size=batch, micro_tokens=budget, seed=seed, objective=objective)
    plan = batches(len(pairs), recipe, t, epoch)
    assert all(len(b) == batch for b in plan[:-1])
    halves = ("real",) if sft else ("real", "generated")
    seen = collections.Counter()
    for one in plan:
        # (rows, weights) of each pass, rank by rank
        shares = [
            list(micro_batches(one, pairs, recipe, World(rank, ranks, None)))
            for rank in range(ranks)
        ]
        assert len({len(passes) for passes in shares}) == 1
        here = []
        for rows, weight in itertools.chain.from_iterable(shares):
            assert rows
            size = sum(len(row[half][0]) for row in rows for half in halves)
            assert size <= budget or len(rows) == 1
            here += [row["index"] for row in rows if weight]
        assert sorted(here) == sorted(one)
        seen.update(here)
    assert seen == collections.Counter(range(len(pairs)))
