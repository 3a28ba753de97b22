"""Tiny Janus folders by transformers for tests/test_janus_parity.py, and what it makes of ours.

    .venv-reference/bin/python tests/reference/janus.py write cases.json ROOT
    .venv-reference/bin/python tests/reference/janus.py load folders.json
    .venv-reference/bin/python tests/reference/janus.py count cases.json

`write` makes ROOT/<case>/ (config.json, generation_config.json, safetensors) of random weights, and
ROOT/<case>.npz with its fp32 results:

  ids, pixels, logits      int32 [B, T], [images, 3, H, W], [B, T, V]: text that reads images
  features                 [images, P, D]: of the encoder, after the last norm
  seen                     [images, P, D]: the same after the adaptor
  paintings, codes, loss   [images, 3, H, W], int32 [images, P'], []: `encode` of the tokenizer
  decoded                  [images, 3, H, W]: `decode` of the codes that were drawn
  prompts, drawn           int32 [B, T], int32 [B, P']: greedy drawing with guidance
  steps, margin            [B, P', S], []: guided logits of the codes; smallest gap of the best
  embedded                 [S, D]: input vectors of all codes

`load` reads folders strictly and writes FOLDER.npz with logits of the ids and pixels given. `count`
prints {case: parameters} of models that are never allocated.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import JanusConfig, JanusForConditionalGeneration

MIN_MARGIN = 2e-3
"""Far above what the order of fp32 sums moves."""
MAX_SEEDS = 60


def build(case: dict) -> JanusForConditionalGeneration:
    config = JanusConfig(**case["hf"])
    config._attn_implementation = "eager"
    return JanusForConditionalGeneration(config)


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights of a size at which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in model.named_parameters():
            noise = torch.randn(w.shape, generator=generator)
            if w.ndim == 1:
                gain = "norm" in name and name.endswith("weight")
                w.copy_((1.0 if gain else 0.0) + 0.1 * noise)
            elif "embed" in name or "position" in name:
                w.copy_(noise)
            else:
                w.copy_(noise * 1.5 / w[0].numel() ** 0.5)


def prompts_of(case: dict, generator: torch.Generator) -> torch.Tensor:
    """Prompts that end with the begin-of-image token; pad is 0, bos 1, boi 2."""
    high = case["hf"]["text_config"]["vocab_size"]
    ids = torch.randint(4, high, (2, case["prompt"]), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


@torch.no_grad()
def reading(model: JanusForConditionalGeneration, case: dict, generator: torch.Generator) -> dict:
    """Rows of text with `images` images each, in as many places."""
    config = model.config
    patches, size = model.model.vision_model.embeddings.num_patches, config.vision_config.image_size
    rows, images = 2, case["images"]
    ids = torch.randint(
        4, config.text_config.vocab_size, (rows, case["length"]), generator=generator
    )
    ids[ids == config.image_token_id] = 5
    pieces = []
    for number in range(images):
        cut = (number + 1) * case["length"] // (images + 1)
        start = number * case["length"] // (images + 1)
        pieces += [ids[:, start:cut], torch.full((rows, patches), config.image_token_id)]
    ids = torch.cat([*pieces, ids[:, images * case["length"] // (images + 1) :]], 1)
    pixels = torch.rand((rows * images, 3, size, size), generator=generator) * 2 - 1
    seen = model.model.get_image_features(pixels, return_dict=True)
    logits = model(input_ids=ids, pixel_values=pixels).logits
    return {
        "ids": ids, "pixels": pixels, "logits": logits,
        "features": seen.last_hidden_state, "seen": seen.pooler_output,
    }  # fmt: skip


@torch.no_grad()
def drawing(model: JanusForConditionalGeneration, case: dict, prompts: torch.Tensor) -> dict:
    """Greedy drawing by `generate`, and the guided logits of every step, by one forward pass."""
    settings = model.generation_config
    settings.update(
        do_sample=False, guidance_scale=case["guidance"], pad_token_id=0, bos_token_id=1,
        eos_token_id=3,
    )  # fmt: skip
    settings.generation_kwargs = {"boi_token_id": 2}
    mask = torch.ones_like(prompts)
    drawn = model.generate(input_ids=prompts, attention_mask=mask, generation_mode="image")
    blank = torch.where((prompts == 1) | (prompts == 2), prompts, 0)
    text = model.get_input_embeddings()(torch.cat([prompts, blank]))
    codes = model.prepare_embeddings_for_image_generation(drawn.repeat(2, 1)[:, :-1])
    hidden = model.model.language_model(inputs_embeds=torch.cat([text, codes], 1))
    logits = model.model.generation_head(hidden.last_hidden_state[:, prompts.shape[1] - 1 :])
    with_text, without = logits.chunk(2)
    steps = without + case["guidance"] * (with_text - without)
    best = steps.topk(2, -1).values
    assert (steps.argmax(-1) == drawn).all()
    decoded = model.decode_image_tokens(drawn).permute(0, 3, 1, 2)
    everything = torch.arange(model.config.vq_config.num_embeddings)
    return {
        "prompts": prompts, "drawn": drawn, "steps": steps, "decoded": decoded,
        "margin": (best[..., 0] - best[..., 1]).min(),
        "embedded": model.prepare_embeddings_for_image_generation(everything),
    }  # fmt: skip


@torch.no_grad()
def painting(model: JanusForConditionalGeneration, generator: torch.Generator) -> dict:
    """Pixels as codes; the size that gives the grid of the encoder's patches."""
    config = model.config
    scale = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    size = scale * config.vq_config.num_patches
    pixels = torch.rand((2, 3, size, size), generator=generator) * 2 - 1
    found = model.model.vqmodel.encode(pixels, return_dict=True)
    return {
        "paintings": pixels, "codes": found.image_tokens.reshape(2, -1),
        "loss": found.embedding_loss,
    }  # fmt: skip


def write(cases: dict, root: pathlib.Path) -> None:
    for name, case in cases.items():
        model = build(case).eval()
        for seed in range(case["seed"], case["seed"] + MAX_SEEDS):
            fill(model, seed)
            generator = torch.Generator().manual_seed(seed)
            drawn = drawing(model, case, prompts_of(case, generator))
            if drawn["margin"] > MIN_MARGIN and len(drawn["drawn"].unique()) > 3:
                break
        else:
            raise SystemExit(f"{name}: no seed without near ties")
        found = drawn | reading(model, case, generator) | painting(model, generator)
        model.save_pretrained(root / name, max_shard_size=case.get("shard") or "1GB")
        arrays = {key: value.numpy() for key, value in found.items()}
        for key, value in arrays.items():
            arrays[key] = value.astype(np.int32) if value.dtype == np.int64 else value
        np.savez(root / f"{name}.npz", **arrays)


@torch.no_grad()
def load(folders: dict) -> None:
    for folder, results in folders.items():
        model, info = JanusForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[problem], (folder, problem, info[problem])
        with np.load(results) as given:
            ids, pixels = (torch.from_numpy(given[key]).clone() for key in ("ids", "pixels"))
        logits = model.eval()(input_ids=ids.long(), pixel_values=pixels).logits
        np.savez(f"{folder}.npz", logits=logits.numpy())


def count(cases: dict) -> None:
    found = {}
    for name, case in cases.items():
        with torch.device("meta"):
            found[name] = sum(w.numel() for w in build(case).parameters())
    print(json.dumps(found))


def main() -> None:
    torch.manual_seed(0)
    given = json.loads(pathlib.Path(sys.argv[2]).read_text())
    if sys.argv[1] == "write":
        write(given, pathlib.Path(sys.argv[3]))
    else:
        {"load": load, "count": count}[sys.argv[1]](given)


if __name__ == "__main__":
    main()
