"""Every knob (setting) of SPIN, defined once, with one default and one help line; and the recipes.
The defaults are the paper's (Section 6.1 and Appendix B.1 of arXiv 2401.01335v3); RECIPES lists
what `small` and `demo` do differently."""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from loss import ELL
from spin.files import fail

# what a value must satisfy: in the words of the error message, and as a test
POSITIVE = ("must be positive", lambda v: v > 0)
NOT_NEGATIVE = ("must be zero or positive", lambda v: v >= 0)
FRACTION = ("must be between 0 and 1", lambda v: 0 <= v <= 1)
PART = ("must be above 0 and at most 1", lambda v: 0 < v <= 1)
BELOW_1 = ("must be at least 0 and below 1", lambda v: 0 <= v < 1)
# divided by a smaller temperature, logits would overflow
WARM = ("must be 0 (greedy) or at least 0.001", lambda v: v == 0 or v >= 1e-3)
NOT_COLD = ("must be at least 0.001", lambda v: v >= 1e-3)


def knob(default, help, rule=None, choices=None, may_change=False):
    """A knob: its default, its help line, the rule that its value must meet, and whether it may
    change within a run, as the machine's knobs and the number of iterations may."""
    about = {"help": help, "rule": rule, "choices": choices, "may_change": may_change}
    return dataclasses.field(default=default, metadata=about)


changeable = functools.partial(knob, may_change=True)


@dataclass(frozen=True)
class Recipe:
    """All knobs, after recipe and flags. `at` turns lam, lr and mix, which have one value per
    iteration, into those of iteration t; the last value serves later iterations too."""

    # the models and the data: Section 6.1; the revision is the one that the authors' code names
    model: str = knob("alignment-handbook/zephyr-7b-sft-full", "theta_0: hub id or folder")
    revision: str = knob(
        "ac6e600eefcce74f5e8bae1035d4f66019e93190", "hub revision of --model ('': newest)"
    )
    data: str = knob(
        "HuggingFaceH4/ultrachat_200k", "the SFT set: file, folder or hub id (docs/data.md)"
    )
    split: str = knob("train_sft", "split of --data, if it is a hub id")
    num_prompts: int = knob(50_000, "prompts from --data; a smaller number is a subset", POSITIVE)
    eval_data: str = knob("HuggingFaceH4/ultrachat_200k", "held-out SFT set: hub id or file")
    eval_split: str = knob("test_sft", "split of --eval-data, if it is a hub id")
    eval_prompts: int = knob(500, "held-out prompts; our choice", POSITIVE)
    eval_temperature: float = knob(
        0.6, "evaluate.py computes the expected exact match at this temperature and at 1", NOT_COLD
    )
    template: str = knob("paper", "'paper' (Appendix B.1), 'chat', or a string with {prompt}")
    template_kwargs: tuple[str, ...] = knob(
        (), "arguments of the chat template, as name=value: enable_thinking=false"
    )
    date: str = knob("", "YYYY-MM-DD, for a chat template that shows it; none: the run's first day")
    iterations: int = changeable(4, "iterations T of Algorithm 1", POSITIVE)
    seed: int = knob(0, "seed of the subset, the sampling and the order of pairs", NOT_NEGATIVE)
    sft_baseline: bool = changeable(
        False, "also run continued SFT, same steps (the paper's Table 5)"
    )

    # stage 1: y' ~ p_θt, the plain distribution of Algorithm 1
    temperature: float = knob(1.0, "sampling temperature of y'; 0 is greedy", WARM)
    top_p: float = knob(1.0, "nucleus of y'; 1 leaves the distribution untruncated", PART)
    engine: str = knob("own", "what samples y': our loop, or vLLM", choices=("own", "vllm"))
    max_new_tokens: int = knob(256, "longest y' in tokens; 256 in the authors' code", POSITIVE)
    chunk: int = knob(512, "prompts that a rank takes, answers and writes at a time", POSITIVE)

    # stage 2, from Appendix B.1; epochs and mix from Section 6.1: 2 epochs on 50k, then 100k pairs
    objective: str = changeable(
        "spin", "SPIN (4.7), or SFT (3.1) into RUN/sft", choices=("spin", "sft")
    )
    lam: tuple[float, ...] = knob((0.1, 0.1, 0.1, 5.0), "lambda of (4.7), by iteration", POSITIVE)
    ell: str = knob("logistic", "the loss l of Assumption 5.1", choices=tuple(ELL))
    # RPO's term (arXiv 2405.16436), against a known weakness: human answers lose probability
    sft_weight: float = knob(
        0.0, "weight of the SFT loss of y (mean per token), which is added to (4.7)", NOT_NEGATIVE
    )
    lr: tuple[float, ...] = knob((5e-7, 5e-7, 1e-7, 1e-7), "peak rate, by iteration", POSITIVE)
    mix: tuple[int, ...] = knob(
        (1, 2), "number of newest iterations whose pairs are used", POSITIVE
    )
    epochs: int = knob(2, "passes over the pairs in an iteration", POSITIVE)
    batch_size: int = knob(64, "pairs in an optimizer step, over all ranks", POSITIVE)
    warmup: float = knob(0.1, "share of the steps that warm up linearly", FRACTION)
    alpha: float = knob(0.99, "RMSProp's smoothing; torch's default, the authors' too", BELOW_1)
    clip: float = knob(1.0, "largest gradient norm; 1.0 in the authors' code base", POSITIVE)
    max_length: int = knob(2048, "longest prompt and response together, in tokens", POSITIVE)

    # adapters instead of full fine-tuning (spin/model/lora.py): ours; the paper trains all weights
    lora_rank: int = knob(0, "rank of LoRA's adapters; 0: all weights are trained", NOT_NEGATIVE)
    lora_alpha: float = knob(16.0, "adapters are scaled by alpha / rank", POSITIVE)
    lora_targets: tuple[str, ...] = knob(
        (), "layers that get adapters, such as q_proj; none: all linear layers except the head"
    )

    # the machine's knobs: they change speed and memory; results change only by rounding
    slots: int = changeable(
        64, "answers in progress at once on a rank; 64 in Appendix B.1", POSITIVE
    )
    tensor_parallel: int = changeable(1, "GPUs per rank of generate.py, for vLLM", POSITIVE)
    micro_tokens: int = changeable(
        8192, "most tokens in a rank's micro-batch; a longer pair is one by itself", POSITIVE
    )
    dtype: str = changeable(
        "auto", "auto: bf16 on CUDA, else fp32", choices=("auto", "bf16", "fp32")
    )
    attention: str = changeable(
        "auto",
        "auto: packed rows, by FlashAttention-2 on CUDA; sdpa, eager: padded batches, slower",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    recompute: bool = changeable(
        True, "activation checkpointing: less memory, a quarter more compute"
    )
    offload: bool = changeable(False, "weights, gradients and optimizer in host memory (slow)")
    replicas: int = changeable(1, "copies of the sharded model, such as one per node", POSITIVE)
    checkpoint_every: int = changeable(200, "optimizer steps between resume checkpoints", POSITIVE)
    track: str = changeable("none", "a live logger", choices=("none", "trackio", "wandb"))

    def revision_of(self, name: str) -> str | None:
        """The hub revision of a model: --revision if it is --model, else None, the newest."""
        return (self.revision if name == self.model else "") or None

    def at(self, t: int) -> "Numbers":
        """The numbers of iteration t."""
        tuples = self.lam, self.lr, self.mix
        return Numbers(*(values[min(t, len(values) - 1)] for values in tuples))


@dataclass(frozen=True)
class Numbers:
    """The knobs that have a value per iteration, with their values in one iteration."""

    lam: float  # λ of (4.7)
    lr: float  # peak learning rate
    mix: int  # iterations whose pairs are trained on


# The flags that a recipe stands for. Sources: `paper` is the defaults. `small`'s learning rate and
# chat template are our choice for a small instruct model, not run. Its λ is 1, since 0.1 lost as
# much as SFT in docs/real-model.md. `demo`'s λ and rates were chosen by benchmarks/demo_seeds.py.
RECIPES = {
    "paper": "",
    "small": """--model HuggingFaceTB/SmolLM2-360M-Instruct --template chat --num-prompts 5000
        --max-length 1024 --lam 1 --lr 1e-6 1e-6 2e-7 2e-7 --micro-tokens 2048""",
    "demo": """--model demo/theta0 --data demo/train.jsonl --eval-data demo/heldout.jsonl
        --num-prompts 2048 --eval-prompts 512 --max-new-tokens 24 --max-length 64
        --chunk 256 --slots 256 --lam 5 --lr 3e-5 3e-5 6e-6 6e-6 --sft-baseline
        --no-recompute --checkpoint-every 16""",
}


# Every draw of a run has a key of its own. generate.py's is (seed, t, prompt id). The keys of the
# others end with a number that keeps their random numbers apart from generate.py's.
STREAM = {
    "evaluate": 1,  # (seed, t, prompt id, 1): the answers to held-out prompts
    "batches": 2,  # (seed, t, epoch, 2): the order of the pairs
    "selection": 3,  # (seed, 0, 0, 3): which rows of the SFT set
    "mt_bench": 4,  # (seed, turn, question, 4): the answers to MT-Bench
}


def fixed_knobs(recipe: Recipe) -> dict:
    """The knobs that may not change within a run, as JSON gives them back."""
    names = [f.name for f in dataclasses.fields(recipe) if not f.metadata["may_change"]]
    return json.loads(json.dumps({name: getattr(recipe, name) for name in names}))


# ---- the command line --------------------------------------------------------------------------

# flags of several stages, as (name, argparse's keywords)
ITER = ("--iter", {"type": int, "required": True, "help": "iteration t"})


def flag(name: str) -> str:
    """The flag of a knob."""
    return "--" + name.replace("_", "-")


def as_text(value) -> str:
    """A knob's value as one would write it behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists every flag)")


def parse(argv=None, description="", *stage_flags) -> tuple[Recipe, argparse.Namespace]:
    """The recipe that the command line asks for, and the stage's own flags (run, iter, and others).
    stage_flags: (name, argparse's keywords) each. Refuses a value that breaks its rule."""
    parser = _Parser(description=description.split("\n")[0], allow_abbrev=False)
    about = "which table of knobs to start from (default: paper)"
    parser.add_argument("--recipe", choices=list(RECIPES), default="paper", help=about)
    about = "run directory (default: runs/RECIPE); under torchrun, which takes --run for its own "
    about += "--run-path, write --run-dir, or -- before the script"
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", dest="run", help=about)
    for name, keywords in stage_flags:
        parser.add_argument(name, **keywords)
    fields = dataclasses.fields(Recipe)
    for f in fields:
        example = f.default
        if isinstance(f.default, tuple):
            example = f.default[0] if f.default else ""
        kind = {"type": type(example), "choices": f.metadata["choices"]}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            kind["nargs"] = "+"
        about = f"{f.metadata['help']} (paper: {as_text(f.default) or 'none'})"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=about, **kind)
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word.encode(errors="replace") != word.encode(errors="surrogatepass"):
            fail(f"{word!r} is not valid UTF-8")
    asked = parser.parse_args(argv)
    args = parser.parse_args([*RECIPES[asked.recipe].split(), *argv])
    args.run = args.run or Path("runs") / args.recipe
    if re.search(r"[\x00-\x1f]", str(args.run)):
        fail(f"--run {str(args.run)!r} must not hold a tab, a line break or their like")
    given = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    if "model" in given:
        given.setdefault("revision", "")  # a user's own model must not get the recipe's revision
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    values["date"] = values.get("date") or date_of(args.run)
    recipe = Recipe(**values)
    _check_values(recipe)
    if (getattr(args, "iter", None) or 0) < 0:
        fail(f"--iter must be zero or positive, got {args.iter}")
    return recipe, args


def date_of(run: Path) -> str:
    """The day on which a run began, which all its prompts keep; today's (UTC) for a new run."""
    try:
        date = json.loads((run / "recipe.json").read_text())["date"]
        return datetime.date.fromisoformat(date).isoformat()
    except (OSError, ValueError, KeyError, TypeError):  # a new run; damage is found by spin/checks
        return datetime.datetime.now(datetime.UTC).date().isoformat()


def _check_values(recipe: Recipe):
    for f in dataclasses.fields(recipe):
        value, rule = getattr(recipe, f.name), f.metadata["rule"]
        for v in value if isinstance(value, tuple) else (value,):
            if v == "" and f.name not in ("revision", "date"):
                fail(f"{flag(f.name)} must not be empty")
            if rule and not (math.isfinite(v) and rule[1](v)):
                fail(f"{flag(f.name)} {rule[0]}, got {v}")
    if recipe.template not in ("paper", "chat") and "{prompt}" not in recipe.template:
        wanted = "'paper', 'chat' or a string that holds {prompt}"
        fail(f"--template must be {wanted}, got {recipe.template!r}")
    if found := re.search(r"\\[nrt]", recipe.template):  # a shell leaves it as it is in '…' and "…"
        fail(f"--template must not hold {found[0]}: for a line break or tab write $'…{found[0]}…'")
    for item in recipe.template_kwargs:
        if recipe.template != "chat" or "=" not in item:
            fail(f"--template-kwargs {item}: name=value is wanted, and --template chat")
    if not recipe.lora_rank and (recipe.lora_targets or recipe.lora_alpha != Recipe.lora_alpha):
        fail("--lora-targets and --lora-alpha need --lora-rank: give a rank, or leave them out")
    if recipe.engine == "own" and recipe.tensor_parallel > 1:
        fail("--tensor-parallel needs --engine vllm: --engine own samples on one GPU per rank")
    if recipe.engine == "vllm" and 0 < recipe.temperature < 0.01:
        fail(f"--temperature {recipe.temperature}: vLLM would take 0.01; give that, or 0")
    try:
        datetime.date.fromisoformat(recipe.date)
    except ValueError:
        fail(f"--date must be a day as YYYY-MM-DD, got {recipe.date!r}")
    if recipe.track != "none" and not importlib.util.find_spec(recipe.track):
        fail(f"--track {recipe.track} needs the package {recipe.track}: pip install {recipe.track}")
    if recipe.max_new_tokens >= recipe.max_length:
        no_room = f"--max-new-tokens {recipe.max_new_tokens} leaves no room for a prompt"
        fail(f"{no_room} in --max-length {recipe.max_length}")
