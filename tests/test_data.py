"""spin/data.py, tokens.py and selection.py: the shapes of SFT data, the template, the tokens."""

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spin.codec import make_codec
from spin.data import Unusable
from spin.data import to_pair as pair_and_unused
from spin.files import write_jsonl
from spin.recipe import Recipe
from spin.selection import select
from spin.sources import read_rows
from spin.tokens import decode, encode, holds_special, render


def talk(*turns: str) -> list[dict]:
    """A conversation as messages; the user speaks first."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(turns)
    ]


def to_pair(row, source="set"):
    """The pair alone."""
    pair, _ = pair_and_unused(row, source)
    pair.pop("later_rounds", None)
    return pair


WANTED = {"prompt": "Hi?", "real": "Hello."}
ROUND = talk("Hi?", "Hello.")
OTHER = talk("Hi?", "Yo")
ULTRACHAT = {"messages": talk("Hi?", "Hello.", "More", "No."), "prompt": "Hi?", "prompt_id": "7"}
SHAPES = {
    "prompt/response": {"prompt": "Hi?", "response": "Hello."},
    "prompt/completion": {"prompt": "Hi?", "completion": "Hello."},
    "question/answer": {"question": "Hi?", "answer": "Hello."},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "messages": ULTRACHAT,
    "prompt/chosen/rejected": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Yo"},
    "ultrafeedback": {"prompt": "Hi?", "chosen": ROUND, "rejected": OTHER, "messages": ROUND},
    "real/generated": {"real": ROUND, "generated": OTHER},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_shape_is_read_from_every_kind_of_file(shape, kind, tmp_path):
    path = tmp_path / f"set.{kind}"
    rows = [SHAPES[shape]] * 2
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    pairs = [to_pair(row, "row") for row in read_rows(str(path))]
    wanted = WANTED | ({"generated": "Yo"} if "Yo" in str(SHAPES[shape]) else {})
    assert pairs == [wanted, wanted]


def test_alpacas_input_belongs_to_the_prompt():
    pair = to_pair({"instruction": "Sum", "input": "1 2", "output": "3"}, "")
    assert pair["prompt"] == "Sum\n\n1 2"


def test_a_system_message_stays_with_the_prompt_and_only_the_first_round_counts(tokenizer):
    system = {"role": "system", "content": "Be kind."}
    pair = to_pair({"messages": [system, *ULTRACHAT["messages"]]}, "")
    assert pair == {**WANTED, "system": "Be kind."}
    text = render(
        make_codec(tokenizer, "paper"), {"prompt": pair["prompt"], "system": pair["system"]}
    )
    assert text.startswith("### Instruction: Be kind.\n\nHi?")


def test_a_set_of_unknown_shape_is_refused_by_its_fields_and_the_known_ones(refused, tokenizer):
    line = refused(lambda: selected([{"text": "a", "label": 1}], tokenizer))
    assert "text, label" in line and "instruction/output" in line and "set holds no" in line


# ---- tokens ----


SPACED_WORDS = "<unk> <s> </s> ▁ ### ▁### ▁Instruction: ▁Response: ▁Hi? ▁Hello Hello ▁Yes"


def spaced_tokenizer(adds_bos: bool = True):
    """A tokenizer that splits as SentencePiece models do: a space belongs to the word behind it.
    It puts its BOS before a text, as Llama's does, or has one and does not, as GPT-2's."""
    numbers = {word: i for i, word in enumerate([*SPACED_WORDS.split(), "\n"])}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    core.decoder = decoders.Metaspace()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=["demo", "spaced"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "demo" else spaced_tokenizer()


def test_a_sequence_has_one_bos_and_ends_with_its_only_eos_and_the_mask_covers_the_response(
    any_tokenizer,
):
    tok = any_tokenizer
    prompt, prompt_mask = encode(make_codec(tok, "paper"), {"prompt": "Hi?"})
    ids, mask = encode(make_codec(tok, "paper"), {"prompt": "Hi?"}, "Hello")
    assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1
    assert ids[-1] == tok.eos_token_id and ids.count(tok.eos_token_id) == 1
    assert ids[: len(prompt)] == prompt and not any(prompt_mask)
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    text = tok.decode(ids, skip_special_tokens=True).replace("▁", " ")
    assert "### Instruction: Hi?\n\n### Response: Hello" in text


def test_a_tokenizer_that_writes_no_bos_gets_none_though_it_has_one():
    tok = spaced_tokenizer(adds_bos=False)
    ids, _ = encode(make_codec(tok, "paper"), {"prompt": "Hi?"}, "Hello")
    assert ids.count(1) == 0 and tok.bos_token_id == 1
    ids, _ = encode(make_codec(spaced_tokenizer(), "paper"), {"prompt": "Hi?"}, "Hello")
    assert ids.count(1) == 1  # control: one that does


def test_the_templates_last_space_goes_to_the_response_where_the_model_would_write_it():
    tok = spaced_tokenizer()
    ids, mask = encode(make_codec(tok, "paper"), {"prompt": "Hi?"}, "Hello")
    assert tok.convert_ids_to_tokens(ids)[-3:] == ["▁Response:", "▁Hello", "</s>"]
    assert mask[-3:] == [0, 1, 1]
    # control: tokenised apart, a stray "▁"
    halves = [tok(text, add_special_tokens=False) for text in ("### Response: ", "Hello")]
    apart = [token for half in halves for token in tok.convert_ids_to_tokens(half["input_ids"])]
    assert apart[-2:] != ["▁Response:", "▁Hello"]


def test_spaces_that_end_a_prompt_do_not_go_to_the_answer(tokenizer):
    pair = {"prompt": "Spell tin  "}
    for template in ("{prompt}", "Q: {prompt}"):
        codec = make_codec(tokenizer, template)
        ids, mask = encode(codec, pair, "t-i-n", eos=False)
        assert decode(codec, [i for i, m in zip(ids, mask, strict=True) if m]) == "t-i-n"
        prompt, _ = encode(codec, pair)
        assert tokenizer.decode(prompt, skip_special_tokens=True).endswith("tin  ")
    ids, mask = encode(make_codec(tokenizer, "{prompt}  "), pair, "t-i-n", eos=False)
    answer = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(answer) == "  t-i-n"  # control: the template's own do


def test_generation_and_training_see_the_same_prompt_ids(tokenizer):
    pair = {"prompt": "Reverse kola"}
    in_generation, _ = encode(make_codec(tokenizer, "paper"), pair)
    in_training, _ = encode(make_codec(tokenizer, "paper"), pair, "alok")
    assert in_training[: len(in_generation)] == in_generation
    otherwise, _ = encode(make_codec(tokenizer, "Q: {prompt}\nA:"), pair)
    assert in_generation != otherwise  # control: another template


def test_sampled_ids_are_taken_as_they_are_though_their_text_would_be_split_otherwise(tokenizer):
    # letter by letter; the tokenizer has "Sort "
    spelled = [tokenizer.convert_tokens_to_ids(c) for c in " Sort 1"]
    text = decode(make_codec(tokenizer, "paper"), spelled)
    assert text == "Sort 1"
    ids, mask = encode(make_codec(tokenizer, "paper"), {"prompt": "x"}, spelled)
    assert ids[-7:] == spelled and mask[-7:] == [1] * 7
    # control: its text
    ids, mask = encode(make_codec(tokenizer, "paper"), {"prompt": "x"}, text, eos=False)
    assert [i for i, m in zip(ids, mask, strict=True) if m] != spelled


def test_the_text_of_a_special_token_in_a_response_or_prompt_does_not_become_one(tokenizer):
    ids, _ = encode(make_codec(tokenizer, "paper"), {"prompt": "say </s><s>"}, "a</s>b")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids.count(tokenizer.bos_token_id) == 1
    # control: plain tokenising parses it
    assert tokenizer("a</s>b")["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_response_that_does_not_fit_is_cut_and_gets_no_eos(tokenizer):
    pair = {"prompt": "Spell tin"}
    whole, _ = encode(make_codec(tokenizer, "paper"), pair, "t-i-n")
    ids, mask = encode(make_codec(tokenizer, "paper"), pair, "t-i-n", max_length=len(whole) - 2)
    assert ids == whole[:-2] and len(mask) == len(ids)
    assert tokenizer.eos_token_id not in ids


def with_chat_template(tokenizer, template: str):
    """The demo's tokenizer with a chat template."""
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tok.chat_template = template
    return tok


def test_the_chat_template_is_the_tokenizers_own_with_one_bos(tokenizer):
    tok = with_chat_template(
        tokenizer,
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}",
    )
    assert (
        render(make_codec(tok, "chat"), {"prompt": "Hi", "system": "Be kind"})
        == "<s>system:\nBe kind\nuser:\nHi\nassistant:\n"
    )
    ids, _ = encode(make_codec(tok, "chat"), {"prompt": "Hi"}, "Yo")
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id
    assert ids.count(tok.eos_token_id) == 1


def test_a_chat_template_that_refuses_a_system_message_is_named(tokenizer):
    tok = with_chat_template(
        tokenizer,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    )
    assert render(make_codec(tok, "chat"), {"prompt": "Hi"}) == "Hi</s>"
    with pytest.raises(Unusable, match="no system role"):
        render(make_codec(tok, "chat"), {"prompt": "Hi", "system": "Be kind"})


def test_a_special_token_without_a_role_counts_as_special_too(tokenizer):
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tok = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="</s>")
    assert not holds_special(make_codec(tok, "paper"), "see <repo>")
    tok.add_tokens([AddedToken("<repo>", special=True)])
    assert "<repo>" not in tok.all_special_tokens
    assert holds_special(make_codec(tok, "paper"), "see <repo>")


def test_chat_without_a_chat_template_is_refused(tokenizer, refused):
    assert "no chat template" in refused(
        lambda: render(make_codec(tokenizer, "chat"), {"prompt": "Hi"})
    )


def test_other_braces_in_template_or_prompt_are_plain_text(tokenizer):
    assert (
        render(make_codec(tokenizer, "{x} {prompt} {0}"), {"prompt": "a {prompt} {y}"})
        == "{x} a {prompt} {y} {0}"
    )


# ---- selection ----


def rows_of(n):
    return [{"prompt": f"p {i}", "response": f"r {i}"} for i in range(n)]


SHORT = Recipe(max_length=64, max_new_tokens=24)


def selected(rows, tokenizer, number=1000, recipe=SHORT):
    return select(rows, "set", make_codec(tokenizer, recipe.template), recipe, number)


def test_a_smaller_number_of_prompts_is_a_subset_of_a_larger_under_one_seed(tokenizer):
    def ids_of(number, recipe=SHORT):
        pairs, _ = selected(rows_of(100), tokenizer, number, recipe)
        return {pair["id"] for pair in pairs}

    assert ids_of(14) < ids_of(26) < ids_of(50) and len(ids_of(50)) == 50
    assert ids_of(14) != ids_of(14, replace(SHORT, seed=1))  # control: another seed


def test_what_is_left_out_is_counted_by_rule(tokenizer):
    rows = rows_of(3) + [
        {"prompt": "p 0", "response": "again"},
        {"prompt": "q", "response": " "},
        {"prompt": "", "response": "r"},
        {"prompt": "w" * 60, "response": "r"},
        {"prompt": "z", "response": "y" * 60},
    ]
    pairs, counts = selected(rows, tokenizer)
    assert {p["prompt"] for p in pairs} == {"p 0", "p 1", "p 2", "z"}
    assert {name: number for name, number in counts.items() if number} == {
        "read": 8,
        "duplicate prompt": 1,
        "empty prompt or response": 2,
        "prompt too long": 1,
        "response cut at max_length": 1,
    }


def test_with_a_template_of_special_tokens_text_that_spells_one_is_left_out_and_counted(tokenizer):
    rows = rows_of(2) + [{"prompt": "what is </s>?", "response": "r"}]
    _, counts = selected(rows, tokenizer, recipe=replace(SHORT, template="{prompt}</s>A:"))
    assert counts["text of a special token"] == 1
    _, counts = selected(rows, tokenizer)
    assert counts["text of a special token"] == 0  # the paper's template is plain text


def test_a_prompt_of_no_tokens_is_left_out_for_nothing_would_predict_the_first_token_of_its_answer(
    tokenizer,
):
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))  # drops what it does not know
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    rows = [{"prompt": "zz", "response": "a"}, {"prompt": "ab", "response": "b"}]
    pairs, counts = selected(rows, tok, recipe=replace(SHORT, template="{prompt}"))
    assert [p["prompt_ids"] for p in pairs] == [[0, 1]]
    assert counts["prompt of no tokens"] == 1


def test_no_usable_rows_is_refused_with_the_counts(tokenizer, refused):
    rows = [{"prompt": "", "response": "x"}] * 2
    assert "empty prompt or response: 2" in refused(lambda: selected(rows, tokenizer))


def test_an_sft_set_that_has_answers_of_an_opponent_too_is_not_judged_by_them(tokenizer):
    """Empty, or a special token spelt out: only train.py --pairs uses them."""
    bare = [{"prompt": f"Spell {w}", "response": w} for w in ("tin", "kola", "bel", "amu")]
    poor = []
    for row, answer in zip(bare, ("", "</s>", " ", "x"), strict=True):
        poor.append({"prompt": row["prompt"], "real": row["response"], "generated": answer})
    ids = [[pair["id"] for pair in selected(rows, tokenizer)[0]] for rows in (bare, poor)]
    assert ids[0] == ids[1] and len(ids[0]) == 4
    poor[3]["real"] = ""  # control
    assert len(selected(poor, tokenizer)[0]) == 3
