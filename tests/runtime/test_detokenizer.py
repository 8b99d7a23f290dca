"""Text from bytes in pieces: whole characters, and stop strings that never appear."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_rt.runtime.generation.detokenizer import TextStream


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def pushed(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [stream.push(piece) for piece in pieces] + [stream.finish()]


@given(st.binary(max_size=40) | st.text(max_size=15).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_one_by_one_are_what_they_are_at_once(data: bytes) -> None:
    """GEN-05: invalid UTF-8 across pieces."""
    pieces = pushed(TextStream(), [data[i : i + 1] for i in range(len(data))])
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_comes_as_soon_as_it_is_whole() -> None:
    stream = TextStream()
    assert [stream.push(bytes([b])) for b in "a\u00e9\U0001f600".encode()] == [
        "a", "", "\u00e9", "", "", "", "\U0001f600",
    ]  # fmt: skip
    assert stream.finish() == ""


def test_a_character_that_is_cut_off_becomes_one_replacement() -> None:
    stream = TextStream()
    assert stream.push(b"a\xf0\x9f\x98") == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@given(
    text=st.text(alphabet="abc\u00e9", max_size=30),
    stop=st.lists(st.text(alphabet="abc\u00e9", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_text_ends_before_the_first_stop_string(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    """However the bytes are cut, not even the beginning of a stop string appears."""
    stream = TextStream(stop)
    shown = ""
    for piece in parts(text.encode(), cuts):
        shown += stream.push(piece)
        assert not any(s in shown for s in stop)
    shown += stream.finish()
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stream.stopped == bool(found)
    assert shown == (text[: min(found)[1]] if found else text)


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (["END"], [b"one E", b"N", b"D two"], ["one ", "", "", ""]),
        (["END"], [b"one E", b"NE", b"ND"], ["one ", "EN", "", ""]),
        (["END"], [b"one EN"], ["one ", "EN"]),
        (["aab"], [b"aaa", b"b"], ["a", "", ""]),
        (["\n\n", "x"], [b"a\n", b"bx", b"c"], ["a", "\nb", "", ""]),
        (["\u00e9"], [b"a\xc3", b"\xa9b"], ["a", "", ""]),
        (["bc", "abcd"], [b"abcd"], ["a", ""]),
        (["now"], [b"now"], ["", ""]),
    ],
)
def test_stop_strings_across_pieces(
    stop: list[str], pieces: list[bytes], expected: list[str]
) -> None:
    """GEN-05."""
    assert pushed(TextStream(stop), pieces) == expected


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(["."])
    assert stream.push(b"a.b") == "a" and stream.stopped
    assert stream.push(b"c") == "" and stream.finish() == ""


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b" a", b" b"], "a b"),
        ([b"a", b" b"], "a b"),
        ([b"\xe2", b"\x96\x81a"], "\u2581a"),
        ([b" "], ""),
        ([], ""),
    ],
)
def test_a_prefix_is_left_out_once(pieces: list[bytes], expected: str) -> None:
    assert "".join(pushed(TextStream(prefix=b" "), pieces)) == expected


def test_a_part_of_a_longer_prefix_is_text_after_all() -> None:
    assert "".join(pushed(TextStream(prefix=b"\xe2\x96\x81"), [b"\xe2", b"\x96"])) == "\ufffd"
    assert "".join(pushed(TextStream(prefix=b"\xe2\x96\x81"), [b"\xe2", b"\x96", b"\x81x"])) == "x"
