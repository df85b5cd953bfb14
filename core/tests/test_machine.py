"""What the machine can give, read from made-up /proc and /sys."""

from pathlib import Path

import pytest

from megastow import machine

MEMINFO = "MemTotal:       1000 kB\nMemFree: 10 kB\nMemAvailable:    800 kB\nHugePages_Total:       0\n"


@pytest.fixture
def root(tmp_path):
    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_without_cgroups(root, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    limits = machine.host_limits(root({"proc/meminfo": MEMINFO}))
    assert (limits.total_bytes, limits.available_bytes) == (1000 << 10, 800 << 10)
    assert limits.cgroup is None
    assert limits.local_ranks == 8


def test_a_system_that_tells_nothing_limits_nothing(tmp_path):
    limits = machine.host_limits(tmp_path)
    assert limits.total_bytes > 1 << 60
    assert limits.available_bytes > 1 << 60


def test_version_2_the_tightest_group_on_the_way_up_counts(root):
    limits = machine.host_limits(
        root(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/job/task\n",
                "sys/fs/cgroup/job/task/memory.max": "max\n",
                "sys/fs/cgroup/job/task/memory.current": "5\n",
                "sys/fs/cgroup/job/memory.max": "500000\n",
                "sys/fs/cgroup/job/memory.current": "300000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 100000\nactive_file 7\n",
            }
        )
    )
    assert limits.cgroup.path.endswith("/job")
    assert limits.available_bytes == limits.cgroup.available_bytes == 300000
    assert limits.total_bytes == 500000


def test_version_2_inside_a_container_the_group_is_the_root(root):
    limits = machine.host_limits(
        root(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/docker/abc\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            }
        )
    )
    assert limits.available_bytes == 0
    assert limits.total_bytes == 1000


def test_version_1(root):
    limits = machine.host_limits(
        root(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "100000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            }
        )
    )
    assert limits.available_bytes == 350000
    assert limits.total_bytes == 400000


@pytest.mark.parametrize(("value", "ranks"), [("4", 4), ("0", 1), ("", 1), ("many", 1), ("-3", 1)])
def test_local_ranks(monkeypatch, value, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert machine.local_ranks() == ranks


def test_numa(root):
    folder = root(
        {
            "sys/devices/system/node/node1/cpulist": "0-2,8,10-11\n",
            "sys/bus/pci/devices/0000:3b:00.0/numa_node": "1\n",
            "sys/bus/pci/devices/0000:3c:00.0/numa_node": "-1\n",
        }
    )
    assert machine.numa_cpus(1, folder) == {0, 1, 2, 8, 10, 11}
    assert machine.numa_cpus(0, folder) == set()
    assert machine.pci_numa_node("0000:3B:00.0", folder) == 1
    assert machine.pci_numa_node("0000:3c:00.0", folder) is None
    assert machine.pci_numa_node("0000:ff:00.0", folder) is None


def test_cpu_model(root, tmp_path):
    assert machine.cpu_model(tmp_path) is None
    text = "processor\t: 0\nmodel\t\t: 17\nmodel name\t: One CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: Another\n"
    assert machine.cpu_model(root({"proc/cpuinfo": text})) == "One CPU @ 2 GHz"
    assert machine.cpu_model(root({"proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd4f\n"})) is None


def test_this_machine():
    limits = machine.host_limits()
    assert 0 < limits.available_bytes <= limits.total_bytes
    assert machine.resident_bytes() > 1 << 20
    assert machine.usable_cpus()


def test_what_file_system_a_path_is_on(root):
    made = root(
        {
            "proc/self/mountinfo": "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
            "30 22 0:26 / /mnt/fast\\040disk rw - xfs /dev/nvme0 rw\n"
            "31 30 0:27 / /mnt/fast\\040disk/shm rw shared:9 master:1 - tmpfs none rw\n"
            "32 22 0:28 / /mnt/over rw - tmpfs none rw\n"
            "33 22 0:29 / /mnt/over rw - ext4 /dev/vdb rw\n"
        }
    )
    asked = {
        "/home": "ext4",
        "/mnt/fast disk": "xfs",
        "/mnt/fast disk/scratch": "xfs",
        "/mnt/fast disk/shm/deep/down": "tmpfs",
        "/mnt/fast disk/shmoo": "xfs",
        "/mnt/over/x": "ext4",
    }
    assert {path: machine.file_system(Path(path), made) for path in asked} == asked


def test_a_system_without_mounts_tells_no_file_system(tmp_path):
    assert machine.file_system(Path("/"), tmp_path) is None
