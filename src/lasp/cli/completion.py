"""`lasp completion`: a script for the shell, in which every command, option and choice stands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from lasp.cli.command_lines import COMMAND_LINES, Option, command_line
from lasp.errors import ConfigError
from lasp.terminal import say

_USAGE = """usage: lasp completion bash|zsh|fish

Print a script that completes lasp's commands, options and their choices in that shell:

  lasp completion bash > lasp.bash        then: . ./lasp.bash
  lasp completion zsh > _lasp             into a folder of $fpath
  lasp completion fish > lasp.fish        into ~/.config/fish/completions"""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp completion SHELL`."""
    if list(arguments) in (["-h"], ["--help"]):
        say(_USAGE)
        return 0
    if len(arguments) != 1 or arguments[0] not in _SHELLS:
        raise ConfigError(f"lasp completion needs the name of a shell, one of {', '.join(_SHELLS)}")
    say(_SHELLS[arguments[0]]({line: command_line(line).options for line in COMMAND_LINES}))
    return 0


Lines = dict[tuple[str, ...], list[Option]]


def _words(lines: Lines) -> dict[str, list[str]]:
    """Words that may follow each word, or pair of words, after `lasp`: commands, then options."""
    from lasp.cli.main import COMMANDS

    found: dict[str, list[str]] = {"": [*COMMANDS, "--help", "--version"], "completion": list(_SHELLS)}
    for line, options in lines.items():
        if len(line) == 2:
            found.setdefault(line[0], []).append(line[1])
        found[" ".join(line)] = [name for option in options for name in option.names]
    return found


def _choices(lines: Lines) -> dict[str, list[str]]:
    """The words that may follow an option, where they are few. An option has the same ones in all commands."""
    found: dict[str, set[str]] = {}
    for options in lines.values():
        for option in options:
            for name in option.names:
                found.setdefault(name, set()).update(option.choices)
    return {name: sorted(words) for name, words in found.items() if words}


def _bash(lines: Lines) -> str:
    def cases(table: dict[str, list[str]]) -> str:
        return "\n".join(f"    {shlex.quote(word)}) words={shlex.quote(' '.join(of))} ;;" for word, of in table.items())

    return f"""# lasp completion for bash
_lasp() {{
  local words='' current="${{COMP_WORDS[COMP_CWORD]}}" line="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{cases(_choices(lines))}
  esac
  if [ -z "$words" ]; then
    if [ "$COMP_CWORD" -eq 1 ]; then line=''; fi
    case "$COMP_CWORD-$line" in [12]-*) ;; *-data|*-bench) line="$line ${{COMP_WORDS[2]}}" ;; esac
    case "$line" in
{cases(_words(lines))}
    esac
    case "$line/$current" in ''/*|completion/*|data/*|bench/*|*/-*) ;; *) words='' ;; esac
  fi
  if [ -n "$words" ]; then COMPREPLY=( $(compgen -W "$words" -- "$current") ); fi
}}
complete -o default -F _lasp lasp"""


def _zsh(lines: Lines) -> str:
    return f"#compdef lasp\nautoload -U +X bashcompinit && bashcompinit\n{_bash(lines)}"


def _fish(lines: Lines) -> str:
    from lasp.cli.main import COMMANDS

    said = ["# lasp completion for fish"]
    for name, text in COMMANDS.items():
        said.append(f"complete -c lasp -n __fish_use_subcommand -f -a {name} -d {shlex.quote(text)}")
    for line in lines:
        if len(line) == 2:
            said.append(f"complete -c lasp -n '__fish_seen_subcommand_from {line[0]}' -f -a {line[1]}")
    said.append(f"complete -c lasp -n '__fish_seen_subcommand_from completion' -f -a {shlex.quote(' '.join(_SHELLS))}")
    for line, options in lines.items():
        others = {other[0] for other in lines if other != line and line[0] in other[1:]}  # `bench train` is not `train`
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in line)
        seen += "".join(f"; and not __fish_seen_subcommand_from {word}" for word in sorted(others))
        for option in options:
            follows = f" -x -a {shlex.quote(' '.join(option.choices))}" if option.choices else ""
            follows = follows or (" -r" if option.values else "")
            for name in option.names:
                told = shlex.quote(option.text.split(". ")[0])
                said.append(f"complete -c lasp -n {shlex.quote(seen)} -l {name.removeprefix('--')}{follows} -d {told}")
    return "\n".join(said)


_SHELLS: dict[str, Callable[[Lines], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
