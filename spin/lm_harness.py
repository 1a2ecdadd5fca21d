"""The paper's benchmarks, run by the Language Model Evaluation Harness (lm_eval), beside the paper's own figures.

Used by evaluate.py --tasks and by report.py. lm_eval is imported here and nowhere else, and only when it is asked for;
prompts, few-shot examples, scoring and standard errors are the harness's own. A data set comes from the hub, or from
--tasks-data DIR, which holds copies of hub repositories in folders of their ids, such as DIR/allenai/ai2_arc.
"""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

from spin.files import fail
from spin.recipe import HERE

INSTALL = "pip install 'lm_eval[hf]==0.4.13'"
# our column, the harness's task, few-shot examples, the harness's metric: Appendix B.1 and the old Open LLM Leaderboard
PAPER = (
    ("Arc", "arc_challenge", 25, "acc_norm,none"),
    ("TruthfulQA", "truthfulqa_mc2", 0, "acc,none"),
    ("Winogrande", "winogrande", 5, "acc,none"),
    ("GSM8k", "gsm8k", 5, "exact_match,strict-match"),
    ("HellaSwag", "hellaswag", 10, "acc_norm,none"),
    ("MMLU", "mmlu", 5, "acc,none"),
)
# Table 6; the Big-Bench-Hard tasks bring their three worked examples along
EXTRA = (
    ("BB causal", "bbh_cot_fewshot_causal_judgement", 3, "exact_match,get-answer"),
    ("BB formal", "bbh_cot_fewshot_formal_fallacies", 3, "exact_match,get-answer"),
    ("BB sports", "bbh_cot_fewshot_sports_understanding", 3, "exact_match,get-answer"),
    ("OpenBookQA", "openbookqa", 1, "acc_norm,none"),
)
TABLES = {
    "paper": (
        PAPER,
        {  # Tables 3 to 5 of arXiv 2401.01335v3
            "zephyr-7b-sft-full": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
            "SPIN iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
            "SPIN iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
            "SPIN iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
            "SPIN iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
            "zephyr-7b-dpo-full": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
            "SPIN iteration 3 + DPO": (66.47, 60.07, 78.06, 37.98, 86.17, 59.68),
            "SFT, one more epoch": (57.76, 44.39, 75.77, 25.85, 81.69, 57.89),
        },
    ),
    "extra": (
        EXTRA,
        {
            "zephyr-7b-sft-full": (56.15, 49.6, 96.0, 45.4),
            "SPIN iteration 0": (57.75, 51.6, 95.2, 46.8),
            "SPIN iteration 1": (58.82, 51.2, 95.2, 47.2),
            "SPIN iteration 2": (59.36, 51.2, 94.4, 47.6),
        },
    ),
}
DIFFERS = (
    "The paper's harness was older than lm_eval 0.4.13, and prompts and scoring have changed since. MMLU is weighted by subject "
    "size here. GSM8k is the strict match (the number after ####)."
)


def load_tasks(asked: list[str], data: Path | None, positions: int | None):
    """The harness's TaskManager, and of --tasks [(name, shots or None for the task's own, task objects)], their data sets read.

    asked: paper, extra, or names of the harness's tasks. positions: the model's; a task that generates more is refused.
    Ends with one line that says what is missing: lm_eval, a task of that name, or a data set.
    """
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE] + [
        str(HERE)
    ]  # some tasks import Hugging Face's
    try:  # package evaluate, not evaluate.py
        import lm_eval.models.huggingface  # needs accelerate too
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._index import Entry, Kind
    except ImportError as problem:
        fail(f"--tasks needs the Language Model Evaluation Harness ({problem}): {INSTALL}")
    import datasets

    for name in ("lm_eval", "huggingface_hub"):  # which would tell of each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager, tasks = TaskManager(), []
    wanted = []
    for name in asked:
        if name not in TABLES and name not in manager.all_tasks:
            fail(
                f"--tasks {name}: the harness knows no task of this name (paper, extra, or one of `lm_eval ls tasks`)"
            )
        wanted += (
            [t[1:3] for t in TABLES[name][0]]
            if name in TABLES
            else [
                (n, None)
                for n in (
                    sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]
                )
            ]
        )
    for name, shots in dict.fromkeys(wanted):
        source = hub_id(manager, name)
        if data and not source:
            fail(
                f"--tasks {name}: which data set it reads cannot be told, so --tasks-data cannot serve it"
            )
        if data and not (data / source).is_dir():
            fail(
                f"{data / source} is missing: the task {name} reads the data set {source}, and --tasks-data wants a copy of it there "
                f"(hf download {source} --repo-type dataset --local-dir {data / source})"
            )
        kind = "group" if name in manager.all_groups else "task"
        if data:  # a group of one, by name: lm_eval 0.4.13 refuses plain overrides, and passes a nameless group's to its members
            local = {
                "group": "local",
                "task": [{kind: name, "dataset_path": str((data / source).resolve())}],
            }
            manager.task_index["local"] = Entry("local", Kind.GROUP, None, local)
        try:
            found = manager.load(["local" if data else name])
        except (
            Exception
        ) as problem:  # of the hub's client, of datasets, of the task's code: there is no such data
            fail(
                f"the task {name} needs the data set {source}, which cannot be read ({type(problem).__name__}: {str(problem)[:200]}); "
                f"without a hub, --tasks-data DIR reads the copy in DIR/{source}"
            )
        for task in found["tasks"].values():
            longest = generates(task)
            if positions and longest and longest >= positions:
                fail(
                    f"the task {name} generates up to {longest} tokens, and the model has {positions} positions: leave it out"
                )
        tasks.append(
            (
                name,
                shots,
                [found["groups"][name]] if kind == "group" else list(found["tasks"].values()),
            )
        )
    return manager, tasks


def hub_id(manager, name: str) -> str | None:
    """The data set of a task; of a group the one that its first task reads, such as cais/mmlu for all of MMLU. None: unknown."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    config = (
        load_yaml(entry.yaml_path, resolve_func=False, recursive=True) if entry.yaml_path else {}
    )
    first = sorted(entry.tags)[:1] if name in manager.all_tags else config.get("task")
    return (
        hub_id(manager, first[0])
        if isinstance(first, list) and first[0] in manager.all_tasks
        else config.get("dataset_path")
    )


def generates(task) -> int:
    """The most tokens that a task lets the model write; 0 where it only scores given answers."""
    settings = task.config.generation_kwargs or {}
    return (
        settings.get("max_gen_toks", 256) if task.OUTPUT_TYPE == "generate_until" else 0
    )  # 256: HFLM.max_gen_toks


def positions(policy, recipe) -> int | None:
    """How many tokens the model can see, by its config."""
    from transformers import AutoConfig

    revision = (recipe.revision if policy == recipe.model else "") or None
    return getattr(
        AutoConfig.from_pretrained(
            policy, revision=revision, trust_remote_code=False
        ).get_text_config(),
        "max_position_embeddings",
        None,
    )


def run(
    model, tokenizer, manager, tasks: list[tuple], limit: int | None, batch: int, world, all_sum
) -> dict | None:
    """{task: {"shots", "n", "figures": {metric: [value, standard error]}}} on rank 0, None on the others.

    Each rank takes its share of the questions. The harness does that through Accelerate and for the GPUs of one node only;
    the namespace below is all that it asks of Accelerate, for any ranks.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    lm._rank, lm._world_size = world.rank, world.size
    mine = torch.arange(world.size, device=world.device) == world.rank
    lm.accelerator = SimpleNamespace(
        gather=lambda x: all_sum(x * mine),
        unwrap_model=lambda model: model,
        wait_for_everyone=lambda: all_sum(torch.zeros(1)),
    )
    found = {}
    for name, shots, objects in tasks:
        result = simple_evaluate(
            lm,
            tasks=objects,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
        if result is None:
            continue
        for part, figures in result["results"].items():
            if (
                part == name or name not in result["results"]
            ):  # of a group its mean, if it has one, else its tasks
                keys = [k for k in figures if "," in k and "_stderr," not in k]
                errors = {k: figures.get("{}_stderr,{}".format(*k.split(",", 1))) for k in keys}
                found[part] = {
                    "shots": shots,
                    "n": figures.get("sample_len"),
                    "figures": {
                        k: [
                            float(figures[k]),
                            float(e) if isinstance(e, (int, float)) and e == e else None,
                        ]
                        for k, e in errors.items()
                    },
                }
                print("\n".join(line(part, found[part])), flush=True)
    return found if world.rank == 0 else None


def line(name: str, result: dict):
    for metric, (value, error) in result["figures"].items():
        yield f"{name:34}{metric:28}{value:.4f} ± {'–' if error is None else f'{error:.4f}'}   ({result['n']} questions)"


def beside_the_paper(name: str, results: dict) -> tuple[list, list] | None:
    """(columns, rows) of the paper's table `name` with our models above: ("Arc", 25, "acc_norm"), (model, [(value, error)…]).

    results: {model: what run returned}. In percent; the last column is the mean of all, where all are there. None if none is.
    """
    tasks, paper = TABLES[name]
    rows = []
    for model, found in results.items():
        cells = [
            found[task]["figures"].get(metric) if task in found else None
            for _, task, _, metric in tasks
        ]
        if any(cells):
            rows.append((model, mean_too([c and (100 * c[0], c[1] and 100 * c[1]) for c in cells])))
    columns = [(column, shots, metric.split(",")[0]) for column, _, shots, metric in tasks] + [
        ("average", "", "")
    ]
    return (
        (
            columns,
            rows
            + [
                (f"paper: {m}", mean_too([(v, None) for v in values]))
                for m, values in paper.items()
            ],
        )
        if rows
        else None
    )


def mean_too(cells: list) -> list:
    """The cells and their mean; its standard error is that of independent figures."""
    if not all(cells):
        return [*cells, None]
    errors = [e for _, e in cells]
    n = len(cells)
    return [
        *cells,
        (
            sum(v for v, _ in cells) / n,
            None if None in errors else sum(e * e for e in errors) ** 0.5 / n,
        ),
    ]


def text_table(columns, rows):
    """The same as lines of text."""
    show = lambda cell: (
        "–"
        if cell is None
        else f"{cell[0]:.2f}" + (f" ±{cell[1]:.2f}" if cell[1] is not None else "")
    )  # noqa: E731
    for head, k in (("", 0), ("few-shot examples", 1), ("metric", 2)):
        yield f"{head:32}" + "".join(f"{c[k]!s:>15}" for c in columns)
    for model, cells in rows:
        yield f"{model[-32:]:32}" + "".join(f"{show(c):>15}" for c in cells)
