"""Controller registers (Base 3.1.3): their values, what of them the host may write, and what an enable demands."""

from __future__ import annotations

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.spec import (
    AQA_WRITABLE,
    CAP_CQR,
    CAP_CRWMS,
    CAP_CSS_MULTIPLE,
    CAP_CSS_NVM,
    CAP_MPSMAX_SHIFT,
    CAP_TO_SHIFT,
    CC_CSS,
    CC_EN,
    CC_MPS,
    CC_SHN,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST,
    PAGE,
    VERSION_2_0,
    Register,
    field,
)

MPSMAX = 4
"""Memory pages up to 64 KiB, as QEMU's nvme offers."""
TIMEOUT = 0xF
"""CAP.TO in units of 500 ms, as QEMU's."""
CSS_NVM = 0
CSS_MULTIPLE = 6
"""CC.CSS: the NVM command set alone, or all sets that Identify lists."""


class Registers:
    """The register file. Values are what a read returns."""

    def __init__(self, config: ControllerConfig) -> None:
        self.cap = (
            config.mqes
            | CAP_CQR
            | TIMEOUT << CAP_TO_SHIFT
            | CAP_CSS_NVM
            | CAP_CSS_MULTIPLE
            | MPSMAX << CAP_MPSMAX_SHIFT
            | CAP_CRWMS
        )
        self.vs = VERSION_2_0
        self.reset()

    def reset(self) -> None:
        """Return to the values after power-on."""
        self.intms = self.cc = self.csts = 0
        self.aqa = self.asq = self.acq = 0

    def disable(self) -> None:
        """Controller reset: all but AQA, ASQ and ACQ return to their initial values (Base 3.7.2)."""
        self.intms = self.csts = 0

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset` below 0x1000; what no register covers reads as zero."""
        image = bytearray(Register.CRTO + 4)
        for register, length, value in (
            (Register.CAP, 8, self.cap),
            (Register.VS, 4, self.vs),
            (Register.INTMS, 4, self.intms),
            (Register.INTMC, 4, self.intms),
            (Register.CC, 4, self.cc),
            (Register.CSTS, 4, self.csts),
            (Register.AQA, 4, self.aqa),
            (Register.ASQ, 8, self.asq),
            (Register.ACQ, 8, self.acq),
            (Register.CRTO, 4, TIMEOUT),
        ):
            image[register : register + length] = value.to_bytes(length, "little")
        return int.from_bytes(image[offset : offset + size], "little")

    def write_aqa(self, value: int) -> None:
        """Store the sizes of the admin queues."""
        self.aqa = value & AQA_WRITABLE

    def write_address(self, offset: int, size: int, value: int) -> None:
        """Store into ASQ or ACQ, whole or one half."""
        name = "asq" if offset < Register.ACQ else "acq"
        if size == 8:
            new = value
        elif offset & 4:
            new = getattr(self, name) & 0xFFFF_FFFF | value << 32
        else:
            new = getattr(self, name) & ~0xFFFF_FFFF | value
        setattr(self, name, new & ~(PAGE - 1))

    @property
    def enabled(self) -> bool:
        """CC.EN."""
        return bool(self.cc & CC_EN)

    @property
    def ready(self) -> bool:
        """CSTS.RDY."""
        return bool(self.csts & CSTS_RDY)

    @property
    def failed(self) -> bool:
        """CSTS.CFS."""
        return bool(self.csts & CSTS_CFS)

    @property
    def shutdown_status(self) -> int:
        """CSTS.SHST, in place: 0, CSTS_SHST_OCCURRING or CSTS_SHST_COMPLETE."""
        return self.csts & CSTS_SHST

    def set_shutdown_status(self, status: int) -> None:
        """Set CSTS.SHST."""
        self.csts = self.csts & ~CSTS_SHST | status

    @property
    def runs(self) -> bool:
        """Whether commands are fetched. Nothing else says so: a restored controller runs because its registers do."""
        return self.enabled and self.ready and not self.failed and not self.shutdown_status

    @property
    def shutdown_notification(self) -> int:
        """CC.SHN."""
        return field(self.cc, CC_SHN)

    @property
    def page_size(self) -> int:
        """The memory page size in bytes that CC.MPS selects."""
        return self.page_size_of(self.cc)

    @staticmethod
    def page_size_of(cc: int) -> int:
        """The memory page size in bytes that `cc` selects."""
        return PAGE << field(cc, CC_MPS)

    @property
    def admin_sizes(self) -> tuple[int, int]:
        """Entries of the admin submission and completion queue, from AQA."""
        return (self.aqa & 0xFFF) + 1, (self.aqa >> 16 & 0xFFF) + 1

    def enable_fault(self) -> str | None:
        """Return why the controller cannot be enabled with these values, or None."""
        sq_size, cq_size = self.admin_sizes
        if sq_size < 2 or cq_size < 2:
            return "AQA gives a queue of one entry"
        if field(self.cc, CC_MPS) > MPSMAX:
            return "CC.MPS exceeds CAP.MPSMAX"
        if field(self.cc, CC_CSS) not in {CSS_NVM, CSS_MULTIPLE}:
            return "CC.CSS selects no supported command set"
        for name, address in (("ASQ", self.asq), ("ACQ", self.acq)):
            if address & (self.page_size - 1):
                return f"{name} is not aligned to a memory page"
        return None
