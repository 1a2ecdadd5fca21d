"""What one model sees of a text: its tokenizer and the template together, taken apart once.

With `--template chat` prompt and answer come from two renderings of the tokenizer's own template:

    the prompt     messages up to the user's, and the generation prompt behind them
    the answer     what the rendering with the assistant's message adds, up to and with the token
                   that ends its turn, which need not be the tokenizer's EOS

What a template puts before an answer (a space, an empty think block) belongs to the answer: the
model has to write it, too. A template that cannot be taken apart so is refused."""

import datetime
import json
import os
import re
from dataclasses import dataclass

from spin.files import fail

PYTHON = {"True": "true", "False": "false", "None": "null"}
PLAIN = "use --template paper, or a string with {prompt}"  # what mends a chat template


@dataclass(frozen=True, eq=False)
class Codec:
    """How one model sees text."""

    tokenizer: object
    vocabulary: int  # the model knows the ids below this
    template: str  # 'paper', 'chat' (the tokenizer's own), or a string with {prompt}
    arguments: dict  # of apply_chat_template, besides the messages
    begin: list[int]  # plain templates: what the tokenizer puts before a text, such as a BOS
    end: int  # the token that ends an answer
    lead: str = ""  # chat: what the template writes between the prompt and an answer
    tail: str = ""  # chat: what it writes behind one, the text of `end` in it


def load_codec(name: str, recipe) -> Codec:
    """The codec of a model; refuses a model that SPIN cannot use, before any weight is read."""
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
        tokenizer("")  # a wrong value in its config shows in use
    except Exception as problem:  # transformers raises many kinds here; each: no usable model
        cause = f"{type(problem).__name__}: {str(problem)[:300]}"
        fail(f"cannot load the tokenizer and config of {name}: {cause}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    # BERT and its kin are there too, for use as decoders; GPT-NeoX is one, and says it is not
    decoder = getattr(text_config, "is_decoder", True) or causal in (config.architectures or ())
    if not causal or not decoder:
        wanted = "each token must follow from those before it"
        fail(f"{name} is no causal language model ({config.model_type}): {wanted}")
    context = getattr(text_config, "max_position_embeddings", None)
    if context and recipe.max_length > context:
        most = f"the {context} positions of {name}; give --max-length {context}"
        fail(f"--max-length {recipe.max_length} is more than {most}")
    if recipe.template != "chat" and tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name} has no EOS token, so a response could not end")
    vocabulary = text_config.vocab_size
    how = (recipe.template, vocabulary, recipe.template_kwargs, recipe.date)
    codec = make_codec(tokenizer, *how)
    if codec.end >= vocabulary:
        known = f"its model only {vocabulary} tokens"
        fail(f"the tokenizer of {name} ends an answer by token {codec.end}, {known}: not a pair")
    return codec


def make_codec(
    tokenizer, template: str, vocabulary: int | None = None, template_kwargs=(), date: str = ""
) -> Codec:
    """The codec of a tokenizer and a template. template_kwargs: "name=value", value JSON or text.
    date: the day that a chat template may write, YYYY-MM-DD; '': today. Ends with one line where
    the chat template cannot be split into prompt and answer."""
    vocabulary = vocabulary or 1 + max(tokenizer.get_vocab().values())
    if template != "chat":
        begin = ids_before_text(tokenizer)
        return Codec(tokenizer, vocabulary, template, {}, begin, tokenizer.eos_token_id)
    if not tokenizer.chat_template:
        fail(f"this tokenizer has no chat template: {PLAIN}")
    arguments = template_arguments(tokenizer, template_kwargs, date)
    lead, tail, within = around_an_answer(tokenizer, arguments)
    end = end_of_turn(tokenizer, lead, tail, within)
    return Codec(tokenizer, vocabulary, template, arguments, [], end, lead, tail)


def ids_before_text(tokenizer) -> list[int]:
    """What a tokenizer puts before a text: its BOS, or nothing. Not what it puts behind one."""
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
    """What a chat template is called with besides messages: the user's arguments, and a clock that
    stands still: else a template that writes the date would change the prompts at midnight."""
    arguments = {}
    try:
        source = tokenizer.get_chat_template()
    except ValueError:  # several named ones
        fail(f"this tokenizer's chat templates have no default among them: {PLAIN}")
    for item in template_kwargs:
        name, _, value = item.partition("=")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            fail(f"--template-kwargs {item}: this model's chat template knows no {name}")
        try:
            # as Python writes it, too: as text, False would be true to a template
            arguments[name] = json.loads(PYTHON.get(value, value))
        except ValueError:
            arguments[name] = value
    if date and "strftime_now" in source:
        arguments["chat_template"] = with_date(source, datetime.datetime.fromisoformat(date))
    return arguments


def with_date(template: str, day: datetime.datetime) -> str:
    """A chat template whose strftime_now, which writes today's date, writes this one.
    By a macro of that name in front: transformers lets no function of ours into a template."""
    written = r"format.replace('%%', '\x00')"
    for letter in "aAbBcCdDeFgGhHIjklmMprRSTuUVwWxXyYzZ":
        for directive in (f"%{letter}", f"%-{letter}"):
            written += f".replace('{directive}', '{day.strftime(directive)}')"
    written += r".replace('\x00', '%')"
    # jinja drops the line break behind a block: the template's own first line stays a first line
    return "{% macro strftime_now(format) %}{{ " + written + " }}{% endmacro %}\n" + template


def around_an_answer(tokenizer, arguments: dict) -> tuple[str, str, str]:
    """(what the chat template writes before an answer, what behind it, what behind one that is not
    the last or '' where that is refused), found from renderings of a made-up conversation with two
    answers; refuses a template that cannot be taken apart so."""
    question = [{"role": "user", "content": "Which?"}]
    system = [{"role": "system", "content": "Be kind."}]
    for messages in (question, [*system, *question]):  # some templates want a system message
        try:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
            found = set()
            for answer in ("Apple", "Quince"):
                whole = [*messages, {"role": "assistant", "content": answer}]
                text = tokenizer.apply_chat_template(whole, tokenize=False, **arguments)
                lead, it, tail = text.removeprefix(prompt).partition(answer)
                found.add((lead, tail) if it and text.startswith(prompt) else None)
        except Exception as problem:  # a template may refuse by any
            refusal = f"the chat template refuses a conversation ({problem}): {PLAIN}"
            continue
        if None in found or len(found) != 1:
            why = "a conversation with its answer does not begin as the one that asks for it"
            fail(f"the chat template cannot be split into prompt and answer, {why}: {PLAIN}")
        try:
            text = tokenizer.apply_chat_template([*whole, *question], tokenize=False, **arguments)
        except Exception:  # a template for one round
            text = ""
        return (*found.pop(), text.partition(answer)[2])
    fail(refusal)


def end_of_turn(tokenizer, lead: str, tail: str, within: str) -> int:
    """The token that ends an answer: the tokenizer's EOS, if every turn ends with it, or else the
    first special token that the template writes behind the last answer. within: what it writes
    behind an answer that is not the last."""
    ids, ids_within = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (tail, within))
    added = tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special} | set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}  # a line break, for instance, that has no token
    ends = [i for i in ids if i in special] or [i for i in ids if i in added]
    if not ends:
        fail(f"the chat template writes no special token behind an answer to end it: {PLAIN}")
    same = len(os.path.commonprefix([ids, ids_within]))
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ids[:same] else ends[0]
    if end in tokenizer(lead, add_special_tokens=False)["input_ids"]:
        fail(f"the chat template begins an answer with the token that ends it: {PLAIN}")
    return end
