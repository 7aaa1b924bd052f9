"""Exports grown models: one plain program with the seeds built in, without hooks, that does not need Esper.

Formats: `torch` writes source and weights, `model.py` beside `model.safetensors`, that need torch alone; `torch-export`
writes a `.pt2` for `torch.export.load`; `onnx` writes an `.onnx`. All three come from the same traced program, and each
is read back and compared with the model before it is called done.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.merging import merge_all, merged, unmerge
from esper_core.leyline.errors import BadOption, EsperError, MissingDependency, os_error_as
from esper_core.leyline.host import OWN_MODEL, list_tensors, map_tensors
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.assembly import build_task
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export_peft import compare_with_peft, write_peft
from esper_core.tolaria.export_source import write_source
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.offline import offline, without_fetching
from esper_core.tolaria.recipe import noise_of

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane
    from esper_core.leyline.host import Inputs

FORMATS: Final = ("torch", "torch-export", "onnx", "peft")
TOLERANCE: Final = 1e-4
_TRACED, _COMPARED = 4, 100
_PLACE: Final = torch.empty(0)


@attrs.frozen
class Exported:
    """What was written.

    Attributes:
        path: of the file, or of the folder for `torch`.
        inputs: names of the inputs, in order; shapes have the batch first.
        fixed_batch: the only batch size that the program takes; None for any.
        merged: paths of the seeds that were merged into their layers. unmerged: path to reason of the other ones.
        difference: largest absolute difference of logits from the model's, over `examples` of the validation split.
        noise: these examples are noise instead, as the run was one of `grow`, whose data are the caller's.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    fixed_batch: int | None
    difference: float
    examples: int
    merged: tuple[str, ...] = ()
    unmerged: Mapping[str, str] = attrs.Factory(dict)
    noise: bool = False


class _Positional(nn.Module):
    """The model behind positional tensors. `example`: inputs as the model takes them."""

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        super().__init__()
        self.model, self.example = model, map_tensors(lambda _: _PLACE, example)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The tensors of the inputs, in order."""
        left = iter(tensors)
        return self.model(map_tensors(lambda _: next(left), self.example))  # type: ignore[no-any-return]


def export_run(
    path: str | Path, form: str, out: str | Path | None = None, *, merge: bool = False, weights: str = "last",
    registry: Registry | None = None,
) -> Exported:  # fmt: skip
    """Write the grown model of a run for use without Esper.

    Args:
        path: a run's folder.
        form: `torch`, `torch-export`, `onnx`, or `peft` for the seeds alone, as an adapter of the host.
        merge: seeds that are updates of their layers' weights become part of these.
        out: file or, for `torch`, folder; by default `export/` in the run's folder.
        weights: `last`, or `best` for the lowest validation loss among these and the run's checkpoints.

    Raises:
        BadFile: there is no grown model.
        BadOption: no such format, or `merge` where there is nothing to merge.
        MissingDependency: `onnx` without its packages.
        EsperError: the model cannot be traced, or what was written computes something else.
    """
    if merge and form == "peft":
        raise BadOption("--merge with --format peft", "an adapter, or a model that has it merged", "--format torch")
    if form not in FORMATS:
        raise BadOption(f"format {form!r}", f"one of {', '.join(FORMATS)}", "--format onnx")
    if form == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    if form == "peft" and importlib.util.find_spec("peft") is None:
        raise MissingDependency("what was written for peft is read back with peft", "", "pip install peft")
    plane, header = load_plane(path, registry or load_registry(), weights=weights)
    target = Path(out) if out is not None else Path(path) / "export" / _FILES[form]
    if form == "peft":
        for seed in merged(plane):
            unmerge(plane, seed)
        return _export_peft(plane, header, target)
    inputs, noise = _examples(header, plane.registry), _made_up(header)
    if not merge:
        return attrs.evolve(export_model(compose(plane).eval(), inputs, form, target), noise=noise)
    with torch.no_grad():
        expected = compose(plane).eval()(inputs)
    done, left = merge_all(plane, permanent=False)
    if not done and not merged(plane):
        raise BadOption("--merge", "seeds around layers that are updates of their weights; " + (
            "; ".join(left.values()) or "there are none"), "leave --merge out")  # fmt: skip
    model = compose(plane).eval()
    with torch.no_grad():
        difference = float((model(inputs) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise EsperError(f"the merged model differs by {difference:.2g}", f"at most {TOLERANCE:g}", "without --merge")
    found = export_model(model, inputs, form, target)
    return attrs.evolve(found, merged=tuple(done), unmerged=left, difference=max(found.difference, difference),
                        noise=noise)  # fmt: skip


def _made_up(header: Mapping[str, Any]) -> bool:
    """Whether the data were the caller's, so that there are no examples but noise."""
    return bool(RunConfig.from_mapping(header["config"]).host == OWN_MODEL)


def _examples(header: Mapping[str, Any], registry: Registry) -> Inputs:
    """A batch of the validation split that a model's file names, or noise where the loaders were the caller's.

    Nothing is fetched for it.
    """
    if _made_up(header):
        return noise_of(header["own"], _COMPARED)  # type: ignore[no-any-return]
    with offline():
        task, _ = build_task(without_fetching(RunConfig.from_mapping(header["config"])), registry)
        return next(iter(task.validation.batches(_COMPARED))).inputs


def _export_peft(plane: Plane, header: Mapping[str, Any], target: Path) -> Exported:
    """Write the seeds for peft, and compare the host with what peft makes of them."""
    config = RunConfig.from_mapping(header["config"])
    batch = _examples(header, plane.registry)
    with os_error_as(EsperError, f"cannot write {target}", "a writable place", "--out PATH"):
        write_peft(plane, target, config.host.partition(":")[2])
    difference, examples = compare_with_peft(plane, target, batch)
    if not difference <= TOLERANCE:
        raise EsperError(f"{target} differs from the model by {difference:.2g}", f"at most {TOLERANCE:g}")
    return Exported(target, "peft", _names(batch, len(list_tensors(batch))), None, difference, examples,
                    noise=_made_up(header))  # fmt: skip


def export_model(model: nn.Module, inputs: Inputs, form: str, target: Path) -> Exported:
    """Write a plain model in eval mode, and compare what was written with it.

    Args:
        inputs: some examples as the model takes them; their first are traced, and all are compared.
        target: file or, for `torch`, folder.

    Raises:
        EsperError: the model cannot be traced, `target` cannot be written, or what was written computes something else.
    """
    tensors = tuple(list_tensors(inputs))
    names = _names(inputs, len(tensors))
    positional = _Positional(model, inputs).eval()
    with torch.no_grad():
        expected = positional(*tensors)
    program, fixed = _trace(positional, tuple(t[:_TRACED] for t in tensors))
    with os_error_as(EsperError, f"cannot write {target}", "a writable place", "--out PATH"):
        target.parent.mkdir(parents=True, exist_ok=True)
        compute = _WRITERS[form](program, target, names)
    size = fixed or len(expected)
    with torch.no_grad():
        found = torch.cat(
            [compute(*(t[i : i + size] for t in tensors)) for i in range(0, len(expected) - size + 1, size)]
        )
    difference = float((found - expected[: len(found)]).abs().max())
    if not difference <= TOLERANCE:
        raise EsperError(f"{target} differs from the model by {difference:.2g}", f"at most {TOLERANCE:g}")
    return Exported(target, form, names, fixed, difference, len(found))


def _trace(model: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, int | None]:
    """The program for any batch size, or else for that of `tensors`; and that size if it is fixed."""
    one, any_ = torch.export.Dim("batch", min=1), torch.export.Dim.DYNAMIC
    shared, apart = (tuple({0: size} for _ in tensors) for size in (one, any_))
    failure: Exception | None = None
    for shapes, fixed in (((shared,), None), ((apart,), None), (None, len(tensors[0]))):
        try:
            with torch.no_grad(), _quiet():
                return torch.export.export(model, tensors, dynamic_shapes=shapes), fixed
        except Exception as error:  # noqa: BLE001 - tracing runs any host's code, and torch raises many kinds
            failure = error
    told = str(failure).strip().splitlines() or [""]
    raise EsperError(
        f"the model cannot be traced: {type(failure).__name__}: {told[0]}", "a model that torch.export takes"
    )


def _write_pt2(program: torch.export.ExportedProgram, target: Path, names: tuple[str, ...]) -> Callable[..., Tensor]:
    with _quiet():
        torch.export.save(program, target)
        return torch.export.load(target).module()


def _write_onnx(program: torch.export.ExportedProgram, target: Path, names: tuple[str, ...]) -> Callable[..., Tensor]:
    import onnxruntime

    with _quiet():
        torch.onnx.export(
            program, (), target, input_names=list(names), output_names=["logits"], dynamo=True, verbose=False,
            external_data=False,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    found = [node.name for node in session.get_inputs()]
    if found != list(names):
        raise EsperError(f"{target} takes {', '.join(found)}", f"inputs {', '.join(names)}", "--format torch-export")

    def compute(*tensors: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return compute


def _write_torch(program: torch.export.ExportedProgram, target: Path, names: tuple[str, ...]) -> Callable[..., Tensor]:
    target.mkdir(parents=True, exist_ok=True)
    source, tensors = write_source(program, names)
    (target / "model.py").write_text(source, encoding="utf-8")
    save_file(tensors, target / "model.safetensors")
    spec = importlib.util.spec_from_file_location("_esper_exported_model", target / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()  # type: ignore[no-any-return]


_Writer = Callable[[torch.export.ExportedProgram, Path, tuple[str, ...]], Callable[..., Tensor]]
_WRITERS: Final[dict[str, _Writer]] = {
    "torch": _write_torch, "torch-export": _write_pt2, "onnx": _write_onnx,
}  # fmt: skip


_FILES: Final = {"torch": "torch", "torch-export": "model.pt2", "onnx": "model.onnx", "peft": "peft"}
"""What an export is called by default."""


def _names(inputs: Inputs, count: int) -> tuple[str, ...]:
    """A name for each tensor: the keys of a mapping of tensors, or `inputs`, numbered if there are several."""
    if isinstance(inputs, Mapping) and len(inputs) == count:
        return tuple(inputs)
    return ("inputs",) if count == 1 else tuple(f"inputs_{number}" for number in range(count))


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"exporting to ONNX needs {', '.join(missing)}", "", "pip install 'esper-core[export]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters print and warn of; their errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def describe_export(exported: Exported) -> dict[str, Any]:
    """JSON-compatible data."""
    return {**attrs.asdict(exported), "path": str(exported.path)}
