"""A row of an SFT set, in the shapes that people have → a pair: {"prompt", "real"}, and where the
row has them "system" and "generated". A row that is no pair is Unusable, with the reason; nothing
that belongs to the prompt is dropped."""

import re
from pathlib import Path

from spin.files import fail, read_jsonl

ROLES = {"system": "system", "developer": "system"}
ROLES |= {"user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
TEXTS = ("system", "prompt", "real", "generated")

# the fields that tell a shape -> a further field, which is appended to the prompt, or "".
# The fields: of the prompt, or "" where it is in the conversation; of the real answer; of the
# generated one, if there is one. The first shape whose fields are all there is taken.
SHAPES = {
    ("prompt", "real", "generated"): "",  # generated.jsonl itself, or pairs as plain text
    ("", "real", "generated"): "",  # the authors' published sets, conversations
    ("prompt", "chosen", "rejected"): "",  # with --pairs this is DPO
    ("question", "chosen", "rejected"): "",  # Orca's pairs
    ("", "chosen", "rejected"): "",  # conversations
    ("", "messages"): "",  # UltraChat
    ("", "conversations"): "",  # ShareGPT
    ("instruction", "output"): "input",  # Alpaca
    ("instruction", "response"): "context",  # Dolly
    ("prompt", "response"): "",
    ("prompt", "completion"): "",  # TRL
    ("query", "response"): "",
    ("question", "response"): "",  # Orca
    ("question", "answer"): "",
    ("input", "output"): "",
}
SYSTEM = (
    "system",
    "system_prompt",
    "system_message",
)  # columns of a system message, beside any shape
OURS = ("id", "iter", "generated_ids", "finish")  # of generated.jsonl
# columns with text or more that the model should see before it answers
OF_THE_PROMPT = ("history", "context", "input", "instruction", "tools", "functions", "documents")
OF_THE_PROMPT += ("image", "images", "audio", "audios", "video", "videos", "passage", "document")
OF_THE_PROMPT += ("article", "choices", "options", "hint")
EMPTY = ("", "[]", "{}", "null", "None", [], {})  # what a column holds where it holds nothing
# of a message, besides its text
MORE_OF_A_TURN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
MORE_OF_A_TURN += ("image", "images", "audio", "audios", "video", "videos")


class Unusable(ValueError):
    """A row that is no pair, or that a template or a model cannot take. Its text is the reason."""


def to_pair(row: dict, source: str) -> tuple[dict, list[str]]:
    """(the pair in a row of any known shape, its columns that are not used). Raises Unusable.
    Ends with one line, about the source, where a column that belongs to the prompt would be lost.
    A pair from a conversation that goes on behind its first answer has "later_rounds"."""
    if not isinstance(row, dict):
        raise Unusable("no object with fields")
    there = {name: value for name, value in row.items() if value not in (None, [])}
    shape = shape_of(there)
    if shape is None:
        nulls = ", ".join(name for name in row if name not in there)
        if shape_of(row):
            raise Unusable(f"nothing in {nulls}")
        fields = ", ".join(map(str, row)).encode(errors="replace").decode()
        raise Unusable(f"unknown shape with fields {fields or '(none)'}")
    used = {*shape, SHAPES[shape], *SYSTEM, *OURS}
    unused = [name for name in there if name not in used]
    for name in unused:
        if name in OF_THE_PROMPT and there[name] not in EMPTY:
            known = "/".join(filter(None, shape))
            mend = f"put its text into the prompt, or remove the column {name}"
            fail(f"{source} has the shape {known}, and {name} would be lost: {mend}")
    pair = read_pair(there, shape)
    for name in TEXTS:
        if not isinstance(pair.get(name, ""), str):
            raise Unusable(f"{name} is no text")
        if pair.get(name, "").encode(errors="replace").decode() != pair.get(name, ""):
            raise Unusable(f"{name} is no valid Unicode")
    return pair, unused


def shape_of(row: dict) -> tuple | None:
    """The fields of SHAPES that a row has; None where it has no shape's."""
    return next((names for names in SHAPES if all(n in row for n in names if n)), None)


def read_pair(row: dict, shape: tuple) -> dict:
    """The pair in a row of this shape, without fields that are null. Raises Unusable."""
    texts = all(isinstance(row.get(name), str) for name in ("prompt", "real", "generated"))
    if shape == ("prompt", "real", "generated") and texts:
        own = {name: row[name] for name in (*shape, "system", *OURS) if name in row}
        return {**own, **system_column(row, own)}
    asked, *answers = ([] if not name else turns_of(row[name], name) for name in shape)
    more = row.get(SHAPES[shape], "")
    if more not in EMPTY:  # these shapes' prompts are text
        role, text = asked[-1] if asked else ("user", "")
        if not (isinstance(text, str) and isinstance(more, str)):
            raise Unusable("prompt is no text")
        asked[-1] = role, "\n\n".join(part for part in (text, more) if part)
    pair = pair_of_turns(asked, *answers)
    return {**pair, **system_column(row, pair)}


def system_column(row: dict, pair: dict) -> dict:
    """{"system": text of a row's own column for it}, or {}. An empty message is kept as one."""
    found = [row[name] for name in SYSTEM if name in row]
    found += [pair["system"]] if "system" in pair else []
    texts = [text for text in found if text != ""]
    if any(text != texts[0] for text in texts):
        raise Unusable("two system messages")
    return {"system": texts[0] if texts else ""} if found else {}


def turns_of(value, field: str) -> list[tuple[str, str]]:
    """A text, or messages in the forms of OpenAI and ShareGPT, as turns (role, text)."""
    if isinstance(value, str) and re.match(
        r"""\s*\[\s*\{\s*['"](role|from|content|value)\b""", value
    ):
        raise Unusable(f"{field} is a conversation written as text")
    if not isinstance(value, list):
        asks = field in ("prompt", "question", "query", "instruction", "input")
        return [("user" if asks else "assistant", value)]
    turns = []
    for message in value:
        if not isinstance(message, dict):
            raise Unusable(f"{field} is no list of messages")
        role = str(message.get("role") or message.get("from"))
        if role.lower() not in ROLES:
            raise Unusable(f"a turn by {ascii(role[:20])}")
        if any(message.get(name) for name in MORE_OF_A_TURN):
            raise Unusable("a turn with tool calls, reasoning or pictures beside its text")
        text = (
            message.get("content") if message.get("content") is not None else message.get("value")
        )
        turns.append((ROLES[role.lower()], text_of(text)))
    return turns


def text_of(content) -> str:
    """The text of a message; a list of parts of text is joined."""
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        parts = parts if kinds <= {"text", "input_text", "output_text"} else None
        content = "".join(parts) if parts and all(isinstance(p, str) for p in parts) else None
    if not isinstance(content, str):
        raise Unusable("a turn without text")
    return content


def pair_of_turns(asked: list, real: list, generated: list | None = None) -> dict:
    """The pair in turns. asked: of the prompt's own column. real, generated: the answers, each
    alone or behind the conversation that asks for it. Of several rounds the first is used (the
    paper's Appendix B.1); of two conversations the one in which they differ."""
    if generated is None:
        cut = next((i for i, (role, _) in enumerate(real) if role == "assistant"), len(real))
    elif real == generated:
        raise Unusable("equal answers")
    else:
        same = [a == b for a, b in zip(real, generated, strict=False)]
        cut = [*same, False].index(False)
    before = real[:cut]
    if any(role == "user" for role, _ in before):
        if asked[-len(before) :] == before:
            before = asked
        elif any(turn not in before for turn in asked):
            raise Unusable("the prompt is not that of the conversation")
    else:
        before = [turn for turn in before if turn not in asked] + asked
    answers = {"real": real[cut:], "generated": generated[cut:] if generated else None}
    pair = {}
    for name, turns in answers.items():
        if turns is None:
            continue
        if not turns:
            raise Unusable("a conversation without an answer")
        if turns[0][0] != "assistant":
            raise Unusable("the answers do not answer the same prompt")
        if [role for role, _ in turns[:2]] == ["assistant", "assistant"]:
            raise Unusable("an answer in several turns")
        pair[name] = turns[0][1]
    systems = [text for role, text in before if role == "system"]
    rest = before[len(systems) :]
    if [role for role, _ in rest] != ["user"]:
        several = [role for role, _ in rest].count("user") > 1
        raise Unusable("several rounds before the answer" if several else "no prompt first")
    if any(role == "assistant" for role, _ in real[cut + 1 :]):
        pair["later_rounds"] = True
    system = {"system": "\n".join(systems)} if systems else {}
    return {"prompt": rest[0][1], **pair, **system}


def sampled_rows(path: Path, t: int, codec):
    """The rows of an iteration's generated.jsonl, one by one; refuses any that is not of it."""
    if not path.exists():
        fail(f"{path} is missing: run generate.py --iter {t} first")
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        try:
            to_pair(row, where)
        except Unusable as problem:
            fail(f"{where}: {problem}")
        if type(row.get("id")) is not int or row.get("iter") != t:
            found = f"id {row.get('id')!r} of iteration {row.get('iter')!r}"
            fail(f"{where}: {found} in the file of iteration {t}")
        check_ids(row, where, codec)
        yield row


def check_ids(row: dict, where: str, codec):
    """Refuse generated_ids that this model cannot have sampled, or that do not fit their finish."""
    ids = row.get("generated_ids")
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < codec.vocabulary for i in ids)
    if not known or not ids:
        fail(f"{where}: generated_ids are not token ids of this model")
    if (ids[-1] == codec.end) != (row.get("finish") == "eos"):
        fail(f"{where}: finish {row.get('finish')!r} does not fit the ids: of another tokenizer")
