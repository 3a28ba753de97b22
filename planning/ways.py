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
    in_step: bool = True
    """A rank waits for its neighbours at every tick; else for what its pass needs alone."""
    recomputes_experts: bool = True
    """Selective recomputation repeats the experts' first products; else their results are kept."""
    grouped: float = 0.0
    """Share of the peak that grouped products in BF16 reach; 0: as the hardware's table says."""


OWN = Ways()
DEEPSEEK = Ways(
    "DeepSeek's system",
    exact_rows=True,
    resends=False,
    one_hop=True,
    vocabulary_on_ranks=False,
    fetches=False,
    hides_messages=True,
    recomputes_experts=False,
)
"""V3 report, sections 3.2.1 to 3.2.3 and 3.3: DeepEP's exchange, which forwards by NVLink what
arrives and knows how many rows come; dispatched rows and SwiGLU's inputs kept in FP8; ends on the
first and last rank; messages of the pipeline hidden in pairs of chunks. Ranks are in step: the
published DualPipe waits for a chunk's messages to both neighbours before it computes the next."""

MEGATRON = DEEPSEEK._replace(name="Megatron-Core", in_step=False, grouped=627.9 / 989)
"""Megatron-Core MoE (arXiv 2603.07685): DeepEP or HybridEP, dispatched rows kept, resident weights,
embedding and head on the ends, messages beside passes of interleaved stages; of the layers with
experts, projections of attention alone are recomputed (the runs' own lists of modules). Grouped
products: TransformerEngine 2.7 on H100, 8 groups of 4096 rows, by its pull request 2045."""
TORCHTITAN = DEEPSEEK._replace(name="torchtitan", fetches=True, recomputes_experts=True)
"""torchtitan: DeepEP, weights gathered by FSDP, embedding and head on the ends; PyTorch's
interleaved schedule waits for the messages of each of its time steps."""
