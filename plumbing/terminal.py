"""What one sees: progress of long work, evaluations, and text while it is denoised."""

import json
import os
import re
import sys
import time

import tiktoken

from plumbing.text import token_texts


def open_screen() -> None:
    """Nothing that is printed later may fail for where it goes: closed by >&-, or not in UTF-8."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's hasn't
        sys.stdout.reconfigure(errors="replace")  # "?" for what its encoding lacks


def put(text: str, end: str = "\n", screen: str = "stdout") -> None:
    """Print now. If the reader or the terminal is gone, the work goes on without a screen."""
    try:
        print(text, end=end, file=getattr(sys, screen), flush=True)
    except OSError:
        setattr(sys, screen, open(os.devnull, "w"))


class Progress:
    """One line on stderr, rewritten in place: amount, speed, time left. Needs a terminal."""

    def __init__(self, label: str, total: float = 0, unit: str = "MB"):
        self.label = label
        self.total = total  # bytes, or whatever is counted; 0 if nobody knows
        self.unit = unit
        self.scale = 1e6 if unit == "MB" else 1
        self.done = 0
        self.start = time.monotonic()
        self.shown = self.start

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.shown < 0.2 and self.done != self.total):
            return
        self.shown = now
        speed = max(1, self.done) / max(1e-9, now - self.start)
        left = f", {max(0, self.total - self.done) / speed:.0f} s left" if self.total else ""
        line = (f"{self.label}: {self.done / self.scale:.0f} {self.unit} at "
                f"{speed / self.scale:.1f} {self.unit}/s{left}")
        put(f"\r{line}\033[K", end="\r", screen="stderr")


def show(text: str, stays: bool = False) -> None:
    """A line of progress, rewritten in place on a terminal; with `stays`, one that is kept."""
    start, end = ("\r\033[K", "\n" if stays else "") if sys.stdout.isatty() else ("", "\n")
    put(start + text, end)


def describe(bound, bits_per_byte: float) -> str:
    """A diffusion.Bound in two lines: the number, and the curve whose mean height it is."""
    name = "NELBO <=" if bound.curve else "NLL"
    text = (f"{name} {bound.nats:.4f} +- {bound.stderr:.4f} nats/token, "
            f"{bits_per_byte:.4f} bits/byte")
    if bound.curve:
        N, counts, nats, _ = bound.curve
        indices = range(len(counts))
        tenths = {min(indices, key=lambda i: abs(counts[i] - N * k / 10)) for k in range(1, 11)}
        levels = (f"  {counts[i] / N:.0%} {nats[i]:.2f}" for i in sorted(tenths))
        text += "\n  loss by mask ratio:" + "".join(levels)
    return text


# --- Text while it is denoised --------------------------------------------------------------------

HIDDEN = "\N{LIGHT SHADE}"
REMASKED = "\N{DARK SHADE}"
# Control characters but newline, tab and CR LF; and those that turn the direction of writing.
DRIVING = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


def harmless(text: str) -> str:
    """What to print: on a terminal, what could drive it is spelled out; files get the text."""
    if not sys.stdout.isatty():
        return text
    return DRIVING.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def draw_position(text: str | None, before: int, now: int, probability: float, color: bool) -> str:
    """One position. In colour: black on green if just committed, red if remasked, plain if given;
    otherwise grey, brighter the more confident the network was."""
    if text is None:
        style, text = ("2", HIDDEN) if before == now else ("31", REMASKED)
    elif before != now:
        style = "30;42"
    else:
        style = f"38;5;{240 + int(15 * probability)}" if probability < 1 else "0"
    text = harmless(text)
    return f"\033[{style}m{text}\033[0m" if color else text


class DenoisingView:
    """States of `denoise`, as text on the screen (`show_steps`) and as lines of a file (`jsonl`).

    On a terminal a frame replaces the one before; elsewhere frames are groups of lines.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, mask_id: int, whole: bool, show_steps: bool,
                 jsonl: str | None):
        self.texts_of = lambda ids: token_texts(ids, tokenizer, mask_id, whole)
        self.mask_id = mask_id
        self.show_steps = show_steps
        self.file = open(jsonl, "w", encoding="utf-8") if jsonl else None
        self.step = 0
        self.before: list[list[int]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()

    def show(self, state) -> None:
        """The next state of `denoise`."""
        if not (self.show_steps or self.file):
            return  # no copies from the device that nobody reads
        tokens = state.tokens.tolist()
        probability = state.probability.tolist()
        texts = [self.texts_of(ids) for ids in tokens]
        if self.file:
            line = {"step": self.step, "tokens": tokens, "probability": probability, "texts": texts}
            print(json.dumps(line), file=self.file)
        if self.show_steps:
            terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
            color = terminal and not os.environ.get("NO_COLOR")
            hidden = sum(row.count(self.mask_id) for row in tokens)
            clear = "\033[H\033[J" if terminal else ""
            print(f"{clear}--- step {self.step}: {hidden} tokens hidden")
            for row in zip(texts, self.before or tokens, tokens, probability, strict=True):
                print("".join(draw_position(*one, color) for one in zip(*row, strict=False)))
        self.before = tokens
        self.step += 1
