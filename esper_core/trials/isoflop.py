"""What a static network of the best size would reach at the same FLOPs, from runs of several sizes and budgets.

Source: isoFLOP profiles: Hoffmann et al. 2022, arXiv:2203.15556, approach 2: at one budget the loss is a parabola in
the logarithm of the parameters. Loss against FLOPs along the frontier is a power law over a range this short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import attrs
import numpy as np


@attrs.frozen
class IsoFlop:
    """The parabola through static networks of one budget.

    Attributes:
        params: of the best size. loss: there (nats).
        residual: root mean square distance of the runs from the curve (nats); 0 where there is no curve.
        fitted: whether there is one: at least four sizes with a minimum among them. Otherwise the best run stands.
    """

    params: float
    loss: float
    residual: float
    fitted: bool


def fit_isoflop(params: Sequence[float], losses: Sequence[float], near: float = 0.08) -> IsoFlop:
    """The best size and its loss.

    Args:
        params, losses: of static networks at one budget.
        near: only sizes whose loss is at most this share above the best take part; far ones bend the parabola.

    Raises:
        ValueError: no network is given.
    """
    points = sorted(zip(params, losses, strict=True))
    if not points:
        raise ValueError("no static network to fit")
    best = min(points, key=lambda point: point[1])
    close = [point for point in points if point[1] <= (1 + near) * best[1]]
    if len({p for p, _ in close}) < 4:
        return IsoFlop(best[0], best[1], 0.0, False)
    x, y = np.log([p for p, _ in close]), np.asarray([loss for _, loss in close])
    middle = x.mean()
    a, b, c = np.polyfit(x - middle, y, 2)
    place = middle - b / (2 * a) if a > 0 else math.nan
    if not x.min() <= place <= x.max():
        return IsoFlop(best[0], best[1], 0.0, False)
    residual = float(np.sqrt(np.mean((np.polyval((a, b, c), x - middle) - y) ** 2)))
    return IsoFlop(float(np.exp(place)), float(c - b * b / (4 * a)), residual, True)


def flops_to_reach(loss: float, frontier: Mapping[float, float]) -> float:
    """FLOPs at which the best static networks reach `loss`, along the power law through the two nearest budgets.

    Args:
        frontier: budget to the best static loss there, at least two. Beyond its ends the nearest law is extended.

    Returns:
        FLOPs; nan where the losses do not fall with the budget.
    """
    budgets = sorted(frontier)
    pairs = list(itertools.pairwise(budgets))
    if not pairs:
        return math.nan
    low, high = next((pair for pair in pairs if frontier[pair[1]] <= loss), pairs[-1])
    slope = (math.log(frontier[high]) - math.log(frontier[low])) / (math.log(high) - math.log(low))
    if slope >= 0:
        return math.nan
    return float(high * math.exp((math.log(loss) - math.log(frontier[high])) / slope))


def token_worth(small: float, large: float, grown: float, by_tokens: Mapping[float, float]) -> float:
    """k̂: tokens of the final network that one token of the smaller networks was worth.

    Args:
        small, large: tokens that the grown run saw before its last growth and after it. grown: its loss.
        by_tokens: tokens to the loss of the final network trained on them from scratch; at least two numbers of tokens.
    """
    equal = flops_to_reach(grown, by_tokens)
    return (equal - large) / small if small > 0 else math.nan
