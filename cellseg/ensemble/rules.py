"""How the members' scores for one cell become its score.

Each rule takes scores [cells, M], of each cell each member's best and 0 where it saw nothing, and
weights [M] > 0. It gives the same bits in any order of members, and one score that all members
share as it is. A sum is no rule of its own: it ranks cells as the mean does.
"""

import numpy as np

from cellseg.inference.merging import Combine, agreement


def root_of_agreement(scores: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the weighted mean of those that saw the cell times the root of their share.

    Half way between "mean", which multiplies by the share itself, and no reward for agreement.
    """
    seen = np.vstack([scores > 0, np.ones((1, len(weight)), dtype=bool)])
    sums = np.sort(np.ascontiguousarray(seen * weight), axis=1).sum(axis=1)
    share = sums[:-1] / sums[-1]
    return (np.array(agreement(scores, weight)) / np.sqrt(np.where(share > 0, share, 1))).tolist()


def best_score(scores: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the highest score times its member's weight over the largest weight."""
    return (scores * (weight / weight.max(initial=0))).max(axis=1, initial=0).tolist()


RULES: dict[str, Combine] = {"mean": agreement, "root": root_of_agreement, "best": best_score}
RULE_TEXTS = {
    "mean": "mean over all members, 0 from those that saw nothing",
    "root": "mean over those that saw the cell, times the root of their share",
    "best": "best score, agreement not rewarded",
}
