"""The jobs of a compute frontier and their order: every arm is tuned on validation, then tested.

Stages, each a function of the rows so far, so that a queue can be cut off anywhere and go on:

1. `tune`: every static size, the host and every grown arm at the first of `rates`, on a seed of its own; then, where
   that left them within `margin` of the best of their kind, at the others. An arm whose best rate is the last one tried
   gets one more on that side, up to `most_rates` for every arm alike.
2. `decay`: the best sizes, the host and every grown arm at their best rate with the other shares of decay. A contender
   that is best at the longest gets one a fifth of the budget longer, up to `most_decays`.
3. `final`: the best sizes, the host and the grown arms, as tuned, on fresh seeds; the test split is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from esper_core.trials.frontier.job import Job

Rows = Sequence[Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Frontier:
    """Static networks of several sizes and grown ones at one budget.

    Attributes:
        name: of the whole. base: configuration of all its runs. budget: FLOPs.
        sizes: of the static networks: values of the host's size options. host: that of the network which is grown.
        options: the host's size options, in that order.
        config: fields of the configuration that set this one apart from others in the same file of rows.
        grown: the arms that grow, as jobs without rate, decay and seed; the first is the heuristic's.
        controls: jobs that show what an operator is worth; they take rate and decay from the first grown arm.
        rates: tried for every arm. most_rates: tried for an arm at most.
        decays: shares of the budget. most_decays: tried for a contender at most.
        margin: share above the best loss up to which an arm is a contender.
        finalists: static sizes that get fresh seeds. seeds: how many. tune_seed: none of them.
    """

    name: str
    base: Mapping[str, Any]
    budget: float
    sizes: Sequence[tuple[int, ...]]
    host: tuple[int, ...]
    options: Sequence[str] = ("layers", "width")
    config: Mapping[str, Any] = attrs.field(factory=dict)
    grown: Sequence[Job]
    controls: Sequence[Job] = ()
    rates: Sequence[float]
    most_rates: int = 4
    decays: Sequence[float] = (0.4, 0.2, 0.6)
    most_decays: int = 3
    margin: float = 0.04
    finalists: int = 2
    seeds: int = 3
    tune_seed: int = 100

    def arms(self) -> list[Job]:
        """Every arm with its first rate and decay: static sizes, the host among them, and grown ones."""
        sizes = dict.fromkeys((*self.sizes, self.host))
        statics = [
            Job(arm=static_name(size), budget=self.budget, size=dict(zip(self.options, size, strict=True)), rate=0.0)
            for size in sizes
        ]
        return [
            attrs.evolve(
                job,
                stage="tune",
                rate=self.rates[0],
                decay=self.decays[0],
                seed=self.tune_seed,
                budget=self.budget,
                config={**self.config, **job.config},
            )
            for job in (*self.grown, *statics)
        ]

    def plan(self, rows: Rows) -> Iterator[Job]:
        """The next jobs, most important first."""
        found = {row["key"]: row for row in rows}
        arms = self.arms()
        if any(arm.key not in found for arm in arms):
            yield from arms
            return
        rated = [job for arm in arms if self._contends(arm, arms, found) for job in self._rate_jobs(arm, found)]
        yield from rated
        if any(job.key not in found for job in rated):
            return
        decayed = [job for arm in self._chosen(arms, found) for job in self._decay_jobs(arm, found)]
        yield from decayed
        if any(job.key not in found for job in decayed):
            return
        yield from self.finals(rows)

    def finals(self, rows: Rows) -> Iterator[Job]:
        """The jobs on fresh seeds, once everything is tuned; seed by seed, so that few seeds are whole too."""
        found = {row["key"]: row for row in rows}
        arms = self.arms()
        tuned = [self.tuned(arm, found) for arm in self._chosen(arms, found)]
        first = self.tuned(arms[0], found)
        controls = [
            attrs.evolve(
                job, rate=first.rate, decay=first.decay, budget=self.budget, config={**self.config, **job.config}
            )
            for job in self.controls
        ]
        for seed in range(self.seeds):
            for job in (*tuned, *controls):
                yield attrs.evolve(job, stage="final", seed=seed, test=True)

    def tuned(self, arm: Job, found: Mapping[str, Mapping[str, Any]]) -> Job:
        """The arm at the rate and decay that gave the least validation loss."""
        tried = [job for job in (*self._rate_jobs(arm, found), *self._decay_jobs(arm, found)) if job.key in found]
        return min(tried, key=lambda job: found[job.key]["loss"])

    def _contends(self, arm: Job, arms: Sequence[Job], found: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether another rate could make it the best of its kind; the host always gets every rate."""
        best = min(found[other.key]["loss"] for other in arms if other.is_static == arm.is_static)
        return self._is_host(arm) or found[arm.key]["loss"] <= (1 + self.margin) * best

    def _rate_jobs(self, arm: Job, found: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """The arm at every rate, and beyond the last on a side where the best is the last."""
        jobs = [attrs.evolve(arm, rate=rate) for rate in self.rates]
        while len(jobs) < self.most_rates and all(job.key in found for job in jobs):
            best = min(jobs, key=lambda job: found[job.key]["loss"]).rate
            known = sorted(job.rate for job in jobs)
            if best not in (known[0], known[-1]):
                break
            jobs.append(attrs.evolve(arm, rate=_round(best / 2 if best == known[0] else best * 2)))
        return jobs

    def _decay_jobs(self, arm: Job, found: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """The arm at its best rate with every other share of decay, and with longer ones while the longest is best."""
        rated = [job for job in self._rate_jobs(arm, found) if job.key in found]
        if not rated:
            return []
        best = min(rated, key=lambda job: found[job.key]["loss"])
        jobs = [best, *(attrs.evolve(best, decay=decay, stage="decay") for decay in self.decays[1:])]
        while len(jobs) < self.most_decays and all(job.key in found for job in jobs) and self._extends(arm, found):
            longest = max(jobs, key=lambda job: job.decay)
            if longest.decay > 0.75 or longest != min(jobs, key=lambda job: found[job.key]["loss"]):
                break
            jobs.append(attrs.evolve(longest, decay=_round(longest.decay + 0.2), stage="decay"))
        return jobs[1:]

    def _extends(self, arm: Job, found: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the arm is tuned beyond the given decays: not the host, unless it is the best static network."""
        if not self._is_host(arm):
            return True
        sizes = [other for other in self.arms() if other.is_static]
        return min(sizes, key=lambda other: self._best_loss(other, found)).key == arm.key

    def _is_host(self, arm: Job) -> bool:
        return arm.is_static and tuple(arm.size.values()) == tuple(self.host)

    def _best_loss(self, arm: Job, found: Mapping[str, Mapping[str, Any]]) -> float:
        return min(float(found[job.key]["loss"]) for job in self._rate_jobs(arm, found) if job.key in found)

    def _chosen(self, arms: Sequence[Job], found: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """Grown arms, the host, and the best static sizes by tuned validation loss."""
        grown = [arm for arm in arms if not arm.is_static]
        static = [arm for arm in arms if arm.is_static]
        host = [arm for arm in static if self._is_host(arm)]
        best = sorted(static, key=lambda arm: self._best_loss(arm, found))
        return list({arm.key: arm for arm in (*grown, *best[: self.finalists], *host)}.values())


def static_name(size: Sequence[int]) -> str:
    """The arm's name: `static 2x64` for 2 blocks of width 64."""
    return "static " + "x".join(map(str, size))


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")
