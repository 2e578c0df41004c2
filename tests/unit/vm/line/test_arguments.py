"""Lifting, as a table of command lines: what QEMU gets, and what nvmove serves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmove.block.config import OpenOptions
from nvmove.errors import UserError
from nvmove.vm.line import arguments
from nvmove.vm.line.endpoints import MonitorMode, StdioAddress, UnixAddress
from nvmove.vm.line.plan import Plan

RUN = Path("/run/x")
TAIL = (
    "-S -chardev socket,id=nvmove-qmp,path=/run/x/qmp -qmp chardev:nvmove-qmp "
    "-chardev socket,id=nvmove-qtest,path=/run/x/qtest -object qtest,id=nvmove-qtest,chardev=nvmove-qtest,log=none"
)
RAM = "-object memory-backend-memfd,id=nvmove-ram,size=134217728,share=on -machine memory-backend=nvmove-ram"
VIRTFS = "-virtfs must stand before it, so that the PCI devices keep their addresses"
RAW = "-drive if=none,id=d0,file=disk.img,format=raw"
QCOW2 = "-drive if=none,id=d0,file=disk.qcow2,format=qcow2"
NVME = "-device nvme,serial=S1,drive=d0"


class FakeQemu:
    path = Path("/usr/bin/qemu-system-x86_64")
    version_text = "11.1.3"

    def property_types(self, driver: str) -> Mapping[str, str]:
        known = {"virtio-net-pci": {"mac": "str", "vectors": "uint32", "csum": "bool", "host_mtu": "uint16"}}
        return known.get(driver, {})

    def compat_properties(self, machine: str) -> Mapping[str, Mapping[str, str]]:
        assert machine[-2] == ".", "only versioned types have any"
        return {
            "pc-q35-6.1": {"nvme-ns": {"eui64-default": "on", "shared": "off"}, "pci-device": {"x": "on"}},
            "pc-q35-5.2": {"nvme": {"msix-exclusive-bar": "on"}, "nvme-ns": {"shared": "off"}},
        }.get(machine, {})


def lift(line: str) -> Plan:
    return arguments.lift(["qemu-system-x86_64", *shlex.split(line)], RUN, FakeQemu())


def refusal(line: str) -> str:
    with pytest.raises(UserError) as raised:
        lift(line)
    message = str(raised.value)
    assert "\n" not in message
    return message


def vfio(number: int = 0, ident: str = "", **more: object) -> str:
    socket = {"type": "unix", "path": f"/run/x/nvme{number}"}
    device = {"driver": "vfio-user-pci", "id": ident or f"nvmove{number}", "socket": socket, "x-msg-timeout": 2**31 - 1}
    device |= more
    return f"-device '{json.dumps(device, separators=(',', ':'))}'"


@pytest.mark.parametrize(
    ("line", "for_qemu"),
    [
        (f"-M q35 {RAW} {NVME} -kernel k", f"-M q35 {vfio()} -kernel k {RAM} {TAIL}"),
        (
            f"{QCOW2},werror=enospc,rerror=report {NVME},addr=6,id=disk0,bootindex=1",
            "-drive if=none,id=d0,file=disk.qcow2,format=qcow2,node-name=nvmove-node0 "
            f"{vfio(ident='disk0', addr='6', bootindex=1)} {RAM} {TAIL}",
        ),
        (f"{RAW} --device nvme,serial=S1,drive=d0", f"{vfio()} {RAM} {TAIL}"),
        (f"{RAW} -device nvme,serial=1,id=n -device nvme-ns,drive=d0,bus=n", f"{vfio(ident='n')} {RAM} {TAIL}"),
        (f"{RAW} {NVME} -append '-device nvme'", f"{vfio()} -append '-device nvme' {RAM} {TAIL}"),
        (f"{RAW} {NVME} -monitor stdio -S -loadvm t1", f"{vfio()} {RAM} {TAIL}"),
        (
            f"-blockdev driver=raw,node-name=d0,file=f -blockdev driver=file,node-name=f,filename=disk.img {NVME}",
            f"{vfio()} {RAM} {TAIL}",
        ),
        (
            f"-blockdev qcow2,node-name=d0,file=f -blockdev file,node-name=f,filename=x {NVME}",
            f"-blockdev qcow2,node-name=d0,file=f -blockdev file,node-name=f,filename=x {vfio()} {RAM} {TAIL}",
        ),
        (
            f"{RAW} -snapshot {NVME}",
            f"{RAW} -snapshot {vfio()} {RAM} {TAIL}",
        ),
        (
            f"-object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m {RAW} {NVME}",
            f"-object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m {vfio()} {TAIL}",
        ),
        (
            f"-m 1G -mem-path /hp -mem-prealloc {RAW} {NVME}",
            f"-m 1G {vfio()} -object memory-backend-file,id=nvmove-ram,size=1073741824,share=on,mem-path=/hp,"
            "prealloc=on "
            f"-machine memory-backend=nvmove-ram {TAIL}",
        ),
    ],
)
def test_what_qemu_gets(line: str, for_qemu: str) -> None:
    assert list(lift(line).arguments) == shlex.split(for_qemu)


@given(
    st.lists(st.sampled_from(["-M", "q35", "-device", "virtio-rng-pci", "-x", "disk.img", "-monitor", "stdio", "--S"]))
)
def test_a_line_without_nvme_passes_untouched(words: list[str]) -> None:
    plan = arguments.lift(["qemu", *words], RUN, FakeQemu())
    assert (plan.passthrough, list(plan.arguments)) == (True, words)


@given(
    st.lists(
        st.sampled_from(["-vga std", "-smp 2", "-append '-S'", "-netdev user,id=n", "-no-reboot", "-rtc base=utc"])
    )
)
def test_options_that_are_not_lifted_keep_their_words_and_order(others: list[str]) -> None:
    line = " ".join(others)
    plan = lift(f"{RAW} {line} {NVME}")
    assert list(plan.arguments) == [*shlex.split(line), *shlex.split(f"{vfio()} {RAM} {TAIL}")]


@pytest.mark.parametrize("line", ["-version", "-device help", "-device nvme,help", f"{NVME} -help", "-M help"])
def test_questions_go_to_qemu_untouched(line: str) -> None:
    assert lift(line).passthrough


def test_devices_that_follow_an_nvme_device_follow_in_json_with_their_types() -> None:
    plan = lift(f"-device a {RAW} {NVME} -device virtio-net-pci,mac=52:54:0:0:0:1,vectors=0x8,csum=off")
    follower = '{"driver":"virtio-net-pci","mac":"52:54:0:0:0:1","vectors":8,"csum":false}'
    assert list(plan.arguments[:6]) == ["-device", "a", *shlex.split(vfio()), "-device", follower]


def test_json_devices_come_after_all_that_qemu_makes_before_them() -> None:
    plan = lift(f"""-device '{{"driver":"j"}}' {RAW} {NVME} -drive if=virtio,file=v -device k""")
    devices = [json.loads(word)["driver"] for word in plan.arguments if word.startswith("{")]
    assert devices == ["vfio-user-pci", "k", "virtio-blk", "j"]
    assert "file=v,if=none,id=virtio0" in [word.replace("if=none,file=v", "file=v,if=none") for word in plan.arguments]


def test_set_and_global_change_lifted_devices() -> None:
    plan = lift(
        f"{RAW} -device nvme,serial=1,drive=d0,id=n -set device.n.mdts=5 -global nvme.aerl=9 -global nvme.mdts=4"
    )
    assert (plan.devices[0].config.mdts, plan.devices[0].config.aerl) == (5, 9)
    assert "-set" not in plan.arguments
    assert "-global" not in plan.arguments


def test_qemus_version_is_the_firmware_version() -> None:
    assert lift(f"{RAW} {NVME}").devices[0].config.firmware_version == "11.1.3"


def test_start_options_are_taken_out_and_told() -> None:
    plan = lift(f"{RAW} {NVME} -S -loadvm t1")
    assert (plan.paused, plan.loadvm) == (True, "t1")
    assert (lift(f"{RAW} {NVME}").paused, lift(f"{RAW} {NVME}").loadvm) == (False, None)


def test_qemu_waits_for_an_incoming_vm_until_nvmove_is_ready_for_it() -> None:
    plan = lift(f"{RAW} {NVME} -incoming tcp:0:1 -incoming tcp:0:4444")
    assert plan.incoming == "tcp:0:4444"
    assert plan.arguments[-2:] == ("-incoming", "defer")
    assert plan.arguments.count("-incoming") == 1
    assert lift(f"{RAW} {NVME}").incoming is None


def test_a_raw_file_is_nvmoves_and_its_options_with_it() -> None:
    plan = lift(f"{RAW},cache=none,discard=unmap,detect-zeroes=unmap,readonly=on,aio=native {NVME},share-rw=on")
    (drive,) = plan.drives
    options = drive.config.options
    assert not drive.in_qemu
    assert (drive.config.file, drive.device, drive.key, drive.config.aio) == ("disk.img", "nvmove0", "d0", "native")
    assert (options.direct, options.discard, options.detect_zeroes) == (True, "unmap", "unmap")
    assert (options.read_only, options.share_rw) == (True, True)


@pytest.mark.parametrize(
    "drive",
    [
        "file=disk.img",  # QEMU guesses, warns and guards block 0
        "file=disk.qcow2,format=qcow2",
        "file=nbd://host/x,format=raw",
        "file=rbd:pool/x,format=raw",
        "file=disk.img,format=raw,snapshot=on",
        "file=disk.img,format=raw,offset=512",
        "file.driver=nbd,file.path=/s,format=raw",
    ],
)
def test_what_is_not_plainly_a_raw_file_stays_qemus(drive: str) -> None:
    assert lift(f"-drive if=none,id=d0,{drive} {NVME}").drives[0].in_qemu


def test_a_node_that_something_else_uses_stays_qemus() -> None:
    nodes = "-blockdev driver=file,node-name=d0,filename=disk.img"
    assert not lift(f"{nodes} {NVME}").drives[0].in_qemu
    assert lift(f"{nodes} -blockdev driver=qcow2,node-name=q,file=x,backing=d0 {NVME}").drives[0].in_qemu


def test_the_write_cache_follows_the_drive_unless_the_device_says() -> None:
    def cached(drive: str, device: str) -> bool:
        return lift(f"{RAW}{drive} {NVME}{device}").devices[0].config.namespaces[0].write_cache

    assert cached("", "")
    assert not cached(",cache=writethrough", "")
    assert cached(",cache=writethrough", ",write-cache=on")
    assert not cached("", ",write-cache=off")


def test_monitors_become_endpoints() -> None:
    plan = lift(f"{RAW} {NVME} -qmp unix:a,,b.sock,server=on,wait=off -chardev stdio,id=c -mon c,mode=readline")
    qmp, hmp = plan.endpoints
    assert (qmp.mode, qmp.address, qmp.server, qmp.wait) == (MonitorMode.CONTROL, UnixAddress("a,b.sock"), True, False)
    assert (hmp.mode, hmp.address, hmp.id) == (MonitorMode.READLINE, StdioAddress(), "c")
    assert "stdio,id=c" not in plan.arguments


@pytest.mark.parametrize(
    "options",
    ["-nographic", "-serial mon:stdio", "-chardev stdio,mux=on,id=serial0 -mon serial0 -serial chardev:serial0"],
)
def test_a_port_that_shares_the_monitors_line_gets_a_socket(options: str) -> None:
    plan = lift(f"{RAW} {NVME} {options}")
    (endpoint,) = plan.endpoints
    assert (endpoint.mode, endpoint.address) == (MonitorMode.READLINE, StdioAddress(signal="-chardev" in options))
    assert [(port.id, str(port.socket)) for port in endpoint.mux] == [("serial0", "/run/x/mux0")]
    words = list(plan.arguments)
    assert words[words.index("-serial") + 1] == "chardev:serial0"
    assert "socket,id=serial0,path=/run/x/mux0" in words
    assert not plan.qemu_uses_stdio


def test_qemu_keeps_stdio_for_its_own_port() -> None:
    assert lift(f"{RAW} {NVME} -serial stdio").qemu_uses_stdio
    assert lift(f"{RAW} {NVME} -nographic -monitor none").qemu_uses_stdio
    assert not lift(f"{RAW} {NVME} -nodefaults").qemu_uses_stdio


def test_monitor_objects_are_monitors() -> None:
    plan = lift(f"{RAW} {NVME} -chardev null,id=n -chardev pty,id=c -object monitor-qmp,id=m,chardev=c,pretty=on")
    assert [(one.mode, one.pretty) for one in plan.endpoints] == [(MonitorMode.CONTROL, True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (NVME, "-device nvme,serial=S1,drive=d0: Property 'nvme.drive' can't find value 'd0'"),
        (f"{RAW} {RAW} {NVME}", f"{RAW}: Duplicate ID 'd0' for drive"),
        (f"{RAW} {NVME},id=a -device b,id=a", "-device b,id=a: Duplicate ID 'a' for device"),
        (f"{RAW} {NVME} -device blk,drive=d0", "-device blk,drive=d0: Drive 'd0' is already in use by another device"),
        (f"{RAW},rerror=enospc {NVME}", f"{RAW},rerror=enospc: 'enospc' invalid read error action"),
        (f"{RAW},werror=foo {NVME}", f"{RAW},werror=foo: 'foo' invalid write error action"),
        (f"{RAW} {NVME},werror=foo", f"{NVME},werror=foo: Parameter 'werror' does not accept value 'foo'"),
        (f"{RAW} {NVME},rerror=enospc", f"{NVME},rerror=enospc: 'enospc' invalid read error action"),
        (f"{RAW},cache=foo {NVME}", f"{RAW},cache=foo: invalid cache option"),
        (f"{RAW} {NVME} -incoming defer -loadvm t1", "-loadvm: a VM that arrives (-incoming) brings its own state"),
        (f"{RAW} {NVME} -serial stdio -monitor stdio", "-serial stdio: cannot use stdio by multiple character devices"),
        (f"{RAW} {NVME} -mon x", '-mon x: chardev "x" not found'),
        (f"{RAW} {NVME} -monitor foo:bar", "-monitor foo:bar: 'foo:bar' is not a valid char driver"),
        (
            f"{RAW} {NVME} -object memory-backend-file,id=m,size=1G,mem-path=/ -machine memory-backend=m",
            "-object memory-backend-file,id=m,size=1G,mem-path=/: nvmove needs guest RAM that it can map: add share=on",
        ),
        (f"{RAW} {NVME} -global nvme.foo=1", f"{NVME}: can't apply global nvme.foo=1: Property 'nvme.foo' not found"),
        (f"{RAW} {NVME} -virtfs local", f"{NVME}: {VIRTFS}"),
        (
            f"-drive id=d0,file=x,format=raw {NVME}",
            f"{NVME}: Drive 'd0' is already in use because it has been automatically connected to another device "
            "(did you need 'if=none' in the drive options?)",
        ),
    ],
)  # fmt: skip
def test_refusals_are_one_line(line: str, message: str) -> None:
    assert refusal(line) == message


def test_every_port_on_a_monitors_line_gets_a_socket_of_its_own() -> None:
    ports = "-serial chardev:c -device virtconsole,chardev=c -parallel chardev:c"
    plan = lift(f"{RAW} {NVME} -chardev stdio,mux=on,id=c -mon c {ports}")
    (endpoint,) = plan.endpoints
    assert [(port.id, port.socket.name) for port in endpoint.mux] == [
        ("c", "mux0"),
        ("c-port1", "mux1"),
        ("c-port2", "mux2"),
    ]
    words = list(plan.arguments)
    assert words[words.index("-parallel") + 1] == "chardev:c-port2"
    assert '{"driver":"virtconsole","chardev":"c-port1"}' in words
    assert words.index("socket,id=c-port1,path=/run/x/mux1") < words.index(
        '{"driver":"virtconsole","chardev":"c-port1"}'
    )


def test_two_monitors_on_one_line() -> None:
    (endpoint,) = lift(f"{RAW} {NVME} -chardev pty,mux=on,id=c -mon c -qmp chardev:c").endpoints
    assert (endpoint.mode, endpoint.monitors) == (MonitorMode.READLINE, (MonitorMode.CONTROL,))
    assert "need mux=on" in refusal(f"{RAW} {NVME} -chardev pty,id=c -mon c -qmp chardev:c")


@pytest.mark.parametrize(
    ("node", "in_qemu"),
    [
        ("driver=raw,node-name=d0,file.driver=file,file.filename=x,file.node-name=below", False),
        ('\'{"driver":"raw","node-name":"d0","file":{"driver":"host_device","filename":"/dev/x"}}\'', False),
        ("driver=raw,node-name=d0,size=512,file.driver=file,file.filename=x", True),
        ("driver=raw,node-name=d0,file.driver=nbd,file.path=x", True),
        ("driver=host_device,node-name=d0,filename=/dev/x,cache.direct=on,aio=native", False),
    ],
)
def test_block_nodes(node: str, in_qemu: bool) -> None:
    plan = lift(f"-blockdev {node} {NVME}")
    assert (plan.drives[0].in_qemu, plan.drives[0].name, plan.drives[0].node) == (in_qemu, "", "d0")
    assert ("-blockdev" in plan.arguments) == in_qemu


def node_options(*nodes: str) -> OpenOptions:
    return lift(" ".join(f"-blockdev {node}" for node in nodes) + f" {NVME}").drives[0].config.options


def test_a_discard_passes_only_when_every_node_lets_it() -> None:
    raw, file = "driver=raw,node-name=d0,file=f", "driver=file,node-name=f,filename=x"
    assert node_options(f"{raw},discard=unmap", f"{file},discard=unmap").discard == "unmap"
    assert node_options(f"{raw},discard=unmap", file).discard == "ignore"
    assert node_options(raw, f"{file},discard=unmap").discard == "ignore"


def test_a_file_described_within_its_node_inherits_from_it() -> None:
    raw = "driver=raw,node-name=d0,file.driver=file,file.filename=x"
    assert node_options(f"{raw},discard=unmap").discard == "unmap"
    assert node_options(f"{raw},cache.direct=on").direct
    assert not node_options(f"{raw},cache.direct=on,file.cache.direct=off").direct
    assert not node_options("raw,node-name=d0,file=f,cache.direct=on", "file,node-name=f,filename=x").direct


def test_what_a_configuration_file_may_hold(tmp_path: Path) -> None:
    def configure(text: str) -> str:
        (tmp_path / "vm.cfg").write_text(text)
        return f"-readconfig {tmp_path}/vm.cfg"

    assert lift(f"{configure('[rtc]')} {RAW} {NVME}").devices
    assert "an nvme device in it is not supported: use -device" in refusal(configure('[device]\n driver = "nvme"'))
    assert "section [memory] is not supported: use -memory" in refusal(f"{configure('[memory]')} {RAW} {NVME}")
    assert lift(configure("[memory]")).passthrough
    assert lift("-readconfig /no/such").passthrough


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-daemonize", "-daemonize: nvmove serves the disk from the foreground"),
        ("-run-with chroot=/x", "-run-with chroot=/x: chroot: QEMU would lose its way"),
        ("-icount shift=1,rr=record,rrfile=f", "-icount shift=1,rr=record,rrfile=f: record and replay"),
        ("-m x", "-m x: Parameter 'size' expects a non-negative number"),
        ("-numa node,memdev=m -object memory-backend-ram,id=m,size=1G,share=on", "-object memory-backend-ram"),
        ("-blockdev driver=null-co", "-blockdev driver=null-co: 'node-name' must be specified for the root node"),
        ("-chardev null,id=a -chardev null,id=a", "-chardev null,id=a: Duplicate ID 'a' for chardev"),
        ("-chardev pty,id=a -mon a,mode=x", "-mon a,mode=x: Parameter 'mode' does not accept value 'x'"),
        ("-chardev pty,id=a -mon a -serial chardev:a", "-serial chardev:a: chardev 'a' is a monitor's too"),
        ("-chardev null,id=a,mux=on -mon a -serial chardev:a", "-chardev null,id=a,mux=on: a monitor on null"),
        ("-qmp chardev:a", '-qmp chardev:a: chardev "a" not found'),
    ],
)
def test_more_refusals(options: str, message: str) -> None:
    assert refusal(f"{RAW} {NVME} {options}").startswith(message)


def test_throttling_of_a_drive_is_refused_because_an_export_would_pass_it_by() -> None:
    assert "throttling.bps-total is not supported yet" in refusal(f"{RAW},throttling.bps-total=1 {NVME}")


def test_memory_size_follows_m() -> None:
    def size(options: str) -> str:
        return next(w for w in lift(f"{RAW} {NVME} {options}").arguments if "memory-backend-memfd" in w).split(",")[2]

    assert size("") == f"size={128 << 20}"
    assert size("-m 512") == f"size={512 << 20}"
    assert size("-m size=1.5G,slots=2,maxmem=4G") == f"size={3 << 29}"
    assert size("-m slots=2,maxmem=4G") == f"size={128 << 20}"
    assert size("-M q35,memory.size=1G") == f"size={1 << 30}"


def test_a_device_in_json_takes_globals_too() -> None:
    plan = lift(
        """-device '{"driver":"nvme","serial":"1","use-intel-id":true}' -global driver=nvme,property=mdts,value=4"""
    )
    assert (plan.devices[0].config.mdts, plan.devices[0].config.use_intel_id) == (4, True)


def test_set_of_something_that_is_not_there_is_left_to_qemu() -> None:
    assert "device.zz.a=1" in lift(f"{RAW} {NVME} -set device.zz.a=1").arguments


def test_deprecated_spellings_are_warned_of_in_qemus_words() -> None:
    plan = lift(f"{RAW} {NVME},use-intel-id,num_queues=3")
    assert [line.rpartition(": ")[2] for line in plan.warnings] == [
        "short-form boolean option 'use-intel-id' deprecated",
        "num_queues is deprecated; please use max_ioqpairs instead",
    ]


def test_no_program_is_a_usage_error() -> None:
    with pytest.raises(UserError) as raised:
        arguments.lift([], RUN)
    assert raised.value.status == 2


@pytest.mark.parametrize(
    ("drive", "device", "actions"),
    [
        ("", "", ("enospc", "report")),
        (",werror=auto,rerror=auto", ",werror=auto,rerror=auto", ("enospc", "report")),
        (",werror=stop,rerror=stop", "", ("stop", "stop")),
        ("", ",werror=ignore,rerror=ignore", ("ignore", "ignore")),
        (",werror=ignore,rerror=stop", ",werror=enospc,rerror=report", ("enospc", "report")),
        (",werror=report", ",rerror=stop", ("report", "stop")),
    ],
)
def test_the_devices_error_actions_win_over_the_drives(drive: str, device: str, actions: tuple[str, str]) -> None:
    for image in (RAW, QCOW2):
        plan = lift(f"{image}{drive} {NVME}{device}")
        assert (plan.drives[0].config.werror, plan.drives[0].config.rerror) == actions
        assert not any("error=" in word for word in plan.arguments), "QEMU's device in its place knows none"


def test_a_blockdev_has_its_error_actions_from_the_namespace() -> None:
    blockdev = "-blockdev driver=file,filename=a.img,node-name=n0"
    plan = lift(f"{blockdev} -device nvme,serial=1,id=c -device nvme-ns,bus=c,drive=n0,werror=stop,rerror=stop")
    assert (plan.drives[0].config.werror, plan.drives[0].config.rerror) == ("stop", "stop")


def test_error_actions_may_be_global_or_set() -> None:
    assert lift(f"{RAW} {NVME} -global nvme.werror=stop").drives[0].config.werror == "stop"
    assert lift(f"{RAW} {NVME},id=n -set device.n.rerror=stop").drives[0].config.rerror == "stop"


RAW_NODE = "-blockdev driver=raw,node-name=d0,file.driver=file,file.filename=x"


@pytest.mark.parametrize("drive", ["-drive if=none,id=d0,file=x,format=raw", RAW_NODE])
@pytest.mark.parametrize(("owner", "in_qemu"), [("qemu", True), ("nvmove", False), ("auto", False)])
def test_the_owner_of_a_raw_image_may_be_said(drive: str, owner: str, in_qemu: bool) -> None:
    plan = lift(f"{drive} -device nvme,serial=S,drive=d0,image-owner={owner}")
    assert plan.drives[0].in_qemu == in_qemu
    assert any("file=x" in word or "filename=x" in word for word in plan.arguments) == in_qemu


def test_an_image_that_needs_qemu_cannot_be_nvmoves() -> None:
    for drive in ("-drive if=none,id=d0,file=x,format=qcow2", "-blockdev driver=qcow2,node-name=d0,file=y"):
        with pytest.raises(UserError, match="image-owner=nvmove is for raw images whose options nvmove knows"):
            lift(f"{drive} -device nvme,serial=S,drive=d0,image-owner=nvmove")


def test_an_owner_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="Parameter 'image-owner' does not accept value 'me'"):
        lift("-drive if=none,id=d0,file=x,format=raw -device nvme,serial=S,drive=d0,image-owner=me")


NAMESPACE = "-device nvme,serial=S1 -device nvme-ns,drive=d0"


@pytest.mark.parametrize(
    ("machine", "more", "shared", "eui64"),
    [
        ("q35", "", True, 0),
        ("pc-q35-9.2", "", True, 0),
        ("pc-q35-6.1", "", False, 0x5254_0000_0000_0001),
        ("pc-q35-6.1", ",shared=on,eui64=7", True, 7),
        ("q35 -machine type=pc-q35-6.1 -global nvme-ns.eui64-default=off", "", False, 0),
    ],
)
def test_a_namespace_is_what_the_machine_type_makes_of_it(machine: str, more: str, shared: bool, eui64: int) -> None:
    (namespace,) = lift(f"-M {machine} {RAW} {NAMESPACE}{more}").devices[0].config.namespaces
    assert (namespace.shared, namespace.eui64) == (shared, eui64)


def test_the_default_eui64_has_the_number_of_the_namespace_in_the_order_of_creation() -> None:
    more = "-drive if=none,id=d1,file=disk1.img,format=raw -drive if=none,id=d2,file=disk2.img,format=raw"
    last = "-device nvme-ns,drive=d1 -device nvme,serial=S2 -device nvme-ns,drive=d2,eui64-default=on"
    plan = lift(f"{RAW} {more} {NVME} {last}")
    found = [namespace.eui64 for device in plan.devices for namespace in device.config.namespaces]
    assert found == [0, 0, 0x5254_0000_0000_0003]


def test_what_a_machine_type_has_and_nvmove_has_not_is_refused_by_name() -> None:
    why = "property 'msix-exclusive-bar' is not supported yet"
    where = f"{NVME}: machine type pc-q35-5.2 has nvme.msix-exclusive-bar=on"
    assert refusal(f"-M pc-q35-5.2 {RAW} {NVME}") == f"{where}: {why}"
    assert lift(f"-M pc-q35-5.2 {RAW} {NVME},msix-exclusive-bar=off").devices
