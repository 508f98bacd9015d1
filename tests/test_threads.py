# SPDX-License-Identifier: Apache-2.0
"""The thread team: started by need, asleep when idle, shared by threads, new after a fork."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fullbeam import _core, ops


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_import_starts_no_thread_and_no_torch_and_is_quick() -> None:
    printed = run_python(
        "import sys, time, threading\n"
        "start = time.perf_counter(); import fullbeam; took = time.perf_counter() - start\n"
        "import fullbeam.ops, os\n"
        "print(threading.active_count(), len(os.listdir('/proc/self/task')),\n"
        "      any(name in sys.modules for name in ('torch', 'fastapi', 'tokenizers')), took < 2)"
    )
    threads, tasks, is_heavy, is_quick = printed.split()
    # numpy's own library may have started its pool: what counts is that fullbeam adds none.
    assert threads == "1"
    assert int(tasks) <= int(
        run_python("import numpy, os; print(len(os.listdir('/proc/self/task')))")
    )
    assert is_heavy == "False"
    assert is_quick == "True"


def product() -> None:
    x = np.ones((64, 256), np.float32)
    weight = ops.pack_weight([(np.zeros(256 * 1024, np.uint8), "F32", (256, 256))])
    ops.linear(x, weight)


def test_idle_threads_take_no_processor_time() -> None:
    _core.set_num_threads(3)
    try:
        product()
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1
    finally:
        _core.set_num_threads(_core.num_physical_cores())


def test_ops_run_from_several_threads_at_once() -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(20):
                product()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_thread_counts_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"threads: the count must be in 1\.\.1024, got {count}"):
        _core.set_num_threads(count)


def test_forked_child_has_a_team_of_its_own() -> None:
    code = (
        "import numpy as np, os\n"
        "from fullbeam import _core, ops\n"
        "_core.set_num_threads(3)\n"
        "w = ops.pack_weight([(np.zeros(256 * 1024, np.uint8), 'F32', (256, 256))])\n"
        "x = np.ones((64, 256), np.float32)\n"
        "ops.linear(x, w)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    ops.linear(x, w); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert run_python(code).strip() == "7"
