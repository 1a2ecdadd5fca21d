"""demo/: what is committed is what the script makes, and it is what the README says."""

import random

import make_demo
from conftest import REPO, THETA0

from spin.data.text import decode, encode, make_renderer
from spin.files import read_jsonl


def test_the_sft_set_is_what_the_script_makes_and_training_and_held_out_prompts_are_disjoint():
    clean, heldout = make_demo.sft_set(random.Random(0))
    training = make_demo.with_mistakes(clean, make_demo.MISTAKES)
    assert list(read_jsonl(REPO / "demo" / "train.jsonl")) == training and len(training) == 2048
    assert list(read_jsonl(REPO / "demo" / "heldout.jsonl")) == heldout and len(heldout) == 512
    prompts = [row["prompt"] for row in training + heldout]
    assert len(set(prompts)) == len(prompts)
    assert make_demo.sft_set(random.Random(1)) != (clean, heldout)  # control


NO_CONSONANTS = str.maketrans("", "", "bcdfghjklmnpqrstvwxyz")
# the first word of a prompt → whether y is right; words: those of the prompt
RIGHT = {
    "Reverse": lambda words, y: list(reversed(words[-1])) == list(y),
    "Capitals": lambda words, y: y.lower() == words[-1] and y.isupper(),
    "Last": lambda words, y: words[-1].endswith(y) and len(y) == 1,
    "Spell": lambda words, y: y.split("-") == list(words[-1]),
    "Vowels": lambda words, y: y == words[-1].translate(NO_CONSONANTS),
    "Twice": lambda words, y: y == f"{words[-1]}{words[-1]}",
    "Larger": lambda words, y: int(y) == max(int(words[2]), int(words[-1])),
    "Add": lambda words, y: int(y) - int(words[-1]) == int(words[1]),
    "Next": lambda words, y: int(y) - 1 == int(words[-1]),
    "Sort": lambda words, y: sorted(words[1:], key=int) == y.split(),
}


def is_right(row: dict) -> bool:
    """Whether an answer is right, by other means than those that made it."""
    words = row["prompt"].split()
    try:
        return RIGHT[words[0]](words, row["response"])
    except ValueError:  # a word where a number is wanted
        return False


def test_the_held_out_answers_are_right_and_a_quarter_of_the_sft_sets_are_another_prompts():
    assert all(is_right(row) for row in read_jsonl(REPO / "demo" / "heldout.jsonl"))
    training = list(read_jsonl(REPO / "demo" / "train.jsonl"))
    clean, _ = make_demo.sft_set(random.Random(0))
    assert all(is_right(row) for row in clean)
    right = sum(is_right(row) for row in training) / len(training)
    assert right == 1 - make_demo.MISTAKES == 0.75
    wrong = [row["response"] for row in training if not is_right(row)]
    assert set(wrong) <= {row["response"] for row in clean}


def test_theta_0_is_small_and_its_tokenizer_is_the_scripts_and_loses_no_text(tokenizer, model):
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 150_000
    assert sum(f.stat().st_size for f in THETA0.iterdir()) < 1_000_000
    made = make_demo.make_tokenizer().backend_tokenizer
    assert made.to_str() == tokenizer.backend_tokenizer.to_str()
    for row in read_jsonl(REPO / "demo" / "train.jsonl"):
        ids, mask = encode(make_renderer(tokenizer, "paper"), row, row["response"], eos=False)
        assert tokenizer.unk_token_id not in ids
        answer = [i for i, m in zip(ids, mask, strict=True) if m]
        assert decode(make_renderer(tokenizer, "paper"), answer) == row["response"]
