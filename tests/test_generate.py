"""generate.py and what samples for it: y' ~ p_θt, the same bytes however the work is split."""

import contextlib
import json
import shutil
import sys

import families
import numpy as np
import pytest
import torch
from conftest import MICRO, THETA0, load, shell, stage, torchrun
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, TopKLogitsWarper
from transformers.cache_utils import Cache

import generate
from loss import sequence_logps
from spin import distributed
from spin import slots as decoding
from spin.codec import make_codec
from spin.data import sampled_rows
from spin.files import read_jsonl
from spin.models import compute_dtype
from spin.packing import pack
from spin.sampling import sample, uniforms
from spin.slots import keeps_every_key, pick_token
from spin.tokens import decode, encode


def generated(run, t=0):
    return (run / f"iter{t}" / "generated.jsonl").read_bytes()


def rows_of(run, t=0) -> list[dict]:
    return list(read_jsonl(run / f"iter{t}" / "generated.jsonl"))


def test_two_ranks_write_the_same_bytes_as_one_process(played, tmp_path):
    done = torchrun(2, "generate.py", *MICRO, "--run", tmp_path, "--iter", "0")
    assert done.returncode == 0, done.stderr
    assert generated(tmp_path) == generated(played)


def test_a_rerun_samples_only_what_is_missing_and_ends_with_the_same_bytes(
    played, tmp_path, monkeypatch
):
    class Killed(Exception):
        pass

    real = generate.answer
    calls = []

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


@pytest.mark.long
def test_killed_at_random_moments_with_one_rank_and_two_the_file_ends_with_the_same_bytes():
    """The long form, with 20 kills, is the script's default."""
    flags = ["--kills", "2", "--prompts", "512", "--chunk", "4"]
    done = shell(sys.executable, "benchmarks/kill_generate.py", *flags)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "512 different prompts of 512; the same bytes" in done.stdout, said


def test_the_paged_engine_draws_anew_in_each_chunk_and_writes_rows_that_training_takes(
    tmp_path, played, tokenizer
):
    stage("generate", tmp_path, "--iter", 0, "--engine", "paged")
    path = tmp_path / "iter0" / "generated.jsonl"
    rows = rows_of(tmp_path)
    assert list(sampled_rows(path, 0, make_codec(tokenizer, "paper"))) == rows
    plain = rows_of(played)
    prompts = [(row["id"], row["prompt"]) for row in plain]
    assert [(row["id"], row["prompt"]) for row in rows] == prompts
    assert rows != plain  # the distribution, not the rows
    model = load(THETA0)
    ids = [tokenizer("### Instruction: Spell tinab")["input_ids"]] * 30
    chunks = []
    for k in (0, 1):
        uniform = uniforms(0, 0, k, number=24)[None]
        chunks.append(sample(model, ids, tokenizer.eos_token_id, 24, uniform, engine="paged"))
    assert chunks[0] != chunks[1]


def test_running_again_does_nothing_and_says_so(played, capsys):
    before = (played / "iter0" / "generated.jsonl").stat().st_mtime_ns
    stage("generate", played, "--iter", 0)
    assert "nothing to do" in capsys.readouterr().out
    assert (played / "iter0" / "generated.jsonl").stat().st_mtime_ns == before


def killed_after_a_chunk(run, monkeypatch, *flags):
    """generate.py, killed when it has written one chunk of three. Returns this chunk."""
    calls = []
    answer = generate.answer

    def killed(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            stage("generate", run, "--iter", 1, *flags)
    return run / "iter1" / "generated.part" / "000000.jsonl"


@pytest.mark.parametrize("how", ["whole", "damaged", "unlisted", "of another model"])
def test_a_chunk_of_a_killed_run_is_kept_if_it_is_whole_and_this_models_and_else_answered_again(
    how, played, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(played, run)
    for path in run.glob("iter1/generated.*"):
        path.unlink()
    chunk = killed_after_a_chunk(run, monkeypatch)
    text = chunk.read_text()
    if how == "damaged":
        chunk.write_text(text.replace('"finish": "eos"', '"finish": "eot"', 1))
    elif how == "unlisted":
        chunk.with_suffix(".sha256").unlink()
    elif how == "of another model":
        shutil.rmtree(run / "iter0" / "model")
        shutil.copytree(played / "iter1" / "model", run / "iter0" / "model")
        shutil.copy(played / "iter1" / "model.sha256", run / "iter0" / "model.sha256")
    answer = generate.answer
    answered = []
    watched = lambda *args: answered.append(1) or answer(*args)  # noqa: E731 – a line is enough
    monkeypatch.setattr(generate, "answer", watched)
    stage("generate", run, "--iter", 1)
    assert len(answered) == (2 if how == "whole" else 3)
    assert (generated(run, 1) == generated(played, 1)) == (how != "of another model")


def test_ids_end_with_eos_exactly_when_the_answer_ended_by_itself(played, tokenizer):
    eos = tokenizer.eos_token_id
    rows = rows_of(played)
    assert len(rows) == 40 and len({row["id"] for row in rows}) == 40
    for row in rows:
        ids = row["generated_ids"]
        ended = ids[-1] == eos
        assert ids.count(eos) == ended == (row["finish"] == "eos")
        assert row["generated"] == decode(make_codec(tokenizer, "paper"), ids)


def test_an_answer_cut_at_the_limit_has_no_eos(model, tokenizer):
    eos = tokenizer.eos_token_id
    ((ids, finish),) = sample(model, [tokenizer("Spell tinab")["input_ids"]], eos, 2)
    assert finish == "length" and len(ids) == 2 and eos not in ids


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
    answers = []
    for prompt, numbers in zip(prompts, uniform, strict=True):
        answers += sample(model, [prompt], eos, max_new_tokens, numbers[None])
    return answers


def greedy_one_by_one(model, prompts) -> list[list[int]]:
    """What model.generate answers to each prompt alone, greedily: at most 24 ids."""
    answers = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def test_an_answer_depends_on_its_own_random_numbers_and_not_on_its_neighbours(model, tokenizer):
    """Whatever the slots, the refills and the order: the same answers."""
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


def test_the_sampler_and_the_scoring_of_training_see_the_same_probabilities(
    model, tokenizer, monkeypatch
):
    """log p(y'|x), summed over what the sampler saw, refills and all, is loss.sequence_logps of
    its answers."""
    prompts = unequal(tokenizer, 30)
    seen = {}  # by its uniform number, which is that token's alone: log p of the token

    def spy(logits, uniform, *rest):
        token = pick_token(logits, uniform, *rest)
        logps = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        seen.update(zip(uniform.tolist(), logps.tolist(), strict=True))
        return token

    monkeypatch.setattr("spin.slots.pick_token", spy)
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
        assert torch.allclose(
            told, sequence_logps(model, **pack(rows, "cpu")), atol=1e-4, rtol=1e-5
        )
        other = sequence_logps(model, **pack(others, "cpu"))
    assert (told - other).abs().mean() > 0.1  # control: one other token in the prompt


def test_random_numbers_differ_by_seed_iteration_and_prompt():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({tuple(uniforms(*key, number=3)) for key in keys}) == len(keys)
    assert (uniforms(0, 0, 0, number=5)[:3] == uniforms(0, 0, 0, number=3)).all()


def tiny(name, **knobs):
    """A random model of an architecture; its weights are large, so that what it says depends on
    all that it has read."""
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
    attention = "eager" if name == "gemma2" else None
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def drawn(engine, n, temperature=1.0, top_p=1.0):
    """Counts of the first token of n answers to one prompt, and its probabilities: (40,) each."""
    model = tiny("llama")
    prompt = [1, 9, 5]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 4).softmax(-1).double().numpy()
    model.lm_head.weight.data /= 4  # flat enough for every token to be drawn
    uniform = np.random.default_rng(0).random((n, 1))
    answers = sample(model, [prompt] * n, 2, 1, uniform, temperature, top_p, 500, engine)
    return np.bincount([ids[0] for ids, _ in answers], minlength=40), p


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize(
    "engine, n",
    [("generate", 20_000), pytest.param("paged", 2_000, marks=pytest.mark.long)],
    ids=["sample-20000", "paged-2000"],
)
def test_tokens_are_distributed_as_p_theta_by_a_chi_square_test(engine, n, monkeypatch):
    limit = 72.1  # the 0.999 quantile with 39 degrees of freedom
    counts, p = drawn(engine, n)
    assert (n * p).min() > 1 and chi_square(counts, p) < limit
    cold = p ** (1 / 0.7) / (p ** (1 / 0.7)).sum()
    counts, _ = drawn(engine, n, temperature=0.7)
    assert chi_square(counts, cold) < limit
    # controls: another temperature, greedy, a nucleus, top-k
    assert chi_square(counts, p) > limit
    assert chi_square(drawn(engine, n, temperature=0)[0], p) > limit
    assert chi_square(drawn(engine, n, top_p=0.9)[0], p) > limit

    def pick_among_twenty(logits, *rest):
        return pick_token(TopKLogitsWarper(20)(None, logits), *rest)

    if engine == "generate":
        monkeypatch.setattr("spin.slots.pick_token", pick_among_twenty)
        assert chi_square(drawn(engine, n)[0], p) > limit


def test_a_token_of_probability_zero_is_never_drawn():
    for scale in range(8):
        logits = torch.tensor([[-torch.inf, scale / 7, -torch.inf, 1.0, -torch.inf]])
        for number in (0.0, 0.2689, 0.5, 1 - 2**-53):
            uniform = torch.tensor([number], dtype=torch.float64)
            assert pick_token(logits, uniform).item() in (1, 3)


def test_whole_answers_occur_as_often_as_their_log_probs_say(model, tokenizer):
    """The sampler and the scoring of train.py agree: each answer occurs among 4,000 as often as
    p(y') says, within 4.5 standard errors."""
    ids = tokenizer("### Instruction: Spell tin\n\n### Response:")["input_ids"]
    ids = [tokenizer.bos_token_id] + ids if ids[0] != tokenizer.bos_token_id else ids
    n = 4000
    answers = sample(model, [ids] * n, tokenizer.eos_token_id, 24, numbers_of(n, 24))
    kinds = sorted({tuple(y) for y, _ in answers})
    with torch.no_grad():
        rows = [(ids + list(y), [0] * len(ids) + [1] * len(y)) for y in kinds]
        p = sequence_logps(model, **pack(rows, "cpu")).double().exp().numpy()
    counts = np.array([sum(tuple(y) == kind for y, _ in answers) for kind in kinds])
    often = p * n > 20
    assert often.sum() >= 4
    error = np.sqrt(n * p * (1 - p))
    assert (np.abs(counts - n * p) < 4.5 * error)[often].all()
    # control: temperature 1/2
    assert not (np.abs(counts - n * p**2) < 4.5 * error)[often].all()


def test_the_models_generation_config_is_not_asked(model, tokenizer):
    eos = tokenizer.eos_token_id
    prompts = []
    for word in ("tin", "rodak", "bel", "amu"):
        prompts.append(tokenizer(f"### Instruction: Reverse {word}\n\n### Response:")["input_ids"])
    uniform = numbers_of(4, 24)
    plain = sample(model, prompts, eos, 24, uniform)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        max_length=12,
        eos_token_id=7,
        suppress_tokens=[77],
    )
    assert sample(model, prompts, eos, 24, uniform) == plain
    greedy = sample(model, prompts, eos, 24)
    assert sample(model, prompts, eos, 24, engine="paged") == greedy
    answers = sample(model, prompts[:1] * 20, eos, 24, uniform, engine="paged")
    assert len({tuple(ids) for ids, _ in answers}) > 3
    # control: plain generate does ask it
    model.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=eos)
    asked = greedy_one_by_one(model, prompts[:1])
    model.generation_config = GenerationConfig(eos_token_id=eos)
    assert asked != greedy_one_by_one(model, prompts[:1])


@pytest.mark.parametrize("engine", ["generate", "paged"], ids=["sample", "paged"])
def test_greedy_answers_equal_plain_generate(engine, model, tokenizer):
    """Unequal prompts, more of them than slots, down to one slot; each against model.generate on
    that prompt alone."""
    prompts = unequal(tokenizer, 30)
    eos = tokenizer.eos_token_id
    alone = greedy_one_by_one(model, prompts)
    assert {len(ids) for ids in alone} > {24} and min(map(len, alone)) < 8
    for slots in (1, 4, 64):
        answers = sample(model, prompts, eos, 24, slots=slots, engine=engine)
        assert [ids for ids, _ in answers] == alone


def also(*values):
    """A further architecture, in the long run only: one that keeps every key, one that forgets and
    one with learnt positions are in the default run."""
    return pytest.param(*values, marks=pytest.mark.long)


DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "name, knobs, in_slots",
    [
        ("llama", {}, True),
        also("qwen2", {}, True),
        also("qwen3", {}, True),
        also("phi", {}, True),
        also("gpt_neox", {}, True),
        also("opt", {"ffn_dim": 48}, True),
        also("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 20}, False),
        also("gemma2", {"sliding_window": 20}, False),
        also("gemma2", {"sliding_window": 64}, True),
        also("gemma3_text", {"sliding_window": 64}, True),
        also("gemma3_text", {"sliding_window": 20}, False),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        also("bloom", {}, False),
        also("mamba", {}, False),
        also("llama", {"rope_parameters": DYNAMIC_ROPE}, False),
    ],
)
def test_every_architecture_answers_as_plain_generate_does(name, knobs, in_slots):
    """Where a layer forgets, or positions are no argument, the loop of our own is not taken."""
    model = tiny(name, **knobs)
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


def test_iteration_one_samples_from_theta_1_and_not_from_theta_0(played, tmp_path):
    """The opponent of iteration t is what iteration t − 1 left; with θ_0 in its place the answers
    differ."""
    (tmp_path / "iter0").mkdir()
    shutil.copytree(played / "iter0" / "model", tmp_path / "iter0" / "model")
    stage("generate", tmp_path, "--iter", 1)
    assert generated(tmp_path, 1) == generated(played, 1)
    shutil.rmtree(tmp_path / "iter1")
    shutil.rmtree(tmp_path / "iter0" / "model")
    shutil.copytree(THETA0, tmp_path / "iter0" / "model")  # control
    stage("generate", tmp_path, "--iter", 1)
    assert rows_of(tmp_path, 1) != rows_of(played, 1)


def test_a_head_larger_than_the_tokenizer_is_sampled_and_trained_as_it_is(
    tmp_path, model, tokenizer
):
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


def test_the_stage_samples_with_the_temperature_and_nucleus_that_it_was_given(
    played, tmp_path, model, tokenizer
):
    plain = {row["id"]: row["generated_ids"] for row in rows_of(played)}
    for name, flags in (("greedy", ["--temperature", 0]), ("nucleus", ["--top-p", 1e-6])):
        stage("generate", tmp_path / name, "--iter", 0, *flags)
        rows = rows_of(tmp_path / name)
        prompts = [encode(make_codec(tokenizer, "paper"), row)[0] for row in rows]
        greedy = [ids for ids, _ in sample(model, prompts, tokenizer.eos_token_id, 24)]
        assert [row["generated_ids"] for row in rows] == greedy
        assert {row["id"]: row["generated_ids"] for row in rows} != plain  # control


def test_each_chunk_goes_to_the_rank_that_asks_first(tmp_path, monkeypatch):
    """One rank of several, which gets the second chunk from the queue alone."""
    parts = [tmp_path / "iter0" / "generated.part" / f"{k:06}.jsonl" for k in range(3)]
    written = []

    def the_second_alone(number):
        assert number == len(parts)
        yield 1
        written.extend(part.exists() for part in parts)
        for part in parts:
            part.touch()  # as the other ranks would

    monkeypatch.setattr(generate, "next_chunk", the_second_alone)
    stage("generate", tmp_path, "--iter", 0)
    assert written == [False, True, False]


def test_parts_are_merged_by_id_line_by_line(tmp_path, monkeypatch):
    """Also where a text holds a character that only str.splitlines takes for the end of a line."""
    made = []

    def with_odd_characters(model, tokenizer, chunk, recipe, t):
        ids = [pair["id"] for pair in chunk]
        rows = [{"id": i, "generated": f"é{i}\u2028\x85", "finish": "eos"} for i in ids]
        made.extend(rows)
        return rows

    monkeypatch.setattr(generate, "answer", with_odd_characters)
    stage("generate", tmp_path, "--iter", 0)
    in_order = sorted(made, key=lambda row: row["id"])
    assert rows_of(tmp_path) == in_order
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in in_order]
    assert generated(tmp_path) == "".join(lines).encode()
    # controls: the parts had another order, by number is not by text, and splitlines finds more
    assert made != in_order != sorted(made, key=lambda row: str(row["id"]))
    assert len("".join(lines).splitlines()) > len(lines) == 40


def test_the_queue_gives_each_number_once():
    with distributed.process_group():
        # as two ranks would, in turns
        first = distributed.next_chunk(5)
        second = distributed.next_chunk(5)
        assert [next(first), next(second), next(first), *second, *first] == [0, 1, 2, 3, 4]


def test_the_opponents_compute_dtype_is_fp32_on_the_cpu():
    assert compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert compute_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert json.loads((THETA0 / "config.json").read_text())["dtype"] == "float32"


def test_more_slots_than_the_gpu_has_room_for_are_refused_with_a_number_that_fits(
    model, monkeypatch, refused
):
    """Keys and values of 3 layers, 4 heads of 16 numbers in fp32: 12,288 bytes for eight tokens."""
    of_a_slot = 2 * 3 * 8 * 4 * 16 * 4
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 10 * of_a_slot)
    prompts = [[1, 2, 3]] * 12  # and five new tokens each
    assert len(sample(model, prompts, 2, 5, slots=9)) == 12  # a tenth is left
    line = refused(lambda: sample(model, prompts, 2, 5, slots=10))
    assert line.startswith("error: --slots 10 needs 0.0 GB") and line.endswith("--slots 9 fits")
    monkeypatch.setattr(decoding, "free_bytes", lambda device: of_a_slot)
    line = refused(lambda: sample(model, prompts, 2, 5, slots=4))
    assert line.endswith("lower --max-new-tokens, or take shorter prompts")
    monkeypatch.undo()
    assert len(sample(model, prompts, 2, 5, slots=10)) == 12  # control: the CPU's memory


@pytest.mark.parametrize("name", ["Llama", "Falcon", "DeepSeek-V3"])
def test_the_room_that_is_asked_for_is_what_the_cache_takes(name, monkeypatch):
    """Falcon has one head of keys for all, DeepSeek-V3 keeps keys and values of other widths."""
    caches = []

    def kept(layers):
        caches.append(Cache(layers=layers))
        return caches[0]

    free = {}

    def free_bytes(device):
        taken = sum(x.nbytes for layer in caches[0].layers for x in tensors_of(layer))
        return free["all"] - taken

    monkeypatch.setattr(decoding, "Cache", kept)
    monkeypatch.setattr(decoding, "free_bytes", free_bytes)
    model = families.tiny(name)
    free["all"] = 10**9
    sample(model, [[1, 2, 3]] * 4, 2, 5, slots=4)
    taken = sum(x.nbytes for layer in caches[0].layers for x in tensors_of(layer))
    # 0.9 of what is free suffices for the slots of all layers, and a byte less does not
    for free["all"], fits in ((taken / 0.9 + 1, True), (taken / 0.9 - 1, False)):
        caches.clear()
        with contextlib.nullcontext() if fits else pytest.raises(SystemExit):
            sample(model, [[1, 2, 3]] * 4, 2, 5, slots=4)


def tensors_of(layer):
    """A layer's keys and values, if it has them already."""
    return (layer.keys, layer.values) if layer.is_initialized else ()
