"""Where things lie in a run (docs/run-directory.md). Refuses nothing: that is spin/checks.py."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from spin.files import locate, weight_files, write_json
from spin.flags import as_text
from spin.recipe import Recipe, fixed_knobs

LOGS = ("metrics.jsonl", "opponent.jsonl")  # of a finished iteration: only pictures use them
# what a text's tokens, and a model's scores, depend on besides its weights
TEXT_FILES = "config.json *token* *.jinja additional_chat_templates/*.jinja chat_template.json"
TEXT_FILES += " *vocab* merges.txt *.model *.spm *.codes tekken.json emoji.json"
SHOWN = 6  # held-out prompts whose answers evaluate.py keeps in answers.jsonl, for the report


@dataclass(frozen=True)
class Iteration:
    """Iteration t of one objective: its folder, and what it is made from: θ_t, pairs, recipe."""

    t: int
    folder: Path
    made_from: dict


def iteration_folder(run: Path, t: int, objective: str = "spin") -> Path:
    """RUN/iter{t}, or RUN/sft/iter{t} for the continued-SFT baseline."""
    return (run / "sft" if objective == "sft" else run) / f"iter{t}"


def starting_model(recipe: Recipe, run: Path, t: int, objective: str = "spin") -> str:
    """Where θ_t lies: the SFT model for t = 0, else what iteration t − 1 left."""
    if t == 0:
        return locate(recipe.model)
    return str(iteration_folder(run, t - 1, objective) / "model")


def answers_of(recipe: Recipe, run: Path, t: int) -> list[tuple[int, Path]]:
    """(s, generated.jsonl of iteration s) for the iterations whose pairs iteration t trains on:
    its own and, for t ≥ 1, those of t − 1 (Section 6.1), all scored by θ_t."""
    first = max(0, t + 1 - recipe.at(t).mix)
    return [(s, iteration_folder(run, s) / "generated.jsonl") for s in range(first, t + 1)]


def hash_of_model(name: str, revision: str) -> str:
    """A hash of weights, config, tokenizer and chat template, by which a run knows its models.
    Two trainings of one model differ in the last megabyte of a file; hashing all 29 GB of a 7B
    model on every rank would cost minutes. A hub model is known by its name and revision."""
    if not Path(name).is_dir():
        return f"{name}@{revision}"
    digest = hashlib.sha256()
    folder = Path(name)
    texts = {path for pattern in TEXT_FILES.split() for path in folder.glob(pattern)}
    for path in sorted(path for path in texts if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    for path in weight_files(folder):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def hash_of_data(source: str) -> str:
    """A hash of a set's files, by which a result knows what it was made from; a set on the hub is
    known by its name. source: as for sources.read_rows."""
    names = [source] if Path(locate(source)).exists() else source.split(",")
    digest = hashlib.sha256()
    for path in map(Path, map(locate, names)):
        if not path.exists():
            return source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def may_write_date(name: str) -> bool:
    """Whether the chat template of a model asks for today's date; of a hub model it may."""
    folder = Path(name)
    texts = [*folder.glob("*.jinja"), *folder.glob("tokenizer_config.json")]
    return not folder.is_dir() or any(b"strftime_now" in path.read_bytes() for path in texts)


def made_by(recipe: Recipe, policy: str, opponent: str | None, asked=None) -> dict:
    """What a result is made from: hashes of the models and of the recipe, and what was asked."""
    knobs = fixed_knobs(recipe)
    for name in ("model", "revision", "date"):  # the models are hashed, by whatever path they came
        del knobs[name]
    if recipe.template == "chat" and may_write_date(policy):  # else one of yesterday is as good
        asked = {**(asked or {}), "date": recipe.date}
    models = {"model": policy, "opponent": opponent}
    made = {name: model and hash_of_model(model, recipe.revision) for name, model in models.items()}
    return {
        **made,
        "recipe": hashlib.sha256(json.dumps(knobs).encode()).hexdigest(),
        **(asked or {}),
    }


def save_recipe(recipe: Recipe, run: Path):
    """Print and write recipe.json, once: every knob as resolved, and a hash of θ_0's weights."""
    path = run / "recipe.json"
    if path.exists():
        return
    for f in dataclasses.fields(recipe):
        print(f"{f.name:18}{as_text(getattr(recipe, f.name))}")
    run.mkdir(parents=True, exist_ok=True)
    theta_0 = hash_of_model(locate(recipe.model), recipe.revision)
    write_json(path, {**vars(recipe), "theta_0": theta_0}, indent=1)
