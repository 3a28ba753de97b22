"""Speeds of GPUs and networks as data: each number with the source that published it.

None was fitted to a training run: `bench/plan.py` compares predictions with published runs, and the
tables here were written before. A file of a user's own measurements overrides them (`--measured`).

Speeds are shares of a data sheet's peak (`runtime/gpus.py`), measured on a Hopper unless said
otherwise, and taken over to other GPUs as shares: where a GPU has figures of its own, they stand.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime.gpus import GPUS, Gpu


class Figure(NamedTuple):
    """A number and who published it."""

    value: float
    source: str


class Shape(NamedTuple):
    """Columns and reduction of a product [M, K] x [K, N]; M is large."""

    N: int
    K: int


DEEPGEMM = "DeepGEMM README of 2025-04-09, H800"
TOKAMAX = "medians of tokamax's committed autotuning files, H100"
FA3 = "FlashAttention-3 (arXiv 2407.08608), figures 5 and 6, H100"

FP8_PRODUCTS: Mapping[Shape, float] = {
    Shape(2112, 7168): 1127 / 1979,
    Shape(24576, 1536): 1212 / 1979,
    Shape(32768, 512): 775 / 1979,
    Shape(7168, 16384): 1520 / 1979,
    Shape(4096, 7168): 1410 / 1979,
    Shape(7168, 2048): 1168 / 1979,
}
"""Dense products at M = 4096, share of the FP8 peak (DEEPGEMM, its table of dense products)."""

BF16_PRODUCTS: Mapping[Shape, float] = {
    Shape(4096, 4096): 800 / 989,  # jax, docs/pallas/gpu/collective_matmul: 43 us, 1024 rows
    Shape(151936, 4096): 684 / 989,  # TOKAMAX, linear cross-entropy, plain XLA
}
"""Dense products in BF16, share of the peak (jax's documentation; TOKAMAX)."""

FP8_GROUPED: Mapping[Shape, float] = {
    Shape(4096, 7168): 1346 / 1979,
    Shape(7168, 2048): 1214 / 1979,
}
"""Grouped products, 4 x 8192 rows, share of the FP8 peak (DEEPGEMM, grouped, contiguous)."""

FP8_GROUPED_256: Mapping[Shape, float] = {
    Shape(4096, 7168): 932 / 1979,
    Shape(7168, 2048): 815 / 1979,
}
"""The same with 256 rows per expert (DEEPGEMM, grouped, masked)."""

BF16_GROUPED: Mapping[Shape, float] = {
    Shape(2048, 7168): 533 / 989,
    Shape(1024, 7168): 454 / 989,
    Shape(7168, 1024): 372 / 989,
    Shape(7168, 512): 333 / 989,
}
"""Grouped products in BF16, forward and of the input, 512 to 1024 rows per expert (TOKAMAX)."""

BF16_GROUPED_WEIGHTS = 518 / 989
"""Gradient of the experts' weights in BF16 (TOKAMAX, drhs 7168 x 1024)."""

ATTENTION_FORWARD: Mapping[int, float] = {
    512: 292 / 989, 1024: 423 / 989, 2048: 521 / 989, 4096: 579 / 989, 8192: 602 / 989,
    16384: 616 / 989,
}  # fmt: skip
"""Causal attention by length, heads of 128, share of the BF16 peak, half of the square counted
(FA3)."""

ATTENTION_BACKWARD = Figure(
    452 / 616, f"{TOKAMAX} (452, heads of 128, causal, 16k) over {FA3} (616)"
)
"""Backward speed over forward speed of attention."""

BLACKWELL_ATTENTION = {"forward": 1460 / 2250, "backward": 1000 / 2250}
"""Dense attention on B200, share of its BF16 peak (FlashMLA README, as reported by NVIDIA)."""

MEMORY = Figure(3000 / 3350, "FlashMLA README: 3000 GB/s on an H800")
"""Share of the memory's bandwidth that a kernel bound by it reaches."""

NVLINK = Figure(160 / 200, "ISCA 2025 (arXiv 2505.09343), section 4.3: 160 of 200 GB/s on H800")
"""Share of NVLink's bandwidth that a collective reaches."""

NETWORK = Figure(40 / 50, "ISCA 2025 (arXiv 2505.09343), section 4.3: 40 of 50 GB/s effective")
"""Share of the network's bandwidth that a collective reaches."""

EXCHANGE_NVLINK = Figure(155 / 200, "DeepEP README, H800, EP8: dispatch 153, combine 158 GB/s")
"""Share of NVLink's bandwidth in an exchange with experts of one domain."""

EXCHANGE_NETWORK: Mapping[int, float] = {16: 43 / 50, 32: 57.5 / 50, 64: 50.5 / 50}
"""Bytes of an exchange with experts between nodes, those that stay in the node included, over the
network's bandwidth, by experts' shards (DeepEP README, H800 with 400 Gb/s: 43, 58/57, 51/50)."""

EXCHANGE_CORES = Figure(20 / 132, "V3 report, section 3.2.2: 20 of 132 SMs send and receive")
"""Share of a GPU's processors that an exchange takes while it runs beside products."""

CONTEXT_BYTES = Figure(
    0.6 * 2**30, "size of a CUDA context with cuBLAS on H100 as users report it (500 to 600 MiB)"
)
"""Memory of the CUDA context, its modules and libraries."""

NCCL_BYTES_PER_GROUP = Figure(
    0.15 * 2**30,
    "NCCL's documentation: 4 MiB (NCCL_BUFFSIZE) per channel and direction, 16 channels",
)
"""Memory of NCCL per group of devices that a program has collectives on."""

FRAGMENTS = Figure(
    0.02,
    "a choice: what XLA's allocator may leave unused; runs set 0.83 to 0.88 of the memory "
    "(marin-community/marin#8506)",
)
"""Share of what is left that the allocator cannot hand out."""

DOLLARS_PER_GPU_HOUR: Mapping[str, float] = {"h800": 2.0}
"""Price of a GPU hour where a publication states it (V3 report, table 1); 2 $ for the others, as a
unit to multiply."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of GPU with its network, and how fast what runs."""

    gpu_name: str
    per_node: int
    """GPUs that NVLink connects."""
    network: float
    """Bytes a second and GPU to other nodes."""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """A user's own figures: keys `products`, `grouped`, `attention`, `memory`, `nvlink`,
    `network`, `exchange`."""

    @property
    def gpu(self) -> Gpu:
        """Its data sheet."""
        return GPUS[self.gpu_name]

    # -- products

    def product(self, M: int, N: int, K: int, fp8: bool) -> float:
        """FLOP/s of a dense product [M, K] x [K, N]."""
        own = self._own_shapes["products", fp8]
        if own:
            return near(own, N, K) * filled(M, N, self.gpu.cores)
        peak, table = self._peak(fp8), FP8_PRODUCTS if fp8 and self.gpu.fp8 else BF16_PRODUCTS
        return peak * near(table, N, K) * filled(M, N, self.gpu.cores)

    def grouped(self, rows: float, N: int, K: int, fp8: bool, weights: bool = False) -> float:
        """FLOP/s of products of experts with `rows` rows each; `weights`: their gradient."""
        own = self._own_shapes["grouped", fp8]
        if own:
            return near(own, N, K) * min(1.0, rows / 256)
        if fp8 and self.gpu.fp8:
            many, few = near(FP8_GROUPED, N, K), near(FP8_GROUPED_256, N, K)
            share = min(max(math.log(max(rows, 1) / 256) / math.log(4096 / 256), 0.0), 1.0)
            less = min(1.0, rows / 256)
            return self._peak(True) * (few + share * (many - few)) * less
        share = BF16_GROUPED_WEIGHTS if weights else near(BF16_GROUPED, N, K)
        return self._peak(False) * share * min(1.0, rows / 256)

    def attention(self, seq_len: int, backward: bool) -> float:
        """FLOP/s of causal attention, half of the square counted."""
        own = self._own("attention", "backward" if backward else "forward")
        if own:
            return own
        lengths = sorted(ATTENTION_FORWARD)
        length = min(max(seq_len, lengths[0]), lengths[-1])
        high = next(n for n in lengths if n >= length)
        low = max((n for n in lengths if n <= length), default=high)
        share = 0.0 if high == low else math.log(length / low) / math.log(high / low)
        speed = ATTENTION_FORWARD[low] + share * (ATTENTION_FORWARD[high] - ATTENTION_FORWARD[low])
        if self.gpu_name in ("b200", "gb200", "gb300"):
            most = BLACKWELL_ATTENTION["backward" if backward else "forward"]
            return self.gpu.bf16 * most * speed / ATTENTION_FORWARD[lengths[-1]]
        return self.gpu.bf16 * speed * (ATTENTION_BACKWARD.value if backward else 1.0)

    @property
    def memory_speed(self) -> float:
        """Bytes a second of a kernel that memory bounds."""
        return self._own("memory", "bandwidth") or self.gpu.bandwidth * MEMORY.value

    # -- links

    def link(self, span: int) -> str:
        """The slowest link of a group of devices that lie within `span` consecutive ones."""
        return "nvlink" if span <= self.per_node else "network"

    def collective(self, link: str) -> float:
        """Bytes a second and GPU of gathers, reductions and permutes."""
        own = self._own(link, "collective")
        share = NVLINK.value * self.gpu.nvlink if link == "nvlink" else NETWORK.value * self.network
        return own or share

    def exchange(self, link: str, experts: int) -> float:
        """Bytes a second and GPU of an exchange with `experts` shards of experts."""
        own = {
            int(key.split()[1]): float(speed)
            for key, speed in self.measured.get("exchange", {}).items()
            if key.startswith(link)
        }
        if not own and link == "nvlink":
            return EXCHANGE_NVLINK.value * self.gpu.nvlink
        table = own or {n: share * self.network for n, share in EXCHANGE_NETWORK.items()}
        return table[min(table, key=lambda n: abs(math.log(n / max(experts, 1))))]

    # -- memory

    def limit(self, groups: int) -> tuple[float, list[str]]:
        """Bytes that a program can have, and where the rest goes; `groups` of collectives."""
        context, nccl = CONTEXT_BYTES.value, NCCL_BYTES_PER_GROUP.value * groups
        left = self.gpu.usable - context - nccl
        lost = FRAGMENTS.value * left
        return left - lost, [
            f"{self.gpu.usable / 2**30:.1f} GiB that the driver reports",
            f"- {context / 2**30:.2f} CUDA context ({CONTEXT_BYTES.source})",
            f"- {nccl / 2**30:.2f} NCCL, {groups} groups ({NCCL_BYTES_PER_GROUP.source})",
            f"- {lost / 2**30:.2f} lost between blocks ({FRAGMENTS.source})",
        ]

    @property
    def dollars_per_hour(self) -> float:
        """Price of a GPU hour."""
        return float(self.measured.get("dollars_per_gpu_hour", 0)) or DOLLARS_PER_GPU_HOUR.get(
            self.gpu_name, 2.0
        )

    def _peak(self, fp8: bool) -> float:
        return self.gpu.fp8 if fp8 and self.gpu.fp8 else self.gpu.bf16

    @functools.cached_property
    def _own_shapes(self) -> dict[tuple[str, bool], dict[Shape, float]]:
        """Measured products by table, and whether they are of FP8."""
        found = {(table, fp8): {} for table in ("products", "grouped") for fp8 in (False, True)}
        for table, _ in found:
            for key, speed in self.measured.get(table, {}).items():
                sizes, _, kind = key.partition(" ")
                N, K = map(int, sizes.split("x")[-2:])
                found[table, kind == "fp8"][Shape(N, K)] = float(speed)
        return found

    def _own(self, table: str, key: str) -> float | None:
        found = self.measured.get(table, {}).get(key)
        return None if found is None else float(found)


def near(table: Mapping[Shape, float], N: int, K: int) -> float:
    """Speed at a shape: of the shapes in the table, the nearer the more weight, on a scale of
    ratios; beyond the table that of its edge."""
    weights = {}
    for shape, speed in table.items():
        apart = math.log(shape.N / N) ** 2 + math.log(shape.K / K) ** 2
        if apart < 1e-12:
            return speed
        weights[shape] = 1 / apart
    return sum(weights[s] * table[s] for s in table) / sum(weights.values())


def filled(M: int, N: int, cores: int) -> float:
    """Share of the processors that 128 x 128 tiles of a result fill, over that of the tables' M of
    4096 (DeepGEMM's and cuBLAS's usual tile)."""

    def share(rows: int) -> float:
        tiles = math.ceil(rows / 128) * math.ceil(N / 128)
        whole = (rows / 128) * (N / 128)
        return whole / (math.ceil(tiles / cores) * cores)

    return min(1.0, share(max(M, 1)) / share(4096)) if M < 4096 else 1.0


def make_hardware(
    gpu: str, per_node: int = 0, network: float = 0.0, measured: str = ""
) -> Hardware:
    """A kind of GPU, with a network of one's own where it is given.

    Args:
        gpu: a name of `runtime/gpus.py:GPUS`.
        per_node: GPUs that NVLink connects; 0: the data sheet's.
        network: Gb/s and GPU between nodes; 0: the data sheet's.
        measured: file of own figures, JSON.

    Raises:
        ValueError: no such GPU, or a file that is none.
    """
    if gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu}: there are {', '.join(GPUS)}")
    found = GPUS[gpu.lower()]
    for option, value in (("--per-node", per_node), ("--network", network)):
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{option} {value:g}: give a positive number, or 0 for the data sheet's"
            )
    own = read_measured(measured) if measured else {}
    kind = own.get("device", {}).get("kind", "")
    if kind and GPUS[gpu.lower()].name not in kind.upper().replace("-", " ").split():
        raise ValueError(f"--measured {measured} is of {kind}, and --gpu is {gpu}; name that GPU")
    bytes_per_s = network * 1e9 / 8 if network else found.network
    return Hardware(gpu.lower(), per_node or found.domain, bytes_per_s, own)


MEASURED: Mapping[str, str] = {
    "products": r"(\d+x)?\d+x\d+( fp8)?", "grouped": r"\d+x\d+( fp8)?",
    "attention": "forward|backward", "memory": "bandwidth", "nvlink": "collective",
    "network": "collective", "exchange": r"(nvlink|network) \d+",
}  # fmt: skip
"""Tables of a file of own figures, and what their keys look like."""


def read_measured(path: str) -> dict[str, Any]:
    """Own figures from a file: tables by name, each FLOP/s or bytes a second by key.

    Raises:
        ValueError: no such file, a table, key or number that is none, or figures of a dry run.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no tables by name")
        for name, table in found.items():
            _check_table(name, table)
    except (OSError, ValueError) as error:
        raise ValueError(f"--measured {path}: {error}") from None
    return found


def _check_table(name: str, table: Any) -> None:
    if name == "device":
        if not isinstance(table, dict) or table.get("dry"):
            raise ValueError("it was made without a GPU, so its figures mean nothing")
        return
    if name == "dollars_per_gpu_hour":
        name, table = "", {name: table}
    elif name not in MEASURED:
        raise ValueError(
            f"no table {name}; there are {', '.join(MEASURED)}, and dollars_per_gpu_hour"
        )
    if not isinstance(table, dict):
        raise ValueError(f"{name} is no table of numbers by key")
    for key, value in table.items():
        if name and not re.fullmatch(MEASURED[name], key):
            raise ValueError(f"{name} has no key {key!r}; keys look like {MEASURED[name]}")
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} {key} is {value!r}, no positive number".lstrip())
