"""The batch script for SLURM: its syntax, and its decisions with stand-ins for the cluster."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "train.slurm"
STOPPED = '{"outcome": "stopped", "epochs_before": 3, "signal": "SIGUSR1", "message": ""}'
FINISHED = '{"outcome": "finished", "epochs_before": 3, "signal": null, "message": ""}'

pytestmark = pytest.mark.skipif(
    os.name == "nt" or shutil.which("bash") is None, reason="needs bash"
)

# Two tasks, started one after the other; the highest code of any is the code of all.
SRUN = """
worst=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@"
    code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
SCONTROL = 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> scontrol.log; fi'
PYTHON = """
echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS $*" >> python.log
[ -e runs/slurm-4711/outcome.json ] && [ "$RANK" = 0 ] && echo stale >> python.log
[ -n "$TOLD" ] && mkdir -p runs/slurm-4711 && echo "$TOLD" > runs/slurm-4711/outcome.json
exit $CODE
"""


def submit(folder, *, code=0, told="", **environment):
    """Run the script as a job, with the folder as its working directory; return its code."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        path = tools / name
        path.write_text(f"#!/bin/bash\n{text}", encoding="utf-8")
        path.chmod(0o755)
    job = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "8",
        "CODE": str(code), "TOLD": told,
    }  # fmt: skip
    command = ["bash", str(SCRIPT), "my data/train", "--epochs", "60"]
    return subprocess.run(command, cwd=folder, env=job | environment, check=False).returncode


def queued_again(folder):
    log = folder / "scontrol.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_each_task_is_told_who_it_is(tmp_path):
    assert submit(tmp_path, told=FINISHED) == 0
    called = "-m cellseg train my data/train --epochs 60 --runs-dir runs --name slurm-4711"
    assert (tmp_path / "python.log").read_text(encoding="utf-8").splitlines() == [
        f"0/2 0 node7:24711 8 {called}",
        f"1/2 1 node7:24711 8 {called}",
    ]


@pytest.mark.parametrize(
    ("reason", "code", "told", "environment", "exit_code", "again"),
    [
        ("finished", 0, FINISHED, {}, 0, False),
        ("stopped by the signal", 138, STOPPED, {}, 0, True),
        ("killed by the signal before a handler was in place", 138, "", {}, 0, True),
        ("stopped, and another process's code won", 143, STOPPED, {}, 0, True),
        ("failed", 1, "", {}, 1, False),
        ("stopped too often", 138, STOPPED, {"SLURM_RESTART_COUNT": "50"}, 138, False),
        ("stopped for the last time", 138, STOPPED, {"SLURM_RESTART_COUNT": "49"}, 0, True),
    ],
)
def test_a_job_queues_itself_again_if_its_time_was_up(
    reason, code, told, environment, exit_code, again, tmp_path
):
    assert submit(tmp_path, code=code, told=told, **environment) == exit_code
    assert queued_again(tmp_path) == (["requeue 4711"] if again else [])


def test_what_an_earlier_job_said_does_not_count(tmp_path):
    old = tmp_path / "runs" / "slurm-4711" / "outcome.json"
    old.parent.mkdir(parents=True)
    old.write_text(STOPPED, encoding="utf-8")
    assert submit(tmp_path, code=1) == 1
    assert queued_again(tmp_path) == []
    assert "stale" not in (tmp_path / "python.log").read_text(encoding="utf-8")
