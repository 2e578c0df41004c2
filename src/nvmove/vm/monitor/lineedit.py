"""The line editor of QEMU's monitor, without I/O: bytes in, echo and lines out.

Keys and echo are those of QEMU 11.1.3, byte for byte, so that scripts written against its monitor work: after each
change the whole line is written again from its start.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

MAX_LINE = 4095
MAX_HISTORY = 64
SCREEN_WIDTH = 80

LEFT = b"\x1b[D"
RIGHT = b"\x1b[C"
CLEAR_TO_END = b"\x1b[K"
CLEAR_SCREEN = b"\x1b[2J\x1b[1;1H"


class Key(enum.Enum):
    """What a key, or a sequence of bytes, means."""

    START = enum.auto()
    END = enum.auto()
    BACK = enum.auto()
    FORWARD = enum.auto()
    OLDER = enum.auto()
    NEWER = enum.auto()
    ERASE = enum.auto()
    DELETE = enum.auto()
    ERASE_WORD = enum.auto()
    ERASE_TO_START = enum.auto()
    REDRAW = enum.auto()
    COMPLETE = enum.auto()
    ENTER = enum.auto()


CONTROL_KEYS = {
    0x01: Key.START,  # Ctrl-A
    0x04: Key.DELETE,  # Ctrl-D
    0x05: Key.END,  # Ctrl-E
    0x08: Key.ERASE,
    0x09: Key.COMPLETE,
    0x0A: Key.ENTER,
    0x0C: Key.REDRAW,  # Ctrl-L
    0x0D: Key.ENTER,
    0x0E: Key.NEWER,  # Ctrl-N
    0x10: Key.OLDER,  # Ctrl-P
    0x15: Key.ERASE_TO_START,  # Ctrl-U
    0x17: Key.ERASE_WORD,  # Ctrl-W
    0x7F: Key.ERASE,
}
# The last byte of a control sequence (ECMA-48, 5.4); "~" goes by its parameter.
CSI_KEYS = {
    ord("A"): Key.OLDER,
    ord("B"): Key.NEWER,
    ord("C"): Key.FORWARD,
    ord("D"): Key.BACK,
    ord("E"): Key.NEWER,
    ord("F"): Key.OLDER,
}
TILDE_KEYS = {1: Key.START, 3: Key.DELETE, 4: Key.END}
SS3_KEYS = {ord("F"): Key.END, ord("H"): Key.START}

# state → next state, by the bytes that change it; all others end the sequence.
ESCAPE, CSI, SS3 = "escape", "csi", "ss3"
ESCAPE_STATES = {ord("["): CSI, ord("O"): SS3}
CSI_BYTE = 0x9B
ESCAPE_BYTE = 0x1B


@dataclass(slots=True)
class Result:
    """What came of some input: bytes for the terminal; then, when the editor stopped, why."""

    echo: bytes = b""
    line: str | None = None
    """A line was entered; the editor waits for `prompt`."""
    complete: str | None = None
    """Tab was pressed after this text; the editor waits for `completed`."""
    rest: bytes = b""
    """The input that was not looked at."""


@dataclass(slots=True)
class LineEditor:
    """One line of input with its history. The caller feeds bytes and writes what comes back."""

    prompt_text: bytes = b"(qemu) "
    history: list[bytes] = field(default_factory=list)
    _line: bytearray = field(default_factory=bytearray)
    _cursor: int = 0
    _shown: bytes = b""
    _shown_cursor: int = 0
    _state: str = ""
    _parameter: int = 0
    _recalled: int | None = None
    _previous: int = 0

    def prompt(self) -> bytes:
        """Start a new line; return what shows the prompt."""
        self._line.clear()
        self._cursor, self._recalled, self._state = 0, None, ""
        return self._draw_prompt()

    def _draw_prompt(self) -> bytes:
        self._shown, self._shown_cursor = b"", 0
        return self.prompt_text

    def feed(self, data: bytes) -> Result:
        """Take input up to a line's end or a Tab."""
        echo = bytearray()
        for position, byte in enumerate(data):
            key = self._key(byte)
            if key is Key.ENTER:
                line = self._enter()
                return Result(bytes(echo) + b"\r\n", line=line, rest=data[position + 1 :])
            if key is Key.COMPLETE:
                before = bytes(self._line[: self._cursor]).decode(errors="surrogateescape")
                return Result(bytes(echo), complete=before, rest=data[position + 1 :])
            if key is Key.REDRAW:
                echo += CLEAR_SCREEN + self._draw_prompt()
            elif isinstance(key, Key):
                self._edit(key)
            elif key is not None:
                self._insert(bytes([key]))
            echo += self._update()
        return Result(bytes(echo))

    def _key(self, byte: int) -> Key | int | None:
        """Return the key that `byte` finishes, or the byte to insert, or None."""
        state, self._state = self._state, ""
        multibyte, self._previous = self._previous >= 0xC0, byte
        if state == ESCAPE:
            self._state, self._parameter = ESCAPE_STATES.get(byte, ""), 0
            return None
        if state == CSI:
            if 0x30 <= byte <= 0x39:
                self._state, self._parameter = CSI, min(self._parameter * 10 + byte - 0x30, 9999)
                return None
            return TILDE_KEYS.get(self._parameter) if byte == ord("~") else CSI_KEYS.get(byte)
        if state == SS3:
            return SS3_KEYS.get(byte)
        if byte == ESCAPE_BYTE:
            self._state = ESCAPE
            return None
        if byte == CSI_BYTE and not multibyte and self._continuation(self._cursor) == 0:
            self._state, self._parameter = CSI, 0
            return None
        return CONTROL_KEYS.get(byte, byte if byte >= 0x20 else None)

    def _continuation(self, cursor: int) -> int:
        """Return how many bytes a UTF-8 character that ends at `cursor` still lacks."""
        for back in range(1, min(4, cursor) + 1):
            byte = self._line[cursor - back]
            if byte < 0x80:
                return 0
            if byte >= 0xC0:
                return max(0, (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) - back)
        return 0

    def _enter(self) -> str:
        line = bytes(self._line)
        if line:
            if line in self.history:
                self.history.remove(line)
            self.history.append(line)
            del self.history[:-MAX_HISTORY]
        self._line.clear()
        self._cursor, self._recalled = 0, None
        self._shown, self._shown_cursor = b"", 0
        return line.decode(errors="replace")

    def _insert(self, data: bytes) -> None:
        if len(self._line) + len(data) <= MAX_LINE:
            self._line[self._cursor : self._cursor] = data
            self._cursor += len(data)

    def _edit(self, key: Key) -> None:
        cursor, line = self._cursor, self._line
        if key is Key.START:
            self._cursor = 0
        elif key is Key.END:
            self._cursor = len(line)
        elif key is Key.BACK:
            self._cursor = max(0, cursor - 1)
        elif key is Key.FORWARD:
            self._cursor = min(len(line), cursor + 1)
        elif key is Key.ERASE and cursor:
            del line[cursor - 1]
            self._cursor -= 1
        elif key is Key.DELETE:
            del line[cursor : cursor + 1]
        elif key is Key.ERASE_TO_START:
            del line[:cursor]
            self._cursor = 0
        elif key is Key.ERASE_WORD:
            start = len(line[:cursor].rstrip(b" "))
            start = line.rfind(b" ", 0, start) + 1
            del line[start:cursor]
            self._cursor = start
        elif key in {Key.OLDER, Key.NEWER}:
            self._recall(-1 if key is Key.OLDER else 1)

    def _recall(self, step: int) -> None:
        """Show an older or a newer line of the history; past the newest one, an empty line."""
        index = len(self.history) if self._recalled is None else self._recalled
        index += step
        if index < 0 or (step > 0 and self._recalled is None):
            return
        self._recalled = None if index >= len(self.history) else index
        self._line[:] = b"" if self._recalled is None else self.history[index]
        self._cursor = len(self._line)

    def _update(self) -> bytes:
        """Return what brings the terminal from what it shows to the line as it is."""
        out = b""
        if bytes(self._line) != self._shown:
            out = LEFT * self._shown_cursor + bytes(self._line) + CLEAR_TO_END
            self._shown, self._shown_cursor = bytes(self._line), len(self._line)
        move = self._cursor - self._shown_cursor
        self._shown_cursor = self._cursor
        return out + (RIGHT * move if move > 0 else LEFT * -move)

    def completed(self, word: str, candidates: list[str]) -> bytes:
        """Take the completions of `word`, the text before the cursor that they continue; return what to show."""
        matches = sorted({candidate for candidate in candidates if candidate.startswith(word)})
        if not matches:
            return b""
        if len(matches) == 1:
            self._insert(f"{matches[0][len(word) :]} ".encode())
            return self._update()
        common = matches[0]
        for match in matches:
            while not match.startswith(common):
                common = common[:-1]
        self._insert(common[len(word) :].encode())
        return b"\r\n" + columns(matches) + self._draw_prompt() + self._update()


def columns(words: list[str]) -> bytes:
    """Return `words` in columns as wide as the longest needs, for a terminal of 80 columns."""
    width = min(max(10, max(map(len, words)) + 2), SCREEN_WIDTH)
    per_row = max(1, SCREEN_WIDTH // width)
    rows = [words[start : start + per_row] for start in range(0, len(words), per_row)]
    return b"".join("".join(word.ljust(width) for word in row).encode() + b"\r\n" for row in rows)
