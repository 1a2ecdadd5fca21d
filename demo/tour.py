"""A tour of one pair: what a prompt and its two answers go through in one iteration of SPIN.

    python demo/tour.py               plays iteration 0 on 128 prompts, in a temporary folder
    python demo/tour.py --run DIR     shows iteration 0 of a run; in a new DIR it plays one

About ten seconds on one thread of a CPU. The project's stages and functions make the numbers, and
each step names them. This file calls them and prints what they return; tests/test_tour.py compares
that with the files of the run.
"""

import argparse
import contextlib
import inspect
import io
import math
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate
import train
from loss import sequence_logps, spin_loss, spin_margin
from spin import checks
from spin.data.pairs import encode_pairs, packed_pairs
from spin.data.selection import select
from spin.data.text import decode, load_renderer, split_ids
from spin.files import REPOSITORY, fail, io_errors_in_one_line, read_jsonl
from spin.model.packing import packed
from spin.model.weights import load_frozen
from spin.run.folders import iteration_folder, read_recipe, read_record, starting_model
from spin.run.ranks import World
from spin.sampling.engines import sample, uniforms
from spin.sampling.slots import pick_token


def load(run: Path) -> SimpleNamespace:
    """Iteration 0 of a run: recipe, renderer, θ_0, θ_1, files. Refused if something is missing."""
    recipe = read_recipe(run)
    checks.before_evaluating(recipe, run, 0)
    given_pairs = read_record(iteration_folder(run, 0)).get("given_pairs")
    if given_pairs or (recipe.temperature, recipe.top_p) != (1, 1):
        fail(f"{run} used --pairs, --temperature or --top-p, which the tour cannot show")
    names = [starting_model(recipe, run, t) for t in (0, 1)]
    renderer = load_renderer(names[0], recipe)
    models = [load_frozen(name, recipe, World(0, 1, torch.device("cpu"))) for name in names]
    kept = ("generated.jsonl", "opponent.jsonl", "metrics.jsonl")
    rows, scores, log = (list(read_jsonl(iteration_folder(run, 0) / name)) for name in kept)
    files = {"rows": rows, "scores": scores, "log": log}
    return SimpleNamespace(recipe=recipe, renderer=renderer, models=models, **files)


def draw(run, model, row: dict) -> tuple[list[int], list[tuple]]:
    """A model's answer by the uniform numbers of a row's prompt: its ids, and for each of them
    (uniform number, lower end of its interval, probability)."""
    number = run.recipe.max_new_tokens
    uniform = torch.as_tensor(uniforms(run.recipe.seed, 0, row["id"], number=number))
    seen = []

    def pick(logits, which, step):  # (1, V), (1,), (1,) → the token (1,)
        token = pick_token(logits, uniform[step])
        p = logits[0].double().softmax(-1)
        seen.append((uniform[step].item(), p[:token].sum().item(), p[token].item()))
        return token

    prompt_ids, _, _ = split_ids(run.renderer, row)
    ((ids, _),) = sample(model, [prompt_ids], run.renderer.end_ids, number, pick=pick)
    return ids, seen


def choose(run) -> dict:
    """The pair that the tour follows: the shortest y' that is y with something before it, as in
    `um, 93`, and that θ_1 does not repeat. Without such a pair, one that comes near."""
    rows = sorted(run.rows, key=lambda row: len(row["generated_ids"]))
    ends = [row for row in rows if row["generated"].endswith(f" {row['real']}")]
    rows = [row for row in ends if not row["generated"].startswith(row["real"])] or rows
    changed = (row for row in rows if draw(run, run.models[1], row)[0] != row["generated_ids"])
    return next(changed, rows[0])


# ---- what is printed -----------------------------------------------------------------------------


def step(title: str, *functions):
    """A step's title, and the functions that make its numbers."""
    names = []
    for function in functions:
        file = Path(inspect.getsourcefile(inspect.unwrap(function))).relative_to(REPOSITORY)
        names.append(f"{file}: {function.__name__}")
    print(f"\n{title}  [{'; '.join(names)}]")


def say(text: str):
    print(textwrap.indent(textwrap.dedent(text).strip("\n"), "   "))


def texts_of(run, ids: list[int]) -> list[str]:
    """Each token's text, in quotes."""
    return [repr(text) for text in run.renderer.tokenizer.convert_ids_to_tokens(ids)]


def show_answer(run, model, row: dict) -> list[int]:
    """A model's answer, token by token. Returns its ids."""
    ids, seen = draw(run, model, row)
    say("token       id   number   falls into         probability")
    for text, i, (u, low, p) in zip(texts_of(run, ids), ids, seen, strict=True):
        say(f"{text:8} {i:5}   {u:.4f}   [{low:.4f}, {low + p:.4f})   {p:.4f}")
    logp = sum(math.log(p) for _, _, p in seen)
    p, answer = math.exp(logp), decode(run.renderer, ids)
    say(f"The answer is {answer!r}. p = {p:.4f} is the product of the column; log p = {logp:.3f}.")
    return ids


def show_loss(run, model, row: dict):
    """The margin and the loss of a pair, and the slopes of the loss in log p(y) and log p(y')."""
    (pair,) = encode_pairs([row], run.renderer, run.recipe)
    with torch.no_grad(), packed(model):
        policy = sequence_logps(model, **packed_pairs([pair], "spin", "cpu"))  # (2,)
    policy.requires_grad_()
    scores = next(score for score in run.scores if score["id"] == row["id"])
    opponent = torch.tensor([scores["logp_real"], scores["logp_generated"]])
    lam, ell = run.recipe.at(0).lam, run.recipe.ell
    margin = spin_margin(*policy, *opponent, lam)
    loss = spin_loss(*policy, *opponent, lam, ell)
    (slopes,) = torch.autograd.grad(loss, policy)
    print("               policy   opponent   difference   d loss / d log p")
    for name, p, q, slope in zip(("y) ", "y')"), policy, opponent, slopes, strict=True):
        say(f"log p({name}  {p:8.3f}   {q:8.3f}     {p - q:+z8.3f}            {slope:+z8.3f}")
    say(f"margin {margin:z.3f}, loss {loss:.4f}")


def tour(run):
    row, recipe, size = choose(run), run.recipe, len(run.rows)
    print("""
Two models play. The opponent θ_0 stays as it is. The policy starts as a copy of θ_0, and training
makes it θ_1. The functions in brackets make the numbers.""")

    step("1. A prompt x and its human answer y", select)
    say(f"""
        x: {row["prompt"]}
        y: {row["real"]}
        This is row {row["id"]} of the SFT set, of which this run uses {size} rows.
        The tour looks for a row whose answer changes in this iteration. Many do not.""")

    step("2. Text becomes tokens", split_ids)
    prompt_ids, real_ids, _ = split_ids(run.renderer, row, row["real"])
    for name, ids in (("x", prompt_ids), ("y", real_ids)):
        say(f"{name}: {ids}\n   {' '.join(texts_of(run, ids))}")
    say("""
        x stands in the template. The loss counts y's tokens, the one that ends it included, and
        none of x's.""")

    step("3. The opponent draws its answer y'", generate.answer, pick_token)
    say("""
        Each token of the vocabulary has an interval between 0 and 1, as wide as its probability.
        The intervals lie side by side, in the order of the ids. A random number falls into one
        of them, and that token comes next.""")
    if show_answer(run, run.models[0], row) != row["generated_ids"]:
        fail("this machine rounds differently and draws another y': leave out --run")

    step("4. Before training, the policy is the opponent", train.score_opponent, spin_loss)
    show_loss(run, run.models[0], row)
    say(f"""
        log p(y') is that of step 3. The opponent's numbers are kept for the whole training.
        difference = log p of the policy − log p of the opponent
        margin = λ × (difference of y − difference of y'), with λ = {recipe.at(0).lam:g}
        loss = ℓ(margin), where ℓ is {recipe.ell}
        d loss / d log p = λ ℓ'(margin) for y, the opposite for y'. Its size is the pair's
        weight in the gradient.""")
    if recipe.ell == "logistic":
        say("""
            The logistic loss is log(1 + exp(−margin)), at margin 0 log 2 = 0.6931. To lower it, the
            margin has to rise: log p(y) up, or log p(y') down.""")

    step("5. The policy trains on all pairs", train.train)
    batches = train.all_batches(size, recipe, 0)
    used = [f"{k}" for k, batch in enumerate(batches) if run.rows.index(row) in batch]
    first, last = run.log[0]["loss"], run.log[-1]["loss"]
    say(f"""
        There are {len(batches)} steps of {recipe.batch_size} pairs. This pair is in step
        {" and step ".join(used)}, once per epoch. Other steps change its numbers, too.
        The mean loss of a step's pairs is {first:.4f} in step 0, and {last:.4f} in the last.""")

    step("6. After training, the policy is θ_1", sequence_logps, spin_loss)
    show_loss(run, run.models[1], row)
    say("""
        The opponent's numbers are those of step 4.""")
    if recipe.ell == "logistic":
        say("The larger the margin, the smaller the pair's weight in the gradient.")

    step("7. θ_1 answers the prompt", sample, pick_token)
    say("The random numbers are those of step 3. The intervals have changed.")
    show_answer(run, run.models[1], row)
    say("In the next iteration θ_1 is the opponent. It answers with new random numbers.")


@io_errors_in_one_line()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run, or a new folder for one")
    parser.add_argument("--num-prompts", type=int, default=128, help="prompts of a new run")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        run = args.run or Path(temporary)
        flags = f"--iter 0 --recipe demo --num-prompts {args.num_prompts} --batch-size 16"
        for stage in (generate, train):
            if not (iteration_folder(run, 0) / "model").exists():
                where = f"--run {run}" if args.run else "(in a temporary folder)"
                print(f"$ python {stage.__name__}.py {flags} {where}", flush=True)
                with contextlib.redirect_stdout(io.StringIO()):
                    stage.main([*flags.split(), "--dtype", "fp32", "--run", str(run)])
        tour(load(run))


if __name__ == "__main__":
    main()
