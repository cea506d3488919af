"""Tests with accelerate and PEFT, which `make oracle` installs; without them there is nothing here."""

from __future__ import annotations

import importlib.util

collect_ignore_glob: list[str] = []

for _package, _tests in (("accelerate", "test_attach.py"), ("peft", "test_peft.py")):
    if importlib.util.find_spec(_package) is None:
        collect_ignore_glob.append(_tests)
