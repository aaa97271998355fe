"""What must agree in a release, and what a source distribution must hold."""

import pathlib
import re
import subprocess
import sys
import tomllib

import sam_optax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def test_the_version_is_the_same_everywhere():
    """In the package, CITATION.cff, the README, and the changelog with its date."""
    version = sam_optax.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {version}\n" in citation
    assert f"version = {{{version}}}" in README
    changelog = (ROOT / "CHANGELOG.md").read_text()
    top, date = re.search(r"^## \[(\S+)\](?: - (\S+))?$", changelog, re.M).groups()
    if top == "Unreleased":  # the release before it is the version
        top, date = re.search(r"^## \[(\d\S*)\] - (\S+)$", changelog, re.M).groups()
    assert top == version
    assert f"date-released: {date}\n" in citation


def test_the_readme_is_short_and_its_commands_stay():
    lines = README.splitlines()
    assert len(lines) <= 150
    start = "python3 -m venv .venv && .venv/bin/pip install"
    assert f'{start} ".[examples]" && .venv/bin/python examples/digits.py' in lines
    test = ".venv/bin/python -m pytest -n 2 --dist loadfile"
    assert f'{start} ".[tests]" && {test}' in lines


def test_links_to_the_projects_own_pages_are_those_of_its_metadata():
    urls = PROJECT["urls"]
    assert set(urls) >= {"Documentation", "Source", "Issues", "Changelog"}
    homes = (urls["Source"], urls["Documentation"])
    texts = [README, *(p.read_text() for p in (ROOT / "docs").rglob("*.md"))]
    texts += [path.read_text() for path in ROOT.glob("*.md")]
    own = [url for text in texts for url in re.findall(r"https://[^\s)>\"]+", text)]
    own = [url for url in own if "sam-optax" in url or "sam_optax" in url]
    assert own
    assert all(url.startswith(homes) for url in own), own


def test_every_job_of_a_workflow_calls_scripts_that_are_here():
    """So that what runs there can run here. Publishing alone is left to actions."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        _, _, jobs = path.read_text().partition("\njobs:\n")
        for job in re.split(r"^  (?=\w+:\n)", jobs, flags=re.M)[1:]:
            name = job.partition(":")[0]
            commands = re.findall(r"- run: (?:\w+=\w+ )?(\S+)(.*)", job)
            assert commands or name == "publish", (path.name, name)
            for script, _ in commands:
                assert script.startswith(("scripts/", ".ci/")), (path.name, script)
                assert (ROOT / script).stat().st_mode & 0o100, script


def test_the_oldest_versions_are_those_of_the_metadata():
    script = ROOT / "scripts" / "oldest.py"
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    )
    pins = dict(line.split("==") for line in run.stdout.split() if "==" in line)
    bounds = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["examples"]]
    for bound in bounds:
        name, version = bound.split(">=")
        assert pins[name].removesuffix(".*") == version
