"""Which ports lose their hot plug, in every form in which a user writes them, and which keep it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from nvmove.vm.line import argv
from nvmove.vm.line.ports import without_hot_plug

BY_PORT = "-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"
PORT = "-device pcie-root-port,id=rp,chassis=3"
PXB = "-device pxb-pcie,id=px,bus_nr=9 -device pcie-root-port,id=rp,bus=px"
SWITCH = (
    "-device pcie-root-port,id=up{0} -device x3130-upstream,id=us,bus=up -device xio3130-downstream,id=rp,bus=us{0}"
)
PC = {"ICH9-LPC": {"acpi-pci-hotplug-with-bridge-support": "bool"}}
DRIVERS = {
    "pcie-root-port": {"hotplug": "bool"},
    "xio3130-downstream": {"hotplug": "bool"},
    "pci-bridge": {"shpc": "bool"},
}


def rewritten(line: str, *, is_pc: bool = True, compat: Mapping[str, Mapping[str, str]] | None = None) -> str:
    known: dict[str, dict[str, str]] = {**DRIVERS, **(PC if is_pc else {})}
    items = without_hot_plug(argv.read(shlex.split(line)), ["rp", ""], compat or {}, lambda name: known.get(name, {}))
    return shlex.join(argv.words(items))


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (f"{BY_PORT} {PORT}", f"{BY_PORT} {PORT},hotplug=off"),
        (f"-machine q35,acpi=off {PORT}", f"-machine q35,acpi=off {PORT},hotplug=off"),
        (f"{BY_PORT} {SWITCH.format('')}", f"{BY_PORT} {SWITCH.format(',hotplug=off')}"),
        (PXB, f"{PXB},hotplug=off"),
        (f"{BY_PORT} -device pci-bridge,id=rp", f"{BY_PORT} -device pci-bridge,id=rp,shpc=off"),
        (
            BY_PORT + """ -device '{"driver":"pcie-root-port","id":"rp"}'""",
            BY_PORT + """ -device '{"driver":"pcie-root-port","id":"rp","hotplug":false}'""",
        ),
    ],
)
def test_the_ports_that_lead_to_a_disk_have_no_hot_plug_of_its_own(line: str, want: str) -> None:
    assert rewritten(line) == want


@pytest.mark.parametrize(
    "line",
    [
        PORT,
        f"-machine q35,acpi=auto {PORT}",
        SWITCH.format(""),
        f"{BY_PORT} {PORT},hotplug=on",
        f"{BY_PORT} -global pcie-root-port.hotplug=on {PORT}",
        f"{BY_PORT} -device pcie-root-port,id=another",
        f"{BY_PORT} -device pcie-pci-bridge,id=rp",
    ],
)
def test_what_acpi_handles_and_what_the_user_says_stays(line: str) -> None:
    assert rewritten(line) == line


def test_a_machine_type_without_acpi_s_hot_plug_and_a_machine_that_is_no_pc() -> None:
    compat = {"ICH9-LPC": {"acpi-pci-hotplug-with-bridge-support": "off"}}
    assert rewritten(PORT, compat=compat) == f"{PORT},hotplug=off"
    assert rewritten(PORT, is_pc=False) == f"{PORT},hotplug=off"
    on = f"{BY_PORT.removesuffix('off')}on {PORT}"
    assert rewritten(on, compat=compat) == on


def test_a_port_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "q35.cfg"
    file.write_text('[machine]\n  type = "q35"\n\n[device "rp"]\n  driver = "pcie-root-port"\n  chassis = "3"\n')
    line = f"{BY_PORT} -readconfig {file}"
    assert rewritten(line) == f"{line} -set device.rp.hotplug=off"
    said = f"{line} -set device.rp.hotplug=on"
    assert rewritten(said) == said
