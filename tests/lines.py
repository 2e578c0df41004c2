"""A device's interrupt lines."""

from __future__ import annotations


class Lines:
    """The interrupt lines, and what was sent over them."""

    def __init__(self, msix: bool = True) -> None:
        self.msix_enabled = msix
        self.signals: list[int] = []
        self.level = False

    @property
    def uses_pin(self) -> bool:
        return not self.msix_enabled

    def signal(self, vector: int) -> None:
        self.signals.append(vector)

    def set_level(self, asserted: bool) -> None:
        self.level = asserted

    def up(self) -> bool:
        """Whether the INTx pin is asserted."""
        return self.level
