"""Yield of a source and what was left out of it, by name: nothing is skipped in silence."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

NAMES_KEPT = 5
SECONDS_PER_LINE = 5.0

Progress = Callable[[str], None]
"""Takes a line for people."""


def told[T](items: Iterable[T], progress: Progress, line: Callable[[int], str]) -> Iterator[T]:
    """Passes items on, and every few seconds tells `line` of how many there were."""
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            progress(line(count))


@dataclasses.dataclass
class SourceReport:
    """Counts of one source. Only the first few names per reason are kept, so memory is bounded."""

    source: str
    """Path as it was configured."""
    files: int = 0
    """Files found."""
    documents: int = 0
    """Documents read."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Files and lines left out, by reason."""
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """First names of what was left out, by reason (`file` or `file:line`)."""

    def add(self, text_bytes: int) -> None:
        """Counts one document of `text_bytes` UTF-8 bytes."""
        self.documents += 1
        self.text_bytes += text_bytes

    def skip(self, reason: str, name: str) -> None:
        """Counts one file or line that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMES_KEPT:
            kept.append(name)

    def lines(self) -> list[str]:
        """One line of counts, then one line of names per reason."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        head = (
            f"{self.source}: {self.files} files, {self.documents} documents, "
            f"{self.text_bytes / 1e6:.2f} MB; left out: {left_out or 'nothing'}"
        )
        return [head] + [f"  {reason}: {self._listed(reason)}" for reason in sorted(self.skipped)]

    def _listed(self, reason: str) -> str:
        kept = self.names[reason]
        more = self.skipped[reason] - len(kept)
        return ", ".join(kept) + (f" and {more} more" if more else "")
