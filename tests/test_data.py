"""spin/data/text.py: plain templates and chat templates, tokens and masks."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spin.data.text import decode, encode, holds_special, make_renderer, render


def talk(*turns: str) -> list[dict]:
    """A conversation as messages; the user speaks first."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(turns)
    ]


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


def test_the_templates_last_space_goes_to_the_response_where_the_model_would_write_it():
    tok = spaced_tokenizer()
    ids, mask = encode(make_renderer(tok, "paper"), {"prompt": "Hi?"}, "Hello")
    assert tok.convert_ids_to_tokens(ids)[-3:] == ["▁Response:", "▁Hello", "</s>"]
    assert mask[-3:] == [0, 1, 1]
    # control: tokenised apart, a stray "▁"
    halves = [tok(text, add_special_tokens=False) for text in ("### Response: ", "Hello")]
    apart = [token for half in halves for token in tok.convert_ids_to_tokens(half["input_ids"])]
    assert apart[-2:] != ["▁Response:", "▁Hello"]


def test_spaces_that_end_a_prompt_do_not_go_to_the_answer(tokenizer):
    pair = {"prompt": "Spell tin  "}
    for template in ("{prompt}", "Q: {prompt}"):
        renderer = make_renderer(tokenizer, template)
        ids, mask = encode(renderer, pair, "t-i-n", eos=False)
        assert decode(renderer, [i for i, m in zip(ids, mask, strict=True) if m]) == "t-i-n"
        prompt, _ = encode(renderer, pair)
        assert tokenizer.decode(prompt, skip_special_tokens=True).endswith("tin  ")
    ids, mask = encode(make_renderer(tokenizer, "{prompt}  "), pair, "t-i-n", eos=False)
    answer = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(answer) == "  t-i-n"  # control: the template's own do


def test_sampled_ids_are_taken_as_they_are_though_their_text_would_be_split_otherwise(tokenizer):
    # letter by letter; the tokenizer has "Sort "
    spelled = [tokenizer.convert_tokens_to_ids(c) for c in " Sort 1"]
    text = decode(make_renderer(tokenizer, "paper"), spelled)
    assert text == "Sort 1"
    ids, mask = encode(make_renderer(tokenizer, "paper"), {"prompt": "x"}, spelled)
    assert ids[-7:] == spelled and mask[-7:] == [1] * 7
    # control: its text
    ids, mask = encode(make_renderer(tokenizer, "paper"), {"prompt": "x"}, text, eos=False)
    assert [i for i, m in zip(ids, mask, strict=True) if m] != spelled


def test_the_text_of_a_special_token_in_a_response_or_prompt_does_not_become_one(tokenizer):
    ids, _ = encode(make_renderer(tokenizer, "paper"), {"prompt": "say </s><s>"}, "a</s>b")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids.count(tokenizer.bos_token_id) == 1
    # control: plain tokenising parses it
    assert tokenizer("a</s>b")["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_special_token_without_a_role_counts_as_special_too(tokenizer):
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tok = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="</s>")
    assert not holds_special(make_renderer(tok, "paper"), "see <repo>")
    tok.add_tokens([AddedToken("<repo>", special=True)])
    assert "<repo>" not in tok.all_special_tokens
    assert holds_special(make_renderer(tok, "paper"), "see <repo>")


def test_a_plain_template_has_the_system_message_before_the_prompt(tokenizer):
    text = render(make_renderer(tokenizer, "paper"), {"prompt": "Hi?", "system": "Be kind."})
    assert text == "### Instruction: Be kind.\n\nHi?\n\n### Response: "
    braces = make_renderer(tokenizer, "{x} {{y}} {prompt} %s:")
    assert render(braces, {"prompt": "Hi {0} {prompt}"}) == "{x} {{y}} Hi {0} {prompt} %s:"
