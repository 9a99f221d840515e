"""Work that goes on beside training: one thread, one job after the other, and errors that are not lost."""

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Background"]


class Background:
    """A daemon thread: a process that was told to end does not stay for a job that waits for ranks that are gone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """For all that was submitted.

        Raises:
            BaseException: of the first job that failed; the jobs after it were dropped.
        """
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:
                with self._lock:
                    self._error = error
                    self._jobs.clear()
