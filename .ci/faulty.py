"""Runs the script on a disk that fails at the Nth of its calls, or is gone together with the process.

`Disk` stands before the module `os` of the script: it counts the calls that the script makes for its files, and at one
of them does a deed of the table DEEDS. `Runner` runs the script so, each run a process of its own that is really
killed; they are forked from one that has imported the script and its libraries already, which saves most of the time.
"""
from __future__ import annotations

import collections
import contextlib
import errno
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import wucme

CHANGING = frozenset({"create", "write", "fsync", "replace", "link", "symlink", "unlink", "fchmod", "fchown", "mkdir",
                      "chmod", "ftruncate", "pwrite"})
GROWING = frozenset({"create", "write", "replace", "link", "symlink", "mkdir", "ftruncate", "pwrite"})
READING = frozenset({"open", "read", "close"})
PIPES = ("drain", "command", "start")       # functions of the script whose descriptors are no files
LIBRARIES = ("base64", "calendar", "configparser", "datetime", "difflib", "email.utils", "getopt", "graphlib",
             "hashlib", "hmac", "http.client", "http.server", "ipaddress", "queue", "random", "shlex", "socketserver",
             "ssl", "subprocess", "textwrap", "threading", "urllib.request", "cryptography.x509",
             "cryptography.hazmat.primitives.serialization", "cryptography.hazmat.primitives.asymmetric.rsa",
             "cryptography.hazmat.primitives.asymmetric.padding", "cryptography.hazmat.primitives.asymmetric.ec")
SECONDS = 60            # no run lasts longer, or it counts as hung


class Fault(NamedTuple):
    """What happens at which call; 0 is none."""

    deed: str
    at: int


class Run(NamedTuple):
    """How a run ended: its exit status (negative: the signal that killed it), what it said, and the calls it made.

    `struck` is the call at which the deed was done, "" if the run ended before.
    """

    status: int
    output: str
    calls: Mapping[str, int]
    struck: str


class Disk:
    """The module `os` as the script sees it, with one fault."""

    def __init__(self, fault: Fault, spare: Path, told: Callable[[str, str], None]) -> None:
        """Take a directory on the same file system for what a power cut has to bring back."""
        self.deed, self.at, self.spare, self.told = DEEDS[fault.deed], fault.at, spare, told
        self.count = 0
        self.struck = False
        self.guard = threading.RLock()
        self.soft: dict[tuple[int, int], None] = {}                     # files whose content is not on the disk yet
        self.undo: list[tuple[str, Callable[[], object]]] = []          # and names, by directory

    def __getattr__(self, name: str) -> Any:
        """Give what the module has, watched if it is about files."""
        real = getattr(os, name)
        return functools.partial(self.call, name, real) if name in (CHANGING | READING) else real

    def call(self, name: str, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Make a call, or do the deed at it."""
        caller = sys._getframe(1).f_code.co_name
        if caller in PIPES:
            return real(*arguments, **more)
        kind = "create" if name == "open" and arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else name
        is_log = caller == "__call__"
        with self.guard:
            if not is_log:
                self.told("call", kind)
            if kind in self.deed.calls:
                self.count += not is_log
                if self.count == self.at and not is_log:
                    self.told("struck", f"{kind} in {caller}")
                    self.struck = True
                    return self.deed.act(self, real, *arguments, **more)
                if self.struck and self.deed.lasting:
                    return self.deed.act(self, real, *arguments, **more)
            return self.really(kind, real, *arguments, **more)

    def really(self, kind: str, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Make a call, and note what a power cut would take back."""
        back = self.way_back(kind, *arguments) if self.deed.cut else None
        result = real(*arguments, **more)
        if self.deed.cut:
            self.note(kind, result if kind == "create" else arguments[0])
            if back:
                self.undo.append((os.path.dirname(os.path.abspath(arguments[-1 if kind in TWO else 0])), back))
        return result

    def way_back(self, kind: str, *arguments: Any) -> Callable[[], object] | None:
        """How to undo a change of a name that is not on the disk yet."""
        target = arguments[1] if kind in TWO else arguments[0]
        kept = self.spare / str(len(os.listdir(self.spare)))
        there = isinstance(target, str) and os.path.lexists(target)
        if there and kind in ("replace", "unlink"):
            os.link(target, kept, follow_symlinks=False)
        if kind == "replace":
            return functools.partial(take_back, arguments[0], target, kept if there else None)
        if kind == "unlink" and there:
            return functools.partial(os.rename, kept, target)
        if kind in ("create", "link", "symlink") and not there:
            return functools.partial(os.unlink, target)
        return functools.partial(shutil.rmtree, target) if kind == "mkdir" else None

    def note(self, kind: str, descriptor: Any) -> None:
        """Note what is on the disk now, and what is not."""
        if kind in ("create", "write", "pwrite", "ftruncate"):
            self.soft[identity(os.fstat(descriptor))] = None
        elif kind == "fsync":
            about = os.fstat(descriptor)
            self.soft.pop(identity(about), None)
            if stat.S_ISDIR(about.st_mode):
                self.undo = [(parent, back) for parent, back in self.undo
                             if not os.path.isdir(parent) or identity(os.stat(parent)) != identity(about)]


TWO = ("replace", "link", "symlink")


def identity(about: os.stat_result) -> tuple[int, int]:
    """What a file is known by whatever it is called."""
    return about.st_dev, about.st_ino


def take_back(source: str, target: str, kept: Path | None) -> None:
    """Undo a rename."""
    os.rename(target, source)
    if kept:
        os.rename(kept, target)


# === The deeds ===


def die(*_: Any, **__: Any) -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(_: Disk, real: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    """Be killed when it is done."""
    real(*arguments, **more)
    die()


def die_half_way(_: Disk, real: Callable[..., Any], descriptor: int, data: bytes, *more: Any) -> None:
    """Be killed in the middle of a write."""
    real(descriptor, data[:len(data) // 2], *more)
    die()


def write_less(_: Disk, real: Callable[..., Any], descriptor: int, data: bytes, *more: Any) -> Any:
    """Write the first part only, and say so."""
    return real(descriptor, data[:max(1, len(data) // 2)], *more)


def be_ended(_: Disk, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Get a SIGTERM before it is done."""
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **more)


def cut_data(disk: Disk, *_: Any, **__: Any) -> None:
    """Lose power: names are as they are, but what was not flushed is lost."""
    for path in sorted(Path(wucme_directory()).rglob("*")):
        if not path.is_symlink() and path.is_file() and identity(path.stat()) in disk.soft:
            os.truncate(path, 0)
    die()


def cut_names(disk: Disk, *_: Any, **__: Any) -> None:
    """Lose power: what was done to directories and not flushed is undone too."""
    for _parent, back in reversed(disk.undo):
        with contextlib.suppress(FileNotFoundError):
            back()
    cut_data(disk)


def failing(number: int) -> Callable[..., NoReturn]:
    """Fail with an error of the system; a close is done all the same, as Linux does it."""
    def fail(_: Disk, real: Callable[..., Any], *arguments: Any, **__: Any) -> NoReturn:
        if real is os.close:
            os.close(*arguments)
        raise OSError(number, os.strerror(number), *[path for path in arguments[:1] if isinstance(path, str)])
    return fail


class Deed(NamedTuple):
    """What is done, at which calls, and whether from then on; `cut`: what was not flushed has to be known."""

    calls: frozenset[str]
    act: Callable[..., Any]
    lasting: bool = False
    cut: bool = False


WRITES = frozenset({"write"})
DEEDS: Mapping[str, Deed] = {
    "killed before": Deed(CHANGING, die),
    "killed after": Deed(CHANGING, die_after),
    "half a write, then killed": Deed(WRITES, die_half_way),
    "power cut, data lost": Deed(CHANGING, cut_data, cut=True),
    "power cut, names lost": Deed(CHANGING, cut_names, cut=True),
    "SIGTERM": Deed(CHANGING, be_ended),
    "short write": Deed(WRITES, write_less),
    "ENOSPC once": Deed(GROWING, failing(errno.ENOSPC)),
    "ENOSPC from then on": Deed(GROWING, failing(errno.ENOSPC), lasting=True),
    "EIO once": Deed(CHANGING | READING, failing(errno.EIO)),
    "EIO from then on": Deed(CHANGING | READING, failing(errno.EIO), lasting=True),
    "EROFS once": Deed(CHANGING, failing(errno.EROFS)),
    "EROFS from then on": Deed(CHANGING, failing(errno.EROFS), lasting=True),
}


# === Runs ===


def wucme_directory() -> str:
    """Find the directory in which a run keeps its files: beside its ini, which is the last of its arguments."""
    return os.path.dirname(sys.argv[-1])


class Runner:
    """A process that has read the script, and runs it in children."""

    def __init__(self, spare: Path) -> None:
        """Fork the process; do it before there are threads."""
        for name in LIBRARIES:
            importlib.import_module(name)
        self.spare = spare
        self.ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.ours.close()
            serve(theirs, spare)
        theirs.close()

    def run(self, arguments: Sequence[str], output: Path, fault: Fault) -> Run:
        """Run the script with these arguments, the last of which is the ini, to its end."""
        shutil.rmtree(self.spare, ignore_errors=True)
        self.spare.mkdir()
        told = output.with_suffix(".calls")
        self.ours.sendall(json.dumps([list(arguments), str(output), str(told), fault]).encode() + b"\n")
        status = int(self.ours.makefile().readline())
        lines = [line.partition(" ") for line in told.read_text().splitlines()]
        struck = next((text for word, _, text in lines if word == "struck"), "")
        calls = collections.Counter(text for word, _, text in lines if word == "call")
        return Run(status, output.read_text(errors="replace"), calls, struck)

    def close(self) -> None:
        """End the process."""
        self.ours.close()
        os.waitpid(self.pid, 0)


def serve(asked: socket.socket, spare: Path) -> NoReturn:
    """Run the script as often as one asks."""
    for line in asked.makefile():
        arguments, output, told, fault = json.loads(line)
        pid = os.fork()
        if pid == 0:
            asked.close()
            be_the_script(arguments, output, told, Fault(*fault), spare)
        asked.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def be_the_script(arguments: Sequence[str], output: str, told: str, fault: Fault, spare: Path) -> NoReturn:
    """Go on as the script, from its main to its exit."""
    signal.alarm(SECONDS)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, how in ((0, os.devnull, os.O_RDONLY), (1, output, flags), (2, output, flags | os.O_APPEND)):
        os.dup2(os.open(path, how, 0o600), number)
    notes = os.open(told, flags, 0o600)
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": os.path.dirname(output)})
    sys.argv[1:] = arguments
    wucme.os = Disk(fault, spare, lambda word, text: os.write(notes, f"{word} {text}\n".encode()))   # type: ignore
    status: Any = 70
    try:
        status = wucme.main(arguments)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
