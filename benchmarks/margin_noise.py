"""How much noise bf16 puts into the margins of step 0, where policy and opponent are the same model and all should be 0.

    python benchmarks/margin_noise.py --recipe demo --run runs/demo [--dtype bf16] [any flag of the stages]

Needs RUN/iter0/generated.jsonl. Scores every pair as the opponent does, in the first epoch's micro-batches, and then
again (a) in the same micro-batches, as step 0 does, and (b) as a control in the second epoch's, where a pair has other
neighbours and other padding. The standard deviation of the margin, over all pairs, for the paper's two λ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from spin import distributed
from spin import recipe as recipes
from spin.data import load_tokenizer
from spin.packing import packed


def main():
    recipe, args = recipes.parse(
        ["--dtype", "bf16", *sys.argv[1:]], "", ("--pairs", dict(default=[]))
    )
    args.iter = 0
    start = recipes.theta(recipe, args.run, 0)
    pairs = train.load_pairs(recipe, args, *load_tokenizer(start, recipe))
    with distributed.join() as world:
        model = distributed.load_sharded(start, recipe, world)
        score = lambda epoch: train.score_opponent(model, pairs, recipe, 0, world, epoch)  # noqa: E731
        with packed(model, recipe.attention):
            scores = [score(0), score(0), score(1)]
        print(
            f"{start}, {len(pairs)} pairs, {recipe.dtype}, {world.device.type}, micro-batches of {recipe.micro_tokens} tokens"
        )
        print(
            "| the policy scores in | std of the margin, λ = 0.1 | λ = 5 | largest log-ratio |\n|---|---|---|---|"
        )
        for again, name in zip(
            scores[1:], ("the opponent's micro-batches", "other micro-batches (control)")
        ):
            ratio = again - scores[0]
            margin = ratio[:, 0] - ratio[:, 1]
            print(
                f"| {name} | {0.1 * margin.std():.2g} | {5 * margin.std():.2g} | {ratio.abs().max():.2g} |"
            )


if __name__ == "__main__":
    main()
