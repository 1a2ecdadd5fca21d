"""Two-layer models trained on dialogues as a chat template renders them: what --template chat makes
of them. The trainer and the oracle are plain transformers; nothing of ours renders or tokenises."""

import json

import pytest
import torch
from chat_templates import DAY, FAMILIES, clock, messages_of, rendered, the_old_way, tokenizer_of
from conftest import load, stage
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import chat_template_utils

import evaluate

pytestmark = pytest.mark.long

DIALOGUES = [
    ("Name a fruit.", "Apple."),
    ("Name a herb.", "Mint, or thyme."),
    ("Which day is it?", "Do you see 31 or 30?"),
    ("Which system?", "A kind one.\n\nAnd short."),
    ("Be short.", "Short."),
    ("Be kind.", "You are kind. Name a day, and I help."),
    ("Which fruit grows here?", "Quince."),
    ("Which herb grows here?", "Sage do."),
    ("You help?", "Which user?"),
    ("Name a model.", "final"),
    ("Today?", "31 January 2026."),
    ("Two fruits?", "Apple, Quince"),
]
TRAINED = ["qwen2.5", "qwen3", "llama2", "llama3.2", "gemma", "phi3", "zephyr", "gpt-oss"]
# of these, an answer alone with the tokenizer's EOS is what the template renders; before Zephyr's
# prompt stood a BOS too many, which this model does not mind
AS_BEFORE = {"qwen2.5", "zephyr"}


@pytest.fixture(autouse=True)
def today(monkeypatch):
    """transformers' own clock stands at DAY, for the oracle."""
    monkeypatch.setattr(chat_template_utils, "datetime", clock(DAY))


def renderings(name: str) -> list[tuple[list[int], list[int]]]:
    """(ids of the generation prompt, all that the template writes behind it) of each dialogue."""
    found = []
    for question, answer in DIALOGUES:
        asked = messages_of({"prompt": question})
        prompt = rendered(name, asked, ask=True)
        whole = rendered(name, messages_of({"prompt": question}, answer))
        assert whole[: len(prompt)] == prompt
        found.append((prompt, whole[len(prompt) :]))
    return found


def trained(name: str, steps: int) -> LlamaForCausalLM:
    """A model that has learnt what stands behind the generation prompts, the end of turn and what
    follows it included."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer_of(name)), **sizes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    texts = renderings(name)
    length = max(len(prompt + rest) for prompt, rest in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)  # -100: no loss
    for row, (prompt, rest) in enumerate(texts):
        end = len(prompt + rest)
        ids[row, :end] = torch.tensor(prompt + rest)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def log_chances(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p of each token of an answer behind a prompt, (T,)."""
    logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


def chance(model, prompt: list[int], answer: list[int]) -> float:
    """p(answer | prompt)."""
    return log_chances(model, prompt, answer).sum().exp().item()


def until_end(name: str, rest: list[int]) -> list[int]:
    """What a template writes behind its generation prompt, up to the end of turn and with it."""
    end = tokenizer_of(name).convert_tokens_to_ids(FAMILIES[name].end)
    return rest[: rest.index(end) + 1]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def files(folder, name: str, model) -> list[str]:
    """Model and dialogues as files; returns the flags that name them."""
    model.save_pretrained(folder / "model")
    tokenizer_of(name).save_pretrained(folder / "model")
    rows = [{"messages": messages_of({"prompt": q}, answer)} for q, answer in DIALOGUES]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "data.jsonl")
    of_template = ["--template-kwargs", *FAMILIES[name].kwargs] * bool(FAMILIES[name].kwargs)
    return [
        *("--recipe", "demo", "--model", str(folder / "model"), "--data", data),
        *("--eval-data", data, "--template", "chat", "--date", DAY, "--max-length", "200"),
        *("--max-new-tokens", "40", "--num-prompts", "12", "--eval-prompts", "12", *of_template),
    ]


@pytest.mark.parametrize("name", TRAINED)
def test_expected_exact_match_is_what_the_rendering_itself_gives(name, tmp_path):
    model = trained(name, steps=150)
    texts = renderings(name)
    right = mean(chance(model, prompt, until_end(name, rest)) for prompt, rest in texts)
    assert right > 0.9
    out = tmp_path / "figures.json"
    evaluate.main([*files(tmp_path, name, model), "--out", str(out)])
    figures = json.loads(out.read_text())
    assert figures["n"] == len(DIALOGUES)
    assert abs(figures["expected_exact_match"] - right) < 0.02
    assert figures["greedy_exact_match"] == figures["eos_rate"] == 1
    # control: the answer alone with the tokenizer's EOS behind it, as at commit 8002864
    old = [the_old_way(name, {"prompt": question}, answer) for question, answer in DIALOGUES]
    before = mean(chance(model, *ids) for ids in old)
    assert before > 0.8 if name in AS_BEFORE else before < 0.02


# a rate, and the same texts by a plain template, which ends an answer with the tokenizer's EOS
PLAIN = {
    "gemma": ("5e-4", "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"),
    "phi3": ("1e-4", "<|user|>\n{prompt}<|end|>\n<|assistant|>\n"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_an_iteration_of_spin_does_not_unlearn_the_end_of_turn(name, tmp_path):
    model = trained(name, steps=60)
    rate, plain = PLAIN[name]
    flags = files(tmp_path, name, model)
    flags += ["--epochs", "6", "--batch-size", "4", "--lr", rate, "--lam", "0.1"]

    def ends(model) -> float:
        """The mean chance of the end of turn behind a whole answer."""
        answers = [(prompt, until_end(name, rest)) for prompt, rest in renderings(name)]
        return mean(log_chances(model, *ids)[-1].exp().item() for ids in answers)

    def after(run, *more) -> float:
        for part in ("generate", "train"):
            stage(part, run, *flags, *more, "--iter", 0)
        return ends(load(run / "iter0" / "model"))

    before = ends(model)
    assert before > 0.9
    assert after(tmp_path / "run") > before - 0.05
    assert after(tmp_path / "plain", "--template", plain) < before - 0.2  # control
