"""The page: what changed from θ_0 to θ_T. Reads a run's JSON files; no model, no torch.

    python report.py --recipe demo          writes RUN/summary.json and RUN/report.html

report.html is one self-contained page with pictures in plain SVG: it opens from disk, without a network. It shows the figures
of eval.json, the benchmarks of benchmarks.json beside the paper's, the curves of metrics.jsonl, the answers of answers.jsonl,
and says in words where something known to go wrong is seen.
"""

import html
import json
import math
from pathlib import Path

from spin import lm_harness
from spin.files import RESTORE, check_files, check_json, fail, one_line, write_whole
from spin.recipe import iter_dir, parse

NAMES = {
    "expected_exact_match": "expected exact match",
    "greedy_exact_match": "greedy exact match",
    "nll_per_token": "NLL per token (nats)",
    "win_rate": "win rate",
    "margin": "margin",
    "eos_rate": "ends by EOS",
    "mean_length": "mean length (tokens)",
}
BLUE, ORANGE = "#1f5fa8", "#c2571a"
LABELS = {
    "spin": ("SPIN", BLUE, ""),
    "sft": ("continued SFT, same steps", ORANGE, "6 4"),
}  # name, colour, dash
# of metrics.jsonl: a picture's title, what it shows, and its lines: (key, label, colour, dash)
CURVES = (
    ("Loss", "ℓ of the margin, Eq. (4.7); it starts at ℓ(0)", [("loss", "loss", BLUE, "")]),
    (
        "Margin",
        "λ·nats, the human answer's lead over the opponent's",
        [("margin", "margin", BLUE, "")],
    ),
    (
        "Log-ratios",
        "nats, policy against opponent; the real one should not fall",
        [("logratio_real", "real", BLUE, ""), ("logratio_generated", "generated", ORANGE, "6 4")],
    ),
    (
        "Lengths",
        "tokens in the answers",
        [("length_real", "real", BLUE, ""), ("length_generated", "generated", ORANGE, "6 4")],
    ),
    ("Gradient norm", "before clipping", [("grad_norm", "norm", BLUE, "")]),
    (
        "Speed",
        "tokens passed through the model in a second",
        [("tokens_per_s", "tokens/s", BLUE, "")],
    ),
)
LOSS_AT_0 = {
    "logistic": math.log(2),
    "hinge": 1.0,
    "correlation": 1.0,
    "exponential": 1.0,
}  # ℓ(0): nothing told apart
STYLE = """:root{color-scheme:light}body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;
background:#fff}table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{padding:.25rem .5rem;text-align:right;
white-space:nowrap;border-bottom:1px solid #ddd}th{white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}
svg{max-width:100%;height:auto}small{color:#666}.pictures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
figure{margin:0;break-inside:avoid}.warn{border-left:4px solid #b00020;background:#fdf1f1;padding:.5rem 1rem}
.answers{display:grid;gap:.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,9rem),1fr));margin:.5rem 0 1.5rem;break-inside:avoid}
.answers div,.ask{border:1px solid #ddd;padding:.4rem .6rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem}
.answers b{display:block;font-size:.8rem}.human{background:#f0f6ee}.knobs td{white-space:normal;overflow-wrap:anywhere;text-align:left}
@media(max-width:40rem){svg{font-size:17px}th:first-child,td:first-child{position:sticky;left:0;background:#fff;white-space:normal;min-width:7rem}}
@media print{body{max-width:none;margin:0;font-size:11pt}.wide{overflow:visible}th,td{white-space:normal}h2,h2+p,.ask{break-after:avoid}.answers{break-inside:avoid}}"""


@one_line
def main(argv=None):
    _, args = parse(argv, __doc__.split("\n")[0])
    check_files(args.run)
    summary = {"recipe": check_json(args.run / "recipe.json", RESTORE), **collect(args.run)}
    summary["benchmarks"] = {
        name: found["tasks"] for name, found in benchmarks(args.run, summary).items()
    }
    if not summary["spin"]:
        fail(f"{args.run} holds no eval.json: run evaluate.py first")
    write_whole(args.run / "summary.json", json.dumps(summary, indent=1) + "\n")
    steps = metrics(args.run, len(summary["spin"]) - 1)
    for problem in (problems := warnings(summary, steps)):
        print(f"note: {problem}")
    write_whole(
        args.run / "report.html",
        page(summary, args.run.name, steps, answers(args.run, summary), problems),
    )
    print(f"{args.run / 'report.html'}")
    print("\n".join(text_table(summary)))


def collect(run: Path) -> dict:
    """{"spin": figures of θ_0, θ_1, …, "sft": the same for the baseline, from the same θ_0}, up to the first that is missing."""
    found = {}
    for objective in LABELS:
        figures, t = [check_json(run / "eval.json")], 0
        while figures[-1] and (figure := check_json(iter_dir(run, t, objective) / "eval.json")):
            figures.append(figure)
            t += 1
        found[objective] = figures if t or (objective == "spin" and figures[0]) else []
    return found


def benchmarks(run: Path, summary: dict) -> dict:
    """{"θ_t": the content of its benchmarks.json} where evaluate.py --tasks has written one."""
    found = {}
    for objective, (label, *_) in LABELS.items():
        for t in range(len(summary[objective])):
            folder = iter_dir(run, t - 1, objective) if t else run
            if (t or objective == "spin") and (figures := check_json(folder / "benchmarks.json")):
                found[f"θ_{t} {label if t else 'SFT model'}"] = figures
    return found


def lines_of(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []
    except ValueError as problem:
        fail(
            f"{path} is damaged ({problem}): restore or delete it, this page is all that is made from it"
        )


def metrics(run: Path, iterations: int) -> list[list[dict]]:
    """The rows of metrics.jsonl, iteration by iteration."""
    return [lines_of(iter_dir(run, t) / "metrics.jsonl") for t in range(iterations)]


def answers(run: Path, summary: dict) -> list[tuple[dict, list]]:
    """(prompt and human answer, [answer of θ_0, of θ_1, …]) of the held-out prompts in answers.jsonl; None where one is missing."""
    models = [
        {row["id"]: row for row in lines_of((iter_dir(run, t - 1) if t else run) / "answers.jsonl")}
        for t in range(len(summary["spin"]))
    ]
    return [(row, [model.get(key) for model in models]) for key, row in models[0].items()]


def warnings(summary: dict, steps: list[list[dict]]) -> list[str]:
    """What is known to go wrong and is seen here, in words: by the last tenth of an iteration's steps, and by eval.json."""
    found, start = [], LOSS_AT_0[summary["recipe"].get("ell", "logistic")]
    for t, rows in enumerate(steps):
        if rows:
            late = rows[-max(1, len(rows) // 10) :]
            end = {
                key: sum(row[key] for row in late) / len(late)
                for key in ("loss", "logratio_real", "length_real")
            }
            if end["loss"] > 0.97 * start:
                found.append(
                    f"Iteration {t}: the loss ended at {end['loss']:.3f} and began at {start:.3f}, where real and generated answers "
                    "are not told apart. The learning rate or the number of steps may be too small, or too large; or nothing is left to learn."
                )
            if end["logratio_real"] < 0:
                found.append(
                    f"Iteration {t}: the human answers became less likely, by {-end['logratio_real']:.2f} nats on average: the policy wins "
                    "by making the generated ones less likely still. A lower learning rate, a larger λ or fewer epochs help."
                )
            away = [
                abs(math.log(max(f["mean_length"], 0.1) / end["length_real"]))
                for f in (summary["spin"][0], summary["spin"][t + 1])
            ]
            if away[1] > away[0] + math.log(1.25):
                found.append(
                    f"θ_{t + 1}: its answers have {summary['spin'][t + 1]['mean_length']:.1f} tokens on average, the human ones "
                    f"{end['length_real']:.1f}: the lengths drift away from them (θ_0: {summary['spin'][0]['mean_length']:.1f})."
                )
    for t, f in enumerate(summary["spin"]):
        if f["eos_rate"] < 0.9:
            found.append(
                f"θ_{t}: {1 - f['eos_rate']:.0%} of its answers were cut off at --max-new-tokens; they have no end to learn from."
            )
    return found


def text_table(summary):
    """Expected exact match, iteration by iteration, for the terminal."""
    for objective, (label, *_) in LABELS.items():
        if summary[objective]:
            yield f"{label:28}" + "  ".join(
                f"θ_{t} {f['expected_exact_match']:.3f}" for t, f in enumerate(summary[objective])
            )


def chart(lines, name: str, log: bool = False, ticks: dict | None = None, dots: bool = True) -> str:
    """Lines over the iterations, with bars of ± one standard error. Returns an <svg>.

    lines: (label, colour, dash pattern, [(t, value, error), …]) each. log: a logarithmic axis, one line a power of ten.
    ticks: {t: text} below the axis, where t is no iteration; None: θ_0, θ_1, … dots=False: lines alone, for many points.
    """
    scale = (lambda v: math.log10(max(v, 1e-300))) if log else (lambda v: v)
    points = [p for *_, line in lines for p in line]
    low, high = scale(min(v - e for _, v, e in points)), scale(max(v + e for _, v, e in points))
    step = max(1, math.ceil((high - low) / 8)) if log else nice((high - low or abs(high) or 1) / 4)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high += step if high == low else 0
    last = max(t for t, _, _ in points)
    ticks = ticks or {t: f"θ{chr(0x2080 + t) if t < 10 else t}" for t in range(last + 1)}
    x = lambda t: 60 + 560 * t / max(1, last)  # noqa: E731
    y = lambda v: 260 - 210 * (scale(v) - low) / (high - low)  # noqa: E731
    out = [
        f'<svg viewBox="0 0 660 300" role="img" aria-label="{html.escape(name)}" font-size="13" '
        'font-family="system-ui,sans-serif" xmlns="http://www.w3.org/2000/svg"><rect width="660" height="300" fill="#fff"/>'
    ]
    for i in range(round((high - low) / step) + 1):
        v, at = low + i * step, 260 - 210 * i * step / (high - low)
        text = (
            f'10<tspan dy="-5" font-size="10">{v:g}</tspan>'
            if log
            else f"{v:.{max(0, -math.floor(math.log10(step)))}f}"
        )
        out.append(
            f'<line x1="60" x2="620" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>'
            f'<text x="52" y="{at + 4:.1f}" text-anchor="end" fill="#555">{text}</text>'
        )
    for t, text in ticks.items():
        out.append(
            f'<text x="{x(t):.1f}" y="282" text-anchor="middle" fill="#555">{html.escape(text)}</text>'
        )
        if not dots:
            out.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="50" y2="260" stroke="#e4e4e4"/>')
    legend = 64
    for label, colour, dash, line in lines:
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v, _ in line)
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        for t, v, e in line if dots else ():
            out.append(
                f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{y(v - e):.1f}" y2="{y(v + e):.1f}" stroke="{colour}"/>'
                f'<circle cx="{x(t):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>'
            )
        out.append(
            f'<line x1="{legend}" x2="{legend + 24}" y1="18" y2="18" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/><text x="{legend + 30}" y="22" fill="{colour}">{html.escape(label)}</text>'
        )
        legend += 52 + 7 * len(label)
    return "\n".join(out) + "</svg>"


def figure_lines(summary: dict, key: str):
    """A figure of eval.json as the lines of a chart, one for each objective that has it."""
    for o, style in LABELS.items():
        line = [
            (t, f[key], f.get(key + "_stderr") or 0)
            for t, f in enumerate(summary[o])
            if f[key] is not None
        ]
        if line:
            yield *style, line


def nice(step: float) -> float:
    """The next number of 1, 2, 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def curves(steps: list[list[dict]]) -> str:
    """The pictures of CURVES: all iterations one after another, thinned to at most 400 points a line."""
    rows = [row for iteration in steps for row in iteration]
    if len(rows) < 2:
        return "<p>No metrics.jsonl is there.</p>"
    begins = {sum(map(len, steps[:t])): f"iter {t}" for t in range(len(steps)) if steps[t]}
    size, pictures = -(-len(rows) // 400), []
    for title, what, keys in CURVES:
        lines = []
        for key, *style in keys:
            bins = [
                (i + size / 2 - 0.5, [r[key] for r in rows[i : i + size] if r.get(key) is not None])
                for i in range(0, len(rows), size)
            ]
            lines.append(
                (*style, [(at, sum(values) / len(values), 0) for at, values in bins if values])
            )
        if any(line for *_, line in lines):
            picture = chart([one for one in lines if one[-1]], title, ticks=begins, dots=False)
            pictures.append(
                f"<figure>{picture}<figcaption><b>{title}</b>: {what}</figcaption></figure>"
            )
    return f'<div class="pictures">{"".join(pictures)}</div>'


def benchmark_tables(results: dict) -> str:
    """The benchmarks of this run's models above the paper's, in percent; empty where none was run."""
    parts = []
    for name in lm_harness.TABLES:
        if beside := lm_harness.beside_the_paper(name, results):
            columns, rows = beside
            head = "".join(
                f"<th>{html.escape(c)}<br><small>{shots} {m}</small></th>"
                for c, shots, m in columns
            )
            show = lambda c: (
                "–"
                if c is None
                else f"{c[0]:.2f}"
                + (f"&nbsp;<small>± {c[1]:.2f}</small>" if c[1] is not None else "")
            )  # noqa: E731
            body = "".join(
                f"<tr><td>{html.escape(model)}</td>{''.join(f'<td>{show(c)}</td>' for c in cells)}</tr>"
                for model, cells in rows
            )
            parts.append(
                f'<div class="wide"><table><tr><th>few-shot examples, metric</th>{head}</tr>{body}</table></div>'
            )
    return (
        f"<h2>Benchmarks</h2>{''.join(parts)}<p><small>{lm_harness.DIFFERS}</small></p>"
        if parts
        else ""
    )


def side_by_side(shown: list[tuple[dict, list]]) -> str:
    """Prompts with the human answer and that of each θ_t, as in the paper's Table 7."""
    card = lambda who, text, kind="": f'<div class="{kind}"><b>{who}</b>{html.escape(text)}</div>'  # noqa: E731
    parts = []
    for row, said in shown:
        cards = [
            card(
                f"θ<sub>{t}</sub>",
                a["answer"] + (" … (cut off)" if a["finish"] == "length" else ""),
            )
            for t, a in enumerate(said)
            if a
        ]
        parts.append(
            f'<div class="ask">{html.escape(row["prompt"])}</div><div class="answers">{card("human", row["real"], "human")}{"".join(cards)}</div>'
        )
    return "".join(parts) or "<p>No answers.jsonl is there.</p>"


def table(summary: dict) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in NAMES.values())
    rows = []
    for objective, (label, *_) in LABELS.items():
        for t, f in enumerate(summary[objective]):
            cells = "".join(f"<td>{cell(f[k], f.get(k + '_stderr'))}</td>" for k in NAMES)
            if t or objective == "spin":
                rows.append(
                    f"<tr><td>θ<sub>{t}</sub> {html.escape(label if t else 'SFT model')}</td>{cells}</tr>"
                )
    return f'<div class="wide"><table><tr><th>model</th>{head}</tr>{"".join(rows)}</table></div>'


def cell(value, error) -> str:
    return (
        "–"
        if value is None
        else f"{value:.3f}" + (f"&nbsp;<small>± {error:.3f}</small>" if error is not None else "")
    )


def page(summary: dict, name: str, steps=(), shown=(), problems=()) -> str:
    start, end = summary["spin"][0], summary["spin"][-1]
    key = "expected_exact_match"
    knobs = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in summary["recipe"].items()
    )
    notes = "".join(f"<li>{html.escape(p)}</li>" for p in problems)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>SPIN: {html.escape(name)}</title><link rel="icon" href="data:,"><style>{STYLE}</style>
<h1>Self-play fine-tuning: {html.escape(name)}</h1>
<p>{len(summary["spin"]) - 1} iterations on {
        start["n"]
    } held-out prompts: the expected exact match went from
{start[key]:.3f} (θ<sub>0</sub>) to {end[key]:.3f} (θ<sub>{
        len(summary["spin"]) - 1
    }</sub>). It is the probability that a sample
at temperature 1 is the human answer, computed from the model's own log-probabilities, averaged over the prompts.
Bars are ± one standard error over prompts.</p>
{
        f'<div class="warn"><b>Look at this</b><ul>{notes}</ul></div>'
        if notes
        else "<p>None of the known signs of trouble is seen: human answers "
        "becoming less likely, lengths drifting, a loss that stays where it began, answers cut off.</p>"
    }
<div class="pictures"><figure>{
        chart(list(figure_lines(summary, key)), NAMES[key])
    }<figcaption><b>Expected exact match</b></figcaption></figure>
<figure>{
        chart(list(figure_lines(summary, "nll_per_token")), NAMES["nll_per_token"])
    }<figcaption><b>Negative log-likelihood</b> per token of
the human answers, in nats</figcaption></figure></div>
<h2>All figures</h2><p>Win rate and margin: against the opponent of that iteration, λ of that iteration, Eq. (4.7).</p>
{table(summary)}
{benchmark_tables(summary.get("benchmarks") or {})}
<h2>Training</h2><p>SPIN's optimizer steps, all iterations one after another; means over the global batch.</p>
{curves(steps)}
<h2>Answers</h2><p>Held-out prompts, the human answer, and one sample of each model at temperature 1.</p>
{side_by_side(shown)}
<h2>Recipe</h2><table class="knobs">{knobs}</table>
</html>
"""


if __name__ == "__main__":
    main()
