"""The first thing that an entry point does: devices, compilation cache, other processes."""

import os
import sys
from importlib.util import find_spec

import jax

from runtime.config import RuntimeOptions
from runtime.devices import check_devices, emulate_devices
from runtime.gpu_host import has_gpus, lines, preflight, this_host
from runtime.host_memory import keep_freed_memory
from runtime.processes import join_processes


def start(options: RuntimeOptions, idle: bool = False) -> None:
    """Set up JAX as the options say. Call before JAX is first used.

    `idle`: nothing will run on the devices.

    Raises ValueError for devices or processes that cannot be had.
    """
    if options.emulate or find_spec("jax_cuda13_plugin") is None:
        keep_freed_memory()
    if options.emulate:
        emulate_devices(options.emulate, idle)
    # Before JAX takes memory, which would count as taken by others.
    found = preflight(this_host()) if has_gpus() and not options.emulate else []
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(options.compilation_cache))
    join_processes(
        options.distributed,
        options.coordinator,
        options.num_processes,
        options.process_id,
        options.join_within,
        options.lost_after,
    )
    if jax.distributed.is_initialized():
        check_devices()
    if found:
        for line in lines(found, problems_only=not is_first_process()):
            print(line, file=sys.stderr)


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0
