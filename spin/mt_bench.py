"""MT-Bench's questions answered, both turns, in the format that FastChat's judge reads.

    python -m spin.mt_bench question.jsonl --model DIR --out NAME.jsonl [--max-new-tokens 1024]
    torchrun --nproc_per_node 8 -m spin.mt_bench question.jsonl --model DIR --out NAME.jsonl

question.jsonl and the judge are FastChat's (Table 6, MT-Bench). NAME becomes the model's name. A
row answers one question: question_id, answer_id, model_id, choices (a text for each turn), tstamp.
"""

import time
import uuid
from dataclasses import replace
from pathlib import Path

from spin import checks
from spin.data.rows import Unusable
from spin.data.text import PLAIN, Renderer, decode, encode, load_renderer, render_messages
from spin.files import check_out, fail, io_errors_in_one_line, read_jsonl, write_jsonl
from spin.model.sampling_check import check_sampling
from spin.model.weights import load_frozen
from spin.recipe import STREAM, parse
from spin.run.ranks import gather, process_group
from spin.sampling.engines import sample, uniforms

# FastChat's temperatures by category, and its 0.7 for the others
TEMPERATURE = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)
FLAGS = (
    ("questions", {"type": Path, "metavar": "QUESTIONS", "help": "MT-Bench's question.jsonl"}),
    ("--out", {"type": Path, "metavar": "NAME.jsonl", "help": "where the answers go"}),
)


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, *FLAGS)
    if not args.out or args.out.suffix != ".jsonl":
        fail("spin.mt_bench needs --out NAME.jsonl: FastChat takes the file's name for the model's")
    check_out(args.out)
    if args.out.exists():  # of this model, or of another
        fail(f"{args.out} is there already: delete it, or give another --out")
    policy = checks.model_folder(recipe.model)
    questions = read_questions(args.questions)
    renderer = load_renderer(policy, recipe)
    with process_group() as world:
        model = load_frozen(policy, recipe, world)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
        alone = replace(recipe, max_length=room or recipe.max_length, slots=1)
        check_sampling(model, alone, world)
        rows = {}
        for k in range(world.rank, len(questions), world.size):
            row = {"question_id": questions[k]["question_id"], "answer_id": uuid.uuid4().hex}
            turns = answer(model, renderer, questions[k], k, recipe, room)
            row |= {"model_id": args.out.stem, "choices": [{"index": 0, "turns": turns}]}
            rows[k] = {**row, "tstamp": time.time()}
        rows = {k: row for part in gather(rows, world) for k, row in part.items()}
        if world.rank == 0:
            write_jsonl(args.out, [rows[k] for k in sorted(rows)])
            print(f"{args.out}: {len(rows)} answers for FastChat's judge")


def read_questions(path: Path) -> list[dict]:
    """FastChat's questions; refuses a file with a row that is not one."""
    questions = list(read_jsonl(path))
    try:
        for row in questions:
            texts = row["turns"] + [row.get("category", "")]  # TypeError unless turns is a list
            "".join(texts).encode()  # raises for what is not text, or holds half a surrogate pair
            if "question_id" not in row or not row["turns"]:
                raise KeyError
    except (KeyError, TypeError, UnicodeError):
        wanted = "a question_id and turns, a list of texts, and maybe a category"
        fail(f"{path} is not MT-Bench's question.jsonl: each row has {wanted}")
    return questions


def answer(model, renderer: Renderer, question: dict, k: int, recipe, room: int) -> list[str]:
    """The answers to question k, turn by turn; each turn sees those before it. The chat template
    renders the whole conversation. Any other template renders one round, so the rounds are joined.
    room: how many positions the model has, or 0 if it has no limit."""
    temperature = TEMPERATURE.get(question.get("category"), 0.7)
    most = recipe.max_new_tokens
    messages, answers = [], []
    ids = list(renderer.bos_ids)  # of the conversation so far
    for turn, text in enumerate(question["turns"]):
        messages.append({"role": "user", "content": text})
        try:
            if renderer.template == "chat":
                whole = render_messages(renderer, messages)
                ids = renderer.tokenizer(whole, add_special_tokens=False)["input_ids"]
            else:
                ids = ids + encode(renderer, {"prompt": text})[0][len(renderer.bos_ids) :]
        except Unusable as problem:
            fail(f"a question cannot be asked, {problem}: {PLAIN}")
        if room and len(ids) + most > room:
            needs = f"a conversation may need {len(ids) + most} positions with its next answer"
            fail(f"{needs}, the model has {room}: lower --max-new-tokens")
        uniform = uniforms(recipe.seed, turn, k, STREAM["mt_bench"], number=most)[None]
        (reply, _), *_ = sample(model, [ids], renderer.end_ids, most, uniform, temperature)
        ids = ids + reply
        answers.append(decode(renderer, reply))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


if __name__ == "__main__":
    main()
