"""Token ids to text as they come: whole characters only, and nothing from a stop string on; and
the answers of a batch on standard output."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
LONGEST_WINDOW = 8
"""Ids that are decoded together before settled ones are let go; one character spans at most 4."""


class TextStream:
    """One row's text.

    Args:
      decode: ids -> text of a byte-level tokenizer, U+FFFD for bytes that are no character (yet).
      stops: strings that end the text; they are not part of it.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty; every text would end at once")
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._taken = 0
        self._held = ""
        self.stopped = False
        """A stop string was found."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that is certain after these ids, which may be none."""
        for i in ids:
            if not self.stopped:
                self._take(int(i))
        return "" if self.stopped else self._release(final=False)

    def close(self) -> str:
        """Text that was held back, now that nothing follows."""
        if self.stopped:
            return ""
        self._held += self._decode(self._ids)[self._taken :] if self._ids else ""
        self._ids, self._taken = [], 0
        return self._release(final=True)

    def _take(self, i: int) -> None:
        """Move every character that later ids cannot change from the window to `_held`."""
        self._ids.append(i)
        text = self._decode(self._ids)
        # Only the last mark can stand for the beginning of a character.
        certain = len(text) - text.endswith(REPLACEMENT)
        self._held += text[self._taken : certain]
        self._taken = certain
        if certain == len(text):
            self._ids, self._taken = [], 0
        elif len(self._ids) > LONGEST_WINDOW:
            self._shorten(text)

    def _shorten(self, text: str) -> None:
        """Let ids go where both sides decode apart to the same text: no character spans the cut."""
        for cut in range(len(self._ids) - 1, 0, -1):
            before, after = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            if before + after == text:
                self._ids, self._taken = self._ids[cut:], self._taken - len(before)
                return

    def _release(self, final: bool) -> str:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        keep = 0 if final else max((_overlap(self._held, s) for s in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answers:
    """Writes answers to stdout: a single one as it comes, several whole and in order.

    Args:
      count: number of answers.
      first: what the first piece of an answer begins with and people do not want to see.
      quiet: write nothing; another process does.
    """

    def __init__(self, count: int, first: str = "", quiet: bool = False):
        self._texts = [""] * count
        self._first, self._quiet = first, quiet
        self.complete = [False] * count
        self._written = 0

    def add(self, row: int, text: str) -> None:
        """The next piece of an answer."""
        if not self._texts[row]:
            text = text.removeprefix(self._first)
        self._texts[row] += text
        if len(self._texts) == 1:
            self._say(text, end="")

    def end(self, row: int) -> None:
        """An answer is complete."""
        self.complete[row] = True
        if len(self._texts) == 1:
            self._say("")
            return
        while self._written < len(self._texts) and self.complete[self._written]:
            self._say(f"--- {self._written}\n{self._texts[self._written]}")
            self._written += 1

    def _say(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, flush=True)
