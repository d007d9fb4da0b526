"""The CPU quota and the memory limit of control groups, as systems of both versions and containers show them, in a made-up file system."""

import math

import pytest

from cbn import cgroup

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 32 0:29 / /sys/fs/cgroup/cpuset rw shared:10 - cgroup cgroup rw,cpuset\n"
    "34 32 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 32 0:31 / /sys/fs/cgroup/memory rw shared:12 - cgroup cgroup rw,memory\n"
)
V1_OWN = "6:memory:{0}\n5:cpuset:/\n4:cpu,cpuacct:{0}\n1:name=systemd:/init.scope\n0::/init.scope\n"
NO_LIMIT = "9223372036854771712\n"  # version 1's: the largest number of pages


def make(root, own, mounts, **files):
    """Let /proc/self say so and the groups have these files, given as path below /sys/fs/cgroup: text."""
    files = {"proc/self/cgroup": own, "proc/self/mountinfo": mounts} | {f"sys/fs/cgroup/{path}": text for path, text in files.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def quota(root, *groups, **files):
    make(root, *groups, **files)
    return cgroup.cpu_quota(str(root))


def memory(root, *groups, **files):
    make(root, *groups, **files)
    return cgroup.memory_limit(str(root))


@pytest.mark.parametrize("text, expected", [("150000 100000\n", 1.5), ("max 100000\n", math.inf), ("50000 100000\n", 0.5)])
def test_version_2(tmp_path, text, expected):
    assert quota(tmp_path, "0::/a/b\n", V2, **{"a/b/cpu.max": text, "a/cpu.max": "max 100000\n"}) == expected


def test_groups_above_count(tmp_path):
    files = {"cpu.max": "900000 100000\n", "a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n", "c/cpu.max": "100000 100000\n"}
    assert quota(tmp_path, "0::/a/b\n", V2, **files) == 3


@pytest.mark.parametrize("values, expected", [(("250000", "100000"), 2.5), (("-1", "100000"), math.inf), (("20000", "10000"), 2)])
def test_version_1(tmp_path, values, expected):
    files = {f"cpu,cpuacct/jobs/7/cpu.cfs_{name}_us": value + "\n" for name, value in zip(("quota", "period"), values, strict=True)}
    assert quota(tmp_path, V1_OWN.format("/jobs/7"), V1, **files) == expected


def test_both_versions_at_once(tmp_path):
    """As systemd's hybrid mode: the CPU controller is of version 1."""
    mounts = V1 + "35 32 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n", "unified/init.scope/cgroup.procs": "1\n"}
    assert quota(tmp_path, V1_OWN.format("/"), mounts, **files) == 4


@pytest.mark.parametrize(
    "own, top",
    [
        ("/docker/1234", "/docker/1234"),  # the host's path, and the mount begins there
        ("/", "/"),  # a name space of its own
        ("/", "/docker/1234"),
        ("/../5678", "/"),  # moved out of its name space: what is mounted is all there is to see
    ],
)
def test_container(tmp_path, own, top):
    mounts = f"40 39 0:30 {top} /sys/fs/cgroup ro master:11 - cgroup2 cgroup rw\n"
    assert quota(tmp_path, f"0::{own}\n", mounts, **{"cpu.max": "200000 100000\n"}) == 2
    assert quota(tmp_path, f"0::{own.rstrip('/')}/inner\n", mounts, **{"inner/cpu.max": "100000 100000\n"}) == (1 if own == top else 2)


@pytest.mark.parametrize("own", ["", "0::/gone\n", "nonsense\n", "0:\n", ":::\n", "4:cpu:/x\n"])
@pytest.mark.parametrize("mounts", ["", V2, V1, "nonsense\n", " - \n", "1 2 3 4 5 6 - cgroup2\n"])
@pytest.mark.parametrize("text", ["", "max", "0 0", "-5 100000", "1 2 3", "x y", "100000"])
def test_what_cannot_be_read_is_no_quota(tmp_path, own, mounts, text):
    assert quota(tmp_path, own, mounts, **{"cpu.max": text, "cpu,cpuacct/cpu.max": text}) == math.inf


@pytest.mark.parametrize("text", ["", "max", "-1", "x", "1 2", "1.5", "²"])
def test_what_cannot_be_read_is_no_limit(tmp_path, text):
    assert memory(tmp_path, "0::/a\n", V2, **{"memory.max": text, "a/memory.max": text}) == math.inf


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"a/b/memory.max": "600000000\n"}, 600000000),
        ({"a/b/memory.max": "max\n", "a/b/memory.high": "max\n"}, math.inf),
        ({"a/b/memory.max": "800\n", "a/b/memory.high": "700\n"}, 700),
        ({"a/b/memory.max": "max\n", "a/memory.max": "500\n", "memory.max": "900\n", "c/memory.max": "1\n"}, 500),
        ({"a/b/memory.max": "300\n", "a/memory.max": "500\n", "a/memory.current": "7\n"}, 300),
        ({"a/b/memory.max": "0\n"}, 0),
    ],
)
def test_memory_in_version_2(tmp_path, files, expected):
    assert memory(tmp_path, "0::/a/b\n", V2, **files) == expected


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"memory/jobs/7/memory.limit_in_bytes": "600000000\n", "memory/memory.limit_in_bytes": NO_LIMIT}, 600000000),
        ({"memory/jobs/7/memory.limit_in_bytes": NO_LIMIT, "memory/jobs/memory.limit_in_bytes": "1024\n"}, 1024),
        ({"memory/jobs/7/memory.limit_in_bytes": NO_LIMIT, "memory/memory.limit_in_bytes": NO_LIMIT}, math.inf),
        ({"memory/jobs/memory.limit_in_bytes": "9223372036854710272\n"}, math.inf),  # pages of 64 KiB
        ({"memory/other/memory.limit_in_bytes": "5\n", "cpu,cpuacct/jobs/7/memory.limit_in_bytes": "6\n"}, math.inf),
    ],
)
def test_memory_in_version_1(tmp_path, files, expected):
    assert memory(tmp_path, V1_OWN.format("/jobs/7"), V1, **files) == expected


def test_memory_in_a_container(tmp_path):
    mounts = V1.replace("0:31 / ", "0:31 /docker/1234 ")
    files = {"memory/memory.limit_in_bytes": "4000\n", "memory/inner/memory.limit_in_bytes": "3000\n"}
    assert memory(tmp_path, V1_OWN.format("/docker/1234"), mounts, **files) == 4000
    assert memory(tmp_path, V1_OWN.format("/docker/1234/inner"), mounts) == 3000


def test_no_such_files(tmp_path):
    assert cgroup.cpu_quota(str(tmp_path)) == cgroup.memory_limit(str(tmp_path)) == math.inf


def test_this_system():
    assert cgroup.cpu_quota() > 0
    assert cgroup.memory_limit() > 0
