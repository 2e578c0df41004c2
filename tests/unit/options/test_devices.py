"""Controllers and namespaces from QEMU's words, refused with QEMU's messages."""

from __future__ import annotations

import uuid

import pytest

from nvmove.options.devices import ParsedController, parse_controllers, parse_device
from nvmove.options.syntax import OptionError
from tests.qemu_messages import BAD_DEVICES, BAD_NAMESPACES


def controllers(*devices: str) -> list[ParsedController]:
    return parse_controllers(map(parse_device, devices))


def refusal(*devices: str) -> str:
    with pytest.raises(OptionError) as raised:
        controllers(*devices)
    message = str(raised.value)
    where = f"-device {devices[-1]}: "
    assert message.startswith(where)
    return message.removeprefix(where)


def test_names_and_defaults_are_qemus() -> None:
    (found,) = controllers("nvme,serial=S1,drive=d0")
    config = found.finish({"d0": True})
    assert (config.serial, config.max_ioqpairs, config.msix_qsize, config.mdts, config.mqes) == ("S1", 64, 65, 7, 2047)
    assert [namespace.nsid for namespace in config.namespaces] == [1]
    assert config.namespaces[0].logical_block_size == 512


def test_the_implied_namespace_has_the_defaults_of_nvme_ns_where_only_that_has_properties() -> None:
    namespace = controllers("nvme,serial=S1,drive=d0")[0].namespaces[0]
    assert (namespace.mssrl, namespace.mcl, namespace.msrc, namespace.shared) == (128, 128, 127, False)
    assert namespace.uuid == uuid.UUID(int=0)


def test_a_namespace_goes_to_the_last_controller_before_it_or_to_its_bus() -> None:
    found = controllers(
        "nvme,serial=1", "nvme,serial=2,id=two", "nvme-ns,drive=a", "nvme-ns,drive=b,bus=nvme-bus.0", "nvme,serial=3"
    )
    assert [[one.drive for one in controller.namespaces] for controller in found] == [["b"], ["a"], []]


def test_the_first_free_namespace_id_is_taken() -> None:
    (found,) = controllers("nvme,serial=1,id=n", "nvme-ns,drive=a,nsid=2", "nvme-ns,drive=b", "nvme-ns,drive=c")
    assert {one.drive: one.nsid for one in found.namespaces} == {"a": 2, "b": 1, "c": 3}
    assert [one.nsid for one in found.finish(dict.fromkeys("abc", True)).namespaces] == [1, 2, 3]


def test_pci_properties_are_kept_for_the_function_in_its_place() -> None:
    (found,) = controllers("nvme,serial=1,addr=06.0,bus=rp,bootindex=-1,multifunction=on,romfile=")
    assert found.pci == {"addr": "06.0", "bus": "rp", "bootindex": -1, "multifunction": True, "romfile": ""}


def test_json_devices_are_the_same_devices() -> None:
    (json,) = controllers('{"driver":"nvme","serial":"1","mdts":5,"use-intel-id":true,"addr":48}')
    assert (json.config.mdts, json.config.use_intel_id, json.pci) == (5, True, {"addr": 48})


def test_deprecated_num_queues_counts_the_admin_queue() -> None:
    assert controllers("nvme,serial=1,num_queues=3")[0].config.max_ioqpairs == 2


def test_identifiers_of_a_namespace() -> None:
    text = "01234567-89ab-cdef-0123-456789abcdef"
    (found,) = controllers("nvme,serial=1", f"nvme-ns,drive=a,uuid={text},nguid={text},eui64=0x10")
    (namespace,) = found.namespaces
    assert (namespace.uuid, namespace.nguid) == (uuid.UUID(text), uuid.UUID(text).bytes)
    assert namespace.eui64 == 16


def test_auto_identifiers_are_random() -> None:
    (found,) = controllers("nvme,serial=1", *(f"nvme-ns,drive={d},uuid=auto,nguid=auto" for d in "ab"))
    first, second = found.namespaces
    assert first.uuid != second.uuid
    assert first.nguid != second.nguid


@pytest.mark.parametrize(("device", "message"), BAD_DEVICES)
def test_qemus_message_for_a_bad_device(device: str, message: str) -> None:
    assert refusal(device) == message


@pytest.mark.parametrize(("namespace", "message"), BAD_NAMESPACES)
def test_qemus_message_for_a_bad_namespace(namespace: str, message: str) -> None:
    assert refusal("nvme,serial=1,drive=d0", namespace) == message


def test_no_namespace_id_is_left_after_256() -> None:
    many = [f"nvme-ns,drive=x{number}" for number in range(257)]
    assert refusal("nvme,serial=1", *many) == "no free namespace id"


def test_namespaces_without_bus_are_refused_when_controllers_sit_on_several_buses() -> None:
    message = refusal("nvme,serial=1", "nvme,serial=2,bus=rp", "nvme-ns,drive=a")
    assert message == "there are nvme devices on several buses: say which one with bus=ID"


def test_unsupported_properties_are_named() -> None:
    assert refusal("nvme,serial=1,cmb_size_mb=64") == "property 'cmb_size_mb' is not supported yet"
    assert refusal("nvme,serial=1", "nvme-ns,drive=a,zoned=on") == "property 'zoned' is not supported yet"
    assert refusal("nvme-subsys,id=s") == "NVMe subsystems (nvme-subsys) are not supported yet"


def test_unsupported_properties_may_have_qemus_default() -> None:
    assert controllers("nvme,serial=1,cmb_size_mb=0,dbcs=on,legacy-cmb=off")


def test_shadow_doorbells_are_offered_unless_the_doorbells_are_mapped_or_dbcs_is_off() -> None:
    configs = [controllers(f"nvme,serial=1{more}")[0].config for more in ("", ",dbcs=off", ",x-doorbells=mapped")]
    assert [(config.dbcs, config.mapped_doorbells) for config in configs] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert controllers("nvme,serial=1,x-doorbells=messages")[0].config == configs[0]
    assert refusal("nvme,serial=1,x-doorbells=mapped,dbcs=on") == "x-doorbells=mapped and dbcs=on exclude each other"
    message = "Parameter 'x-doorbells' expects 'messages' or 'mapped', not 'on'"
    assert refusal("nvme,serial=1,x-doorbells=on") == message
