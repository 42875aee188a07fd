"""What holds for the repository as a whole: order of imports, notebook, README's map, style."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cellseg"
NOTEBOOK = ROOT / "Training.ipynb"
README = ROOT / "README.md"

# Who may import whom: a room imports from itself and from the rooms in lines above its own.
ROOMS = [
    {"errors"},
    {"files"},
    {"markdown"},
    {"rle"},
    {"coco"},
    {"overlap"},
    {"data"},
    {"models"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"presets"},
    {"ensemble"},
    {"submission"},
    {"interchange"},
    {"report"},
    {"notebook"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_NOTEBOOK_LINES = 15
MAX_TRACKED_KB = 300

needs_notebook = pytest.mark.skipif(not NOTEBOOK.exists(), reason="no Training.ipynb")


def room_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_modules(path, source):
    """Yield the absolute names of what a module of the package imports, at any depth."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tracked_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_imports_only_rooms_above_its_own(path):
    names = [name.split(".") for name in imported_modules(path, path.read_text(encoding="utf-8"))]
    rooms = {name[1] for name in names if name[0] == "cellseg" and len(name) > 1}
    if path == PACKAGE / "__init__.py":
        assert not rooms
        return
    room = room_of(path)
    assert room in RANK, f"{room} has no place in the table of rooms"
    below = {other for other in rooms if other != room and RANK.get(other, -1) >= RANK[room]}
    assert not below, f"{room} stands above {below}"


def test_relative_imports_are_seen_by_the_table():
    path = PACKAGE / "data" / "reading.py"
    assert list(imported_modules(path, "from ..report import plots")) == ["cellseg.report.plots"]
    assert list(imported_modules(path, "from .audit import x")) == ["cellseg.data.audit.x"]
    inside = "def f():\n    import cellseg.report.plots as plots"
    assert list(imported_modules(path, inside)) == ["cellseg.report.plots"]


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, cellseg; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"torch", "numpy", "matplotlib", "typst"} & set(done.stdout.split())


def test_no_error_is_caught_blindly():
    """Whoever catches everything passes it on; but for what must never stop training or doctor."""
    blind = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = ast.walk(node.type) if node.type else [ast.Name("BaseException")]
            kinds = {name.id for name in names if isinstance(name, ast.Name)}
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if kinds & {"Exception", "BaseException"} and not passes_on:
                blind.append(path.relative_to(PACKAGE).as_posix())
    allowed = {
        "cli/__init__.py", "doctor/probes.py", "doctor/versions.py", "training/tracking.py",
    }  # fmt: skip
    assert set(blind) <= allowed


def code_cells():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(cell):
    """Return a cell's source with magics and shell lines taken out."""
    lines = cell.source.splitlines()
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in lines)


@needs_notebook
def test_notebook_holds_no_outputs():
    for cell in code_cells():
        assert not cell.outputs and cell.execution_count is None


@needs_notebook
def test_notebook_narrates_and_the_package_computes():
    for cell in code_cells():
        nodes = list(ast.walk(ast.parse(python_of(cell))))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in nodes if isinstance(node, kinds)], cell.source
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= MAX_NOTEBOOK_LINES, cell.source


@needs_notebook
def test_notebook_has_one_settings_cell():
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code_cells()) == 1


@needs_notebook
def test_every_cellseg_name_in_the_notebook_exists():
    tree = ast.parse("\n".join(python_of(cell) for cell in code_cells()))
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "cellseg":
            for alias in node.names:
                found = find(f"{node.module}.{alias.name}")
                aliases[alias.asname or alias.name] = found
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "cellseg":
                    aliases[alias.asname or "cellseg"] = find(alias.name)
    modules = {name: value for name, value in aliases.items() if type(value) is type(ast)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), ast.unparse(node)


def find(name):
    """Return the module, function or class of an absolute name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def map_paths(text):
    """Yield the paths in the code block below README's heading of the file map.

    The first word of a line is a path; an indented line lies in the folder above it.
    """
    block = re.search(r"^#+ [^\n]*\bmap\b[^\n]*\n.*?^```\w*\n(.*?)^```", text, re.I | re.S | re.M)
    folders = []
    for line in block.group(1).splitlines() if block else ():
        plain = re.sub(r"[│├└─]", " ", line)
        if not plain.strip():
            continue
        indent = len(plain) - len(plain.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        name = plain.split()[0]
        path = "".join(folder for _, folder in folders) + name
        yield path
        if name.endswith("/"):
            folders.append((indent, name))


def test_map_paths_are_read_from_an_indented_block():
    text = "# A\n## File map\nWords.\n```\na/   x\n  b.py  y\n  c/\n    d.py\ne.md z\n```\n"
    assert list(map_paths(text)) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.md"]


@pytest.mark.skipif(not README.exists(), reason="no README.md")
def test_file_map_of_the_readme_is_true():
    paths = list(map_paths(README.read_text(encoding="utf-8")))
    assert paths, "README.md has no file map: a heading with the word map, then a code block"
    missing = [path for path in paths if not (ROOT / path).exists() and not ignored_by_git(path)]
    assert not missing


def ignored_by_git(path):
    """Tell whether a path is one that a run makes and git leaves out."""
    tracked_files()
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0


def test_no_tracked_file_is_large():
    sizes = {path: path.stat().st_size / 1024 for path in tracked_files() if path.exists()}
    large = [f"{path.name}: {size:.0f} KB" for path, size in sizes.items() if size > MAX_TRACKED_KB]
    assert not large


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt", "pyproject.toml"])
def test_requirements_name_no_index(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|https?://|^-e|@ file:", text, re.M)


def read_requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    texts = [line.split("#")[0].strip() for line in lines]
    return [Requirement(text) for text in texts if text]


def test_constraints_pin_every_requirement_to_a_version_it_allows():
    pins = {canonicalize_name(pin.name): pin for pin in read_requirements("constraints.txt")}
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
    for requirement in read_requirements("requirements.txt"):
        version = str(pins[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), requirement


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_passes(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
