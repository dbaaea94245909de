"""What `make audit` says, from pip-audit's own JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FINE = {"name": "click", "version": "8.3.1", "vulns": []}
BAD = {"name": "pillow", "version": "10.0.0", "vulns": [{"id": "CVE-2023-50447", "fix_versions": ["10.2.0"]}]}
UNKNOWN = {"name": "zarr", "skip_reason": "Dependency not found on PyPI and could not be audited: zarr (3.1.6)"}


@pytest.mark.parametrize(
    ("dependencies", "code", "said"),
    [
        ([FINE], 0, "1 packages audited, 0 known vulnerabilities\n"),
        ([FINE, UNKNOWN], 0, "1 packages audited, 0 known vulnerabilities; 1 could not be looked up\n"),
        ([FINE, BAD], 1, "pillow 10.0.0: CVE-2023-50447, mended in 10.2.0\n2 packages audited, 1 known vulnerabilities\n"),
        ([UNKNOWN, UNKNOWN], 2, "nothing was audited: none of 2 packages was found in the data base of vulnerabilities\n"),
        (None, 2, "nothing was audited: pip-audit failed, as its message above says\n"),
    ],
)  # fmt: skip
def test_an_audit_that_could_not_look_anything_up_does_not_pass_for_a_clean_one(dependencies, code, said):
    text = "" if dependencies is None else json.dumps({"dependencies": dependencies, "fixes": []})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("audit.py"))], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, said)


def test_releases_of_lightning_that_carried_malware_are_never_installed():
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (lightning,) = (requirement for text in wanted if (requirement := Requirement(text)).name == "lightning")
    assert lightning.specifier.contains("2.6.1")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))
