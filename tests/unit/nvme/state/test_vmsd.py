"""State → section `nvme` → state: nothing is lost or guessed; what does not fit together is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmove.nvme.state import saved as state_module
from nvmove.nvme.state import vmsd_ours as ours
from nvmove.nvme.state.vmsd import NVME, DeviceState, PciImage, dump, from_tree, load, to_tree, zeroes
from nvmove.nvme.state.vmsd_qemu import CQ, QEMU_NVME
from nvmove.vmstate.schema import Reader, StateError
from nvmove.vmstate.stream import Section
from nvmove.vmstate.stream import dump as dump_stream
from nvmove.vmstate.tree import Tree
from tests.nvme_commands import CommandHost
from tests.states import SAMPLES, busy, config_space, fresh, pin, shadow, states

GOLDEN = Path(__file__).parents[3] / "data" / "state-v1"


@settings(deadline=None, max_examples=60)
@given(states())
def test_every_state_is_loaded_as_it_was_saved(state: DeviceState) -> None:
    assert load(dump(state)) == state


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_loaded_as_it_was_saved(name: str) -> None:
    assert load(dump(SAMPLES[name]())) == SAMPLES[name]()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_first_format_keeps_loading(name: str) -> None:
    golden = (GOLDEN / f"{name}.nvmove").read_bytes()
    assert load(golden) == SAMPLES[name]()


def test_what_a_controller_at_work_saves_is_what_another_loads() -> None:
    host = CommandHost()
    host.write(0, b"x" * 512)
    host.aer()
    controller = host.controller
    assert controller.pause(0)
    saved = controller.save()
    pci = PciImage(config_space(saved.identity.msix_qsize), bytes(16 * saved.identity.msix_qsize))
    loaded = load(dump(DeviceState(pci, saved))).controller
    assert loaded == saved
    other = CommandHost()
    assert other.controller.pause(0)
    other.controller.load(loaded)
    again = other.controller.save()
    for state in (saved, again):  # clocks
        state.smart.power_on_ms = state.features.timestamp_age = 0
    assert again == saved


def test_every_class_of_the_state_has_a_part_in_the_saved_state() -> None:
    classes = {c for _, c in inspect.getmembers(state_module, dataclasses.is_dataclass)}
    seen = set()

    def walk(value: object) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            seen.add(type(value))
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(load(dump(shadow())).controller)
    assert seen == classes


def test_the_fields_are_qemus_and_subsections_follow_only_when_needed() -> None:
    tree = to_tree(fresh())
    out = bytearray()
    written = NVME.write(out, tree)
    assert [s["vmsd_name"] for s in written["subsections"]] == [ours.IDENTITY, ours.NAMESPACES]
    reader = Reader(bytes(out))
    qemus = QEMU_NVME.read(reader, 1)
    assert qemus.keys() == {f.name for f in QEMU_NVME.fields}
    assert reader.data[reader.position] == 5


def test_what_a_state_does_not_use_is_not_in_it() -> None:
    full = {s["vmsd_name"] for s in NVME.write(bytearray(), to_tree(shadow()))["subsections"]}
    assert full == {s.name for s in ours.SUBSECTIONS} - {ours.IRQ_STATUS, ours.REQUESTS}
    assert ours.IRQ_STATUS in {s["vmsd_name"] for s in NVME.write(bytearray(), to_tree(pin()))["subsections"]}


def test_more_aers_than_qemu_can_count_are_saved_all() -> None:
    state = busy()
    state.controller.events.outstanding = list(range(1000, 1256))
    assert load(dump(state)) == state


def test_qemus_derived_fields_are_those_of_qemu() -> None:
    tree = to_tree(busy())
    assert (tree["qs_created"], tree["page_size"], tree["page_bits"], tree["max_prp_ents"]) == (True, 4096, 12, 512)
    assert (tree["outstanding_aers"], tree["aer_queued"], tree["aer_mask"]) == (2, 2, 5)
    assert tree["cq_pending"] == 1
    assert tree["bar"]["intms"] == tree["bar"]["intmc"]
    assert [sq and sq["sqid"] for sq in tree["sq"]] == [0, 1, None, 3, *[None] * 5]
    assert tree["features.hbs"]["cdfe"] == 0x1234
    assert tree["parent_obj[1]"]["msix"][-2:] == b"\x02\x01"
    assert tree["namespace"]["id_ns"]["nsze"] == 1 << 21


Change = Callable[[Tree], Any]
CONTRADICTIONS: list[tuple[Change, str]] = [
    (lambda t: t["bar"].update(cmbsz=1), "nvme.bar.cmbsz: 1,"),
    (lambda t: t["bar"].update(intmc=1), "nvme.bar.intmc: 1,"),
    (lambda t: t["bar"].update(css=b"\0\1" + bytes(482)), "nvme.bar.css: byte 1 is 0x01,"),
    (lambda t: t.update(page_size=8192), "nvme.page_size: 8192,"),
    (lambda t: t.update(aer_queued=3), "nvme.aer_queued: 3,"),
    (lambda t: t.update(cq_pending=0), "nvme.cq_pending: 0,"),
    (lambda t: t.update(conf_msix_qsize=10), "nvme.conf_msix_qsize: 10, but the MSI-X capability has 9"),
    (lambda t: t["parent_obj[1]"].update(msix=bytes(145) + b"\2"), "nvme.parent_obj[1].msix: a message pending for"),
    (lambda t: t["parent_obj[0]"].update(irq_state=b"\0\0\0\2" + bytes(12)), "nvme.parent_obj[0].irq_state: byte 3"),
    (lambda t: t["sq"][1].update(sqid=2), "nvme.sq[1].sqid: 2, not its index"),
    (lambda t: t["cq"][4].update(cqid=1), "nvme.cq[4].cqid: 1, not its index"),
    (lambda t: t["cq"][1].update(irq_enabled=2), "nvme.cq[1].irq_enabled: 2,"),
    (lambda t: t["cq"][1].update(req_list=[{}]), "nvme.cq[1].req_list: completions that were not posted"),
    (lambda t: t["aer_reqs"].__setitem__(0, None), "nvme.aer_reqs: a request that is not there"),
    (lambda t: t["aer_reqs"][1]["cmd"].update(opcode=2), "nvme.aer_reqs[1].cmd.opcode: 2,"),
    (lambda t: t["namespace"]["id_ns"].update(nsze=5), "nvme.namespace.id_ns.nsze: 5,"),
    (lambda t: t["namespace"]["lbaf"].update(ms=8), "nvme.namespace.lbaf.ms: 8,"),
    (lambda t: t["namespace"]["tmp"].update(enable_write_cache=True), "nvme.namespace.tmp.enable_write_cache: True"),
    (lambda t: t[ours.QUEUES]["queues"][0].update(sqid=2), f"{ours.QUEUES}: there is no submission queue 2"),
    (lambda t: t[ours.QUEUES]["queues"].reverse(), f"{ours.QUEUES}.queues[0]."),
    (lambda t: t[ours.QUEUES]["queues"].append(dict(t[ours.QUEUES]["queues"][0])), f"{ours.QUEUES}.queues: 3 entries"),
    (lambda t: t[ours.NAMESPACES]["namespaces"][1].update(nsid=1), f"{ours.NAMESPACES}: the ids [1, 1, 7] do not"),
    (lambda t: t[ours.NAMESPACES]["namespaces"][0].update(nsid=0), f"{ours.NAMESPACES}: the ids [0, 2, 7] do not"),
    (lambda t: t[ours.IRQ_STATUS].update(high=b"\0"), f"{ours.IRQ_STATUS}.high: byte 0 is 0x00,"),
    (lambda t: t.pop(ours.IDENTITY), f"nvme: subsection '{ours.IDENTITY}' is missing: this state is not nvmove's"),
]


@pytest.mark.parametrize(("change", "says"), CONTRADICTIONS, ids=[says.split(":")[0] for _, says in CONTRADICTIONS])
def test_a_state_that_contradicts_itself_is_refused_by_the_name_of_the_field(change: Change, says: str) -> None:
    tree = copy.deepcopy(to_tree(busy()))
    change(tree)
    with pytest.raises(StateError) as caught:
        from_tree(tree)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_state_that_qemu_saved_is_refused_and_says_why() -> None:
    tree = {name: value for name, value in to_tree(busy()).items() if not name.startswith(ours.PREFIX)}
    with pytest.raises(StateError, match="this state is not nvmove's"):
        from_tree(tree)


def test_a_stream_of_no_section_or_two_is_refused() -> None:
    with pytest.raises(StateError, match="the state has no section 'nvme'"):
        load(dump_stream([]))
    section = (Section("nvme", to_tree(fresh())), NVME)
    with pytest.raises(StateError, match="section 'nvme' is there twice"):
        load(dump_stream([section, section]))


def forged(data: bytes, change: Callable[[bytearray], Any]) -> bytes:
    """`data` with other bytes in its section, and a checksum that fits them."""
    described = json.loads(data[(end := data.rindex(b'{"page_size"')) :])
    body = bytearray(data[: end - 5])
    change(body)
    text = json.dumps(described | {"checksum": zlib.crc32(body)}).encode()
    return bytes(body) + b"\x06" + len(text).to_bytes(4, "big") + text


def test_every_truncation_is_refused() -> None:
    data = dump(busy())
    for cut in random.Random(1).sample(range(len(data)), 200):
        with pytest.raises(StateError):
            load(data[:cut])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_forged_byte_is_refused_or_loads_as_a_state_that_saves_again(data: st.DataObject) -> None:
    original = dump(busy())
    size = original.rindex(b'{"page_size"') - 5
    position, flip = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))

    def change(body: bytearray) -> None:
        body[position] ^= flip

    try:
        state = load(forged(original, change))
    except StateError as error:
        assert "\n" not in str(error)
    else:
        assert load(dump(state)) == state


def test_only_structures_of_a_fixed_size_have_an_empty_form() -> None:
    with pytest.raises(TypeError, match=r"nvme-cq\.req_list is of no fixed size"):
        zeroes(CQ)
