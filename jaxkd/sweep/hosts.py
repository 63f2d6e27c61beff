"""Several hosts: jax's own processes, each with blocks of its own; they meet at the store's making and at the end."""

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import jax
from jax._src import clusters, distributed  # the coordination service's barrier needs no devices, unlike the public one

_WAIT_MS = 7 * 24 * 3600 * 1000
_JOIN_S = 300
_meetings = itertools.count()


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes of this sweep; call it before jax starts.

    SLURM, GKE and TPU pods are found by jax itself; where there is nothing to be found and no flag is given, this
    process stays alone, and so does one that is SLURM's only task. A process that the others do not join within five
    minutes ends with 2.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many processes there are.
      process_id: which of them this is, from 0.

    Raises:
      ValueError: when only some are given and the rest cannot be found, or one is out of range.
      OSError: when process 0 cannot listen.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if any(value is not None for value in given.values()):
        _check(given)
    lone = _is_slurms_only_task()
    if lone and coordinator is None:
        return
    try:
        with _given_up(coordinator):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                # jax gives every task of SLURM one GPU, the only one in a job too.
                cluster_detection_method="deactivate" if lone else None,
                initialization_timeout=2 * _JOIN_S,
            )
    except ValueError as error:
        if coordinator is None and "coordinator_address" in str(error):
            return  # no cluster
        raise ValueError(f"cannot join the other processes ({', '.join(given)}): {error}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RPC server" not in str(error):
            raise
        where = coordinator or "the address that the cluster gave"
        raise OSError(f"cannot listen at {where}: give a --coordinator whose port is free on its host") from error


def _is_slurms_only_task() -> bool:
    if os.environ.get("SLURM_NTASKS") != "1":
        return False
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind.name for kind in kinds if kind.is_env_present()), None) == "slurm"


@contextmanager
def _given_up(coordinator: str | None) -> Iterator[None]:
    """End the process with one message where the others do not come: jax itself aborts, with a stack of C++."""

    def end():
        where = coordinator or "the address that the cluster gave"
        print(
            f"error: the other processes did not join within {_JOIN_S} s at {where}: start the same command in every "
            "process, where process 0 can be reached (--coordinator), and tell each of their number (--num-processes)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(_JOIN_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(given: dict) -> None:
    coordinator, num_processes, process_id = given.values()
    if missing := [flag for flag, value in given.items() if value is None]:
        raise ValueError(f"{', '.join(given)} go together; not given: {', '.join(missing)}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator must be host:port with a port from 1 to 65535; got {coordinator!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id must be from 0 to --num-processes − 1; got {process_id} of {num_processes} processes"
        )


def own_share(count: int) -> range:
    """Which of `count` blocks this process computes: every n-th."""
    return range(jax.process_index(), count, jax.process_count())


@contextmanager
def together(purpose: str, meanwhile: Callable[[Callable[[float], bool]], None] | None = None) -> Iterator[None]:
    """Do something in every process and leave when all have; an error in one is an error in all.

    Args:
      purpose: for the message: "could not …".
      meanwhile: what to do while waiting for the others. It is given a function that waits up to some seconds and says
        whether all have come.

    Raises:
      OSError: in the other processes, when one failed; its own error goes on in that one.
    """
    if jax.process_count() == 1:
        yield
        return
    meeting = f"jaxkd/{next(_meetings)}"
    try:
        yield
    except Exception as error:
        _tell(meeting, str(error) or type(error).__name__)
        _wait(meeting)
        raise
    _tell(meeting, "")
    _wait(meeting, meanwhile)
    errors = {index: distributed.global_state.client.blocking_key_value_get(f"{meeting}/{index}", _WAIT_MS)
              for index in range(jax.process_count())}  # fmt: skip
    if told := {index: error for index, error in errors.items() if error}:
        index, error = next(iter(told.items()))
        raise OSError(f"process {index} could not {purpose}: {error}")


def _tell(meeting: str, error: str) -> None:
    distributed.global_state.client.key_value_set(f"{meeting}/{jax.process_index()}", error)


def _wait(meeting: str, meanwhile: Callable[[Callable[[float], bool]], None] | None = None) -> None:
    if meanwhile is None:
        distributed.global_state.client.wait_at_barrier(meeting, _WAIT_MS)
        return
    errors = []

    def meet():
        try:
            distributed.global_state.client.wait_at_barrier(meeting, _WAIT_MS)
        except Exception as error:
            errors.append(error)

    def over(seconds: float) -> bool:
        waiting.join(seconds)
        return not waiting.is_alive()

    waiting = threading.Thread(target=meet, daemon=True, name="meeting")
    waiting.start()
    # What is shown while waiting is looked up on a disk that all share: an error there ends no sweep.
    with suppress(OSError):
        meanwhile(over)
    waiting.join()
    if errors:
        raise errors[0]
