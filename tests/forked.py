"""`python -m MODULE` and `python FILE` without the seconds in which a new interpreter loads PyTorch: by a fork of this.

Where this process sees GPUs they are new interpreters: no fork of one that has looked at a GPU goes backward.

Arguments, environment, folder, files, session and signals are as a new interpreter has them, and what it starts in turn
(the processes of `lasp train`, those of torchrun) is forked likewise. What only a new interpreter shows, as what is
imported when and how one ends by itself, is for the tests that start one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch._dynamo  # of what optimizers load when first used

_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def _fork_or_execute(self: subprocess.Popen[Any], args: Any, *given: Any) -> None:
    """Stands for what subprocess.Popen calls to start a child, once its pipes are made."""
    program, *words = [args] if isinstance(args, str | bytes) else [os.fspath(word) for word in args]
    words = words[words[:1] == ["-u"] :]
    if torch.cuda.is_available() or program != sys.executable or not (words[0] == "-m" or words[0].endswith(".py")):  # type: ignore[arg-type]
        return _execute(self, args, *given)
    how = inspect.signature(_execute).bind(self, args, *given).arguments
    self.pid = os.fork()
    if self.pid == 0:
        _become(words, how)  # type: ignore[arg-type]
    self._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    self._close_pipe_fds(*(how[name] for name in pipes))  # type: ignore[attr-defined]


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen that forks for `[sys.executable, "-m", MODULE, *ARGUMENTS]`, or a file in place of a module."""

    _execute_child = _fork_or_execute


def run(
    command: Sequence[str], *, new: bool = False, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """subprocess.run of such a command, its output captured as text; `new`: by a new interpreter."""
    start = subprocess.Popen if new else Popen
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def _become(words: Sequence[str], how: dict[str, Any]) -> NoReturn:
    """Be an interpreter that was started with these words, and end as it does."""
    code: Any = 1
    try:
        gc.freeze()  # nothing of this process's past is ended here
        subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
        _take_files(how)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if how["start_new_session"]:
            os.setsid()
        if how["cwd"] is not None:
            os.chdir(how["cwd"])
        if how["env"] is not None:
            os.environ.clear()
            os.environ.update(how["env"])
        atexit._clear()
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *warning: print(warnings.formatwarning(*warning[:4]), file=sys.stderr, end="")
        torch.use_deterministic_algorithms(False)
        is_module = words[0] == "-m"
        sys.argv[:] = words[is_module:]
        if is_module:
            sys.modules.pop(sys.argv[0], None)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _take_files(how: dict[str, Any]) -> None:
    """Standard input and outputs, and of the others those that are to be handed on."""
    for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if how[name] != -1:
            os.dup2(how[name], number)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in (nothing, *how["pass_fds"]):
            with contextlib.suppress(OSError):  # what listed them
                os.fstat(number)
                os.dup2(nothing, number)  # not closed: objects that are still there take the number for theirs
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
