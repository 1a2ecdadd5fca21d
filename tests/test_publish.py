"""spin/publish.py: the published folder beside the run's model, its card beside the run's files,
and what is sent to a hub: a server on this machine."""

import base64
import contextlib
import http.server
import json
import re
import shutil
import sys
import threading

import pytest
import torch
from conftest import REPO, load, shell
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin import publish
from spin.files import read_json, write_json


@pytest.fixture()
def run(played, tmp_path):
    """A copy of the run of two iterations."""
    return shutil.copytree(played, tmp_path / "runs" / "mine")


def rows_of(card: str) -> dict[str, list[str]]:
    """{first cell: the others} of the card's table."""
    lines = [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def test_the_published_model_is_the_runs_rounded_to_bf16_and_its_card_has_the_runs_figures(
    run, capsys, tokenizer
):
    benchmarks = {"limit": 4, "tasks": {"piqa": {"shots": 0, "alias": "p", "acc,none": 0.5}}}
    benchmarks["tasks"]["piqa"]["acc_stderr,none"] = 0.0125
    write_json(run / "iter1" / "benchmarks.json", benchmarks)
    publish.main([str(run / "iter1" / "model")])
    out = run / "iter1" / "published"
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    ours = load(run / "iter1" / "model").state_dict()
    assert {name: w.dtype for name, w in model.state_dict().items()} == {
        name: torch.bfloat16 for name in ours
    }
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, ours[name].bfloat16(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert (out / "generation_config.json").exists() and "<svg" in (out / "report.svg").read_text()

    text = (out / "README.md").read_text()
    rows = rows_of(text)
    assert rows[""] == ["θ₀", "θ₁ SPIN", "θ₂ SPIN"]
    for place, folder in enumerate((run, run / "iter0", run / "iter1")):
        figures = read_json(folder / "eval.json", "")
        value, error = figures["nll_per_token"], figures["nll_per_token_stderr"]
        assert rows["nll_per_token"][place] == f"{value:.3f} ± {error:.3f}"
    assert rows["win_rate"][0] == "–" and rows["piqa (--limit 4) none acc"] == [
        "–",
        "–",
        "0.500 ± 0.013",
    ]
    recipe = json.loads(re.search(r"^~{6}json\n(.*?)^~{6}", text, re.M | re.S)[1])
    saved = read_json(run / "recipe.json", "")
    del saved["theta_0"]
    here = {"model": "theta0", "data": "train.jsonl", "eval_data": "heldout.jsonl"}
    assert recipe == saved | here and str(REPO) not in text
    bibtex = (REPO / "README.md").read_text().partition("```bibtex")[2]
    assert text.endswith("```bibtex" + bibtex) and bibtex
    # what was printed is in the card too, and is what bf16 rounds away: little, and not nothing
    said = re.search(r"log p of 12 held-out .* at most", capsys.readouterr().out)[0]
    assert said in text
    mean, most = map(float, re.search(r": (\S+) nats on average, (\S+) at most", said).groups())
    assert 0 < most < 0.2 and abs(mean) <= most


def front(run, **knobs) -> dict:
    """The front matter of a card for a run with these knobs."""
    found = publish.read_run(run)
    knobs = {k: v for k, v in found["recipe"].items() if k != "theta_0"} | knobs
    return ModelCard(publish.card(found, 2, knobs, "a/b", "equal")).data.to_dict()


def test_the_front_matter_names_what_the_hub_has_and_no_file_of_this_machine(run, tmp_path):
    plain = {"library_name": "transformers", "tags": ["spin", "self-play"]}
    assert front(run) == plain  # the demo's model and set are files
    named = {"base_model": "someone/base", "datasets": ["someone/set"]}
    assert front(run, model="someone/base", data="someone/set") == plain | named
    for gone in ("/no/such/model", "./model", "a/b/c"):
        assert front(run, model=gone, data="gone/mine.jsonl") == plain
    (tmp_path / "theta").mkdir()
    (tmp_path / "theta" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert front(run, model=str(tmp_path / "theta")) == plain | {"license": "mit"}


def test_a_card_says_why_there_are_no_adapters(run):
    found = publish.read_run(run)
    cards = [publish.card(found, 2, found["recipe"] | {"lora_rank": r}, "a/b", "") for r in (0, 4)]
    assert ["No adapters are included" in text for text in cards] == [False, True]


@pytest.mark.parametrize(
    "harm, flags, word",
    [
        (lambda run: None, ["iter9/model"], "is no model of a run"),
        (lambda run: None, ["iter1"], "is no model of a run"),
        (lambda run: (run / "recipe.json").unlink(), ["iter1/model"], "is no model of a run"),
        (lambda run: (run / "iter1" / "published").mkdir(), ["iter1/model"], "is there already"),
        (lambda run: (run / "iter1" / "eval.json").unlink(), ["iter1/model"], "evaluate.py --iter"),
        (lambda run: None, ["iter1/model", "--to", "a/b"], "wants OWNER/NAME and a token"),
        (lambda run: None, ["iter1/model", "--dtype", "fp8"], "invalid choice"),
        (lambda run: None, [], "required: model"),
        (
            lambda run: shutil.copytree(
                run / "iter0/model", run / "iter1/model", dirs_exist_ok=True
            ),
            ["iter1/model"],
            "was made from another",
        ),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(
    harm, flags, word, run, refused, monkeypatch, tmp_path
):
    monkeypatch.setattr(publish.hub, "get_token", lambda: None)
    harm(run)
    paths = [str(run / flag) if flag.startswith("iter") else flag for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    assert word in refused(lambda: publish.main(paths))
    assert sorted(tmp_path.rglob("*")) == before


@contextlib.contextmanager
def a_hub(status: int = 200):
    """A server that takes what huggingface_hub sends; yields its address and (path, body) of each
    request. status: that of a commit."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            seen.append((self.path, body))
            code, answer = 200, {"url": f"http://{self.headers['Host']}/a/b"}
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                answer = {"files": files}
            elif "/commit/" in self.path:
                code = status
                answer = {
                    "commitUrl": f"{answer['url']}/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()


@pytest.mark.parametrize("status", [200, 403])
def test_to_sends_the_folder_to_the_hub_or_says_how_to_send_it_later(status, run):
    model = run / "iter1" / "model"
    with a_hub(status) as (address, seen):
        env = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "spin.publish", model, "--to", "a/b"]
        done = shell(*command, env=env)
    out = run / "iter1" / "published"
    if status != 200:
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and line.startswith("error: not uploaded (403")
        assert line.endswith(f"hf upload a/b {out}") and "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (commit,) = [body for path, body in seen if path.startswith("/api/models/a/b/commit/")]
    sent = {}
    for line in map(json.loads, commit.splitlines()):
        if line["key"] == "file":
            sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'from_pretrained("a/b"' in sent["README.md"].decode()
