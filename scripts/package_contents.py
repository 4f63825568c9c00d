"""What the sdist and the wheel hold; called by scripts/check-package. Standard library only.

package_contents.py SOURCE SDIST WHEEL DIRECT_WHEEL   looks into the archives
package_contents.py --import WHEEL                    imports every module of the wheel that is installed here
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

NOT_OURS = ("tests", "benchmarks", "scripts", "docs")  # of the repository only, even with an __init__.py
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def main(arguments: list[str]) -> int:
    if arguments[0] == "--import":
        problems = import_all(Path(arguments[1]))
    else:
        problems = look_inside(*map(Path, arguments))
    for problem in problems:
        print(f"check-package: {problem}", file=sys.stderr)
    return 1 if problems else 0


def look_inside(source: Path, sdist: Path, wheel: Path, direct: Path) -> list[str]:
    """What is missing, what should not be there, and whether torch is bounded."""
    # Not from pyproject.toml: a room that was forgotten there is what this looks for.
    rooms = [
        folder.parent.name for folder in source.glob("*/__init__.py") if folder.parent.name not in NOT_OURS
    ]
    with tarfile.open(sdist) as archive:
        in_sdist = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    in_wheel = files(wheel)
    wanted = {f"{room}/py.typed" for room in rooms}
    for room in rooms:
        wanted |= {str(file.relative_to(source)) for file in (source / room).rglob("*.py")}
    protos: set[str] = set()
    for proto in (source / "proto" / "baton").rglob("*.proto"):
        path = str(proto.relative_to(source))
        protos.add(path)
        wanted |= {path.removeprefix("proto/").removesuffix(".proto") + ending for ending in STUBS}
    problems = [f"{name} is not in the wheel" for name in sorted(wanted - in_wheel)]
    problems += [f"{name} is not in the sdist" for name in sorted((wanted | protos) - in_sdist)]
    strays = {name.split("/")[0] for name in in_wheel} - {*rooms}
    problems += [f"{name}: should not be in the wheel" for name in sorted(strays) if ".dist-info" not in name]
    unwanted = ("tests", "models", ".venv")
    problems += [
        f"{name}: should not be in the sdist" for name in sorted(in_sdist) if name.split("/")[0] in unwanted
    ]
    problems += [f"{name}: only in one of the two wheels" for name in sorted(in_wheel ^ files(direct))]
    return problems


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def import_all(wheel: Path) -> list[str]:
    """Imports what is installed here, and nothing from elsewhere; says what cannot be imported or is shadowed."""
    here = Path(sysconfig.get_path("purelib"))
    problems = []
    for name in sorted(files(wheel)):
        if not name.endswith(".py"):
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            # Importing a __main__ would run it.
            found = importlib.util.find_spec(module)
            if not module.endswith("__main__"):
                importlib.import_module(module)
        except Exception as error:
            problems.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
            continue
        if found is None or found.origin is None or not Path(found.origin).is_relative_to(here):
            problems.append(f"{module} comes from {found.origin if found else 'nowhere'}")
    # The wheel's own dist-info is no room; where .venv has this project installed for editing, it lies there too.
    rooms = {name.split("/")[0] for name in files(wheel)}
    problems += shadowed({room for room in rooms if not room.endswith(".dist-info")}, here)
    torch = [line for line in importlib.metadata.requires("baton-serve") or [] if line.startswith("torch")]
    if len(torch) != 1 or "<" not in torch[0]:
        problems.append(f"torch must have an upper bound: {torch}")
    return problems


def shadowed(rooms: set[str], here: Path) -> list[str]:
    """Our packages have plain names: no dependency may bring one of the same name."""
    others = [Path(entry) for entry in sys.path if entry and Path(entry) != here]
    return [
        f"{entry / room}: another package of the same name"
        for entry in others
        for room in sorted(rooms)
        if (entry / room).is_dir() or (entry / f"{room}.py").is_file()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
