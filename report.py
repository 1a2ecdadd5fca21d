"""The page: what changed from θ_0 to θ_T. Reads a run's recipe.json and eval.json files; no model, no torch.

    python report.py --recipe demo          writes RUN/summary.json and RUN/report.html

report.html is one self-contained page with pictures in plain SVG: it opens from disk, without a network.
"""

import html
import json
import math
from pathlib import Path

from recipe import fail, iter_dir, parse, write_whole

NAMES = {"expected_exact_match": "expected exact match", "greedy_exact_match": "greedy exact match",
         "nll_per_token": "NLL per token (nats)", "win_rate": "win rate", "margin": "margin",
         "eos_rate": "ends by EOS", "mean_length": "mean length (tokens)"}
LABELS = {"spin": ("SPIN", "#1f5fa8", ""), "sft": ("continued SFT, same steps", "#c2571a", "6 4")}  # name, colour, dash
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{padding:.25rem .5rem;text-align:right;white-space:nowrap;
border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}svg{max-width:100%;height:auto}
small{color:#666}code{background:#f4f4f4}"""


def main(argv=None):
    _, args = parse(argv, __doc__.split("\n")[0])
    summary = {"recipe": read(args.run / "recipe.json"), **collect(args.run)}
    if not summary["spin"]:
        fail(f"{args.run} holds no eval.json: run evaluate.py first")
    write_whole(args.run / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_whole(args.run / "report.html", page(summary, args.run.name))
    print(f"{args.run / 'report.html'}")
    print("\n".join(text_table(summary)))


def read(path: Path):
    try:
        found = json.loads(path.read_text()) if path.exists() else None
        if not isinstance(found, dict | None):
            raise ValueError("not an object")
        return found
    except ValueError as problem:
        fail(f"{path} cannot be read ({problem}): delete it and run its stage again")


def collect(run: Path) -> dict:
    """{"spin": figures of θ_0, θ_1, …, "sft": the same for the baseline, from the same θ_0}, up to the first that is missing."""
    found = {}
    for objective in LABELS:
        figures, t = [read(run / "eval.json")], 0
        while figures[-1] and (figure := read(iter_dir(run, t, objective) / "eval.json")):
            figures.append(figure)
            t += 1
        found[objective] = figures if t or (objective == "spin" and figures[0]) else []
    return found


def text_table(summary):
    """Expected exact match, iteration by iteration, for the terminal."""
    for objective, (label, *_) in LABELS.items():
        if summary[objective]:
            yield f"{label:28}" + "  ".join(f"θ_{t} {f['expected_exact_match']:.3f}" for t, f in enumerate(summary[objective]))


def chart(lines, name: str, log: bool = False) -> str:
    """Lines over the iterations, with bars of ± one standard error. Returns an <svg>.

    lines: (label, colour, dash pattern, [(t, value, error), …]) each. log: a logarithmic axis, one line a power of ten.
    """
    scale = (lambda v: math.log10(max(v, 1e-300))) if log else (lambda v: v)
    points = [p for *_, line in lines for p in line]
    low, high = scale(min(v - e for _, v, e in points)), scale(max(v + e for _, v, e in points))
    step = max(1, math.ceil((high - low) / 8)) if log else nice((high - low or abs(high) or 1) / 4)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high += step if high == low else 0
    last = max(t for t, _, _ in points)
    x = lambda t: 60 + 560 * t / max(1, last)  # noqa: E731
    y = lambda v: 260 - 210 * (scale(v) - low) / (high - low)  # noqa: E731
    out = [f'<svg viewBox="0 0 660 300" role="img" aria-label="{html.escape(name)} by iteration" font-size="13" '
           'font-family="system-ui,sans-serif" xmlns="http://www.w3.org/2000/svg"><rect width="660" height="300" fill="#fff"/>']
    for i in range(round((high - low) / step) + 1):
        v, at = low + i * step, 260 - 210 * i * step / (high - low)
        text = f'10<tspan dy="-5" font-size="10">{v:g}</tspan>' if log else f"{v:.{max(0, -math.floor(math.log10(step)))}f}"
        out.append(f'<line x1="60" x2="620" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>'
                   f'<text x="52" y="{at + 4:.1f}" text-anchor="end" fill="#555">{text}</text>')
    out += [f'<text x="{x(t):.1f}" y="282" text-anchor="middle" fill="#555">θ{chr(0x2080 + t) if t < 10 else t}</text>'
            for t in range(last + 1)]
    legend = 64
    for label, colour, dash, line in lines:
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v, _ in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        for t, v, e in line:
            out.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{y(v - e):.1f}" y2="{y(v + e):.1f}" stroke="{colour}"/>'
                       f'<circle cx="{x(t):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>')
        out.append(f'<line x1="{legend}" x2="{legend + 24}" y1="18" y2="18" stroke="{colour}" stroke-width="2" '
                   f'stroke-dasharray="{dash}"/><text x="{legend + 30}" y="22" fill="{colour}">{html.escape(label)}</text>')
        legend += 52 + 7 * len(label)
    return "\n".join(out) + "</svg>"


def figure_lines(summary: dict, key: str):
    """A figure of eval.json as the lines of a chart, one for each objective that has it."""
    for o, style in LABELS.items():
        line = [(t, f[key], f.get(key + "_stderr") or 0) for t, f in enumerate(summary[o]) if f[key] is not None]
        if line:
            yield *style, line


def nice(step: float) -> float:
    """The next number of 1, 2, 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def table(summary: dict) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in NAMES.values())
    rows = []
    for objective, (label, *_) in LABELS.items():
        for t, f in enumerate(summary[objective]):
            cells = "".join(f"<td>{cell(f[k], f.get(k + '_stderr'))}</td>" for k in NAMES)
            if t or objective == "spin":
                rows.append(f"<tr><td>θ<sub>{t}</sub> {html.escape(label if t else 'SFT model')}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>model</th>{head}</tr>{"".join(rows)}</table></div>'


def cell(value, error) -> str:
    return "–" if value is None else f"{value:.3f}" + (f"&nbsp;<small>± {error:.3f}</small>" if error is not None else "")


def page(summary: dict, name: str) -> str:
    start, end = summary["spin"][0], summary["spin"][-1]
    key = "expected_exact_match"
    knobs = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in (summary["recipe"] or {}).items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>SPIN: {html.escape(name)}</title><style>{STYLE}</style>
<h1>Self-play fine-tuning: {html.escape(name)}</h1>
<p>{len(summary["spin"]) - 1} iterations on {start["n"]} held-out prompts: the expected exact match went from
{start[key]:.3f} (θ<sub>0</sub>) to {end[key]:.3f} (θ<sub>{len(summary["spin"]) - 1}</sub>). It is the probability that a sample
at temperature 1 is the human answer, computed from the model's own log-probabilities, averaged over the prompts.
Bars are ± one standard error over prompts.</p>
<h2>Expected exact match</h2>{chart(list(figure_lines(summary, key)), NAMES[key])}
<h2>Negative log-likelihood per token of the human answers</h2>{chart(list(figure_lines(summary, "nll_per_token")), NAMES["nll_per_token"])}
<h2>All figures</h2><p>Win rate and margin: against the opponent of that iteration, λ of that iteration, Eq. (4.7).</p>
{table(summary)}
<h2>Recipe</h2><div class="wide"><table>{knobs}</table></div>
</html>
"""


if __name__ == "__main__":
    main()
