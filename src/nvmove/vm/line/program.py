"""QEMU's program: found, and asked what it can do.

Nothing here imports more than it needs: a command line is refused before anything else of nvmove's is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvmove.errors import UserError

MINIMUM = (10, 1)
"""The first QEMU with vfio-user-pci."""
_PROBE_SECONDS = 60


@dataclass(frozen=True, slots=True)
class QemuProgram:
    """A QEMU that nvmove can work with."""

    path: Path
    version: tuple[int, int, int]
    _types: dict[str, Mapping[str, str]] = field(default_factory=dict, compare=False, repr=False)
    """What was asked before."""

    @property
    def version_text(self) -> str:
        """The version as QEMU's devices show it: `11.1.3`."""
        return ".".join(map(str, self.version))

    def property_types(self, driver: str) -> Mapping[str, str]:
        """Return the types of a device's properties by name, as `-device DRIVER,help` shows them; empty if unknown."""
        if driver not in self._types:
            (shown,) = _ask(self.path, [("-device", f"{driver},help")])
            self._types[driver] = _properties(shown)
        return self._types[driver]

    def compat_properties(self, machine: str) -> Mapping[str, Mapping[str, str]]:
        """Return what a versioned machine type sets of devices, by their types; empty for what is no machine.

        So that a guest of an older QEMU finds the devices of that QEMU.
        """
        query = json.dumps({"execute": "query-machines", "arguments": {"compat-props": True}})
        talk = f'{{"execute":"qmp_capabilities"}}{query}{{"execute":"quit"}}'
        (answers,) = _ask(self.path, [("-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio")], talk)
        for line in answers.splitlines():
            for found in json.loads(line).get("return", ()):
                if found["name"] == machine:
                    return _with_types(found.get("compat-props", ()))
        return {}


def _with_types(properties: Iterable[Mapping[str, str]]) -> Mapping[str, Mapping[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for one in properties:  # of two the later counts
        found.setdefault(one["qom-type"], {})[one["property"]] = one["value"]
    return found


def find(program: str) -> QemuProgram:
    """Return the QEMU that the user means by `program` (`$NVMOVE_QEMU` when set); raises UserError."""
    wanted = os.environ.get("NVMOVE_QEMU") or program
    path = shutil.which(wanted)
    need = f"nvmove needs QEMU {MINIMUM[0]}.{MINIMUM[1]} or later"
    if path is None:
        raise UserError(f"'{wanted}' not found; {need} (set NVMOVE_QEMU to its path)")
    device, objects = ("-device", "vfio-user-pci,help"), ("-object", "help")
    shown, properties, types = _ask(Path(path), [("--version",), device, objects])
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", shown)
    if not match:
        raise UserError(f"'{path}' is not a QEMU system emulator: it does not tell its version; {need}")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version[:2] < MINIMUM:
        raise UserError(f"{need}, and '{path}' is QEMU {'.'.join(map(str, version))} (NVMOVE_QEMU chooses another)")
    found = QemuProgram(Path(path), version)
    if "socket" not in _properties(properties):
        raise UserError(f"'{path}' (QEMU {found.version_text}) was built without the device vfio-user-pci")
    for needed in ("dbus-vmstate", "qtest"):
        if needed not in types.split():
            raise UserError(f"'{path}' (QEMU {found.version_text}) was built without the object {needed}")
    return found


def _properties(shown: str) -> Mapping[str, str]:
    return dict(re.findall(r"^  (\S+)=<(.+?)>(?:\s|$)", shown, re.MULTILINE))


def _ask(path: Path, questions: Sequence[Sequence[str]], says: str = "") -> list[str]:
    """Return what the program prints for each list of arguments; it runs once for each, all at a time.

    Each reads `says`.
    """
    running: list[subprocess.Popen[str]] = []
    try:
        for words in questions:
            running.append(
                subprocess.Popen(
                    [path, *words],
                    stdin=subprocess.PIPE if says else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                )
            )
        return [process.communicate(says or None, timeout=_PROBE_SECONDS)[0] for process in running]
    except OSError as error:
        raise UserError(f"cannot run '{path}': {error.strerror}") from None
    except subprocess.TimeoutExpired as late:
        words = " ".join(late.cmd[1:])
        raise UserError(f"'{path} {words}' does not answer in {_PROBE_SECONDS} seconds") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
