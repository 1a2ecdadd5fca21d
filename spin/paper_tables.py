"""The paper's benchmark figures (Tables 3 to 6 of arXiv 2401.01335v3), and ours beside them.

Used by spin/lm_harness.py, which makes ours, and by the report.
"""

# our column, the harness's task, few-shot examples, the harness's metric: Appendix B.1 and the old
# Open LLM Leaderboard
PAPER = (
    ("Arc", "arc_challenge", 25, "acc_norm,none"),
    ("TruthfulQA", "truthfulqa_mc2", 0, "acc,none"),
    ("Winogrande", "winogrande", 5, "acc,none"),
    ("GSM8k", "gsm8k", 5, "exact_match,strict-match"),
    ("HellaSwag", "hellaswag", 10, "acc_norm,none"),
    ("MMLU", "mmlu", 5, "acc,none"),
)
# Table 6; the Big-Bench-Hard tasks bring their three worked examples along
EXTRA = (
    ("BB causal", "bbh_cot_fewshot_causal_judgement", 3, "exact_match,get-answer"),
    ("BB formal", "bbh_cot_fewshot_formal_fallacies", 3, "exact_match,get-answer"),
    ("BB sports", "bbh_cot_fewshot_sports_understanding", 3, "exact_match,get-answer"),
    ("OpenBookQA", "openbookqa", 1, "acc_norm,none"),
)
TABLES = {
    "paper": (
        PAPER,
        {  # Tables 3 to 5 of arXiv 2401.01335v3
            "zephyr-7b-sft-full": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
            "SPIN iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
            "SPIN iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
            "SPIN iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
            "SPIN iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
            "zephyr-7b-dpo-full": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
            "SPIN iteration 3 + DPO": (66.47, 60.07, 78.06, 37.98, 86.17, 59.68),
            "SFT, one more epoch": (57.76, 44.39, 75.77, 25.85, 81.69, 57.89),
        },
    ),
    "extra": (
        EXTRA,
        {  # Table 6
            "zephyr-7b-sft-full": (56.15, 49.6, 96.0, 45.4),
            "SPIN iteration 0": (57.75, 51.6, 95.2, 46.8),
            "SPIN iteration 1": (58.82, 51.2, 95.2, 47.2),
            "SPIN iteration 2": (59.36, 51.2, 94.4, 47.6),
        },
    ),
}
DIFFERS = (
    "The paper's harness was older than lm_eval 0.4.13, and prompts and scoring have changed "
    "since. MMLU is weighted by subject size here. GSM8k is the strict match (the number after "
    "####)."
)


def beside_the_paper(name: str, results: dict) -> tuple[list, list] | None:
    """(columns, rows) of the paper's table `name` with our models above, in percent.

    results: {model: {task: …}} as lm_harness gives them. A column is ("Arc", 25, "acc_norm"), the
    last one the mean of all, where all are there. A row is (model, [(value, error), …]).
    None if no figure is there."""
    tasks, paper = TABLES[name]
    rows = []
    for model, found in results.items():
        cells = []
        for _, task, _, metric in tasks:
            cell = found[task]["figures"].get(metric) if task in found else None
            cells.append(cell and in_percent(*cell))
        if any(cells):
            rows.append((model, with_mean(cells)))
    if not rows:
        return None
    columns = [(column, shots, metric.split(",")[0]) for column, _, shots, metric in tasks]
    columns.append(("average", "", ""))
    for model, values in paper.items():
        rows.append((f"paper: {model}", with_mean([(value, None) for value in values])))
    return columns, rows


def in_percent(value: float, error: float | None) -> tuple:
    """A figure of the harness, a share of 1, in percent as the paper's are."""
    return 100 * value, None if error is None else 100 * error


def with_mean(cells: list) -> list:
    """The cells and their mean; its standard error is that of independent figures."""
    if not all(cells):
        return [*cells, None]
    n = len(cells)
    mean = sum(value for value, _ in cells) / n
    errors = [error for _, error in cells]
    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / n
    return [*cells, (mean, error)]


def text_table(columns, rows) -> list[str]:
    """What beside_the_paper gives, as lines of text."""
    texts = []
    for k, head in enumerate(("", "few-shot examples", "metric")):
        texts.append(f"{head:32}" + "".join(f"{column[k]!s:>15}" for column in columns))
    for model, cells in rows:
        texts.append(f"{model[-32:]:32}" + "".join(f"{in_words(cell):>15}" for cell in cells))
    return texts


def in_words(cell: tuple | None) -> str:
    """A value in percent with its standard error, as far as they are known."""
    if cell is None:
        return "–"
    value, error = cell
    return f"{value:.2f}" if error is None else f"{value:.2f} ±{error:.2f}"
