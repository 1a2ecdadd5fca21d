"""Stage 1 of an iteration: the opponent answers every prompt, y'_i ~ p_θt(·|x_i).

This is the inner loop of Algorithm 1.

    python generate.py --iter 0 --recipe demo
    torchrun --nproc_per_node 8 generate.py --iter 0

Reads the SFT set and θ_t (--model for t = 0, else RUN/iter{t-1}/model; RUN is --run); writes
RUN/iter{t}/generated.jsonl. By default it samples at temperature 1 without truncation, because the
objective's expectation is over p_θt itself.

Prompts, sorted by length, are cut into chunks that do not depend on the number of ranks. An idle
rank takes the next chunk and writes its answers to a file in generated.part/; a rerun samples only
the missing chunks. On the CPU, with equal numbers of threads and --slots, the result has the same
bytes for any number of ranks and restarts; spin/sampling/engines.py says what differs elsewhere.
"""

import shutil
import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # this folder, missing under PYTHONSAFEPATH

import numpy as np
from tqdm import tqdm

from spin import checks
from spin.data.rows import read_rows
from spin.data.selection import counts_line, select
from spin.data.text import decode, load_renderer
from spin.files import fail, io_errors_in_one_line, read_jsonl, write_json, write_jsonl
from spin.model.sampling_check import check_sampling, start_vllm
from spin.model.scoring_check import check_scoring, refuse_what_cannot_be_trained
from spin.model.weights import load_empty, load_frozen, parts_not_kept
from spin.recipe import ITER, parse
from spin.report import diagnose
from spin.run.folders import (
    fingerprint,
    iteration_folder,
    record,
    save_recipe,
    starting_model,
)
from spin.run.ranks import barrier, next_chunk, process_group
from spin.sampling import vllm_engine
from spin.sampling.engines import sample, uniforms


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, ITER)
    run, t = args.run, args.iter
    with process_group(run, recipe.tensor_parallel) as world:
        checks.before_generating(recipe, run, t)
        out = iteration_folder(run, t) / "generated.jsonl"
        parts_folder = out.with_name("generated.part")
        if out.exists():
            shutil.rmtree(parts_folder, ignore_errors=True)  # left if killed after the merge
            return print(f"{out} is there already: nothing to do")
        theta_t = starting_model(recipe, run, t)
        renderer = load_renderer(theta_t, recipe)
        refuse_what_cannot_be_trained(theta_t, recipe)
        rows = read_rows(recipe.data, recipe.split)
        pairs, left_out = select(rows, recipe.data, renderer, recipe, recipe.num_prompts)
        prompts = checks.same_prompts(run / "prompts.json", pairs, recipe.data)
        made_from = {"theta": fingerprint(theta_t, recipe.revision), "rows": len(pairs)}
        checks.same_chunks(parts_folder, made_from)
        # fixed chunks, the longest prompts first: a memory failure comes at once
        pairs.sort(key=lambda pair: (-len(pair["prompt_ids"]), pair["id"]))
        chunks = [pairs[i : i + recipe.chunk] for i in range(0, len(pairs), recipe.chunk)]
        parts = [parts_folder / f"{k:06}.jsonl" for k in range(len(chunks))]

        if recipe.engine == "vllm":
            model = start_vllm(theta_t, [pair["prompt_ids"] for pair in pairs], recipe, world)
        else:
            model = load_frozen(theta_t, recipe, world)
            # train.py will need this model's log-probabilities: check now that they are right
            check_scoring(model, recipe, world)
            check_sampling(model, recipe, world)
        barrier()  # no rank writes before all have seen what is missing and loaded the model
        if world.rank == 0:
            diagnose.warn(parts_not_kept(load_empty(theta_t, recipe), theta_t, recipe))
            print(f"theta_{t} ({theta_t}) answers {len(pairs)} prompts ({counts_line(left_out)})")
            save_recipe(recipe, run)
            write_json(run / "prompts.json", prompts)
            parts_folder.mkdir(parents=True, exist_ok=True)
            record(parts_folder, **made_from)
        barrier()  # made_from.json must be on disk before the first answer

        # an idle rank takes the next chunk
        bar = tqdm(total=len(chunks), desc=f"generate {t}", unit="chunk", disable=world.rank > 0)
        for k in next_chunk(len(chunks)):
            if not parts[k].exists():  # else a run that was killed has answered it
                write_jsonl(parts[k], answer(model, renderer, chunks[k], recipe, t))
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
            diagnose.warn(diagnose.ended_alike(rows))


def answer(model, renderer, chunk: list[dict], recipe, t: int) -> list[dict]:
    """The rows of generated.jsonl for one chunk of prompts: y' ~ p_θt(·|x) for each."""
    prompts = [pair["prompt_ids"] for pair in chunk]
    # each prompt has random numbers of its own
    keys = [(recipe.seed, t, pair["id"]) for pair in chunk]
    ends, longest = renderer.end_ids, recipe.max_new_tokens
    knobs = recipe.temperature, recipe.top_p
    if recipe.engine == "vllm":
        answers = vllm_engine.sample(model, prompts, ends, longest, keys, *knobs)
    else:
        uniform = np.stack([uniforms(*key, number=longest) for key in keys])
        answers = sample(model, prompts, ends, longest, uniform, *knobs, recipe.slots)
    rows = []
    for pair, (ids, finish, *_) in zip(chunk, answers, strict=True):
        row = {"id": pair["id"], "iter": t}
        row |= {name: pair[name] for name in ("system", "prompt", "real") if name in pair}
        # keep the ids too: encoding the decoded text again may give other tokens
        row |= {"generated": decode(renderer, ids), "generated_ids": ids}
        rows.append({**row, "finish": finish})
    return rows


if __name__ == "__main__":
    main()
