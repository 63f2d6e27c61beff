"""Processes that meet at a port of this machine, for tests."""

import socket
import subprocess
from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str


def run_cluster(start: Callable[[str, int], subprocess.Popen], count: int = 2, timeout: float = 300) -> list[Outcome]:
    """Run `start(address, index)` for every process until all have ended; once more where another took the port."""
    for attempt in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes = [start(address, index) for index in range(count)]
        outcomes = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=timeout)
                outcomes.append(Outcome(process.returncode, out, err))
                # The first process is the one that listens: the others would wait for it in vain.
                if is_taken := ("Failed to start RPC server" in err or "cannot listen at" in err):
                    break
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        if not is_taken or attempt:
            break
    return outcomes
