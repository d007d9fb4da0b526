"""The share of the machine's CPUs and memory that the control groups of this process grant it: a container's limits, which the system doesn't apply
to what it says of the machine.
"""

import math


def cpu_quota(root=""):
    """The CPUs' worth of time that this process may use: the least quota of its control groups and of all above them; infinity without one.

    root : path of what stands for the root folder, for tests. What is missing or can't be read counts as no quota.
    """
    return min(map(_cpu_quota, _groups("cpu", root)), default=math.inf)


def memory_limit(root=""):
    """The bytes of memory that this process may use, as cpu_quota; a limit from which on the system slows it down (memory.high) is one, too."""
    files = "memory.max", "memory.high", "memory.limit_in_bytes"
    return min((_number(f"{folder}/{file}") for folder in _groups("memory", root) for file in files), default=math.inf)


def _groups(controller, root):
    """The folders of this process's control groups that may limit what a controller is for, and of all above them."""
    paths = _own_groups(controller, root)
    for line in _read(root + "/proc/self/mountinfo").splitlines():
        # ID parent major:minor top mount-point options ... - type source options: proc_pid_mountinfo(5). In a container, `top` may be its group.
        before, after = (part.split() for part in line.partition(" - ")[::2])
        if len(before) < 5 or len(after) < 3 or after[0] not in paths or after[0] == "cgroup" and controller not in after[2].split(","):
            continue
        top, mount, path = before[3].rstrip("/"), root + before[4], paths[after[0]]
        names = path[len(top) :].split("/")[1:] if (path + "/").startswith(top + "/") and ".." not in path.split("/") else []
        for depth in range(len(names) + 1):
            yield "/".join([mount, *names[:depth]])


def _own_groups(controller, root):
    """The path of this process's group in the hierarchies that may have this controller, by the file system type of their mounts."""
    paths = {}
    for line in _read(root + "/proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")  # ID:controllers:path; version 2 names no controllers: cgroups(7)
        if not controllers:
            paths["cgroup2"] = path
        elif controller in controllers.split(","):
            paths["cgroup"] = path
    return paths


def _cpu_quota(folder):
    """Version 2: "quota period" or "max period", in microseconds; version 1: a file for each, -1 for none."""
    values = (_read(folder + "/cpu.max") or f"{_read(folder + '/cpu.cfs_quota_us')} {_read(folder + '/cpu.cfs_period_us')}").split()
    if len(values) == 2 and all(value.isdecimal() and int(value) > 0 for value in values):
        return int(values[0]) / int(values[1])
    return math.inf


def _number(path):
    """Of a file of one number; infinity for "max", or what version 1 has for it, the largest number of pages."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() and int(text) < 1 << 62 else math.inf


def _read(path):
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (OSError, ValueError):
        return ""
