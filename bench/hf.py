"""Hugging Face's models: the other side of `bench/step.py` and `bench/decode.py`.

    hf.py '{"measure": "step", "batch": 8, "length": 256, "compile": false, "model_type": ...}'
    hf.py '{"measure": "decode", "model_type": "deepseek_v3", "vocab_size": 4096, ...}'

Says what it is on its first line, or that torch.compile is not available and why. Then every line
of numbers that it reads is answered by a line of JSON. Needs torch and transformers only; fp32.

step: for n, runs n steps (forward, backward, clipping, AdamW) and answers {"wall": ..,
"processor": ..}, seconds per step. decode: for `batch context tokens`, decodes random prompts
greedily with the cache and answers {"seconds": ..}: time of 1 + tokens less that of 1.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

CONFIG_CLASSES = {
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
}
Answer = Callable[..., dict[str, float]]


def train_steps(model, batch: int, length: int, compiled: bool) -> Answer:
    """Steps of training on one batch of random tokens, warm."""
    run = torch.compile(model.train()) if compiled else model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = torch.randint(0, model.config.vocab_size, (batch, length + 1))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def answer(count: int) -> dict[str, float]:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            loss = run(input_ids=inputs, labels=targets, shift_labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            loss.item()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        return {"wall": wall / count, "processor": processor / count}

    answer(3)
    return answer


def decode(model) -> Answer:
    """Greedy text after random prompts."""
    model.eval()

    @torch.inference_mode()
    def seconds(ids, count: int) -> float:
        began = time.perf_counter()
        settings = transformers.GenerationConfig(
            do_sample=False, use_cache=True, min_new_tokens=count, max_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert done.shape[1] == ids.shape[1] + count
        return time.perf_counter() - began

    def answer(batch: int, context: int, tokens: int) -> dict[str, float]:
        ids = torch.randint(0, model.config.vocab_size, (batch, context))
        first = seconds(ids, 1)
        return {"seconds": seconds(ids, 1 + tokens) - first}

    return answer


def main() -> None:
    """Serve measurements until the input ends."""
    options = json.loads(sys.argv[1])
    what = options.pop("measure")
    shape = [options.pop(name) for name in ("batch", "length", "compile") if what == "step"]
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = CONFIG_CLASSES[options.pop("model_type")](**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        answer = train_steps(model, *shape) if what == "step" else decode(model)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        print(f"not available: torch.compile: {reason}", flush=True)
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"attention {model.config._attn_implementation}, "
        f"experts {getattr(model.config, '_experts_implementation', None)}, "
        f"{torch.get_num_threads()} threads"
        f"{', torch.compile' * (shape[-1:] == [True])}",
        flush=True,
    )
    for line in sys.stdin:
        print(json.dumps(answer(*map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
