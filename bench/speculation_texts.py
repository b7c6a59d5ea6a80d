"""The texts of `speculation.py`: how each of them begins. The demo model writes Python."""

_MODULE = '''"""Queues that hold tasks."""

import heapq
import threading


class TaskQueue:
    """A queue of tasks, the most urgent one first."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.lock = threading.Lock()
        self.tasks = []

    def put(self, task, priority=0):
        """Put a task into the queue."""
        with self.lock:
            if self.maxsize and len(self.tasks) >= self.maxsize:
                raise ValueError("the queue is full")
            heapq.heappush(self.tasks, (priority, task))

    def get(self):
        """Remove the most urgent task and return it."""
        with self.lock:
            if not self.tasks:
                raise IndexError("the queue is empty")
            priority, task = heapq.heappop(self.tasks)
        return task

    def clear(self):
        """Remove all tasks."""
        with self.lock:
            self.tasks.clear()

    def __len__(self):
        return len(self.tasks)
'''

TEXTS = {
    # A class is written again under another name.
    "editing": _MODULE
    + '''

class ThreadQueue:
    """A queue of tasks, the most urgent one first."""

    def __init__(self, maxsize=0):
''',
    # The signatures and first lines of a module, without the bodies.
    "summarising": _MODULE
    + '''

# Summary:
#
# class TaskQueue:
#     """A queue of tasks, the most urgent one first."""
#
#     def __init__(self, maxsize=0):
#     def put(self, task, priority=0):
#         """Put a task into the queue."""
#     def get(self):
''',
    "free": '''"""Reading and writing of tables."""

import os


def ''',
}
