"""Held-out loss, bits per byte and MTP acceptance."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from sharding.partition import place_rows
from training.step import State, Trainer


class HeldOutReader(Protocol):
    """Batches {"tokens", "mask"} that score every held-out token once; data/evaluation.py."""

    eval_bytes: int
    """UTF-8 bytes of the text that is scored."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def evaluate(
    trainer: Trainer, state: State, reader: HeldOutReader, rows: range, num_rows: int
) -> dict[str, float]:
    """eval/loss (nats/token), eval/bits_per_byte, and eval/mtp_acceptance where there is MTP.

    `rows` of each batch of `num_rows` sequences are this process's part. FloatingPointError for a
    loss that is not a finite number.
    """
    totals: dict[str, float] = {}
    for batch in reader:
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
