"""The opponent's scores, and checkpoints to resume from: used again only if they belong to the same
θ_t, pairs and recipe (Iteration.made_from)."""

import shutil

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from tqdm import tqdm

from spin.files import fail, read_json, read_jsonl, write_json, write_jsonl, write_whole
from spin.model import lora
from spin.model.weights import state_options
from spin.run.folders import Iteration, newest_checkpoint, read_record, record
from spin.run.ranks import World, barrier, first_cause

FIX = "delete the folder checkpoint to start this iteration again"


def read_scores(iteration: Iteration, pairs) -> torch.Tensor | None:
    """The scores in opponent.jsonl, (N, 2); None if they are missing or belong to other pairs."""
    path = iteration.folder / "opponent.jsonl"
    found = {}
    if path.exists() and read_record(iteration.folder).get("pairs") == iteration.made_from["pairs"]:
        for row in read_jsonl(path):
            found[row["iter"], row["id"]] = row["logp_real"], row["logp_generated"]
    wanted = [(pair["iter"], pair["id"]) for pair in pairs]
    if set(found) != set(wanted):
        return None
    return torch.tensor([found[name] for name in wanted], dtype=torch.float64)


def write_scores(iteration: Iteration, pairs, scores: torch.Tensor, world: World):
    """Write opponent.jsonl from scores (N, 2). Refuses NaN and infinity, and names the pairs."""
    named = [(pair["iter"], pair["id"]) for pair in pairs]
    bad = [named[i] for i in (~scores.isfinite().all(1)).nonzero()[:, 0].tolist()]
    if bad:
        found = f"{len(bad)} pairs are NaN or infinite, (iter, id): {bad[:5]}"
        fail(f"the opponent's log-probabilities of {found}; look at these, or try --dtype fp32")
    if world.rank != 0:
        return
    rows = []
    for (t, id), (real, generated) in zip(named, scores.tolist(), strict=True):
        rows.append({"id": id, "iter": t, "logp_real": real, "logp_generated": generated})
    # the record names these pairs only when their scores are on disk, so a kill cannot mix them up
    record(iteration.folder, pairs=None)
    write_jsonl(iteration.folder / "opponent.jsonl", rows)


def save_checkpoint(iteration: Iteration, step: int, model, optimizer, world: World):
    """Write checkpoint/{step}, whole, then delete older ones."""
    folder = iteration.folder / "checkpoint"
    part = folder / f"{step}.part"
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # left by a killed run, maybe one of more ranks
    barrier()
    weights, moments = what_is_trained(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    barrier()
    if world.rank == 0:
        write_json(part / "made_from.json", iteration.made_from)
        write_whole(part / "metrics.jsonl", (iteration.folder / "metrics.jsonl").read_text())
        part.rename(folder / str(step))
        for old in folder.iterdir():
            if old.name != str(step):
                shutil.rmtree(old)
        tqdm.write(f"checkpoint of step {step}: {folder / str(step)}")
    barrier()


def refuse_unrelated(iteration: Iteration):
    """Refuse a checkpoint that belongs to other pairs, another starting model or another recipe."""
    newest = newest_checkpoint(iteration.folder)
    if newest and read_json(newest / "made_from.json", FIX) != iteration.made_from:
        fail(f"{newest} belongs to other pairs or another starting model: {FIX}")


def load_checkpoint(iteration: Iteration, model, optimizer) -> int:
    """Load the newest checkpoint, if any, on any number of ranks; returns the steps taken.
    The files are torch's own format (a pickled index): read only your own run's."""
    newest = newest_checkpoint(iteration.folder)
    if newest is None:
        return 0
    weights, moments = what_is_trained(model, optimizer)
    reader = dcp.FileSystemReader(newest)
    try:
        if sum(1 for _ in read_jsonl(newest / "metrics.jsonl")) != int(newest.name):
            raise ValueError("metrics.jsonl has too few lines")
        reader.read_metadata()  # where it cannot, dcp.load would print a traceback
        dcp.load({"model": weights, "optimizer": moments}, storage_reader=reader)
    except (Exception, dcp.CheckpointException) as problem:  # the second is a BaseException
        cause = first_cause(problem)
        fail(f"{newest} is damaged ({type(cause).__name__}: {str(cause)[:200]}): {FIX}")
    both = {"model_state_dict": weights, "optim_state_dict": moments}
    states.set_state_dict(model, optimizer, **both, options=state_options(model))
    return int(newest.name)


def restore_metrics(iteration: Iteration, done: int):
    """metrics.jsonl as in the checkpoint: a kill may have left later lines, or half of one."""
    saved = iteration.folder / "checkpoint" / str(done) / "metrics.jsonl"
    write_whole(iteration.folder / "metrics.jsonl", saved.read_text() if done else "")


def what_is_trained(model, optimizer) -> tuple[dict, dict]:
    """The rank's part of the weights and of the optimizer's moments, for a checkpoint."""
    weights, moments = states.get_state_dict(model, optimizer, options=state_options(model))
    return lora.adapters_in(model, weights), moments
