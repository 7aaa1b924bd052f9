"""`esper hosts show`: the injection points of a host, with sizes and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from esper_core.cli.arguments import parse_settings
from esper_core.cli.context import current_registry
from esper_core.cli.output import InOrder, make_console, make_table, print_json

if TYPE_CHECKING:
    from esper_core.leyline.host import HostProtocol


@click.group(cls=InOrder)
def hosts() -> None:
    """Show where hosts can grow."""


def _complete_hosts(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [part.name for part in current_registry().specs("host") if part.name.startswith(incomplete)]


@hosts.command("show")
@click.argument("reference", metavar="HOST", shell_complete=_complete_hosts)
@click.option("--input-shape", metavar="C,H,W", help="one example without the batch  [default: the host's own]")
@click.option("--outputs", type=click.IntRange(1), metavar="N", help="classes or tokens  [default: the host's own]")
@click.option("--seed", default=0, metavar="N", help="of the initial weights")
@click.option("--set", "settings", metavar="HOST.OPTION=VALUE", multiple=True, help="an option of the host; repeatable")
@click.option("--around", is_flag=True, help="print the points around layers, which --slots around:… chooses")
@click.option("--json", "as_json", is_flag=True, help="print JSON for programs")
def show(
    reference: str, input_shape: str | None, outputs: int | None, seed: int, settings: tuple[str, ...], around: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the injection points of HOST with channels, layout, role, tags, parameters and FLOPs.

    Parameters and FLOPs of a point are those of the module before it, for one example; a multiply-add counts as
    two.

    \b
    esper hosts show cnn
    esper hosts show timm:resnet18 --input-shape 1,8,8 --outputs 10
    esper hosts show transformers:gpt2 --set transformers.layers=2
    esper hosts show transformers:bert --around
    """
    shape = _parse_shape(input_shape)
    host = _build(reference, shape, outputs, seed, parse_settings(settings))
    data = describe_host(host, reference, shape, around=around)
    if as_json:
        print_json(data)
    else:
        _print(data)


def describe_host(
    host: HostProtocol, reference: str, shape: tuple[int, ...] | None = None, *, around: bool = False
) -> dict[str, Any]:
    """What `hosts show` says, as JSON-compatible data.

    Args:
        host: any host.
        reference: as the user typed it.
        shape: of one example; None if the host knows one.
        around: the points around its layers, instead of those behind its modules.

    Raises:
        EsperError: the host offers no points around its layers.
    """
    import attrs

    from esper_core.kasmina.around import AroundHost, path_of
    from esper_core.kasmina.ledger import count_parameters
    from esper_core.leyline.errors import EsperError

    flops, each = _count(host, shape)
    points = []
    specs, modules = host.injection_specs, dict(host.module.named_modules())
    if around:
        if not isinstance(host, AroundHost):
            raise EsperError(f"{reference} offers no points around its layers", "a host made by host_from_module")
        specs = host.around_specs()
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].order, item[0])):
        path = path_of(name)
        module = modules.get(path)
        data = {**attrs.asdict(spec), "tags": sorted(spec.tags), "feature_shape": list(spec.feature_shape)}
        points.append({**data, "params": count_parameters(module) if module else None, "flops": each.get(path)})
    return {
        "host": reference,
        "params": count_parameters(host.module),
        "flops": flops,
        "notes": list(getattr(host, "notes", ())),
        "points": points,
    }


def _build(
    reference: str, shape: tuple[int, ...] | None, outputs: int | None, seed: int, settings: dict[str, str]
) -> HostProtocol:
    from esper_core.leyline.errors import BadOption
    from esper_core.registry import split_reference

    name, argument = split_reference(reference)
    registry = current_registry()
    own = registry.find("host", name).spec.name
    foreign = [key for key in settings if key.partition(".")[0] not in (own, name)]
    if foreign:
        raise BadOption(f"--set {foreign[0]} is no option of the host {own}", f"{own}.OPTION=VALUE")
    options = {key.partition(".")[2]: value for key, value in settings.items()}
    host: HostProtocol = registry.build(
        "host", name, argument, outputs=outputs, input_shape=shape, seed=seed, options=options
    )
    return host


def _count(host: HostProtocol, shape: tuple[int, ...] | None) -> tuple[int | None, dict[str, int]]:
    """Forward FLOPs of the host and of its modules by path; None if no example is known."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    example = getattr(host, "example", None)
    if example is None and shape is None:
        return None, {}
    host.module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        host.forward_with_slots(torch.zeros(1, *(shape or ())) if example is None else example)
    root = type(host.module).__name__ + "."
    counts = counter.get_flop_counts()
    return counter.get_total_flops(), {
        path.removeprefix(root): sum(count.values()) for path, count in counts.items() if path.startswith(root)
    }


def _parse_shape(text: str | None) -> tuple[int, ...] | None:
    from esper_core.leyline.errors import BadOption

    if text is None:
        return None
    parts = [part.strip() for part in text.replace("x", ",").replace("×", ",").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadOption(f"--input-shape {text!r} cannot be read", "positive whole numbers", "--input-shape 3,32,32")
    return tuple(int(part) for part in parts)


def _print(data: dict[str, Any]) -> None:
    from rich.text import Text

    console = make_console()
    heading = Text(data["host"], "bold")
    heading.append(f"  {data['params']:,} parameters", "default")
    heading.append(f", {_short(data['flops'])} FLOPs an example" if data["flops"] else "")
    console.print(heading)
    for note in data["notes"]:
        console.print(Text(f"note: {note}", "yellow"))
    heads = ["point", "layout", "size", "channels", "after", "params", "FLOPs", "tags"]
    rows = [
        [
            p["name"], p["layout"], _positions(p), str(p["channels"]), p["role"].removeprefix("after_"),
            _short(p["params"]), _short(p["flops"]), " ".join(p["tags"]),
        ]
        for p in data["points"]
    ]  # fmt: skip
    if console.width >= 110:
        heads.insert(5, "region")
        for row, p in zip(rows, data["points"], strict=True):
            row.insert(5, p["region"])
    if any(p["layer"] for p in data["points"]):  # their names are long, and what is typed
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    table = make_table(*heads, header=True)
    for column, head in zip(table.columns, heads, strict=True):
        column.justify = "right" if head in ("size", "channels", "params", "FLOPs") else "left"
        column.no_wrap = head not in ("point", "tags")
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _positions(point: dict[str, Any]) -> str:
    """`56×56` for a map, `197` for a sequence."""
    shape = point["feature_shape"]
    return "×".join(map(str, shape[1:] if point["layout"] == "NCHW" else shape[:-1]))


def _short(count: int | None) -> str:
    """A count in three digits or so: 1,234 as 1.23k."""
    if count is None:
        return ""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)
