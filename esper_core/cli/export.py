"""`esper export`: the grown model as a plain program, for use without Esper."""

from __future__ import annotations

import click

from esper_core.cli.arguments import find_run, host_option, run_argument, weights_option
from esper_core.cli.context import current_registry
from esper_core.cli.output import print_json, say

FORMATS = ("torch", "torch-export", "onnx", "peft")


@click.command()
@run_argument()
@click.option("--format", "form", type=click.Choice(FORMATS), default="torch", show_default=True, help="What to write.")
@click.option("--out", metavar="PATH", help="Where to write it.  [default: export/ in the run's folder]")
@click.option("--merge", is_flag=True, help="Merge seeds around layers into the layers' weights, where they can be.")
@weights_option
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def export(run: str, form: str, out: str | None, merge: bool, weights: str, code: str, as_json: bool) -> None:
    """Write the grown model of RUN for use without Esper: seeds built in, no hooks.

    \b
    torch         a folder with model.py and model.safetensors, which need torch only
    torch-export  a .pt2 file for torch.export.load
    onnx          an .onnx file
    peft          the lora seeds around layers alone, as an adapter that peft loads

    What was written is read back and compared with the model. With --merge the result has the bare host's parameters
    and FLOPs where every seed is an update of a weight: lora, lora_conv, dora, ia3, vera.

    A run of `grow` in Python, whose module is your own, needs --host module:FILE.py:CLASS. What was written is then
    compared on noise, since no folder holds your data.
    """
    folder = find_run(run)
    from esper_core.tolaria.export import describe_export, export_run
    from esper_core.tolaria.own_code import code_named

    with code_named(code):
        found = export_run(folder, form, out, merge=merge, weights=weights, registry=current_registry())
    if as_json:
        print_json(describe_export(found))
        return
    say(found.path)
    batch = "any batch size" if found.fixed_batch is None else f"batches of {found.fixed_batch} only"
    agrees = f"within {found.difference:.1g} of the model on {found.examples} {'made-up ' * found.noise}examples"
    if merge:
        say(f"merged {len(found.merged)} seeds into their layers", err=True)
        for path, reason in found.unmerged.items():
            say(f"not merged: {path}: {reason}", err=True)
    say(f"takes {', '.join(found.inputs)}, {batch}; {agrees}", err=True)
