"""What an iteration leaves: the opponent's scores, checkpoints to resume from, and θ_{t+1}.
Scores and checkpoints are used again only where they are made from the same starting model, pairs
and recipe (Iteration.made_from). Everything appears whole, or not at all."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states

from spin import lora
from spin.checksums import write_list, write_listed
from spin.distributed import World, barrier, first_cause
from spin.files import fail, read_json, read_jsonl, write_json, write_jsonl, write_whole
from spin.models import second_names
from spin.run import Iteration, model_files, newest_checkpoint


def read_scores(iteration: Iteration, pairs) -> torch.Tensor | None:
    """The frozen opponent's scores in opponent.jsonl, (N, 2), joined by (iter, id); None if there
    are none to use. Refuses a checkpoint that was trained against scores that are gone."""
    path = iteration.folder / "opponent.jsonl"
    key = path.with_suffix(".json")
    checkpoint = iteration.folder / "checkpoint"
    anew = f"delete {path}, {key} and {checkpoint} to start anew"
    found = {}
    if path.exists() and read_json(key, anew) == iteration.made_from:
        for r in read_jsonl(path):
            found[r["iter"], r["id"]] = r["logp_real"], r["logp_generated"]
    wanted = [(pair["iter"], pair["id"]) for pair in pairs]
    if set(found) != set(wanted):
        if latest_step(iteration):
            missing = f"not all of the opponent's scores of {checkpoint} are in {iteration.folder}"
            fail(f"{missing}: delete the checkpoint to start anew")
        return None
    return torch.tensor([found[one] for one in wanted], dtype=torch.float64)


def write_scores(iteration: Iteration, pairs, scores: torch.Tensor, world: World):
    """Write opponent.jsonl from scores (N, 2), and beside it what they are made from; refuses
    scores that are NaN or infinite, and names their pairs."""
    named = [(pair["iter"], pair["id"]) for pair in pairs]
    bad = [named[i] for i in (~scores.isfinite().all(1)).nonzero()[:, 0].tolist()]
    if bad:
        found = f"{len(bad)} pairs are NaN or infinite, (iter, id): {bad[:5]}"
        mend = "none were kept; look at these pairs, or try --dtype fp32"
        fail(f"the opponent's log-probabilities of {found}; {mend}")
    if world.rank != 0:
        return
    path = iteration.folder / "opponent.jsonl"
    for old in (".json", ".sha256"):  # of other pairs
        path.with_suffix(old).unlink(missing_ok=True)
    rows = []
    for (t, id), (real, generated) in zip(named, scores.tolist(), strict=True):
        rows.append({"id": id, "iter": t, "logp_real": real, "logp_generated": generated})
    write_jsonl(path, rows)
    write_json(path.with_suffix(".json"), iteration.made_from, write=write_listed)


def save_checkpoint(iteration: Iteration, step: int, model, optimizer, world: World):
    """checkpoint/{step}, whole: sharded weights, optimizer, made_from, metrics, checksums. Then the
    older ones go."""
    folder = iteration.folder / "checkpoint"
    part = folder / f"{step}.part"
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a kill, maybe with more ranks
    barrier()
    weights, moments = what_is_trained(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    mine = [path.name for path in part.glob(f"__{world.rank}_*")] + [".metadata"][world.rank :]
    write_list(part / f"{world.rank}.sha256", part, mine)
    barrier()
    if world.rank == 0:
        write_json(part / "made_from.json", iteration.made_from, write=write_listed)
        write_listed(part / "metrics.jsonl", (iteration.folder / "metrics.jsonl").read_text())
        shutil.rmtree(folder / str(step), ignore_errors=True)
        part.rename(folder / str(step))
        for old in folder.iterdir():
            if old.name != str(step):
                shutil.rmtree(old)
    barrier()


def latest_step(iteration: Iteration) -> int:
    """Steps that the newest checkpoint holds, or 0; refuses one of other pairs or another start."""
    newest = newest_checkpoint(iteration.folder)
    if newest is None:
        return 0
    again = f"delete {newest.parent} to start this iteration anew"
    if read_json(newest / "made_from.json", again) != iteration.made_from:
        fail(f"{newest} belongs to other pairs or another starting model: {again}")
    return int(newest.name)


def load_checkpoint(iteration: Iteration, model, optimizer) -> int:
    """Load the newest checkpoint, if any, on any number of ranks; returns the steps taken.
    The files are torch's own format (a pickled index): read none but your own run's."""
    step = latest_step(iteration)
    if step:
        folder = iteration.folder / "checkpoint"
        weights, moments = what_is_trained(model, optimizer)
        reader = dcp.FileSystemReader(folder / str(step))
        try:
            reader.read_metadata()  # where it cannot, dcp.load would print a traceback
            dcp.load({"model": weights, "optimizer": moments}, storage_reader=reader)
        except (Exception, dcp.CheckpointException) as problem:  # which is no Exception
            cause = first_cause(problem)
            mend = f"delete {folder} to start this iteration anew"
            found = f"{type(cause).__name__}: {str(cause)[:200]}"
            fail(f"{folder / str(step)} is damaged ({found}): {mend}")
        states.set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=state_options(model),
        )
    return step


def restore_metrics(iteration: Iteration, done: int):
    """metrics.jsonl as in the checkpoint: a kill may have left later lines, or half of one."""
    saved = iteration.folder / "checkpoint" / str(done) / "metrics.jsonl"
    (iteration.folder / "metrics.sha256").unlink(missing_ok=True)  # it will change
    write_whole(iteration.folder / "metrics.jsonl", saved.read_text() if done else "")


def export(model, tokenizer, folder: Path, pairs: list[str], world: World):
    """θ_{t+1} as a folder, whole, in fp32: bf16 would round away what an iteration changed.
    Beside it pairs.json: the foreign pairs that it was made from; model.sha256: its checksums."""
    weights = states.get_model_state_dict(model, options=state_options(model, whole=True))
    weights = lora.adapters_in(model, weights)
    for second in second_names(model):
        weights.pop(second, None)
    if world.rank == 0:
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        if lora.is_adapted(model):
            lora.write_merged(model, weights, part)
            write_adapter(model, weights, folder.with_name("adapter"))
        else:
            model.save_pretrained(part, state_dict=weights)
        try:
            # several templates stay in one file: a name such as "tools/v2" is none of a file
            several = isinstance(tokenizer.chat_template, dict)
            tokenizer.save_pretrained(part, save_jinja_files=not several)
        except Exception as problem:  # Rust's OSError is none
            raise OSError(problem) from None
        sync(part)  # before the checkpoint goes
        write_json(folder.with_name("pairs.json"), {"pairs": pairs}, write=write_listed)
        write_list(folder.with_name("metrics.sha256"), folder.parent, ["metrics.jsonl"])
        write_list(folder.with_suffix(".sha256"), part, model_files(part))
        part.rename(folder)
    barrier()


def write_adapter(model, weights, folder: Path):
    """adapter/ beside model/, whole, with its checksums."""
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):  # of a kill
        shutil.rmtree(old, ignore_errors=True)
    lora.write_adapters(model, weights, part)
    sync(part)
    write_list(folder.with_suffix(".sha256"), part, [path.name for path in part.iterdir()])
    part.rename(folder)


def sync(folder: Path):
    """Have all files of a folder on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def state_options(model, whole: bool = False):
    """torch's options for reading and setting weights: all of them, or with adapters these alone.
    whole: gathered in rank 0's host memory."""
    adapted = lora.is_adapted(model)
    return states.StateDictOptions(
        full_state_dict=whole,
        cpu_offload=whole,
        ignore_frozen_params=adapted,
        strict=not adapted,
    )


def what_is_trained(model, optimizer) -> tuple[dict, dict]:
    """The rank's part of the weights and of the optimizer's moments, for a checkpoint."""
    weights, moments = states.get_state_dict(model, optimizer, options=state_options(model))
    return lora.adapters_in(model, weights), moments
