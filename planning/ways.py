"""Ways in which systems do the same layout: this program's own, and those of published systems.

A plan is of this program. To hold its speeds against a run that somebody measured, the ways of that
run's system can stand in (`bench/plan.py`); what they are worth is the reason of a miss.
"""

from typing import NamedTuple


class Ways(NamedTuple):
    """What a system does beside the layers' mathematics."""

    name: str = "this program"
    exact_rows: bool = False
    """Rows of the exchange are sent without padding, whatever `mesh.exchange` says."""
    resends: bool = True
    """Rows are sent to the experts again for the backward pass instead of being kept."""
    one_hop: bool = False
    """What goes to another node is passed on inside of it while it arrives."""
    vocabulary_on_ranks: bool = True
    """All ranks of a pipeline hold a part of embedding and head; else the end ranks hold them."""
    fetches: bool = True
    """Stages get their weights at the start of a step, and give gradients back at its end."""
    hides_messages: bool = False
    """Messages between ranks travel beside products."""


OWN = Ways()
DEEPSEEK = Ways(
    "DeepSeek's system",
    exact_rows=True,
    resends=False,
    one_hop=True,
    vocabulary_on_ranks=False,
    fetches=False,
    hides_messages=True,
)
"""V3 report, sections 3.2.1 to 3.2.3 and 3.3: DeepEP's exchange, which forwards by NVLink what
arrives and knows how many rows come; dispatched rows kept in FP8; ends on the first and last rank;
messages of the pipeline hidden in pairs of chunks."""

MEGATRON = DEEPSEEK._replace(name="Megatron-Core")
"""Megatron-Core MoE (arXiv 2603.07685): DeepEP or HybridEP, dispatched rows kept, resident weights,
embedding and head on the ends, messages hidden where stages are interleaved."""
TORCHTITAN = DEEPSEEK._replace(name="torchtitan", fetches=True)
"""torchtitan: DeepEP, weights gathered by FSDP, embedding and head on the ends."""
