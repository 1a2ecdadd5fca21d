"""The table of bad inputs: each ends in one line and exit code 2, leaves the disk as it was, and loads no weights.

A case is a function that lays out its files in a fresh directory and returns the command: (stage, run directory, flags).
Inputs that look bad and are not (BOM, CRLF, mixed shapes, …) are below, with the result that they must give.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import time

import pytest
import torch
from conftest import MICRO, REPO, THETA0, shell, stage, torchrun
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spin.data import read_jsonl, write_jsonl
from spin.recipe import Recipe, flag

SMALL = dict(
    vocab_size=88,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)


def snapshot(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# ---- how the cases are laid out --------------------------------------------------------------------------------


def knob(*flags):
    return lambda tmp, played: (
        "generate",
        tmp / "run",
        ["--iter", "0"] * ("--iter" not in flags) + list(flags),
    )


def data(content, *flags, name="set.jsonl"):
    """An SFT set of these bytes (of this text, of these rows) given to generate.py."""

    def lay_out(tmp, played):
        if isinstance(content, list):
            text = "".join(json.dumps(row) + "\n" for row in content)
        else:
            text = content
        (tmp / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return "generate", tmp / "run", ["--iter", "0", "--data", tmp / name, *flags]

    return lay_out


def row(**fields):
    """A good row, then one with these fields, among enough good ones for it to be reached wherever it comes."""
    return data([{"prompt": f"Spell {w}", "response": w} for w in ("tin", "kola")] + [fields])


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


def config(**fields):
    def change(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in {**old, **fields}.items() if v is not None})
        )

    return change


def weights(change):
    def rewrite(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


UP = "model.layers.1.mlp.up_proj.weight"


def tokenizer_config(**fields):
    return lambda folder: (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **fields})
    )


def sharded(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )


def beyond(folder, number):
    """The EOS gets a number that the model has no embedding for, though the tokenizer is no larger than the model."""
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"]["</s>"] = number
    core["added_tokens"] = [
        {**token, "id": number} if token["content"] == "</s>" else token
        for token in core["added_tokens"]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(core))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(path, by=1):
    path.write_bytes(path.read_bytes()[:-by])


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
        rows = list(read_jsonl(played / "iter0" / "generated.jsonl"))
        change(rows)
        if keep_prompts:
            shutil.copy(played / "prompts.json", tmp / "run")
        write_jsonl(tmp / "run" / "iter0" / "generated.jsonl", rows)
        return "train", tmp / "run", ["--iter", "0"]

    return lay_out


def untrained(change):
    """Iteration 1 without its model, as a stop after the scores or amid the steps leaves it, after a change."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        shutil.rmtree(tmp / "run" / "iter1" / "model")
        change(tmp / "run" / "iter1")
        return "train", tmp / "run", ["--iter", "1"]

    return lay_out


def of_another(kind):
    """The generated.jsonl of iteration 1 is of other prompts than the run's."""

    def lay_out(tmp, played):
        shutil.copytree(played, tmp / "run")
        shutil.rmtree(tmp / "run" / "iter1" / "model")
        path = tmp / "run" / "iter1" / "generated.jsonl"
        rows = list(read_jsonl(path))
        rows[5][kind] = "Reverse other"
        write_jsonl(path, rows)
        return "train", tmp / "run", ["--iter", "1"]

    return lay_out


def swapped(change):
    """θ_0 has changed since the run began: its generated.jsonl is another model's."""

    def lay_out(tmp, played):
        flags = begun(tmp)
        change(tmp / "model")
        return "train", tmp / "run", flags

    return lay_out


def begun(tmp):
    """A run whose first answers are there, of a model in tmp; its flags."""
    shutil.copytree(THETA0, tmp / "model")
    (tmp / "run").mkdir()
    flags = ["--iter", 0, "--model", tmp / "model"]
    stage("generate", tmp / "run", *flags)
    return flags


def chunks_of_another(tmp, played):
    """A killed generate.py left a chunk, and θ_1 was trained anew since."""
    shutil.copytree(played, tmp / "run")
    shutil.rmtree(tmp / "run" / "iter1" / "model")
    shutil.copytree(played / "iter1" / "model", tmp / "run" / "iter0" / "model", dirs_exist_ok=True)
    (tmp / "run" / "iter0" / "files.json").unlink()
    answers = tmp / "run" / "iter1" / "generated.jsonl"
    (tmp / "run" / "iter1" / "generated.part").mkdir()
    rows = sorted(
        read_jsonl(answers),
        key=lambda row: (
            -len(AutoTokenizer.from_pretrained(THETA0)(row["prompt"])["input_ids"]),
            row["id"],
        ),
    )
    write_jsonl(tmp / "run" / "iter1" / "generated.part" / "000000.jsonl", rows[:16])
    answers.unlink()
    return "generate", tmp / "run", ["--iter", 1]


def held_out(tmp):
    """The held-out set changes between the evaluation of θ_0 and that of θ_1."""
    flags = ["--eval-data", tmp / "held.jsonl"]
    (tmp / "held.jsonl").write_text(PLAIN)
    stage("evaluate", tmp / "run", "--theta0", *flags)
    (tmp / "run" / "eval.json").unlink()
    (tmp / "held.jsonl").write_text(PLAIN.replace("Spell", "Twice"))
    return "evaluate", tmp / "run", ["--theta0", *flags]


def train_on(*rows):
    def lay_out(tmp, played):
        write_jsonl(tmp / "pairs.jsonl", rows)
        return "train", tmp / "run", ["--iter", "0", "--pairs", tmp / "pairs.jsonl"]

    return lay_out


USER, BOT = {"role": "user", "content": "Spell tin"}, {"role": "assistant", "content": "t-i-n"}
GOOD = b'{"prompt": "Spell tin", "response": "t-i-n"}\n'
DEEP = b'{"prompt": ' + b"[" * 100_000

TABLE = {
    # a knob out of range, of the wrong type, not finite
    **{
        " ".join(flags): (knob(*flags), word)
        for flags, word in [
            (["--lr", "0"], "--lr must be positive"),
            (["--lr", "nan"], "--lr must be positive"),
            (["--lr", "1e-4", "inf"], "--lr must be positive"),
            (["--lr", "fast"], "--lr"),
            (["--lr"], "--lr"),
            (["--lr", "1e-400"], "--lr must"),
            (["--lam", "-1"], "--lam must be positive"),
            (["--lam", "nan"], "--lam"),
            (["--batch-size", "0"], "--batch-size"),
            (["--batch-size", "1e3"], "--batch-size"),
            (["--epochs", "-2"], "--epochs"),
            (["--warmup", "1.5"], "--warmup must be between"),
            (["--warmup", "nan"], "--warmup"),
            (["--top-p", "0"], "--top-p"),
            (["--top-p", "1.01"], "--top-p"),
            (["--temperature", "-1"], "--temperature"),
            (["--temperature", "inf"], "--temperature"),
            (["--temperature", "1e-300"], "--temperature must be 0"),
            (["--num-prompts", "0"], "--num-prompts"),
            (["--eval-prompts", "0"], "--eval-prompts"),
            (["--max-new-tokens", "64"], "no room for a prompt"),
            (["--max-new-tokens", "0"], "--max-new-tokens"),
            (["--micro-tokens", "0"], "--micro-tokens"),
            (["--mix", "0"], "--mix"),
            (["--clip", "0"], "--clip"),
            (["--clip", "inf"], "--clip"),
            (["--seed", "-1"], "--seed"),
            (["--seed", "0.5"], "--seed"),
            (["--ell", "square"], "--ell"),
            (["--objective", "dpo"], "--objective"),
            (["--engine", "vllm"], "--engine"),
            (["--dtype", "int8"], "--dtype"),
            (["--attention", "none"], "--attention"),
            (["--alpha", "1"], "--alpha"),
            (["--slots", "0"], "--slots"),
            (["--chunk", "2.5"], "--chunk"),
            (["--replicas", "0"], "--replicas"),
            (["--iterations", "0"], "--iterations"),
            (["--checkpoint-every", "0"], "--checkpoint-every"),
            (["--iter", "-1"], "--iter"),
            (["--iter", "x"], "--iter"),
            (["--iter", "3"], "theta_3 is missing"),
            (["--nonsense"], "--nonsense"),
            (["--recipe", "large"], "--recipe"),
            (["--max-length", "65"], "64 positions"),
            (["--trust-remote-code"], "--trust-remote-code"),
            (["--template", "no place"], "holds {prompt}"),
            (["--template", "{ prompt }"], "holds {prompt}"),
            (["--template", "chat"], "no chat template"),
            (["--template", "\udcff{prompt}"], "UTF-8"),
            (["--run", "/dev/null/run"], "/dev/null is a file"),
            (["--run", "r" * 300], "cannot read or write: "),
            (["--model", "m" * 300], "cannot read or write: "),
            (["--model", "no/such/model"], "no model"),
            (["--model", ""], "--model must not be empty"),
            (["--data", "no/such.jsonl"], "no/such.jsonl"),
            (["--data", str(THETA0)], "no data"),
            (["--data", ""], "--data must not be empty"),
            (["--data", "demo"], "no data"),
            (["--split", ""], "--split must not be empty"),
            (["--eval-split", ""], "--eval-split must not"),
            (["--recompute=maybe"], "--recompute"),
            (["--offload=1"], "--offload"),
            (["--sft-baseline", "3"], "arguments: 3"),
        ]
    },
    "--eval-data of nothing": (
        lambda tmp, played: ("evaluate", tmp / "run", ["--theta0", "--eval-data", "no/such.jsonl"]),
        "cannot read no/such.jsonl",
    ),
    # data
    "an empty file": (data(""), "no rows"),
    "blank lines only": (data("\n \r\n\n"), "no rows"),
    "a list as .json that holds no objects": (data("[{}, 3]", name="set.json"), "no rows"),
    "an object as .json": (data('{"prompt": "a", "response": "b"}', name="set.json"), "no rows"),
    "half a .json": (data('[{"prompt": "a"', name="set.json"), "set.json"),
    "a .parquet that is none": (data("PAR1xxxx", name="set.parquet"), "set.parquet"),
    "an unknown ending": (data(GOOD, name="set.csv"), "no data"),
    "a row without fields": (data("{}\n"), "unknown shape"),
    "a row of other fields": (data('{"a": 1}\n'), "fields a; known: prompt/real"),
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
    "a prompt of 50 MB and no other": (
        data(b'{"prompt": "' + b"tin " * 12_500_000 + b'", "response": "y"}'),
        "prompt too long: 1",
    ),
    "no usable row": (
        data('{"prompt": "a", "response": ""}\n{"prompt": " ", "response": "b"}\n'),
        "empty prompt or response: 2",
    ),
    "prompts longer than the context": (
        data([{"prompt": w * 30, "response": "a"} for w in ("tin", "amu")]),
        "prompt too long: 2",
    ),
    "a prompt that is null": (row(prompt=None, response="b"), "its prompt is no text"),
    "a response that is a number": (
        row(prompt="a", response=3),
        "row 3: the row has the shape prompt/response",
    ),
    "a response that is a list": (row(question="a", answer=["b"]), "question/answer"),
    "a lone surrogate": (row(prompt="a \ud800", response="b"), "surrogates not allowed"),
    "a field too few": (row(prompt="a"), "unknown shape with fields prompt"),
    "messages that are text": (row(messages="Hi"), "messages"),
    "messages that are null": (row(messages=None), "messages"),
    "messages without a role": (row(messages=[{"content": "a"}, BOT]), "KeyError: 'role'"),
    "messages without content": (row(messages=[{"role": "user"}, BOT]), "KeyError: 'content'"),
    "messages of pictures": (
        row(messages=[USER, {"role": "assistant", "content": [{"type": "image"}]}]),
        "its real is no text",
    ),
    "messages that begin with the answer": (
        row(messages=[BOT, USER]),
        "does not begin with a user",
    ),
    "one message": (row(messages=[USER]), "does not begin with a user"),
    "pairs of two prompts": (
        row(real=[USER, BOT], generated=[{**USER, "content": "Other"}, BOT]),
        "different prompts",
    ),
    "an Alpaca input that is a number": (
        row(instruction="a", input=3, output="b"),
        "instruction/output",
    ),
    "pairs without an answer of the opponent": (
        train_on({"prompt": "a", "response": "b"}),
        "needs a generated response",
    ),
    "pairs none of which can be used": (
        train_on({"prompt": "a", "real": "", "generated": "c"}),
        "no pairs to train on",
    ),
    "a file of pairs that is not there": (
        lambda tmp, played: ("train", tmp / "run", ["--iter", 0, "--pairs", tmp / "no.jsonl"]),
        "no.jsonl",
    ),
    # a model and its tokenizer
    "no config.json": (model(lambda m: (m / "config.json").unlink()), "config.json"),
    "half a config.json": (
        model(lambda m: cut(m / "config.json", 40)),
        "cannot load the tokenizer and config",
    ),
    "a config without a type": (
        model(config(model_type=None)),
        "cannot load the tokenizer and config",
    ),
    "an encoder": (
        model(config(model_type="bert", architectures=["BertForMaskedLM"])),
        "no causal language model (bert)",
    ),
    "an encoder and a decoder": (model(config(model_type="t5")), "no causal language model (t5)"),
    "a model of pictures": (model(config(model_type="vit")), "no causal language model (vit)"),
    "code from a model's folder": (
        model(config(model_type="mine", auto_map={"AutoConfig": "mine.Config"})),
        "cannot load the tokenizer",
    ),
    "weights that are not there": (
        model(lambda m: (m / "model.safetensors").unlink()),
        "cannot load the model",
    ),
    "weights that are pickled": (model(pickled), "cannot load the model"),
    "weights of 50 bytes of nothing": (
        model(lambda m: (m / "model.safetensors").write_bytes(b"x" * 50)),
        "header cannot be read",
    ),
    "weights that were cut off": (
        model(lambda m: cut(m / "model.safetensors")),
        "model.safetensors is damaged",
    ),
    "weights with something behind": (
        model(
            lambda m: (
                cut(m / "model.safetensors", -1) or open(m / "model.safetensors", "ab").write(b"xy")
            )
        ),
        "model.safetensors is damaged",
    ),
    "a weight missing": (model(weights(lambda w: w.pop(UP)), "train"), "missing keys"),
    "a weight too many": (
        model(weights(lambda w: w.update({UP + "2": w[UP].clone()})), "train"),
        "unexpected keys",
    ),
    "a weight of another shape": (
        model(weights(lambda w: w.update({UP: w[UP][:-1].clone()})), "train"),
        "mismatched keys",
    ),
    "a weight that is NaN": (
        model(weights(lambda w: w[UP].fill_(float("nan")))),
        "NaN or infinity",
    ),
    "a shard of the weights missing": (model(sharded), "model-2.safetensors is missing, or empty"),
    "an EOS beyond the model's vocabulary": (
        model(lambda m: beyond(m, 5000)),
        "has a token 5000, its model only 88",
    ),
    "no tokenizer": (
        model(lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")]),
        "cannot load the tokenizer",
    ),
    "half a tokenizer": (
        model(lambda m: cut(m / "tokenizer.json", 100)),
        "cannot load the tokenizer",
    ),
    "a tokenizer without EOS": (model(tokenizer_config()), "no EOS"),
    "a tokenizer larger than the model": (model(config(vocab_size=50)), "not a pair"),
    # a run
    "of another recipe": (
        run(lambda r: None, "generate", 2, "--lam", "3", "--seed", "7"),
        "seed: 0 there, 7 asked; lam: ",
    ),
    "of another theta_0": (
        run(lambda r: None, "generate", 2, "--model", THETA0),
        "model: 'demo/theta0' there",
    ),
    "of another theta_0 in the same place": (
        swapped(weights(lambda w: w[UP].mul_(1.01))),
        "are not those that",
    ),
    "of another tokenizer in the same place": (
        swapped(lambda m: open(m / "tokenizer.json", "a").write(" ")),
        "are not those that",
    ),
    "of a newer version": (
        run(
            lambda r: (r / "recipe.json").write_text(
                json.dumps({**json.loads((r / "recipe.json").read_text()), "new_knob": 1})
            )
        ),
        "another version (knobs new_knob)",
    ),
    "half a recipe.json": (run(lambda r: cut(r / "recipe.json", 30)), "recipe.json is damaged"),
    "a recipe.json that is a list": (
        run(lambda r: (r / "recipe.json").write_text("[]")),
        "recipe.json is damaged",
    ),
    "half a prompts.json": (
        run(lambda r: (r / "prompts.json").write_bytes(b'{"prom\xff')),
        "prompts.json is damaged",
    ),
    "a run that is a file": (
        lambda tmp, played: (
            (tmp / "run").write_text("") and None or ("generate", tmp / "run", ["--iter", 0])
        ),
        "is a file",
    ),
    "training before generating": (
        lambda tmp, played: ("train", tmp / "run", ["--iter", "0"]),
        "generate.py --iter 0",
    ),
    "generated.jsonl cut off": (
        run(lambda r: cut(r / "iter0" / "generated.jsonl")),
        "iter0/generated.jsonl is missing, or damaged: it has 40 lines",
    ),
    "generated.jsonl cut off, and generated again": (
        run(lambda r: cut(r / "iter1" / "generated.jsonl", 99), "generate"),
        "delete it and run generate.py",
    ),
    "weights of an iteration cut off": (
        run(lambda r: cut(r / "iter0" / "model" / "model.safetensors"), "generate"),
        "model.safetensors is missing, or damaged",
    ),
    "an iteration's tokenizer lost": (
        run(lambda r: (r / "iter0" / "model" / "tokenizer.json").unlink()),
        "tokenizer.json is missing, or damaged",
    ),
    "metrics.jsonl cut at a line": (
        run(lambda r: cut(r / "iter1" / "metrics.jsonl", 300)),
        "metrics.jsonl is missing, or damaged",
    ),
    "half an opponent.json": (
        untrained(lambda i: cut(i / "opponent.json", 9)),
        "opponent.json is damaged",
    ),
    "half a generated.json": (
        run(lambda r: cut(r / "iter1" / "generated.json", 9), "generate"),
        "generated.json is damaged",
    ),
    "half a heldout.json": (
        run(lambda r: cut(r / "heldout.json", 9), "evaluate"),
        "heldout.json is damaged",
    ),
    "answers of another model": (
        untrained(lambda i: (i / "generated.json").write_text('{"model": "0123"}')),
        "was sampled from another theta_1",
    ),
    "chunks of another model": (chunks_of_another, "are not known to be those of"),
    "other held-out prompts": (lambda tmp, played: held_out(tmp), "not those of"),
    "half an eval.json": (
        run(lambda r: cut(r / "iter1" / "eval.json", 9), "evaluate"),
        "delete it and run evaluate.py",
    ),
    "answers.jsonl lost": (
        run(lambda r: (r / "answers.jsonl").unlink(), "evaluate"),
        "answers.jsonl is missing, or damaged: it has 0 lines of 6",
    ),
    "answers.jsonl cut at a line": (
        run(
            lambda r: write_jsonl(
                r / "iter0" / "answers.jsonl", list(read_jsonl(r / "iter0" / "answers.jsonl"))[:4]
            )
        ),
        "it has 4 lines of 6",
    ),
    "opponent.jsonl cut off before training": (
        untrained(lambda i: cut(i / "opponent.jsonl")),
        "opponent.jsonl is missing, or damaged: it has 80 lines of 80",
    ),
    "a chunk of another run": (
        lambda tmp, played: (
            [
                (tmp / "run/iter0/generated.part").mkdir(parents=True),
                (tmp / "run/iter0/generated.part/000000.jsonl").write_text('{"id": 1}\n'),
            ]
            and ("generate", tmp / "run", ["--iter", 0])
        ),
        "000000.jsonl",
    ),
    # rows of generated.jsonl that cannot be this run's
    **{
        f"generated.jsonl: {name}": (pairs(change), word)
        for name, change, word in [
            ("another iteration", lambda rows: rows[0].update(iter=1), "iteration 1"),
            ("a row twice", lambda rows: rows.append(rows[0]), "41 lines of 40"),
            ("no ids", lambda rows: rows[0].pop("generated_ids"), "generated_ids"),
            ("another end", lambda rows: rows[3].update(finish="length"), "tokenizer"),
            ("ids too large", lambda rows: rows[0].update(generated_ids=[10**6]), "token ids"),
            ("no answer", lambda rows: rows[0].update(generated_ids=[]), "token ids"),
            ("ids that are text", lambda rows: rows[0].update(generated_ids="ab"), "token ids"),
            (
                "ids that are not numbers",
                lambda rows: rows[0].update(generated_ids=[True, 2]),
                "token ids",
            ),
            ("a null", lambda rows: rows[0].update(real=None), "line 1"),
            ("an id that is a list", lambda rows: rows[0].update(id=[1]), "id [1]"),
            ("a row less", lambda rows: rows.pop(), "39 lines of 40"),
            ("no rows", lambda rows: rows.clear(), "0 lines of 40"),
            ("an id twice", lambda rows: rows[0].update(id=rows[1]["id"]), "not those of"),
            ("another prompt", lambda rows: rows[0].update(prompt="zzz 0"), "not those of"),
        ]
    },
    "an id twice, and no prompts.json to tell": (
        pairs(lambda rows: rows[0].update(id=rows[1]["id"]), False),
        "occurs twice",
    ),
    "an iteration of another SFT set": (of_another("prompt"), "not those of"),
    "an iteration of other human answers": (of_another("real"), "not those of"),
}
LISTED = [
    re.sub(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", ".+", re.escape(message)).replace(
        "…", ".*"
    )  # FILE, N, … stand for anything
    for row in (REPO / "README.md").read_text().split("## When something is wrong")[1].splitlines()
    if row.startswith("|")
    for message in re.findall("`([^`]+)`", row.split("|")[1])
]
LOADS = [
    name
    for name in TABLE
    if name.startswith(("weights that are not", "weights that are p", "a weight"))
]  # nothing less would tell


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_line_with_exit_code_2_and_changes_nothing(
    name, tmp_path, played, refused, monkeypatch
):
    lay_out, word = TABLE[name]
    script, folder, flags = lay_out(tmp_path, played)
    before = snapshot(tmp_path)
    if name not in LOADS:
        for function in ("load_model", "load_sharded", "load_frozen"):
            monkeypatch.setattr(
                f"spin.distributed.{function}", lambda *args: pytest.fail("weights were loaded")
            )
    line = refused(lambda: stage(script, folder, *flags))
    assert word in line and len(line) < 1100, line
    assert any(re.fullmatch("error: " + pattern, line) for pattern in LISTED), (
        f"the README does not list: {line}"
    )
    assert snapshot(tmp_path) == before


def test_the_table_holds_every_knob():
    """But --revision: any text may be the name of one."""
    assert {flag(f.name) for f in dataclasses.fields(Recipe)} - {
        re.split("[ =]", name)[0] for name in TABLE
    } == {"--revision"}


# ---- what looks bad and is not ---------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"Spell {w}", "response": "-".join(w)}
    for w in ("tin", "kola", "bel", "amu", "rodak")
]
PLAIN = "".join(json.dumps(r) + "\n" for r in ROWS)
MIXED = [
    {"prompt": r["prompt"], "completion": r["response"]}
    if i == 1
    else {
        "messages": [
            {"role": "user", "content": r["prompt"]},
            {"role": "assistant", "content": r["response"]},
            USER,
        ]
    }
    if i == 2
    else {"instruction": r["prompt"], "input": "", "output": r["response"]}
    if i == 3
    else {"id": "x", "iter": 7, "prompt": r["prompt"], "real": r["response"], "generated": "y"}
    if i == 4
    else r
    for i, r in enumerate(ROWS)
]
FINE = {
    "BOM": "\ufeff" + PLAIN,
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "no last newline": PLAIN[:-1],
    "blank lines": PLAIN.replace("\n", "\n\n"),
    "mixed shapes, one with ids of its own": "".join(json.dumps(r) + "\n" for r in MIXED),
    "escapes": PLAIN.replace("S", "\\u0053"),
    "duplicate ids and other fields": "".join(
        json.dumps({**r, "id": 1, "x": None}) + "\n" for r in ROWS
    ),
}


def answers(run, *flags):
    stage("generate", run, "--iter", 0, *flags)
    return list(read_jsonl(run / "iter0" / "generated.jsonl"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The answers to PLAIN, which the odd forms of the same rows must get too."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "set.jsonl").write_text(PLAIN)
    return answers(folder / "run", "--data", folder / "set.jsonl")


@pytest.mark.parametrize("form", FINE)
def test_odd_forms_of_good_data_give_the_answers_of_the_plain_form(form, clean, tmp_path):
    (tmp_path / "set.jsonl").write_bytes(FINE[form].encode())
    assert answers(tmp_path / "run", "--data", tmp_path / "set.jsonl") == clean


def test_control_other_rows_give_other_answers(clean, tmp_path):
    (tmp_path / "set.jsonl").write_text(PLAIN.replace("Spell", "Twice"))
    assert answers(tmp_path / "run", "--data", tmp_path / "set.jsonl") != clean


def test_texts_of_50_mb_among_good_rows_cost_seconds(tmp_path, capsys):
    begun, much = time.perf_counter(), "tin " * 12_500_000
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"prompt": much, "response": "y"}) + "\n" + PLAIN
    )
    assert {r["prompt"] for r in answers(tmp_path / "run", "--data", tmp_path / "set.jsonl")} == {
        r["prompt"] for r in ROWS
    }
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": much, "real": "a", "generated": "b"},
            {"prompt": "Spell tin", "real": much, "generated": "b"},
        ],
    )
    stage("train", tmp_path / "other", "--iter", 0, "--pairs", tmp_path / "pairs.jsonl")
    assert (
        "pairs: read: 2, prompt too long: 1" in capsys.readouterr().out
        and (tmp_path / "other" / "iter0" / "model").is_dir()
    )
    assert time.perf_counter() - begun < 60


def test_nul_characters_that_are_escaped_and_other_braces_in_a_template_are_text(tmp_path):
    (tmp_path / "set.jsonl").write_text(PLAIN.replace("Spell", "Spell\\u0000{0}"))
    rows = answers(
        tmp_path / "run", "--data", tmp_path / "set.jsonl", "--template", "{x} {{y}} {prompt} %s:"
    )
    assert len(rows) == 5 and all(row["prompt"].startswith("Spell\0{0} ") for row in rows)


@pytest.mark.parametrize(
    "fields, same",
    [({"eos_token": "</s>", "bos_token": "<s>"}, True), ({"eos_token": "</s>"}, False)],
)
def test_a_tokenizer_without_pad_gives_the_same_answers_and_one_without_bos_is_taken_as_it_is(
    fields, same, clean, tmp_path
):
    shutil.copytree(THETA0, tmp_path / "model")
    tokenizer_config(**fields)(tmp_path / "model")
    (tmp_path / "set.jsonl").write_text(PLAIN)
    flags = ["--iter", 0, "--data", tmp_path / "set.jsonl", "--model", tmp_path / "model"]
    rows = answers(tmp_path / "run", *flags[2:])
    assert len(rows) == 5 and (rows == clean) == same
    stage("train", tmp_path / "run", *flags)
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
    shutil.copytree(
        THETA0, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "set.jsonl").write_text(PLAIN)
    flags = ["--data", tmp_path / "set.jsonl", "--model", tmp_path / "model"]
    assert len(answers(tmp_path / "run", *flags)) == 5
    stage("train", tmp_path / "run", "--iter", 0, *flags)


# ---- through the shell -----------------------------------------------------------------------------------------


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
    shutil.copytree(THETA0, tmp_path / "model")
    path, seen = tmp_path / "model" / file, tmp_path / "was run"
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entry})
    )
    (tmp_path / "model" / "mine.py").write_text(
        f"open({str(seen)!r}, 'w')\nfrom transformers import LlamaConfig as Config, PreTrainedTokenizerFast as Mine\n"
    )
    done = shell(
        sys.executable,
        "generate.py",
        *MICRO,
        "--run",
        tmp_path / "run",
        "--iter",
        "0",
        "--model",
        tmp_path / "model",
        input="y\n" * 9,
    )
    assert not seen.exists() and "Traceback" not in done.stderr
    trusting = shell(
        sys.executable,
        "-c",
        "import sys; from transformers import AutoConfig, AutoTokenizer\n"
        "for a in (AutoConfig, AutoTokenizer): a.from_pretrained(sys.argv[1], trust_remote_code=True)",
        tmp_path / "model",
    )
    assert seen.exists(), trusting.stderr  # the control: the code would run


def test_under_torchrun_rank_0_alone_speaks(tmp_path):
    done = torchrun(2, "train.py", *MICRO, "--run", tmp_path / "run", "--iter", "3")
    assert done.returncode != 0 and done.stderr.count("error: theta_3 is missing") == 1
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
