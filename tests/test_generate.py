"""generate.py and what samples for it: y' ~ p_θt, the same bytes however the work is split."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import THETA0, on_ranks, shell, stage
from families import tiny
from transformers import GenerationConfig, TopKLogitsWarper

import generate
from loss import sequence_logps
from spin.data.text import decode, encode, make_renderer
from spin.files import read_jsonl
from spin.model.packing import pack
from spin.model.weights import compute_dtype
from spin.run import ranks
from spin.sampling import slots as decode_loop
from spin.sampling.engines import cut_at_eos, sample, uniforms
from spin.sampling.slots import forward_in_slots, keeps_every_key, pick_token


def generated(run, t=0):
    return (run / f"iter{t}" / "generated.jsonl").read_bytes()


def rows_of(run, t=0) -> list[dict]:
    return list(read_jsonl(run / f"iter{t}" / "generated.jsonl"))


def test_two_ranks_write_the_same_bytes_as_one_process(played, tmp_path):
    run = tmp_path / "run"
    code, err = on_ranks(2, lambda: stage("generate", run, "--iter", 0), tmp_path)
    assert code == 0, err
    assert generated(run) == generated(played)


@pytest.mark.long
def test_killed_at_random_moments_with_one_rank_and_two_the_file_ends_with_the_same_bytes():
    """The long form, with 20 kills, is the script's default."""
    flags = ["--kills", "2", "--prompts", "512", "--chunk", "4"]
    done = shell(sys.executable, "benchmarks/kill_generate.py", *flags)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "512 different prompts of 512; the same bytes" in done.stdout, said


def test_a_chunk_of_a_killed_run_is_kept_if_it_is_whole(played, tmp_path, monkeypatch, capsys):
    answer = generate.answer
    answered = []

    def killed(*args):
        if len(answered) == 1:
            raise KeyboardInterrupt
        answered.append(1)
        return answer(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "answer", killed)
        stage("generate", tmp_path / "run", "--iter", 0)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    (chunk,) = (tmp_path / "cut" / "iter0" / "generated.part").glob("*.jsonl")
    chunk.write_text("".join(chunk.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as stop:
        stage("generate", tmp_path / "cut", "--iter", 0)
    assert stop.value.code == 2 and "39 of 40 answers" in capsys.readouterr().err

    watched = lambda *args: answered.append(1) or answer(*args)  # noqa: E731 – a line is enough
    monkeypatch.setattr(generate, "answer", watched)
    stage("generate", tmp_path / "run", "--iter", 0)
    assert len(answered) == 3 and generated(tmp_path / "run") == generated(played)


def test_ids_end_with_eos_exactly_when_the_answer_ended_by_itself(played, model, tokenizer):
    eos = tokenizer.eos_token_id
    rows = rows_of(played)
    assert len(rows) == 40 and len({row["id"] for row in rows}) == 40
    for row in rows:
        ids = row["generated_ids"]
        ended = ids[-1] == eos
        assert ids.count(eos) == ended == (row["finish"] == "eos")
        assert row["generated"] == decode(make_renderer(tokenizer, "paper"), ids)
    ((ids, finish),) = sample(model, [tokenizer("Spell tinab")["input_ids"]], eos, 2)
    assert finish == "length" and len(ids) == 2 and eos not in ids  # cut off at the limit


def unequal(tokenizer, n):
    """n prompts, of 1 to 60 tokens, in no order."""
    text = "### Instruction: Spell tin ### Response: Sort 1 0 4 Larger of 12 and 93 um, 81"
    ids = tokenizer(text * 2)["input_ids"]
    return [ids[k % 7 : k % 7 + 1 + 37 * k % 60] for k in range(n)]


def numbers_of(n, length) -> np.ndarray:
    """The uniform numbers of prompts 0 to n − 1 in iteration 0, (n, length)."""
    return np.stack([uniforms(0, 0, i, number=length) for i in range(n)])


def one_by_one(model, prompts, eos, max_new_tokens, uniform):
    """The answer to each prompt, sampled without neighbours."""
    alone = zip(prompts, uniform, strict=True)
    return [sample(model, [x], eos, max_new_tokens, numbers[None])[0] for x, numbers in alone]


def greedy_one_by_one(model, prompts) -> list[list[int]]:
    """What model.generate answers to each prompt alone, greedily: at most 24 ids."""
    answers = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def test_an_answer_depends_on_its_own_random_numbers_and_not_on_its_neighbours(model, tokenizer):
    prompts = unequal(tokenizer, 40)
    eos = tokenizer.eos_token_id
    uniform = numbers_of(40, 8)
    alone = one_by_one(model, prompts, eos, 8, uniform)
    assert {finish for _, finish in alone} == {"eos", "length"}
    for slots in (1, 3, 17, 64):
        assert sample(model, prompts, eos, 8, uniform, slots=slots) == alone
    reverse = uniform[::-1].copy()
    assert sample(model, prompts[::-1], eos, 8, reverse, slots=5) == alone[::-1]
    assert sample(model, prompts, eos, 8, reverse, slots=5) != alone  # control


def test_prompts_enter_in_groups_of_limited_size_without_effect(model, tokenizer, monkeypatch):
    prompts = unequal(tokenizer, 40)
    uniform = numbers_of(40, 8)
    passes = []  # tokens of each prefill; a decode step has one column

    def spy(model, cache, ids, *rest):
        if ids.shape[1] > 1:
            passes.append(ids.numel())
        return forward_in_slots(model, cache, ids, *rest)

    monkeypatch.setattr(decode_loop, "forward_in_slots", spy)
    together = sample(model, prompts, tokenizer.eos_token_id, 8, uniform)
    assert max(passes) > 1000  # control: all 40 at once
    passes.clear()
    monkeypatch.setattr(decode_loop, "PREFILL", 150)
    assert sample(model, prompts, tokenizer.eos_token_id, 8, uniform) == together
    assert 100 < max(passes) <= 150


def test_sampler_and_scoring_see_the_same_probabilities(model, tokenizer, monkeypatch):
    """log p(y'|x), summed over what the sampler saw, refills and all, is loss.sequence_logps of
    its answers."""
    prompts = unequal(tokenizer, 30)
    seen = {}  # by its uniform number, which is that token's alone: log p of the token

    def spy(logits, uniform, *rest):
        token = pick_token(logits, uniform, *rest)
        logps = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        seen.update(zip(uniform.tolist(), logps.tolist(), strict=True))
        return token

    monkeypatch.setattr("spin.sampling.engines.pick_token", spy)
    uniform = numbers_of(30, 24)
    answers = sample(model, prompts, tokenizer.eos_token_id, 24, uniform, slots=7)
    told = []
    rows = []
    for prompt, numbers, (ids, _) in zip(prompts, uniform, answers, strict=True):
        told.append(sum(seen[number] for number in numbers[: len(ids)]))
        rows.append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
    told = torch.tensor(told)
    others = [([ids[0] ^ 1] + ids[1:], mask) for ids, mask in rows]
    with torch.no_grad():
        wanted = sequence_logps(model, **pack(rows, "cpu"))
        other = sequence_logps(model, **pack(others, "cpu"))
    assert torch.allclose(told, wanted, atol=1e-4, rtol=1e-5)
    assert (told - other).abs().mean() > 0.1  # control: one other token in the prompt


def test_random_numbers_differ_by_seed_iteration_and_prompt():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({tuple(uniforms(*key, number=3)) for key in keys}) == len(keys)


def drawn(n, temperature=1.0, top_p=1.0):
    """The first tokens of n answers to one prompt, counted, and their probabilities: (40,) each."""
    model = tiny("Llama", vocab_size=40)
    prompt = [1, 9, 5]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 4).softmax(-1).double().numpy()
    model.lm_head.weight.data /= 4  # flat enough for every token to be drawn
    uniform = np.random.default_rng(0).random((n, 1))
    answers = sample(model, [prompt] * n, 2, 1, uniform, temperature, top_p, slots=500)
    return np.bincount([ids[0] for ids, _ in answers], minlength=40), p


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def test_tokens_are_distributed_as_p_theta_by_a_chi_square_test(monkeypatch):
    n = 10_000
    limit = 72.1  # the 0.999 quantile with 39 degrees of freedom
    counts, p = drawn(n)
    assert (n * p).min() > 1 and chi_square(counts, p) < limit
    cold = p ** (1 / 0.7) / (p ** (1 / 0.7)).sum()
    counts, _ = drawn(n, temperature=0.7)
    assert chi_square(counts, cold) < limit
    # the nucleus: the likeliest tokens, until they hold 0.9
    order = (-p).argsort()
    nucleus = order[: np.searchsorted(p[order].cumsum(), 0.9) + 1]
    counts, _ = drawn(n, top_p=0.9)
    assert counts[nucleus].sum() == n
    assert chi_square(counts[nucleus], p[nucleus] / p[nucleus].sum()) < limit
    # controls: another temperature, greedy, a nucleus, top-k
    for knobs in ({"temperature": 0.7}, {"temperature": 0}, {"top_p": 0.9}):
        assert chi_square(drawn(n, **knobs)[0], p) > limit

    def pick_among_twenty(logits, *rest):
        return pick_token(TopKLogitsWarper(20)(None, logits), *rest)

    monkeypatch.setattr("spin.sampling.engines.pick_token", pick_among_twenty)
    assert chi_square(drawn(n)[0], p) > limit


def test_rare_tokens_in_the_tail_of_a_large_vocabulary_are_drawn():
    """100,000 tokens of 2e-8 each follow one that holds the rest. A sum in fp32 loses them."""
    logits = torch.full((100_001,), math.log(2e-8))
    logits[0] = math.log(1 - 100_000 * 2e-8)
    for number in (0.9985, 0.999, 0.9999):
        uniform = torch.tensor([number], dtype=torch.float64)
        wanted = 1 + (number - (1 - 100_000 * 2e-8)) / 2e-8
        assert pick_token(logits[None], uniform).item() == pytest.approx(wanted, abs=100)
    # control
    in_fp32 = torch.tensor(np.cumsum(logits.softmax(-1).numpy(), dtype=np.float32))
    assert in_fp32[-1] == in_fp32[0] < 0.9985


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.4, -torch.inf, 1.0, -torch.inf]])
    for number in (0.0, 0.2689, 0.5, 1 - 2**-53):
        uniform = torch.tensor([number], dtype=torch.float64)
        assert pick_token(logits, uniform).item() in (1, 3)


def test_the_models_generation_config_is_not_asked(model, tokenizer):
    eos = tokenizer.eos_token_id
    prompts = unequal(tokenizer, 4)
    uniform = numbers_of(4, 24)
    plain = sample(model, prompts, eos, 24, uniform)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, max_length=12, eos_token_id=7
    )
    assert sample(model, prompts, eos, 24, uniform) == plain
    # control: plain generate does ask it
    model.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=eos)
    asked = greedy_one_by_one(model, prompts)
    model.generation_config = GenerationConfig(eos_token_id=eos)
    assert asked != greedy_one_by_one(model, prompts)


DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
# (family, its knobs, whether our own loop answers); of all families: test_families.py
ARCHITECTURES = [
    ("Llama", {}, True),
    ("GPT-2", {}, True),
    ("Mistral, window", {"sliding_window": 20}, False),
    ("Mistral, window", {"sliding_window": 64}, True),
    ("Bloom", {}, False),
    ("Llama", {"rope_parameters": DYNAMIC_ROPE}, False),
]


@pytest.mark.parametrize("name, knobs, in_slots", ARCHITECTURES)
def test_every_architecture_answers_as_plain_generate_does(name, knobs, in_slots):
    """Where a layer forgets, or positions are no argument, the loop of our own is not taken."""
    model = tiny(name, vocab_size=40, **knobs)
    prompts = [[1] + [3 + (7 * k + i * i) % 37 for i in range(5 * k % 31)] for k in range(9)]
    assert keeps_every_key(model, 30 + 24) == in_slots
    plain = greedy_one_by_one(model, prompts)
    # which is not asked
    model.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=7)
    slots = 3 if in_slots else 1
    assert [ids for ids, _ in sample(model, prompts, 2, 24, slots=slots)] == plain
    uniform = np.random.default_rng(0).random((9, 24))
    answers = sample(model, prompts, 2, 24, uniform, slots=slots)
    assert answers == one_by_one(model, prompts, 2, 24, uniform)
    assert [ids for ids, _ in answers] != plain
    several = sample(model, prompts, [2, 9, 28], 24, uniform, slots=slots)  # the first that comes
    assert several == [cut_at_eos([2, 9, 28], ids) for ids, _ in answers] != answers


def test_iteration_one_samples_from_theta_1_and_not_from_theta_0(played, tmp_path):
    for name, theta in (("right", played / "iter0" / "model"), ("control", THETA0)):
        run = tmp_path / name
        shutil.copytree(theta, run / "iter0" / "model")
        stage("generate", run, "--iter", 1)
        assert (generated(run, 1) == generated(played, 1)) == (name == "right")


def test_a_head_larger_than_the_tokenizer_is_sampled_and_trained(tmp_path, model, tokenizer):
    """Qwen and Pythia pad their heads; a tail that is not dead is drawn from, and train.py takes
    what was drawn."""
    torch.manual_seed(0)
    model.resize_token_embeddings(120, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    flags = ["--iter", 0, "--model", tmp_path / "wide", "--temperature", 3]
    stage("generate", tmp_path / "run", *flags)
    largest = max(max(row["generated_ids"]) for row in rows_of(tmp_path / "run"))
    assert largest >= len(tokenizer)
    stage("train", tmp_path / "run", *flags)
    assert (tmp_path / "run" / "iter0" / "model").is_dir()


def test_the_stage_samples_with_its_temperature_and_nucleus(played, tmp_path, model, tokenizer):
    plain = {row["id"]: row["generated_ids"] for row in rows_of(played)}
    for name, flags in (("greedy", ["--temperature", 0]), ("nucleus", ["--top-p", 1e-6])):
        stage("generate", tmp_path / name, "--iter", 0, *flags)
        rows = rows_of(tmp_path / name)
        prompts = [encode(make_renderer(tokenizer, "paper"), row)[0] for row in rows]
        greedy = [ids for ids, _ in sample(model, prompts, tokenizer.eos_token_id, 24)]
        assert [row["generated_ids"] for row in rows] == greedy
        assert {row["id"]: row["generated_ids"] for row in rows} != plain  # control


def test_parts_are_merged_by_id_line_by_line(tmp_path, monkeypatch):
    """Also where a text holds a character that only str.splitlines takes for the end of a line."""
    made = []

    def with_odd_characters(model, tokenizer, chunk, recipe, t):
        ids = [pair["id"] for pair in chunk]
        made.extend(ids)
        return [{"id": i, "generated": f"é{i}\u2028\x85", "finish": "eos"} for i in ids]

    monkeypatch.setattr(generate, "answer", with_odd_characters)
    stage("generate", tmp_path, "--iter", 0)
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == sorted(made) != made
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    assert generated(tmp_path) == "".join(lines).encode()
    # controls: by number is not by text, and splitlines finds more
    assert sorted(made) != sorted(made, key=str)
    assert len("".join(lines).splitlines()) > len(lines) == 40


def test_the_queue_gives_each_number_once():
    with ranks.process_group():
        first, second = ranks.next_chunk(5), ranks.next_chunk(5)  # as two ranks would, in turns
        assert [next(first), next(second), next(first), *second, *first] == [0, 1, 2, 3, 4]


def test_the_compute_dtype_is_bf16_on_a_gpu_and_fp32_on_the_cpu():
    assert compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert compute_dtype("auto", torch.device("cuda")) is torch.bfloat16


def test_a_gpu_that_is_too_small_for_the_slots_is_one_line(model, monkeypatch, refused):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("spin.sampling.slots.prefill", full)
    line = refused(lambda: sample(model, [[1, 2, 3]] * 12, 2, 5, slots=9))
    assert "too small for --slots 9" in line
