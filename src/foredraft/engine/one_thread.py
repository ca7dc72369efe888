"""Torch on a single thread while steps run, for targets that have threads of their own."""

from __future__ import annotations

import os
import threading

import torch


class OneThread:
    """A context in which torch computes on a single thread. It may be entered from several Python threads at once.

    Torch's number of threads belongs to the process: a Python thread takes it over at its first operation. So the number is
    read only while no thread is inside. Every thread that leaves sets the number again for itself.
    """

    def __init__(self):
        self._usual = 1
        self._start_anew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        """Forgets who is inside. The child of a fork has none of these threads, and one of them may have held the lock."""
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside = max(0, self._inside - 1)  # 0 in the child of a fork inside
            torch.set_num_threads(self._usual)


one_thread = OneThread()
"""The only instance, because torch has one number of threads."""
