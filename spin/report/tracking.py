"""A run's metrics in a live logger, trackio or wandb: --track. A stage sends what the run's files
hold and the logger lacks, then its own steps: after a kill no step is sent twice."""

import contextlib
import importlib
import itertools
import os
from pathlib import Path

from huggingface_hub import constants

from spin.files import fail, read_json, read_jsonl
from spin.run.folders import iteration_folder


@contextlib.contextmanager
def follow(recipe, run: Path, t: int, trains: bool):
    """Send what is there up to the evaluation of θ_t, and with `trains` the steps of iteration t.
    Yields a function that sends one more row of metrics.jsonl. Does nothing without --track, or on
    other ranks than 0. Ends with one line if the logger does not start."""
    if recipe.track == "none" or os.environ.get("RANK", "0") != "0":
        yield lambda row: None
        return
    # the id is the time of recipe.json, which is written once per run and stays if a run is moved
    id = f"{(run / 'recipe.json').stat().st_mtime_ns:x}"
    id += "-sft" if recipe.objective == "sft" else ""
    how = {"project": "spin", "name": f"{run.resolve().name}-{id}", "config": vars(recipe)}
    offline = constants.HF_HUB_OFFLINE
    try:
        logger = importlib.import_module(recipe.track)
        if recipe.track == "wandb":
            sent = range(logger.init(**how, resume="allow", id=id).step)
        else:  # trackio would ask the hub who is logged in; only a Space needs that
            constants.HF_HUB_OFFLINE = offline or "TRACKIO_SPACE_ID" not in os.environ
            logger.init(**how, resume="allow")
            stored = logger.sqlite_storage.SQLiteStorage.get_logs("spin", how["name"])
            sent = {row["step"] for row in stored}
    except Exception as problem:  # of a package, a service, its settings
        fail(f"--track {recipe.track} cannot begin: {type(problem).__name__}: {problem}")
    finally:
        constants.HF_HUB_OFFLINE = offline
    numbers = itertools.count()

    def send(kind: str, s: int, values: dict):
        step = next(numbers)
        names = [k for k, v in values.items() if isinstance(v, (int, float)) and "_stderr" not in k]
        if names and step not in sent:
            logger.log({"iteration": s, **{f"{kind}/{k}": values[k] for k in names}}, step=step)

    try:
        for values in history(run, recipe.objective, t, trains):
            send(*values)
        yield lambda row: send("train", t, row)
    finally:  # also where SIGTERM ends the stage
        logger.finish()


def send_evaluation(recipe, run: Path, t: int):
    """Send what is there, up to the evaluation of θ_t."""
    with follow(recipe, run, t, trains=False):
        pass


def history(run: Path, objective: str, t: int, trains: bool):
    """(kind, iteration, values) of each row to send: θ_0's evaluation and benchmarks, iteration 0's
    optimizer steps, θ_1's evaluation and benchmarks, … A missing JSON file gives an empty row."""
    for s in range(t + 1):
        folder = iteration_folder(run, s - 1, objective) if s else run
        yield "heldout", s, read_json(folder / "eval.json", "delete it")
        tasks = read_json(folder / "benchmarks.json", "delete it").get("tasks", {})
        yield "benchmarks", s, {f"{task}/{k}": v for task in tasks for k, v in tasks[task].items()}
        steps = iteration_folder(run, s, objective) / "metrics.jsonl"
        if steps.exists() and (s < t or trains):
            yield from (("train", s, row) for row in read_jsonl(steps))
