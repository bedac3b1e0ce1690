"""Memory that a batch job or a container may still take: the tightest group around this process counts."""

from types import SimpleNamespace

import pytest

from utils.data.room import free_memory

MIB = 2**20
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """With 100 MiB free, so that no figure of this machine matters."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * MIB))


def group(folder, version, limit, used=0, cached=0, **more):
    folder.mkdir(parents=True, exist_ok=True)
    files = {version[0]: limit, version[1]: used, "memory.stat": f"anon 5\n{version[2]} {cached}", **more}
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def process_of(root, *lines):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_the_limit_of_a_batch_job_counts(tmp_path):
    """Slurm sets it on a group above that of the task, which has none of its own."""
    job = tmp_path / "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    process_of(tmp_path, "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    group(job / "step_0/user/task_0", V2, "max", used=MIB)
    group(job / "step_0", V2, 50 * MIB, used=2 * MIB)
    group(job, V2, 20 * MIB, used=8 * MIB, cached=3 * MIB)
    group(job.with_name("job_8"), V2, MIB)
    assert free_memory(tmp_path) == 15 * MIB
    group(job / "step_0", V2, 50 * MIB, used=2 * MIB, **{"memory.high": 9 * MIB})
    assert free_memory(tmp_path) == 7 * MIB


def test_groups_of_the_first_version(tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    process_of(tmp_path, "7:cpu,cpuacct:/elsewhere", "4:hugetlb,memory:/slurm/uid_1/job_7", "0::/")
    group(top, V1, 2**63 - 4096, used=MIB)
    group(top / "slurm/uid_1/job_7", V1, 30 * MIB, used=10 * MIB, cached=4 * MIB)
    group(top / "elsewhere", V1, MIB)
    assert free_memory(tmp_path) == 24 * MIB


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/../../job_7"])
def test_a_container_that_sees_its_own_group_as_the_root(path, tmp_path):
    process_of(tmp_path, f"0::{path}")
    group(tmp_path / "sys/fs/cgroup", V2, 5 * MIB, used=6 * MIB)
    assert free_memory(tmp_path) == 0, "more is used than it may"
    group(tmp_path / "sys/fs/cgroup", V2, 5 * MIB, used=MIB)
    group(tmp_path / "sys/fs/cgroup/job_7", V2, MIB)
    assert free_memory(tmp_path) == 4 * MIB


def test_without_groups_and_with_unreadable_ones_the_host_counts(tmp_path):
    assert free_memory(tmp_path) == 100 * MIB
    process_of(tmp_path, "0::/job", "a line of another kind")
    group(tmp_path / "sys/fs/cgroup/job", V2, "nonsense")
    assert free_memory(tmp_path) == 100 * MIB
