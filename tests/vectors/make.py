"""Make the vectors anew, and compare them with those in this folder: `make vectors`.

Ends with 1 on any difference. With --write the folder is brought up to date instead.
"""

import base64
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.second import intermediates as second
from tests.vectors.accepted import accepted
from tests.vectors.faults import Fault, all_faults
from tests.vectors.intermediates import Witnessed
from tests.vectors.published import Published
from tests.vectors.scenarios import SCENARIOS
from tests.vectors.scene import Scene

HERE = Path(__file__).parent
WRAPPED = "wrapped.json"
FULL_SIZE = "full-size"
LONGEST_LIST = 2048  # characters


def encode(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read(name: str) -> dict[str, Any]:
    """A vector of this folder."""
    found: dict[str, Any] = json.loads((HERE / name).read_bytes())
    return found


def files_of(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _base64(path.read_bytes()) for path in paths}


def changed(good: Mapping[str, bytes], files: Mapping[str, Any]) -> dict[str, bytes | None]:
    """The files of a vector: whole ones are in base64, splices are of good ones; None: removed."""
    found: dict[str, bytes | None] = {}
    for name, given in files.items():
        if given is None:
            found[name] = None
        elif isinstance(given, str):
            found[name] = base64.b64decode(given)
        else:
            found[name] = spliced(good[name], given)
    return found


def write_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Put the files of a vector into a folder, which has the good ones."""
    good = {name: (folder / name).read_bytes() for name in files if (folder / name).exists()}
    for name, data in changed(good, files).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        if data is None:
            path.unlink()
            continue
        path.touch(mode=0o600)
        path.write_bytes(data)


def spliced(good: bytes, splice: Mapping[str, Any]) -> bytes:
    """A file of which `cut` bytes at byte `at` gave way to `put`."""
    at, put = splice["at"], base64.b64decode(splice["put"])
    return good[:at] + put + good[at + splice["cut"] :]


def splice(good: bytes, bad: bytes) -> dict[str, Any]:
    """What to cut out of one file, and to put there, to get another."""
    start = _common(good, bad)
    rest, other = good[start:], bad[start:]
    end = _common(rest[::-1], other[::-1])
    put = other[: len(other) - end]
    return {"at": start, "cut": len(rest) - end, "put": _base64(put)}


def _common(one: bytes, other: bytes) -> int:
    """How many bytes they begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _vector(fault: Fault, scene: Scene) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name, raw in fault.change(scene).items():
        if raw is None:
            files[name] = None
        elif (scene.folder / name).exists():
            files[name] = splice(scene.read(name), raw)
        else:
            files[name] = _base64(raw)
    tried = {"tried": fault.tried} if fault.tried else {}
    return tried | {
        "about": fault.about,
        "job": fault.scene,
        "command": fault.command.split(),
        "exit": fault.code,
        "files": files,
    }


def shortened(value: Any) -> Any:
    """Long lists give way to the SHA-512 of their canonical JSON, for jobs of full size."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    text = json.dumps(value, separators=(",", ":"))
    if not isinstance(value, list) or len(text) <= LONGEST_LIST:
        return value
    return {"sha512": hashlib.sha512(text.encode()).hexdigest()}


def intermediates_of(title: str, found: Any) -> Any:
    """What a vector says of what was computed on the way."""
    return shortened(found) if title == FULL_SIZE else found


def make() -> dict[str, bytes]:
    """Every file of this folder that is not code, by its path."""
    wrapped = read(WRAPPED) if (HERE / WRAPPED).exists() else {}
    used: dict[str, str] = {}
    made: dict[str, bytes] = {}
    for title, play in SCENARIOS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            dtl = Published(folder, title, wrapped)
            play(folder, dtl)
            found = Witnessed(folder, dtl.inputs).everything()
            content = {
                "files": files_of(folder),
                "inputs": dtl.inputs,
                "intermediates": intermediates_of(title, found),
            }
            made[f"{title}.json"] = encode(content)
            scene = Scene(dtl)
            for folder_name, faults in (("refused", all_faults()), ("accepted", accepted())):
                for fault in faults:
                    if fault.scene == title:
                        path = f"{folder_name}/{fault.name}.json"
                        assert path not in made, path
                        made[path] = encode(_vector(fault, scene))
            used |= dtl.used
    made[WRAPPED] = encode(used)
    return made


def stored() -> dict[str, bytes]:
    """The vectors in this folder."""
    return {str(path.relative_to(HERE)): path.read_bytes() for path in HERE.rglob("*.json")}


def differences(made: Mapping[str, bytes], known: Mapping[str, bytes]) -> list[str]:
    return sorted(n for n in {*made, *known} if made.get(n) != known.get(n))


def main() -> int:
    made = make()
    different = differences(made, stored())
    if "--write" in sys.argv[1:]:
        for name in different:
            path = HERE / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            if name in made:
                path.write_bytes(made[name])
        different = []
    for title in SCENARIOS:
        with tempfile.TemporaryDirectory() as name:
            vector = json.loads(made[f"{title}.json"])
            write_files(Path(name), vector["files"])
            found = second.Witnessed(Path(name), vector["inputs"]).everything()
            if intermediates_of(title, found) != vector["intermediates"]:
                different.append(f"{title}.json, in the second implementation's eyes")
    for name in different:
        print(f"differs: {name}", file=sys.stderr)
    print(f"{len(made)} vectors, {sum(map(len, made.values())):,} bytes")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
