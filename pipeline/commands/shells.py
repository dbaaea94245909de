"""The command that prints a shell's completion script, and how bash's words become click's."""

from __future__ import annotations

import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

COMPLETE_VARIABLE = "_KDPIPE_COMPLETE"  # click's, for a program called kdpipe

BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *[=/] ]] && compopt -o nospace
                [[ $value == *[[:space:]]* ]] && printf -v value %%q "$value"
                COMPREPLY+=("$value")
                ;;
        esac
    done < <(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class WholeWords(BashComplete):
    """
    Bash's completion with the command line as it is typed.

    Bash breaks words at `=` and `:`, so that `--set train.precision=b` comes as five words, and puts an answer in the place
    of the last of them. Here click is asked about the words between spaces, and the part that bash keeps is cut off its answers.
    """

    source_template = BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The whole words before the cursor's, and that one up to the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if len(words) > 1 and not line.endswith((" ", "\t")) else ""
        breaks = [character for character in "=:" if character in os.environ.get("COMP_BREAKS", "=:")]
        self._kept = 1 + max((incomplete.rfind(character) for character in breaks), default=-1)
        return words[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """The answers, without what bash has already; click's own lack the `--option=` before the value, and all of that is kept."""
        found = super().get_completions(args, incomplete)
        kept = incomplete[: self._kept]
        for item in found:
            item.value = item.value.removeprefix(kept)
        return found


@add_completion_class
class OpenEnds(ZshComplete):
    """Zsh's completion without a space after a folder or `key=`, where typing goes on."""

    source_template = ZshComplete.source_template.replace(
        'completions+=("$key")',
        'if [[ "$key" == *[=/] ]]; then compadd -U -S "" -- "$key"; else completions+=("$key"); fi',
    )


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """
    Print the script that lets SHELL complete commands, configs, keys, files.

    \b
    bash   echo 'eval "$(kdpipe completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(kdpipe completion zsh)"' >> ~/.zshrc
    fish   kdpipe completion fish > ~/.config/fish/completions/kdpipe.fish
    """  # noqa: D301 - the backspace is click's, and keeps the lines below it as they are
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(context.find_root().command, {}, "kdpipe", COMPLETE_VARIABLE).source(), nl=False)
