"""SFT sets in, token ids and response masks out. Every stage reads, renders and tokenises through this file.

An SFT set is a hub id, or a .jsonl, .json or .parquet file, in one of the shapes of SHAPES. A pair is a dict
{"id", "prompt", "real"} (and "system" where a system message came with the prompt); with "iter", "generated",
"generated_ids" and "finish" it is a row of generated.jsonl. Joined by (iter, id), never by position.
"""

import collections
import functools
import hashlib
import json
from pathlib import Path

import numpy as np

from spin.files import fail, write_whole
from spin.recipe import locate

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # Appendix B.1


# ---- reading -------------------------------------------------------------------------------------------------


def read_rows(source: str, split: str = "train"):
    """The rows (dicts) of an SFT set, in their order. Ends with one line for a file that cannot be read."""
    path = Path(locate(source))
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        return _hub_rows(source, split)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # comes with datasets

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            rows = list(read_jsonl(path))
    except (OSError, ValueError, RecursionError, OverflowError) as problem:
        fail(f"cannot read {path}: {problem}")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        fail(f"{path} holds no rows: a list of objects is wanted")
    return rows


def _hub_rows(source: str, split: str):
    if Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        fail(f"no data at {source}: a .jsonl, .json or .parquet file is wanted, or a hub id")
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except (
        Exception
    ) as problem:  # the hub client raises many kinds; each means the set is not to be had
        fail(
            f"cannot load {source} (split {split}) from the hub: {type(problem).__name__}: {str(problem)[:200]}"
        )


def read_jsonl(path: Path):
    """The objects of a JSONL file. Ends with file and line number at a line that is not one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except (
                    ValueError,
                    RecursionError,
                ) as problem:  # of JSON, or of UTF-8; brackets a thousand deep
                    fail(f"{path}, line {number}: {problem}")
                yield row


def write_jsonl(path: Path, rows):
    """Write rows as JSONL, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- shapes --------------------------------------------------------------------------------------------------


def _first_round(messages) -> dict:
    """The first round of a conversation (Appendix B.1); a system message stays with the prompt."""
    turns = [m for m in messages if m["role"] != "system"]
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    if [m["role"] for m in turns[:2]] != ["user", "assistant"]:
        raise ValueError("the conversation does not begin with a user and an assistant turn")
    pair = {"prompt": turns[0]["content"], "real": turns[1]["content"]}
    return {**pair, "system": system} if system else pair


def _conversations(row, real, generated) -> dict:
    pair, other = _first_round(row[real]), _first_round(row[generated])
    if other["prompt"] != pair["prompt"]:
        raise ValueError(f"{real} and {generated} answer different prompts")
    return {**pair, "generated": other["real"]}


def _alpaca(row) -> dict:
    return {
        "prompt": row["instruction"] + ("\n\n" + row["input"] if row.get("input") else ""),
        "real": row["output"],
    }


def _preference(row) -> dict:
    answer = lambda side: side if isinstance(side, str) else _first_round(side)["real"]  # noqa: E731
    return {
        "prompt": row["prompt"],
        "real": answer(row["chosen"]),
        "generated": answer(row["rejected"]),
    }


SHAPES = {  # the fields that tell a shape -> the pair in it; the first whose fields are all there is taken
    ("prompt", "real", "generated"): dict,  # generated.jsonl itself, or pairs as plain text
    ("real", "generated"): lambda r: _conversations(
        r, "real", "generated"
    ),  # the authors' published sets
    (
        "prompt",
        "chosen",
        "rejected",
    ): _preference,  # with --pairs this is DPO; UltraFeedback-binarized has messages too
    ("messages",): lambda r: _first_round(r["messages"]),  # UltraChat
    ("instruction", "output"): _alpaca,
    ("prompt", "response"): lambda r: {"prompt": r["prompt"], "real": r["response"]},
    ("prompt", "completion"): lambda r: {"prompt": r["prompt"], "real": r["completion"]},
    ("question", "answer"): lambda r: {"prompt": r["question"], "real": r["answer"]},
}


def to_pair(row: dict, where: str) -> dict:
    """The pair in a row of any known shape: prompt, real, and where the row has them system and generated."""
    for names, read in SHAPES.items():
        if all(name in row for name in names):
            try:
                pair = read(row)
                for name in ("prompt", "real", "system", "generated"):
                    if not isinstance(text := pair.get(name, ""), str):
                        raise TypeError(f"its {name} is no text")
                    text.encode()  # without lone surrogates
                return pair
            except (KeyError, TypeError, ValueError, AttributeError) as problem:
                fail(
                    f"{where}: the row has the shape {'/'.join(names)}, but {type(problem).__name__}: {problem}"
                )
    fail(
        f"{where}: unknown shape with fields {', '.join(map(str, row)) or '(none)'}; known: "
        + "; ".join("/".join(names) for names in SHAPES)
    )


# ---- text to tokens ------------------------------------------------------------------------------------------


def load_tokenizer(name: str, recipe):
    """The tokenizer of a model and the size of the model's head, checked together before any weight is read."""
    from transformers import AutoConfig, AutoTokenizer, logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    revision = (recipe.revision if name == recipe.model else "") or None
    try:
        whole = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )  # unset, it would ask
        config = whole.get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (
        Exception
    ) as problem:  # transformers raises many kinds here; each means there is no usable model
        fail(
            f"cannot load the tokenizer and config of {name}: {type(problem).__name__}: {str(problem)[:300]}"
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(whole.model_type)
    if (
        not causal
        or not getattr(config, "is_decoder", True)
        and causal not in (whole.architectures or ())
    ):
        # BERT and its kin are there too, for use as decoders; but GPT-NeoX says is_decoder False, and is one
        fail(
            f"{name} is no causal language model ({whole.model_type}): each token must follow from those before it"
        )
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name} has no EOS token, so a response could not end")
    if (largest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        fail(
            f"the tokenizer of {name} has a token {largest}, its model only {config.vocab_size} tokens: not a pair"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context and recipe.max_length > context:
        fail(
            f"--max-length {recipe.max_length} is more than the {context} positions of {name}; give --max-length {context}"
        )
    return tokenizer, config.vocab_size


def render(tokenizer, template: str, prompt: str, system: str = "") -> str:
    """The prompt as the model sees it. template: 'paper', 'chat', or a string with {prompt} (plain substitution)."""
    if template == "chat":
        if not tokenizer.chat_template:
            fail(
                "this tokenizer has no chat template: use --template paper, or a string with {prompt}"
            )
        messages = [{"role": "system", "content": system}] * bool(system) + [
            {"role": "user", "content": prompt}
        ]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as problem:  # a template may refuse by any exception, a system message for instance
            fail(
                f"the chat template refuses a prompt ({problem}): use --template paper, or a string with {{prompt}}"
            )
    text = PAPER_TEMPLATE if template == "paper" else template
    return text.replace("{prompt}", f"{system}\n\n{prompt}" if system else prompt)


def encode(
    tokenizer,
    template: str,
    pair: dict,
    response: str | list[int] | None = None,
    max_length: int | None = None,
    eos: bool = True,
) -> tuple[list[int], list[int]]:
    """(prompt, response) -> token ids and response mask, both (T,); the one place where text becomes tokens.

    pair: holds prompt, and maybe system. response: text, sampled ids (taken as they are), or None for the prompt alone.
    Text gets the EOS if eos; a response that does not fit in max_length is cut, and then has no EOS: an EOS that was
    never produced would tell real from generated. Exactly one BOS if the tokenizer has one, whatever its template does.
    The prompt's ids do not depend on the response: a template's last spaces go to the response's first token, as in
    the LM Evaluation Harness, since "Response: " + "Yes" and "Response:" + " Yes" are different tokens to most models.
    """
    room = most_characters(tokenizer, max_length) if max_length else None
    text = render(tokenizer, template, **{k: pair[k] for k in ("prompt", "system") if k in pair})[
        :room
    ]
    head = text.rstrip(" ")
    literal = not parses_specials(
        tokenizer, template
    )  # then "</s>" in someone's prompt is four characters, no EOS
    ids = tokenizer(head, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id not in (None, *ids[:1]) else []
    if isinstance(response, str):
        after = text[len(head) :] + response[:room]
        whole = tokenizer(head + after, add_special_tokens=False, split_special_tokens=literal)[
            "input_ids"
        ]
        if (
            whole[: len(ids)] != ids or not literal and holds_special(tokenizer, response)
        ):  # e.g. merged at the boundary
            whole = (
                ids
                + tokenizer(after, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )
        response = whole[len(ids) :] + [tokenizer.eos_token_id] * (
            eos and response == response[:room]
        )
    mask = [0] * len(bos + ids) + [1] * len(response or [])
    return (bos + ids + (response or []))[:max_length], mask[:max_length]


@functools.lru_cache(maxsize=8)
def most_characters(tokenizer, length: int) -> int:
    """More characters than `length` tokens hold: what lies behind need not be tokenised, which for 50 MB takes a minute."""
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
    """Whether special tokens are parsed out of text: the template is written with them, or the tokenizer cannot but do it."""
    names = [token for token in special_tokens(tokenizer) if token != tokenizer.unk_token]
    text = "".join(
        f"{name}\n{name} {name}a{name}" for name in names
    )  # their text may be in the vocabulary of words too
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (
        template == "chat"
        or holds_special(tokenizer, template)
        or not set(tokenizer.convert_tokens_to_ids(names)).isdisjoint(ids)
    )


def decode(tokenizer, template: str, ids: list[int]) -> str:
    """The text of a sampled response, without its EOS and without the space that the template lent it."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spaced = template == "paper" or template.endswith(" ")
    return text[1:] if spaced and text.startswith(" ") else text


def select(
    rows,
    source: str,
    tokenizer,
    template: str,
    number: int,
    seed: int,
    max_length: int,
    max_new_tokens: int,
) -> tuple[list[dict], dict]:
    """The first `number` usable rows in the order that seed gives: a smaller number gives a subset (14k in 26k in 50k).

    Returns the pairs, each with "id" (its row in the source) and "prompt_ids", and the counts of what was left out,
    by rule: an empty prompt or response; a prompt that came before; one of no tokens; one that leaves fewer than max_new_tokens
    of max_length; text that would be read as a special token. A response that is too long is cut, and counted.
    """
    pairs, seen, counts = [], set(), collections.Counter()
    for index in (
        np.random.default_rng((seed, 0, 0, 3)).permutation(len(rows)).tolist()
    ):  # 3: a stream of its own
        if len(pairs) == number:
            break
        pair = {**to_pair(rows[index], f"{source}, row {index + 1}"), "id": index}
        counts["read"] += 1
        key = (pair.get("system", ""), pair["prompt"])
        texts = [*key, pair["real"]]
        if not pair["prompt"].strip() or not pair["real"].strip():
            counts["empty prompt or response"] += 1
        elif key in seen:
            counts["duplicate prompt"] += 1
        elif parses_specials(tokenizer, template) and any(
            holds_special(tokenizer, t) for t in texts
        ):
            counts["text of a special token"] += 1
        else:
            seen.add(key)
            ids, mask = encode(
                tokenizer, template, pair, pair["real"], max_length + 1
            )  # one more shows whether it fits
            pair["prompt_ids"] = ids[: len(ids) - sum(mask)]
            if not pair["prompt_ids"]:
                counts["prompt of no tokens"] += 1
            elif len(pair["prompt_ids"]) > max_length - max_new_tokens:
                counts["prompt too long"] += 1
            else:
                counts["response cut at max_length"] += len(ids) > max_length
                pairs.append(pair)
    if not pairs:
        fail(f"{source} holds no usable rows ({counts_line(counts)})")
    return pairs, counts


def counts_line(counts: dict) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items() if number)


def check_prompts(path: Path, pairs, source) -> str:
    """The text of RUN/prompts.json: the number and a hash of the prompts and human answers in source. Refuses pairs of others."""
    number, total = 0, 0
    for number, pair in enumerate(
        pairs, 1
    ):  # hashes are added up, so that the order does not matter
        text = json.dumps([pair.get(name) for name in ("id", "system", "prompt", "real")])
        total = (total + int.from_bytes(hashlib.sha256(text.encode()).digest())) % 2**256
    mine = json.dumps({"prompts": number, "sha256": f"{total:064x}"}) + "\n"
    if path.exists() and path.read_bytes() != mine.encode():
        fail(
            f"{number} pairs in {source} that are not those of {path}: it has changed since the run began; restore it, "
            "or choose another --run"
        )
    return mine


def read_generated(path: Path, iteration: int, vocabulary: int, eos: int):
    """The rows of an iteration's generated.jsonl, one by one; ends with one line if they are not that iteration's."""
    if not path.exists():
        fail(f"{path} is missing: run generate.py --iter {iteration} first")
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        to_pair(row, where)
        if type(row.get("id")) is not int or row.get("iter") != iteration:
            fail(
                f"{where}: id {row.get('id')!r} of iteration {row.get('iter')!r} in the file of iteration {iteration}"
            )
        check_ids(row, where, vocabulary, eos)
        yield row


def check_ids(row: dict, where: str, vocabulary: int, eos: int):
    """Refuse a row whose generated_ids could not have been sampled from this model, or do not fit its finish."""
    ids = row.get("generated_ids")
    if (
        not isinstance(ids, list)
        or not ids
        or not all(type(i) is int and 0 <= i < vocabulary for i in ids)
    ):
        fail(f"{where}: generated_ids are not token ids of this model")
    if (ids[-1] == eos) != (row.get("finish") == "eos"):
        fail(
            f"{where}: finish is {row.get('finish')!r}, but the ids say otherwise; they are of another tokenizer"
        )
