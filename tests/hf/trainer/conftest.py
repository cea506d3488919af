"""Tests with accelerate, PEFT and TRL, which `make oracle` installs; without them there is nothing here."""

from __future__ import annotations

import importlib.util

_NEEDED = {
    "test_attach.py": ("accelerate", "peft"),
    "test_fsdp_over_devices.py": ("accelerate",),
    "test_peft.py": ("peft",),
    "test_quantized.py": ("peft", "accelerate", "bitsandbytes"),
    "test_sft.py": ("trl", "datasets", "accelerate", "peft"),
}
collect_ignore_glob = [
    tests for tests, packages in _NEEDED.items() if any(importlib.util.find_spec(name) is None for name in packages)
]
