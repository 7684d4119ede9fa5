"""One place that turns errors into lines: every command of this repository ends here.

Exit codes: 0 done; 2 a mistake of the user's, which has changed nothing; 1 a failure at run time (a
full disk, a loss that is NaN, a lost process); 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP. If the reader
of the output leaves, as `| head` does, the command ends quietly. A bug keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable

from plumbing.terminal import open_screen, put


class Mistake(Exception):
    """Something that the user can put right; the message is one line that names it and the fix."""


def command(prog: str, *mistakes: type[Exception]) -> Callable:
    """Decorate `main(arguments) -> exit code`. `mistakes`: further errors that are the user's."""

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(arguments: list[str] | None = None) -> int:
            open_screen()
            try:
                code = main(sys.argv[1:] if arguments is None else arguments) or 0
                sys.stdout.flush()  # here one can still say so if that fails
                return code
            except BrokenPipeError:
                return 0
            except (Mistake, *mistakes) as error:
                code, message = 2, str(error)
            except (FloatingPointError, OSError) as error:  # diverged, disk full
                code, message = 1, str(error)
            except (MemoryError, RuntimeError) as error:
                code, message = 1, explain(error)
                if message is None:
                    raise
            except KeyboardInterrupt:
                code, message = 130, "stopped"
            finally:
                put("", end="")  # or Python would complain at exit about what it could not flush
            put(f"{prog}: {message}", screen="stderr")
            return code

        return wrapped

    return decorate


def explain(error: Exception) -> str | None:
    """One line for a failure of the machine; None for what can only be a bug."""
    if isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error):
        return f"out of memory: try fewer rows: --micro-batch-size, --num-samples ({error!r:.200})"
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        return f"a process of this run was lost, go on with --resume ({error!r:.200})"
    return None
