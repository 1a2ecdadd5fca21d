"""generate.py and sample.py: y' ~ p_θt, the same bytes however the work is split."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO, THETA0, stage, torchrun
from transformers import GenerationConfig

import parallel
from data import decode, encode, read_jsonl
from loss import sequence_logps
from packing import pack
from sample import InverseCDF, sample, uniforms


def generated(run, t=0):
    return (run / f"iter{t}" / "generated.jsonl").read_bytes()


def test_two_ranks_write_the_same_bytes_as_one_process(played, tmp_path):
    done = torchrun(2, "generate.py", *MICRO, "--run", tmp_path, "--iter", "0")
    assert done.returncode == 0, done.stderr
    assert generated(tmp_path) == generated(played)


def test_a_rerun_samples_only_what_is_missing_and_ends_with_the_same_bytes(played, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    import generate
    real, calls = generate.answer, []

    def dies_in_the_second_chunk(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*args)
    monkeypatch.setattr(generate, "answer", dies_in_the_second_chunk)
    with pytest.raises(Killed):
        stage("generate", tmp_path, "--iter", 0)
    assert not (tmp_path / "iter0" / "generated.jsonl").exists()
    stage("generate", tmp_path, "--iter", 0)
    assert len(calls) == 2 + 2  # three chunks of 16: the first was kept
    assert generated(tmp_path) == generated(played)


def test_running_again_does_nothing_and_says_so(played, capsys):
    before = (played / "iter0" / "generated.jsonl").stat().st_mtime_ns
    stage("generate", played, "--iter", 0)
    assert "nothing to do" in capsys.readouterr().out
    assert (played / "iter0" / "generated.jsonl").stat().st_mtime_ns == before


def test_a_part_of_another_run_is_refused(played, tmp_path, refused):
    part = tmp_path / "iter0" / "generated.part" / "000000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text('{"id": 1}\n')
    assert "000000.jsonl" in refused(lambda: stage("generate", tmp_path, "--iter", 0))


def test_ids_end_with_eos_exactly_when_the_answer_ended_by_itself(played, tokenizer):
    rows = list(read_jsonl(played / "iter0" / "generated.jsonl"))
    assert len(rows) == 40 and len({row["id"] for row in rows}) == 40
    for row in rows:
        ended = row["generated_ids"][-1] == tokenizer.eos_token_id
        assert row["generated_ids"].count(tokenizer.eos_token_id) == ended == (row["finish"] == "eos")
        assert row["generated"] == decode(tokenizer, "paper", row["generated_ids"])


def test_an_answer_cut_at_the_limit_has_no_eos(model, tokenizer):
    (ids, finish), = sample(model, [tokenizer("Spell tinab")["input_ids"]], tokenizer.eos_token_id, 2)
    assert finish == "length" and len(ids) == 2 and tokenizer.eos_token_id not in ids


def test_an_answer_depends_on_its_own_random_numbers_and_not_on_its_neighbours(model, tokenizer):
    prompts = [tokenizer(f"### Instruction: Spell {w}\n\n### Response:")["input_ids"] for w in ("tin", "rodak", "bel")]
    u = np.stack([uniforms(0, 0, i, number=20) for i in range(3)])
    together = sample(model, prompts, tokenizer.eos_token_id, 20, u)
    alone = [sample(model, [p], tokenizer.eos_token_id, 20, u[i:i + 1])[0] for i, p in enumerate(prompts)]
    assert together == alone


def test_random_numbers_differ_by_seed_iteration_and_prompt():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({tuple(uniforms(*key, number=3)) for key in keys}) == len(keys)
    assert (uniforms(0, 0, 0, number=5)[:3] == uniforms(0, 0, 0, number=3)).all()


def drawn(logits, temperature=1.0, top_p=1.0, n=20_000):
    """Counts of n draws from one row of logits."""
    u = torch.from_numpy(np.random.default_rng(0).random((n, 1)))
    scores = InverseCDF(u, 0, temperature, top_p)(torch.zeros(n, 0, dtype=torch.long), logits.expand(n, -1))
    return np.bincount(scores.argmax(-1).numpy(), minlength=logits.numel())


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def test_tokens_are_distributed_as_p_theta_by_a_chi_square_test():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    p, limit = logits.softmax(-1).numpy(), 31.3  # the 0.999 quantile with 11 degrees of freedom
    assert chi_square(drawn(logits), p) < limit
    assert chi_square(drawn(logits, temperature=0.7), p) > limit  # controls: another temperature, a nucleus, greedy
    assert chi_square(drawn(logits, top_p=0.9), p) > limit
    assert chi_square(np.eye(12)[logits.argmax()] * 20_000, p) > limit
    assert chi_square(drawn(logits, temperature=0.7), (logits / 0.7).softmax(-1).numpy()) < limit


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    for u in (0.0, 0.2689, 0.5, 1 - 2**-53):
        scores = InverseCDF(torch.tensor([[u]], dtype=torch.float64), 0, 1.0, 1.0)(torch.zeros(1, 0), logits[None])
        assert scores.argmax(-1).item() in (1, 3)


def test_whole_answers_occur_as_often_as_their_log_probs_say(model, tokenizer):
    """The sampler and train.py's scoring agree: over 4,000 answers, mean −log p(y') is the entropy the scores give."""
    ids = tokenizer("### Instruction: Spell tin\n\n### Response:")["input_ids"]
    ids = [tokenizer.bos_token_id] + ids if ids[0] != tokenizer.bos_token_id else ids
    n = 4000
    u = np.stack([uniforms(0, 0, i, number=24) for i in range(n)])
    answers = sample(model, [ids] * n, tokenizer.eos_token_id, 24, u)
    kinds = sorted({tuple(y) for y, _ in answers})
    with torch.no_grad():
        rows = [(ids + list(y), [0] * len(ids) + [1] * len(y)) for y in kinds]
        p = sequence_logps(model, *pack(rows, "cpu")).double().exp().numpy()
    counts = np.array([sum(tuple(y) == kind for y, _ in answers) for kind in kinds])
    often = p * n > 20
    assert often.sum() >= 4
    assert (np.abs(counts - n * p) < 4.5 * np.sqrt(n * p * (1 - p)))[often].all()
    assert not (np.abs(counts - n * p**2) < 4.5 * np.sqrt(n * p * (1 - p)))[often].all()  # control: temperature 1/2


def test_the_models_generation_config_is_not_asked(model, tokenizer):
    prompts = [tokenizer(f"### Instruction: Reverse {w}\n\n### Response:")["input_ids"] for w in ("tin", "rodak", "bel", "amu")]
    u = np.stack([uniforms(0, 0, i, number=24) for i in range(4)])
    plain = sample(model, prompts, tokenizer.eos_token_id, 24, u)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0,
                                               max_length=12, eos_token_id=7, suppress_tokens=[77])
    assert sample(model, prompts, tokenizer.eos_token_id, 24, u) == plain
    model.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=tokenizer.eos_token_id)
    ids = torch.tensor([prompts[0]])  # control: plain generate does ask it
    asked = model.generate(ids, max_new_tokens=24, do_sample=False)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    assert asked.tolist() != model.generate(ids, max_new_tokens=24, do_sample=False).tolist()


def test_greedy_answers_equal_plain_generate(model, tokenizer):
    prompts = [tokenizer(f"### Instruction: {p}\n\n### Response:")["input_ids"] for p in ("Reverse tin", "Larger of 12 and 74")]
    for prompt, (ids, _) in zip(prompts, sample(model, prompts, tokenizer.eos_token_id, 24)):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt):]
        assert ids == plain.tolist()


def test_iteration_one_samples_from_theta_1_and_not_from_theta_0(played, tmp_path):
    """The opponent of iteration t is what iteration t − 1 left; with θ_0 in its place the answers differ."""
    rows = list(read_jsonl(played / "iter1" / "generated.jsonl"))
    (tmp_path / "iter0").mkdir()
    shutil.copytree(played / "iter0" / "model", tmp_path / "iter0" / "model")
    stage("generate", tmp_path, "--iter", 1)
    assert generated(tmp_path, 1) == generated(played, 1)
    shutil.rmtree(tmp_path / "iter1")
    shutil.rmtree(tmp_path / "iter0" / "model")
    shutil.copytree(THETA0, tmp_path / "iter0" / "model")  # control
    stage("generate", tmp_path, "--iter", 1)
    assert list(read_jsonl(tmp_path / "iter1" / "generated.jsonl")) != rows


def test_a_head_larger_than_the_tokenizer_is_sampled_and_trained_as_it_is(tmp_path, model, tokenizer):
    """Qwen and Pythia pad their heads; a tail that is not dead is drawn from, and train.py takes what was drawn."""
    torch.manual_seed(0)
    model.resize_token_embeddings(120, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    flags = ["--iter", 0, "--model", tmp_path / "wide", "--temperature", 3]
    stage("generate", tmp_path / "run", *flags)
    drawn = {i for row in read_jsonl(tmp_path / "run" / "iter0" / "generated.jsonl") for i in row["generated_ids"]}
    assert max(drawn) >= len(tokenizer)
    stage("train", tmp_path / "run", *flags)
    assert (tmp_path / "run" / "iter0" / "model").is_dir()


def test_the_stage_samples_with_the_temperature_and_nucleus_that_it_was_given(played, tmp_path, model, tokenizer):
    plain = {row["id"]: row["generated_ids"] for row in read_jsonl(played / "iter0" / "generated.jsonl")}
    for name, flags in (("greedy", ["--temperature", 0]), ("nucleus", ["--top-p", 1e-6])):
        stage("generate", tmp_path / name, "--iter", 0, *flags)
        rows = list(read_jsonl(tmp_path / name / "iter0" / "generated.jsonl"))
        prompts = [encode(tokenizer, "paper", row)[0] for row in rows]
        greedy = [ids for ids, _ in sample(model, prompts, tokenizer.eos_token_id, 24)]
        assert [row["generated_ids"] for row in rows] == greedy
        assert {row["id"]: row["generated_ids"] for row in rows} != plain  # control


def test_ranks_share_the_chunks(tmp_path, monkeypatch):
    """Two ranks, played one after the other: each chunk is sampled by one of them."""
    import generate
    taken = []
    real = generate.answer
    monkeypatch.setattr(generate, "answer", lambda model, tok, chunk, *rest: taken.append(chunk[0]["id"]) or real(model, tok, chunk, *rest))
    monkeypatch.setattr(generate, "read_jsonl", lambda path: iter(()))  # rank 0 is not there to merge
    join = parallel.join

    @contextlib.contextmanager
    def second_of_two():
        with join() as world:
            yield parallel.World(1, 2, world.device)
    monkeypatch.setattr(parallel, "join", second_of_two)
    stage("generate", tmp_path, "--iter", 0)
    assert len(taken) == 1  # of three chunks, the second


def test_the_opponents_compute_dtype_is_fp32_on_the_cpu():
    assert parallel.compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert parallel.compute_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert json.loads((THETA0 / "config.json").read_text())["dtype"] == "float32"
