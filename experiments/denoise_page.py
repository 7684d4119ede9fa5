"""Watch a text being written: python -m experiments.denoise_page STEPS.jsonl PAGE.html|PICTURE.svg

    python sample.py --prefix "The state of the Union" --steps 40 --jsonl steps.jsonl

writes the steps. The page holds everything it needs: no network, no library. A slider and a play
button move through the steps; a token's colour is the step at which it was written (dark early,
light late), a ring marks what was written in the step on show, and hovering tells the probability.
The picture is of the first text alone, and moves by itself, also where scripts are forbidden.
"""

import json
import sys
from html import escape
from pathlib import Path

from plumbing.command import Mistake, command
from plumbing.config import Parser

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Denoising, step by step</title>
<style>
  body { font: 16px/1.7 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em }
  header { position: sticky; top: 0; background: #fff; padding: .5em 0; display: flex; gap: 1em }
  #step { flex: 1 }
  p { white-space: pre-wrap; overflow-wrap: anywhere }
  .hidden { color: #bbb }
  .again { color: #c22 }
  .new { box-shadow: 0 0 0 2px #222 }
</style>
<header>
  <button id="play">Play</button>
  <input id="step" type="range" min="0" value="0" aria-label="step">
  <output id="label"></output>
</header>
<main></main>
<script type="application/json" id="frames">FRAMES</script>
<script>
  const frames = JSON.parse(document.getElementById("frames").textContent)
  const slider = document.getElementById("step")
  const play = document.getElementById("play")
  const last = frames.length - 1
  slider.max = last

  // One position: its text, the step `since` which it has been so, and the probability. Text is set
  // as text, never as markup: a model may write anything.
  function position(text, since, probability, step) {
    const span = document.createElement("span")
    const late = since / last
    const changed = since === step && step > 0
    span.textContent = text ?? "\\u2591"
    span.className = text === null ? (changed ? "again" : "hidden") : (changed ? "new" : "")
    span.title = text === null ? "hidden" : since === 0 ? "given"
      : `probability ${probability.toFixed(3)}, written in step ${since}`
    if (text !== null && since > 0)
      span.style.background = `hsl(${210 - 170 * late} 80% ${62 + 26 * late}%)`
    return span
  }

  function show(step) {
    const {texts, since, probability} = frames[step]
    document.querySelector("main").replaceChildren(...texts.map((row, r) => {
      const p = document.createElement("p")
      p.append(...row.map((text, i) => position(text, since[r][i], probability[r][i], step)))
      return p
    }))
    const hidden = texts.flat().filter(text => text === null).length
    document.getElementById("label").textContent = `step ${step} of ${last}: ${hidden} hidden`
  }

  let timer = null
  function stop() { clearInterval(timer); timer = null; play.textContent = "Play" }
  slider.oninput = () => { stop(); show(+slider.value) }
  play.onclick = () => {
    if (timer) return stop()
    if (+slider.value === last) slider.value = 0
    play.textContent = "Pause"
    timer = setInterval(() => {
      show(+(slider.value = +slider.value + 1))
      if (+slider.value === last) stop()
    }, Math.max(30, 6000 / (last + 1)))  // all of it in about six seconds
  }
  show(0)
</script>
</html>
"""


def page(steps: list[dict]) -> str:
    """The page for the lines of `sample.py --jsonl`: {"step", "tokens", "texts", "probability"}.

    What the page needs besides is `since`: the step in which each position became what it is.
    """
    frames = []
    before = steps[0]["tokens"]
    since = [[0] * len(row) for row in before]
    for number, step in enumerate(steps):
        since = [[number if new != old else s for new, old, s in zip(*rows, strict=True)]
                 for rows in zip(step["tokens"], before, since, strict=True)]
        before = step["tokens"]
        probability = [[round(p, 4) for p in row] for row in step["probability"]]
        frames.append({"texts": step["texts"], "since": since, "probability": probability})
    # In JSON "<" stands only inside strings, where \\u003c means the same and can't end the script.
    text = json.dumps(frames, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.replace("FRAMES", text)


WIDTH = 88  # characters of a line of the picture
SECONDS_PER_STEP = 0.45
SECONDS_OF_REST = 4  # in which the finished text can be read

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">
<style>
text {{ font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #1f2328 }}
rect {{ fill: #d0d7de }}
g * {{ animation-duration: {seconds}s; animation-iteration-count: infinite;
       animation-timing-function: step-end }}
{rules}
</style>
<rect width="100%" height="100%" style="fill: #ffffff"/>
<g>
{tokens}
</g>
</svg>
"""


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
        if column and column + len(text) > WIDTH:
            line += 1
            column = 0
        if column == 0:
            text = text.lstrip(" ")
        found.append((column, line, text))
        column += len(text)
    return found


def picture(steps: list[dict]) -> str:
    """An SVG of the first text, in which each token appears in its step, first in red."""
    last = len(steps) - 1
    seconds = last * SECONDS_PER_STEP + SECONDS_OF_REST
    final = steps[-1]["texts"][0]
    rules = []
    for step in range(1, last + 1):
        now = 100 * step * SECONDS_PER_STEP / seconds
        then = now + 100 * SECONDS_PER_STEP / seconds
        rules.append(f".t{step} {{ animation-name: t{step} }} "
                     f".b{step} {{ animation-name: b{step} }}"
                     f" @keyframes b{step} {{ {now:.2f}% {{ fill: transparent }} }}"
                     f" @keyframes t{step} {{ 0% {{ fill: transparent }}"
                     f" {now:.2f}% {{ fill: #cf222e }} {then:.2f}% {{ fill: #1f2328 }} }}")
    tokens = []
    line = 0
    for i, (column, line, text) in enumerate(lay_out([text or "" for text in final])):
        # The step from which on the token is there for good. Earlier texts may have ended earlier.
        before = [(step["texts"][0] + [None] * i)[i] for step in steps[:-1]]
        step = max((n + 1 for n in range(last) if before[n] is None), default=0)
        x = 12 + 7.83 * column
        y = 24 + 20 * line
        if step and text.strip():
            width = 7.83 * len(text.strip()) - 2
            left = x + 7.83 * (len(text) - len(text.lstrip()))
            tokens.append(f'<rect class="b{step}" x="{left:.1f}" y="{y - 11}" width="{width:.1f}" '
                          'height="14" rx="3"/>')
        width = 7.83 * max(1, len(text))
        tokens.append(f'<text class="t{step}" x="{x:.1f}" y="{y}" textLength="{width:.1f}">'
                      f'{escape(text)}</text>')
    return PICTURE.format(w=round(24 + 7.83 * WIDTH), h=40 + 20 * line, seconds=seconds,
                          rules="\n".join(rules), tokens="\n".join(tokens))


@command("experiments.denoise_page")
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.denoise_page", description=__doc__.split("\n")[0])
    parser.add_argument("steps", metavar="STEPS.jsonl", help="what sample.py --jsonl wrote")
    parser.add_argument("page", metavar="PAGE.html", type=Path, help="what to write; or an .svg")
    args = parser.parse_args(arguments)
    try:
        with open(args.steps, encoding="utf-8") as lines:
            steps = [json.loads(line) for line in lines]
        text = (picture if args.page.suffix == ".svg" else page)(steps)
        args.page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Mistake(str(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mistake(f"{args.steps} is not what sample.py --jsonl writes ({error})") from None
    print(f"{args.page}: {len(text) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
