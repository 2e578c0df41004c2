"""Identify (Base 5.17, NVM 4.1.5): what the controller and its namespaces say of themselves.

Strings and values are those of QEMU's nvme, so that a guest does not see that its disk has moved here; the differences
that stay are explained in docs/reference/differences.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.commands.effects import IO_EFFECTS
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import Namespace, check_nsid
from nvmove.nvme.spec import (
    ALL_NAMESPACES,
    CONTROLLER_LIST,
    CSI_NVM,
    CTRATT_ELBAS,
    DLFEAT_WRITE_ZEROES_DEALLOCATES,
    DLFEAT_ZEROES,
    ERROR_ENTRIES,
    FRMW_ONE_READ_ONLY_SLOT,
    IDENTIFY_SIZE,
    LPA_EFFECTS,
    LPA_EXTENDED_DATA,
    LPA_SUPPORTED_PAGES,
    MAX_NAMESPACES,
    NAMESPACE_LIST_ENTRIES,
    NMIC_SHARED,
    NSATTR_WRITE_PROTECTED,
    NSFEAT_OPTPERF,
    NSTAT_READY,
    OACS_DOORBELL_BUFFER_CONFIG,
    OACS_FORMAT,
    OACS_NAMESPACE_MANAGEMENT,
    OAES_NAMESPACE,
    ONCS_COMPARE,
    ONCS_COPY,
    ONCS_DATASET_MANAGEMENT,
    ONCS_SAVE_SELECT,
    ONCS_TIMESTAMP,
    ONCS_VERIFY,
    ONCS_WRITE_ZEROES,
    SGLS_SUPPORTED,
    TEMPERATURE_CRITICAL,
    TEMPERATURE_WARNING,
    VWC_FLUSH_ALL,
    VWC_PRESENT,
    Cns,
    DescriptorType,
    Status,
)

QEMU_VENDOR, QEMU_IEEE = 0x1B36, 0x525400
INTEL_VENDOR, INTEL_IEEE = 0x8086, 0x00_02B3
"""VID and IEEE OUI; the second pair with QEMU's property `use-intel-id`."""
SUBSYSTEM_VENDOR = 0x1AF4
NQN = "nqn.2019-08.org.qemu:"

ARBITRATION_BURST = 6
ABORT_LIMIT = 3
COPY_FORMATS = 1 << 0
"""OCFS: descriptor format 0."""
OPTIONAL_ADMIN = OACS_FORMAT | OACS_NAMESPACE_MANAGEMENT
OPTIONAL_NVM = (
    ONCS_COMPARE
    | ONCS_DATASET_MANAGEMENT
    | ONCS_WRITE_ZEROES
    | ONCS_SAVE_SELECT
    | ONCS_TIMESTAMP
    | ONCS_VERIFY
    | ONCS_COPY
)
MAX_POWER, ENTRY_LATENCY, EXIT_LATENCY = 2500, 16, 4
"""Power state 0: 25 W in units of 10 mW, microseconds."""

DSM_MAX_RANGES = 255
DSM_MAX_RANGE_BYTES = (1 << 31) - 512
"""DMRL, and what DMRSL is in the largest blocks of all namespaces: QEMU's. Larger requests are served too."""


def _text(value: str, size: int) -> bytes:
    return value.encode("ascii", "replace")[:size].ljust(size)


def controller_data(config: ControllerConfig, version: int, *, dbcs: bool) -> bytes:
    """Return the Identify Controller data structure (CNS 01h, Base figure 275)."""
    data = bytearray(IDENTIFY_SIZE)

    def put(offset: int, layout: str, *values: object) -> None:
        struct.pack_into("<" + layout, data, offset, *values)

    vendor, ieee = (INTEL_VENDOR, INTEL_IEEE) if config.use_intel_id else (QEMU_VENDOR, QEMU_IEEE)
    put(0, "HH20s40s8s", vendor, SUBSYSTEM_VENDOR, _text(config.serial, 20), _text(config.model, 40),
        _text(config.firmware_version, 8))  # fmt: skip
    put(72, "B3sBBHI", ARBITRATION_BURST, ieee.to_bytes(3, "little"), 0, config.mdts, config.cntlid, version)
    put(92, "II", OAES_NAMESPACE, CTRATT_ELBAS)
    put(111, "B", 1)  # CNTRLTYPE: I/O controller
    optional_admin = OPTIONAL_ADMIN | OACS_DOORBELL_BUFFER_CONFIG * dbcs
    put(256, "HBBBBB", optional_admin, ABORT_LIMIT, config.aerl, FRMW_ONE_READ_ONLY_SLOT,
        LPA_EFFECTS | LPA_EXTENDED_DATA | LPA_SUPPORTED_PAGES, ERROR_ENTRIES - 1)  # fmt: skip
    put(266, "HH", TEMPERATURE_WARNING, TEMPERATURE_CRITICAL)
    put(512, "BB", 0x66, 0x44)  # SQES, CQES
    put(516, "IHHBB", MAX_NAMESPACES, OPTIONAL_NVM, 0, 0, VWC_PRESENT | VWC_FLUSH_ALL)
    put(534, "H", COPY_FORMATS)
    put(536, "I", SGLS_SUPPORTED)
    put(768, "256s", (NQN + config.serial).encode("ascii", "replace"))
    put(2048, "HxxII", MAX_POWER, ENTRY_LATENCY, EXIT_LATENCY)
    return bytes(data)


def namespace_data(namespace: Namespace) -> bytes:
    """Return the Identify Namespace data structure (CNS 00h, NVM figure 97)."""
    config = namespace.config
    data = bytearray(IDENTIFY_SIZE)
    struct.pack_into("<QQQ", data, 0, *[namespace.blocks] * 3)  # all capacity is allocated: NSZE = NCAP = NUSE
    struct.pack_into("<BBB", data, 24, NSFEAT_OPTPERF, len(namespace.formats) - 1, _flbas(namespace))
    data[30] = NMIC_SHARED if config.shared else 0
    data[33] = DLFEAT_ZEROES | DLFEAT_WRITE_ZEROES_DEALLOCATES
    granularity = _blocks(namespace, namespace.discard_granularity)
    struct.pack_into(
        "<HHHHHHIB", data, 64,
        _preferred_write(namespace), _preferred_write(namespace), min(granularity, 0xFFFF), min(granularity, 0xFFFF),
        min(_blocks(namespace, config.opt_io_size), 0xFFFF), config.mssrl, config.mcl, config.msrc,
    )  # fmt: skip
    data[99] = _attributes(namespace)
    data[104:120] = config.nguid
    data[120:128] = config.eui64.to_bytes(8, "big")
    for index, lba_format in enumerate(namespace.formats):
        data[128 + 4 * index + 2] = lba_format.shift
    return bytes(data)


def _flbas(namespace: Namespace) -> int:
    """Index of the format: bits 3:0, and 6:5 for its upper bits."""
    return namespace.format_index & 0xF | namespace.format_index >> 4 << 5


def _blocks(namespace: Namespace, size: int) -> int:
    """0's based number of logical blocks in `size` bytes; 0 also where nothing is preferred."""
    return max(size >> namespace.block_shift, 1) - 1


def _preferred_write(namespace: Namespace) -> int:
    """NPWG and NPWA: writes of a physical block, or of `min_io_size`, need no read-modify-write."""
    preferred = max(namespace.config.physical_block_size, namespace.config.min_io_size)
    return min(_blocks(namespace, preferred), 0xFFFF)


def _attributes(namespace: Namespace) -> int:
    return NSATTR_WRITE_PROTECTED if namespace.read_only else 0


def independent_data(namespace: Namespace) -> bytes:
    """Return the I/O Command Set Independent Identify Namespace data structure (CNS 08h, Base figure 280)."""
    data = bytearray(IDENTIFY_SIZE)
    data[1] = NMIC_SHARED if namespace.config.shared else 0
    data[8] = _attributes(namespace)
    data[14] = NSTAT_READY
    return bytes(data)


def nvm_namespace_data(namespace: Namespace) -> bytes:
    """Return the NVM command set's Identify Namespace data structure (CNS 05h, NVM figure 100).

    No format has protection information, so all of ELBAF is 0; NPDGL and NPDAL (not 0's based) repeat NPDG and NPDA.
    """
    data = bytearray(IDENTIFY_SIZE)
    granularity = namespace.discard_granularity >> namespace.block_shift
    struct.pack_into("<I", data, 268, granularity)
    struct.pack_into("<I", data, 284, granularity)
    return bytes(data)


def nvm_controller_data(config: ControllerConfig, block_size: int) -> bytes:
    """Return the NVM command set's Identify Controller data structure (CNS 06h, NVM figure 102).

    `block_size`: the largest of its namespaces, in bytes.
    """
    blocks = DSM_MAX_RANGE_BYTES // block_size
    return struct.pack("<BBBBIQ", config.vsl, 0, 0, DSM_MAX_RANGES, blocks, DSM_MAX_RANGES * blocks).ljust(
        IDENTIFY_SIZE, b"\0"
    )


def descriptors(namespace: Namespace) -> bytes:
    """Return the Namespace Identification Descriptor list (CNS 03h, Base 5.17.2.3); an identifier of 0 is none."""
    config = namespace.config
    identifiers = (
        (DescriptorType.UUID, config.uuid.bytes),
        (DescriptorType.NGUID, config.nguid),
        (DescriptorType.EUI64, config.eui64.to_bytes(8, "big")),
    )
    data = b"".join(bytes((kind, len(value), 0, 0)) + value for kind, value in identifiers if any(value))
    return (data + bytes((DescriptorType.CSI, 1, 0, 0, namespace.csi))).ljust(IDENTIFY_SIZE, b"\0")


def namespace_list(nsids: Iterable[int]) -> bytes:
    """Return a namespace list (Base 4.4.2)."""
    entries = list(nsids)[:NAMESPACE_LIST_ENTRIES]
    return struct.pack(f"<{len(entries)}I", *entries).ljust(IDENTIFY_SIZE, b"\0")


def controller_list(cntlids: Iterable[int]) -> bytes:
    """Return a controller list (Base 4.4.1)."""
    entries = list(cntlids)
    return struct.pack(f"<{len(entries) + 1}H", len(entries), *entries).ljust(CONTROLLER_LIST.size, b"\0")


# --- by CNS ----------------------------------------------------------------------------------------------------------


def _require_nvm(command: Command) -> None:
    """CNS values with a CSI field know the NVM command set only."""
    if command.cdw11 >> 24 != CSI_NVM:
        raise CommandError(Status.INVALID_FIELD)


def _controller(controller: Controller, _command: Command) -> bytes:
    return controller_data(controller.config, controller.registers.vs, dbcs=controller.doorbells.offered)


def _nvm_controller(controller: Controller, _command: Command) -> bytes:
    largest = max((namespace.block_size for namespace in controller.namespaces.active), default=512)
    return nvm_controller_data(controller.config, largest)


def _of_namespace(structure: Callable[[Namespace], bytes], *, active: bool) -> Callable[[Controller, Command], bytes]:
    """Answer with `structure` of one namespace; zeroes for a valid id without one (Base 5.17.2.2)."""

    def answer(controller: Controller, command: Command) -> bytes:
        namespace = controller.namespaces.find(command.nsid)
        if namespace is None or (active and not namespace.attached):
            return bytes(IDENTIFY_SIZE)
        return structure(namespace)

    return answer


def _common_or_namespace(controller: Controller, command: Command) -> bytes:
    """CNS 00h; NSID FFFFFFFFh asks for what all namespaces have in common, whatever their size and format."""
    if command.nsid != ALL_NAMESPACES:
        return _of_namespace(namespace_data, active=True)(controller, command)
    first = next(iter(controller.namespaces), None)
    if first is None:
        return bytes(IDENTIFY_SIZE)
    common = bytearray(namespace_data(first))
    common[0:24] = bytes(24)
    common[26] = 0
    common[30] = 0
    common[64:83] = bytes(19)
    common[99] = 0
    common[104:128] = bytes(24)
    return bytes(common)


def _list(*, active: bool) -> Callable[[Controller, Command], bytes]:
    """Answer with the ids above the command's NSID, ascending."""

    def answer(controller: Controller, command: Command) -> bytes:
        if command.nsid >= ALL_NAMESPACES - 1:
            raise CommandError(Status.INVALID_NAMESPACE)
        table = controller.namespaces
        return namespace_list(
            namespace.nsid for namespace in (table.active if active else table) if namespace.nsid > command.nsid
        )

    return answer


def _descriptors(controller: Controller, command: Command) -> bytes:
    return descriptors(controller.namespaces.require_active(command.nsid))


def _controllers(controller: Controller, command: Command) -> bytes:
    """CNS 13h: the subsystem's controllers from CNTID on: there is one."""
    cntlid = controller.config.cntlid
    return controller_list([cntlid] if cntlid >= command.cdw10 >> 16 else [])


def _attached_controllers(controller: Controller, command: Command) -> bytes:
    check_nsid(command.nsid)
    namespace = controller.namespaces.get(command.nsid)
    if namespace is None:
        raise CommandError(Status.INVALID_FIELD)
    return _controllers(controller, command) if namespace.attached else controller_list([])


def _command_sets(controller: Controller, command: Command) -> bytes:
    """CNS 1Ch: one combination, the NVM command set alone (Base 5.17.2.21). CNTID FFFFh is this controller too."""
    if command.cdw10 >> 16 not in {controller.config.cntlid, 0xFFFF}:
        raise CommandError(Status.INVALID_FIELD)
    return struct.pack("<Q", sum(1 << csi for csi in IO_EFFECTS)).ljust(IDENTIFY_SIZE, b"\0")


def _with_csi(answer: Callable[[Controller, Command], bytes]) -> Callable[[Controller, Command], bytes]:
    def checked(controller: Controller, command: Command) -> bytes:
        _require_nvm(command)
        return answer(controller, command)

    return checked


ANSWERS: dict[int, Callable[[Controller, Command], bytes]] = {
    Cns.NAMESPACE: _common_or_namespace,
    Cns.CONTROLLER: _controller,
    Cns.ACTIVE_NAMESPACES: _list(active=True),
    Cns.NAMESPACE_DESCRIPTORS: _descriptors,
    Cns.CSI_NAMESPACE: _with_csi(_of_namespace(nvm_namespace_data, active=True)),
    Cns.CSI_CONTROLLER: _with_csi(_nvm_controller),
    Cns.CSI_ACTIVE_NAMESPACES: _with_csi(_list(active=True)),
    Cns.INDEPENDENT_NAMESPACE: _of_namespace(independent_data, active=True),
    Cns.ALLOCATED_NAMESPACES: _list(active=False),
    Cns.ALLOCATED_NAMESPACE: _of_namespace(namespace_data, active=False),
    Cns.ATTACHED_CONTROLLERS: _attached_controllers,
    Cns.CONTROLLERS: _controllers,
    Cns.CSI_ALLOCATED_NAMESPACES: _with_csi(_list(active=False)),
    Cns.CSI_ALLOCATED_NAMESPACE: _with_csi(_of_namespace(nvm_namespace_data, active=False)),
    Cns.COMMAND_SETS: _command_sets,
    Cns.ALLOCATED_INDEPENDENT_NAMESPACE: _of_namespace(independent_data, active=False),
}


def identify(controller: Controller, command: Command) -> None:
    """Identify (Base 5.17); a CNS that this controller has no answer for is an invalid field."""
    answer = ANSWERS.get(command.cdw10 & 0xFF)
    if answer is None:
        raise CommandError(Status.INVALID_FIELD)
    with controller.lock:
        data = answer(controller, command)
    command.write_data(data)
    command.complete()
