import pytest

from sonofed_common.runtime import link_atomically


def test_a_link_points_to_the_old_target_until_it_points_to_the_new_one(tmp_path):
    link, old, new = (tmp_path / name for name in ("link", "old", "new"))
    for target in (old, new):
        target.mkdir()
    link_atomically(link, old)
    with pytest.raises(OSError, match="too long"):
        link_atomically(link, tmp_path / ("x" * 5000))
    assert link.resolve() == old
    link_atomically(link, new)
    assert link.resolve() == new and sorted(tmp_path.iterdir()) == [link, new, old]
