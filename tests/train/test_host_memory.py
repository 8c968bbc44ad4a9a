"""A program of ours keeps the memory that it frees."""

import subprocess
import sys

import pytest

_PAGE_FAULTS = """
import resource, threading
import numpy as np
from attnlab.train.memory import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        [np.ones(5 * 2**20, np.float32) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():  # in a thread, as XLA does: heaps of threads are given back by rules of their own
    faults(3)
    given_back = faults(5)
    keep_freed_memory()
    faults(3)
    print(given_back, faults(5))

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_is_freed_is_kept_for_what_comes_next():
    done = subprocess.run([sys.executable, "-c", _PAGE_FAULTS], capture_output=True, text=True, check=True, timeout=120)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 500
    assert kept < 50
