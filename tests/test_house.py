"""The house itself: who imports whom, what is imported at all, and how much there is to read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {path.stem: path for path in ROOT.glob("*.py")} | {"configs": ROOT / "configs/__init__.py"}
MAY_IMPORT = {
    "model": set(), "diffusion": set(), "prepare_data": set(), "configs": set(),
    "train": {"configs", "diffusion", "model", "prepare_data"},
    "sample": {"configs", "diffusion", "model", "prepare_data"},
}
OUR_FOLDERS = {"bench", "experiments", "tests"}


def imported(path: Path) -> set[str]:
    """The top-level names a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_top_level_modules_are_the_five_and_configs():
    assert set(CORE) == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_form_a_dag(name):
    ours = imported(CORE[name]) & (set(MAY_IMPORT) | OUR_FOLDERS)
    assert ours <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_core_needs_three_packages(name):
    foreign = imported(CORE[name]) - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    optional = {"datasets"} if name == "prepare_data" else set()  # inside the function that needs it
    assert foreign <= {"torch", "numpy", "tiktoken"} | optional


def test_importing_has_no_side_effects(tmp_path):
    code = "import model, diffusion, configs, prepare_data, train, sample"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_core_can_be_read_in_an_afternoon():
    assert sum(len(path.read_text().splitlines()) for path in CORE.values()) <= 2171  # may only fall


def test_no_file_edits_the_import_path():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if path != Path(__file__) and ".venv" not in path.parts:
            assert "sys.path" not in path.read_text(), path


def test_every_command_passes_its_exit_code_on():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("experiments/*.py")]:
        if '__name__ == "__main__"' in (text := path.read_text()):
            assert text.rstrip().splitlines()[-1].startswith("    sys.exit(main("), path
