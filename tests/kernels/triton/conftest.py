"""The kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py).

On a GPU the tests compile several hundred kernels, about a second each. Before the first test, processes of their own
run a part each, for what that leaves in Triton's cache; what they find is not looked at. Under pytest-xdist (`-n 6`
fits one GPU of 80 GB) the workers compile for themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
PART = "LASP_TEST_PART"
collect_ignore = [] if ON_GPU else ["test_gpu.py"]
if not ON_GPU:
    import interpreted_bf16
    import interpreted_fast

    from lasp.kernels.triton.common.device import ready_to_interpret

    interpreted_bf16.install()
    interpreted_fast.install()
    ready_to_interpret()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def _memory_for_the_other_processes() -> Iterator[None]:
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PART in os.environ:
        part, parts = map(int, os.environ[PART].split("/"))
        items[:] = items[part::parts]


@pytest.fixture(scope="session", autouse=True)
def _compiled_in_parallel(request: pytest.FixtureRequest) -> None:
    here = str(Path(__file__).parent)
    items = [item for item in request.session.items if str(item.path).startswith(here)]
    parts = min(len(items) // 8, (os.cpu_count() or 1) - 2)
    if not ON_GPU or PART in os.environ or "PYTEST_XDIST_WORKER" in os.environ or parts < 2:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", here]
    processes = [
        subprocess.Popen(
            command, env=os.environ | {PART: f"{part}/{parts}"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for part in range(parts)
    ]
    for process in processes:
        process.wait()
