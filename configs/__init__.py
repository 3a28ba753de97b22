"""Presets by name. A preset is a function without arguments that returns a RunConfig."""

import difflib
from collections.abc import Callable

from configs import deepseek, dense, janus, r1, search, small, tiny
from configs.schema import RunConfig

PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        *(tiny.tiny, small.small),
        *(deepseek.v2_lite, deepseek.moonlight_16b, deepseek.v2, deepseek.v3_671b),
        deepseek.kimi_k2,
        *(r1.r1_base, r1.r1_zero, r1.r1_base2, r1.r1_zero2, r1.r1_cold, r1.r1_reasoning),
        *(r1.r1_sft, r1.r1, r1.r1_student, r1.r1_student2),
        *(search.search_base, search.search_zero),
        *(dense.tiny_dense, dense.r1_student_dense, dense.r1_zero_dense),
        *(dense.qwen25_1_5b, dense.qwen25_7b, dense.qwen25_14b, dense.qwen25_32b),
        *(dense.llama31_8b, dense.llama33_70b, dense.llama31_405b),
        *(dense.r1_distill_qwen_1_5b, dense.r1_distill_qwen_7b, dense.r1_distill_qwen_14b),
        *(dense.r1_distill_qwen_32b, dense.r1_distill_llama_8b, dense.r1_distill_llama_70b),
        *(janus.janus_tiny_tokenizer, janus.janus_tiny),
        *(janus.janus_pro_1b, janus.janus_pro_1b_stage2, janus.janus_pro_1b_stage3),
        *(janus.janus_pro_7b, janus.janus_pro_7b_stage2, janus.janus_pro_7b_stage3),
    )
}
"""Presets in the order of `--help`."""


def preset(name: str) -> RunConfig:
    """The preset called `name`; ValueError with near matches if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"unknown preset {name!r}{hint} Known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def summary(name: str) -> str:
    """First line of the preset's docstring."""
    return (PRESETS[name].__doc__ or "").strip().splitlines()[0]
