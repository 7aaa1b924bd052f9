"""Curricula: worlds to train Tamiyo on, as TOML files shipped with the package or written by users.

A world is a family of runs: fields of `RunConfig`, and under `vary` lists from which each episode draws. `blueprints`
may be a table `{pool, least, most}`: each episode offers a random subset, so that no blueprint is learnt by heart.
A world with `hosts` and `tasks` is a generator: each episode pairs one of each, at one of its `horizons` and `rents`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

from esper_core.leyline.errors import BadFile, UnknownName, did_you_mean
from esper_core.simic.learning.imitation import ImitationConfig
from esper_core.simic.learning.ppo import PPOConfig
from esper_core.storage.toml_file import flatten, parse_toml, read_text_file
from esper_core.tamiyo.core import CoreConfig
from esper_core.tolaria.config import RunConfig

_Part = TypeVar("_Part", bound=attrs.AttrsInstance)


@attrs.frozen(kw_only=True)
class World:
    """A family of runs.

    Attributes:
        name: for curves and tables. domain: `vision`, `language`, `signal`; adapters train on one.
        held_out: only evaluated on. weight: how often it is drawn beside the others.
        apart: only drawn when its domain is named, so that a core is not trained on the domain of an adapter.
        run: fields of `RunConfig`. vary: field, or `settings.part.option`, to values that an episode draws from.
        schedule: the blueprint of the fixed-schedule control.
        hosts, tasks: tables of further fields, each with a `vary` of its own; an episode takes one of each.
        horizons: factors on the steps between two decisions, so on the length of the run. rents: values of lambda.
        planted: blueprints of `simic.gym.planted` that an offer may hold beside the others.
        planted_chance: the share of episodes in which each of them does.
    """

    name: str
    domain: str = "vision"
    held_out: bool = False
    apart: bool = False
    weight: float = 1.0
    run: Mapping[str, Any] = attrs.field(factory=dict)
    vary: Mapping[str, Sequence[Any]] = attrs.field(factory=dict)
    schedule: str = ""
    hosts: Sequence[Mapping[str, Any]] = ()
    tasks: Sequence[Mapping[str, Any]] = ()
    horizons: Sequence[float] = ()
    rents: Sequence[float] = ()
    planted: Sequence[str] = ()
    planted_chance: float = 0.5

    def draw(self, rng: random.Random, seed: int, build: random.Random | None = None) -> RunConfig:
        """One run of this family.

        Args:
            rng: of all draws. build: of those that say what is computed (host, task, length, the offer, since every
                blueprint of a stack costs it time), where these are shared.
        """
        build = build or rng
        fields = {**self.run, "settings": dict(self.run.get("settings", {})), "seed": seed}
        for name, values in self.vary.items():
            _set(fields, name, (rng if name in OWN else build).choice(list(values)))
        for choices in (self.hosts, self.tasks):
            if choices:
                _take(fields, build.choice(list(choices)), build)
        if self.horizons:
            name = "steps_per_epoch" if fields.get("steps_per_epoch") else "epochs"
            fields[name] = max(1, round(fields.get(name, RunConfig().epochs) * build.choice(list(self.horizons))))
        if self.rents:
            fields["rent"] = fields["settings"]["rent.rate"] = rng.choice(list(self.rents))
        offer = fields.get("blueprints")
        if isinstance(offer, Mapping):
            pool = list(offer["pool"])
            count = build.randint(int(offer.get("least", len(pool))), int(offer.get("most", len(pool))))
            fields["blueprints"] = sorted(build.sample(pool, count))
        if self.planted:
            more = [name for name in self.planted if build.random() < self.planted_chance]
            fields["blueprints"] = sorted([*fields.get("blueprints", ()), *more])
        return RunConfig.from_mapping(fields)


OWN: Final = ("seed", "blueprints", "blends", "budget_params", "budget_flops", "rent", "rewards", "controller")
"""Fields in which runs that are computed as one may differ."""


def _set(fields: dict[str, Any], name: str, value: Any) -> None:
    if name.startswith("settings."):
        fields["settings"][name.removeprefix("settings.")] = value
    else:
        fields[name] = value


def _take(fields: dict[str, Any], table: Mapping[str, Any], rng: random.Random) -> None:
    """Add the fields of a host or task to those of a run, and draw what the table varies."""
    for name, value in table.items():
        if name == "settings":
            fields["settings"] |= dict(flatten(value))
        elif name != "vary":
            fields[name] = value
    for name, values in table.get("vary", {}).items():
        _set(fields, name, rng.choice(list(values)))


@attrs.frozen(kw_only=True)
class Curriculum:
    """One stage of the curriculum.

    Attributes:
        iterations: policy updates. groups: episode groups in each. group_size: environments in a group.
        rewards: `name=weight`. controllers: controllers that an evaluation compares with the agent.
        checkpoint_every: iterations between checkpoints.
        alike: how many groups in a row share world, host, task, length and offer, and differ in weights, batches,
            budget and rent, so that a device computes them as one.
        ppo, core, imitation: of the policy update, the network, and the demonstrations before the first update.
        tuning: of the policy update of a core that was trained before; fields that it leaves out are those of `ppo`.
    """

    name: str
    summary: str
    iterations: int = 100
    groups: int = 4
    group_size: int = 8
    rewards: Sequence[str] = ("loss=1", "rent=1", "governor_death=1")
    controllers: Sequence[str] = ("wait", "random", "schedule", "heuristic")
    checkpoint_every: int = 5
    alike: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    ppo: PPOConfig = attrs.Factory(PPOConfig)
    tuning: PPOConfig = attrs.Factory(PPOConfig)
    core: CoreConfig = attrs.Factory(CoreConfig)
    imitation: ImitationConfig = attrs.Factory(ImitationConfig)
    worlds: Sequence[World] = ()

    def chosen(self, *, held_out: bool, domain: str = "") -> list[World]:
        """The worlds to train on, or those held out, of one domain if it is named.

        Raises:
            UnknownName: there is none.
        """
        worlds = [w for w in self.worlds if w.held_out is held_out and (w.domain == domain if domain else not w.apart)]
        if not worlds:
            domains = ", ".join(sorted({w.domain for w in self.worlds}))
            raise UnknownName(
                f"{self.name} has no such world (domain {domain or 'any'!r}, held out {held_out})", domains
            )
        return worlds

    def draw(
        self, seed: int, iteration: int, group: int, *, held_out: bool = False, domain: str = ""
    ) -> tuple[World, RunConfig]:
        """The world and run of one episode group; the same arguments give the same."""
        rng = random.Random(f"{seed}|{iteration}|{group}|{held_out}")
        build = random.Random(f"{seed}|{iteration}|{group // self.alike}|{held_out}|alike") if self.alike > 1 else rng
        worlds = self.chosen(held_out=held_out, domain=domain)
        world = build.choices(worlds, [w.weight for w in worlds])[0]
        run = world.draw(rng, rng.randrange(1 << 31), build)
        return world, attrs.evolve(run, rewards=tuple(self.rewards))


def stages() -> list[str]:
    """Names of the curricula that ship with Esper."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_curriculum(name: str) -> Curriculum:
    """A curriculum that ships with Esper, by name, or by the path of a TOML file.

    Raises:
        UnknownName: no such stage and no such file.
        BadFile: no TOML, or a key that does not exist.
    """
    return parse_curriculum(curriculum_text(name), name)


def curriculum_text(name: str) -> str:
    """The TOML of a curriculum; see `load_curriculum`."""
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return read_text_file(path, "a curriculum")
    if name in stages():
        return str((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    raise UnknownName(f"no curriculum {name!r}", f"{', '.join(stages())}, or the path of a TOML file",
                      did_you_mean(name, stages()))  # fmt: skip


def parse_curriculum(text: str, name: str) -> Curriculum:
    """The curriculum that a TOML text describes. `name`: for error messages.

    Raises:
        BadFile: no TOML, a key that does not exist, or a value that does not fit.
    """
    expected = "a TOML file as in docs/curriculum.md"
    try:
        return _read(parse_toml(text, f"the curriculum {name!r}", expected), name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(
            f"the curriculum {name!r} cannot be read: {error}", "a TOML file as in docs/curriculum.md"
        ) from error


def _read(data: dict[str, Any], name: str) -> Curriculum:
    shared = data.pop("run", {})
    worlds = []
    for raw in data.pop("worlds", []):
        own = raw.get("run", {})
        settings = {**dict(flatten(shared.get("settings", {}))), **dict(flatten(own.get("settings", {})))}
        worlds.append(_part(World, {**raw, "run": {**shared, **own, "settings": settings}}, f"a world of {name}"))
    ppo = data.pop("ppo", {})
    parts = {"ppo": _part(PPOConfig, _tuples(ppo), "ppo"),
             "tuning": _part(PPOConfig, _tuples({**ppo, **data.pop("tuning", {})}), "tuning"),
             "core": _part(CoreConfig, data.pop("core", {}), "core"),
             "imitation": _part(ImitationConfig, _tuples(data.pop("imitation", {})), "imitation")}  # fmt: skip
    return _part(Curriculum, {**data, **parts, "worlds": worlds}, name)


def _part(kind: type[_Part], values: Mapping[str, Any], where: str) -> _Part:
    known = attrs.fields_dict(kind)
    for key in values:
        if key not in known:
            raise BadFile(f"{where} has an unknown key {key!r}", ", ".join(known), did_you_mean(key, known))
    return kind(**values)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _folder() -> Any:
    return files("esper_core.simic") / "curricula"
