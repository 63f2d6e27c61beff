"""What tests of scripts share."""

import runpy
import sys

import pytest


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process; returns exit code, standard output and standard error."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        # Messages are boxed: at the width of a terminal a long path would break them anywhere.
        monkeypatch.setenv("COLUMNS", "400")
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call
