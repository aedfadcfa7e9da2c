"""A KL coefficient that steers towards a target KL."""

from __future__ import annotations

from typing import Any

from fasttax._base import checks

KEYS = ("beta", "target", "horizon", "clip")


class AdaptiveKL:
    """The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2).

        beta <- beta * (1 + clip(kl / target - 1, -clip, clip) * samples / horizon)

    `FullKL(..., beta=AdaptiveKL(...))` updates it at every optimizer step. In a loop of your own:

        loss = task_loss + controller.beta * kl
        controller.update(kl.item())

    Args:
        target: the KL per token to hold, in nats, > 0.
        beta: the coefficient to begin with, > 0.
        horizon: updates after which a KL that is off by `clip` or more has moved beta by a factor
            of about exp(clip).
        clip: bound on the relative error of one update, in (0, 1).

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> control = fasttax.integrations.AdaptiveKL(target=0.05, beta=0.1)
        >>> control.update(0.08) > 0.1  # the KL is above its target
        True
    """

    def __init__(
        self, target: float, beta: float = 0.1, horizon: float = 50.0, clip: float = 0.2
    ) -> None:
        op = "AdaptiveKL"
        self.target = checks.number(op, "target", target, low=0, open_low=True)
        self.beta = checks.number(op, "beta", beta, low=0, open_low=True)
        self.horizon = checks.number(op, "horizon", horizon, low=1)
        self.clip = checks.number(op, "clip", clip, low=0, high=0.99, open_low=True)

    def __repr__(self) -> str:
        return (
            f"AdaptiveKL(target={self.target:g}, beta={self.beta:g}, horizon={self.horizon:g}, "
            f"clip={self.clip:g})"
        )

    def update(self, kl: float, samples: float = 1.0) -> float:
        """Takes the KL per token that was measured, and returns the new beta.

        Args:
            kl: nats per token, finite, >= 0; the mean over all ranks, so that they agree.
            samples: how much of the horizon this update is: 1, or the number of sequences where
                `horizon` counts sequences.
        """
        kl = checks.number("AdaptiveKL.update", "kl", kl, low=0)
        samples = checks.number("AdaptiveKL.update", "samples", samples, low=0)
        error = min(max(kl / self.target - 1.0, -self.clip), self.clip)
        self.beta *= 1.0 + error * min(1.0, samples / self.horizon)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """The coefficient and the constructor's numbers, for a checkpoint."""
        return {key: getattr(self, key) for key in KEYS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over beta; target, horizon and clip stay as they were given to this controller."""
        if not isinstance(state, dict) or set(state) != set(KEYS):
            raise checks.fail(
                "AdaptiveKL.load_state_dict", "state", f"a dict with {', '.join(KEYS)}", state
            )
        self.beta = checks.number(
            "AdaptiveKL.load_state_dict", "beta", state["beta"], low=0, open_low=True
        )
