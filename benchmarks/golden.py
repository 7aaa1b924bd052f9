"""Golden runs: the same seeded runs by two versions of this repository, compared bit for bit.

`python -m benchmarks.golden --before CHECKOUT [--cases cnn,gym] [--json FILE]`, where CHECKOUT holds the other version,
such as `git worktree add /tmp/before 2b6c269` makes. Every case runs in a process of its own with the packages of one
version, one thread, on the CPU. Of each, the trajectory (losses, scores, changes of stages), the FLOPs and a digest of
every tensor of the model are compared.

The half of this file that runs in the child process must work with both versions, so it imports them where it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

Record = dict[str, Any]
ROOT: Final = Path(__file__).parents[1]
_SHORT: Final = (
    "--device", "cpu", "--decisions-per-epoch", "4", "--budget-params", "60%", "--amp", "off", "--rewards",
    "rent=1", "--quiet",
)  # fmt: skip
_CNN: Final = (
    "--host", "cnn", "--task", "digits", "--blueprints", "depthwise,conv", "--epochs", "3", "--steps-per-epoch", "12",
    "--batch-size", "32", "--decision-examples", "128", *_SHORT,
)  # fmt: skip
_TIMM: Final = (
    "--host", "timm:resnet18", "--task", "digits", "--blueprints", "depthwise", "--epochs", "2", "--steps-per-epoch",
    "4", "--batch-size", "8", "--decision-examples", "32", *_SHORT,
)  # fmt: skip
_GPT2: Final = (
    "--host", "transformers:gpt2", "--task", "pydoc", "--blueprints", "ffn,bottleneck_adapter", "--epochs", "1",
    "--steps-per-epoch", "8", "--batch-size", "2", "--decision-examples", "8", "--set", "transformers.layers=2",
    "--set", "transformers.width=64", "--set", "transformers.heads=4", *_SHORT,
)  # fmt: skip
_TWO_SEEDS: Final = (("block1", "depthwise", 0), ("block2", "conv", 2))
_ARMS: Final = ("--seeds", "1", "--candidates", "1", "--workers", "1", "--json")


# --- In the child process ---


def _controller(steps: tuple[tuple[str, str, int], ...] | None, out: Path) -> str:
    """A schedule of slots, blueprints and decisions, written to `out`; without any, a controller that waits."""
    if not steps:
        return "wait"
    plan = [
        {"op": "germinate", "slot": slot, "blueprint": name, "decision": at, "tempo": "fast"}
        for slot, name, at in steps
    ]
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return f"schedule:{out / 'plan.json'}"


def _run(arguments: tuple[str, ...], steps: tuple[tuple[str, str, int], ...] | None, out: Path) -> Path:
    """A run by the command line; `steps`: slots, blueprints and decisions of a schedule; None to wait."""
    given = () if "--controller" in arguments else ("--controller", _controller(steps, out))
    _esper("run", *arguments, *given, "--out", str(out / "run"))
    return out / "run"


def _esper(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "esper_core", *arguments], check=True, stdout=subprocess.DEVNULL)


def _digests(tensors: Mapping[str, Any]) -> dict[str, str]:
    import torch

    return {
        name: hashlib.sha256(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in sorted(tensors.items())
    }


def _trajectory(events: list[Record]) -> Record:
    """What both versions tell of a run, under the names of this one."""
    kinds = {"epoch_ended": [], "stage_changed": [], "run_ended": []}  # type: dict[str, list[Any]]
    for event in events:
        kind = event["kind"]
        if kind in kinds:
            kinds[kind].append({key.replace("accuracy", "score"): value for key, value in event.items()})
    losses = ("train_loss", "validation_loss", "validation_score", "learning_rate")
    return {
        "epochs": [[epoch[name] for name in losses] for epoch in kinds["epoch_ended"]],
        "stages": [[event["step"], event["slot"], event["after"]] for event in kinds["stage_changed"]],
        "test": [[end["test_loss"], end["test_score"], end["params"]] for end in kinds["run_ended"]],
        "flops": [end["total_flops"] for end in kinds["run_ended"]],
    }


def _read(run: Path) -> Record:
    from safetensors.torch import load_file

    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = _trajectory([json.loads(line) for line in lines])
    (model,) = (run / "model").glob("*.safetensors")
    return {**found, "weights": _digests(load_file(model))}


def _command(arguments: tuple[str, ...], steps: tuple[tuple[str, str, int], ...] | None) -> Callable[[Path], Record]:
    return lambda out: _read(_run(arguments, steps, out))


def _compare(*changes: str) -> Callable[[Path], Record]:
    """`esper compare`: for each arm, losses and scores of its seeds."""

    def case(out: Path) -> Record:
        run = _run((*_CNN, *changes), _TWO_SEEDS[:1], out)
        _esper("compare", str(run), *_ARMS)
        files = sorted((run / "compare").glob("*.json"))
        return {path.stem: _arm(json.loads(path.read_text(encoding="utf-8"))) for path in files}

    return case


def _arm(found: Record) -> Record:
    """What one seed of an arm reached and cost, under the names of this version."""
    named = {key.replace("accuracy", "score"): value for key, value in found.items()}
    return {key: named.get(key) for key in ("loss", "score", "validation_score", "params", "flops")}


def _grow(steps: tuple[tuple[str, str, int], ...] | None) -> Callable[[Path], Record]:
    """`grow()` of a plain network on the digits."""

    def case(out: Path) -> Record:
        import torch
        from sklearn.datasets import load_digits
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset

        from esper_core.tolaria.grow import grow

        pictures, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pictures / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        train = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=50)
        held_out = DataLoader(TensorDataset(x[600:800], y[600:800]), batch_size=100)
        grown = grow(
            model, train, held_out, points=["0", "2"], blueprints=["conv"], controller=_controller(steps, out),
            epochs=4, decisions_per_epoch=4, seed=3, rewards="rent=1", device="cpu", budget_params="200%",
        )  # fmt: skip
        events = [{"kind": _kind(event), **_fields(event)} for event in grown.events]
        return {**_trajectory(events), "weights": _digests(grown.model.state_dict())}

    return case


def _kind(event: Any) -> str:
    name = type(event).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


def _fields(event: Any) -> Record:
    import attrs

    return {field.name: getattr(event, field.name) for field in attrs.fields(type(event))}


def _gym(out: Path) -> Record:
    """An episode of three environments under fixed commands: rewards, their terms, and what became of the hosts."""
    from esper_core.leyline.actions import Command, Tempo
    from esper_core.leyline.stages import Op
    from esper_core.registry import load_registry
    from esper_core.tolaria import assembly
    from esper_core.tolaria.config import RunConfig

    try:
        from esper_core.simic.gym import environment as gym
    except ImportError:
        from esper_core.simic import environment as gym  # type: ignore[attr-defined,no-redef]
    ground_of = getattr(gym, "World", None) or gym.Ground
    config = RunConfig(
        host="cnn", task="digits", epochs=4, steps_per_epoch=8, batch_size=32, decisions_per_epoch=2, seed=5,
        decision_examples=128, device="cpu", budget_params="100%", blueprints=("conv", "depthwise"),
        rewards=("loss=1", "rent=0.5"), settings={"governor.check_every": 4},
    )  # fmt: skip
    registry = load_registry()
    group = gym.EpisodeGroup(ground_of.lay(config, registry), 3, assembly.build_rewards(config, registry))
    plans = [{}, {1: Command(Op.GERMINATE, "block1", "conv", "residual:cosine", Tempo.FAST)},
             {0: Command(Op.GERMINATE, "block2", "depthwise", "residual:cosine", Tempo.FAST),
              6: Command(Op.CULL, "block2")}]  # type: list[dict[int, Command]]  # fmt: skip
    found = []
    decision = 0
    while not group.done:
        views, paid = group.advance()
        for k, (view, pay) in enumerate(zip(views, paid, strict=True)):
            found.append([pay.reward, dict(sorted(pay.components.items())), group.cohort.members[k].measured.loss])
            wanted = plans[k].get(decision)
            moves = [Command(Op.ADVANCE, slot.path) for slot in view.slots if Op.ADVANCE in slot.legal]
            group.act(k, [wanted] if wanted else moves)
        decision += 1
    weights = [_digests(member.plane.host.module.state_dict()) for member in group.cohort.members]
    return {"paid": found, "weights": {f"{k}.{n}": v for k, each in enumerate(weights) for n, v in each.items()}}


def _university(out: Path) -> Record:
    """The first iteration of a training on University's worlds: the heuristic demonstrates."""
    folder = out / "training"
    arguments = ("--curriculum", "university", "--iterations", "1", "--workers", "1", "--seed", "0", "--quiet")
    _esper("tamiyo", "train", *arguments, "--out", str(folder))
    record = json.loads((folder / "curves.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return {key: value for key, value in record.items() if "second" not in key}


CASES: Final[dict[str, Callable[[Path], Record]]] = {
    "cnn": _command(_CNN, None),
    "cnn-scheduled": _command(_CNN, _TWO_SEEDS),
    "cnn-rewards": _command((*_CNN, "--rewards", "accuracy=1,rent=1"), _TWO_SEEDS),
    "cnn-heuristic": _command((*_CNN, "--controller", "heuristic"), None),
    "cnn-random": _command((*_CNN, "--controller", "random"), None),
    "cnn-bf16": _command((*_CNN, "--amp", "bf16"), _TWO_SEEDS),
    "timm": _command(_TIMM, None),
    "timm-scheduled": _command(_TIMM, (("layer1.1", "depthwise", 0),)),
    "gpt2": _command(_GPT2, None),
    "gpt2-scheduled": _command(_GPT2, (("h.0", "ffn", 0),)),
    "grow": _grow(None),
    "grow-scheduled": _grow((("0", "conv", 0),)),
    "gym": _gym,
    "university": _university,
    "compare": _compare(),
    "compare-bf16": _compare("--amp", "bf16"),
}
"""What is run, by name; each is called with an empty folder."""


# --- Comparing ---


def play(case: str, checkout: Path) -> Record:
    """What a case gives with the packages in `checkout`."""
    roots = [checkout, *(checkout / name for name in ("hosts", "blueprints", "plugins"))]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", case]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        told = Path(folder, "told.json")
        if not told.exists():
            raise SystemExit(f"{case} failed in {checkout}:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
        found: Record = json.loads(told.read_text(encoding="utf-8"))
    return found


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Places at which two records differ, each with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{where}.{k}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d for i, (a, b) in enumerate(zip(before, after, strict=True)) for d in differences(a, b, f"{where}[{i}]")
        ]
    return [] if before == after else [f"{where}: {json.dumps(before)[:120]} became {json.dumps(after)[:120]}"]


def _child(case: str) -> None:
    folder = Path.cwd()
    (folder / "work").mkdir()
    found = CASES[case](folder / "work")
    (folder / "told.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the other version")
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--json", type=Path, help="where to write the differences")
    parser.add_argument("--child", choices=tuple(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.child)
        return
    if given.before is None or not (given.before / "esper_core").is_dir():
        parser.error("--before takes a checkout of the other version")
    found = {}
    for case in given.cases.split(","):
        found[case] = differences(play(case, given.before.resolve()), play(case, ROOT))
        print(f"{case}: {'the same bits' if not found[case] else f'{len(found[case])} differences'}", flush=True)
        for line in found[case][:12]:
            print(f"    {line}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
