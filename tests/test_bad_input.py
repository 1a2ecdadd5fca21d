"""The table of bad inputs: each ends in one line and exit code 2, leaves the disk as it was, and
loads no weights.

A case is a function that lays out its files in a fresh directory and returns the command: (stage,
run directory, flags). Inputs that look bad and are not (BOM, CRLF, mixed shapes, …) are below, with
the result that they must give.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
import warnings

import datasets
import pytest
import torch
from conftest import MICRO, REPO, THETA0, as_in_a_shell, shell, stage, torchrun
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForCausalLM,
)

from spin.checksums import write_list
from spin.files import fail, read_jsonl, write_jsonl
from spin.flags import flag
from spin.recipe import Recipe

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


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


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


def sharded(folder):
    """An index names two files of weights, one of which is there."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def eos_beyond(folder):
    """The EOS gets a number that the model has no embedding for, in a tokenizer no larger."""
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"]["</s>"] = 5000
    for token in core["added_tokens"]:
        if token["content"] == "</s>":
            token["id"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(core))


def keep_lines(name, number):
    return rewrite(name, lambda old: b"".join(old.splitlines(keepends=True)[:number]))


def unlisted(change):
    """The same where the checksums were lost: what is told without them."""

    def change_more(folder):
        for listed in folder.rglob("*.sha256"):
            listed.unlink()
        change(folder)

    return change_more


def edit_rows(change):
    """generated.jsonl after a change of its list of rows."""

    def change_file(folder):
        rows = list(read_jsonl(folder / "generated.jsonl"))
        change(rows)
        write_jsonl(folder / "generated.jsonl", rows)

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


def row(**fields):
    """A set of this row alone: beside good ones it is left out and counted (test_sets.py)."""
    return data([fields])


def train_on(*rows):
    def lay_out(tmp, played):
        write_jsonl(tmp / "pairs.jsonl", rows)
        return "train", tmp / "run", ["--iter", "0", "--pairs", tmp / "pairs.jsonl"]

    return lay_out


def train_on_no_file(tmp, played):
    return "train", tmp / "run", ["--iter", 0, "--pairs", tmp / "no.jsonl"]


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


def pairs(change, keep_prompts=True):
    """generated.jsonl of iteration 0 after a change of its rows, in a run that is to be trained."""

    def lay_out(tmp, played):
        (tmp / "run" / "iter0").mkdir(parents=True)
        shutil.copy(played / "iter0" / "generated.jsonl", tmp / "run" / "iter0")
        if keep_prompts:
            shutil.copy(played / "prompts.json", tmp / "run")
        edit_rows(change)(tmp / "run" / "iter0")
        return "train", tmp / "run", ["--iter", "0"]

    return lay_out


def untrained(change):
    """Iteration 1 without its model, as a stop amid training leaves it, after a change."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        shutil.rmtree(tmp / "run" / "iter1" / "model")
        change(tmp / "run" / "iter1")
        return "train", tmp / "run", ["--iter", "1"]

    return lay_out


def swapped(change):
    """θ_0 has changed since the run began: its generated.jsonl is another model's."""

    def lay_out(tmp, played):
        shutil.copytree(THETA0, tmp / "model")
        flags = ["--iter", 0, "--model", tmp / "model"]
        (tmp / "run").mkdir()
        stage("generate", tmp / "run", *flags)
        change(tmp / "model")
        return "train", tmp / "run", flags

    return lay_out


def another_theta_1(run):
    """θ_1 was trained anew, with other bytes, after iteration 1 had its answers."""
    shutil.rmtree(run / "iter1" / "model")
    shutil.copytree(run / "iter0" / "model", run / "other")
    weights(lambda w: w[UP].mul_(1.01))(run / "other")
    shutil.rmtree(run / "iter0" / "model")
    (run / "other").rename(run / "iter0" / "model")
    write_list(run / "iter0" / "model.sha256", run / "iter0" / "model", [SAFETENSORS])


def run_is_a_file(tmp, played):
    (tmp / "run").write_text("")
    return "generate", tmp / "run", ["--iter", 0]


def held_out(tmp, played):
    """The held-out set changes between the evaluation of θ_0 and that of θ_1."""
    flags = ["--eval-data", tmp / "held.jsonl"]
    (tmp / "held.jsonl").write_text(PLAIN)
    stage("evaluate", tmp / "run", "--theta0", *flags)
    (tmp / "run" / "eval.json").unlink()
    (tmp / "held.jsonl").write_text(PLAIN.replace("Spell", "Twice"))
    return "evaluate", tmp / "run", ["--theta0", *flags]


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
--lr 0; --lr nan; --lr 1e-4 inf | FLAG must be positive
--lr fast; --lr | FLAG
--lr 1e-400 | FLAG must
--lam -1 | FLAG must be positive
--lam nan; --batch-size 0; --batch-size 1e3; --epochs -2 | FLAG
--warmup 1.5 | FLAG must be between
--warmup nan; --top-p 0; --top-p 1.01; --temperature -1; --temperature inf | FLAG
--temperature 1e-300 | FLAG must be 0
--num-prompts 0; --eval-prompts 0; --right-share 1.5; --right-share nan | FLAG
--eval-temperature 0; --eval-temperature 1e-300; --eval-temperature inf | FLAG must be at least
--max-new-tokens 64 | no room for a prompt
--max-new-tokens 0; --micro-tokens 0; --mix 0; --clip 0; --clip inf; --seed -1; --seed 0.5 | FLAG
--ell square; --objective dpo; --engine vllm; --dtype int8; --attention none; --alpha 1 | FLAG
--slots 0; --chunk 2.5; --replicas 0; --iterations 0; --checkpoint-every 0 | FLAG
--iter -1; --iter x | FLAG
--iter 3 | theta_3 is missing
--nonsense; --recipe large | FLAG
--max-length 65 | 64 positions
--trust-remote-code | FLAG
--template "no place"; --template "{{ prompt }}" | holds {{prompt}}
--template chat | no chat template
--template "Q: {{prompt}}\\nA:" | write $'…\\n…'
--template "Q: {{prompt}}\\tA:" | write $'…\\t…'
--template-kwargs "note=a\\nb" | --template-kwargs must not hold a backslash
--template-kwargs a=1 | name=value is wanted, and --template chat
--date 2026-13-01 | --date must be a day
--date yesterday | --date must be a day
--template "\udcff{{prompt}}" | UTF-8
--run /dev/null/run | /dev/null is a file
--run {"r" * 300}; --model {"m" * 300} | cannot read or write: [Errno
--model no/such/model | no model
--model "" | FLAG must not be empty
--data no/such.jsonl | no/such.jsonl
--data {THETA0} | holds no file of data
--data "" | FLAG must not be empty
--data demo | holds no file named as the split
--split "" | FLAG must not be empty
--eval-split "" | FLAG must not
--recompute=maybe; --offload=1 | FLAG
--lora-rank -1; --lora-rank 0.5; --lora-alpha 0; --lora-alpha inf | FLAG
--lora-alpha 8; --lora-targets q_proj | FLAG
--lora-targets q_proj nothing --lora-rank 4 | 'nothing' is no linear layer of
--lora-rank 400 | the smaller side of model.layers.0.
--sft-baseline 3 | arguments: 3
""")

USER = {"role": "user", "content": "Spell tin"}
BOT = {"role": "assistant", "content": "t-i-n"}
PICTURE = {"role": "assistant", "content": [{"type": "image"}]}
GOOD = b'{"prompt": "Spell tin", "response": "t-i-n"}\n'
DEEP = b'{"prompt": ' + b"[" * 100_000
LONG = b'{"prompt": "' + b"tin " * 12_500_000 + b'", "response": "y"}'
DATA = {
    "--eval-data of nothing": (
        command("evaluate", "--theta0", "--eval-data", "no/such.jsonl"),
        "no data at no/such.jsonl",
    ),
    "an empty file": (data(""), "no rows"),
    "blank lines only": (data("\n \r\n\n"), "no rows"),
    "a list as .json that holds no objects": (data("[{}, 3]", name="set.json"), "no usable rows"),
    "an object as .json": (data('{"epochs": 3}', name="set.json"), "unknown shape"),
    "half a .json": (data('[{"prompt": "a"', name="set.json"), "set.json"),
    "a .parquet that is none": (data("PAR1xxxx", name="set.parquet"), "set.parquet"),
    "a folder of save_to_disk that is not whole": (half_saved, "cannot read"),
    "an unknown ending": (data(GOOD, name="set.txt"), "no data"),
    "a row without fields": (data("{}\n"), "unknown shape"),
    "a row of other fields": (data('{"a": 1}\n'), "fields a: 1); known: prompt/real"),
    "a line that is a list": (data("[1]\n"), "line 1"),
    "a line that is broken": (data(GOOD + b"{oops\n"), "line 2"),
    "a line that was cut off": (data(GOOD + GOOD[:-9]), "line 2"),
    "a bracket too many": (data(GOOD + GOOD[:-1] + b"]\n"), "line 2"),
    "brackets without end": (data(GOOD + DEEP), "line 2"),
    "Latin-1": (data(GOOD + '{"prompt": "é", "response": "b"}\n'.encode("latin-1")), "line 2"),
    "UTF-16": (data(GOOD.decode().encode("utf-16")), "line 1"),
    "a NUL byte": (data(GOOD + b'{"prompt": "a\x00b", "response": "c"}\n'), "line 2"),
    "a line of NUL bytes, as a power cut leaves": (data(GOOD + b"\x00" * 4096), "line 2"),
    "a line of 50 MB that is no JSON": (data(GOOD + b"x" * 50_000_000), "line 2"),
    "a prompt of 50 MB and no other": (data(LONG), "prompt too long: 1"),
    "no usable row": (
        data([{"prompt": "a", "response": ""}, {"prompt": " ", "response": "b"}]),
        "empty prompt or response: 2",
    ),
    "prompts longer than the context": (
        data([{"prompt": w * 30, "response": "a"} for w in ("tin", "amu")]),
        "prompt too long: 2",
    ),
    "a prompt that is null": (row(prompt=None, response="b"), "nothing in prompt: 1"),
    "a response that is a number": (
        row(prompt="a", response=3),
        "real is no text: 1",
    ),
    "a response that is a list": (row(question="a", answer=["b"]), "no list of messages"),
    "a lone surrogate": (row(prompt="a \ud800", response="b"), "prompt is no valid Unicode"),
    "a field too few": (row(prompt="a"), "unknown shape with fields prompt"),
    "messages that are text": (row(messages="Hi"), "no prompt first"),
    "messages that are null": (row(messages=None), "nothing in messages"),
    "messages without a role": (row(messages=[{"content": "a"}, BOT]), "a turn by 'None'"),
    "messages without content": (row(messages=[{"role": "user"}, BOT]), "a turn without text"),
    "messages of pictures": (row(messages=[USER, PICTURE]), "a turn without text"),
    "messages that begin with the answer": (
        row(messages=[BOT, USER]),
        "no prompt first",
    ),
    "one message": (row(messages=[USER]), "without an answer"),
    "pairs of two prompts": (
        row(real=[USER, BOT], generated=[{**USER, "content": "Other"}, BOT]),
        "do not answer the same prompt",
    ),
    "an Alpaca input that is a number": (
        row(instruction="a", input=3, output="b"),
        "prompt is no text",
    ),
    "pairs without an answer of the opponent": (
        train_on({"prompt": "a", "response": "b"}),
        "no generated response beside the real one",
    ),
    "pairs none of which can be used": (
        train_on({"prompt": "a", "real": "", "generated": "c"}),
        "empty prompt or response: 1",
    ),
    "a file of pairs that is not there": (train_on_no_file, "no.jsonl"),
}

# a model and its tokenizer: the change of θ_0's folder, and the stage if it is not generate.py
BERT = config(model_type="bert", architectures=["BertForMaskedLM"])
MINE = config(model_type="mine", auto_map={"AutoConfig": "mine.Config"})
SAFETENSORS = "model.safetensors"
SMALL = dict(
    vocab_size=88,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
MOVING = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}


def family(build):
    """Another model in the folder, with the same tokenizer."""
    return lambda folder: build().save_pretrained(folder)


def openai_gpt():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=88, **sizes))


def roberta():
    """Its positions begin at pad_token_id + 1, unless they are given."""
    config = RobertaPreLayerNormConfig(**{**SMALL, "max_position_embeddings": 80}, is_decoder=True)
    model = RobertaPreLayerNormForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    torch.nn.init.normal_(model.base_model.embeddings.position_embeddings.weight)
    return model


def softcapped(tmp, played):
    shutil.copytree(THETA0, tmp / "model")
    tiny("Gemma 2").save_pretrained(tmp / "model")
    flags = ["--iter", "0", "--model", tmp / "model", "--attention", "sdpa"]
    return "generate", tmp / "run", flags


def adapted(build):
    """generate.py with adapters for another model."""

    def lay_out(tmp, played):
        shutil.copytree(THETA0, tmp / "model")
        build().save_pretrained(tmp / "model")
        flags = ["--iter", "0", "--model", tmp / "model", "--lora-rank", "2"]
        return "generate", tmp / "run", flags

    return lay_out


CHANGED_MODELS = {
    "no config.json": (remove("config.json"), "config.json"),
    "half a config.json": (cut("config.json", 40), "cannot load the tokenizer and config"),
    "a config without a type": (config(model_type=None), "cannot load the tokenizer and config"),
    "an encoder": (BERT, "no causal language model (bert)"),
    "an encoder and a decoder": (config(model_type="t5"), "no causal language model (t5)"),
    "a model of pictures": (config(model_type="vit"), "no causal language model (vit)"),
    "code from a model's folder": (MINE, "cannot load the tokenizer"),
    "weights that are not there": (remove(SAFETENSORS), "cannot load the model"),
    "weights that are pickled": (pickled, "cannot load the model"),
    "weights of 50 bytes of nothing": (write(SAFETENSORS, "x" * 50), "deserializing header"),
    "weights that were cut off": (cut(SAFETENSORS), "model.safetensors is damaged"),
    "weights with something behind": (
        rewrite(SAFETENSORS, lambda old: old + b"xy"),
        "model.safetensors is damaged",
    ),
    "a weight missing": (weights(lambda w: w.pop(UP)), "missing keys", "train"),
    "a weight too many": (
        weights(lambda w: w.update({UP + "2": w[UP].clone()})),
        "unexpected keys",
        "train",
    ),
    "a weight of another shape": (
        weights(lambda w: w.update({UP: w[UP][:-1].clone()})),
        "mismatched keys",
        "train",
    ),
    "a weight that is NaN": (weights(lambda w: w[UP].fill_(float("nan"))), "NaN or infinity"),
    "a shard of the weights missing": (sharded, "model-2.safetensors is damaged (No such file"),
    "rotary angles that move": (
        config(rope_parameters=MOVING),
        "beyond 32 positions this model's rotary angles (longrope) change",
    ),
    "blocks without a name": (family(openai_gpt), "OpenAIGPTLMHeadModel does not name its blocks"),
    "a model that counts positions from another number": (
        family(roberta),
        "cannot keep sequences in one row apart: one differs from the same sequence alone",
    ),
    "an EOS beyond the model's vocabulary": (eos_beyond, "ends an answer by token 5000, its model"),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "cannot load the tokenizer",
    ),
    "half a tokenizer": (cut("tokenizer.json", 100), "cannot load the tokenizer"),
    "a length in words": (
        tokenizer_config(eos_token="</s>", model_max_length="long"),
        "cannot load the tokenizer",
    ),
    "a tokenizer without EOS": (tokenizer_config(), "no EOS"),
    "a tokenizer larger than the model": (config(vocab_size=50), "a token that the model lacks: "),
}
MODELS = {
    name: (model(change, *stage_name), word)
    for name, (change, word, *stage_name) in CHANGED_MODELS.items()
} | {
    "an attention that the model lacks": (
        softcapped,
        "Gemma2ForCausalLM cannot use --attention sdpa: use --attention auto",
    ),
    "adapters for weights that have another name in the files": (
        adapted(lambda: tiny("Llama").model),
        "do not hold model.layers.0.self_attn.q_proj alone under this name",
    ),
    "adapters where peft takes a layer for experts": (
        adapted(lambda: tiny("DeepSeek-V3")),
        "peft cannot adapt ",
    ),
}

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
CHATS = {
    "that does not end an answer": (TURNS.replace("</s>", "; "), "no special token", []),
    "that refuses everything": ("{{ raise_exception('no') }}", "refuses a conversation (no)", []),
    "that begins an answer otherwise": (
        TURNS + "{% if add_generation_prompt %}assistant: <think>{% endif %}",
        "cannot be split into prompt and answer",
        [],
    ),
    "that drops the answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content[:2] }}</s>{% endfor %}",
        "cannot be split into prompt and answer",
        [],
    ),
    "that begins an answer with its end": (
        TURNS.replace("{{ m.content", "</s>{{ m.content"),
        "with the token that ends it",
        [],
    ),
    "that drops the prompt": (
        "{% for m in messages %}{{ m.content if m.role == 'assistant' }}</s>{% endfor %}",
        "the chat template drops or changes the prompt: 2048",
        [],
    ),
    "with an argument that it does not know": (
        TURNS,
        "knows no enable_thinking",
        ["--template-kwargs", "enable_thinking=false"],
    ),
}


def chat(template: str, flags: list[str]):
    """generate.py with a chat template of this text."""

    def lay_out(tmp_path, played):
        script, folder, others = model(write("chat_template.jinja", template))(tmp_path, played)
        return script, folder, [*others, "--template", "chat", *flags]

    return lay_out


TEMPLATES = {
    f"a chat template {name}": (chat(template, flags), word)
    for name, (template, word, flags) in CHATS.items()
}

NAMED = tokenizer_config(
    eos_token="</s>", chat_template=[{"name": name, "template": TURNS} for name in ("a", "b")]
)


def named_templates(tmp_path, played):
    """generate.py with two named chat templates, none of them called default."""
    script, folder, flags = model(NAMED)(tmp_path, played)
    return script, folder, [*flags, "--template", "chat"]


TEMPLATES["chat templates without a default"] = named_templates, "no default among them"

RUNS = {
    "of another recipe": (
        run(nothing, "generate", 2, "--lam", "3", "--seed", "7"),
        "seed: 0 there, 7 asked; lam: ",
    ),
    "of another rank of adapters": (
        run(nothing, "train", 1, "--lora-rank", "4"),
        "lora_rank: 0 there, 4 asked",
    ),
    "of another theta_0": (
        run(nothing, "generate", 2, "--model", THETA0),
        "model: 'demo/theta0' there",
    ),
    "of another theta_0 in the same place": (
        swapped(weights(lambda w: w[UP].mul_(1.01))),
        "model/model.safetensors is damaged, changed or new, by the checksums in",
    ),
    "of another tokenizer in the same place": (
        swapped(rewrite("tokenizer.json", lambda old: old + b" ")),
        "model/tokenizer.json is damaged, changed or new, by the checksums in",
    ),
    "of a theta_0 that got a chat template": (
        swapped(write("chat_template.jinja", TURNS)),
        "model/chat_template.jinja is damaged, changed or new, by the checksums in",
    ),
    "of a newer version": (
        run(unlisted(edit("recipe.json", new_knob=1))),
        "another version (knobs new_knob)",
    ),
    "half a recipe.json": (
        run(cut("recipe.json", 30)),
        "restore what was there, or choose another --run",
    ),
    "half a recipe.json, unlisted": (
        run(unlisted(cut("recipe.json", 30))),
        "recipe.json is damaged (",
    ),
    "a recipe.json that is a list": (
        run(unlisted(write("recipe.json", "[]"))),
        "recipe.json is damaged (",
    ),
    "half a prompts.json": (
        run(rewrite("prompts.json", lambda old: old[:6] + b"\xff")),
        "prompts.json is damaged, changed",
    ),
    "a run that is a file": (run_is_a_file, "is a file"),
    "training before generating": (command("train", "--iter", "0"), "generate.py --iter 0"),
    "generated.jsonl cut off": (
        run(cut("iter0/generated.jsonl")),
        "iter0/generated.jsonl is damaged, changed or new, by the checksums in",
    ),
    "generated.jsonl cut off, and generated again": (
        run(cut("iter1/generated.jsonl", 99), "generate"),
        "iter1/generated.* to have what is needed made again",
    ),
    "weights of an iteration cut off": (
        run(cut("iter0/model/model.safetensors"), "evaluate"),
        "run train.py --iter 0 again",
    ),
    "weights of an iteration cut off, unlisted": (
        run(unlisted(cut("iter0/model/model.safetensors")), "evaluate"),
        "model.safetensors is damaged (",
    ),
    "an iteration's tokenizer lost": (
        run(remove("iter0/model/tokenizer.json"), "evaluate"),
        "tokenizer.json is missing, by the checksums in",
    ),
    "metrics.jsonl cut at a line": (
        run(cut("iter1/metrics.jsonl", 300)),
        "metrics.jsonl is damaged, changed",
    ),
    "half an opponent.json": (
        untrained(cut("opponent.json", 9)),
        "opponent.json is damaged, changed",
    ),
    "half an opponent.json, unlisted": (
        untrained(unlisted(cut("opponent.json", 9))),
        "opponent.json is damaged (",
    ),
    "half a generated.json": (
        run(cut("iter1/generated.json", 9), "generate"),
        "generated.json is damaged, changed",
    ),
    "half a heldout.json": (
        run(cut("heldout.json", 9), "evaluate"),
        "heldout.json is damaged, changed",
    ),
    "answers of another model": (
        run(another_theta_1),
        "iter0/model.sha256 is damaged, changed or new, by the checksums in",
    ),
    "other held-out prompts": (held_out, "not those of"),
    "half an eval.json": (
        run(cut("iter1/eval.json", 9), "evaluate"),
        "eval.json is damaged, changed",
    ),
    "answers.jsonl cut at a line": (
        run(keep_lines("iter0/answers.jsonl", 4)),
        "answers.jsonl is damaged, changed",
    ),
    "opponent.jsonl cut off before training": (
        untrained(cut("opponent.jsonl")),
        "opponent.jsonl is damaged, changed",
    ),
}

# rows of generated.jsonl that cannot be this run's
FOREIGN_ROWS = {
    "another iteration": (set_in(0, iter=1), "iteration 1"),
    "a row twice": (lambda rows: rows.append(rows[0]), "41 pairs in"),
    "no ids": (lambda rows: rows[0].pop("generated_ids"), "generated_ids"),
    "another end": (set_in(3, finish="length"), "tokenizer"),
    "ids too large": (set_in(0, generated_ids=[10**6]), "token ids"),
    "no answer": (set_in(0, generated_ids=[]), "token ids"),
    "ids that are text": (set_in(0, generated_ids="ab"), "token ids"),
    "ids that are not numbers": (set_in(0, generated_ids=[True, 2]), "token ids"),
    "a null": (set_in(0, real=None), "line 1"),
    "an id that is a list": (set_in(0, id=[1]), "id [1]"),
    "a row less": (lambda rows: rows.pop(), "39 pairs in"),
    "no rows": (lambda rows: rows.clear(), "0 pairs in"),
    "an id twice": (same_id, "not those of"),
    "another prompt": (set_in(0, prompt="zzz 0"), "not those of"),
}
PAIRS = {
    **{f"generated.jsonl: {name}": (pairs(c), word) for name, (c, word) in FOREIGN_ROWS.items()},
    "an id twice, and no prompts.json to tell": (pairs(same_id, False), "occurs twice"),
    "an iteration of another SFT set": (
        untrained(unlisted(edit_rows(set_in(5, prompt="?")))),
        "not those of",
    ),
    "an iteration of other human answers": (
        untrained(unlisted(edit_rows(set_in(5, real="?")))),
        "not those of",
    ),
}

TABLE = KNOBS | DATA | MODELS | TEMPLATES | RUNS | PAIRS
LOADS = (
    "weights that are not",
    "weights that are p",
    "a weight",
    "a model that counts",
    "half an opponent.json, unlisted",
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
def test_bad_input_is_one_line_with_exit_code_2_and_changes_nothing(
    name, tmp_path, tmp_path_factory, played, monkeypatch
):
    lay_out, word = TABLE[name]
    script, folder, flags = lay_out(tmp_path, played)
    before = snapshot(tmp_path)
    if not name.startswith(LOADS):
        loaders = "generate.load_frozen", "spin.figures.load_frozen", "train.load_empty"
        for function in (*loaders, "spin.models.load_whole"):
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


def test_the_table_holds_every_knob():
    """But --revision: any text may be the name of one."""
    held = {re.split("[ =]", name)[0] for name in TABLE}
    assert {flag(f.name) for f in dataclasses.fields(Recipe)} - held == {"--revision"}


# ---- what looks bad and is not -------------------------------------------------------------------

MIXED = [
    {"prompt": "Spell tin", "response": "t-i-n"},
    {"prompt": "Spell kola", "completion": "k-o-l-a"},
    {
        "messages": [
            {"role": "user", "content": "Spell bel"},
            {"role": "assistant", "content": "b-e-l"},
            USER,
        ]
    },
    {"instruction": "Spell amu", "input": "", "output": "a-m-u"},
    {"id": "x", "iter": 7, "prompt": "Spell rodak", "real": "r-o-d-a-k", "generated": "y"},
]
DOUBLE = [{**row, "id": 1, "x": None} for row in ROWS]
FINE = {
    "BOM": "\ufeff" + PLAIN,
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "no last newline": PLAIN[:-1],
    "blank lines": PLAIN.replace("\n", "\n\n"),
    "mixed shapes, one with ids of its own": "".join(json.dumps(row) + "\n" for row in MIXED),
    "escapes": PLAIN.replace("S", "\\u0053"),
    "duplicate ids and other fields": "".join(json.dumps(row) + "\n" for row in DOUBLE),
}


def answers(folder, text, *flags):
    """The rows that generate.py writes for an SFT set of this text."""
    (folder / "set.jsonl").write_bytes(text.encode())
    stage("generate", folder / "run", "--iter", 0, "--data", folder / "set.jsonl", *flags)
    return list(read_jsonl(folder / "run" / "iter0" / "generated.jsonl"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The answers to PLAIN, which the odd forms of the same rows must get too."""
    return answers(tmp_path_factory.mktemp("clean"), PLAIN)


@pytest.mark.parametrize("form", FINE)
def test_odd_forms_of_good_data_give_the_answers_of_the_plain_form(form, clean, tmp_path):
    assert answers(tmp_path, FINE[form]) == clean


def test_control_other_rows_give_other_answers(clean, tmp_path):
    assert answers(tmp_path, PLAIN.replace("Spell", "Twice")) != clean


def test_texts_of_50_mb_among_good_rows_cost_seconds(tmp_path, capsys):
    begun = time.perf_counter()
    much = "tin " * 12_500_000
    rows = answers(tmp_path, json.dumps({"prompt": much, "response": "y"}) + "\n" + PLAIN)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in ROWS}
    long_prompt = {"prompt": much, "real": "a", "generated": "b"}
    long_answer = {"prompt": "Spell tin", "real": much, "generated": "b"}
    write_jsonl(tmp_path / "pairs.jsonl", [long_prompt, long_answer])
    stage("train", tmp_path / "other", "--iter", 0, "--pairs", tmp_path / "pairs.jsonl")
    assert "pairs: read: 2, prompt too long: 1" in capsys.readouterr().out
    assert (tmp_path / "other" / "iter0" / "model").is_dir()
    assert time.perf_counter() - begun < 60


def test_nul_characters_that_are_escaped_and_other_braces_in_a_template_are_text(tmp_path):
    text = PLAIN.replace("Spell", "Spell\\u0000{0}")
    rows = answers(tmp_path, text, "--template", "{x} {{y}} {prompt} %s:")
    assert len(rows) == 5 and all(row["prompt"].startswith("Spell\0{0} ") for row in rows)


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
def test_a_tokenizer_without_pad_gives_the_same_answers_and_one_without_bos_is_taken_as_it_is(
    change, same, clean, tmp_path
):
    shutil.copytree(THETA0, tmp_path / "model")
    change(tmp_path / "model")
    rows = answers(tmp_path, PLAIN, "--model", tmp_path / "model")
    assert len(rows) == 5 and (rows == clean) == same
    flags = ["--data", tmp_path / "set.jsonl", "--model", tmp_path / "model"]
    stage("train", tmp_path / "run", "--iter", 0, *flags)
    assert (tmp_path / "run" / "iter0" / "model").is_dir()


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, rotary_pct=0.5)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=88, n_embd=32, n_layer=1, n_head=2)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, num_key_value_heads=1)),
    ],
)
def test_causal_models_of_other_families_are_taken(build, tmp_path):
    """GPT-NeoX (Pythia) has is_decoder False in its config, as encoders have."""
    other = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(THETA0, tmp_path / "model", ignore=other)
    build().save_pretrained(tmp_path / "model")
    assert len(answers(tmp_path, PLAIN, "--model", tmp_path / "model")) == 5
    flags = ["--data", tmp_path / "set.jsonl", "--model", tmp_path / "model"]
    stage("train", tmp_path / "run", "--iter", 0, *flags)


# ---- through the shell ---------------------------------------------------------------------------


def test_the_shell_gives_exit_code_2_and_one_line_in_every_stage(tmp_path):
    for script, flags in (
        ("generate.py", ["--iter", "0", "--lr", "nan"]),
        ("train.py", ["--iter", "1"]),
        ("evaluate.py", ["--model", "no/such/x"]),
        ("-m spin.report", []),
    ):
        done = shell(sys.executable, *script.split(), *MICRO, "--run", tmp_path / "run", *flags)
        assert done.returncode == 2 and re.fullmatch(r"error: [^\n]*\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, entry",
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}},
        ),
    ],
)
def test_code_in_a_models_folder_is_not_run_even_if_somebody_answers_yes(file, entry, tmp_path):
    folder, seen = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(THETA0, folder)
    edit(file, **entry)(folder)
    (folder / "mine.py").write_text(f"""open({str(seen)!r}, 'w')
from transformers import LlamaConfig as Config, PreTrainedTokenizerFast as Mine
""")
    flags = [*MICRO, "--run", tmp_path / "run", "--iter", "0", "--model", folder]
    done = shell(sys.executable, "generate.py", *flags, input="y\n" * 9)
    assert not seen.exists() and "Traceback" not in done.stderr
    trust = """import sys
from transformers import AutoConfig, AutoTokenizer
for a in (AutoConfig, AutoTokenizer): a.from_pretrained(sys.argv[1], trust_remote_code=True)"""
    trusting = shell(sys.executable, "-c", trust, folder)
    assert seen.exists(), trusting.stderr  # the control: the code would run


def test_under_torchrun_rank_0_alone_speaks(tmp_path):
    done = torchrun(2, "train.py", *MICRO, "--run", tmp_path / "run", "--iter", "3")
    assert done.returncode != 0 and done.stderr.count("error: theta_3 is missing") == 1
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
