"""What `flwr run` needs for a job: an app that points into dtl, and where the SuperLink is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtl.core.errors import UsageError
from dtl.core.files.atomic import AtomicFolder, write_file
from dtl.core.flower.engine import APP

Value = str | int | float | bool

_PROJECT = """\
[project]
name = "dtl-job"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "dtl"

[tool.flwr.app.components]
serverapp = "dtl.core.flower.server:app"
clientapp = "dtl.core.flower.client:app"

[tool.flwr.app.config]
"""
_CONNECTION = '[superlink]\ndefault = "dtl"\n\n[superlink.dtl]\n'


@dataclass(frozen=True)
class Connection:
    """Where the SuperLink is, and the certificate of who vouches for it (None: no TLS)."""

    address: str
    root_certificates: Path | None = None


def write_config(folder: Path, settings: Mapping[str, Value | None], link: Connection) -> None:
    """Write a new folder for `flwr run`: the app with its settings, and config.toml.

    Settings that are None are left out. Raises UsageError for a folder that is not new.
    """
    lines = [f"{name} = {_toml(value)}\n" for name, value in settings.items() if value is not None]
    security = (
        f"root-certificates = {_toml(str(link.root_certificates.absolute()))}"
        if link.root_certificates
        else "insecure = true"
    )
    connection = f"{_CONNECTION}address = {_toml(link.address)}\n{security}\n"
    with AtomicFolder(folder) as staging:
        (staging.temporary / APP).mkdir()
        project = (_PROJECT + "".join(lines)).encode()
        write_file(staging.temporary / APP / "pyproject.toml", project, force=True)
        write_file(staging.temporary / "config.toml", connection.encode(), force=True)
        staging.commit()


def _toml(value: Value) -> str:
    """A value as TOML; UsageError for text that cannot stand in a plain quoted string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not value.isprintable() or {'"', "\\"} & set(value):
            raise UsageError(f"{value!r}: quotes and backslashes cannot stand here")
        return f'"{value}"'
    return str(value)
