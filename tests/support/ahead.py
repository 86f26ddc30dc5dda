"""Work that is done in other processes while tests run, in what time they leave to the processors.

Threads would see what a test changes for itself, such as CXX, and their memory would be counted as its own.
"""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def start_pool():
    """Return a pool of as many processes as there are processors."""
    context = multiprocessing.get_context("spawn")
    processes = os.cpu_count() or 1
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)
    for _ in range(processes):  # starts one each: those that start later see what a test has changed by then
        pool.submit(os.getpid)
    return pool


def _prepare():
    os.nice(19)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """End, too, when the process of the tests is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
