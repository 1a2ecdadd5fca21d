"""Stage 2 of an iteration: the update of Algorithm 1, from θ_t to θ_{t+1}.

    θ_{t+1} = argmin_θ Σ_i ℓ(λ log p_θ/p_θt(y_i|x_i) − λ log p_θ/p_θt(y'_i|x_i))          Eq. (4.7)

    torchrun --nproc_per_node 8 train.py --iter 0
    python train.py --iter 0 --recipe demo             one process; the code path is the same
    python train.py --iter 0 --objective sft           the continued-SFT baseline, same batches
    python train.py --iter 0 --pairs FILE              your own pairs; with preference pairs: DPO

Reads θ_t and the generated.jsonl of the iterations of --mix, by default t and t − 1. Writes into
RUN/iter{t}/ the files opponent.jsonl, metrics.jsonl and made_from.json, and θ_{t+1} as model/. SFT
writes into RUN/sft/iter{t}/, without opponent.jsonl; --lora-rank adds adapter/. A rerun resumes
from the last checkpoint, in checkpoint/; on the CPU, with the same ranks and threads, it ends with
the same bytes as an uninterrupted run.
"""

import contextlib
import itertools
import math
import os
import shutil
import sys
import time

sys.path.insert(0, __file__.rpartition("/")[0])  # this folder, missing under PYTHONSAFEPATH

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim import RMSprop
from tqdm import tqdm

from loss import sequence_logps, sft_loss, sft_loss_per_token, spin_loss, unmet_assumptions
from spin import checks
from spin.data.pairs import (
    answer_lengths,
    batches,
    encode_pairs,
    hash_of_pairs,
    micro_batches,
    opponent_of,
    packed_pairs,
    share_prompts,
)
from spin.data.selection import counts_line, select_pairs
from spin.data.text import load_renderer
from spin.files import append_jsonl, io_errors_in_one_line, read_jsonl
from spin.model import checkpoint, lora
from spin.model.packing import is_padded, packed
from spin.model.scoring_check import check_scoring
from spin.model.weights import (
    blocks_of,
    clip_gradients,
    compute_dtype,
    export,
    load_empty,
    parts_not_kept,
    read_weights,
)
from spin.recipe import ITER, fixed_knobs, parse
from spin.report import diagnose, metrics, tracking
from spin.run.folders import (
    Iteration,
    answer_files,
    fingerprint,
    hash_of_source,
    iteration_folder,
    record,
    save_recipe,
    starting_model,
)
from spin.run.ranks import (
    barrier,
    catch_sigterm,
    device_mesh,
    flags_of_all_ranks,
    process_group,
    sum_over_ranks,
)

PAIRS = ("--pairs", {"nargs": "+", "default": [], "help": "files of pairs to train on instead"})


@io_errors_in_one_line()
def main(argv=None):
    recipe, args = parse(argv, __doc__, ITER, PAIRS)
    run, t = args.run, args.iter
    with process_group(run) as world:
        given_pairs = [hash_of_source(source) for source in args.pairs]
        checks.before_training(recipe, run, t, given_pairs)
        out = iteration_folder(run, t, recipe.objective)
        if (out / "model").is_dir():
            shutil.rmtree(out / "checkpoint", ignore_errors=True)  # left if killed after the export
            return print(f"{out / 'model'} is there already: nothing to do")
        theta_t = starting_model(recipe, run, t, recipe.objective)
        renderer = load_renderer(theta_t, recipe)
        pairs = encode_pairs(rows_to_train_on(recipe, args, renderer), renderer, recipe)

        facts = {"theta": fingerprint(theta_t, recipe.revision), "pairs": hash_of_pairs(pairs)}
        iteration = Iteration(t, out, {**facts, "recipe": fixed_knobs(recipe)})
        checkpoint.refuse_unrelated(iteration)
        model = load_empty(theta_t, recipe)
        if world.rank == 0:
            diagnose.warn(parts_not_kept(model, theta_t, recipe))
        if recipe.lora_rank:
            dtype = compute_dtype(recipe.dtype, world.device)
            lora.add_adapters(model, theta_t, recipe, t, dtype)
        shard(model, recipe, world)
        read_weights(model, theta_t, recipe, world)
        check_scoring(model, recipe, world)
        # train sets lr at each step. There is no weight decay (Appendix B.1). With foreach, RMSprop
        # would need temporaries as large as the rank's part of the model
        optimizer = RMSprop(model.parameters(), lr=0.0, alpha=recipe.alpha, foreach=False)
        barrier()  # nobody writes before everybody has its model
        with packed(model, recipe.attention, world.device) as method:
            if method == "packed":  # only our own attention can share a prompt
                share_prompts(pairs)
            if world.rank == 0:
                print(f"theta_{t} ({theta_t}) trains on {len(pairs)} pairs, {recipe.objective}")
                save_recipe(recipe, run)
                if recipe.objective == "spin":
                    for lack in unmet_assumptions(recipe.ell):
                        diagnose.warn(f"Assumption 5.1 does not hold: --ell {recipe.ell} {lack}")
            out.mkdir(parents=True, exist_ok=True)
            # Score now: train may load a checkpoint, and after that the model is no longer θ_t.
            scores = None
            if recipe.objective == "spin":
                scores = frozen_scores(model, pairs, recipe, iteration, world)
            if world.rank == 0:
                record(out, **facts, given_pairs=given_pairs)
            train(model, optimizer, pairs, scores, recipe, iteration, world)
            if recipe.lora_rank:  # export reads θ_t again, so it must not have changed
                checks.same_start(out, theta_t, recipe)
            with catch_sigterm():  # SIGTERM has to wait until θ_{t+1} is written
                export(model, renderer.tokenizer, out / "model", theta_t, recipe, world)
        if world.rank == 0:
            shutil.rmtree(out / "checkpoint", ignore_errors=True)
            print(f"{out / 'model'}: theta_{t + 1}")


def train(model, optimizer, pairs, scores, recipe, iteration, world):
    """Train the model in place by RMSProp on (4.7), from θ_t or the newest checkpoint to θ_{t+1}.
    scores (N, 2): the opponent's log p_θt of each pair's real and generated answer; SFT: None."""
    numbers = recipe.at(iteration.t)
    lam, ell = numbers.lam, recipe.ell  # of (4.7)
    padded = is_padded(model)
    schedule = all_batches(len(pairs), recipe, iteration.t)
    steps = len(schedule)
    done = checkpoint.load_checkpoint(iteration, model, optimizer)
    logging = step_log(iteration, scores, recipe, done, steps, world)
    with catch_sigterm() as sigterm, logging as log:
        for step in range(done, steps):
            begun = time.perf_counter()
            rate = learning_rate(step, steps, numbers.lr, recipe.warmup)
            optimizer.param_groups[0]["lr"] = rate

            # The gradient of the mean loss, one micro-batch at a time. A rank without pairs left
            # repeats one with weight 0, since FSDP needs equally many passes on all ranks.
            passes = []
            for part, weight in micro_batches(schedule[step], pairs, recipe, world, padded):
                row = packed_pairs(part, recipe.objective, world.device)
                policy = sequence_logps(model, **row)  # log p_θ of all y; for SPIN, then of all y'
                if recipe.objective == "sft":
                    losses = sft_loss(policy)  # Eq. (3.1)
                else:
                    policy_real, policy_generated = policy.chunk(2)
                    opponent_real, opponent_generated = opponent_of(part, scores, policy)
                    losses = spin_loss(  # Eq. (4.7)
                        policy_real, policy_generated, opponent_real, opponent_generated, lam, ell
                    )
                total = losses
                if recipe.sft_weight and recipe.objective == "spin":
                    term = sft_loss_per_token(policy_real, answer_lengths(part))
                    total = losses + recipe.sft_weight * term  # RPO, arXiv 2405.16436
                # FSDP averages gradients over the ranks; we want their sum, so multiply by the
                # number of ranks
                share = total.sum() * weight * world.size / len(schedule[step])
                share.backward()
                passes.append((part, weight, losses.detach(), policy.detach()))
                # frees the graph
                losses = term = total = policy = policy_real = policy_generated = share = None

            # the update; NaN or infinity ends the run here, before anything is saved
            norm = clip_gradients(model, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            checks.finite(step, passes, norm, model, iteration, world)
            log(step, passes, norm, rate, begun)
            # save a checkpoint if one is due, or if SIGTERM says that the machine is taken away
            stop = flags_of_all_ranks([bool(sigterm)], world).any()
            due = (step + 1) % recipe.checkpoint_every == 0 and step + 1 < steps
            if stop or due:
                checkpoint.save_checkpoint(iteration, step + 1, model, optimizer, world)
            if stop:
                leave(step + 1, steps, world)


def shard(model, recipe, world):
    """Shard the model by FSDP2. Each rank keeps a part of the fp32 master weights; blocks are
    gathered one by one in the compute dtype, and gradients are reduced in fp32."""
    dtype = compute_dtype(recipe.dtype, world.device)
    options = {
        "mesh": device_mesh(recipe.replicas, world),
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32),
    }
    if recipe.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in blocks_of(model, recipe.recompute):
        fully_shard(block, **options)
    fully_shard(model, **options)


def frozen_scores(model, pairs, recipe, iteration, world):
    """The opponent's log p_θt, (N, 2): read from opponent.jsonl, or else computed and written."""
    scores = checkpoint.read_scores(iteration, pairs)
    if scores is None:
        scores = score_opponent(model, pairs, recipe, iteration.t, world)
        checkpoint.write_scores(iteration, pairs, scores, world)
    return scores


@torch.no_grad()
def score_opponent(model, pairs, recipe, t, world, epoch=0):
    """log p_θt(y|x) and log p_θt(y'|x) of all pairs, (N, 2), on every rank.

    No second model is needed: before its first update the policy is the opponent (in eval mode:
    there is no dropout). Scoring takes the micro-batches of the first epoch: the same shapes
    through the same kernels give the same bits, so the first margins are zero in bf16 too. Another
    epoch is for benchmarks/margin_noise.py."""
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
    first_epoch = batches(len(pairs), recipe, t, epoch)
    for batch in tqdm(first_epoch, desc=f"opponent {t}", unit="batch", disable=world.rank > 0):
        for part, weight in micro_batches(batch, pairs, recipe, world, is_padded(model)):
            logps = sequence_logps(model, **packed_pairs(part, "spin", world.device))
            if weight:  # else a repeated pair, as in train
                indices = [pair["index"] for pair in part]
                scores[indices] = logps.view(2, -1).T.double().cpu()  # (B, 2)
    # after a pass without gradient FSDP2 keeps the outermost module's weights gathered: free them
    model.reshard()
    return sum_over_ranks(scores)  # every pair was scored by one rank; the others hold zeros


def rows_to_train_on(recipe, args, renderer):
    """The rows of the run's own generated.jsonl files, or of the files of --pairs."""
    if not args.pairs:
        own = answer_files(recipe, args.run, args.iter)
        return itertools.chain.from_iterable(read_jsonl(path) for path in own.values())
    rows, left_out = select_pairs(args.pairs, renderer, recipe)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"pairs: {counts_line(left_out)}")
    return [{**row, "iter": args.iter} for row in rows]


def all_batches(n: int, recipe, t: int) -> list[list[int]]:
    """The global batches of an iteration, one epoch after the other."""
    return [batch for epoch in range(recipe.epochs) for batch in batches(n, recipe, t, epoch)]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warmup to the peak over a share of the steps, then linear decay to almost zero. The
    rate is never exactly zero, neither at the first step nor at the last.

    The warmup is from Appendix B.1. The decay is from the authors' code, which stretches it over
    six epochs; here it ends with the iteration's last step. Warmup also tames RMSProp: without a
    bias correction, its first step is 1/√(1 − α) times the rate."""
    warm = max(1, math.ceil(warmup * steps))
    return peak * min((step + 1) / warm, (steps - step) / (steps - warm + 1))


@contextlib.contextmanager
def step_log(iteration, scores, recipe, done, steps, world):
    """Yields a function that logs a step: a line of metrics.jsonl, the progress bar, a warning."""
    path = iteration.folder / "metrics.jsonl"
    if world.rank == 0:
        checkpoint.restore_metrics(iteration, done)
    run = iteration.folder.parents[1 if recipe.objective == "sft" else 0]
    name = f"{recipe.objective} {iteration.t}"
    bar = tqdm(desc=name, unit="step", initial=done, total=steps, disable=world.rank > 0)
    bar.leave = False  # if training ends early, the bar is not drawn again below the message
    rows = []

    def log(step, passes, norm, rate, begun):
        row = {"step": step, "epoch": step * recipe.epochs // steps}
        lam, sft_weight = recipe.at(iteration.t).lam, recipe.sft_weight
        row |= metrics.of_step(passes, scores, recipe.objective, lam, sft_weight)
        row |= {"grad_norm": norm.item(), "lr": rate}
        row["tokens_per_s"] = row.pop("tokens") / (time.perf_counter() - begun)
        rows.append(row)
        if world.rank == 0:
            append_jsonl(path, row)
            track(row)
            diagnose.warn(diagnose.new_collapse(rows, iteration.t))
        bar.leave = step + 1 == steps
        shown = [name for name in ("loss", "win_rate", "tokens_per_s") if row[name] is not None]
        bar.set_postfix({name: row[name] for name in shown}, refresh=False)
        bar.update()

    with bar, tracking.follow(recipe, run, iteration.t, trains=True) as track:
        yield log


def leave(done, steps, world):
    """Leave as if SIGTERM had ended the process."""
    if world.rank == 0:
        stopped = f"SIGTERM: stopped after {done} of {steps} steps"
        print(f"\n{stopped}; the same command goes on from there", file=sys.stderr)
    raise SystemExit(143)


if __name__ == "__main__":
    main()
