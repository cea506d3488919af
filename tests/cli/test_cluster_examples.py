"""The Slurm script, run with stand-ins for Slurm's own commands, and the Kubernetes example's command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import command
from torch.distributed.run import get_args_parser as torchrun_arguments

from lasp.cli import train as train_command
from lasp.train.metrics import read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"
# Each task gets its number as Slurm's would; the code is the highest of all tasks', as srun's is.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=() code=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do one=0; wait "$pid" || one=$?; ((one > code)) && code=$one; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; echo never-asked; else echo "$@" >> "$SAID"; fi
"""


def run_script(folder: Path, lasp: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script under bash with two tasks on this machine; `lasp` is what the command of that name does."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("lasp", f"#!/usr/bin/env bash\n{lasp}\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SAID": str(folder / "said"),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    script = ["bash", str(EXAMPLES / "slurm" / "train.sbatch"), *arguments]
    environment = {**os.environ, **slurm, **variables}
    return subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)


def test_the_slurm_script_trains(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--steps", "2")[1:]
    done = run_script(tmp_path, f'exec {sys.executable} -m lasp.cli.main "$@"', *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu: dp 1 x sp 2" in done.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == [1, 2]
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize(("code", "again"), [(0, False), (64, False), (70, False), (71, True), (75, True), (137, True)])
def test_the_slurm_script_comes_back_where_that_helps(tmp_path: Path, code: int, again: bool) -> None:
    fails = f"((RANK == 1)) && exit {code}; exit 0"
    assert run_script(tmp_path, fails).returncode == code
    said = tmp_path / "said"
    assert said.exists() == again and (not again or said.read_text() == f"requeue {os.getpid()}\n")
    if again:
        said.unlink()
        run_script(tmp_path, fails, SLURM_RESTART_COUNT="20")
        assert not said.exists()


def test_the_kubernetes_example_can_be_run() -> None:
    text = (EXAMPLES / "kubernetes" / "pytorchjob.yaml").read_text()
    # Written as YAML's flow sequences, lists are JSON too.
    start, options = (json.loads(re.search(rf" {name}: (\[.*?\])", text, re.DOTALL)[1]) for name in ("command", "args"))  # type: ignore[index]
    assert start[0] == "torchrun" and start[-3:] == ["-m", "lasp", "train"]
    operator = {"$(RANK)": "1", "$(MASTER_ADDR)": "lasp-master-0", "$(MASTER_PORT)": "23456"}
    given = torchrun_arguments().parse_args([*(operator.get(word, word) for word in start[1:-3]), "-m", "lasp"])
    assert (given.node_rank, given.master_addr, given.master_port) == (1, "lasp-master-0", 23456)
    pods, processes = int(given.nnodes), int(given.nproc_per_node)
    assert sum(int(found) for found in re.findall(r" replicas: (\d+)", text)) == pods
    assert int(re.search(r"gpu: (\d+)", text)[1]) == processes  # type: ignore[index]
    # Nothing that is loaded as a pickle, and nobody else's connections.
    assert given.rdzv_backend == "static" and "elasticPolicy:" not in text and not given.standalone
    assert re.search(
        r'kind: NetworkPolicy.*podSelector: &pods.*policyTypes: \["Ingress"\].*podSelector: \*pods', text, re.S
    )
    assert options[-2:] == ["--resume", "auto"]
    config = train_command.arguments_of(options[:-2]).settings
    config.validate(pods * processes)
    assert config.num_dp(pods * processes) == 2
    mounts, volumes = (set(re.findall(rf"- name: (\w+)\n +{next_}", text)) for next_ in ("mountPath", "(?:pers|empty)"))
    assert mounts == volumes
