"""Log-probabilities from all logits at once, in double precision: what the streamed head is held against."""

import jax
import numpy as np
from scipy.special import logsumexp

from jaxkd.smollm2.model import Model, make_model

_logits = jax.jit(Model.logits, static_argnums=0)


def log_prob(config, params, x) -> np.ndarray:
    """Of each completion, its end included, float64[n] (nats)."""
    tokens, mask, completion_mask = (np.asarray(x[name]) for name in ("tokens", "mask", "completion_mask"))
    logits = np.float64(_logits(make_model(config), params, tokens, mask))[:, :-1]
    log_probs = logits - logsumexp(logits, axis=-1, keepdims=True)
    picked = np.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.where(completion_mask[:, 1:], picked, 0).sum(axis=1)
