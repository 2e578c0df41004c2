"""What the user did wrong, or what the machine lacks: never a traceback."""

from __future__ import annotations

import sys


class UserError(Exception):
    """One line that says what is wrong and how to mend it; `status` becomes the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
        self._said = False

    def say(self) -> None:
        """Print the line on stderr, once: now where a manager is to find it before something ends, else at the end."""
        if not self._said:
            print(f"nvmove: {self}", file=sys.stderr, flush=True)
            self._said = True
