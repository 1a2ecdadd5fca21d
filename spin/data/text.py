"""Text → token ids, and back: one model's tokenizer and template together. Every stage renders and
tokenizes here, so that all see the same.

With --template chat, prompt and answer come from two renderings by the tokenizer's own template,
with the answer and without. Qwen3, for instance:

    prompt                   │ before_answer            │ answer │ after_answer
    …<|im_start|>assistant\\n │ <think>\\n\\n</think>\\n\\n   │ Apple. │ <|im_end|>\\n
                             └──────────── the answer's tokens ────────┘  eot_id ends them

The loss counts the answer's tokens including its end of turn, and nothing of the prompt. What the
template writes before an answer counts as answer, since the model has to write it, too."""

import contextlib
import datetime
import functools
import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

from spin.data.rows import LONGEST, Unusable, is_blank
from spin.files import fail

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # Appendix B.1
PLAIN = "use --template paper, or a string with {prompt}"  # the remedy for a chat template


@dataclass(frozen=True, eq=False)
class Renderer:
    """How one model sees text: its tokenizer and a template."""

    tokenizer: object
    vocabulary: int  # the model knows the ids below this
    template: str  # 'chat' (the tokenizer's own), or a plain one: a string with {prompt}
    arguments: dict  # of apply_chat_template, besides the messages
    bos_ids: list[int]  # plain templates: what the tokenizer puts before a text, a BOS or nothing
    eot_id: int  # the token that ends an answer: <end_of_turn> for Gemma, else often the EOS
    end_ids: tuple[int, ...] = ()  # what ends a sampled answer: eot_id, then the model's others
    before_answer: str = ""  # chat: what the template writes before an answer
    after_answer: str = ""  # chat: what follows the last answer, the end of turn included
    next_turn: str = ""  # chat: the end of after_answer that only the next turn writes (GLM-4.5)


def load_renderer(name: str, recipe) -> Renderer:
    """The renderer of a model; refuses a model that SPIN cannot use, before any weight is read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers asks about a model's own code unless trust_remote_code is set
    options = {"revision": recipe.revision_of(name), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if re.search(r'"(quantization|compression)_config": {', config.to_json_string(False)):
            fix = "take the weights in bf16, fp16 or fp32 that they were made from"
            fail(f"the weights in {name} are quantised, by its config.json: {fix}")
        text_config = config.get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        # use it once: some wrong values in the tokenizer's config raise an error only then
        tokenizer.decode(tokenizer("", split_special_tokens=True)["input_ids"])
        configs = [config, text_config]
        with contextlib.suppress(OSError):  # it need not be there
            configs.append(GenerationConfig.from_pretrained(name, **options))
        listed = [getattr(one, "eos_token_id", None) for one in configs]
        listed = [i for ids in listed for i in (ids if isinstance(ids, list) else [ids])]
        arguments = (text_config.vocab_size, recipe.template_kwargs, recipe.date, listed)
        renderer = make_renderer(tokenizer, recipe.template, *arguments)
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
    if renderer.eot_id is None:
        fail(f"the tokenizer of {name} has no EOS token, so a response could not end")
    if renderer.eot_id >= renderer.vocabulary:
        ends = f"ends an answer with token {renderer.eot_id}"
        known = f"but its model knows only {renderer.vocabulary} tokens"
        fail(f"the tokenizer of {name} {ends}, {known}: they do not belong together")
    return renderer


def make_renderer(tokenizer, template, vocabulary=None, template_kwargs=(), date="", listed=()):
    """The renderer of a tokenizer and a template. template_kwargs: "name=value", a value is JSON or
    text. date: the day that a chat template may write, YYYY-MM-DD; '': today. listed: the ids that
    the model's configs name as its EOS. Ends with one line if a chat template cannot be used."""
    vocabulary = vocabulary or 1 + max(tokenizer.get_vocab().values())
    if template != "chat":
        template = PAPER_TEMPLATE if template == "paper" else template
        bos_ids = ids_before_text(tokenizer)
        renderer = Renderer(tokenizer, vocabulary, template, {}, bos_ids, tokenizer.eos_token_id)
    else:
        arguments = template_arguments(tokenizer, template_kwargs, date)
        renderer = Renderer(tokenizer, vocabulary, template, arguments, [], None)
        before, after, between = around_an_answer(renderer)
        eot_id, next_turn = end_of_turn(tokenizer, before, after, between, listed)
        renderer = replace(renderer, eot_id=eot_id, before_answer=before, next_turn=next_turn)
        renderer = replace(renderer, after_answer=after + next_turn)
    # an ordinary word cannot end an answer, even if listed: Llama's config lists token 2 by default
    ends = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ends -= {*tokenizer(renderer.before_answer, add_special_tokens=False)["input_ids"]}
    others = [i for i in listed if i in ends and i < vocabulary]
    return replace(renderer, end_ids=tuple(dict.fromkeys([renderer.eot_id, *others])))


def ids_before_text(tokenizer) -> list[int]:
    """What a tokenizer puts before a text: its BOS for Llama, nothing for Qwen."""
    # try a word that it knows: a tokenizer for arithmetic may have no token for a letter
    for word in sorted(set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens}):
        text = tokenizer.convert_tokens_to_string([word])
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare:
            break
    whole = tokenizer(text)["input_ids"]
    return whole[: whole.index(bare[0])] if bare[0] in whole else []


def template_arguments(tokenizer, template_kwargs, date: str) -> dict:
    """What a chat template is called with besides messages: the user's arguments, and the date of
    the run, since a template that writes today's would change the prompts at midnight."""
    arguments = {}
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        fail(f"this tokenizer has no chat template, or several with no default among them: {PLAIN}")
    for item in template_kwargs:
        name, _, value = item.partition("=")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            fail(f"--template-kwargs {item}: this model's chat template knows no {name}")
        # as Python writes it, too: as text, False would be true to a template
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        with contextlib.suppress(ValueError):  # else it is text
            value = json.loads(value)
        arguments[name] = value
    if date and "strftime_now" in source:
        # we cannot give a template another clock, so the date replaces each call of strftime_now
        day = datetime.datetime.fromisoformat(date)
        call = re.compile(r"""strftime_now\(\s*(['"])([^'"{}]*)\1\s*\)""")
        source = call.sub(lambda found: found[1] + day.strftime(found[2]) + found[1], source)
        if re.search(r"strftime_now(?! is (not )?defined)", source):
            fail(f"the chat template writes the date in a way that is not known here: {PLAIN}")
        arguments["chat_template"] = source
    return arguments


def around_an_answer(renderer: Renderer) -> tuple[str, str, str]:
    """What the chat template writes around an answer, found from a made-up conversation: before it,
    after the last one, and after an earlier one ('' if the template refuses a second round).

    Mistral: (" ", "</s>", "</s>[INST] Which? [/INST]")"""
    system = {"role": "system", "content": "Be kind."}
    question = {"role": "user", "content": "Which?"}
    answer = {"role": "assistant", "content": "Apple"}
    thinks = "enable_thinking" in renderer.tokenizer.get_chat_template()
    fix = f"add --template-kwargs enable_thinking=false, or {PLAIN}" if thinks else PLAIN
    for asked in ([question], [system, question]):  # some templates want a system message
        try:
            prompt = render_messages(renderer, asked)
            text = render_messages(renderer, [*asked, answer])
            break
        except Unusable as problem:
            refusal = problem
    else:
        fail(f"{refusal}: {fix}")
    before, inside, after = text.removeprefix(prompt).partition("Apple")
    if not inside or not text.startswith(prompt):
        why = "a conversation with its answer does not begin as the one that asks for it"
        fail(f"the chat template cannot be split into prompt and answer, {why}: {fix}")
    between = ""  # stays so if the template refuses a second round
    with contextlib.suppress(Unusable):
        between = render_messages(renderer, [*asked, answer, question]).partition("Apple")[2]
    return before, after, between


def end_of_turn(tokenizer, before: str, after: str, between: str, listed) -> tuple[int, str]:
    """(eot_id, next_turn). eot_id ends an answer: the tokenizer's EOS or a listed token if one of
    them follows every answer, else the first special token after the last one. next_turn: '', or
    if only the next turn writes such a token, the text up to it. before, after, between: of
    around_an_answer; listed: as in make_renderer.

    Phi-3: after "<|end|>\\n<|endoftext|>", between "<|end|>\\n" give (<|end|>, "").
    GLM-4.5: after "", between "<|user|>\\n…", <|user|> listed give (<|user|>, "<|user|>")."""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ids_between = tokenizer(between, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special} | set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}  # a line break, for instance, that has no token
    ends = [i for i in ids if i in special] or [i for i in ids if i in added]
    next_turn = ""
    if not ends:
        ends = [i for i in ids_between if i in added][:1]
        if not {*ends} & {*listed, tokenizer.eos_token_id} or not between.startswith(after):
            none = "no special token behind an answer to end it"
            fail(f"the chat template writes {none}, nor one that the model lists as EOS: {PLAIN}")
        end = tokenizer.decode(ends)
        next_turn = between.removeprefix(after).partition(end)[0] + end
    every_turn = os.path.commonprefix([ids, ids_between])  # the ids that follow every answer
    likely = [i for i in (tokenizer.eos_token_id, *listed) if i in every_turn] or ends
    eot_id = likely[0]
    if eot_id in tokenizer(before, add_special_tokens=False)["input_ids"]:
        fail(f"the chat template begins an answer with the token that ends it: {PLAIN}")
    return eot_id, next_turn


def render(renderer: Renderer, pair: dict, answer: str | None = None) -> str:
    """The prompt as the model sees it, or the prompt and an answer with all that is around it.
    pair: holds prompt, and maybe system."""
    system = pair.get("system", "")
    if renderer.template != "chat":
        asked = f"{system}\n\n{pair['prompt']}" if system else pair["prompt"]
        return renderer.template.replace("{prompt}", asked) + (answer or "")
    # an empty system message is one: without it some templates would write their own
    messages = [{"role": "system", "content": system}] if "system" in pair else []
    messages.append({"role": "user", "content": pair["prompt"]})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = render_messages(renderer, messages)
    for name in ("system", "prompt"):
        part = pair.get(name, "").strip()
        # counted: a prompt may hold the words of a system message that the template drops
        if part and text.count(part) < sum(one["content"].count(part) for one in messages):
            raise Unusable(f"the chat template drops or changes the {name}")
    return text if answer is None else text + renderer.next_turn


def render_messages(renderer: Renderer, messages: list[dict]) -> str:
    """A conversation by the chat template. The generation prompt follows a user's message."""
    how = {"tokenize": False, "add_generation_prompt": messages[-1]["role"] == "user"}
    try:
        return renderer.tokenizer.apply_chat_template(messages, **how, **renderer.arguments)
    except Exception as problem:  # of any kind: a template may refuse a system message, for one
        raise Unusable(f"the chat template refuses a conversation ({str(problem)[:150]})") from None


def split_text(renderer: Renderer, pair: dict, response: str | None, eos: bool) -> tuple[str, str]:
    """(text of the prompt, text that the answer adds). eos: with after_answer (chat).
    Raises Unusable if the chat template does more to the answer than trim it."""
    text = render(renderer, pair)
    if renderer.template != "chat":
        # The template's last spaces go to the answer's first token, as in the LM Evaluation
        # Harness: to most models "Response:" + " Yes" and "Response: " + "Yes" are other tokens.
        # Spaces that end someone's prompt stay where they are.
        spaces = len(renderer.template) - len(renderer.template.rstrip(" "))
        prompt = text[: len(text) - spaces]
        return prompt, text[len(prompt) :] + (response or "")
    if response is None:
        return text, ""
    whole = render(renderer, pair, response)
    added = whole.removeprefix(text)
    answer = added.removeprefix(renderer.before_answer).removesuffix(renderer.after_answer)
    as_found = added == renderer.before_answer + answer + renderer.after_answer
    if not (whole.startswith(text) and as_found and answer.strip() == response.strip()):
        raise Unusable("the chat template changes the answer")
    return text, added if eos else renderer.before_answer + answer


def encode(renderer: Renderer, pair: dict, response=None, max_length=None, eos=True):
    """split_ids as one sequence: token ids and response mask, both (T,), cut at max_length. A cut
    answer has no end of turn, even a human one: else a missing end would mark generated answers."""
    ids, answer, _ = split_ids(renderer, pair, response, eos)
    mask = [0] * len(ids) + [1] * len(answer)
    return (ids + answer)[:max_length], mask[:max_length]


def split_ids(renderer: Renderer, pair: dict, response=None, eos=True) -> tuple[list, list, bool]:
    """(ids of the prompt, ids of the answer, whether a token would reach across the border).
    response: text, which gets the end of turn if eos is true and it has at most LONGEST characters;
    sampled ids, taken as they are; or None for the prompt alone. Raises Unusable.

    The prompt is tokenized, then prompt and answer together; what the second adds are the answer's
    ids. Gemma: […, model, \\n], [Apple, ., <end_of_turn>], False. If the first token of the answer
    would swallow the prompt's end, the answer is tokenized alone, so that the prompt's ids do not
    depend on it. Vicuna's prompt ends with a space, and "▁Apple" would be one token: True.
    """
    # literal: "</s>" in a text is four characters, and not the EOS
    literal = not parses_specials(renderer)
    tokenize = partial(renderer.tokenizer, add_special_tokens=False, split_special_tokens=literal)
    is_text = isinstance(response, str)
    if is_text and len(response) > LONGEST:
        response, eos = response[:LONGEST], False
    prompt, added = split_text(renderer, pair, response if is_text else None, eos)
    ids = tokenize(prompt)["input_ids"]
    answer, merged = response or [], False
    if is_text:
        both = tokenize(prompt + added)["input_ids"]
        merged = both[: len(ids)] != ids
        answer = ids_amid_text(tokenize, added) if merged else both[len(ids) :]
        if eos and renderer.template != "chat":
            answer = [*answer, renderer.eot_id]
        elif eos and renderer.eot_id not in answer:
            raise Unusable("the tokenizer does not see the end of turn behind the answer")
        elif eos:
            answer = answer[: answer.index(renderer.eot_id) + 1]
    if ids[: len(renderer.bos_ids)] != renderer.bos_ids:  # else the template has written it
        ids = renderer.bos_ids + ids
    if any(i >= renderer.vocabulary for i in ids + answer):
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


def lacks_token(renderer: Renderer, text: str) -> bool:
    """Whether the tokenizer has no token for a part of a text: not all comes back by decoding."""
    how = {"add_special_tokens": False, "split_special_tokens": not parses_specials(renderer)}
    try:
        ids = renderer.tokenizer(text, **how)["input_ids"]
    except Exception:  # Rust's: a word-level tokenizer that has no token for unknown words
        return True
    tokenizer = renderer.tokenizer
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unk = tokenizer.unk_token or getattr(model, "unk_token", None)
    # in tokenizers like GPT-2's the unk token is the EOS, too, so it does not show a missing token
    if unk not in (None, tokenizer.eos_token) and tokenizer.convert_tokens_to_ids(unk) in ids:
        return True
    texts = (text, renderer.tokenizer.decode(ids, skip_special_tokens=True))
    # a normalizer may change case, accents and widths
    fold = partial(unicodedata.normalize, "NFKD")
    signs, known = (Counter(fold(fold(one).casefold())) for one in texts)
    return not is_blank("".join(signs - known))


@functools.lru_cache(maxsize=8)
def special_tokens(renderer: Renderer) -> tuple[str, ...]:
    """Every special token's text, those included that have no role, such as <repo_name>."""
    tokenizer = renderer.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added, *map(tokenizer.decode, renderer.end_ids)})


def holds_special(renderer: Renderer, text: str) -> bool:
    """Whether text spells out a special token, such as </s>, or the one that ends an answer."""
    return any(token in text for token in special_tokens(renderer))


@functools.lru_cache(maxsize=8)
def parses_specials(renderer: Renderer) -> bool:
    """Whether a special token in a text becomes one id. It must if the template writes special
    tokens. It also does if the tokenizer has them among its ordinary words."""
    if renderer.template == "chat" or holds_special(renderer, renderer.template):
        return True
    tokenizer = renderer.tokenizer
    names = [token for token in special_tokens(renderer) if token != tokenizer.unk_token]
    text = "".join(f"{name}\n{name} {name}a{name}" for name in names)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return not set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(ids)


def decode(renderer: Renderer, ids: list[int]) -> str:
    """The text of a sampled answer, without its end of turn and what the template puts around it.

    Qwen3: <think> \\n\\n </think> \\n\\n Apple . <|im_end|>  →  "Apple." """
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    as_text = partial(renderer.tokenizer.decode, **how)
    text = as_text(ids[:-1] if ids and ids[-1] in renderer.end_ids else ids)
    if renderer.template == "chat":
        before = renderer.tokenizer(renderer.before_answer, add_special_tokens=False)["input_ids"]
        after = renderer.after_answer.partition(renderer.tokenizer.decode([renderer.eot_id]))[0]
        return text.removeprefix(as_text(before)).removesuffix(after)
    return text.removeprefix(" ") if renderer.template.endswith(" ") else text
