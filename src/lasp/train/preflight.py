"""Refuses before a command begins: files that could not be written at the end, devices that are not there."""

import importlib
import os
from pathlib import Path

from lasp.errors import ConfigError


def check_target(option: str, path: Path | None) -> None:
    """Raises ConfigError if no file can be written at `path`. What is there stays as it is."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: the folder of {path} does not exist")
    if path.is_dir():
        raise ConfigError(f"{option} must name a file, and {path} is a folder")
    existed = os.path.lexists(path)
    if existed and not path.is_file():
        return  # a device or a pipe: to open it would be to use it
    try:
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path}: {error.strerror}") from error


def check_picture(option: str, path: Path | None) -> None:
    """Raises ConfigError if matplotlib cannot draw to `path`: it is not there, or does not know the ending."""
    if path is None:
        return
    try:
        canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    except ImportError as error:
        raise ConfigError(f"{option} draws with matplotlib, which is not installed: pip install matplotlib") from error
    endings = sorted(canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ConfigError(f"{option} must end in one of .{', .'.join(endings)}; got {path}")
    check_target(option, path)


def check_gpus(device: str, least: int) -> None:
    """Raises ConfigError if `device` is "cuda" and this machine has fewer GPUs than `least`."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < least:
        raise ConfigError(
            f"--device cuda needs {least} GPU{'s' * (least > 1)} on this machine, found {torch.cuda.device_count()}"
        )


def check_seed(name: str, seed: int) -> None:
    """Raises ConfigError for a seed that PyTorch's generators do not take."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"{name} must be a number of at most 64 bits, got {seed}")


def check_folder(name: str, path: Path | None) -> None:
    """Raises ConfigError for a path at which no folder can be, because it or what it is in is a file."""
    if path is None:
        return
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise ConfigError(f"{name} must be a folder, and {there} is none")


def check_text(name: str, text: str | None) -> None:
    """Raises ConfigError for bytes of the command line that are no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be text in UTF-8, got {text!r}") from None
