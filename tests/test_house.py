"""The rules of the house: who imports whom, what a stage does itself, what is required.

Each check is a function that returns what is wrong, in sentences. It must return nothing for this
repository, and the right sentence for a text with a fault in it: that is the control.
"""

import ast
import functools
import graphlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPO

STAGES = {"generate", "train", "evaluate"}
# spin/ from the ground up: each part uses only what stands before it
ORDER = ["files", "recipe", "sampling", "run", "model", "data", "checks", "bench", "report"]
ORDER += ["compare", "mt_bench", "publish"]  # commands
# optional packages: only one module imports each, and only when it is asked for
ONLY_IN = {
    "datasets": "spin.data.rows",
    "flash_attn": "spin.model.attention",
    "lm_eval": "spin.bench.harness",
    "matplotlib": "spin.report.pictures",
    "peft": "spin.model.lora",
    "vllm": "spin.sampling.vllm_engine",
}

TOP_LEVEL = ["evaluate.py", "generate.py", "loss.py", "train.py"]

USERS_SIX = ["torch", "transformers", "datasets", "flash-attn", "numpy", "tqdm"]


def rooms() -> dict[str, str]:
    """{"train": text of train.py, "spin.files": text of spin/files.py, …}: top level and spin/."""
    files = sorted([*REPO.glob("*.py"), *REPO.glob("spin/**/*.py")])
    names = {file: file.relative_to(REPO).with_suffix("") for file in files}
    return {".".join(name.parts): file.read_text() for file, name in names.items()}


# ---- imports -------------------------------------------------------------------------------------


@functools.cache
def imports_of(source: str) -> list[tuple[str, bool]]:
    """(what is imported, whether inside a function): "a" of `import a`, "a.b" of `from a import b`.

    A relative import is one from spin, where alone it can stand."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
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


def room_named(name: str, house: dict[str, str]) -> str | None:
    """The room of which a module, or something in it, is imported; None for other packages."""
    while name and name not in house:
        name = name.rpartition(".")[0]
    return name or None


def part_of(module: str) -> str | None:
    """The part of spin/ that a module belongs to: "model" of spin.model.lora; None for others."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "spin" else None


def wrong_imports(house: dict[str, str]) -> list[str]:
    wrong = []
    arrows = {}
    for room, text in house.items():
        imports = imports_of(text)
        arrows[room] = {room_named(name, house) for name, _ in imports} - {None}
        for stage in sorted(arrows[room] & STAGES):
            wrong.append(f"{room} imports the stage {stage}")
        for other in sorted(arrows[room]):
            mine, its = part_of(room), part_of(other)
            if mine in ORDER and its in ORDER and ORDER.index(its) > ORDER.index(mine):
                wrong.append(f"{room} imports upward: {other}")
        for name, late in imports:
            package = name.partition(".")[0]
            if room == "loss" and package != "torch":
                wrong.append(f"loss imports {package}, not torch alone")
            if package in ONLY_IN and not (late and room == ONLY_IN[package]):
                wrong.append(f"{room} imports {package}, not a function of {ONLY_IN[package]}")
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        wrong.append("a circle: " + " → ".join(error.args[1]))
    return wrong


def wrong_places(house: Path) -> list[str]:
    """Parts of spin/ that have no place in the order, doors that do not say what lies behind them,
    and Python files of the top level that the user did not name."""
    wrong = []
    for path in sorted((house / "spin").iterdir()):
        if path.stem not in (*ORDER, "__init__", "__pycache__"):
            wrong.append(f"spin/{path.name} has no place in the order")
        door = path / "__init__.py"
        if path.stem in ORDER and path.is_dir():
            says = door.exists() and ast.get_docstring(ast.parse(door.read_text())) or ""
            if len(says) < 200:
                wrong.append(f"{path.name}/__init__.py does not say what lies behind the door")
    top = sorted(file.name for file in house.glob("*.py"))
    if top != TOP_LEVEL:
        wrong.append(f"the top level is {' '.join(top)}")
    return wrong


def test_no_import_runs_upward_or_in_a_circle():
    assert len(rooms()) > 20
    assert wrong_imports(rooms()) == []


def test_each_part_has_its_place_and_each_door_says_what_lies_behind_it(tmp_path):
    assert wrong_places(REPO) == []
    (tmp_path / "spin" / "run").mkdir(parents=True)  # controls
    (tmp_path / "sample.py").touch()
    (tmp_path / "spin" / "extra.py").touch()
    (tmp_path / "spin" / "run" / "__init__.py").write_text('"""run"""')
    wrong = wrong_places(tmp_path)
    assert wrong[0] == "spin/extra.py has no place in the order"
    assert wrong[1].startswith("run/__init__.py does not say") and "sample.py" in wrong[2]


WRONG_IMPORTS = [
    ("spin.files", "from spin import checks", "a circle: "),
    ("spin.files", "from .checks import finite", "a circle: "),
    ("spin.files", "def late():\n    import spin.checks", "a circle: "),
    ("spin.run.folders", "from spin.data import rows", "spin.run.folders imports upward"),
    (
        "spin.model.packing",
        "def late():\n    import spin.report.metrics",
        "imports upward",
    ),
    ("loss", "import math", "loss imports math"),
    ("spin.checks", "import evaluate", "spin.checks imports the stage evaluate"),
    ("evaluate", "import generate as stage", "evaluate imports the stage generate"),
    ("train", "def late():\n    import lm_eval", "train imports lm_eval"),
    ("spin.data.rows", "import datasets", "spin.data.rows imports datasets"),
    ("spin.bench.harness", "import lm_eval.tasks", "spin.bench.harness imports lm_eval"),
]


@pytest.mark.parametrize("room, line, sentence", WRONG_IMPORTS)
def test_a_wrong_import_is_found(room, line, sentence):
    house = rooms()
    house[room] += f"\n\n{line}\n"
    assert any(sentence in found for found in wrong_imports(house))


# ---- what a stage does itself --------------------------------------------------------------------

# (file, what it calls, where that is imported from); a method is imported from nowhere
CALLS = [
    ("train.py", "spin_loss", "loss"),
    ("train.py", "backward", None),
    ("train.py", "RMSprop", "torch.optim"),
    ("train.py", "optimizer.step", None),
    ("train.py", "fully_shard", "torch.distributed.fsdp"),
    ("generate.py", "sample", "spin.sampling.engines"),
]


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
    folders = ("", "spin/**/", "tests/", "benchmarks/", "demo/")
    files = [file for folder in folders for file in REPO.glob(f"{folder}*.py")]
    found = {file: noqa_without_reason(file.read_text()) for file in files}
    assert {file: comments for file, comments in found.items() if comments} == {}
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


def packages_of(house: dict[str, str]) -> set[str]:
    """What the top level and spin/ import from others."""
    found = {name.partition(".")[0] for text in house.values() for name, _ in imports_of(text)}
    return {distribution(name) for name in found - {*house, "spin", *sys.stdlib_module_names}}


def test_requirements_name_every_package_that_is_imported_the_users_six_first():
    text = (REPO / "requirements.txt").read_text()
    assert required(text)[:6] == USERS_SIX
    assert packages_of(rooms()) - set(required(text)) == set()
    assert packages_of(rooms()) > {"torch", "jinja2", "lm-eval"}
    # controls
    house = rooms() | {"spin.extra": "def late():\n    import scipy.stats\n"}
    assert packages_of(house) - set(required(text)) == {"scipy"}
    fewer = required(text.replace("jinja2==", "# jinja2=="))
    assert packages_of(rooms()) - set(fewer) == {"jinja2"}
    assert required("# numpy\n#   pip install 'lm_eval[hf]==1'\nA_b==2\n") == ["lm-eval", "a-b"]


def versions(text: str) -> set[str]:
    """The packages of a requirements file with their versions; comments, optional ones too, not."""
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def test_pyproject_is_the_one_place_of_versions_and_the_requirements_repeat_it():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = {*extras["lora"], *extras["eval"], *extras["track"]}
    (others,) = {line for line in extras["dev"] if line.startswith("spin-reference")}
    assert others == "spin-reference[lora,eval,track]"
    text, dev = (REPO / "requirements.txt").read_text(), REPO / "requirements-dev.txt"
    assert versions(text) == {*project["dependencies"]}
    assert versions(dev.read_text()) == {*extras["dev"]} - {others} | optional
    # what requirements.txt and the messages say to install has the same versions
    said = re.findall(r"pip install '?([\w\[\]]+==[\d.]+)", text + "".join(rooms().values()))
    assert {*said} == optional | {"torch==2.13.0"}
    assert versions(text.replace("numpy==2", "numpy==3")) != {*project["dependencies"]}  # control


SHADOWED = (
    "import loss, spin.files, lm_eval.tasks.french_bench.utils as t; print(t.evaluate.__file__)"
)


@pytest.mark.long
def test_an_installation_offers_spin_and_loss_and_hides_no_other_evaluate(tmp_path):
    """A task of lm_eval imports Hugging Face's package evaluate."""
    ignored = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "theta0")
    copy = shutil.copytree(REPO, tmp_path / "copy", ignore=ignored)

    def installed(folder) -> list[str]:
        """What an editable installation of the copy makes importable: its finder's MAPPING."""
        folder.mkdir()
        build = "from setuptools.build_meta import build_editable as b; b"
        build += f"({str(folder)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        (finder,) = folder.glob("__editable__*.py")
        mapping = re.search(r"^MAPPING.*?= (\{.*\})$", finder.read_text(), re.MULTILINE)[1]
        return sorted(ast.literal_eval(mapping))

    def evaluate_of(folder) -> str:
        code = f"import site; site.addsitedir(r'{folder}'); {SHADOWED}"
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert installed(tmp_path / "ours") == ["loss", "spin"]
    assert evaluate_of(tmp_path / "ours").strip().endswith("/evaluate/__init__.py")
    text = (copy / "pyproject.toml").read_text()  # control
    (copy / "pyproject.toml").write_text(text.replace('["loss"]', '["loss", "evaluate"]'))
    assert installed(tmp_path / "other") == ["evaluate", "loss", "spin"]
