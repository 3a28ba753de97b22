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

    def __post_init__(self):
        for name, least in (("every", 0), ("keep", 1), ("keep_best", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"checkpoint.{name}={value}; it must be {least} or more")
