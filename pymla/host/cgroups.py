"""The Linux control groups that this process is in: containers and services limit memory and processors with them."""

from collections.abc import Iterator
from pathlib import Path


def groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of each control group whose limit on a resource applies to this process.

    The limits of a group apply to all groups below it, so parents are among them. A group that this process cannot see
    has a folder that does not exist.

    Parameters
    ----------
    controller : name of the resource in version 1: ``memory``, ``cpu``
    root : where ``proc`` and ``sys`` are
    """
    for line in lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, found, path = rest.partition(":")
        if not (number and found):
            continue
        if controllers == "":
            version, mount = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, mount = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not visible; the mount is then the container's group.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield version, folder


def lines(path: Path) -> list[str]:
    """The lines of a file of the kernel; none where it does not exist or cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
