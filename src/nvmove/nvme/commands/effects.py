"""What the controller supports and what it does to it: commands, features, and their effects (Base 5.16.1.6, .18).

The tables are the controller's own promise; a test holds them against the handlers that exist.
"""

from __future__ import annotations

from nvmove.nvme.spec import (
    CSI_NVM,
    EFFECT_CONTENT,
    EFFECT_CONTROLLER_CAPABILITY,
    EFFECT_NAMESPACE_CAPABILITY,
    EFFECT_NAMESPACE_INVENTORY,
    EFFECT_SUPPORTED,
    FEATURE_SCOPE_CONTROLLER,
    FEATURE_SCOPE_NAMESPACE,
    Admin,
    Feature,
    Nvm,
)

_ADMIN = (
    Admin.DELETE_SQ,
    Admin.CREATE_SQ,
    Admin.GET_LOG_PAGE,
    Admin.DELETE_CQ,
    Admin.CREATE_CQ,
    Admin.IDENTIFY,
    Admin.ABORT,
    Admin.SET_FEATURES,
    Admin.GET_FEATURES,
    Admin.ASYNC_EVENT_REQUEST,
    Admin.DOORBELL_BUFFER_CONFIG,
)
"""Commands that change no namespace."""

ADMIN_EFFECTS: dict[int, int] = {
    **dict.fromkeys(_ADMIN, EFFECT_SUPPORTED),
    Admin.NAMESPACE_ATTACHMENT: EFFECT_SUPPORTED | EFFECT_NAMESPACE_INVENTORY | EFFECT_CONTROLLER_CAPABILITY,
    Admin.FORMAT_NVM: EFFECT_SUPPORTED | EFFECT_CONTENT | EFFECT_NAMESPACE_CAPABILITY,
}

_READS = EFFECT_SUPPORTED
_WRITES = _READS | EFFECT_CONTENT

_NVM: dict[int, int] = {
    Nvm.FLUSH: _WRITES,
    Nvm.WRITE: _WRITES,
    Nvm.READ: _READS,
    Nvm.COMPARE: _READS,
    Nvm.WRITE_ZEROES: _WRITES,
    Nvm.DATASET_MANAGEMENT: _WRITES,
    Nvm.VERIFY: _READS,
    Nvm.COPY: _WRITES,
}
"""Those of QEMU's nvme: Flush counts as one that changes content there. No scope of a command is reported, because
Linux warns of "unusual effects" of an I/O command that says more than these two bits."""

IO_EFFECTS: dict[int, dict[int, int]] = {CSI_NVM: _NVM}
"""By Command Set Identifier and opcode."""

FEATURE_EFFECTS: dict[int, int] = {
    feature: EFFECT_SUPPORTED
    | (FEATURE_SCOPE_NAMESPACE if feature == Feature.ERROR_RECOVERY else FEATURE_SCOPE_CONTROLLER)
    for feature in Feature
}


def _dwords(table: dict[int, int]) -> bytes:
    return b"".join(table.get(index, 0).to_bytes(4, "little") for index in range(256))


def commands_page(csi: int, dbcs: bool) -> bytes:
    """Return the Commands Supported and Effects log page: 256 admin commands, 256 I/O commands, 2 KiB reserved."""
    admin = ADMIN_EFFECTS | ({} if dbcs else {Admin.DOORBELL_BUFFER_CONFIG: 0})
    return (_dwords(admin) + _dwords(IO_EFFECTS[csi])).ljust(4096, b"\0")


def features_page() -> bytes:
    """Return the Feature Identifiers Supported and Effects log page."""
    return _dwords(FEATURE_EFFECTS)


def mi_commands_page() -> bytes:
    """Return the NVMe-MI Commands Supported and Effects log page: none is supported."""
    return bytes(4096)
