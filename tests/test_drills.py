"""Short forms of the drills in tools/drills: what they do for minutes, for seconds.
Two more are beside what they drill, in test_training and test_sweeps."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRILLS = Path(__file__).parents[1] / "tools" / "drills"


def own_mounts() -> bool:
    "Whether this process may mount something in a mount namespace of its own."
    return os.geteuid() == 0 and bool(shutil.which("unshare")) and subprocess.run([
        "unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not own_mounts(), reason="mounts in a namespace of its own need root")


def run(name, *arguments):
    done = subprocess.run([sys.executable, str(DRILLS / f"{name}.py"), *arguments],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_samples_and_latents_end_with_the_same_bytes():
    assert run("kill_sampling", "--kills", "3").count("every file has the same bytes, nothing is left over") == 4


@pytest.mark.slow
@needs_mounts
def test_a_full_disk_loses_nothing_and_is_one_line():
    assert "5 of 5 full disks" in run("full_disk", "--points", "1", "--only", "train,sample,latents,evaluate")


@pytest.mark.slow
@needs_mounts
def test_a_clock_that_is_set_stops_nothing():
    assert "training and sweep finished, list right throughout" in run("set_clock")


@pytest.mark.slow
def test_memory_stays_flat():
    assert run("memory", "--steps", "600", "--moves", "40").count("MiB, then") == 5
