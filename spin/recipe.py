"""Every knob of SPIN once: a dataclass (one default, one help line each), and the table of recipes.
The defaults are the paper's (Section 6.1 and Appendix B.1 of arXiv 2401.01335v3); RECIPES lists
what `small` and `demo` do otherwise. spin/flags.py makes the command line from this file."""

import dataclasses
import json
from dataclasses import dataclass

# what a value must satisfy: in the words of the error message, and as a test
POSITIVE = ("must be positive", lambda v: v > 0)
NOT_NEGATIVE = ("must be zero or positive", lambda v: v >= 0)
FRACTION = ("must be between 0 and 1", lambda v: 0 <= v <= 1)
PART = ("must be above 0 and at most 1", lambda v: 0 < v <= 1)
BELOW_1 = ("must be at least 0 and below 1", lambda v: 0 <= v < 1)
# divided by less, logits would overflow
WARM = ("must be 0 (greedy) or at least 0.001", lambda v: v == 0 or v >= 1e-3)
NOT_COLD = ("must be at least 0.001", lambda v: v >= 1e-3)
LOSSES = ("logistic", "hinge", "correlation", "exponential")


def knob(default, help, rule=None, choices=None, fixed=True):
    """A knob of the run: its default, its help line, the rule its value must meet."""
    about = {"help": help, "rule": rule, "choices": choices, "fixed": fixed}
    return dataclasses.field(default=default, metadata=about)


def free(default, help, rule=None, choices=None):
    """A knob that may change within a run: it changes speed, memory or the number of iterations."""
    return knob(default, help, rule, choices, fixed=False)


@dataclass(frozen=True)
class Recipe:
    """All knobs, as resolved. A tuple holds one value per iteration; its last serves later ones."""

    # what plays: Section 6.1; the revision is the one the authors' repository names
    model: str = knob("alignment-handbook/zephyr-7b-sft-full", "theta_0: hub id or folder")
    revision: str = knob(
        "ac6e600eefcce74f5e8bae1035d4f66019e93190", "hub revision of --model ('': newest)"
    )
    data: str = knob("HuggingFaceH4/ultrachat_200k", "the SFT set: hub id, .jsonl, .json, .parquet")
    split: str = knob("train_sft", "split of --data, if it is a hub id")
    num_prompts: int = knob(50_000, "prompts from --data; fewer are a subset of more", POSITIVE)
    eval_data: str = knob("HuggingFaceH4/ultrachat_200k", "held-out SFT set: hub id or file")
    eval_split: str = knob("test_sft", "split of --eval-data, if it is a hub id")
    eval_prompts: int = knob(500, "held-out prompts; our choice", POSITIVE)
    eval_temperature: float = knob(
        0.6, "a second temperature of evaluate.py's expected exact match, beside 1", NOT_COLD
    )
    right_share: float = free(
        0.0, "share of right answers in --data where it is known: a line in the report", FRACTION
    )
    template: str = knob("paper", "'paper' (Appendix B.1), 'chat', or a string with {prompt}")
    template_kwargs: tuple[str, ...] = knob(
        (), "arguments of the chat template, as name=value: enable_thinking=false"
    )
    date: str = knob("", "the day that a chat template may write, YYYY-MM-DD; today in a new run")
    iterations: int = free(4, "iterations T of Algorithm 1", POSITIVE)
    seed: int = knob(0, "seed of the subset, the sampling and the order of pairs", NOT_NEGATIVE)
    sft_baseline: bool = free(False, "also run continued SFT, same steps (the paper's Table 5)")

    # stage 1: y' ~ p_θt, the plain distribution of Algorithm 1
    temperature: float = knob(1.0, "sampling temperature of y'; 0 is greedy", WARM)
    top_p: float = knob(1.0, "nucleus of y'; 1 leaves the distribution untruncated", PART)
    max_new_tokens: int = knob(256, "longest y' in tokens; 256 in the authors' code", POSITIVE)
    engine: str = knob(
        "auto",
        "generate (ours, the same rows anywhere), paged (generate_batch); auto: generate",
        choices=("auto", "generate", "paged"),
    )
    chunk: int = knob(512, "prompts that a rank takes, answers and writes at a time", POSITIVE)

    # stage 2: Appendix B.1; two epochs of Section 6.1; mix: 50k pairs, then 100k
    objective: str = free("spin", "SPIN (4.7), or SFT (3.1) into RUN/sft", choices=("spin", "sft"))
    lam: tuple[float, ...] = knob((0.1, 0.1, 0.1, 5.0), "lambda of (4.7), by iteration", POSITIVE)
    ell: str = knob("logistic", "the loss l of Assumption 5.1", choices=LOSSES)
    lr: tuple[float, ...] = knob((5e-7, 5e-7, 1e-7, 1e-7), "peak rate, by iteration", POSITIVE)
    mix: tuple[int, ...] = knob((1, 2), "iterations whose pairs are used, by iteration", POSITIVE)
    epochs: int = knob(2, "passes over the pairs in an iteration", POSITIVE)
    batch_size: int = knob(64, "pairs in an optimizer step, over all ranks", POSITIVE)
    warmup: float = knob(0.1, "share of the steps that warm up linearly", FRACTION)
    alpha: float = knob(0.99, "RMSProp's smoothing; torch's default, the authors' too", BELOW_1)
    clip: float = knob(1.0, "largest gradient norm; 1.0 in the authors' code base", POSITIVE)
    max_length: int = knob(2048, "longest prompt and response together, in tokens", POSITIVE)

    # adapters in the place of full fine-tuning (spin/lora.py): ours, the paper trains all weights
    lora_rank: int = knob(0, "rank of LoRA's adapters; 0: all weights are trained", NOT_NEGATIVE)
    lora_alpha: float = knob(16.0, "adapters count alpha / rank times", POSITIVE)
    lora_targets: tuple[str, ...] = knob(
        (), "layers that get adapters, as q_proj; none: all linear ones of the blocks"
    )

    # the machine's knobs: they change speed and memory, and no more of the result than rounding
    slots: int = free(64, "answers in progress at once on a rank; 64 in Appendix B.1", POSITIVE)
    micro_tokens: int = free(8192, "tokens a rank in a pass; a longer pair goes alone", POSITIVE)
    dtype: str = free("auto", "auto: bf16 on CUDA, else fp32", choices=("auto", "bf16", "fp32"))
    attention: str = free(
        "auto",
        "auto: FlashAttention-2 on CUDA, flash-attn's where installed, else torch's; CPU: SDPA",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    recompute: bool = free(True, "activation checkpointing: less memory, a quarter more compute")
    offload: bool = free(False, "weights, gradients and optimizer in host memory (slow)")
    replicas: int = free(1, "whole copies of the sharded model, such as one a node", POSITIVE)
    checkpoint_every: int = free(200, "optimizer steps between resume checkpoints", POSITIVE)

    def revision_of(self, name: str) -> str | None:
        """The hub revision of a model: the recipe's for the recipe's own, else the newest."""
        return (self.revision if name == self.model else "") or None

    def at(self, t: int) -> "Recipe":
        """The recipe of iteration t: lam, lr and mix are numbers in it, not tuples."""
        # the first t + 1 values end with that of iteration t, or with the one for all later ones
        numbers = {name: getattr(self, name)[: t + 1][-1] for name in ("lam", "lr", "mix")}
        return dataclasses.replace(self, **numbers)


# The flags that a recipe stands for. Sources: `paper` is the defaults. `small`'s learning rate and
# chat template are our choice for a small instruct model, not run. `demo`'s λ and learning rates
# were chosen by benchmarks/demo_seeds.py (RESULTS.md).
RECIPES = {
    "paper": "",
    "small": """--model HuggingFaceTB/SmolLM2-360M-Instruct --template chat --num-prompts 5000
        --max-length 1024 --lr 1e-6 1e-6 2e-7 2e-7 --micro-tokens 2048""",
    "demo": """--model demo/theta0 --data demo/train.jsonl --eval-data demo/heldout.jsonl
        --right-share 0.75 --num-prompts 2048 --eval-prompts 512 --max-new-tokens 24 --max-length 64
        --chunk 256 --slots 256 --lam 5 --lr 3e-5 3e-5 6e-6 6e-6 --sft-baseline
        --no-recompute --checkpoint-every 16""",
}


def fixed_knobs(recipe: Recipe) -> dict:
    """The knobs that may not change within a run, as JSON gives them back."""
    names = [f.name for f in dataclasses.fields(recipe) if f.metadata["fixed"]]
    return json.loads(json.dumps({name: getattr(recipe, name) for name in names}))
