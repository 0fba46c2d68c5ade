"""Test a process that forks while another of its threads simulates: the child simulates too."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The fork is asked for when the other thread is inside of a run, which the lock guards. A child
# that waits for ever is ended by its alarm.
_SCRIPT = """
import os, signal, threading, types
import torch
from flashcore import attention
from flashcore.sim import run

inside = threading.Event()
load = run.load_kernel

def telling(source):
    library = load(source)
    def fc_sim_run(*arguments):
        inside.set()
        library.fc_sim_run(*arguments)
    bytes_of = library.fc_sim_params_bytes
    return types.SimpleNamespace(fc_sim_params_bytes=bytes_of, fc_sim_run=fc_sim_run)

def simulate():
    q = torch.ones(2, 2, 300, 16, dtype=torch.float16)
    assert bool((attention(q, q, q, backend="sim") == 1).all())

torch.set_num_threads(1)
simulate()  # it is built
run.load_kernel = telling
other = threading.Thread(target=simulate)
other.start()
assert inside.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(60)
    simulate()
    os._exit(7)
_, status = os.waitpid(child, 0)
other.join()
simulate()
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7, status
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing forks on Windows")
@pytest.mark.thorough
def test_a_child_of_a_fork_during_a_simulation_simulates() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
