"""Speculative sampling: keep a drafted token so that the result is distributed as without a draft.

A token d drawn from the draft's q is kept with probability min(1, p[d] / q[d]); otherwise a token
is drawn from the positive part of p - q. What comes out is distributed as p, whatever q is
(Leviathan et al. 2023, theorem of appendix A.1). Letters: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from generation.config import Sampling
from generation.sampling import draw


def accept_or_redraw(
    accept_keys_B: jax.Array,
    redraw_keys_B: jax.Array,
    draft_B: jax.Array,
    q_BV: jax.Array | None,
    p_BV: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Tokens distributed as `p_BV`, int32 [B], and whether each is the draft drawn from `q_BV`.

    Greedy decoding, where both distributions are a single token, needs no `q_BV`.
    """
    if q_BV is None:
        assert sampling.temperature == 0
        token_B = draw(redraw_keys_B, p_BV, sampling)
        return token_B, token_B == draft_B
    at_draft = lambda x_BV: jnp.take_along_axis(x_BV, draft_B[:, None], axis=-1)[:, 0]  # noqa: E731
    u_B = jax.vmap(jax.random.uniform)(accept_keys_B)
    accepted_B = u_B * at_draft(q_BV) < at_draft(p_BV)
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # p = q leaves nothing to draw from; rounding may then still refuse a draft with p < q.
    some_B1 = rest_BV.sum(-1, keepdims=True) > 0
    redrawn_B = draw(redraw_keys_B, jnp.where(some_B1, rest_BV, p_BV), sampling)
    return jnp.where(accepted_B, draft_B, redrawn_B), accepted_B
