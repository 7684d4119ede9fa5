from pathlib import Path

import pytest
import torch
from oracles import FOX

from plumbing import machine
from prepare_data import write_dataset

# The tensors of the tests are tiny: a second thread costs more than it brings, on a busy machine
# much more.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_ceiling():
    """What matrix products reach is not measured: it would take a second in each training run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "matmul_ceiling", lambda device, dtype: 1e9)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder such as prepare_data.py writes; a token is a byte."""
    folder = tmp_path_factory.mktemp("data")
    documents = [("train", [FOX * 60]), ("val", [(FOX * 60)[:2000]])]
    write_dataset(iter(documents), "byte", folder, "test")
    return folder


@pytest.fixture
def figure(request, capsys):
    """Print what a test counted: in its long form, where somebody waits for it."""

    def show(text: str) -> None:
        if request.node.get_closest_marker("reliability"):
            with capsys.disabled():
                print(f"\n    {text}", flush=True)

    return show
