"""What scripts share beside the sweeps: how a script begins anew with huge pages."""

import os
import subprocess
import sys

import pytest

from jaxkd import cli

SCRIPT = """
import os, sys
from jaxkd.cli import use_huge_pages
print("begun", os.getpid(), flush=True)
use_huge_pages()
print("goes on", os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.utf8_mode)
"""


@pytest.fixture
def begun_anew(monkeypatch):
    """Programs that would have been begun, where the kernel gives huge pages to who asks."""
    begun = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: begun.append((path, arguments)))
    monkeypatch.setattr(cli, "_huge_pages_are_to_be_asked_for", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return begun


def test_a_script_begins_anew_with_huge_pages_and_what_it_was_told(begun_anew, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.setattr(sys, "argv", ["align.py", "--out", "a b"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "align.py", "--out", "a b"])
    cli.use_huge_pages()
    assert begun_anew == [(sys.executable, [sys.executable, "-X", "utf8", "align.py", "--out", "a b"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.check=1:glibc.malloc.hugetlb=2"])
def test_who_speaks_of_huge_pages_is_left_alone(begun_anew, monkeypatch, tunables):
    monkeypatch.setattr(sys, "argv", sys.orig_argv[:1])
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    cli.use_huge_pages()
    assert begun_anew == [] and os.environ["GLIBC_TUNABLES"] == tunables


def test_a_program_that_runs_a_script_inside_itself_is_left_alone(begun_anew, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["align.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher"])
    cli.use_huge_pages()
    assert begun_anew == []


def test_nothing_begins_anew_where_the_kernel_does_not_ask_for_it(begun_anew, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.orig_argv[:1])
    monkeypatch.setattr(cli, "_huge_pages_are_to_be_asked_for", lambda: False)
    cli.use_huge_pages()
    assert begun_anew == [] and "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize("setting, asked", [("always [madvise] never", True), ("[always] madvise never", False)])
def test_huge_pages_are_asked_for_where_the_kernel_says_so(monkeypatch, tmp_path, setting, asked):
    told = tmp_path / "enabled"
    told.write_text(setting)
    monkeypatch.setattr(cli, "_TRANSPARENT_HUGE_PAGES", told)
    gnu = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    assert cli._huge_pages_are_to_be_asked_for() == (asked and gnu)
    monkeypatch.setattr(cli, "_TRANSPARENT_HUGE_PAGES", tmp_path / "missing")
    assert not cli._huge_pages_are_to_be_asked_for()


def test_it_is_the_same_process_with_the_same_arguments():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "utf8", "-c", SCRIPT, "one", "two words"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    asked = cli._huge_pages_are_to_be_asked_for()
    begun, goes_on = told[:-1], told[-1]
    assert len(begun) == (2 if asked else 1) and len(set(begun)) == 1
    tunables = "glibc.malloc.hugetlb=1" if asked else None
    assert goes_on == f"goes on {begun[0].split()[1]} {tunables} ['one', 'two words'] 1"
