"""Nothing is believed: every file that is read may come from a stranger, every text from anywhere.

A reader meets thousands of broken files. It reads a file or refuses it with its own error, one
printable line; any other exception fails the test, and so does a file that takes much memory. Files
with a right digest are broken too: behind the digest everything else must still hold.
"""

import copy
import hashlib
import json
import random
import re
import sys
import types
import unittest.mock
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import sample
import train
from diffusion import Bound
from experiments import denoising
from experiments.structured import parse as parse_template
from plumbing import checkpoint
from plumbing.checkpoint import CheckpointError, load_checkpoint, read_tensors, write_tensors
from plumbing.config import ConfigError, load
from plumbing.corpora import hugging_face
from plumbing.terminal import harmless
from plumbing.text import token_texts
from prepare_data import DataError, TokenFile, get_tokenizer

ROOT = Path(__file__).parents[2]
FIRST = ROOT / "tests/fixtures/first"  # a tiny checkpoint
STATUS = Path("/proc/self/status")
LONG = [pytest.param(2500, seed, id=f"long {seed}", marks=pytest.mark.reliability)
        for seed in (1, 2, 3, 4)]
MANY = [pytest.param(200, 0, id="short"), *LONG]  # how many inputs, the seed of their mutations


class Peak:
    """The most memory, in MB, that this process took inside a `with`; 0 where nobody can tell."""

    def __enter__(self):
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
            self.before = self.now()
        return self

    def now(self) -> float:
        return int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1]) / 1000

    def __exit__(self, *_):
        self.grown = self.now() - self.before if STATUS.exists() else 0.0


PIECES = (b"9" * 20, b"-1", b"1e999", b"NaN", b"[" * 3000, b"\x1b[31m", b"\n", b"\0", b"null", b'"',
          b"{}", b"../../evil", b"\xed\xa0\x80")


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four accidents or attacks: bits, bytes, huge numbers, pieces cut out or repeated."""
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
    try:
        read()
    except error as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 500, str(refusal)
        return True
    return False


def fuzz(number: int, seed: int, read, write, data: bytes, error: type[Exception]) -> str:
    """Give `read` what `write` makes of `number` mutations of `data`; returns what came of it."""
    chance = random.Random(seed)
    refusals = 0
    write(data)
    assert not refused(read, error)
    with Peak() as peak:
        for _ in range(number):
            write(mutate(data, chance))
            refusals += refused(read, error)
    assert peak.grown < 64 and refusals > number // 10
    return (f"{number:,} inputs of {len(data):,} bytes, {refusals:,} refused, the rest read; "
            f"memory grew by {peak.grown:.1f} MB")


# ---- checkpoints ---------------------------------------------------------------------------------

MODEL = (FIRST / "model.safetensors").read_bytes()
DATA_START = 8 + int.from_bytes(MODEL[:8], "little")
HEADER = MODEL[8:DATA_START]


def use(folder: Path) -> None:
    """Load a checkpoint, and write a little with it, in each of the ways that read its info."""
    load_checkpoint(folder)
    for options in (["--steps", "2"], ["--steps", "2", "--schedule", "optimal"]):
        assert sample.main(["--checkpoint", str(folder), "--length", "4", *options]) in (0, 2)


@pytest.fixture(scope="module", autouse=True)
def warm():
    use(FIRST)  # what is imported on first use is not the files' doing


@pytest.mark.parametrize("number, seed", MANY)
def test_a_checkpoint_of_any_bytes_is_refused_or_is_the_checkpoint(tmp_path, number, seed, figure):
    path = tmp_path / "model.safetensors"
    original, _ = load_checkpoint(FIRST)

    def read():
        model, _ = load_checkpoint(tmp_path)
        assert all(map(torch.equal, model.parameters(), original.parameters()))

    figure(f"{path.name}: " + fuzz(number, seed, read, path.write_bytes, MODEL, CheckpointError))


def with_header(header: bytes, length: int | None = None) -> bytes:
    """The file of the first checkpoint with another header, which may lie about its length."""
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + MODEL[DATA_START:]


@pytest.mark.parametrize("number, seed", MANY)
def test_a_broken_header_is_refused_behind_the_digest_too(tmp_path, monkeypatch, number, seed,
                                                          figure):
    path = tmp_path / "model.safetensors"
    right = json.loads(HEADER)["__metadata__"]["digest"]
    monkeypatch.setattr(checkpoint, "digest", lambda tensors, info_text: right)  # any will do
    counted = fuzz(number, seed, lambda: load_checkpoint(tmp_path),
                   lambda header: path.write_bytes(with_header(header)), HEADER, CheckpointError)
    figure(f"the header of {path.name}, any digest being right: {counted}")


def lie(name: str = "blocks.0.up.weight", **claims) -> bytes:
    """About one tensor, of which the truth would be F32, [8, 2], [2624, 2688]; or about another."""
    header = json.loads(HEADER)
    header[name] = header.get(name, {"dtype": "F32"}) | claims
    return with_header(json.dumps(header).encode())


LIES = {
    "a header of 2^64 bytes": with_header(HEADER, 2**64 - 1),
    "a header longer than the file": with_header(HEADER, 2**20),
    "a header that ends early": with_header(HEADER, 1000),
    "a header that is too long": with_header(HEADER + b" " * 2**19),
    "no header": with_header(b""),
    "not even a length": b"\1\2\3",
    "lists in lists": with_header(b"[" * 500_000),
    "objects in objects": with_header(b'{"a":' * 10**5),
    "170,000 objects": with_header(b"[" + b"{}," * 170_000),
    "metadata twice": with_header(HEADER.replace(b"{", b'{"__metadata__":{},', 1)),
    "a tensor twice": with_header(HEADER.replace(b"blocks.0.down", b"blocks.0.up")),
    "not UTF-8": with_header(HEADER.replace(b"blocks.0.up", b"blocks.0.\xff")),
    "UTF-16": with_header(HEADER.decode().encode("utf-16")),
    "half a surrogate pair": with_header(HEADER.replace(b'"2"', b'"\\ud800"')),
    "an integer of 4,000 digits": with_header(HEADER.replace(b"[8, 2]", b"[8%s]" % (b"0" * 4000))),
    "an integer of 10^5 digits": with_header(HEADER.replace(b"[8, 2]", b"[8%s]" % (b"0" * 10**5))),
    **{f"shape {shape!r:.30}": lie(shape=shape) for shape in (
        [2**31, 2**31], [10**12], [0, 2**62], [2**62, 0], [-8, -2], [True, 16], [16.0], [8],
        [8, 2, 2], [8, 2] + [1] * 7, [999] * 90_000, ["8", 2], [[8, 2]], "", {}, None, 16)},
    **{f"offsets {offsets!r:.30}": lie(data_offsets=offsets) for offsets in (
        [2560, 2624], [2632, 2696], [2624, 2680], [2624, 10**12], [2688, 2624], [-64, 0],
        [2624.0, 2688], [2624], [], "", None)},
    "a tensor that is nowhere": lie("extra", shape=[0], data_offsets=[2760, 2760]),
    "an empty tensor that is not small": lie("extra", shape=[0, 2**62], data_offsets=[2752, 2752]),
    "a tensor behind the end": lie("extra", shape=[480], data_offsets=[2752, 4672]),
    "a tensor of the disk's size": lie("extra", shape=[10**12], data_offsets=[2752, 4 * 10**12]),
    **{f"dtype {dtype!r}": lie(dtype=dtype) for dtype in ("F16", "F64", "\x1b[2J", None, [])},
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_before_memory_is_taken_for_it(tmp_path, monkeypatch, data):
    monkeypatch.setattr(checkpoint, "digest", lambda *_: pytest.fail("the tensors were read"))
    (tmp_path / "model.safetensors").write_bytes(data)
    with Peak() as peak:
        assert refused(lambda: load_checkpoint(tmp_path), CheckpointError)
    assert peak.grown < 64


@pytest.mark.parametrize("claim", [
    {name: size} for name in ("n_layer", "n_embd", "n_head", "context_length", "vocab_size")
    for size in (10**9, 10**400, float("nan"), [], json.loads("[" * 900 + "]" * 900))
], ids=lambda claim: f"{claim!r:.30}")
def test_a_network_that_the_file_does_not_hold_is_refused(tmp_path, claim):
    tensors, info = read_tensors(FIRST / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", tensors, info | {"model": info["model"] | claim})
    with Peak() as peak:
        assert refused(lambda: load_checkpoint(tmp_path), CheckpointError)
    assert peak.grown < 64


def test_the_largest_header_takes_little_memory(tmp_path):
    info = read_tensors(FIRST / "model.safetensors")[1]
    info["model"]["n_layer"] = 2000
    tensors = {str(i): torch.zeros(0) for i in range(8000)}
    write_tensors(tmp_path / "model.safetensors", tensors, info)
    with Peak() as peak:
        assert refused(lambda: load_checkpoint(tmp_path), CheckpointError)
    assert peak.grown < 64


JUNK = (None, True, -1, 0, 1, 2, 3, 257, 2**24, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308,
        float("nan"), float("inf"), "", "byte", "gpt2", "../../../etc/passwd", "\x1b[2J", "a\nb",
        "\ud800", [], {}, [[]], [1, 2], {"a": 1})


def change(value, chance: random.Random):
    """JSON that is changed, or misses something, somewhere."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return copy.deepcopy(chance.choice(JUNK))
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match chance.randrange(6):
        case 0:
            del value[key]
        case 1:
            value[key] = copy.deepcopy(chance.choice(JUNK))
        case _:
            value[key] = change(value[key], chance)
    return value


def change_tensors(tensors: dict, chance: random.Random) -> dict:
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    match chance.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.to(chance.choice(list(checkpoint.DTYPES.values())))
        case 2:
            tensors[name] = tensor.flatten()[: chance.randrange(2)]
        case 3:
            tensors[name] = tensor.t() if tensor.dim() == 2 else tensor[None]
        case 4:
            tensors[name] = tensor.flatten()[:1].expand(2 ** chance.choice((1, 8, 16)))
        case 5:
            tensors[name] = tensor * float(chance.choice(("nan", "inf", "1e38", "0")))
        case 6:
            tensors[chance.choice(("extra", "\x1b[2J", "", "a\nb"))] = tensor
    return tensors


def write_lies(path: Path, chance: random.Random) -> None:
    """The file of that name of the first checkpoint, changed in one place, with a right digest."""
    tensors, info = read_tensors(FIRST / path.name)
    if chance.random() < 0.6:
        info = change(info, chance)
    else:
        tensors = change_tensors(tensors, chance)
    write_tensors(path, tensors, info)


@pytest.mark.parametrize("number, seed", MANY)
def test_a_checkpoint_that_lies_with_a_right_digest_is_refused_or_usable(tmp_path, capsys, number,
                                                                         seed, figure):
    chance = random.Random(seed)
    refusals = 0
    with Peak() as peak:
        for _ in range(number):
            write_lies(tmp_path / "model.safetensors", chance)
            refusals += refused(lambda: use(tmp_path), CheckpointError)
            assert all(line.startswith(("sample.py: ", "note: ")) or "new tokens in" in line
                       for line in capsys.readouterr().err.splitlines())
    figure(f"model.safetensors behind its digest: {number:,} inputs, {refusals:,} refused, the "
           f"rest used; memory grew by {peak.grown:.1f} MB")
    assert peak.grown < 64 and number // 10 < refusals < number


@pytest.mark.parametrize("number, seed", MANY)
def test_a_state_that_lies_with_a_right_digest_is_refused_or_goes_on(tmp_path, data, capsys,
                                                                     monkeypatch, number, seed,
                                                                     figure):
    monkeypatch.setattr(train, "evaluate", lambda *rest, **named: Bound(1.0, 0.1, None))
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    chance = random.Random(seed)
    codes = []
    cfg = json.loads((FIRST / "config.json").read_text())
    cfg |= {"data_dir": data, "out_dir": out_dir, "resume": True, "max_steps": None}
    flags = [f"--{name}={value}" for name, value in cfg.items() if value is not None]
    for _ in range(number):
        write_lies(out_dir / "state.safetensors", chance)
        (out_dir / "log.jsonl").write_bytes((FIRST / "log.jsonl").read_bytes())
        codes.append(train.main(flags))
        errors = capsys.readouterr().err
        assert codes[-1] in (0, 1, 2) and errors.isprintable() or errors.count("\n") == 1, errors
    figure(f"state.safetensors behind its digest: {number:,} inputs, "
           f"{number - codes.count(0):,} refused")
    assert codes.count(2) > number // 10 and codes.count(0)


def test_a_path_for_a_tokenizer_leads_nowhere(tmp_path, capsys):
    tensors, info = read_tensors(FIRST / "model.safetensors")
    for tokenizer, says in (("../../evil", "unknown tokenizer '../../evil'"), ("gpt2", "")):
        write_tensors(tmp_path / "model.safetensors", tensors, info | {"tokenizer": tokenizer})
        assert sample.main(["--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error


# ---- datasets, steps, configurations -------------------------------------------------------------


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
            padded = mutated[:size].ljust(size, b"\0")
            (tmp_path / name).write_bytes(mutated if len(mutated) % 3 else padded)
    else:
        write = (tmp_path / name).write_bytes
    figure(f"{name}: " + fuzz(number, seed, lambda: read_data(tmp_path), write, content, DataError))


@pytest.mark.parametrize("number, seed", MANY)
def test_a_meta_json_that_lies_is_refused_or_read(tmp_path, data, number, seed, figure):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta = json.loads((data / "meta.json").read_text())
    chance = random.Random(seed)
    refusals = 0
    with Peak() as peak:
        for _ in range(number):
            (tmp_path / "meta.json").write_text(json.dumps(change(meta, chance)))
            refusals += refused(lambda: read_data(tmp_path), DataError)
    figure(f"meta.json, changed as JSON: {number:,} inputs, {refusals:,} refused; "
           f"memory grew by {peak.grown:.1f} MB")
    assert peak.grown < 64 and number // 10 < refusals < number


@pytest.mark.parametrize("content", [b"[" * 10**6, b" " * 10**7, b'{"a":' * 10**5, b"",
                                     b"[[],[]," * 10**6])
def test_a_gigantic_meta_json_is_refused_without_being_read_whole(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with Peak() as peak:
        assert refused(lambda: TokenFile(tmp_path, "train"), DataError)
    assert peak.grown < 16


@pytest.mark.parametrize("number, seed", MANY)
def test_steps_of_any_bytes_make_a_picture_or_one_line(tmp_path, number, seed, capsys, figure):
    steps = b"".join(json.dumps({"step": i, "tokens": [[i, 2, 3]], "texts": [["a", None, "c"]],
                                 "probability": [[0.5, 0, 1]]}).encode() + b"\n" for i in range(3))
    chance = random.Random(seed)
    codes = []
    for _ in range(number):
        (tmp_path / "steps.jsonl").write_bytes(mutate(steps, chance))
        try:
            codes.append(denoising.main([str(tmp_path / name)
                                         for name in ("steps.jsonl", "picture.svg")]))
        except SystemExit as stop:  # argparse's way to refuse
            codes.append(stop.code)
        assert codes[-1] in (0, 2) and capsys.readouterr().err.count("\n") == (codes[-1] == 2)
    figure(f"steps.jsonl: {number:,} inputs, {codes.count(2):,} refused")
    assert 0 < codes.count(2)


@pytest.mark.parametrize("number, seed", MANY)
def test_a_configuration_of_any_bytes_is_refused_or_read(tmp_path, number, seed, figure):
    path = tmp_path / "config.toml"
    data = (ROOT / "configs/quickstart.toml").read_bytes()
    figure("a .toml: " + fuzz(number, seed, lambda: load(train.TrainConfig, path),
                              path.write_bytes, data, ConfigError))


# ---- texts ---------------------------------------------------------------------------------------

BYTE = get_tokenizer("byte")
NASTY = st.sampled_from("\0\x1b\r\n\u202e😀\ud800")
ANY_TEXT = st.text(st.characters(exclude_categories=()) | NASTY)


def test_a_line_of_ten_megabytes_and_an_empty_file(tmp_path):
    text = ("<|endoftext|>שלום\0😀" * 400_000)[: 10**7]
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "empty.txt").touch()
    files = [str(tmp_path / name) for name in ("long.txt", "empty.txt")]
    command = [*files, "--tokenizer", "byte", "--out-dir", str(tmp_path / "out")]
    assert prepare_data.main(command) == 0
    tokens = [token for split in ("train", "val")
              for token in TokenFile(tmp_path / "out", split).tokens.tolist()]
    found = BYTE.decode_bytes([token for token in tokens if token != BYTE.eot_token])
    assert hashlib.sha256(found).digest() == hashlib.sha256(text.encode()).digest()


def test_bytes_that_are_no_text_are_refused_by_the_name_of_their_file(tmp_path, capsys):
    path = tmp_path / "bad.txt"
    for bad in (b"\xed\xa0\x80", b"\xff", b"\xc0\xaf", b"\xf4\x90\x80\x80"):  # first: a surrogate
        path.write_bytes(b"good " * 100 + bad + b" good" * 100)
        assert prepare_data.main([str(path), "--out-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "bad.txt is not UTF-8 text" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", [7, ["a"]])  # what is missing or broken is skipped
def test_a_document_that_is_no_text_is_refused_by_its_number(monkeypatch, text):
    rows = [{"text": "fine"}, {"text": text}]
    package = types.SimpleNamespace(load_dataset=lambda *names, **options: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(DataError, match="document 1 is not text") as refusal:
        list(hugging_face("some/corpus"))
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
            command = load(sample.Command, None, [f"--{name}={given_text}"])
        except ConfigError:
            assert bad
            continue
        assert not bad
        try:
            x = sample.starting_tokens(command, model, BYTE)[0].tolist()
        except ValueError as error:
            assert "nothing to write" in str(error) or "context" in str(error)
            continue
        given_tokens = [token for token in x if token != mask_id]
        assert BYTE.decode_bytes(given_tokens).decode() == wanted


def test_a_template_of_the_structured_experiment_too():
    for text in ("שלום\0 😀 <|endoftext|>", "\ud800"):
        try:
            [given], _, _ = parse_template(text + "[digits:1]", BYTE, 257)
        except ValueError:
            assert text == "\ud800"
        else:
            assert BYTE.decode_bytes(given).decode() == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 257), max_size=40), st.booleans())
def test_what_a_model_writes_cannot_drive_the_terminal(ids, whole):
    text = "".join(piece or "" for piece in token_texts(ids, BYTE, 257, whole))
    with unittest.mock.patch("sys.stdout.isatty", lambda: True):
        shown = harmless(text)
    assert all(c.isprintable() or c in "\r\n\t" or c > "\x9f" for c in shown)
    assert not re.search("\r(?!\n)|[\u202a-\u202e\u2066-\u2069]", shown)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(ANY_TEXT | st.sampled_from(["</text><script>alert(1)</script>", "<!--", "]]>",
                                            "\u2028", "&amp;"]), min_size=1))
def test_no_text_gets_out_of_its_place_in_the_picture(texts):
    probability = [[1.0] * len(texts)]
    hidden = {"texts": [[None] * len(texts)], "probability": probability}
    picture = denoising.picture([hidden, {"texts": [texts], "probability": probability}])
    svg = ElementTree.fromstring(picture.encode())
    shown = [title.tail for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert shown == [text.lstrip() for _, _, text in denoising.lay_out(texts) if text.strip()]
    tags = {element.tag.split("}")[1] for element in svg.iter()}
    assert tags <= {"svg", "style", "rect", "g", "animate", "text", "title"}  # the picture's own


def test_score_reads_a_file_as_it_is(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\rthree\n" * 10)
    assert sample.main(["--checkpoint", str(FIRST), "--score", str(tmp_path / "text.txt")]) == 0
    assert "of 150 tokens" in capsys.readouterr().out
    for content in (b"", b"\xff"):
        (tmp_path / "text.txt").write_bytes(content)
        assert sample.main(["--checkpoint", str(FIRST), "--score", str(tmp_path / "text.txt")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
