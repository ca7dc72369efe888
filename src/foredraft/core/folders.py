"""Directories: the bundled models, and the cache of measurements and compiled code."""

from __future__ import annotations

import getpass
import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "bundled"
BUNDLED_TARGET = BUNDLED / "chat-14m"
BUNDLED_LM = BUNDLED / "draft-lm"
BUNDLED_HEAD = BUNDLED / "fspad"
"""The default drafter of the bundled target."""


_log = logging.getLogger("foredraft")


def cache_folder() -> Path | None:
    """Returns the directory for measurements and compiled code, and creates it if necessary.

    It is ``$FOREDRAFT_CACHE``, else ``foredraft`` in the user's cache directory. If that cannot be written, it is a private
    temporary directory, or None if there is no such directory either. A warning reports this once per process.
    """
    return _writable(_wanted())


def cached_file(name: str) -> Path | None:
    """Returns the path of a file in the cache. An existing file is found even if the cache is read-only.

    Returns None if the file does not exist and there is no directory in which it could be written.
    """
    there = _wanted() / name
    with suppress(OSError):
        if there.is_file():
            return there
    folder = cache_folder()
    return None if folder is None else folder / name


def keep(name: str, text: str) -> None:
    """Writes a file of the cache atomically, so that no reader sees half of it. Without a cache directory, does nothing.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    folder = cache_folder()
    if folder is not None:
        part = folder / f"{name}.{os.getpid()}"
        part.write_text(text)
        part.replace(folder / name)


def _wanted() -> Path:
    given = os.environ.get("FOREDRAFT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foredraft"


@cache
def _writable(wanted: Path) -> Path | None:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        reason = f"the cache directory {str(wanted)!r} cannot be written ({error.strerror or error})"
    private = _private_folder()
    if private is None:
        _log.warning("%s, nor can a temporary directory: nothing is compiled or timed. Set FOREDRAFT_CACHE", reason)
    else:
        _log.warning("%s: measurements are kept in %s. Set FOREDRAFT_CACHE to a writable directory", reason, private)
    return private


def _private_folder() -> Path | None:
    """Returns a temporary directory that only this user can access. None if there is none or another user owns it."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    try:
        folder = Path(tempfile.gettempdir()) / f"foredraft-{user}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        is_private = stat.S_ISDIR(found.st_mode) and (os.name == "nt" or (found.st_uid == user and not found.st_mode & 0o077))
        if not is_private:
            return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def is_file(path: Path) -> bool:
    """Whether a path is a file. A path that is too long is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
