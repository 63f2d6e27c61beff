"""Strictness for every test: no silent dtype or rank promotion, several CPU devices; scripts run in this process."""

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path

# Tests compile much and compute little: LLVM's expensive passes and XLA's fusion emitters cost more than they save.
# Set before jax starts.
_QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_COMPILE}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from jaxkd import pipelines  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)

_TOGETHER = ("tests/smollm2/", "tests/parity/", "tests/test_laboratory.py", "tests/sweep/test_sweep.py")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow: ask for it with --slow")
    skip_parity = pytest.mark.skip(reason="needs torch and TRL: pip install -e '.[parity]'")
    has_parity = all(importlib.util.find_spec(name) for name in ("torch", "trl"))
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "parity" in item.keywords and not has_parity:
            item.add_marker(skip_parity)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests in one process where they share compiled programs and whole runs.

    Files come first, by their number of tests; all other tests follow one by one and fill what is left.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return file if file.startswith(_TOGETHER) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Make jax refuse implicit dtype and rank promotion, so that none creeps into our own functions."""
    if "loose" in request.keywords:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


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


@pytest.fixture
def drawn(request, monkeypatch):
    """Figures as they were when they were to be written, of the module that a test file calls `DRAWN_BY`."""
    figures = []
    monkeypatch.setattr(request.module.DRAWN_BY, "save", lambda figure, paths: figures.append(figure))
    yield figures
    for figure in figures:
        plt.close(figure)


@pytest.fixture
def readme_order():
    """The new order that the README adds, by its own lines, for one test."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```python\n(from jaxkd\.pipelines import .*?)```", readme, re.S)
    before = set(pipelines.STAGES)
    exec(snippet, {})
    [added] = set(pipelines.STAGES) - before
    yield added
    del pipelines.STAGES[added]
