"""The texts of `speculation.py`: a prompt, and what somebody who does as the prompt asks writes behind it."""

from typing import NamedTuple


class Text(NamedTuple):
    """How a text begins, and how it goes on."""

    prompt: str
    answer: str


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

_EDITED = '''class JobQueue:
    """A queue of jobs, the most urgent one first."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.lock = threading.Lock()
        self.jobs = []

    def put(self, job, priority=0):
        """Put a job into the queue."""
        with self.lock:
            if self.maxsize and len(self.jobs) >= self.maxsize:
                raise QueueFull("the queue is full")
            heapq.heappush(self.jobs, (priority, job))

    def get(self):
        """Remove the most urgent job and return it."""
        with self.lock:
            if not self.jobs:
                raise QueueEmpty("the queue is empty")
            priority, job = heapq.heappop(self.jobs)
        return job

    def clear(self):
        """Remove all jobs."""
        with self.lock:
            self.jobs.clear()

    def __len__(self):
        return len(self.jobs)
'''

_SUMMARY = '''class TaskQueue:
    A queue of tasks, the most urgent one first.

    __init__(self, maxsize=0)
    put(self, task, priority=0)
        Put a task into the queue.
        Raises ValueError("the queue is full").
    get(self)
        Remove the most urgent task and return it.
        Raises IndexError("the queue is empty").
    clear(self)
        Remove all tasks.
    __len__(self)
        The number of tasks.
"""
'''

_FREE = '''read_table(path, separator=","):
    """Return the rows of a file as lists of strings."""
    rows = []
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            fields = [field.strip() for field in line.split(separator)]
            if any(fields):
                rows.append(fields)
    return rows


def column_widths(rows):
    """Return how wide each column has to be."""
    widths = {}
    for row in rows:
        for number, field in enumerate(row):
            widths[number] = max(widths.get(number, 0), len(field))
    return [widths[number] for number in sorted(widths)]


def write_table(rows, target=None):
    """Print rows in columns, the first one as a heading."""
    sizes = column_widths(rows)
    for index, row in enumerate(rows):
        print("  ".join(map(str.ljust, row, sizes)), file=target)
        if index == 0:
            print("-" * (sum(sizes) + 2 * len(sizes) - 2), file=target)
'''

TEXTS = {
    "editing": Text(_MODULE + "\n\n# The same class for jobs, with errors of its own.\n\n", _EDITED),
    "summarising": Text(_MODULE + '\n\n"""Summary of this module:\n\n', _SUMMARY),
    "free": Text('"""Reading and writing of tables."""\n\nimport os\n\n\ndef ', _FREE),
}
