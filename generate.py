"""Stage 1 of an iteration: the opponent answers every prompt, y'_i ~ p_θt(·|x_i).

This is the inner loop of Algorithm 1.

    python generate.py --iter 0 --recipe demo
    torchrun --nproc_per_node 8 generate.py --iter 0

Reads the SFT set and θ_t (--model for t = 0, else RUN/iter{t-1}/model); writes
RUN/iter{t}/generated.jsonl. Temperature 1 and no truncation unless told otherwise: the objective's
expectation is over p_θt itself.

Prompts are sorted by length and cut into fixed chunks, whatever the number of ranks. An idle rank
takes the next chunk and writes it whole (generated.part/); a rerun samples only what is missing. On
the CPU, with the same number of threads and slots, the file has the same bytes for any number of
ranks and restarts; spin/sampling/engines.py says what may differ elsewhere.
"""

import shutil
import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH would leave it out

import numpy as np
from tqdm import tqdm

from spin import checks
from spin.data.rows import read_rows
from spin.data.selection import counts_line, select
from spin.data.text import decode, load_codec
from spin.files import fail, io_errors_in_one_line, read_jsonl, write_json, write_jsonl
from spin.model.probe import probe, refuse_what_cannot_be_trained
from spin.model.sampling_probe import probe_sampling
from spin.model.weights import load_frozen, parts_not_kept
from spin.recipe import ITER, parse
from spin.report import trouble
from spin.run.folders import (
    fingerprint,
    iteration_folder,
    record,
    save_recipe,
    starting_model,
)
from spin.run.ranks import barrier, next_chunk, process_group
from spin.sampling.engines import sample, uniforms


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, ITER)
    run, t = args.run, args.iter
    with process_group(run) as world:
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
        prompts = checks.same_prompts(run / "prompts.json", pairs, recipe.data)
        made_from = {"theta": fingerprint(theta_t, recipe.revision), "rows": len(pairs)}
        checks.same_chunks(parts_folder, made_from)
        # fixed chunks, the longest prompts first: a memory failure comes at once
        pairs.sort(key=lambda pair: (-len(pair["prompt_ids"]), pair["id"]))
        chunks = [pairs[i : i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
        parts = [parts_folder / f"{k:06}.jsonl" for k in range(len(chunks))]

        model = load_frozen(theta_t, recipe, world)
        # train.py will need this model's log-probabilities: check now that they are right
        probe(model, recipe, world)
        probe_sampling(model, recipe, world)
        barrier()  # nobody writes before everybody has seen what is missing and has its model
        if world.rank == 0:
            trouble.warn(parts_not_kept(model, theta_t, recipe))
            print(f"theta_{t} ({theta_t}) answers {len(pairs)} prompts ({counts_line(left_out)})")
            save_recipe(recipe, run)
            write_json(run / "prompts.json", prompts)
            parts_folder.mkdir(parents=True, exist_ok=True)
            record(parts_folder, **made_from)
        barrier()  # answers come after what they are made from

        # an idle rank takes the next chunk
        bar = tqdm(total=len(chunks), desc=f"generate {t}", unit="chunk", disable=world.rank > 0)
        for k in next_chunk(len(chunks)):
            if not parts[k].exists():  # else a run that was killed has answered it
                write_jsonl(parts[k], answer(model, codec, chunks[k], recipe, t))
            bar.n = k + 1  # chunks 0 … k are all taken, by this rank or another
            bar.refresh()
        bar.close()
        barrier()
        if world.rank == 0:
            rows = [row for part in parts for row in read_jsonl(part)]
            if len(rows) != len(pairs):
                fail(f"{parts_folder} has {len(rows)} of {len(pairs)} answers: delete it")
            write_json(out.with_name("made_from.json"), {**made_from, "left_out": left_out}, 1)
            write_jsonl(out, sorted(rows, key=lambda row: row["id"]))
            shutil.rmtree(parts_folder)
            print(f"{out}: {len(rows)} answers")
            trouble.warn(trouble.ended_alike(rows))


def answer(model, codec, chunk: list[dict], recipe, t: int) -> list[dict]:
    """The rows of generated.jsonl for one chunk of prompts: y' ~ p_θt(·|x) for each."""
    # each prompt has random numbers of its own
    uniform = [uniforms(recipe.seed, t, pair["id"], number=recipe.max_new_tokens) for pair in chunk]
    answers = sample(
        model,
        [pair["prompt_ids"] for pair in chunk],
        codec.end_ids,
        recipe.max_new_tokens,
        np.stack(uniform),
        recipe.temperature,
        recipe.top_p,
        recipe.slots,
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
