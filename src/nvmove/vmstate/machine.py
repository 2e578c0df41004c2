"""How the state of the VM as a whole lies in the stream (vm/moves/machinestate.py; docs/reference/state-format.md)."""

from __future__ import annotations

from nvmove.vmstate.fields import Counted, Int, Text
from nvmove.vmstate.schema import VMStateDescription

IDENT = "nvmove-vm"
"""Its Id on the bus; the devices' begin with `nvmove/`."""
_NAME_MAX = 255
_COUNT_MAX = 4096

DEVICE = VMStateDescription("nvmove-vm-device", fields=(Text("id", _NAME_MAX),))
DRIVE = VMStateDescription(
    "nvmove-vm-drive", fields=(Text("device", _NAME_MAX), Int("nsid", 4), Text("io_status", _NAME_MAX))
)
VM = VMStateDescription(
    IDENT,
    fields=(
        Text("run_state", _NAME_MAX),
        Counted("devices", DEVICE, _COUNT_MAX),
        Counted("drives", DRIVE, _COUNT_MAX),
    ),
)
"""`drives` are those whose io-status is not ok."""
