"""A host driver of a controller whose doorbells are a page that the client maps."""

from __future__ import annotations

import msgspec

from tests.lines import Lines
from tests.nvme_host import CONFIG, Host

MAPPED = msgspec.structs.replace(CONFIG, mapped_doorbells=True, dbcs=False)


class MappedHost(Host):
    """A driver that writes doorbells into the page; then somebody looks."""

    def __init__(self, lines: Lines | None = None) -> None:
        super().__init__(config=MAPPED, lines=lines)
        self.share()

    def share(self) -> None:
        self.page = memoryview(bytearray(4096)).cast("I")
        self.controller.doorbells.share(self.page)

    def store(self, index: int, value: int) -> None:
        self.page[index] = value

    def ring_sq(self, qid: int) -> None:
        self.store(2 * qid, self.rings[qid].tail)
        self.controller.doorbells.scan()

    def ring_cq(self, cqid: int) -> None:
        self.store(2 * cqid + 1, self.cqs[cqid].head)
        self.controller.doorbells.scan()

    def look(self) -> None:
        """Somebody looks at the page, and queue 1 at its doorbells."""
        self.controller.doorbells.scan()
        self.engine.kick(1)


def mapped(*, sq_size: int = 16, cq_size: int = 16, lines: Lines | None = None) -> MappedHost:
    """A host that has a queue pair."""
    host = MappedHost(lines)
    host.enable()
    host.create(sq_size=sq_size, cq_size=cq_size)
    return host
