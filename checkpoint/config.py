"""When checkpoints are written and which are kept."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Cadence and retention."""

    every: int = 200
    """Steps between checkpoints (one more at the end and on SIGTERM/SIGINT); 0 saves only those."""
    keep: int = 2
    """Newest checkpoints kept; at least 1."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss kept besides the newest."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
