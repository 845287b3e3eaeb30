"""Check what is in a wheel and a source archive, as `nox -s package` builds them. ::

python tests/check_archives.py dist
"""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = PROJECT["tool"]["hatch"]["build"]["targets"]
PACKAGES = [PurePosixPath(path).name for path in TARGETS["wheel"]["packages"]]
AT_THE_ROOT = ("README.md", "LICENSE", "pyproject.toml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")


def require(condition: object, message: str) -> None:
    """End with a message if something is wrong."""
    if not condition:
        sys.exit(f"check_archives: {message}")


def check_wheel(path: Path) -> None:
    """Require the four packages, all of their modules and types, the licence, and nothing else."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        tops = {PurePosixPath(name).parts[0] for name in names}
        information = next(top for top in tops if top.endswith(".dist-info"))
        require(tops == {information, *PACKAGES}, f"the wheel installs {sorted(tops)}, and should {PACKAGES}")
        metadata = HeaderParser().parsestr(archive.read(f"{information}/METADATA").decode())
    for source in TARGETS["wheel"]["packages"]:
        folder = ROOT / source
        installed = {name for name in names if name.startswith(f"{folder.name}/")}
        modules = {file.relative_to(folder.parent).as_posix() for file in folder.rglob("*.py")}
        missing = {*modules, f"{folder.name}/py.typed"} - installed
        require(not missing, f"the wheel lacks {sorted(missing)}")
        strange = [n for n in installed if "tests" in n.split("/") or not (folder.parent / n).is_file()]
        require(not strange, f"the wheel has {strange}, which are no files of {source}")
    require(f"{information}/licenses/LICENSE" in names, "the wheel lacks LICENSE")
    require(f"{information}/entry_points.txt" in names, "the wheel lacks its entry points")
    extras = set(metadata.get_all("Provides-Extra", []))
    require(
        extras == set(PROJECT["project"]["optional-dependencies"]), f"the wheel offers the extras {extras}"
    )


def check_source(path: Path) -> None:
    """Require what hatch is told to include, and that no file is one that git ignores."""
    with tarfile.open(path) as archive:
        files = [
            PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in archive if member.isfile()
        ]
    for included in (*TARGETS["sdist"]["include"], *AT_THE_ROOT):
        entry = PurePosixPath(included.lstrip("/"))
        require(any(file.is_relative_to(entry) for file in files), f"the source archive lacks {entry}")
    made = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".nox", ".venv", "dist"}
    strange = [str(file) for file in files if made & set(file.parts)]
    require(not strange, f"the source archive has {strange}")


def main() -> None:
    """Check the one wheel and the one source archive of a folder."""
    folder = Path(sys.argv[1])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_source(source)
    print(
        f"{wheel.name} ({wheel.stat().st_size:,} bytes), {source.name} ({source.stat().st_size:,} bytes): complete"
    )


if __name__ == "__main__":
    main()
