"""Any text in any shape, any lengths, any number of ranks: what data.py, packing.py and train.py promise of all of them.

200 examples each, the same ones every time; FUZZ=10000 python -m pytest -q tests/test_fuzz.py tries that many new ones.
"""

import collections
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_data import spaced_tokenizer

import train
from spin import distributed
from spin import recipe as recipes
from spin.data import decode, encode, holds_special, parses_specials, select, to_pair
from spin.packing import pack, share

NUMBER = int(os.environ.get("FUZZ", 200))
many = settings(
    max_examples=NUMBER,
    derandomize=NUMBER == 200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = [
    "</s>",
    "<s>",
    "<unk>",
    "<|im_end|>",
    " ",
    "  ",
    "\n",
    "### Response:",
    "### Instruction:",
    "▁",
    "Hello",
    "Sort ",
    "tin",
    "\0",
    "\u200b",
    "\r\n",
    "é",
    "e\u0301",
    "{prompt}",
    "\u2028",
    "ﷺ",
    "👩‍👩‍👧",
    "\ufeff",
]
text = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=8).map("".join)
template = st.one_of(
    st.just("paper"),
    st.just("<s>[INST] {prompt} [/INST]"),
    st.tuples(text, text).map("{prompt}".join),
)
TALK = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
SHAPES = {
    "prompt/response": lambda q, a: {"prompt": q, "response": a},
    "prompt/completion": lambda q, a: {"prompt": q, "completion": a},
    "question": lambda q, a: {"question": q, "answer": a},
    "alpaca": lambda q, a: {"instruction": q, "output": a, "input": ""},
    "messages": lambda q, a: {"messages": TALK(q, a)},
    "own": lambda q, a: {"prompt": q, "real": a, "generated": a},
    "preference": lambda q, a: {"prompt": q, "chosen": TALK(q, a), "rejected": a},
}


@pytest.fixture(scope="module", params=["demo", "spaced", "without BOS"])
def tok(request, tokenizer):
    return {
        "demo": tokenizer,
        "spaced": spaced_tokenizer(bos_token="<s>"),
        "without BOS": spaced_tokenizer(),
    }[request.param]


@example(
    shape="question", template="paper", prompt="\n</s>", response="", other="", cut=1
)  # found by 10,000: a word of the
@example(
    shape="question", template="paper", prompt="", response="\n</s>", other="", cut=1
)  # vocabulary, though split as text
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
    pair = to_pair(SHAPES[shape](prompt, response), "row")
    assert (pair["prompt"], pair["real"]) == (prompt, response)
    if parses_specials(tok, template) and any(
        holds_special(tok, part) for part in (prompt, response, other)
    ):
        return  # select leaves these out, and counts them
    start, nothing = encode(tok, template, pair)
    ids, mask = encode(tok, template, pair, response)
    written = (
        0 if template == "paper" else template.count(tok.bos_token or "\0\0")
    )  # a template may be written with a BOS
    if tok.bos_token_id is not None:
        there = written > 0 and template.replace("{prompt}", prompt).startswith(tok.bos_token)
        assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == written + (not there)
    eos = ids[len(start) :].count(tok.eos_token_id)
    assert eos == 1 and ids[-1] == tok.eos_token_id
    assert written or holds_special(tok, template) or ids.count(tok.eos_token_id) == 1
    assert mask == [0] * len(start) + [1] * (len(ids) - len(start)) and not any(nothing)
    assert ids[: len(start)] == start == encode(tok, template, pair, other)[0][: len(start)]
    short, short_mask = encode(tok, template, pair, response, cut)
    assert (
        short == ids[:cut]
        and short_mask == mask[:cut]
        and (len(ids) <= cut or short[-1:] != [tok.eos_token_id] or holds_special(tok, template))
    )
    sampled = ids[len(start) :]
    assert encode(tok, template, pair, sampled) == (ids, mask)  # ids are taken as they are
    assert isinstance(decode(tok, template, sampled), str)


@many
@given(
    rows=st.lists(st.tuples(text, text), min_size=1, max_size=12),
    number=st.integers(1, 12),
    seed=st.integers(0, 9),
    length=st.integers(20, 80),
)
def test_selected_pairs_fit_and_occur_once(tokenizer, rows, number, seed, length):
    rows = [{"prompt": q, "response": a} for q, a in rows] + [
        {"prompt": "Spell a", "response": "a"}
    ]
    try:
        pairs, counts = select(rows, "set", tokenizer, "{prompt}", number, seed, length, 8)
    except SystemExit:
        return  # none that fits
    assert 1 <= len(pairs) <= number and len({p["prompt"] for p in pairs}) == len(pairs) == len(
        {p["id"] for p in pairs}
    )
    for pair in pairs:
        assert (
            rows[pair["id"]]["prompt"] == pair["prompt"]
            and pair["prompt"].strip()
            and pair["real"].strip()
        )
        assert 0 < len(pair["prompt_ids"]) <= length - 8
    left = sum(
        n for name, n in counts.items() if name not in ("read", "response cut at max_length")
    )
    assert counts["read"] == len(pairs) + left


sizes = st.lists(st.one_of(st.integers(1, 40), st.integers(0, 5000)), min_size=1, max_size=60)


@many
@given(sizes=sizes, budget=st.integers(1, 3000), parts=st.integers(1, 17))
def test_bins_hold_everything_once(sizes, budget, parts):
    bins = share(sizes, budget, parts)
    load = [sum(sizes[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert len(bins) % parts == 0 and load == sorted(load, reverse=True)
    assert all(full <= budget or len(b) == 1 for full, b in zip(load, bins))
    if budget >= max(sizes) and len(sizes) > 4 * len(bins):
        assert load[0] - load[-1] <= max(sizes)  # as even as the largest piece allows


@many
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1)), min_size=1, max_size=30),
        min_size=1,
        max_size=9,
    )
)
def test_a_packed_row_falls_apart_into_its_sequences(rows):
    sequences = [tuple(map(list, zip(*row))) for row in rows]
    ids, mask, lengths = pack(sequences, "cpu")
    assert ids.shape == mask.shape == (1, sum(lengths))
    assert [
        (a.tolist(), b.tolist()) for a, b in zip(ids[0].split(lengths), mask[0].split(lengths))
    ] == sequences


@many
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=50),
    ranks=st.integers(1, 9),
    batch=st.integers(1, 70),
    budget=st.integers(1, 900),
    seed=st.integers(0, 2**40),
    t=st.integers(0, 5),
    epoch=st.integers(0, 3),
    sft=st.booleans(),
)
def test_every_pair_is_trained_on_once_an_epoch_and_every_rank_makes_as_many_passes(
    lengths, ranks, batch, budget, seed, t, epoch, sft
):
    pairs = [
        {"real": ([0] * a, 0), "generated": ([0] * b, 0), "index": i}
        for i, (a, b) in enumerate(lengths)
    ]
    recipe = recipes.Recipe(
        batch_size=batch, micro_tokens=budget, seed=seed, objective="sft" if sft else "spin"
    )
    plan, seen = train.batches(len(pairs), recipe, t, epoch), collections.Counter()
    assert all(len(b) == batch for b in plan[:-1])
    for one in plan:
        shares = [
            list(train.micro_batches(one, pairs, recipe, distributed.World(rank, ranks, None)))
            for rank in range(ranks)
        ]
        assert len({len(passes) for passes in shares}) == 1
        here = [
            row["index"]
            for passes in shares
            for rows, weight in passes
            for row, w in zip(rows, weight.tolist())
            if w
        ]
        assert sorted(here) == sorted(one) and all(rows for passes in shares for rows, _ in passes)
        seen.update(here)
    assert seen == collections.Counter(range(len(pairs)))
