"""MT-Bench's questions answered, both turns, in the format that FastChat's judge reads.

    python -m spin.mt_bench question.jsonl --model DIR --out NAME.jsonl [--max-new-tokens 1024]
    torchrun --nproc_per_node 8 -m spin.mt_bench question.jsonl --model DIR --out NAME.jsonl
Started in the repository's root. question.jsonl is FastChat's (its limit: 1024 tokens a turn), and
so is the judge (Table 6, MT-Bench). NAME becomes the model's. A row a question: question_id,
answer_id, model_id, choices (one, with a text for each turn), tstamp. NAME.json beside it says what
they were made from."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spin import checks
from spin.codec import PLAIN, Codec, load_codec
from spin.data import Unusable
from spin.distributed import process_group, sum_over_ranks
from spin.files import check_out, fail, io_errors_in_one_line, write_json, write_jsonl
from spin.flags import parse
from spin.lm_harness import count_positions
from spin.models import load_frozen
from spin.run import made_by
from spin.sampling import sample, uniforms
from spin.sources import read_rows
from spin.tokens import decode, encode, render_messages

# FastChat's temperature_config by category, and its 0.7 for the others
TEMPERATURE = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)
QUESTIONS = ("questions", {"metavar": "QUESTIONS", "help": "MT-Bench's question.jsonl"})
OUT = ("--out", {"type": Path, "metavar": "NAME.jsonl", "help": "where the answers go"})


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, QUESTIONS, OUT)
    check_out(args.out)
    if not args.out or args.out.suffix != ".jsonl":
        fail("spin.mt_bench needs --out NAME.jsonl: FastChat takes the file's name for the model's")
    policy = checks.model_folder(recipe.model)
    questions = read_questions(args.questions)
    beside = args.out.with_suffix(".json")
    made_from = made_by(recipe, policy, None, {"questions": questions})
    if args.out.exists():
        checks.same_result(args.out, made_from, beside)
        return print(f"{args.out} is there already: nothing to do")
    codec = load_codec(policy, recipe)
    check_room(questions, policy, codec, recipe)
    with process_group() as world:
        model = load_frozen(policy, recipe, world)
        mine = answer_questions(model, codec, questions, recipe, world)
        answers = sum_over_ranks(mine.to(world.device)).tolist()  # of each row, one rank's
        if world.rank > 0:
            return
    rows = []
    for question, ids in zip(questions, answers, strict=True):
        turns = [[i - 1 for i in turn if i] for turn in ids[: len(question["turns"])]]
        texts = [decode(codec, turn) for turn in turns]
        key = json.dumps([args.out.stem, question["question_id"], texts])
        row = {"question_id": question["question_id"], "model_id": args.out.stem}
        row["answer_id"] = hashlib.sha256(key.encode()).hexdigest()[:22]  # as long as FastChat's
        row["choices"] = [{"index": 0, "turns": texts}]
        rows.append({**row, "tstamp": time.time()})
    write_json(beside, {"made_from": made_from})
    write_jsonl(args.out, rows)
    print(f"{args.out}: {len(rows)} answers for FastChat's judge")


def read_questions(source: str) -> list[dict]:
    """FastChat's questions; refuses a row that is none."""
    questions = list(read_rows(source))
    for number, row in enumerate(questions, 1):
        turns = row.get("turns")
        try:  # text, and no half of a surrogate pair
            "".join([row.get("category", ""), *turns]).encode()
            good = "question_id" in row and isinstance(turns, list) and turns and all(turns)
        except (TypeError, UnicodeError):
            good = False
        if not good:
            wanted = "a question_id and turns, a list of texts, and maybe a category"
            fail(f"{source}, row {number}: a question has {wanted}")
    return questions


def check_room(questions, policy: str, codec, recipe):
    """End with one line if some conversation might not fit in the model's positions."""
    room = count_positions(policy, recipe)
    most = recipe.max_new_tokens
    needs = {}
    for question in questions:
        rounds = [conversation(codec, [x], []) for x in question["turns"]]
        needs[question["question_id"]] = sum(len(ids) + most for ids in rounds)
    long = [name for name, need in needs.items() if room and need > room]
    if long:
        found = f"{len(long)} of {len(questions)} questions (the first is {long[0]}) may need up to"
        found += f" {max(needs.values())} positions with --max-new-tokens {most} a turn"
        mend = "lower --max-new-tokens, or take a model with more"
        fail(f"{found}, and {policy} has {room}: {mend}")


def answer_questions(model, codec, questions, recipe, world) -> torch.Tensor:
    """This rank's answers: (questions, turns, --max-new-tokens) of id + 1; 0 where no token is."""
    temperatures = [TEMPERATURE.get(q.get("category"), 0.7) for q in questions]
    turns, most = max(len(q["turns"]) for q in questions), recipe.max_new_tokens
    ids, eos = torch.zeros(len(questions), turns, most, dtype=torch.long), codec.end
    said = [[] for _ in questions]  # the answers so far, which the next turn sees
    for turn in tqdm(range(turns), desc="answers", unit="turn", disable=world.rank > 0):
        for temperature in sorted(set(temperatures)):
            mine, prompts = [], []
            for k in range(world.rank, len(questions), world.size):
                asked = questions[k]["turns"][: turn + 1]
                if temperatures[k] == temperature and len(asked) == turn + 1:
                    mine.append(k)
                    prompts.append(conversation(codec, asked, said[k]))
            if not mine:
                continue
            # 4: a stream of its own
            uniform = np.stack([uniforms(recipe.seed, turn, k, 4, number=most) for k in mine])
            answers = sample(model, prompts, eos, most, uniform, temperature, slots=recipe.slots)
            for k, (answer, _) in zip(mine, answers, strict=True):
                said[k].append(answer)
                ids[k, turn, : len(answer)] = torch.tensor(answer) + 1
    return ids


def conversation(codec: Codec, asked: list[str], said: list[list[int]]) -> list[int]:
    """The ids of a conversation up to its next answer.
    asked: the prompts so far; said: the answers' ids, one fewer. With the chat template it is
    rendered as one; other templates have one round only, so rounds are put one after another."""
    if codec.template == "chat":
        messages = []
        for prompt, answer in zip(asked, [*said, []], strict=True):
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": decode(codec, answer)})
        del messages[-1]  # the answer that is still to come
        try:
            text = render_messages(codec, messages)
        except Unusable as problem:
            fail(f"a question cannot be asked, {problem}: {PLAIN}")
        return codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = []
    for prompt, answer in zip(asked, [*said, []], strict=True):
        more = encode(codec, {"prompt": prompt})[0]
        if ids and more[: len(codec.begin)] == codec.begin:
            del more[: len(codec.begin)]  # one BOS, at the beginning
        ids += more + answer
    return ids


if __name__ == "__main__":
    main()
