"""The rules of the house: who imports whom, how long things are, what a stage does itself.

Each check is a function that returns what is wrong, in sentences. It must return nothing for this
repository, and the right sentence for a copy or a text with a fault in it: that is the control.
"""

import ast
import graphlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import REPO

STAGES = {"generate", "train", "evaluate"}
# packages that only one room imports, and only when they are asked for
ROOM_OF = {"lm_eval": "spin.lm_harness", "matplotlib": "spin.pictures", "peft": "spin.lora"}

TOP_LEVEL = ["evaluate.py", "generate.py", "loss.py", "train.py"]
TOP_LEVEL_LINES = 660  # together; they had 600 when the house was built
ROOM_LINES = 220
SHELL_LINES = {"run_iterations.sh": 45, "spin/launch.sh": 50}
FUNCTION_LINES = 45
ARGUMENTS = 7
# The loops of the sampler share one long list of arguments, and transformers dictates what a cache
# and an attention take.
FREE_ROOMS = ["spin/sampling.py", "spin/slots.py"]
FREE_FUNCTIONS = ["packed_attention", "trial_attention"]
LINE_LENGTH = 100

USERS_SIX = ["torch", "transformers", "datasets", "flash-attn", "numpy", "tqdm"]


def rooms(house: Path) -> dict[str, Path]:
    """{"train": …/train.py, "spin.files": …/spin/files.py, …}: the top level and spin/."""
    files = sorted([*house.glob("*.py"), *house.glob("spin/**/*.py")])
    return {".".join(file.relative_to(house).with_suffix("").parts): file for file in files}


def functions_of(tree: ast.AST) -> list:
    """All functions of a syntax tree, methods and inner ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.fixture()
def copied(tmp_path):
    """copied() is a new copy of the top level and spin/, to break."""

    def copy() -> Path:
        house = tmp_path / f"house{len(list(tmp_path.iterdir()))}"
        shutil.copytree(REPO / "spin", house / "spin")
        for name in (*TOP_LEVEL, "run_iterations.sh", "requirements.txt"):
            shutil.copy(REPO / name, house)
        return house

    return copy


def add(file: Path, text: str):
    file.write_text(file.read_text() + text)


# ---- imports -------------------------------------------------------------------------------------


def imports_of(file: Path) -> list[tuple[str, bool]]:
    """(what is imported, whether inside a function): "a" of `import a`, "a.b" of `from a import b`.

    A relative import is one from spin, where alone it can stand."""
    tree = ast.parse(file.read_text())
    late = {id(node) for function in functions_of(tree) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            home = ["spin"] if node.level else []
            home += [node.module] if node.module else []
            names = [".".join([*home, alias.name]) for alias in node.names]
        found += [(name, id(node) in late) for name in names]
    return found


def room_named(name: str, house: dict[str, Path]) -> str | None:
    """The room of which a module, or something in it, is imported; None for other packages."""
    while name and name not in house:
        name = name.rpartition(".")[0]
    return name or None


def wrong_imports(house: Path) -> list[str]:
    files = rooms(house)
    wrong = []
    arrows = {}
    for room, file in files.items():
        imports = imports_of(file)
        arrows[room] = {room_named(name, files) for name, _ in imports} - {None}
        for stage in sorted(arrows[room] & STAGES):
            wrong.append(f"{room} imports the stage {stage}")
        for name, late in imports:
            package = name.partition(".")[0]
            if room == "loss" and package != "torch":
                wrong.append(f"loss imports {package}, not torch alone")
            if package in ROOM_OF and not (late and room == ROOM_OF[package]):
                wrong.append(f"{room} imports {package}, not a function of {ROOM_OF[package]}")
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        wrong.append("a circle: " + " → ".join(error.args[1]))
    return wrong


def test_no_import_runs_upward_or_in_a_circle():
    assert len(rooms(REPO)) > 20
    assert wrong_imports(REPO) == []


WRONG_IMPORTS = [
    ("spin/files.py", "from spin import checks", "a circle: "),
    ("spin/files.py", "def late():\n    import spin.checks", "a circle: "),
    ("spin/files.py", "from .checks import finite", "a circle: "),
    ("spin/files.py", "from . import checks", "a circle: "),
    ("loss.py", "from spin.metrics import of_step", "a circle: "),
    ("loss.py", "import math", "loss imports math"),
    ("spin/signs.py", "from train import shard", "spin.signs imports the stage train"),
    ("spin/checks.py", "import evaluate", "spin.checks imports the stage evaluate"),
    ("evaluate.py", "import generate as stage", "evaluate imports the stage generate"),
    ("train.py", "def late():\n    import lm_eval", "train imports lm_eval"),
    ("spin/lm_harness.py", "import lm_eval.tasks", "spin.lm_harness imports lm_eval"),
    ("spin/report.py", "def late():\n    import matplotlib", "spin.report imports matplotlib"),
    ("spin/pictures.py", "from matplotlib import style", "spin.pictures imports matplotlib"),
]


@pytest.mark.parametrize("file, line, sentence", WRONG_IMPORTS)
def test_a_wrong_import_is_found(file, line, sentence, copied):
    """The control of the test before."""
    house = copied()
    assert wrong_imports(house) == []
    add(house / file, f"\n\n{line}\n")
    assert any(sentence in found for found in wrong_imports(house))


# ---- sizes ---------------------------------------------------------------------------------------


def number_of_lines(file: Path) -> int:
    return file.read_text().count("\n")


def too_long(house: Path) -> list[str]:
    """Files that are longer than they may be, or that do not belong on the top level."""
    wrong = []
    top = sorted(file.name for file in house.glob("*.py"))
    if top != TOP_LEVEL:
        wrong.append(f"the top level is {' '.join(top)}")
    together = sum(number_of_lines(house / name) for name in top)
    if together > TOP_LEVEL_LINES:
        wrong.append(f"the top level has {together} lines")
    limits = {str(file.relative_to(house)): ROOM_LINES for file in house.glob("spin/**/*.py")}
    for name, limit in {**limits, **SHELL_LINES}.items():
        lines = number_of_lines(house / name)
        if lines > limit:
            wrong.append(f"{name} has {lines} lines")
    return wrong


def lengthen(file: Path, lines: int):
    """Add comments until a file has so many lines."""
    missing = lines - number_of_lines(file)
    assert missing >= 0
    add(file, "#\n" * missing)


def test_no_file_is_too_long_and_the_top_level_shows_the_users_names_alone(copied):
    assert too_long(REPO) == []
    # controls: each limit is met exactly, then passed by a line
    for name, limit in {"spin/signs.py": ROOM_LINES, **SHELL_LINES}.items():
        house = copied()
        lengthen(house / name, limit)
        assert too_long(house) == []
        lengthen(house / name, limit + 1)
        assert too_long(house) == [f"{name} has {limit + 1} lines"]
    house = copied()
    others = sum(number_of_lines(house / name) for name in TOP_LEVEL if name != "loss.py")
    lengthen(house / "loss.py", TOP_LEVEL_LINES - others)
    assert too_long(house) == []
    add(house / "loss.py", "#\n")
    assert too_long(house) == [f"the top level has {TOP_LEVEL_LINES + 1} lines"]
    (house / "loss.py").unlink()
    assert too_long(house) == ["the top level is evaluate.py generate.py train.py"]
    house = copied()
    (house / "sample.py").touch()
    assert "sample.py" in too_long(house)[0]


def large_functions(source: str, name: str) -> list[str]:
    """Functions of a file that are too long, or take too many arguments; name: the file's."""
    wrong = []
    for function in functions_of(ast.parse(source)):
        lines = function.end_lineno - function.lineno + 1
        if lines > FUNCTION_LINES:
            wrong.append(f"{name}: {function.name} has {lines} lines")
        if name in FREE_ROOMS or function.name in FREE_FUNCTIONS:
            continue
        taken = function.args
        arguments = len([*taken.posonlyargs, *taken.args, *taken.kwonlyargs])
        if arguments > ARGUMENTS:
            wrong.append(f"{name}: {function.name} takes {arguments} arguments")
        if taken.kwarg:
            wrong.append(f"{name}: {function.name} hides arguments in **{taken.kwarg.arg}")
    return wrong


def test_no_function_is_too_long_or_takes_too_many_arguments():
    wrong = []
    for file in rooms(REPO).values():
        wrong += large_functions(file.read_text(), str(file.relative_to(REPO)))
    assert wrong == []
    # controls, each beside what is just allowed
    body = "    pass\n" * (FUNCTION_LINES - 1)
    assert large_functions(f"@a\ndef f():\n{body}", "train.py") == []
    assert "f has 46 lines" in large_functions(f"def f():\n{body}    pass\n", "train.py")[0]
    assert large_functions("def f(a, b, c, /, d, e=1, *, g, h=2): ...", "train.py") == []
    eight = "class A:\n    def f(self, a, b, c, d, *, e, g, h=2): ..."
    assert "f takes 8 arguments" in large_functions(eight, "train.py")[0]
    assert "**knobs" in large_functions("def f(a, **knobs): ...", "train.py")[0]
    assert large_functions(eight, "spin/slots.py") == []
    assert large_functions("def packed_attention(a, **rest): ...", "spin/packing.py") == []


# ---- what a stage does itself --------------------------------------------------------------------

# (file, what it calls, where that is imported from); a method is imported from nowhere
CALLS = [
    ("train.py", "spin_loss", "loss"),
    ("train.py", "backward", None),
    ("train.py", "RMSprop", "torch.optim"),
    ("train.py", "optimizer.step", None),
    ("train.py", "fully_shard", "torch.distributed.fsdp"),
    ("generate.py", "sample", "spin.sampling"),
]
OF_4_7 = "policy_real, policy_generated, opponent_real, opponent_generated, lam, ell"


def calls_of(source: str, name: str) -> list[str]:
    """The arguments, as written, of each call of a function or method."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)  # "spin_loss", "optimizer.step", …
            if called == name or called.endswith(f".{name}"):
                parts = [*node.args, *node.keywords]
                found.append(", ".join(ast.unparse(part) for part in parts))
    return found


def takes_from(source: str, module: str) -> set[str]:
    """The names that a file imports from a module and does not rename."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            found |= {alias.name for alias in node.names if not alias.asname}
    return found


@pytest.mark.parametrize("file, name, module", CALLS, ids=[name for _, name, _ in CALLS])
def test_the_steps_of_algorithm_1_stand_in_the_stages_themselves(file, name, module):
    source = (REPO / file).read_text()
    assert calls_of(source, name)
    # control: it is called under another name, and stands in a comment alone
    other = re.sub(rf"\b{re.escape(name)}\(", "elsewhere(", source) + f"\n# {name}()\n"
    assert calls_of(other, name) == []
    if module:
        assert name in takes_from(source, module)
        own = source.replace(f"from {module} import", "from spin.own import")
        assert name not in takes_from(own, module)  # control


def test_equation_4_7_is_called_with_its_six_values_by_name():
    source = (REPO / "train.py").read_text()
    assert calls_of(source, "spin_loss") == [OF_4_7]
    opponent = "opponent_real, opponent_generated"
    swapped = source.replace(f"{opponent}, lam", "opponent_generated, opponent_real, lam")
    assert calls_of(swapped, "spin_loss") not in ([], [OF_4_7])  # control


# ---- lines ---------------------------------------------------------------------------------------


def tracked(*patterns: str) -> list[Path]:
    """The files that git knows by these patterns."""
    listed = subprocess.run(
        ["git", "-C", REPO, "ls-files", "-z", *patterns], check=True, capture_output=True, text=True
    )
    files = [REPO / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.exists()]  # one may be about to be deleted


def long_lines(text: str) -> list[int]:
    """The numbers of the lines that are too long."""
    lines = enumerate(text.split("\n"), 1)
    return [number for number, line in lines if len(line) > LINE_LENGTH]


def test_no_line_of_python_or_shell_is_too_long():
    files = tracked("*.py", "*.sh", ".ci/run")
    names = {str(file.relative_to(REPO)) for file in files}
    assert {*TOP_LEVEL, *SHELL_LINES, "tests/conftest.py", ".ci/run"} <= names
    found = {str(file.relative_to(REPO)): long_lines(file.read_text()) for file in files}
    assert {name: numbers for name, numbers in found.items() if numbers} == {}
    assert long_lines("é" * 100 + "\n" + "é" * 101 + "\n") == [2]  # control


def noqa_without_reason(source: str) -> list[str]:
    """The comments that silence the linter and do not say why, or do not say what they silence."""
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(r"\bnoqa\b", token.string, re.IGNORECASE):
            comments.append(token.string)
    # a code or several, then words
    reasoned = re.compile(r"# noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*\W+\w.*\w \w")
    return [comment for comment in comments if not reasoned.match(comment)]


def test_the_linter_is_silenced_only_with_a_reason_beside_it():
    found = {
        str(file.relative_to(REPO)): noqa_without_reason(file.read_text())
        for file in tracked("*.py")
    }
    assert {name: comments for name, comments in found.items() if comments} == {}
    told = "x = 1  # noqa: B007, E731 – both are wanted after the loop\n"
    assert noqa_without_reason(told + 'y = "# noqa"\n') == []
    for fault in ("# noqa", "# noqa: E731", "# noqa: E731 –", "# noqa: B007, E731", "# ruff: noqa"):
        assert noqa_without_reason(f"{told}y = 2  {fault}\n") == [fault]  # control


# ---- requirements --------------------------------------------------------------------------------


def distribution(name: str) -> str:
    """One spelling for a package to install and the package to import: huggingface_hub's and
    Jinja2's differ in nothing else."""
    return name.replace("_", "-").replace(".", "-").lower()


def required(text: str) -> list[str]:
    """The packages of a requirements file in its order, with those of `# pip install X`, which are
    optional."""
    pattern = r"^(?:#.*pip install )?'?([A-Za-z][\w.-]*)"
    names = [distribution(name) for name in re.findall(pattern, text, re.MULTILINE)]
    return list(dict.fromkeys(names))


def packages_of(house: Path) -> set[str]:
    """What the top level and spin/ import from others."""
    files = rooms(house)
    found = set()
    for file in files.values():
        packages = {name.partition(".")[0] for name, _ in imports_of(file)}
        found |= packages - {*files, "spin", *sys.stdlib_module_names}
    return {distribution(name) for name in found}


def test_requirements_name_every_package_that_is_imported_the_users_six_first(copied):
    text = (REPO / "requirements.txt").read_text()
    assert required(text)[:6] == USERS_SIX
    assert packages_of(REPO) - set(required(text)) == set()
    assert packages_of(REPO) > {"torch", "jinja2", "huggingface-hub", "lm-eval"}
    # controls
    house = copied()
    add(house / "spin" / "signs.py", "\n\ndef late():\n    import scipy.stats\n")
    assert packages_of(house) - set(required(text)) == {"scipy"}
    assert packages_of(REPO) - set(required(text.replace("jinja2==", "# jinja2=="))) == {"jinja2"}
    assert required("# numpy\n#   pip install 'lm_eval[hf]==1'\nA_b==2\n") == ["lm-eval", "a-b"]
