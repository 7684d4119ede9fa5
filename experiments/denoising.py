"""Watch a text being written: python -m experiments.denoising STEPS.jsonl PICTURE.svg

    python sample.py --prefix "The state of the Union" --jsonl steps.jsonl

writes the steps. The picture shows the first text and moves in any browser: a grey box is a hidden
token, a red word has just been written. Hover over a word for the step, and its probability then.
"""

import json
import sys
from html import escape
from pathlib import Path

from plumbing.command import Mistake, command
from plumbing.config import Parser

COLUMNS = 88  # characters of a line
PITCH = 7.83  # the width of a character, in pixels
SECONDS_PER_STEP = 0.45
SECONDS_OF_REST = 4  # in which the finished text can be read

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">
<style>text {{ font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre }}
rect {{ rx: 3px }}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<g fill="#1f2328">{given}</g>{steps}
</svg>
"""
STEP = """
<g fill="#d0d7de" visibility="hidden"><animate attributeName="visibility" values="visible;hidden"
 keyTimes="0;{now:.4f}" {pace}/>{boxes}</g>
<g fill="#1f2328"><animate attributeName="visibility" values="hidden;visible"
 keyTimes="0;{now:.4f}" {pace}/><animate attributeName="fill" values="#cf222e;#1f2328"
 keyTimes="0;{then:.4f}" {pace}/>{words}</g>"""
PACE = 'calcMode="discrete" dur="{seconds}s" repeatCount="indefinite"'


def lay_out(texts: list[str]) -> list[tuple[int, int, str]]:
    """(column, line, characters) of each token, broken into lines as a typewriter would."""
    found = []
    column = line = 0
    for text in texts:
        if "\n" in text:  # in our vocabularies, nothing stands before it in the same token
            line += 1 if column else 0
            column = 0
        text = text.split("\n")[-1].replace("\t", " ")
        text = "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)  # XML wants it
        if column and column + len(text) > COLUMNS:
            line += 1
            column = 0
        if column == 0:
            text = text.lstrip(" ")
        found.append((column, line, text))
        column += len(text)
    return found


def picture(steps: list[dict]) -> str:
    """The SVG of the lines of `sample.py --jsonl`: {"step", "tokens", "texts", "probability"}."""
    boxes = [""] * len(steps)  # by the step that wrote their token for good
    words = [""] * len(steps)  # [0]: given
    tokens = lay_out([text or "" for text in steps[-1]["texts"][0]])
    for i, (column, line, text) in enumerate(tokens):
        # Before which steps it was hidden; or there was no such token, if that text ended earlier.
        hidden = [n for n, earlier in enumerate(steps[:-1])
                  if (earlier["texts"][0] + [None] * i)[i] is None]
        step = hidden[-1] + 1 if hidden else 0
        p = steps[-1]["probability"][0][i]
        title = f"step {step}, probability {p:.3f}" if step else "given"
        if word := text.lstrip():
            x = 12 + PITCH * (column + len(text) - len(word))
            y = 24 + 20 * line
            width = PITCH * len(word)
            boxes[step] += f'\n<rect x="{x:.1f}" y="{y - 11}" width="{width - 2:.1f}" height="14"/>'
            words[step] += (f'\n<text x="{x:.1f}" y="{y}" textLength="{width:.1f}">'
                            f"<title>{title}</title>{escape(word)}</text>")
    seconds = SECONDS_PER_STEP * (len(steps) - 1) + SECONDS_OF_REST
    share = SECONDS_PER_STEP / seconds  # of the time, a step's
    groups = [STEP.format(now=n * share, then=(n + 1) * share, pace=PACE.format(seconds=seconds),
                          boxes=boxes[n], words=words[n]) for n in range(1, len(steps))]
    height = 40 + 20 * (tokens[-1][1] if tokens else 0)
    return PICTURE.format(w=round(24 + PITCH * COLUMNS), h=height, given=words[0],
                          steps="".join(groups))


@command("experiments.denoising", OSError)  # of a file that isn't there
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.denoising", description=__doc__.split("\n")[0])
    parser.add_argument("steps", metavar="STEPS.jsonl", help="what sample.py --jsonl wrote")
    parser.add_argument("picture", metavar="PICTURE.svg", type=Path, help="what to write")
    args = parser.parse_args(arguments)
    try:
        with open(args.steps, encoding="utf-8") as lines:
            text = picture([json.loads(line) for line in lines])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise Mistake(f"{args.steps} is not what sample.py --jsonl writes ({error})") from None
    args.picture.write_text(text, encoding="utf-8")
    print(f"{args.picture}: {len(text) / 1000:.0f} KB; open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
