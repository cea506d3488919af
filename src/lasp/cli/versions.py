"""`lasp --version`: this package, and what its results depend on. PyTorch is not loaded to ask it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from lasp import __version__

# Distribution -> what for. Those that are missing are no fault: "reference" and "torch" run without.
_OTHERS = {
    "torch": "",
    "triton": 'backend "triton"',
    "fla-core": 'backend "fla"',
    "numpy": "",
    "safetensors": "",
}


def versions() -> str:
    """Return a line for each package: its name and version, or that it is not installed."""
    lines = [f"lasp {__version__}", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name, purpose in _OTHERS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        lines.append(f"{name} {found}" + (f" ({purpose})" if purpose else ""))
    return "\n".join(lines)
