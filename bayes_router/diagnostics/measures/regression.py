"""Linear and logistic regression with a ridge: what confidence is made of."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bayes_router.diagnostics.measures.bootstrap import Array


class Standard(NamedTuple):
    """Columns brought to the mean 0 and deviation 1 that they had on the text of a fit."""

    mean: Array
    scale: Array

    def __call__(self, columns: Array) -> Array:
        """Columns [N, F] -> [N, F]."""
        return np.asarray((columns - self.mean) / self.scale)

    @classmethod
    def of(cls, columns: Array) -> "Standard":
        """Of the text of a fit; a column that never changes is left as it is."""
        scale = columns.std(0)
        return cls(columns.mean(0), np.where(scale > 0, scale, 1.0))


class Linear(NamedTuple):
    """Weight . columns + bias; the ridge shrinks every weight alike, and not the bias.

    So columns are to be given in one unit: numbers standardised, and indicators as 0 and 1, which
    then are the effects of groups with a common prior, those of few rows near none.
    """

    weight: Array  # the bias last

    def __call__(self, columns: Array) -> Array:
        """Columns [N, F] -> [N]."""
        return np.asarray(columns @ self.weight[:-1] + self.weight[-1])

    @classmethod
    def fit(cls, columns: Array, target: Array, ridge: float) -> "Linear":
        """Least squares of numbers [N]."""
        x, penalty = _with_bias(columns, ridge)
        weight = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ target)
        return cls(np.asarray(weight, np.float64))


class Logistic(NamedTuple):
    """p = sigmoid of a `Linear`."""

    linear: Linear

    def __call__(self, columns: Array) -> Array:
        """Columns [N, F] -> [N]."""
        return np.asarray(1 / (1 + np.exp(-self.linear(columns))))

    @classmethod
    def fit(cls, columns: Array, right: npt.NDArray[np.bool_], ridge: float) -> "Logistic":
        """Least penalised cross-entropy of right [N], by Newton's method."""
        x, penalty = _with_bias(columns, ridge)
        weight = np.zeros(x.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-(x @ weight)))
            curvature = (x * np.maximum(p * (1 - p), 1e-6)[:, None]).T @ x + np.diag(penalty)
            step = np.linalg.solve(curvature, x.T @ (right - p) - penalty * weight)
            weight = weight + step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
            if float(np.abs(step).max()) < 1e-8:
                break
        return cls(Linear(weight))


def _with_bias(columns: Array, ridge: float) -> tuple[Array, Array]:
    """Columns with one of ones, and what each weight is penalised by."""
    penalty = np.append(np.full(columns.shape[1], ridge), 1e-9)
    return np.column_stack([columns, np.ones(len(columns))]), penalty
