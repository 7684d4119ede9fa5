"""When should I take diffusion, and when GPT? python -m experiments.sudoku

Sudoku of 6 x 6, in boxes of 2 x 3: 14 clues are visible, 22 cells hidden, one solution exists.
Some hidden cells follow at once from the clues, others only from cells that must be found first.
Which ones differs from puzzle to puzzle. A model that chooses its order goes from the easy cells to
the hard ones; one that writes left to right has to know the hard ones at once.

    diffusion  trained on full grids, any part of which is hidden; it never sees a puzzle. To solve
               one is infilling: the clues are given, and `denoise` writes the rest greedily
    GPT        the same network with a causal mask, trained on puzzle + solution, 72 tokens, by the
               loss of the solution. It writes the hidden cells left to right, one a call

Both have the recipe of train.py, the same grids and as many steps, of which GPT's take twice the
time. GPT's puzzles have 14 to 22 clues. The table: the fraction of held-out puzzles solved and its
standard error, by model calls, and with 18 clues and a call for every hidden cell.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion import Model, corrupt, keyed_generator, loss
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import fraction_and_error, write
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast
from model import Transformer
from plumbing.command import command
from plumbing.machine import choose_dtype, compiled, keep_freed_memory
from sample import left_to_right_model
from train import TrainConfig, build_optimizers

CELLS = 36
CLUES = 14
EMPTY = 6  # digits are tokens 0 to 5; this is diffusion's mask token, and a word of GPT's language
START = 7  # GPT's mask token: before the first token, and where it has not written yet
ORDERS = ("margin", "entropy", "random", "spread", "left_to_right")

# The row, the column and the box of each cell, and its 12 peers, which have other digits.
UNITS = [{f"row {i // 6}", f"column {i % 6}", f"box {i // 12} {i % 6 // 3}"} for i in range(CELLS)]
PEERS = [[j for j in range(CELLS) if i != j and UNITS[i] & UNITS[j]] for i in range(CELLS)]


def solutions(board: list[int], rng: random.Random) -> Iterator[list[int]]:
    """The full grids (36,) that agree with the visible cells of `board`, in random order."""
    possible = {cell: set(range(6)) - {board[other] for other in PEERS[cell]}
                for cell in range(CELLS) if board[cell] == EMPTY}
    if not possible:
        yield board
        return
    cell = min(possible, key=lambda cell: len(possible[cell]))  # the fewest digits to try
    for digit in rng.sample(sorted(possible[cell]), len(possible[cell])):
        yield from solutions([*board[:cell], digit, *board[cell + 1 :]], rng)


def make_puzzle(rng: random.Random) -> list[int]:
    """(72,): a puzzle with 14 clues, then its only solution."""
    while True:  # nearly always once
        grid = next(solutions([EMPTY] * CELLS, rng))
        puzzle = grid.copy()
        for cell in rng.sample(range(CELLS), CELLS):
            puzzle[cell] = EMPTY
            found = solutions(puzzle, rng)
            next(found)
            if next(found, None):  # a second solution: this clue must stay
                puzzle[cell] = grid[cell]
            elif puzzle.count(EMPTY) == CELLS - CLUES:
                return puzzle + grid


def disguise(row: list[int], rng: random.Random) -> list[int]:
    """A puzzle and its solution (72,) as another one: digits get other names, and rows and columns
    other places, as far as boxes stay boxes."""
    # The solver takes milliseconds a puzzle. This makes hundreds of thousands out of a few.
    names = [*rng.sample(range(6), 6), EMPTY]
    rows = [r + i for r in rng.sample((0, 2, 4), 3) for i in rng.sample(range(2), 2)]
    columns = [c + j for c in rng.sample((0, 3), 2) for j in rng.sample(range(3), 3)]
    places = [6 * r + c for r in rows for c in columns]
    return [names[row[half + place]] for half in (0, CELLS) for place in places]


def reveal(row: list[int], clues: int, rng: random.Random) -> list[int]:
    """The same puzzle (72,) of 14 clues with more of its solution given: so many in all."""
    row = row.copy()
    hidden = [cell for cell in range(CELLS) if row[cell] == EMPTY]
    for cell in rng.sample(hidden, clues - CLUES):
        row[cell] = row[CELLS + cell]
    return row


def make_data(num_train: int, num_held_out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n,72) of puzzle and solution: to train on, with 14 to 22 clues; held out, with 14, the
    hardest; and these with 18. Held-out grids are never trained on."""
    rng = random.Random(seed)
    held_out = [make_puzzle(rng) for _ in range(num_held_out)]
    few = [make_puzzle(rng) for _ in range(min(num_train, 1000))]
    train = [reveal(disguise(rng.choice(few), rng), rng.randint(CLUES, 22), rng)
             for _ in range(num_train)]
    secret = {tuple(row[CELLS:]) for row in held_out}
    train = [row for row in train if tuple(row[CELLS:]) not in secret]
    easier = [reveal(row, 18, rng) for row in held_out]
    return torch.tensor(train), torch.tensor(held_out), torch.tensor(easier)


def learn(cfg: TrainConfig, vocab_size: int, rows: Tensor) -> Transformer:
    """The loop of train.py without its machine and files: hide, predict, learn. rows: (n,T)."""
    print(f"training {cfg.objective}: {cfg.steps} steps", file=sys.stderr)
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg.network(vocab_size))
    optimizers = build_optimizers(cfg, model, choose_dtype("auto", torch.device("cpu")))
    step_loss = compiled(loss) if cfg.compile else loss
    for step in range(cfg.steps):
        generator = keyed_generator(cfg.seed, step, "sudoku")
        x_0 = rows[torch.randint(len(rows), (cfg.batch_size,), generator=generator)]  # (B,T)
        batch = corrupt(x_0, model.config.mask_id, cfg.masking(), generator)
        with autocast():
            value = step_loss(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * cfg.rate(step)
            optimizer.step()
            optimizer.zero_grad()
    return model.requires_grad_(False)


def fill(model: Model, x: Tensor, mask_id: int = EMPTY, **options) -> Tensor:
    """(S+1,B,T): x (B,T) before and after each model call, filled greedily."""
    states = write(model, x, mask_id, temperature=0.0, **options)
    return torch.stack([state.tokens for state in states])


def fill_as_gpt(twin: Model, puzzles: Tensor) -> Tensor:
    """The same of GPT, for puzzles (B,36). It need not write the clues again: they are given."""
    x = torch.cat([puzzles, puzzles.where(puzzles != EMPTY, START)], 1)  # (B,72)
    states = fill(left_to_right_model(twin, START), x, START, order="left_to_right")
    return states[:, :, CELLS:]


def compare(model: Model, twin: Model, puzzles: Tensor, easier: Tensor,
            truth: Tensor) -> dict[str, dict]:
    """Who solves what in how many calls, printed: {who: {column: (fraction, error)}}; (B,36)."""
    columns = {f"{calls} calls": (puzzles, calls) for calls in (22, 8, 4, 1)}
    columns["18 clues"] = (easier, 18)  # which leave 18 hidden cells
    print(f"{'solved':16}" + "".join(f"{name:>16}" for name in columns))
    table = {}
    for who in (*ORDERS, "GPT"):
        row = {}
        for name, (boards, calls) in columns.items():
            if who == "GPT" and calls < 18:  # it needs a call for each hidden cell
                continue
            states = (fill_as_gpt(twin, boards) if who == "GPT"
                      else fill(model, boards, order=who, steps=calls))
            row[name] = fraction_and_error((states[-1] == truth).all(1))
        cells = ("{:.1%} +- {:.1%}".format(*row[name]) if name in row else "-" for name in columns)
        print(f"{who:16}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
        table[who] = row
    return table


def paint(panels, boards: dict[str, Tensor], truth: Tensor) -> None:
    """A puzzle at five moments of its solution by each: boards (S+1,36), truth (36,)."""
    from matplotlib import colormaps

    for line, (who, states) in zip(panels, boards.items(), strict=True):
        calls = len(states) - 1
        written = (states >= EMPTY).sum(0).float()  # (36,), by which call; 0: a clue
        for i, axes in enumerate(line):
            board = states[round(i * calls / 4)]
            colors = written.masked_fill((written == 0) | (board >= EMPTY), torch.nan)
            colors[(board < EMPTY) & (board != truth)] = CELLS
            axes.imshow(colors.view(6, 6).numpy(), vmin=-calls, vmax=calls,
                        cmap=colormaps["viridis"].with_extremes(over="tab:red"))
            for cell, digit in enumerate(board.tolist()):
                axes.text(cell % 6, cell // 6, digit + 1 if digit < EMPTY else "", ha="center",
                          va="center", fontsize=13)
            for edge in range(7):
                axes.axhline(edge - 0.5, color="black", linewidth=0.5 if edge % 2 else 2)
                axes.axvline(edge - 0.5, color="black", linewidth=0.5 if edge % 3 else 2)
            axes.set_title(f"{who}, call {round(i * calls / 4)}", fontsize=10)
            axes.axis("off")
    axes.figure.suptitle("White: clues. Green to yellow: written early to late. Red: wrong.")


@command("experiments.sudoku")
def main(arguments: list[str]) -> None:
    parser = flags("sudoku", __doc__, checkpoint=False, data_dir=False)
    add = parser.add_argument
    add("--steps", type=count, default=1000, help="of training (default: 1000)")
    add("--train-boards", type=several, default=200_000, help="(default: 200000)")
    add("--boards", type=several, default=256, help="held-out puzzles (default: 256)")
    add("--seed", type=int, default=1, help="(default: 1)")
    add("--no-compile", action="store_true", help="do not compile the training step")
    args = parser.parse_args(arguments)
    keep_freed_memory()  # makes a CPU faster
    train, held_out, easier = make_data(args.train_boards, args.boards, args.seed)
    puzzles, truth = held_out.split(CELLS, 1)  # (boards,36) each
    cfg = TrainConfig(n_layer=4, n_head=4, n_embd=128, context_length=CELLS, steps=args.steps,
                      batch_size=128, seed=args.seed, compile=not args.no_compile)
    model = learn(cfg, EMPTY, train[:, CELLS:])
    twin = learn(replace(cfg, objective="autoregressive", context_length=2 * CELLS,
                         prefix_length=CELLS), START, train)
    table = compare(model, twin, puzzles, easier[:, :CELLS], truth)
    ours = fill(model, puzzles, order="margin")
    gpts = fill_as_gpt(twin, puzzles)
    right, also_right = ((states[-1] == truth).all(1) for states in (ours, gpts))
    b = int((right & ~also_right).int().argmax())  # diffusion solves it, GPT doesn't, if there is
    boards = {"diffusion": ours[:, b], "GPT": gpts[:, b]}
    draw(args.picture, lambda panels: paint(panels, boards, truth[b]), columns=5, rows=2, width=2.1,
         height=2.3)
    report(table)


if __name__ == "__main__":
    sys.exit(main())
