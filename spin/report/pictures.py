"""Pictures of lines with error bars, as SVG: for the report, demo/theory.py and benchmarks/."""

import base64
import io
from typing import NamedTuple

# colour and dash of the first, second, … line of a picture, in matplotlib's notation
STYLES = ("C0-", "C1--", "C2-.", "C4:", "C9-", "C3--", "C7:")
SETTINGS = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.handlelength": 3,
    "lines.markersize": 4,
    "figure.figsize": (4.2, 2.8),  # inches, where the letters are about as large as the page's
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "spin",  # and no date: the same lines give the same file
}


class Line(NamedTuple):
    """One line of a picture. points: x, value, standard error. style: an o makes dots."""

    label: str
    points: list[tuple[float, float, float]]
    style: str = "C0-o"


def draw_lines(title: str, lines: list[Line], x_label: str, y_label: str, log=False, ticks=None):
    """The text of an SVG file with these lines, and bars of ± one standard error. title: read
    aloud, not drawn. log: the y axis. ticks: {x: text} below the x axis; None: θ₀, θ₁, …"""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: nothing needs a screen

    with matplotlib.style.context(["default", SETTINGS]):  # not the user's own matplotlibrc
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        for label, points, style in lines:
            x, values, errors = zip(*points, strict=True)
            axes.errorbar(x, values, errors if any(errors) else None, fmt=style, label=label)
        if log:
            axes.set_yscale("log", nonpositive="clip")
        if ticks is None:
            last = max(x for line in lines for x, *_ in line.points)
            ticks = {t: theta(t) for t in range(0, last + 1, 1 + last // 9)}  # at most nine fit
        axes.set_xticks(list(ticks), labels=list(ticks.values()))
        if len(lines) > 1:  # a single line is named by the y axis
            longest = max(len(line.label) for line in lines)
            figure.legend(loc="outside upper center", ncols=2 if longest < 20 else 1)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    return file.getvalue().decode()


def theta(t: int) -> str:
    """θ₀, θ₁, …"""
    return "θ" + str(t).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def as_image(axis: str, lines: list[Line], x_label: str, ticks=None) -> dict[str, str]:
    """src and alt of an <img> of these lines: where each begins and ends. axis: the y axis."""
    svg = draw_lines(axis, lines, x_label, axis, ticks=ticks)
    ends = [f"{name} from {y[0][1]:.3g} to {y[-1][1]:.3g}" for name, y, _ in lines]
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return {"src": source, "alt": "; ".join(ends)}
