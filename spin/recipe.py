"""Every knob of SPIN in one place: a dataclass (one default, one help line each), and the table of recipes.

The default values are the paper's (Section 6.1 and Appendix B.1 of arXiv 2401.01335v3); RECIPES lists what `small`
and `demo` do otherwise. Flags are generated from the dataclass. A run directory keeps its recipe in recipe.json and
refuses any other. This file also answers run_iterations.sh:
    python recipe.py --recipe demo         checks the flags; prints run directory, iterations, baseline
"""

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from spin.files import (
    RESTORE,
    check_files,
    check_json,
    check_weights,
    fail,
    identity,
    one_line,
    write_whole,
)

HERE = Path(__file__).resolve().parent.parent


def knob(default, help, check=None, choices=None, tied=True):
    """One knob: its default, its help line, the rule its value must meet. tied=False: it may change within a run."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, check=check, choices=choices, tied=tied)
    )


# what a value must satisfy, in the words of the error message
POSITIVE, FRACTION = "must be positive", "must be between 0 and 1"
NOT_NEGATIVE, SHARE, BELOW_1 = (
    "must be zero or positive",
    "must be above 0 and at most 1",
    "must be at least 0 and below 1",
)
WARM = "must be 0 (greedy) or at least 0.001"  # divided by less, logits would overflow
HOLDS = {
    POSITIVE: lambda v: v > 0,
    NOT_NEGATIVE: lambda v: v >= 0,
    WARM: lambda v: v == 0 or v >= 1e-3,
    FRACTION: lambda v: 0 <= v <= 1,
    SHARE: lambda v: 0 < v <= 1,
    BELOW_1: lambda v: 0 <= v < 1,
}


@dataclass(frozen=True)
class Recipe:
    """All knobs, as resolved. A tuple holds one value per iteration; its last value serves all later ones."""

    # what plays: Section 6.1; the revision is the one the authors' repository names
    model: str = knob(
        "alignment-handbook/zephyr-7b-sft-full", "theta_0, the SFT model: hub id or folder"
    )
    revision: str = knob(
        "ac6e600eefcce74f5e8bae1035d4f66019e93190", "hub revision of --model ('' for the newest)"
    )
    data: str = knob(
        "HuggingFaceH4/ultrachat_200k", "the SFT set: hub id, or a .jsonl, .json or .parquet file"
    )
    split: str = knob("train_sft", "split of --data, if it is a hub id")
    num_prompts: int = knob(
        50_000, "prompts taken from --data; a smaller number is a subset of a larger", POSITIVE
    )
    eval_data: str = knob("HuggingFaceH4/ultrachat_200k", "held-out SFT set: hub id or file")
    eval_split: str = knob("test_sft", "split of --eval-data, if it is a hub id")
    eval_prompts: int = knob(500, "held-out prompts; our choice", POSITIVE)
    template: str = knob(
        "paper", "'paper' (Appendix B.1), 'chat' (the tokenizer's own) or a string with {prompt}"
    )
    iterations: int = knob(4, "iterations T of Algorithm 1", POSITIVE, None, False)
    seed: int = knob(0, "seed of the subset, the sampling and the order of the pairs", NOT_NEGATIVE)
    sft_baseline: bool = knob(
        False, "also run continued SFT for the same steps (the paper's Table 5)", tied=False
    )

    # stage 1: y' ~ p_θt, the plain distribution of Algorithm 1
    temperature: float = knob(1.0, "sampling temperature of y'; 0 is greedy", WARM)
    top_p: float = knob(1.0, "nucleus of y'; 1 leaves the distribution untruncated", SHARE)
    max_new_tokens: int = knob(256, "longest y' in tokens; 256 in the authors' code", POSITIVE)
    engine: str = knob(
        "auto",
        "sampler: generate (ours, the same rows anywhere), paged (transformers' generate_batch); "
        "auto: generate",
        None,
        ("auto", "generate", "paged"),
    )
    chunk: int = knob(512, "prompts that a rank takes, answers and writes at a time", POSITIVE)

    # stage 2: Appendix B.1; two epochs of Section 6.1; the first of mix's columns is iteration 0
    objective: str = knob(
        "spin",
        "what to minimise: SPIN (4.7), or SFT (3.1) into RUN/sft",
        None,
        ("spin", "sft"),
        False,
    )
    lam: tuple[float, ...] = knob(
        (0.1, 0.1, 0.1, 5.0), "lambda of (4.7), the experiments' beta, by iteration", POSITIVE
    )
    ell: str = knob(
        "logistic",
        "the loss l of Assumption 5.1",
        None,
        ("logistic", "hinge", "correlation", "exponential"),
    )
    lr: tuple[float, ...] = knob(
        (5e-7, 5e-7, 1e-7, 1e-7), "peak learning rate, by iteration", POSITIVE
    )
    mix: tuple[int, ...] = knob(
        (1, 2), "how many of the latest iterations' pairs are trained on, by iteration", POSITIVE
    )
    epochs: int = knob(2, "passes over the pairs in an iteration", POSITIVE)
    batch_size: int = knob(64, "pairs in an optimizer step, over all ranks", POSITIVE)
    warmup: float = knob(0.1, "share of the steps that warm up linearly", FRACTION)
    alpha: float = knob(
        0.99, "RMSProp's smoothing constant; torch's default, as in the authors' code", BELOW_1
    )
    clip: float = knob(1.0, "largest gradient norm; 1.0 in the authors' code base", POSITIVE)
    max_length: int = knob(2048, "longest prompt and response together, in tokens", POSITIVE)

    # the machine's knobs: they change speed and memory, and no more of the result than rounding
    slots: int = knob(
        64,
        "answers in progress at once on a rank; 64 in Appendix B.1, there over all GPUs",
        POSITIVE,
        None,
        False,
    )
    micro_tokens: int = knob(
        8192,
        "tokens per rank in one forward and backward pass; a longer pair goes alone",
        POSITIVE,
        None,
        False,
    )
    dtype: str = knob(
        "auto",
        "compute dtype; auto: bf16 on CUDA, else fp32",
        None,
        ("auto", "bf16", "fp32"),
        False,
    )
    attention: str = knob(
        "auto",
        "auto: FlashAttention-2 on CUDA, flash-attn's where installed, else torch's; elsewhere SDPA",
        None,
        ("auto", "sdpa", "eager", "flash_attention_2"),
        False,
    )
    recompute: bool = knob(
        True, "activation checkpointing: less memory for a third more compute", tied=False
    )
    offload: bool = knob(
        False,
        "keep weights, gradients and optimizer in host memory (small cards; slow)",
        tied=False,
    )
    replicas: int = knob(
        1,
        "whole copies of the sharded model, such as one a node (hybrid sharding)",
        POSITIVE,
        None,
        False,
    )
    checkpoint_every: int = knob(
        200, "optimizer steps between resume checkpoints", POSITIVE, None, False
    )


# What differs from the defaults above. Sources: `paper` is the defaults. `small`'s learning rate and chat template
# are our choice for a small instruct model, not run. `demo`'s were chosen by benchmarks/demo_seeds.py (RESULTS.md).
RECIPES = {
    "paper": {},
    "small": dict(
        model="HuggingFaceTB/SmolLM2-360M-Instruct",
        revision="",
        template="chat",
        num_prompts=5_000,
        max_length=1024,
        lr=(1e-6, 1e-6, 2e-7, 2e-7),
        micro_tokens=2048,
    ),
    "demo": dict(
        model="demo/theta0",
        revision="",
        data="demo/train.jsonl",
        eval_data="demo/heldout.jsonl",
        num_prompts=2048,
        eval_prompts=512,
        max_new_tokens=24,
        max_length=64,
        chunk=256,
        slots=256,
        sft_baseline=True,
        lam=(5.0,),
        lr=(3e-5, 3e-5, 6e-6, 6e-6),
        recompute=False,
        checkpoint_every=16,
    ),
}


def locate(name: str) -> str:
    """A path as the user means it: from the working directory, else from this repository (`demo/…`), else a hub id."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists every flag)")


def parse(argv=None, description="", *stage_flags) -> tuple[Recipe, argparse.Namespace]:
    """The recipe that the command line asks for, and the stage's own flags (run, iter, and those of stage_flags).

    stage_flags: (name, argparse keywords) each. Knobs: dataclass defaults < RECIPES[--recipe] < flags.
    Ends with exit code 2 and one line where a value breaks its rule.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="paper",
        help="which table of knobs to start from (default: paper)",
    )
    parser.add_argument(
        "--run",
        "--run-dir",
        type=Path,
        metavar="DIR",
        dest="run",
        help="run directory (default: runs/RECIPE); under torchrun, whose own --run-path makes --run "
        "ambiguous, write --run-dir, or -- before the script",
    )
    for name, keywords in stage_flags:
        parser.add_argument(name, **keywords)
    for f in dataclasses.fields(Recipe):
        first = f.default[0] if isinstance(f.default, tuple) else f.default
        kind = (
            dict(action=argparse.BooleanOptionalAction)
            if isinstance(first, bool)
            else dict(
                type=type(first),
                choices=f.metadata["choices"],
                nargs="+" if isinstance(f.default, tuple) else None,
            )
        )
        parser.add_argument(
            flag(f.name),
            default=argparse.SUPPRESS,
            **kind,
            help=f"{f.metadata['help']} (default: {words(f.default) or 'none'})",
        )
    args = parser.parse_args(argv)
    asked = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)
    }
    asked = {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()
    }
    if "model" in asked:
        asked.setdefault("revision", "")  # the recipe's revision belongs to the recipe's model
    recipe = dataclasses.replace(Recipe(), **{**RECIPES[args.recipe], **asked})
    args.run = args.run or Path("runs") / args.recipe
    _check_values(recipe)
    if (getattr(args, "iter", None) or 0) < 0:
        fail(f"--iter must be zero or positive, got {args.iter}")
    return recipe, args


def _check_values(recipe: Recipe):
    for f in dataclasses.fields(recipe):
        value, rule = getattr(recipe, f.name), f.metadata["check"]
        if isinstance(value, str) and value.encode(errors="replace") != value.encode(
            errors="surrogatepass"
        ):
            fail(f"{flag(f.name)} is not valid UTF-8, got {value!r}")
        if value == "" and f.name != "revision":
            fail(f"{flag(f.name)} must not be empty")
        for v in value if isinstance(value, tuple) else (value,):
            if rule and not (math.isfinite(v) and HOLDS[rule](v)):
                fail(f"{flag(f.name)} {rule}, got {v}")
    if recipe.template not in ("paper", "chat") and "{prompt}" not in recipe.template:
        fail(
            f"--template must be 'paper', 'chat' or a string that holds {{prompt}}, got {recipe.template!r}"
        )
    if recipe.max_new_tokens >= recipe.max_length:
        fail(
            f"--max-new-tokens {recipe.max_new_tokens} leaves no room for a prompt in --max-length {recipe.max_length}"
        )


def at(values: tuple, iteration: int):
    """The value of a per-iteration knob in iteration t; the last one serves all later iterations."""
    return values[min(iteration, len(values) - 1)]


def iter_dir(run: Path, iteration: int, objective: str = "spin") -> Path:
    """RUN/iter{t}, or RUN/sft/iter{t} for the continued-SFT baseline."""
    return (run / "sft" if objective == "sft" else run) / f"iter{iteration}"


def theta(recipe: Recipe, run: Path, t: int, objective: str = "spin") -> str:
    """Where θ_t lies: the SFT model for t = 0, else what iteration t − 1 left. Ends with one line if it is not there."""
    if t == 0:
        name = check_model(recipe.model)
        mark = identity(name, recipe.revision)
        if check_json(run / "recipe.json", RESTORE).get("theta_0", mark) != mark:
            fail(
                f"the weights in {name} are not those that {run} began with: restore them, or choose another --run"
            )
        return name
    folder = iter_dir(run, t - 1, objective) / "model"
    if not folder.is_dir():
        fail(
            f"theta_{t} is missing: {folder} is made by train.py --iter {t - 1}"
            f"{' --objective sft' if objective == 'sft' else ''}, which has not finished"
        )
    return check_model(str(folder))


def check_model(name: str) -> str:
    """The model's folder or hub id; ends with one line if a folder is meant and it holds no whole transformers model."""
    name = locate(name)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        fail(f"{name} holds no config.json: --model wants a transformers folder or a hub id")
    if not Path(name).exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        fail(
            f"no model at {name}: --model wants a transformers folder or a hub id such as {Recipe.model}"
        )
    check_weights(Path(name))
    return name


def tied(recipe: Recipe) -> dict:
    """The knobs that may not change within a run, as JSON gives them back."""
    return json.loads(
        json.dumps(
            {
                f.name: getattr(recipe, f.name)
                for f in dataclasses.fields(recipe)
                if f.metadata["tied"]
            }
        )
    )


def check_run(recipe: Recipe, run: Path):
    """Refuse a run directory made with another recipe, or damaged; write nothing."""
    path = run / "recipe.json"
    there = next(folder for folder in (run, *run.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(
            f"--run {run}: {there} is {'read-only' if there.is_dir() else 'a file'}; a directory that can be written to is wanted"
        )
    check_files(run)
    if not path.exists():
        return
    saved = check_json(path, RESTORE)
    if missing := (set(saved) ^ set(vars(recipe))) - {"theta_0"}:
        fail(
            f"{path} was written by another version (knobs {', '.join(sorted(missing))}); choose another --run"
        )
    if other := [
        f"{k}: {saved[k]!r} there, {v!r} asked" for k, v in tied(recipe).items() if saved[k] != v
    ]:
        fail(
            f"{run} holds a run of another recipe ({'; '.join(other)}); give the same flags, or another --run"
        )


def save_run(recipe: Recipe, run: Path):
    """Print and write recipe.json, once: every knob as resolved by the run's first stage, and a mark of θ_0's weights."""
    path = run / "recipe.json"
    if not path.exists():
        for f in dataclasses.fields(recipe):
            print(f"{f.name:18}{words(getattr(recipe, f.name))}")
        run.mkdir(parents=True, exist_ok=True)
        mark = identity(locate(recipe.model), recipe.revision)
        write_whole(path, json.dumps({**vars(recipe), "theta_0": mark}, indent=1) + "\n")


@one_line
def main(argv=None):
    recipe, args = parse(argv, __doc__.split("\n")[0])
    check_run(recipe, args.run)
    check_model(recipe.model)
    print(args.run, recipe.iterations, int(recipe.sft_baseline), sep="\t")


if __name__ == "__main__":
    main()
