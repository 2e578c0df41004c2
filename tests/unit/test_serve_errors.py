"""Error policies without a VM that could be stopped: `nvmove serve`."""

from __future__ import annotations

import pytest

from nvmove.options.syntax import OptionError
from nvmove.serve import _configure, _errors


def policies(drive: str = "", device: str = "") -> tuple[str, str]:
    controller, drives = _configure([f"nvme,serial=1,drive=d0{device}"], [f"id=d0,file=a.img,format=raw{drive}"])
    found = _errors(controller.drives[0], drives["d0"])
    return found.werror.value, found.rerror.value


def test_nothing_is_held_where_no_vm_can_be_stopped() -> None:
    assert policies() == ("report", "report")
    assert policies(",werror=ignore", ",rerror=ignore") == ("ignore", "ignore")


@pytest.mark.parametrize(("drive", "device"), [(",werror=stop", ""), ("", ",rerror=stop")])
def test_stop_is_refused_in_one_line(drive: str, device: str) -> None:
    with pytest.raises(OptionError, match=r"^-device nvme,.*: drive 'd0': serve has no VM that werror=stop"):
        policies(drive, device)
