"""Outputs that are complete or absent: temporary file, fsync, rename.

A temporary file lives in the folder of its output, under a hidden name. It is locked while
its process lives; leftovers of a killed process are removed by the next command that
writes the same output.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from dtl.core.errors import DtlError, FormatError, UsageError

PUBLIC_MODE = 0o666  # less the umask
PRIVATE_MODE = 0o600

_SNIFF_BYTES = 1 << 14
_PRECIOUS = (b'"event":"ledger"', b'"participant_seed":', b'"server_seed":', b'"box":')
_WRONG_NAME = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,  # a socket
)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a reported failure: usage (2) or the machine (1)."""
    try:
        yield
    except OSError as error:
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        kind = UsageError if error.errno in _WRONG_NAME else DtlError
        raise kind(f"{path}: {reason}") from None


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicOutput:
    """A file under construction; nothing appears under its name before `commit`.

    Use as a context manager: leaving it without `commit` removes the temporary file.
    Raises UsageError when the output exists and `force` is false.
    """

    def __init__(self, path: Path, force: bool = False, mode: int = PUBLIC_MODE) -> None:
        self.path = path
        self.descriptor = -1
        self._force, self._mode = force, mode
        self._sealed = self._keep = False
        check_output(path, force)
        _remove_leftovers(path)
        self._temporary = _temporary_name(path)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        with machine_errors(self.path):
            while view:
                view = view[os.write(self.descriptor, view) :]

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at a place."""
        view = memoryview(data).cast("B")
        with machine_errors(self.path):
            while view:
                done = os.pwrite(self.descriptor, view, offset)
                view, offset = view[done:], offset + done

    def stream(self) -> IO[bytes]:
        """The output as a file object, for libraries that want one; close it before `commit`."""
        return os.fdopen(os.dup(self.descriptor), "r+b")

    def seal(self, digest: bytes) -> None:
        """Finish writing: fsync, and move to a temporary name that carries the digest."""
        pending = pending_path(self.path, digest)
        with machine_errors(self.path):
            os.fsync(self.descriptor)
            self._temporary.replace(pending)
            self._temporary, self._sealed = pending, True
            fsync_folder(self.path.parent)

    def sync(self) -> None:
        """Make what was written durable, before a ledger says that it exists."""
        with machine_errors(self.path):
            os.fsync(self.descriptor)

    def commit(self) -> None:
        """Give the finished file its name."""
        with machine_errors(self.path):
            if not self._sealed:
                os.fsync(self.descriptor)
            place(self._temporary, self.path, self._force)
        self._close()

    def record(self, append: Callable[[], None]) -> None:
        """Write the ledger line of a sealed file.

        Whatever interrupts that leaves the sealed file: the line may be on disk, and then a
        rerun completes the work with `finish`. Only where `append` says that it failed is
        the file removed; a rerun removes a sealed file without a line.
        """
        self._keep = True
        try:
            append()
        except (DtlError, OSError):
            self._keep = False
            raise

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            while self.descriptor < 0:
                with machine_errors(self.path):
                    self.descriptor = os.open(self._temporary, flags, self._mode)
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX)
                if not os.fstat(self.descriptor).st_nlink:  # taken for a leftover before the lock
                    self._close()
        except BaseException:  # an interruption too
            self._temporary.unlink(missing_ok=True)
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.descriptor >= 0:
            if not self._keep:
                with suppress(OSError):
                    self._temporary.unlink()
            self._close()


class AtomicFolder:
    """A folder under construction, readable by its owner only, named by `commit`.

    Use as a context manager: files go into `temporary`; leaving it without `commit` removes
    it. Raises UsageError as `check_new_folder`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  (resolve would follow links)
        check_new_folder(self.path)
        _remove_leftovers(self.path)
        self.temporary = _temporary_name(self.path)
        with machine_errors(path):
            while not self._begin():  # taken for a leftover before it was locked
                pass

    def _begin(self) -> bool:
        self.temporary.mkdir(mode=0o700)
        try:
            self._lock = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except FileNotFoundError:
            return False
        except BaseException:
            self.temporary.rmdir()
            raise
        if os.fstat(self._lock).st_nlink:
            return True
        os.close(self._lock)
        return False

    def commit(self) -> None:
        """Give the finished folder its name."""
        with machine_errors(self.path):
            fsync_folder(self.temporary)
            try:
                self.temporary.rename(self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # somebody was faster
                    check_new_folder(self.path)
                raise
            try:
                fsync_folder(self.path.parent)
            except BaseException:
                self.path.rename(self.temporary)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        os.close(self._lock)


def check_new_folder(folder: Path) -> None:
    """Raise UsageError unless `folder` does not exist or is empty, and is not the current one."""
    with machine_errors(folder):
        if not folder.exists() and not folder.is_symlink():
            if not Path(os.path.abspath(folder)).parent.is_dir():  # noqa: PTH100
                raise UsageError(f"{folder}: its parent folder does not exist")
        elif folder.is_symlink() or not folder.is_dir():
            raise UsageError(f"{folder}: exists already, and is not a folder")
        elif any(folder.iterdir()) or folder.samefile(Path.cwd()):
            raise UsageError(
                f"{folder}: expected a new or empty folder", "nothing in it is ever overwritten"
            )


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _hidden(path: Path, ending: str) -> list[Path]:
    """Temporary files and folders of an output."""
    with machine_errors(path):
        return [
            entry
            for entry in path.parent.iterdir()
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(ending)
        ]


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of killed commands with this output."""
    for leftover in _hidden(path, ".partial"):
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is in use
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()
            finally:
                os.close(descriptor)


def remove_second_names(path: Path) -> None:
    """Remove the temporary names of a finished output whose command was killed in `place`."""
    _remove_leftovers(path)
    for pending in pending_files(path):
        if path.exists() and pending.samefile(path):
            fsync_folder(path.parent)
            pending.unlink()


def pending_path(path: Path, digest: bytes) -> Path:
    """The name of a finished output that has not got its own name yet."""
    return path.with_name(f".{path.name}.{digest.hex()[:32]}.pending")


def pending_files(path: Path) -> list[Path]:
    """Sealed files that have not got the name `path` yet."""
    return _hidden(path, ".pending")


def finish(path: Path, digest: bytes, force: bool) -> bool:
    """Complete the rename of a sealed output; False when there is none with this digest."""
    pending = pending_path(path, digest)
    if not pending.is_file():
        return False
    with machine_errors(path):
        place(pending, path, force)
    return True


def place(finished: Path, path: Path, force: bool) -> None:
    """Rename a finished file to its name; without `force` never over an existing one.

    Where the name cannot be made durable, it is taken back, and what it replaced put back.
    """
    if force:
        _replace(finished, path)
        return
    try:
        os.link(finished, path, follow_symlinks=False)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise _exists(path) from None
        _replace(finished, path)
        return
    try:
        fsync_folder(path.parent)
    except BaseException:  # `finished` is still there: nothing is lost
        path.unlink()
        raise
    with suppress(OSError):  # the next command with this output removes it
        finished.unlink()


def _replace(finished: Path, path: Path) -> None:
    old: Path | None = _temporary_name(path)
    undo = True
    try:
        os.link(path, str(old), follow_symlinks=False)
    except OSError as error:
        old = None  # there is nothing; or no hard links, and then what is replaced is gone
        undo = error.errno == errno.ENOENT
    try:
        finished.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        if undo and not finished.exists():
            path.rename(finished)
            if old is not None:
                old.replace(path)
        raise
    finally:
        if old is not None:
            with suppress(OSError):  # the next command with this output removes it
                old.unlink(missing_ok=True)
    if finished.exists():  # `replace` does not make one of two names of one file
        with suppress(OSError):
            finished.unlink()


def check_output(path: Path, force: bool) -> None:
    """Raise UsageError when `path` cannot be an output: it exists, or its folder does not."""
    with machine_errors(path):
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise UsageError(f"{path.parent}: expected a folder")
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
    if _is_precious(path):
        raise UsageError(f"{path}: key files and ledgers are never overwritten")
    if force and stat.S_ISREG(found.st_mode):
        return
    remove_second_names(path)
    raise _exists(path)


def _is_precious(path: Path) -> bool:
    """Whether an existing file is a key or a ledger, by its name or its content."""
    if path.suffix in (".key", ".ledger"):
        return True
    with suppress(DtlError):
        start = read_start(path, _SNIFF_BYTES)
        return start.startswith(b"{") and any(mark in start for mark in _PRECIOUS)
    return False


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path}: exists already", "choose another name, or add --force")


def write_file(path: Path, data: bytes, force: bool = False, mode: int = PUBLIC_MODE) -> None:
    """Write a small file atomically."""
    with AtomicOutput(path, force, mode) as output:
        output.write(data)
        output.commit()


def open_regular(path: Path) -> int:
    """Open a regular file for reading; returns the descriptor. UsageError for anything else."""
    with machine_errors(path):
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UsageError(f"{path}: expected a file")
        return descriptor


def pread_up_to(descriptor: int, length: int, start: int) -> bytes:
    """Read `length` bytes from `start` on; fewer only where the file ends before."""
    data = os.pread(descriptor, length, start)
    if len(data) == length:
        return data
    parts = [data]
    while parts[-1] and (left := length - sum(map(len, parts))):
        parts.append(os.pread(descriptor, left, start + length - left))
    return b"".join(parts)


def read_start(path: Path, length: int) -> bytes:
    """Up to `length` bytes from the start of a regular file."""
    with machine_errors(path), os.fdopen(open_regular(path), "rb") as file:
        return file.read(length)


def read_file(path: Path, limit: int) -> bytes:
    """Read a small regular file of at most `limit` bytes; FormatError if it is larger."""
    data = read_start(path, limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path}: expected at most {limit} bytes")
    return data
