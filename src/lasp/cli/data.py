"""`lasp data build`: text to token shards."""

from collections.abc import Sequence

from lasp.cli.arguments import parse
from lasp.errors import ConfigError
from lasp.terminal import Terminal
from lasp.train.build_data import BuildOptions, build


def main(arguments: Sequence[str]) -> int:
    """Run `lasp data ARGUMENTS`."""
    if not arguments or arguments[0] != "build":
        if arguments and arguments[0] in ("-h", "--help"):
            arguments = ["build", "--help"]
        else:
            raise ConfigError("usage: lasp data build SOURCE... --out FOLDER; lasp data build --help lists all")
    build(parse(BuildOptions, arguments[1:], "lasp data build"), Terminal(soft_wrap=True))
    return 0
