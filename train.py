"""Stage 2 of an iteration: the update of Algorithm 1, θ_{t+1} = argmin_θ Σ_i ℓ(λ log p_θ/p_θt(y_i|x_i) − λ log p_θ/p_θt(y'_i|x_i)).

    torchrun --nproc_per_node 8 train.py --iter 0
    python train.py --iter 0 --recipe demo             a world of one takes the same path
    python train.py --iter 0 --objective sft           the paper's continued-SFT baseline, on the same batches
    python train.py --iter 0 --pairs FILE              pairs from elsewhere, such as the authors' published ones

Reads θ_t and the generated.jsonl of iterations t and t − 1; writes into RUN/iter{t}/ (RUN/sft/iter{t}/ for SFT)
opponent.jsonl, metrics.jsonl and model/, which is θ_{t+1}. There is no second model in memory: the frozen opponent is
the policy before its first update, so it scores every pair once, before training begins. A rerun resumes from the
last checkpoint; on the CPU with the same ranks and threads it ends with the same bytes as an uninterrupted run.
"""

import collections
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from loss import sequence_logps, sft_loss, spin_loss, spin_margin
from spin import distributed
from spin.data import (
    check_ids,
    check_prompts,
    counts_line,
    encode,
    holds_special,
    load_tokenizer,
    parses_specials,
    read_generated,
    read_jsonl,
    read_rows,
    to_pair,
    write_jsonl,
)
from spin.files import check_json, fail, identity, one_line, write_whole
from spin.packing import pack, packed, share
from spin.recipe import at, check_run, iter_dir, parse, save_run, theta, tied


@one_line
def main(argv=None):
    recipe, args = parse(
        argv,
        __doc__.split("\n")[0],
        ("--iter", dict(type=int, required=True, help="iteration t")),
        ("--pairs", dict(nargs="+", default=[], help="train on these pairs, not on the run's own")),
    )
    t, out = args.iter, iter_dir(args.run, args.iter, recipe.objective)
    check_run(recipe, args.run)
    if (out / "model").is_dir():
        shutil.rmtree(out / "checkpoint", ignore_errors=True)  # a kill may have come between
        return print(f"{out / 'model'} is there already: nothing to do")
    start = theta(recipe, args.run, t, recipe.objective)
    mark, sampled = identity(start, recipe.revision), iter_dir(args.run, t) / "generated.json"
    if (
        recipe.objective == "spin"
        and not args.pairs
        and check_json(sampled).get("model", mark) != mark
    ):
        fail(
            f"{sampled}l was sampled from another theta_{t} than {start}: delete it and {sampled} and run generate.py again"
        )
    tokenizer, vocabulary = load_tokenizer(start, recipe)
    pairs = load_pairs(recipe, args, tokenizer, vocabulary)
    note = {
        "start": mark,
        "pairs": fingerprint(pairs),
        "number": len(pairs),
        "recipe": tied(recipe),
    }

    with distributed.join() as world:
        model = distributed.load_sharded(start, recipe, world)
        distributed.barrier()  # nobody writes before everybody has its model
        if world.rank == 0:
            print(f"theta_{t} ({start}) trains on {len(pairs)} pairs, objective {recipe.objective}")
        out.mkdir(parents=True, exist_ok=True)
        # Appendix B.1: no weight decay. foreach would make temporaries as large as the rank's share of the model
        optimizer = torch.optim.RMSprop(
            model.parameters(), lr=0.0, alpha=recipe.alpha, foreach=False
        )
        done = distributed.load_checkpoint(out / "checkpoint", note, model, optimizer)
        with packed(model, recipe.attention):
            if world.rank == 0:
                save_run(recipe, args.run)
            opponent = (
                frozen_scores(model, pairs, recipe, t, world, out, note, done)
                if recipe.objective == "spin"
                else None
            )
            with distributed.preemption() as asked:
                train(model, optimizer, pairs, opponent, recipe, t, world, out, note, done, asked)
                distributed.export(model, tokenizer, out / "model", world)
        if world.rank == 0:
            shutil.rmtree(out / "checkpoint", ignore_errors=True)
            print(f"{out / 'model'}: theta_{t + 1}")


def train(model, optimizer, pairs, opponent, recipe, t, world, out, note, done, asked=()):
    """Two epochs of minibatch steps from step `done` on; one line of metrics.jsonl each. θ_t in, θ_{t+1} out, in place.

    asked: holds something once SIGTERM has come to this rank; then all ranks checkpoint after the step and leave with 143.
    """
    steps = [
        batch for epoch in range(recipe.epochs) for batch in batches(len(pairs), recipe, t, epoch)
    ]
    lam, peak = at(recipe.lam, t), at(recipe.lr, t)
    if world.rank == 0:
        keep_metrics(out / "metrics.jsonl", done)
    bar = tqdm(
        steps[done:],
        desc=f"{recipe.objective} {t}",
        unit="step",
        initial=done,
        total=len(steps),
        disable=world.rank > 0,
    )
    recent, warned = collections.deque(maxlen=5), False
    for step, batch in enumerate(bar, done):
        begun, lr = time.perf_counter(), learning_rate(step, len(steps), peak, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums, losses = 0.0, []
        for rows, weight in micro_batches(batch, pairs, recipe, world):
            logps = score(model, rows, recipe.objective, world.device)
            if recipe.objective == "sft":
                values = {"loss": sft_loss(logps)}  # Eq. (3.1)
            else:
                values = play(
                    logps, opponent[[row["index"] for row in rows]].to(logps), lam, recipe.ell
                )
            # FSDP averages gradients over the ranks, and ranks may hold different numbers of pairs: weigh by pairs
            ((values["loss"] * weight.to(world.device)).sum() * world.size / len(batch)).backward()
            sums += measure(values, rows, weight)
            losses.append((rows, values["loss"].detach()))
        wrong = [not sums.isfinite().all(), distributed.broken(p.grad for p in model.parameters())]
        norm = distributed.clip_gradients(model, recipe.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        *wrong, leave = distributed.on_all(
            [*wrong, distributed.broken(model.parameters()), bool(asked)], world
        )
        if torch.stack(wrong).any():
            bar.close()
            fail(
                f"step {step} of iteration {t}: {not_finite(wrong, losses, batch, pairs, out / 'checkpoint')}"
            )
        means = dict(zip([*values, *LENGTHS], (distributed.all_sum(sums) / len(batch)).tolist()))
        if "margin" in means:
            means["margin_std"] = math.sqrt(
                max(0.0, means["margin_std"] - means["margin"] ** 2)
            )  # was the mean square
        speed = means.pop("tokens") * len(batch) / (time.perf_counter() - begun)
        row = {
            "step": step,
            "epoch": step * recipe.epochs // len(steps),
            **dict.fromkeys(MEANS),
            **means,
            "grad_norm": norm,
            "lr": lr,
            "tokens_per_s": speed,
        }
        if world.rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        bar.set_postfix_str(
            " ".join(
                f"{k} {row[k]:.3g}"
                for k in ("loss", "win_rate", "tokens_per_s")
                if row[k] is not None
            )
        )
        recent.append(row)
        if world.rank == 0 and not warned and (warning := collapse(recent)):
            tqdm.write(f"warning: step {step} of iteration {t}: {warning}", file=sys.stderr)
            warned = True
        if leave.any() or (step + 1) % recipe.checkpoint_every == 0 and step + 1 < len(steps):
            distributed.save_checkpoint(out / "checkpoint", step + 1, note, model, optimizer, world)
        if leave.any():
            bar.close()
            if world.rank == 0:
                print(
                    f"SIGTERM: stopped after step {step} of {len(steps)}; the same command goes on from there",
                    file=sys.stderr,
                )
            raise SystemExit(143)  # as if the signal had ended the process


def play(logps, opponent, lam, ell) -> dict:
    """The game of one micro-batch, pair by pair. logps (2B,): log p_θ, real ones first; opponent (B, 2): log p_θt."""
    real, generated = logps.chunk(2)
    opponent_real, opponent_generated = opponent.unbind(1)
    margin = spin_margin(real, generated, opponent_real, opponent_generated, lam).detach()
    return {
        "loss": spin_loss(
            real, generated, opponent_real, opponent_generated, lam, ell
        ),  # Eq. (4.7)
        "margin": margin,
        "margin_std": margin**2,
        "win_rate": (margin > 0) + 0.5 * (margin == 0),
        "logratio_real": real - opponent_real,
        "logratio_generated": generated - opponent_generated,
    }


def score(model, rows, objective, device):
    """log p_θ of both halves of the pairs in one pass: (2B,), the real ones first; of the real ones alone, (B,), for SFT."""
    sequences = [row["real"] for row in rows] + (
        [row["generated"] for row in rows] if objective == "spin" else []
    )
    return sequence_logps(model, *pack(sequences, device))


# ---- the frozen opponent -----------------------------------------------------------------------------------------


def frozen_scores(model, pairs, recipe, t, world, out, note, done):
    """The frozen opponent's scores, (N, 2): those in opponent.jsonl if this start and these pairs made them, else new ones.

    New ones need the policy to be θ_t still; ends with one line if a checkpoint was loaded and its scores are gone.
    """
    path, key = out / "opponent.jsonl", out / "opponent.json"
    if (
        path.exists()
        and check_json(key, f"delete {path}, {key} and {out / 'checkpoint'} to start anew") == note
    ):
        return load_opponent(path, pairs)
    if done:
        fail(
            f"the opponent's scores of {out / 'checkpoint'} are missing from {out}: delete the checkpoint to start anew"
        )
    scores = score_opponent(model, pairs, recipe, t, world)
    if bad := [
        (pair["iter"], pair["id"])
        for pair, good in zip(pairs, scores.isfinite().all(1))
        if not good
    ]:
        fail(
            f"the opponent's log-probabilities of {len(bad)} pairs are NaN or infinite, (iter, id): {bad[:5]}; none were kept; "
            "look at these pairs, or try --dtype fp32"
        )
    if world.rank == 0:
        key.unlink(missing_ok=True)
        write_jsonl(
            path,
            (
                {
                    "id": pair["id"],
                    "iter": pair["iter"],
                    "logp_real": real,
                    "logp_generated": generated,
                }
                for pair, (real, generated) in zip(pairs, scores.tolist())
            ),
        )
        write_whole(key, json.dumps(note) + "\n")
    return scores


def score_opponent(model, pairs, recipe, t, world, epoch=0):
    """log p_θt(y|x) and log p_θt(y'|x) of all pairs, (N, 2), on every rank.

    In the very micro-batches of the first epoch: the same shapes through the same kernels give the same bits, so
    the first margins are zero in bf16 too. (benchmarks/margin_noise.py asks for another epoch's.)
    """
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in tqdm(
            batches(len(pairs), recipe, t, epoch),
            desc=f"opponent {t}",
            unit="batch",
            disable=world.rank > 0,
        ):
            for rows, weight in micro_batches(batch, pairs, recipe, world):
                logps = score(model, rows, "spin", world.device).view(2, -1).T.double().cpu()
                for row, pair_scores, w in zip(rows, logps, weight):
                    if w:
                        scores[row["index"]] = pair_scores
    model.reshard()  # FSDP2 leaves the root unsharded after a pass without gradient
    return distributed.all_sum(scores)  # every pair was scored by one rank; the others hold zeros


def load_opponent(path, pairs):
    """The scores in opponent.jsonl, (N, 2), joined by (iter, id)."""
    found = {
        (row["iter"], row["id"]): (row["logp_real"], row["logp_generated"])
        for row in read_jsonl(path)
    }
    if set(found) != {(pair["iter"], pair["id"]) for pair in pairs}:
        fail(
            f"{path} does not score this iteration's pairs: delete {path.parent} but generated.jsonl, to start it anew"
        )
    return torch.tensor([found[pair["iter"], pair["id"]] for pair in pairs], dtype=torch.float64)


# ---- pairs, batches, schedule ------------------------------------------------------------------------------------


def load_pairs(recipe, args, tokenizer, vocabulary) -> list[dict]:
    """The pairs of iteration t as token ids: {"id", "iter", "index", "real": (ids, mask), "generated": (ids, mask)}.

    Iteration t ≥ 1 trains on its own pairs and those of t − 1 (Section 6.1), all scored by θ_t.
    The ids (T,) are int32 and the masks int8 arrays: 100,000 pairs as lists of Python numbers would fill a node's memory.
    """
    rows = (foreign_pairs if args.pairs else own_pairs)(recipe, args, tokenizer, vocabulary)
    seen, pairs = set(), []
    for row in rows:
        if (row["iter"], row["id"]) in seen:
            fail(
                f"the pair with iter {row['iter']} and id {row['id']} occurs twice: the files do not belong together"
            )
        seen.add((row["iter"], row["id"]))
        pair = {"id": row["id"], "iter": row["iter"], "index": len(pairs)}
        answer = row.get(
            "generated_ids", row["generated"]
        )  # sampled ids as they are: decoding loses how they were split
        for half, response in (("real", row["real"]), ("generated", answer)):
            ids, mask = encode(tokenizer, recipe.template, row, response, recipe.max_length)
            pair[half] = np.array(ids, np.int32), np.array(mask, np.int8)
        pairs.append(pair)
    if not pairs:
        fail("there are no pairs to train on")
    return pairs


def own_pairs(recipe, args, tokenizer, vocabulary):
    """The rows of generated.jsonl of the latest iterations, all of one SFT set, one by one."""
    t = args.iter
    for s in range(max(0, t + 1 - at(recipe.mix, t)), t + 1):
        path = iter_dir(args.run, s) / "generated.jsonl"
        rows = lambda: read_generated(path, s, vocabulary, tokenizer.eos_token_id)  # noqa: E731, B023
        check_prompts(args.run / "prompts.json", rows(), path)
        yield from rows()


def foreign_pairs(recipe, args, tokenizer, vocabulary):
    """The rows of the files of --pairs, in any shape that holds y'; what cannot be used is counted, by select's rules."""
    number, seen, counts = 0, set(), collections.Counter()
    for source in args.pairs:
        for line, row in enumerate(read_rows(source, recipe.split), 1):
            where = f"{source}, row {line}"
            pair = to_pair(row, where)
            if "generated" not in pair:
                fail(f"{where}: a pair needs a generated response beside the real one")
            if "generated_ids" in pair:  # from another run's generated.jsonl
                check_ids(pair, where, vocabulary, tokenizer.eos_token_id)
            counts["read"] += 1
            key = json.dumps(
                [pair.get(k) for k in ("system", "prompt", "real", "generated", "generated_ids")]
            )
            key = hashlib.sha256(key.encode()).digest()
            if not all(pair[k].strip() for k in ("prompt", "real")) or not pair.get(
                "generated_ids", pair["generated"].strip()
            ):
                counts["empty prompt or response"] += 1
            elif key in seen:
                counts["duplicate pair"] += 1
            elif parses_specials(tokenizer, recipe.template) and any(
                holds_special(tokenizer, pair.get(k, ""))
                for k in ("system", "prompt", "real", "generated")
            ):
                counts["text of a special token"] += 1
            elif not (
                length := len(
                    encode(tokenizer, recipe.template, pair, max_length=recipe.max_length)[0]
                )
            ):
                counts["prompt of no tokens"] += 1
            elif length >= recipe.max_length:
                counts["prompt too long"] += 1
            else:
                seen.add(key)
                yield {**pair, "id": number, "iter": args.iter}
                number += 1
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"pairs: {counts_line(counts)}")


def fingerprint(pairs) -> str:
    """A hash of the pairs' tokens, by which a checkpoint knows what it was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (*pair["real"], *pair["generated"]):
            digest.update(part.tobytes())
    return digest.hexdigest()


def batches(n: int, recipe, t: int, epoch: int) -> list[list[int]]:
    """The epoch's global batches: every pair once, in an order that depends on (seed, t, epoch) only."""
    order = (
        np.random.default_rng((recipe.seed, t, epoch, 2)).permutation(n).tolist()
    )  # 2: a stream of its own
    return [order[i : i + recipe.batch_size] for i in range(0, n, recipe.batch_size)]


def micro_batches(batch, pairs, recipe, world):
    """This rank's share of a global batch, in micro-batches of --micro-tokens: (rows, weight (B,)) each.

    Ranks and micro-batches get equal numbers of tokens, as near as may be. All ranks make equally many passes, as FSDP must;
    where pairs run out, the shortest one stands in with weight 0.
    """
    halves = ("real", "generated") if recipe.objective == "spin" else ("real",)
    sizes = [sum(len(pairs[i][half][0]) for half in halves) for i in batch]
    for mine in share(sizes, recipe.micro_tokens, world.size)[world.rank :: world.size]:
        weight = [1.0] * len(mine) or [0.0]
        yield [pairs[batch[k]] for k in mine or [sizes.index(min(sizes))]], torch.tensor(weight)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warmup to the peak over a share of the steps, then linear decay that would reach zero one step after the last.

    The first step is step 0 and moves already. Warmup is Appendix B.1's; the decay is the authors' code's, over the steps
    that are really taken. It also tames RMSProp, whose first step is 1/√(1 − α) times the rate for want of a bias correction.
    """
    warm = max(1, math.ceil(warmup * steps))
    return peak * min((step + 1) / warm, (steps - step) / (steps - warm + 1))


# ---- metrics -----------------------------------------------------------------------------------------------------

MEANS = (
    "loss",
    "margin",
    "margin_std",
    "win_rate",
    "logratio_real",
    "logratio_generated",
)  # null where undefined
LENGTHS = ("length_real", "length_generated", "tokens")


def measure(values: dict, rows, weight) -> torch.Tensor:
    """The sums over this micro-batch's pairs of values, response lengths, and tokens passed through the model."""
    lengths = [[row[k][1].sum() for row in rows] for k in ("real", "generated")]
    halves = ("real", "generated") if "margin" in values else ("real",)
    columns = [v.detach().double().cpu() for v in values.values()]
    columns += [
        torch.tensor(c).double()
        for c in (*lengths, [sum(len(row[k][0]) for k in halves) for row in rows])
    ]
    return torch.stack(columns) @ weight.double()


def keep_metrics(path: Path, done: int):
    """Keep the lines of the steps that the checkpoint holds; a kill may have left later ones, or half a line."""
    lines = path.read_text().splitlines(keepends=True)[:done] if path.exists() and done else []
    if len(lines) < done or not "".join(lines[-1:]).endswith("\n" * bool(done)):
        fail(
            f"{path} is damaged, it has less than the {done} steps of {path.with_name('checkpoint')}: restore it, or delete "
            "the checkpoint to start this iteration anew"
        )
    write_whole(path, lines)


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def not_finite(wrong, losses, batch, pairs, checkpoint) -> str:
    """In words, on every rank: where NaN or infinity is, of which pairs, and what is kept, for nothing of this step was.

    wrong: a flag a rank for each of the loss, the gradient, the weights; the first that has any is named, with its ranks.
    The pairs are those whose own loss is not finite, else some of the step's.
    """
    what, ranks = next(
        (what, ranks)
        for what, ranks in zip(("the loss", "the gradient", "a weight"), wrong)
        if ranks.any()
    )
    guilty = torch.zeros(len(pairs))
    for rows, loss in losses:
        guilty[[row["index"] for row in rows]] = (~loss.isfinite()).float().cpu()
    guilty = distributed.all_sum(guilty).tolist()
    names = [(pairs[i]["iter"], pairs[i]["id"]) for i in batch if guilty[i] or not any(guilty)]
    kept = (
        f"the last good checkpoint is in {checkpoint}"
        if checkpoint.exists()
        else "there was no checkpoint yet"
    )
    return (
        f"{what} is NaN or infinite, on rank {', '.join(map(str, ranks.nonzero().flatten().tolist()))}; {len(names)} pairs (iter, id): "
        f"{', '.join(map(str, names[:5]))}{', …' if len(names) > 5 else ''}; nothing of this step was saved, {kept}; look at "
        "these pairs, or start another --run with a lower --lr"
    )


def collapse(recent) -> str | None:
    """In words, what is wrong when the policy wins by making everything less likely; None while it does not.

    recent: the latest lines of metrics.jsonl. The rule: five steps that win every pair, while the log-ratio of the human
    answers is negative and fell by more than a nat.
    """
    fall = (recent[0]["logratio_real"] or 0) - (recent[-1]["logratio_real"] or 0)
    if (
        len(recent) == 5
        and all(row["win_rate"] == 1 for row in recent)
        and fall > max(1, recent[0]["logratio_real"])
    ):
        return (
            f"every pair is won, and the human answers lost {fall:.1f} nats in 5 steps: the policy makes all answers less "
            "likely; a lower --lr, fewer --epochs or a larger --lam would hold it back"
        )


if __name__ == "__main__":
    main()
