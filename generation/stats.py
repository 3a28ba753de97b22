"""What a generation reports."""

import dataclasses


@dataclasses.dataclass
class Stats:
    """Counts and times of one generation; tokens of unfinished rows only."""

    prefill_tokens: int = 0
    """Prompt tokens, padding not counted."""
    prefill_seconds: float = 0.0
    """Until the first token of every row is known."""
    decoded_tokens: int = 0
    """Tokens after the first of each row."""
    decode_seconds: float = 0.0
    """Spent in steps after the first token."""
    compile_seconds: float = 0.0
    """Spent on compiling both programs, which their times leave out."""
    main_passes: int = 0
    """Passes of the main model, counted once per row that was not finished."""
    drafted: int = 0
    """Tokens that the MTP module proposed."""
    accepted: int = 0
    """Of these, the ones that were kept."""
