"""Everything to know about this repository on a GPU, in a quarter of an hour: make gpu

In this order, the most important first:

    proofs        pytest -m gpu: what the tests prove on a CPU holds on this device, too
    ceilings      what matrix products and copies reach here
    training      bench.training at GPT-2's shape: masked, full and gpt
    gpt2          configs/gpt2-15min.toml, cut to four minutes, and what it then writes
    sampling      bench.sampling at GPT-2's shape, against the twin with its cache
    small models  configs/quickstart.toml and shakespeare.toml, to their end
    small steps   bench.training with fewer rows

Each part but the ceilings is a process of its own: if it fails or takes too long, the others go on.
No network is needed; data that isn't there is named, and what needs it is left out.

All output stays in out/gpu: results.json, and results.md with rows for bench/RESULTS.md. --smoke
does the same in tiny sizes on any machine, in three minutes, to try this script.
"""

import argparse
import json
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from plumbing.command import command
from plumbing.config import Parser
from plumbing.machine import choose_device, choose_dtype, device_name, matmul_ceiling

OUT = Path("out/gpu")
SHORT = "--steps 1300 --warmup-steps 100"  # of gpt2-15min: to its end, 204 s on an H100
TINY = ("--n-layer 2 --n-head 2 --n-embd 32 --context-length 64 --batch-size 8 "
        "--micro-batch-size 4 --steps 30 --log-interval 10 --eval-interval 15 --eval-rows 8 "
        "--final-eval-rows 16")


class Report:
    """What was found: rows for people, results for programs. Written anew after each part."""

    def __init__(self, machine: str, seconds: float):
        self.machine = machine
        self.deadline = time.monotonic() + seconds
        self.rows: list[tuple[str, str]] = []
        self.results: dict[str, object] = {}
        OUT.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, found: str, result: object = None) -> None:
        self.rows.append((what, found))
        self.results[what] = result
        print(f"{what}\n    {found}", flush=True)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True).stdout.strip()
        lines = [f"## {self.machine}", "", "| date | commit | command | numbers |",
                 "|---|---|---|---|"]
        for what, found in self.rows:
            found = found.replace("|", "/").replace("\n", " ")
            lines.append(f"| {date.today()} | {commit or '-'} | `{what}` | {found} |")
        (OUT / "results.md").write_text("\n".join(lines) + "\n")
        everything = {"machine": self.machine, "commit": commit, "parts": self.results}
        (OUT / "results.json").write_text(json.dumps(everything, indent=1) + "\n")

    def run(self, name: str, arguments: str, seconds: float) -> tuple[str, str]:
        """`python arguments`, for so long at most: (its stdout, what went wrong or "").

        All that it prints goes to OUT/name.txt.
        """
        seconds = min(seconds, self.deadline - time.monotonic())
        if seconds < 5:
            return "", "no time was left"
        path = OUT / f"{name}.txt"
        with open(path, "w+") as file:
            process = subprocess.Popen([sys.executable, *shlex.split(arguments)], stdout=file,
                                       stderr=open(OUT / f"{name}.err", "w"))
            try:
                code = process.wait(seconds)
                problem = f"exit code {code}: see {OUT / name}.err" if code else ""
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                problem = f"stopped after {seconds:.0f} s"
        return path.read_text(), problem


def json_line(stdout: str) -> dict:
    """The line of JSON with which every bench ends; {} if it didn't get so far."""
    lines = [line for line in stdout.splitlines() if line[:1] + line[-1:] == "{}"]
    return json.loads(lines[-1]) if lines else {}


# --- The parts ------------------------------------------------------------------------------------


def proofs(report: Report) -> None:
    what = "-m pytest -m gpu tests/proofs/test_device.py"
    stdout, problem = report.run("proofs", what, seconds=150)
    verdicts = [line for line in stdout.splitlines() if " passed" in line or " failed" in line]
    report.add(f"python {what}", verdicts[-1].strip(" =") if verdicts else problem)


def ceilings(report: Report, device: torch.device) -> None:
    dtype = choose_dtype("auto", device)
    flops = matmul_ceiling(device, dtype)
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)  # 1 GB or 64 MB
    target = source.clone()
    copied = 0.0  # bytes per second
    for _ in range(10):
        target[0].item()  # waits for the device
        started = time.perf_counter()
        target.copy_(source)
        target[0].item()
        copied = max(copied, 2 * source.nbytes / (time.perf_counter() - started))
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the parts below want it
    report.add("python -m bench.gpu", f"{dtype} matrix products {flops / 1e12:,.1f} TFLOP/s; "
               f"copies {copied / 1e9:,.0f} GB/s, reads and writes counted",
               {"flops": flops, "bytes_per_second": copied})


def training(report: Report, runs: list[tuple[str, int]], smoke: bool) -> None:
    turns = "--repeats 4 --warm-up 1"
    if smoke:
        turns = "--repeats 2 --warm-up 1 --context-length 64 --n-embd 64 --vocab-size 512"
    for way, rows in runs:
        what = f"-m bench.training --shape gpt2 --ways {way} --rows {rows} {turns}"
        if (way, rows) == runs[0]:
            what += f" --profile {OUT / f'profile-{way}-{rows}.txt'}"
        stdout, problem = report.run(f"training-{way}-{rows}", what, seconds=90)
        result = json_line(stdout)
        if result:
            row = result["ways"][way]
            memory = f"; peak memory {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
            problem = (f"{row['tokens_per_second']:,} tokens/s (spread {row['spread']:.1%}), "
                       f"{row['mfu']:.1%} MFU of {result['ceiling_gflops'] / 1e3:,.1f} TFLOP/s, "
                       f"optimizer {row['optimizer_share']:.1%}{memory}")
        report.add(f"python {what}", problem, result)


def train(report: Report, config: str, data_dir: str, flags: str, seconds: float) -> None:
    """Train for so long at most, then write four texts."""
    name = Path(config).stem
    out_dir = OUT / name
    what = f"train.py {config} --data-dir {data_dir} {flags}".strip()
    if not Path(data_dir, "meta.json").exists():
        report.add(f"python {what}", f"left out: no {data_dir}; the config's header says how to "
                   "make it")
        return
    shutil.rmtree(out_dir, ignore_errors=True)  # an earlier run's
    watch = watch_gpu(OUT / f"{name}-utilization.txt")
    _, problem = report.run(name, f"{what} --out-dir {out_dir} --max-minutes {seconds / 60}",
                            seconds + 60)
    log = out_dir / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = [line for line in lines if "loss" in line]
    found = [problem] if problem else []
    if steps:
        last = steps[-1]
        speed = statistics.median(line["tokens_per_second"] for line in steps[1:] or steps)
        found.append(f"{last['step']} steps in {last['seconds']:.0f} s, {speed:,.0f} tokens/s, "
                     f"loss {last['loss']:.3f}")
    # The last step is measured twice, at last on more rows.
    for step, line in {line["step"]: line for line in lines if "nats" in line}.items():
        found.append(f"after {step} steps <= {line['bits_per_byte']:.3f} bits/byte "
                     f"({line['nats']:.3f} nats a token)")
    if watch is not None:
        found.append(f"the GPU is busy for {busy_fraction(*watch):.0%} of the time")
    report.add(f"python {what}", "; ".join(found), lines)
    if steps:
        device = choose_device("auto").type
        what = f"sample.py --checkpoint {out_dir} --num-samples 4 --temperature 0.7 --steps 64"
        texts, problem = report.run(f"{name}-samples", f"{what} --device {device}", seconds=60)
        report.add(f"python {what}", problem or texts[:300], texts.split("\n---\n"))


def watch_gpu(path: Path) -> tuple[subprocess.Popen, Path] | None:
    """Let nvidia-smi note, twice a second, how long the GPU was at work; None without it."""
    try:
        return subprocess.Popen(["nvidia-smi", "--query-gpu=utilization.gpu", "-lms", "500",
                                 "--format=csv,noheader,nounits"], stdout=open(path, "w")), path
    except OSError:
        return None


def busy_fraction(process: subprocess.Popen, path: Path) -> float:
    """Of the run's second half, in which nothing compiles."""
    process.terminate()
    process.wait()
    samples = [float(word) for word in path.read_text().split() if word.isdigit()]
    return statistics.fmean(samples[len(samples) // 2 :] or [0]) / 100


def sampling(report: Report, smoke: bool) -> None:
    what = "-m bench.sampling --shape gpt2 --batch-sizes 1 16 --steps 16 64 256 --repeats 2"
    if smoke:
        what = "-m bench.sampling --shape bytes --batch-sizes 1 --steps 4 --repeats 1"
    what += " --without 'gpt, uncached' straightforward 'straightforward, eager'"
    what += "" if smoke else " 'denoise, confidence'"  # they take their time to compile
    stdout, problem = report.run("sampling", what, seconds=240)
    rows = json_line(stdout).get("rows", [])
    for batch in sorted({row["batch"] for row in rows}):
        found = [f"{row['way']}, {row['calls']} calls {row['tokens_per_second']:,.0f}"
                 for row in rows if row["batch"] == batch]
        report.add(f"python {what}", f"batch {batch}, tokens/s: " + "; ".join(found), rows)
    if not rows:
        report.add(f"python {what}", problem)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.gpu", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=16.0, help="for all parts together (default: 16)")
    add("--data-dir", default="data/fineweb-edu", help="GPT-2's tokens, for the part gpt2")
    add("--smoke", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args(arguments)
    if not 0 < args.minutes < 1e4:
        parser.error(f"--minutes must be above 0, not {args.minutes}")
    args.device = choose_device("auto")
    if args.device.type != "cuda" and not args.smoke:
        parser.error("PyTorch sees no GPU here; --smoke tries this script without one")
    return args


@command("bench.gpu")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    machine = (f"{device_name(args.device)}, Python {platform.python_version()}, "
               f"PyTorch {torch.__version__}")
    print(machine, flush=True)
    report = Report(machine, 60 * args.minutes)
    data = {"gpt2-15min": args.data_dir, "quickstart": "data/sotu",
            "shakespeare": "data/shakespeare"}
    if args.smoke:  # this repository's own prose has to do
        data = dict.fromkeys(data, str(OUT / "data"))
        how = f"--tokenizer byte --out-dir {OUT / 'data'}"
        report.run("data", f"prepare_data.py docs/guide.md {how}", 60)
    proofs(report)
    ceilings(report, args.device)
    ways = [("masked", 32), ("gpt", 32), ("full", 32), ("masked", 64)]
    training(report, [("masked", 2), ("gpt", 2)] if args.smoke else ways, args.smoke)
    for name, data_dir in data.items():
        flags = SHORT if name == "gpt2-15min" else ""
        train(report, f"configs/{name}.toml", data_dir, TINY if args.smoke else flags, seconds=240)
        if name == "gpt2-15min":
            sampling(report, args.smoke)
    if not args.smoke:
        training(report, [("masked", 16), ("masked", 8)], args.smoke)
    print(f"\n{OUT / 'results.md'} has rows for bench/RESULTS.md, {OUT / 'results.json'} the rest")


if __name__ == "__main__":
    sys.exit(main())
