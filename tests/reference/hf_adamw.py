"""Steps of transformers' DeepSeek-V3 with torch's AdamW, for tests/test_hf_adamw.py.

    .venv-reference/bin/python tests/reference/hf_adamw.py CASE FOLDER TOKENS.npy STEPS RATE

Saves random weights of a case of tests/reference/cases.py as a checkpoint in FOLDER, then trains on
TOKENS (int32 [STEPS, B, T+1]) and writes FOLDER/steps.npz: loss (nats per token) and grad_norm
(before clipping), fp64 [STEPS]. Matrices decay by 0.1, norms do not; the norm is clipped at 1.
"""

import pathlib
import sys

import numpy as np
import torch
from cases import CASES
from hf_reference import build, fill, named_tensors

DECAY, CLIP = 0.1, 1.0


def main() -> None:
    """Write the checkpoint and the steps."""
    case, folder, tokens, steps, rate = sys.argv[1:]
    model, _ = build(CASES[case].hf)
    with torch.no_grad():
        fill(named_tensors(model, None), np.random.default_rng(0))
    model.save_pretrained(folder)
    learned = [p for n, p in model.named_parameters() if not n.endswith("e_score_correction_bias")]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=float(rate), betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for rows in torch.from_numpy(np.load(tokens)).long()[: int(steps)]:
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in learned]))
        for p in learned:
            p.grad *= CLIP / max(norm.item(), CLIP)
        adamw.step()
        losses.append(loss.item())
        norms.append(norm.item())
    path = pathlib.Path(folder) / "steps.npz"
    np.savez(path, loss=np.array(losses), grad_norm=np.array(norms))


if __name__ == "__main__":
    main()
