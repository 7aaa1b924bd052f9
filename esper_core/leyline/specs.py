"""What a plugin hands in: plain data about a part, with the part itself named as `package.module:Name`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Final

import attrs

from esper_core.leyline.errors import EsperError, did_you_mean
from esper_core.leyline.leniency import Tolerant
from esper_core.leyline.options import Option
from esper_core.leyline.sensors import check_sensors
from esper_core.leyline.tags import LAYOUTS, is_tag

API_VERSION: Final = 2
"""The plugin API of this core. Specs written for it or for the version before it are accepted."""

OLDEST_API_VERSION: Final = max(1, API_VERSION - 1)

NAME: Final = re.compile(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*")
_FACTORY: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _options(values: Iterable[Option]) -> tuple[Option, ...]:
    options = tuple(values)
    for option in options:
        if not isinstance(option, Option):
            raise EsperError(f"option {option!r} is a {type(option).__name__}", "a leyline.options.Option")
    return options


def _words(values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise EsperError(f"{values!r} is one string", "a collection of strings")
    words = tuple(values)
    for word in words:
        if not isinstance(word, str):
            raise EsperError(f"{word!r} is a {type(word).__name__}", "a string")
    return words


def _sensors(values: Iterable[str]) -> tuple[str, ...]:
    names = _words(values)
    check_sensors(names)
    return names


def _tags(values: Iterable[str]) -> frozenset[str]:
    if isinstance(values, str):
        raise EsperError(f"tags {values!r} are one string", "a collection of tags")
    return frozenset(_words(values))


def _check_tags(_: object, attribute: attrs.Attribute[frozenset[str]], value: frozenset[str]) -> None:
    for tag in sorted(value):
        if not is_tag(tag):
            raise EsperError(f"unknown tag {tag!r} in {attribute.name}", "a tag of leyline.tags or one with prefix x-")


def _check_factory(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not _FACTORY.fullmatch(value):
        raise EsperError(f"{attribute.name} {value!r} is not importable", 'text like "package.module:Name"')


def _check_layouts(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    if not value or not set(value) <= set(LAYOUTS):
        raise EsperError(f"{attribute.name} {list(value)}", f"some of {', '.join(LAYOUTS)}")


def _check_wants(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    if not set(value) <= {"run", "call"}:
        raise EsperError(f"{attribute.name} {list(value)}", "some of run, call")


def _check_text(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or "\n" in value:
        raise EsperError(f"{attribute.name} {value!r} is not one line of text", "a string without line breaks")


def _check_api(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not isinstance(value, int):
        raise EsperError(f"{attribute.name} {value!r} is a {type(value).__name__}", f"an integer such as {API_VERSION}")


def accepted_versions(oldest: int = OLDEST_API_VERSION, newest: int = API_VERSION) -> str:
    """The plugin API versions that this core takes, as words."""
    return " and ".join(str(version) for version in range(oldest, newest + 1))


class _SpecType(Tolerant):
    """Makes specs, and tells a field of a later version from a mistake."""

    def explain(cls, error: EsperError, fields: dict[str, Any]) -> EsperError:
        api = fields.get("api", API_VERSION)
        if isinstance(api, int) and api > API_VERSION:
            name, kind = fields.get("name"), getattr(cls, "kind", "spec")
            return EsperError(
                f"{kind} {name!r} is for plugin API {api}, newer than this core's ({accepted_versions()})",
                hint="pip install -U esper-core",
            )
        known = [field.name for field in attrs.fields(cls)]  # type: ignore[arg-type]
        for field in fields:
            if field not in known:
                near = did_you_mean(field, known) or f"api={API_VERSION + 1} in it, if a newer core knows the field"
                return EsperError(f"{cls.__name__} {fields.get('name')!r} has no field {field!r}", hint=near)
        return error


# Equality and representation are written once, not generated for every class: making these classes is the greater
# part of what importing them costs, and every command pays it.


@attrs.frozen(kw_only=True, eq=False, repr=False)
class PluginSpec(metaclass=_SpecType):
    """What every spec says of itself.

    Attributes:
        name: what the user types: lower case, digits, `_` and `-`.
        summary: one line for listings.
        factory: where the part is, as `package.module:Name`; imported only when the part is used.
        options: the options that the factory takes as keyword arguments.
        needs: tags that the parts used with this one must have.
        capabilities: tags that this offers.
        sensors: names of the sensors that make it visible to controllers, each one of `leyline.sensors.SENSORS`.
        requires: top-level modules that the factory imports beyond the core's own needs.
        install: what to `pip install` when one of `requires` is missing, such as `esper-core[timm]`.
        source: paper or origin, in one line.
        api: plugin API version that the spec was written for.
    """

    kind: ClassVar[str] = ""
    needs_sensors: ClassVar[bool] = False
    factory_signature: ClassVar[str] = ""

    name: str = attrs.field()
    summary: str = attrs.field(validator=_check_text)
    factory: str = attrs.field(validator=_check_factory)
    options: tuple[Option, ...] = attrs.field(default=(), converter=_options)
    needs: frozenset[str] = attrs.field(default=frozenset(), converter=_tags, validator=_check_tags)
    capabilities: frozenset[str] = attrs.field(default=frozenset(), converter=_tags, validator=_check_tags)
    sensors: tuple[str, ...] = attrs.field(default=(), converter=_sensors)
    requires: tuple[str, ...] = attrs.field(default=(), converter=_words)
    install: str = attrs.field(default="", validator=_check_text)
    source: str = attrs.field(default="", validator=_check_text)
    api: int = attrs.field(default=API_VERSION, validator=_check_api)

    @name.validator
    def _nameable(self, _: object, value: str) -> None:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise EsperError(
                f"{self.kind or 'spec'} name {value!r} cannot be typed", "lower-case letters, digits, '_' and '-'"
            )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, field.name) == getattr(other, field.name) for field in attrs.fields(type(self)))

    def __hash__(self) -> int:
        return hash((type(self), self.name, self.factory))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, factory={self.factory!r}, …)"

    @property
    def example(self) -> str:
        """A command line that uses this part."""
        return f"esper plugins info {self.name}"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class HostSpec(PluginSpec):
    """A family of models that can grow.

    `factory(argument, *, outputs, input_shape, seed, **options) -> HostProtocol`; `argument` is what stands after
    `:` in `--host name:argument` (empty if nothing does), `outputs` and `input_shape` come from the task and may
    be None.

    Attributes:
        argument: what the argument means, or empty if the host takes none.
        default_task: the task of a run that names none.
        sizes: the options that set its size, the number of blocks first; a sweep of static sizes varies them.
        start: where a function is, as `package.module:name`, that maps the parameters in blocks with which a network is
            to end to the options with which it should start; empty if its size is always the user's.
        code: whether the argument names code that is run. Nothing but the user's own word has it run: a run folder or
            a model file that names it is refused.
    """

    kind: ClassVar[str] = "host"
    needs_sensors: ClassVar[bool] = True
    factory_signature: ClassVar[str] = "factory(argument, *, outputs, input_shape, seed, **options) -> HostProtocol"
    argument: str = ""
    default_task: str = "digits"
    sizes: tuple[str, ...] = attrs.field(default=(), converter=_words)
    start: str = attrs.field(default="", validator=attrs.validators.or_(attrs.validators.in_(("",)), _check_factory))
    code: bool = False

    @property
    def example(self) -> str:
        return f"esper run --host {self.name}{':' + self.argument if self.argument else ''}"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class BlueprintSpec(PluginSpec):
    """A module that can grow at a slot.

    `factory(point, **options) -> nn.Module` maps a feature to a *delta* of the same shape and dtype; the blend adds
    it to the host's. `estimate(point, **options) -> (params, flops)` says what such a module costs for one example
    without building it. `point` is an `InjectionSpec`.

    Attributes:
        family: a word by which controllers group blueprints.
        layouts: the feature layouts that it serves.
        estimate: where the estimate is, as `package.module:name`.
        wants: what it asks for beyond the point. `run`: factory and estimate also take `run=`, the host's own blocks
            that end at the slot, as a `kasmina.copies.BlockRun`; it can grow only where there is such a run. `call`:
            the seed's forward also takes the arguments with which the host called the block, as a
            `kasmina.calls.Call`, or None where a host does not hand them on.
        answers: `delta`, or `feature` if the seed gives what would go on in the feature's place. Plain blends
            interpolate between the two then, and at alpha 1 the seed's output is passed on unchanged.
        isolation: whether its seeds learn anything while isolated; if not, they begin to blend as soon as they are
            born, and the run is given time to settle.
        excludes: tags of points at which it cannot grow, such as `causal` for what mixes all positions. (API 2)
    """

    kind: ClassVar[str] = "blueprint"
    needs_sensors: ClassVar[bool] = True
    factory_signature: ClassVar[str] = "factory(point, **options) -> nn.Module"
    family: str = attrs.field(validator=_check_text)
    layouts: tuple[str, ...] = attrs.field(converter=_words, validator=_check_layouts)
    estimate: str = attrs.field(validator=_check_factory)
    wants: tuple[str, ...] = attrs.field(default=(), converter=_words, validator=_check_wants)
    answers: str = attrs.field(default="delta", validator=attrs.validators.in_(("delta", "feature")))
    isolation: bool = True
    excludes: frozenset[str] = attrs.field(default=frozenset(), converter=_tags, validator=_check_tags)

    @property
    def example(self) -> str:
        host = "gpt" if "run" in self.wants else "cnn" if "NCHW" in self.layouts else "transformers:gpt2"
        if "around" not in self.needs:
            return f"esper run --host {host} --blueprints {self.name}"
        host, layers = ("cnn", "conv") if "around-conv" in self.capabilities else ("gpt", "attn,mlp")
        return f"esper run --host {host} --slots around:{layers} --blueprints {self.name}"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class BlendSpec(PluginSpec):
    """One half of a blend: how seed and host combine, or how alpha moves in time.

    combination: `factory(point, **options) -> nn.Module` with `forward(h, s, alpha) -> h'`, identity at alpha 0.
    curve: `factory(**options) -> Callable[[float], float]`, monotone from 0 to 0 and from 1 to 1.

    Attributes:
        part: `combination` or `curve`.
        interpolates: for a seed that returns a feature of its own, this combination is nothing but
            (1 − α)·h + α·s; others get s − h for the seed's delta.
    """

    kind: ClassVar[str] = "blend"
    factory_signature: ClassVar[str] = "factory(point, **options) -> nn.Module, or factory(**options) -> curve"
    part: str = attrs.field(validator=attrs.validators.in_(("combination", "curve")))
    interpolates: bool = False

    @property
    def example(self) -> str:
        return f"esper run --host cnn --blends {self.name}"


class RewardSpec(PluginSpec):
    """A term of the reward. `factory(**options) -> RewardTerm` (see `leyline.outcome`).

    One of the capability `removal` pays for what an overseer removes, and is 0 without one.
    """

    __slots__ = ()
    kind: ClassVar[str] = "reward"
    factory_signature: ClassVar[str] = "factory(**options) -> RewardTerm"

    @property
    def example(self) -> str:
        overseers = " --overseers emrakul" if "removal" in self.capabilities else ""
        return f"esper run --host cnn{overseers} --rewards {self.name}=1.0"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class ControllerSpec(PluginSpec):
    """Something that decides. `factory(argument, *, seed, **options) -> Controller`.

    Attributes:
        argument: what stands after `:` in `--controller name:argument`, or empty.
        overseer: it stands around another controller; its factory also takes that one as `inner`.
    """

    kind: ClassVar[str] = "controller"
    factory_signature: ClassVar[str] = "factory(argument, *, seed, **options) -> Controller"
    argument: str = ""
    overseer: bool = False

    @property
    def example(self) -> str:
        option = "overseers" if self.overseer else "controller"
        return f"esper run --host cnn --{option} {self.name}{':' + self.argument if self.argument else ''}"


class AdapterSpec(PluginSpec):
    """A kind of adapter on a frozen Tamiyo core. `factory(core, **options) -> Adapter`."""

    __slots__ = ()
    kind: ClassVar[str] = "adapter"
    factory_signature: ClassVar[str] = "factory(core, **options) -> Adapter"

    @property
    def example(self) -> str:
        return f"esper tamiyo adapt --kind {self.name} --domain language"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class TaskSpec(PluginSpec):
    """Something to learn. `factory(argument, *, seed, **options) -> TaskProtocol`.

    Attributes:
        argument: what stands after `:` in `--task name:argument`, or empty.
    """

    kind: ClassVar[str] = "task"
    factory_signature: ClassVar[str] = "factory(argument, *, seed, **options) -> TaskProtocol"
    argument: str = ""

    @property
    def example(self) -> str:
        hosts = {
            "language-modelling": "transformers:gpt2",
            "language": "transformers:bert",
            "vision": "cnn",
            "signal": "cnn",
        }
        host = next((host for tag, host in hosts.items() if tag in self.capabilities), "mlp")
        head = " --set cnn.head=map" if host == "cnn" and "segmentation" in self.capabilities else ""
        return f"esper run --host {host} --task {self.name}{':' + self.argument if self.argument else ''}{head}"


class ObjectiveSpec(PluginSpec):
    """What is minimised and judged. `factory(*, outputs, **options) -> Objective` (see `leyline.objective`).

    `outputs` is the task's number of classes, tokens or values, or None where it is unknown.
    """

    __slots__ = ()
    kind: ClassVar[str] = "objective"
    factory_signature: ClassVar[str] = "factory(*, outputs, **options) -> Objective"

    @property
    def example(self) -> str:
        return f"esper run --host cnn --objective {self.name}"


class SinkSpec(PluginSpec):
    """A place to which events go. `factory(folder, **options) -> Sink` with `write(event)`, `flush()`, `close()`."""

    __slots__ = ()
    kind: ClassVar[str] = "sink"
    factory_signature: ClassVar[str] = "factory(folder, **options) -> Sink"

    @property
    def example(self) -> str:
        return f"esper run --host cnn --sinks {self.name}"


SPEC_KINDS: Final[tuple[type[PluginSpec], ...]] = (
    HostSpec, BlueprintSpec, BlendSpec, RewardSpec, ControllerSpec, AdapterSpec, TaskSpec, SinkSpec,
    ObjectiveSpec,
)  # fmt: skip
"""Every kind of spec; the hook `esper_<kind>s` returns specs of that kind."""

KINDS: Final = tuple(spec.kind for spec in SPEC_KINDS)
"""Every kind of part, as typed after `--kind`."""
