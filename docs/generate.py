"""Writes the pages that are derived from code: `python docs/generate.py`; with `--check` it only says which differ."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import click

import esper_core
from esper_core import testing
from esper_core.cli.main import VERBS, cli
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import resolve_options
from esper_core.leyline.sensors import HOST_READINGS, READINGS, SLOT_FIELDS, TREE_READINGS
from esper_core.leyline.specs import BlendSpec, BlueprintSpec, PluginSpec
from esper_core.leyline.stages import STAGES, TRANSITIONS
from esper_core.nissa.host_sensors import EXAMPLES
from esper_core.registry import load_registry

HERE = Path(__file__).parent
NOTICE = "<!-- Written by docs/generate.py; change the code, then run it again. -->\n"


def lifecycle_page() -> str:
    """`lifecycle.md`: the diagram, the stages and the gates of `esper_core.leyline.stages`."""
    stages = [
        f"| {stage.name} | {spec.summary} | {_mark(spec.occupied)} | {_mark(spec.isolated)} "
        f"| {_mark(spec.contributes)} | {_mark(spec.pays_rent)} | {', '.join(spec.sensors)} |"
        for stage, spec in STAGES.items()
    ]
    moves = [
        f"| {t.source.name} | {t.target.name if t.target else 'the stage that it left'} | `{t.op.value}`"
        f"{' (automatic)' if t.automatic else ''}{' (auditor only)' if t.auditor_only else ''} "
        f"| {'; '.join(gate.summary for gate in t.gates)} |"
        for t in TRANSITIONS
    ]
    gates = {gate.summary: gate for transition in TRANSITIONS for gate in transition.gates}
    conditions = [f"| `{g.measure}` | {g.comparison} {g.threshold:g} | {g.summary} |" for g in gates.values()]
    return "\n".join(
        [
            NOTICE,
            "# The lifecycle of a seed\n",
            "One table in `esper_core/leyline/stages.py` says which stages a seed passes through, what holds in",
            "each and what leads from one to the next. Masks, gates and this page are derived from it. WAIT is",
            "legal everywhere.\n",
            "![The stages of a seed in a row, and the way out by withering](pictures/lifecycle.svg)\n",
            "## Stages\n",
            "| stage | | seed exists | isolated | contributes | pays rent | sensors |",
            "|---|---|:-:|:-:|:-:|:-:|---|",
            *stages,
            "\n*Isolated*: the host computes, and learns, exactly as if nothing grew. *Contributes*: the output",
            "depends on the seed when its alpha is above zero.\n",
            "## Transitions\n",
            "| from | to | command | gates |",
            "|---|---|---|---|",
            *moves,
            "",
            "## Gates\n",
            "A quantity that is not measured passes no gate.\n",
            "| measure | must be | that is |",
            "|---|---|---|",
            *conditions,
            "",
        ]
    )


def sensors_page() -> str:
    """`sensors.md`: what is read at every slot, of the host, and in each stage."""
    stages = [f"| {stage.name} | {', '.join(f'`{name}`' for name in spec.sensors)} |" for stage, spec in STAGES.items()]
    return "\n".join(
        [
            NOTICE,
            "# What Nissa reads\n",
            "No capability without a sensor: a host, blueprint or stage that declares none is refused, and so is",
            "one that declares a sensor which is not on this page.",
            "Readings are gathered on the device and leave it at a decision, as the mean over the batches sampled",
            "since the last one (`--set sensors.every=N`: one batch in N). What was not measured has no key: unknown",
            "is neither zero nor healthy. A slot that nobody reads has no probe, and computes as if sensors did not",
            "exist.\n",
            "## At a slot (`SlotRead` events)\n",
            "h is the host's feature, s the seed's output, g the gradient of the batch's mean loss with respect to the",
            "slot's output.\n",
            "| reading | |",
            "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in READINGS.items()),
            "\n## At a slot whose seed has seeds inside it\n",
            "In the same events: the readings of an organ and of all that grows inside it, summed up.\n",
            "| reading | |",
            "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in TREE_READINGS.items()),
            "\n## Of a host that works on sequences (`HostRead` events)\n",
            f"Once an epoch, on {EXAMPLES} examples, in evaluation mode: one forward and one backward pass, which no",
            "gradient, buffer or random state remembers.\n",
            "| reading | |",
            "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in HOST_READINGS.items()),
            "\n## What each stage needs\n",
            "Beside the readings above a stage may list what every slot shows of itself:\n",
            "| field | |",
            "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in SLOT_FIELDS.items()),
            "",
            "| stage | sensors |",
            "|---|---|",
            *stages,
            "",
        ]
    )


def _docstring(module: str, attribute: str) -> str:
    """That of a name; read from the source where importing the module would import another library's trainer."""
    if not module.startswith("esper_core.integrations."):
        return getattr(importlib.import_module(module), attribute).__doc__ or ""
    source = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    nodes = ast.parse(source.read_text(encoding="utf-8")).body
    found = (n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == attribute)
    return ast.get_docstring(next(found)) or ""


def public_api_page() -> str:
    """`public-api.md`: the names that `esper_core` promises to keep."""
    rows = []
    for name, reference in sorted(esper_core.PUBLIC.items(), key=lambda item: (item[1].partition(":")[0], item[0])):
        module, _, attribute = reference.partition(":")
        documented = _docstring(module, attribute)
        line = documented.strip().split("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{name}` | `{module}` | {' '.join(line.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(
        [
            NOTICE,
            "# Public names\n",
            "`from esper_core import NAME`. These, every module of `esper_core.leyline`, the conformance classes",
            "of `esper_core.testing` and the command `esper` are what plugins and programs may rely on;",
            "everything else is private and may change. Importing `esper_core` alone imports none of the modules",
            "below.\n",
            "| name | from | |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def blueprints_page() -> str:
    """`blueprints.md`: the blueprints and blends that ship with Esper, as registered, with costs by their estimates."""
    registry = load_registry()
    shipped = [part for part in registry.specs() if part.distribution == "esper-core"]
    blueprints, blends = [], []
    for part in shipped:
        spec = part.spec
        if isinstance(spec, BlueprintSpec):
            estimate = registry.load(part, attribute="estimate")
            defaults = resolve_options(spec.name, spec.options, {})
            points = (_example("NCHW", (64, 16, 16)), _example("NLD", (64, 64)))
            if "run" in spec.wants:
                on_map = on_sequence = "the host's blocks'"
            else:
                costs = (estimate(p, **defaults) if p.layout in spec.layouts else (0, 0) for p in points)
                on_map, on_sequence = (f"{params:,} / {flops / 1e6:.3g} M" for params, flops in costs)
            blueprints.append(
                f"| `{spec.name}` | {spec.family} | {spec.summary} | {on_map if 'NCHW' in spec.layouts else ''} "
                f"| {on_sequence if 'NLD' in spec.layouts else ''} | {_options(spec)} | {spec.source} |"
            )
        elif isinstance(spec, BlendSpec):
            blends.append(f"| `{spec.name}` | {spec.part} | {spec.summary} | {_options(spec)} | {spec.source} |")
    return "\n".join(
        [
            NOTICE,
            "# Blueprints and blends that ship with Esper\n",
            "A blueprint says what grows at a slot. Whatever it is, it maps the host's feature to a *delta* of the",
            "same shape, is born silent (with `init=zero`, the default) and works at one position and one channel.",
            "`copy` is the exception: it answers with a feature, which takes the place of the host's.",
            "Set an option with `--set name.option=value`; publish your own with `esper plugins new NAME`.\n",
            "Parameters / forward FLOPs of one example at default options: on a map of 64 channels and 16×16",
            "positions, and on a sequence of 64 tokens of 64 features. Empty: the blueprint does not serve that",
            "layout. A multiply-add counts as two; norms and element-wise work count as nothing.\n",
            "| blueprint | family | | map | sequence | options | source |",
            "|---|---|---|--:|--:|---|---|",
            *blueprints,
            "\nA blend says how it comes in: a combination, and a curve in which alpha (α) moves: `gated:cosine`.",
            "h is the host's feature, s the seed's delta; at α = 0 every combination gives back h bit for bit.\n"
            "Set an option with `--set lerp.share=0.3`, for blends that `--blends` names.\n",
            "| blend | part | | options | source |",
            "|---|---|---|---|---|",
            *blends,
            "",
        ]
    )


def conformance_page() -> str:
    """`conformance.md`: attributes, methods and tests of each class of the conformance kit."""
    parts = [
        NOTICE,
        "# The conformance kit\n",
        "Subclass the class of your part's kind, set `spec`, and pytest checks the part. Attributes and methods",
        "below may be set and overridden freely. A test that is overridden must say why in `overrides`.\n",
        "```python",
        "from esper_core.testing import BlueprintConformance\n\n",
        "class TestGlow(BlueprintConformance):",
        '    spec = "glow"',
        "```\n",
        "`pytest --conformance=all` runs every case instead of a representative subset.\n",
    ]
    for name in sorted(testing.__all__, key=lambda name: (name != "Conformance", name)):
        kit = getattr(testing, name)
        before, _, attributes = inspect.cleandoc(kit.__doc__).partition("Attributes:\n")
        own = {key: value for key, value in vars(kit).items() if callable(value) and not key.startswith("_")}
        defaults = {
            key: value for key, value in vars(kit).items() if not callable(value) and isinstance(key, str)
            and not isinstance(value, property | classmethod | staticmethod)
        }  # fmt: skip
        parts += [f"## {name}\n", before.strip() + "\n"]
        if attributes:
            parts += ["| attribute | default | |", "|---|---|---|"]
            for line in re.sub(r"\n {5,}", " ", inspect.cleandoc("x\n" + attributes)).splitlines()[1:]:
                attribute, _, meaning = line.strip().partition(": ")
                if meaning:
                    default = _default(defaults.get(attribute))
                    parts.append(f"| `{attribute}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
            parts.append("")
        methods = {
            key: value for key, value in own.items()
            if inspect.isfunction(value) and not key.startswith(("test_", "pytest_")) and value.__doc__
        }  # fmt: skip
        if methods:
            parts += ["| method | |", "|---|---|"]
            parts += [f"| `{key}` | {_first(value.__doc__)} |" for key, value in methods.items()]
            parts.append("")
        tests = [key for key in own if key.startswith("test_")]
        parts += ["Tests: " + ", ".join(f"`{key}`" for key in tests) + ".\n"] if tests else []
    return "\n".join(parts)


def _default(value: object) -> str:
    if value is None or isinstance(value, property):
        return ""
    if isinstance(value, Mapping):
        return f"`{dict(value)}`"
    return f"`{value!r}`"


def _first(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("|", "\\|")


def cli_page() -> str:
    """`cli.md`: the help of every command, as the terminal prints it."""
    parts = [NOTICE, "# Command line\n", "The help of every command. `esper COMMAND --help` prints the same.\n"]
    root = click.Context(cli, info_name="esper", terminal_width=100)
    parts += ["```", cli.get_help(root), "```", ""]
    for verb in VERBS:
        command = cli.get_command(root, verb)
        assert command is not None
        parts += _help(command, click.Context(command, info_name=verb, parent=root, terminal_width=100), 2)
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context, level: int) -> list[str]:
    text = command.get_help(context).replace("\N{NO-BREAK SPACE}", " ")
    found = [
        f"{'#' * level} {context.command_path}",
        "",
        "```",
        *(line.rstrip() for line in text.splitlines()),
        "```",
        "",
    ]
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        found += _help(inner, click.Context(inner, info_name=name, parent=context, terminal_width=100), level + 1)
    return found


def _example(layout: str, shape: tuple[int, ...]) -> InjectionSpec:
    return InjectionSpec(name="example", channels=64, layout=layout, order=0, feature_shape=shape)


def _options(spec: PluginSpec) -> str:
    defaults = (
        f"{option.default:.3g}" if isinstance(option.default, float) else str(option.default) for option in spec.options
    )
    return ", ".join(f"`{option.name}={default}`" for option, default in zip(spec.options, defaults, strict=True))


PAGES = {
    "lifecycle.md": lifecycle_page,
    "public-api.md": public_api_page,
    "blueprints.md": blueprints_page,
    "sensors.md": sensors_page,
    "cli.md": cli_page,
    "conformance.md": conformance_page,
    "gallery.md": runpy.run_path(str(HERE / "gallery" / "gallery.py"))["page"],
}


def _mark(flag: bool) -> str:
    return "●" if flag else ""


def main(check: bool) -> int:
    """Write every page, or compare it; returns how many differed."""
    stale = 0
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"docs/{name} {'is not what the code says: run python docs/generate.py' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    stale_pages = main(checking)
    sys.exit(1 if checking and stale_pages else 0)
