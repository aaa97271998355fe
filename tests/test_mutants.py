"""The tool of `mutants.py` finds what a toy package's tests notice, and what not."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("cosmic_ray")

SCRIPT = pathlib.Path(__file__).parent / "mutants.py"

MODULE = '''"""1 + 1."""


def covered(x: int | float, y, scale=1):
    y = y * scale
    return x - y


def uncovered(x):
    if x == 3:
        raise ValueError(f"{x + 1}")
    return covered(x, 0, scale=2)
'''
TEST = """from toy import covered

def test_covered():
    assert covered(5, 3, 2) == -1
"""


@pytest.mark.slow
def test_survivors_are_where_no_test_looks(tmp_path):
    (tmp_path / "toy").mkdir()
    module = tmp_path / "toy" / "__init__.py"
    module.write_text(MODULE)
    (tmp_path / "test_toy.py").write_text(TEST)
    command = [sys.executable, SCRIPT, "toy", "--tests", "test_toy.py", "--jobs", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *survivors, score = result.stdout.splitlines()
    places = [line.split()[1] for line in survivors if line.startswith("SURVIVED")]
    # The default of line 4; `x == 3`, the `if` and the 3 of line 10; and of line 12 the
    # two numbers, the keyword and the order of the arguments.
    lines = [4, 10, 10, 10, 12, 12, 12, 12]
    assert sorted(places) == sorted(f"toy/__init__.py:{line}" for line in lines)
    assert "+    return covered(0, x, scale=2)" in survivors
    assert "+    return covered(x, 0, **{})" in survivors
    assert score == "toy/__init__.py: 3 of 11 mutants killed"  # y, `*` and `-`
    assert module.read_text() == MODULE
