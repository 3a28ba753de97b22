"""What one host of many reads of a released DeepSeek-V3, and the main memory that takes.

    python -m bench.import_share [--layers 61] [--hosts 64] [--write]

A folder with the released names, shapes and types (FP8 blocks, one MTP layer) is made of sparse
files: real headers, no blocks on disk, all values zero. Host 0 then reads the shards of its 8
devices as generation places them (fsdp 8, expert = hosts) in bf16 through the reader that loads
checkpoints, drops each, and reports the peak of its resident memory. No byte comes from a disk, so
the rate is that of reading, dequantising and transposing alone.
"""

import dataclasses
import json
import pathlib
import resource
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from bench.command import Command
from checkpoint import safetensors
from checkpoint.hf_config import to_hf_config
from checkpoint.hf_reader import INDEX, HuggingFaceFolder
from checkpoint.hf_writer import QUANTIZATION, layout
from configs import deepseek
from model.blueprint import blueprint
from model.config import ModelConfig
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout, stored_shardings

DEVICES_PER_HOST = 8
SHARD_BYTES = 4_300_000_000
"""Gives about the 163 files of the release."""


def write_sparse(path: pathlib.Path, config: ModelConfig) -> int:
    """Write the folder; returns the bytes that its files claim."""
    specs, _ = layout(config, "bf16", True)
    files: list[dict] = [{}]
    size = 0
    for name, (dtype, shape) in specs.items():
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if size + nbytes > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = (dtype, shape)
        size += nbytes
    total, weight_map = 0, {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        head = safetensors.header_bytes(tensors)
        body = sum(d.itemsize * int(np.prod(s, dtype=np.int64)) for d, s in tensors.values())
        with (path / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + body)
        total += len(head) + body
        weight_map |= dict.fromkeys(tensors, name)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    described = to_hf_config(config) | {"quantization_config": QUANTIZATION}
    (path / "config.json").write_text(json.dumps(described))
    return total


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclasses.dataclass
class Share:
    """Amounts that a host has read."""

    read: int = 0
    """Bytes of files."""
    kept: int = 0
    """Bytes of its shards, in bf16."""
    largest: int = 0
    """Bytes of the largest of them."""
    seconds: float = 0.0


def read_share(folder: HuggingFaceFolder, hosts: int) -> Share:
    """Read what the first host's devices hold, shard by shard, keeping nothing."""
    mesh = make_mesh(MeshConfig(fsdp=DEVICES_PER_HOST, expert=hosts))
    # Hosts are rows of experts: the devices that share an expert are on one host.
    ordered = np.asarray(mesh.devices).reshape(DEVICES_PER_HOST, hosts)
    local = set(ordered[:, 0])
    plan = blueprint(folder.config)
    share, original = Share(), safetensors._pread

    def counted(file, info, into, offset):
        share.read += into.nbytes
        original(file, info, into, offset)

    safetensors._pread = counted
    start = time.perf_counter()
    try:
        for tree, shapes, axes in (
            ("params", plan.params, plan.params_axes),
            ("router_bias", plan.router_bias, plan.router_bias_axes),
        ):
            shardings = stored_shardings(Layout(mesh, copied=()), shapes, axes)
            leaves = jax.tree_util.tree_leaves_with_path(shapes)
            for (keys, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
                places = sharding.devices_indices_map(leaf.shape)
                mine = {
                    tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
                    for device, index in places.items()
                    if device in local
                }
                name = jax.tree_util.keystr(keys, simple=True, separator="/")
                for bounds in sorted(mine):
                    index = tuple(slice(*pair) for pair in bounds)
                    size = folder.read(tree, name, index, ml_dtypes.bfloat16).nbytes
                    share.kept += size
                    share.largest = max(share.largest, size)
    finally:
        safetensors._pread = original
    share.seconds = time.perf_counter() - start
    return share


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and, if asked, write a section of the results."""
    parser = Command(__doc__, layers=4, hosts=64)
    parser.add_argument("--layers", type=int, default=61, help="of the main model, 4 or more")
    parser.add_argument("--hosts", type=int, default=64, help="of 8 devices each")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_PER_HOST * options.hosts)
    config = dataclasses.replace(deepseek.v3_model(), num_layers=options.layers)
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        total = write_sparse(path, config)
        started = time.perf_counter()
        folder = HuggingFaceFolder(path)
        opened, before = time.perf_counter() - started, peak_mib()
        share = read_share(folder, options.hosts)
    grown, mib = peak_mib() - before, 2.0**20
    lines = [
        f"V3 with {options.layers} + 1 layers: {total / 1e9:.1f} GB claimed by sparse files; "
        f"opened and checked in {opened:.1f} s. Host 0 of {options.hosts}:",
        "",
        "| | |",
        "|---|---|",
        f"| read from files | {share.read / 1e9:.2f} GB in {share.seconds:.0f} s "
        f"({share.read / share.seconds / 1e9:.2f} GB/s) |",
        f"| its shards, bf16 | {share.kept / 1e9:.2f} GB; the largest {share.largest / mib:.0f} "
        "MiB |",
        f"| resident memory with the folder open | {before:.0f} MiB |",
        f"| peak while reading | {before + grown:.0f} MiB: {grown:.0f} MiB more, "
        f"{grown * mib / share.largest:.2f} x the largest shard |",
    ]
    parser.show("Import of one host's share", lines)


if __name__ == "__main__":
    main()
