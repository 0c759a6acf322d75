"""`python -m attnopt` is the `attnopt` command."""

from __future__ import annotations

import sys

from attnopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
