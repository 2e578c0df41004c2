"""QEMU's command line as a list of options: which of them take an argument, and their words as the user typed them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nvmove.options.syntax import Option, parse

_WITH_ARGUMENT = frozenset(
    """
    M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev chroot compat cpu d debugcon
    device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg g gdb global hda hdb hdc hdd icount incoming
    initrd iscsi k kernel L D loadvm m machine mem-path mon monitor mtdblock msg name net netdev nic numa object
    option-rom overcommit p parallel pflash pidfile plugin prom-env qmp qmp-pretty readconfig rtc run-with runas sandbox
    sd seed semihosting-config serial set shim smbios smp spice tb-size tpmdev trace usbdevice uuid vga virtfs vnc
    watchdog watchdog-action xen-domid writeconfig
    """.split()  # noqa: SIM905
)
"""From `qemu-system-x86_64 --help` of 11.1 (a test compares), and options of other targets."""

_ANSWERS = frozenset({"h", "help", "version", "dump-vmstate"})
"""Options after which QEMU prints something and ends."""


@dataclass(frozen=True, slots=True)
class Item:
    """One option with its argument, or a word that is none (an image; its name is empty)."""

    words: tuple[str, ...]
    name: str = ""
    value: str = ""
    typed: tuple[str, ...] = field(default=(), compare=False)
    """The user's words that it stands for, where QEMU is given others."""

    @classmethod
    def make(cls, name: str, value: str) -> Item:
        """Return `-name value`."""
        return cls((f"-{name}", value), name, value)

    def instead(self, value: str, name: str = "") -> Item:
        """Return what QEMU gets instead of this option of the user's."""
        name = name or self.name
        return Item((f"-{name}", value), name, value, self.typed or self.words)


def read(arguments: Sequence[str]) -> list[Item]:
    """Split QEMU's arguments; `-option` and `--option` are the same. The words stay as they are."""
    items = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        name = word.removeprefix("-").removeprefix("-") if word.startswith("-") else ""
        taken = 2 if name in _WITH_ARGUMENT and position + 1 < len(arguments) else 1
        words = tuple(arguments[position : position + taken])
        items.append(Item(words, name, words[1] if taken == 2 else ""))
        position += taken
    return items


def words(items: Iterable[Item]) -> list[str]:
    """Return the arguments that `items` stand for."""
    return [word for item in items for word in item.words]


def machine_options(items: Iterable[Item]) -> list[Option]:
    """Return what `-M` and `-machine` say, read, in their order; raises OptionError."""
    return [
        parse(f"-{item.name}", item.value, implied="type", json_allowed=True)
        for item in items
        if item.name in ("M", "machine")
    ]


def wording(items: Iterable[Item]) -> dict[str, str]:
    """Return what the user typed by what QEMU is given instead, both as QEMU shows an option in its messages."""
    return {" ".join(item.words): " ".join(item.typed) for item in items if item.typed and item.typed != item.words}


def asks_for_help(items: Iterable[Item]) -> bool:
    """Whether QEMU would only print something: -help, -version, or `help` where a value is due."""
    return any(
        item.name in _ANSWERS or item.value in ("help", "?") or item.value.endswith((",help", ",?")) for item in items
    )
