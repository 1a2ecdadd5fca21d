"""demo/tour.py: what it prints about a pair is what the files of that run say, and what plain
transformers computes from its models."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import tour
from conftest import THETA0, load

from spin.files import read_jsonl, write_json

NUMBER = r"([-+]?\d+\.\d+)"


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """A run that the tour has played."""
    run = tmp_path_factory.mktemp("runs") / "toured"
    tour.main(["--run", str(run), "--num-prompts", "40"])
    return run


def log_softmax(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The log-probability of every token at each place of an answer, (T, V)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def logp(model, prompt: list[int], answer: list[int]) -> float:
    return log_softmax(model, prompt, answer).gather(1, torch.tensor([answer]).T).sum().item()


def wrong_numbers(text: str, run, tokenizer) -> set[str]:
    """The kinds of numbers in the tour's text that are not those of the pair that it names."""
    pair = int(re.search(r"row (\d+)", text)[1])
    row, scores = (
        next(row for row in read_jsonl(run / "iter0" / name) if row["id"] == pair)
        for name in ("generated.jsonl", "opponent.jsonl")
    )
    steps = list(read_jsonl(run / "iter0" / "metrics.jsonl"))
    models = load(THETA0), load(run / "iter0" / "model")
    prompt = tokenizer(f"### Instruction: {row['prompt']}\n\n### Response:")["input_ids"]
    real = tokenizer(f" {row['real']}")["input_ids"][1:] + [tokenizer.eos_token_id]
    wrong = set()

    def check(kind: str, told, right, tolerance=6e-4):
        told, right = np.array(told, float), np.array(right, float)
        if told.shape != right.shape or np.abs(told - right).max() > tolerance:
            wrong.add(kind)

    x, y = ([int(i) for i in ids.split(",")] for ids in re.findall(r": \[([\d, ]+)\]\n", text))
    check("prompt ids", x, prompt, 0)
    check("answer ids", y, real, 0)

    # the tables of steps 3 and 7
    uniform = np.random.default_rng((0, 0, pair)).random(24)
    table = rf" +(\d+)   {NUMBER}   \[{NUMBER}, {NUMBER}\)   {NUMBER}\n"
    for t, lines in enumerate(text.split("   token")[1:]):
        ids, number, low, high, p = np.array(re.findall(table, lines), float).T
        ids = ids.astype(int)
        check("uniform numbers", number, uniform[: len(ids)], 6e-5)
        if (low > number + 1e-4).any() or (high < number - 1e-4).any():
            wrong.add("intervals")
        right = log_softmax(models[t], prompt, ids.tolist()).exp().numpy()
        place = range(len(ids))
        check("probabilities", p, right[place, ids], 6e-5)
        check("intervals", high, right.cumsum(1)[place, ids], 1.1e-4)
        if t == 0:
            check("y'", ids, row["generated_ids"], 0)

    # the tables of steps 4 and 6
    opponent = np.array([scores["logp_real"], scores["logp_generated"]])
    pattern = rf"log p\(y'?\) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}\n"
    tables = np.array(re.findall(pattern, text), float).reshape(2, 2, 4)
    values = np.array(re.findall(rf"margin {NUMBER}, loss {NUMBER}\n", text), float)
    for model, told, value in zip(models, tables, values, strict=True):
        policy = np.array([logp(model, prompt, ids) for ids in (real, row["generated_ids"])])
        margin = 5 * (policy - opponent) @ [1, -1]
        weight = 5 / (1 + math.exp(margin))
        kinds = {"log p": policy, "opponent": opponent, "difference": policy - opponent}
        for column, (kind, right) in enumerate(kinds.items()):
            check(kind, told[:, column], right)
        check("slope", told[:, 3], [-weight, weight], 2e-3)
        check("margin and loss", value, [margin, math.log1p(math.exp(-margin))], 2e-3)
    if not (values[0] == (0, 0.6931)).all() or (tables[0, :, 0] != tables[0, :, 1]).any():
        wrong.add("before training")
    told = re.search(rf"mean loss of a step's pairs is {NUMBER} in step 0, and {NUMBER}", text)
    check("mean loss", told.groups(), [steps[0]["loss"], steps[-1]["loss"]], 6e-5)
    return wrong


def test_the_tours_numbers_are_those_of_the_runs_files_and_models(toured, capsys, tokenizer):
    tour.main(["--run", str(toured)])
    text = capsys.readouterr().out
    assert wrong_numbers(text, toured, tokenizer) == set()
    assert max(map(len, text.splitlines())) <= 100

    # controls: the numbers belong to another pair, or one of them is another
    pair = re.search(r"row (\d+)", text)[1]
    rows = read_jsonl(toured / "iter0" / "generated.jsonl")
    other = next(
        row["id"] for row in rows if str(row["id"]) != pair and row["real"] != row["generated"]
    )
    found = wrong_numbers(text.replace(f"row {pair}", f"row {other}"), toured, tokenizer)
    assert found >= {"prompt ids", "answer ids", "y'", "uniform numbers", "opponent", "log p"}
    for kind, old, new in (
        ("mean loss", "0.6931 in step 0", "0.6921 in step 0"),
        ("before training", "margin 0.000, loss 0.6931", "margin 0.001, loss 0.6931"),
        ("slope", "-2.500", "+2.500"),
    ):
        assert old in text
        assert wrong_numbers(text.replace(old, new), toured, tokenizer) == {kind}


@pytest.mark.parametrize("fault", ["recipe.json", "made_from.json", "model"])
def test_a_run_that_the_tour_cannot_show_is_refused(toured, tmp_path, refused, fault):
    run = shutil.copytree(toured, tmp_path / "run")
    if fault == "model":  # θ_1 is another run's: it is damaged
        (run / "iter0" / "model" / "model.safetensors").write_bytes(b"")
    else:
        path = run / fault if fault == "recipe.json" else run / "iter0" / fault
        change = {"temperature": 0.5} if fault == "recipe.json" else {"given_pairs": ["a hash"]}
        write_json(path, {**json.loads(path.read_text()), **change})
    line = refused(lambda: tour.main(["--run", str(run)]))
    assert "which the tour cannot show" in line or fault == "model"
