"""What every objective must keep. A plugin author subclasses `ObjectiveConformance`, sets `spec` and gives cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from esper_core.kasmina.scoring import refuse_misfit
from esper_core.leyline.errors import EsperError
from esper_core.leyline.objective import Objective
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed

_EXAMPLES = 6


class ObjectiveConformance(Conformance):
    """The invariants of an objective.

    Attributes:
        spec: name of the objective, or `distribution/name`.
        options: options to build it with, beside their defaults.
        outputs: number of classes, tokens or values of the cases.
    """

    kind = "objective"
    options: ClassVar[Mapping[str, object]] = MappingProxyType({})
    outputs: ClassVar[int] = 5

    def cases(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Outputs (count, …) and targets of `count` examples; another `generator` gives others."""
        raise NotImplementedError("say what the objective judges: outputs and targets")

    def perfect(self, targets: Tensor) -> Tensor:
        """The best possible outputs for `targets`."""
        raise NotImplementedError("say which outputs are right")

    def misfits(self) -> list[tuple[Tensor, Tensor]]:
        """Outputs and targets that must be refused."""
        return [(torch.zeros(3, 2, 2, 2, 2, 2), torch.zeros(4, dtype=torch.int64))]

    def made(self, count: int = _EXAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A case; the same for the same arguments."""
        return self.cases(count, torch.Generator().manual_seed(seed))

    @pytest.fixture
    def objective(self) -> Objective:
        """The objective, built as a run builds it."""
        return installed().build("objective", self.spec, outputs=self.outputs, options=self.options)  # type: ignore[no-any-return]

    def test_is_an_objective_that_accepts_its_cases(self, objective: Objective) -> None:
        assert isinstance(objective, Objective) and objective.metric.name
        refuse_misfit(objective, *self.made())
        refuse_misfit(objective, *self.made(1))

    def test_misfits_are_refused_in_one_line(self, objective: Objective) -> None:
        for outputs, targets in self.misfits():
            with pytest.raises(EsperError) as caught:
                refuse_misfit(objective, outputs, targets)
            assert "\n" not in str(caught.value)

    def test_scores_are_of_each_example_alone(self, objective: Objective) -> None:
        """What pairs examples must not depend on the others of the batch, or on their order."""
        outputs, targets = self.made()
        whole = objective.scores(outputs, targets)
        for index in range(len(outputs)):
            alone = objective.scores(outputs[index : index + 1], targets[index : index + 1])
            for each, one in zip(whole, alone, strict=True):
                assert each.shape == (len(outputs),) and each.is_floating_point()
                torch.testing.assert_close(each[index : index + 1], one, rtol=1e-5, atol=1e-6)

    def test_training_moves_towards_the_targets(self, objective: Objective) -> None:
        """The loss is what its gradient says it is, and following it lowers the loss of the examples too."""
        outputs, targets = self.made()
        leaf = outputs.clone().requires_grad_()
        before = objective.scores(outputs, targets)[0].mean()
        for _ in range(20):
            gradient = torch.autograd.grad(objective.loss(leaf, targets), leaf)[0]
            assert gradient.isfinite().all() and gradient.abs().max() > 0
            leaf = (leaf - 0.1 * gradient / gradient.abs().max()).detach().requires_grad_()
        assert objective.scores(leaf.detach(), targets)[0].mean() < before

    def test_the_metric_says_which_way_is_better(self, objective: Objective) -> None:
        outputs, targets = self.made()
        right = self.perfect(targets)
        metric = objective.metric
        best, worse = (float(objective.scores(o, targets)[1].mean()) for o in (right, outputs))
        assert metric.gain(best, worse) > 0
        assert float(objective.scores(right, targets)[0].mean()) < float(objective.scores(outputs, targets)[0].mean())
        if metric.share:
            for each in (objective.scores(right, targets)[1], objective.scores(outputs, targets)[1]):
                assert 0 <= float(each.min()) <= float(each.max()) <= 1

    def test_outputs_that_are_not_finite_are_not_right(self, objective: Objective) -> None:
        """A model that answers with NaN must not look good, whatever `argmax` and comparisons make of NaN."""
        outputs, targets = self.made()
        losses, scores = objective.scores(torch.full_like(outputs, math.nan), targets)
        assert not losses.isfinite().any()
        assert not ((scores > 0) & scores.isfinite()).any(), "nothing of it is right"

    def test_chance_is_what_indifferent_outputs_lose(self, objective: Objective) -> None:
        outputs, targets = self.made()
        if objective.chance is not None:
            found = float(objective.loss(torch.zeros_like(outputs), targets))
            assert math.isclose(found, objective.chance, rel_tol=1e-4), (found, objective.chance)

    def test_the_tally_is_the_mean_metric(self, objective: Objective) -> None:
        outputs, targets = self.made()
        tally = objective.tally(outputs, targets)
        if tally is not None:
            total, count = (float(value) for value in tally)
            assert total / count == pytest.approx(float(objective.scores(outputs, targets)[1].mean()), rel=1e-5)

    def test_nothing_is_changed_and_no_random_number_drawn(self, objective: Objective) -> None:
        outputs, targets = self.made()
        kept = outputs.clone(), targets.clone()
        state = torch.get_rng_state()
        first = [objective.loss(outputs, targets), *objective.scores(outputs, targets)]
        again = [objective.loss(outputs, targets), *objective.scores(outputs, targets)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(outputs, kept[0]) and torch.equal(targets, kept[1])
        assert torch.equal(state, torch.get_rng_state())

    def test_runs_stacked_over_environments(self, objective: Objective) -> None:
        """The engine for one GPU maps the loss over the environments."""
        pairs = [self.made(seed=seed) for seed in (0, 1)]
        targets = pairs[0][1]
        stacked = torch.vmap(objective.loss, in_dims=(0, None))(torch.stack([o for o, _ in pairs]), targets)
        expected = torch.stack([objective.loss(o, targets) for o, _ in pairs])
        torch.testing.assert_close(stacked, expected)
