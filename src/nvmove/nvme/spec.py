"""Every constant and wire structure of the NVMe specifications that the controller uses, once, each with its section.

"Base" is NVM Express Base Specification 2.0, "NVM" the NVM Command Set Specification 1.0, "PCIe" the NVMe over PCIe
Transport Specification 1.0. All fields are little-endian; all sizes are bytes unless said otherwise.

It is long because it is one table of numbers: each is here, and nobody has to ask where.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

PAGE: Final = 4096
"""CC.MPS 0; other memory page sizes come from CC."""
SQE_SIZE: Final = 64
CQE_SIZE: Final = 16
IDENTIFY_SIZE: Final = 4096
ALL_NAMESPACES: Final = 0xFFFF_FFFF
MAX_NAMESPACES: Final = 256


# --- registers: Base 3.1.3 -------------------------------------------------------------------------------------------


class Register(enum.IntEnum):
    """Offset in BAR0. Base 3.1.3, figure 33."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CRTO = 0x68


REGISTER_END: Final = 0x1000
DOORBELLS: Final = 0x1000
"""PCIe 3.1.2: the first submission queue tail doorbell; CAP.DSTRD is 0, so doorbells are 4 bytes apart."""
DOORBELL_STRIDE: Final = 4

VERSION_2_0: Final = 0x0002_0000
VERSION_1_4: Final = 0x0001_0400

CAP_CQR: Final = 1 << 16
"""Contiguous queues required. Base 3.1.3.1."""
CAP_TO_SHIFT: Final = 24
CAP_CSS_NVM: Final = 1 << 37
CAP_CSS_MULTIPLE: Final = 1 << 43
CAP_MPSMAX_SHIFT: Final = 52
CAP_CRWMS: Final = 1 << 59
"""Ready With Media is supported, which 2.0 demands: RDY means that the disks are there, within CRTO.CRWMT."""

AQA_WRITABLE: Final = 0x0FFF_0FFF
"""Both sizes, 0's based: submission queue low, completion queue high. Base 3.1.3.8."""

CC_EN: Final = 1 << 0
CC_CSS: Final = 0x70
CC_MPS: Final = 0x780
CC_AMS: Final = 0x3800
CC_SHN: Final = 0xC000
CC_IOSQES: Final = 0xF0000
CC_IOCQES: Final = 0xF00000
CC_WRITABLE: Final = CC_EN | CC_CSS | CC_MPS | CC_AMS | CC_SHN | CC_IOSQES | CC_IOCQES
"""Base 3.1.3.5."""

CSTS_RDY: Final = 1 << 0
CSTS_CFS: Final = 1 << 1
CSTS_SHST_OCCURRING: Final = 1 << 2
CSTS_SHST_COMPLETE: Final = 2 << 2
CSTS_SHST: Final = 3 << 2
"""Base 3.1.3.6."""


def field(value: int, mask: int) -> int:
    """Return the bits of `value` under `mask`, shifted down."""
    return (value & mask) // (mask & -mask)


# --- commands --------------------------------------------------------------------------------------------------------


class Admin(enum.IntEnum):
    """Admin opcodes. Base 5, figure 138."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    NAMESPACE_ATTACHMENT = 0x15
    DOORBELL_BUFFER_CONFIG = 0x7C
    FORMAT_NVM = 0x80


class Nvm(enum.IntEnum):
    """I/O opcodes of the NVM command set. NVM 3, figure 20."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    COPY = 0x19


FUSE: Final = 0x03
PSDT: Final = 0xC0
"""Bits of command dword 0 byte 1: fused operation, PRP or SGL. Base 3.3.3.1."""

FUA: Final = 1 << 30
PRINFO: Final = 0xF << 26
DEAC: Final = 1 << 25
"""Command dword 12 of NVM reads and writes; DEAC only of Write Zeroes. NVM 3.2.4, 3.2.6, 3.2.8."""

DSM_DEALLOCATE: Final = 1 << 2
"""Command dword 11 of Dataset Management. NVM 3.2.3."""
DSM_RANGE: Final = struct.Struct("<IIQ")
"""Context attributes, length in logical blocks, starting LBA."""
COPY_RANGE: Final = struct.Struct("<8xQH14x")
"""Source range of descriptor format 0: starting LBA, 0's based number of logical blocks. NVM 3.2.2."""

QUEUE_CONTIGUOUS: Final = 1 << 0
QUEUE_INTERRUPTS: Final = 1 << 1
"""Command dword 11 of Create I/O Submission / Completion Queue. Base 5.4, 5.5."""


# --- status: Base 3.3.3.2.1 ------------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    """Status code type << 8 | status code."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_SGL_SEGMENT = 0x00D
    INVALID_SGL_COUNT = 0x00E
    DATA_SGL_LENGTH_INVALID = 0x00F
    METADATA_SGL_LENGTH_INVALID = 0x010
    SGL_TYPE_INVALID = 0x011
    INVALID_PRP_OFFSET = 0x013
    SGL_OFFSET_INVALID = 0x016
    WRITE_PROTECTED = 0x020
    INVALID_COMMAND_SET = 0x02C
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    NAMESPACE_NOT_READY = 0x082
    FORMAT_IN_PROGRESS = 0x084
    INVALID_CQ = 0x100
    INVALID_QID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    AER_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_FORMAT = 0x10A
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    NAMESPACE_ALREADY_ATTACHED = 0x118
    NAMESPACE_NOT_ATTACHED = 0x11A
    CONTROLLER_LIST_INVALID = 0x11C
    IO_COMMAND_SET_NOT_SUPPORTED = 0x129
    IO_COMMAND_SET_COMBINATION_REJECTED = 0x12B
    INVALID_PROTECTION_INFORMATION = 0x181
    WRITE_TO_READ_ONLY = 0x182
    COMMAND_SIZE_LIMIT_EXCEEDED = 0x183
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


STATUS_MORE: Final = 1 << 13
STATUS_DNR: Final = 1 << 14
"""In the 15-bit Status Field, beside SCT << 8 | SC: an Error Information entry exists; a retry will fail as well."""

# --- completion queue entry: Base 3.3.3.2 ----------------------------------------------------------------------------

CQE: Final = struct.Struct("<QHHHH")
"""Result (dwords 0 and 1), SQ head, SQ id, command id, phase | Status Field << 1."""
assert CQE.size == CQE_SIZE

# --- PRP and SGL: Base 4.1.1, 4.1.2 ----------------------------------------------------------------------------------

PRP_SIZE: Final = 8
SGL_DESCRIPTOR: Final = struct.Struct("<QI3xB")
"""Address, length, type << 4 | subtype."""
SGL_SIZE: Final = 16
assert SGL_DESCRIPTOR.size == SGL_SIZE
SGL_DATA_BLOCK: Final = 0x0
SGL_BIT_BUCKET: Final = 0x1
SGL_SEGMENT: Final = 0x2
SGL_LAST_SEGMENT: Final = 0x3

# --- asynchronous events: Base 5.2 -----------------------------------------------------------------------------------


class EventType(enum.IntEnum):
    """Asynchronous event type. Base 5.2, figure 145."""

    ERROR = 0
    SMART = 1
    NOTICE = 2


EVENT_INVALID_DOORBELL_REGISTER: Final = 0x00
EVENT_INVALID_DOORBELL_VALUE: Final = 0x01
EVENT_TRANSIENT_INTERNAL_ERROR: Final = 0x04
EVENT_SMART_RELIABILITY: Final = 0x00
EVENT_SMART_TEMPERATURE: Final = 0x01
EVENT_SMART_SPARE: Final = 0x02
EVENT_NOTICE_NAMESPACE: Final = 0x00

ASYNC_CONFIG_SMART: Final = 0xFF
ASYNC_CONFIG_NAMESPACE: Final = 1 << 8
"""Feature 0Bh; the low byte enables SMART critical warnings bit by bit. Base 5.27.1.8."""

# --- identify: Base 5.17 ---------------------------------------------------------------------------------------------


class Cns(enum.IntEnum):
    """Controller or Namespace Structure. Base 5.17.1, figure 273."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03
    CSI_NAMESPACE = 0x05
    CSI_CONTROLLER = 0x06
    CSI_ACTIVE_NAMESPACES = 0x07
    INDEPENDENT_NAMESPACE = 0x08
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11
    ATTACHED_CONTROLLERS = 0x12
    CONTROLLERS = 0x13
    CSI_ALLOCATED_NAMESPACES = 0x1A
    CSI_ALLOCATED_NAMESPACE = 0x1B
    COMMAND_SETS = 0x1C
    ALLOCATED_INDEPENDENT_NAMESPACE = 0x1F
    """Of Base 2.1; QEMU's nvme answers it too."""


CSI_NVM: Final = 0x00


NAMESPACE_LIST_ENTRIES: Final = 1024
"""Base 4.4.2."""


class DescriptorType(enum.IntEnum):
    """Namespace Identification Descriptor types. Base 5.17.2.3."""

    EUI64 = 1
    NGUID = 2
    UUID = 3
    CSI = 4


OACS_FORMAT: Final = 1 << 1
OACS_NAMESPACE_MANAGEMENT: Final = 1 << 3
OACS_DOORBELL_BUFFER_CONFIG: Final = 1 << 8
"""Optional Admin Command Support. Base 5.17.2.1, figure 275, as all of the following."""
ONCS_COMPARE: Final = 1 << 0
ONCS_DATASET_MANAGEMENT: Final = 1 << 2
ONCS_WRITE_ZEROES: Final = 1 << 3
ONCS_SAVE_SELECT: Final = 1 << 4
ONCS_TIMESTAMP: Final = 1 << 6
ONCS_VERIFY: Final = 1 << 7
ONCS_COPY: Final = 1 << 8
"""Optional NVM Command Support."""
OAES_NAMESPACE: Final = 1 << 8
"""Optional Asynchronous Events Supported."""
CTRATT_ELBAS: Final = 1 << 15
"""Extended LBA Formats Supported: CNS 05h has the ELBAF fields."""
LPA_EFFECTS: Final = 1 << 1
LPA_EXTENDED_DATA: Final = 1 << 2
LPA_SUPPORTED_PAGES: Final = 1 << 5
"""Log Page Attributes."""
FRMW_ONE_READ_ONLY_SLOT: Final = 0x03
VWC_PRESENT: Final = 1 << 0
VWC_FLUSH_ALL: Final = 3 << 1
"""Flush takes NSID FFFFFFFFh."""
SGLS_SUPPORTED: Final = 0x0008_0001
"""SGLs with no alignment demands; bit 19: the metadata pointer may be one."""

NSFEAT_OPTPERF: Final = 0x30
"""NPWG, NPWA, NPDG, NPDA and NOWS are defined, bit 5 (a later revision's): NPDGL and NPDAL too. NVM 4.1.5.1."""
DLFEAT_ZEROES: Final = 0x01
DLFEAT_WRITE_ZEROES_DEALLOCATES: Final = 0x08
"""What a deallocated block reads as, and whether Write Zeroes has DEAC. NVM 4.1.5.1."""
NMIC_SHARED: Final = 1 << 0
NSATTR_WRITE_PROTECTED: Final = 1 << 0
NSTAT_READY: Final = 1 << 0
"""Base 5.17.2.8."""

ATTACH: Final = 0
DETACH: Final = 1
"""Select of Namespace Attachment. Base 5.19."""
CONTROLLER_LIST: Final = struct.Struct("<H2047H")
"""Count, controller ids. Base 4.4.1."""
FORMAT_SES_USER_DATA_ERASE: Final = 1
"""Secure Erase Settings of Format NVM. Base 5.14."""


# --- features: Base 5.27.1 -------------------------------------------------------------------------------------------


class Feature(enum.IntEnum):
    """Feature identifiers. Base figure 317."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR_CONFIGURATION = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT_CONFIGURATION = 0x0B
    TIMESTAMP = 0x0E
    HOST_BEHAVIOR_SUPPORT = 0x16
    COMMAND_SET_PROFILE = 0x19


class Select(enum.IntEnum):
    """Which value Get Features asks for. Base 5.15."""

    CURRENT = 0
    DEFAULT = 1
    SAVED = 2
    SUPPORTED = 3


ARBITRATION_NO_LIMIT: Final = 7
"""Arbitration Burst. Base 5.27.1.1."""
COMPOSITE_TEMPERATURE: Final = 323
TEMPERATURE_WARNING: Final = 343
TEMPERATURE_CRITICAL: Final = 373
"""The temperature, WCTEMP and CCTEMP in kelvin, as QEMU's."""
SENSOR_COMPOSITE: Final = 0
SENSOR_ALL: Final = 0xF
THRESHOLD_OVER: Final = 0
THRESHOLD_UNDER: Final = 1
"""Fields of Temperature Threshold. Base 5.27.1.3."""
ERROR_RECOVERY_DULBE: Final = 1 << 16
"""NVM 4.1.3.2."""
COALESCING_DISABLE: Final = 1 << 16
"""Interrupt Vector Configuration. Base 5.27.1.7."""
TIMESTAMP: Final = struct.Struct("<Q")
TIMESTAMP_MASK: Final = (1 << 48) - 1
TIMESTAMP_SYNCH: Final = 1 << 48
TIMESTAMP_ORIGIN_SHIFT: Final = 49
TIMESTAMP_FROM_HOST: Final = 1
"""Milliseconds, whether the clock may have stood still, where it came from. Base 5.27.1.11."""
HOST_BEHAVIOR_SIZE: Final = 512
"""ACRE, ETDAS, LBAFEE, one byte each, then reserved. Base 5.27.1.18."""

FEATURE_SAVE: Final = 1 << 31
FEATURE_NAMESPACE: Final = 1 << 1
FEATURE_CHANGEABLE: Final = 1 << 2
"""Bits of the answer to Select.SUPPORTED; bit 0 (saveable) is never set here."""

# --- log pages: Base 5.16.1 ------------------------------------------------------------------------------------------


class Log(enum.IntEnum):
    """Log page identifiers. Base figure 202."""

    SUPPORTED = 0x00
    ERROR_INFORMATION = 0x01
    SMART = 0x02
    FIRMWARE_SLOT = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMANDS_SUPPORTED = 0x05
    FEATURES_SUPPORTED = 0x12
    MI_COMMANDS_SUPPORTED = 0x13


LOG_RETAIN_EVENT: Final = 1 << 15
LOG_OFFSET_IS_INDEX: Final = 1 << 23
"""Command dword 10 and 14 of Get Log Page. Base 5.16.1."""
LOG_SUPPORTED: Final = 1 << 0
"""Base 5.16.1.1."""
ERROR_ENTRIES: Final = 64
"""ELPE + 1."""
LOCATION_NONE: Final = 0xFFFF
"""No parameter of the command is to blame."""
LOCATION_NSID: Final = 4
LOCATION_CDW10: Final = 40
"""Bytes of the SQE, for an error's parameter location."""
ERROR_ENTRY: Final = struct.Struct("<QHHHHQIBBxxQHB21x")
"""Error count, SQ id, command id, status field << 1, parameter location, LBA, namespace, vendor page, transport type,
command specific, transport specific, opcode and the rest. Base 5.16.1.2."""
ERROR_ENTRY_SIZE: Final = 64
assert ERROR_ENTRY.size == ERROR_ENTRY_SIZE
SMART_SIZE: Final = 512
FIRMWARE_SLOT_SIZE: Final = 512
"""Base 5.16.1.3, 5.16.1.4."""
CHANGED_NAMESPACES_MAX: Final = 1024
"""Base 5.16.1.5: more than this and the first entry is FFFFFFFFh, alone."""

WARNING_SPARE: Final = 1 << 0
WARNING_TEMPERATURE: Final = 1 << 1
WARNING_RELIABILITY: Final = 1 << 2
WARNING_READ_ONLY: Final = 1 << 3
WARNING_BACKUP: Final = 1 << 4
WARNING_PMR: Final = 1 << 5
"""Critical warning bits of the SMART log. Base figure 207."""

EFFECT_SUPPORTED: Final = 1 << 0
EFFECT_CONTENT: Final = 1 << 1
EFFECT_NAMESPACE_CAPABILITY: Final = 1 << 2
EFFECT_NAMESPACE_INVENTORY: Final = 1 << 3
EFFECT_CONTROLLER_CAPABILITY: Final = 1 << 4
EFFECT_EXCLUSIVE_NAMESPACE: Final = 1 << 16
"""Commands Supported and Effects. Base figure 211."""
FEATURE_SCOPE_NAMESPACE: Final = 1 << 20
FEATURE_SCOPE_CONTROLLER: Final = 1 << 21
"""Feature Identifiers Supported and Effects. Base 5.16.1.18."""
SMART_UNIT: Final = 512 * 1000
"""Bytes in one data unit of the SMART log. Base 5.16.1.3."""
