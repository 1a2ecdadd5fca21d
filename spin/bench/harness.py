"""The paper's benchmarks, by the Language Model Evaluation Harness (lm_eval): evaluate.py --tasks.
Prompts, few-shot examples, scoring and standard errors are its own. Data sets come from the hub.
Without access to the hub, start evaluate.py where each data set has a copy under its hub id, such
as ./allenai/ai2_arc: the package datasets looks there first."""

import logging
import os
import sys
from pathlib import Path

import torch.distributed as dist

from spin.bench.paper_tables import TABLES
from spin.data.text import load_renderer
from spin.files import REPOSITORY, fail
from spin.model.weights import compute_dtype, load_empty, load_frozen
from spin.run.ranks import World, device_of_rank

INSTALL = "pip install 'lm_eval[hf]==0.4.13'"


def run_benchmarks(policy: str, recipe, asked: list[str], limit: int | None) -> dict | None:
    """Print lm_eval's results for the model; rank 0 returns them, for benchmarks.json.
    asked: paper, extra, or names of lm_eval's tasks, groups and tags. Call it outside
    process_group(): lm_eval joins the ranks itself."""
    size = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", size) != size:
        fail("--tasks runs on one node: lm_eval does not share questions between nodes")
    load_renderer(policy, recipe)  # refuses what is no causal language model
    lm_eval = import_lm_eval()
    manager = lm_eval.tasks.TaskManager()
    config = load_empty(policy, recipe).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    shots = {}  # few-shot examples; None: the task's own number
    for name in asked:
        if name in TABLES:
            shots |= {task: number for _, task, number, _ in TABLES[name]["tasks"]}
        else:
            shots.setdefault(name, None)
    tasks = {name: read_tasks(manager, name, positions) for name in shots}
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", 0)))
    # Refuses a model that lacks weights: lm_eval would run it with random ones in their place.
    load_frozen(policy, recipe, World(0, 1, device))
    lm = lm_eval.models.huggingface.HFLM(
        pretrained=policy,
        revision=recipe.revision_of(policy) or "main",
        dtype=compute_dtype(recipe.dtype, device),
        device=str(device),
        batch_size=batch_that_fits(config.vocab_size),
        use_safetensors=True,
    )
    how = {"limit": limit, "log_samples": False, "task_manager": manager}
    found = {}
    for name, number in shots.items():
        result = lm_eval.simple_evaluate(lm, tasks=tasks[name], num_fewshot=number, **how)
        if result:  # rank 0's
            print(lm_eval.utils.make_table(result), flush=True)
            for task, metrics in result["results"].items():
                found[task] = {"shots": number, **metrics}
    if dist.is_initialized():
        dist.destroy_process_group()  # lm_eval's
    return {"model": policy, "limit": limit, "tasks": found} if found else None


def batch_that_fits(vocabulary: int) -> int:
    """Questions in a pass of 2,048 tokens each, whose logits take about 1 GB in bf16; at most 8."""
    return min(8, max(1, 2**29 // (2048 * vocabulary)))


def import_lm_eval():
    """The package lm_eval, quiet; ends with one line where it is missing."""
    # this folder goes last: tasks that import evaluate mean Hugging Face's package, not evaluate.py
    sys.path.sort(key=lambda folder: Path(folder).resolve() == REPOSITORY)
    try:
        import lm_eval.models.huggingface  # needs accelerate too
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as problem:
        fail(f"--tasks needs the Language Model Evaluation Harness ({problem}): {INSTALL}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def read_tasks(manager, name: str, positions: int | None) -> list:
    """lm_eval's task, the tasks of a tag, or the group, with their data sets read. Refuses what it
    does not know, what has no data set here, and what generates more than the model's positions."""
    if name not in manager.all_tasks:
        fail(f"--tasks {name}: the harness knows no task of this name; see `lm_eval ls tasks`")
    try:
        found = manager.load([name])
    except Exception as problem:  # of the hub's client, of datasets, of the task's code: no data
        why = f"the task {name} needs a data set that cannot be read ({str(problem)[:200]})"
        fix = "start this in a folder that holds a copy of the data set under its hub id"
        fail(f"{why}; without a hub, {fix} (hf download ID --repo-type dataset --local-dir ID)")
    for task in found["tasks"].values():
        longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)  # HFLM's default
        if task.OUTPUT_TYPE == "generate_until" and positions and longest >= positions:
            room = f"and the model has {positions} positions: leave it out"
            fail(f"the task {name} generates up to {longest} tokens, {room}")
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())
