"""What a stage refuses before it starts: a file of the run that is damaged, missing, or made from
something else. And after a step: numbers that are not finite. A stage calls before_…() first. A
refusal is one line that says what to do, with exit code 2, and nothing is written.
docs/troubleshooting.md lists the messages.

run_iterations.sh asks, before the first stage:
    python -m spin.checks --recipe demo      prints run directory, iterations, baseline, …"""

import hashlib
import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spin.data.rows import sampled_rows
from spin.data.text import load_renderer
from spin.files import AGAIN, fail, io_errors_in_one_line, locate, read_json, weight_files
from spin.model.weights import has_nonfinite
from spin.recipe import Recipe, fixed_knobs, parse
from spin.run.folders import (
    RESTORE,
    answer_files,
    fingerprint,
    iteration_folder,
    newest_checkpoint,
    read_record,
    starting_model,
)
from spin.run.ranks import flags_of_all_ranks, gather

# what a row of generated.jsonl has from the SFT set
OF_THE_SET = ("id", "system", "prompt", "real")


def before_generating(recipe: Recipe, run: Path, t: int):
    """Check that the run has this recipe, θ_t exists, and answers that exist are of this θ_t."""
    run_directory(recipe, run)
    folder = iteration_folder(run, t)
    theta_t = theta(recipe, run, t)
    if (folder / "generated.jsonl").exists() or (folder / "model").exists():
        same_start(folder, theta_t, recipe)


def before_training(recipe: Recipe, run: Path, t: int, given_pairs: list[str]):
    """The run is this recipe's; θ_t and its answers are there, and belong together.
    given_pairs: hashes of the files of --pairs, which take the answers' place."""
    run_directory(recipe, run)
    folder = iteration_folder(run, t, recipe.objective)
    finished = (folder / "model").is_dir()
    start = starting_model(recipe, run, t, recipe.objective)
    if not finished or Path(start).exists():  # of a finished iteration it may be deleted
        same_start(folder, theta(recipe, run, t, recipe.objective), recipe)
    if finished:
        return same_pairs(folder, given_pairs)
    renderer = load_renderer(start, recipe)
    for s, path in answer_files(recipe, run, t).items() if not given_pairs else ():
        rows = []
        for row in sampled_rows(path, s, renderer):  # not its token ids, which take much memory
            rows.append({name: row.get(name) for name in OF_THE_SET})
        expected = read_record(path.parent).get("rows", len(rows))
        if len(rows) != expected:
            fix = f"delete it and run generate.py --iter {s} again"
            fail(f"{path} has {len(rows)} of {expected} rows, so it was cut off: {fix}")
        same_prompts(run / "prompts.json", rows, path)


def before_evaluating(recipe: Recipe, run: Path, t: int | None):
    """Check that the run has this recipe, and that θ_{t+1} and θ_t exist; if t is None, θ_0."""
    run_directory(recipe, run)
    if t is None:
        theta(recipe, run, 0)
        return
    theta(recipe, run, t + 1, recipe.objective)
    start = theta(recipe, run, t, recipe.objective)
    same_start(iteration_folder(run, t, recipe.objective), start, recipe)


def run_directory(recipe: Recipe, run: Path):
    """Refuse a run directory that holds a run of another recipe, of another θ_0, or of another
    version of this code."""
    path = run / "recipe.json"
    if not path.exists():
        return
    saved = read_json(path, RESTORE)
    if unknown := ", ".join(sorted(set(saved) ^ {*vars(recipe), "theta_0"})):
        fail(f"{path} was written by another version (knobs {unknown}); choose another --run")
    asked = {name: value for name, value in fixed_knobs(recipe).items() if saved[name] != value}
    other = [f"{name}: {saved[name]!r} there, {value!r} asked" for name, value in asked.items()]
    if other:
        fix = "give the same flags, or another --run"
        fail(f"{run} holds a run of another recipe ({'; '.join(other)}); {fix}")
    theta_0 = locate(recipe.model)
    if Path(theta_0).is_dir() and fingerprint(theta_0, recipe.revision) != saved["theta_0"]:
        fail(f"{theta_0} is not the model that {run} began with: {RESTORE}")


def whole_run(recipe: Recipe, run: Path):
    """Refuse a run in which an iteration or its eval.json was made from another model than the one
    that is there now."""
    run_directory(recipe, run)
    for objective in ("spin", "sft"):
        folder = iteration_folder(run, 0, objective)
        t = 0
        while folder.exists():
            start = starting_model(recipe, run, t, objective)
            if Path(start).exists():
                same_start(folder, start, recipe)
            known = read_json(folder / "eval.json", "delete it").get("made_from")
            model = folder / "model"
            if known and model.exists() and known["model"] != fingerprint(str(model), ""):
                fail(f"{folder / 'eval.json'} was made from another {model}: delete it")
            t += 1
            folder = iteration_folder(run, t, objective)


def theta(recipe: Recipe, run: Path, t: int, objective: str = "spin") -> str:
    """Where θ_t lies; refuses one that is missing or damaged."""
    name = starting_model(recipe, run, t, objective)
    if t > 0 and not Path(name).is_dir():
        maker = f"train.py --iter {t - 1} --objective {objective}"
        fail(f"theta_{t} is missing: {name} is made by {maker}, which has not finished")
    return model_folder(name)


def model_folder(name: str) -> str:
    """A model's folder or hub id; refuses a folder that holds no transformers model, and weights
    that were cut off."""
    name = locate(name)
    folder = Path(name)
    if any(folder.glob("adapter_*")):
        fix = "merge it into its model (peft's merge_and_unload), or move the files adapter_* away"
        fail(f"{name} holds an adapter, and --model wants whole weights: {fix}")
    if folder.exists() and not (folder / "config.json").is_file():
        fail(f"{name} holds no config.json: --model wants a transformers folder or a hub id")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        wanted = f"a transformers folder or a hub id such as {Recipe.model}"
        fail(f"no model at {name}: --model wants {wanted}")
    for path in weight_files(folder):
        try:
            safe_open(path, "pt")
        except (SafetensorError, OSError) as problem:
            fail(f"{path} is damaged ({problem}): {AGAIN}")
    return name


def same_start(folder: Path, theta_t: str, recipe: Recipe):
    """Refuse an iteration that was begun from another θ_t than the one that is there now."""
    known = read_record(folder).get("theta")
    if known and known != fingerprint(theta_t, recipe.revision):
        fix = f"restore that model, or delete {folder} to start this iteration again"
        fail(f"{folder} was made from another model than {theta_t}, which has changed: {fix}")


def same_chunks(folder: Path, made_from: dict):
    """Refuse chunks of answers that a killed generate.py left and that another θ_t gave."""
    if (folder / "made_from.json").exists() and read_record(folder) != made_from:
        fail(f"{folder} holds answers of another model or to other prompts: delete it")


def same_pairs(folder: Path, given_pairs: list[str]):
    """Refuse a finished iteration that was trained on other pairs."""
    if read_record(folder).get("given_pairs", []) != given_pairs:
        fix = "give the --pairs that it was trained on, if any, or choose another --run"
        fail(f"{folder / 'model'} was not trained on these pairs: {fix}")


def same_result(out: Path, made_from: dict):
    """Refuse a result that is there already and was made from something else, or does not say from
    what."""
    found = read_json(out, "delete it").get("made_from")
    known = found if isinstance(found, dict) else {}
    other = [name for name in made_from if name not in known or known[name] != made_from[name]]
    if other:
        fix = "delete it, or give another --out"
        fail(f"{out} is there already, made with another {', '.join(other)}: {fix}")


def same_prompts(path: Path, pairs, source) -> dict:
    """The content of `path` (prompts.json, heldout.json): number and hash of the prompts and human
    answers in source. Refuses them if they are not those that the file records."""
    facts = [[pair.get(name) for name in OF_THE_SET] for pair in pairs]
    text = "".join(sorted(map(json.dumps, facts)))  # sorted, so that their order does not matter
    mine = {"prompts": len(facts), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if path.exists() and read_json(path, RESTORE) != mine:
        other = f"the {len(facts)} pairs in {source} are not those of {path}"
        fail(f"{other}: {source} has changed since the run began; {RESTORE}")
    return mine


def finite(step: int, passes, grad_norm, model, iteration, world):
    """End the run where the loss, the gradient or a weight is NaN or infinite, before it is kept.
    passes: as in metrics.of_step."""
    losses_are_bad = has_nonfinite([losses for _, _, losses, _ in passes])
    flags = [losses_are_bad, not grad_norm.isfinite(), has_nonfinite(model.parameters())]
    flags = flags_of_all_ranks(flags, world)  # (3, ranks)
    if not flags.any():
        return
    first = int(flags.any(1).nonzero()[0])
    what = ("the loss", "the gradient", "a weight")[first]
    ranks = ", ".join(map(str, flags[first].nonzero().flatten().tolist()))
    mine = []  # the pairs whose own loss is not finite
    for part, _, losses, _ in passes:
        wrong = (~losses.isfinite()).tolist()
        mine += [(p["iter"], p["id"]) for p, bad in zip(part, wrong, strict=True) if bad]
    pairs = sorted({pair for pairs in gather(mine, world) for pair in pairs})
    named = f"{len(pairs)} pairs (iter, id): {pairs[:5]}; " if pairs else ""
    newest = newest_checkpoint(iteration.folder) or "none yet"
    print(file=sys.stderr)  # the progress bar has left its line open
    fail(
        f"step {step} of iteration {iteration.t}: {what} is NaN or infinite, on rank {ranks}; "
        f"{named}nothing of this step was saved (last good checkpoint: {newest}); look at "
        "these pairs, or start another --run with a lower --lr"
    )


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__)
    model_folder(recipe.model)
    whole_run(recipe, args.run)
    for t in range(recipe.iterations):
        if (iteration_folder(args.run, t) / "model").exists():
            same_pairs(iteration_folder(args.run, t), [])  # run_iterations.sh takes no --pairs
    print(args.run, recipe.iterations, int(recipe.sft_baseline), recipe.tensor_parallel, sep="\t")


if __name__ == "__main__":
    main()
