"""Noise and questions: how many tokens are hidden, which, and what each is worth in the loss.

draw_num_masked -> draw_mask -> weigh -> ask -> loss, against numbers that one can find by hand.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Fixed, at, chi_square_p, levels, seeded, some_curve
from torch import Tensor

import diffusion
from diffusion import Batch, Masking, ask, corrupt, draw_mask, draw_num_masked, loss, weigh
from model import ModelConfig, Transformer

MASK = 9  # outside the vocabulary of 5 used here, and not next to it


def tokens(B: int, T: int) -> Tensor:
    return torch.randint(0, 5, (B, T), generator=seeded(123))


def square(t: Tensor) -> Tensor:
    """The CDF of an asymmetric distribution of mask ratios."""
    return t**2


def middle(t: Tensor) -> Tensor:
    """The CDF of a symmetric one that draws some levels never: evenly from 20% to 80%."""
    return ((t - 0.2) / 0.6).clamp(0, 1)


CDF = {"uniform": lambda t: t, "bell": lambda t: 3 * t**2 - 2 * t**3,
       "narrow": lambda t: 10 * t**3 - 15 * t**4 + 6 * t**5, square: square}


# --- How many tokens are hidden -------------------------------------------------------------------


@pytest.mark.parametrize("B, N", [(1, 6), (5, 6), (4, 7)])
@pytest.mark.parametrize("mask_ratio", CDF, ids=str)
def test_every_row_hides_each_count_as_often_as_its_distribution_says(mask_ratio, B, N):
    masking = Masking(mask_ratio=mask_ratio)
    counts = torch.stack([draw_num_masked(B, N, masking, seeded(seed)) for seed in range(1000)])
    q = CDF[mask_ratio](torch.arange(N + 1) / N).diff()
    for row in counts.T:
        assert chi_square_p(torch.bincount(row, minlength=N + 1)[1:], q) > 1e-4


def test_a_batch_spreads_over_the_levels_evenly():
    for seed in range(20):
        for N in (1, 2, 7, 100):  # a batch of 2N rows hides every count exactly twice
            counts = draw_num_masked(2 * N, N, generator=seeded(seed)).view(-1, 2)
            assert (counts.sort(0).values == torch.arange(1, N + 1)[:, None]).all()
            # and of ten levels, which hide only tenths, ten pairs hold each once in the even rows
            counts = draw_num_masked(20, 10 * N + 4, Masking(mask_levels=10), seeded(seed))
            tenths = [round(k * (10 * N + 4) / 10) for k in range(1, 11)]
            assert counts[::2].sort().values.tolist() == tenths
        # 8 pairs over 64 counts: one draw in each eighth, all at the same place in it, so 8 apart
        counts = draw_num_masked(16, 64, generator=seeded(seed)).view(-1, 2)
        assert (counts.sort(0).values.diff(dim=0) == 8).all()
    # CDF t^2: q(k) = (2k-1)/N^2, so N^2 strata hold count k exactly 2k-1 times
    counts = draw_num_masked(25, 5, Masking(mask_ratio=square), seeded(0))
    assert torch.bincount(counts).tolist() == [0, 1, 3, 5, 7, 9]
    counts = [draw_num_masked(6, 10, Masking(mask_ratio=middle), seeded(s)) for s in range(100)]
    assert torch.cat(counts).unique().tolist() == [3, 4, 5, 6, 7, 8]


# --- Which tokens are hidden ----------------------------------------------------------------------


@pytest.mark.parametrize("T, prefix_length, m", [(5, 0, 2), (6, 2, 2), (6, 0, 3), (5, 1, 1)])
def test_every_subset_after_the_prefix_is_equally_likely(T, prefix_length, m):
    mask = draw_mask(torch.full((20000,), m), T, prefix_length, seeded(0))
    assert (mask.sum(1) == m).all() and not mask[:, :prefix_length].any()
    _, observed = mask.unique(dim=0, return_counts=True)
    assert len(observed) == math.comb(T - prefix_length, m)
    assert chi_square_p(observed, torch.ones(len(observed))) > 1e-4


@pytest.mark.parametrize("T, prefix_length", [(8, 0), (10, 3), (16, 0), (6, 5)])
def test_spread_masks_are_what_the_order_spread_has_left_from_any_start(T, prefix_length):
    N = T - prefix_length
    rank = [int(f"{t:0{max(1, (N - 1).bit_length())}b}"[::-1], 2) for t in range(N)]
    last = sorted(range(N), key=rank.__getitem__, reverse=True)
    for m in range(1, N + 1):
        rotations = {tuple(sorted((t - start) % N + prefix_length for t in last[:m]))
                     for start in range(N)}
        mask = draw_mask(torch.full((4000,), m), T, prefix_length, seeded(m), "spread")
        found = {tuple(row.nonzero().flatten().tolist()) for row in mask}
        assert found == rotations
        often = mask[:, prefix_length:].float().mean(0)  # all positions alike
        assert (often - m / N).abs().max() < 0.04  # five standard errors


@pytest.mark.parametrize("shortest, longest", [(1, 4), (0, 5)])
def test_a_drawn_prefix_has_every_length_of_its_range_equally_often(shortest, longest):
    # Ten rows are five strata of at most six tokens: some row hides all that may be hidden, so the
    # first hidden position of the batch is the prefix length.
    masking = Masking(prefix_length=shortest, prefix_length_max=longest)
    lengths = []
    for seed in range(600):
        hidden = corrupt(tokens(10, 6), MASK, masking, seeded(seed)).inputs == MASK
        lengths.append(hidden.any(0).int().argmax())
    counts = torch.bincount(torch.stack(lengths), minlength=7)
    assert (counts > 0).tolist() == [shortest <= length <= longest for length in range(7)]
    assert chi_square_p(counts[counts > 0], torch.ones(longest - shortest + 1)) > 1e-4


# --- The question ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.builds(Masking, objective=st.sampled_from(["diffusion", "diffusion", "mlm"]),
                 mask_ratio=st.sampled_from(["uniform", "bell", "narrow", square]),
                 mask_positions=st.sampled_from(["random", "spread"]),
                 weighting=st.sampled_from(["nelbo", "token"]),
                 mask_levels=st.sampled_from([0, 0, 3, 10]),
                 mlm_ratio=st.sampled_from([0.01, 0.15, 1.0]),
                 prefix_length=st.integers(0, 4), prefix_length_max=st.sampled_from([None, 4, 10])),
       st.integers(1, 9), st.integers(20, 23), st.integers(0, 10**6))
def test_what_holds_for_every_masking(masking, B, T, seed):
    x_0 = tokens(B, T)
    before = x_0.clone()
    batch, again = (corrupt(x_0, MASK, masking, seeded(seed)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))  # the same seed
    inputs, positions, targets, weights = batch
    hidden = inputs == MASK
    m = hidden.sum(1)
    N = T - masking.prefix_length  # or fewer, after a drawn prefix
    assert torch.equal(x_0, before) and torch.equal(inputs[~hidden], x_0[~hidden])
    assert 1 <= m.min() and m.max() <= N and not hidden[:, : masking.prefix_length].any()

    # Every hidden position is predicted once; the rest of the P predictions is padding of weight 0.
    real = weights > 0
    assert positions[real].tolist() == hidden.flatten().nonzero().flatten().tolist()
    assert (weights[~real] == 0).all() and torch.equal(targets, x_0.flatten()[positions])
    P = diffusion.num_predicted(B, T, masking)  # always the same: one shape, one compilation
    assert len(positions) == len(targets) == len(weights) == P
    weighting_is_nelbo = masking.objective == "diffusion" and masking.weighting == "nelbo"
    if not weighting_is_nelbo:  # all alike, in sum 1
        torch.testing.assert_close(weights[real], (1 / m.sum()).expand(m.sum()))
    elif masking.mask_ratio == "uniform":  # 1/t: each row counts 1/B in all
        torch.testing.assert_close(weights[real], (1 / (B * m)).repeat_interleave(m))
    if masking.prefix_length_max is None:
        if weighting_is_nelbo and masking.mask_levels == 0:  # 1 / (B N q(m) m)
            q = CDF[masking.mask_ratio](torch.arange(N + 1) / N).diff()
            expected = (1 / (B * N * q[m - 1] * m)).repeat_interleave(m)
            torch.testing.assert_close(weights[real], expected, rtol=1e-4, atol=0)
        if masking.objective == "mlm":
            assert (m == max(1, round(masking.mlm_ratio * N))).all() and real.all()
        elif masking.mask_ratio != square:  # antithetic pairs
            pairs = m[: B // 2 * 2].view(-1, 2)
            assert (pairs.sum(1) == N + round(N / (masking.mask_levels or N))).all()
            assert B % 2 or real.all()  # which need no padding


def test_the_number_of_predictions_by_hand():
    # Pairs hide N+1 = 21 tokens, or 20 + 2 of ten levels; after a prefix of 7, 13 + 1; the last of
    # an odd number of rows, and every row that has no partner, up to 20.
    for B, options, expected in ((6, {}, 63), (7, {}, 83), (1, {}, 20),
                                 (6, {"mask_levels": 10}, 66),
                                 (6, {"prefix_length": 7, "prefix_length_max": 9}, 42),
                                 (6, {"mask_ratio": square}, 120), (6, {"objective": "mlm"}, 18),
                                 (6, {"objective": "autoregressive"}, 120)):
        assert diffusion.num_predicted(B, 20, Masking(**options)) == expected


def test_autoregressive_is_gpts_shifted_cross_entropy_by_the_same_four_calls():
    x_0 = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 0]])
    masking = Masking(objective="autoregressive")
    gpt = Transformer(ModelConfig(5, 4, n_layer=2, n_head=2, n_embd=16, causal=True))
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    num_masked = draw_num_masked(2, 4, masking, seeded(0))
    mask = draw_mask(num_masked, 4, 0, seeded(0))
    batch = ask(x_0, mask, weigh(num_masked, 4, masking), 5, masking)
    assert batch.inputs.tolist() == [[5, 1, 2, 3], [5, 4, 3, 2]]
    assert batch.positions.tolist() == list(range(8)) and torch.equal(batch.targets, x_0.flatten())
    logits = gpt(F.pad(x_0, (1, 0), value=5)[:, :-1])  # GPT reads a text of T+1 tokens
    torch.testing.assert_close(loss(gpt, batch), F.cross_entropy(logits.mT, x_0))


# --- What the answers are worth -------------------------------------------------------------------


def test_loss_is_the_weighted_cross_entropy_and_has_its_gradient():
    table = torch.randn(3 * 4, 5, generator=seeded(0), requires_grad=True)
    positions = torch.tensor([0, 5, 6, 11])
    targets = torch.tensor([4, 0, 2, 2])
    weights = torch.tensor([0.5, 0.25, 0.0, 2.0])
    value = loss(Fixed(table.view(3, 4, 5)), Batch(tokens(3, 4), positions, targets, weights))
    value.backward()
    p = table.detach()[positions].softmax(-1)
    right = F.one_hot(targets, 5)
    torch.testing.assert_close(value.detach(), -(weights * (p * right).sum(-1).log()).sum())
    expected = torch.zeros(12, 5)
    expected[positions] = weights[:, None] * (p - right)  # d CE / d logits = softmax - one-hot
    torch.testing.assert_close(table.grad, expected)


def level_loss(B: int, T: int, **options) -> float:
    return loss(levels, corrupt(torch.zeros(B, T).long(), 2, Masking(**options), seeded(0))).item()


# N = 8 and B such that the strata hold each level exactly in proportion: then the loss of a batch
# *is* its expectation. uniform: 8 pairs; bell: q(k) = i/256; square (no pairs): i/64.
@pytest.mark.parametrize("weighting", ["nelbo", "token"])
@pytest.mark.parametrize("mask_ratio, B", [("uniform", 16), ("bell", 512), (square, 64)], ids=str)
def test_expected_loss_of_each_weighting_is_its_sum_over_levels(mask_ratio, B, weighting):
    m = torch.arange(1, 9).double()
    q = CDF[mask_ratio](torch.arange(9).double() / 8).diff()
    if weighting == "nelbo":
        q = 1 / m  # whatever q is: the importance weights undo it
    expected = (q * m * some_curve(m)).sum() / (q * m).sum()
    value = level_loss(B, 8, mask_ratio=mask_ratio, weighting=weighting)
    assert value == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("N", [14, 20, 24])
@pytest.mark.parametrize("mask_ratio, B", [("uniform", 20), ("bell", 1000)])
def test_ten_levels_price_the_ten_step_sampler(mask_ratio, B, N):
    # NELBO_10 = (1/10) sum of CE(kN/10). Ten pairs hold each level once; 500 pairs hold the bell's
    # q(k), multiples of 1/500, exactly. Partners hide N + round(N/10) - m: the same for N = 20.
    m = torch.tensor([round(k * N / 10) for k in range(1, 11)]).double()
    expected = (some_curve(m).mean() + some_curve(N + round(N / 10) - m).mean()) / 2
    value = level_loss(B, N, mask_ratio=mask_ratio, mask_levels=10)
    assert value == pytest.approx(expected.item(), rel=1e-5)


# --- Slices of the global batch -------------------------------------------------------------------


def loss_and_gradient(batch: Batch) -> Tensor:
    """Of a network in which every token of a row matters at every position of that row."""
    mix = torch.randn(20, 20, generator=seeded(1))
    table = torch.randn(MASK + 1, 5, generator=seeded(2)).requires_grad_()
    value = loss(lambda x, at_: at(torch.einsum("ts,bsv->btv", mix, table[x]), at_), batch)
    value.backward()
    return torch.cat([value.detach()[None], table.grad.flatten()])


@pytest.mark.parametrize("B, rows", [(8, 2), (8, 4), (7, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("masking", [
    Masking(), Masking(mask_ratio="bell"), Masking(mask_ratio=square), Masking(mask_levels=10),
    Masking(mask_levels=10, mask_ratio=square), Masking(mask_ratio=middle, weighting="token"),
    Masking(prefix_length=7), Masking(prefix_length=2, prefix_length_max=9),
    Masking(mask_ratio=square, prefix_length_max=19), Masking(objective="autoregressive"),
    Masking(objective="mlm"), Masking(objective="mlm", prefix_length_max=9)], ids=range(12))
def test_asking_per_slice_adds_up_to_asking_at_once_or_is_refused(masking, B, rows):
    for seed in range(5):
        x_0 = tokens(B, 20)
        generator = seeded(seed)
        N = diffusion.draw_num_maskable(20, masking, generator)
        num_masked = draw_num_masked(B, N, masking, generator)
        mask = draw_mask(num_masked, 20, 20 - N, generator)
        weights = weigh(num_masked, N, masking)
        whole = ask(x_0, mask, weights, MASK, masking)
        expected = loss_and_gradient(whole)
        one_call = loss_and_gradient(corrupt(x_0, MASK, masking, seeded(seed)))
        assert torch.equal(expected, one_call)
        try:
            slices = [slice(first, first + rows) for first in range(0, B, rows)]
            parts = [ask(x_0[s], mask[s], weights[s], MASK, masking) for s in slices]
        except ValueError as error:
            assert "pairs together" in str(error) and rows % 2  # whole pairs are never refused
            continue
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert len({len(part.positions) for part in parts[: B // rows]}) == 1  # equal work
        total = sum(map(loss_and_gradient, parts))
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)


def test_a_torn_pair_that_the_head_has_no_room_for_is_refused():
    x_0 = tokens(4, 20)
    mask = draw_mask(torch.tensor([3, 18, 17, 4]), 20, generator=seeded(0))
    assert len(ask(x_0[:2], mask[:2], torch.ones(2), MASK).positions) == 21
    with pytest.raises(ValueError, match="keep antithetic pairs together"):
        ask(x_0[1:3], mask[1:3], torch.ones(2), MASK)


# --- Arguments that make no sense -----------------------------------------------------------------


@pytest.mark.parametrize("options, named", [
    ({"objective": "difusion"}, "objective.*difusion"),
    ({"weighting": "tokens"}, "weighting.*tokens"),
    ({"mask_ratio": "flat"}, "mask_ratio.*flat"),
    ({"mask_ratio": middle}, "mask_ratio never draws"),  # no weight makes that the NELBO
    ({"mask_levels": -1}, "mask_levels.*-1"),
    ({"mask_levels": 21}, "20 tokens and 21 mask levels"),
    ({"mlm_ratio": -0.1}, "mlm_ratio.*-0.1"),
    ({"mlm_ratio": 1.5}, "mlm_ratio.*1.5"),
    ({"mlm_ratio": math.nan}, "mlm_ratio.*nan"),
    ({"prefix_length": -1}, "prefix of -1"),
    ({"prefix_length": 20}, "prefix of 20"),
    ({"prefix_length": 5, "prefix_length_max": 4}, "prefix of 5 to 4"),
    ({"prefix_length_max": 20}, "prefix of 0 to 20"),
    ({"prefix_length_max": 19, "mask_levels": 10}, "prefix of 0 to 19.*10"),  # fits at some draws
], ids=str)
def test_a_masking_that_makes_no_sense_is_refused_by_name_at_every_draw(options, named):
    for seed in range(20):
        with pytest.raises(ValueError, match=named):
            corrupt(tokens(4, 20), MASK, Masking(**options), seeded(seed))


@pytest.mark.parametrize("N, mask_levels", [(0, 0), (-3, 0), (4, 5)])
def test_rows_that_are_too_short_are_refused(N, mask_levels):
    with pytest.raises(ValueError, match=f"{N} tokens are too few for {mask_levels} mask levels"):
        draw_num_masked(4, N, Masking(mask_levels=mask_levels), seeded(0))
