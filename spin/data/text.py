"""Text → token ids, and back: one model's tokenizer and template together. Every stage renders and
tokenizes here, so that all see the same.

With --template chat, prompt and answer come from two renderings by the tokenizer's own template,
with the answer and without. Qwen3, for instance:

    prompt                   │ before_answer            │ answer │ after_answer
    …<|im_start|>assistant\\n │ <think>\\n\\n</think>\\n\\n   │ Apple. │ <|im_end|>\\n
                             └──────────── the answer's tokens ────────┘  eot_id ends them

The loss counts the answer's tokens including its end of turn, and nothing of the prompt. What the
template writes before an answer counts as answer, since the model has to write it, too."""

import datetime
import functools
import json
import re
from dataclasses import dataclass, replace
from functools import partial

from spin.data.rows import LONGEST, Unusable
from spin.files import fail

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # Appendix B.1
PLAIN = "use --template paper, or a string with {prompt}"  # the remedy for a chat template


@dataclass(frozen=True, eq=False)
class Codec:
    """How one model sees text."""

    tokenizer: object
    vocabulary: int  # the model knows the ids below this
    template: str  # 'chat' (the tokenizer's own), or a plain one: a string with {prompt}
    arguments: dict  # of apply_chat_template, besides the messages
    bos_ids: list[int]  # plain templates: what the tokenizer puts before a text, a BOS or nothing
    eot_id: int  # the token that ends an answer: <end_of_turn> for Gemma, else often the EOS
    before_answer: str = ""  # chat: what the template writes before an answer
    after_answer: str = ""  # chat: what it writes after the last answer, the end of turn included


def load_codec(name: str, recipe) -> Codec:
    """The codec of a model; refuses a model that SPIN cannot use, before any weight is read."""
    from transformers import AutoConfig, AutoTokenizer, logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers asks about a model's own code unless trust_remote_code is set
    options = {"revision": recipe.revision_of(name), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        text_config = config.get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        tokenizer("")  # a wrong value in its config shows in use
    except Exception as problem:  # transformers raises many kinds here
        cause = f"{type(problem).__name__}: {str(problem)[:300]}"
        fail(f"cannot load the tokenizer and config of {name}: {cause}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    # BERT is in this table, as a decoder; GPT-NeoX is a decoder, though its config says it is not
    decoder = getattr(text_config, "is_decoder", True) or causal in (config.architectures or ())
    if not causal or not decoder:
        fail(f"{name} is no causal language model ({config.model_type})")
    context = getattr(text_config, "max_position_embeddings", None)
    if context and recipe.max_length > context:
        fail(f"--max-length {recipe.max_length} is more than the {context} positions of {name}")
    size = text_config.vocab_size
    codec = make_codec(tokenizer, recipe.template, size, recipe.template_kwargs, recipe.date)
    if codec.eot_id is None:
        fail(f"the tokenizer of {name} has no EOS token, so a response could not end")
    if codec.eot_id >= size:
        known = f"its model only {size} tokens"
        fail(f"the tokenizer of {name} ends an answer by token {codec.eot_id}, {known}: not a pair")
    return codec


def make_codec(tokenizer, template: str, vocabulary=None, template_kwargs=(), date="") -> Codec:
    """The codec of a tokenizer and a template. template_kwargs: "name=value", value JSON or text.
    date: the day that a chat template may write, YYYY-MM-DD; '': today. Ends with one line if a
    chat template cannot be used."""
    vocabulary = vocabulary or 1 + max(tokenizer.get_vocab().values())
    if template != "chat":
        template = PAPER_TEMPLATE if template == "paper" else template
        bos_ids = ids_before_text(tokenizer)
        return Codec(tokenizer, vocabulary, template, {}, bos_ids, tokenizer.eos_token_id)
    arguments = template_arguments(tokenizer, template_kwargs, date)
    codec = Codec(tokenizer, vocabulary, template, arguments, [], None)
    before, after, between = around_an_answer(codec)
    eot_id = end_of_turn(tokenizer, before, after, between)
    return replace(codec, eot_id=eot_id, before_answer=before, after_answer=after)


def ids_before_text(tokenizer) -> list[int]:
    """What a tokenizer puts before a text: its BOS for Llama, nothing for Qwen."""
    # a word that it knows: a tokenizer of sums has no token for a letter
    for word in sorted(set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens}):
        text = tokenizer.convert_tokens_to_string([word])
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare:
            break
    whole = tokenizer(text)["input_ids"]
    starts = [k for k in range(len(whole)) if whole[k : k + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def template_arguments(tokenizer, template_kwargs, date: str) -> dict:
    """What a chat template is called with besides messages: the user's arguments, and the date of
    the run, since a template that writes today's would change the prompts at midnight."""
    arguments = {}
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        several = "or several with no default among them"
        fail(f"this tokenizer has no chat template, {several}: {PLAIN}")
    for item in template_kwargs:
        name, _, value = item.partition("=")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            fail(f"--template-kwargs {item}: this model's chat template knows no {name}")
        # as Python writes it, too: as text, False would be true to a template
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    if date and "strftime_now" in source:
        # transformers lets no clock of ours into a template: the date stands in the place of a call
        day = datetime.datetime.fromisoformat(date)
        call = re.compile(r"""strftime_now\(\s*(['"])([^'"{}]*)\1\s*\)""")
        source = call.sub(lambda found: found[1] + day.strftime(found[2]) + found[1], source)
        if re.search(r"strftime_now(?! is (not )?defined)", source):
            fail(f"the chat template writes the date in a way that is not known here: {PLAIN}")
        arguments["chat_template"] = source
    return arguments


def around_an_answer(codec: Codec) -> tuple[str, str, str]:
    """What the chat template writes around an answer, found from a made-up conversation: before it,
    after the last one, and after an earlier one ('' if the template refuses a second round).

    Mistral: (" ", "</s>", "</s>[INST] Which? [/INST]")"""
    system = {"role": "system", "content": "Be kind."}
    question = {"role": "user", "content": "Which?"}
    answer = {"role": "assistant", "content": "Apple"}
    for asked in ([question], [system, question]):  # some templates want a system message
        try:
            prompt = render_messages(codec, asked)
            text = render_messages(codec, [*asked, answer])
            break
        except Unusable as problem:
            refusal = problem
    else:
        fail(f"{refusal}: {PLAIN}")
    before, inside, after = text.removeprefix(prompt).partition("Apple")
    if not inside or not text.startswith(prompt):
        why = "a conversation with its answer does not begin as the one that asks for it"
        fail(f"the chat template cannot be split into prompt and answer, {why}: {PLAIN}")
    try:
        between = render_messages(codec, [*asked, answer, question]).partition("Apple")[2]
    except Unusable:  # a template for one round
        between = ""
    return before, after, between


def end_of_turn(tokenizer, before: str, after: str, between: str) -> int:
    """The token that ends an answer: the tokenizer's EOS if every turn ends with it, else the first
    special token after the last answer. The arguments are those of around_an_answer.

    Phi-3 writes "<|end|>\\n<|endoftext|>" after the last answer, but "<|end|>\\n" after an earlier
    one: its turns end with <|end|>, though its EOS is <|endoftext|>."""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ids_between = tokenizer(between, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special} | set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}  # a line break, for instance, that has no token
    ends = [i for i in ids if i in special] or [i for i in ids if i in added]
    if not ends:
        fail(f"the chat template writes no special token behind an answer to end it: {PLAIN}")
    every_turn = []  # the ids that follow every answer
    for last, earlier in zip(ids, ids_between, strict=False):
        if last != earlier:
            break
        every_turn.append(last)
    eot_id = tokenizer.eos_token_id if tokenizer.eos_token_id in every_turn else ends[0]
    if eot_id in tokenizer(before, add_special_tokens=False)["input_ids"]:
        fail(f"the chat template begins an answer with the token that ends it: {PLAIN}")
    return eot_id


def render(codec: Codec, pair: dict, answer: str | None = None) -> str:
    """The prompt as the model sees it, or the prompt and an answer with all that is around it.
    pair: holds prompt, and maybe system."""
    system = pair.get("system", "")
    if codec.template != "chat":
        asked = f"{system}\n\n{pair['prompt']}" if system else pair["prompt"]
        return codec.template.replace("{prompt}", asked) + (answer or "")
    # an empty system message is one: without it some templates would write their own
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
    """A conversation by the chat template. The generation prompt follows a user's message."""
    asks = messages[-1]["role"] == "user"
    try:
        return codec.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks, **codec.arguments
        )
    except Exception as problem:  # a template may refuse by any, a system message for instance
        raise Unusable(f"the chat template refuses a conversation ({str(problem)[:150]})") from None


def split_text(codec: Codec, pair: dict, response: str | None, eos: bool) -> tuple[str, str]:
    """(text of the prompt, text that the answer adds). eos: with after_answer (chat).
    Raises Unusable if the chat template does more to the answer than trim it."""
    text = render(codec, pair)
    if codec.template != "chat":
        # The template's last spaces go to the answer's first token, as in the LM Evaluation
        # Harness: to most models "Response:" + " Yes" and "Response: " + "Yes" are other tokens.
        # Spaces that end someone's prompt stay where they are.
        spaces = len(codec.template) - len(codec.template.rstrip(" "))
        prompt = text[: len(text) - spaces]
        return prompt, text[len(prompt) :] + (response or "")
    if response is None:
        return text, ""
    whole = render(codec, pair, response)
    added = whole.removeprefix(text)
    answer = added.removeprefix(codec.before_answer).removesuffix(codec.after_answer)
    as_found = added == codec.before_answer + answer + codec.after_answer
    if not (whole.startswith(text) and as_found and answer.strip() == response.strip()):
        raise Unusable("the chat template changes the answer")
    return text, added if eos else codec.before_answer + answer


def encode(codec: Codec, pair: dict, response=None, max_length=None, eos=True):
    """split_ids as one sequence: token ids and response mask, both (T,), cut at max_length. An
    answer that is cut gets no end of turn, which it never had: if every human answer had one and
    some generated ones had not, that alone would distinguish them."""
    ids, answer, _ = split_ids(codec, pair, response, eos)
    mask = [0] * len(ids) + [1] * len(answer)
    return (ids + answer)[:max_length], mask[:max_length]


def split_ids(codec: Codec, pair: dict, response=None, eos=True) -> tuple[list, list, bool]:
    """(ids of the prompt, ids of the answer, whether a token would reach across the border).
    response: text, which gets the end of turn if eos is true and it is no longer than LONGEST;
    sampled ids, taken as they are; or None for the prompt alone. The prompt's ids do not depend on
    the answer. Raises Unusable.

    Gemma: […, model, \\n], [Apple, ., <end_of_turn>], False. Vicuna's prompt ends with a space, and
    "▁Apple" would be one token: the prompt keeps its "▁", the answer is tokenized by itself: True.
    """
    literal = not parses_specials(codec)  # "</s>" in a prompt is then four characters and no EOS
    tokenize = partial(codec.tokenizer, add_special_tokens=False, split_special_tokens=literal)
    is_text = isinstance(response, str)
    if is_text and len(response) > LONGEST:
        response, eos = response[:LONGEST], False
    prompt, added = split_text(codec, pair, response if is_text else None, eos)
    ids = tokenize(prompt)["input_ids"]
    answer, merged = response or [], False
    if is_text:
        both = tokenize(prompt + added)["input_ids"]
        answer = both[len(ids) :]
        merged = both[: len(ids)] != ids
        if codec.template != "chat" and not literal and holds_special(codec, response):
            answer = ids_amid_text(partial(tokenize, split_special_tokens=True), added)
        elif merged:
            answer = ids_amid_text(tokenize, added)
        if eos and codec.template != "chat":
            answer = [*answer, codec.eot_id]
        elif eos and codec.eot_id not in answer:
            raise Unusable("the tokenizer does not see the end of turn behind the answer")
        elif eos:
            answer = answer[: answer.index(codec.eot_id) + 1]
    if ids[: len(codec.bos_ids)] != codec.bos_ids:  # else the template has written it
        ids = codec.bos_ids + ids
    if any(i >= codec.vocabulary for i in ids + answer):
        raise Unusable("a token that the model lacks")
    return ids, answer, merged


def ids_amid_text(tokenize, text: str) -> list[int]:
    """The ids of a text that continues another. By itself "Apple" may become "▁Apple": some
    tokenizers put a space before the first word that they see."""
    for before in ("\n", "a", "."):  # one that does not merge with the text's first characters
        ids = tokenize(before)["input_ids"]
        both = tokenize(before + text)["input_ids"]
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    return tokenize(text)["input_ids"]


@functools.lru_cache(maxsize=8)
def special_tokens(codec: Codec) -> tuple[str, ...]:
    """Every special token's text, those included that have no role, such as <repo_name>."""
    tokenizer = codec.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added, tokenizer.decode([codec.eot_id])})


def holds_special(codec: Codec, text: str) -> bool:
    """Whether text spells out a special token, such as </s>, or the one that ends an answer."""
    return any(token in text for token in special_tokens(codec))


@functools.lru_cache(maxsize=8)
def parses_specials(codec: Codec) -> bool:
    """Whether text's special tokens are parsed: the template has some, or the tokenizer must, since
    they are in its vocabulary of words, too."""
    if codec.template == "chat" or holds_special(codec, codec.template):
        return True
    tokenizer = codec.tokenizer
    names = [token for token in special_tokens(codec) if token != tokenizer.unk_token]
    text = "".join(f"{name}\n{name} {name}a{name}" for name in names)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return not set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(ids)


def decode(codec: Codec, ids: list[int]) -> str:
    """The text of a sampled answer, without its end of turn and what the template puts around it.

    Qwen3: <think> \\n\\n </think> \\n\\n Apple . <|im_end|>  →  "Apple." """
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    as_text = partial(codec.tokenizer.decode, **how)
    text = as_text(ids[:-1] if ids[-1:] == [codec.eot_id] else ids)
    if codec.template == "chat":
        before = codec.tokenizer(codec.before_answer, add_special_tokens=False)["input_ids"]
        after = codec.after_answer.partition(codec.tokenizer.decode([codec.eot_id]))[0]
        return text.removeprefix(as_text(before)).removesuffix(after)
    spaced = codec.template.endswith(" ")
    return text[1:] if spaced and text.startswith(" ") else text
