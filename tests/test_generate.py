"""generate.py and sampling.py: y' ~ p_θt, the same bytes however the work is split."""

import collections
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import MICRO, THETA0, shell, stage, torchrun
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, TopKLogitsWarper

import generate
from loss import sequence_logps
from spin import distributed, sampling
from spin.data import decode, encode, read_generated, read_jsonl, write_jsonl
from spin.packing import pack
from spin.sampling import uniforms


def generated(run, t=0):
    return (run / f"iter{t}" / "generated.jsonl").read_bytes()


def test_two_ranks_write_the_same_bytes_as_one_process(played, tmp_path):
    done = torchrun(2, "generate.py", *MICRO, "--run", tmp_path, "--iter", "0")
    assert done.returncode == 0, done.stderr
    assert generated(tmp_path) == generated(played)


def test_a_rerun_samples_only_what_is_missing_and_ends_with_the_same_bytes(
    played, tmp_path, monkeypatch
):
    class Killed(Exception):
        pass

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


def test_killed_at_random_moments_with_one_rank_and_two_the_file_ends_with_the_same_bytes():
    """The long form, with 20 kills, is the script's default."""
    done = shell(
        sys.executable,
        "benchmarks/kill_generate.py",
        "--kills",
        "2",
        "--prompts",
        "512",
        "--chunk",
        "4",
    )
    assert done.returncode == 0 and "512 different prompts of 512; the same bytes" in done.stdout, (
        done.stdout + done.stderr
    )


def test_the_paged_engine_draws_anew_in_each_chunk_and_writes_rows_that_training_takes(
    tmp_path, played, tokenizer
):
    stage("generate", tmp_path, "--iter", 0, "--engine", "paged")
    rows = list(read_jsonl(tmp_path / "iter0" / "generated.jsonl"))
    assert (
        list(read_generated(tmp_path / "iter0" / "generated.jsonl", 0, 88, tokenizer.eos_token_id))
        == rows
    )
    plain = list(read_jsonl(played / "iter0" / "generated.jsonl"))
    assert [(row["id"], row["prompt"]) for row in rows] == [
        (row["id"], row["prompt"]) for row in plain
    ]
    assert rows != plain  # the distribution, not the rows
    model = AutoModelForCausalLM.from_pretrained(THETA0, dtype=torch.float32)
    ids = [tokenizer("### Instruction: Spell tinab")["input_ids"]] * 30
    chunks = [
        sampling.paged(model, ids, tokenizer.eos_token_id, 24, uniforms(0, 0, k, number=24)[None])
        for k in (0, 1)
    ]
    assert chunks[0] != chunks[1]


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
        assert (
            row["generated_ids"].count(tokenizer.eos_token_id) == ended == (row["finish"] == "eos")
        )
        assert row["generated"] == decode(tokenizer, "paper", row["generated_ids"])


def test_an_answer_cut_at_the_limit_has_no_eos(model, tokenizer):
    ((ids, finish),) = sampling.sample(
        model, [tokenizer("Spell tinab")["input_ids"]], tokenizer.eos_token_id, 2
    )
    assert finish == "length" and len(ids) == 2 and tokenizer.eos_token_id not in ids


def unequal(tokenizer, n):
    """n prompts, of 1 to 60 tokens, in no order."""
    text = "### Instruction: Spell tin ### Response: Sort 1 0 4 Larger of 12 and 93 um, 81"
    ids = tokenizer(text * 2)["input_ids"]
    return [ids[k % 7 : k % 7 + 1 + 37 * k % 60] for k in range(n)]


def test_an_answer_depends_on_its_own_random_numbers_and_not_on_its_neighbours(model, tokenizer):
    """Whatever the slots, the refills and the order: the same answers."""
    prompts, eos = unequal(tokenizer, 40), tokenizer.eos_token_id
    u = np.stack([uniforms(0, 0, i, number=8) for i in range(40)])
    alone = [sampling.sample(model, [p], eos, 8, u[i : i + 1])[0] for i, p in enumerate(prompts)]
    assert {finish for _, finish in alone} == {"eos", "length"}
    for slots in (1, 3, 17, 64):
        assert sampling.sample(model, prompts, eos, 8, u, slots=slots) == alone
    assert sampling.sample(model, prompts[::-1], eos, 8, u[::-1].copy(), slots=5) == alone[::-1]
    assert sampling.sample(model, prompts, eos, 8, u[::-1].copy(), slots=5) != alone  # control


def test_the_sampler_and_the_scoring_of_training_see_the_same_probabilities(
    model, tokenizer, monkeypatch
):
    """log p(y'|x) summed over what the sampler saw, refills and all, is loss.sequence_logps of its answers."""
    prompts, seen, choose = unequal(tokenizer, 30), {}, sampling.choose

    def spy(logits, u, *rest):
        token = choose(logits, u, *rest)
        seen.update(
            zip(u.tolist(), logits.log_softmax(-1).gather(1, token[:, None])[:, 0].tolist())
        )
        return token

    monkeypatch.setattr(sampling, "choose", spy)
    u = np.stack([uniforms(0, 0, i, number=24) for i in range(30)])
    answers = sampling.sample(model, prompts, tokenizer.eos_token_id, 24, u, slots=7)
    told = torch.tensor([sum(seen[x] for x in row[: len(y)]) for row, (y, _) in zip(u, answers)])
    rows = [(p + y, [0] * len(p) + [1] * len(y)) for p, (y, _) in zip(prompts, answers)]
    with torch.no_grad():
        assert torch.allclose(told, sequence_logps(model, *pack(rows, "cpu")), atol=1e-4, rtol=1e-5)
        other = sequence_logps(
            model, *pack([([ids[0] ^ 1] + ids[1:], mask) for ids, mask in rows], "cpu")
        )
    assert (told - other).abs().mean() > 0.1  # control: one other token in the prompt


def test_random_numbers_differ_by_seed_iteration_and_prompt():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({tuple(uniforms(*key, number=3)) for key in keys}) == len(keys)
    assert (uniforms(0, 0, 0, number=5)[:3] == uniforms(0, 0, 0, number=3)).all()


def tiny(name, **knobs):
    """A random model of an architecture; large weights, so that what it says depends on all that it has read."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **knobs,
    )
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if name == "gemma2" else None
    ).eval()


def drawn(engine, n=20_000, **knobs):
    """Counts of the first token of n answers to one prompt, and its probabilities."""
    model, prompt = tiny("llama"), [1, 9, 5]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 4).softmax(-1).double().numpy()
    model.lm_head.weight.data /= 4  # flat enough for every token to be drawn
    u = np.random.default_rng(0).random((n, 1))
    answers = engine(model, [prompt] * n, 2, 1, **{"u": u, "slots": 500, **knobs})
    return np.bincount([ids[0] for ids, _ in answers], minlength=40), p


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("engine, n", [(sampling.sample, 20_000), (sampling.paged, 2_000)])
def test_tokens_are_distributed_as_p_theta_by_a_chi_square_test(engine, n, monkeypatch):
    limit = 72.1  # the 0.999 quantile with 39 degrees of freedom
    counts, p = drawn(engine, n)
    assert (n * p).min() > 1 and chi_square(counts, p) < limit
    cold = p ** (1 / 0.7) / (p ** (1 / 0.7)).sum()
    counts, _ = drawn(engine, n, temperature=0.7)
    assert (
        chi_square(counts, cold) < limit < chi_square(counts, p)
    )  # controls: another temperature, greedy, a nucleus, top-k
    assert chi_square(drawn(engine, n, temperature=0)[0], p) > limit
    assert chi_square(drawn(engine, n, top_p=0.9)[0], p) > limit
    if engine is sampling.sample:
        choose = sampling.choose
        monkeypatch.setattr(
            sampling,
            "choose",
            lambda logits, *rest: choose(TopKLogitsWarper(20)(None, logits), *rest),
        )
        assert chi_square(drawn(engine, n)[0], p) > limit


def test_a_token_of_probability_zero_is_never_drawn():
    for scale in range(8):
        logits = torch.tensor([-torch.inf, scale / 7, -torch.inf, 1.0, -torch.inf])
        for u in (0.0, 0.2689, 0.5, 1 - 2**-53):
            assert sampling.choose(logits[None], torch.tensor([u], dtype=torch.float64)).item() in (
                1,
                3,
            )


def test_whole_answers_occur_as_often_as_their_log_probs_say(model, tokenizer):
    """The sampler and train.py's scoring agree: over 4,000 answers, mean −log p(y') is the entropy the scores give."""
    ids = tokenizer("### Instruction: Spell tin\n\n### Response:")["input_ids"]
    ids = [tokenizer.bos_token_id] + ids if ids[0] != tokenizer.bos_token_id else ids
    n = 4000
    u = np.stack([uniforms(0, 0, i, number=24) for i in range(n)])
    answers = sampling.sample(model, [ids] * n, tokenizer.eos_token_id, 24, u)
    kinds = sorted({tuple(y) for y, _ in answers})
    with torch.no_grad():
        rows = [(ids + list(y), [0] * len(ids) + [1] * len(y)) for y in kinds]
        p = sequence_logps(model, *pack(rows, "cpu")).double().exp().numpy()
    counts = np.array([sum(tuple(y) == kind for y, _ in answers) for kind in kinds])
    often = p * n > 20
    assert often.sum() >= 4
    assert (np.abs(counts - n * p) < 4.5 * np.sqrt(n * p * (1 - p)))[often].all()
    assert not (np.abs(counts - n * p**2) < 4.5 * np.sqrt(n * p * (1 - p)))[
        often
    ].all()  # control: temperature 1/2


def test_the_models_generation_config_is_not_asked(model, tokenizer):
    prompts = [
        tokenizer(f"### Instruction: Reverse {w}\n\n### Response:")["input_ids"]
        for w in ("tin", "rodak", "bel", "amu")
    ]
    u = np.stack([uniforms(0, 0, i, number=24) for i in range(4)])
    plain = sampling.sample(model, prompts, tokenizer.eos_token_id, 24, u)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        max_length=12,
        eos_token_id=7,
        suppress_tokens=[77],
    )
    assert sampling.sample(model, prompts, tokenizer.eos_token_id, 24, u) == plain
    assert sampling.paged(model, prompts, tokenizer.eos_token_id, 24) == sampling.sample(
        model, prompts, tokenizer.eos_token_id, 24
    )
    assert (
        len(
            {
                tuple(y)
                for y, _ in sampling.paged(model, prompts[:1] * 20, tokenizer.eos_token_id, 24, u)
            }
        )
        > 3
    )
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, eos_token_id=tokenizer.eos_token_id
    )
    ids = torch.tensor([prompts[0]])  # control: plain generate does ask it
    asked = model.generate(ids, max_new_tokens=24, do_sample=False)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    assert asked.tolist() != model.generate(ids, max_new_tokens=24, do_sample=False).tolist()


@pytest.mark.parametrize("engine", [sampling.sample, sampling.paged])
def test_greedy_answers_equal_plain_generate(engine, model, tokenizer):
    """Unequal prompts, more of them than slots, down to one slot; each against model.generate on that prompt alone."""
    prompts, eos = unequal(tokenizer, 30), tokenizer.eos_token_id
    alone = [
        model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert {len(y) for y in alone} > {24} and min(map(len, alone)) < 8
    for slots in (1, 4, 64):
        assert [ids for ids, _ in engine(model, prompts, eos, 24, slots=slots)] == alone


@pytest.mark.parametrize(
    "name, knobs, in_slots",
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("qwen3", {}, True),
        ("phi", {}, True),
        ("gpt_neox", {}, True),
        ("opt", {"ffn_dim": 48}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 20}, False),
        ("gemma2", {"sliding_window": 20}, False),
        ("gemma2", {"sliding_window": 64}, True),
        ("gemma3_text", {"sliding_window": 64}, True),
        ("gemma3_text", {"sliding_window": 20}, False),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ("bloom", {}, False),
        ("mamba", {}, False),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            False,
        ),
    ],
)
def test_every_architecture_answers_as_plain_generate_does(name, knobs, in_slots):
    """Where a layer forgets, or positions are no argument, the loop of our own is not taken."""
    model = tiny(name, **knobs)
    prompts = [[1] + [3 + (7 * k + i * i) % 37 for i in range(5 * k % 31)] for k in range(9)]
    assert sampling.keeps_every_key(model, 30 + 24) == in_slots
    plain = [
        model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, eos_token_id=7
    )  # which is not asked
    slots, u = 3 if in_slots else 1, np.random.default_rng(0).random((9, 24))
    assert [ids for ids, _ in sampling.sample(model, prompts, 2, 24, slots=slots)] == plain
    drawn = sampling.sample(model, prompts, 2, 24, u, slots=slots)
    assert drawn == [
        sampling.sample(model, [p], 2, 24, u[i : i + 1])[0] for i, p in enumerate(prompts)
    ]
    assert [ids for ids, _ in drawn] != plain


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


def test_a_head_larger_than_the_tokenizer_is_sampled_and_trained_as_it_is(
    tmp_path, model, tokenizer
):
    """Qwen and Pythia pad their heads; a tail that is not dead is drawn from, and train.py takes what was drawn."""
    torch.manual_seed(0)
    model.resize_token_embeddings(120, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    flags = ["--iter", 0, "--model", tmp_path / "wide", "--temperature", 3]
    stage("generate", tmp_path / "run", *flags)
    drawn = {
        i
        for row in read_jsonl(tmp_path / "run" / "iter0" / "generated.jsonl")
        for i in row["generated_ids"]
    }
    assert max(drawn) >= len(tokenizer)
    stage("train", tmp_path / "run", *flags)
    assert (tmp_path / "run" / "iter0" / "model").is_dir()


def test_the_stage_samples_with_the_temperature_and_nucleus_that_it_was_given(
    played, tmp_path, model, tokenizer
):
    plain = {
        row["id"]: row["generated_ids"] for row in read_jsonl(played / "iter0" / "generated.jsonl")
    }
    for name, flags in (("greedy", ["--temperature", 0]), ("nucleus", ["--top-p", 1e-6])):
        stage("generate", tmp_path / name, "--iter", 0, *flags)
        rows = list(read_jsonl(tmp_path / name / "iter0" / "generated.jsonl"))
        prompts = [encode(tokenizer, "paper", row)[0] for row in rows]
        greedy = [ids for ids, _ in sampling.sample(model, prompts, tokenizer.eos_token_id, 24)]
        assert [row["generated_ids"] for row in rows] == greedy
        assert {row["id"]: row["generated_ids"] for row in rows} != plain  # control


def test_each_chunk_goes_to_the_rank_that_asks_first(tmp_path, monkeypatch):
    """One rank of several, which gets the second chunk from the queue alone."""
    monkeypatch.setattr(distributed, "queue", lambda number: iter([1]))
    monkeypatch.setattr(
        generate,
        "merge",
        lambda parts, out: (
            [part.exists() for part in parts] == [False, True, False]
            and collections.Counter(eos=1)
            or pytest.fail()
        ),
    )
    stage("generate", tmp_path, "--iter", 0)


def test_parts_are_merged_by_id_line_by_line(tmp_path):
    """Also where a text holds a character that only str.splitlines takes for the end of a line."""
    parts = [tmp_path / "generated.part" / f"{k}.jsonl" for k in range(2)]
    parts[0].parent.mkdir()
    rows = [{"id": i, "generated": f"é{i}\u2028\x85"} for i in (30, 4, 111, 5)]
    for part, some in zip(parts, (rows[:3], rows[3:])):
        write_jsonl(part, some)
    generate.merge(parts, tmp_path / "generated.jsonl")
    assert list(read_jsonl(tmp_path / "generated.jsonl")) == sorted(rows, key=lambda row: row["id"])


def test_the_queue_gives_each_number_once():
    with distributed.join():
        first, second = distributed.queue(5), distributed.queue(5)  # as two ranks would, in turns
        assert [next(first), next(second), next(first), *second, *first] == [0, 1, 2, 3, 4]


def test_the_opponents_compute_dtype_is_fp32_on_the_cpu():
    assert distributed.compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert distributed.compute_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert json.loads((THETA0 / "config.json").read_text())["dtype"] == "float32"
