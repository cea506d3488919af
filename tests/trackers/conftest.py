"""Tests with the real trackers, installed into a folder of their own: `make trackers` runs them.

They bring some 250 MB, so the default test environment does not have them, and without them there is nothing to
collect here.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = (
    ["test_*.py"] if any(importlib.util.find_spec(name) is None for name in ("tensorboard", "wandb")) else []
)
