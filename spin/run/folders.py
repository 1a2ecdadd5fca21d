"""Where the files of a run lie (docs/run-directory.md), and how a run recognises its models and its
data. What does not fit together is refused by spin/checks.py."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from spin.files import AGAIN, fail, locate, read_json, weight_files, write_json
from spin.recipe import Recipe, as_text, fixed_knobs

# what of a model's folder is read besides its weights
TEXT_FILES = "*config.json *.index.json *token* *vocab* merges.txt *.model *.spm *.codes"
TEXT_FILES += " *.jinja */*.jinja chat_template.json tekken.json emoji.json"
SAMPLE = 2**16  # bytes read at the start, in the middle and at the end of each tensor
RESTORE = "restore it, or choose another --run"  # what helps when a run's file is damaged
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


def answer_files(recipe: Recipe, run: Path, t: int) -> dict[int, Path]:
    """{s: generated.jsonl of iteration s} for the iterations whose pairs iteration t trains on: the
    newest --mix, by default t and t − 1 (Section 6.1). θ_t scores all of them."""
    first = max(0, t + 1 - recipe.at(t).mix)
    return {s: iteration_folder(run, s) / "generated.jsonl" for s in range(first, t + 1)}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of an iteration, if any; a killed run may leave a .part."""
    there = [path for path in (folder / "checkpoint").glob("*") if path.name.isdigit()]
    return max(there, key=lambda path: int(path.name), default=None)


def read_record(folder: Path) -> dict:
    """What an iteration was made from, by its made_from.json; {} if there is none yet. Keys:
    theta      θ_t's fingerprint
    rows       number of rows in generated.jsonl
    left_out   rows of the SFT set that were left out, by reason
    pairs      hash of the pairs' tokens that opponent.jsonl and model/ belong to
    given_pairs    hashes of the files of --pairs, if there were any"""
    return read_json(folder / "made_from.json", f"delete {folder} to start this iteration again")


def record(folder: Path, **facts):
    """Add facts to an iteration's made_from.json."""
    write_json(folder / "made_from.json", {**read_record(folder), **facts}, indent=1)


def fingerprint(name: str, revision: str) -> str:
    """A SHA-256 by which a run recognises a model. It covers config, tokenizer and chat template
    whole, and of each weight file the size, the header, and 64 KiB at the start, middle and end of
    each tensor. (Names and sizes alone would not notice other weights.) A hub model is known by its
    name and revision. Ends with one line if a weight file has no readable header."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}"
    digest = hashlib.sha256()
    texts = {path for pattern in TEXT_FILES.split() for path in folder.glob(pattern)}
    for path in sorted(path for path in texts if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    for path in weight_files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for part in parts_of_weights(path):
            digest.update(part)
    return digest.hexdigest()


def parts_of_weights(path: Path):
    """The header of a safetensors file, and three parts of each of its tensors, as bytes."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            yield header
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            for begin, end in (tensor["data_offsets"] for tensor in tensors.values()):
                last = max(begin, end - SAMPLE)
                for start in (begin, (begin + last) // 2, last):
                    file.seek(8 + size + start)
                    yield file.read(min(SAMPLE, end - start))
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as problem:
        fail(f"{path} is damaged ({problem}): {AGAIN}")


def hash_of_source(source: str) -> str:
    """A hash of a set's files; a set on the hub is known by its name. source: as for read_rows."""
    path = Path(locate(source))
    if not path.exists():
        return source
    digest = hashlib.sha256()
    for file in [path, *sorted(path.rglob("*"))]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def made_by(recipe: Recipe, policy: str, opponent: str | None, asked: dict) -> dict:
    """What a result is made from: fingerprints of the models, a hash of the recipe, and what was
    asked."""
    knobs = fixed_knobs(recipe)
    del knobs["model"], knobs["revision"]  # the models have fingerprints, whatever their paths
    if recipe.template != "chat":
        del knobs["date"]  # which only a chat template can write
    models = {"model": policy, "opponent": opponent}
    made = {name: model and fingerprint(model, recipe.revision) for name, model in models.items()}
    digest = hashlib.sha256(json.dumps(knobs).encode()).hexdigest()
    return {**made, "recipe": digest, **asked}


def read_recipe(run: Path) -> Recipe:
    """The recipe in recipe.json, as save_recipe wrote it. Knobs that are unknown or missing there
    are refused by checks.run_directory, not here."""
    saved = read_json(run / "recipe.json", RESTORE).items()
    knobs = {name: tuple(v) if isinstance(v, list) else v for name, v in saved}
    return Recipe(**{name: v for name, v in knobs.items() if name in Recipe.__dataclass_fields__})


def save_recipe(recipe: Recipe, run: Path):
    """Print and write recipe.json, once: every knob as resolved, and θ_0's fingerprint."""
    path = run / "recipe.json"
    if path.exists():
        return
    for f in dataclasses.fields(recipe):
        print(f"{f.name:18}{as_text(getattr(recipe, f.name))}")
    run.mkdir(parents=True, exist_ok=True)
    theta_0 = fingerprint(locate(recipe.model), recipe.revision)
    write_json(path, {**vars(recipe), "theta_0": theta_0}, indent=1)
