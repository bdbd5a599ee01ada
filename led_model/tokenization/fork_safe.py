"""Makes locks that a fork waits for.

A child process has no thread that would release a lock held at the fork, nor one that would finish what the lock
guards inside a library.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

_locks: WeakSet[threading.RLock] = WeakSet()
_held_for_fork: list[threading.RLock] = []
# A thread holds it while it forks: two that take each other's locks would wait for ever.
_one_fork = threading.RLock()


def new_lock() -> threading.RLock:
    """Returns a lock that is free in children of this process, and was free when they were made."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _before_fork() -> None:
    _one_fork.acquire()
    for lock in list(_locks):
        lock.acquire()
        _held_for_fork.append(lock)


def _after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()
    _one_fork.release()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
