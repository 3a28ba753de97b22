"""Hugging Face's `generate` with its cache: the other side of `bench/decode.py`, run by it.

    hf_decode.py '{"model_type": "deepseek_v3", "vocab_size": 4096, ...}'

Says what it is on its first line. Then, for every line `batch context tokens` it reads, it decodes
greedily in fp32 and answers {"seconds": ..}: time of generating 1 + tokens less that of generating
1, for random prompts. Needs torch and transformers only.
"""

import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

CONFIG_CLASSES = {
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
}


def main() -> None:
    """Serve measurements until the input ends."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = CONFIG_CLASSES[options.pop("model_type")](**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

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

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"attention {model.config._attn_implementation}, "
        f"experts {model.config._experts_implementation}, {torch.get_num_threads()} threads",
        flush=True,
    )
    for line in sys.stdin:
        batch, context, tokens = map(int, line.split())
        ids = torch.randint(0, config.vocab_size, (batch, context))
        first = seconds(ids, 1)
        print(json.dumps({"seconds": seconds(ids, 1 + tokens) - first}), flush=True)


if __name__ == "__main__":
    main()
