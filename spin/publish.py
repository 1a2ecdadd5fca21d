"""A model of a run as a folder to share: weights in bf16, tokenizer and a model card.

    python -m spin.publish runs/demo/iter3/model [--dtype fp32] [--to OWNER/NAME]

Writes RUN/iter{t}/published, and --to uploads it. README.md, the card, has the run's figures."""

import argparse
import base64
import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub as hub
import torch

from spin import checks
from spin.data.text import PAPER_TEMPLATE
from spin.files import REPOSITORY, fail, io_errors_in_one_line, locate, write_whole
from spin.model.weights import compute_dtype, load_frozen, load_whole, whole_folder
from spin.report.evaluation_metrics import logps, read_held_out
from spin.report.page import chart, read_run
from spin.run.folders import read_recipe
from spin.run.ranks import process_group

# the hub id of a model or a data set, and not the path of a file that may have been deleted
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)")


@io_errors_in_one_line()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # one line, as of every command
    parser.add_argument("model", type=Path, help="RUN/iter{t}/model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument("--to", metavar="OWNER/NAME", help="also upload it to this repository")
    args = parser.parse_args(argv)
    model = args.model.resolve()
    run, out = model.parent.parent, model.with_name("published")
    place = re.fullmatch(r"iter(\d+)/model", f"{model.parent.name}/{model.name}")
    if not (place and model.is_dir() and (run / "recipe.json").is_file()):
        fail(f"{args.model} is no model of a run: name a folder such as runs/demo/iter3/model")
    if out.exists():
        fail(f"{out} is there already: delete it, or send it by hf upload")
    if args.to and not (HUB_ID.fullmatch(args.to) and hub.get_token()):
        fail(f"--to {args.to} wants OWNER/NAME and a token: run hf auth login, or set HF_TOKEN")
    found, t = read_run(run), int(place[1]) + 1
    recipe = read_recipe(run)
    with process_group(run) as world:
        checks.whole_run(recipe, run)
        if len(found["spin"]) <= t or world.size > 1:
            fail(f"no card yet: first run evaluate.py --iter {t - 1}, then this in one process")
        with whole_folder(out) as part:
            differs = write_model(checks.model_folder(str(model)), part, args.dtype, recipe, world)
            _, _, picture = chart(found, found["leads"])["src"].partition(",")
            (part / "report.svg").write_bytes(base64.b64decode(picture))
            name = args.to or f"{run.name}-theta{t}"
            write_whole(part / "README.md", card(found, t, vars(recipe), name, differs))
    print(f"{differs}\n{out}: theta_{t} and its card")
    if args.to:
        try:
            hub.create_repo(args.to, exist_ok=True)
            print(hub.upload_folder(repo_id=args.to, folder_path=out).commit_url)
        except Exception as problem:  # of the network, the hub, its client
            fail(f"not uploaded ({str(problem)[:300]}): try hf upload {args.to} {out}")


@torch.no_grad()
def write_model(model: str, part: Path, dtype: str, recipe, world) -> str:
    """Write all but the card. Returns how the weights, read back, differ from the run's."""
    answers = [pair["real_tokens"] for pair in read_held_out(model, recipe)[1][:64]]
    shutil.copytree(model, part, ignore=shutil.ignore_patterns("*.safetensors*"))
    load_whole(model, recipe, compute_dtype(dtype, world.device)).save_pretrained(part)
    logp = []  # of the human answers, (N,) each
    for name, kind in ((model, "fp32"), (str(part), dtype)):
        frozen = load_frozen(name, dataclasses.replace(recipe, dtype=kind), world)
        logp.append(logps(frozen, answers, recipe).double())
    change = logp[1] - logp[0]
    numbers = f"{change.mean():+.4f} nats on average, {change.abs().max():.4f} at most"
    return f"log p of {len(change)} held-out human answers, {dtype} minus the run's fp32: {numbers}"


def cell(*figure) -> str:
    """A figure and its standard error, as far as they are known; lm_eval writes N/A."""
    return " ± ".join(f"{x:.3f}" for x in figure if isinstance(x, float)) or "–"


def card(found: dict, t: int, knobs: dict, name: str, differs: str) -> str:
    """The text of README.md: front matter for the hub, then what a reader needs."""
    paths = {key: Path(locate(knobs[key])) for key in ("model", "data", "eval_data")}
    ids = {k: knobs[k] for k in paths if HUB_ID.fullmatch(knobs[k]) and not paths[k].exists()}
    shown = knobs | {k: ids.get(k, path.name) for k, path in paths.items()}  # no path of a machine
    about = {"base_model": ids.get("model"), "datasets": [ids["data"]] if "data" in ids else None}
    with contextlib.suppress(Exception):  # θ_0 has no card, or its hub is out of reach
        start = ids.get("model") or paths["model"] / "README.md"
        about["license"] = hub.ModelCard.load(start).data.license
    front = hub.ModelCardData(library_name="transformers", tags=["spin", "self-play"], **about)
    models = found["models"]
    for model in models:  # "acc_stderr,none" of arc becomes "arc none acc_stderr", as in eval.json
        for task, result in model["tasks"].items():
            task += f" (--limit {model['limit']})" if model["limit"] else ""
            model |= {" ".join([task, *reversed(k.split(","))]): v for k, v in result.items()}
    rows = [["", *(m["name"] for m in models)], ["---"] * (1 + len(models))]
    for key in dict.fromkeys(k for m in models for k in m if f"{k}_stderr" in m):
        rows.append([key, *(cell(m.get(key), m.get(f"{key}_stderr")) for m in models)])
    template = PAPER_TEMPLATE if knobs["template"] == "paper" else knobs["template"]
    asked = "by the chat template" if template == "chat" else f"as `{json.dumps(template)}`"
    lora = " No adapters are included: each fits only the previous model, and all are merged here."
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    readme = REPOSITORY / "README.md"  # it has the paper's BibTeX
    cite = "".join(readme.read_text().partition("```bibtex")[1:]) if readme.exists() else ""
    return f"""---
{front.to_yaml()}
---
# {name}
θ_{t} of self-play fine-tuning ([SPIN](https://arxiv.org/abs/2401.01335)) of `{shown["model"]}` on
`{shown["data"]}`; {differs}.{lora if knobs["lora_rank"] else ""}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
Prompts were written {asked}. Figures of the run's fp32 weights, ± one standard error, on
{models[0]["n"]} prompts of `{shown["eval_data"]}` (win rate and margin: against the model before):

{table}

![by iteration](report.svg)
~~~~~~json
{json.dumps(shown, indent=1, ensure_ascii=False)}
~~~~~~
{cite}"""


if __name__ == "__main__":
    main()
