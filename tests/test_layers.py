"""Which parts of jaxkd know of which: arrows point one way, and what serves both settings knows of neither."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jaxkd"
SETTINGS = {"mixture", "mixture_rewards", "truth", "laboratory", "smollm2"}
SERVES_BOTH = [
    "align",
    "distill",
    "pipelines",
    "policy",
    "rewards",
    "optimisation",
    "loops",
    "random",
    "durable",
    "losses",
]


def files_of(part):
    path = PACKAGE / part
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def known_to(part):
    """The parts that a part imports, wherever in its files."""
    names = set()
    for file in files_of(part):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} has a relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jaxkd.")} - {part}


def reached_from(part):
    """The parts that a part imports, and those that they import."""
    reached, todo = set(), [part]
    while todo:
        new = {name for name in known_to(todo.pop()) if any(file.exists() for file in files_of(name))} - reached
        reached |= new
        todo += new
    return reached


@pytest.mark.parametrize("part", SERVES_BOTH)
def test_what_serves_both_settings_knows_of_neither(part):
    assert not reached_from(part) & SETTINGS


def test_the_settings_do_not_know_each_other():
    assert known_to("mixture") == {"policy", "loops", "random"}
    assert {"policy", "align", "distill", "pipelines"} <= known_to("smollm2")
    assert not reached_from("smollm2") & (SETTINGS - {"smollm2"})


def test_nothing_knows_of_a_script():
    scripts = {path.stem for path in (PACKAGE.parent / "experiments").glob("*.py")}
    for file in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Import)]
        assert not {alias.name for node in nodes for alias in node.names} & scripts, file
