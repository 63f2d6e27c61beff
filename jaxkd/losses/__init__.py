"""Losses as pure functions of log-probabilities, one value per example: reducing them is the caller's choice."""

from jaxkd.losses import divergence, policy_gradient, preference

__all__ = ["divergence", "policy_gradient", "preference"]
