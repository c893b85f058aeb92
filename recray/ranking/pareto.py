"""Which of several points are worth having when two things are wanted at once.

Axes: P points, G goals, each the higher the better.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray


def front(values: Float[ndarray, "P G"]) -> Bool[ndarray, " P"]:
    """Return whether each point is on the Pareto front: no other is as good in every goal and better in one.

    Points that are alike are all on it, or none. A point with a NaN is not, and keeps no other off.

    Args:
        values: of each point in each goal, the higher the better; turn the sign of what is to be low.
    """
    known = ~np.isnan(values).any(axis=1)
    as_good = (values[:, None] >= values[None]).all(axis=2)  # [by, of]: comparisons with NaN are false
    better = (values[:, None] > values[None]).any(axis=2)
    beaten: Bool[ndarray, " P"] = (as_good & better & known[:, None]).any(axis=0)
    on: Bool[ndarray, " P"] = known & ~beaten
    return on
