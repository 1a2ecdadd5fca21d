"""train.py: the frozen opponent, the loss over the global batch, the update, resume, export."""

import itertools
import json
import math
import os
import shutil

import pytest
import torch
from conftest import MICRO, THETA0, load, on_ranks, stage
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from loss import sequence_logps
from spin.data.pairs import batches, encode_pairs
from spin.data.text import load_renderer
from spin.files import read_jsonl, write_jsonl
from spin.model import checkpoint
from spin.model.packing import pack
from spin.recipe import ITER, parse
from spin.run.folders import starting_model


def metrics(folder):
    return list(read_jsonl(folder / "metrics.jsonl"))


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def fresh(played, tmp_path, iterations=(0,)):
    """A run that has its answers but is not trained yet (iteration 1 gets its θ_1 too)."""
    tmp_path.mkdir(exist_ok=True)
    shutil.copy(played / "prompts.json", tmp_path)
    for t in iterations:
        (tmp_path / f"iter{t}").mkdir(parents=True)
        shutil.copy(played / f"iter{t}" / "generated.jsonl", tmp_path / f"iter{t}")
    if 1 in iterations:
        shutil.copytree(played / "iter0" / "model", tmp_path / "iter0" / "model")
    return tmp_path


def recipe_and_pairs(run, t):
    """The micro recipe, and the pairs that iteration t of a run trains on."""
    recipe, args = parse([*MICRO, "--run", str(run), "--iter", str(t)], "", ITER, train.PAIRS)
    renderer = load_renderer(str(THETA0), recipe)
    return recipe, encode_pairs(train.rows_to_train_on(recipe, args, renderer), renderer, recipe)


# ---- the frozen opponent -------------------------------------------------------------------------


def test_the_first_loss_of_every_iteration_is_log2_and_its_margin_is_zero(played):
    for t, pairs in ((0, 40), (1, 80)):  # later iterations train on two iterations' pairs
        first, second, *rest = metrics(played / f"iter{t}")
        assert 2 + len(rest) == 2 * math.ceil(pairs / 12)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        for name in ("margin", "margin_std", "logratio_real", "logratio_generated"):
            assert first[name] == 0, name
        assert first["win_rate"] == 0.5
        assert second["margin_std"] > 0  # control: after an update there is a margin


def test_dropout_is_off_while_scoring_and_training(played, tmp_path):
    run = fresh(played, tmp_path / "run")
    shutil.copytree(THETA0, tmp_path / "wet")
    config = json.loads((tmp_path / "wet" / "config.json").read_text())
    (tmp_path / "wet" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    stage("train", run, "--iter", 0, "--model", tmp_path / "wet")
    assert metrics(run / "iter0")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    # control: it would be on in train mode
    wet = AutoModelForCausalLM.from_pretrained(tmp_path / "wet").train()
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(wet(ids).logits, wet(ids).logits)


def test_in_bf16_the_first_margin_is_zero_too_by_the_same_micro_batches(played, tmp_path):
    run = fresh(played, tmp_path)
    stage("train", run, "--iter", 0, "--dtype", "bf16")
    assert metrics(run / "iter0")[0]["margin_std"] == 0


def test_scores_are_those_of_the_starting_model_and_do_not_change_with_training(played, model):
    theta_1 = load(played / "iter0" / "model")
    theta_2 = load(played / "iter1" / "model")
    _, pairs = recipe_and_pairs(played, 1)
    rows = {(r["iter"], r["id"]): r for r in read_jsonl(played / "iter1" / "opponent.jsonl")}
    assert len(rows) == len(pairs) == 80 and {t for t, _ in rows} == {0, 1}
    for half in ("real", "generated"):
        wanted = torch.tensor([rows[p["iter"], p["id"]][f"logp_{half}"] for p in pairs])
        batch = pack([p[half] for p in pairs], "cpu")
        with torch.no_grad():
            assert torch.allclose(sequence_logps(theta_1, **batch), wanted, atol=1e-4)
            for other in (theta_2, model):  # controls: another model
                assert not torch.allclose(sequence_logps(other, **batch), wanted, atol=1e-4)


def test_after_the_opponents_pass_the_model_is_sharded_again(played, tmp_path, monkeypatch):
    """FSDP2 leaves the root unsharded after a pass without gradient; an update would then miss the
    weights in use."""
    seen = []
    real = train.train

    def watched(model, optimizer, *rest):
        in_use = {id(p) for p in model.parameters()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        kinds = {type(p.data).__name__ for p in model.parameters()}
        seen.append((in_use, held, kinds))
        return real(model, optimizer, *rest)

    monkeypatch.setattr(train, "train", watched)
    stage("train", fresh(played, tmp_path), "--iter", 0)
    ((in_use, held, kinds),) = seen
    assert in_use == held and kinds == {"DTensor"}


# ---- the loss and the update ---------------------------------------------------------------------


def oracle(run, t, steps, sft_weight=0.0):
    """Algorithm 1's update in plain single-process PyTorch: one batch a step, autograd, RMSProp by
    hand. Returns the losses of the first steps, and the SFT terms, which count sft_weight times."""
    recipe, pairs = recipe_and_pairs(run, t)
    model = load(starting_model(recipe, run, t))
    lr = (3e-5, 2e-5)[t]
    lam = (5.0, 4.0)[t]

    def logps(batch, half):
        return sequence_logps(model, **pack([pairs[i][half] for i in batch], "cpu"))

    with torch.no_grad():
        frozen = {half: logps(range(len(pairs)), half) for half in ("real", "generated")}
    square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    total = 2 * math.ceil(len(pairs) / 12)
    warm = max(1, math.ceil(0.1 * total))
    losses, terms = [], []
    for step in range(steps):
        # the loss of the global batch
        batch = batches(len(pairs), recipe, t, 0)[step]
        policy_real = logps(batch, "real")
        lengths = torch.tensor([pairs[i]["real"][1].sum() for i in batch])
        term = (-policy_real / lengths).mean()
        real = policy_real - frozen["real"][batch]
        generated = logps(batch, "generated") - frozen["generated"][batch]
        loss = torch.log1p(torch.exp(-(lam * real - lam * generated))).mean()
        model.zero_grad()
        (loss + sft_weight * term).backward()
        losses.append(loss.item())
        terms.append(term.item())

        # RMSProp on the clipped gradient
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        rate = lr * (step + 1) / warm if step < warm else lr * (total - step) / (total - warm + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * min(1.0, 1.0 / (norm.item() + 1e-6))
                square[name] = 0.99 * square[name] + 0.01 * g**2
                p -= rate * g / (square[name].sqrt() + 1e-8)
    return losses, terms


@pytest.mark.parametrize("t", [0, 1])
def test_the_losses_are_those_of_algorithm_1_written_out_in_plain_pytorch(played, t):
    """Micro-batches of unequal size, the last batch of an epoch smaller: still the mean over the
    global batch."""
    got = [row["loss"] for row in metrics(played / f"iter{t}")[:4]]
    assert got == pytest.approx(oracle(played, t, 4)[0], rel=1e-4)


def test_sft_weight_adds_the_mean_nll_per_token_of_the_human_answers(played, tmp_path):
    """And 0 changes no byte and no key; the logged loss stays that of (4.7), first log 2."""
    run, zero = (fresh(played, tmp_path / name) for name in ("run", "zero"))
    stage("train", run, "--iter", 0, "--sft-weight", 3)
    got = metrics(run / "iter0")[:4]
    assert got[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    losses, terms = oracle(played, 0, 4, sft_weight=3.0)
    assert [row["loss"] for row in got] == pytest.approx(losses, rel=1e-4)
    assert [row["sft_loss"] for row in got] == pytest.approx(terms, rel=1e-4)
    # control: without the term, or with another weight, the steps differ
    for other in (0.0, 1.0):
        assert [row["loss"] for row in got] != pytest.approx(oracle(played, 0, 4, other)[0], 1e-4)
    stage("train", zero, "--iter", 0, "--sft-weight", 0)
    assert weights(zero / "iter0") == weights(played / "iter0")
    assert "sft_loss" not in metrics(zero / "iter0")[0]
    # continued SFT beside it takes no notice
    for at in (run, zero):
        stage("train", at, "--iter", 0, "--objective", "sft", "--sft-weight", 3 * (at == run))
    assert weights(run / "sft" / "iter0") == weights(zero / "sft" / "iter0")


def test_the_sft_term_is_the_same_on_two_ranks(played, tmp_path):
    one, two = (fresh(played, tmp_path / name) for name in ("one", "two"))
    flags = ("--iter", 0, "--sft-weight", 3)
    stage("train", one, *flags)
    code, err = on_ranks(2, lambda: stage("train", two, *flags), tmp_path)
    assert code == 0, err
    for a, b in zip(metrics(one / "iter0"), metrics(two / "iter0"), strict=True):
        for key in ("loss", "sft_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.parametrize(
    "ranks, flags", [(2, []), (2, ["--offload"]), (4, ["--replicas", "2", "--recompute"])]
)
def test_any_number_of_ranks_gives_losses_and_model_of_one_process(played, tmp_path, ranks, flags):
    run = fresh(played, tmp_path / "run")
    code, err = on_ranks(ranks, lambda: stage("train", run, "--iter", 0, *flags), tmp_path)
    assert code == 0, err
    for a, b in zip(metrics(played / "iter0"), metrics(run / "iter0"), strict=True):
        for key in ("loss", "grad_norm", "length_real", "length_generated", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert distance(run / "iter0", played / "iter0") < 1e-3 * moved(played)


def distance(a, b, name="model"):
    """The Euclidean distance between two exported models."""
    a = load_file(a / "model" / "model.safetensors")
    b = load_file(b / name / "model.safetensors")
    return math.sqrt(sum(((a[k] - b[k]) ** 2).sum().item() for k in a))


def moved(played):
    """How far iteration 0 moved the weights."""
    return distance(played / "iter0", THETA0.parent, "theta0")


# ---- resume --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed(*args):
    raise Killed


MOMENTS = {
    "step": (train, "clip_gradients"),
    "checkpoint": (checkpoint, "save_checkpoint"),
    "export": (train, "export"),
}


def die_at(moment, monkeypatch):
    """Let train.py die in its third step, while it writes its second checkpoint, or in the export:
    moment is "step 3", "checkpoint 2" or "export 1"."""
    what, _, number = moment.partition(" ")
    real, calls = getattr(*MOMENTS[what]), []

    def dying(*args):
        calls.append(1)
        if len(calls) < int(number):
            return real(*args)
        if what == "checkpoint":  # begun, not finished
            (args[0].folder / "checkpoint" / f"{args[1]}.part").mkdir(parents=True)
        if what == "export":
            args[2].with_name("model.part").mkdir()
        raise Killed

    monkeypatch.setattr(*MOMENTS[what], dying)


@pytest.mark.parametrize("moment", ["step 3", "checkpoint 2", "export 1"])
def test_a_killed_iteration_resumes_to_the_same_bytes(played, tmp_path, monkeypatch, moment):
    run = fresh(played, tmp_path, (0, 1))
    die_at(moment, monkeypatch)
    with pytest.raises(Killed):
        stage("train", run, "--iter", 1)
    assert not (run / "iter1" / "model").exists() and (run / "iter1" / "checkpoint").is_dir()
    monkeypatch.undo()
    stage("train", run, "--iter", 1)
    assert weights(run / "iter1") == weights(played / "iter1")
    rows = metrics(run / "iter1")
    undisturbed = metrics(played / "iter1")
    for row in (*rows, *undisturbed):
        del row["tokens_per_s"]
    assert rows == undisturbed
    assert not (run / "iter1" / "checkpoint").exists()


def test_a_run_begun_on_two_ranks_goes_on_with_one(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    save = checkpoint.save_checkpoint

    def dying(iteration, step, *args):
        save(iteration, step, *args)
        if step == 4:
            os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", dying)
        assert on_ranks(2, lambda: stage("train", run, "--iter", 0), tmp_path)[0] == 9
    assert (run / "iter0" / "checkpoint" / "4").is_dir() and len(metrics(run / "iter0")) == 4
    stage("train", run, "--iter", 0)
    one = metrics(played / "iter0")
    both = metrics(run / "iter0")
    assert [r["loss"] for r in both] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert distance(run / "iter0", played / "iter0") < 0.02 * moved(played)


def test_the_opponents_scores_are_used_again_for_their_pairs_only(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path / "run")
    calls = []
    real = train.score_opponent

    def counted(*args):
        calls.append(1)
        return real(*args)

    def scored():
        """How often train.py asks the opponent, before it would take its steps."""
        calls.clear()
        with pytest.raises(Killed):
            stage("train", run, "--iter", 0)
        return len(calls)

    monkeypatch.setattr(train, "score_opponent", counted)
    monkeypatch.setattr(train, "train", killed)
    assert scored() == 1 and scored() == 0  # the second time the file is read
    rows = list(read_jsonl(run / "iter0" / "generated.jsonl"))
    write_jsonl(run / "iter0" / "generated.jsonl", rows[:-1])
    (run / "prompts.json").unlink()  # which would notice
    assert scored() == 1
    (run / "iter0" / "made_from.json").unlink()  # no record says whose scores these are
    assert scored() == 1


def test_a_checkpoint_of_other_pairs_is_refused(played, tmp_path, monkeypatch, refused):
    run = fresh(played, tmp_path)
    die_at("step 3", monkeypatch)
    with pytest.raises(Killed):
        stage("train", run, "--iter", 0)
    rows = list(read_jsonl(run / "iter0" / "generated.jsonl"))
    write_jsonl(run / "iter0" / "generated.jsonl", rows[:-1])
    (run / "prompts.json").unlink()  # which would have noticed first
    assert "other pairs" in refused(lambda: stage("train", run, "--iter", 0))


def test_warmup_and_decay_span_the_steps_that_are_taken():
    rates = [train.learning_rate(s, 20, 1.0, 0.1) for s in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0 * 18 / 19]
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert rates[-1] == pytest.approx(1 / 19)
    assert train.learning_rate(0, 20, 1.0, 0.0) == 1.0
    assert max(train.learning_rate(s, 7, 1.0, 1.0) for s in range(7)) == 1.0


# ---- the baseline, memory, and pairs from elsewhere ----------------------------------------------


def test_the_sft_baseline_takes_the_same_steps_on_the_same_batches(played, tmp_path):
    run = fresh(played, tmp_path)
    stage("train", run, "--iter", 0, "--objective", "sft")
    spin = metrics(played / "iter0")
    sft = metrics(run / "sft" / "iter0")
    for a, b in zip(spin, sft, strict=True):
        assert all(a[key] == b[key] for key in ("step", "lr", "length_real"))
    # the second epoch's mean loss is lower than the first's, of batches of 12, 12, 12 and 4
    sums = [size * row["loss"] for size, row in zip((12, 12, 12, 4) * 2, sft, strict=True)]
    assert sft[0]["margin"] is None and sum(sums[4:]) < sum(sums[:4])
    # the first batch's loss is −log p_θ0(y|x), a sum over tokens
    recipe, _ = parse(MICRO)
    order = [r["id"] for r in read_jsonl(played / "iter0" / "generated.jsonl")]
    batch = [order[i] for i in batches(40, recipe, 0, 0)[0]]
    scores = {r["id"]: r["logp_real"] for r in read_jsonl(played / "iter0" / "opponent.jsonl")}
    wanted = -sum(scores[id] for id in batch) / 12
    assert sft[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not (run / "iter0" / "model").exists()


def test_another_runs_generated_jsonl_is_trained_on_with_its_ids_as_they_are(played, tmp_path):
    rows = list(read_jsonl(played / "iter0" / "generated.jsonl"))
    cut = next(row for row in rows if len(row["generated_ids"]) > 4)
    cut.update(generated_ids=cut["generated_ids"][:3], finish="length")
    run = fresh(played, tmp_path / "own")
    (run / "prompts.json").unlink()
    for path in (run / "iter0" / "generated.jsonl", tmp_path / "pairs.jsonl"):
        write_jsonl(path, rows)
    stage("train", run, "--iter", 0)
    stage("train", tmp_path / "other", "--iter", 0, "--pairs", tmp_path / "pairs.jsonl")
    own = weights(run / "iter0")
    assert weights(tmp_path / "other" / "iter0") == own != weights(played / "iter0")


def test_published_pairs_that_repeat_or_cannot_be_used_are_left_out_and_counted(tmp_path, capsys):
    texts = [("Twice tin", "tintin", "tin")] * 6
    texts += [("Twice amu", "", "x"), ("Twice amu", "amuamu", " "), ("Twice bel", "belbel", "b")]
    texts += [("Spell " + "tin" * 30, "a", "b")]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": x, "real": y, "generated": z} for x, y, z in texts])
    stage("train", tmp_path / "run", "--iter", 0, "--pairs", path)
    out = capsys.readouterr().out
    counts = "read: 10, duplicate pair: 5, empty prompt or response: 2, prompt too long: 1"
    assert counts in out and "trains on 2 pairs" in out
