"""What the user did wrong, or what the machine lacks: never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """One line that says what is wrong and how to mend it; `status` becomes the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
