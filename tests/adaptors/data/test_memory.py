"""How much memory a process may still take."""

import pytest

from coldtap.adaptors.data.memory import _control_group_bytes


def group(folder, names, limit, used, cache):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\nactive_file {cache}\ninactive_file 1\n")


@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current")),
        ("7:cpu:/\n4:memory:/job/step", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_the_tightest_limit_on_the_way_up_counts_and_the_page_cache_does_not(tmp_path, line, root, names):
    (tmp_path / "groups").write_text(f"{line}\n")
    mount = tmp_path / "mount"
    group(mount / root / "job/step", names, limit=1000, used=300, cache=99)
    assert _control_group_bytes(tmp_path / "groups", mount) == 800
    group(mount / root / "job", names, limit=500, used=400, cache=19)
    assert _control_group_bytes(tmp_path / "groups", mount) == 120


def test_without_a_limit_there_is_none(tmp_path):
    assert _control_group_bytes(tmp_path / "nothing", tmp_path) == 2**62
    (tmp_path / "groups").write_text("0::/\n")
    group(tmp_path / "mount", ("memory.max", "memory.current"), limit="max", used=3, cache=0)
    assert _control_group_bytes(tmp_path / "groups", tmp_path / "mount") == 2**62
