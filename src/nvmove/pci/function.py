"""What PCI sees of a function beside its registers: configuration space, interrupts, and the MSI-X table.

QEMU keeps BARs, COMMAND and the MSI-X table of its own and forgets them in a load. So a loaded state's part stays apart
(`image`, `table`), untouched by what QEMU writes meanwhile, until the function runs again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.state.vmsd import PciImage
from nvmove.pci.config import ConfigSpace
from nvmove.pci.interrupts import InterruptLines

_MSIX_ENTRY_RESET = bytes(12) + (1).to_bytes(4, "little")
"""A vector of the MSI-X table after reset: masked (PCIe Base 4.0 §7.7.2.3)."""


class PciFunction:
    """One function, for the client's thread and its owner's."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = ConfigSpace(config)
        self.layout = self._config.layout
        """Of BAR0."""
        self.lines = InterruptLines(config.msix_qsize, lambda: self._config.msix_enabled)
        self._vectors = config.msix_qsize
        self._lock = threading.Lock()
        """For configuration space and what was loaded."""
        self._table = _MSIX_ENTRY_RESET * config.msix_qsize
        self._loaded: PciImage | None = None

    # --- the client's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """Read configuration space."""
        return self._config.read(offset, count, self.lines.level)

    def write(self, offset: int, data: bytes) -> bool:
        """Write configuration space; return whether that asks for a function-level reset."""
        with self._lock:
            had_msix = self._config.msix_enabled
            wants_reset = self._config.write(offset, data)
            lost_msix = had_msix and not self._config.msix_enabled and self._loaded is None
        if lost_msix:
            self.lines.forget_pending()
        return wants_reset

    def reset(self) -> None:
        """Function-level reset."""
        with self._lock:
            self._config.reset()
            self._loaded = None
            self._table = _MSIX_ENTRY_RESET * self._vectors
        self.lines.reset()

    # --- the owner's side --------------------------------------------------------------------------------------------

    @property
    def config(self) -> bytes:
        """Configuration space as the guest left it; between a load and `resume`, as loaded."""
        with self._lock:
            return self._config.save() if self._loaded is None else self._loaded.config

    @property
    def current_config(self) -> bytes:
        """Configuration space as it is now, whatever was loaded."""
        with self._lock:
            return self._config.save()

    @property
    def table(self) -> bytes:
        """The MSI-X table, as loaded or as it was kept, 16 bytes a vector."""
        with self._lock:
            return self._table

    def keep_table(self, table: bytes) -> None:
        """Take QEMU's MSI-X table into what `save` returns; raise ValueError for one of another size."""
        if len(table) != self.layout.table_size:
            raise ValueError(f"an MSI-X table of {len(table)} bytes, expected {self.layout.table_size}")
        with self._lock:
            self._table = table

    def save(self) -> PciImage:
        """Return all of it; the function is paused."""
        config = self.config
        return PciImage(config, self.table, self.lines.pending, self.lines.level)

    @contextlib.contextmanager
    def loading(self, image: PciImage) -> Iterator[None]:
        """Take an image over when the body, which loads the rest of the function, has; else leave all as it was.

        The controller's load looks whether MSI-X is on, so configuration space goes first.
        """
        with self._lock:
            before = self._config.save()
            self._config.load(image.config)
            try:
                yield
            except BaseException:
                self._config.load(before)
                raise
            self.lines.load(image.pending, image.intx)
            self._table = image.msix_table
            self._loaded = image

    def run(self) -> None:
        """The function runs again: what was loaded is the guest's from here on."""
        with self._lock:
            self._loaded = None
        self.lines.resume()
