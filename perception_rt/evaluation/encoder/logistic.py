"""Multinomial logistic regression by L-BFGS.

Legend: N items, D features, C classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import BackendError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Labels = Int64 | Float64

_MAX_STEPS = 1000
_TOLERANCE = 1e-7  # of the largest gradient


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Logistic:
    """A fitted classifier: `weight` float64 (C, D) and `bias` float64 (C)."""

    weight: Float64
    bias: Float64

    def scores(self, features: Float32) -> Float64:
        """Logits, float64 (N, C)."""
        found: Float64 = features @ self.weight.T + self.bias
        return found


def fit_logistic(
    features: Float32, labels: Labels, classes: int, penalty: float, start: Logistic | None = None
) -> Logistic:
    """Minimises mean cross-entropy + penalty / 2 * (sum of squared weights), without the biases.

    In float64, from `start` or from zero: the same input gives the same classifier. scikit-learn's
    `LogisticRegression` minimises the same for C = 1 / (N * penalty).

    Args:
        features: (N, D).
        labels: class of each item, int64 (N,); or shares of the classes, float64 (N, C), whose sum
            is the item's weight.
        classes: number of classes.
        penalty: above 0.
        start: where to begin.

    Raises:
        BackendError: torch is not installed.
    """
    torch = _torch()
    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(labels)
    if start is None:
        start = Logistic(weight=np.zeros((classes, x.shape[1])), bias=np.zeros(classes))
    weight = torch.from_numpy(start.weight.copy()).requires_grad_()
    bias = torch.from_numpy(start.bias.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
        loss = fit + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Logistic(weight=weight.detach().numpy(), bias=bias.detach().numpy())


def _torch() -> Any:
    try:
        import torch  # noqa: TID251 - only to train a probe
    except ModuleNotFoundError:
        raise BackendError("a linear probe needs torch: pip install torch") from None
    return torch
