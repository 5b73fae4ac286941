"""Trainings that differ in their seed alone: how sure is their mean?"""

import numpy as np

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # Student's t, 97.5%, for 2 to 8 seeds


def over_seeds(values: list[float]) -> float:
    """Half-width of the 95% interval of a mean over seeds (Student's t; more than 8 seeds: a little too wide); NaN for one.

    >>> round(over_seeds([1.0, 2.0, 3.0]), 3), over_seeds([1.0])
    (2.484, nan)
    """
    if len(values) < 2:
        return float("nan")
    quantile = T_QUANTILES[min(len(values), len(T_QUANTILES) + 1) - 2]
    return float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)
