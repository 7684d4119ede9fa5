"""experiments/nano.py, the page that people share: its bound is right, and it learns.

And docs/nano.ipynb, the same with pictures: it is up to date, and runs.
"""

import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import seeded

from experiments import nano, notebook

ROOT = Path(__file__).parents[2]
WORDS = "a the of and ship storm captain sailor island harbour night wind saw left feared".split()


def run_nano(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "experiments/nano.py", *map(str, arguments)],
                          capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    sentences = (" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(3000))
    path = tmp_path / "text.txt"
    path.write_text("".join(sentences))  # about 120 KB
    return path


def test_a_few_steps_beat_the_byte_frequencies(text):
    result = run_nano(text, 80)
    assert (result.returncode, result.stderr) == (0, "")
    nelbo, error = re.search(r"<= ([\d.]+) \+- ([\d.]+) bits", result.stdout).groups()
    entropy = re.search(r"frequencies alone: ([\d.]+)", result.stdout)[1]
    own = text.read_bytes()[-text.stat().st_size // 10:]
    p = [own.count(byte) / len(own) for byte in set(own)]
    assert float(entropy) == pytest.approx(-sum(q * math.log2(q) for q in p), abs=1e-3)
    assert float(error) < 0.2
    least = 3000 * 8 * math.log2(len(WORDS)) / text.stat().st_size  # the entropy of the source
    assert least < float(nelbo) < float(entropy) - 1

    _, *states = re.findall("^.*░.*$", result.stdout, re.MULTILINE)
    hidden = [state.count("░") for state in states]
    assert hidden == sorted(hidden, reverse=True) and len(hidden) == 7  # the text appears


@pytest.mark.parametrize("arguments, message", [
    ([], "0 arguments"),
    (["no such file"], "No such file"),
    (["small"], "300 bytes"),
    (["small", "many"], "'many'"),
    (["small", "1", "2"], "3 arguments"),
])
def test_a_mistake_gets_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").write_text("abc" * 100)
    assert nano.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "usage:" in err and err.count("\n") == 1


def test_the_exit_code_of_a_mistake_is_2():
    assert run_nano().returncode == 2


# --- The bound, where the answer is known ---------------------------------------------------------


def test_the_bound_of_independent_bytes_is_their_entropy():
    torch.manual_seed(0)
    p = torch.randn(256, generator=seeded(0)).mul(2).softmax(0)
    rows = torch.multinomial(p, 1000 * nano.T, replacement=True, generator=seeded(1))
    bits, error = nano.bound(lambda x: p.log().expand(*x.shape, 256), rows.view(-1, nano.T))
    assert error < 0.05
    assert abs(bits - torch.special.entr(p).sum().item() / math.log(2)) < 4 * error


@pytest.mark.parametrize("R", [3 * nano.T, 500])
def test_the_bound_is_the_mean_over_all_counts(R):
    torch.manual_seed(0)

    def model(x):  # a model for which the byte 7 costs m/T bits where m are hidden
        m = (x == nano.MASK).sum(1)
        assert ((x == nano.MASK) | (x == 7)).all() and (m >= 1).all()
        p = 2 ** -(m / nano.T)
        logits = ((1 - p) / 255).log()[:, None, None].repeat(1, nano.T, 256)
        logits[..., 7] = p.log()[:, None]
        return logits

    bits, _ = nano.bound(model, torch.full((R, nano.T), 7))
    assert bits == pytest.approx((nano.T + 1) / (2 * nano.T), abs=1e-5 if R % nano.T == 0 else 2e-3)


def test_exactly_m_bytes_are_hidden_and_any_of_them():
    torch.manual_seed(0)
    m = torch.arange(1, nano.T + 1).repeat(20)
    seen = []

    def model(x):
        seen.append(x == nano.MASK)
        return torch.zeros(*x.shape, 256)

    nats = nano.guess(model, torch.randint(256, (len(m), nano.T)), m)
    assert torch.equal(seen[0].sum(1), m)
    often = seen[0].float().mean(0)  # of each position: (T+1) / 2T of the rows, give or take 0.01
    assert (often - (nano.T + 1) / (2 * nano.T)).abs().max() < 0.06
    assert torch.allclose(nats, torch.tensor(256.0).log())


def test_masks_are_never_written():
    torch.manual_seed(0)
    model = nano.Denoiser()
    assert model(torch.full((2, nano.T), nano.MASK)).shape == (2, nano.T, 256)
    lines = list(nano.write(model, steps=4))
    assert [line.count("░") for line in lines] == [nano.T * left // 4 for left in (4, 3, 2, 1, 0)]


# --- The notebook ---------------------------------------------------------------------------------


def test_the_notebook_is_what_nano_and_its_story_make():
    committed = json.loads((ROOT / "docs/nano.ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in committed["cells"]]
    built = [(cell["cell_type"], cell["source"]) for cell in notebook.build()["cells"]]
    assert cells == built, "run python -m experiments.notebook"


def test_every_function_of_nano_but_main_is_in_the_notebook():
    code = "\n".join(cell["source"] for cell in notebook.build()["cells"]
                     if cell["cell_type"] == "code")
    made = {name: value for name, value in vars(nano).items()
            if getattr(value, "__module__", "") == nano.__name__}
    for name, value in made.items():
        assert (name == "main") != (inspect.getsource(value).strip() in code), name


@pytest.mark.slow
def test_a_quick_notebook_runs_to_its_end_and_has_its_pictures():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    quick = nbformat.from_dict(notebook.build(steps="20"))
    nbclient.NotebookClient(quick, timeout=300).execute()  # an error in a cell is raised here
    outputs = [output for cell in quick.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawn = sum("plt." in cell.source or "page(" in cell.source for cell in quick.cells)
    assert len(pictures) == drawn == 5
    said = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert said == ""


def test_without_nbclient_one_line_names_the_command(monkeypatch, capsys):
    before = (ROOT / "docs/nano.ipynb").read_bytes()
    monkeypatch.setattr(notebook, "find_spec", lambda name: None if name == "nbclient" else name)
    assert notebook.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "pip install nbclient ipykernel" in err and err.count("\n") == 1
    assert (ROOT / "docs/nano.ipynb").read_bytes() == before
