"""Pictures: a PNG if matplotlib is installed, one line on stderr if not."""

import sys
from collections.abc import Callable
from pathlib import Path


def draw(path: Path, paint: Callable, columns: int = 1, rows: int = 1, width: float = 5.0,
         height: float = 4.0) -> None:
    """Save what `paint(axes)` draws, or say in one line why not. width, height: inches a panel."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    figure = Figure((width * columns, height * rows), layout="constrained")
    paint(figure.subplots(rows, columns))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        print(f"picture: {path}")
    except OSError as error:  # the numbers are worth more: they are still to be printed
        print(f"no picture: {error}", file=sys.stderr)
