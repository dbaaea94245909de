"""
Search for the script that explains how saved scores differ from the teacher's: decisions are changed one, two, three at a time.

From each round the most promising scripts are carried into the next one. As a change alone may bring nothing nearer, all pairs of a
normalisation and an order of bands are tried too, and all pairs with one of the commonest faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from kdpipe.configs.errors import KdpipeError
from kdpipe.pipeline.progress import Advance, Progress
from kdpipe.pipeline.verify.script_runs import Attempt, Difference, Runner, Target
from kdpipe.pipeline.verify.scripts import IMAGENET, Given, Script, alternatives, scalings_of, sizes_like

ROUNDS, CARRIED = 3, (2, 1)  # scripts carried into a round: as they are, and with one more decision about their output
LARGEST_OF_THREE_PX = (
    2**18
)  # of larger tiles at most two decisions are changed at once: a third round predicts them a hundred times more
MOST_IN_VAIN = 2  # tiles that are searched in vain before the others are given up
EXACT = 0.1  # of the tolerance: what is nearer ends the search
FALL = 1 / 3  # a script explains a difference only if it leaves at most this part of it
SURELY = (
    1 / 500
)  # and surely if it leaves no more: a script that feeds large numbers magnifies the rounding of a network
NEAR = 1.5  # times the smallest mean difference: of scripts that near, the one with the fewest changes is named


@dataclass(frozen=True)
class Explanation:
    """A script, what becomes of the differences of the tiles that it explains, and whether they become as small as allowed."""

    script: Script
    given: Given
    after: dict[str, Difference]
    complete: bool


def explain(
    runner: Runner,
    failing: Sequence[tuple[Target, Difference]],
    allowed: Callable[[Target], float],
    progress: Progress,
    rounds: int = ROUNDS,
) -> list[Explanation]:
    """
    Scripts that explain the differences of `failing` tiles, each tile at most once; those that do not explain them fully come last.

    `allowed` returns the tolerance of a tile's largest difference.
    """
    left = sorted(failing, key=lambda pair: pair[0].pixels)
    found: list[Explanation] = []
    partial: list[Explanation] = []
    in_vain = 0
    while left and in_vain < MOST_IN_VAIN:
        target, before = left[0]
        given = runner.given(target)
        hints = [explanation.script for explanation in found]
        # After a search in vain, others only look for what one change explains.
        best = _search(runner, target, before, given, allowed(target), hints, progress, 1 if in_vain else rounds)
        explanation = None if best is None else _spread(runner, best.script, given, left, allowed)
        if explanation is not None and explanation.complete:
            found.append(explanation)
            left = [pair for pair in left if pair[0].tile.id not in explanation.after]
        else:
            in_vain += 1
            partial += [explanation] if explanation else []
            left = left[1:]
    explained = {tile for explanation in found for tile in explanation.after}
    for explanation in partial[:1]:
        after = {tile: result for tile, result in explanation.after.items() if tile not in explained}
        found += [replace(explanation, after=after)] if after else []
    return found


def _spread(
    runner: Runner,
    script: Script,
    given: Given,
    left: Sequence[tuple[Target, Difference]],
    allowed: Callable[[Target], float],
) -> Explanation:
    """The explanation by a script that was found on the first tile of `left`, with all tiles that it explains or brings much nearer."""
    (target, before), targets = left[0], [target for target, _ in left]
    if script.order is not None and len(left) > 1:
        together = runner.common_order(script, targets)
        if together.order is not None and _explains(runner.difference(together, target), before, allowed(target)):
            script = together
    alike = [replace(script, size=size) for size in sizes_like(script.size, given)]  # on this tile, not on others
    results = [(other, [runner.difference(other, target) for target in targets]) for other in alike]
    script, after = min(results, key=lambda result: sum(found.mean for found in result[1]))
    pairs = list(zip(left, after, strict=True))
    complete = _explains(after[0], before, allowed(target))
    if complete:
        pairs = [pair for pair in pairs if _explains(pair[1], pair[0][1], allowed(pair[0][0]))]
    else:
        pairs = pairs[:1] + [pair for pair in pairs[1:] if pair[1].mean <= FALL * pair[0][1].mean]
    return Explanation(script, given, {tile.tile.id: result for (tile, _), result in pairs}, complete)


def _explains(after: Difference | Attempt, before: Difference, allowed: float) -> bool:
    return after.largest <= max(min(allowed, FALL * before.largest), SURELY * before.largest)


def _search(
    runner: Runner, target: Target, before: Difference, given: Given, allowed: float, hints: Sequence[Script], progress: Progress,
    rounds: int,
) -> Attempt | None:  # fmt: skip
    """
    The simplest script that explains the tile, else the nearest one; None if none is much nearer than kdpipe's.

    What is one decision away from one of `hints`, which explain other tiles, is tried before other pairs.
    """
    tried: dict[Script, list[Attempt]] = {}
    rounds = min(rounds, 2) if target.pixels > LARGEST_OF_THREE_PX else rounds

    def run(script: Script) -> bool:
        """Try a script; whether it explains the tile so well that the search may end."""
        if script in tried:
            return False
        try:
            tried[script] = runner.attempts(script, target)
        except (KdpipeError, RuntimeError, ValueError):  # it does not run here, for lack of memory, say: no explanation
            tried[script] = []
        near = [a for a in tried[script] if _explains(a, before, EXACT * allowed)]
        nearest = sorted(near, key=lambda a: len(a.script.changes(runner.base)))[:2]
        return any(_explains(runner.difference(a.script, target), before, EXACT * allowed) for a in nearest)

    title = f"what explains {target.tile.id}"
    for number in range(rounds + 1):
        scripts = list(_round(runner, given, tried, number))
        if number == 1:
            scripts += [other for hint in hints for other in alternatives(hint, runner.base, given)]
        with progress.bar(title, len(scripts), "scripts") as advance:
            ended = _any(run, scripts, advance)
        attempts = [a for found in tried.values() for a in found]
        best = _simplest(runner, target, before, allowed, attempts)
        # Two changes after the network's output may explain what one before it does as well: that is tried first.
        if best is not None and (ended or len(best.script.changes(runner.base)) <= number or number == rounds):
            return best
    attempts = [a for found in tried.values() for a in found if a.script != runner.base]
    least = min((a.mean for a in attempts), default=1.0)
    if not attempts or least > FALL * before.mean:
        return None
    near = [a for a in attempts if a.mean <= NEAR * least]
    return min(near, key=lambda a: (len(a.script.changes(runner.base)), a.mean))


def _any(run: Callable[[Script], bool], scripts: Sequence[Script], advance: Advance) -> bool:
    for script in scripts:
        ended = run(script)
        advance()
        if ended:
            return True
    return False


def _round(runner: Runner, given: Given, tried: dict[Script, list[Attempt]], number: int) -> Iterator[Script]:
    """The scripts of a round: with `number` changes before the network's output."""
    base = runner.base
    if number == 0:
        yield base
        return
    if number == 1:
        yield from alternatives(base, base, given)
        return
    scalings = scalings_of(len(base.bands))
    commonest = {
        "bands": base.bands[::-1],
        "scaling": IMAGENET if IMAGENET in scalings else scalings[0],
        "mode": "train",
    }
    if number == 2:
        yield from (replace(base, **dict(pair)) for pair in combinations(commonest.items(), 2))  # type: ignore[arg-type]
        orders = dict.fromkeys(script.bands for script in tried if script.bands != base.bands)
        for scaling in scalings:
            if scaling != base.scaling:
                yield from (replace(base, scaling=scaling, bands=bands) for bands in orders)
    before = [(script, found) for script, found in tried.items() if len(script.changes(base)) == number - 1]
    ranked = [(script, found) for script, found in before if found]
    as_they_are = sorted(ranked, key=lambda pair: min(a.mean for a in pair[1] if a.script.order is None))
    at_best = sorted(ranked, key=lambda pair: min(a.mean for a in pair[1]))
    carried = dict.fromkeys(script for script, _ in [*as_they_are[: CARRIED[0]], *at_best[: CARRIED[1]]])
    if number == 2:
        carried |= dict.fromkeys(replace(base, **{name: value}) for name, value in commonest.items())  # type: ignore[arg-type]
        carried.pop(base, None)
    for script in carried:
        for other in alternatives(script, base, given):
            # Many views cost many predictions.
            if other.views == script.views or (other.views[0] != "d4" and other.views[1] == "logits"):
                yield other


def _simplest(
    runner: Runner, target: Target, before: Difference, allowed: float, attempts: Sequence[Attempt]
) -> Attempt | None:
    """The script with the fewest changes that explains the tile over all its pixels; of several, the nearest."""
    candidates = [a for a in attempts if _explains(a, before, allowed)]
    for attempt in sorted(candidates, key=lambda a: (len(a.script.changes(runner.base)), a.largest)):
        after = runner.difference(attempt.script, target)
        if _explains(after, before, allowed):
            return Attempt(attempt.script, after.largest, after.mean)
    return None
