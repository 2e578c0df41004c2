"""Every error message here is what QEMU 11.1.3 says to the same words (after `qemu-system-x86_64: `)."""

from __future__ import annotations

import uuid

import pytest

from nvmove.options.devices import ParsedController, parse_controllers, parse_device
from nvmove.options.syntax import OptionError


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


def test_the_implied_namespace_has_zeroes_where_only_nvme_ns_has_properties() -> None:
    namespace = controllers("nvme,serial=S1,drive=d0")[0].namespaces[0]
    assert (namespace.mssrl, namespace.mcl, namespace.msrc, namespace.shared) == (0, 0, 0, False)
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


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nvme", "serial property not set"),
        (
            "nvme,serial=123456789012345678901",
            "'serial' parameter '123456789012345678901' can be at most '20' characters",
        ),
        (
            "nvme,serial=1,firmware-version=123456789",
            "'firmware-version' parameter '123456789' can be at most '8' characters",
        ),
        ("nvme,serial=1,foo=1", "Property 'nvme.foo' not found"),
        ("nvme,serial=1,max_ioqpairs=0", "max_ioqpairs must be between 1 and 65535"),
        ("nvme,serial=1,max_ioqpairs=65536", "max_ioqpairs must be between 1 and 65535"),
        ("nvme,serial=1,max_ioqpairs=x", "Parameter 'max_ioqpairs' expects integer"),
        ("nvme,serial=1,max_ioqpairs=4294967297", "Parameter 'max_ioqpairs' expects uint32_t"),
        ("nvme,serial=1,num_queues=1", "max_ioqpairs must be between 1 and 65535"),
        ("nvme,serial=1,msix_qsize=0", "msix_qsize must be between 1 and 2048"),
        ("nvme,serial=1,msix_qsize=70000", "Parameter 'msix_qsize' expects uint16_t"),
        ("nvme,serial=1,mdts=256", "Parameter 'mdts' expects uint8_t"),
        ("nvme,serial=1,mqes=0", "mqes property cannot be less than 1"),
        ("nvme,serial=1,vsl=0", "vsl must be non-zero"),
        ("nvme,serial=1,use-intel-id=maybe", "Parameter 'use-intel-id' expects 'on' or 'off'"),
        ("nvme,serial=1,bootindex=x", "Parameter 'bootindex' expects integer"),
        ("nvme,serial=1,drive=d,write-cache=foo", "Parameter 'write-cache' does not accept value 'foo'"),
        (
            "nvme,serial=1,drive=d,logical_block_size=1000",
            "parameter logical_block_size must be a power of 2 between 512 and 2097152",
        ),
        ("nvme,serial=1,drive=d,logical_block_size=4096", "logical_block_size > physical_block_size not supported"),
        ("nvme,serial=1,drive=d,min_io_size=100", "min_io_size must be a multiple of logical_block_size"),
        ("nvme,serial=1,drive=d,min_io_size=64M", "min_io_size must not exceed 65535 logical blocks"),
        (
            "nvme,serial=1,drive=d,discard_granularity=100",
            "discard_granularity must be a multiple of logical_block_size",
        ),
        ("nvme,serial=1,drive=d,discard_granularity=x", "Parameter 'discard_granularity' expects size"),
        ("nvme-ns,drive=d", "No 'nvme-bus' bus found for device 'nvme-ns'"),
        ('{"driver":"nvme","serial":1}', "Invalid parameter type for 'serial', expected: string"),
        ('{"driver":"nvme","serial":"1","mdts":300}', "Parameter 'mdts' expects uint8_t"),
    ],
)
def test_qemus_message_for_a_bad_device(device: str, message: str) -> None:
    assert refusal(device) == message


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ("nvme-ns,nsid=1", "block backend not configured"),
        ("nvme-ns,drive=x,nsid=300", "invalid namespace id (must be between 0 and 256)"),
        ("nvme-ns,drive=x,nsid=1", "namespace id '1' already allocated"),
        ("nvme-ns,drive=d0", "Drive 'd0' is already in use by another device"),
        ("nvme-ns,drive=x,bus=xx", "Bus 'xx' not found"),
        ("nvme-ns,drive=x,uuid=bad", "Property 'nvme-ns.uuid' doesn't take value 'bad'"),
        ("nvme-ns,drive=x,nguid=bad", "Property 'nvme-ns.nguid' doesn't take value 'bad'"),
        ("nvme-ns,drive=x,eui64=zz", "Parameter 'eui64' expects integer"),
    ],
)
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
