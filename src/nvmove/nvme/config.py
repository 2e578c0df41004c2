"""What a controller and its namespaces are configured with: QEMU's properties, typed; names and defaults are QEMU's."""

from __future__ import annotations

import uuid

import msgspec


class NamespaceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`-device nvme-ns` (or the namespace that `-device nvme,drive=` implies)."""

    nsid: int = 0
    """1…256; 0: the first that is free."""
    drive: str
    """The drive's id or node name: the key of the back end."""
    uuid: uuid.UUID
    nguid: bytes = bytes(16)
    eui64: int = 0
    logical_block_size: int = 512
    physical_block_size: int = 512
    discard_granularity: int | None = None
    min_io_size: int = 0
    opt_io_size: int = 0
    mssrl: int = 128
    mcl: int = 128
    msrc: int = 127
    shared: bool = True
    detached: bool = False
    write_cache: bool = True


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`-device nvme`."""

    serial: str
    id: str = ""
    model: str = "QEMU NVMe Ctrl"
    firmware_version: str = "11.1.3"
    """Identify's FR, at most 8 characters; `nvmove run` sets the running QEMU's version, as QEMU does."""
    max_ioqpairs: int = 64
    msix_qsize: int = 65
    mqes: int = 2047
    mdts: int = 7
    vsl: int = 7
    aerl: int = 3
    aer_max_queued: int = 64
    cntlid: int = 0
    use_intel_id: bool = False
    smart_critical_warning: int = 0
    dbcs: bool = True
    """Whether Doorbell Buffer Config is offered; not with `mapped_doorbells`."""
    mapped_doorbells: bool = False
    """`x-doorbells=mapped`: doorbells are a page that the client can map."""
    namespaces: tuple[NamespaceConfig, ...] = ()
