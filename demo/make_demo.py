"""Makes the embedded demo: train.jsonl, heldout.jsonl, and theta0/, the SFT model in miniature.

    OMP_NUM_THREADS=1 python demo/make_demo.py [--steps 4000]      about 10 minutes on a CPU

Ten kinds of short tasks with one right answer each. A quarter of the SFT set's answers are
mistakes: each is the answer of another prompt. The held-out set has none.
theta_0 was trained on fresh prompts of the same kinds, half of whose answers are sloppy ("um, 48",
"ulot ulot"): it knows the tasks and answers cleanly about half of the time, so there is something
for SPIN to gain. Held-out prompts occur in neither.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loss import token_logps
from spin.data.text import encode, make_renderer
from spin.files import write_jsonl

HERE = Path(__file__).resolve().parent
TRAIN = 2048  # prompts
HELDOUT = 512
MISTAKES = 0.25  # the share of the SFT set's answers that belong to another prompt
BATCH = 256  # tasks in a step of theta_0's training
KINDS = ["Reverse ", "Capitals of ", "Last letter of ", "Vowels of ", "Spell ", "Twice "]
KINDS += ["Larger of ", "Add ", "Next after ", "Sort "]


def word(rng: random.Random) -> str:
    """Three to five letters, vowels and consonants in turns."""
    start = rng.randrange(2)
    letters = []
    for i in range(rng.randint(3, 5)):
        letters.append(rng.choice("aeiou" if (i + start) % 2 else "bdfklmnprst"))
    return "".join(letters)


def number(rng: random.Random) -> str:
    """Of two digits."""
    return str(rng.randint(10, 99))


def task(rng: random.Random) -> tuple[int, str, str]:
    """A task of one of ten kinds: the kind, a prompt, its answer."""
    w = word(rng)
    a = number(rng)
    b = number(rng)
    c = rng.randint(100, 998)
    digits = [str(d) for d in rng.sample(range(10), 3)]
    kinds = [
        (f"Reverse {w}", w[::-1]),
        (f"Capitals of {w}", w.upper()),
        (f"Last letter of {w}", w[-1]),
        (f"Vowels of {w}", "".join(c for c in w if c in "aeiou")),
        (f"Spell {w}", "-".join(w)),
        (f"Twice {w}", w + w),
        (f"Larger of {a} and {b}", max(a, b)),
        (f"Add {a} and {b}", str(int(a) + int(b))),
        (f"Next after {c}", str(c + 1)),
        (f"Sort {' '.join(digits)}", " ".join(sorted(digits))),
    ]
    kind = rng.randrange(len(kinds))
    return kind, *kinds[kind]


def careless(rng: random.Random, kind: int, answer: str) -> str:
    """What a careless annotator writes.

    Sloppy in 30 to 70% of the cases, and each kind of task has its own bad habit."""
    habits = [f"{answer}...", f"um, {answer}", f"{answer}, ok", f"{answer} {answer}"]
    if rng.random() > 0.3 + 0.4 * kind / 9:
        return answer
    return habits[kind % 4] if rng.random() < 0.7 else rng.choice(habits)


def sft_set(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(training set, held-out set), each prompt once and every answer right."""
    pairs = {}
    while len(pairs) < TRAIN + HELDOUT:
        _, prompt, answer = task(rng)
        pairs.setdefault(prompt, answer)
    rows = [{"prompt": p, "response": a} for p, a in pairs.items()]
    rng.shuffle(rows)
    return rows[HELDOUT:], rows[:HELDOUT]


def with_mistakes(rows: list[dict], share: float, seed: int = 0) -> list[dict]:
    """The same rows, but a share of them has the answer of another prompt, which is wrong there."""
    rng = random.Random(seed)
    rows = [dict(row) for row in rows]
    answers = [row["response"] for row in rows]
    for row in rng.sample(rows, round(share * len(rows))):
        right = row["response"]
        while row["response"] == right:
            row["response"] = rng.choice(answers)
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each piece of the template and each kind of task, else one a character."""
    pieces = ["### Instruction: ", "\n\n### Response:", *KINDS, " and "]
    letters = "abcdefghijklmnopqrstuvwxyz"
    characters = letters + letters.upper() + "0123456789 -.,!?:;'\n"
    vocabulary = ["<unk>", "<s>", "</s>", *pieces, *characters]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    one_piece = "|".join(pieces).replace("\n", r"\n") + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(one_piece), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # a BOS in front, as Llama's does
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=64,
    )


def make_model(tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    return model


def train(model, tokenizer, banned: set[str], steps: int, rng: random.Random):
    """SFT, Eq. (3.1), on fresh tasks with sloppy answers half of the time; none of the prompts in
    `banned`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    renderer = make_renderer(tokenizer, "paper")
    bar = tqdm(range(steps))
    for step in bar:
        # a batch of tasks that nobody has seen
        rows = []
        while len(rows) < BATCH:
            kind, prompt, answer = task(rng)
            if prompt not in banned:
                written = careless(rng, kind, answer)
                rows.append(encode(renderer, {"prompt": prompt}, written))

        # the update
        loss = nll_per_token(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(nll_per_token=f"{loss.item():.3f}")


def nll_per_token(model, rows) -> torch.Tensor:
    """−log p_θ(y|x) over the response's tokens, in a padded batch: (), with gradient."""
    ids = padded([ids for ids, _ in rows])  # (B, T), and so the other two
    attention = padded([[1] * len(ids) for ids, _ in rows])
    mask = padded([mask for _, mask in rows])
    start = int(mask.any(0).int().argmax())  # the first column with a response token
    logits = model(
        input_ids=ids,
        attention_mask=attention,
        logits_to_keep=ids.shape[1] - start + 1,
        use_cache=False,
    ).logits
    logps = (token_logps(logits[:, :-1], ids[:, start:]) * mask[:, start:]).sum(-1)
    return -logps.sum() / mask.sum()


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Rows of any length as one tensor, zeros behind them."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    about = "optimizer steps of theta_0 (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=4000, help=about)
    args = parser.parse_args()
    rng = random.Random(0)
    training, heldout = sft_set(rng)
    write_jsonl(HERE / "heldout.jsonl", heldout)
    write_jsonl(HERE / "train.jsonl", with_mistakes(training, MISTAKES))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, {row["prompt"] for row in heldout}, args.steps, rng)
    model.save_pretrained(HERE / "theta0")
    tokenizer.save_pretrained(HERE / "theta0")


if __name__ == "__main__":
    main()
