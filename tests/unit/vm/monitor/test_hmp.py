"""The HMP server and the multiplexer, on a fake QEMU."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.monitor.hmp import HmpSession
from nvmove.vm.monitor.mux import EscapeDecoder, HmpParty, Mux, PortParty, QmpParty, help_text
from nvmove.vm.monitor.stream import Pipe
from tests.fake_qemu import FakeQemu, Terminal, facade_on_fake

BANNER = b"QEMU 11.1.3 monitor - type 'help' for more information\r\n(qemu) "
PROMPT = b"\r\n(qemu) "


def with_fake(test: Callable[[Facade, FakeQemu], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(facade, qemu)

    asyncio.run(main())


def plain(output: bytes) -> str:
    """Return what a terminal shows of the editor's output: of each line, its last state."""
    text = re.sub(r"(\x1b\[D)+", "\x1b[D", output.decode())
    return re.sub(r"[^\x1b\r\n]*\x1b\[K\x1b\[D", "", text).replace("\x1b[K", "")


async def hmp_terminal(facade: Facade) -> Terminal:
    terminal = Terminal()
    terminal.start(HmpSession(facade, terminal.stream).run)
    assert await terminal.until(b"(qemu) ") == BANNER
    return terminal


def test_a_line_goes_to_qemu_and_its_output_comes_whole() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.hmp_answers["info x"] = "".join(f"line {number}\n" for number in range(5000))
        terminal = await hmp_terminal(facade)
        output = await terminal.talk(b"info x\n", PROMPT)
        assert plain(output) == "info x\r\n" + "".join(f"line {number}\r\n" for number in range(5000)) + "(qemu) "
        await terminal.end()

    with_fake(test)


def test_unknown_commands_and_empty_lines_are_answered_as_by_qemu() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await hmp_terminal(facade)
        assert plain(await terminal.talk(b"no\n", PROMPT)) == "no\r\nunknown command: 'no'\r\n(qemu) "
        count = len(qemu.requests)
        assert await terminal.talk(b"  \n", PROMPT) and len(qemu.requests) == count
        await terminal.end()

    with_fake(test)


def test_lines_sent_ahead_are_run_in_order() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.hmp_answers |= {"a": "A\n", "b": "B\n"}
        terminal = await hmp_terminal(facade)
        assert plain(await terminal.talk(b"a\nb\na\n", b"B\r\n") + await terminal.until(b"A\r\n(qemu) ")) == (
            "a\r\nA\r\n(qemu) b\r\nB\r\n(qemu) a\r\nA\r\n(qemu) "
        )
        await terminal.end()

    with_fake(test)


def test_commands_of_ours_print_as_they_go_and_their_errors_are_hmps() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        release = asyncio.Event()

        async def savevm(_facade: Facade, args: str, out: Callable[[str], None]) -> str:
            out("half\n")
            await release.wait()
            if args:
                raise QmpError("GenericError", f"no {args}")
            return "whole\n"

        facade.hmp_handlers["cont"] = savevm
        terminal = await hmp_terminal(facade)
        await terminal.talk(b"c\n", b"half\r\n")
        release.set()
        assert await terminal.until(b"(qemu) ") == b"whole\r\n(qemu) "
        assert (await terminal.talk(b"cont t\n", PROMPT)).endswith(b"half\r\nError: no t\r\n(qemu) ")
        await terminal.end()

    with_fake(test)


def test_the_chosen_cpu_belongs_to_the_terminal() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.hmp_answers |= {"cpu 1": "", "cpu 7": "invalid CPU index\r\n", "info registers": ""}
        qemu.answers["query-cpus-fast"] = [{"cpu-index": 0}, {"cpu-index": 1}]
        first, second = await hmp_terminal(facade), await hmp_terminal(facade)
        for line in (b"cpu 1\n", b"cpu 7\n", b"info registers\n"):
            await first.talk(line, PROMPT)
        assert qemu.requests[-1]["arguments"] == {"command-line": "info registers", "cpu-index": 1}
        await second.talk(b"info registers\n", PROMPT)
        assert qemu.requests[-1]["arguments"] == {"command-line": "info registers"}
        await first.end()
        await second.end()

    with_fake(test)


def test_history_is_the_terminals_own() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await hmp_terminal(facade)
        await terminal.talk(b"one\n", PROMPT)
        await terminal.talk(b"info history\n", b"0: 'one'\r\n1: 'info history'\r\n(qemu) ")
        await terminal.end()

    with_fake(test)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (b"in\t", b"info \x1b[K"),
        (b"info na\t", b"info name \x1b[K"),
        (b"help st\t", b"help stop \x1b[K"),
        (b"s\t", b"\r\ns         stop      sum       \r\n(qemu) s\x1b[K"),
        (b"info n\t", b"\r\nname      numa      \r\n(qemu) info n\x1b[K"),
    ],
)
def test_tab_completes_commands(keys: bytes, shown: bytes) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await hmp_terminal(facade)
        assert (await terminal.talk(keys, shown)).endswith(shown)
        await terminal.end()

    with_fake(test)


def test_tab_in_arguments_does_nothing() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await hmp_terminal(facade)
        assert plain(await terminal.talk(b"sum x\ty\n", PROMPT)).startswith("sum xy\r\n")
        await terminal.end()

    with_fake(test)


def test_there_is_no_prompt_after_quit() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        async def quit_(_arguments: Any) -> str:
            return ""

        qemu.answers["human-monitor-command"] = quit_
        terminal = await hmp_terminal(facade)
        terminal.stream.feed(b"q\n")
        await terminal.end()
        assert terminal.output.endswith(b"q\x1b[K\r\n")

    with_fake(test)


# The multiplexer


class Screen:
    """A multiplexed terminal with a port and monitors."""

    def __init__(self, facade: Facade) -> None:
        self.terminal = Terminal()
        self.mux = Mux(self.terminal.stream.write, facade)
        self.monitor = HmpParty(facade, self.mux)
        self.port = PortParty("ser0", facade)
        self.guest = Pipe(self._to_guest)
        self.received = bytearray()
        self.mux.parties += [self.monitor, self.port]
        self.mux.start(1)
        self._serving = asyncio.create_task(self.port.serve(self.guest, self.mux, self.terminal.stream.drain))

    def _to_guest(self, data: bytes) -> None:
        self.received += data

    async def type(self, data: bytes, until: bytes) -> bytes:
        await asyncio.sleep(0)
        await self.mux.feed(data)
        return await self.terminal.until(until)

    async def close(self) -> None:
        await self.monitor.close()
        self.guest.close()
        await self._serving


def with_screen(test: Callable[[Screen, FakeQemu], Awaitable[None]]) -> None:
    async def on_fake(facade: Facade, qemu: FakeQemu) -> None:
        screen = Screen(facade)
        try:
            await test(screen, qemu)
        finally:
            await screen.close()

    with_fake(on_fake)


def test_escape_sequences_are_taken_out_of_the_input_wherever_it_is_cut() -> None:
    expected = [(b"ab", "c"), (b"\x01x", "z"), (b"y", "")]
    data = b"ab\x01c\x01\x01x\x01zy"
    assert list(EscapeDecoder(1).feed(data)) == expected
    decoder = EscapeDecoder(1)
    found = [item for byte in data for item in decoder.feed(bytes([byte]))]
    assert b"".join(text for text, _ in found) == b"ab\x01xy"
    assert [command for _, command in found if command] == ["c", "z"]


def test_the_help_names_the_escape_character() -> None:
    assert help_text(1).startswith(b"\n\rC-a h    print this help\n\r")
    assert help_text(2).endswith(b"\n\rC-b C-b  sends C-b\n\r")
    assert b"Escape-Char (0x5d) x" in help_text(0x5D)


def test_the_guest_has_the_focus_first_and_ctrl_a_c_changes_it() -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        await screen.type(b"root\r\x01c", BANNER)
        assert screen.received == b"root\r"
        await screen.type(b"no\n", b"unknown command: 'no'\r\n(qemu) ")
        assert await screen.type(b"typ\x01c", b"\r\n") == b"t\x1b[K\x1b[Dty\x1b[K\x1b[D\x1b[Dtyp\x1b[K\r\n"
        assert await screen.type(b"\x01\x01\x03x\x01c", b"(qemu) ") == b"(qemu) "
        assert screen.received == b"root\r\x01\x03x"

    with_screen(test)


def test_the_guests_output_is_seen_while_the_monitor_has_the_focus() -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        await screen.type(b"\x01c", BANNER)
        screen.guest.feed(b"kernel: hello\r\n")
        assert await screen.terminal.until(b"hello\r\n") == b"kernel: hello\r\n"

    with_screen(test)


def test_what_the_monitor_prints_without_the_focus_is_kept() -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        release = asyncio.Event()

        async def slow(_arguments: Any) -> str:
            await release.wait()
            return "late\r\n"

        qemu.answers["human-monitor-command"] = slow
        await screen.type(b"\x01c", BANNER)
        await screen.type(b"x\n\x01c", b"x\x1b[K\r\n\r\n")
        release.set()
        await asyncio.wait_for(_until(lambda: b"late" in screen.monitor._kept), 20)
        assert screen.terminal.output == b""
        assert await screen.type(b"\x01c", b"(qemu) ") == b"late\r\n(qemu) "

    with_screen(test)


async def _until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0)


def test_breaks_quit_and_commit_go_to_qemu() -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        qemu.answers |= {"chardev-send-break": {}, "quit": {}}
        await screen.mux.feed(b"\x01b\x01s\x01x")
        assert await screen.terminal.until(b"\n\r") == b"QEMU: Terminated\n\r"
        assert [request["execute"] for request in qemu.requests[1:]] == [
            "chardev-send-break",
            "human-monitor-command",
            "quit",
        ]
        assert qemu.requests[1]["arguments"] == {"id": "ser0"}

    with_screen(test)


def test_a_break_that_qemu_refuses_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        await screen.mux.feed(b"\x01b")
        await screen.mux.send_break()
        await screen.mux.feed(b"\x01c")
        await screen.mux.send_break()

    with_screen(test)
    assert caplog.text.count("QEMU refused") == 2


def test_timestamps_begin_each_line_while_they_are_on() -> None:
    async def test(screen: Screen, qemu: FakeQemu) -> None:
        await screen.mux.feed(b"\x01t")
        screen.guest.feed(b"rest\na\r\nb")
        assert re.fullmatch(rb"rest\n\[00:00:00\.\d{3}\] a\r\n\[00:00:00\.\d{3}\] b", await screen.terminal.until(b"b"))
        await screen.mux.feed(b"\x01t")
        screen.guest.feed(b"\nplain\n")
        assert await screen.terminal.until(b"plain\n") == b"\nplain\n"

    with_screen(test)


def test_input_to_a_port_that_is_not_connected_is_lost() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        port = PortParty("ser0", facade)
        await port.feed(b"x")
        port.focus(True)
        assert port.idle.is_set()

    with_fake(test)


def test_a_qmp_monitor_on_a_shared_terminal() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = Terminal()
        mux = Mux(terminal.stream.write, facade)
        party = QmpParty(facade, mux, pretty=False)
        mux.parties.append(party)
        mux.start(0)
        assert b'"capabilities": []' in await terminal.until(b"\r\n")
        await mux.feed(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
        assert b"Capability 'oob' not available" in await terminal.until(b"\r\n")
        await mux.send_break()
        await party.close()

    with_fake(test)
