"""Text → token ids and response masks, and back. Every stage renders and tokenises through here."""

import functools

from spin.files import fail

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # Appendix B.1


def load_tokenizer(name: str, recipe):
    """The tokenizer of a model and the size of its head, checked together before any weight."""
    from transformers import AutoConfig, AutoTokenizer, logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    revision = recipe.revision_of(name)
    try:
        # trust_remote_code unset, transformers would ask
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        text_config = config.get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as problem:  # transformers raises many kinds here; each: no usable model
        cause = f"{type(problem).__name__}: {str(problem)[:300]}"
        fail(f"cannot load the tokenizer and config of {name}: {cause}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    # BERT and its kin are there too, for use as decoders; GPT-NeoX is one, and says it is not
    decoder = getattr(text_config, "is_decoder", True) or causal in (config.architectures or ())
    if not causal or not decoder:
        wanted = "each token must follow from those before it"
        fail(f"{name} is no causal language model ({config.model_type}): {wanted}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name} has no EOS token, so a response could not end")
    largest = max(tokenizer.get_vocab().values())
    if largest >= text_config.vocab_size:
        known = f"its model only {text_config.vocab_size} tokens"
        fail(f"the tokenizer of {name} has a token {largest}, {known}: not a pair")
    context = getattr(text_config, "max_position_embeddings", None)
    if context and recipe.max_length > context:
        most = f"the {context} positions of {name}; give --max-length {context}"
        fail(f"--max-length {recipe.max_length} is more than {most}")
    return tokenizer, text_config.vocab_size


def render(tokenizer, template: str, prompt: str, system: str = "") -> str:
    """The prompt as the model sees it. template: 'paper', 'chat' (the tokenizer's own), or a string
    with {prompt}: plain substitution."""
    if template != "chat":
        text = PAPER_TEMPLATE if template == "paper" else template
        return text.replace("{prompt}", f"{system}\n\n{prompt}" if system else prompt)
    mend = "use --template paper, or a string with {prompt}"
    if not tokenizer.chat_template:
        fail(f"this tokenizer has no chat template: {mend}")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # a template may refuse by any, a system message for instance
        fail(f"the chat template refuses a prompt ({problem}): {mend}")


def encode(tokenizer, template: str, pair: dict, response=None, max_length=None, eos=True):
    """(prompt, response) → token ids and response mask, both (T,); here text becomes tokens.
    pair: holds prompt, and maybe system. response: text; sampled ids, taken as they are; or None
    for the prompt alone. Text gets the EOS if eos. A response that does not fit in max_length is
    cut and then has no EOS: one that was never produced would tell real from generated.
    Exactly one BOS if the tokenizer has one, whatever its template does."""
    # where specials are not parsed, "</s>" in someone's prompt is four characters and no EOS
    literal = not parses_specials(tokenizer, template)
    tokenise = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=literal)
    room = most_characters(tokenizer, max_length) if max_length else None
    text = render(tokenizer, template, pair["prompt"], pair.get("system", ""))[:room]
    # The prompt's ids do not depend on the response: a template's last spaces go to the response's
    # first token, as in the LM Evaluation Harness. "Response: " + "Yes" and "Response:" + " Yes"
    # are different tokens to most models.
    head = text.rstrip(" ")
    ids = tokenise(head)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id not in (None, *ids[:1]) else []
    if isinstance(response, str):
        ended = eos and response == response[:room]
        after = text[len(head) :] + response[:room]
        both = tokenise(head + after)["input_ids"]
        apart = both[: len(ids)] != ids  # merged at the boundary
        if apart or not literal and holds_special(tokenizer, response):
            both = ids + tokenise(after, split_special_tokens=True)["input_ids"]
        response = both[len(ids) :] + [tokenizer.eos_token_id] * ended
    response = response or []
    mask = [0] * len(bos + ids) + [1] * len(response)
    return (bos + ids + response)[:max_length], mask[:max_length]


@functools.lru_cache(maxsize=8)
def most_characters(tokenizer, length: int) -> int:
    """More characters than `length` tokens hold: to tokenise 50 MB behind them takes a minute."""
    return 10_000 + length * max(map(len, tokenizer.get_vocab()))


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer) -> tuple[str, ...]:
    """Every special token's text, those included that have no role, such as <repo_name>."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added})


def holds_special(tokenizer, text: str) -> bool:
    """Whether text spells out a special token, such as </s>."""
    return any(token in text for token in special_tokens(tokenizer))


@functools.lru_cache(maxsize=8)
def parses_specials(tokenizer, template: str) -> bool:
    """Whether text's special tokens are parsed: the template has some, or the tokenizer must."""
    if template == "chat" or holds_special(tokenizer, template):
        return True
    names = [token for token in special_tokens(tokenizer) if token != tokenizer.unk_token]
    # their text may be in the vocabulary of words too
    text = "".join(f"{name}\n{name} {name}a{name}" for name in names)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return not set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(ids)


def decode(tokenizer, template: str, ids: list[int]) -> str:
    """The text of a sampled response, without its EOS and the space that the template lent it."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spaced = template == "paper" or template.endswith(" ")
    return text[1:] if spaced and text.startswith(" ") else text
