"""The line editor: echo as QEMU 11.1.3 sent it for the same keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmove.vm.monitor.lineedit import MAX_HISTORY, MAX_LINE, LineEditor, columns

D = b"\x1b[D"
C = b"\x1b[C"
K = b"\x1b[K"


def typed(editor: LineEditor, data: bytes) -> bytes:
    """Feed `data`, entering lines on the way; return the echo, prompts included."""
    echo = b""
    while data:
        result = editor.feed(data)
        echo += result.echo + (editor.prompt() if result.line is not None else b"")
        data = result.rest
    return echo


def editor(*history: bytes, line: bytes = b"") -> LineEditor:
    made = LineEditor()
    made.prompt()
    for old in history:
        typed(made, old + b"\n")
    typed(made, line)
    return made


def line_of(made: LineEditor) -> str | None:
    return made.feed(b"\n").line


@pytest.mark.parametrize(
    ("line", "keys", "echo"),
    [
        (b"", b"in", b"i" + K + D + b"in" + K),
        (b"in", b"f\x7f", D * 2 + b"inf" + K + D * 3 + b"in" + K),
        (b"info stat", D + D, D + D),
        (b"ab", D + b"Z", D + D * 1 + b"aZb" + K + D),
        (b"abc", b"\x01", D * 3),
        (b"abc", b"\x01A", D * 3 + b"Aabc" + K + D * 3),
        (b"abc", b"\x01\x05", D * 3 + C * 3),
        (b"abc", b"\x01\x04", D * 3 + b"bc" + K + D * 2),
        (b"abc", b"\x04", b""),
        (b"s", b"\x17", D + K),
        (b"a b c", b"\x17", D * 5 + b"a b " + K),
        (b"a b ", b"\x17", D * 4 + b"a " + K),
        (b"xyz", D + D + b"\x15", D * 2 + D + b"yz" + K + D * 2),
        (b"abc", b"\x0b", b""),
        (b"abc", b"\x1b[H", b""),
        (b"abc", b"\x1b[1~\x1b[4~\x1b[3~\x1b[9~", D * 3 + C * 3),
        (b"abc", b"\x1bOH\x1bOF", D * 3 + C * 3),
        (b"abc", b"\x1b[C", b""),
        (b"abc", b"\x1bx", b""),
        (b"ab", b"\x9bDc", D + D + b"acb" + K + D),
        (b"", b"\x08\x7f\x03\x02\x06\x00", b""),
        (b"", b"\x0c", b"\x1b[2J\x1b[1;1H(qemu) "),
        (b"ab", D + b"\x0c", D + b"\x1b[2J\x1b[1;1H(qemu) ab" + K + D),
        (b"", b"\r\n", b"\r\n(qemu) \r\n(qemu) "),
    ],
)
def test_echo_is_qemus(line: bytes, keys: bytes, echo: bytes) -> None:
    whole, apart = editor(line=line), editor(line=line)
    assert typed(whole, keys) == echo
    assert b"".join(typed(apart, bytes([key])) for key in keys) == echo


def test_history_goes_back_and_forth() -> None:
    made = editor(b"one", b"two", b"one")
    assert typed(made, b"\x1b[A") == b"one" + K
    assert typed(made, b"\x1b[F") == D * 3 + b"two" + K
    assert typed(made, b"\x10") == b"", "the older `one` has moved to the end"
    assert typed(made, b"\x0e") == D * 3 + b"one" + K
    assert typed(made, b"\x1b[B") == D * 3 + K
    assert typed(made, b"\x1b[B") == b""
    assert line_of(made) == ""


def test_history_keeps_a_limited_number_of_lines() -> None:
    made = editor(*(b"%d" % number for number in range(MAX_HISTORY + 5)))
    assert (len(made.history), made.history[0]) == (MAX_HISTORY, b"5")


def test_a_line_has_a_limit() -> None:
    made = editor(line=b"x" * (MAX_LINE + 10))
    assert line_of(made) == "x" * MAX_LINE


def test_characters_of_several_bytes_are_not_taken_for_keys() -> None:
    made = editor(line="čšě".encode())  # its last byte is 0x9b, which alone begins a control sequence
    assert line_of(made) == "čšě"


def test_the_rest_of_the_input_waits_for_the_line() -> None:
    made = editor()
    result = made.feed(b"stop\ncont\n")
    assert (result.line, result.rest) == ("stop", b"cont\n")


def test_tab_asks_for_completions_of_what_is_before_the_cursor() -> None:
    made = editor(line=b"info st x" + D * 2)
    assert made.feed(b"\tz").complete == "info st"


def test_one_completion_is_inserted() -> None:
    made = editor(line=b"in")
    made.feed(b"\t")
    assert made.completed("in", ["info", "stop"]) == D * 2 + b"info " + K


def test_several_completions_are_listed_and_their_common_start_inserted() -> None:
    made = editor(line=b"info sta")
    made.feed(b"\t")
    shown = made.completed("sta", ["status", "stats", "status", "name"])
    assert shown == b"\r\nstats     status    \r\n(qemu) info stat" + K


def test_no_completion_shows_nothing() -> None:
    made = editor(line=b"zz")
    made.feed(b"\t")
    assert made.completed("zz", ["info"]) == b""


def test_columns_fill_eighty_characters() -> None:
    words = ["drive_add", "drive_backup", "drive_del", "drive_mirror", "drive_x", "drive_y"]
    rows = columns(words).split(b"\r\n")
    assert rows == [b"".join(word.encode().ljust(14) for word in words[:5]), b"drive_y".ljust(14), b""]
    assert columns(["x" * 90]) == b"x" * 90 + b"\r\n"


@given(st.binary())
def test_no_input_breaks_the_editor(data: bytes) -> None:
    typed(editor(b"old"), data.replace(b"\t", b""))
