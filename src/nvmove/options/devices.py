"""`-device nvme` and `-device nvme-ns` → ControllerConfig, checked as QEMU 11.1 checks them and with its messages."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.options.properties import Values
from nvmove.options.syntax import Option, parse

MAX_NAMESPACES = 256
"""QEMU's NVME_MAX_NAMESPACES: namespace ids are 1…256."""
_MIN_BLOCK, _MAX_BLOCK = 512, 2 << 20
_LENGTHS = {"serial": 20, "model": 40, "firmware-version": 8}
"""Identify Controller's SN, MN and FR (NVMe Base 2.0c §5.17.2.1)."""


@dataclass(slots=True)
class DriveUse:
    """A drive that a namespace needs, and what its device says about it."""

    name: str
    option: Option
    share_rw: bool
    write_cache: str
    """`on`, `off`, or `auto`: as the drive's own cache mode says."""
    werror: str = "auto"
    rerror: str = "auto"
    """What is done about the drive's errors; `auto`: as the drive says."""
    image_owner: str = "auto"
    """Who opens the image: `qemu`, `nvmove`, or `auto`: nvmove where it can."""


@dataclass(slots=True)
class ParsedController:
    """An nvme device with its namespaces."""

    option: Option
    config: ControllerConfig
    """Without namespaces: see `finish`."""
    pci: dict[str, str | int | bool]
    """What the PCI function in its place is to have: addr, bus, bootindex, …"""
    namespaces: list[NamespaceConfig] = field(default_factory=list)
    drives: list[DriveUse] = field(default_factory=list)

    def finish(self, write_cache: Mapping[str, bool]) -> ControllerConfig:
        """Return the whole configuration; `write_cache` tells for each drive whether its writes may be cached."""
        namespaces = tuple(
            msgspec.structs.replace(namespace, write_cache=write_cache[namespace.drive])
            for namespace in sorted(self.namespaces, key=lambda one: one.nsid)
        )
        return msgspec.structs.replace(self.config, namespaces=namespaces)


MSG_TIMEOUT = (1 << 31) - 1
"""vfio-user-pci's `x-msg-timeout`: milliseconds that QEMU waits for an answer, here for ever. After five seconds, its
default, it would go on with a reset, and give memory to the guest that a disk still writes to."""
EUI64_DEFAULT = 0x5254_0000_0000_0000
"""With `eui64-default`: the EUI-64 of QEMU's namespaces, less their number in the order of creation, from 1."""


def is_nvme(option: Option) -> bool:
    """Whether a `-device` is one that nvmove takes over (or refuses)."""
    return option.values.get("driver") in ("nvme", "nvme-ns", "nvme-subsys")


def parse_controllers(devices: Iterable[Option], firmware: str = "") -> list[ParsedController]:
    """Read nvme devices in the order in which QEMU creates them; `firmware` is the default of firmware-version.

    Raises OptionError with QEMU's message for what QEMU would refuse, and for what nvmove does not support yet.
    """
    controllers: list[ParsedController] = []
    used: set[str] = set()
    for option in devices:
        driver = option.get("driver")
        if driver == "nvme-subsys":
            raise option.error("NVMe subsystems (nvme-subsys) are not supported yet")
        values = Values(option, driver)
        drive = values.text("drive")
        if driver == "nvme":
            controllers.append(_controller(option, values, firmware))
            owner = controllers[-1]
            if drive:
                # QEMU leaves the limits of Copy at zero, and then refuses every one (docs/reference/differences.md)
                fields: dict[str, object] = {"nsid": 1, "shared": False}
                owner.namespaces.append(_namespace(values, drive, uuid.UUID(int=0), fields))
        else:
            owner = _owner(option, values.text("bus"), controllers)
            if not drive:
                raise option.error("block backend not configured")
            created = sum(len(controller.namespaces) for controller in controllers)
            owner.namespaces.append(_attached(option, values, drive, owner.namespaces, EUI64_DEFAULT + created + 1))
        if not drive:
            continue
        if drive in used:
            raise option.error(f"Drive '{drive}' is already in use by another device")
        used.add(drive)
        cache, actions = values.text("write-cache"), (values.text("werror"), values.text("rerror"))
        use = DriveUse(drive, option, values.switch("share-rw"), cache, *actions, values.text("image-owner"))
        owner.drives.append(use)
    return controllers


def parse_device(argument: str) -> Option:
    """Read the argument of `-device`, in either form; raises OptionError."""
    return parse("-device", argument, implied="driver", json_allowed=True)


def _controller(option: Option, values: Values, firmware: str) -> ParsedController:
    for name, length in _LENGTHS.items():
        if len(text := values.text(name)) > length:
            raise option.error(f"'{name}' parameter '{text}' can be at most '{length}' characters")
    pairs = values.number("max_ioqpairs")
    if values.number("num_queues"):
        pairs = values.number("num_queues") - 1  # deprecated: it counted the admin queue
    if not 1 <= pairs <= 0xFFFF:
        raise option.error("max_ioqpairs must be between 1 and 65535")
    if not 1 <= values.number("msix_qsize") <= 2048:
        raise option.error("msix_qsize must be between 1 and 2048")
    if "serial" not in option.values:
        raise option.error("serial property not set")
    if values.number("mqes") < 1:
        raise option.error("mqes property cannot be less than 1")
    if not values.number("vsl"):
        raise option.error("vsl must be non-zero")
    mapped = _mapped_doorbells(option, values)
    config = ControllerConfig(
        serial=values.text("serial"),
        id=values.text("id"),
        model=values.text("model"),
        max_ioqpairs=pairs,
        msix_qsize=values.number("msix_qsize"),
        mqes=values.number("mqes"),
        mdts=values.number("mdts"),
        vsl=values.number("vsl"),
        aerl=values.number("aerl"),
        aer_max_queued=values.number("aer_max_queued"),
        use_intel_id=values.switch("use-intel-id"),
        dbcs=values.switch("dbcs") and not mapped,
        mapped_doorbells=mapped,
        smart_critical_warning=values.number("smart_critical_warning"),
        firmware_version=values.text("firmware-version") or firmware or ControllerConfig(serial="").firmware_version,
    )
    return ParsedController(option, config, values.pci())


def _mapped_doorbells(option: Option, values: Values) -> bool:
    """With doorbells that cost nothing to ring there is no use for a way not to ring them."""
    where = values.text("x-doorbells")
    if where not in {"messages", "mapped"}:
        raise option.error(f"Parameter 'x-doorbells' expects 'messages' or 'mapped', not '{where}'")
    mapped = where == "mapped"
    if mapped and "dbcs" in option.values and values.switch("dbcs"):
        raise option.error("x-doorbells=mapped and dbcs=on exclude each other")
    return mapped


def _owner(option: Option, bus: str, controllers: Sequence[ParsedController]) -> ParsedController:
    """Return the controller that an nvme-ns belongs to: that of `bus`, else the last one before it."""
    if not bus:
        if not controllers:
            raise option.error("No 'nvme-bus' bus found for device 'nvme-ns'")
        if len({controller.pci.get("bus") for controller in controllers}) > 1:
            raise option.error("there are nvme devices on several buses: say which one with bus=ID")
        return controllers[-1]
    unnamed = [controller for controller in controllers if not controller.config.id]
    for controller in controllers:
        name = controller.config.id or f"nvme-bus.{unnamed.index(controller)}"
        if name == bus:
            return controller
    raise option.error(f"Bus '{bus}' not found")


def _attached(
    option: Option, values: Values, drive: str, others: Sequence[NamespaceConfig], eui64: int
) -> NamespaceConfig:
    nsid = values.number("nsid")
    if nsid > MAX_NAMESPACES:
        raise option.error(f"invalid namespace id (must be between 0 and {MAX_NAMESPACES})")
    taken = {namespace.nsid for namespace in others}
    if not nsid:
        nsid = next((free for free in range(1, MAX_NAMESPACES + 1) if free not in taken), 0)
        if not nsid:
            raise option.error("no free namespace id")
    elif nsid in taken:
        raise option.error(f"namespace id '{nsid}' already allocated")
    fields: dict[str, object] = {
        "nsid": nsid,
        "nguid": _nguid(option, values.text("nguid")),
        "eui64": values.number("eui64") or (eui64 if values.switch("eui64-default") else 0),
        "mssrl": values.number("mssrl"),
        "mcl": values.number("mcl"),
        "msrc": values.number("msrc"),
        "shared": values.switch("shared"),
        "detached": values.switch("detached"),
    }
    return _namespace(values, drive, _uuid(option, values.text("uuid")), fields)


def _namespace(values: Values, drive: str, identity: uuid.UUID, fields: dict[str, object]) -> NamespaceConfig:
    option = values.option
    logical = values.number("logical_block_size") or _MIN_BLOCK
    physical = values.number("physical_block_size") or _MIN_BLOCK
    for name, size in (("physical_block_size", physical), ("logical_block_size", logical)):
        if not _MIN_BLOCK <= size <= _MAX_BLOCK or size & (size - 1):
            raise option.error(f"parameter {name} must be a power of 2 between {_MIN_BLOCK} and {_MAX_BLOCK}")
    if logical > physical:
        raise option.error("logical_block_size > physical_block_size not supported")
    granularity: int | None = values.number("discard_granularity")
    if granularity == 0xFFFFFFFF:
        granularity = None  # QEMU's default: what the drive says
    for name, limit in (("min_io_size", 0xFFFF), ("opt_io_size", 0xFFFFFFFF)):
        if values.number(name) % logical:
            raise option.error(f"{name} must be a multiple of logical_block_size")
        if values.number(name) // logical > limit:
            raise option.error(f"{name} must not exceed {limit} logical blocks")
    if granularity is not None and granularity % logical:
        raise option.error("discard_granularity must be a multiple of logical_block_size")
    known: dict[str, object] = {
        "drive": drive,
        "uuid": identity,
        "logical_block_size": logical,
        "physical_block_size": physical,
        "min_io_size": values.number("min_io_size"),
        "opt_io_size": values.number("opt_io_size"),
        "discard_granularity": granularity,
    }
    return NamespaceConfig(**known | fields)  # type: ignore[arg-type]


def _uuid(option: Option, text: str) -> uuid.UUID:
    if text == "auto":
        return uuid.uuid4()
    if not text:
        return uuid.UUID(int=0)
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        raise option.error(f"Property 'nvme-ns.uuid' doesn't take value '{text}'")
    return uuid.UUID(text)


def _nguid(option: Option, text: str) -> bytes:
    if text == "auto":
        return uuid.uuid4().bytes
    digits = text.replace("-", "")
    if not re.fullmatch(r"([0-9a-fA-F]{32})?", digits):
        raise option.error(f"Property 'nvme-ns.nguid' doesn't take value '{text}'")
    return bytes.fromhex(digits) or bytes(16)
