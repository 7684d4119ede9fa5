"""The house itself: what it consists of, who imports whom, and whether its rooms are easy to read.

A check that fails says where, and what to do.
"""

import ast
import graphlib
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READING_PATH = ("model", "diffusion", "train", "sample", "prepare_data")  # what people come for
FOLDERS = ("plumbing", "bench", "experiments", "tests")
FILES = sorted(ROOT.glob("*.py")) + [path for folder in FOLDERS
                                     for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}
NANO = "experiments/nano.py"
READ = {path: SOURCES[path] for path in (f"{name}.py" for name in READING_PATH)}
CORE = READ | {path: text for path, text in SOURCES.items() if path.startswith("plumbing/")}

# How many lines there may be. If a room grows out of its limit, make something simpler.
LIMITS = {
    "model.py": 180,
    "diffusion.py": 445,
    "train.py": 270,
    "sample.py": 440,
    "prepare_data.py": 250,
    "plumbing/": 2047,
    NANO: 160,
}
READING_PATH_LIMIT = 1550
CORE_LIMIT = 3590

# Of ours, what a file may import: by its name, or by that of the folder it is in.
MAY_IMPORT = {
    "model": {"plumbing.machine"},
    "diffusion": set(),
    "prepare_data": {"plumbing"},
    "plumbing": {"plumbing", "model", "diffusion"},
    "train": {"plumbing", "model", "diffusion", "prepare_data"},
    "sample": {"plumbing", "model", "diffusion", "prepare_data"},
    "bench": {*READING_PATH, "plumbing", "bench"},
    "experiments": {*READING_PATH, "plumbing", "bench", "experiments"},
    "tests": {*READING_PATH, *FOLDERS},
}


def complain(problems: Iterator[str]) -> None:
    """Fail with all of them, one a line."""
    if lines := list(problems):
        pytest.fail("\n".join(lines), pytrace=False)


def module_of(path: str) -> str:
    """plumbing/muon.py -> plumbing.muon"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """The five files are rooms of their own; tests import their helpers by bare names."""
    return "tests" if f"tests/{module}.py" in SOURCES else module.split(".")[0]


def imports(path: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether inside a function) of every import in a file."""
    modules = set(map(module_of, SOURCES))
    inside = {id(node) for function in ast.walk(TREES[path]) if isinstance(function, FUNCTIONS)
              for node in ast.walk(function)}
    for node in ast.walk(TREES[path]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part in modules else str(node.module) for part in parts]
        for name in dict.fromkeys(names):
            yield node.lineno, "." * getattr(node, "level", 0) + name, id(node) in inside


# ---- what there is, and who imports whom ---------------------------------------------------------


def test_the_house_has_five_files_four_folders_of_code_and_nothing_else():
    found = [path.relative_to(ROOT) for pattern in ("*.py", "[!.]*/*.py")
             for path in ROOT.glob(pattern)]
    complain(f"{path}:1: no such room; move it into plumbing/, bench/ or experiments/"
             for path in found if str(path) not in READ and path.parts[0] not in FOLDERS)
    complain(f"{path}: configs/ holds TOML files only" for path in (ROOT / "configs").iterdir()
             if path.suffix != ".toml" and path.name != "__pycache__")


def test_nobody_imports_what_is_above_it():
    def problems():
        for path in SOURCES:
            allowed = MAY_IMPORT.get(room_of(module_of(path)), set())
            for line, module, _ in imports(path):
                if module.startswith("."):
                    yield f"{path}:{line}: a relative import; write the whole name"
                elif room_of(module) in MAY_IMPORT and not {module, room_of(module)} & allowed:
                    yield (f"{path}:{line}: imports {module}, but may import only "
                           f"{sorted(allowed) or 'nothing of ours'}: move what it needs there")

    complain(problems())


def test_imports_make_no_circle():
    graph = {module_of(path): {module for _, module, _ in imports(path)} for path in SOURCES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        complain([f"{' <- '.join(error.args[1])}: move what they share below both"])


def test_the_core_needs_three_packages_and_nano_needs_torch_alone():
    def problems():
        for path in [*CORE, NANO]:
            known = {"torch"} if path == NANO else {"torch", "numpy", "tiktoken", *MAY_IMPORT}
            for line, module, inside in imports(path):
                package = module.split(".")[0]
                optional = (path, package, inside) == ("plumbing/corpora.py", "datasets", True)
                if not optional and package not in {*known, *sys.stdlib_module_names}:
                    yield f"{path}:{line}: imports {package}: write it out"

    complain(problems())


def test_importing_has_no_side_effects(tmp_path):
    core = ", ".join(module_of(path) for path in CORE)
    result = subprocess.run([sys.executable, "-c", f"import {core}"], cwd=tmp_path,
                            env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_no_file_edits_the_import_path():
    word = "sys." + "path"
    complain(f"{path}:{number}: {word}; run it as python -m, from the top folder"
             for path, source in SOURCES.items()
             for number, line in enumerate(source.splitlines(), 1) if word in line)


def test_every_command_passes_its_exit_code_on():
    complain(f"{path}:{len(source.splitlines())}: the last line must be sys.exit(main())"
             for path, source in SOURCES.items() if '__name__ == "__main__"' in source
             and not path.startswith("tests/")
             and not source.rstrip().splitlines()[-1].startswith("    sys.exit(main("))


# ---- whether it is easy to read ------------------------------------------------------------------


def test_no_line_is_longer_than_100_columns():
    complain(f"{path}:{number}: {len(line)} columns; break it, or say it more shortly"
             for path, source in SOURCES.items()
             for number, line in enumerate(source.splitlines(), 1) if len(line) > 100)


def definitions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """("path:line: name", function), of the five files."""
    for path in READ:
        for node in ast.walk(TREES[path]):
            if isinstance(node, FUNCTIONS):
                yield f"{path}:{node.lineno}: {node.name}", node


def test_no_function_is_longer_than_a_screen():
    def length(node):
        return node.end_lineno - node.lineno + 1

    complain(f"{where} has {length(node)} lines; up to 60 fit a screen: split it where it tells "
             "another story" for where, node in definitions() if length(node) > 60)


def test_no_call_takes_more_than_eight_arguments():
    def number(node):
        names = [inner.arg for inner in ast.walk(node.args) if isinstance(inner, ast.arg)]
        return len(set(names) - {"self", "cls"})

    complain(f"{where} has {number(node)} arguments; up to 8: let options travel in a frozen "
             "dataclass" for where, node in definitions() if number(node) > 8)


def test_a_line_assigns_one_thing():
    def calls(node):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else []
        return sum(isinstance(value, ast.Call) for value in values)

    complain(f"{path}:{node.lineno}: a, b = f(), g(); write two lines" for path in READ
             for node in ast.walk(TREES[path]) if isinstance(node, ast.Assign) and calls(node) > 1)


def test_15_to_25_lines_of_100_have_a_comment():
    def per_100(source):
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        return 100 * len(lines) / len(source.splitlines())

    complain(f"{path}:1: {per_100(source):.1f} lines of 100 have a comment, not 15 to 25: say why, "
             "a shape, a usual value; drop what the code says itself"
             for path, source in READ.items() if not 15 <= per_100(source) <= 25)


def lines_of(prefix: str) -> int:
    """How long a file is, or all files of a folder."""
    return sum(len(text.splitlines()) for path, text in SOURCES.items() if path.startswith(prefix))


def test_no_room_outgrows_its_limit():
    complain(f"{room}:1: {lines_of(room)} lines, the limit is {limit}: make something simpler"
             for room, limit in LIMITS.items() if lines_of(room) > limit)


def test_the_reading_path_and_the_core_stay_short():
    reading_path = sum(lines_of(path) for path in READ)
    core = sum(lines_of(path) for path in CORE)
    assert reading_path <= READING_PATH_LIMIT, "make something in the five files simpler"
    assert core <= CORE_LIMIT, "make something in plumbing/ simpler"
