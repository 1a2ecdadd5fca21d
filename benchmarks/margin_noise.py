"""How much noise bf16 puts into the margins of step 0.

    python benchmarks/margin_noise.py --recipe demo --run runs/demo [--dtype bf16]

Policy and opponent are the same model there, so all margins should be 0. Needs
RUN/iter0/generated.jsonl. Scores every pair as the opponent does, in the first epoch's
micro-batches, and then again (a) in the same micro-batches, as step 0 does, and (b) as a control in
the second epoch's, where a pair has other neighbours and other padding. Prints the standard
deviation of the margin, over all pairs, for the paper's two λ. Takes any flag of the stages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from spin import checks
from spin.data.pairs import encode_pairs
from spin.data.rows import sampled_rows
from spin.data.text import load_renderer
from spin.model.packing import packed
from spin.model.weights import load_empty, read_weights
from spin.recipe import parse
from spin.run.folders import iteration_folder
from spin.run.ranks import process_group


def read_pairs(recipe, run: Path, start: str) -> list[dict]:
    """The pairs of iteration 0, as ids."""
    renderer = load_renderer(start, recipe)
    path = iteration_folder(run, 0) / "generated.jsonl"
    rows = list(sampled_rows(path, 0, renderer))
    checks.same_prompts(run / "prompts.json", rows, path)
    return encode_pairs(rows, renderer, recipe)


def print_noise(name: str, opponent, policy):
    """A row of the table. opponent, policy: (N, 2), log p of the real and the generated answers."""
    ratio = policy - opponent
    margin = ratio[:, 0] - ratio[:, 1]  # (N,), for λ = 1
    print(
        f"| {name} | {0.1 * margin.std():.2g} | {5 * margin.std():.2g} | {ratio.abs().max():.2g} |"
    )


def main():
    recipe, args = parse(["--dtype", "bf16", *sys.argv[1:]], __doc__)
    start = checks.theta(recipe, args.run, 0)
    pairs = read_pairs(recipe, args.run, start)
    with process_group() as world:
        model = load_empty(start, recipe)
        train.shard(model, recipe, world)
        read_weights(model, start, recipe, world)
        with packed(model, recipe.attention):
            opponent = train.score_opponent(model, pairs, recipe, 0, world)
            same = train.score_opponent(model, pairs, recipe, 0, world)
            other = train.score_opponent(model, pairs, recipe, 0, world, epoch=1)
        print(
            f"{start}, {len(pairs)} pairs, {recipe.dtype}, {world.device.type}, "
            f"micro-batches of {recipe.micro_tokens} tokens"
        )
        print("| the policy scores in | std of the margin, λ = 0.1 | λ = 5 | largest log-ratio |")
        print("|---|---|---|---|")
        print_noise("the opponent's micro-batches", opponent, same)
        print_noise("other micro-batches (control)", opponent, other)


if __name__ == "__main__":
    main()
