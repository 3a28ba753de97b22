"""GPUs as data: what their maker says of them. Whoever asks for a GPU by name asks here.

Peaks are dense, without sparsity. Figures are of the SXM modules, of the L40S
card, and of GB200 and GB300 in their racks of 72.
"""

from typing import NamedTuple

GB = 10**9
TFLOPS = 10**12


class Gpu(NamedTuple):
    """Figures of a data sheet."""

    name: str
    memory: int
    """Bytes, as the data sheet counts them."""
    usable: int
    """Bytes that its driver reports, which is what a program can be given at most."""
    bandwidth: int
    """Bytes a second of its memory."""
    bf16: int
    """FLOP/s of dense products in BF16."""
    fp8: int
    """FLOP/s of dense products in FP8; 0 if it has none."""
    nvlink: int
    """Bytes a second that it sends to other GPUs of its NVLink domain, in one direction; of a card
    without NVLink, by PCIe inside of a host."""
    domain: int
    """GPUs that NVLink connects, or of a host."""
    network: int
    """Bytes a second that it sends to other domains."""
    cores: int
    """Streaming multiprocessors."""
    source: str


SHEET = "NVIDIA data sheet"
GPUS = {
    "a100": Gpu(
        "A100", 80 * GB, 85_100_068_864, 2_039 * GB, 312 * TFLOPS, 0, 300 * GB, 8, 25 * GB, 108,
        f"{SHEET} A100 80GB SXM; 8 x 200 Gb/s a host (DGX A100)",
    ),
    "l40s": Gpu(
        "L40S", 48 * GB, 47_800_000_000, 864 * GB, 362 * TFLOPS, 733 * TFLOPS, 32 * GB, 8, 25 * GB,
        142, f"{SHEET} L40S, a card without NVLink: PCIe 4.0 x16; 8 x 200 Gb/s a host",
    ),
    "h100": Gpu(
        "H100", 80 * GB, 85_520_809_984, 3_350 * GB, 989 * TFLOPS, 1_979 * TFLOPS, 450 * GB, 8,
        50 * GB, 132, f"{SHEET} H100 SXM; 8 x 400 Gb/s a host (DGX H100)",
    ),
    "h800": Gpu(
        "H800", 80 * GB, 85_520_809_984, 3_350 * GB, 989 * TFLOPS, 1_979 * TFLOPS, 200 * GB, 8,
        50 * GB, 132, "H100 with less NVLink (ISCA 2025, section 4.1: 200 GB/s one way)",
    ),
    "h200": Gpu(
        "H200", 141 * GB, 150_000_000_000, 4_800 * GB, 989 * TFLOPS, 1_979 * TFLOPS, 450 * GB, 8,
        50 * GB, 132, f"{SHEET} H200 SXM; 8 x 400 Gb/s a host (DGX H200)",
    ),
    "b200": Gpu(
        "B200", 180 * GB, 191_514_411_008, 7_700 * GB, 2_250 * TFLOPS, 4_500 * TFLOPS, 900 * GB, 8,
        50 * GB, 148, f"{SHEET} HGX B200; 8 x 400 Gb/s a host (DGX B200)",
    ),
    "gb200": Gpu(
        "GB200", 186 * GB, 197_897_748_480, 8_000 * GB, 2_500 * TFLOPS, 5_000 * TFLOPS, 900 * GB,
        72, 50 * GB, 152, f"{SHEET} GB200 NVL72; 400 Gb/s a GPU (DGX GB200)",
    ),
    "gb300": Gpu(
        "GB300", 288 * GB, 297_021_079_552, 8_000 * GB, 2_500 * TFLOPS, 5_000 * TFLOPS, 900 * GB,
        72, 100 * GB, 152, f"{SHEET} GB300 NVL72; 800 Gb/s a GPU (ConnectX-8)",
    ),
}  # fmt: skip
GPUS["a100-80"] = GPUS["a100"]
"""By the name that `--gpu` takes."""
