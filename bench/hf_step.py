"""Hugging Face's DeepSeek-V3 train step: the other side of `bench/step.py`, run by it.

    hf_step.py '{"vocab_size": 4096, ..., "batch": 8, "length": 256, "compile": false}'

Says what it is on its first line. Then, for every number n it reads, runs n steps (forward,
backward, clipping, AdamW; fp32) and answers {"wall": .., "processor": ..}, seconds per step.
Needs torch and transformers only.
"""

import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Serve steps until the input ends."""
    options = json.loads(sys.argv[1])
    batch, length = options.pop("batch"), options.pop("length")
    compiled = options.pop("compile")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    run = torch.compile(model) if compiled else model
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = torch.randint(0, config.vocab_size, (batch, length + 1))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> float:
        loss = run(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    size = sum(p.numel() for p in model.parameters())
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {size:,} parameters, "
        f"attention {model.config._attn_implementation}, "
        f"experts {model.config._experts_implementation}, {torch.get_num_threads()} threads"
        f"{', torch.compile' * compiled}",
        flush=True,
    )
    for line in sys.stdin:
        count = int(line)
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            step()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(json.dumps({"wall": wall / count, "processor": processor / count}), flush=True)


if __name__ == "__main__":
    main()
