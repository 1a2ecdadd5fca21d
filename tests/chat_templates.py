"""Chat templates of today's families in miniature, each with a tokenizer of its kind.

Every template is our own shortest jinja with a family's structure: what stands before a turn, what
ends it, what is trimmed, what is refused. Tokenizers are trained here, in milliseconds."""

import datetime
import functools
import json
from dataclasses import dataclass, replace

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

DAY = "2026-01-31"  # of templates that write the date
LINES = [
    "Name a fruit. Apple. Quince. Which herb grows here? Mint, thyme and sage do.",
    "user assistant system model Be kind. Be short. You help. Today is 31 January 2026.",
    "[INST] [/INST] <<SYS>> <</SYS>> USER: ASSISTANT: <think> </think> final\n\n\n two\n\n",
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SENTENCE_PIECES = list("▁\n" + LETTERS + "0123456789<>/[]|:.,;!?'-_=#")

EACH = "{% for m in messages %}"
DONE = "{% endfor %}"
ASKED = "{% if add_generation_prompt %}"
END = "{% endif %}"
BY_USER = "{% if m.role == 'user' %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}" + END
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK_CHATML = ASKED + "<|im_start|>assistant\n" + END
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
AFTER_THOUGHT = "m.content.split('</think>')[-1].lstrip('\n')"
QWEN3_TURN = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + (EMPTY_THOUGHT + "{{ " + AFTER_THOUGHT + " }}")
    + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
# one piece a word, a line break with what is blank before it, or signs: as newer tokenizers cut
PIECES = r"\s*\n+|[^\n\w]?\w+| ?[^\s\w]+\n*|\s+"
HARMONY_TURN = (
    "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template in miniature, its tokenizer, and what is right for it, found by hand."""

    template: str
    specials: tuple[str, ...]
    end: str = ""  # the token that ends a turn
    lead: str = ""  # what the template writes between the generation prompt and an answer
    eos: str = ""  # the tokenizer's EOS; '': it is the end of turn
    bos: str | None = None
    puts: str = ""  # what the tokenizer puts around a text: "BOS", "EOS", "BOS EOS" or nothing
    spm: bool = False  # a Metaspace tokenizer, as from SentencePiece; else byte-level BPE
    legacy: bool = False  # of those, one that puts a space behind each special token, as Llama 2's
    lacks: str = ""  # characters for which a Metaspace tokenizer has no token but <unk>
    gpt2: bool = False  # cut into pieces as GPT-2 does, where two line breaks are one piece or two
    rstrip: bool = False  # special tokens swallow the white space behind them, as Phi-3's do
    plain: tuple[str, ...] = ()  # added tokens that are not marked as special
    kwargs: tuple[str, ...] = ()  # of --template-kwargs
    system: str = "kept"  # or "refused", "dropped", "required": what becomes of a system message
    merges: bool = False  # tokens merge across the boundary, whatever the answer
    refusal: str = ""  # why the template cannot be used at all


S = ("<s>", "</s>")
CHATML_TOKENS = {"specials": QWEN, "end": "<|im_end|>"}
SPM_TOKENS = {"specials": S, "end": "</s>", "bos": "<s>", "puts": "BOS", "spm": True}
LLAMA3_TOKENS = {
    "specials": ("<|bos|>", "<|end_of_text|>", "<|head|>", "<|tail|>", "<|eot|>"),
    **{"end": "<|eot|>", "eos": "<|end_of_text|>", "bos": "<|bos|>", "puts": "BOS"},
}
FAMILIES = {
    "qwen2.5": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + (EACH + CHATML + DONE + ASK_CHATML),
        **CHATML_TOKENS,
    ),
    "qwen3": Family(
        EACH + QWEN3_TURN + DONE + ASK_CHATML, **CHATML_TOKENS, lead=EMPTY_THOUGHT, plain=THINK
    ),
    "qwen3, enable_thinking=false": Family(
        (EACH + QWEN3_TURN + DONE + ASKED + "<|im_start|>assistant\n")
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        + (EMPTY_THOUGHT + END + END),
        **CHATML_TOKENS,
        plain=THINK,
        kwargs=("enable_thinking=false",),
    ),
    "qwen3-thinking": Family(
        EACH + QWEN3_TURN + DONE + ASKED + "<|im_start|>assistant\n<think>\n" + END,
        **CHATML_TOKENS,
        lead="\n</think>\n\n",
        plain=THINK,
        merges=True,
    ),
    "deepseek-r1": Family(
        "{{ bos_token }}"
        + (EACH + "{% if m.role == 'assistant' %}<|Assistant|>{{ " + AFTER_THOUGHT + " }}<|eos|>")
        + "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}"
        + (DONE + ASKED + "<|Assistant|><think>\n" + END),
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"),
        bos="<|bos|>",
        eos="<|eos|>",
        refusal="does not begin as the one that asks",
    ),
    "llama2": Family(
        "{% set ns = namespace(s='') %}" + EACH + "{% if m.role == 'system' %}"
        "{% set ns.s = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.s + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} </s>{% endif %}" + DONE,
        **SPM_TOKENS,
        lead=" ",
    ),
    "llama2, an older tokenizer": Family(
        (EACH + BY_USER + "{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]")
        + "{% elif m.role == 'assistant' %} {{ m.content.strip() }} </s>"
        + ("{% else %}{{ raise_exception('no system') }}" + END + DONE),
        **SPM_TOKENS,
        lead=" ",
        legacy=True,
        system="refused",
    ),
    "mistral": Family(
        (NO_SYSTEM + "<s>" + EACH + BY_USER)
        + "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
        + DONE,
        **SPM_TOKENS,
        lead=" ",
        system="refused",
    ),
    "llama3": Family(
        ("{{ bos_token }}" + EACH + "<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>")
        + (DONE + ASKED + "<|head|>assistant<|tail|>\n\n" + END),
        **LLAMA3_TOKENS,
    ),
    "llama3.2": Family(
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
        "{% else %}{% set day = '1 Jan 2000' %}{% endif %}{{ bos_token }}<|head|>system<|tail|>\n\n"
        "Today is {{ day }}.\n{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}<|eot|>"
        + (EACH + "<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>")
        + (DONE + ASKED + "<|head|>assistant<|tail|>\n\n" + END),
        **LLAMA3_TOKENS,
    ),
    "gemma": Family(
        ("{{ bos_token }}" + NO_SYSTEM + EACH)
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + "{{ m.content | trim }}<end_of_turn>\n"
        + (DONE + ASKED + "<start_of_turn>model\n" + END),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        puts="BOS",
        spm=True,
        system="refused",
    ),
    "phi3": Family(
        (EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + DONE)
        + (ASKED + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"),
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<|endoftext|>",
        bos="<s>",
        puts="BOS",
        spm=True,
        rstrip=True,
    ),
    "zephyr": Family(
        EACH + "<|{{ m.role }}|>\n{{ m.content }}</s>\n" + DONE + ASKED + "<|assistant|>\n" + END,
        **SPM_TOKENS,
    ),
    "vicuna": Family(
        ("<s>{% if messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}" + EACH)
        + "{% if m.role == 'user' %}USER: {{ m.content }} "
        + "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% endif %}"
        + (DONE + ASKED + "ASSISTANT: " + END),
        **SPM_TOKENS,
        merges=True,
    ),
    "vicuna, byte-level": Family(
        (EACH + "{{ m.role | upper }}: {{ m.content }}")
        + ("{{ '</s>' if m.role == 'assistant' else '\n' }}" + DONE)
        + (ASKED + "ASSISTANT: " + END),
        ("</s>",),
        "</s>",
        merges=True,
    ),
    "command-r": Family(
        ("{{ bos_token }}" + EACH)
        + "<|turn|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}|>"
        + "{{ m.content.strip() }}<|end_turn|>"
        + (DONE + ASKED + "<|turn|><|CHATBOT|>" + END),
        ("<B>", "<|turn|>", "<|end_turn|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>"),
        "<|end_turn|>",
        bos="<B>",
        puts="BOS",
    ),
    "command-a": Family(  # two special tokens behind an answer, of which the second ends the turn
        "{{ bos_token }}" + EACH + "<|turn|><|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "<|response|>{{ m.content }}<|/response|>{% else %}{{ m.content }}{% endif %}<|end_turn|>"
        + (DONE + ASKED + "<|turn|><|assistant|>" + END),
        ("<B>", "<|turn|>", "<|end_turn|>", "<|system|>", "<|user|>", "<|assistant|>")
        + ("<|response|>", "<|/response|>"),
        "<|end_turn|>",
        "<|response|>",
        bos="<B>",
        puts="BOS",
    ),
    "no token for a line break": Family(  # what stands before the end of turn is unknown to it
        EACH + "<|{{ m.role }}|>{{ m.content }}\n<|end|>" + DONE + ASKED + "<|assistant|>" + END,
        ("<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<eos>",
        spm=True,
        lacks="\n",
    ),
    "gpt-oss": Family(
        "<|start|>system<|message|>Today is {{ strftime_now('%Y-%m-%d') }}<|end|>"
        + (EACH + HARMONY_TURN + DONE + ASKED + "<|start|>assistant" + END),
        ("<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>", "<|pad|>"),
        "<|return|>",
        "<|channel|>final<|message|>",
    ),
    "granite": Family(  # blanks before the first block, which jinja drops
        "  {% set day = strftime_now('%B %-d, %Y') %}\n" + EACH + "<|r|>{{ m.role }}<|e|>"
        "{{ m.content }}{{ ' (' + day + ')' if m.role == 'user' else '' }}<|endoftext|>\n"
        + (DONE + ASKED + "<|r|>assistant<|e|>" + END),
        ("<|endoftext|>", "<|r|>", "<|e|>"),
        "<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "smollm3": Family(
        (EACH + "{% if loop.first %}<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.\n")
        + "Thinking: {{ 'on' if enable_thinking | default(true) else 'off' }}\n"
        + "{{ m.content if m.role == 'system' else 'You help.' }}<|im_end|>\n{% endif %}"
        + "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        + ("{% if not enable_thinking | default(true) %}" + EMPTY_THOUGHT + END)
        + ("{{ m.content.lstrip('\n') }}<|im_end|>\n" + END + DONE)
        + (ASKED + "<|im_start|>assistant\n{% if not enable_thinking | default(true) %}")
        + (EMPTY_THOUGHT + END + END),
        **CHATML_TOKENS,
        plain=THINK,
        kwargs=("enable_thinking=false",),
    ),
    "tulu": Family(  # marks what the assistant writes, and ends the last turn otherwise than others
        (EACH + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}")
        + "{{ m.content }}{{ eos_token if loop.last else eos_token + '\n' }}{% endgeneration %}"
        + ("{% else %}{{ m.content }}\n{% endif %}" + DONE + ASKED + "<|assistant|>\n" + END),
        ("<|endoftext|>",),
        "<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "wants a system message": Family(
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + (EACH + CHATML + DONE + ASK_CHATML),
        **CHATML_TOKENS,
        eos="<|endoftext|>",
        system="required",
    ),
    "drops a system message": Family(
        EACH + "{% if m.role != 'system' %}" + CHATML + END + DONE + ASK_CHATML,
        **CHATML_TOKENS,
        system="dropped",
    ),
    "knows no generation prompt": Family(
        EACH + CHATML + DONE, **CHATML_TOKENS, lead="<|im_start|>assistant\n", eos=QWEN[0]
    ),
    "dialogpt": Family(
        EACH + "{{ m.content }}{{ eos_token }}" + DONE,
        ("<|endoftext|>",),
        "<|endoftext|>",
        gpt2=True,
        bos="<|endoftext|>",
    ),
    "puts an EOS behind a text": Family(
        EACH + "<|{{ m.role }}|>{{ m.content }}</s>\n" + DONE + ASKED + "<|assistant|>" + END,
        S,
        "</s>",
        bos="<s>",
        puts="BOS EOS",
        spm=True,
    ),
    "an end that is not marked as special": Family(
        EACH + "[{{ m.role }}] {{ m.content }} [end]\n" + DONE + ASKED + "[assistant] " + END,
        ("<eos>",),
        "[end]",
        eos="<eos>",
        plain=("[user]", "[assistant]", "[system]", "[end]"),
        merges=True,
    ),
    "is no jinja": Family(EACH + "{{ m.content }}", ("<x>",), eos="<x>", refusal="refuses a conv"),
}
FAMILIES["qwen3-thinking, sentence pieces"] = replace(FAMILIES["qwen3-thinking"], spm=True)
USABLE = [name for name, family in FAMILIES.items() if not family.refusal]
REFUSED = [name for name, family in FAMILIES.items() if family.refusal]


def core_of(family: Family) -> Tokenizer:
    """A BPE tokenizer trained on LINES: byte-level, or Metaspace as SentencePiece's models are."""
    specials = list(family.specials)
    if family.spm:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        if family.legacy:
            as_sign = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            core.normalizer = normalizers.Sequence(as_sign)
            core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        letters = [sign for sign in SENTENCE_PIECES if sign not in family.lacks]
        specials = ["<unk>", *specials]
    else:
        core = Tokenizer(models.BPE())
        pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.gpt2)
        core.pre_tokenizer = pre_tokenizers.Sequence([pieces] * (not family.gpt2) + [as_bytes])
        core.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
    marked = [AddedToken(t, rstrip=family.rstrip, normalized=False, special=True) for t in specials]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=marked, initial_alphabet=letters, max_token_length=8
    )
    lines = ["".join(c for c in line if c not in family.lacks) for line in LINES]
    core.train_from_iterator([line for line in lines for _ in range(9)], trainer)
    core.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    eos = family.eos or family.end
    around = [(t, core.token_to_id(t)) for t in (family.bos, eos) if t in family.specials]
    first = [family.bos] * ("BOS" in family.puts)
    last = [eos] * ("EOS" in family.puts)
    if family.puts:
        single = " ".join([*first, "$A", *last])
        core.post_processor = processors.TemplateProcessing(single, special_tokens=around)
    return core


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its chat template. Shared: copy it before changing it."""
    family = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core_of(family),
        eos_token=family.eos or family.end,
        bos_token=family.bos,
        unk_token="<unk>" if family.spm else None,
    )
    tokenizer.chat_template = family.template
    return tokenizer


# ---- the oracle ----------------------------------------------------------------------------------


def clock(day: str):
    """A class in the place of datetime.datetime that says that today is another day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day).replace(tzinfo=tz)

    return Clock


def pair_of(system: str | None) -> dict:
    pair = {"prompt": "Name a fruit."}
    return pair if system is None else {**pair, "system": system}


def messages_of(pair: dict, answer: str | None = None) -> list[dict]:
    messages = [{"role": "user", "content": pair["prompt"]}]
    if "system" in pair:
        messages.insert(0, {"role": "system", "content": pair["system"]})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def rendered(name: str, messages, tokenize=True, ask=False):
    """transformers' rendering, as ids or as text: the oracle."""
    arguments = dict(item.split("=") for item in FAMILIES[name].kwargs)
    arguments = {key: json.loads(value) for key, value in arguments.items()}
    return tokenizer_of(name).apply_chat_template(
        messages, tokenize=tokenize, return_dict=False, add_generation_prompt=ask, **arguments
    )


def the_old_way(name: str, pair: dict, answer: str) -> tuple[list[int], list[int]]:
    """What stood here before: the answer alone, the EOS behind it, a BOS where there is none."""
    tokenizer = tokenizer_of(name)
    ids = rendered(name, messages_of(pair), ask=True)
    bos = [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    ids = ids if ids[: len(bos)] == bos else bos + ids
    both = tokenizer(tokenizer.decode(ids) + answer, add_special_tokens=False)["input_ids"]
    return ids, [*both[len(ids) :], tokenizer.eos_token_id]
