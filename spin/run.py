"""Where things lie in a run (docs/run-directory.md). Refuses nothing: that is spin/checks.py."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from spin.checksums import CHECKS_FILES, sha256, write_list, write_listed
from spin.files import locate, weight_files, write_json
from spin.flags import as_text
from spin.recipe import Recipe, fixed_knobs

# what of a model's folder is read besides its weights
TEXT_FILES = "*config.json *.index.json *token* *vocab* merges.txt *.model *.spm *.codes"
TEXT_FILES += " *.jinja */*.jinja chat_template.json tekken.json emoji.json"
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


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in an iteration's folder, if any; older ones may be in ruins."""
    there = [path for path in (folder / "checkpoint").glob("*") if path.name.isdigit()]
    return max(there, key=lambda path: int(path.name), default=None)


def list_of(run: Path, t: int) -> Path:
    """The list of the checksums of θ_t's files."""
    return iteration_folder(run, t - 1) / "model.sha256" if t else run / "theta_0.sha256"


def model_files(folder: Path) -> list[str]:
    """The names of all that is read of a model's folder."""
    texts = [path for pattern in TEXT_FILES.split() for path in folder.glob(pattern)]
    files = {path for path in (*texts, *weight_files(folder)) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in files)


def hash_of(files) -> str:
    """One hash of the contents of files."""
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def hash_of_model(name: str, revision: str) -> str | None:
    """A hash of all that is read of a model, by which a run knows its models; a hub model is known
    by its name and revision. None on the ranks that leave checksums to another of their node."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}"
    return hash_of(folder / file for file in model_files(folder)) if CHECKS_FILES else None


def hash_of_data(source: str) -> str:
    """A hash of a set's files, by which a result knows what it was made from; a set on the hub is
    known by its name. source: as for sources.read_rows."""
    names = [source] if Path(locate(source)).exists() else source.split(",")
    paths = [Path(locate(name)) for name in names]
    if not all(path.exists() for path in paths):
        return source
    files = [file for path in paths for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    return hash_of(files)


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
    """Print and write recipe.json, once: every knob as resolved; before it, θ_0's checksums."""
    path = run / "recipe.json"
    if path.exists():
        return
    for f in dataclasses.fields(recipe):
        print(f"{f.name:18}{as_text(getattr(recipe, f.name))}")
    run.mkdir(parents=True, exist_ok=True)
    theta_0 = Path(locate(recipe.model))
    write_list(run / "theta_0.sha256", theta_0, model_files(theta_0))
    write_json(path, vars(recipe), indent=1, write=write_listed)
