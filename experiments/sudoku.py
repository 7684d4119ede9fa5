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
time. GPT's puzzles have 14 to 22 clues. The tables: the fraction of held-out puzzles solved, and
its standard error, by model calls, and by the number of clues with a call for every hidden cell.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from diffusion import corrupt, keyed_generator, loss
from experiments.lab.command import at_least, count, flags, report, several
from experiments.lab.judge import fraction_and_error
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast
from model import Transformer
from plumbing.command import command
from plumbing.machine import choose_dtype, compiled, keep_freed_memory
from sample import denoise, left_to_right_model
from train import TrainConfig, build_optimizers

CELLS = 36
HOLES = 22
EMPTY = 6  # digits are tokens 0 to 5; this is diffusion's mask token, and a word of GPT's language
START = 7  # GPT's mask token: before the first token, and where it has not written yet
ORDERS = ("margin", "entropy", "confidence", "random", "spread", "left_to_right")

# The three units of each cell, out of 18: its row, its column and its box.
UNITS_OF = [(r, 6 + c, 12 + r // 2 * 2 + c // 3) for r in range(6) for c in range(6)]
UNITS = torch.tensor([[cell for cell in range(CELLS) if unit in UNITS_OF[cell]]
                      for unit in range(18)])  # (18,6): the cells of each unit

# --- Puzzles --------------------------------------------------------------------------------------


def solutions(board: list[int], rng: random.Random) -> Iterator[list[int]]:
    """The full grids that agree with the visible cells of `board`, in random order."""
    used = [0] * len(UNITS)  # a bit for each digit that a unit has; EMPTY's bit does no harm
    for digit, units in zip(board, UNITS_OF, strict=True):
        for unit in units:
            used[unit] |= 1 << digit
    taken = {cell: used[row] | used[column] | used[box]
             for cell, (row, column, box) in enumerate(UNITS_OF) if board[cell] == EMPTY}
    if not taken:
        yield board
        return
    cell = max(taken, key=lambda cell: taken[cell].bit_count())  # the fewest digits to try
    for digit in rng.sample(range(6), 6):
        if not taken[cell] >> digit & 1:
            yield from solutions([*board[:cell], digit, *board[cell + 1 :]], rng)


def make_puzzle(rng: random.Random) -> list[int]:
    """(72,): a puzzle with HOLES hidden cells, then its only solution."""
    while True:  # nearly always once
        grid = next(solutions([EMPTY] * CELLS, rng))
        puzzle = grid.copy()
        for cell in rng.sample(range(CELLS), CELLS):
            puzzle[cell] = EMPTY
            found = solutions(puzzle, rng)
            next(found)
            if next(found, None):  # a second solution: this clue must stay
                puzzle[cell] = grid[cell]
            elif puzzle.count(EMPTY) == HOLES:
                return puzzle + grid


def reorder(n: int, groups: int, size: int, generator: Generator) -> Tensor:
    """(n,6): six lines in new orders, in which groups of `size` neighbours stay together."""
    group = torch.rand(n, groups, generator=generator).argsort(1).repeat_interleave(size, 1)
    return (group + torch.rand(n, 6, generator=generator)).argsort(1)


def disguise(rows: Tensor, generator: Generator) -> Tensor:
    """Each row (n,72) as a new puzzle that has one solution as well: digits get other names, and
    rows and columns other places, as far as boxes stay boxes."""
    # The solver takes milliseconds a puzzle. This makes hundreds of thousands out of a few.
    n = len(rows)
    names = torch.rand(n, 6, generator=generator).argsort(1)
    names = torch.cat([names, torch.full((n, 1), EMPTY)], 1)  # (n,7)
    boards = names.gather(1, rows).view(n, 2, 6, 6)  # puzzle and solution
    places = reorder(n, 3, 2, generator)[:, None, :, None].expand_as(boards)
    boards = boards.gather(2, places)
    places = reorder(n, 2, 3, generator)[:, None, None, :].expand_as(boards)
    return boards.gather(3, places).flatten(1)


def reveal(puzzles: Tensor, grids: Tensor, clues: int | Tensor, generator: Generator) -> Tensor:
    """Puzzles (B,36) with more of their solution given: `clues`, or (B,1) numbers, in all."""
    score = torch.rand(puzzles.shape, generator=generator).masked_fill(puzzles != EMPTY, -1)
    return grids.where(score.argsort(1).argsort(1) < clues, EMPTY)  # given ones come first


def make_data(num_train: int, num_held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (n,72) of puzzle and solution, to train on and held out, with no grid in common.

    Those to train on have 14 to 22 clues, held-out ones 14, the hardest.
    """
    rng = random.Random(seed)
    held_out = torch.tensor([make_puzzle(rng) for _ in range(num_held_out)])
    few = torch.tensor([make_puzzle(rng) for _ in range(min(num_train, 1000))])
    generator = keyed_generator(seed, 0, "disguise")
    train = disguise(few[torch.randint(len(few), (num_train,), generator=generator)], generator)
    clues = torch.randint(CELLS - HOLES, 23, (len(train), 1), generator=generator)
    puzzles, grids = train.split(CELLS, 1)
    train = torch.cat([reveal(puzzles, grids, clues, generator), grids], 1)
    secret = set(map(tuple, held_out[:, CELLS:].tolist()))
    new = [tuple(grid) not in secret for grid in train[:, CELLS:].tolist()]
    return train[torch.tensor(new)], held_out


def solved(grids: Tensor, puzzles: Tensor) -> Tensor:
    """(B,) bool: clues are kept, and all units have all digits. grids, puzzles: (B,36)."""
    kept = ((grids == puzzles) | (puzzles == EMPTY)).all(1)
    digits = grids[:, UNITS].sort(-1).values  # (B,18,6)
    return kept & (digits == torch.arange(6)).flatten(1).all(1)


# --- Learning and writing -------------------------------------------------------------------------


def learn(cfg: TrainConfig, vocab_size: int, rows: Tensor) -> Transformer:
    """The loop of train.py without its machine and files: hide, predict, learn. rows: (n,T)."""
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
        if (step + 1) % 100 == 0:
            print(f"{cfg.objective}: step {step + 1} of {cfg.steps}, loss {value.item():.3f}",
                  file=sys.stderr)
    return model.requires_grad_(False)


def write(model: nn.Module, x: Tensor, mask_id: int = EMPTY, **options) -> Tensor:
    """(S+1,B,T): x (B,T) before and after each model call, written greedily."""
    with autocast():
        generator = keyed_generator(1, 0, "write")
        states = denoise(model, x, mask_id, generator, temperature=0.0, **options)
        return torch.stack([state.tokens for state in states])


def write_as_gpt(twin: nn.Module, puzzles: Tensor) -> Tensor:
    """The same of GPT, for puzzles (B,36). It need not write the clues again: they are given."""
    x = torch.cat([puzzles, puzzles.where(puzzles != EMPTY, START)], 1)  # (B,72)
    states = write(left_to_right_model(twin, START), x, START, order="left_to_right")
    return states[:, :, CELLS:]


# --- The numbers ----------------------------------------------------------------------------------


def compare(model: nn.Module, twin: nn.Module, puzzles: Tensor, calls: list[int]) -> list[dict]:
    """Who solves what in how many calls, printed; the last row is GPT's."""
    rows = []

    def judge(who: str, states: Tensor) -> str:
        share, error = fraction_and_error(solved(states[-1], puzzles))
        rows.append({"who": who, "calls": len(states) - 1, "solved": share, "stderr": error})
        return f"{share:8.1%} +- {error:.1%}"

    print(f"{'solved, by model calls':24}" + "  ".join(f"{number:8}        " for number in calls))
    for order in ORDERS:
        cells = [judge(order, write(model, puzzles, order=order, steps=n)) for n in calls]
        print(f"diffusion, {order:13}" + "  ".join(cells), flush=True)
    print(f"{'GPT':24}{judge('GPT', write_as_gpt(twin, puzzles))}, in {rows[-1]['calls']} calls")
    return rows


def compare_clues(model: nn.Module, twin: nn.Module, puzzles: Tensor, truth: Tensor,
                  numbers: list[int]) -> list[dict]:
    """The same for easier puzzles, printed: some more cells of the solution are given."""
    print(f"\n{'solved, by clues':24}" + "  ".join(f"{clues:8}        " for clues in numbers))
    easier = [reveal(puzzles, truth, clues, keyed_generator(1, 0, "clues")) for clues in numbers]
    rows = []
    for who in ("margin", "random", "GPT"):
        cells = []
        for clues, boards in zip(numbers, easier, strict=True):
            states = write_as_gpt(twin, boards) if who == "GPT" else write(model, boards, order=who)
            share, error = fraction_and_error(solved(states[-1], boards))
            rows.append({"who": who, "clues": clues, "solved": share, "stderr": error})
            cells.append(f"{share:8.1%} +- {error:.1%}")
        print(f"{who if who == 'GPT' else 'diffusion, ' + who:24}" + "  ".join(cells), flush=True)
    return rows


# --- The picture ----------------------------------------------------------------------------------


def paint_board(axes, board: list[int], colors: list, truth: list[int]) -> None:
    """Digits on the colours of their cells, wrong ones on red; hidden cells grey."""
    for cell, digit in enumerate(board):
        y, x = divmod(cell, 6)
        wrong = digit not in (truth[cell], EMPTY, START)
        color = "0.85" if digit >= EMPTY else "tab:red" if wrong else colors[cell]
        axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=color)
        if digit < EMPTY:
            axes.text(x + 0.5, y + 0.53, str(digit + 1), ha="center", va="center", fontsize=13,
                      color="white" if wrong else "black")
    for i in range(7):
        axes.plot([0, 6], [i, i], color="black", linewidth=0.5 if i % 2 else 2)
        axes.plot([i, i], [0, 6], color="black", linewidth=0.5 if i % 3 else 2)
    axes.set(ylim=(6.1, -0.1), aspect="equal")
    axes.axis("off")


def paint(panels, ours: Tensor, gpts: Tensor, puzzles: Tensor, truth: Tensor) -> None:
    """A puzzle at five moments of both; one that diffusion solves and GPT doesn't, if there is."""
    from matplotlib import colormaps

    telling = solved(ours[-1], puzzles) & ~solved(gpts[-1], puzzles)
    b = int(telling.int().argmax())
    for line, who, states in zip(panels, ("diffusion", "GPT"), (ours, gpts), strict=True):
        calls = len(states) - 1
        written = (states[:, b] >= EMPTY).sum(0).tolist()  # by which call; 0: a clue
        colors = [colormaps["viridis"](0.5 + 0.5 * call / calls) if call else "white"
                  for call in written]
        for i, axes in enumerate(line):
            moment = round(i * calls / 4)
            paint_board(axes, states[moment, b].tolist(), colors, truth[b].tolist())
            axes.set_title(f"{who}, call {moment}", fontsize=10)
    axes.figure.suptitle("White: clues. Green to yellow: written early to late. Red: wrong.")


@command("experiments.sudoku")
def main(arguments: list[str]) -> None:
    parser = flags("sudoku", __doc__, checkpoint=False, data_dir=False)
    add = parser.add_argument
    add("--steps", type=count, default=1000, help="of training (default: 1000)")
    add("--twin-steps", type=count, help="of GPT's training (default: as many)")
    add("--batch-size", type=count, default=128, help="grids a step (default: 128)")
    add("--train-boards", type=several, default=200_000, help="(default: 200000)")
    add("--boards", type=several, default=256, help="held-out puzzles (default: 256)")
    add("--calls", type=count, nargs="+", default=[22, 8, 4, 1], help="(default: 22 8 4 1)")
    add("--clues", type=count, nargs="+", default=[14, 16, 18, 22], help="(default: 14 16 18 22)")
    add("--seed", type=at_least(0), default=1, help="(default: 1)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="the training step")
    args = parser.parse_args(arguments)
    keep_freed_memory()  # makes a CPU faster
    train, held_out = make_data(args.train_boards, args.boards, args.seed)
    puzzles, truth = held_out.split(CELLS, 1)  # (boards,36) each
    cfg = TrainConfig(n_layer=4, n_head=4, n_embd=128, context_length=CELLS, steps=args.steps,
                      batch_size=args.batch_size, seed=args.seed, compile=args.compile)
    model = learn(cfg, EMPTY, train[:, CELLS:])
    twin = learn(replace(cfg, objective="autoregressive", context_length=2 * CELLS,
                         prefix_length=CELLS, steps=args.twin_steps or args.steps), START, train)
    rows = compare(model, twin, puzzles, args.calls)
    by_clues = compare_clues(model, twin, puzzles, truth, args.clues)
    ours = write(model, puzzles, order="margin")
    gpts = write_as_gpt(twin, puzzles)
    draw(args.picture, lambda panels: paint(panels, ours, gpts, puzzles, truth), columns=5, rows=2,
         width=2.1, height=2.3)
    report({"by calls": rows, "by clues": by_clues})


if __name__ == "__main__":
    sys.exit(main())
