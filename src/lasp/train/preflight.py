"""What commands refuse before they begin: files that could not be written at the end, devices that are not there."""

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
