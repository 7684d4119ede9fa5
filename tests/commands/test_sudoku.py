"""The sudoku experiment: its puzzles against brute force, two oracles, and to its end."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from oracles import at, seeded

from experiments import sudoku
from experiments.sudoku import CELLS, EMPTY, ORDERS, START, make_data

TRAIN, HELD_OUT, EASIER = make_data(num_train=80, num_held_out=12, seed=1)
PUZZLES, GRIDS = HELD_OUT.split(CELLS, 1)


def valid(grid: list[int]) -> bool:
    """By the rules, written out: rows, columns and boxes of 2 x 3 hold 0 to 5."""
    rows = [grid[6 * r : 6 * r + 6] for r in range(6)]
    columns = [grid[c::6] for c in range(6)]
    boxes = [[grid[6 * (r + i) + c + j] for i in range(2) for j in range(3)]
             for r in (0, 2, 4) for c in (0, 3)]
    return all(sorted(unit) == list(range(6)) for unit in rows + columns + boxes)


def brute_force(puzzle: list[int]) -> list[list[int]]:
    """All solutions, by trying permutations row by row and checking what stands above."""
    partial = [[]]
    for r in range(6):
        given = puzzle[6 * r : 6 * r + 6]
        rows = [row for row in itertools.permutations(range(6))
                if all(g in (EMPTY, digit) for g, digit in zip(given, row, strict=True))]
        partial = [[*above, *row] for above in partial for row in rows
                   if all(digit not in above[c::6] for c, digit in enumerate(row))
                   and (r % 2 == 0 or all(set(row[c : c + 3]).isdisjoint(above[-6:][c : c + 3])
                                          for c in (0, 3)))]
    return partial


class Oracle:
    """A network that knows the solutions (B,36), and says so with a confidence of its own."""

    def __init__(self, grids):
        self.logits = 9.0 * F.one_hot(grids, EMPTY) * torch.rand(*grids.shape, 1,
                                                                 generator=seeded(0))

    def __call__(self, tokens, positions=None):
        assert tokens.shape == self.logits.shape[:2]
        return at(self.logits, positions)


class LeftToRightOracle(Oracle):
    """GPT's form: it sees [START, puzzle, solution so far] and answers where the solution is."""

    def __call__(self, tokens, positions):
        assert tokens.shape[1] == 2 * CELLS and (tokens[:, 0] == START).all()
        assert torch.equal(tokens[:, 1 : CELLS + 1], PUZZLES)
        assert (positions % (2 * CELLS) >= CELLS).all()
        return F.pad(self.logits, (0, 1, CELLS, 0)).flatten(0, 1)[positions]


@pytest.mark.parametrize("rows", [HELD_OUT, TRAIN[::8]], ids=["held out", "disguised"])
def test_puzzles_are_valid_and_have_one_solution(rows):
    for row in rows.tolist():
        puzzle, grid = row[:CELLS], row[CELLS:]
        assert CELLS - 22 <= puzzle.count(EMPTY) <= 22 and valid(grid)
        assert brute_force(puzzle) == [grid]


def test_all_solutions_are_found():
    puzzle = PUZZLES[0].tolist()
    for cell in [cell for cell in range(CELLS) if puzzle[cell] != EMPTY][:5]:
        puzzle[cell] = EMPTY
    found = list(sudoku.solutions(puzzle, random.Random(0)))
    assert len(found) > 1 and sorted(found) == sorted(brute_force(puzzle))


def test_held_out_grids_are_never_trained_on(monkeypatch):
    grids = set(map(tuple, TRAIN[:, CELLS:].tolist()))
    assert len(grids) > 40 and grids.isdisjoint(map(tuple, GRIDS.tolist()))
    # The only puzzle there is, and half of the rows are not disguised: that half is left out.
    known, other = HELD_OUT[:2].tolist()
    turns = itertools.cycle([known, other])
    monkeypatch.setattr(sudoku, "make_puzzle", lambda rng: known)
    monkeypatch.setattr(sudoku, "disguise", lambda row, rng: next(turns))
    train, held_out, _ = make_data(10, 2, seed=1)
    assert train[:, CELLS:].tolist() == [other[CELLS:]] * 5
    assert held_out.tolist() == [known, known]


def test_a_network_that_knows_the_solutions_solves_all():
    for order, calls in itertools.product(ORDERS, (22, 4, 1)):
        states = sudoku.fill(Oracle(GRIDS), PUZZLES, order=order, steps=calls)
        assert len(states) == calls + 1 and torch.equal(states[-1], GRIDS)
        assert torch.equal(states[0], PUZZLES)
        clues = PUZZLES != EMPTY
        assert all(torch.equal(state[clues], PUZZLES[clues]) for state in states)
    states = sudoku.fill_as_gpt(LeftToRightOracle(GRIDS), PUZZLES)
    assert len(states) == 22 + 1 and torch.equal(states[-1], GRIDS)
    first_hole = (PUZZLES == EMPTY).int().argmax(1)
    assert torch.equal((states[1] != states[0]).int().argmax(1), first_hole)
    assert ((states[1] != states[0]).sum(1) == 1).all()


def test_easier_puzzles_have_more_of_the_same_solution():
    easier, grids = EASIER.split(CELLS, 1)
    assert torch.equal(grids, GRIDS)
    assert torch.equal(easier[PUZZLES != EMPTY], PUZZLES[PUZZLES != EMPTY])
    assert ((easier == GRIDS) | (easier == EMPTY)).all()
    assert ((PUZZLES != EMPTY).sum(1) == 14).all() and ((easier != EMPTY).sum(1) == 18).all()
    clues = (TRAIN[:, :CELLS] != EMPTY).sum(1)
    assert (clues.min(), clues.max()) == (14, 22)


def test_who_solves_what_is_counted(monkeypatch, capsys):
    wrong = GRIDS.roll(1, 0)  # of which a quarter is right
    wrong[:3] = GRIDS[:3]
    monkeypatch.setattr(sudoku, "ORDERS", ("random",))
    monkeypatch.setattr(sudoku, "fill_as_gpt", lambda twin, boards: GRIDS[None])
    table = sudoku.compare(Oracle(wrong), None, PUZZLES, EASIER[:, :CELLS], GRIDS)
    assert {name: share for name, (share, error) in table["random"].items()} == {
        "22 calls": 0.25, "8 calls": 0.25, "4 calls": 0.25, "1 calls": 0.25, "18 clues": 0.25}
    assert {name: share for name, (share, error) in table["GPT"].items()} == {
        "22 calls": 1, "18 clues": 1}
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["random", "25.0%"]


def test_sudoku(finish):
    flags = "--steps 2 --train-boards 40 --boards 6 --no-compile"
    lines, result = finish(sudoku, flags)
    assert list(result) == [*ORDERS, "GPT"]
    assert all(sum(line.startswith(who + " ") for line in lines) == 1 for who in result)
    assert finish(sudoku, flags)[1] == result  # the same seed, the same numbers
