"""What a model sees of a text: our ids against transformers' own, for the families of today."""

import copy
import datetime
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from chat_templates import (
    DAY,
    FAMILIES,
    REFUSED,
    USABLE,
    clock,
    messages_of,
    pair_of,
    rendered,
    the_old_way,
    tokenizer_of,
)
from conftest import THETA0, stage
from tokenizers import AddedToken, Tokenizer, models, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import train
from spin import recipe as flags
from spin.data.rows import Unusable, check_ids
from spin.data.selection import select
from spin.data.text import decode, load_renderer, make_renderer, split_ids
from spin.files import read_jsonl
from spin.recipe import Recipe

SYSTEMS = (None, "Be kind.", "")
ANSWERS = ("Apple.", " Quince \n", "\nApple", "Mint, thyme\n\nand sage do")
MERGED = "answers whose first token merges with the prompt"


@pytest.fixture(autouse=True)
def today(monkeypatch):
    """transformers' own clock stands at DAY, for the oracle."""
    monkeypatch.setattr(chat_template_utils, "datetime", clock(DAY))


def renderer_of(name: str, date: str = DAY, **others):
    return make_renderer(
        tokenizer_of(name), "chat", template_kwargs=FAMILIES[name].kwargs, date=date, **others
    )


def expected(name: str, pair: dict, answer: str) -> tuple[list[int], list[int] | None, str]:
    """(ids of the generation prompt, the other ids up to the end of turn, the text of all).
    The other ids are None where tokens merge across the boundary."""
    end = tokenizer_of(name).convert_tokens_to_ids(FAMILIES[name].end)
    prompt = rendered(name, messages_of(pair), ask=True)
    start = rendered(name, messages_of(pair), tokenize=False, ask=True)
    ids = rendered(name, messages_of(pair, answer))
    text = rendered(name, messages_of(pair, answer), tokenize=False)
    ending = FAMILIES[name].end
    text = text[: text.index(ending, len(start) + len(FAMILIES[name].lead)) + len(ending)]
    if ids[: len(prompt)] != prompt:
        return prompt, None, text
    stop = ids.index(end, len(prompt))
    return prompt, ids[len(prompt) : stop + 1], text


def taken(name: str) -> list[tuple[dict, str]]:
    """The pairs and answers that a family's template renders as they are."""
    wrong = {"refused": SYSTEMS[1:], "dropped": SYSTEMS[1:2], "required": SYSTEMS[:1]}
    systems = [s for s in SYSTEMS if s not in wrong.get(FAMILIES[name].system, ())]
    return [(pair_of(system), answer) for system in systems for answer in ANSWERS]


@pytest.mark.parametrize("name", USABLE)
def test_prompt_and_answer_have_the_ids_of_apply_chat_template_up_to_the_end_of_turn(name):
    renderer = renderer_of(name)
    tokenizer = tokenizer_of(name)
    assert tokenizer.convert_ids_to_tokens(renderer.eot_id) == FAMILIES[name].end
    assert renderer.before_answer == FAMILIES[name].lead
    for pair, answer in taken(name):
        prompt, rest, text = expected(name, pair, answer)
        ids, answer_ids, merged = split_ids(renderer, pair, answer)
        assert ids == prompt == split_ids(renderer, pair)[0]
        assert merged == (rest is None)
        if rest is not None:
            assert answer_ids == rest
        assert answer_ids[-1] == renderer.eot_id and renderer.eot_id not in answer_ids[:-1]
        # decoding gives back no space that a special token swallowed, or that was put behind one
        if not (FAMILIES[name].rstrip or FAMILIES[name].legacy or FAMILIES[name].lacks):
            assert tokenizer.decode(ids + answer_ids).lstrip(" ") == text.lstrip(" ")
        known = "".join(sign for sign in answer if sign not in FAMILIES[name].lacks)
        assert decode(renderer, answer_ids).strip() == known.strip()
        if answer == "Apple.":
            assert merged == FAMILIES[name].merges


def test_the_ids_are_not_those_of_the_answer_alone_with_an_eos_behind_it():
    """The control of the test before, and what commit 8002864 did."""
    wrong = set()
    for name in set(USABLE):
        if not FAMILIES[name].merges:
            pair, answer = taken(name)[0]
            prompt, rest, _ = expected(name, pair, answer)
            if the_old_way(name, pair, answer) != (prompt, rest):
                wrong.add(name)
    before_it = {"qwen3", "llama2", "llama2, an older tokenizer", "mistral", "gpt-oss"}
    not_eos = {"llama3", "llama3.2", "gemma", "phi3"}  # ends a turn
    two_bos = {"dialogpt", "granite", "tulu", "puts an EOS behind a text", "zephyr"}
    others = {"no token for a line break", "wants a system message", "knows no generation prompt"}
    assert wrong == before_it | not_eos | two_bos | others | {"command-a"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_split_is_refused_in_one_line(name, refused):
    line = refused(lambda: renderer_of(name))
    assert FAMILIES[name].refusal in line
    assert line.endswith("use --template paper, or a string with {prompt}")


UNUSABLE = [
    ("mistral", {"system": "Be kind."}, "Apple.", "refuses a conversation (no system)"),
    ("gemma", {"system": "Be kind."}, "Apple.", "refuses a conversation (no system)"),
    ("drops a system message", {"system": "Be kind."}, "Apple.", "drops or changes the system"),
    ("drops a system message", {"system": "fruit"}, "Apple.", "drops or changes the system"),
    ("wants a system message", {}, "Apple.", "refuses a conversation (system first)"),
    ("qwen3", {}, "Hm.</think>Apple.", "changes the answer"),
]


@pytest.mark.parametrize("name, more, answer, reason", UNUSABLE)
def test_a_row_that_the_template_refuses_or_alters_is_left_out(name, more, answer, reason):
    renderer = renderer_of(name)
    with pytest.raises(Unusable) as problem:
        split_ids(renderer, {"prompt": "Name a fruit.", **more}, answer)
    assert reason in str(problem.value)
    good, right = taken(name)[0]
    bad = {"prompt": "Which herb?", **more}
    rows = [{"messages": messages_of(*row)} for row in ((good, right), (bad, answer))]
    recipe, _ = flags.parse(["--template", "chat", "--max-new-tokens", "9"])
    pairs, counts = select(rows, "two rows", renderer, recipe, 2)
    assert [pair["prompt"] for pair in pairs] == ["Name a fruit."]
    (counted,) = [number for what, number in counts.items() if reason in what]
    assert counted == 1


SWITCHED = (  # as SmolLM3's: a switch in a message is taken out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.replace('/no_think', '') }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_row_with_a_switch_that_the_template_takes_out_is_left_out_and_counted():
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    tokenizer.chat_template = SWITCHED
    systems = ["/no_think", "Be kind.\n\n/no_think", "Be kind."]
    rows = [{"system": system, "prompt": "Which?", "response": "Apple."} for system in systems]
    recipe, _ = flags.parse(["--template", "chat", "--max-new-tokens", "9"])
    pairs, counts = select(rows, "rows", make_renderer(tokenizer, "chat", date=DAY), recipe, 3)
    assert [pair["system"] for pair in pairs] == ["Be kind."]
    assert counts["the chat template drops or changes the system"] == 2


# ---- tokens that merge across the boundary -------------------------------------------------------


@pytest.mark.parametrize("name", ["vicuna", "vicuna, byte-level", "qwen3-thinking"])
def test_where_tokens_merge_the_prompt_is_what_is_sampled_from_and_the_row_is_counted(name):
    rows = [{"messages": messages_of(pair_of(None), "Apple.")}]
    rows += [{"messages": messages_of({"prompt": "Which herb?"}, "\nMint")}]
    recipe, _ = flags.parse(["--template", "chat", "--max-new-tokens", "9"])
    pairs, counts = select(rows, "two rows", renderer_of(name), recipe, 2)
    merged = 0
    for pair in pairs:
        prompt, rest, _ = expected(name, pair, pair["real"])
        assert pair["prompt_ids"] == prompt
        merged += rest is None
    assert counts[MERGED] == merged > 0
    trimmed = select(rows, "two rows", renderer_of("llama3"), recipe, 2)[1]
    assert trimmed[MERGED] == 0  # control


def test_the_tokens_behind_a_merged_boundary_are_those_that_follow_the_prompts():
    renderer = renderer_of("vicuna")
    ids, answer, merged = split_ids(renderer, pair_of(None), "Apple.")
    pieces = renderer.tokenizer.convert_ids_to_tokens(ids + answer)
    assert merged and "".join(pieces) == "<s>USER:▁Name▁a▁fruit.▁ASSISTANT:▁Apple.</s>"
    assert renderer.tokenizer.decode(ids).endswith("ASSISTANT: ")
    assert pieces[len(ids)].startswith("A")  # no second space
    whole = rendered("vicuna", messages_of(pair_of(None), "Apple."))
    assert whole[: len(ids)] != ids  # control: the template's own tokens lie across


# ---- plain templates -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["paper", "Q: {prompt}\nA:", "{prompt}"])
@pytest.mark.parametrize("name", USABLE)
def test_a_plain_template_begins_as_the_tokenizer_does_and_nothing_stands_behind(name, template):
    tokenizer = tokenizer_of(name)
    renderer = make_renderer(tokenizer, template)
    text = "### Instruction: {prompt}\n\n### Response:" if template == "paper" else template
    text = text.replace("{prompt}", "Name a fruit.")
    ids, answer, _ = split_ids(renderer, pair_of(None), "Apple.")
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] * ("BOS" in FAMILIES[name].puts)
    assert ids == begin + bare
    whole = tokenizer(text)["input_ids"]
    assert ids == whole[: len(ids)]
    assert len(whole) == len(ids) + ("EOS" in FAMILIES[name].puts)  # control: that is not there
    assert answer[-1] == renderer.eot_id == tokenizer.eos_token_id
    assert answer.count(renderer.eot_id) == 1


def test_a_bos_that_a_plain_template_writes_is_not_doubled():
    for name in ("llama2", "gemma", "llama3"):
        bos = FAMILIES[name].bos
        tokenizer = tokenizer_of(name)
        renderer = make_renderer(tokenizer, bos + "Q: {prompt} A:")
        ids = split_ids(renderer, pair_of(None))[0]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        twice = tokenizer(bos + "Q: Name a fruit. A:")["input_ids"]
        assert twice.count(tokenizer.bos_token_id) == 2  # control


def digits(**puts) -> PreTrainedTokenizerFast:
    """A tokenizer of sums: it has no token for a letter, and none for what it does not know."""
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=list("+=12345"))
    core.train_from_iterator(["1+2=3"], trainer)
    around = [("<s>", 0), ("</s>", 1)]
    core.post_processor = processors.TemplateProcessing(special_tokens=around, **puts)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("single, number", [("$A", 0), ("<s> $A", 1), ("<s> $A </s>", 1)])
def test_a_tokenizer_without_letters_begins_a_text_as_it_does_any_other(single, number):
    tokenizer = digits(single=single)
    renderer = make_renderer(tokenizer, "{prompt}=")
    ids, answer, _ = split_ids(renderer, {"prompt": "1+2"}, "3")
    assert tokenizer("1+2=")["input_ids"][: len(ids)] == ids
    assert ids.count(tokenizer.bos_token_id) == number
    assert tokenizer.convert_ids_to_tokens(answer) == ["3", "</s>"]


def test_a_tokenizer_that_cannot_read_every_text_is_loaded_all_the_same(tmp_path):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", *"0123+="])}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(Exception, match="UNK"):
        tokenizer("a")
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(THETA0 / "config.json", tmp_path)
    renderer = load_renderer(str(tmp_path), Recipe(template="{prompt}", max_length=8))
    assert renderer.eot_id == 0


# ---- dates ---------------------------------------------------------------------------------------

DATED = ["llama3.2", "gpt-oss", "granite", "smollm3"]


@pytest.mark.parametrize("name", DATED)
def test_a_template_that_writes_the_date_writes_the_runs_whatever_day_it_is(name, monkeypatch):
    renderer = renderer_of(name)
    before = split_ids(renderer, pair_of(None), "Apple.")
    oracle = expected(name, pair_of(None), "Apple.")
    assert before[:2] == oracle[:2]
    monkeypatch.setattr(chat_template_utils, "datetime", clock("2026-02-01"))
    assert split_ids(renderer, pair_of(None), "Apple.") == before
    assert split_ids(renderer_of(name), pair_of(None), "Apple.") == before
    assert expected(name, pair_of(None), "Apple.")[0] != oracle[0]  # control: transformers' own
    later = renderer_of(name, date="2026-02-01")
    assert split_ids(later, pair_of(None), "Apple.")[0] == expected(name, pair_of(None), "A")[0]


@pytest.mark.parametrize("call", ["strftime_now('on %-d, %b%%')", 'strftime_now( "%A" )'])
def test_any_directive_of_a_date_is_written_as_strftime_writes_it(call):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    tokenizer.chat_template = "{{ " + call + " }}\n" + tokenizer.chat_template
    own = tokenizer.apply_chat_template(
        messages_of(pair_of(None)), add_generation_prompt=True, return_dict=False
    )
    assert split_ids(make_renderer(tokenizer, "chat", date=DAY), pair_of(None))[0] == own


@pytest.mark.parametrize("call", ["strftime_now(how)", "strftime_now('%d' + how)", "strftime_now"])
def test_a_template_whose_date_cannot_be_set_is_refused(call, refused):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    tokenizer.chat_template = "{% set day = " + call + " %}" + tokenizer.chat_template
    assert "writes the date" in refused(lambda: make_renderer(tokenizer, "chat", date=DAY))


def small_config(vocabulary: int, **others) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    return LlamaConfig(vocab_size=vocabulary, **sizes, **others)


def test_stages_after_midnight_go_on_with_the_prompts_of_the_day_before(tmp_path, monkeypatch):
    """Sampled on one day, stopped amid training, gone on with on the next, without a flag."""
    *options, date_flag, _ = save(tmp_path, "llama3.2", {})  # without its date
    assert date_flag == "--date"
    options += ["--max-length", "200", "--num-prompts", "12"]
    torch.manual_seed(0)  # a random model, for which every token of a prompt matters
    model = LlamaForCausalLM(small_config(len(tokenizer_of("llama3.2"))))
    model.save_pretrained(tmp_path / "model")

    def on(day: str, run: str, *names: str):
        of_stages = SimpleNamespace(datetime=clock(day), date=datetime.date, UTC=datetime.UTC)
        monkeypatch.setattr(flags, "datetime", of_stages)
        monkeypatch.setattr(chat_template_utils, "datetime", clock(day))
        for name in names:
            stage(name, tmp_path / run, *options, "--iter", 0, "--run", tmp_path / run)
        return tmp_path / run / "iter0"

    def stop(*args):
        raise KeyboardInterrupt

    all_day = on(DAY, "all day", "generate", "train")
    on(DAY, "over midnight", "generate")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "export", stop)
        on(DAY, "over midnight", "train")
    over = on("2026-02-01", "over midnight", "train", "evaluate")
    later = on("2026-02-01", "a day later", "generate", "train")
    for name in ("generated.jsonl", "opponent.jsonl", "model/model.safetensors"):
        assert (over / name).read_bytes() == (all_day / name).read_bytes()
    scores = "opponent.jsonl"
    assert (later / scores).read_bytes() != (all_day / scores).read_bytes()  # control


# ---- a model: its vocabulary, and where its answers end ------------------------------------------


def unigram_model(tokenizer, chances: dict[int, float], vocabulary: int) -> LlamaForCausalLM:
    """A model that draws each token by itself, with these chances (their sum is 1)."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = small_config(vocabulary, tie_word_embeddings=False, **ends)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 1.0  # normed: √32 in the first place of 32
        model.lm_head.weight[:, 0] = -10.0
        for token, chance in chances.items():
            model.lm_head.weight[token, 0] = math.log(chance) / math.sqrt(32)
    return model


def save(folder, name: str, chances: dict[str, float], vocabulary: int | None = None):
    """A unigram model of a family's tokenizer; returns the flags that run it on dialogues."""
    tokenizer = tokenizer_of(name)
    by_id = {tokenizer.convert_tokens_to_ids(token): p for token, p in chances.items()}
    size = vocabulary or len(tokenizer)
    unigram_model(tokenizer, by_id, size).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fruits = ("Apple.", "Quince.", "Mint", "thyme", "sage", "Name", "herb", "kind.")
    rows = [messages_of({"prompt": f"Name a fruit. {k}"}, fruits[k % 8]) for k in range(40)]
    lines = [json.dumps({"messages": messages}) for messages in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    data = str(folder / "data.jsonl")
    where = ["--model", str(folder / "model"), "--data", data, "--eval-data", data]
    return [*where, "--template", "chat", "--run", str(folder / "run"), "--date", DAY]


def list_ends(folder, tokenizer, listed):
    """A model's configs name these tokens as its EOS; returns their ids."""
    ids = tokenizer.convert_tokens_to_ids(listed)
    for name in ("config.json", "generation_config.json"):
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))
    return ids


@pytest.mark.parametrize("more", [[], ["<eos>"], ["a"]])
def test_sampling_stops_at_every_listed_end_and_finish_and_ids_go_by_it(more, tmp_path):
    """An ordinary token is none: "a" may stand in an answer. Llama's config lists 2 by default."""
    chances = {"<end_of_turn>": 0.1, "<eos>": 0.1, "a": 0.8}
    options = save(tmp_path, "gemma", chances)
    listed = list_ends(tmp_path, tokenizer_of("gemma"), ["<end_of_turn>", *more])
    ends = {*listed[:1], *(listed[1:] if more == ["<eos>"] else [])}
    stage("generate", tmp_path / "run", *options, "--iter", 0)
    renderer = renderer_of("gemma", listed=listed)
    eos = renderer.tokenizer.eos_token_id
    rows = list(read_jsonl(tmp_path / "run" / "iter0" / "generated.jsonl"))
    assert len(rows) == 40
    for row in rows:
        ids = row["generated_ids"]
        ended = ids[-1] in ends
        assert sum(i in ends for i in ids) == ended == (row["finish"] == "eos")
        assert len(ids) == 24 or ended
        check_ids(row, "a row", renderer)
    assert {row["finish"] for row in rows} == {"eos", "length"}
    # control: the tokenizer's EOS ends nothing if it is not listed
    assert any(eos in row["generated_ids"][:-1] for row in rows) == (eos not in ends)
    # human answers have one end, whatever the model lists
    answer = split_ids(renderer, pair_of(None), "Apple.")[1]
    assert answer[-1] == renderer.eot_id == listed[0]
    stage("train", tmp_path / "run", *options, "--iter", 0)
    stage("evaluate", tmp_path / "run", *options, "--theta0")
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    share = 1 - (1 - 0.1 * len(ends)) ** 24  # of answers of at most 24 tokens that end
    assert abs(figures["eos_rate"] - share) < 4 * math.sqrt(share * (1 - share) / 12)


GLM = (
    "{% for m in messages %}{{ '<|USER|>' if m.role == 'user' else '<|CHATBOT|>\n<t></t>' }}\n"
    "{{ m.content.strip() }}{{ '\n' if SPACED }}{% endfor %}"
    "{% if add_generation_prompt %}<|CHATBOT|>{% endif %}"
)


@pytest.mark.parametrize("spaced", ["false", "true"])
def test_where_the_next_roles_token_ends_a_turn_so_does_an_answer(spaced, tmp_path, refused):
    options = save(tmp_path, "command-r", {"<|USER|>": 0.2, "<|SYSTEM|>": 0.1, "a": 0.7})
    tokenizer = copy.deepcopy(tokenizer_of("command-r"))
    tokenizer.chat_template = GLM.replace("SPACED", spaced)
    tokenizer.save_pretrained(tmp_path / "model")
    line = refused(lambda: stage("generate", tmp_path / "run", *options, "--iter", 0))
    assert "nor one that the model lists as EOS" in line  # control
    listed = list_ends(tmp_path, tokenizer, ["<|end_turn|>", "<|USER|>", "<|SYSTEM|>"])
    renderer = make_renderer(tokenizer, "chat", listed=listed)
    assert renderer.end_ids == (listed[1], listed[0], listed[2])
    for answer in ("Apple.", "Mint, thyme\n\nand sage do "):
        talk = [*messages_of(pair_of(None), answer), *messages_of(pair_of(None))]
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        first, second = (k for k, i in enumerate(whole) if i == listed[1])
        ids, rest, _ = split_ids(renderer, pair_of(None), answer)
        assert ids + rest == whole[: second + 1] and first < len(ids)
        assert decode(renderer, rest).strip() == answer.strip()
    for name in ("generate", "train", "evaluate"):
        stage(name, tmp_path / "run", *options, "--iter", 0)
    rows = list(read_jsonl(tmp_path / "run" / "iter0" / "generated.jsonl"))
    assert {row["generated_ids"][-1] for row in rows if row["finish"] == "eos"} == {*listed[1:]}


def test_of_the_tokens_that_follow_every_answer_a_listed_one_ends_it():
    tokenizer = copy.deepcopy(tokenizer_of("command-r"))
    own = tokenizer.chat_template
    closed = tokenizer.convert_tokens_to_ids("<|SYSTEM|>")  # as </answer> would be
    end = make_renderer(tokenizer, "chat").eot_id
    last = tokenizer.decode([end])
    tokenizer.chat_template = own.replace(last, "<|SYSTEM|>" + last)
    tokenizer.eos_token = "<|USER|>"
    assert make_renderer(tokenizer, "chat").eot_id == closed  # control: nothing is listed
    assert make_renderer(tokenizer, "chat", listed=[end]).eot_id == end


def larger(name: str, *words: str) -> PreTrainedTokenizerFast:
    """A family's tokenizer with more tokens than its model knows."""
    tokenizer = copy.deepcopy(tokenizer_of(name))
    tokenizer.add_tokens([*words])
    return tokenizer


@pytest.mark.parametrize("template", ["chat", "paper"])
def test_tokens_that_the_model_lacks_leave_out_the_rows_with_them_alone(tmp_path, template):
    options = save(tmp_path, "gemma", {"<end_of_turn>": 0.5, "a": 0.5})
    size = len(tokenizer_of("gemma"))
    larger("gemma", "<image>", "Papaya").save_pretrained(tmp_path / "model")
    more = ["--max-length", "64", "--max-new-tokens", "24", "--template", template]
    recipe, _ = flags.parse([*options, *more])
    renderer = load_renderer(str(tmp_path / "model"), recipe)
    assert renderer.vocabulary == size < len(renderer.tokenizer)
    rows = [("Name a fruit.", "Apple."), ("And one?", "Papaya."), ("Is Papaya one?", "Apple.")]
    rows = [{"prompt": prompt, "response": response} for prompt, response in rows]
    pairs, counts = select(rows, "three rows", renderer, recipe, 3)
    assert [pair["prompt"] for pair in pairs] == ["Name a fruit."]
    assert counts["a token that the model lacks"] == 2
    # control: a model that has them
    known = make_renderer(renderer.tokenizer, template, date=DAY)
    assert len(select(rows, "three rows", known, recipe, 3)[0]) == 3


def test_a_tokenizer_with_more_tokens_than_its_model_samples_trains_and_evaluates(tmp_path):
    options = save(tmp_path, "gemma", {"<end_of_turn>": 0.5, "a": 0.5})
    larger("gemma", "<image>").save_pretrained(tmp_path / "model")
    for name in ("generate", "train", "evaluate"):
        stage(name, tmp_path / "run", *options, "--iter", 0)
    assert (tmp_path / "run" / "iter0" / "eval.json").exists()


def test_an_end_of_turn_that_the_model_lacks_is_refused(tmp_path, refused):
    options = save(tmp_path, "gemma", {"<eos>": 1.0}, vocabulary=5)
    line = refused(lambda: stage("generate", tmp_path / "run", *options, "--iter", 0))
    assert "do not belong together" in line
    assert not (tmp_path / "run").exists()


WRONG_ARGUMENTS = [
    ("qwen2.5", "enable_thinking=false", "knows no enable_thinking"),
    ("qwen3, enable_thinking=false", "thinking=false", "knows no thinking"),
    ("qwen2.5", "add_generation_prompt=false", "add_generation_prompt"),
]


@pytest.mark.parametrize("name, argument, word", WRONG_ARGUMENTS)
def test_an_argument_that_the_template_cannot_take_is_refused(name, argument, word, refused):
    given = {"template_kwargs": [argument], "date": DAY}
    assert word in refused(lambda: make_renderer(tokenizer_of(name), "chat", **given))


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def test_where_a_template_can_switch_off_thinking_the_refusal_names_the_flag(refused):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    tokenizer.chat_template = THINKS
    line = refused(lambda: make_renderer(tokenizer, "chat", date=DAY))
    argument = re.search(r": add --template-kwargs (\w+=false), or use --template", line)[1]
    renderer = make_renderer(tokenizer, "chat", date=DAY, template_kwargs=[argument])
    assert renderer.after_answer == "<|im_end|>\n"
    # the control: nothing is named that the template does not know
    tokenizer.chat_template = re.sub("enable_thinking.*_thinking", "1", THINKS)
    line = refused(lambda: make_renderer(tokenizer, "chat", date=DAY))
    assert "--template-kwargs" not in line and "use --template paper" in line


@pytest.mark.parametrize("method", ["convert_tokens_to_string", "get_vocab", "decode", "__call__"])
def test_a_tokenizer_that_lacks_a_method_is_one_line(method, monkeypatch, refused):
    """As transformers' own for a tekken.json."""

    def lacks(*args, **keywords):
        raise NotImplementedError

    recipe = Recipe(model=str(THETA0), max_length=64, max_new_tokens=24)
    load_renderer(str(THETA0), recipe)  # the control
    monkeypatch.setattr(PreTrainedTokenizerFast, method, lacks)
    line = refused(lambda: load_renderer(str(THETA0), recipe))
    assert f"cannot load the tokenizer and config of {THETA0}: NotImplementedError" in line


@pytest.mark.parametrize("value", ["false", "False"])
def test_the_value_of_an_argument_means_what_it_says(value):
    """As text, False would be true to a template."""
    name = "qwen3, enable_thinking=false"
    given = {"template_kwargs": [f"enable_thinking={value}"], "date": DAY}
    ids = split_ids(make_renderer(tokenizer_of(name), "chat", **given), pair_of(None))[0]
    assert ids == rendered(name, messages_of(pair_of(None)), ask=True)
    without = make_renderer(tokenizer_of(name), "chat", date=DAY)
    assert split_ids(without, pair_of(None))[0] != ids  # control


def test_a_row_in_which_the_tokenizer_does_not_see_the_end_of_turn_is_left_out():
    """A special token that is one only as a word by itself, behind a letter."""
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    core = tokenizer.backend_tokenizer
    core.add_special_tokens([AddedToken("STOP", single_word=True)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "STOP")
    renderer = make_renderer(tokenizer, "chat", date=DAY)
    answer = split_ids(renderer, pair_of(None), "Apple.")[1]
    assert answer[-1] == renderer.eot_id  # control: behind a point
    with pytest.raises(Unusable):
        split_ids(renderer, pair_of(None), "Apple")
