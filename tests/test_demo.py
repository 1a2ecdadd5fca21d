"""demo/: what is committed is what the script makes, and it is what the README says."""

import random
import sys

from conftest import REPO, THETA0

sys.path.insert(0, str(REPO / "demo"))
import make_demo

from spin.data import decode, encode, read_jsonl


def test_the_sft_set_is_what_the_script_makes_and_training_and_held_out_prompts_are_disjoint():
    training, heldout = make_demo.sft_set(random.Random(0))
    assert list(read_jsonl(REPO / "demo" / "train.jsonl")) == training and len(training) == 2048
    assert list(read_jsonl(REPO / "demo" / "heldout.jsonl")) == heldout and len(heldout) == 512
    prompts = [row["prompt"] for row in training + heldout]
    assert len(set(prompts)) == len(prompts)
    assert make_demo.sft_set(random.Random(1)) != (training, heldout)  # control


def test_the_answers_are_right():
    """Each kind of task checked by other means than the one that made it."""
    for row in read_jsonl(REPO / "demo" / "heldout.jsonl"):
        words, y = row["prompt"].split(), row["response"]
        kind, last = words[0], words[-1]
        assert {
            "Reverse": lambda: list(reversed(last)) == list(y),
            "Capitals": lambda: y.lower() == last and y.isupper(),
            "Last": lambda: last.endswith(y) and len(y) == 1,
            "Spell": lambda: y.split("-") == list(last),
            "Vowels": lambda: y == last.translate(str.maketrans("", "", "bcdfghjklmnpqrstvwxyz")),
            "Twice": lambda: y == f"{last}{last}",
            "Larger": lambda: int(y) == max(int(words[2]), int(last)),
            "Add": lambda: int(y) - int(last) == int(words[1]),
            "Next": lambda: int(y) - 1 == int(last),
            "Sort": lambda: sorted(words[1:], key=int) == y.split(),
        }[kind](), row


def test_theta_0_is_small_and_its_tokenizer_is_the_scripts_and_gives_every_text_back(
    tokenizer, model
):
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 150_000
    assert sum(f.stat().st_size for f in THETA0.iterdir()) < 1_000_000
    assert (
        make_demo.make_tokenizer().backend_tokenizer.to_str()
        == tokenizer.backend_tokenizer.to_str()
    )
    for row in read_jsonl(REPO / "demo" / "train.jsonl"):
        ids, mask = encode(tokenizer, "paper", row, row["response"], eos=False)
        assert tokenizer.unk_token_id not in ids
        assert decode(tokenizer, "paper", [i for i, m in zip(ids, mask) if m]) == row["response"]
