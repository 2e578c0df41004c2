from __future__ import annotations

import pytest

from nvmove.options.syntax import OptionError
from nvmove.vm.line import chardevs, endpoints
from nvmove.vm.line.chardevs import Endpoint


def short(device: str) -> Endpoint:
    return chardevs.endpoint(chardevs.from_short_form("-monitor", device, "m"))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("stdio", Endpoint(endpoints.StdioAddress())),
        ("mon:stdio", Endpoint(endpoints.StdioAddress(signal=False))),
        ("null", Endpoint(None)),
        ("pty", Endpoint(endpoints.PtyAddress())),
        ("pty:/tmp/link", Endpoint(endpoints.PtyAddress("/tmp/link"))),
        ("file:/tmp/log", Endpoint(endpoints.FileAddress("/tmp/log"))),
        ("pipe:/tmp/p", Endpoint(endpoints.PipeAddress("/tmp/p"))),
        ("unix:/tmp/a=b", Endpoint(endpoints.UnixAddress("/tmp/a=b"))),
        ("unix:/tmp/s,server=on", Endpoint(endpoints.UnixAddress("/tmp/s"), server=True, wait=True)),
        ("unix:/tmp/s,server,nowait", Endpoint(endpoints.UnixAddress("/tmp/s"), server=True)),
        ("unix:/tmp/s,reconnect=2", Endpoint(endpoints.UnixAddress("/tmp/s"), reconnect_ms=2000)),
        ("tcp:host:4444", Endpoint(endpoints.TcpAddress("host", "4444"))),
        ("tcp::4444,server=on,wait=off", Endpoint(endpoints.TcpAddress("", "4444"), server=True)),
        ("tcp:[::1]:4444,nodelay=on", Endpoint(endpoints.TcpAddress("::1", "4444", nodelay=True))),
        (
            "telnet:localhost:23,server=on,wait=off,to=30,ipv4=on",
            Endpoint(endpoints.TcpAddress("localhost", "23", to=30, ipv4=True), server=True, telnet=True),
        ),
    ],
)
def test_short_forms(device: str, expected: Endpoint) -> None:
    assert short(device) == expected


def test_long_forms() -> None:
    abstract = chardevs.endpoint(chardevs.read("socket,id=c,path=x,abstract=on,tight=off"))
    assert abstract.address == endpoints.UnixAddress("x", abstract=True, tight=False)
    assert chardevs.endpoint(chardevs.read("socket,id=c,fd=5")).address == endpoints.FdAddress(5)
    assert chardevs.endpoint(chardevs.read("stdio,id=c,signal=off")).address == endpoints.StdioAddress(signal=False)
    assert chardevs.endpoint(chardevs.read("file,id=c,path=a,append=on,input-path=b")).address == (
        endpoints.FileAddress("a", "b", append=True)
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stdio", "Parameter 'id' is missing"),
        ("socket,id=c", "chardev: socket: no socket address given"),
        ("socket,id=c,path=x,foo=1", "Invalid parameter 'foo'"),
        ("socket,id=c,path=x,wait=on", "'wait' option is incompatible with socket in client mode"),
        (
            "socket,id=c,path=x,server=on,reconnect-ms=1",
            "'reconnect-ms' option is incompatible with socket in server listen mode",
        ),
        ("socket,id=c,path=x,tls-creds=t", "tls-creds is not supported yet for a monitor"),
        ("socket,id=c,fd=name", "file descriptor named 'name' has not been found"),
        ("file,id=c", "chardev: file: no filename given"),
        ("spicevmc,id=c,name=x", "the chardev backend 'spicevmc' is not supported for a monitor; use stdio or socket"),
    ],
)
def test_what_is_refused(argument: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        chardevs.endpoint(chardevs.read(argument))
    assert str(raised.value) == f"-chardev {argument}: {message}"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("vc", "a monitor on QEMU's own display is not supported; use stdio or unix:PATH,server=on"),
        ("vc:80Cx24C", "a monitor on QEMU's own display is not supported; use stdio or unix:PATH,server=on"),
        ("udp:1", "udp is not supported yet for a monitor"),
        ("nonsense", "'nonsense' is not a valid char driver"),
        ("tcp:4444", "parse error: HOST:PORT expected"),
    ],
)
def test_short_forms_that_are_refused(device: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        short(device)
    assert str(raised.value) == f"-monitor {device}: {message}"
