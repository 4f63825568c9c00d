"""Stop strings: whatever the pieces, the answer ends before the first one and nothing else is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stop import StopMatcher

Cut = tuple[str, bool]


def feed(stops: list[str], pieces: list[str]) -> Cut:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.stopped:
            return out, True
    return out + matcher.flush(), False


def reference(stops: list[str], text: str) -> Cut:
    """The stop string that is complete first, character by character; of several the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


few_letters = st.text(alphabet="abé", max_size=40)


@given(
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=5),
    text=few_letters,
    cuts=st.lists(st.integers(0, 100), max_size=10),
)
def test_any_stops_any_cuts(stops: list[str], text: str, cuts: list[int]) -> None:
    assert feed(stops, pieces_of(text, cuts)) == reference(stops, text)


@given(
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4), text=few_letters
)
def test_holds_back_only_what_may_begin_a_stop(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for end, char in enumerate(text, 1):
        out += matcher.push(char)
        if matcher.stopped:
            return
        seen = text[:end]
        beginnings = [
            seen[start:] for start in range(end) if any(stop.startswith(seen[start:]) for stop in stops)
        ]
        assert matcher.held == max(beginnings, key=len, default="")
        assert out + matcher.held == seen


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["one E", "N", "D two"], ("one ", True)),  # across three pieces
        (["END"], ["one EN", "ough"], ("one ENough", False)),  # began, but was none
        (["END"], ["one EN"], ("one EN", False)),  # the answer is over first
        (["\n\n"], ["a\n", "\nb"], ("a", True)),
        (["aab"], ["aaa", "ab"], ("aa", True)),  # falls back to a shorter beginning
        (["abcd", "bc"], ["abcd"], ("a", True)),  # "bc" is complete first
        (["bc", "abc"], ["xabc"], ("x", True)),  # both at once: the longest
        (["🙂"], ["so 🙂!"], ("so ", True)),
        (["]", "^", "-", "\\"], ["a-b"], ("a", True)),  # characters that mean something in a character class
    ],
)
def test_cases(stops: list[str], pieces: list[str], expected: Cut) -> None:
    assert feed(stops, pieces) == expected


def test_nothing_more_comes_after_a_hit() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[], ["a", ""]])
def test_needs_stop_strings(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="stop strings"):
        StopMatcher(stops)
