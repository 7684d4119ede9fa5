"""nano.py with pictures: python -m experiments.notebook makes docs/nano.ipynb, and runs it

Never edit the notebook: its talk and drawings are nano_story.md, its code is cut out of nano.py.
A cell of the story that begins with `# nano.py: FIRST ... LAST` ends with what stands there from
one statement to another.
"""

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

from plumbing.command import Mistake, command

HERE = Path(__file__).parent


def cut(first: str, last: str) -> str:
    """nano.py, or its main(), from the statement that begins with `first` to that with `last`."""
    source = (HERE / "nano.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    nodes = [node for parent in ast.parse(source).body if not isinstance(parent, ast.If)
             for node in [parent, *getattr(parent, "body", [])]]
    begin, end = (next(node for node in nodes if lines[node.lineno - 1].strip().startswith(start))
                  for start in (first, last))
    top = (getattr(begin, "decorator_list", None) or [begin])[0].lineno
    return dedent("\n".join(lines[top - 1 : end.end_lineno]))


def build(steps: str = "STEPS") -> dict:
    """The notebook, not yet run, as JSON has it. steps: of the training."""
    story = (HERE / "nano_story.md").read_text(encoding="utf-8")
    cells = []
    for i, text in enumerate(re.split("```python\n(.*?)\n```", story, flags=re.DOTALL)):
        cell = {"id": f"cell-{i}", "metadata": {}, "cell_type": "markdown", "source": text.strip()}
        if i % 2:
            own = [line for line in text.splitlines() if not line.startswith("# nano.py: ")]
            if found := re.match("# nano.py: (.*)", text):
                first, _, last = found[1].partition(" ... ")
                own.append(cut(first, last or first))
            source = "\n".join(own).replace("steps = STEPS", f"steps = {steps}")
            cell |= {"cell_type": "code", "source": source, "execution_count": None, "outputs": []}
        if cell["source"]:
            cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


@command("experiments.notebook")
def main(arguments: list[str]) -> None:
    if arguments:
        raise Mistake(f"takes no arguments, not {' '.join(arguments)}")
    if not all(map(find_spec, ("nbclient", "ipykernel", "matplotlib"))):
        raise Mistake("running the notebook needs: pip install nbclient ipykernel matplotlib")
    import nbclient
    import nbformat

    notebook = nbformat.from_dict(build())
    nbclient.NotebookClient(notebook, timeout=None, record_timing=False,
                            coalesce_streams=True).execute()
    path = HERE.parent / "docs/nano.ipynb"
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"docs/nano.ipynb: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
