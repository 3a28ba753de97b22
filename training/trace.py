"""`--profile FIRST:LAST`: a trace of some steps, for TensorBoard or Perfetto."""

from pathlib import Path
from types import TracebackType

import jax

from training.display import Display


class Trace:
    """Traces the wanted steps into RUN/profile; a context, which ends a trace under way.

    Args:
      wanted: steps to trace, counted from the first that runs; empty for none.
      run_dir: the run's folder.
      display: told where the trace is.
    """

    def __init__(self, wanted: range, run_dir: Path, display: Display):
        self._wanted, self._folder, self._display = wanted, run_dir / "profile", display
        self._running = False

    def before(self, steps: range, state: object) -> None:
        """Start or stop before `steps`, which run as one; `state` is what the last ones made."""
        wanted = bool(self._wanted) and (
            steps.start < self._wanted.stop and self._wanted.start < steps.stop
        )
        if self._running and not wanted:
            jax.block_until_ready(state)  # steps are started ahead of their end
            self._stop()
        elif wanted and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._display.note(f"trace: {self._folder}")
