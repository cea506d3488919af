"""Gives scripts the folder that an argument names for their results."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """Returns a folder, made if there is none: before the work whose results it is for, which may take long."""
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path
