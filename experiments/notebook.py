"""nano.py with pictures: python -m experiments.notebook makes docs/nano.ipynb, and runs it

Never edit the notebook: its code is cut out of nano.py; talk and drawings are STORY, whose cells
begin with # or %%. `%% FIRST ... LAST`: own lines, then nano.py's from one statement to another.
"""

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

from plumbing.command import Mistake, command

ROOT = Path(__file__).parent.parent
STORY = r"""
# Text diffusion on one page, with pictures
GPT writes from left to right. A diffusion model starts from a page on which every letter is hidden
and uncovers them in any order, several at a time. One exercise teaches it that: **hide some letters
of a real text, guess them from the others.** With few hidden it learns to spell; with half of them,
grammar; with all, what texts look like at all. The code is [nano.py](../experiments/nano.py)'s.
%% import math ... MASK =
## The text
Nothing to download: Python's own library is here already, megabytes of people explaining things to
a computer (a letter is a byte; of blanks in a row I keep one). To use your own, a megabyte or more:
`text = bytearray(open("novel.txt", "rb").read())`. The last tenth is kept for the exam.
%% torch.manual_seed ... train, held_out
import os, pathlib, re
files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
text = bytearray(re.sub(b" +", b" ", b"".join(file.read_bytes() for file in files))[:3_000_000])
## Hide
Draw a number m, hide any m letters: that is all the noise there is. Here is one text with m = 0,
10, 48 and all 96. How far down can *you* read it?
%% def show
%%
from matplotlib import pyplot as plt
def page(lines, colours, ylabel):
    figure, axes = plt.subplots(figsize=(13, len(lines) / 4), dpi=75)
    axes.set(facecolor="silver", xticks=[], ylabel=ylabel)
    axes.imshow(colours, aspect="auto", cmap="turbo", alpha=0.45, vmin=0, vmax=16)
    for y, line in enumerate(lines):
        for x, letter in enumerate(line.replace("░", " ")):
            axes.text(x, y, letter, ha="center", va="center", family="monospace", size=10)
m = torch.tensor([0, 10, 48, T])
hidden = torch.rand(4, T).argsort(1) < m[:, None]
x = train[:T].long().masked_fill(hidden, MASK)
page([show(row) for row in x], torch.where(hidden, math.nan, 8), "m")
plt.yticks(range(4), m.tolist());
## The network
You know the parts: embeddings, attention, MLPs. **The one difference to GPT: no causal mask.** GPT
must not see the next letter, that being the question. Here questions are hidden in the *input*, so
all may look at all. The mask has a row in the table but no output: it is read, never written.
%% def norm ... class Denoiser
## Guess: the loss
Hide, guess, and pay the cross-entropy of what was hidden. Letters in plain sight are free.
%% def guess
## Train
A minute on two idle cores; mine were not idle. The loss is rough because m is luck.
%% model = ... for step
steps = STEPS
%%
mean = torch.tensor(bits).unfold(0, min(50, steps), 1).mean(1)
plt.figure(figsize=(9, 3), dpi=75)
plt.plot(bits, color="lightgrey")
plt.plot(range(steps - len(mean), steps), mean)
plt.gca().set(xlabel="step", ylabel="bits per hidden letter", ylim=(0, 8.2));
## What a letter costs
CE(m) is the loss with m letters hidden. Write a text letter by letter, in an order drawn by lot:
the first costs CE(96), the next CE(95), the last CE(1). So a letter costs the *mean height of this
curve*. It bounds -log p from above: all orders lead to the text, and I count just one. That is all
there is to the NELBO. `bound` measures it without the curve, with one m for each row; the curve
below is that of fewer rows, so its mean is a little off.
%% def bound
%% rows = ... print(f"its
%%
few = rows[torch.randperm(len(rows))[:128]]
ce = []
for m in range(1, T + 1):
    x = few.repeat(1 + 16 // m, 1)  # one hidden letter says little: ask again, with another
    with torch.no_grad():
        ce.append(guess(model, x, torch.full((len(x),), m)).mean())
ce = torch.stack(ce) / math.log(2)  # (T,) bits; of m letters: ce[m - 1]
plt.figure(figsize=(9, 3.2), dpi=75)
plt.stairs(ce, range(T + 1), fill=True, alpha=0.4)
plt.axhline(ce.mean(), color="black", linestyle="--", label=f"mean height: {ce.mean():.2f} bits")
plt.xlim(T, 0)
plt.xlabel("m, letters still hidden: writing goes this way →")
plt.ylabel("CE(m), bits")
plt.legend();
## What few steps cost
**The picture of this repository.** Letters of the same step do not see each other: they all pay the
height of the curve at the *start* of their step. So the price of S steps (random positions,
temperature 1) is the area under a staircase, and the red gap above the curve is what haste costs.
One letter a step, and the gap is gone. I know all this without having written a single text.
%%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True, layout="constrained", dpi=75)
for axes, S in zip(panels, (4, 8, 16)):
    paid = ce[T // S - 1 :: T // S].repeat_interleave(T // S)  # (T,) each letter its step's start
    axes.stairs(ce, range(T + 1), fill=True, alpha=0.4)
    axes.stairs(paid, range(T + 1), baseline=ce.numpy(), fill=True, color="red", alpha=0.5)
    haste = paid.mean() - ce.mean()
    axes.set(title=f"{S} steps: {paid.mean():.2f} bits, {haste:.2f} of it haste", xlim=(T, 0))
figure.supxlabel("m, letters still hidden →", size=10)
panels[0].set_ylabel("bits per letter");
## Write
From grey boxes to letters in 16 steps; the colour says in which step a letter came. Underneath, the
same with a step for each letter. It will not pass a code review, but it had only a minute.
%% def write
%%
lines = list(write(model, steps=16))
came = [next(i for i, line in enumerate(lines) if line[t : t + 1] != "░") for t in range(T)]
page(lines, [[c if c <= i else math.nan for c in came] for i in range(len(lines))], "step")
plt.show()
print("\n----\n".join(list(write(model, steps=T))[-1].replace("↵", "\n") for _ in range(3)))
## Try this
1. What do 2 steps cost, what does 1? Then let steps be unequal: which 8 step sizes are cheapest?
2. Give `F.scaled_dot_product_attention` its `is_causal=True` back, drop `self.right`, train again:
   which end of the curve suffers, and why?
3. Fill a hole: let `write` start from your own sentence and uncover only its hidden letters.
"""


def cut(first: str, last: str) -> str:
    """nano.py, or its main(), from the statement that begins with `first` to that with `last`."""
    source = (ROOT / "experiments/nano.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    nodes = [node for parent in ast.parse(source).body if not isinstance(parent, ast.If)
             for node in [parent, *getattr(parent, "body", [])]]
    begin, end = (next(node for node in nodes if lines[node.lineno - 1].strip().startswith(start))
                  for start in (first, last))
    top = (getattr(begin, "decorator_list", None) or [begin])[0].lineno
    return dedent("\n".join(lines[top - 1 : end.end_lineno]))


def build(steps: str = "STEPS") -> dict:
    """The notebook, not yet run, as JSON has it. steps: of the training."""
    cells = []
    for text in re.split(r"\n(?=#|%%)", STORY.strip().replace("steps = STEPS", f"steps = {steps}")):
        cell = {"id": f"cell-{len(cells)}", "metadata": {}, "cell_type": "markdown", "source": text}
        if text.startswith("%%"):
            head, _, own = text.partition("\n")
            first, _, last = head.removeprefix("%%").strip().partition(" ... ")
            parts = [own, cut(first, last or first)] if first else [own]
            cell |= {"cell_type": "code", "source": "\n".join(filter(None, parts)),
                     "execution_count": None, "outputs": []}
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
    path = ROOT / "docs/nano.ipynb"
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
