"""Versions of what a run is computed with."""

import platform
from importlib.metadata import PackageNotFoundError, version

# Named one by one: a list of everything installed, or of the environment, may hold what should not be shown around.
_PACKAGES = ("lasp-torch", "torch", "numpy", "safetensors", "triton", "fla-core", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are here, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
