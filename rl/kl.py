"""Estimators of KL(policy, reference) from the log-probabilities of the tokens drawn.

Letters: B answers, T tokens.
"""

import jax
import jax.numpy as jnp

from rl.config import K1_REASON


def k3(logp_BT: jax.Array, other_logp_BT: jax.Array) -> jax.Array:
    """other/policy - log(other/policy) - 1, nats, never negative (DeepSeekMath, eq. 4).

    Its mean under the policy is KL(policy, other); the gradient of its mean is not that of the KL.
    """
    d_BT = other_logp_BT - logp_BT
    return jnp.expm1(d_BT) - d_BT  # exp(d) - 1 loses all digits of a small d


def kl_estimate(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, log_ratio_BT: jax.Array, estimator: str
) -> jax.Array:
    """KL to the reference per token, nats, fp32 [B, T], as a term of the loss.

    Args:
      logp_BT, ref_logp_BT: log-probabilities of the drawn tokens, policy and reference.
      log_ratio_BT: log(policy / policy that drew them), per token, for v3_2.
      estimator: k2, half the squared log-ratio, whose gradient under the policy is the KL's; k3
        (R1, eq. 2); v3_2, k3 times policy / old policy, unbiased in value and gradient also for
        answers of the old policy (V3.2, eq. 7).

    Raises ValueError for k1, whose gradient is zero in expectation.
    """
    if estimator == "k1":
        raise ValueError(K1_REASON)
    if estimator == "k2":
        return 0.5 * jnp.square(logp_BT - ref_logp_BT)
    if estimator == "k3":
        return k3(logp_BT, ref_logp_BT)
    assert estimator == "v3_2", estimator
    return jnp.exp(log_ratio_BT) * k3(logp_BT, ref_logp_BT)
