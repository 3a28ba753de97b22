"""Run Hugging Face's models on tiny random weights and write down everything they compute.

    hf_reference.py run --case v3 --seed 100 --out v3.npz
    hf_reference.py load --checkpoint DIR --tokens tokens.npy --out logits.npz

Needs torch and transformers, and nothing of this project's model: the numbers must come from an
implementation that we did not write. Runs in fp32 on one CPU thread, offline.

Arrays of a `run` file, names of the tensors as in a released checkpoint (B sequences, T tokens):
  meta                    JSON: case, seed, config (as given), smallest top-K margin, and so on
  tokens                  int32 [B, T]
  w:<tensor>              every weight; float16, and exact: weights are drawn from float16 values
  g:<tensor>              gradient of `loss` with respect to that weight
  logits                  [B, T, V]
  hidden                  [layers + 1, B, T, d]: embeddings, then the output of every layer
  final_hidden            [B, T, d] after the final norm
  attn_in, attn_out       [B, T, d] attention of layer 0, after its input norm
  moe_in, moe_out         [B, T, d] first MoE layer (if any), after its norm
  router_index/_weight    [B, T, K] first MoE layer (if any), in no particular order
  mtp_logits_<k>          [B, T-k, V] module k = 1..D: position i saw token i + k
  loss                    mean next-token cross-entropy, plus 0.3 times its mean over modules
"""

import argparse
import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from cases import BATCH, CASES, DENSE, LENGTH
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_layers import MtpModel

CONFIG_CLASSES = {
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
}
ALL_CASES = CASES | DENSE
MIN_MARGIN = 1e-3
"""Top-K decisions closer than this may differ between two correct fp32 programs."""
MTP_WEIGHT = 0.3
MAX_SEEDS = 2000
WEIGHT_STD = 0.18
"""About 1/sqrt(d): a matrix keeps the size of what it multiplies, so logits are of order 1."""


def build(hf: dict) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The causal language model of a configuration, and its MTP modules when it has any."""
    # A copy: transformers completes the nested rope dict in place.
    options = copy.deepcopy(hf)
    config = CONFIG_CLASSES[options.pop("model_type")](**options)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    depth = hf.get("num_nextn_predict_layers", 0)
    mtp = MtpModel(model, depth) if depth else None
    if mtp is not None:
        mtp.eval()
    return model.eval(), mtp


def named_tensors(model, mtp) -> dict[str, torch.Tensor]:
    """Weights and selection biases under their names in a released checkpoint.

    MTP module k is layer `num_hidden_layers + k` there. Its copies of the embedding and the head
    are left out: they are the main model's tensors.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("inv_freq")}
    if mtp is not None:
        first = model.config.num_hidden_layers
        for depth, layer in enumerate(mtp.layers):
            inner = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            for name, tensor in inner.items():
                name = {"post_norm.weight": "shared_head.norm.weight"}.get(name, name)
                name = name.removeprefix("mtp_block.")
                tensors[f"model.layers.{first + depth}.{name}"] = tensor
    return tensors


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> None:
    """Random weights that give logits of order 1 and experts that compete.

    Norm scales scatter around 1 and biases around 0, so that forgetting one changes the result.
    Every value is rounded to float16, which halves the golden files without losing a bit.
    """
    for name in sorted(tensors):
        tensor = tensors[name]
        draw = rng.standard_normal(tuple(tensor.shape))
        if name.endswith("e_score_correction_bias"):
            draw = 0.1 * draw
        elif name.endswith("bias"):
            draw = 0.3 * draw
        elif tensor.ndim == 1:
            draw = 1.0 + 0.2 * draw
        else:
            draw = WEIGHT_STD * draw
        tensor.copy_(torch.from_numpy(draw.astype(np.float16).astype(np.float32)))


class Recorder:
    """Forward hooks that keep what the blocks received and returned."""

    def __init__(self, model, mtp):
        self.routers: list[tuple] = []
        self.attn: tuple | None = None
        self.moe: tuple | None = None
        layers = list(model.model.layers)
        layers[0].self_attn.register_forward_hook(self._attn, with_kwargs=True)
        sparse = [layer for layer in layers if hasattr(layer.mlp, "gate")]
        if sparse:
            sparse[0].mlp.register_forward_hook(self._moe)
        sparse += [layer.mtp_block for layer in mtp.layers] if mtp is not None else []
        for layer in sparse:
            layer.mlp.gate.register_forward_hook(self._router)

    def _attn(self, _module, args, kwargs, output):
        self.attn = (args[0] if args else kwargs["hidden_states"], output[0])

    def _moe(self, _module, args, output):
        self.moe = (args[0], output)

    def _router(self, module, _args, output):
        self.routers.append((module, *output))


def smallest_margin(routers: list[tuple]) -> tuple[float, float]:
    """How clear-cut the routing is, and how often the bias decides it.

    Returns the smallest gap between a chosen and a rejected group or expert (of sigmoid scores plus
    bias; of log-probabilities for softmax), and the share of tokens whose experts would differ
    without the bias. Recomputed here from the logits, and compared with what the router chose.
    """
    margin, flips = np.inf, []
    for module, logits, _, index in routers:
        score = logits.detach().double().numpy()
        E, G, K = module.num_experts, module.num_group or 1, module.top_k
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            score = 1 / (1 + np.exp(-score))
        chosen = []
        for shift in (0.0,) if bias is None else (0.0, bias.double().numpy()):
            grouped = np.sort((score + shift).reshape(-1, G, E // G), axis=-1)
            group_score = grouped[..., -1] if bias is None else grouped[..., -2:].sum(-1)
            order = np.argsort(-group_score, axis=-1)
            kept_groups = module.topk_group or G
            allowed = np.zeros_like(group_score, bool)
            np.put_along_axis(allowed, order[:, :kept_groups], True, axis=-1)
            choice = np.where(np.repeat(allowed, E // G, axis=-1), score + shift, -np.inf)
            ranks = np.argsort(-choice, axis=-1)
            chosen.append(np.sort(ranks[:, :K], axis=-1))
        ranked = np.take_along_axis(choice, ranks, axis=-1)
        margin = min(margin, (ranked[:, K - 1] - ranked[:, K]).min())
        if kept_groups < G:
            ranked = np.take_along_axis(group_score, order, axis=-1)
            margin = min(margin, (ranked[:, kept_groups - 1] - ranked[:, kept_groups]).min())
        if not np.array_equal(chosen[-1], np.sort(index.numpy(), axis=-1)) and margin > MIN_MARGIN:
            raise AssertionError("the router does not choose as documented in smallest_margin")
        flips.append((chosen[0] != chosen[-1]).any(-1).mean())
    return float(margin), float(min(flips, default=0.0))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def forward(model, mtp, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Logits, final hidden and MTP logits of `tokens` [B, T], and the loss of the docstring."""
    out = model(tokens, output_hidden_states=True, use_cache=False)
    final = out.hidden_states[-1]
    result = {"logits": out.logits, "final_hidden": final}
    loss = cross_entropy(out.logits[:, :-1], tokens[:, 1:])
    hidden, mtp_losses = final, []
    for k in range(1, len(mtp.layers) + 1 if mtp is not None else 1):
        position = torch.arange(k, tokens.shape[1])[None]
        hidden = mtp.forward_layer(k - 1, hidden[:, :-1], position, None, input_ids=tokens[:, k:])
        logits = mtp._project_to_logits(hidden)
        result[f"mtp_logits_{k}"] = logits
        mtp_losses.append(cross_entropy(logits[:, :-1], tokens[:, k + 1 :]))
    if mtp_losses:
        loss = loss + MTP_WEIGHT * torch.stack(mtp_losses).mean()
    return result, loss


def capture_layers(model) -> list[torch.Tensor]:
    """A list that the next forward fills with the embeddings and each layer's output."""
    outputs: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _m, _a, out: None if outputs else outputs.append(out)
    )
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    return outputs


def run(case: str, seed: int) -> dict[str, np.ndarray]:
    """Everything about one case with the first seed from `seed` whose routing is clear-cut."""
    hf = ALL_CASES[case].hf
    for attempt in range(seed, seed + MAX_SEEDS):
        rng = np.random.Generator(np.random.PCG64(attempt))
        model, mtp = build(hf)
        tensors = named_tensors(model, mtp)
        fill(tensors, rng)
        tokens = torch.from_numpy(rng.integers(0, hf["vocab_size"], (BATCH, LENGTH)))
        record, layer_outputs = Recorder(model, mtp), capture_layers(model)
        result, loss = forward(model, mtp, tokens)
        margin, bias_flips = smallest_margin(record.routers)
        if margin >= MIN_MARGIN:
            break
    else:
        raise SystemExit(
            f"{case}: no seed in {seed}..{attempt} keeps top-K gaps above {MIN_MARGIN}"
        )
    loss.backward()

    result["hidden"] = torch.stack(layer_outputs)
    # The state handed to the MTP modules is the normed one; the last entry of `hidden` is not.
    assert torch.equal(model.model.norm(layer_outputs[-1]), result["final_hidden"])
    result["attn_in"], result["attn_out"] = record.attn
    if record.moe is not None:
        result["moe_in"], result["moe_out"] = record.moe
        _, _, weight, index = record.routers[0]
        result["router_index"] = index.reshape(BATCH, LENGTH, -1).to(torch.int32)
        result["router_weight"] = weight.reshape(BATCH, LENGTH, -1)
    result["loss"] = loss
    arrays = {name: value.detach().numpy() for name, value in result.items()}
    for name, tensor in tensors.items():
        arrays[f"w:{name}"] = tensor.detach().numpy().astype(np.float16)
        if tensor.requires_grad:
            assert tensor.grad is not None, f"{name} takes no part in the loss"
            arrays[f"g:{name}"] = tensor.grad.numpy()
    meta = {"case": case, "seed": attempt, "config": hf, "margin": margin, "bias_flips": bias_flips,
            "mtp_weight": MTP_WEIGHT, "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip
    return arrays | {"tokens": tokens.numpy().astype(np.int32), "meta": np.array(json.dumps(meta))}


def load(checkpoint: str, tokens_file: str) -> dict[str, np.ndarray]:
    """Logits of a checkpoint folder (config.json and safetensors) on saved int tokens [B, T]."""
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise SystemExit(f"{checkpoint}: {problem}: {sorted(info[problem])}")
    tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
    with torch.no_grad():
        return {"logits": model.eval()(tokens, use_cache=False).logits.numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="seeded weights of a named case")
    runs.add_argument("--case", required=True, choices=sorted(ALL_CASES))
    runs.add_argument("--seed", type=int, help="default: the seed of the golden file")
    loads = commands.add_parser("load", help="a checkpoint folder")
    loads.add_argument("--checkpoint", required=True)
    loads.add_argument("--tokens", required=True, help=".npy of int tokens [B, T]")
    for command in (runs, loads):
        command.add_argument("--out", required=True, help=".npz to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one summation order: the same file on every machine of a kind
    transformers.utils.logging.set_verbosity_error()
    if args.command == "run":
        seed = ALL_CASES[args.case].seed if args.seed is None else args.seed
        arrays = run(args.case, seed)
    else:
        arrays = load(args.checkpoint, args.tokens)
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
