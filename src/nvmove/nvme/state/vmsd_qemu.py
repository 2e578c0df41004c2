"""The section `nvme` version 1 as QEMU 11.1 writes it: every field, in its order and size.

Measured with `qemu-system-x86_64 -M q35 -dump-vmstate` and in a migration file with the description at its end.
Names are QEMU's. What QEMU lacks is in subsections of ours (vmsd.py). The length of three arrays follows from other
fields: the MSI-X state from the capability in config space, queues from `conf_ioqpairs`, AERs from `outstanding_aers`.
"""

from __future__ import annotations

from nvmove.vmstate.fields import Array, Bool, Buffer, Int, Pointers, Queue, Struct, reserved
from nvmove.vmstate.schema import Field, StateError, VMStateDescription
from nvmove.vmstate.tree import Tree

CONFIG_SIZE = 4096
"""Bytes of PCI Express configuration space."""


def u8(name: str) -> Int:
    """A byte."""
    return Int(name, 1)


def u16(name: str) -> Int:
    """Two bytes."""
    return Int(name, 2)


def u32(name: str) -> Int:
    """Four bytes."""
    return Int(name, 4)


def u64(name: str) -> Int:
    """Eight bytes."""
    return Int(name, 8)


def structure(name: str, *fields: Field, version: int = 1) -> VMStateDescription:
    """A description of a part."""
    return VMStateDescription(name, version, version, fields)


def msix_vectors(config: bytes) -> int:
    """Return how many MSI-X vectors the function with this config space has; raise StateError.

    (PCI 3.0, 6.7 and 6.8.2: the list of capabilities at 34h, MSI-X is 11h, the table's size - 1 is in Message Control.)
    """
    pointer = config[0x34] & 0xFC
    for _ in range(48):
        if pointer < 0x40:
            break
        if config[pointer] == 0x11:
            return (int.from_bytes(config[pointer + 2 : pointer + 4], "little") & 0x7FF) + 1
        pointer = config[pointer + 1] & 0xFC
    raise StateError("nvme.parent_obj[0].config[1]: no MSI-X capability")


def msix_size(root: Tree) -> int:
    """Return the length of QEMU's MSI-X state: the table, then the pending bits."""
    vectors = msix_vectors(root["parent_obj[0]"]["config[1]"])
    return 16 * vectors + (vectors + 7) // 8


PCI_DEVICE = structure(
    "PCIDevice",
    Int("version_id", 4, signed=True, label="int32 le"),  # "le": less or equal is loaded; the number is big-endian
    Buffer("config[1]", CONFIG_SIZE, "pci config"),
    Buffer("irq_state", 16, "pci irq state"),
    version=2,
)
MSIX = structure("msix", Buffer("msix", msix_size, "msix state"), version=0)

BAR = structure(
    "nvme-bar",
    u64("cap"),
    u32("vs"),
    u32("intms"),
    u32("intmc"),
    u32("cc"),
    reserved("rsvd24", 4),
    u32("csts"),
    u32("nssr"),
    u32("aqa"),
    u64("asq"),
    u64("acq"),
    u32("cmbloc"),
    u32("cmbsz"),
    u32("bpinfo"),
    u32("bprsel"),
    u64("bpmbl"),
    u64("cmbmsc"),
    u32("cmbsts"),
    reserved("rsvd92", 3492),
    u32("pmrcap"),
    u32("pmrctl"),
    u32("pmrsts"),
    u32("pmrebs"),
    u32("pmrswtp"),
    u32("pmrmscl"),
    u32("pmrmscu"),
    reserved("css", 484),
)

CQE = structure("nvme-cqe", u32("result"), u32("dw1"), u16("sq_head"), u16("sq_id"), u16("cid"), u16("status"))
SGL = structure("nvme-request-cmd-dptr-sgl", u64("addr"), u32("len"), reserved("rsvd", 3), u8("type"))
DPTR = structure("nvme-request-cmd-dptr", u64("prp1"), u64("prp2"), Struct("sgl", SGL))
COMMAND = structure(
    "nvme-request-cmd",
    u8("opcode"),
    u8("flags"),
    u16("cid"),
    u32("nsid"),
    u64("res1"),
    u64("mptr"),
    Struct("dptr", DPTR),
    *(u32(f"cdw{number}") for number in range(10, 16)),
)
REQUEST = structure("nvme-request", u16("status"), Struct("cqe", CQE), Struct("cmd", COMMAND))

EVENT_RESULT = structure("nvme-async-event-result", u8("event_type"), u8("event_info"), u8("log_page"), u8("resv"))
EVENT = structure("nvme-async-event", Struct("result", EVENT_RESULT))

LBAF = structure("nvme_lbaf", u16("ms"), u8("ds"), u8("rp"))
ID_NS = structure(
    "nvme_id_ns",
    u64("nsze"),
    u64("ncap"),
    u64("nuse"),
    *map(u8, ("nsfeat", "nlbaf", "flbas", "mc", "dpc", "dps", "nmic", "rescap", "fpi", "dlfeat")),
    *map(u16, ("nawun", "nawupf", "nacwu", "nabsn", "nabo", "nabspf", "noiob")),
    reserved("nvmcap", 16),
    *map(u16, ("npwg", "npwa", "npdg", "npda", "nows", "mssrl")),
    u32("mcl"),
    u8("msrc"),
    reserved("rsvd81", 18),
    u8("nsattr"),
    u16("nvmsetid"),
    u16("endgid"),
    reserved("nguid", 16),
    u64("eui64"),
    Array("lbaf", LBAF, 64),
    reserved("vs", 3712),
)
ID_NS_NVM = structure(
    "nvme_id_ns_nvm",
    u64("lbstm"),
    u8("pic"),
    reserved("rsvd9", 3),
    Array("elbaf", u32("elbaf"), 64),
    *map(u32, ("npdgl", "nprg", "npra", "nors", "npdal")),
    reserved("rsvd288", 3808),
)
ID_NS_IND = structure(
    "nvme_id_ns_ind",
    *map(u8, ("nsfeat", "nmic", "rescap", "fpi")),
    u32("anagrpid"),
    u8("nsattr"),
    u8("rsvd9"),
    u16("nvmsetid"),
    u16("endgrpid"),
    u8("nstat"),
    reserved("rsvd15", 4081),
)
ATOMIC = structure(
    "nvme-atomic",
    u32("atomic_max_write_size"),
    u64("atomic_boundary"),
    u64("atomic_nabo"),
    Bool("atomic_writes"),
)
NAMESPACE = structure(
    "nvme_ns",
    Struct("tmp", structure("nvme_ns_tmp", Bool("enable_write_cache"), version=0), inline=True),
    Struct("id_ns", ID_NS),
    Struct("id_ns_nvm", ID_NS_NVM),
    Struct("id_ns_ind", ID_NS_IND),
    Struct("lbaf", LBAF),
    u32("nlbaf"),
    u8("csi"),
    u16("status"),
    u8("pif"),
    u16("zns.zrwas"),
    u16("zns.zrwafg"),
    u32("zns.numzrwa"),
    u32("features.err_rec"),
    Struct("atomic", ATOMIC),
)

SQ = structure("nvme-sq", u16("sqid"), u16("cqid"), u32("head"), u32("tail"), u32("size"), u64("dma_addr"))
CQ = structure(
    "nvme-cq",
    u8("phase"),
    u16("cqid"),
    u16("irq_enabled"),
    u32("head"),
    u32("tail"),
    u32("vector"),
    u32("size"),
    u64("dma_addr"),
    Queue("req_list", REQUEST, always_empty=True),
)
HOST_BEHAVIOUR = structure(
    "nvme-hbs", u8("acre"), u8("etdas"), u8("lbafee"), u8("rsvd3"), u16("cdfe"), reserved("rsvd6", 506)
)


def queues(root: Tree) -> int:
    """Return how many entries the arrays of queues have: the I/O queue pairs and the admin pair."""
    return int(root["conf_ioqpairs"]) + 1


def outstanding(root: Tree) -> int:
    """Return how many AERs are outstanding."""
    return int(root["outstanding_aers"])


FIELDS: tuple[Field, ...] = (
    Struct("parent_obj[0]", PCI_DEVICE),
    Struct("parent_obj[1]", MSIX),
    Struct("bar", BAR),
    Bool("qs_created"),
    u32("page_size"),
    u16("page_bits"),
    u16("max_prp_ents"),
    u32("max_q_ents"),
    u8("outstanding_aers"),
    u32("irq_status"),
    Int("cq_pending", 4, signed=True),
    u64("host_timestamp"),
    u64("timestamp_set_qemu_clock_ms"),
    u64("starttime_ms"),
    u16("temperature"),
    u8("smart_critical_warning"),
    u32("conf_msix_qsize"),
    u32("conf_ioqpairs"),
    u64("dbbuf_dbs"),
    u64("dbbuf_eis"),
    Bool("dbbuf_enabled"),
    u8("aer_mask"),
    Pointers("aer_reqs", REQUEST, outstanding),
    Queue("aer_queue", EVENT),
    Int("aer_queued", 4, signed=True),
    Struct("namespace", NAMESPACE),
    Pointers("sq", SQ, queues),
    Pointers("cq", CQ, queues),
    u16("features.temp_thresh_hi"),
    u16("features.temp_thresh_low"),
    u32("features.async_config"),
    Struct("features.hbs", HOST_BEHAVIOUR),
    u32("dn"),
    Struct("atomic", ATOMIC),
)

QEMU_NVME = VMStateDescription("nvme", 1, 1, FIELDS)
"""QEMU's own section, without the subsections of ours."""
