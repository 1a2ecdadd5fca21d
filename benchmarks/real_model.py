"""What SPIN does to a real language model whose SFT set is partly wrong: arms, seeds, tables.

    OMP_NUM_THREADS=1 python benchmarks/real_model.py --model DIR --workers 2 [--work DIR]
    python benchmarks/real_model.py --tables      only prints the tables and draws the pictures

The questions are short, of fact and of form (real_model/questions.jsonl, made by
make_questions.py). θ_0 is --model after SFT on a few clean questions. Each arm trains on 768
others, of which 30% (or none) have the answer to another question of the same kind. The best
iteration is chosen on 128 questions, and 256 others are reported.

Every arm runs the stages themselves, in a run directory of its own under --work. A model's figures
become one line of the log, real_model/log.jsonl. A rerun does what the log lacks: an arm whose
lines are there is skipped, whatever is left of its directory. A seed draws the mistakes, the y' and
the order of the pairs; θ_0 is the same for all seeds."""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from spin.files import append_jsonl, fail, read_jsonl, write_json, write_jsonl, write_whole
from spin.report.pictures import STYLES, Line, draw_lines, theta

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTIONS = REPOSITORY / "benchmarks" / "real_model" / "questions.jsonl"
HELD_OUT = ("choose", "report")
NOISE = 0.3  # wrong answers in the held-out set of which a user would see the NLL
# θ_0: clean questions, and the flags of its SFT. It knows the facts, and the form hardly or well
STARTS = {
    "form": (40, "--epochs 2 --lr 1e-5 --batch-size 8"),
    "formed": (192, "--epochs 3 --lr 2e-5 --batch-size 32"),
}
COMMON = """--template paper --max-new-tokens 24 --max-length 96 --eval-prompts 384
    --dtype bf16 --no-recompute --checkpoint-every 100000 --slots 128"""
COLUMNS = {"1": "temperature 1", "0.6": "0.6", "greedy": "greedy"}
SEEN = ("loss", "margin", "win_rate", "logratio_real", "logratio_generated", "sft_loss")
SEEN += ("length_real", "length_generated")


@dataclasses.dataclass(frozen=True)
class Arm:
    """Some iterations of SPIN, and maybe continued SFT beside them."""

    name: str  # of its run directories, and of its lines
    lam: str = "5"
    lr: str = "5e-6"
    start: str = "form"  # one of STARTS
    wrong: float = NOISE  # share of the training answers
    mix: str = "1"
    epochs: str = "2"
    more: str = ""  # other flags
    sft: bool = False  # continued SFT, same steps; it does not depend on λ
    iterations: int = 2

    def flags(self) -> list[str]:
        given = f"--lam {self.lam} --lr {self.lr} --mix {self.mix} --epochs {self.epochs}"
        return f"{given} --batch-size 32 --num-prompts 768 {COMMON} {self.more}".split()

    def of_sft(self) -> tuple:
        """All that continued SFT depends on."""
        return self.start, self.wrong, self.lr, self.epochs, self.mix

    def keys(self, seed: int) -> list[tuple]:
        """The lines of the log that make it complete, as (arm, seed, objective, t of θ_t)."""
        both = ("spin", "sft")[: 1 + self.sft]
        later = itertools.product(both, range(1, self.iterations + 1))
        return [(self.name, seed, *key) for key in later]


# Each stands for a sentence of docs/theory.md. The first five came first: SPIN falls below θ_0 at
# 5e-6, and not at 1e-6. So the others are at 1e-6.
ARMS = [
    Arm("5e-6", sft=True),  # λ > 1 vetoes what the model finds implausible
    Arm("5e-6, λ 1", lam="1"),  # one optimum is p_data, mistakes included
    Arm("5e-6, one epoch", epochs="1", sft=True),  # in the second, mistakes are learnt by heart
    Arm("5e-6, λ 20", lam="20", iterations=1),  # small steps
    Arm("1e-6", lr="1e-6", sft=True),
    Arm("1e-6, 0% wrong", lr="1e-6", wrong=0, sft=True),  # SFT should be ahead
    Arm("1e-6, λ 1", lr="1e-6", lam="1"),
    Arm("1e-6, four iterations", lr="1e-6", iterations=4),
    Arm("1e-6, formed", lr="1e-6", start="formed", sft=True),  # little is left to gain
    Arm("1e-6, λ 20", lr="1e-6", lam="20"),
    Arm("1e-6, SFT term 1", lr="1e-6", more="--sft-weight 1"),  # RPO
    Arm("1e-6, mix 1 2", lr="1e-6", mix="1 2"),
    Arm("2e-6", lr="2e-6", sft=True),
    Arm("1e-6, λ 0.1", lr="1e-6", lam="0.1"),  # goes past the data
    Arm("1e-6, 0% wrong, λ 1", lr="1e-6", wrong=0, lam="1"),
]
# the arms that run with the seeds 1 and 2 too, chosen by the first tables
SECOND = ("1e-6", "1e-6, 0% wrong", "1e-6, λ 1", "1e-6, SFT term 1")


# ---- the questions -------------------------------------------------------------------------------


def split(name: str) -> list[dict]:
    """The questions of a split, as prompt, response, kind."""
    names = ("prompt", "response", "kind")
    rows = [row for row in read_jsonl(QUESTIONS) if row["split"] == name]
    return [{name: row[name] for name in names} for row in rows]


def with_mistakes(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The same rows, a share of them with the answer to another question of the same kind. A row
    that was changed keeps the right answer as "right"."""
    rng = random.Random(seed)
    answers = {}
    for row in rows:
        answers.setdefault(row["kind"], []).append(row["response"])
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    result = []
    for place, row in enumerate(rows):
        response = row["response"]
        while place in wrong and response == row["response"]:
            response = rng.choice(answers[row["kind"]])
        changed = {"response": response, "right": row["response"]} if place in wrong else {}
        result.append({**row, **changed})
    return result


def training_set(arm: Arm, seed: int) -> list[dict]:
    return with_mistakes(split("train"), arm.wrong, seed)


def held_out() -> list[dict]:
    return [row for name in HELD_OUT for row in split(name)]


def sft_rows(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in ("prompt", "response")} for row in rows]


# ---- running -------------------------------------------------------------------------------------


def call(run: Path, name: str, script: str, *flags):
    """Run a script of the repository as a process of one thread. Its output goes to RUN/log, its
    CPU seconds to RUN/cpu.json, under `name`."""
    run.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, str(REPOSITORY / script), *map(str, flags)]
    with open(run / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {run / 'log'}")
    spent = json.loads((run / "cpu.json").read_text()) if (run / "cpu.json").exists() else {}
    # a rerun of a stage that has ended only says so
    spent[name] = max(spent.get(name, 0), usage.ru_utime + usage.ru_stime)
    write_json(run / "cpu.json", spent)


def make_start(name: str, model: Path, work: Path) -> Path:
    """θ_0 of a name of STARTS: its folder, made by train.py if it is not there."""
    number, flags = STARTS[name]
    run = work / f"theta0-{name}"
    rows = split("sft")[:number]
    # train.py wants pairs; SFT reads the human answer alone
    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "-"} for r in rows]
    run.mkdir(parents=True, exist_ok=True)
    write_jsonl(run / "pairs.jsonl", pairs)
    given = ["--iter", 0, "--objective", "sft", "--model", model, "--run", run]
    given += ["--pairs", run / "pairs.jsonl", "--num-prompts", number]
    call(run, "train", "train.py", *given, *COMMON.split(), *flags.split())
    return run / "sft" / "iter0" / "model"


def play(arm: Arm, seed: int, start: Path, work: Path, log: "Log"):
    """An arm with one seed: what the log lacks of it."""
    run = work / f"seed{seed}" / arm.name.replace(" ", "_")
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "train.jsonl").exists():
        write_jsonl(run / "train.jsonl", sft_rows(training_set(arm, seed)))
        write_jsonl(run / "heldout.data.jsonl", sft_rows(held_out()))
    flags = ["--run", run, "--model", start, "--seed", seed, *arm.flags()]
    flags += ["--data", run / "train.jsonl", "--eval-data", run / "heldout.data.jsonl"]
    measure(arm.start, seed, "theta0", 0, arm, run, start, flags, log)
    for t in range(arm.iterations):
        call(run, f"generate{t}", "generate.py", "--iter", t, *flags)
        for _, _, objective, s in arm.keys(seed):
            if s == t + 1:
                of = [*flags, "--objective", objective]
                call(run, f"{objective} train{t}", "train.py", "--iter", t, *of)
                folder = run / ("sft" if objective == "sft" else "") / f"iter{t}"
                measure(arm.name, seed, objective, s, arm, run, folder / "model", of, log)
    for folder in run.rglob("model"):
        shutil.rmtree(folder)


def measure(name, seed, objective, s, arm: Arm, run: Path, model: Path, flags, log: "Log"):
    """Log the figures of one θ_s. name: of the arm, or of STARTS for θ_0."""
    if (name, seed, objective, s) in log.done():
        return
    which = ["--iter", s - 1] if s else ["--theta0"]
    key = f"{objective} {s}"
    call(run, f"evaluate {key}", "evaluate.py", *which, *flags)
    out = run / f"scores {key}.json"
    script = "benchmarks/real_model.py"
    about = ["--score", out, "--arm", arm.name, "--seed", seed, "--model", model]
    call(run, f"score {key}", script, *about)
    folder = model.parent if s else run
    found = sorted(read_jsonl(folder / "by_prompt.jsonl"), key=lambda row: row["id"])
    line = {"arm": name, "seed": seed, "objective": objective, "t": s}
    line["nll"] = [round(row["nll"], 3) for row in found]  # of it exp(−nll) is at temperature 1
    line["cooler"] = [round(row["expected_exact_match_cooler"], 3) for row in found]
    line["greedy"] = "".join(str(int(row["greedy_exact_match"])) for row in found)
    for part, rows in zip(HELD_OUT, (found[:128], found[128:]), strict=True):
        per_token = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
        line[f"clean_{part}"] = round(per_token, 4)
    line |= json.loads(out.read_text())
    names = ("win_rate", "margin", "eos_rate", "mean_length")
    evaluated = json.loads((folder / "eval.json").read_text())
    line["evaluated"] = {n: round(evaluated[n], 4) for n in names if evaluated[n] is not None}
    if s:
        line["training"] = training_figures(list(read_jsonl(folder / "metrics.jsonl")))
    spent = json.loads((run / "cpu.json").read_text())
    stages = {"evaluate": f"evaluate {key}", "score": f"score {key}"}
    if s:
        stages["train"] = f"{objective} train{s - 1}"
    if objective == "spin":
        stages["generate"] = f"generate{s - 1}"
    line["cpu_s"] = {stage: round(spent[name]) for stage, name in stages.items()}
    log.append(line)


def training_figures(steps: list[dict]) -> dict:
    """What a user sees of the training: the means of its first step and of its last eight."""
    result = {}
    for name, rows in (("first", steps[:1]), ("last", steps[-8:])):
        seen = [n for n in SEEN if rows[0].get(n) is not None]
        result[name] = {n: round(statistics.fmean(row[n] for row in rows), 4) for n in seen}
    return result


def key_of(line: dict) -> tuple:
    return line["arm"], line["seed"], line["objective"], line["t"]


class Log:
    """The log's lines; several threads append."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.lines = list(read_jsonl(path)) if path.exists() else []

    def done(self) -> set[tuple]:
        """(arm, seed, objective, t of θ_t) of each line."""
        return {key_of(line) for line in self.lines}

    def append(self, line: dict):
        with self.lock:
            if key_of(line) in self.done():  # θ_0, which two arms may have measured at once
                return
            append_jsonl(self.path, line)
            self.lines.append(line)


def plan() -> list[tuple[Arm, int]]:
    """Arms and seeds in the order in which they run."""
    more = [(arm, seed) for seed in (1, 2) for arm in ARMS if arm.name in SECOND]
    return [(arm, 0) for arm in ARMS] + more


def missing(jobs: list[tuple[Arm, int]], log: Log) -> list[tuple[Arm, int]]:
    """Those of which a line is not in the log."""
    done = log.done()
    return [(arm, seed) for arm, seed in jobs if not done.issuperset(arm.keys(seed))]


def run_all(jobs, model: Path, work: Path, workers: int, log: Log):
    begun = time.perf_counter()
    starts = {name: make_start(name, model, work) for name in {arm.start for arm, _ in jobs}}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {
            pool.submit(play, arm, seed, starts[arm.start], work, log): (arm.name, seed)
            for arm, seed in jobs
        }
        for number, job in enumerate(concurrent.futures.as_completed(running), 1):
            job.result()
            spent = (time.perf_counter() - begun) / 60
            print(f"{running[job]}: {number} of {len(jobs)} arms, {spent:.0f} min", flush=True)


def score(arm: Arm, seed: int, model: Path) -> dict:
    """Figures that evaluate.py does not give, by the project's own scoring: the NLL per token of
    held-out answers of which 30% are wrong; and the probabilities of the right and of the wrong
    answer to the training questions that were changed (with 0% wrong: to those that 30% would
    change, whose wrong answer nobody trained on)."""
    import torch

    from spin.data.text import encode, load_renderer
    from spin.model.weights import load_frozen
    from spin.recipe import parse
    from spin.report.evaluation_metrics import logps
    from spin.run.ranks import process_group

    recipe, args = parse(["--model", str(model), *arm.flags()])
    with process_group(None) as world, torch.no_grad():
        renderer = load_renderer(str(model), recipe)
        policy = load_frozen(str(model), recipe, world)

        def logs(rows, answer):
            pairs = [(row, row[answer]) for row in rows]
            tokens = [encode(renderer, row, text, recipe.max_length) for row, text in pairs]
            return logps(policy, tokens, recipe), [sum(mask) for _, mask in tokens]

        result = {}
        noisy = with_mistakes(held_out(), NOISE, seed)
        for part, rows in zip(HELD_OUT, (noisy[:128], noisy[128:]), strict=True):
            found, tokens = logs(rows, "response")
            result[f"noisy_{part}"] = round(-found.sum().item() / sum(tokens), 4)
        changed = with_mistakes(split("train"), arm.wrong or NOISE, seed)
        changed = [row for row in changed if "right" in row]
        for name, answer in (("right", "right"), ("wrong", "response")):
            found, _ = logs(changed, answer)
            result[name] = [round(p, 3) for p in found.exp().tolist()]
    return result


# ---- tables --------------------------------------------------------------------------------------


def values(line: dict, column: str, part: str) -> list[float]:
    """A model's figure of COLUMNS for each question of a part of HELD_OUT."""
    place = slice(0, 128) if part == "choose" else slice(128, None)
    if column == "1":
        return [math.exp(-nll) for nll in line["nll"][place]]
    if column == "0.6":
        return line["cooler"][place]
    return [float(mark) for mark in line["greedy"][place]]


def difference(a: list[list[float]], b: list[list[float]]) -> tuple[float, float]:
    """(mean of b − a, its standard error) over questions and seeds. a, b: a list for each seed,
    with a value for each question. The variance is that of the questions' means plus, with several
    seeds, that of the seeds' means, which counts what is left twice and so errs on the safe
    side."""
    table = [[y - x for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    by_question = [statistics.fmean(column) for column in zip(*table, strict=True)]
    by_seed = [statistics.fmean(row) for row in table]
    variance = statistics.variance(by_question) / len(by_question)
    if len(by_seed) > 1:
        variance += statistics.variance(by_seed) / len(by_seed)
    return statistics.fmean(by_seed), math.sqrt(variance)


def models_of(arm: Arm, lines: list[dict], arms: list[Arm]) -> dict[tuple, dict[int, dict]]:
    """{(objective, t): {seed: line}} of an arm, θ_0 and the continued SFT that it shares with an
    arm of another λ included."""
    names = {"spin": arm.name, "theta0": arm.start}
    owners = [x for x in arms if x.sft and x.of_sft() == arm.of_sft()]
    owners = [x for x in owners if x.iterations >= arm.iterations]  # as many steps
    names["sft"] = arm.name if arm.sft else next((x.name for x in owners), None)
    found = {}
    for line in lines:
        if names[line["objective"]] == line["arm"] and line["t"] <= arm.iterations:
            found.setdefault((line["objective"], line["t"]), {})[line["seed"]] = line
    return found


def best(models: dict, objective: str, seeds: list[int]) -> int | None:
    """The iteration t ≥ 1 of the highest expected exact match on the questions to choose on."""
    found = {}
    for (name, t), by_seed in models.items():
        if name == objective and by_seed.keys() >= set(seeds):
            found[t] = statistics.fmean(
                statistics.fmean(values(by_seed[seed], "1", "choose")) for seed in seeds
            )
    return max(found, key=found.get) if found else None


def noisy_match(line: dict) -> float:
    """The expected exact match that a user with NOISE in his held-out answers would see. A wrong
    answer counts as 0: models give those of training questions a probability of about 0.02."""
    rows = with_mistakes(held_out(), NOISE, line["seed"])[128:]
    found = values(line, "1", "report")
    return statistics.fmean(0 if "right" in r else p for r, p in zip(rows, found, strict=True))


def from_theta0(models: dict, objective: str, t: int) -> tuple[float, float]:
    """(θ_t's expected exact match − θ_0's, its standard error), of the seeds that both have."""
    both = models["theta0", 0], models[objective, t]
    seeds = sorted(both[0].keys() & both[1].keys())
    return difference(*([values(by_seed[s], "1", "report") for s in seeds] for by_seed in both))


def three(by_seed: dict[int, dict]) -> str:
    """Expected exact match at temperature 1 (at 0.6; greedy), the mean over seeds."""
    one, cooler, greedy = (
        statistics.fmean(statistics.fmean(values(x, c, "report")) for x in by_seed.values())
        for c in COLUMNS
    )
    return f"{one:.3f} ({cooler:.3f}; {greedy:.3f})"


def table(head: list[str], rows: list[list[str]]):
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def tables(lines: list[dict], arms: list[Arm]):
    """All tables, line by line. An arm is shown as soon as its θ_1 of SPIN is in the log."""
    gains, levels, differences, memory = [], [], [], {}
    most = max((line["t"] for line in lines), default=0)
    for arm in arms:
        models = models_of(arm, lines, arms)
        if ("spin", 1) in models:
            gains.append(gains_of(arm, models))
            levels += levels_of(arm, models, most)
            differences += differences_of(arm, models)
            memory |= memory_of(arm, models)
    yield "Expected exact match at temperature 1, less θ_0's, 256 questions"
    head = ["arm", *(f"{by} θ_{t}" for by in ("SPIN", "SFT") for t in (1, 2))]
    yield from table(head, gains)
    yield "Expected exact match at temperature 1 (at 0.6; greedy), 256 questions"
    yield from table(["arm", "seeds", *(f"θ_{t}" for t in range(most + 1))], levels)
    yield "Paired differences ± two standard errors, best iterations"
    yield from table(["arm", "seeds", "difference", *COLUMNS.values()], differences)
    yield "Training questions with a wrong answer: probability of the right one, of the wrong one,"
    yield "and how often the right one is more likely"
    rows = [[name, *(f"{value:.3f}" for value in found)] for name, found in memory.items()]
    yield from table(["model", "right", "wrong", "right ahead"], rows)
    yield "What a user sees of SPIN's iterations in which the expected exact match rose, or fell"
    yield from signals(lines, arms)
    spent = sum(sum(line["cpu_s"].values()) for line in lines)
    yield f"{len(lines)} models, {spent / 3600:.1f} core-hours"


def gains_of(arm: Arm, models: dict) -> list[str]:
    """A row of the first table."""
    keys = itertools.product(("spin", "sft"), (1, 2))
    cells = [f"{from_theta0(models, *key)[0]:+.3f}" if key in models else "" for key in keys]
    return [arm.name, *cells]


def levels_of(arm: Arm, models: dict, most: int):
    """Rows of the second table: SPIN, and SFT if this arm has run it. most: the last t."""
    for objective, by in (("spin", "SPIN"), ("sft", "continued SFT"))[: 1 + arm.sft]:
        found = {t: of for (name, t), of in models.items() if name in ("theta0", objective)}
        cells = [three(found[t]) if t in found else "" for t in range(most + 1)]
        yield [f"{arm.name}: {by}", str(len(found.get(1, ()))), *cells]


def memory_of(arm: Arm, models: dict) -> dict[str, list[float]]:
    """{model: means over questions and seeds}; continued SFT is listed with the arm that ran it."""
    found = {}
    order = ("theta0", "spin", "sft")
    for objective, t in sorted(models, key=lambda key: (order.index(key[0]), key[1])):
        names = {"theta0": f"θ_0, {arm.start}", "spin": f"{arm.name}: SPIN θ_{t}"}
        if arm.sft or objective != "sft":
            rows = [(x["right"], x["wrong"]) for x in models[objective, t].values()]
            pairs = [pair for row in rows for pair in zip(*row, strict=True)]
            right, wrong = map(statistics.fmean, zip(*pairs, strict=True))
            name = names.get(objective, f"{arm.name}: continued SFT θ_{t}")
            found[name] = [right, wrong, statistics.fmean(r > w for r, w in pairs)]
    return found


def differences_of(arm: Arm, models: dict):
    """Rows of paired differences: of the seeds that all three have."""
    pairs = (("SPIN − SFT", "sft", "spin"), ("SPIN − θ_0", "theta0", "spin"))
    for label, a, b in (*pairs, ("SFT − θ_0", "theta0", "sft")):
        if b == "sft" and not arm.sft:
            continue
        of = {name: [by_seed for (n, _), by_seed in models.items() if n == name] for name in (a, b)}
        common = [set(by_seed) for name in (a, b) for by_seed in of[name]]
        seeds = sorted(set.intersection(*common)) if of[a] and of[b] else []
        if seeds:
            t = {"theta0": 0} | {n: best(models, n, seeds) for n in (a, b) if n != "theta0"}
            rows = []
            for column in COLUMNS:
                by_seed = [
                    [values(models[n, t[n]][s], column, "report") for s in seeds] for n in (a, b)
                ]
                mean, error = difference(*by_seed)
                rows.append(f"{mean:+.3f} ± {2 * error:.3f}")
            which = f"{label} (θ_{t[b]}, θ_{t[a]})"
            yield [arm.name, str(len(seeds)), which, *rows]


# What a user sees of an iteration: of θ_t its change since θ_{t-1}, of the training its last steps.
CHANGES = {
    "exact match, noisy answers": noisy_match,
    "NLL per token, noisy answers": lambda line: line["noisy_report"],
    "NLL per token, right answers": lambda line: line["clean_report"],
    "length of its answers": lambda line: line["evaluated"]["mean_length"],
}
TRAINING = ("win_rate", "margin", "logratio_real", "logratio_generated")


def signals(lines: list[dict], arms: list[Arm]):
    """A table: each figure of CHANGES and TRAINING, as its mean over SPIN's iterations in which the
    expected exact match rose, and over those in which it fell, and as its correlation with that
    change."""
    iterations = []  # (the change, {figure: value}) of each
    for arm in arms:
        models = models_of(arm, lines, arms)
        for (objective, t), by_seed in models.items():
            if objective != "spin" or (arm.iterations > 2 >= t):  # those are another arm's too
                continue
            start = models["theta0" if t == 1 else "spin", t - 1]
            for seed in by_seed.keys() & start.keys():
                old, new = start[seed], by_seed[seed]
                a, b = (statistics.fmean(values(line, "1", "report")) for line in (old, new))
                seen = {name: figure(new) - figure(old) for name, figure in CHANGES.items()}
                seen |= {f"training: {name}": new["training"]["last"][name] for name in TRAINING}
                iterations.append((b - a, seen))
    rose, fell = ([seen for gain, seen in iterations if (gain > 0) == up] for up in (True, False))
    rows = []
    for name in iterations[0][1] if rose and fell else ():
        means = (statistics.fmean(seen[name] for seen in part) for part in (rose, fell))
        pairs = [(gain, seen[name]) for gain, seen in iterations]
        correlation = statistics.correlation(*zip(*pairs, strict=True))
        rows.append([name, *(f"{mean:+.3f}" for mean in means), f"{correlation:+.2f}"])
    return table(["figure", f"rose ({len(rose)})", f"fell ({len(fell)})", "correlation"], rows)


# ---- pictures ------------------------------------------------------------------------------------


def pictures(lines: list[dict], arms: list[Arm]) -> dict[str, str]:
    """{file name: SVG} for docs/real-model.md: what wrong answers do, and what the rate does, as
    far as the log has it. Bars are one standard error of the paired difference."""
    found = {arm.name: models_of(arm, lines, arms) for arm in arms}
    drawn = {"mistakes.svg": [], "rates.svg": []}

    def draw(picture, label, points, start=()):
        style = STYLES[len(drawn[picture])] + "o"
        there = [
            (x, *from_theta0(found[a], *k)) for x, a, *k in points if (*k,) in found.get(a, ())
        ]
        if there:
            drawn[picture].append(Line(label, [*start, *there], style))

    for objective, by in (("spin", "SPIN"), ("sft", "SFT")):
        for name, wrong in (("1e-6, 0% wrong", "0%"), ("1e-6", "30%")):
            steps = [(t, name, objective, t) for t in (1, 2)]
            draw("mistakes.svg", f"{by}, {wrong} wrong", steps, [(0, 0, 0)])
        for t in (1, 2):
            steps = [(x, name, objective, t) for x, name in enumerate(("1e-6", "2e-6", "5e-6"))]
            draw("rates.svg", f"{by} {theta(t)}", steps)
    axis, rates = "expected exact match − θ₀'s", dict(enumerate(("1e-6", "2e-6", "5e-6")))
    about = {"mistakes.svg": ("model", None), "rates.svg": ("rate, 30% wrong", rates)}
    return {
        name: draw_lines(axis, drawn[name], label, axis, ticks=ticks)
        for name, (label, ticks) in about.items()
        if drawn[name]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="a folder of SmolLM2-135M-Instruct, or of another model")
    add("--workers", type=int, default=2, help="arms at a time, each one process (default: 2)")
    add("--work", type=Path, default=Path("runs/real_model"), help="the run directories")
    add("--log", type=Path, default=QUESTIONS.with_name("log.jsonl"))
    add("--tables", action="store_true", help="print the log's tables, draw its pictures")
    add("--score", type=Path, help=argparse.SUPPRESS)  # a process of its own
    add("--arm", help=argparse.SUPPRESS)
    add("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        (arm,) = (arm for arm in ARMS if arm.name == args.arm)
        return write_json(args.score, score(arm, args.seed, args.model))
    log = Log(args.log)
    jobs = missing(plan(), log)
    if jobs and not args.tables:
        if not (args.model and args.model.is_dir()):
            fail("--model DIR is wanted, a folder of SmolLM2-135M-Instruct; or --tables")
        run_all(jobs, args.model.absolute(), args.work.absolute(), args.workers, log)
    print("\n".join(tables(log.lines, ARMS)))
    for name, svg in pictures(log.lines, ARMS).items():
        write_whole(args.log.with_name(name), svg)


if __name__ == "__main__":
    main()
