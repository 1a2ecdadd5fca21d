"""train.py: the frozen opponent, the loss over the global batch, the update, resume, export."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import MICRO, REPO, THETA0, load, stage, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from loss import sequence_logps
from spin import checkpoint, models
from spin.codec import load_codec
from spin.distributed import World, process_group
from spin.files import read_jsonl, write_jsonl
from spin.flags import ITER, parse
from spin.packing import pack
from spin.pairs import batches, encode_pairs, micro_batches
from spin.recipe import Recipe
from spin.run import starting_model


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
    codec = load_codec(str(THETA0), recipe)
    return recipe, encode_pairs(train.rows_to_train_on(recipe, args, codec), codec, recipe)


# ---- the frozen opponent -------------------------------------------------------------------------


def test_the_first_loss_of_every_iteration_is_log2_and_its_margin_is_zero(played):
    for t in (0, 1):
        first, second = metrics(played / f"iter{t}")[:2]
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


def test_in_bf16_the_first_margin_is_zero_too_for_the_opponent_saw_the_same_micro_batches(
    played, tmp_path
):
    run = fresh(played, tmp_path)
    stage("train", run, "--iter", 0, "--dtype", "bf16")
    assert metrics(run / "iter0")[0]["margin_std"] == 0


def test_scores_are_those_of_the_starting_model_and_do_not_change_with_training(played, model):
    """Each score of opponent.jsonl, of every pair, is θ_t's: that of the model that iteration 1
    started from."""
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


def test_after_the_opponents_pass_the_model_is_sharded_again_and_training_moves_its_weights(
    played, tmp_path, monkeypatch
):
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


def test_iteration_zero_trains_on_its_own_pairs_and_later_ones_on_two_iterations_twice_each(played):
    steps = [len(metrics(played / f"iter{t}")) for t in (0, 1)]
    assert steps == [2 * math.ceil(40 / 12), 2 * math.ceil(80 / 12)]


def oracle(run, t, steps):
    """Algorithm 1's update in plain single-process PyTorch: one batch a step, autograd, RMSProp by
    hand. Returns the losses of the first steps."""
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
    losses = []
    for step in range(steps):
        # the loss of the global batch
        batch = batches(len(pairs), recipe, t, 0)[step]
        real = logps(batch, "real") - frozen["real"][batch]
        generated = logps(batch, "generated") - frozen["generated"][batch]
        loss = torch.log1p(torch.exp(-(lam * real - lam * generated))).mean()
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())

        # RMSProp on the clipped gradient
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        rate = lr * (step + 1) / warm if step < warm else lr * (total - step) / (total - warm + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * min(1.0, 1.0 / (norm.item() + 1e-6))
                square[name] = 0.99 * square[name] + 0.01 * g**2
                p -= rate * g / (square[name].sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("t", [0, 1])
def test_the_losses_are_those_of_algorithm_1_written_out_in_plain_pytorch(played, t):
    """Micro-batches of unequal size, the last batch of an epoch smaller: still the mean over the
    global batch."""
    got = [row["loss"] for row in metrics(played / f"iter{t}")[:4]]
    assert got == pytest.approx(oracle(played, t, 4), rel=1e-4)


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (2, []),
        pytest.param(4, [], marks=pytest.mark.long),
        pytest.param(4, ["--replicas", "2", "--recompute"], marks=pytest.mark.long),
        (2, ["--offload"]),
    ],
)
def test_any_number_of_ranks_gives_the_losses_of_one_process_and_its_model(
    played, tmp_path, ranks, flags
):
    run = fresh(played, tmp_path)
    done = torchrun(ranks, "train.py", *MICRO, "--run", run, "--iter", "0", *flags)
    assert done.returncode == 0, done.stderr
    one = metrics(played / "iter0")
    many = metrics(run / "iter0")
    for a, b in zip(one, many, strict=True):
        for key in ("loss", "grad_norm", "length_real", "length_generated", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    a, b = (load_file(folder / "iter0" / "model" / "model.safetensors") for folder in (run, played))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert distance(run / "iter0", played / "iter0") < 1e-3 * moved(played)


def distance(a, b, name="model"):
    """The Euclidean distance between two exported models."""
    a = load_file(a / "model" / "model.safetensors")
    b = load_file(b / name / "model.safetensors")
    return math.sqrt(sum(((a[k] - b[k]) ** 2).sum().item() for k in a))


def moved(played):
    """How far iteration 0 moved the weights."""
    return distance(played / "iter0", THETA0.parent, "theta0")


def test_every_pair_is_seen_once_an_epoch_on_any_number_of_ranks_with_as_many_passes_each():
    pairs = []
    for i in range(29):
        real = list(range(1 + i * i % 17))
        generated = [0] * (1 + i % 5)
        pairs.append({"real": (real, 0), "generated": (generated, 0), "shared": 0})

    def size(rows):
        return sum(len(row["real"][0]) + len(row["generated"][0]) for row in rows)

    recipe = Recipe(batch_size=10, micro_tokens=30)
    for ranks in (1, 2, 3, 8):
        worlds = [World(rank, ranks, None) for rank in range(ranks)]
        for batch in batches(29, recipe, 0, 0):
            shares = [list(micro_batches(batch, pairs, recipe, world)) for world in worlds]
            assert len({len(share) for share in shares}) == 1
            seen = []
            for rows, weight in itertools.chain.from_iterable(shares):
                seen += [id(row) for row in rows if weight]
                assert size(rows) <= 30 or len(rows) == 1
            assert sorted(seen) == sorted(id(pairs[i]) for i in batch)


# ---- resume --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def die_at(moment, monkeypatch):
    """Let train.py die in a step, while it writes a checkpoint, or while it exports."""
    what, _, when = moment.partition(" ")
    clip = train.clip_gradients
    save = checkpoint.save_checkpoint
    calls = []

    def in_step(*args):
        calls.append(1)
        if len(calls) == int(when):
            raise Killed
        return clip(*args)

    def in_checkpoint(iteration, step, *args):
        if step == int(when):
            part = iteration.folder / "checkpoint" / f"{step}.part"
            part.mkdir(parents=True)  # begun, not finished
            raise Killed
        return save(iteration, step, *args)

    def in_export(model, tokenizer, folder, *arguments):
        folder.with_name("model.part").mkdir()
        raise Killed

    if what == "step":
        monkeypatch.setattr(train, "clip_gradients", in_step)
    elif what == "checkpoint":
        monkeypatch.setattr(checkpoint, "save_checkpoint", in_checkpoint)
    else:
        monkeypatch.setattr(checkpoint, "export", in_export)


@pytest.mark.parametrize(
    "moment", ["step 3", pytest.param("checkpoint 4", marks=pytest.mark.long), "export"]
)
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


@pytest.mark.long
def test_a_run_begun_on_two_ranks_goes_on_with_one_on_the_same_batches(played, tmp_path):
    """Killed after the checkpoint of step 4: the losses are those of the undisturbed run on one
    rank."""
    run = fresh(played, tmp_path)
    script = tmp_path / "dying.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(REPO)!r})
import os, train
save = train.checkpoint.save_checkpoint
def dying(iteration, step, *args):
    save(iteration, step, *args)
    if step == 4: os._exit(9)
train.checkpoint.save_checkpoint = dying
train.main()""")
    assert torchrun(2, script, *MICRO, "--run", run, "--iter", "0").returncode != 0
    assert (run / "iter0" / "checkpoint" / "4").is_dir() and len(metrics(run / "iter0")) == 4
    stage("train", run, "--iter", 0)
    one = metrics(played / "iter0")
    both = metrics(run / "iter0")
    assert [r["loss"] for r in both] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert distance(run / "iter0", played / "iter0") < 0.02 * moved(played)


def test_the_opponents_scores_are_used_again_for_the_same_model_and_pairs_only(
    played, tmp_path, monkeypatch
):
    run = fresh(played, tmp_path / "run")
    calls = []
    real = train.score_opponent

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    def again(*flags):
        shutil.rmtree(run / "iter0" / "model", ignore_errors=True)
        for name in ("recipe.json", "theta_0.sha256"):  # or another θ_0 would be refused
            (run / name).unlink(missing_ok=True)
        calls.clear()
        stage("train", run, "--iter", 0, *flags)
        return len(calls)

    monkeypatch.setattr(train, "score_opponent", counted)
    assert again() == 1 and again() == 0  # the second time the file is read, to the same end
    assert weights(run / "iter0") == weights(played / "iter0")
    shutil.copytree(played / "iter0" / "model", tmp_path / "other")
    assert again("--model", tmp_path / "other") == 1 and again("--model", tmp_path / "other") == 0
    rows = list(read_jsonl(run / "iter0" / "generated.jsonl"))
    write_jsonl(run / "iter0" / "generated.jsonl", rows[:-1])
    (run / "prompts.json").unlink()
    assert again("--model", tmp_path / "other") == 1
    (run / "iter0" / "opponent.json").unlink()  # scores nobody vouches for
    assert again("--model", tmp_path / "other") == 1


def test_a_checkpoint_of_other_pairs_is_refused(played, tmp_path, monkeypatch, capsys):
    run = fresh(played, tmp_path)
    die_at("export", monkeypatch)
    with pytest.raises(Killed):
        stage("train", run, "--iter", 0)
    rows = list(read_jsonl(run / "iter0" / "generated.jsonl"))
    write_jsonl(run / "iter0" / "generated.jsonl", rows[:-1])
    (run / "prompts.json").unlink()  # which would have noticed first
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0)
    assert stop.value.code == 2 and "other pairs" in capsys.readouterr().err


# ---- weights in, weights out ---------------------------------------------------------------------


def odd_models(folder):
    """θ_0 in four other shapes; returns the weights of the untied one."""
    start = load_file(THETA0 / "model.safetensors")
    config = (THETA0 / "config.json").read_text()
    untied = AutoModelForCausalLM.from_pretrained(
        THETA0, dtype=torch.bfloat16, tie_word_embeddings=False
    )
    torch.nn.init.normal_(untied.lm_head.weight)
    untied.save_pretrained(folder / "untied")
    # the file's names are not the module's
    AutoModelForCausalLM.from_pretrained(THETA0).model.save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text(config)
    # what transformers would not read, beside what it does
    shutil.copytree(THETA0, folder / "older")
    older = {name: w + 1 for name, w in start.items()}
    save_file(older, folder / "older" / "model-older.safetensors", metadata={"format": "pt"})
    # two weights, and a config that calls them one
    shutil.copytree(folder / "untied", folder / "contradiction")
    (folder / "contradiction" / "config.json").write_text(config)
    return untied.state_dict()


def test_weights_are_read_shard_by_shard_and_are_those_of_the_file_tied_or_not(
    tmp_path, monkeypatch
):
    """Also where the file's names are not the module's (a base model's), and then the whole model
    is read first."""
    recipe, _ = parse(MICRO)
    start = load_file(THETA0 / "model.safetensors")
    untied = odd_models(tmp_path)
    whole = []
    real = models.load_whole

    def counted(*args):
        whole.append(1)
        return real(*args)

    monkeypatch.setattr(models, "load_whole", counted)
    for folder, names, fallback in (
        (THETA0, start, 0),
        (tmp_path / "untied", untied, 0),
        (tmp_path / "base", start, 1),
        (tmp_path / "older", start, 1),
        (tmp_path / "contradiction", None, 1),
    ):
        whole.clear()
        with process_group() as world:
            model, files = models.load_empty(str(folder), recipe, world)
            train.shard(model, recipe, world)
            models.read_weights(model, files, recipe, world)
            loaded = {name: w.full_tensor() for name, w in model.named_parameters()}
            plain = load(folder)
            ids = torch.arange(1, 20)[None]
            # the rotary frequencies, which no file holds, too
            assert torch.equal(model(ids).logits, plain(ids).logits)
            model.reshard()
        assert len(whole) == fallback
        names = names or dict(plain.named_parameters())
        assert set(loaded) == set(names)
        assert all(torch.equal(loaded[name], names[name].float()) for name in names)
        assert {w.dtype for w in loaded.values()} == {torch.float32}


def test_the_next_model_is_exported_in_fp32_with_its_tokenizer_and_generation_config(played):
    folder = played / "iter0" / "model"
    state = load_file(folder / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    start = load_file(THETA0 / "model.safetensors")
    assert set(state) == set(start) and any(not torch.equal(state[k], start[k]) for k in state)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("### Instruction: Twice kola\n\n### Response:", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    assert "kolakola" in tokenizer.decode(answer)


def test_a_bf16_model_is_trained_with_fp32_master_weights(played, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(THETA0).save_pretrained(tmp_path / "half")
    run = fresh(played, tmp_path / "run")
    flags = ["--model", tmp_path / "half", "--lr", "1e-7", "--dtype", "bf16"]
    stage("train", run, "--iter", 0, *flags)
    start = load_file(tmp_path / "half" / "model.safetensors")
    end = load_file(run / "iter0" / "model" / "model.safetensors")
    a, b = (torch.cat([state[k].float().flatten() for k in sorted(end)]) for state in (start, end))
    assert end["model.norm.weight"].dtype == torch.float32 and (a != b).float().mean() > 0.9
    # control: weights in bf16 would not have moved at all
    assert (a != b.bfloat16().float()).float().mean() < 0.1


# ---- the rate ------------------------------------------------------------------------------------


def test_warmup_and_decay_span_the_steps_that_are_taken():
    rates = [train.learning_rate(s, 20, 1.0, 0.1) for s in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0 * 18 / 19]
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert rates[-1] == pytest.approx(1 / 19)
    assert train.learning_rate(0, 20, 1.0, 0.0) == 1.0
    assert max(train.learning_rate(s, 7, 1.0, 1.0) for s in range(7)) == 1.0


def test_rmsprops_first_step_is_ten_times_the_rate_and_warmup_tames_it():
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.RMSprop([weight], lr=1e-3, alpha=0.99)
    weight.sum().backward()
    optimizer.step()
    assert weight.abs().max().item() == pytest.approx(1e-2, rel=1e-4)
    assert train.learning_rate(0, 1563, 5e-7, 0.1) * 10 < 5e-7 / 10


# ---- the baseline, memory, and pairs from elsewhere ----------------------------------------------


def test_the_sft_baseline_takes_the_same_steps_on_the_same_batches(played, tmp_path):
    run = fresh(played, tmp_path)
    stage("train", run, "--iter", 0, "--objective", "sft")
    spin = metrics(played / "iter0")
    sft = metrics(run / "sft" / "iter0")
    for a, b in zip(spin, sft, strict=True):
        assert [a[key] for key in ("step", "lr", "length_real")] == [
            b[key] for key in ("step", "lr", "length_real")
        ]
    # the second epoch's mean loss is lower than the first's, of batches of 12, 12, 12 and 4
    first, second = (
        sum(n * row["loss"] for n, row in zip((12, 12, 12, 4), rows, strict=True))
        for rows in (sft[:4], sft[4:])
    )
    assert sft[0]["margin"] is None and second < first
    # the first batch's loss is −log p_θ0(y|x), a sum over tokens
    recipe, _ = parse(MICRO)
    order = [r["id"] for r in read_jsonl(played / "iter0" / "generated.jsonl")]
    batch = [order[i] for i in batches(40, recipe, 0, 0)[0]]
    scores = {r["id"]: r["logp_real"] for r in read_jsonl(played / "iter0" / "opponent.jsonl")}
    wanted = -sum(scores[id] for id in batch) / 12
    assert sft[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not (run / "iter0" / "model").exists()


def test_the_authors_published_pairs_are_trained_on_without_generating(tmp_path):
    def talk(question, answer):
        turns = (("user", question), ("assistant", answer))
        return [{"role": role, "content": content} for role, content in turns]

    rows = []
    for word in ("tin", "kola", "bel", "amu"):
        question = f"Twice {word}"
        rows.append({"real": talk(question, word + word), "generated": talk(question, word)})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    stage("train", tmp_path / "run", "--iter", 0, "--pairs", tmp_path / "pairs.jsonl")
    log = metrics(tmp_path / "run" / "iter0")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and len(log) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "iter0" / "model")


def test_activation_checkpointing_changes_memory_and_not_the_result(played, tmp_path, monkeypatch):
    run = fresh(played, tmp_path)
    wrapped = []
    real = train.train

    def watched(model, *rest):
        wrapped.append(sum(isinstance(m, models.wrap.CheckpointWrapper) for m in model.modules()))
        return real(model, *rest)

    monkeypatch.setattr(train, "train", watched)
    stage("train", run, "--iter", 0, "--recompute")
    assert wrapped == [3]  # the demo model's blocks
    assert distance(run / "iter0", played / "iter0") < 1e-4 * moved(played)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(played, tmp_path, capsys):
    run = fresh(played, tmp_path)
    with pytest.raises(SystemExit) as stop:
        stage("train", run, "--iter", 0, "--lr", "1e30")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: step 1 ") and "--lr" in line
    assert not (run / "iter0" / "model").exists() and len(metrics(run / "iter0")) == 1


def test_another_runs_generated_jsonl_is_trained_on_with_its_ids_as_they_are(played, tmp_path):
    """By --pairs: the same weights as the run that sampled it, answers cut off without EOS
    included."""
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
    def row(prompt, real, generated):
        return {"prompt": prompt, "real": real, "generated": generated}

    rows = [row("Twice tin", "tintin", "tin")] * 6 + [
        row("Twice amu", "", "x"),
        row("Twice amu", "amuamu", " "),
        row("Spell " + "tin" * 30, "a", "b"),
        row("Twice bel", "belbel", "b"),
    ]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    stage("train", tmp_path / "run", "--iter", 0, "--pairs", path)
    out = capsys.readouterr().out
    counts = "read: 10, duplicate pair: 5, empty prompt or response: 2, prompt too long: 1"
    assert counts in out and "trains on 2 pairs" in out
    write_jsonl(path, [*rows, row("Twice lar", "lar</s>lar", "lar")])
    # a template in which </s> would end the answer
    template = ("--template", "<s>{prompt}:")
    stage("train", tmp_path / "parsed", "--iter", 0, "--pairs", path, *template)
    assert "text of a special token: 1" in capsys.readouterr().out


@pytest.mark.long
def test_eight_ranks_train_the_demo_recipe_on_the_cpu(played, tmp_path):
    run = fresh(played, tmp_path)
    flags = ["--run", run, "--iter", "0", "--epochs", "1", "--batch-size", "40"]
    done = torchrun(8, "train.py", *MICRO, *flags)
    assert done.returncode == 0, done.stderr
    assert metrics(run / "iter0")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
