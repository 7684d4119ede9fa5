"""Whatever stops a command: what it has not finished vanishes, and so do its workers."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
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


@contextlib.contextmanager
def workers_end() -> Iterator[None]:
    """After an error nobody waits for a worker, which may be waiting for one that was killed."""
    try:
        yield
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise


def end_with_parent() -> None:
    """In a worker: it ends when its parent ends it, or has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
