"""The paper's benchmarks, by the Language Model Evaluation Harness (lm_eval): evaluate.py --tasks.
lm_eval is imported here and nowhere else, only when it is asked for, and only by its public names;
prompts, few-shot examples, scoring and standard errors are its own. Data sets come from the hub.
Without one, start evaluate.py in a folder that holds a copy of each in a folder of its hub id, such
as ./allenai/ai2_arc: the package datasets looks there first."""

import logging
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from spin import distributed
from spin.codec import load_codec
from spin.files import REPOSITORY, fail
from spin.models import load_frozen
from spin.paper_tables import DIFFERS, TABLES, beside_the_paper, text_table

INSTALL = "pip install 'lm_eval[hf]==0.4.13'"


def run_benchmarks(policy: str, recipe, asked: list[str], limit) -> dict | None:
    """Print lm_eval's figures of the model beside the paper's; rank 0 returns them."""
    codec = load_codec(policy, recipe)
    manager, benchmarks = load_benchmarks(asked, count_positions(policy, recipe))
    with distributed.process_group() as world:
        model = load_frozen(policy, recipe, world)
        lm = as_lm(model, codec.tokenizer, recipe.slots, world)
        found = figures_of_tasks(lm, manager, benchmarks, limit)
        if world.rank > 0:
            return
    for name in TABLES:
        if table := beside_the_paper(name, {policy: found}):
            print(*text_table(*table), DIFFERS, sep="\n")
    if limit:
        print(f"--limit {limit}: a quick look, not the benchmark")
    return {"model": policy, "limit": limit, "tasks": found}


def import_lm_eval():
    """The package lm_eval, quiet; ends with one line where it is missing."""
    # some tasks import Hugging Face's package evaluate, not evaluate.py: the top level comes last
    others = [p for p in sys.path if Path(p or ".").resolve() != REPOSITORY]
    sys.path[:] = [*others, str(REPOSITORY)]
    try:
        import datasets
        import lm_eval.models.huggingface  # needs accelerate too
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as problem:
        fail(f"--tasks needs the Language Model Evaluation Harness ({problem}): {INSTALL}")
    for name in ("lm_eval", "huggingface_hub"):  # which would tell of each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return lm_eval


def load_benchmarks(asked: list[str], positions: int | None):
    """lm_eval's TaskManager, and [(name, few-shot examples or None for the task's own number,
    lm_eval's tasks with their data sets read)] of the benchmarks asked for: paper, extra, or names
    of lm_eval's tasks, groups and tags. positions: the model's; a task that generates more is
    refused, and so is one that lm_eval does not know or that has no data set here."""
    manager = import_lm_eval().tasks.TaskManager()
    wanted = []
    for name in asked:
        if name in TABLES:
            wanted += [(task, shots) for _, task, shots, _ in TABLES[name]["tasks"]]
        elif name in manager.all_tasks:
            wanted.append((name, None))
        else:
            known = "paper, extra, or one of `lm_eval ls tasks`"
            fail(f"--tasks {name}: the harness knows no task of this name ({known})")
    wanted = dict.fromkeys(wanted)
    return manager, [(*one, tasks_of(manager, one[0], positions)) for one in wanted]


def tasks_of(manager, name: str, positions: int | None) -> list:
    """lm_eval's Task, or the tasks of a tag, or the one Group, with their data sets read."""
    try:
        found = manager.load([name])
    except Exception as problem:  # of the hub's client, of datasets, of the task's code: no data
        why = f"{type(problem).__name__}: {str(problem)[:200]}"
        mend = "start this in a folder that holds a copy of it in a folder of its hub id"
        mend += " (hf download ID --repo-type dataset --local-dir ID)"
        fail(f"the task {name} needs a data set that cannot be read ({why}); without a hub, {mend}")
    for task in found["tasks"].values():
        if positions and task.OUTPUT_TYPE == "generate_until":
            longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)  # HFLM's
            if longest >= positions:
                room = f"and the model has {positions} positions: leave it out"
                fail(f"the task {name} generates up to {longest} tokens, {room}")
    group = found["groups"].get(name)
    return [group] if group else list(found["tasks"].values())


def count_positions(policy, recipe) -> int | None:
    """How many tokens the model can see, by its config."""
    revision = recipe.revision_of(policy)
    config = AutoConfig.from_pretrained(policy, revision=revision, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def as_lm(model, tokenizer, batch: int, world):
    """The model as lm_eval takes it; each rank answers its share of the questions.
    lm_eval asks for these four to be overridden where ranks are not met through Accelerate, which
    knows the GPUs of one node only (lm_eval.api.model.LM, "communication primitives")."""

    class RankedLM(import_lm_eval().models.huggingface.HFLM):
        rank = world.rank
        world_size = world.size

        def all_gather(self, number):  # () of each rank -> (ranks,)
            mine = torch.arange(world.size, device=world.device) == world.rank
            return distributed.sum_over_ranks(number * mine)

        def barrier(self):
            distributed.barrier()

    return RankedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def figures_of_tasks(lm, manager, benchmarks: list[tuple], limit: int | None) -> dict:
    """{task: {"shots", "n", "figures": {metric: [value, standard error]}}}; empty but on rank 0."""
    lm_eval = import_lm_eval()
    found = {}
    how = {"limit": limit, "log_samples": False, "task_manager": manager}
    for benchmark, shots, tasks in benchmarks:
        result = lm_eval.simple_evaluate(lm, tasks=tasks, num_fewshot=shots, **how)
        if result is None:  # rank 0 alone has the figures
            continue
        for name, figures in result["results"].items():
            # of a group its mean, if it has one, else its tasks
            if name == benchmark or benchmark not in result["results"]:
                values = values_and_errors(figures)
                found[name] = {"shots": shots, "n": figures.get("sample_len"), "figures": values}
        print(lm_eval.utils.make_table(result), flush=True)
    return found


def values_and_errors(figures: dict) -> dict[str, list]:
    """lm_eval's {"acc,none": …, "acc_stderr,none": …} -> {"acc,none": [value, standard error]}."""
    pairs = {}
    for key, value in figures.items():
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = figures.get(f"{metric}_stderr,{how}")
            known = isinstance(error, (int, float)) and error == error  # neither "N/A" nor NaN
            pairs[key] = [float(value), float(error) if known else None]
    return pairs
