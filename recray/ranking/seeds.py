"""Several runs of each method, with other seeds, as one line a method.

Axes: R rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray.ranking.paired import FLIPS, holm, sign_flip_p_values
from recray.ranking.summary import Measures, Ranked, Settings, Summaries, measures, resampled


def over_seeds(
    runs: dict[str, list[Ranked]],
    start: str,
    users: NDArray[Any],
    popularity: NDArray[Any],
    settings: Settings,
    k: int,
) -> Summaries:
    """Return one object a method and one a method other than `start`, minus that, measures as {value, low, high}.

    A row's measure is the mean over the method's runs, so that intervals resample users alone and say nothing of seeds;
    what another seed does is `between_seeds`: the standard deviation, over runs, of NDCG@k (null for a single run).
    Each pair has the p-value of its difference in NDCG@k and that after Holm for all pairs (`recray.ranking.paired`).

    Args:
        runs: of each method, one `Ranked` a seed, all of the same R rows.
        start: the method that others are compared with.
        users: [R], the user of each row.
        popularity: [I], training interactions of every item.
        settings: ks, resamples, confidence and seed.
        k: of the NDCG by which methods are judged.
    """
    of_runs = {method: [measures(run, popularity, settings.ks) for run in each] for method, each in runs.items()}
    own = {method: _mean(each) for method, each in of_runs.items()}
    found, counted = resampled(own, users, settings)
    judged = f"ndcg@{k}"
    models = [
        {
            "model": method,
            **counted,
            "runs": len(each),
            "between_seeds": _deviation([float(run[judged].mean()) for run in each]),
            **found[method].named(settings),
        }
        for method, each in of_runs.items()
    ]
    others = [method for method in runs if method != start]
    if not others:
        return Summaries(models, [])
    apart = np.stack([own[method][judged] - own[start][judged] for method in others], axis=1)
    p_values = sign_flip_p_values(apart, users, seed=settings.seed)
    shared = {"measure": judged, "comparisons": len(others), "flips": FLIPS}
    pairs = [
        {
            "model": method,
            "minus": start,
            **counted,
            **found[method].minus(found[start]).named(settings),
            "test": {**shared, "p": p, "p_holm": corrected},
        }
        for method, p, corrected in zip(others, p_values.tolist(), holm(p_values).tolist(), strict=True)
    ]
    return Summaries(models, pairs)


def _mean(runs: Sequence[Measures]) -> Measures:
    """Return each measure's mean over runs, row by row."""
    return {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
