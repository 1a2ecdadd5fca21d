"""What a stage refuses before it starts: a damaged, foreign or missing file of the run; and after a
step: what is not finite. A stage calls before_…() first. What it refuses ends in one line that says
how to mend it, exit code 2, and nothing is written. docs/troubleshooting.md lists the messages.

run_iterations.sh asks, before the first stage:
    python -m spin.checks --recipe demo      prints run directory, iterations, baseline"""

import hashlib
import json
import os
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spin.checksums import CHECKS_FILES, check_list, check_run_files
from spin.codec import load_codec
from spin.data import sampled_rows
from spin.files import AGAIN, fail, io_errors_in_one_line, locate, read_json, weight_files
from spin.flags import parse
from spin.recipe import Recipe, fixed_knobs
from spin.run import answers_of, iteration_folder, model_files, newest_checkpoint, starting_model

RESTORE = "restore it, or choose another --run"
UNLIST = "delete the list, if you changed it yourself"


def before_generating(recipe: Recipe, run: Path, t: int):
    """The run is whole and this recipe's; its answers of iteration t, or else θ_t, are there."""
    run_directory(recipe, run)
    if not (iteration_folder(run, t) / "generated.jsonl").exists():
        theta(recipe, run, t)


def before_training(recipe: Recipe, run: Path, t: int, foreign_pairs: list[str]):
    """The run is whole and this recipe's; θ_t and its answers are there, and belong together.
    foreign_pairs: hashes of what --pairs names, in the answers' place."""
    run_directory(recipe, run)
    folder = iteration_folder(run, t, recipe.objective)
    if (folder / "model").is_dir():
        return same_pairs(folder, foreign_pairs)
    start = theta(recipe, run, t, recipe.objective)
    newest = newest_checkpoint(folder)
    for listed in newest.glob("*.sha256") if newest else ():
        check_list(newest, listed, f"delete {newest.parent} to start this iteration anew")
    codec = load_codec(start, recipe)
    for s, path in () if foreign_pairs else answers_of(recipe, run, t):
        same_prompts(run / "prompts.json", sampled_rows(path, s, codec), path)


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

    loss_is_bad = not torch.cat([losses for _, _, losses, _ in passes]).isfinite().all()
    flags = [loss_is_bad, not grad_norm.isfinite(), has_nonfinite(model.parameters())]
    flags = flags_of_all_ranks(flags, world)
    if not flags.any():
        return
    named = zip(("the loss", "the gradient", "a weight"), flags, strict=True)
    what, where = next((what, where) for what, where in named if where.any())
    ranks = ", ".join(map(str, where.nonzero().flatten().tolist()))
    # the pairs whose own loss is not finite, on any rank; else all of the step
    seen, guilty = torch.zeros(2, len(pairs))
    for rows, weight, losses, _ in passes:
        mine = [row["index"] for row in rows]
        seen[mine] += weight
        guilty[mine] += weight * (~losses.isfinite()).float().cpu()
    chosen = guilty if sum_over_ranks(guilty).any() else sum_over_ranks(seen)  # sums in place
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
    if unknown := ", ".join(sorted(set(saved) ^ set(vars(recipe)))):
        fail(f"{path} was written by another version (knobs {unknown}); choose another --run")
    asked = {name: value for name, value in fixed_knobs(recipe).items() if saved[name] != value}
    other = [f"{name}: {saved[name]!r} there, {value!r} asked" for name, value in asked.items()]
    if other:
        mend = "give the same flags, or another --run"
        fail(f"{run} holds a run of another recipe ({'; '.join(other)}); {mend}")


def theta(recipe: Recipe, run: Path, t: int, objective: str = "spin") -> str:
    """Where θ_t lies; refuses one that is missing, damaged, or not the run's own θ_0."""
    name = starting_model(recipe, run, t, objective)
    maker = f"train.py --iter {t - 1}" + " --objective sft" * (objective == "sft")
    if t > 0 and not Path(name).is_dir():
        fail(f"theta_{t} is missing: {name} is made by {maker}, which has not finished")
    otherwise = f"delete {name} and run {maker} again" if t else "choose another --run"
    return model_folder(name, Path(f"{name}.sha256") if t else run / "theta_0.sha256", otherwise)


def model_folder(name: str, listed: Path | None = None, otherwise="", weights=True) -> str:
    """A model's folder or hub id; refuses a folder that holds no transformers model, weights cut
    off by a copy, or files that are not as listed."""
    name = locate(name)
    folder = Path(name)
    beside = Path(f"{folder.resolve()}.sha256")
    if not (listed and listed.exists()) and beside.with_name("pairs.json").exists():
        listed, otherwise = beside, UNLIST  # both are train.py's; without pairs.json it is a user's
    if weights and listed and listed.exists():
        check_list(folder, listed, otherwise, model_files(folder))
    if folder.exists() and not (folder / "config.json").is_file():
        fail(f"{name} holds no config.json: --model wants a transformers folder or a hub id")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        wanted = f"a transformers folder or a hub id such as {Recipe.model}"
        fail(f"no model at {name}: --model wants {wanted}")
    for path in weight_files(folder) if weights else ():
        try:
            safe_open(path, "np")  # imports numpy, which run_iterations.sh need not wait for
        except (SafetensorError, OSError) as problem:
            fail(f"{path} is damaged ({problem}): {AGAIN}")
    return name


def same_pairs(folder: Path, foreign_pairs: list[str]):
    """Refuse a finished iteration that was trained on other pairs."""
    path = folder / "pairs.json"
    if read_json(path, RESTORE).get("pairs") != foreign_pairs:
        mend = "give the same --pairs (none if it was none), restore it, or choose another --run"
        fail(f"{path} does not say that {folder / 'model'} was made from these pairs: {mend}")


def same_result(out: Path, made_from: dict, record: Path | None = None):
    """Refuse a result that is there already, and was made from something else, or by nobody knows
    what. record: the file that says what it was made from, if it is not the result itself."""
    found = read_json(record or out, "delete it").get("made_from")
    known = found if isinstance(found, dict) else {}
    other = [name for name in made_from if known.get(name, ()) != made_from[name]]
    if other and CHECKS_FILES:
        mend = "delete it, or give another --out"
        fail(f"{out} is there already, made with another {', '.join(other)}: {mend}")


def same_prompts(path: Path, pairs, source) -> str:
    """The text of RUN/prompts.json: number and hash of the prompts and human answers in source.
    Refuses pairs of others than the file there holds."""
    facts = [[pair.get(name) for name in ("id", "system", "prompt", "real")] for pair in pairs]
    text = "".join(sorted(map(json.dumps, facts)))  # sorted, so that their order does not matter
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    mine = json.dumps({"prompts": len(facts), "sha256": sha256}) + "\n"
    if path.exists() and path.read_bytes() != mine.encode():
        other = f"the {len(facts)} pairs in {source} are not those of {path}"
        fail(f"{other}: it has changed since the run began; {RESTORE}")
    return mine


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__)
    run_directory(recipe, args.run)
    model_folder(recipe.model, weights=False)
    for model in args.run.glob("**/iter*/model"):
        if model.parent.name[4:].isdigit():  # not a user's copy
            same_pairs(model.parent, [])  # the loop's own have no --pairs
    print(args.run, recipe.iterations, int(recipe.sft_baseline), sep="\t")


if __name__ == "__main__":
    main()
