"""Every refusal of a damaged, foreign or missing file of a run: one call a stage, one a step.
A stage calls before_…() first; what it refuses ends in one line that says how to mend it, exit code
2, and nothing is written. A finished file that was cut off, lost or swapped since is told by the
number of its lines, by its size (files.json), by the header of safetensors, or by a hash of the
model that made it (recipe.json, generated.json). docs/troubleshooting.md lists the messages.

run_iterations.sh asks, before anything else:
    python -m spin.checks --recipe demo      prints run directory, iterations, baseline"""

import hashlib
import json
import os
import sys
from pathlib import Path

from spin.codec import load_codec
from spin.damage import check_run_files, check_weights, sampled_rows
from spin.files import fail, io_errors_in_one_line, locate, read_json, read_jsonl
from spin.flags import parse
from spin.recipe import Recipe, fixed_knobs
from spin.run import answers_of, hash_of_data, hash_of_model, iteration_folder, starting_model

RESTORE = "restore it, or choose another --run"


def before_generating(recipe: Recipe, run: Path, t: int):
    """The run is whole and this recipe's; its answers of iteration t, or else θ_t, are there."""
    run_directory(recipe, run)
    answers = iteration_folder(run, t) / "generated.jsonl"
    if answers.exists():
        same_prompts(run / "prompts.json", read_jsonl(answers), answers)
    else:
        theta(recipe, run, t)


def before_training(recipe: Recipe, run: Path, t: int, foreign_pairs: list[str]):
    """The run is whole and this recipe's; θ_t and its answers are there, and belong together."""
    run_directory(recipe, run)
    folder = iteration_folder(run, t, recipe.objective)
    if (folder / "model").is_dir():
        return same_pairs(folder, foreign_pairs)
    start = theta(recipe, run, t, recipe.objective)
    if foreign_pairs:
        return
    hash_of_start = hash_of_model(start, recipe.revision)
    sampled = iteration_folder(run, t) / "generated.json"
    made_by = read_json(sampled, RESTORE).get("model", hash_of_start)
    if recipe.objective == "spin" and made_by != hash_of_start:
        mend = f"delete it and {sampled} and run generate.py again"
        fail(f"{sampled}l was sampled from another theta_{t} than {start}: {mend}")
    codec = load_codec(start, recipe)
    for s, path in answers_of(recipe, run, t):
        rows = sampled_rows(path, s, codec)
        same_prompts(run / "prompts.json", rows, path)


def before_evaluating(recipe: Recipe, run: Path, t: int | None):
    """The run is whole and this recipe's; θ_{t+1} and its opponent θ_t are there. None: θ_0."""
    run_directory(recipe, run)
    for number in (0,) if t is None else (t + 1, t):
        theta(recipe, run, number, recipe.objective)


def finite(step: int, passes, grad_norm, model, pairs, iteration, world):
    """End the run where the loss, the gradient or a weight is NaN or infinite, before it is kept.
    passes: as in metrics.of_step."""
    import torch  # here, so that run_iterations.sh has its answer before torch is loaded

    from spin.distributed import flags_of_all_ranks, sum_over_ranks
    from spin.models import has_nonfinite

    loss_is_bad = not all(losses.isfinite().all() for _, _, losses, _ in passes)
    flags = [loss_is_bad, not grad_norm.isfinite(), has_nonfinite(model.parameters())]
    flags = flags_of_all_ranks(flags, world)
    if not flags.any():
        return
    named = zip(("the loss", "the gradient", "a weight"), flags, strict=True)
    what, where = next((what, where) for what, where in named if where.any())
    ranks = ", ".join(map(str, where.nonzero().flatten().tolist()))
    # the pairs whose own loss is not finite, on any rank; else all of the step
    seen = torch.zeros(len(pairs))
    guilty = torch.zeros(len(pairs))
    for rows, weight, losses, _ in passes:
        mine = [row["index"] for row in rows]
        seen[mine] += weight
        guilty[mine] += weight * (~losses.isfinite()).float().cpu()
    chosen = guilty if sum_over_ranks(guilty).any() else sum_over_ranks(seen)
    names = [(pairs[i]["iter"], pairs[i]["id"]) for i in chosen.nonzero().flatten().tolist()]
    some = ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
    kept = f"the last good checkpoint is in {iteration.folder / 'checkpoint'}"
    if not (iteration.folder / "checkpoint").exists():
        kept = "there was no checkpoint yet"
    print(file=sys.stderr)  # the progress bar has left its line open
    fail(
        f"step {step} of iteration {iteration.t}: {what} is NaN or infinite, on rank {ranks}; "
        f"{len(names)} pairs (iter, id): {some}; nothing of this step was saved, {kept}; "
        "look at these pairs, or start another --run with a lower --lr"
    )


def run_directory(recipe: Recipe, run: Path):
    """Refuse a run directory made with another recipe, or damaged."""
    there = next(folder for folder in (run, *run.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        kind = "read-only" if there.is_dir() else "a file"
        fail(f"--run {run}: {there} is {kind}; a directory that can be written to is wanted")
    check_run_files(run)
    path = run / "recipe.json"
    if not path.exists():
        return
    saved = read_json(path, RESTORE)
    unknown = (set(saved) ^ set(vars(recipe))) - {"theta_0"}
    if unknown:
        knobs = ", ".join(sorted(unknown))
        fail(f"{path} was written by another version (knobs {knobs}); choose another --run")
    asked = {name: value for name, value in fixed_knobs(recipe).items() if saved[name] != value}
    other = [f"{name}: {saved[name]!r} there, {value!r} asked" for name, value in asked.items()]
    if other:
        mend = "give the same flags, or another --run"
        fail(f"{run} holds a run of another recipe ({'; '.join(other)}); {mend}")


def theta(recipe: Recipe, run: Path, t: int, objective: str = "spin") -> str:
    """Where θ_t lies; refuses one that is missing, damaged, or not the run's own θ_0."""
    name = starting_model(recipe, run, t, objective)
    if t > 0 and not Path(name).is_dir():
        sft = " --objective sft" if objective == "sft" else ""
        maker = f"train.py --iter {t - 1}{sft}"
        fail(f"theta_{t} is missing: {name} is made by {maker}, which has not finished")
    model_folder(name)
    if t > 0:
        made = read_json(Path(name).with_name("files.json"), RESTORE).get("hash")
    else:
        made = read_json(run / "recipe.json", RESTORE).get("theta_0")
    if made not in (None, hash_of_model(name, recipe.revision)):
        maker = f"that {run} began with" if t == 0 else "that train.py wrote"
        fail(f"weights, tokenizer or chat template in {name} are not those {maker}: {RESTORE}")
    return name


def model_folder(name: str) -> str:
    """A model's folder or hub id; refuses a folder that holds no whole transformers model."""
    name = locate(name)
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        fail(f"{name} holds no config.json: --model wants a transformers folder or a hub id")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        wanted = f"a transformers folder or a hub id such as {Recipe.model}"
        fail(f"no model at {name}: --model wants {wanted}")
    check_weights(folder)
    return name


def same_pairs(folder: Path, foreign_pairs: list[str]):
    """Refuse a finished iteration that was trained on other pairs."""
    made_from = read_json(folder / "files.json", RESTORE).get("pairs", [])
    if made_from != [hash_of_data(source) for source in foreign_pairs]:
        mend = "give the same --pairs, or none if it was none, or another --run"
        fail(f"{folder / 'model'} was made from other pairs: {mend}")


def same_result(out: Path, made_from: dict, record: Path | None = None):
    """Refuse a result that is there already, and was made from something else, or by nobody knows
    what. record: the file that says what it was made from, if it is not the result itself."""
    found = read_json(record or out, "delete it").get("made_from")
    known = found if isinstance(found, dict) else {}
    other = [name for name in made_from if known.get(name, ()) != made_from[name]]
    if other:
        mend = "delete it, or give another --out"
        fail(f"{out} is there already, made with another {', '.join(other)}: {mend}")


def same_prompts(path: Path, pairs, source) -> str:
    """The text of RUN/prompts.json: number and hash of the prompts and human answers in source.
    Refuses pairs of others than the file there holds."""
    hashes = []
    for pair in pairs:
        text = json.dumps([pair.get(name) for name in ("id", "system", "prompt", "real")])
        hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()))
    total = sum(hashes) % 2**256  # a sum, so that the order does not matter
    mine = json.dumps({"prompts": len(hashes), "sha256": f"{total:064x}"}) + "\n"
    if path.exists() and path.read_bytes() != mine.encode():
        other = f"{len(hashes)} pairs in {source} that are not those of {path}"
        fail(f"{other}: it has changed since the run began; {RESTORE}")
    return mine


@io_errors_in_one_line
def main(argv=None):
    recipe, args = parse(argv, __doc__)
    run_directory(recipe, args.run)
    model_folder(recipe.model)
    for model in args.run.glob("**/iter*/model"):  # the loop's own have no --pairs
        same_pairs(model.parent, [])
    print(args.run, recipe.iterations, int(recipe.sft_baseline), sep="\t")


if __name__ == "__main__":
    main()
