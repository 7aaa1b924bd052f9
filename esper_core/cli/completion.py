"""`esper completion`: the script that makes a shell complete commands, options and names of plugins."""

from __future__ import annotations

import click

_WHERE = {
    "bash": 'add to ~/.bashrc: eval "$(esper completion bash)"',
    "zsh": 'add to ~/.zshrc: eval "$(esper completion zsh)"',
    "fish": "esper completion fish > ~/.config/fish/completions/esper.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_WHERE)))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    bash  add to ~/.bashrc: eval "$(esper completion bash)"
    zsh   add to ~/.zshrc: eval "$(esper completion zsh)"
    fish  esper completion fish > ~/.config/fish/completions/esper.fish
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None, "click completes every shell of the choices"
    command = click.get_current_context().find_root().command
    click.echo(f"# {_WHERE[shell]}")
    click.echo(maker(command, {}, "esper", "_ESPER_COMPLETE").source())
