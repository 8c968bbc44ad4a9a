"""Arms made equally costly: the integer option of an arm at which it costs what the baseline does."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from attnlab import nn
from attnlab.errors import UserError

_LARGEST = 2**20


@dataclasses.dataclass(frozen=True)
class Match:
    """How an arm was matched. cost: what was matched by. off: the arm's cost / the baseline's - 1.

    knob, value: the option that was set, and to what; None where nothing was.
    """

    cost: str
    off: float
    knob: str | None = None
    value: int | None = None


def cost_of(options: Mapping[str, Any], cost: str) -> float:
    """parameters, flops or state_size of the model and the task of an Experiment's options; nothing is computed."""
    if cost == "parameters":
        return nn.count_parameters(options["model"])
    costs = options["task"].costs(options["model"])
    if costs[cost] is None:
        refusal = options["model"].decoding_refusal if costs["length"] is not None else ""
        reason = f", as the model does not decode: {refusal}" if refusal else ""
        raise UserError(f"match: got {cost!r}; {type(options['task']).__name__} has none{reason}")
    return costs[cost]


def closest(cost_at: Callable[[int], float], target: float, *, what: str) -> int:
    """The integer at which a growing cost comes closest to the target.

    It looks among the multiples of the least power of two that the model takes: heads may have to divide it.

    Args:
      cost_at: raises UserError for an integer that the model refuses.
      what: "WINDOW of local for as many parameters as softmax", for errors.

    Raises:
      UserError: no integer is taken, the cost does not grow with it, or it does not reach the target.
    """
    refusals: dict[int, UserError] = {}
    costs: dict[int, float] = {}

    def tried(value: int) -> float:
        """The cost; what is refused counts as too much."""
        if value not in costs:
            try:
                costs[value] = cost_at(value)
            except UserError as error:
                refusals[value], costs[value] = error, math.inf
        return costs[value]

    step = next((step for step in (1, 2, 4, 8, 16, 32, 64) if math.isfinite(tried(step))), None)
    if step is None and len({str(refusal) for refusal in refusals.values()}) == 1:
        raise UserError(f"match: {what}: {refusals[1]}")  # not for its value: such a name is not there
    if step is None:
        raise UserError(f"match: {what}: no power of two up to 64 is taken; 1 gives: {refusals[1]}")
    most = step
    while tried(most) < target and most < _LARGEST:
        most *= 2
    tried(2 * step)  # with another, a knob that does nothing differs from one that cannot go low enough
    above = step * (1 + bisect.bisect_left(range(step, most + 1, step), target, key=tried))

    taken = sorted((value, cost) for value, cost in costs.items() if math.isfinite(cost))
    falls = any(later < earlier for (_, earlier), (_, later) in itertools.pairwise(taken))
    if falls or (len(taken) > 1 and taken[0][1] == taken[-1][1]):
        shown = ", ".join(f"{cost:,.0f} at {value}" for value, cost in taken[:4])
        raise UserError(f"match: {what}: the cost does not grow with it ({shown}); give another knob")
    (least, least_cost), (largest, largest_cost) = taken[0], taken[-1]
    if least_cost > target:
        raise UserError(f"match: {what}: need {target:,.0f}, and {least} has {least_cost:,.0f} already")
    if largest_cost < target:
        refused = f"; {above} gives: {refusals[above]}" if above in refusals else ""
        raise UserError(f"match: {what}: need {target:,.0f}, and {largest} has {largest_cost:,.0f} at most{refused}")
    return min((above - step, above), key=lambda value: abs(costs.get(value, math.inf) - target))
