"""Stage 1 of an iteration: the opponent answers every prompt, y'_i ~ p_θt(·|x_i) (Algorithm 1, lines 2 to 4).

    python generate.py --iter 0 --recipe demo
    torchrun --nproc_per_node 8 generate.py --iter 0

Reads the SFT set and θ_t (--model for t = 0, else RUN/iter{t-1}/model); writes RUN/iter{t}/generated.jsonl.
Temperature 1 and no truncation unless told otherwise: the objective's expectation is over p_θt itself.
Prompts are sorted by length and cut into fixed chunks, whatever the number of ranks; a free rank takes the next chunk
from a common queue and writes it whole (generated.part/); a rerun samples only what is missing. On the CPU, with the
same number of threads and slots and --engine generate, the file has the same bytes for any number of ranks and restarts;
sample.py says what may differ elsewhere. --engine paged promises the distribution, not the very rows.
"""

import collections
import json
import shutil
import sys
import time

import numpy as np
from tqdm import tqdm

from spin import distributed
from spin.data import (
    check_prompts,
    counts_line,
    decode,
    load_tokenizer,
    read_jsonl,
    read_rows,
    select,
    write_jsonl,
)
from spin.files import check_json, check_lines, fail, identity, one_line, write_whole
from spin.recipe import check_run, iter_dir, parse, save_run, theta
from spin.sampling import ENGINES, uniforms


@one_line
def main(argv=None):
    recipe, args = parse(
        argv, __doc__.split("\n")[0], ("--iter", dict(type=int, required=True, help="iteration t"))
    )
    t, out = args.iter, iter_dir(args.run, args.iter) / "generated.jsonl"
    check_run(recipe, args.run)
    if out.exists():
        check_prompts(args.run / "prompts.json", read_jsonl(out), out)
        shutil.rmtree(
            out.with_name("generated.part"), ignore_errors=True
        )  # a kill may have come between
        return print(f"{out} is there already: nothing to do")
    opponent = theta(recipe, args.run, t)
    tokenizer, _ = load_tokenizer(opponent, recipe)
    pairs, counts = select(
        read_rows(recipe.data, recipe.split),
        recipe.data,
        tokenizer,
        recipe.template,
        recipe.num_prompts,
        recipe.seed,
        recipe.max_length,
        recipe.max_new_tokens,
    )
    prompts = check_prompts(args.run / "prompts.json", pairs, recipe.data)
    pairs.sort(
        key=lambda pair: (-len(pair["prompt_ids"]), pair["id"])
    )  # longest first: a memory failure comes at once
    chunks = [pairs[i : i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
    parts = [out.with_name("generated.part") / f"{k:06}.jsonl" for k in range(len(chunks))]
    missing = {k for k in range(len(chunks)) if not is_whole(parts[k], chunks[k])}
    mark, key = {"model": identity(opponent, recipe.revision)}, out.with_suffix(".json")
    if len(missing) < len(chunks) and check_json(key) != mark:
        fail(
            f"the answers in {parts[0].parent} are not known to be those of {opponent}: delete that folder and run this again"
        )

    with distributed.join() as world:
        model = distributed.load_frozen(opponent, recipe, world)
        distributed.barrier()  # nobody writes before everybody has seen what is missing and has its model
        if world.rank == 0:
            print(f"theta_{t} ({opponent}) answers {len(pairs)} prompts ({counts_line(counts)})")
            save_run(recipe, args.run)
            write_whole(args.run / "prompts.json", prompts)
            out.parent.mkdir(exist_ok=True)
            write_whole(key, json.dumps(mark) + "\n")
        parts[0].parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(chunks), desc=f"generate {t}", unit="chunk", disable=world.rank > 0)
        begun, tokens = time.perf_counter(), 0
        for k in distributed.queue(len(chunks)):
            if k in missing:
                rows = answer(model, tokenizer, chunks[k], recipe, t)
                write_jsonl(parts[k], rows)
                tokens += sum(len(row["generated_ids"]) for row in rows)
            bar.set_postfix_str(
                f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s a rank", refresh=False
            )
            bar.update(k + 1 - bar.n)  # those before k are taken too, by any rank
        bar.close()
        distributed.barrier()
        if world.rank == 0:
            warning = collapse(merge(parts, out))
            shutil.rmtree(parts[0].parent)
            print(f"{out}: {len(pairs)} answers")
            if warning:
                print(f"warning: {warning}", file=sys.stderr)


def answer(model, tokenizer, chunk: list[dict], recipe, t: int) -> list[dict]:
    """The rows of generated.jsonl for one chunk of prompts."""
    u = np.stack(
        [uniforms(recipe.seed, t, pair["id"], number=recipe.max_new_tokens) for pair in chunk]
    )
    engine = ENGINES["generate" if recipe.engine == "auto" else recipe.engine]
    answers = engine(
        model,
        [pair["prompt_ids"] for pair in chunk],
        tokenizer.eos_token_id,
        recipe.max_new_tokens,
        u,
        recipe.temperature,
        recipe.top_p,
        recipe.slots,
    )
    return [
        {
            "id": pair["id"],
            "iter": t,
            **{k: pair[k] for k in ("system", "prompt", "real") if k in pair},
            "generated": decode(tokenizer, recipe.template, ids),
            "generated_ids": ids,
            "finish": finish,
        }
        for pair, (ids, finish) in zip(chunk, answers)
    ]


def collapse(ends) -> str | None:
    """In words, what is wrong with an opponent whose answers all ended alike: "length", or "empty". None where it is well."""
    if ends.keys() == {"length"}:
        return (
            "every answer was cut off at --max-new-tokens: the model never writes its EOS token; has it learnt to, and in "
            "this --template? SPIN cannot teach it to stop"
        )
    if ends.keys() == {"empty"}:
        return "every answer is empty: the model ends at once; is this its --template, and was theta_t trained too far?"


def merge(parts, out) -> collections.Counter:
    """generated.jsonl from its parts, sorted by id; it holds the places of the rows in memory, not the rows.

    Returns how often an answer was "empty", or else ended by "eos" or "length".
    """
    heap, places, ends = parts[0].with_name("all"), [], collections.Counter()
    with open(heap, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    with open(heap, "rb") as file:
        while line := file.readline():
            row = json.loads(line)
            places.append((row["id"], file.tell() - len(line)))
            ends[row.get("finish") if row["generated"].strip() else "empty"] += 1

        def line_at(place):
            file.seek(place)
            return file.readline().decode()

        write_whole(out, (line_at(place) for _, place in sorted(places)))
    return ends


def is_whole(part, chunk) -> bool:
    """Whether a chunk was sampled before; ends with one line if the file is of other prompts."""
    again = f"delete {part.parent} and run this again"
    if part.exists():
        check_lines(part, len(chunk), again)
        if [row.get("id") for row in read_jsonl(part)] != [pair["id"] for pair in chunk]:
            fail(f"{part} does not hold the prompts of its chunk: {again}")
    return part.exists()


if __name__ == "__main__":
    main()
