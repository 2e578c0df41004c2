"""QEMU's own nvme section: the golden bytes are what QEMU 11.1.3 wrote for a Linux guest with two I/O queues."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from nvmove.nvme.state.vmsd_qemu import QEMU_NVME, msix_vectors
from nvmove.vmstate.schema import Reader, StateError
from nvmove.vmstate.tree import Tree

DATA = Path(__file__).parents[3] / "data"
HEADER = 1 + 4 + 1 + len("0000:00:01.0/nvme") + 4 + 4
FOOTER = 5


@pytest.fixture(scope="module")
def body() -> bytes:
    return gzip.decompress((DATA / "qemu-11.1-nvme-section.gz").read_bytes())[HEADER:-FOOTER]


@pytest.fixture(scope="module")
def tree(body: bytes) -> Tree:
    reader = Reader(body)
    tree = QEMU_NVME.read(reader, 1)
    assert reader.left == 0
    return tree


def test_a_section_that_qemu_saved_is_read_whole(tree: Tree) -> None:
    assert tree["parent_obj[0]"]["version_id"] == 2
    assert tree["bar"]["cc"] == 0x00460061
    assert msix_vectors(tree["parent_obj[0]"]["config[1]"]) == 65
    assert [sq["sqid"] for sq in tree["sq"] if sq] == [0, 1, 2]
    assert 65 == len(tree["sq"]) == len(tree["cq"])
    assert [request["cmd"]["opcode"] for request in tree["aer_reqs"]] == [0x0C]
    assert tree["namespace"]["id_ns"]["nsze"] == 512 << 10


def test_a_section_that_qemu_saved_is_written_as_qemu_wrote_it(tree: Tree, body: bytes) -> None:
    out = bytearray()
    QEMU_NVME.write(out, tree)
    assert body == bytes(out)


@pytest.mark.parametrize("next_capability", [0, 0x60])
def test_config_space_without_msix_is_refused_and_a_loop_ends(next_capability: int) -> None:
    config = bytearray(4096)
    config[0x34], config[0x60], config[0x61] = 0x60, 1, next_capability
    with pytest.raises(StateError, match="no MSI-X capability"):
        msix_vectors(bytes(config))
