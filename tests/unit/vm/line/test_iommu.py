"""Command lines with a virtual IOMMU: what is added, with one line, and what is refused."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import pytest

from nvmove.options.syntax import OptionError
from nvmove.vm.line import argv
from nvmove.vm.line.iommu import told

NEEDED = "nvmove's disks have to be told what the guest maps"
IMPOSSIBLE = "nvmove's disks cannot work behind this IOMMU: QEMU does not tell them what the guest maps"


def types(driver: str) -> Mapping[str, str]:
    return {"intel-iommu": {"caching-mode": "bool"}, "amd-iommu": {"dma-remap": "bool"}}[driver]


def types_of_qemu_10_1(driver: str) -> Mapping[str, str]:
    return {} if driver == "amd-iommu" else types(driver)


@pytest.mark.parametrize(
    ("line", "becomes", "warned", "is_between"),
    [
        ("-M q35 -device virtio-net-pci", "", "", False),
        ("-device intel-iommu,intremap=on,caching-mode=on", "", "", True),
        ("-global intel-iommu.caching-mode=on -device intel-iommu", "", "", True),
        ("-M q35,default-bus-bypass-iommu=on -device intel-iommu", "", "", False),
        ("-M virt,iommu=smmuv3,default_bus_bypass_iommu=on", "", "", False),
        ("-M virt,iommu=none", "", "", False),
        (
            "-device intel-iommu,intremap=on -M q35",
            "-device intel-iommu,intremap=on,caching-mode=on -M q35",
            "-device intel-iommu,intremap=on: caching-mode=on added",
            True,
        ),
        (
            """-device '{"driver":"intel-iommu"}'""",
            """-device '{"driver":"intel-iommu","caching-mode":true}'""",
            """-device {"driver":"intel-iommu"}: caching-mode=on added""",
            True,
        ),
        ("-device amd-iommu", "-device amd-iommu,dma-remap=on", "-device amd-iommu: dma-remap=on added", True),
    ],
)
def test_an_iommu_is_made_to_tell_what_the_guest_maps(line: str, becomes: str, warned: str, is_between: bool) -> None:
    warnings: list[str] = []
    items, found = told(argv.read(shlex.split(line)), types, warnings)
    assert argv.words(items) == shlex.split(becomes or line)
    assert warnings == ([f"{warned}: {NEEDED}"] if warned else [])
    assert found is is_between


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("-device intel-iommu,caching-mode=off", f"{NEEDED}: use caching-mode=on"),
        ("-global intel-iommu.caching-mode=off -device intel-iommu", f"{NEEDED}: use caching-mode=on"),
        ("-device amd-iommu", f"-device amd-iommu: this QEMU's has no property 'dma-remap': {IMPOSSIBLE}"),
        ("-M virt,iommu=smmuv3", f"-M iommu=smmuv3: {IMPOSSIBLE}"),
        ("-device arm-smmuv3,primary-bus=pcie.0", IMPOSSIBLE),
        ("-device virtio-iommu-pci", "not tested behind it"),
    ],
)
def test_an_iommu_that_cannot_is_refused_in_one_line(line: str, why: str) -> None:
    with pytest.raises(OptionError) as raised:
        told(argv.read(shlex.split(line)), types_of_qemu_10_1, [])
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
