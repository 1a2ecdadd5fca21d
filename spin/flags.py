"""The command line of every stage: a flag for each knob of the recipe, and what its value must be.
Knobs: defaults of the dataclass < the flags of RECIPES[--recipe] < flags."""

import argparse
import dataclasses
import datetime
import json
import math
import sys
from pathlib import Path

from spin.files import fail
from spin.recipe import RECIPES, Recipe

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
        first = (*f.default, "")[0] if isinstance(f.default, tuple) else f.default
        kind = {"type": type(first), "choices": f.metadata["choices"]}
        if isinstance(first, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            kind["nargs"] = "+"
        about = f"{f.metadata['help']} (default: {as_text(f.default) or 'none'})"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=about, **kind)
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    args = parser.parse_args([*RECIPES[asked.recipe].split(), *argv])
    args.run = args.run or Path("runs") / args.recipe
    given = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    if "model" in given:
        given.setdefault("revision", "")  # the recipe's revision belongs to the recipe's model
    if hasattr(asked, "data") and not hasattr(asked, "right_share"):
        given["right_share"] = 0.0  # the recipe's is that of the recipe's own set
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
        name, rule = flag(f.name), f.metadata["rule"]
        value = getattr(recipe, f.name)
        if isinstance(value, str):
            if value.encode(errors="replace") != value.encode(errors="surrogatepass"):
                fail(f"{name} is not valid UTF-8, got {value!r}")
            if value == "" and f.name not in ("revision", "date"):
                fail(f"{name} must not be empty")
        for v in value if isinstance(value, tuple) else (value,):
            if rule and not (math.isfinite(v) and rule[1](v)):
                fail(f"{name} {rule[0]}, got {v}")
    if recipe.template not in ("paper", "chat") and "{prompt}" not in recipe.template:
        wanted = "'paper', 'chat' or a string that holds {prompt}"
        fail(f"--template must be {wanted}, got {recipe.template!r}")
    texts = [("--template", recipe.template)]
    # a value that is JSON may hold them
    texts += [("--template-kwargs", x) for x in recipe.template_kwargs if x[-1:] not in '"]}']
    for name, text in texts:
        for letter in "nrt":  # a shell leaves them as they are in '…' and "…"
            if f"\\{letter}" in text:
                mend = f"for a line break or tab write $'…\\{letter}…'"
                fail(f"{name} must not hold a backslash and the letter {letter}: {mend}")
    for item in recipe.template_kwargs:
        if recipe.template != "chat" or "=" not in item:
            fail(f"--template-kwargs {item}: name=value is wanted, and --template chat")
    if not recipe.lora_rank and (recipe.lora_targets or recipe.lora_alpha != Recipe.lora_alpha):
        fail("--lora-targets and --lora-alpha with --lora-rank 0: give a rank, or leave them out")
    try:
        datetime.date.fromisoformat(recipe.date)
    except ValueError:
        fail(f"--date must be a day as YYYY-MM-DD, got {recipe.date!r}")
    if recipe.max_new_tokens >= recipe.max_length:
        no_room = f"--max-new-tokens {recipe.max_new_tokens} leaves no room for a prompt"
        fail(f"{no_room} in --max-length {recipe.max_length}")
