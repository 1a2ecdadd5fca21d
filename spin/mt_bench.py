"""MT-Bench's questions answered, both turns, in the format that FastChat's judge reads. Used by evaluate.py; we do not judge.

    python evaluate.py --model DIR --mt-bench question.jsonl --out NAME.jsonl

A row a question: question_id, answer_id, model_id, choices (one, with an answer for each turn), tstamp.
"""

import hashlib
import json
import time

import numpy as np
import torch
from tqdm import tqdm

from spin import distributed
from spin.data import decode, encode, load_tokenizer, read_rows, write_jsonl
from spin.files import fail
from spin.lm_harness import positions
from spin.sampling import sample, uniforms

# FastChat's temperature_config; 0.7 for other categories
TEMPERATURE = {
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def answer(policy, recipe, source, out):
    """An answer to each turn of each question, to out in FastChat's format; the file's name is the model's.

    At FastChat's temperatures, up to --max-new-tokens a turn (FastChat's limit is 1024). Ends with one line, before the
    model is loaded, if some conversation might not fit in the model's positions.
    """
    questions, (tokenizer, _) = list(read_rows(source)), load_tokenizer(policy, recipe)
    for k, q in enumerate(questions, 1):
        turns = q.get("turns")
        texts = [q.get("category", ""), *(turns if isinstance(turns, list) else [])]
        if (
            "question_id" not in q
            or len(texts) < 2
            or not all(isinstance(x, str) for x in texts)
            or not all(texts[1:])
            or "".join(texts).encode(errors="replace")
            != "".join(texts).encode(errors="surrogatepass")
        ):
            fail(
                f"{source}, row {k}: a question has a question_id and turns, a list of texts, and maybe a category"
            )
    room, most = positions(policy, recipe), recipe.max_new_tokens
    needs = [
        sum(len(conversation(tokenizer, recipe.template, [x], [])) + most for x in q["turns"])
        for q in questions
    ]
    if room and (long := [q["question_id"] for q, n in zip(questions, needs) if n > room]):
        fail(
            f"{len(long)} of {len(questions)} questions (the first is {long[0]}) may need up to {max(needs)} positions with "
            f"--max-new-tokens {most} a turn, and {policy} has {room}: lower --max-new-tokens, or take a model with more"
        )
    heat = [TEMPERATURE.get(q.get("category"), 0.7) for q in questions]
    ids = torch.zeros(
        len(questions), max(len(q["turns"]) for q in questions), most, dtype=torch.long
    )  # id + 1; 0: none
    with distributed.join() as world:
        model, said = distributed.load_frozen(policy, recipe, world), [[] for _ in questions]
        for turn in tqdm(range(ids.shape[1]), desc="answers", unit="turn", disable=world.rank > 0):
            for temperature in sorted(set(heat)):
                mine = [
                    k
                    for k, q in enumerate(questions)
                    if k % world.size == world.rank
                    and heat[k] == temperature
                    and turn < len(q["turns"])
                ]
                u = [
                    uniforms(recipe.seed, turn, k, 4, number=most) for k in mine
                ]  # 4: a stream of its own
                prompts = [
                    conversation(
                        tokenizer, recipe.template, questions[k]["turns"][: turn + 1], said[k]
                    )
                    for k in mine
                ]
                for k, (answer, _) in zip(
                    mine,
                    mine
                    and sample(
                        model,
                        prompts,
                        tokenizer.eos_token_id,
                        most,
                        np.stack(u),
                        temperature,
                        slots=recipe.slots,
                    ),
                ):
                    said[k].append(answer)
                    ids[k, turn, : len(answer)] = torch.tensor(answer) + 1
        ids = distributed.all_sum(ids.to(world.device)).tolist()  # each row was filled by one rank
    if world.rank == 0:
        rows = []
        for q, answers in zip(questions, ids):
            turns = [
                decode(tokenizer, recipe.template, [i - 1 for i in answer if i])
                for answer in answers[: len(q["turns"])]
            ]
            mark = hashlib.sha256(
                json.dumps([out.stem, q["question_id"], turns]).encode()
            ).hexdigest()[:22]
            rows.append(
                {
                    "question_id": q["question_id"],
                    "answer_id": mark,
                    "model_id": out.stem,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
            )
        write_jsonl(out, rows)
        print(f"{out}: {len(rows)} answers for FastChat's judge")


def conversation(tokenizer, template: str, asked: list[str], said: list[list[int]]) -> list[int]:
    """The ids of a conversation up to its next answer. asked: the prompts so far; said: the answers' ids, one fewer.

    With the chat template it is rendered as one; other templates have one round only, so rounds are put one after another.
    """
    if template == "chat" and said:
        texts = [
            x for q, a in zip(asked, said) for x in (q, decode(tokenizer, template, a))
        ] + asked[-1:]
        text = tokenizer.apply_chat_template(
            [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)],
            tokenize=False,
            add_generation_prompt=True,
        )
        return encode(tokenizer, text, {"prompt": "{prompt}"})[0]
    rounds = [encode(tokenizer, template, {"prompt": x})[0] for x in asked]
    rounds[1:] = [ids[ids[:1] == [tokenizer.bos_token_id] :] for ids in rounds[1:]]
    return sum((r + a for r, a in zip(rounds, [*said, []])), [])
