"""Claims on files that several processes want."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from jaxkd import files


def is_free(path):
    code = (
        "import sys; from pathlib import Path; from jaxkd import files\n"
        "with files.claim(Path(sys.argv[1]), wait=False) as mine: print(mine)"
    )
    answer = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return answer.stdout.strip() == "True"


@pytest.mark.slow
def test_a_claim_keeps_other_processes_away_and_its_file_claims_nothing(tmp_path):
    path = tmp_path / "store"
    with files.claim(path, wait=False) as mine:
        assert mine
        assert str(files.claim_of(path)) in files.claimed(path)
        assert files.claim_of(path).exists()
        assert not is_free(path)
    assert is_free(path)
    # As a process leaves it that was killed.
    files.claim_of(path).touch()
    assert is_free(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("no flock")])
def test_a_file_system_that_takes_no_claim_is_one_message(tmp_path, monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(fcntl, "flock", refused)
    told = rf"cannot lock .*{tmp_path.name}/\.s\.lock: (No locks available|no flock); choose an --out on a file system"
    with pytest.raises(OSError, match=told), files.claim(tmp_path / "s", wait=False):
        pass


def test_where_there_is_no_flock_a_claim_is_its_file(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.warns(UserWarning, match="flock not supported"), files.claim(tmp_path / "s", wait=False) as mine:
        assert mine
        with files.claim(tmp_path / "s", wait=False) as others:
            assert not others
    assert not files.claim_of(tmp_path / "s").exists()
