"""What one trusts and skips: files, devices, terminals. The idea is in the five files above."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (make runs this file first, with whatever Python)
    sys.stderr.write("this needs Python 3.11 or later, as in: make quickstart PYTHON=python3.12\n")
    sys.exit(2)
