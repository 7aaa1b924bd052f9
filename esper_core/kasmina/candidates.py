"""The blueprints that may grow on a plane: spec, options and cost, each resolved once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from esper_core.kasmina.copies import BlockRun
from esper_core.leyline.errors import EsperError, IllegalCommand
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import resolve_options
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import Registry

_NONE: Mapping[str, Any] = MappingProxyType({})


class Candidates(Mapping[str, BlueprintSpec]):
    """Specs by the name that a command uses.

    Args:
        registry: where blueprints come from.
        names: which may grow; None for all that can be used, or those that the registry's file recorded. Those whose
            name several packages offer are named `distribution/name`.
        options: of the run, by blueprint; a command's own come before them.
        run_at: path of a slot to the host's blocks that end there, for blueprints that want them.

    Raises:
        UnknownName, AmbiguousName, PluginBroken, MissingDependency: a name that means no blueprint that can be used.
    """

    def __init__(
        self, registry: Registry, names: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]],
        run_at: Callable[[str], BlockRun],
    ) -> None:  # fmt: skip
        self.registry, self._run_at = registry, run_at
        self.of_run = {name: dict(chosen) for name, chosen in options.items()}
        self._costs: dict[tuple[object, ...], tuple[int, int]] = {}
        if names is None and registry.origins is not None:
            names = registry.origins.names("blueprint") or None
        if names is None:
            every = dict.fromkeys(registry.shortest(part) for part in registry.specs("blueprint"))
            wanted = [name for name in every if self._is_usable(name)]
        else:
            wanted = list(dict.fromkeys(names))
        self._specs = {name: self._usable(name) for name in wanted}

    def __getitem__(self, name: str) -> BlueprintSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, name: str) -> BlueprintSpec:
        """The spec of a candidate, or of a blueprint that was named to the plane directly.

        Raises:
            UnknownName, AmbiguousName: no such blueprint.
        """
        if name in self._specs:
            return self._specs[name]
        found = self.registry.find("blueprint", name).spec
        assert isinstance(found, BlueprintSpec)
        return found

    def options(self, name: str, given: Mapping[str, Any] = _NONE) -> dict[str, Any]:
        """The options of a seed: those of its command before those of the run."""
        return {**self.of_run.get(name, {}), **given}

    def refusal(self, path: str, point: InjectionSpec, name: str) -> str:
        """Why a blueprint cannot grow in the slot `path` of `point` as the model is now, or the empty string."""
        spec = self.spec(name)
        reason = misfit(spec, point)
        if not reason and "run" in spec.wants:
            try:
                self.cost(path, point, name)
            except EsperError as error:
                return str(error)
        return reason

    def refuse_misfits(self, points: Mapping[str, InjectionSpec]) -> None:
        """Refuse candidates of which not one can grow in any of the slots.

        Args:
            points: path of each slot to its point.

        Raises:
            IllegalCommand: none can grow; the message gives the reason for the first blueprint at the first point.
        """
        reasons = [self.refusal(path, point, name) for name in self for path, point in points.items()]
        if reasons and all(reasons):
            tags = sorted(next(iter(points.values())).tags)
            offered = ((part.name, part.spec) for part in self.registry.specs("blueprint"))
            fitting = [
                name
                for name, spec in offered
                if isinstance(spec, BlueprintSpec) and "run" not in spec.wants  # which asks for more than a point
                if any(not misfit(spec, point) for point in points.values())
            ]
            raise IllegalCommand(
                f"none of {', '.join(self)} can grow in this host: {reasons[0]}",
                f"a blueprint that fits, such as {', '.join(fitting[:4])}" if fitting else "a blueprint that fits",
                f"esper plugins list --kind blueprint --capability {tags[-1]}",
            )

    def cost(self, path: str, point: InjectionSpec, name: str, options: Mapping[str, Any] = _NONE) -> tuple[int, int]:
        """Parameters and forward FLOPs (one example) of a seed in the slot `path`, by the blueprint's own estimate.

        Raises:
            UnknownName: no such blueprint.
            IllegalCommand: the blueprint does not fit the point.
        """
        spec = self.spec(name)
        reason = misfit(spec, point)
        if reason:
            raise IllegalCommand(
                f"{name} cannot grow at {point.name}: {reason}",
                "a blueprint that fits",
                f"esper plugins list --kind blueprint --capability {sorted(point.tags)[0]}",
            )
        run = {"run": self._run_at(path)} if "run" in spec.wants else {}
        blocks = tuple(source.info.name for source in run["run"].sources) if run else ()
        key = (path, name, tuple(sorted(options.items())), blocks)
        if key not in self._costs:
            resolved = resolve_options(name, spec.options, self.options(name, options))
            estimate = self.registry.load(self.registry.find("blueprint", name), attribute="estimate")
            params, flops = estimate(point, **run, **resolved)
            self._costs[key] = int(params), int(flops)
        return self._costs[key]

    def _usable(self, name: str) -> BlueprintSpec:
        """The spec of a blueprint that has been imported: one that cannot be must not be found out in mid-run."""
        part = self.registry.find("blueprint", name)
        assert isinstance(part.spec, BlueprintSpec)
        self.registry.load(part)
        self.registry.load(part, attribute="estimate")
        return part.spec

    def _is_usable(self, name: str) -> bool:
        try:
            self._usable(name)
        except EsperError:
            return False
        return True


def misfit(spec: BlueprintSpec, point: InjectionSpec) -> str:
    """Why a blueprint cannot grow at `point`, or the empty string."""
    if point.layer is not None and f"around-{point.layer.kind}" not in spec.capabilities:
        return f"it does not grow around a layer of kind {point.layer.kind}, as {point.name} is"
    if point.layout not in spec.layouts:
        return f"it serves {', '.join(spec.layouts)}, and {point.name} is {point.layout}"
    if barred := sorted(spec.excludes & point.tags):
        return f"it excludes {', '.join(barred)}, and {point.name} has {', '.join(sorted(point.tags))}"
    missing = sorted(spec.needs - point.tags)
    return f"it needs {', '.join(missing)}, and {point.name} has {', '.join(sorted(point.tags))}" if missing else ""
