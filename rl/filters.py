"""Which answers take part in the loss.

Letters: B answers, group after group; T tokens.
"""

import jax
import jax.numpy as jnp

from rl.advantages import informative_groups
from rl.config import GRPOConfig
from rl.metrics import Mean, Metrics


def filtered_mask(
    mask_BT: jax.Array, advantages_B: jax.Array, truncated_B: jax.Array, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """The mask with rows of zeros for answers that DAPO leaves out, fp32 [B, T], and metrics.

    Args:
      mask_BT: 1 for tokens of answers, their EOS included; 0 elsewhere.
      advantages_B: of `group_advantages`. An answer that is left out has counted in its group.
      truncated_B: bool, answers cut at the length limit, without an EOS.
      config: `dynamic_sampling` leaves out groups without any difference (DAPO, eq. 11);
        `overlong_filter` leaves out truncated answers (DAPO, section 3.4).

    An answer left out counts in no mean either, so take the denominator from the mask returned.
    Metrics: `truncated_answers` and `filtered_answers`, shares of all answers.
    """
    if truncated_B.shape != mask_BT.shape[:1] or advantages_B.shape != mask_BT.shape[:1]:
        raise ValueError(
            f"the mask has shape {list(mask_BT.shape)}, truncated {list(truncated_B.shape)}, "
            f"advantages {list(advantages_B.shape)}; give [B, T], [B] and [B]"
        )
    kept_B = jnp.ones(mask_BT.shape[0], bool)
    if config.dynamic_sampling:
        kept_B &= jnp.repeat(informative_groups(advantages_B, config.group_size), config.group_size)
    if config.overlong_filter:
        kept_B &= ~truncated_B
    count = jnp.float32(mask_BT.shape[0])
    metrics: Metrics = {
        "truncated_answers": Mean(truncated_B.sum().astype(jnp.float32), count),
        "filtered_answers": Mean((~kept_B).sum().astype(jnp.float32), count),
    }
    return mask_BT.astype(jnp.float32) * kept_B[:, None], metrics
