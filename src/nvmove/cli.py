"""The `nvmove` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line in `sys.argv`; return the exit status."""
    print("nvmove: nothing here yet", file=sys.stderr)
    return 2
