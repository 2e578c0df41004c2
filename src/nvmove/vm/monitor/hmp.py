"""HMP for one terminal: QEMU's prompt and line editing; lines are ours or go to QEMU by `human-monitor-command`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nvmove.vm.monitor.facade import ALIASES, Facade, QmpError
from nvmove.vm.monitor.lineedit import LineEditor
from nvmove.vm.monitor.stream import ByteStream

_CPU = re.compile(r"\s*cpu\s+(\d+)\s*$")
_HELP = re.compile(r"^(?:info )?([\w|?-]+)(?: |$)")


class HmpSession:
    """One terminal from its connection to its end: its history, and the CPU that `cpu` chose."""

    def __init__(self, facade: Facade, stream: ByteStream) -> None:
        self._facade = facade
        self._stream = stream
        self._editor = LineEditor()
        self._cpu: int | None = None
        self.executing = False
        """A command or a completion waits for QEMU, and input for it."""
        self.quiet = False
        """No prompt is wanted now: the terminal is somebody else's."""

    async def run(self) -> None:
        """Serve until the terminal or QEMU has gone. A command under way is finished in any case."""
        self.greet()
        while data := await self._stream.read():
            await self.feed(data)

    def greet(self) -> None:
        """Print the banner and the first prompt."""
        version = self._facade.qmp.version["qemu"]
        assert isinstance(version, dict)
        number = f"{version['major']}.{version['minor']}.{version['micro']}"
        self._stream.write(f"QEMU {number} monitor - type 'help' for more information\r\n".encode())
        self.prompt()

    def prompt(self) -> None:
        """Begin a new line; while a command runs, or the terminal is somebody else's, that comes later."""
        if not self.executing and not self.quiet:
            self._stream.write(self._editor.prompt())

    async def feed(self, data: bytes) -> None:
        """Take input, and run the lines that it completes, one after the other."""
        while data:
            result = self._editor.feed(data)
            self._stream.write(result.echo)
            if result.line is not None:
                self.executing = True
                try:
                    await self._execute(result.line)
                finally:
                    self.executing = False
                await self._stream.drain()
                self.prompt()
            elif result.complete is not None:
                self.executing = True
                try:
                    word, candidates = await self._complete(result.complete)
                finally:
                    self.executing = False
                self._stream.write(self._editor.completed(word, candidates))
            data = result.rest

    def _print(self, text: str) -> None:
        self._stream.write(re.sub("\r?\n", "\r\n", text).encode(errors="surrogateescape"))

    async def _execute(self, line: str) -> None:
        words = line.split()
        if not words:
            return
        if [ALIASES.get(words[0], words[0]), *words[1:]] == ["info", "history"]:
            self._print(
                "".join(f"{n}: '{old.decode(errors='replace')}'\n" for n, old in enumerate(self._editor.history))
            )
            return
        try:
            self._print(await self._facade.dispatch_hmp(line, self._cpu, self._print))
            if ALIASES.get(words[0], words[0]) == "quit" and len(words) == 1:
                self.quiet = True  # QEMU is about to go
            if chosen := _CPU.match(line):
                await self._choose_cpu(int(chosen[1]))
        except QmpError as error:
            self._print(f"Error: {error.desc}\n")

    async def _choose_cpu(self, index: int) -> None:
        """Remember the CPU for this terminal, as QEMU does for each of its own, when it exists."""
        cpus = await self._facade.execute("query-cpus-fast")
        if any(cpu["cpu-index"] == index for cpu in cpus):
            self._cpu = index

    async def _complete(self, text: str) -> tuple[str, list[str]]:
        """Return the word to complete and what it may be: names of commands, and of what `info` shows."""
        words = text.split(" ")
        start = [word for word in words[:-1] if word]
        if not start:
            return words[-1], list(_names(await self._facade.hmp("help")))
        if start in (["info"], ["help"]):
            return words[-1], list(_names(await self._facade.hmp("help info" if start == ["info"] else "help")))
        return words[-1], []


def _names(help_text: str) -> Iterable[str]:
    """Return the names at the starts of the lines of a help text."""
    for line in help_text.splitlines():
        if found := _HELP.match(line):
            yield from found[1].split("|")
