"""Files that another run, another program or a fault may have put there: read carefully, written whole or not at all.

What a path names is read only if it is a regular file, and never more of it than the caller has room for: a pipe would
wait for ever, a device has no end. Within a folder of ours (a run, a checkpoint, built data) links are not followed
either: a folder that came out of an archive may point anywhere. Nothing is written through a link: a new file takes the
place of whatever had the name.
"""

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Far above what manifests, states and settings need.
MOST_JSON_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20


def open_regular(path: Path, *, follow: bool = False) -> BinaryIO:
    """`path` open for reading, if it is a regular file; follow: it may be a link to one.

    Raises OSError otherwise, without waiting.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def read(path: Path, most: int = MOST_JSON_BYTES, *, follow: bool = False) -> bytes:
    """The whole content of a regular file of at most `most` bytes. Raises OSError, ValueError for a longer one."""
    with open_regular(path, follow=follow) as stream:
        length = min(os.fstat(stream.fileno()).st_size, most)
        content = stream.read(length + 1)
    if len(content) > length:
        raise ValueError(f"{path} is longer than {length:,} bytes, too long for what it should be")
    return content


def read_json(path: Path, *, follow: bool = False) -> Any:
    """Read a JSON file. Raises OSError, ValueError (whatever is wrong with the text), which name the file."""
    text = read(path, follow=follow)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: bytes) -> Any:
    """Parse JSON text. Raises ValueError, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def num_bytes(path: Path) -> int:
    """Length of a regular file, links not followed. Raises OSError."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    return found.st_size


def write(path: Path, content: bytes | str) -> None:
    """Put a file with this content (text in UTF-8) in the place of whatever `path` names, at once. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open_new(temporary) as stream:
            stream.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_output(path: Path, content: str) -> None:
    """Write what a user asked for: into a pipe or a device, and through a link; else as `write`. Raises OSError."""
    if path.exists() and not path.is_file():
        with open(path, "wb") as stream:
            stream.write(content.encode())
    else:
        write(path.resolve(), content)


def open_new(path: Path) -> BinaryIO:
    """A file that was not there, open for writing. Raises OSError (FileExistsError for anything there, a link too)."""
    return open(path, "xb")


def make_folder(path: Path) -> Path:
    """`path`, made if it was not there. Raises OSError for a link: what is written below it would land elsewhere."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(f"{path} is a link: nothing is written through it; put the folder itself there")
    return path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into; it becomes `target` if nothing is raised, else nothing of it stays.

    Raises OSError, also where something is at `target` by then.
    """
    temporary = target.parent / f".writing-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, *, follow: bool = False, progress: Callable[[int], None] = lambda _bytes: None) -> str:
    """SHA-256 of a regular file; progress is told the bytes of every block. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path, follow=follow) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
