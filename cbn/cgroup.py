"""The share of the machine's CPUs that the control groups of this process grant it: what a container's CPU limit is, and OpenMP doesn't know."""

import math


def cpu_quota(root=""):
    """The CPUs' worth of time that this process may use: the least quota of its control groups and of all above them; infinity without one.

    root : path of what stands for the root folder, for tests. What is missing or can't be read counts as no quota.
    """
    quota = math.inf
    paths = _own_groups(root)
    for line in _read(root + "/proc/self/mountinfo").splitlines():
        # ID parent major:minor top mount-point options ... - type source options: proc_pid_mountinfo(5). In a container, `top` may be its group.
        before, after = (part.split() for part in line.partition(" - ")[::2])
        if len(before) < 5 or len(after) < 3 or after[0] not in paths or after[0] == "cgroup" and "cpu" not in after[2].split(","):
            continue
        top, mount, path = before[3].rstrip("/"), root + before[4], paths[after[0]]
        names = path[len(top) :].split("/")[1:] if (path + "/").startswith(top + "/") and ".." not in path.split("/") else []
        for depth in range(len(names) + 1):
            quota = min(quota, _group_quota("/".join([mount, *names[:depth]])))
    return quota


def _own_groups(root):
    """The path of this process's group in the hierarchies that may have CPU quotas, by the file system type of their mounts."""
    paths = {}
    for line in _read(root + "/proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")  # ID:controllers:path; version 2 names no controllers: cgroups(7)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    return paths


def _group_quota(folder):
    """Version 2: "quota period" or "max period", in microseconds; version 1: a file for each, -1 for none."""
    values = (_read(folder + "/cpu.max") or f"{_read(folder + '/cpu.cfs_quota_us')} {_read(folder + '/cpu.cfs_period_us')}").split()
    if len(values) == 2 and all(value.isdecimal() and int(value) > 0 for value in values):
        return int(values[0]) / int(values[1])
    return math.inf


def _read(path):
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (OSError, ValueError):
        return ""
