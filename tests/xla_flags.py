"""Flags of XLA for tests; imported before jax, so it imports nothing."""

QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    # In one piece: cutting a program for several compiler threads costs a seventh of its time.
    "--xla_cpu_parallel_codegen_split_count=1 "
    # Fusions by the older emitter: a third of the compile time (13.4 s -> 5.1 s for a step of
    # `tiny`, layout cube), but loops run several times slower; test shapes are too small to mind.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
"""Compile in a quarter of the time; for the programs that tests start, too."""
