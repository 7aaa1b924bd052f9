"""What the registry finds, how it names it, and that it is the same wherever it is built."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import attrs
import pytest

from esper_core.leyline import specs
from esper_core.leyline.errors import (
    AmbiguousName,
    BadOption,
    EsperError,
    MissingDependency,
    PluginBroken,
    UnknownName,
    did_you_mean,
)
from esper_core.leyline.hookspecs import GROUP, hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import API_VERSION, OLDEST_API_VERSION, BlueprintSpec, ControllerSpec, RewardSpec
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.registry.discovery import find_plugins
from esper_core.registry.loading import SLOW_NOTE
from tests.registry.site import answer, offers, run_esper, run_python, write_package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder first on this process's path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ESPER_DISABLE_PLUGINS", raising=False)
    return tmp_path


def make(argument: str = "", *, seed: int = 0, size: int = 1) -> tuple[str, int, int]:
    """A factory."""
    return argument, seed, size


class Embedded:
    """A plugin that is an object."""

    @hookimpl
    def esper_controllers(self) -> list[ControllerSpec]:
        options = (Option("size", "int", 1, "how much", minimum=0),)
        return [ControllerSpec(name="made", summary="s", factory=f"{__name__}:make", options=options)]

    @hookimpl
    def esper_veto(self, command: object) -> str | None:
        return "no" if command == "bad" else None


def described(registry: Registry) -> list[dict[str, Any]]:
    """Everything about every part, as data."""
    return [
        attrs.asdict(part, value_serializer=lambda _, __, v: sorted(v) if isinstance(v, frozenset) else v)
        for part in registry.specs()
    ]


def in_worker(registry: Registry) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a worker process finds by itself, and in the registry that it was sent."""
    return described(load_registry()), described(registry)


def test_every_part_that_ships_is_sound() -> None:
    registry = load_registry()
    assert registry.broken == []
    notes = [note for plugin in registry.plugins for note in plugin.notes]
    assert [note for note in notes if not note.startswith(SLOW_NOTE)] == []  # any machine is slow at times
    assert {part.kind for part in registry.specs()} >= {"blueprint", "blend", "controller", "reward", "sink", "task"}
    assert all(part.distribution == "esper-core" for part in registry.specs() if part.module.startswith("esper_"))


def test_specs_are_ordered_and_filtered(site: Path) -> None:
    write_package(site, "zebra", offers('blueprint("zz")', 'blueprint("aa", capabilities=("x-odd",))'))
    registry = load_registry()
    order = [(part.kind, part.name) for part in registry.specs()]
    assert order == sorted(order)
    assert {part.kind for part in registry.specs("sink")} == {"sink"}
    assert [part.qualified for part in registry.specs(capability="x-odd")] == ["zebra/aa"]
    assert registry.specs("sink", capability="x-odd") == []


def test_order_does_not_depend_on_the_path(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_package(site, "bee", offers('blueprint("same")'))
    write_package(other, "ant", offers('blueprint("same")'))
    orders = []
    for path in ([str(site), str(other)], [str(other), str(site)]):
        listed = run_python(
            "-c",
            "import json; from esper_core.registry import load_registry; r = load_registry();"
            "print(json.dumps([[p.qualified for p in r.specs()], [p.qualified for p in r.plugins]]))",
            PYTHONPATH=":".join(path),
        )
        orders.append(answer(listed))
    assert orders[0] == orders[1]
    assert orders[0][1][0].startswith("esper-core/")


def test_discovery_agrees_with_importlib(site: Path) -> None:
    write_package(site, "plain", offers('blueprint("plain")'))
    write_package(site, "With.Dots", offers('blueprint("dots")'), version="2.0rc1")
    site.joinpath("plain-1.0.dist-info", "entry_points.txt").write_text(
        "# comment\n[console_scripts]\nplain = plain:main\n\n[esper_core]\nplugin = plain_plugin [extra]\n"
        "other=plain_plugin:thing\n[esper_core.other]\nno = no\n"
    )
    expected = {
        (entry.dist.name, entry.dist.version, entry.name, entry.module, entry.attr or "")
        for entry in importlib.metadata.entry_points(group=GROUP)
        if entry.dist is not None
    }
    found = {(p.distribution, p.version, p.name, *_split(p.module)) for p in find_plugins()}
    assert found == expected
    assert ("With.Dots", "2.0rc1", "plugin", "With.Dots_plugin", "") in found


def test_a_malformed_file_of_another_package_harms_nobody(site: Path) -> None:
    write_package(site, "plain", offers('blueprint("plain")'))
    write_package(site, "mangled", offers('blueprint("mangled")'))
    site.joinpath("mangled-1.0.dist-info", "entry_points.txt").write_bytes(
        b"[esper_core]\nno equals sign \xff\n[[\n=\n"
    )
    registry = load_registry()
    assert registry.find("blueprint", "plain")
    assert {broken.distribution for broken in registry.broken} == {"mangled"}


def _split(reference: str) -> tuple[str, str]:
    module, _, attribute = reference.partition(":")
    return module, attribute


def test_plugins_in_an_archive_are_found(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(site, "zipped", offers('blueprint("zipped")'))
    archive = site / "zipped.whl"
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(site.rglob("*")):
            if path.is_file() and path != archive:
                target.write(path, path.relative_to(site))
    monkeypatch.setattr(sys, "path", [str(archive), *(entry for entry in sys.path if entry != str(site))])
    assert load_registry().find("blueprint", "zipped").version == "1.0"


def test_an_earlier_folder_shadows_a_later_one(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path_factory.mktemp("later")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    write_package(site, "twice-there", offers('blueprint("here")'), version="2.0")
    write_package(later, "twice_there", offers('blueprint("here")'), version="1.0")
    assert load_registry().find("blueprint", "here").version == "2.0"


def test_another_librarys_finder_of_the_same_folders_adds_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backport `importlib_metadata` puts such a finder into `sys.meta_path` when it is imported."""

    class Backport:
        find_spec = staticmethod(lambda *_: None)
        find_distributions = staticmethod(importlib.metadata.MetadataPathFinder.find_distributions)

    write_package(site, "bare", offers('blueprint("bare")'), version="3.1")
    site.joinpath("bare-3.1.dist-info", "METADATA").unlink()
    write_package(site, "mangled", offers('blueprint("mangled")'))
    site.joinpath("mangled-1.0.dist-info", "entry_points.txt").write_bytes(b"[esper_core]\n\xff\n")
    alone = find_plugins()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Backport])
    assert find_plugins() == alone


def test_metadata_may_be_missing(site: Path) -> None:
    write_package(site, "bare", offers('blueprint("bare")'), version="3.1")
    site.joinpath("bare-3.1.dist-info", "METADATA").unlink()
    assert load_registry().find("blueprint", "bare").described == "blueprint 'bare' of bare 3.1"


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("blueprint", "depthwse", "did you mean depthwise?"),
        ("controller", "heuristics", "did you mean heuristic?"),
        ("blueprint", "esper-core/depthwse", "did you mean esper-core/depthwise?"),
        ("blueprint", "qqq", "esper plugins list --kind blueprint"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(kind: str, name: str, hint: str) -> None:
    with pytest.raises(UnknownName, match=f"there is no {kind} {name!r}") as caught:
        load_registry().find(kind, name)
    assert hint in str(caught.value)


def test_an_unknown_name_mentions_a_broken_plugin_that_may_offer_it(site: Path) -> None:
    write_package(site, "crashing", "1 / 0\n")
    for name in ("qqq", "depthwse", ""):
        with pytest.raises(UnknownName, match="unless crashing/plugin offers it, which cannot be loaded"):
            load_registry().find("blueprint", name)


def test_dist_slash_name_picks_and_disabling_settles_a_conflict(site: Path) -> None:
    write_package(site, "impostor", offers('blueprint("conv")'), version="9.1")
    registry = load_registry()
    with pytest.raises(AmbiguousName, match=r"esper-core [\d.]+ and impostor 9.1.*esper-core/conv or impostor/conv"):
        registry.find("blueprint", "conv")
    assert registry.find("blueprint", "impostor/conv").distribution == "impostor"
    assert registry.find("blueprint", "Esper_Core/conv").distribution == "esper-core"
    assert load_registry(["impostor"]).find("blueprint", "conv").distribution == "esper-core"


def test_one_distribution_offering_a_name_twice_is_a_conflict_too(site: Path) -> None:
    write_package(site, "double", offers('blueprint("again")', 'blueprint("again")'))
    with pytest.raises(AmbiguousName, match=r"offered more than once, by double_plugin of double 1\.0"):
        load_registry().find("blueprint", "double/again")


def test_plugins_of_one_name_are_both_kept(site: Path) -> None:
    for distribution in ("first", "second"):
        write_package(site, distribution, offers(f'blueprint("{distribution}")'), entry="same")
    registry = load_registry()
    assert registry.find("blueprint", "first") and registry.find("blueprint", "second")
    with pytest.raises(AmbiguousName, match="first/same or second/same"):
        load_registry(["same"])
    assert [p.qualified for p in load_registry(["first/same"]).plugins if p.name == "same"] == ["second/same"]


def test_two_entry_points_to_one_module(site: Path) -> None:
    write_package(site, "shared", offers('blueprint("shared")'))
    site.joinpath("shared-1.0.dist-info", "entry_points.txt").write_text(
        "[esper_core]\na = shared_plugin\nb = shared_plugin\n"
    )
    registry = load_registry()
    assert registry.find("blueprint", "shared").plugin == "a"
    assert ["same module as plugin shared/a" in broken.cause for broken in registry.broken] == [True]


@pytest.mark.parametrize("name", ["odd-one", "odd_one", "oddly", "odd-one/oddly"])
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_disabling(name: str, way: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(site, "odd-one", "raise RuntimeError('imported although disabled')\n", entry="oddly")
    assert load_registry().broken
    if way == "environment":
        monkeypatch.setenv("ESPER_DISABLE_PLUGINS", f" , {name},")
    registry = load_registry([name] if way == "argument" else [])
    assert registry.broken == [] and registry.disabled == (name,)
    assert registry.find("blueprint", "conv")


def test_disabling_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"cannot disable plugin 'blueprnts'.*did you mean blueprints\?"):
        load_registry(["blueprnts"])
    monkeypatch.setenv("ESPER_DISABLE_PLUGINS", "nothing-like-it")
    with pytest.raises(UnknownName, match="nothing-like-it"):
        load_registry()


def test_disabled_parts_are_gone_and_the_error_says_why() -> None:
    registry = load_registry(["blueprints"])
    assert registry.specs("blueprint") == []
    with pytest.raises(UnknownName, match="without disabling blueprints"):
        registry.find("blueprint", "conv")


def test_api_of_this_version_and_of_the_one_before(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper_core.registry.loading.API_VERSION", 5)
    monkeypatch.setattr("esper_core.registry.loading.OLDEST_API_VERSION", 4)
    names = [f'blueprint("api{version}", api={version})' for version in (3, 4, 5, 6)]
    write_package(site, "versions", offers(*names))
    registry = load_registry()
    assert [part.name for part in registry.specs("blueprint") if part.distribution == "versions"] == ["api4", "api5"]
    old, new = (broken.cause for broken in registry.broken if broken.distribution == "versions")
    assert "'api3' for plugin API 3, older than this core takes (4 and 5)" in old
    assert "'api6' for plugin API 6, newer than this core's (4 and 5); pip install -U esper-core" in new
    assert specs.OLDEST_API_VERSION in (specs.API_VERSION, specs.API_VERSION - 1)


def test_one_bad_spec_or_hook_leaves_the_others(site: Path) -> None:
    code = offers('blueprint("seeing")', 'blueprint("blind", sensors=())')
    write_package(site, "mixed", code + "\n@hookimpl\ndef esper_sinks():\n    raise ValueError('no sink today')\n")
    registry = load_registry()
    assert registry.find("blueprint", "seeing").distribution == "mixed"
    with pytest.raises(PluginBroken, match="'blind' without a sensor"):
        registry.find("blueprint", "blind")
    assert {(b.kind, b.name) for b in registry.broken} == {("blueprint", "blind"), ("sink", "")}


def test_an_optional_unknown_hook_is_no_fault(site: Path) -> None:
    code = "\n@hookimpl(optionalhook=True)\ndef esper_later():\n    return []\n"
    write_package(site, "modern", offers('blueprint("modern")') + code)
    assert load_registry().broken == []


def test_embedding_and_building() -> None:
    registry = Registry()
    plugin = Embedded()
    registry.register(plugin, name="here", distribution="mine", version="2")
    assert registry.build("controller", "made", "x", seed=3) == ("x", 3, 1)
    assert registry.build("controller", "mine/made", "x", options={"size": "7"}) == ("x", 0, 7)
    with pytest.raises(BadOption, match=r"made takes no option 'sise'.*did you mean size"):
        registry.build("controller", "made", options={"sise": 1})
    assert registry.hook.esper_veto(command="bad", plane=None) == "no"
    assert registry.hook.esper_veto(command="good", plane=None) is None
    with pytest.raises(PluginBroken, match="same module as plugin mine/here"):
        registry.register(plugin)


def test_embedding_something_broken_raises() -> None:
    class Wrong:
        @hookimpl
        def esper_rewards(self) -> RewardSpec:
            return RewardSpec(name="r", summary="s", factory="a:b")

    with pytest.raises(PluginBroken, match="returns a RewardSpec from esper_rewards, not a list of RewardSpec"):
        Registry().register(Wrong())


def test_a_missing_dependency_is_told_from_a_bug(site: Path) -> None:
    write_package(
        site,
        "needy",
        offers('blueprint("declared", requires=("nobody_has_this",))', 'blueprint("hidden", factory="needy_inner:f")'),
        requires=("nobody-has-this>=3",),
    )
    site.joinpath("needy_inner.py").write_text("import nobody_has_this.core\n")
    registry = load_registry()
    for name in ("declared", "hidden"):
        part = registry.find("blueprint", name)
        with pytest.raises(
            MissingDependency, match=r"needs nobody_has_this, .*; try: pip install 'nobody-has-this>=3'"
        ):
            registry.load(part)
    assert registry.missing(registry.find("blueprint", "declared")) == ("nobody_has_this",)
    site.joinpath("needy_inner.py").write_text("import json.nothing\n")
    with pytest.raises(PluginBroken, match=r"No module named 'json\.nothing'"):
        registry.load(registry.find("blueprint", "hidden"))


def test_factories_are_not_imported_before_they_are_used(site: Path) -> None:
    write_package(site, "lazy", offers('blueprint("lazy", factory="lazy_inner:make")'))
    site.joinpath("lazy_inner.py").write_text("def make(point):\n    return 'made'\n")
    registry = load_registry()
    assert "lazy_inner" not in sys.modules
    assert registry.build("blueprint", "lazy", None) == "made"
    assert "lazy_inner" in sys.modules


def test_what_a_factory_prints_on_import_stays_off_stdout(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_package(site, "loud", offers('blueprint("loud", factory="loud_inner:make")'))
    site.joinpath("loud_inner.py").write_text(
        "import logging, sys\nprint('hello')\nhandler = logging.StreamHandler(sys.stdout)\ndef make(point):\n    pass\n"
    )
    registry = load_registry()
    registry.load(registry.find("blueprint", "loud"))
    sys.modules["loud_inner"].handler.stream.write("later\n")  # a kept reference goes on working
    out, err = capsys.readouterr()
    assert out == "" and err == "hello\nlater\n"


def test_split_reference() -> None:
    assert split_reference("mine/timm:a/b:c") == ("mine/timm", "a/b:c")


def test_the_registry_is_the_same_in_a_worker(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(site, "for-all", offers('blueprint("everywhere", capabilities=("x-b", "x-a"))'))
    write_package(site, "for-none", "raise RuntimeError\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    registry = load_registry(["for-none"])
    here = described(registry)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        own, sent = pool.apply(in_worker, (registry,))
    assert own == here and sent == here
    assert any(part["spec"]["name"] == "everywhere" for part in here)


def test_a_copy_keeps_what_was_disabled_and_embedded() -> None:
    registry = load_registry(["blueprints"])
    registry.register(Embedded(), name="here", distribution="mine")
    copy = pickle.loads(pickle.dumps(registry))
    assert described(copy) == described(registry)
    assert copy.disabled == ("blueprints",)


def test_distributions_are_recorded(site: Path) -> None:
    write_package(site, "recorded", offers('blueprint("recorded")'), version="4.5")
    assert load_registry().distributions["recorded"] == "4.5"
    assert json.dumps(load_registry().distributions)


def test_suggestions_prefer_what_is_nearly_the_same() -> None:
    assert did_you_mean("esper_bluprints", ["esper_blueprints", "esper_blends"]) == "did you mean esper_blueprints?"
    assert did_you_mean("zzz", ["a"]) == ""


def test_a_plane_over_everything_takes_both_sides_of_a_conflict_by_their_full_names(site: Path) -> None:
    from esper_core.kasmina.candidates import Candidates

    write_package(site, "impostor", offers('blueprint("conv")', 'blueprint("sick", requires=("nobody_has_this",))'))
    names = set(Candidates(load_registry(), None, {}, None))
    assert {"esper-core/conv", "impostor/conv", "depthwise"} <= names
    assert names.isdisjoint({"conv", "sick"})


def test_specs_of_this_api_and_the_one_before_work_and_those_of_the_next_are_refused_one_by_one(tmp_path) -> None:
    """One package with a spec for each version; a field that this core does not know is told from a mistake."""
    api, oldest = API_VERSION, OLDEST_API_VERSION
    write_package(
        tmp_path,
        "versions",
        offers(
            f'blueprint("next", api={api + 1}, grows_on_trees=True)',
            f'blueprint("next-layout", api={api + 1}, layouts=("NCDHW",))',
            f'blueprint("now", api={api})',
            f'blueprint("before", api={oldest})',
            'blueprint("typo", sumary="x")',
            'blueprint("incomplete", family=None)',
            'blueprint("optional", options=[Option("size", "int", "much", "h")])',
            f'blueprint("too-old", api={oldest - 1})',
        ),
    )
    result = run_esper("plugins", "list", "--json", site=tmp_path)
    found = answer(result)
    assert {p["name"] for p in found["parts"] if p["distribution"] == "versions"} == {"now", "before"}
    causes = {b["name"]: b["cause"] for b in found["broken"] if b["distribution"] == "versions"}
    assert set(causes) == {"next", "next-layout", "typo", "incomplete", "optional", "too-old"}
    for name in ("next", "next-layout"):
        assert f"for plugin API {api + 1}, newer than this core's" in causes[name]
        assert "pip install -U esper-core" in causes[name]
    assert "has no field 'sumary'; did you mean summary?" in causes["typo"]
    assert "size='much' cannot be read" in causes["optional"]
    used = run_esper("plugins", "info", "versions/next", site=tmp_path)
    assert used.returncode != 0 and "newer than this core's" in used.stderr and "Traceback" not in used.stderr


def test_outside_of_a_registration_a_wrong_spec_is_an_error() -> None:
    with pytest.raises(EsperError, match="has no field 'colour'"):
        BlueprintSpec(name="x", summary="s", factory="a:b", family="f", layouts=("NCHW",), estimate="a:c", colour=1)
    with pytest.raises(EsperError, match="newer than this core's"):
        BlueprintSpec(name="x", api=API_VERSION + 1, colour=1)
    with pytest.raises(EsperError, match="cannot be made"):
        BlueprintSpec(name="x")
