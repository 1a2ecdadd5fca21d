"""Text → token ids, and back. Every stage renders and tokenises through here, so that all see the
same. What is prompt and what is answer: spin/codec.py."""

import functools
from functools import partial

from spin.codec import Codec
from spin.data import Unusable

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # Appendix B.1


def render(codec: Codec, pair: dict, answer: str | None = None) -> str:
    """The prompt as the model sees it, or the prompt and an answer with all that is around it.
    pair: holds prompt, and maybe system. Plain templates substitute, and nothing else."""
    system = pair.get("system", "")
    if codec.template != "chat":
        text = PAPER_TEMPLATE if codec.template == "paper" else codec.template
        asked = f"{system}\n\n{pair['prompt']}" if system else pair["prompt"]
        return text.replace("{prompt}", asked) + (answer or "")
    # an empty system message is one: some templates would put their own in the place of none
    messages = [{"role": "system", "content": system}] if "system" in pair else []
    messages.append({"role": "user", "content": pair["prompt"]})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = render_messages(codec, messages)
    lost = [name for name in ("system", "prompt") if pair.get(name, "").strip() not in text]
    if lost or (system and drops_system(codec)):
        raise Unusable(f"the chat template drops or changes the {(*lost, 'system')[0]}")
    return text


@functools.lru_cache(maxsize=8)
def drops_system(codec: Codec) -> bool:
    """Whether the chat template leaves out a system message: found by one that no prompt holds."""
    system = "Speak as a zebra."
    question = [{"role": "system", "content": system}, {"role": "user", "content": "Which?"}]
    return system not in render_messages(codec, question)


def render_messages(codec: Codec, messages: list[dict]) -> str:
    """A conversation by the chat template; with the generation prompt unless it is answered."""
    asks = messages[-1]["role"] != "assistant"
    try:
        return codec.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks, **codec.arguments
        )
    except Exception as problem:  # a template may refuse by any, a system message for instance
        raise Unusable(f"the chat template refuses it ({str(problem)[:80]})") from None


def split_text(codec: Codec, pair: dict, response: str | None, ended: bool) -> tuple[str, str]:
    """(text of the prompt, text that the answer adds); ended: with what ends the answer (chat).
    Raises Unusable where the chat template does more to the answer than trim it."""
    text = render(codec, pair)
    if codec.template != "chat":
        # A template's last spaces go to the answer's first token, as in the LM Evaluation Harness:
        # "Response: " + "Yes" and "Response:" + " Yes" are different tokens to most models.
        template = PAPER_TEMPLATE if codec.template == "paper" else codec.template
        spaces = len(template) - len(template.rstrip(" "))  # not those that end someone's prompt
        prompt = text[: len(text) - spaces]
        return prompt, text[len(prompt) :] + (response or "")
    if response is None:
        return text, ""
    whole = render(codec, pair, response)
    added = whole.removeprefix(text)
    inner = added.removeprefix(codec.lead).removesuffix(codec.tail)
    wanted = (text, codec.lead + inner + codec.tail, response.strip())
    if (whole[: len(text)], added, inner.strip()) != wanted:
        raise Unusable("the chat template changes the answer")
    return text, added if ended else codec.lead + inner


def split_ids(
    codec: Codec, pair: dict, response=None, max_length=None, eos=True
) -> tuple[list[int], list[int], bool]:
    """(ids of the prompt, ids of the answer, whether a token would have reached across the border:
    then the answer is tokenised by itself).
    pair: holds prompt, and maybe system. response: text; sampled ids, taken as they are; or None
    for the prompt alone. Text gets the end of turn if eos, and if it is not certainly longer than
    max_length. The prompt's ids do not depend on the answer. Raises Unusable."""
    # where specials are not parsed, "</s>" in someone's prompt is four characters and no EOS
    literal = not parses_specials(codec)
    tokenise = partial(codec.tokenizer, add_special_tokens=False, split_special_tokens=literal)
    room = most_characters(codec.tokenizer, max_length) if max_length else None
    in_words = isinstance(response, str)
    ended = eos and in_words and response == response[:room]
    prompt, added = split_text(codec, pair, response[:room] if in_words else None, ended)
    prompt = prompt[:room]
    ids = tokenise(prompt)["input_ids"]
    answer = response or []
    merged = False
    if in_words:
        both = tokenise(prompt + added)["input_ids"]
        answer = both[len(ids) :]
        merged = both[: len(ids)] != ids
        if codec.template != "chat" and not literal and holds_special(codec, response):
            answer = ids_amid_text(partial(tokenise, split_special_tokens=True), added)
        elif merged:
            answer = ids_amid_text(tokenise, added)
        if codec.template != "chat":
            answer = answer + [codec.end] * ended
        elif ended and codec.end not in answer:
            raise Unusable("the tokenizer does not see the end of turn behind the answer")
        elif ended:
            answer = answer[: answer.index(codec.end) + 1]
    if ids[: len(codec.begin)] != codec.begin:  # else the template wrote it
        ids = codec.begin + ids
    if any(i >= codec.vocabulary for i in ids + answer):
        raise Unusable("a token that the model lacks")
    return ids, answer, merged


def ids_amid_text(tokenise, text: str) -> list[int]:
    """The ids of a text that goes on from another: some tokenizers put a space before the first
    word that they see, which here would be one too many."""
    for before in ("\n", "a", "."):  # one with which the text's first characters do not merge
        ids = tokenise(before)["input_ids"]
        both = tokenise(before + text)["input_ids"]
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    return tokenise(text)["input_ids"]


def encode(codec: Codec, pair: dict, response=None, max_length=None, eos=True):
    """split_ids as one sequence: token ids and response mask, both (T,), cut at max_length. An
    answer that was cut has no end of turn: one never produced would tell real from generated."""
    ids, answer, _ = split_ids(codec, pair, response, max_length, eos)
    mask = [0] * len(ids) + [1] * len(answer)
    return (ids + answer)[:max_length], mask[:max_length]


def decode(codec: Codec, ids: list[int]) -> str:
    """The text of a sampled answer, without its end and what the template puts around it."""
    ids = ids[:-1] if ids[-1:] == [codec.end] else ids
    if codec.template == "chat":
        end = codec.tokenizer.decode([codec.end])
        lead = as_text(
            codec.tokenizer, codec.tokenizer(codec.lead, add_special_tokens=False).input_ids
        )
        behind = codec.tail.partition(end)[0]
        return as_text(codec.tokenizer, ids).removeprefix(lead).removesuffix(behind)
    text = as_text(codec.tokenizer, ids)
    spaced = codec.template == "paper" or codec.template.endswith(" ")
    return text[1:] if spaced and text.startswith(" ") else text


def as_text(tokenizer, ids: list[int]) -> str:
    """Ids as text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@functools.lru_cache(maxsize=8)
def most_characters(tokenizer, length: int) -> int:
    """More characters than `length` tokens hold: to tokenise 50 MB behind them takes a minute."""
    return 10_000 + length * max(map(len, tokenizer.get_vocab()))


@functools.lru_cache(maxsize=8)
def special_tokens(codec: Codec) -> tuple[str, ...]:
    """Every special token's text, those included that have no role, such as <repo_name>."""
    tokenizer = codec.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added, tokenizer.decode([codec.end])})


def holds_special(codec: Codec, text: str) -> bool:
    """Whether text spells out a special token, such as </s>, or the one that ends an answer."""
    return any(token in text for token in special_tokens(codec))


@functools.lru_cache(maxsize=8)
def parses_specials(codec: Codec) -> bool:
    """Whether text's special tokens are parsed: the template has some, or the tokenizer must."""
    if codec.template == "chat" or holds_special(codec, codec.template):
        return True
    tokenizer = codec.tokenizer
    names = [token for token in special_tokens(codec) if token != tokenizer.unk_token]
    # their text may be in the vocabulary of words too
    text = "".join(f"{name}\n{name} {name}a{name}" for name in names)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return not set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(ids)
