"""Stop strings over a stream of text: the answer ends before the first one.

Pure; used by `router.generation`, one matcher per request. It holds back only text that may still turn out to be the
beginning of a stop string, and its result does not depend on how the text was cut into pieces: the stop string that
is completed first wins, and of several completed by the same character the longest.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A prefix of some stop string in the automaton of Aho and Corasick (1975)."""

    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest proper suffix of this prefix that is a prefix too
    match: int = 0  # length of the longest stop string that ends here, 0 = none


class StopMatcher:
    """Feed text with `push` until it says that a stop string was hit; call `flush` when the answer ended otherwise.

    The depth of the automaton's state is the length of the longest suffix of the text that begins a stop string, which
    is exactly what must be held back. Cost: a few dictionary look-ups for each character that could matter.
    """

    __slots__ = ("_first", "_held", "_root", "_state", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        if not stops or not all(stops):
            raise ValueError("a matcher needs stop strings, none of them empty")
        self._root = _build(stops)
        self._state = self._root
        self._held = ""
        # Skips in C over text that cannot begin any stop string.
        self._first = re.compile("[" + "".join(re.escape(char) for char in self._root.children) + "]")
        self.stopped = False

    @property
    def held(self) -> str:
        """Text that may be the beginning of a stop string."""
        return self._held

    def push(self, text: str) -> str:
        """Returns the text that is now final. When `stopped` is set afterwards, the answer ends with it."""
        if self.stopped:
            return ""
        if not self._held and self._first.search(text) is None:
            return text
        held = self._held
        state, root = self._state, self._root
        for index, char in enumerate(text):
            node: _Node | None = state
            while node is not None and char not in node.children:
                node = node.fallback
            state = node.children[char] if node is not None else root
            if state.match:
                self.stopped = True
                self._state, self._held = root, ""
                return (held + text[: index + 1])[: -state.match]
        self._state = state
        whole = held + text
        final = len(whole) - state.depth
        self._held = whole[final:]
        return whole[:final]

    def flush(self) -> str:
        """The answer ended without a stop string: what was held back belongs to it."""
        held, self._held, self._state = self._held, "", self._root
        return held


def _build(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            child = node.children.get(char)
            if child is None:
                child = node.children[char] = _Node(node.depth + 1)
            node = child
        node.match = len(stop)
    # Breadth first, so that a fall-back, being shorter, is complete before it is used.
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.children.items():
            shorter = node.fallback
            while shorter is not None and char not in shorter.children:
                shorter = shorter.fallback
            child.fallback = shorter.children[char] if shorter is not None else root
            child.match = max(child.match, child.fallback.match)
            queue.append(child)
    return root
