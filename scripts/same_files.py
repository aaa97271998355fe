"""Checks that an unpacked source distribution holds every file that the tests need.

python scripts/same_files.py DIRECTORY
"""

import pathlib
import subprocess
import sys

NEEDED = ("sam_optax/", "tests/", "examples/", "benchmarks/", "docs/", "scripts/")
root = pathlib.Path(__file__).parent.parent
unpacked = pathlib.Path(sys.argv[1])
tracked = subprocess.run(
    ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
).stdout.splitlines()
needed = [name for name in tracked if name.startswith(NEEDED) or "/" not in name]
missing = [name for name in needed if not (unpacked / name).exists()]
if missing:
    sys.exit("The source distribution lacks:\n" + "\n".join(missing))
print(f"The source distribution holds all {len(needed)} files that it should.")
