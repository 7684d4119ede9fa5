import pytest
import torch

# The tests' tensors are tiny: a second thread costs more than it brings, on a busy machine much more.
torch.set_num_threads(1)


@pytest.fixture
def figure(request, capsys):
    """Print what a test counted: in its long form (`make test-reliability`), where somebody waits for it."""

    def show(text: str) -> None:
        if request.node.get_closest_marker("reliability"):
            with capsys.disabled():
                print(f"\n    {text}", flush=True)

    return show
