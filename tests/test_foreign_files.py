"""Nothing is believed: every file that is read may come from a stranger, every text from anywhere.

A reader meets thousands of broken files. It refuses a file with its own error, one printable line, or reads
it; any other exception fails the test, and so does a file that takes long or much memory. Files with a right
digest are broken too: behind the digest everything else must still hold.
"""

import copy
import hashlib
import io
import json
import random
import re
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_file
import prepare_data
import sample
import train
from configs import ConfigError, load
from diffusion import Bound
from experiments.denoise_page import main as denoise_page
from experiments.denoise_page import page
from experiments.structured import parse as parse_template
from model import CheckpointError, load_checkpoint, read_checkpoint_file
from prepare_data import DataError, TokenFile, get_tokenizer, write_dataset
from train import TrainConfig, main

ROOT = Path(__file__).parent.parent
FIRST = ROOT / "tests/fixtures/first"  # a tiny checkpoint
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 10
STATUS = Path("/proc/self/status")
MANY = [pytest.param(200, 0, id="short"),  # how many inputs, and the seed of their mutations
        *(pytest.param(2500, i, id=f"long {i}", marks=pytest.mark.reliability) for i in (1, 2, 3, 4))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
]


class Peak:
    """The most memory that this process used inside a `with`, in MB, where the system can tell (Linux)."""

    def __enter__(self):
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
            self.before = self.now()
        return self

    def now(self) -> float:
        return int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1]) / 1000

    def __exit__(self, *_):
        self.grown = self.now() - self.before if STATUS.exists() else 0.0


PIECES = (b"9" * 20, b"-1", b"1e999", b"NaN", b"[" * 3000, b"\x1b[31m", b"\n", b"\0", b"null", b'"', b"{}",
          b"../../evil", b"\xed\xa0\x80")


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four accidents or attacks: bits, bytes, huge numbers, pieces that are cut, repeated or moved."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        i, j = sorted(chance.randrange(len(data) + 1) for _ in range(2)) if data else (0, 0)
        j = min(j, i + chance.choice((1, 2, 4, 8, 64, len(data))))
        match chance.randrange(7):
            case 0 if data:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                data[i:j] = chance.randbytes(j - i)
            case 2:
                data[i : i + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f"))
            case 3:
                del data[i:j]
            case 4:
                data[i:i] = data[i:j]
            case 5:
                del data[i:]
            case _:
                data[i:j] = chance.choice(PIECES)
    return bytes(data)


def refused(read, error: type[Exception]) -> bool:
    """Whether `read` refuses what it is given, with its own error of one printable line."""
    started = time.monotonic()
    try:
        read()
    except error as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 500, str(refusal)
        return True
    finally:
        assert time.monotonic() - started < 10, "it hangs"
    return False


def fuzz(number: int, seed: int, read, write, data: bytes, error: type[Exception]) -> str:
    """Give `read` what `write` makes of `number` mutations of `data`; returns what came of it."""
    chance, refusals, size = random.Random(seed), 0, 0
    write(data)
    assert not refused(read, error)
    with Peak() as peak:
        for _ in range(number):
            mutated = mutate(data, chance)
            size = max(size, len(mutated))
            write(mutated)
            refusals += refused(read, error)
    assert peak.grown < 64 and refusals > number // 10
    return (f"{number:,} inputs of {len(data):,} bytes, {refusals:,} refused, the rest read; "
            f"memory grew by {peak.grown:.1f} MB")


# ---- checkpoints ----------------------------------------------------------------------------------


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def write_with_digest(path: Path, content: dict) -> None:
    """A checkpoint file whose digest is right, whatever it holds."""
    try:
        content["digest"] = model_file.digest(content["tensors"], content["info"])
    except RuntimeError:  # too large a tensor to have
        content["digest"] = ""
    torch.save(content, path)


def use(folder: Path) -> None:
    """Load a checkpoint, and write a little with it, in each of the ways that read its information."""
    load_checkpoint(folder)
    for options in (["--steps", "2"], ["--steps", "2", "--schedule", "optimal"]):
        assert sample.main(["--checkpoint", str(folder), "--length", "4", *options]) in (0, 2)


@pytest.mark.parametrize("number, seed", MANY)
def test_a_checkpoint_of_any_bytes_is_refused_or_is_the_checkpoint(tmp_path, number, seed, figure):
    path, tensors = tmp_path / "model.pt", read_checkpoint_file(FIRST / "model.pt")[0]

    def read():
        model, _ = load_checkpoint(tmp_path)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())

    original = (FIRST / "model.pt").read_bytes()
    figure("model.pt: " + fuzz(number, seed, read, path.write_bytes, original, CheckpointError))


@pytest.mark.parametrize("number, seed", MANY)
def test_a_broken_pickle_is_refused_behind_the_digest_too(tmp_path, monkeypatch, number, seed, figure):
    path, real = tmp_path / "model.pt", model_file.digest
    with zipfile.ZipFile(FIRST / "model.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    right = content_of(FIRST / "model.pt")["digest"]
    monkeypatch.setattr(model_file, "digest", lambda *content: real(*content) and right)  # any will do

    def write(pickle: bytes):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, pickle if name.endswith("/data.pkl") else data)

    (pickle,) = (data for name, data in entries.items() if name.endswith("/data.pkl"))
    counted = fuzz(number, seed, lambda: load_checkpoint(tmp_path), write, pickle, CheckpointError)
    figure(f"the pickle of model.pt, any digest being right: {counted}")


JUNK = (None, True, -1, 0, 1, 2, 3, 257, 2**24, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"),
        float("inf"), "", "byte", "gpt2", "../../../etc/passwd", "\x1b[2J", "a\nb", "\ud800", [], {}, [[]],
        [1, 2], {"a": 1})


def change(value, chance: random.Random):
    """JSON with one place, somewhere, changed, removed or added."""
    value = copy.deepcopy(value)
    while True:
        if isinstance(value, dict | list) and value and chance.random() < 0.9:
            key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
            fate = chance.randrange(6)
            if fate == 0:
                del value[key]
            elif fate == 1:
                value[key] = copy.deepcopy(chance.choice(JUNK))
            else:
                value[key] = change(value[key], chance)
            return value
        return copy.deepcopy(chance.choice(JUNK))


def change_tensors(tensors: dict, chance: random.Random) -> dict:
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    match chance.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.double()
        case 2:
            tensors[name] = tensor.flatten()[:0].expand(0) if chance.random() < 0.5 else tensor.flatten()[:1]
        case 3:
            tensors[name] = tensor.t() if tensor.dim() == 2 else tensor[None]
        case 4:
            tensors[name] = tensor.flatten()[:1].expand(2 ** chance.choice((1, 8, 16, 22, 50)))
        case 5:
            tensors[name] = tensor * float(chance.choice(("nan", "inf", "1e38", "0")))
        case 6:
            tensors[chance.choice(("extra", "\x1b[2J", "", "a\nb"))] = tensor
        case 7:
            tensors[name] = tensor.int()
    return tensors


@pytest.mark.parametrize("number, seed", MANY)
def test_a_checkpoint_that_lies_with_a_right_digest_is_refused_or_usable(tmp_path, capsys, number, seed,
                                                                         figure):
    chance, refusals = random.Random(seed), 0
    content = content_of(FIRST / "model.pt")
    use(FIRST)  # what is imported on first use is not the files' doing
    with Peak() as peak:
        for _ in range(number):
            tensors, info = dict(content["tensors"]), content["info"]
            if chance.random() < 0.7:
                info = json.dumps(change(json.loads(info), chance))
            else:
                tensors = change_tensors(tensors, chance)
            write_with_digest(tmp_path / "model.pt", {"tensors": tensors, "info": info})
            refusals += refused(lambda: use(tmp_path), CheckpointError)
            assert all(line.startswith(("sample.py: ", "note: ")) or "new tokens in" in line
                       for line in capsys.readouterr().err.splitlines())
    figure(f"model.pt behind its digest: {number:,} inputs, {refusals:,} refused, the rest used; "
           f"memory grew by {peak.grown:.1f} MB")
    assert peak.grown < 64 and number // 10 < refusals < number


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT])]), "byte", folder, "test")
    return folder


@pytest.mark.parametrize("number, seed", MANY)
def test_a_state_that_lies_with_a_right_digest_is_refused_or_goes_on(tmp_path, data, capsys, monkeypatch,
                                                                     number, seed, figure):
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e9)  # to measure takes too long here
    monkeypatch.setattr(train, "evaluate", lambda *rest, **named: Bound(1.0, 0.1, None))
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    content, chance = content_of(FIRST / "state.pt"), random.Random(seed)
    cfg = json.loads(content["info"])["config"]
    cfg |= {"data_dir": str(data), "out_dir": str(out_dir), "resume": True, "max_steps": None}
    codes = []
    for _ in range(number):
        tensors, info = dict(content["tensors"]), content["info"]
        if chance.random() < 0.6:
            info = json.dumps(change(json.loads(info), chance))
        else:
            tensors = change_tensors(tensors, chance)
        write_with_digest(out_dir / "state.pt", {"tensors": tensors, "info": info})
        (out_dir / "log.jsonl").write_bytes((FIRST / "log.jsonl").read_bytes())
        codes.append(main([f"--{key}={value}" for key, value in cfg.items() if value is not None]))
        errors = capsys.readouterr().err
        assert codes[-1] in (0, 1, 2) and errors.isprintable() or errors.count("\n") == 1, errors
    figure(f"state.pt behind its digest: {len(codes):,} inputs, {len(codes) - codes.count(0):,} refused")
    assert codes.count(2) > len(codes) // 10 and codes.count(0)


def archive(pickle: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The first checkpoint with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(FIRST / "model.pt") as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, pickle if name.endswith("/data.pkl") else old.read(name))
    return file.getvalue()


def expanded() -> bytes:
    """A billion numbers that are all the same four bytes."""
    file = io.BytesIO()
    tensors = {"w": torch.zeros(1).expand(2**30)}
    torch.save({"tensors": tensors, "info": '{"format": 1}', "digest": ""}, file)
    return file.getvalue()


def shared() -> bytes:
    """One tensor under ten thousand names."""
    file, w = io.BytesIO(), torch.zeros(50_000)
    torch.save({"tensors": {f"w{i}": w[:] for i in range(8000)}, "info": '{"format": 1}', "digest": ""}, file)
    return file.getvalue()


def crowded() -> bytes:
    """A directory that names 300,000 files, of which Python would make an object each."""
    small = archive(b"\x80\x02].")
    directory, end = small.index(b"PK\1\2"), small.index(b"PK\5\6")
    entries = small[directory:end] + small[directory : small.find(b"PK\1\2", directory + 1)] * 300_000
    size = struct.pack("<I", len(entries))
    return small[:directory] + entries + small[end : end + 12] + size + small[end + 16 :]


def claiming(**claims) -> bytes:
    """A right digest over a configuration that asks for a giant."""
    content, file = content_of(FIRST / "model.pt"), io.BytesIO()
    info = json.loads(content["info"])
    info["model"] |= claims
    content["info"] = json.dumps(info)
    content["digest"] = model_file.digest(content["tensors"], content["info"])
    torch.save(content, file)
    return file.getvalue()


def call(name: str, *arguments: bytes) -> bytes:
    return b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR."


LONG = b"\x8a\x05" + (2**32).to_bytes(5, "little")  # four billion, in a pickle
TEXT16 = b"X" + struct.pack("<I", 16) + b"a" * 16
HEX = b"\x80\x02c_codecs\nencode\nq\x01" + TEXT16 + b"X\x05\0\0\0utf-8\x86Rq\x02" + (
    b"h\x01h\x02X\x03\0\0\0hex\x86Rq\x02" * 28) + b"."  # each hex doubles it
BOMBS = {
    "four billion bytes": lambda: archive(call("builtins.bytearray", LONG)),
    "sixteen bytes doubled 28 times": lambda: archive(HEX),
    "compressed": lambda: archive(b"\x80\x02]" + b"0]" * 10**8 + b".", zipfile.ZIP_DEFLATED),
    "a long structure": lambda: archive(b"\x80\x02" + b"]" * 2**21 + b"."),
    "a directory of 300,000 files": crowded,
    "a billion numbers in four bytes": expanded,
    "one tensor 8,000 times": shared,
    "a billion layers": lambda: claiming(n_layer=10**9),
    "a billion places": lambda: claiming(context_length=10**9),
    "a billion channels": lambda: claiming(n_embd=10**9),
    "a billion tokens": lambda: claiming(vocab_size=10**9),
    "a vocabulary that is not a number": lambda: claiming(vocab_size=float("nan")),
    "nested information": lambda: claiming(causal=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_with_no_more_memory_than_the_file_is_worth(tmp_path, bomb):
    path = tmp_path / "model.pt"
    path.write_bytes(bomb())
    torch.zeros(2**20).sum()
    with Peak() as peak:
        assert refused(lambda: load_checkpoint(tmp_path), CheckpointError)
    assert peak.grown < 2 * path.stat().st_size / 1e6 + 32


def test_the_bombs_are_live(tmp_path):
    # What torch.load alone makes of a kilobyte; smaller ones than above, so that the proof is cheap.
    (tmp_path / "bomb.pt").write_bytes(archive(call("builtins.bytearray", b"J" + struct.pack("<i", 10**8))))
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    assert len(torch.load(tmp_path / "bomb.pt", weights_only=True)) == 10**8


def test_paths_in_names_lead_nowhere(tmp_path, data, capsys):
    folder, before = tmp_path / "out", sorted(ROOT.parent.glob("*evil*"))
    folder.mkdir()
    with zipfile.ZipFile(FIRST / "model.pt") as old, zipfile.ZipFile(folder / "model.pt", "w") as new:
        for name in old.namelist():
            new.writestr("../../evil/" + name.split("/", 1)[1], old.read(name))
    refused(lambda: use(folder), CheckpointError)
    content = content_of(FIRST / "model.pt")
    info = json.loads(content["info"]) | {"tokenizer": "../../evil"}
    write_with_digest(folder / "model.pt", {"tensors": content["tensors"], "info": json.dumps(info)})
    assert sample.main(["--checkpoint", str(folder)]) == 2
    assert "unknown tokenizer '../../evil'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.pt", "out"]
    assert sorted(ROOT.parent.glob("*evil*")) == before


def test_a_checkpoint_of_another_format_or_vocabulary_is_named(tmp_path, capsys):
    content = content_of(FIRST / "model.pt")
    for key, value, says in (("format", 2, "format 2"), ("tokenizer", "gpt2", "")):
        info = json.dumps(json.loads(content["info"]) | {key: value})
        write_with_digest(tmp_path / "model.pt", {"tensors": content["tensors"], "info": info})
        assert sample.main(["--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error


# ---- datasets, steps, configurations --------------------------------------------------------------


def read_data(folder: Path) -> None:
    for split in ("train", "val"):
        tokens = TokenFile(folder, split)
        tokens.batch(1, 2, rows=3, length=16)
        tokens.spread(rows=4, length=16)


@pytest.mark.parametrize("number, seed", MANY)
@pytest.mark.parametrize("name", ["meta.json", "train.bin"])
def test_a_dataset_of_any_bytes_is_refused_or_read(tmp_path, data, name, number, seed, figure):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (data / name).read_bytes()
    if name.endswith(".bin"):  # a third of the right length, behind the check of the length
        size = len(content)

        def write(mutated: bytes):
            (tmp_path / name).write_bytes(mutated if len(mutated) % 3 else mutated[:size].ljust(size, b"\0"))
    else:
        write = (tmp_path / name).write_bytes
    figure(f"{name}: " + fuzz(number, seed, lambda: read_data(tmp_path), write, content, DataError))


@pytest.mark.parametrize("number, seed", MANY)
def test_a_meta_json_that_lies_is_refused_or_read(tmp_path, data, number, seed, figure):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta, chance, refusals = json.loads((data / "meta.json").read_text()), random.Random(seed), 0
    with Peak() as peak:
        for _ in range(number):
            (tmp_path / "meta.json").write_text(json.dumps(change(meta, chance)))
            refusals += refused(lambda: read_data(tmp_path), DataError)
    figure(f"meta.json, changed as JSON: {number:,} inputs, {refusals:,} refused; "
           f"memory grew by {peak.grown:.1f} MB")
    assert peak.grown < 64 and number // 10 < refusals < number


@pytest.mark.parametrize("content", [b"[" * 10**6, b" " * 10**7, b'{"a":' * 10**5, b"", b"[[],[]," * 10**6])
def test_a_gigantic_meta_json_is_refused_without_being_read_whole(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with Peak() as peak:
        assert refused(lambda: TokenFile(tmp_path, "train"), DataError)
    assert peak.grown < 16


@pytest.mark.parametrize("number, seed", MANY)
def test_steps_of_any_bytes_make_a_page_or_one_line(tmp_path, number, seed, capsys, figure):
    steps = b"".join(json.dumps({"step": i, "tokens": [[i, 2, 3]], "texts": [["a", None, "c"]],
                                 "probability": [[0.5, 0, 1]]}).encode() + b"\n" for i in range(3))
    chance, codes = random.Random(seed), []
    for _ in range(number):
        (tmp_path / "steps.jsonl").write_bytes(mutate(steps, chance))
        codes.append(denoise_page([str(tmp_path / "steps.jsonl"), str(tmp_path / "page.html")]))
        assert codes[-1] in (0, 2) and capsys.readouterr().err.count("\n") == (codes[-1] == 2)
    figure(f"steps.jsonl: {number:,} inputs, {codes.count(2):,} refused")
    assert 0 < codes.count(2)


@pytest.mark.parametrize("number, seed", MANY)
def test_a_configuration_of_any_bytes_is_refused_or_read(tmp_path, number, seed, figure):
    path = tmp_path / "config.toml"
    original = (ROOT / "configs/quickstart.toml").read_bytes()
    figure("a .toml: " + fuzz(number, seed, lambda: load(TrainConfig, path), path.write_bytes, original,
                              ConfigError))


# ---- texts ----------------------------------------------------------------------------------------

BYTE = get_tokenizer("byte")
ANY_TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\0\x1b\r\n\u202e😀\ud800"))


def test_a_line_of_ten_megabytes_and_an_empty_file(tmp_path):
    text = ("<|endoftext|>שלום\0😀" * 400_000)[: 10**7]
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "empty.txt").touch()
    arguments = [str(tmp_path / "long.txt"), str(tmp_path / "empty.txt"), "--out-dir", str(tmp_path / "out")]
    assert prepare_data.main(arguments) == 0
    tokens = TokenFile(tmp_path / "out", "train").tokens
    tail = TokenFile(tmp_path / "out", "val").tokens
    found = BYTE.decode_bytes([t for part in (tokens, tail) for t in part.tolist() if t != BYTE.eot_token])
    assert hashlib.sha256(found).digest() == hashlib.sha256(text.encode()).digest()


def test_bytes_that_are_no_text_are_refused_by_the_name_of_their_file(tmp_path, capsys):
    for bad in (b"\xed\xa0\x80", b"\xff", b"\xc0\xaf", b"\xf4\x90\x80\x80"):  # the first: a surrogate
        (tmp_path / "bad.txt").write_bytes(b"good " * 100 + bad + b" good" * 100)
        assert prepare_data.main([str(tmp_path / "bad.txt"), "--out-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "bad.txt is not UTF-8 text" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["half \ud800 a pair", None, 7, ["a"]])
def test_a_document_that_is_no_text_is_refused_by_its_number(monkeypatch, text):
    rows = [{"text": "fine"}, {"text": text}]
    package = types.SimpleNamespace(load_dataset=lambda *names, **options: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(DataError, match="document 1 is not Unicode text") as refusal:
        list(prepare_data.hugging_face("some/corpus"))
    assert str(refusal.value).isprintable()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prefix=ANY_TEXT, before=ANY_TEXT, after=ANY_TEXT)
def test_any_prefix_and_template_comes_back_or_is_refused_by_name(prefix, before, after):
    model, _ = load_checkpoint(FIRST)
    mask_id = model.config.mask_id
    for name, given_text, wanted in (("prefix", prefix, prefix),
                                     ("text", f"{before}[MASK:2]{after}", before + after)):
        if name == "text" and "[MASK" in before + after:
            continue
        bad = any("\ud800" <= c <= "\udfff" for c in given_text)
        try:
            args = sample.parse([f"--{name}={given_text}"])
        except SystemExit as stop:
            assert bad and stop.code == 2
            continue
        assert not bad
        try:
            x = sample.starting_tokens(args, model, BYTE)[0].tolist()
        except ValueError as error:
            assert "leave nothing to write" in str(error) or "context" in str(error)
            continue
        given_tokens = [token for token in x if token != mask_id]
        assert BYTE.decode_bytes(given_tokens).decode() == wanted


def test_a_template_of_the_structured_experiment_too():
    for text in ("שלום\0 😀 <|endoftext|>", "\ud800"):
        try:
            x, _ = parse_template(text + "[digits:1]", BYTE, 257)
        except ValueError:
            assert text == "\ud800"
        else:
            assert BYTE.decode_bytes(x[x != 257].tolist()).decode() == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 257), max_size=40), st.booleans())
def test_what_a_model_writes_cannot_drive_the_terminal(ids, whole):
    text = "".join(piece or "" for piece in sample.token_texts(ids, BYTE, 257, whole))
    assert all(c.isprintable() or c in "\n\t" for c in text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(ANY_TEXT | st.sampled_from(["</script><script>alert(1)</script>", "<!--", "]]>", "\u2028"]),
                min_size=1))
def test_no_text_gets_out_of_its_place_in_the_page(texts):
    row = list(range(len(texts)))
    html = page([{"step": 0, "tokens": [row], "texts": [texts], "probability": [[1.0] * len(row)]}])
    plain = page([{"step": 0, "tokens": [[0]], "texts": [["x"]], "probability": [[1.0]]}])
    assert html.count("<") == plain.count("<")  # no markup but the page's own
    found = json.loads(re.search(r'id="frames">(.*?)</script>', html, re.S)[1])
    assert found[0]["texts"] == [texts]


def test_score_reads_a_file_as_it_is(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\rthree\n" * 10)
    assert sample.main(["--checkpoint", str(FIRST), "--score", str(tmp_path / "text.txt")]) == 0
    assert "of 150 tokens" in capsys.readouterr().out
    for content in (b"", b"\xff"):
        (tmp_path / "text.txt").write_bytes(content)
        assert sample.main(["--checkpoint", str(FIRST), "--score", str(tmp_path / "text.txt")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
