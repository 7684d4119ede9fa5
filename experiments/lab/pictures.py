"""Pictures: a PNG if matplotlib is installed, one line on stderr if not."""

import sys
from collections.abc import Callable
from pathlib import Path


def draw(path: Path, paint: Callable, columns: int = 1, rows: int = 1, width: float = 5.0,
         height: float = 4.0) -> None:
    """Save what `paint(axes)` draws, or say in one line why not. width, height: inches a panel."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(width * columns, height * rows), layout="constrained")
        paint(figure.subplots(rows, columns))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        print(f"picture: {path}")
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    except OSError as error:
        print(f"no picture: {error}", file=sys.stderr)
