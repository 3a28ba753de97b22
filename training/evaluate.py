"""Held-out loss, bits per byte and MTP acceptance."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from sharding.partition import place_rows
from training.step import State, Trainer

SECONDS_PER_LINE = 10.0


class HeldOutReader(Protocol):
    """Batches {"tokens", "mask"} that score every held-out token once; data/evaluation.py."""

    eval_bytes: int
    """UTF-8 bytes of the text that is scored."""
    batches: int
    """Batches that there are."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def evaluate(
    trainer: Trainer,
    state: State,
    reader: HeldOutReader,
    rows: range,
    num_rows: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """eval/loss (nats/token), eval/bits_per_byte, and eval/mtp_acceptance where there is MTP.

    `rows` of each batch of `num_rows` sequences are this process's part. say: told now and then
    how far it is. FloatingPointError for a loss that is not a finite number.
    """
    totals: dict[str, float] = {}
    last = time.monotonic()
    for number, batch in enumerate(reader):
        if time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            say(f"evaluating held-out text: {number} of {reader.batches} batches are done")
        placed = place_rows(trainer.layout, dict(batch), rows, num_rows)
        for name, value in trainer.evaluate(state["params"], state["router_bias"], placed).items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value))
    if not math.isfinite(totals["nats"]):
        raise FloatingPointError(
            f"the held-out loss is {totals['nats']} at step {int(state['step'])}: the weights give "
            "logits that are not finite numbers; go on from an earlier checkpoint"
        )
    result = {
        "eval/loss": totals["nats"] / totals["targets"],
        "eval/bits_per_byte": totals["nats"] / math.log(2) / reader.eval_bytes,
    }
    if "drafts" in totals:
        result["eval/mtp_acceptance"] = totals["accepted"] / max(totals["drafts"], 1.0)
    return result
