"""Folders: what comes with the package, and where it keeps its measurements of a machine."""

from __future__ import annotations

import getpass
import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_TARGET = BUNDLED / "chat-14m"
BUNDLED_LM = BUNDLED / "draft-lm"
BUNDLED_HEAD = BUNDLED / "fspad"
"""The drafter of the bundled target unless another is named."""


_log = logging.getLogger("foredraft")


def cache_folder() -> Path | None:
    """Where measurements and compiled code are kept, created if need be.

    It is ``$FOREDRAFT_CACHE``, else ``foredraft`` in the user's cache folder. Where that cannot be written it is a private
    temporary folder, and None where there is none either; a warning says so once a process.
    """
    return _writable(_wanted())


def cached_file(name: str) -> Path | None:
    """The file of this name in the cache: one that exists, also in a folder that can only be read, else one to be written."""
    there = _wanted() / name
    with suppress(OSError):
        if there.is_file():
            return there
    folder = cache_folder()
    return None if folder is None else folder / name


def keep(name: str, text: str) -> None:
    """Writes a file of the cache in one go, so that no reader sees half of it; nothing where there is no folder.

    Raises:
        OSError: the disk is full, for instance.
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
        reason = f"the cache folder {str(wanted)!r} cannot be written ({error.strerror or error})"
    private = _private_folder()
    if private is None:
        _log.warning("%s, and no temporary folder either: nothing is compiled or timed. Set FOREDRAFT_CACHE", reason)
    else:
        _log.warning("%s: measurements are kept in %s. Set FOREDRAFT_CACHE to another folder", reason, private)
    return private


def _private_folder() -> Path | None:
    """A temporary folder that belongs to this user alone; None where there is none, or somebody else owns it."""
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
