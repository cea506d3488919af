"""A shell in which Python and PyTorch have started already: `lasp`, `python` and `torchrun` are forks of this process.

The blocks of the documentation are run by bash as they stand. On the PATH are small programs by those names; each hands
its arguments, folder, variables and streams to a server, which forks what a new interpreter would be (`forked`), and so
do the processes that it starts. Nothing else differs, but that training is shortened: see `shortened`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import forked

# What the programs import when they are used; their forks have it.
# ruff: noqa: F401
import torch.distributed.run

import lasp.cli.check
import lasp.cli.generate
import lasp.cli.plan
import lasp.cli.train
import lasp.parallelize
import lasp.train.trainer

_CLIENT = """#!{python} -SE
import array, json, os, socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect({door!r})
told = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
door.sendmsg([len(told).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
door.sendall(told)
sys.exit(int(door.makefile().read() or 1))
"""
_NAMES = ("lasp", "python", "torchrun")
# Of a model that trains a step in milliseconds.
_SMALL = ["d_model", "32", "num_layers", "2", "num_heads", "2", "key_dim", "16", "value_dim", "16", "ffn_dim", "64"]
_SHORTER = 20


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of `lasp`, with a twentieth of the steps, a small model and little to score and to generate."""
    if arguments[:1] != ["train"] or "--help" in arguments:
        return arguments
    changed = list(arguments)
    if "--steps" in changed:
        where = changed.index("--steps") + 1
        changed[where] = str(max(2, int(changed[where]) // _SHORTER))
    elif "--resume" not in changed:
        changed += ["--steps", "4"]
    if "--save-every" in changed:
        where = changed.index("--save-every") + 1
        changed[where] = str(max(1, int(changed[where]) // _SHORTER))
    if "--eval-sequences" not in changed:
        changed += ["--eval-sequences", "4", "--sample.num-tokens", "4"]
    is_new = "--resume" not in changed or "auto" in changed
    if is_new and "--init-from" not in changed:
        if "--model.overrides" in changed:
            where = changed.index("--model.overrides") + 1
            changed[where:where] = [word for pair in _pairs(_SMALL) if pair[0] not in changed for word in pair]
        elif "--model.family" not in changed:
            changed += ["--model.overrides", *_SMALL]
        if "--data.path" not in changed and "--config" not in changed:
            changed += ["--data.path", "my/texts"]
    return changed


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(words[::2], words[1::2], strict=True)


class WarmShell:
    """Run shell text with warm programs; use as a context."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._door = socket.socket(socket.AF_UNIX)
        self._server = 0

    def __enter__(self) -> WarmShell:
        place = str(Path(self._folder.name) / "door")
        self._door.bind(place)
        self._door.listen(8)
        for name in _NAMES:
            program = Path(self._folder.name) / name
            program.write_text(_CLIENT.format(python=sys.executable, door=place))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self._server = os.fork()
        if self._server == 0:
            _serve(self._door)
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)
        self._door.close()
        self._folder.cleanup()

    def run(self, text: str, folder: Path, deadline_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run it by bash in `folder`, which ends at the first command that fails."""
        path = os.pathsep.join([self._folder.name, os.environ["PATH"]])
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=os.environ | {"PATH": path, "N": "0", "HOST": "127.0.0.1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=deadline_s,
        )


def _serve(door: socket.socket) -> None:
    """Fork a child for everyone who comes; the child answers with the exit code."""
    while True:
        caller, _ = door.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            door.close()
            code = 1
            with contextlib.suppress(BaseException):
                code = _answer(caller)
            caller.sendall(str(code).encode())
            os._exit(0)
        caller.close()


def _answer(caller: socket.socket) -> int:
    size, rights, *_ = caller.recvmsg(8, socket.CMSG_SPACE(12))
    streams = array.array("i", rights[0][2])
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += caller.recv(1 << 16)
    program, arguments, folder, variables = json.loads(told)
    with socket.socket() as free:  # where the processes of torchrun meet
        free.bind(("127.0.0.1", 0))
        variables["PET_MASTER_PORT"] = str(free.getsockname()[1])
    command = [sys.executable, *_words(program, arguments)]
    process = forked.Popen(command, stdin=streams[0], stdout=streams[1], stderr=streams[2], cwd=folder, env=variables)
    return process.wait() % 256


def _words(program: str, arguments: list[str]) -> list[str]:
    """Words that Python is given, the arguments of `lasp` shortened wherever it stands."""
    words = {"python": [], "lasp": ["-m", "lasp"], "torchrun": ["-m", "torch.distributed.run"]}[program] + arguments
    for after in range(2, len(words)):
        if words[after - 2 : after] == ["-m", "lasp"]:
            return words[:after] + shortened(words[after:])
    return words
