"""`grow` by other objectives than cross-entropy: the right metric judges, and the model's score is the reported one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_diabetes, make_multilabel_classification
from sklearn.metrics import f1_score, mean_absolute_error
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import CounterfactualMeasured, EpochEnded, RunStarted, StageChanged
from esper_core.leyline.host import Batch
from esper_core.tolaria.grow import grow

QUICK = {
    "epochs": 8, "decisions_per_epoch": 2, "device": "cpu", "budget_params": "", "learning_rate": 1e-2,
    "controller": "wait",
}  # fmt: skip


def planted(folder: Path, slot: str, blueprint: str) -> str:
    """A controller that plants one seed early and moves it on as its gates pass."""
    step = {"decision": 1, "op": "germinate", "slot": slot, "blueprint": blueprint}
    (folder / "plan.json").write_text(json.dumps({"advance": True, "steps": [step]}))
    return f"schedule:{folder / 'plan.json'}"


def loaders(inputs: torch.Tensor, targets: torch.Tensor, size: int = 32) -> list[DataLoader]:
    """Training, validation and test, in a fixed order."""
    cut = len(inputs) * 6 // 10, len(inputs) * 8 // 10
    parts = [slice(0, cut[0]), slice(*cut), slice(cut[1], None)]
    return [DataLoader(TensorDataset(inputs[p], targets[p]), batch_size=size) for p in parts]


def mlp(features: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, 24), nn.GELU(), nn.Sequential(nn.Linear(24, 24), nn.GELU()), nn.Linear(24, outputs)
    )


def outputs_of(model: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in loader]
    return torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])


def reported_exactly(grown, loader: DataLoader) -> None:
    """The plain model that `grow` returns, judged by the run's objective on the test split, has the reported score."""
    objective = grown.objective
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for inputs, targets in loader:
            scores = objective.scores(grown.model(inputs), targets)[1]
            total, count = total + scores.double().sum(), count + len(inputs)
    assert float(total / count) == grown.result.test_score


def seeds_were_judged(grown) -> None:
    measured = [e for e in grown.events if isinstance(e, CounterfactualMeasured)]
    assert len(measured) > 2 and measured[-1].score_mean > 0, "the seed helps, by the metric of this run"
    assert any(e.after == "fossilized" for e in grown.events if isinstance(e, StageChanged))


def test_regression_on_diabetes(tmp_path) -> None:
    data = load_diabetes()
    inputs = torch.tensor(data.data / data.data.std(0), dtype=torch.float32)
    targets = torch.tensor(data.target, dtype=torch.float32)
    train, validation, test = loaders(inputs, targets)
    grown = grow(
        mlp(10, 1), train, validation, test_loader=test,
        **{**QUICK, "learning_rate": 0.02, "controller": planted(tmp_path, "2.1", "ffn")},
    )  # fmt: skip
    metric = grown.result.metric
    assert metric.name == "mean absolute error" and not metric.higher_is_better
    assert next(e for e in grown.events if isinstance(e, RunStarted)).metric["name"] == metric.name
    reported_exactly(grown, test)
    outputs, true = outputs_of(grown.model, test)
    assert grown.result.test_score == pytest.approx(mean_absolute_error(true, outputs[:, 0]), rel=1e-5)
    epochs = [e for e in grown.events if isinstance(e, EpochEnded)]
    assert epochs[-1].validation_score < epochs[0].validation_score
    seeds_were_judged(grown)


def test_multilabel(tmp_path) -> None:
    x, y = make_multilabel_classification(600, n_features=12, n_classes=5, random_state=0)
    inputs = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    train, validation, test = loaders(inputs, torch.tensor(y))
    grown = grow(
        mlp(12, 5), train, validation, test_loader=test,
        **{**QUICK, "rent": 0.01, "controller": planted(tmp_path, "2.1", "ffn")},
    )  # fmt: skip
    assert grown.result.metric.name == "F1"
    reported_exactly(grown, test)
    outputs, true = outputs_of(grown.model, test)
    expected = f1_score(true.numpy(), (outputs > 0).numpy(), average="samples", zero_division=1.0)
    assert grown.result.test_score == pytest.approx(expected, rel=1e-5) and expected > 0.5
    seeds_were_judged(grown)


class Segmenter(nn.Module):
    """Two blocks at full resolution; classes for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)))


def pictures(count: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy squares (class 1) and bars (class 2) on nothing; one column is nobody's."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(count, 12, 12, dtype=torch.int64)
    for index in range(count):
        top, left, row = (int(v) for v in torch.randint(0, 7, (3,), generator=generator))
        targets[index, row : row + 2, :] = 2
        targets[index, top : top + 4, left : left + 4] = 1
    inputs = targets.float()[:, None] + 0.5 * torch.randn(count, 1, 12, 12, generator=generator)
    targets[:, :, -1] = -100
    return inputs, targets


def test_segmentation(tmp_path) -> None:
    train, validation, test = loaders(*pictures(), size=16)
    grown = grow(
        Segmenter(),
        train,
        validation,
        test_loader=test,
        **{**QUICK, "controller": planted(tmp_path, "block.1", "conv")},
    )
    assert grown.result.metric.name == "mean IoU" and 0.5 < grown.result.test_score <= 1
    reported_exactly(grown, test)
    seeds_were_judged(grown)


def test_own_functions_train_and_judge() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 6, generator=generator)
    targets = inputs[:, :2] * 2

    def largest_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).abs().amax(1)

    train, validation, test = loaders(inputs, targets)
    how = {**QUICK, "epochs": 2, "controller": "wait"}
    grown = grow(
        mlp(6, 2), train, validation, test_loader=test, loss=nn.SmoothL1Loss(), metric=largest_error,
        higher_is_better=False, **how,
    )  # fmt: skip
    outputs, true = outputs_of(grown.model, test)
    assert grown.result.metric.name == "largest_error"
    assert grown.result.test_score == pytest.approx(float((outputs - true).abs().amax(1).mean()), rel=1e-5)
    assert grown.result.test_loss == pytest.approx(float(F.smooth_l1_loss(outputs, true)), rel=1e-5)
    mean = grow(mlp(6, 2), train, validation, test_loader=test, loss=lambda o, t: F.smooth_l1_loss(o, t), **how)
    assert mean.result.test_loss == pytest.approx(grown.result.test_loss, rel=1e-5)
    assert mean.result.test_score == mean.result.test_loss and mean.result.metric.name == "loss"


@pytest.mark.parametrize(
    ("targets", "options", "match"),
    [
        (torch.zeros(60, 2), {"loss": F.cross_entropy, "metric": lambda o, t: o.nonsense}, "nonsense"),
        (torch.zeros(60, 3), {"loss": lambda o, t: (o - t).mean()}, r"outputs \(1, 2\) float32 and targets \(1, 3\)"),
        (torch.zeros(60, 2), {"loss": lambda o, t: o.detach().mean()}, "has no gradient"),
        (torch.zeros(60, 2), {"loss": lambda o, t: "much"}, "a str"),
        (torch.zeros(60, 2), {"loss": "regresion"}, "did you mean regression"),
        (torch.zeros(60, 2), {"loss": 3}, "the name of an objective"),
        (torch.zeros(60, 2), {}, "do not tell the objective"),
        (torch.rand(60, 3), {}, "no objective is known"),
        (torch.zeros(60, dtype=torch.int64), {"loss": "regression"}, "regression cannot judge"),
        (torch.full((60,), 7), {}, "from 7 to 7"),
    ],
)
def test_a_loss_that_does_not_fit_is_one_clear_line(targets, options, match) -> None:
    train, validation, _ = loaders(torch.randn(60, 6), targets)
    with pytest.raises(EsperError, match=match) as caught:
        grow(mlp(6, 2), train, validation, **{**QUICK, **options})
    assert "\n" not in str(caught.value)


class Several(nn.Module):
    """Two tensors and a mapping of one, as positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(4, 16), nn.Linear(3, 16), nn.Linear(16, 3)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU())

    def forward(self, a: torch.Tensor, more: dict[str, tuple[torch.Tensor, float]]) -> torch.Tensor:
        b, scale = more["b"]
        return self.head(self.block(self.one(a) + scale * self.two(b)))


def nested(item: tuple[torch.Tensor, torch.Tensor]) -> Batch:
    x, y = item
    return Batch((x[:, :4], {"b": (x[:, 4:], 0.5)}), y)


def test_nested_inputs_work_everywhere(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 7, generator=generator)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 4] > 0).long()
    train, validation, test = loaders(inputs, targets)
    plan = planted(tmp_path, "block.1", "ffn")
    grown = grow(Several(), train, validation, test_loader=test, convert=nested, **{**QUICK, "controller": plan})
    assert any(isinstance(e, CounterfactualMeasured) for e in grown.events)
    hits = [(grown.model(nested(item).inputs).argmax(1) == item[1]).double() for item in test]
    assert grown.result.test_score == float(torch.cat(hits).mean())
