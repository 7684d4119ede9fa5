"""Whatever stops a command: what it has not finished vanishes, and so do its workers."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def unfinished(out_dir: Path) -> Iterator[Path]:
    """A folder that vanishes, whatever happens: a mistake, a full disk, Ctrl-C, SIGTERM, SIGHUP."""
    for stale in out_dir.glob(".unfinished-*"):  # of a kill -9
        shutil.rmtree(stale, ignore_errors=True)
    owner = os.getpid()

    def stop(number: int, frame) -> None:
        if os.getpid() != owner:  # a worker that was forked a moment ago
            os._exit(1)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    names = {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal))  # Windows has no SIGHUP
    numbers = {getattr(signal, name) for name in names}
    handlers = {number: signal.signal(number, stop) for number in numbers
                if signal.getsignal(number) != signal.SIG_IGN}  # as nohup does
    try:  # inside out_dir, because a rename is atomic only within one file system
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out_dir) as folder:
            yield Path(folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def work(pipe, others: list, function: Callable, shared) -> None:
    """A worker's life: it ends when its parent has ended, or ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    for other in others:  # or nobody would see that the parent's end was closed
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send([function(shared, item) for item in pipe.recv()])


def in_parallel(function: Callable, shared, items: Iterator) -> Iterator:
    """function(shared, item) of every item, in order, by a process on each core.

    Each has a pipe of its own: if one is killed, that pipe ends, in the middle of a result, too.
    ChildProcessError then. (A pool waits for ever.)
    """
    pipes = []
    workers = []
    try:
        for _ in range(os.cpu_count() or 1):
            ours, theirs = multiprocessing.Pipe()
            pipes.append(ours)
            worker = multiprocessing.Process(target=work, args=(theirs, pipes, function, shared))
            worker.start()
            workers.append(worker)
            theirs.close()
        waiting = collections.deque()  # whose results are next; each works on one batch
        batches = iter(lambda: list(itertools.islice(items, 8)), [])
        for pipe, batch in zip(pipes, batches, strict=False):
            pipe.send(batch)
            waiting.append(pipe)
        while waiting:
            pipe = waiting.popleft()
            results = pipe.recv()
            if batch := next(batches, None):
                pipe.send(batch)
                waiting.append(pipe)
            yield from results
    except (EOFError, ConnectionError):
        raise ChildProcessError("a process was killed that worked for this one, maybe as memory "
                                "ran out; run again") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
