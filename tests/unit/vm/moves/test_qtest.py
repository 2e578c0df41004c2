"""QEMU's qtest protocol against a peer that keeps memory as QEMU does."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from nvmove.vm.monitor.facade import QemuGone
from nvmove.vm.moves.qtest import QTest, ReplayError
from tests.directories import short_directory

Answer = Callable[[str], str]


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[QTest]:
    """A QTest, and a QEMU that answers each line by `answer`; empty: it ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().strip():
            said = answer(line)
            if not said:
                break
            writer.write(f"{said}\n".encode())
        writer.close()

    qtest = QTest()
    with short_directory() as directory:
        await qtest.listen(directory / "q")
        serving = asyncio.ensure_future(serve(*await asyncio.open_unix_connection(directory / "q")))
        try:
            yield qtest
        finally:
            await qtest.close()
            await serving


def run(answer: Answer, story: Callable[[QTest], Awaitable[object]]) -> object:
    async def in_time() -> object:
        async with asyncio.timeout(30), connected(answer) as qtest:
            return await story(qtest)

    return asyncio.run(in_time())


def test_single_accesses_have_their_size() -> None:
    seen: list[str] = []

    def answer(line: str) -> str:
        seen.append(line)
        return "OK 0x0000000000001b36" if line.startswith("read") else "OK"

    async def story(qtest: QTest) -> None:
        assert await qtest.read(0xB000_0000, 2) == 0x1B36
        await qtest.write(0xB000_0004, 4, 6)
        await qtest.write(0xB000_000C, 1, 8)

    run(answer, story)
    assert seen == ["readw 0xb0000000", "writel 0xb0000004 0x6", "writeb 0xb000000c 0x8"]


def test_bytes_of_any_number_go_both_ways() -> None:
    memory = bytearray(1 << 16)

    def answer(line: str) -> str:
        name, start, length, *data = line.split()
        at = slice(int(start, 16), int(start, 16) + int(length, 16))
        if name == "b64read":
            return f"OK {base64.b64encode(memory[at]).decode()}"
        memory[at] = base64.b64decode(data[0])
        return "OK"

    table = bytes(range(256)) * 128

    async def story(qtest: QTest) -> bytes:
        await qtest.write_bytes(0x2000, table)
        return await qtest.read_bytes(0x2000, len(table))

    assert run(answer, story) == table


def test_what_qemu_refuses_is_an_error_and_the_next_answer_is_the_next_ones() -> None:
    async def story(qtest: QTest) -> list[str]:
        with pytest.raises(ReplayError, match="refused 'nonsense': FAIL Unknown command"):
            await qtest.ask("nonsense 1", "inl 0xcfc")
        return await qtest.ask("inl 0xcfc")

    assert run(lambda line: "FAIL Unknown command" if "nonsense" in line else "OK 0x7", story) == ["0x7"]


def test_a_qemu_that_ends_is_gone() -> None:
    async def story(qtest: QTest) -> None:
        for _ in range(2):
            with pytest.raises(QemuGone):
                await qtest.read(0, 4)

    run(lambda line: "", story)
