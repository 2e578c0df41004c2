from __future__ import annotations

import pytest

from nvmove.options import syntax
from nvmove.options.syntax import OptionError, parse


def test_doubled_commas_are_one_comma_of_the_value() -> None:
    option = parse("-device", "nvme,serial=a,,b,drive=d0", implied="driver")
    assert option.values == {"driver": "nvme", "serial": "a,b", "drive": "d0"}
    assert syntax.unparse(dict(option.values), "driver") == "nvme,serial=a,,b,drive=d0"


def test_the_last_of_two_values_wins() -> None:
    assert parse("-device", "nvme,serial=1,serial=2", "driver").values["serial"] == "2"


def test_bare_words_are_booleans_and_no_negates() -> None:
    option = parse("-device", "nvme,use-intel-id,noioeventfd", "driver")
    assert option.values == {"driver": "nvme", "use-intel-id": "on", "ioeventfd": "off"}
    assert option.flags == ("use-intel-id", "noioeventfd")


def test_json_keeps_its_types() -> None:
    option = parse("-device", '{"driver":"nvme","mdts":5,"use-intel-id":true}', json_allowed=True)
    assert syntax.integer(option, "mdts", 7, 8) == 5
    assert syntax.boolean(option, "use-intel-id", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("1k", 1024),
        ("1.5G", 3 << 29),
        ("0x10", 16),
        ("0x1M", 1 << 20),
        ("4T", 4 << 40),
        ("", None),
        ("x", None),
    ],
)
def test_sizes_are_qemus(text: str, expected: int | None) -> None:
    assert syntax.parse_size(text) == expected


def test_a_size_without_suffix_takes_the_options_unit() -> None:
    assert syntax.parse_size("512", "m") == 512 << 20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nvme,mdts=x", "Parameter 'mdts' expects integer"),
        ("nvme,mdts=-1", "Parameter 'mdts' expects uint8_t"),
        ("nvme,mdts=256", "Parameter 'mdts' expects uint8_t"),
        ('{"mdts":"5"}', "Parameter 'mdts' expects uint64"),
    ],
)
def test_wrong_integers_are_refused_with_qemus_message(argument: str, message: str) -> None:
    option = parse("-device", argument, "driver", json_allowed=True)
    with pytest.raises(OptionError) as raised:
        syntax.integer(option, "mdts", 7, 8)
    assert str(raised.value) == f"-device {argument}: {message}"


def test_octal_and_hexadecimal_integers() -> None:
    option = parse("-device", "nvme,a=010,b=0x10,c=10", "driver")
    assert [syntax.integer(option, name, 0, 16) for name in "abc"] == [8, 16, 10]


def test_broken_json_is_one_line() -> None:
    with pytest.raises(OptionError) as raised:
        parse("-device", '{"driver"', json_allowed=True)
    assert str(raised.value).startswith('-device {"driver": 1:10: JSON parse error')
    assert "\n" not in str(raised.value)


def test_what_json_says_must_have_the_right_type() -> None:
    option = parse("-device", '{"a":1,"b":true,"c":"on","d":[1,{"e":2}]}', json_allowed=True)
    for read in (
        lambda: option.get("a"),
        lambda: syntax.boolean(option, "c", False),
        lambda: syntax.signed(option, "b", 0),
        lambda: syntax.integer(option, "b", 0, 8),
        lambda: syntax.size(option, "c", 0),
        lambda: option.unknown(frozenset({"a"}), "{}?"),
    ):
        with pytest.raises(OptionError):
            read()
    assert syntax.flatten(option.values) == {"a": 1, "b": True, "c": "on", "d.0": 1, "d.1.e": 2}
    assert syntax.size(option, "a", 0) == 1


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(OptionError, match="JSON parse error"):
        parse("-device", "{]", json_allowed=True)


def test_ranges_of_signed_integers_and_sizes() -> None:
    option = parse("-device", "nvme,a=-2147483649,b=-1,c=1E", "driver")
    assert syntax.signed(option, "b", 0) == -1
    with pytest.raises(OptionError, match="Parameter 'a' expects int32_t"):
        syntax.signed(option, "a", 0)
    with pytest.raises(OptionError, match="Parameter 'c' expects uint32_t"):
        syntax.size(option, "c", 0, bits=32)


def test_an_id_must_be_an_identifier() -> None:
    with pytest.raises(OptionError, match="Parameter 'id' expects an identifier"):
        parse("-device", "nvme,id=9bad", "driver")


def test_a_bare_word_may_hold_an_escaped_comma() -> None:
    assert parse("-drive", "a,,b=c.img,if=none", "file").values == {"file": "a,b=c.img", "if": "none"}
