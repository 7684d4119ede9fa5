"""The whole idea of text diffusion on one page: python experiments/nano.py FILE [STEPS]

GPT writes from left to right. A diffusion model starts from a page on which every letter is hidden
and uncovers them in any order, several at a time. One exercise teaches it that: hide some letters
of a real text, guess them from the others. With few hidden it learns to spell; with half of them,
words and grammar; with all of them, what texts look like at all.

FILE is any text, best a megabyte or more. In about a minute on two CPU cores you see the loss fall,
then what a byte of unseen text costs (Shakespeare: 3.0 bits; by byte frequencies alone 4.8), then a
text appear that nobody wrote. Everything else in this repository is speed, size and care.
Shapes: B rows, T positions, C channels, H heads of D = C/H channels.
"""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

T = 96  # bytes that the model sees, and writes, at once: a line of the terminal
C, H, LAYERS = 128, 4, 3  # 0.6 million parameters; the small GPT-2 has 768, 12, 12
BATCH, STEPS, RATE = 16, 1000, 5e-3  # a minute is short: many small steps beat few large ones
MASK = 256  # bytes are 0..255; the mask is one more *input*, never an output: it cannot be written


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x):
    """Turn pairs of channels by angles that grow with the position, some fast, some slowly (RoPE):
    the product of a query and a key then depends on how far apart they stand. x: (B,H,T,D)."""
    angle = torch.arange(x.size(2))[:, None] * 100 ** -torch.linspace(0, 1, x.size(3) // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Block(nn.Module):
    """Look at your two neighbours, look at everybody, think it over. (B,T,C) in and out."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.randn(C))
        self.right = nn.Parameter(torch.randn(C))
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        # A hidden letter depends most on the two beside it. Attention needs hundreds of steps to
        # find out where "beside" is, so I show it: 3.0 bits in the end; without this line, 3.2.
        x = x + self.left * F.pad(x, (0, 0, 1, -1)) + self.right * F.pad(x, (0, 0, -1, 1))
        q, k, v = self.qkv(norm(x)).unflatten(2, (3, H, C // H)).permute(2, 0, 3, 1, 4)  # (B,H,T,D)
        # GPT says is_causal=True here. Without it all see all: that is the whole difference.
        y = F.scaled_dot_product_attention(rotate(norm(q)), rotate(norm(k)), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Denoiser(nn.Module):
    """From bytes and masks (B,T) to a guess at every position: logits (B,T,256)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(257, C) / 10)  # a vector for each byte, and the mask
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, x):  # nobody tells the network how much is hidden: it can count
        return norm(self.blocks(norm(self.table[x]))) @ self.table[:MASK].T


def guess(model, x, m):
    """Hide any m[b] bytes of row b, let the model guess them: the mean cross-entropy, (B,) nats."""
    hidden = torch.rand(x.shape).argsort(1) < m[:, None]  # of 0..T-1, shuffled, m are below m
    nats = F.cross_entropy(model(x.masked_fill(hidden, MASK)).mT, x, reduction="none")  # (B,T)
    return (nats * hidden).sum(1) / m


@torch.no_grad()
def bound(model, rows):
    """The most that a byte of these rows (R,T) costs (NELBO), in bits, and its standard error.

    Let the model write a row byte by byte, in an order drawn by lot. With m bytes left the next one
    costs CE(m), which `guess` measures; m runs from T down to 1, so a byte costs the mean CE over
    all m. It bounds -log p from above: all orders lead to the text, and we count only one.
    """
    m = (torch.arange(len(rows)) * T + torch.randint(T, ())) // len(rows) + 1  # evenly over 1..T
    parts = zip(rows.split(64), m[torch.randperm(len(m))].split(64), strict=True)
    bits = torch.cat([guess(model, x, m) for x, m in parts]) / math.log(2)
    return bits.mean().item(), bits.std().item() / len(bits) ** 0.5


def show(x):
    """A row of bytes as a line of text; what is hidden is a grey box."""
    text = b"".join("░".encode() if byte == MASK else bytes([byte]) for byte in x.tolist())
    text = text.decode(errors="replace").replace("\n", "↵")
    return "".join(letter if letter.isprintable() else " " for letter in text)


@torch.no_grad()
def write(model, steps, temperature=0.7):
    """From nothing but masks to a text, T/steps bytes per step. Yields a line after each step."""
    x = torch.full((1, T), MASK)
    yield show(x[0])
    for positions in torch.randperm(T).chunk(steps):
        logits = model(x)[0, positions] / temperature  # below 1: fewer risks, fewer surprises
        # Bytes of the same step do not see each other: the price of writing several at a time.
        x[0, positions] = torch.distributions.Categorical(logits=logits).sample()
        yield show(x[0])


def main(arguments):
    try:
        if len(arguments) not in (1, 2):
            raise ValueError(f"{len(arguments)} arguments, where one text file is wanted")
        text = bytearray(open(arguments[0], "rb").read())
        steps = int(arguments[1]) if arguments[1:] else STEPS
        if steps < 1 or len(text) < 100 * T:
            raise ValueError(f"{steps} steps on {len(text)} bytes; it takes 1 on {100 * T} or more")
    except (OSError, ValueError) as error:
        print(f"{error}; usage: python experiments/nano.py FILE [STEPS]", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="replace")  # a terminal without grey boxes gets question marks
    torch.manual_seed(1)
    text = torch.frombuffer(text, dtype=torch.uint8)
    train, held_out = text.tensor_split([len(text) * 9 // 10])
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    bits = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        x = train[torch.randint(len(train) - T + 1, (BATCH, 1)) + torch.arange(T)].long()  # (B,T)
        m = torch.randint(1, T + 1, (BATCH // 2,))
        m = torch.cat([m, T + 1 - m])  # an easy row for each hard one: every batch hides as much
        loss = (guess(model, x, m) * m).sum() / m.sum()  # every hidden byte counts alike
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 20) * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits.append(loss.item() / math.log(2))
        if step % 50 == 0:
            print(f"step {step:4}: {sum(bits[-50:]) / 50:.3f} bits per hidden byte,"
                  f" {time.monotonic() - started:3.0f} s", flush=True)

    rows = held_out[: len(held_out) // T * T].view(-1, T).long()
    nelbo, error = bound(model, rows[torch.randperm(len(rows))[:1024]])
    entropy = torch.special.entr(held_out.bincount() / len(held_out)).sum().item() / math.log(2)
    print(f"\nheld-out text: <= {nelbo:.3f} +- {error:.3f} bits per byte")
    print(f"its byte frequencies alone: {entropy:.3f}\n")
    print("\n".join(list(write(model, steps=T // 2))[::6]))  # two bytes per step
    for _ in range(4):
        print("\n" + list(write(model, steps=T))[-1])  # one byte per step: slower, and better
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
