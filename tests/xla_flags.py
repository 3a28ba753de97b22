"""Flags of XLA for tests; imported before jax, so it imports nothing."""

QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    # In one piece: cutting a program for several compiler threads costs a seventh of its time.
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""Compile in half the time; for the programs that tests start, too."""
