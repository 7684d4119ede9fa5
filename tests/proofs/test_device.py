"""The proofs worth repeating on a GPU: pytest -m gpu. They run on the best device there is.

A GPU computes the same with other kernels, which round and add in another order. So results are
compared with arithmetic, with the CPU's or with another way to them, and each tolerance says why it
is as wide as it is. Without a GPU these are quick tests of a CPU.
"""

import contextlib
import re

import oracles
import pytest
import torch
from oracles import EXACT, JOINT, ROWS, T, V, fits, masked, seeded, with_holes
from tiny_runs import everything, log, run, state
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
import model
import sample
import train
from diffusion import Batch, Masking, loss, nelbo
from model import ModelConfig, Transformer
from plumbing.checkpoint import load_checkpoint, read_tensors
from plumbing.machine import autocast, can_compile, choose_dtype, fetch, hand_over
from sample import generate

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SHAPE = ModelConfig(vocab_size=11, context_length=16, n_layer=2, n_head=2, n_embd=32)
MASK = SHAPE.mask_id
PREFIXES = Masking(prefix_length_max=5)  # drawn, so most batches are padded


@pytest.fixture(autouse=True)
def no_tf32():
    """float32 is float32 here, whatever ran before: TF32 keeps 10 bits."""
    torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def network(device: torch.device = DEVICE) -> Transformer:
    """A network with much to say, the same on every device. Fresh ones: projections of zero."""
    net = Transformer(SHAPE).eval()
    for seed, weight in enumerate(net.parameters()):
        weight.normal_(std=2 * weight.size(-1) ** -0.5, generator=seeded(10 + seed))
    return net.to(device)


def question(masking: Masking = Masking(), seed: int = 0, B: int = 8) -> Batch:
    """A batch on the host, as train.py makes it."""
    x_0 = torch.randint(MASK, (B, SHAPE.context_length), generator=seeded(seed))
    return diffusion.corrupt(x_0, MASK, masking, seeded(seed))


def learn(net: Transformer, *batches: Batch, loss=loss, forward=None) -> tuple[Tensor, ...]:
    """The sum of the losses, and its gradient for each parameter."""
    value = sum(loss(forward or net, hand_over(batch, DEVICE)) for batch in batches)
    return value.detach(), *torch.autograd.grad(value, list(net.parameters()))


def assert_same_learning(found: tuple[Tensor, ...], expected: tuple[Tensor, ...],
                         tolerance: float) -> None:
    """By the norm of each tensor: single entries may be rounding errors and little else."""
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= tolerance * other.norm()


# --- Measuring and writing ------------------------------------------------------------------------


def table(tokens: Tensor, positions: Tensor) -> Tensor:
    """The exact conditionals, as a network of the device. Others' tensors are none of its business:
    what was left on the host fails here, and on a GPU also where it meets the answer."""
    assert tokens.device.type == positions.device.type == DEVICE.type
    return EXACT(tokens.cpu(), positions.cpu()).to(DEVICE)


def test_nelbo_of_exact_conditionals_is_the_entropy_and_its_curve_is_on_the_host():
    bound = nelbo(table, EXACT.sample(6000).to(DEVICE), V, batch_size=1000)
    assert bound.stderr < 0.02
    assert abs(bound.nats - EXACT.entropy() / T) < 3 * bound.stderr
    numbers = [bound.nats, bound.stderr, *bound.curve.nats, *bound.curve.stderr]
    assert {type(number) for number in numbers} == {float}
    assert bound.curve.counts == [1, 2, 3, 4]
    assert bound.nats == pytest.approx(sum(bound.curve.nats) / T, abs=0.05)  # measured separately


@pytest.mark.parametrize("expected, options", [
    (JOINT, {"order": "random"}), (JOINT, {"order": "margin"}),
    (oracles.random_order_q(EXACT, [4, 2, 0]), {"steps": 2}),
], ids=["random", "margin", "two steps"])
def test_samplers_write_what_enumeration_says(expected, options):
    x = generate(table, masked(ROWS, T, V).to(DEVICE), V, seeded(1), **options)
    assert x.device.type == DEVICE.type
    assert fits(x.cpu(), expected)


WAYS = [{}, {"order": "left_to_right", "top_p": 0.9}, {"order": "ancestral", "steps": 12},
        {"order": "confidence", "temperature": 0.0}, {"order": "margin", "steps": 6, "top_k": 5},
        {"order": "entropy", "gumbel": 1.0}, {"order": "confidence", "remask": "renoise"},
        {"order": "confidence", "threshold": 0.6, "temperature": 0.0},
        {"order": "confidence", "remask": "conf", "block_length": 5, "temperature": 0.0}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_device_writes_the_text_of_the_cpu_and_leaves_what_is_given(options):
    def written(device):
        net = network(device)
        return generate(net, x.to(device), MASK, seeded(2), **options).cpu()

    x = with_holes(256, 16, MASK)
    found = written(DEVICE)
    expected = written(torch.device("cpu"))
    given = x != MASK
    assert torch.equal(found[given], x[given]) and (found < MASK).all()
    assert max(torch.bincount(found[~given])) < 0.6 * (~given).sum()  # no text of one letter
    # Devices differ in the seventh digit. That flips a choice if two numbers agree in so many, one
    # choice in 100,000 or so, and then changes the rest of its row, but no other: these ways draw
    # as many random numbers whatever is written. 1% is what five rows come to, half of them wrong.
    assert (found == expected)[~given].float().mean() > 0.99


# --- Learning -------------------------------------------------------------------------------------


def test_the_masked_head_is_the_full_head_at_those_positions():
    net = network()
    batch = question(PREFIXES, seed=1)
    assert (batch.weights == 0).any()  # padded

    def full(tokens, positions):
        return net(tokens).flatten(0, 1)[positions]

    with torch.no_grad():
        inputs, positions, *_ = hand_over(batch, DEVICE)
        # Logits go up to 6, and float32 errs by up to 7e-6 in them; products of other shapes add in
        # another order. Gradients err by 6e-7 of their norm.
        expected = full(inputs, positions)
        torch.testing.assert_close(net(inputs, positions), expected, atol=3e-5, rtol=1e-5)
    assert_same_learning(learn(net, batch), learn(net, batch, forward=full), 1e-5)


@pytest.mark.parametrize("masking", [PREFIXES, Masking(), Masking(weighting="token")],
                         ids=["prefixes", "nelbo", "token"])
def test_micro_batches_add_up_to_the_batch(masking):
    B, length = 8, SHAPE.context_length
    x_0 = torch.randint(MASK, (B, length), generator=seeded(0))
    N = diffusion.draw_num_maskable(length, masking, seeded(1))
    num_masked = diffusion.draw_num_masked(B, N, masking, seeded(2))
    mask = diffusion.draw_mask(num_masked, length, length - N, seeded(3))
    weights = diffusion.weigh(num_masked, N, masking)

    def ask(rows):
        return diffusion.ask(x_0[rows], mask[rows], weights[rows], MASK, masking)

    net = network()
    parts = learn(net, ask(slice(0, 4)), ask(slice(4, 8)))
    assert_same_learning(parts, learn(net, ask(slice(0, 8))), 1e-5)  # sums in another order


def test_compiled_is_eager_without_a_break_and_once_for_all_batches():
    if not can_compile():
        pytest.skip("no C++ compiler")
    net = network()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True)
    for seed in range(3):
        batch = question(PREFIXES, seed)
        # Fused kernels round less often and add in another order: two or three digits of seven.
        assert_same_learning(learn(net, batch, loss=compiled), learn(net, batch), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_bfloat16_learns_nearly_what_float32_learns():
    def direction(gradients):
        return nn.functional.normalize(torch.cat([part.flatten() for part in gradients]), dim=0)

    net = network()
    value, *gradients = learn(net, question(B=32))
    with autocast(DEVICE, torch.bfloat16):
        rounded, *others = learn(net, question(B=32))
    assert rounded != value  # it is on
    # bfloat16 has 8 bits, errors of up to 1/256, which mostly cancel in the mean of 272 losses.
    assert (rounded - value).abs() < 0.01 * value
    assert direction(others) @ direction(gradients) > 0.999


# PyTorch's own fused kernels of attention, one of which is called fmha, and that of cuDNN.
FUSED = re.compile("flash|fmha|cudnn")


def names_of_kernels(function, *arguments) -> str:
    """What PyTorch runs for a call, on the host and on the GPU."""
    with torch.profiler.profile() as profile:
        function(*arguments)
        if ON_GPU:
            torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_one_fused_kernel(causal):
    q, k, v = torch.randn(3, 2, 12, 1024, 64, generator=seeded(0)).to(DEVICE, torch.bfloat16)
    assert FUSED.search(names_of_kernels(model.attend, q, k, v, causal))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if it can't be that
        flash = model.attend(q, k, v, causal)
    with sdpa_kernel(SDPBackend.MATH):
        written_out = model.attend(q, k, v, causal)
        assert not FUSED.search(names_of_kernels(model.attend, q, k, v, causal))
    # 8 bits: the neighbours of 3 are 1/64 away.
    torch.testing.assert_close(flash, written_out, atol=2e-2, rtol=2e-2)


# --- Runs -----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    whole = run(data, tmp_path / "whole", device=DEVICE.type)
    parts = run(data, tmp_path / "parts", device=DEVICE.type, max_steps=6)
    assert read_tensors(parts / "state.safetensors")[1]["step"] == 6
    run(data, parts, device=DEVICE.type, resume=True)
    if not ON_GPU:
        assert everything(parts) == everything(whole)
    # A GPU may add in an order that varies from run to run; twelve steps make little of it. A mask,
    # a row of text or a rate of another step would show in the second digit.
    for read in (state, log):
        torch.testing.assert_close(read(parts), read(whole), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_loads_onto_the_device_and_writes_there(data, tmp_path, capsys):
    out = run(data, tmp_path / "out", device=DEVICE.type, steps=2)
    net, info = load_checkpoint(out, DEVICE)
    assert info["step"] == 2 and not net.training
    tensors = [*net.parameters(), *net.buffers()]
    assert {tensor.device.type for tensor in tensors} == {DEVICE.type}
    saved = read_tensors(out / "model.safetensors")[0]
    assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in net.state_dict().items())
    capsys.readouterr()
    assert sample.main(["--checkpoint", str(out), "--device", DEVICE.type, "--text",
                        "the quick[MASK:7]fox", "--temperature", "0", "--whole"]) == 0
    written, numbers = capsys.readouterr()
    assert written.startswith("the quick") and written.endswith("fox\n") and len(written) > 13
    assert "7 new tokens in 7 model calls" in numbers


class HostReads(TorchDispatchMode):
    """Notes what would make a GPU wait: a number that Python reads, a result of unknown size."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.found.append(name)
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for a GPU, or on a CPU, would."""
    if not ON_GPU:
        with HostReads() as reads:
            yield
        assert reads.found == []
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_numbers_on_their_way_are_those_of_their_time():
    numbers = torch.tensor([1.0, 2.0], device=DEVICE)
    with no_waiting() if ON_GPU else contextlib.nullcontext():
        read = fetch(numbers)
        numbers.zero_()
    assert read() == [1.0, 2.0] and read() == [1.0, 2.0]


@pytest.mark.parametrize("options", [
    {"order": "spread", "top_k": 3}, {"order": "random", "top_p": 0.9}, {"order": "ancestral"},
    {"order": "right_to_left", "temperature": 0.0}, {"block_length": 5},
], ids=str)
def test_fixed_orders_are_written_ahead_of_the_device(options):
    states = sample.denoise(network(), masked(4, 16, MASK).to(DEVICE), MASK, seeded(0), **options)
    state = next(states)
    while state.probability.min() == 0:  # a step at a time, read in between
        with no_waiting() if ON_GPU else contextlib.nullcontext():
            state = next(states)
    assert state.calls > 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_training_step_never_waits_for_the_device(optimizer):
    net = network()
    averaged = network()
    dtype = choose_dtype("auto", DEVICE)
    optimizers = train.build_optimizers(train.TrainConfig(optimizer=optimizer), net, dtype)

    def step(number, batch):
        with autocast(DEVICE, dtype):
            value = loss(net, hand_over(batch, DEVICE))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        train.average(averaged, net, 0.999, number)

    step(0, question())  # libraries and optimizers make themselves ready
    batch = question(seed=1)
    before = net.embedding.weight.detach().clone()
    with no_waiting():
        step(1, batch)
    assert not torch.equal(net.embedding.weight, before)
