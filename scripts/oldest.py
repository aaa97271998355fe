"""Prints the lower bounds of pyproject.toml as constraints, for scripts/tests oldest.

The tools of the tests (pytest, ruff and the like) are left at their newest.
"""

import pathlib
import re
import tomllib

project = tomllib.loads(
    (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text()
)["project"]
extras = project["optional-dependencies"]
bounds = [*project["dependencies"], *extras["examples"]]
for bound in bounds:
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", bound).groups()
    print(f"{name}=={version}" + ("" if version.count(".") == 2 else ".*"))
# Newer ones warn of what the oldest Matplotlib calls, and warnings are errors in tests.
print("pyparsing<3.3")
