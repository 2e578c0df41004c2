"""Words that QEMU 11.1.3 refuses, and its messages: unit tests hold nvmove to them, a guest test holds QEMU to them."""

from __future__ import annotations

BAD_DEVICES = [
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
]
"""`-device`, message."""

BAD_NAMESPACES = [
    ("nvme-ns,nsid=1", "block backend not configured"),
    ("nvme-ns,drive=x,nsid=300", "invalid namespace id (must be between 0 and 256)"),
    ("nvme-ns,drive=x,nsid=1", "namespace id '1' already allocated"),
    ("nvme-ns,drive=d0", "Drive 'd0' is already in use by another device"),
    ("nvme-ns,drive=x,bus=xx", "Bus 'xx' not found"),
    ("nvme-ns,drive=x,uuid=bad", "Property 'nvme-ns.uuid' doesn't take value 'bad'"),
    ("nvme-ns,drive=x,nguid=bad", "Property 'nvme-ns.nguid' doesn't take value 'bad'"),
    ("nvme-ns,drive=x,eui64=zz", "Parameter 'eui64' expects integer"),
]
"""`-device nvme-ns`, behind `-device nvme,serial=1,drive=d0`; message."""

BAD_DRIVES = [
    ("rerror=enospc", "'enospc' invalid read error action"),
    ("werror=foo", "'foo' invalid write error action"),
    ("cache=foo", "invalid cache option"),
    ("discard=foo", "Invalid discard option"),
    ("aio=foo", "invalid aio option"),
    (
        "aio=native",
        "aio=native was specified, but it requires cache.direct=on, which was not specified.",
    ),
    ("detect-zeroes=foo", "invalid parameter value: foo"),
]
"""Added to `-drive if=none,id=d0,file=…,format=raw`; message."""
