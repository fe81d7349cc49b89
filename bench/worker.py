"""Processes that each hold one function, so that it is timed as it runs for a user: alone.

Whatever else a process does changes a function's time: malloc keeps freed memory or gives it back
depending on what other functions freed before, and another library's threads may be spinning on a
core. The parent starts a worker as `python -m bench.worker`. The worker reads pickles from its
standard input and answers with pickles; between requests it sleeps.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# glibc reads these as a process starts; it then gives no freed memory back to the system.
KEEP_FREED_MEMORY = MappingProxyType({"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"})
AS_IT_COMES: Mapping[str, str] = MappingProxyType({})
_ROOT = Path(__file__).parents[1]


class WorkerError(RuntimeError):
    """A worker raised an error or died; it answers no more requests."""


class Worker:
    """A process that prepares a function, and then answers requests about it.

    Nothing waits for the process before `receive`, so that several can start side by side.

    Parameters
    ----------
    prepare : function
        Called in the process; returns the function that requests are about. It is pickled, like
        everything that passes between the processes.
    environment : mapping {str: str}
        Environment variables of the process, in addition to those of this one.
    """

    def __init__(
        self, prepare: Callable[[], Callable[[], Any]], environment: Mapping[str, str] = AS_IT_COMES
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            cwd=_ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.send(prepare)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        # The worker ends when its input does.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def send(self, request: Callable[..., Any]) -> None:
        """Ask the process to compute request(function)."""
        # If the worker has died, `receive` reports the error that it left.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()

    def receive(self) -> Any:
        """Wait for the answer to a request, and return it.

        Raises
        ------
        WorkerError
            The preparation or the request raised, or the process died.
        """
        try:
            answer, error = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            status = self._process.wait()
            raise WorkerError(f"the process died with exit status {status}") from None
        if error is not None:
            raise WorkerError(error)
        return answer

    def ask(self, request: Callable[..., Any]) -> Any:
        """Return request(function), computed in the process."""
        self.send(request)
        return self.receive()


def call(function: Callable[[], Any]) -> Any:
    """Return what a function without arguments returns: the simplest request."""
    return function()


def _serve() -> None:
    requests = sys.stdin.buffer
    # Redirect what libraries print to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            function = pickle.load(requests)()
            while requests.peek(1):
                answer = pickle.dumps((pickle.load(requests)(function), None))
                answers.write(answer)
                answers.flush()
        except Exception as error:
            traceback.print_exc()
            pickle.dump((None, f"{type(error).__name__}: {error}"), answers)


if __name__ == "__main__":
    _serve()
