"""Rotary positions in a Hugging Face `config.json`: the base, and the extension of the context.

Two generations of files spell them in three places, which must agree.
"""

from typing import Any

from checkpoint.hf_values import number, require
from model.config import BandsConfig, ModelConfig, YarnConfig

_YARN = {
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
}  # fmt: skip
_BANDS = {
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
}  # fmt: skip
_KEYS = {"default": set(), "yarn": _YARN, "llama3": _BANDS}
_ROPE_FIXED = {"partial_rotary_factor": 1.0, "attention_factor": None, "truncate": True}


def read_rope(hf: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Base and extension, one of `kinds`, as fields of ModelConfig.

    Older files hold them in `rope_theta` and `rope_scaling`, files of transformers 5 in
    `rope_parameters`. What is said in several places must agree.
    """
    thetas, extensions = {}, {}
    if "rope_theta" in hf:
        thetas["rope_theta"] = hf["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        require(rope is None or isinstance(rope, dict), name, rope, "must be an object or null")
        if not rope:
            continue
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = rope["rope_theta"]
        # Theirs may be no more than the place of the base.
        if rope.keys() - {"rope_theta"}:
            extensions[name] = _extension(name, rope, kinds)
    numbers = {key: number(key, value, above=1.0) for key, value in thetas.items()}
    if len({*numbers.values()}) > 1:
        raise ValueError(f"config.json: {numbers} contradict each other; leave one")
    if len({*extensions.values()}) > 1:
        raise ValueError(
            f"config.json: rope_scaling={hf['rope_scaling']!r} and rope_parameters="
            f"{hf['rope_parameters']!r} contradict each other; leave the one that is meant"
        )
    theta = next(iter(numbers.values()), 10000.0)
    extension = next(iter(extensions.values()), None)
    field = {"bands" if isinstance(extension, BandsConfig) else "yarn": extension}
    return {"rope_theta": theta} | field


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a model, as every version of transformers reads them."""
    scaling = None
    if config.yarn is not None:
        yarn = config.yarn
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    if config.bands is not None:
        bands = config.bands
        scaling = {
            "rope_type": "llama3",
            "factor": bands.factor,
            "original_max_position_embeddings": bands.original_max_position,
            "low_freq_factor": bands.low_freq_factor,
            "high_freq_factor": bands.high_freq_factor,
        }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _extension(
    name: str, rope: dict[str, Any], allowed: tuple[str, ...]
) -> YarnConfig | BandsConfig | None:
    """The context extension that an object of the file asks for; None for none."""
    kinds = {key: rope[key] for key in ("rope_type", "type") if key in rope}
    if len({repr(kind) for kind in kinds.values()}) != 1:
        raise ValueError(
            f"config.json: {name} is {rope!r}; it must say its type, once: "
            f"{' or '.join(map(repr, allowed))}"
        )
    kind = next(iter(kinds.values()))
    extensions = " or ".join(f"plain {kind}" for kind in allowed[1:])
    if kind not in allowed:
        raise ValueError(
            f"config.json: {name}: type {kind!r} not implemented; only {extensions} is"
        )
    for key, value in _ROPE_FIXED.items():
        require(
            rope.get(key, value) == value,
            f"{name}.{key}",
            rope.get(key),
            f"only {value!r} is implemented",
        )
    known = {"rope_type", "type", "rope_theta", *_ROPE_FIXED, *_KEYS[kind]}
    if unknown := sorted(rope.keys() - known):
        raise ValueError(
            f"config.json: {name}: type {kind!r} has no {', '.join(unknown)}; only {extensions} is "
            "implemented"
        )
    if kind == "default":
        return None
    needed = _BANDS if kind == "llama3" else {"factor", "original_max_position_embeddings"}
    if missing := sorted(needed - rope.keys()):
        raise ValueError(f"config.json: {name}: missing {', '.join(missing)}")
    original = rope["original_max_position_embeddings"]
    require(
        type(original) is int and original > 0,
        f"{name}.original_max_position_embeddings",
        original,
        "must be an integer of 1 or more",
    )
    if kind == "llama3":
        low = number(f"{name}.low_freq_factor", rope["low_freq_factor"], above=0.0)
        high = number(f"{name}.high_freq_factor", rope["high_freq_factor"], above=low)
        return BandsConfig(number(f"{name}.factor", rope["factor"], least=1.0), low, high, original)
    # Null means the default there.
    given = {key: value for key, value in rope.items() if value is not None}
    fast = number(f"{name}.beta_fast", given.get("beta_fast", 32.0), above=0.0)
    slow = number(f"{name}.beta_slow", given.get("beta_slow", 1.0), above=0.0)
    require(slow <= fast, f"{name}.beta_slow", slow, f"it exceeds beta_fast={fast:g}")
    mscale = number(f"{name}.mscale", given.get("mscale", 0.0), least=0.0)
    all_dim = number(f"{name}.mscale_all_dim", given.get("mscale_all_dim", 0.0), least=0.0)
    # Without mscale_all_dim, transformers ignores mscale where DeepSeek's code uses it; 1 is both.
    if (all_dim and not mscale) or (not all_dim and (mscale != 1 and "mscale" in given)):
        raise ValueError(
            f"config.json: {name}: mscale={mscale:g} with mscale_all_dim={all_dim:g}; "
            "implementations disagree on one without the other, give both or neither"
        )
    factor = number(f"{name}.factor", rope["factor"], least=1.0)
    return YarnConfig(factor, original, fast, slow, mscale or 1.0, all_dim)
