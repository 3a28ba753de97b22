"""Checkpoints by transformers for tests/test_hf_parity.py, and what transformers makes of ours.

    .venv-reference/bin/python tests/reference/hf_parity.py write cases.json ROOT
    .venv-reference/bin/python tests/reference/hf_parity.py load folders.json

`write` makes ROOT/<case>/ (config.json, safetensors) for every case of the file: random weights
saved by `save_pretrained`; MTP layers, which it leaves out, are added under their released names,
and FP8 blocks are made here. Beside it ROOT/<case>.npz holds the fp32 results of those weights:

  ids, logits             int32 [B, T], [B, T, V]
  mtp_logits_<k>          [B, T-k, V] module k = 1..D: position i saw token i + k
  prompts, greedy         int32 [B, P], [B, NEW]: `generate` with do_sample=False
  margin                  smallest gap between the two best logits at any greedy step
  routing_margin          smallest gap of a top-K decision, greedy text included

`load` reads folders strictly and writes FOLDER.npz with logits and mtp_logits_<k> of the ids given.
"""

import argparse
import json
import logging
import pathlib

import numpy as np
import torch
import transformers
from hf_reference import Recorder, build, fill, forward, named_tensors, smallest_margin
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

BATCH, LENGTH, PROMPT, NEW = 2, 24, 7, 64
MIN_MARGIN, MIN_ROUTING_MARGIN = 4e-3, 1e-4
"""Both far above what the order of fp32 sums moves."""
MAX_SEEDS = 400
FACTOR = "The explicitly set RoPE scaling factor"
"""A warning about the cases' own numbers, 4096 positions and a factor that leads elsewhere."""
MIN_TOKENS, DULL_SEEDS = 4, 40
"""Different tokens of a text that is worth comparing, and how long to look for one."""
BLOCK, LARGEST = 128, 448.0
INDEX = "model.safetensors.index.json"


def matrices(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of all tensors with one matrix per expert, under released names."""
    views = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            views[name] = tensor
            continue
        prefix = name.rsplit(".", 1)[0]
        for expert, matrix in enumerate(tensor):
            if name.endswith("down_proj"):
                views[f"{prefix}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                views[f"{prefix}.{expert}.gate_proj.weight"] = gate
                views[f"{prefix}.{expert}.up_proj.weight"] = up
    return views


def quantize(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E4M3 values, factors per block, the fp32 matrix that they stand for)."""
    rows, columns = (-(-n // BLOCK) for n in w.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: w.shape[0], : w.shape[1]] = w
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    q = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    value = (q.float() * scale[:, None, :, None]).reshape(padded.shape)
    q = q.reshape(padded.shape)[: w.shape[0], : w.shape[1]]
    return q.contiguous(), scale, value[: w.shape[0], : w.shape[1]]


@torch.no_grad()
def pack(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Round the weights to what files of this kind hold; the files' tensors, by released name."""
    packed = {}
    for name, view in matrices(tensors).items():
        if kind == "fp8" and name.endswith("_proj.weight") and "eh_proj" not in name:
            packed[name], packed[f"{name}_scale_inv"], value = quantize(view)
            view.copy_(value)
        elif kind == "fp32" or (kind == "fp8" and name.endswith("e_score_correction_bias")):
            packed[name] = view.detach().clone()
        else:
            packed[name] = view.detach().to(torch.bfloat16)
            view.copy_(packed[name].float())
    return packed


def save(folder: pathlib.Path, case: dict, model, mtp, packed: dict[str, torch.Tensor]) -> None:
    """The checkpoint folder of a case."""
    if case["kind"] == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(
        folder, max_shard_size=case["shard"] or "1GB", save_original_format=not case["fused"]
    )
    files = sorted(folder.glob("*.safetensors"))
    shards = {file.name: load_file(file) for file in files}
    if mtp is not None:
        extra = named_tensors(model, mtp)
        extra = extra if case["fused"] else {n: packed[n] for n in matrices(extra)}
        extra = {n: t for n, t in extra.items() if is_mtp(n, model)}
        for layer in {name.split(".")[2] for name in extra}:
            extra[f"model.layers.{layer}.embed_tokens.weight"] = packed["model.embed_tokens.weight"]
            extra[f"model.layers.{layer}.shared_head.head.weight"] = packed["lm_head.weight"]
        shards["model-mtp.safetensors"] = {n: t.detach().clone() for n, t in extra.items()}
    if case["kind"] == "fp8":
        shards = {f: {n: packed.get(n, t) for n, t in s.items()} for f, s in shards.items()}
        scales = {n: t for n, t in packed.items() if n.endswith("_scale_inv")}
        shards["model-scales.safetensors"] = scales
    config = json.loads((folder / "config.json").read_text())
    if case["old_config"]:
        config = case["hf"] | {k: config[k] for k in ("architectures",)}
    if case["kind"] == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if mtp is None and case["kind"] != "fp8":
        return
    for name, shard in shards.items():
        save_file(shard, folder / name, {"format": "pt"})
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def is_mtp(name: str, model) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= model.config.num_hidden_layers


@torch.no_grad()
def results(model, mtp, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits of the main model and of every MTP module."""
    found, _ = forward(model, mtp, ids)
    return {k: v.numpy() for k, v in found.items() if "logits" in k}


@torch.no_grad()
def greedy(model, prompts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(new tokens, smallest gap between the two best logits)."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values
    return out.sequences[:, prompts.shape[1] :], float((best[..., 0] - best[..., 1]).min())


def write(case: dict, folder: pathlib.Path) -> None:
    """A folder and its results, from the first seed whose decisions are all clear-cut."""
    hf = case["hf"]
    for seed in range(case["seed"], case["seed"] + MAX_SEEDS):
        rng = np.random.Generator(np.random.PCG64(seed))
        model, mtp = build(hf)
        tensors = named_tensors(model, mtp)
        fill(tensors, rng)
        packed = pack(tensors, case["kind"])
        ids = torch.from_numpy(rng.integers(0, hf["vocab_size"], (BATCH, LENGTH)))
        prompts = torch.from_numpy(rng.integers(0, hf["vocab_size"], (BATCH, PROMPT)))
        record = Recorder(model, mtp)
        arrays = results(model, mtp, ids)
        routing, _ = smallest_margin(record.routers)
        if routing < MIN_ROUTING_MARGIN:
            continue
        record.routers.clear()
        new, margin = greedy(model, prompts)
        routing = min(routing, smallest_margin(record.routers)[0])
        dull = len(np.unique(new)) < MIN_TOKENS and seed < case["seed"] + DULL_SEEDS
        if margin >= MIN_MARGIN and routing >= MIN_ROUTING_MARGIN and not dull:
            break
    else:
        raise SystemExit(f"{folder.name}: no seed of {MAX_SEEDS} has margins above the limits")
    arrays |= {"ids": ids.numpy().astype(np.int32), "prompts": prompts.numpy().astype(np.int32),
               "greedy": new.numpy().astype(np.int32), "margin": np.array(margin),
               "routing_margin": np.array(routing), "seed": np.array(seed)}  # fmt: skip
    np.savez(folder.with_suffix(".npz"), **arrays)
    model.generation_config.pad_token_id = None
    save(folder, case, model, mtp, packed)


def dequantized(folder: pathlib.Path) -> pathlib.Path:
    """An FP8 folder as fp32 files beside it: transformers reads FP8 with more packages only."""
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    for name in [name for name in state if name.endswith("_scale_inv")]:
        weight = state[name.removesuffix("_scale_inv")]
        assert weight.dtype == torch.float8_e4m3fn, name
        factors = state.pop(name).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        factors = factors[: weight.shape[0], : weight.shape[1]]
        state[name.removesuffix("_scale_inv")] = weight.float() * factors
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in state.values())
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["weight_block_size"] == [BLOCK, BLOCK]
    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir()
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(json.dumps(config))
    return plain


class Said(logging.Handler):
    """What a program logs from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(folder: pathlib.Path, ids_file: str) -> dict[str, np.ndarray]:
    """Results of a folder; SystemExit for a missing, unexpected or mismatched tensor, and for a
    warning (MTP layers, which transformers leaves out, apart)."""
    config = json.loads((folder / "config.json").read_text())
    layers, depth = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    # transformers names the MTP layer of the release, 61; the same rule for few layers.
    kind = transformers.DeepseekV3ForCausalLM
    kind._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{n}\..*" for n in range(layers, layers + depth)
    ]
    if "quantization_config" in config:
        folder = dequantized(folder)
    said = Said()
    logging.getLogger("transformers").addHandler(said)
    options = {"experts_implementation": "eager"} if "n_routed_experts" in config else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True,
        **options,
    )  # fmt: skip
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise SystemExit(f"{folder}: {problem}: {sorted(info[problem])}")
    lines = [line for line in said.lines if FACTOR not in line]
    if lines and not depth:
        raise SystemExit(f"{folder}: transformers says {lines}")
    mtp = MtpModel.from_pretrained(model).eval() if depth else None
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float32}:
        raise SystemExit(f"{folder}: loaded as {kinds}, not fp32")
    return results(model.eval(), mtp, torch.from_numpy(np.load(ids_file)["ids"].astype(np.int64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("write", help="checkpoints and results")
    writes.add_argument("cases", help=".json: name -> hf, seed, kind, shard, fused, old_config")
    writes.add_argument("root", type=pathlib.Path)
    loads = commands.add_parser("load", help="results of folders")
    loads.add_argument("folders", help=".json: folder -> .npz with the ids")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    if args.command == "write":
        for name, case in json.loads(pathlib.Path(args.cases).read_text()).items():
            write(case, args.root / name)
    else:
        for folder, ids in json.loads(pathlib.Path(args.folders).read_text()).items():
            np.savez(f"{folder}.npz", **load(pathlib.Path(folder), ids))


if __name__ == "__main__":
    main()
