from pathlib import Path

import jax
import pytest

from jaxkd.sweep import cache


@pytest.fixture(autouse=True)
def settings():
    """The settings of jax that the cache changes; they must be as they were at the end."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    names = [f"jax_{name}" for name in names]
    before = {name: getattr(jax.config, name) for name in names}
    yield before
    assert {name: getattr(jax.config, name) for name in names} == before


def test_a_folder_that_cannot_be_written_is_told_and_done_without(tmp_path, capsys):
    (tmp_path / "file").touch()
    use = cache.use_compile_cache(tmp_path / "file" / "programs")
    assert use.hits == 0
    told = capsys.readouterr().err
    assert told == f"no compile cache: cannot write to {tmp_path / 'file' / 'programs'}: Not a directory\n"


def test_none_is_wanted(capsys):
    cache.use_compile_cache(False)
    assert capsys.readouterr().err == ""


def test_the_usual_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "jaxkd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.default_folder() == Path.home() / ".cache" / "jaxkd"
