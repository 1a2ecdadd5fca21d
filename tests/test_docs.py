"""README.md, docs/ and benchmarks/RESULTS.md: links lead somewhere, and what is quoted is there.

Each check is a function of a folder that returns what is wrong in it. It must return nothing for
this repository, and something for a copy of its pages with a fault in it: that is the control.
"""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import REPO

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# [text](target), and ![text](target)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages(root: Path) -> list[Path]:
    """The pages whose links are checked."""
    return [root / "README.md", *sorted(root.glob("docs/*.md")), root / "benchmarks" / "RESULTS.md"]


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page: lower case; only letters, digits,
    spaces, hyphens and underscores stay; spaces become hyphens."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text stays
        found.add(re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-"))
    return found


def links(page: Path) -> list[tuple[str, str]]:
    """(file, anchor) of each relative link of a page, code left out; either may be empty."""
    text = FENCED.sub("", page.read_text())
    text = re.sub(r"`[^`\n]*`", "", text)
    inside = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [(unquote(file), anchor) for file, _, anchor in (t.partition("#") for t in inside)]


def dead_links(root: Path) -> list[str]:
    """Links to a file that is not there, or to a heading that its page has not."""
    dead = []
    for page in pages(root):
        for file, anchor in links(page):
            target = (page.parent / file).resolve() if file else page
            lost = not target.exists()
            if not lost and anchor:
                lost = anchor not in slugs(target.read_text())
            if lost:
                dead.append(f"{page.relative_to(root)}: {file}#{anchor}")
    return dead


def unreached(root: Path) -> list[str]:
    """Pages of docs/ that the README does not link to, and pages that do not link back."""
    from_readme = {(root / file).resolve() for file, _ in links(root / "README.md")}
    lost = [page.name for page in root.glob("docs/*.md") if page.resolve() not in from_readme]
    for page in root.glob("docs/*.md"):
        back = {(page.parent / file).resolve() for file, _ in links(page)}
        if (root / "README.md").resolve() not in back:
            lost.append(f"{page.name} back to README.md")
    return lost


# ---- quotes --------------------------------------------------------------------------------------


def quotes_not_in_loss(root: Path) -> list[str]:
    """Passages of the README's python block that do not stand in loss.py; a line of dots ends one.
    Of each line only what is not indentation counts."""

    def stripped(text: str) -> str:
        return "".join(line.strip() + "\n" for line in text.splitlines())

    blocks = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.M | re.S)
    passages = stripped("".join(blocks)).split("...\n")
    code = stripped((root / "loss.py").read_text())
    return [passage for passage in passages if not passage or passage not in code]


def names_of_no_test(root: Path) -> list[str]:
    """Tests that docs/theory.md names and that are not there; `test_name_…` is the start of one."""
    theory = (root / "docs" / "theory.md").read_text()
    code = "".join(p.read_text() for p in (root / "tests").glob("*.py"))
    there = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
    named = re.findall(r"`(test_\w+)(…?)`", theory)
    if len(named) < 12:
        return [f"only {len(named)} tests are named"]
    wrong = []
    for name, dots in named:
        fitting = [test for test in there if test.startswith(name) and (dots or test == name)]
        if len(fitting) != 1:
            wrong.append(f"{name}{dots}: {len(fitting)} tests")
    return wrong


def files_not_there(root: Path) -> list[str]:
    """Files of the README's tree, and `file`: `function` of its tables, that are not there."""
    readme = (root / "README.md").read_text()
    tree = readme.split("\n## The files\n")[1].split("```")[1]
    wrong, folder = [], ""
    for line in tree.strip().splitlines():
        names = re.findall(r"(?<!\S)\w+(?:\.py|\.sh|/)(?!\S)", line)
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            parent = ""
        else:
            parent = folder
        wrong += [parent + name for name in names if not (root / parent / name).exists()]
    for file, function in re.findall(r"`([\w/]+\.py)`: `(\w+)`", readme):
        path = root / file
        code = path.read_text() if path.exists() else ""
        if not re.search(rf"^(def|class) {function}\b", code, re.MULTILINE):
            wrong.append(f"{file}: {function}")
    return wrong


# ---- the checks and their controls ---------------------------------------------------------------


def change(file: str, old: str, new: str):
    """A fault: the text `old` of a file becomes `new`."""

    def harm(root: Path):
        text = (root / file).read_text()
        assert old in text, f"{file} has no {old!r} to be changed"
        (root / file).write_text(text.replace(old, new))

    return harm


def remove(file: str):
    """A fault: a file is gone."""
    return lambda root: (root / file).unlink()


def a_page_without_links(root: Path):
    (root / "docs" / "other.md").write_text("Nothing.\n")


# a check and faults that it finds
FAULTS = {
    dead_links: [
        remove("demo/theory_steps.svg"),
        remove("docs/metrics.md"),
        change("docs/metrics.md", "## How to read a run", "## Reading a run"),
        change("docs/theory.md", "(../README.md)", "(README.md)"),
    ],
    unreached: [
        a_page_without_links,
        change("README.md", "(docs/departures.md)", "(docs/theory.md)"),
        change("docs/lora.md", "(../README.md)", "(theory.md)"),
    ],
    quotes_not_in_loss: [
        change("loss.py", "lam * logratio_real - lam", "lam * logratio_real + lam"),
        change("loss.py", "    return lam *", "    # a line between\n    return lam *"),
        change("README.md", "```python", "```"),
    ],
    names_of_no_test: [
        change("tests/test_theory.py", "def test_the_ideal_opponent", "def test_an_opponent"),
        change("docs/theory.md", "`test_if_the_opponent_is_not_the_data_…`", "`test_if_the_…`"),
    ],
    files_not_there: [
        remove("run_iterations.sh"),
        remove("spin/recipe.py"),
        lambda root: shutil.rmtree(root / "benchmarks"),
        change("train.py", "def learning_rate(", "def rate("),
    ],
}


@pytest.mark.parametrize("check", FAULTS, ids=lambda check: check.__name__)
def test_a_check_finds_nothing_here_and_something_in_a_copy_with_a_fault(check, tmp_path):
    assert check(REPO) == []
    skipped = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.safetensors", "*.jsonl")
    for number, harm in enumerate(FAULTS[check]):
        copy = shutil.copytree(REPO, tmp_path / str(number), ignore=skipped)
        assert check(copy) == []
        harm(copy)
        assert check(copy) != []  # control


def test_the_readme_ends_with_licence_and_bibtex():
    end = (REPO / "README.md").read_text().split("\n## ")[-1]
    assert end.startswith("Licence") and "Apache-2.0" in end and "@inproceedings" in end
    assert re.search(r"^```bibtex\n.*^}\n```\n\Z", end, re.MULTILINE | re.DOTALL)


def test_slugs_are_githubs():
    headings = ["# Eq. (4.7) & its `code`", "## λ, ℓ and `--lam`", "## A [link](x.md) in it"]
    text = "\n".join([*headings, "```", "# not a heading", "```"])
    assert slugs(text) == {"eq-47--its-code", "λ-ℓ-and---lam", "a-link-in-it"}
