"""What a user gets wrong: one line that names the value and the fix, exit code 2, nothing done."""

import importlib

import pytest

COMMANDS = [
    ("bench.training", "--shape=huge", "invalid choice: 'huge'"),
    ("bench.training", "--repeats=0", "--repeats, --rows and --steps-per-turn must be at least 1"),
    ("bench.training", "--device=mps", "device mps is not available"),
    ("bench.gpu", "--minutes=0", "--minutes must be above 0, not 0.0"),
    ("bench.sampling", "--steps 0", "every number must be at least 1, not 0"),
    ("bench.transformers_baseline", "--rows=0", "must be at least 1"),
    ("bench.transformers_baseline", "--mlm-probability=1.5", "must be in (0, 1], not 1.5"),
    ("sampling", "", "required: question"),
    ("sampling", "speed", "invalid choice: 'speed'"),
    ("sampling", "temperature --num-samples=1", "must be at least 2, not 1"),
    ("sampling", "temperature --data-dir=nowhere", "no nowhere/meta.json"),
    ("sampling", "steps --checkpoint=nowhere", "nowhere/model.safetensors does not exist"),
    ("sampling", "orders --judge=nowhere", "--objective autoregressive --out-dir nowhere"),
    ("sampling", "methods --judge=run", "run is no autoregressive twin of run"),
    ("sampling", "methods --checkpoint=twin", "twin is autoregressive: it never sees hidden text"),
    ("training", "speed", "invalid choice: 'speed'"),
    ("training", "masking --steps=0", "must be at least 1, not 0"),
    ("training", "repetition --data-dir=nowhere", "run prepare_data.py"),
    ("prices", "--checkpoint nowhere", "nowhere/model.safetensors does not exist"),
    ("prices", "--num-samples=1", "must be at least 2, not 1"),
    ("words", "data/sotu-bytes", "required: file"),
    ("words", "data/sotu-bytes nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    ("words", "data/sotu-bytes run/model.safetensors", "run/model.safetensors is not UTF-8 text"),
    ("staircase", "--checkpoint=run", "run has no curve of the loss by mask ratio"),
    ("masking", "--checkpoint=twin", "is autoregressive: it never sees hidden text"),
    ("masking", "--rows=1", "must be at least 2, not 1"),
    ("layers", "--text=fox", "has no hole"),
    ("layers", "--checkpoint=twin", "is autoregressive: it never sees hidden text"),
    ("guidance", "--judge=twin", "train.bin has 1 documents, too few"),
    ("guidance", f"--judge=twin --prefix={'x' * 64}", "--prefix has 64 tokens, as many as a text"),
    ("domain", "--source=nowhere --data-dir=new", "no Python files in nowhere"),
    ("proof_corpus", "--tokens=0", "must be at least 5, not 0"),
    ("proof_corpus", "--tokens=many", "invalid number value: 'many'"),
    ("structured", "--num-samples=0", "must be at least 1, not 0"),
    ("structured", "--template=[digits:2] --order=best", "order must be random or"),
    ("structured", "--template=In:[wrd:May|June]", "[wrd:May|June] is no hole"),
    ("structured", "--template=[MASK:3][digits:x]", "[digits:x] is no hole"),
    ("structured", "--template=In[May]", "the template has no holes"),
    ("denoising", "steps.jsonl", "required: PICTURE.svg"),
    ("denoising", "nowhere.jsonl picture.svg", "No such file"),
    ("roberta_start", "--steps=0", "argument --steps: must be at least 1, not 0"),
    ("roberta_start", "--data-dir=nowhere", "run prepare_data.py"),
    ("roberta_start", "--checkpoint=nowhere", "No such file or directory: 'nowhere/config.json'"),
]
READ_A_CHECKPOINT = ("sampling", "masking", "layers", "guidance", "structured")


def refusal(script, arguments: list[str], capsys) -> str:
    """The one line that a mistake gets."""
    try:
        code = script.main(arguments)
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith(script.__name__), error
    return error


@pytest.mark.parametrize("name, flags, says", COMMANDS)
def test_a_mistake_gets_one_line(name, flags, says, workplace, started, capsys):
    arguments = flags.split()
    if name in READ_A_CHECKPOINT and "--checkpoint" not in flags:
        arguments.append("--checkpoint=run")
    if name == "sampling" and "--judge" not in flags:
        arguments.append("--judge=twin")
    script = importlib.import_module(name if "." in name else f"experiments.{name}")
    assert says in refusal(script, arguments, capsys)
    assert not started


@pytest.mark.parametrize("content", ["", "{", "{}\n", '{"tokens": 3}\n', "[1]\n"])
def test_a_file_that_is_no_record_of_steps_gets_one_line(content, workplace, capsys):
    (workplace / "bad.jsonl").write_text(content)
    script = importlib.import_module("experiments.denoising")
    error = refusal(script, ["bad.jsonl", "picture.svg"], capsys)
    assert "bad.jsonl is not what sample.py --jsonl writes" in error
    assert not (workplace / "picture.svg").exists()


@pytest.mark.parametrize("name, flags, says", [
    ("bench.transformers_baseline", "", "pip install transformers"),
])
def test_a_missing_package_is_named_before_the_work(name, flags, says, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert says in refusal(script, flags.split(), capsys)
