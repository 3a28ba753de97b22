"""Figures of a generation."""

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
    """Spent on compiling the programs, which their times leave out."""
    main_passes: int = 0
    """Passes of the main model, counted once per row that was not finished."""
    drafted: int = 0
    """Tokens that the MTP module proposed."""
    accepted: int = 0
    """Drafts that were kept."""
    trial_seconds: float = 0.0
    """Spent on timing steps with and without drafts, which the other times leave out."""
    pass_steps: float = 0.0
    """Cost of a speculative pass, in plain steps; 0 where drafts were not on trial."""
    stopped: bool = False
    """The trial ended drafting, before the first draft or after some."""

    def report(self) -> str:
        """Rates of prefill and decoding, the times that they leave out, and what drafts did."""
        rate = lambda count, seconds: f"{count / seconds:,.1f}" if seconds else "-"  # noqa: E731
        parts = [
            f"prefill {self.prefill_tokens} tokens, "
            f"{rate(self.prefill_tokens, self.prefill_seconds)} tokens/s",
            f"decode {self.decoded_tokens} tokens, "
            f"{rate(self.decoded_tokens, self.decode_seconds)} tokens/s",
            f"compilation {self.compile_seconds:.1f} s",
        ]
        if self.trial_seconds:
            parts.append(f"trial of speculation {self.trial_seconds:.1f} s")
        return "; ".join([*parts, *self._speculation()])

    def _speculation(self) -> list[str]:
        """The decision about drafts, and their gain."""
        cost = [f"a pass costs {self.pass_steps:.2f} steps"] if self.pass_steps else []
        if not self.drafted:
            return [f"speculation off: {cost[0]}"] if self.stopped else []
        accepted = f"{self.accepted / self.drafted:.0%}"
        if self.stopped:
            said = f"speculation stopped after {self.drafted} drafts: {accepted} accepted"
        else:
            per_pass = f"{self.decoded_tokens / self.main_passes:.2f} tokens per main pass"
            said = f"MTP drafts accepted {accepted}, {per_pass}"
        return [", ".join([said, *cost])]
