"""
Says what pip-audit found; `pip-audit -f json | python audit.py`. `make audit` runs it on the installed environment.

Exits with 0 if no installed release is known to be vulnerable, 1 if some are, 2 if nothing could be looked up, as without a network.
"""

from __future__ import annotations

import json
import sys


def report(text: str) -> tuple[int, str]:
    """The exit code and the text for pip-audit's JSON, which is empty where pip-audit failed."""
    try:
        packages = [p for p in json.loads(text)["dependencies"] if p["name"] != "kdpipe"]
    except (ValueError, KeyError):
        return 2, "nothing was audited: pip-audit failed, as its message above says"
    looked_up = [package for package in packages if "vulns" in package]
    if not looked_up:
        return 2, f"nothing was audited: none of {len(packages)} packages was found in the data base of vulnerabilities"
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no release yet'}"
        for package in looked_up
        for found in package["vulns"]
    ]
    skipped = len(packages) - len(looked_up)
    rest = f"; {skipped} could not be looked up" if skipped else ""
    lines.append(f"{len(looked_up)} packages audited, {len(lines)} known vulnerabilities{rest}")
    return int(len(lines) > 1), "\n".join(lines)


if __name__ == "__main__":
    code, said = report(sys.stdin.read())
    print(said)
    sys.exit(code)
