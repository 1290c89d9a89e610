"""What a curve over the label budget comes to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sonofed_simulations.statistics.bootstrap import Floats


def budget_area(budgets: ArrayLike, values: ArrayLike) -> Floats:
    """Mean height of a curve over the budget, by trapezoids.

    Parameters
    ----------
    budgets : array (B,)
        Ascending, at least two.
    values : array (..., B)
        A metric at each budget.

    Returns
    -------
    ndarray of float64 (...)
        The area over the budgets' range, divided by that range.
    """
    x = np.asarray(budgets, np.float64)
    return np.asarray(np.trapezoid(np.asarray(values, np.float64), x, axis=-1) / (x[-1] - x[0]))


def needed_budget(budgets: ArrayLike, values: ArrayLike, target: ArrayLike) -> Floats:
    """Smallest budget at which a curve, linear between its points, first reaches a target.

    Parameters
    ----------
    budgets : array (B,)
        Ascending.
    values : array (R, B)
        Curves.
    target : array (R,)
        What each is to reach.

    Returns
    -------
    ndarray of float64 (R,)
        NaN where a curve never reaches it.
    """
    x, y = np.asarray(budgets, np.float64), np.atleast_2d(np.asarray(values, np.float64))
    goal = np.asarray(target, np.float64).reshape(-1, 1)
    reached = y >= goal
    first = reached.argmax(axis=1)
    rows = np.arange(len(y))
    before = np.maximum(first - 1, 0)
    low, high = y[rows, before], y[rows, first]
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(first > 0, (goal[:, 0] - low) / rise, 0.0)
    found = x[before] + share * (x[first] - x[before])
    return np.where(reached.any(axis=1), found, np.nan)
