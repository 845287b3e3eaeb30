"""The version and its date are the same wherever a release names them."""

import re
from pathlib import Path

import adamss

ROOT = Path(__file__).parents[1]


def found(pattern, name):
    return re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_version_and_date_agree():
    releases = found(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", "CHANGELOG.md")
    cited = found(r"^version: (\S+)$", "CITATION.cff") + found(r"^date-released: (\S+)$", "CITATION.cff")
    assert releases[0] == tuple(cited)
    assert cited[0] == adamss.__version__
