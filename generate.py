"""Stage 1 of an iteration: the opponent answers every prompt, y'_i ~ p_θt(·|x_i).

Algorithm 1's inner loop.

    python generate.py --iter 0 --recipe demo
    torchrun --nproc_per_node 8 generate.py --iter 0

Reads the SFT set and θ_t (--model for t = 0, else RUN/iter{t-1}/model); writes
RUN/iter{t}/generated.jsonl. Temperature 1 and no truncation unless told otherwise: the objective's
expectation is over p_θt itself.

Prompts are sorted by length and cut into fixed chunks, whatever the number of ranks. A free rank
takes the next chunk and writes it whole (generated.part/); a rerun samples only what is missing. On
the CPU, with the same number of threads and slots, the file has the same bytes for any number of
ranks and restarts; spin/sampling.py says what may differ elsewhere.
"""

import shutil
from functools import partial

import numpy as np
from tqdm import tqdm

from spin import checks, signs
from spin.checksums import is_whole, write_listed
from spin.codec import load_codec
from spin.distributed import barrier, next_chunk, process_group
from spin.files import io_errors_in_one_line, read_jsonl, write_json, write_jsonl
from spin.flags import ITER, parse
from spin.models import load_frozen
from spin.probe import probe, refuse_what_cannot_be_trained
from spin.run import iteration_folder, list_of, save_recipe, starting_model
from spin.sampling import sample, uniforms
from spin.selection import counts_line, select
from spin.sources import read_rows
from spin.tokens import decode


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, ITER)
    run, t = args.run, args.iter
    checks.before_generating(recipe, run, t)
    out = iteration_folder(run, t) / "generated.jsonl"
    parts_folder = out.with_name("generated.part")
    if out.exists():
        shutil.rmtree(parts_folder, ignore_errors=True)  # left if killed after the merge
        return print(f"{out} is there already: nothing to do")
    theta_t = starting_model(recipe, run, t)
    codec = load_codec(theta_t, recipe)
    refuse_what_cannot_be_trained(theta_t, recipe)
    rows = read_rows(recipe.data, recipe.split)
    pairs, left_out = select(rows, recipe.data, codec, recipe, recipe.num_prompts)
    seal = checks.same_prompts(run / "prompts.json", pairs, recipe.data)
    # fixed chunks, the longest prompts first: a memory failure comes at once
    pairs.sort(key=lambda pair: (-len(pair["prompt_ids"]), pair["id"]))
    chunks = [pairs[i : i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
    parts = [parts_folder / f"{k:06}.jsonl" for k in range(len(chunks))]
    write = partial(write_listed, made_from=list_of(run, t))

    with process_group() as world:
        model = load_frozen(theta_t, recipe, world)
        probe(model, recipe, world)  # before hours of sampling: can train.py score its answers?
        barrier()  # nobody writes before everybody has seen what is missing and has its model
        parts_folder.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            print(f"theta_{t} ({theta_t}) answers {len(pairs)} prompts ({counts_line(left_out)})")
            save_recipe(recipe, run)
            write_listed(run / "prompts.json", seal)
            write_json(out.with_suffix(".json"), {"left_out": left_out})
        barrier()  # no answer without the recipe that it is of

        # a free rank takes the next chunk
        bar = tqdm(total=len(chunks), desc=f"generate {t}", unit="chunk", disable=world.rank > 0)
        for k in next_chunk(len(chunks)):
            if not is_whole(parts[k]):  # else a run that was killed has answered it
                write_jsonl(parts[k], answer(model, codec, chunks[k], recipe, t), write=write)
            bar.update(k + 1 - bar.n)  # chunks 0 … k are all taken, by this rank or another
        bar.close()
        barrier()
        if world.rank == 0:
            merge(parts, out, write)
            shutil.rmtree(parts_folder)


def merge(parts, out, write):
    """The chunks' rows, sorted by id, become generated.jsonl."""
    rows = [row for part in parts for row in read_jsonl(part)]
    write_jsonl(out, sorted(rows, key=lambda row: row["id"]), write=write)
    print(f"{out}: {len(rows)} answers")
    signs.warn(signs.ended_alike(rows))


def answer(model, codec, chunk: list[dict], recipe, t: int) -> list[dict]:
    """The rows of generated.jsonl for one chunk of prompts: y' ~ p_θt(·|x) for each."""
    # each prompt has random numbers of its own
    uniform = [uniforms(recipe.seed, t, pair["id"], number=recipe.max_new_tokens) for pair in chunk]
    answers = sample(
        model,
        [pair["prompt_ids"] for pair in chunk],
        codec.end,
        recipe.max_new_tokens,
        np.stack(uniform),
        recipe.temperature,
        recipe.top_p,
        recipe.slots,
        recipe.engine,
    )
    rows = []
    for pair, (ids, finish) in zip(chunk, answers, strict=True):
        row = {"id": pair["id"], "iter": t}
        row |= {name: pair[name] for name in ("system", "prompt", "real") if name in pair}
        # the ids too: the decoded text, encoded again, may split into other tokens
        row |= {"generated": decode(codec, ids), "generated_ids": ids}
        rows.append({**row, "finish": finish})
    return rows


if __name__ == "__main__":
    main()
