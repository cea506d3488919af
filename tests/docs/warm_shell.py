"""A shell in which Python and PyTorch have started already: `lasp`, `python` and `torchrun` are forks of this process.

The blocks of the documentation are run by bash as they stand. On the PATH are small programs by those names; each hands
its arguments, folder, variables and streams to a server, which forks a child that has everything imported. torchrun's
children are forks too, over gloo. Nothing else differs, but that training is shortened: see `shortened`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

# What the programs import when they are used; their forks have it.
import lasp.cli.check
import lasp.cli.generate
import lasp.cli.plan
import lasp.cli.train
import lasp.parallelize
import lasp.train.loop  # noqa: F401

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
    """Fork a child for everyone who comes; the child answers with its exit code."""
    import torch._dynamo  # noqa: F401 - as every optimizer does when it is made; here once

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
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if program == "torchrun":
        return _torchrun(arguments)
    return _forked([lambda: _program(program, arguments)])


def _torchrun(arguments: list[str]) -> int:
    """Start the processes of one host; all options but their number are those of an agent that is not there."""
    options, size = list(arguments), 1
    while options and options[0].startswith("--"):
        name = options.pop(0)
        value = options.pop(0)
        size = int(value) if name == "--nproc-per-node" else size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(number: int) -> int:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return _program("python", options)

    return _forked([lambda number=number: rank(number) for number in range(size)])  # type: ignore[misc]


def _forked(programs: list) -> int:  # type: ignore[type-arg]
    """Run each in a child; the first exit code that is not 0."""
    children = []
    for program in programs:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                code = program()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return next((code for code in codes if code), 0)


def _program(name: str, arguments: list[str]) -> int:
    # Streams that Python made for the parent may hold its text.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if name == "lasp" or arguments[:2] == ["-m", "lasp"]:
        return _lasp(arguments if name == "lasp" else arguments[2:])
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def _lasp(arguments: list[str]) -> int:
    from lasp.cli import launch, main

    # `lasp` starts processes of its own; here they are forks, which meet as torchrun's do.
    launch.launch = lambda words, count: _torchrun(["--nproc-per-node", str(count), "-m", "lasp", *words])
    sys.argv = ["lasp", *arguments]
    return main.main(shortened(arguments))
