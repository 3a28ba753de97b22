"""Arrays of fixed shape from the answers of a rollout.

Row a of a batch is prompt and answer of answer a, then padding. Position t of every array but
`tokens` and `routes` belongs to token t + 1, which is predicted there; `routes` to token t, which
is read there.

Letters: A answers, group after group; T positions; K tokens that top-k keeps; R experts of a token
over all layers; n tokens of a prompt and its answer.
"""

from collections.abc import Sequence

import numpy as np

from rl.rollout import Rollout

Batch = dict[str, np.ndarray]


def make_batch(prompts: Sequence[np.ndarray], rollout: Rollout, seq_len: int) -> Batch:
    """Padded arrays of a rollout's answers.

    Args:
      prompts: token ids of each prompt, int32 [n]; all have the same number of answers.
      rollout: the answers, prompt after prompt.
      seq_len: positions, T; rows hold T + 1 tokens.
    Returns:
      tokens int32 [A, T+1], 0 beyond the end; lengths int32 [A], tokens of prompt and answer; mask
      fp32 [A, T], 1 where a token of the answer is predicted, its EOS included; sampler_logp fp32
      [A, T], 0 elsewhere; with tokens kept by top-k, kept int32 [A, T, K], -1 beyond them, and
      elsewhere the token itself; and with recorded routes int16 [A, T, R], -1 from the last token
      on, which the sampler never read.

    Raises ValueError if prompt and answer do not fit into T + 1 tokens.
    """
    answers = len(rollout.tokens)
    assert answers % len(prompts) == 0, (answers, len(prompts))
    group = answers // len(prompts)
    batch: Batch = {
        "tokens": np.zeros((answers, seq_len + 1), np.int32),
        "lengths": np.zeros(answers, np.int32),
        "mask": np.zeros((answers, seq_len), np.float32),
        "sampler_logp": np.zeros((answers, seq_len), np.float32),
    }
    if rollout.routes is not None:
        experts = rollout.routes[0].shape[1]
        batch["routes"] = np.full((answers, seq_len, experts), -1, np.int16)
    for a, answer in enumerate(rollout.tokens):
        prompt = prompts[a // group]
        first, n = len(prompt), len(prompt) + len(answer)
        if n > seq_len + 1:
            raise ValueError(
                f"a prompt of {first} tokens with an answer of {len(answer)} has {n}; "
                f"train.seq_len={seq_len} holds {seq_len + 1}. Raise it, or lower "
                "rl.max_new_tokens"
            )
        batch["tokens"][a, :first] = prompt
        batch["tokens"][a, first:n] = answer
        batch["lengths"][a] = n
        batch["mask"][a, first - 1 : n - 1] = 1.0
        batch["sampler_logp"][a, first - 1 : n - 1] = rollout.logps[a]
        if rollout.routes is not None:
            batch["routes"][a, : n - 1] = rollout.routes[a]
    if rollout.kept is not None:
        batch["kept"] = np.full((answers, seq_len, rollout.kept[0].shape[1]), -1, np.int32)
        batch["kept"][:, :, 0] = batch["tokens"][:, 1:]
        batch["kept"][batch["mask"] > 0] = np.concatenate(rollout.kept)
    return batch


def cut(batch: Batch, updates: int, micro_batch_size: int) -> list[Batch]:
    """The batch in equal parts of consecutive rows, each [micro batches, rows, ...]."""

    def part(rows: np.ndarray, i: int) -> np.ndarray:
        return np.split(rows, updates)[i].reshape(-1, micro_batch_size, *rows.shape[1:])

    return [{name: part(rows, i) for name, rows in batch.items()} for i in range(updates)]
