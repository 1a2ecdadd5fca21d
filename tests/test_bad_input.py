"""The table of bad inputs: each ends in one line and exit code 2, leaves the disk as it was, and
loads no weights.

A case is a function that lays out its files in a fresh directory and returns the command: (stage,
run directory, flags). Inputs that look bad and are not are below, and in test_sets.py."""

import hashlib
import io
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings

import datasets
import pytest
import torch
from conftest import MICRO, REPO, THETA0, as_in_a_shell, stage
from families import LONGROPE, SMALL, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spin.files import fail, read_jsonl, write_jsonl

NOUNS = ("tin", "kola", "bel", "amu", "rodak")
ROWS = [{"prompt": f"Spell {word}", "response": "-".join(word)} for word in NOUNS]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS)


def snapshot(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# ---- changes of a folder -------------------------------------------------------------------------


def nothing(folder):
    pass


def rewrite(name, change):
    """A file's bytes after a change."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text.encode())


def cut(name, by=1):
    """Bytes are missing at the end of a file."""
    return rewrite(name, lambda old: old[:-by])


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **fields):
    """A JSON file gets other fields; None takes one out."""

    def change(folder):
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        new = {key: value for key, value in {**old, **fields}.items() if value is not None}
        path.write_text(json.dumps(new))

    return change


def config(**fields):
    return edit("config.json", **fields)


def tokenizer_config(**fields):
    """In the place of what was there."""
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **fields}
    return write("tokenizer_config.json", json.dumps(content))


UP = "model.layers.1.mlp.up_proj.weight"


def weights(change):
    """model.safetensors after a change of its dictionary of weights."""

    def change_file(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return change_file


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def eos_beyond(folder):
    """The EOS gets a number that the model has no embedding for, in a tokenizer no larger."""
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"]["</s>"] = 5000
    for token in core["added_tokens"]:
        if token["content"] == "</s>":
            token["id"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(core))


def edit_rows(change, name):
    """A file of JSON lines after a change of its list of rows."""

    def change_file(folder):
        rows = list(read_jsonl(folder / name))
        change(rows)
        write_jsonl(folder / name, rows)

    return change_file


def set_in(number, **fields):
    """The row of that number gets these fields."""
    return lambda rows: rows[number].update(fields)


def same_id(rows):
    rows[0]["id"] = rows[1]["id"]


# ---- how the cases are laid out ------------------------------------------------------------------


def command(name, *flags):
    """A stage with these flags, and no files."""

    def lay_out(tmp, played):
        return name, tmp / "run", flags

    return lay_out


def data(content, name="set.jsonl"):
    """An SFT set of these bytes (of this text, of these rows) given to generate.py."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, str):
        content = content.encode()

    def lay_out(tmp, played):
        (tmp / name).write_bytes(content)
        return "generate", tmp / "run", ["--iter", "0", "--data", tmp / name]

    return lay_out


def half_saved(tmp, played):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp / "set")
    (only,) = (tmp / "set").glob("*.arrow")
    only.write_bytes(b"ARROW1")
    return "generate", tmp / "run", ["--iter", "0", "--data", tmp / "set"]


def model(change, name="generate"):
    """θ_0's folder after a change, given to a stage."""

    def lay_out(tmp, played):
        shutil.copytree(THETA0, tmp / "model")
        change(tmp / "model")
        if name == "train":
            (tmp / "run" / "iter0").mkdir(parents=True)
            shutil.copy(played / "iter0" / "generated.jsonl", tmp / "run" / "iter0")
        return name, tmp / "run", ["--iter", "0", "--model", tmp / "model"]

    return lay_out


def run(change, name="train", t=1, *flags):
    """A finished run of two iterations after a change, then a stage in it."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        change(tmp / "run")
        return name, tmp / "run", ["--iter", t, *flags]

    return lay_out


def untrained(change):
    """A run whose iteration 1 has no model, as a stop during training leaves it, after a change."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        shutil.rmtree(tmp / "run" / "iter1" / "model")
        change(tmp / "run")
        return "train", tmp / "run", ["--iter", "1"]

    return lay_out


def swapped(change):
    """θ_0 has changed since the run began: its generated.jsonl is another model's."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        shutil.copytree(THETA0, tmp / "model")
        edit("recipe.json", model=str(tmp / "model"))(tmp / "run")
        change(tmp / "model")
        return "train", tmp / "run", ["--iter", 0, "--model", tmp / "model"]

    return lay_out


def another_theta_1(run):
    """θ_1 was trained anew, with other bytes, after iteration 1 had its answers."""
    shutil.copytree(run / "iter0" / "model", run / "other")
    weights(lambda w: w[UP].mul_(1.01))(run / "other")
    shutil.rmtree(run / "iter0" / "model")
    (run / "other").rename(run / "iter0" / "model")


def chunks_of_another_model(tmp, played):
    """generate.py was killed, and θ_1 trained again before it went on."""
    shutil.copytree(played, tmp / "run")
    folder = tmp / "run" / "iter1"
    shutil.rmtree(folder / "model")
    (folder / "generated.part").mkdir()
    (folder / "generated.jsonl").unlink()
    shutil.copy(folder / "made_from.json", folder / "generated.part")
    another_theta_1(tmp / "run")
    return "generate", tmp / "run", ["--iter", "1"]


def other_held_out(run):
    """The held-out set has changed before θ_2 is evaluated."""
    (run / "iter1" / "eval.json").unlink()
    edit("heldout.json", sha256="another")(run)


def without_wandb(tmp, played):
    sys.modules["wandb"] = None
    return "train", tmp / "run", ["--iter", "0", "--track", "wandb"]


# ---- the table: name -> (how it is laid out, a part of the line) ---------------------------------


def knobs(text):
    """Of lines `flags; flags; … | a part of the line`, with FLAG for the flag itself.

    A case is named by its flags, which are generate.py's.
    """
    cases = {}
    for line in text.strip().splitlines():
        several, word = line.split(" | ")
        for one in several.split(";"):
            flags = shlex.split(one)
            iteration = [] if "--iter" in flags else ["--iter", "0"]
            name = re.split("[ =]", flags[0])[0]
            lay_out = command("generate", *iteration, *flags)
            cases[" ".join(flags)] = lay_out, word.replace("FLAG", name)
    return cases


# a knob out of range, of the wrong type, not finite
KNOBS = knobs(f"""
--lr 0; --lr 1e-4 inf; --lam -1; --batch-size 0; --clip inf; --lora-alpha 0 | FLAG must be positive
--lr fast; --lr; --batch-size 1e3; --ell square; --nonsense; --recipe large; --iter x | FLAG
--recompute=maybe; --trust-remote-code | FLAG
--lr 1e-400 | FLAG must be positive
--warmup 1.5 | FLAG must be between 0 and 1
--top-p 0 | FLAG must be above 0
--alpha 1 | FLAG must be at least 0 and below 1
--temperature 1e-300 | FLAG must be 0
--eval-temperature 0 | FLAG must be at least 0.001
--seed -1; --lora-rank -1; --iter -1 | FLAG must be zero or positive
--model ""; --split "" | FLAG must not be empty
--max-new-tokens 64 | no room for a prompt
--max-length 65 | 64 positions
--iter 3 | theta_3 is missing
--template "no place"; --template "{{ prompt }}" | holds {{prompt}}
--template "\udcff{{prompt}}" | UTF-8
--template "Q: {{prompt}}\\nA:" | write $'…\\n…'
--template chat | no chat template
--template-kwargs a=1 | name=value is wanted, and --template chat
--date 2026-13-01 | --date must be a day
--run /dev/null/run | /dev/null is no directory
--run {"r" * 300}; --model {"m" * 300} | cannot read or write: [Errno
--model no/such/model | no model
--data no/such.jsonl | no/such.jsonl
--data {THETA0} | has no split train_sft
--data demo | has no split train_sft: give --split
--lora-targets q_proj | FLAG
--lora-targets q_proj nothing --lora-rank 4 | 'nothing' is no linear layer of
""")

GOOD = b'{"prompt": "Spell tin", "response": "t-i-n"}\n'
LONG = b'{"prompt": "' + b"tin " * 12_500_000 + b'", "response": "y"}'
# what a row or a file may lack is in test_sets.py; here, that a stage ends with it in one line
DATA = {
    **{
        f"--run {name!r}": (command("generate", "--iter", 0, "--run", name), "must not hold a tab")
        for name in ("a\tb", "a\nb", "a\r")
    },
    "--eval-data of nothing": (
        command("evaluate", "--theta0", "--eval-data", "no/such.jsonl"),
        "no data at no/such.jsonl",
    ),
    "an empty file": (data(""), "no rows"),
    "half a .json": (data('[{"prompt": "a"', name="set.json"), "set.json"),
    "a .parquet that is none": (data("PAR1xxxx", name="set.parquet"), "set.parquet"),
    "a folder of save_to_disk that is not whole": (half_saved, "cannot read"),
    "an unknown ending": (data(GOOD, name="set.txt"), "no data"),
    "a row of other fields": (data('{"a": 1}\n'), "fields a: 1); known: prompt/real"),
    "a line that was cut off": (data(GOOD + GOOD[:-9]), "line 2"),
    "brackets without end": (data(GOOD + b'{"prompt": ' + b"[" * 100_000), "line 2"),
    "Latin-1": (data(GOOD + '{"prompt": "é", "response": "b"}\n'.encode("latin-1")), "line 2"),
    "a line of NUL bytes, as a power cut leaves": (data(GOOD + b"\x00" * 4096), "line 2"),
    "a prompt of 50 MB and no other": (data(LONG), "prompt too long: 1"),
    "messages without a role": (data([{"messages": [{"content": "a"}]}]), "a turn by 'None'"),
    "pairs without an answer of the opponent": (
        command("train", "--iter", "0", "--pairs", "demo/heldout.jsonl"),
        "no generated response beside the real one",
    ),
}

# a model and its tokenizer: the change of θ_0's folder, and the stage if it is not generate.py
BERT = config(model_type="bert", architectures=["BertForMaskedLM"])
MINE = config(model_type="mine", auto_map={"AutoConfig": "mine.Config"})
SAFETENSORS = "model.safetensors"
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
MOVING = {**LONGROPE, **FACTORS, "original_max_position_embeddings": 32}


def roberta(positions=80):
    """Its positions begin at pad_token_id + 1, unless they are given."""
    sizes = {**SMALL, "max_position_embeddings": positions, "is_decoder": True, "pad_token_id": 1}
    config = AutoConfig.for_model("roberta-prelayernorm", **sizes)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    torch.nn.init.normal_(model.base_model.embeddings.position_embeddings.weight)
    return model


def other_model(name, *flags):
    """generate.py with a tiny model of another family, and these flags."""

    def lay_out(tmp, played):
        shutil.copytree(THETA0, tmp / "model")
        tiny(name).save_pretrained(tmp / "model")
        return "generate", tmp / "run", ["--iter", "0", "--model", tmp / "model", *flags]

    return lay_out


QUANTISED = {
    "MXFP4": {"quantization_config": {"quant_method": "mxfp4"}},
    "bitsandbytes, of old": {"quantization_config": {"load_in_4bit": True}},
    "GPTQ in a text_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    "compressed-tensors, of old": {"compression_config": {"format": "pack-quantized"}},
}


def adapter_alone(folder):
    (folder / "config.json").unlink()
    (folder / SAFETENSORS).rename(folder / "adapter_model.safetensors")


CHANGED_MODELS = {
    "no config.json": (remove("config.json"), "config.json"),
    "half a config.json": (cut("config.json", 40), "cannot load the tokenizer and config"),
    "an encoder": (BERT, "no causal language model (bert)"),
    "code from a model's folder": (MINE, "cannot load the tokenizer"),
    "weights that are not there": (remove(SAFETENSORS), "cannot load the model"),
    "weights that are pickled": (pickled, "cannot load the model"),
    "weights of 50 bytes of nothing": (write(SAFETENSORS, "x" * 50), "deserializing header"),
    "weights that were cut off": (cut(SAFETENSORS), "model.safetensors is damaged"),
    "a weight missing": (weights(lambda w: w.pop(UP)), "missing keys", "train"),
    "a weight too many": (weights(lambda w: w.update({"x": w[UP].clone()})), "unexpected keys"),
    "a weight of another shape": (
        weights(lambda w: w.update({UP: w[UP][:-1].clone()})),
        "mismatched keys",
    ),
    "a weight that is NaN": (weights(lambda w: w[UP].fill_(float("nan"))), "NaN or infinity"),
    "rotary angles that move": (
        config(rope_parameters=MOVING),
        "beyond 32 positions this model's rotary angles (longrope) change",
    ),
    "a model that counts positions from another number": (
        lambda folder: roberta().save_pretrained(folder),
        "cannot keep sequences apart: one differs from the same sequence alone",
    ),
    "fewer positions than its config says": (
        lambda folder: roberta(64).save_pretrained(folder),
        "cannot score 64 tokens (RuntimeError: index 64 is out of bounds",
    ),
    **{
        f"weights quantised by {name}": (config(**fields), "are quantised, by its config.json")
        for name, fields in QUANTISED.items()
    },
    "an adapter beside its weights": (write("adapter_config.json", "{}"), "holds an adapter"),
    "an adapter alone": (adapter_alone, "holds an adapter"),
    "an EOS beyond the model's vocabulary": (
        eos_beyond,
        "ends an answer with token 5000, but its model",
    ),
    "half a tokenizer": (cut("tokenizer.json", 100), "cannot load the tokenizer"),
    "a tokenizer without EOS": (tokenizer_config(), "no EOS"),
    "a tokenizer larger than the model": (config(vocab_size=50), "a token that the model lacks: "),
}
MODELS = {
    name: (model(change, *stage_name), word)
    for name, (change, word, *stage_name) in CHANGED_MODELS.items()
} | {
    "blocks without a name": (other_model("OpenAI GPT"), "OpenAIGPTLMHeadModel does not name its"),
    "an attention that the model lacks": (
        other_model("Gemma 2", "--attention", "sdpa"),
        "Gemma2ForCausalLM does not support an attention implementation",
    ),
    "a live logger that is not installed": (
        without_wandb,
        "--track wandb needs the package wandb: pip install wandb",
    ),
    "adapters where peft takes a layer for experts": (
        other_model("DeepSeek-V3", "--lora-rank", "2"),
        "peft cannot adapt ",
    ),
}

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant: <think>{% endif %}"
ANSWERS = "{% for m in messages %}{{ m.content if m.role == 'assistant' }}</s>{% endfor %}"
CHATS = {
    "does not end an answer": (TURNS.replace("</s>", "; "), "no special token"),
    "refuses everything": ("{{ raise_exception('no') }}", "refuses a conversation (no)"),
    "begins an answer otherwise": (TURNS + ASKS, "cannot be split into prompt and answer"),
    "begins an answer with its end": (
        TURNS.replace("{{ m.content", "</s>{{ m.content"),
        "with the token that ends it",
    ),
    "drops the prompt": (ANSWERS, "the chat template drops or changes the prompt: 2048"),
}


def chat(change, *flags):
    """generate.py with a chat template that a change of θ_0's folder makes."""

    def lay_out(tmp, played):
        script, folder, others = model(change)(tmp, played)
        return script, folder, [*others, "--template", "chat", *flags]

    return lay_out


NAMED = [{"name": name, "template": TURNS} for name in ("a", "b")]
TEMPLATES = {
    f"a chat template that {name}": (chat(write("chat_template.jinja", template)), word)
    for name, (template, word) in CHATS.items()
} | {
    "a chat template with an argument that it does not know": (
        chat(write("chat_template.jinja", TURNS), "--template-kwargs", "enable_thinking=false"),
        "knows no enable_thinking",
    ),
    "chat templates without a default": (
        chat(tokenizer_config(eos_token="</s>", chat_template=NAMED)),
        "no default among them",
    ),
}

RUNS = {
    "of another recipe": (
        run(nothing, "generate", 2, "--lam", "3", "--seed", "7"),
        "seed: 0 there, 7 asked; lam: [5.0, 4.0] there, [3.0] asked)",
    ),
    "of another theta_0": (run(nothing, "generate", 2, "--model", THETA0), "model: 'demo/theta0'"),
    "of another theta_0 in the same place": (
        swapped(weights(lambda w: w["model.norm.weight"][:1].add_(1e-6))),
        "is not the model that",
    ),
    "of a theta_0 whose weights were cut off": (swapped(cut(SAFETENSORS, 2**17)), "restore it"),
    "of another version": (
        run(edit("recipe.json", theta_0=None, right_share=0.75)),
        "another version (knobs right_share, theta_0)",
    ),
    "half a recipe.json": (run(cut("recipe.json", 30)), "recipe.json is damaged ("),
    "half a prompts.json": (untrained(cut("prompts.json", 9)), "prompts.json is damaged ("),
    "training before generating": (command("train", "--iter", "0"), "generate.py --iter 0"),
    "generated.jsonl cut within a line": (untrained(cut("iter1/generated.jsonl", 9)), "line 40: "),
    "generated.jsonl cut at a line's end": (
        untrained(edit_rows(lambda rows: rows.pop(), "iter1/generated.jsonl")),
        "iter1/generated.jsonl has 39 of 40 rows, so it was cut off",
    ),
    "weights of theta_1 cut off": (run(cut(f"iter0/model/{SAFETENSORS}"), "evaluate"), "damaged ("),
    "answers of another model": (untrained(another_theta_1), "iter1 was made from another model"),
    "answers of another": (run(another_theta_1, "generate"), "iter1 was made from another model"),
    "a model of another": (run(another_theta_1, "train"), "iter1 was made from another model"),
    "chunks of another model": (chunks_of_another_model, "generated.part holds answers of another"),
    "figures of another": (run(another_theta_1, "evaluate", 0), "there already, made with another"),
    "other held-out prompts": (run(other_held_out, "evaluate"), "not those of"),
    "half an eval.json": (run(cut("iter1/eval.json", 9), "evaluate"), "eval.json is damaged ("),
    "opponent.jsonl cut off": (untrained(cut("iter1/opponent.jsonl", 9)), "line 80: "),
}

# rows of iteration 1's generated.jsonl that cannot be this run's
FOREIGN_ROWS = {
    "another iteration": (set_in(0, iter=0), "iteration 0"),
    "no ids": (lambda rows: rows[0].pop("generated_ids"), "generated_ids"),
    "another end": (set_in(3, finish="length"), "tokenizer"),
    "ids too large": (set_in(0, generated_ids=[10**6]), "token ids"),
    "a null": (set_in(0, real=None), "line 1"),
    "an id twice": (same_id, "not those of"),
    "another prompt": (set_in(0, prompt="zzz 0"), "not those of"),
    "another human answer": (set_in(5, real="?"), "not those of"),
}
PAIRS = {
    f"generated.jsonl: {name}": (untrained(edit_rows(change, "iter1/generated.jsonl")), word)
    for name, (change, word) in FOREIGN_ROWS.items()
} | {
    "an iteration of another SFT set": (
        untrained(edit_rows(set_in(5, prompt="?"), "iter0/generated.jsonl")),
        "not those of",
    )
}

TABLE = KNOBS | DATA | MODELS | TEMPLATES | RUNS | PAIRS
LOADS = (
    "weights that are not",
    "weights that are p",
    "a weight",
    "a model that counts",
    "fewer positions",
    "opponent.jsonl cut",
)  # nothing less would tell


def listed_messages():
    """Patterns of the table of messages; FILE, N, … stand for anything."""
    section = (
        (REPO / "docs" / "troubleshooting.md").read_text().split("## When something is wrong")[1]
    )
    rows = [line for line in section.splitlines() if line.startswith("|")]
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row.split("|")[1])]
    patterns = [
        re.sub(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", ".+", re.escape(message)) for message in messages
    ]
    return [pattern.replace("…", ".*") for pattern in patterns]


LISTED = listed_messages()


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_a_line_and_changes_nothing(
    name, tmp_path, tmp_path_factory, played, monkeypatch
):
    lay_out, word = TABLE[name]
    script, folder, flags = lay_out(tmp_path, played)
    before = snapshot(tmp_path)
    if not name.startswith(LOADS):
        loaders = (
            "generate.load_frozen",
            "spin.report.evaluation_metrics.load_frozen",
            "train.load_empty",
        )
        for function in (*loaders, "spin.model.weights.load_whole"):
            monkeypatch.setattr(function, lambda *args: pytest.fail("weights were loaded"))
    shown = tmp_path_factory.mktemp("shell") / "stderr"
    code, err = as_in_a_shell(lambda: stage(script, folder, *flags), shown)
    assert code == 2 and re.fullmatch(r"\n?error: [^\n]*\n", err), err
    line = err.strip()
    assert word in line and len(line) < 1100, line
    listed = any(re.fullmatch("error: " + pattern, line) for pattern in LISTED)
    assert listed, f"docs/troubleshooting.md does not list: {line}"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "say",
    [
        lambda: logging.getLogger("torch.distributed.checkpoint").warning("newly initialized"),
        lambda: warnings.warn("newly initialized", stacklevel=1),
        lambda: os.write(2, b"newly initialized\n"),  # as libraries in C++ do
    ],
)
def test_control_words_of_libraries_before_the_line_are_seen(say, tmp_path):
    code, err = as_in_a_shell(lambda: (say(), fail("no")), tmp_path / "stderr")
    assert code == 2 and "newly initialized" in err and err.endswith("error: no\n")


def answers(folder, text, *flags):
    """The rows that generate.py writes for an SFT set of this text."""
    (folder / "set.jsonl").write_bytes(text.encode())
    stage("generate", folder / "run", "--iter", 0, "--data", folder / "set.jsonl", *flags)
    return list(read_jsonl(folder / "run" / "iter0" / "generated.jsonl"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The answers to PLAIN. Odd forms of the same rows: test_sets.py."""
    return answers(tmp_path_factory.mktemp("clean"), PLAIN)


def test_other_braces_in_a_template_are_text(tmp_path):
    rows = answers(tmp_path, PLAIN, "--template", "{x} {{y}} {prompt} %s:")
    assert len(rows) == 5


def writes_no_bos(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))


@pytest.mark.parametrize(
    "change, same",
    [
        (tokenizer_config(eos_token="</s>", bos_token="<s>"), True),
        (tokenizer_config(eos_token="</s>"), True),
        (writes_no_bos, False),
    ],
    ids=["no pad", "no name for the BOS", "no BOS"],
)
def test_a_tokenizer_without_pad_or_bos_is_taken_as_it_is(change, same, clean, tmp_path):
    shutil.copytree(THETA0, tmp_path / "model")
    change(tmp_path / "model")
    rows = answers(tmp_path, PLAIN, "--model", tmp_path / "model")
    assert len(rows) == 5 and (rows == clean) == same
    flags = ["--data", tmp_path / "set.jsonl", "--model", tmp_path / "model"]
    stage("train", tmp_path / "run", "--iter", 0, *flags)
    assert (tmp_path / "run" / "iter0" / "model").is_dir()


@pytest.mark.parametrize(
    "script, flags",
    [
        ("generate.py", ["--iter", "0", "--lr", "nan"]),
        ("train.py", ["--iter", "1"]),
        ("evaluate.py", ["--model", "no/such/x"]),
        ("spin.report", []),
    ],
)
def test_every_command_gives_exit_code_2_and_one_line(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *MICRO, "--run", str(tmp_path / "run"), *flags])
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    program = str(REPO / script) if script.endswith(".py") else script
    code, err = as_in_a_shell(lambda: run(program, run_name="__main__"), tmp_path / "stderr")
    assert code == 2 and re.fullmatch(r"error: [^\n]*\n", err), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "loader, file, entry",
    [
        (AutoConfig, "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.A"}}),
        (
            AutoTokenizer,
            "tokenizer_config.json",
            {"tokenizer_class": "A", "auto_map": {"AutoTokenizer": [None, "mine.A"]}},
        ),
    ],
)
def test_code_in_a_models_folder_is_not_run(loader, file, entry, tmp_path, monkeypatch):
    folder, seen = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(THETA0, folder)
    edit(file, **entry)(folder)
    code = f"open({str(seen)!r}, 'w')\nfrom transformers import {{}} as A\n"
    kind = "LlamaConfig" if loader is AutoConfig else "PreTrainedTokenizerFast"
    (folder / "mine.py").write_text(code.format(kind))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    flags = ["--iter", "0", "--model", folder]
    _, err = as_in_a_shell(lambda: stage("generate", tmp_path / "run", *flags), tmp_path / "err")
    assert not seen.exists() and "Traceback" not in err
    as_in_a_shell(lambda: loader.from_pretrained(folder, trust_remote_code=True), tmp_path / "err")
    assert seen.exists()  # the control: the code would run
