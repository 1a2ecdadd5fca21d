"""Pictures of lines with error bars, as SVG text: for the report, demo/theory.py and benchmarks/.

    line = Line("SPIN", [(0, 0.50, 0.01), (1, 0.71, 0.01)])
    svg = draw_lines("Exact match", [line], "iteration", "probability")
No stage imports this file. matplotlib's Figure is used without pyplot, so nothing needs a screen,
and no setting of the user's changes a picture: the same input gives the same bytes."""

import base64
import dataclasses
import io
from pathlib import Path

# Colour and dash of the first, second, … line: without colour the dash alone tells them apart.
STYLES = (
    ("#1f5fa8", "-"),  # blue
    ("#c2571a", "--"),  # orange
    ("#1b7f4d", "-."),  # green
    ("#8a4fb0", ":"),  # purple
    ("#0f8b9d", (0, (8, 2))),  # teal, long dashes
    ("#b01f4f", (0, (6, 2, 1, 2, 1, 2))),  # red, a dash and two dots
    ("#6b6b6b", (0, (2, 3))),  # grey, short dashes far apart
)
SIZE = (4.2, 2.8)  # inches, 403 pixels wide, where the letters are about as large as a page's
SETTINGS = Path(__file__).with_suffix(".mplstyle")
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclasses.dataclass
class Line:
    """One line of a picture."""

    label: str
    points: list[tuple[float, float, float]]  # x, value, standard error (0: no bar)
    colour: str = STYLES[0][0]
    dash: str | tuple = "-"  # a line style of matplotlib
    marker: str = "o"  # "": no dots


def level(label: str, points: list[tuple[float, float]]) -> Line:
    """A grey line without dots, for something to compare with. points: x and value."""
    return Line(label, [(x, value, 0) for x, value in points], *STYLES[-1], marker="")


def draw_lines(
    title: str,
    lines: list[Line],
    x_label: str,
    y_label: str,
    log: bool = False,
    ticks: dict[float, str] | None = None,
    dots: bool = True,
) -> str:
    """Lines over iterations, with bars of ± one standard error, as the text of an SVG file.
    title: not drawn, but read aloud. log: powers of ten on the y axis. ticks: {x: text} below the
    x axis; None: θ_0, θ_1, … dots: False draws lines alone, for many points, with a vertical line
    at each tick. Line i stands in the group with the id line-i."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", SETTINGS]):  # not the user's own matplotlibrc
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        for number, line in enumerate(lines):
            add_line(axes, line, dots, f"line-{number}")
        if log:
            axes.set_yscale("log", nonpositive="clip")
        if ticks is None:  # at most nine of them
            last = max(x for line in lines for x, _, _ in line.points)
            some = range(0, last + 1, 1 + last // 9)
            ticks = {t: "θ" + str(t).translate(SUBSCRIPTS) for t in some}
        axes.set_xticks(list(ticks), labels=list(ticks.values()))
        if not dots:
            axes.grid(axis="x")
        # One line needs no legend: the axis says what it is.
        if len(lines) > 1:
            # beside each other if they fit: 52 characters, of which a sample of a line takes seven
            widths = [len(line.label) + 7 for line in lines]
            columns = len(lines) if sum(widths) <= 52 else max(1, 52 // max(widths))
            figure.legend(loc="outside upper center", ncols=columns)
        # No date, and no version of matplotlib: a file in the repository changes with its content.
        file = io.BytesIO()
        told = {"Title": title, "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=told)
    return file.getvalue().decode()


def add_line(axes, line: Line, dots: bool, name: str):
    """Draw a line, with its dots and error bars or alone."""
    x, values, errors = zip(*line.points, strict=True)
    (drawn,) = axes.plot(x, values, color=line.colour, linestyle=line.dash, label=line.label)
    drawn.set(linewidth=1.6 if dots else 1.1, markersize=4, gid=name)
    drawn.set_marker(line.marker if dots else "")
    if any(errors):
        axes.errorbar(x, values, yerr=errors, fmt="none", ecolor=line.colour)


def as_image(svg: str, lines: list[Line]) -> dict[str, str]:
    """src and alt of an <img>: two SVGs in one page itself would share their ids. The alternative
    text says where each line begins and ends."""
    values = [(line.label, line.points[0][1], line.points[-1][1]) for line in lines]
    ends = [f"{label} from {first:.3g} to {last:.3g}" for label, first, last in values]
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return {"src": source, "alt": "; ".join(ends)}
