"""Tests of wucme.py: its sections one by one, then whole runs. `make test`, or a part: `make test ARGS="-k load"`.

The first part needs nothing but Python, cryptography, pytest and hypothesis. What is marked `process` runs the script
many times, `pebble` needs that test CA, `servers` needs servers from Debian; `.ci/setup` gets pebble,
`.ci/run` all of it.
"""
from __future__ import annotations

import ast
import atexit
import base64
import collections
import contextlib
import email.utils
import errno
import functools
import gc
import hashlib
import http.client
import http.server
import imaplib
import ipaddress
import itertools
import json
import os
import pty
import py_compile
import re
import select
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fakeca
import pytest
import testbed
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import wucme

SCRIPT = Path(wucme.__file__).resolve()
if os.geteuid() == 0 and (wucme.anyone_may_write(str(SCRIPT)) or wucme.others_may_write(str(SCRIPT))):
    FILES = Path(tempfile.mkdtemp())        # root trusts no file of others, so a checkout of others is copied
    atexit.register(shutil.rmtree, FILES)
    shutil.copytree(SCRIPT.parent, FILES, ignore=shutil.ignore_patterns(".venv", ".cache", ".git"), dirs_exist_ok=True)
    for checked_out in (FILES, *FILES.rglob("*")):
        os.chown(checked_out, 0, 0)
        checked_out.chmod(checked_out.stat().st_mode & ~0o022)
    SCRIPT = FILES / "wucme.py"
    wucme.__file__ = str(SCRIPT)
BUILT = Path(tempfile.mkdtemp())            # a script is compiled by each run of it, which is most of what a run takes
atexit.register(shutil.rmtree, BUILT)
COMPILED = str(BUILT / "wucme.pyc")
py_compile.compile(str(SCRIPT), COMPILED, doraise=True)


def mode(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def wait_until(true: Callable[[], object], seconds: float = 15) -> None:
    """Wait for something to become true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return wucme.proc_text(pid, "stat").rpartition(") ")[2][:1] not in ("", "Z")


# === Units: the sections of the script, one by one =============================================

DAY = 86400.0
NOW = 1770942000.0              # 2026-02-13 00:20:00 UTC
ENVIRONMENT = {"PATH": os.environ["PATH"]}
LOOPBACKS = ["127.0.0.1", *(["::1"] if wucme.proc_text("net", "if_inet6") else [])]
EXAMPLES = int(os.environ.get("WUCME_EXAMPLES", "60"))       # many more, and other ones each time, where it is set
bounded = settings(max_examples=EXAMPLES, deadline=None, derandomize="WUCME_EXAMPLES" not in os.environ, database=None,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
scalars = st.sampled_from([None, True, 0, -1, 10 ** 30, 0.0, float("inf"), float("nan"), "", "x", "\udc80"])
json_values = (scalars | st.lists(scalars, max_size=3)
               | st.dictionaries(st.sampled_from(["x", "value", ""]), scalars, max_size=2))
members = st.sampled_from(["value", "type", "url", "token", "status", "error", "start", "end", "identifier", ""])
deep_values = (json_values | st.lists(json_values, max_size=3) | st.dictionaries(members, json_values, max_size=4)
               | st.lists(st.dictionaries(members, json_values, max_size=4), max_size=3))
any_line: st.SearchStrategy[str] = st.text(st.characters(), min_size=1, max_size=40).map(str.strip).filter(bool)


def armour(label: str, der: bytes) -> bytes:
    """DER as PEM."""
    return f"-----BEGIN {label}-----\n".encode() + base64.encodebytes(der) + f"-----END {label}-----\n".encode()


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """The same bytes with some of them changed, doubled, or gone."""
    change = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 2), st.binary(max_size=3))
    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        found = data
        for at, gone, new in changes:
            found = found[:at] + new + found[at + gone:]
        return found
    return st.lists(change, min_size=1, max_size=4).map(apply)


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Greenwich, for what is shown in local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is for those who lose power, and takes most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> wucme.Log:
    """A log of the test's own."""
    fresh = wucme.Log()
    monkeypatch.setattr(wucme, "log", fresh)
    return fresh


def noting(seen: list[Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what another does, and notes what it was called with."""
    def noted(*arguments: Any) -> Any:
        seen.append(arguments[0] if len(arguments) == 1 else arguments)
        return call(*arguments)
    return noted


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """The one RSA key."""
    return rsa.generate_private_key(65537, 2048)


class Issuer:
    """A CA of the tests, with or without key identifiers in what it issues."""

    def __init__(self, name: str, by: Issuer | None = None, identifiers: bool = True) -> None:
        self.key, self.identifiers = new_key(), identifiers
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = (by or self).issue(self.key, subject=self.name, span=(-400 * DAY, 4000 * DAY), authority=True)

    def issue(self, key: Any, *names: str, subject: x509.Name | None = None, authority: bool = False,
              span: tuple[float, float] = (-DAY, 89 * DAY), now: float = NOW) -> bytes:
        """A certificate (PEM) for a key and names."""
        public = key.public_key()
        start, end = (datetime.fromtimestamp(now + seconds, timezone.utc) for seconds in span)
        builder = (x509.CertificateBuilder().subject_name(subject or x509.Name([])).issuer_name(self.name)
                   .public_key(public).serial_number(x509.random_serial_number())
                   .not_valid_before(start).not_valid_after(end)
                   .add_extension(x509.BasicConstraints(authority, None), critical=True))
        if names:
            general: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(name)) if wucme.is_address(name)
                                               else x509.DNSName(name) for name in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
        if self.identifiers:
            own = self.key.public_key()
            builder = (builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
                       .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False))
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def chain(self, key: Any, *names: str, span: tuple[float, float] = (-DAY, 89 * DAY)) -> bytes:
        """A leaf and this issuer."""
        return self.issue(key, *(names or NAMES), span=span) + self.pem


NAMES = ("www.example.org", "example.org")
KEY, OTHER_KEY = new_key(), new_key()
KEY_HASH = wucme.key_hash(KEY.public_key())
ROOT = Issuer("root")
INTERMEDIATE = Issuer("intermediate", ROOT)
CHAIN = INTERMEDIATE.chain(KEY)
DEFAULT = wucme.read_settings(wucme.NOWHERE, {}).default
RUN = wucme.read_settings(wucme.NOWHERE, {}).run._replace(directory="/d", host="alpha")


# --- 1. errors ---------------------------------------------------------------------------------

class TestErrors:
    @pytest.mark.parametrize(("text", "shown"), [
        ("plain text, é", "plain text, é"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x00\x7f", r"\x1b[31mred\x00\x7f"),
        ("\x85\u2028\u202e", r"\x85\u2028\u202e"),
        ("\udcff", r"\udcff"),
        ("", ""),
    ])
    def test_printable(self, text: str, shown: str) -> None:
        assert wucme.printable(text) == shown

    @bounded
    @given(text=st.text(st.characters(), min_size=1, max_size=40))
    def test_printable_is_one_line_of_text_that_can_be_written(self, text: str) -> None:
        shown = wucme.printable(text)
        assert shown.isprintable()
        assert len(shown.splitlines()) <= 1
        assert shown.encode()

    @pytest.mark.parametrize(("error", "text"), [
        (OSError(2, "No such file", "/a\nb"), r"/a\nb: No such file"),
        (OSError(28, "No space left"), "No space left"),
        (OSError("odd"), "odd"),
        (wucme.PemError("holds\nnothing"), r"holds\nnothing"),
        (KeyError("odd"), "internal error, KeyError: 'odd'"),
    ])
    def test_sentence(self, error: Exception, text: str) -> None:
        assert wucme.sentence(error) == text

    def test_a_refusal_of_the_ca_carries_its_kind_and_when_to_come_back(self) -> None:
        error = wucme.AcmeError("no", "rateLimited", 30)
        assert (str(error), error.kind, error.retry_after) == ("no", "rateLimited", 30)


# --- 2. world ----------------------------------------------------------------------------------

class TestLog:
    @pytest.mark.parametrize(("clock", "stamp"), [
        (NOW, "2026-02-13 10:50:00.00"), (NOW + 0.25, "2026-02-13 10:50:00.25"),
        (NOW + 0.9999, "2026-02-13 10:50:00.99"), (NOW + 43200, "2026-02-13 22:50:00.00"),
    ])
    def test_a_line_has_local_time_with_hundredths(self, log: wucme.Log, monkeypatch: pytest.MonkeyPatch,
                                                   clock: float, stamp: str) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "XYZ-10:30")
            time.tzset()
            log.clock = lambda: clock
            log("said\nthis")
        time.tzset()
        assert list(log.held) == [f"{stamp}: said\\nthis\n"]

    def test_held_lines_are_printed_once_and_only_when_flushed(self, log: wucme.Log,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
        log("one")
        log("two")
        assert not capsys.readouterr().err
        log.flush()
        log.flush()
        assert [line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["one", "two"]

    def test_of_very_many_lines_the_last_are_printed_and_what_went_wrong(self, log: wucme.Log,
                                                                         capsys: pytest.CaptureFixture[str]) -> None:
        for number in range(wucme.HELD_LINES + 10):
            log(f"line {number}", wrong=number in (2, wucme.HELD_LINES))
        log.flush()
        said = [line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()]
        assert said[:3] == ["line 2", "... 9 lines before these are left out here ...", "line 10"]
        assert len(said) == wucme.HELD_LINES + 2
        log("after")
        log.flush()
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_at_a_terminal_a_line_is_shown_at_once_and_not_again(self, log: wucme.Log,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
        log.live = True
        log("one")
        assert capsys.readouterr().err.endswith(": one\n")
        log.flush()
        assert not capsys.readouterr().err

    def test_details_are_for_verbose_only(self, log: wucme.Log) -> None:
        log.detail("unheard")
        log.loud = True
        log.detail("heard")
        assert [line.rpartition(": ")[2] for line in log.held] == ["heard\n"]

    @pytest.mark.parametrize("live", [False, True])
    def test_the_file_has_each_line_at_once(self, log: wucme.Log, tmp_path: Path, live: bool) -> None:
        log.descriptor, log.live = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), live
        log("said é \udcff")
        os.close(log.descriptor)
        assert (tmp_path / "log").read_text("utf-8").endswith(": said é \\udcff\n")

    def test_a_full_disk_stops_nothing(self, log: wucme.Log) -> None:
        log.descriptor = os.open("/dev/full", os.O_WRONLY)
        log("said")
        os.close(log.descriptor)
        assert len(log.held) == 1

    def test_a_closed_terminal_stops_nothing(self, log: wucme.Log, monkeypatch: pytest.MonkeyPatch) -> None:
        with open("/dev/full", "w", encoding="ascii", buffering=1) as full:
            monkeypatch.setattr(sys, "stderr", full)
            log.live = True
            log("said")
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                full.close()
        assert not log.held


def shell(script: str, timeout: float = 5, **more: Any) -> wucme.Finished:
    """Run a shell script as a load command is run."""
    return wucme.command(["/bin/sh", "-c", script], ENVIRONMENT, timeout, **more)


class TestCommand:
    @pytest.mark.parametrize(("script", "problem", "output"), [
        ("true", "", []),
        ("exit 3", "exit status 3", []),
        ("kill -TERM $$", "killed by signal 15", []),
        ("printf 'no newline'", "", ["no newline"]),
        ("echo out; echo err >&2", "", ["out", "err"]),
        (r"printf 'a\377\000b\n'", "", ["a\\xff\0b"]),
        ("pwd", "", ["/"]),
        ("test $(cut -d' ' -f5 /proc/$$/stat) = $$", "", []),
    ])
    def test_ending_and_output(self, script: str, problem: str, output: list[str]) -> None:
        assert shell(script) == wucme.Finished(problem, output)

    def test_what_cannot_be_run_is_said(self, tmp_path: Path) -> None:
        assert wucme.command([str(tmp_path / "none")], {}, 5).problem == "cannot be run: No such file or directory"
        assert wucme.command([str(tmp_path)], {}, 5).problem == "cannot be run: Permission denied"

    @pytest.mark.parametrize("umask", [0o022, 0o027])
    def test_the_umask_of_the_caller_is_handed_on(self, umask: int) -> None:
        before = os.umask(0o077)
        assert shell("umask", umask=umask).output == [f"{umask:04o}"]
        assert os.umask(before) == 0o077

    def test_the_environment_is_the_one_given(self) -> None:
        assert wucme.command(["/usr/bin/env"], {"A": "1", "B": "two\nlines"}, 5).output == ["A=1", "B=two", "lines"]

    @pytest.mark.parametrize("path", ["/bin", "", None])
    def test_the_path_has_the_programs_of_the_administrator_and_never_the_current_directory(
            self, monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
        monkeypatch.delenv("PATH") if path is None else monkeypatch.setenv("PATH", path)
        start = path or "/usr/local/bin:/usr/bin:/bin"
        assert wucme.child_environment()["PATH"] == f"{start}:/usr/local/sbin:/usr/sbin:/sbin"

    def test_endless_output_is_bounded_and_never_waits(self) -> None:
        finished = shell("yes", 0.4)
        assert finished.problem == "stopped after 0.4 s (load_timeout)"
        assert sum(len(line) + 1 for line in finished.output) == wucme.OUTPUT_BYTES

    def test_the_time_limit_kills_the_whole_group(self) -> None:
        finished = shell("sh -c 'sleep 60 & echo $!; wait' & wait", 0.4)
        assert finished.problem.startswith("stopped after 0.4 s")
        wait_until(lambda: not alive(int(finished.output[0])))

    @pytest.mark.filterwarnings("ignore::ResourceWarning")         # a pipe that nobody had begun to read
    def test_a_signal_kills_the_whole_group(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wucme, "ending", wucme.Ending())        # it may come before the shell is known here
        before = signal.signal(signal.SIGALRM, wucme.ending)
        with pytest.raises(SystemExit):
            shell(f"sleep 60 & echo $! > {tmp_path}/pid; kill -ALRM {os.getpid()}; wait")
        signal.signal(signal.SIGALRM, before)
        gc.collect()
        wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))

    def test_a_daemon_that_keeps_the_pipe_hangs_nothing_and_its_reader_reads_nothing_else(self, tmp_path: Path) -> None:
        finished = shell(f"(timeout 20 sh -c 'until [ -e {tmp_path}/go ]; do sleep 0.02; done'; echo late) & echo $!")
        assert alive(int(finished.output[0]))
        pipes = [os.pipe() for _ in range(4)]
        for _, end in pipes:
            os.write(end, b"mine")
        (tmp_path / "go").touch()
        wait_until(lambda: not alive(int(finished.output[0])))
        time.sleep(0.05)
        for ours, end in pipes:
            os.set_blocking(ours, False)
            assert os.read(ours, 9) == b"mine"
            os.close(ours)
            os.close(end)

    def test_the_input_is_what_is_given(self) -> None:
        assert shell("cat", given="a\n" * 40000).output == ["a"] * 32768

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
    def test_a_command_can_be_run_as_another_process_runs(self) -> None:
        who = {"user": 65534, "group": 65533, "extra_groups": [7, 8]}
        with subprocess.Popen(["/bin/sleep", "60"], **who) as other:   # type: ignore[call-overload]
            found = wucme.credentials(other.pid)
            other.kill()
        assert found == who
        assert shell("id -u; id -G", **found).output == ["65534", "65533 7 8"]
        assert wucme.credentials(os.getpid()) == {}
        assert wucme.credentials(0) == {}

    def test_a_signal_is_caught_or_not(self) -> None:
        code = "import signal, sys; signal.signal(signal.SIGUSR2, print); print(flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout
            other.stdout.readline()
            assert [wucme.catches(other.pid, number) for number in (signal.SIGUSR2, signal.SIGUSR1)] == [True, False]
            other.kill()
        assert not wucme.catches(0, signal.SIGUSR2)

    def test_the_input_is_empty_whatever_the_callers_is(self) -> None:
        (start, end), before = os.pipe(), os.dup(0)
        os.dup2(start, 0)
        finished = shell("cat; echo $?", 0.5)
        os.dup2(before, 0)
        for descriptor in (start, end, before):
            os.close(descriptor)
        assert finished == wucme.Finished("", ["0"])

    @pytest.mark.parametrize("given", ["two\nlines\n", "x" * 300_000, "\udcff"], ids=["lines", "much", "bytes"])
    def test_what_is_given_is_read_to_its_end(self, given: str) -> None:
        assert shell("wc -c", given=given).output == [str(len(given))]

    def test_a_signal_that_came_before_starts_nothing_more(self, tmp_path: Path) -> None:
        ending = wucme.Ending()
        ending.number = signal.SIGTERM
        with pytest.raises(SystemExit) as caught, ending.put_off():
            (tmp_path / "begun").touch()
        assert caught.value.code == 143
        assert not (tmp_path / "begun").exists()

    def test_a_second_signal_does_not_cut_the_end_short(self) -> None:
        ending = wucme.Ending()
        with pytest.raises(SystemExit):
            ending(signal.SIGTERM, None)
        ending(signal.SIGHUP, None)
        assert ending.number == signal.SIGTERM

    def test_what_other_threads_run_is_killed_at_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wucme, "ending", wucme.Ending())
        found: list[wucme.Finished] = []
        script = f"sleep 60 & echo $! > {tmp_path}/pid_tmp; mv {tmp_path}/pid_tmp {tmp_path}/pid; wait"
        thread = threading.Thread(target=lambda: found.append(shell(script, 60)))
        thread.start()
        wait_until((tmp_path / "pid").exists)
        wucme.ending.kill()
        thread.join(10)
        assert found[0].problem == "killed by signal 9"
        wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))
        assert not wucme.ending.groups

    @pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")
    def test_what_may_not_be_killed_is_let_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: int) -> None:
            raise PermissionError(1, "Operation not permitted")

        with monkeypatch.context() as patch:        # as a command that became root by sudo
            patch.setattr(os, "killpg", refuse)
            finished = shell(f"echo $$ > {tmp_path}/pid; exec sleep 60", 0.4)
            patch.setattr(wucme.ending, "groups", {int((tmp_path / "pid").read_text())})
            wucme.ending.kill()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert finished.problem == "stopped after 0.4 s (load_timeout)"
        gc.collect()

    def test_a_signal_that_comes_while_threads_are_being_imported_ends_the_program_too(
            self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "threading", type(sys)("threading"))
        with pytest.raises(SystemExit):
            wucme.Ending()(signal.SIGTERM, None)

    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        before = set(os.listdir("/proc/self/fd"))
        shell("echo said")
        wucme.command([str(tmp_path / "none")], {}, 5)
        assert set(os.listdir("/proc/self/fd")) <= before      # what others left may be closed meanwhile


class TestJobs:
    def test_each_ends_in_its_result_or_its_error(self) -> None:
        jobs = [wucme.Job(str(n), functools.partial(lambda n: 1 // n, n), 9) for n in range(4)]
        found = dict(wucme.gather(jobs, 2, wucme.REAL))
        assert isinstance(found.pop("0"), ZeroDivisionError)
        assert found == {"1": 1, "2": 0, "3": 0}
        assert list(wucme.gather([], 2, wucme.REAL)) == []

    def test_one_that_hangs_holds_back_no_other(self) -> None:
        hang = threading.Event()
        jobs = [wucme.Job("hangs", hang.wait, 0.1), wucme.Job("waits", lambda: "done", 0.1)]
        found = wucme.gather(jobs, 1, wucme.REAL)
        assert "did not end" in str(next(found)[1])
        threading.Timer(5, hang.set).start()
        assert next(found) == ("waits", "done")
        hang.set()

    def test_none_is_begun_too_late(self) -> None:
        (_, result), = wucme.gather([wucme.Job("a", lambda: 1, 9)], 1, wucme.REAL, time.monotonic())
        assert "not begun" in str(result)

    def test_several_are_called_at_once_and_the_first_error_ends_it(self) -> None:
        both, done = threading.Barrier(2, timeout=5), []
        assert wucme.at_once({"a": both.wait, "b": both.wait}, 9, wucme.REAL) in ([0, 1], [1, 0])
        with pytest.raises(ZeroDivisionError):
            wucme.at_once({str(n): lambda: done.append(1 // 0) for n in range(99)}, 9, wucme.REAL)
        assert not done


class TestProcesses:
    def test_processes_finds_a_program_by_name_with_its_arguments(self, tmp_path: Path) -> None:
        name = f"w ({os.getpid()}) y"       # its own, beside another run of these tests
        (tmp_path / name).symlink_to("/bin/sleep")
        with subprocess.Popen([tmp_path / name, "60"]) as child:
            expected = wucme.Process(child.pid, os.getpid(), [str(tmp_path / name), "60"])
            try:
                wait_until(lambda: wucme.processes([name]) == [expected])
            finally:
                child.kill()

    def test_processes_leaves_out_the_dead_and_those_of_other_names(self, tmp_path: Path) -> None:
        name = f"w-{os.getpid()}"
        (tmp_path / name).symlink_to("/bin/true")
        with subprocess.Popen([tmp_path / name]) as child:
            wait_until(lambda: " Z " in wucme.proc_text(child.pid, "stat"))
            assert wucme.processes([name]) == []
        assert wucme.processes(["wucme-none"]) == []

    @pytest.mark.parametrize("address", ["127.0.0.1", *(["::1"] if socket.has_ipv6 and os.path.exists(
        "/proc/net/if_inet6") and Path("/proc/net/if_inet6").read_text() else [])])
    def test_port_holder_names_who_listens(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as server:
            port = server.getsockname()[1]
            command = Path("/proc/self/comm").read_text().strip()
            assert wucme.port_holder(port) == f"{command} (pid {os.getpid()})"
        assert wucme.port_holder(port) == ""

    def test_without_a_terminal_the_answer_is_no(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with open("/dev/null", encoding="ascii") as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            assert wucme.ask("Really?") is False
        monkeypatch.setattr(sys, "stdin", None)
        assert wucme.ask("Really?") is False


class Loopback:
    """A server on loopback: each connection is handed to `talk`, in a thread of its own."""

    def __init__(self, talk: Callable[[socket.socket], None], host: str = "127.0.0.1") -> None:
        self.talk, self.connections = talk, 0
        self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.accept)]

    def accept(self) -> None:
        """Take connections until closed."""
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                self.connections += 1
                self.threads.append(threading.Thread(target=self.serve, args=(peer,)))
                self.threads[-1].start()

    def serve(self, peer: socket.socket) -> None:
        """Talk on one connection; its end is no error."""
        peer.settimeout(5)
        with peer, contextlib.suppress(OSError):
            self.talk(peer)

    def __enter__(self) -> Loopback:
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()


def head(peer: socket.socket) -> bytes:
    """The head of the next request, whose body is read too; b"" where there is none."""
    with peer.makefile("rb") as stream:
        found = b"".join(itertools.takewhile(lambda line: line != b"\r\n", stream))
        stream.read(int((re.findall(rb"(?i)content-length: (\d+)", found) or [b"0"])[0]))
        return found


def answer(body: bytes = b"hello", *headers: str, length: int | None = None) -> bytes:
    """An HTTP answer."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Site(NamedTuple):
    """How to serve HTTPS on loopback, and the file that says whom to trust."""
    context: ssl.SSLContext
    ca_file: str

    def talk(self, pieces: Callable[[bytes], Iterable[bytes]], times: int = 9) -> Callable[[socket.socket], None]:
        """A talk that answers so many requests of each connection, piece by piece."""
        def talk(peer: socket.socket) -> None:
            with self.context.wrap_socket(peer, server_side=True) as secure:
                for request in itertools.takewhile(bool, (head(secure) for _ in range(times))):
                    for piece in pieces(request):
                        secure.sendall(piece)
        return talk


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site called localhost, with a certificate of a home-made CA."""
    place, ca, key = tmp_path_factory.mktemp("site"), Issuer("home-made CA"), new_key()
    (place / "ca.pem").write_bytes(ca.issue(ca.key, subject=ca.name, authority=True, now=time.time()))
    (place / "site.pem").write_bytes(wucme.key_pem(key) + ca.issue(key, "localhost", now=time.time()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "site.pem")
    return Site(context, str(place / "ca.pem"))


@pytest.fixture
def web(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., wucme.Http]]:
    """Makes clients that trust the site and know no proxy, and closes them."""
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "")
    with contextlib.ExitStack() as stack:
        def make(timeout: float = 5, ca_file: str = site.ca_file, proxy: str = "") -> wucme.Http:
            client = wucme.Http(timeout, ca_file, proxy)
            stack.callback(client.close)
            return client
        yield make


def plainly(request: bytes) -> list[bytes]:
    """An answer that says which request it is for."""
    return [answer(request.split(b"\r\n")[0])]


def drip(data: bytes) -> Iterator[bytes]:
    """The data so slowly that it never ends, each byte well within any time limit for one."""
    for at in range(len(data)):
        time.sleep(0.02)
        yield data[at:at + 1]


class TestHttp:
    def test_one_connection_serves_many_requests(self, site: Site, web: Callable[..., wucme.Http]) -> None:
        with Loopback(site.talk(plainly)) as server, contextlib.closing(web()) as client:
            bodies = [client.request("GET", f"https://localhost:{server.port}/{n}?q={n}").body for n in range(3)]
        assert bodies == [f"GET /{n}?q={n} HTTP/1.1".encode() for n in range(3)]
        assert server.connections == 1

    @pytest.mark.parametrize("headers", [(), ("Connection: close",)])
    def test_a_server_that_closes_after_each_answer_is_connected_anew(
            self, site: Site, web: Callable[..., wucme.Http], headers: tuple[str, ...]) -> None:
        with Loopback(site.talk(lambda _: [answer(b"hello", *headers)], 1)) as server, contextlib.closing(web()) as it:
            for _ in range(3):
                assert it.request("POST", f"https://localhost:{server.port}/", b"").body == b"hello"
        assert server.connections == 3

    def test_what_is_sent_and_what_comes_back(self, site: Site, web: Callable[..., wucme.Http]) -> None:
        seen: list[bytes] = []
        with Loopback(site.talk(noting(seen, lambda _: [answer(b"{}", "X-A: 1")]), 1)) as server:
            client = web()
            found = client.request("POST", f"https://localhost:{server.port}", b"body", {"Content-Type": "x/y"})
            client.close()
        lines = seen[0].decode().split("\r\n")
        assert lines[0] == "POST / HTTP/1.1"
        assert {f"Host: localhost:{server.port}", f"User-Agent: {wucme.USER_AGENT}", "Content-Type: x/y",
                "Content-Length: 4"} <= set(lines)
        assert (found.status, found.headers["X-A"], found.body) == (200, "1", b"{}")

    @pytest.mark.parametrize(("pieces", "reason"), [
        ([answer(b"x" * (wucme.BODY_BYTES + 9))], "an answer of more than 1 MiB"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65536] * 17], "an answer of more than 1 MiB"),
        ([answer(b"short", length=9)], "an answer of 5 bytes where 9 were promised"),
        ([b"SSH-2.0-x\r\n"], "SSH-2.0-x"),
        ([b""], "closed connection without response"),
    ])
    def test_a_bad_answer_is_refused(self, site: Site, web: Callable[..., wucme.Http], pieces: list[bytes],
                                     reason: str) -> None:
        with Loopback(site.talk(lambda _: pieces, 1)) as server, contextlib.closing(web()) as client:
            with pytest.raises(wucme.NetworkError) as caught:
                client.request("GET", f"https://localhost:{server.port}/")
            assert not client.kept
        assert f"localhost:{server.port}: " in str(caught.value)
        assert reason in str(caught.value)
        del caught
        gc.collect()            # its connection, too, and not in the middle of another test

    def test_an_address_of_a_kind_that_the_kernel_lacks_is_passed_over(
            self, site: Site, web: Callable[..., wucme.Http], monkeypatch: pytest.MonkeyPatch) -> None:
        found = socket.getaddrinfo
        lacking = (255, socket.SOCK_STREAM, 0, "", ("::1", 1, 0, 0))        # as AF_INET6 after ipv6.disable=1
        monkeypatch.setattr(socket, "getaddrinfo", lambda *at, **how: [lacking, *found(*at, **how)])
        with Loopback(site.talk(plainly, 1)) as server, contextlib.closing(web()) as client:
            assert client.request("GET", f"https://localhost:{server.port}/").status == 200

    @pytest.mark.parametrize("where", ["head", "body", "handshake", "proxy"])
    def test_a_request_ends_in_time_however_slowly_bytes_drip_in(self, site: Site, web: Callable[..., wucme.Http],
                                                                 where: str) -> None:
        slow = answer(b"x" * 90) if where == "head" else b"x" * 90
        first = b"" if where == "head" else answer(length=90, body=b"")
        talk = site.talk(lambda _: itertools.chain([first], drip(slow)))
        if where in ("handshake", "proxy"):
            def talk(peer: socket.socket) -> None:
                for piece in drip(b"\x16\x03\x03\x20\x00" * 6 if where == "handshake" else b"HTTP/1.1 200 " + b"k" * 9):
                    peer.sendall(piece)
        with Loopback(talk) as server:
            client = web(0.1, proxy=f"localhost:{server.port}" if where == "proxy" else "none")
            start = time.monotonic()
            with pytest.raises(wucme.NetworkError, match=r"no whole answer within 0\.1 s"):
                client.request("GET", f"https://localhost:{server.port}/")
            assert 0.08 < time.monotonic() - start < 1.7

    def test_the_time_limit_is_for_the_whole_request(self, site: Site, web: Callable[..., wucme.Http]) -> None:
        def talk(peer: socket.socket) -> None:
            time.sleep(0.2)
            site.talk(lambda _: (time.sleep(0.2) or one for one in [answer()]))(peer)   # type: ignore[func-returns-value]

        with Loopback(talk) as server, pytest.raises(wucme.NetworkError, match=r"no whole answer within 0\.3 s"):
            web(0.3).request("GET", f"https://localhost:{server.port}/")

    @pytest.mark.parametrize("reached", [True, False])
    def test_it_is_shared_by_the_addresses_of_a_host(self, site: Site, web: Callable[..., wucme.Http], reached: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Loopback(site.talk(plainly)))
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(2):      # its queue is full: who comes next gets no answer
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(silent.getsockname())
            at = [silent.getsockname(), ("127.0.0.1", server.port) if reached else silent.getsockname()]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", one) for one in at])
            start = time.monotonic()
            with contextlib.nullcontext() if reached else pytest.raises(wucme.NetworkError, match="no whole answer"):
                stack.enter_context(contextlib.closing(web(0.8))).request("GET", f"https://localhost:{server.port}/")
            assert time.monotonic() - start < 1.5

    def test_an_untrusted_certificate_leads_to_ca_file(self, site: Site, web: Callable[..., wucme.Http]) -> None:
        with Loopback(site.talk(plainly)) as server, pytest.raises(wucme.NetworkError) as caught:
            web(ca_file="").request("GET", f"https://localhost:{server.port}/")
        assert "its certificate is not trusted (" in str(caught.value)
        assert "set ca_file to" in str(caught.value)

    def test_a_certificate_for_another_name_is_refused(self, site: Site, web: Callable[..., wucme.Http]) -> None:
        with Loopback(site.talk(plainly)) as server, pytest.raises(wucme.NetworkError, match="not trusted"):
            web().request("GET", f"https://127.0.0.1:{server.port}/")

    @pytest.mark.parametrize("url", ["http://localhost/", "ftp://localhost/", "https:///x", "localhost", ""])
    def test_only_https_is_used(self, web: Callable[..., wucme.Http], url: str) -> None:
        with pytest.raises(wucme.NetworkError, match="only https is used"):
            web().request("GET", url)

    def test_what_is_no_url_is_said(self, web: Callable[..., wucme.Http]) -> None:
        with pytest.raises(wucme.NetworkError, match=r"https://\[::1: Invalid IPv6 URL"):
            web().request("GET", "https://[::1")

    def test_nobody_listening_is_said(self, web: Callable[..., wucme.Http]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(wucme.NetworkError, match=f"localhost:{port}: Connection refused"):
            web().request("GET", f"https://localhost:{port}/")

    @pytest.mark.parametrize("content", [None, "", "no PEM\n"])
    def test_a_ca_file_that_cannot_be_used_is_named(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "ca.pem").write_text(content)
        with pytest.raises(wucme.NetworkError, match=re.escape(f"ca_file {tmp_path}/ca.pem: no PEM file")):
            wucme.Http(1, f"{tmp_path}/ca.pem")


class TestServed:
    """The certificate that a server shows, whether it is trusted or not."""

    def said(self, site: Site, *lines: bytes) -> Callable[[socket.socket], None]:
        """A talk that says the first line, each other after a line that it heard, and then begins TLS."""
        def talk(peer: socket.socket) -> None:
            with peer.makefile("rb", buffering=0) as heard:
                for at, line in enumerate(lines):
                    if at:
                        heard.readline()
                    peer.sendall(line)
            with site.context.wrap_socket(peer, server_side=True) as secure:
                secure.recv(1)
        return talk

    @pytest.mark.parametrize(("protocol", "lines"), [
        ("", ()), ("smtp", (b"220-wait\r\n220 a\r\n", b"250-a\r\n250-STARTTLS\r\n250 b\r\n", b"220 go\r\n")),
        ("imap", (b"* OK [CAPABILITY X]\r\n", b"* X\r\na OK go\r\n")), ("pop3", (b"+OK\r\n", b"+OK go\r\n")),
    ])
    def test_it_is_shown_by_each_protocol(self, site: Site, protocol: str, lines: tuple[bytes, ...]) -> None:
        with Loopback(self.said(site, *lines)) as server:
            found = wucme.served("127.0.0.1", server.port, "any.example", protocol, 5)
        assert wucme.facts(found).names == ("localhost",)

    @pytest.mark.parametrize(("protocol", "lines", "reason"), [
        ("smtp", (b"554 not you\r\n",), "it said '554 not you'"), ("smtp", (b"220 a\r\n", b"250 a\r\n", b"454 no\r\n"),
                                                                     "it said '454 no'"),
        ("imap", (b"* BYE\r\n",), "no whole answer within"), ("pop3", (b"",), "no whole answer within"),
        ("imap", (b"* OK\r\n", b"a NO\x1b\r\n"), "it said 'a NO\\x1b'"),
    ])
    def test_a_server_that_will_not_is_quoted(self, site: Site, protocol: str, lines: tuple[bytes, ...],
                                              reason: str) -> None:
        with Loopback(self.said(site, *lines)) as server, pytest.raises(wucme.NetworkError) as error:
            wucme.served("127.0.0.1", server.port, "a", protocol, 0.1 if "within" in reason else 5)
        assert reason in str(error.value)

    def test_it_ends_in_time_however_slowly_bytes_drip_in(self, site: Site) -> None:
        def talk(peer: socket.socket) -> None:
            for byte in drip(b"220-" * 1000):
                peer.sendall(byte)

        start = time.monotonic()
        with Loopback(talk) as server, pytest.raises(wucme.NetworkError, match="no whole answer within"):
            wucme.served("127.0.0.1", server.port, "a", "smtp", 0.1)
        assert time.monotonic() - start < 2

    def test_a_page_ends_in_time_however_slowly_it_drips_in(self, site: Site) -> None:
        start = time.monotonic()
        with Loopback(site.talk(lambda _: drip(answer(b"x" * 90)))) as server, \
                pytest.raises(wucme.NetworkError, match="no whole answer within"):
            wucme.visit(f"https://localhost:{server.port}/", "127.0.0.1", 0.3)
        assert time.monotonic() - start < 2

    def test_nobody_and_nonsense_are_said(self) -> None:
        port = testbed.free_ports(1)[0]
        for host, name in (("127.0.0.1", "a"), ("::1", "a"), ("256.1.1.1", "a"), ("no.invalid", "a")):
            with pytest.raises(wucme.NetworkError):
                wucme.served(host, port, name, "", 1)
        with pytest.raises(wucme.NetworkError, match="does not resolve"):
            wucme.resolve("no.invalid")

    def test_the_name_asked_for_decides_what_is_shown_also_by_ipv6(self, site: Site) -> None:
        asked: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(site.ca_file).with_name("site.pem"))
        context.sni_callback = lambda _, name, __: asked.append(name)
        with Loopback(Site(context, "").talk(plainly), LOOPBACKS[-1]) as server:
            for name in ("b.example", "127.0.0.1", ""):
                wucme.served(LOOPBACKS[-1], server.port, name, "", 5)
        assert asked == ["b.example", None, None]
        assert "127.0.0.1" in wucme.resolve("localhost")


class Proxy:
    """A proxy that knows only CONNECT, to one port of loopback, and keeps what it was asked."""

    def __init__(self, port: int, refusal: bytes = b"") -> None:
        self.port, self.refusal = port, refusal
        self.heads: list[str] = []

    def __call__(self, peer: socket.socket) -> None:
        self.heads.append(head(peer).decode())
        if self.refusal:
            peer.sendall(self.refusal)
            return
        peer.sendall(b"HTTP/1.1 200 connected\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.port), 5) as inner:
            while True:
                for source in select.select([peer, inner], [], [], 5)[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    (inner if source is peer else peer).sendall(data)


class TestProxy:
    @pytest.mark.parametrize(("user", "header", "by"), [
        ("", None, "setting"), ("ann:se%3Acret@", "ann:se:cret", "setting"), ("ann@", "ann:", "setting"),
        ("%C3%A9:x@", "é:x", "environment"),
    ])
    def test_by_connect_with_its_password_and_nobody_else_sees_that(
            self, site: Site, web: Callable[..., wucme.Http], user: str, header: str | None, by: str) -> None:
        seen: list[bytes] = []
        with Loopback(site.talk(noting(seen, lambda _: [answer()]))) as server:
            proxy = Proxy(server.port)
            with Loopback(proxy) as outer:
                url = f"http://{user}127.0.0.1:{outer.port}"
                os.environ["https_proxy"] = url if by == "environment" else "http://127.0.0.1:1"
                client = web(proxy=url if by == "setting" else "")
                for _ in range(2):
                    assert client.request("GET", f"https://localhost:{server.port}/").body == b"hello"
                client.close()
        assert len(proxy.heads) == 1
        assert proxy.heads[0].startswith(f"CONNECT localhost:{server.port} HTTP/1.")
        found = re.findall(r"(?m)^Proxy-Authorization: Basic (\S+)\r$", proxy.heads[0])
        assert [base64.b64decode(one).decode() for one in found] == ([header] if header else [])
        assert not any(b"roxy" in request for request in seen)

    @pytest.mark.parametrize(("proxy", "no_proxy"), [("none", ""), ("", "localhost")])
    def test_none_and_no_proxy_go_direct(self, site: Site, web: Callable[..., wucme.Http],
                                         monkeypatch: pytest.MonkeyPatch, proxy: str, no_proxy: str) -> None:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", no_proxy)
        with Loopback(site.talk(plainly)) as server, contextlib.closing(web(proxy=proxy)) as client:
            assert client.request("GET", f"https://localhost:{server.port}/").status == 200

    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")      # http.client before Python 3.11
    def test_a_proxy_that_wants_a_password_is_quoted(self, web: Callable[..., wucme.Http]) -> None:
        refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        with Loopback(Proxy(1, refusal)) as outer, pytest.raises(wucme.NetworkError) as caught:
            web(proxy=f"127.0.0.1:{outer.port}").request("GET", "https://ca.test/")
        assert str(caught.value) == (
            f"cannot reach ca.test through the proxy 127.0.0.1:{outer.port}: Tunnel connection failed: 407 Proxy "
            "Authentication Required; set proxy = http://USER:PASSWORD@HOST:PORT")
        del caught
        gc.collect()

    @pytest.mark.parametrize("proxy", ["https://ann:secret@p.test:3128", "socks5://ann:secret@p.test:1080",
                                       "http://ann:secret@:3128", "http://ann:secret/@p.test:3128"])
    def test_another_kind_of_proxy_is_refused_without_its_password(self, web: Callable[..., wucme.Http],
                                                                   proxy: str) -> None:
        with pytest.raises(wucme.NetworkError, match="only http://HOST:PORT can be used") as caught:
            web(proxy=proxy).request("GET", "https://ca.test/")
        assert "secret" not in str(caught.value)


# --- 3. files ----------------------------------------------------------------------------------

@pytest.fixture
def no_umask() -> Iterator[None]:
    """A umask that takes nothing away, so that modes show who set them."""
    before = os.umask(0)
    yield
    os.umask(before)


class TestFiles:
    @pytest.mark.parametrize("content", [b"", b"text\n\0\xff", b"x" * 70000])
    def test_read(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        assert wucme.read(str(tmp_path / "file")) == content

    def test_read_goes_up_to_its_cap(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        assert wucme.read(str(tmp_path / "file"), 5) == b"12345"
        with pytest.raises(wucme.FileError, match="file: 5 bytes, more than the 4 that are read"):
            wucme.read(str(tmp_path / "file"), 4)

    @pytest.mark.parametrize(("make", "reason"), [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: None, "No such file or directory"),
        (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
        (lambda path: os.symlink("/dev/zero", path), "not a regular file"),
    ])
    def test_read_refuses_without_waiting(self, tmp_path: Path, make: Callable[[str], None], reason: str) -> None:
        path = str(tmp_path / "it")
        make(path)
        with pytest.raises(wucme.FileError, match=f"^{re.escape(path)}: {reason}$"):
            wucme.read(path)

    def test_what_may_not_be_read_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"secret")
        path.chmod(0)
        if os.geteuid():
            with pytest.raises(wucme.FileError, match="Permission denied"):
                wucme.read(str(path))
        else:
            assert wucme.read(str(path)) == b"secret"

    def test_read_and_create_leave_no_descriptor(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        wucme.create(str(tmp_path / "file"), b"x")
        for path in (tmp_path / "file", tmp_path, tmp_path / "none"):
            with contextlib.suppress(wucme.FileError):
                wucme.read(str(path))
        assert os.listdir("/proc/self/fd") == before

    def test_a_signature_changes_with_the_file(self, tmp_path: Path) -> None:
        path = str(tmp_path / "file")
        assert wucme.signature(path) == ("", False)
        seen = set()
        for content, when in ((b"one", 1), (b"one", 2), (b"three", 2)):
            Path(path).write_bytes(content)
            os.utime(path, (when, when))
            seen.add(wucme.signature(path)[0])
        wucme.create(path, b"three")
        os.utime(path, (2, 2))
        assert len(seen | {wucme.signature(path)[0]}) >= 3
        assert "" not in seen

    def test_create_is_private_from_the_first_byte(self, tmp_path: Path, no_umask: None,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
        path, modes, opener, write = tmp_path / "key", [], os.open, os.write

        def note(descriptor: int) -> int:
            modes.append((os.fstat(descriptor).st_size, stat.S_IMODE(os.fstat(descriptor).st_mode)))
            return descriptor

        monkeypatch.setattr(os, "open", lambda *arguments: note(opener(*arguments)))
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(note(descriptor), data[:3]))
        wucme.create(str(path), b"secret")
        assert modes == [(0, 0o600), (0, 0o600), (3, 0o600)]
        assert (path.read_bytes(), mode(path)) == (b"secret", 0o600)

    @pytest.mark.parametrize("umask", [0, 0o077])
    def test_create_has_the_mode_asked_for_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        wucme.create(str(tmp_path / "file"), b"x", wucme.Owner(0o644, -1, -1))
        os.umask(before)
        assert mode(tmp_path / "file") == 0o644

    def test_create_makes_a_new_file_in_place_of_a_stale_one(self, tmp_path: Path) -> None:
        path, other = tmp_path / "file_tmp", tmp_path / "other"
        other.write_bytes(b"stale, and longer")
        other.chmod(0o666)
        os.link(other, path)
        wucme.create(str(path), b"new")
        assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
        assert other.read_bytes() == b"stale, and longer"

    @pytest.mark.parametrize("dangling", [False, True])
    def test_create_follows_no_planted_link(self, tmp_path: Path, dangling: bool) -> None:
        path, victim = tmp_path / "file_tmp", tmp_path / "victim"
        if not dangling:
            victim.write_bytes(b"precious")
        path.symlink_to(victim)
        wucme.create(str(path), b"new")
        assert not path.is_symlink()
        assert victim.read_bytes() == b"precious" if victim.exists() else dangling

    def test_create_does_not_follow_a_link_planted_meanwhile(self, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
        path, unlink = tmp_path / "file_tmp", os.unlink
        path.write_bytes(b"stale")

        def race(name: str) -> None:
            unlink(name)
            os.symlink(tmp_path / "victim", name)

        monkeypatch.setattr(os, "unlink", race)
        with pytest.raises(FileExistsError):
            wucme.create(str(path), b"new")
        assert not (tmp_path / "victim").exists()

    @pytest.mark.parametrize(("kept", "user", "group"), [(0o600, 12345, 23456), (0o644, 12345, 0), (0o640, 0, 23456)])
    def test_replace_keeps_mode_and_owner(self, tmp_path: Path, no_umask: None, kept: int, user: int,
                                          group: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old, and longer")
        path.chmod(kept)
        theirs = (user, group) if os.geteuid() == 0 else (os.getuid(), os.getgid())
        os.chown(path, *theirs)
        wucme.replace(str(path), b"new", 0o606)
        about = path.stat()
        assert (path.read_bytes(), mode(path), (about.st_uid, about.st_gid)) == (b"new", kept, theirs)
        assert os.listdir(tmp_path) == ["file"]

    def test_replace_makes_what_is_not_there_with_the_mode_given(self, tmp_path: Path, no_umask: None) -> None:
        wucme.replace(str(tmp_path / "private"), b"x")
        wucme.replace(str(tmp_path / "public"), b"x", 0o644)
        assert (mode(tmp_path / "private"), mode(tmp_path / "public")) == (0o600, 0o644)

    def test_replace_puts_a_file_where_a_link_was(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").write_bytes(b"precious")
        (tmp_path / "file").symlink_to("elsewhere")
        wucme.replace(str(tmp_path / "file"), b"new")
        assert not (tmp_path / "file").is_symlink()
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"

    def test_file_and_directory_are_flushed_in_this_order(self, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[Any] = []
        monkeypatch.setattr(os, "replace", noting(events, os.replace))
        monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor)))
        path = str(tmp_path / "file")
        wucme.replace(path, b"four")
        assert events[1] == (f"{path}_tmp", path)
        assert (events[0].st_ino, events[0].st_size) == (os.stat(path).st_ino, 4)
        assert events[2].st_ino == tmp_path.stat().st_ino

    @pytest.mark.parametrize(("before", "held"), [(None, 0), (b"old", 0o644), (b"new", 0o644)])
    def test_a_copy_has_mode_and_owner_before_its_first_byte(
            self, tmp_path: Path, no_umask: None, monkeypatch: pytest.MonkeyPatch, before: bytes | None,
            held: int) -> None:
        path = tmp_path / "copy"
        seen: list[tuple[int, int, int]] = []
        if before is not None:
            path.write_bytes(before)
            path.chmod(held)
        like = wucme.Owner(0o640, os.geteuid(), 7 if os.geteuid() == 0 else os.getegid())
        monkeypatch.setattr(wucme, "write_all", lambda descriptor, data: seen.append((
            stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_gid, os.write(descriptor, data))))
        wucme.deploy(str(path), b"new", like)
        assert (path.read_bytes(), mode(path), path.stat().st_gid) == (b"new", 0o640, like.gid)
        assert seen == [(0o640, like.gid, 3)]
        assert os.listdir(tmp_path) == ["copy"]
        wucme.deploy(str(path), b"new", like)
        assert len(seen) == 1, "what is there already is left alone"

    def test_a_copy_replaces_a_link_and_goes_into_no_directory(self, tmp_path: Path) -> None:
        like = wucme.Owner(0o644, os.geteuid(), os.getegid())
        (tmp_path / "target").write_bytes(b"new")
        (tmp_path / "link").symlink_to("target")
        (tmp_path / "dangling").symlink_to("nowhere")
        for name in ("link", "dangling"):
            wucme.deploy(str(tmp_path / name), b"new", like)
            assert not (tmp_path / name).is_symlink()
        (tmp_path / "directory").mkdir()
        (tmp_path / "way").symlink_to("directory")
        for name, reason in (("directory", "a directory"), ("way", "a link to one"), ("none/x", "make it")):
            with pytest.raises(wucme.FileError, match=reason):
                wucme.deploy(str(tmp_path / name), b"new", like)
        assert not list(tmp_path.rglob(".*"))

    def test_a_copy_that_cannot_be_given_away_is_not_made(self, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: int, *ids: int) -> None:
            if set(ids) != {-1}:
                raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "fchown", refuse)
        with pytest.raises(wucme.FileError, match="with this owner: Operation not permitted"):
            wucme.deploy(str(tmp_path / "x"), b"new", wucme.Owner(0o640, os.geteuid(), 7))
        assert os.listdir(tmp_path) == []
        wucme.deploy(str(tmp_path / "x"), b"new", wucme.copy_owner("", "644"))      # as on NFS with root_squash
        assert os.listdir(tmp_path) == ["x"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_a_copy_has_the_group_asked_for_in_a_directory_that_hands_on_its_own(self, tmp_path: Path) -> None:
        os.chown(tmp_path, 0, 12345)
        tmp_path.chmod(0o2755)
        wucme.deploy(str(tmp_path / "x"), b"new", wucme.Owner(0o640, os.geteuid(), os.getegid()))
        assert (tmp_path / "x").stat().st_gid == os.getegid()

    def test_remove_and_link(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "by").write_bytes(b"stale")
        (tmp_path / "link").write_bytes(b"old")
        wucme.link("file", str(tmp_path / "link"), str(tmp_path / "by"))
        assert os.readlink(tmp_path / "link") == "file"
        for _ in range(2):
            wucme.remove(str(tmp_path / "link"))
        assert os.listdir(tmp_path) == ["file"]

    def test_a_backup_is_a_second_link_that_a_rename_leaves_alone(self, tmp_path: Path) -> None:
        path, target = tmp_path / "file", tmp_path / "file_1"
        path.write_bytes(b"old")
        target.write_bytes(b"stale")
        inode = path.stat().st_ino
        wucme.back_up(str(path), str(target))
        wucme.replace(str(path), b"new")
        assert (target.read_bytes(), target.stat().st_ino, path.read_bytes()) == (b"old", inode, b"new")

    @pytest.mark.parametrize("linked", [False, True])
    def test_a_backup_is_a_copy_of_a_link_and_where_links_cannot_be(self, tmp_path: Path, linked: bool,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "pair").write_bytes(b"old")
        (tmp_path / "pair").chmod(0o640)
        if linked:
            (tmp_path / "key").symlink_to("pair")
        else:
            (tmp_path / "pair").rename(tmp_path / "key")
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
        wucme.back_up(str(tmp_path / "key"), str(tmp_path / "key_1"))
        (tmp_path / "key").resolve().write_bytes(b"new")
        assert not (tmp_path / "key_1").is_symlink()
        assert ((tmp_path / "key_1").read_bytes(), mode(tmp_path / "key_1")) == (b"old", 0o640)

    def test_a_backup_of_a_key_is_private(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_bytes(wucme.key_pem(KEY))
        (tmp_path / "key").chmod(0o644)
        wucme.back_up(str(tmp_path / "key"), str(tmp_path / "key_1"))
        assert mode(tmp_path / "key_1") == 0o600

    @pytest.mark.parametrize(("bits", "anyone"), [(0o644, False), (0o664, False), (0o646, True), (0o602, True)])
    @pytest.mark.parametrize("user", [0, 1000])
    def test_what_anyone_may_write_is_not_for_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int,
                                                   anyone: bool, user: int) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "file").chmod(bits)
        monkeypatch.setattr(os, "geteuid", lambda: user)
        path = str(tmp_path / "file")
        fault = f"{path}: anyone may write it, and root trusts it; chmod o-w {path}"
        assert wucme.anyone_may_write(path) == (fault if anyone and user == 0 else "")
        assert not wucme.anyone_may_write(str(tmp_path / "none"))

    @pytest.mark.parametrize(("bits", "fine"), [(0o755, True), (0o777, False), (0o1777, True)])
    def test_directories_on_the_way_count_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int,
                                              fine: bool) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        (tmp_path / "open" / "below").mkdir(parents=True)
        (tmp_path / "open").chmod(bits)
        (tmp_path / "link").symlink_to("open")
        for way in (tmp_path / "open", tmp_path / "link"):
            assert bool(wucme.anyone_may_write(str(way / "below" / "file"))) is not fine
        assert bool(wucme.anyone_may_write(str(tmp_path / "open"))) is (bits != 0o755), "sticky or not"

    def test_every_link_on_the_way_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        for name in ("open", "real"):
            (tmp_path / name).mkdir()
        (tmp_path / "real" / "file").touch()
        (tmp_path / "first").symlink_to("open/second")
        (tmp_path / "open" / "second").symlink_to("../real")
        (tmp_path / "loop").symlink_to("loop")
        path = str(tmp_path / "first" / "file")
        assert wucme.anyone_may_write(path) == wucme.anyone_may_write(str(tmp_path / "loop")) == ""
        (tmp_path / "open").chmod(0o777)
        assert f"anyone may write {tmp_path}/open," in wucme.anyone_may_write(path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize(("which", "bits", "user", "said"), [
        ("file", 0o644, 0, ""), ("file", 0o664, 0, " (group 0 may write it)"),
        ("file", 0o644, 12345, " (it belongs to user 12345)"), ("", 0o755, 12345, " (it belongs to user 12345)"),
        ("", 0o775, 0, "")])
    def test_who_else_may_write(self, tmp_path: Path, which: str, bits: int, user: int, said: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / which).chmod(bits)
        os.chown(tmp_path / which, user, 0)
        (tmp_path.parent / "link").unlink(missing_ok=True)
        (tmp_path.parent / "link").symlink_to(tmp_path)
        for way in (tmp_path, tmp_path.parent / "link"):
            found = wucme.others_may_write(str(way / "file"))
            assert found in ([f"{one / which}{said}" for one in (way, tmp_path)] if said else [""])

    def test_directories_can_be_passed_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o077)
        wucme.make_directory(str(tmp_path / "a" / "b"))
        os.umask(before)
        assert [mode(tmp_path / name) for name in ("a", "a/b")] == [0o755, 0o755]

    def test_a_new_directory_is_flushed_in_its_parent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flushed: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
        wucme.make_directory(str(tmp_path / "a" / "b"))
        assert flushed == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]

    def test_what_is_planted_is_public_and_leaves_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir(0o700)
        path = tmp_path / "a" / "b" / "token"
        for text in (b"one", b"two"):
            wucme.plant(str(tmp_path), ["a", "b"], "token", text)
            assert (path.read_bytes(), mode(path)) == (text, 0o644)
        assert (mode(tmp_path / "a"), mode(tmp_path / "a" / "b")) == (0o700, 0o755)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
    @pytest.mark.parametrize(("owner", "mode", "followed"), [
        (0, 0o755, True), (0, 0o775, False), (65534, 0o755, False)])
    def test_a_link_on_the_way_is_followed_only_where_no_other_could_have_made_it(
            self, owner: int, mode: int, followed: bool, tmp_path: Path) -> None:
        root, other = tmp_path / "root", tmp_path / "other"
        root.mkdir()
        other.mkdir()
        (root / "a").symlink_to(other)
        root.chmod(mode)
        os.chown(root, owner, owner)
        with contextlib.nullcontext() if followed else pytest.raises(wucme.FileError, match="is not followed"):
            wucme.plant(str(root), ["a"], "token", b"x")
        assert (other / "token").exists() is followed
        (root / "b").mkdir()
        (root / "b" / "token").symlink_to(other / "victim")
        wucme.plant(str(root), ["b"], "token", b"y")
        planted = root / "b" / "token"
        assert (planted.is_symlink(), planted.stat().st_uid, (other / "victim").exists()) == (False, owner, False)

    def test_who_may_not_give_files_away_keeps_what_is_planted(self, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "fchown", refuse)
        wucme.plant(str(tmp_path), ["a"], "token", b"one")
        assert (tmp_path / "a" / "token").read_bytes() == b"one"

    @pytest.mark.parametrize(("fault", "told"), [("file", True), ("loop", True), ("long", False)])
    def test_a_link_is_blamed_only_where_it_may_be_one(self, tmp_path: Path, fault: str, told: bool) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(wucme.FileError) as met:
            wucme.plant(str(tmp_path), [{"long": "x" * 300}.get(fault, fault)], "token", b"one")
        assert ("a link" in str(met.value)) == told

    def test_what_others_may_change_is_not_ours_alone(self, tmp_path: Path) -> None:
        key, link = tmp_path / "key", tmp_path / "link"
        key.touch(0o600)
        link.symlink_to(key)
        assert wucme.signature(str(key))[1]
        assert wucme.signature(str(link)) == (wucme.signature(str(key))[0], False)
        key.chmod(0o620)
        assert not any(wucme.signature(str(path))[1] for path in (key, link, tmp_path, tmp_path / "none"))

    def test_a_directory_may_be_made_by_several_workers_at_once(self, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
        answers, real = iter([False, True]), os.path.isdir
        monkeypatch.setattr(os.path, "isdir", lambda path: next(answers, True) and real(path))
        (tmp_path / "new").mkdir()
        wucme.make_directory(str(tmp_path / "new"))
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError):
            wucme.make_directory(str(tmp_path / "file"))

    def test_a_directory_that_is_there_keeps_its_mode(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o750)
        wucme.make_directory(str(tmp_path))
        assert mode(tmp_path) == 0o750

    def test_only_one_has_the_lock(self, tmp_path: Path) -> None:
        path = str(tmp_path / "lock")
        first = wucme.take_lock(path)
        assert first is not None
        assert wucme.take_lock(path) is None
        os.close(first)
        again = wucme.take_lock(path)
        assert again is not None
        os.close(again)
        assert mode(tmp_path / "lock") == 0o600

    def test_the_lock_is_free_when_its_holder_is_killed_though_its_child_lives_on(self, tmp_path: Path) -> None:
        code = ("import subprocess, sys, time, wucme; wucme.take_lock(sys.argv[1]); null = subprocess.DEVNULL; "
                "child = subprocess.Popen(['sleep', '5'], stdout=null, stderr=null, close_fds=False); "
                "print(child.pid, flush=True); time.sleep(5)")
        with subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE,
                              env={**ENVIRONMENT, "PYTHONPATH": str(BUILT),
                                   "PYTHONDONTWRITEBYTECODE": "1"}) as holder:
            assert holder.stdout
            child = int(holder.stdout.readline())
            assert wucme.take_lock(str(tmp_path / "lock")) is None
            holder.kill()
        assert alive(child)
        ours = wucme.take_lock(str(tmp_path / "lock"))
        os.kill(child, signal.SIGKILL)
        assert ours is not None
        os.close(ours)

    def test_a_file_system_without_locks_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", flock)
        with pytest.raises(wucme.FileError, match="cannot be locked here \\(Operation not supported\\)"):
            wucme.take_lock(str(tmp_path / "lock"))


# --- 4. pem ------------------------------------------------------------------------------------

def brief(value: object) -> str | None:
    """What to call a PEM text, or one that is too long, in the name of a test."""
    return f"{len(value)} bytes" if isinstance(value, bytes) or (isinstance(value, str) and len(value) > 99) else None


def der(tag: int, *parts: bytes) -> bytes:
    """A value of less than 256 bytes in DER."""
    body = b"".join(parts)
    return bytes([tag, len(body)] if len(body) < 128 else [tag, 0x81, len(body)]) + body


class TestKeys:
    @pytest.mark.parametrize("kind", ["ecdsa-p256", "ecdsa-p384", "rsa-2048"])
    def test_a_key_goes_to_pem_and_comes_back(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        monkeypatch.setattr(rsa, "generate_private_key", lambda exponent, size: rsa_key())
        key = wucme.new_key(kind)
        pem = wucme.key_pem(key)
        assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
        again = wucme.parse_key(b"text before\n" + pem)
        assert wucme.key_kind(again.public_key()) == kind
        assert wucme.key_hash(again.public_key()) == wucme.key_hash(key.public_key())

    @pytest.mark.parametrize("size", [2048, 3072, 4096])
    def test_rsa_keys_have_the_size_asked_for(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(rsa, "generate_private_key", noting(asked, lambda *_: None))
        wucme.new_key(f"rsa-{size}")
        assert asked == [(65537, size)]
        assert f"rsa-{size}" in wucme.KEY_KINDS

    def test_a_key_hash_is_the_digest_of_the_public_key_info(self) -> None:
        der = KEY.public_key().public_bytes(serialization.Encoding.DER,
                                            serialization.PublicFormat.SubjectPublicKeyInfo)
        assert wucme.key_hash(KEY.public_key()) == hashlib.sha256(der).hexdigest()
        assert wucme.key_hash(KEY.public_key()) != wucme.key_hash(OTHER_KEY.public_key())

    @pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.BrainpoolP256R1(), ec.BrainpoolP384R1()])
    def test_a_key_on_another_curve_is_of_another_kind(self, curve: ec.EllipticCurve) -> None:
        assert wucme.key_kind(ec.generate_private_key(curve).public_key()) not in wucme.KEY_KINDS

    def test_the_kind_of_another_key_is_said_in_words(self) -> None:
        assert "Ed25519PublicKey" in wucme.key_kind(ed25519.Ed25519PrivateKey.generate().public_key())

    @pytest.mark.parametrize("form", [serialization.PrivateFormat.TraditionalOpenSSL,
                                      serialization.PrivateFormat.PKCS8])
    @pytest.mark.parametrize("key", [KEY, rsa_key()])
    def test_keys_of_other_programs_are_read(self, key: Any, form: serialization.PrivateFormat) -> None:
        pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        found = wucme.parse_key(CHAIN + pem.replace(b"\n", b"\r\n"))
        assert wucme.key_hash(found.public_key()) == wucme.key_hash(key.public_key())

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize(("curve", "oid"), [(ec.SECP256R1(), "06082a8648ce3d030107"),
                                                (ec.SECP384R1(), "06052b81040022")])
    @pytest.mark.parametrize("change", [1, -1])
    def test_numbers_longer_or_shorter_than_their_curve_are_read(self, curve: Any, oid: str, plain: bool,
                                                                 change: int) -> None:
        size = (curve.key_size + 7) // 8
        key = ec.derive_private_key(3 << (8 * size - 16), curve)    # its first octet is zero
        number = key.private_numbers().private_value.to_bytes(size + change, "big")
        point = key.public_key().public_bytes(serialization.Encoding.X962,
                                              serialization.PublicFormat.UncompressedPoint)
        named = bytes.fromhex(oid)
        found = der(0x30, b"\x02\x01\x01", der(4, number), b"" if plain else der(0xa0, named),
                    der(0xa1, der(3, b"\0" + point)))
        if plain:
            kind = der(0x30, bytes.fromhex("06072a8648ce3d0201"), named)
            found = der(0x30, b"\x02\x01\x00", kind, der(4, found))
        label = b"PRIVATE KEY-----" if plain else b"EC PRIVATE KEY-----"
        pem = b"-----BEGIN " + label + b"\n" + base64.encodebytes(found) + b"-----END " + label + b"\n"
        for found_key in (wucme.parse_key(pem), wucme.parse_odd_key(pem)):
            assert found_key
            assert wucme.key_hash(found_key.public_key()) == wucme.key_hash(key.public_key())

    @pytest.mark.parametrize(("key", "reason"), [
        (b"", "holds no (whole )?private key"),
        (b"junk", "holds no (whole )?private key"),
        (CHAIN, "holds no (whole )?private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds no (whole )?private key"),
        (b"-----BEGIN PRIVATE KEY-----\n\xff\n-----END PRIVATE KEY-----\n", "holds no (whole )?private key"),
        (wucme.key_pem(KEY)[:-40], "holds no (whole )?private key"),
        (ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
         "a private key of a kind that CAs do not take"),
        *[(KEY.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"x")),
           "the private key is encrypted; wucme needs it in the clear")
          for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL)],
    ], ids=brief)
    def test_what_is_no_key_is_refused(self, key: bytes, reason: str) -> None:
        with pytest.raises(wucme.PemError, match=f"^{reason}"):
            wucme.parse_key(key)

    @pytest.mark.parametrize("names", [("a.example",), ("*.a.example", "b.example"),
                                       ("192.0.2.1", "2001:db8::1", "c.d")])
    @pytest.mark.parametrize("key", [KEY, rsa_key()])
    def test_a_request_has_exactly_the_names_and_no_subject(self, key: Any, names: tuple[str, ...]) -> None:
        request = x509.load_der_x509_csr(wucme.signing_request(key, names))
        assert list(request.subject) == []
        assert request.is_signature_valid
        assert [one.oid for one in request.extensions] == [x509.SubjectAlternativeName.oid]
        found = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(one.value) for one in found] == list(names)
        assert wucme.key_hash(request.public_key()) == wucme.key_hash(key.public_key())


class TestChains:
    def test_facts(self) -> None:
        pem = INTERMEDIATE.issue(KEY, "WWW.example.org", "192.0.2.1", span=(-100.0, 200.0))
        leaf = x509.load_pem_x509_certificate(pem)
        found = wucme.facts(b"text\n" + pem + CHAIN)
        assert found == wucme.Facts(
            ("www.example.org", "192.0.2.1"), NOW - 100, NOW + 200, "CN=intermediate", f"{leaf.serial_number:x}",
            hashlib.sha256(leaf.public_bytes(serialization.Encoding.DER)).hexdigest(),
            wucme.key_hash(KEY.public_key()), "ecdsa-p256", wucme.certificate_id(leaf))

    def test_a_certificate_without_names_has_none(self) -> None:
        assert wucme.facts(ROOT.pem).names == ()

    @pytest.mark.parametrize("pem", [
        b"", b"junk", wucme.key_pem(KEY), CHAIN[:200], CHAIN.replace(b"MII", b"MI!"),
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n\xff\n-----END CERTIFICATE-----\n",
    ], ids=brief)
    def test_facts_of_what_is_no_certificate(self, pem: bytes) -> None:
        with pytest.raises(wucme.PemError, match=r"^(holds no certificate|not a certificate: )"):
            wucme.facts(pem)

    def test_blocks_are_cut_out_of_any_text_with_plain_line_ends(self) -> None:
        text = b"Bag Attributes\r\n" + (wucme.key_pem(KEY) + CHAIN).replace(b"\n", b"\r\n") + b"end"
        assert b"".join(wucme.certificates(text)) == CHAIN
        assert len(wucme.certificates(text)) == 2
        assert wucme.private_key(text) == wucme.key_pem(KEY)
        assert wucme.private_key(CHAIN) == b""

    @bounded
    @given(data=st.lists(st.binary(max_size=9) | st.sampled_from([
        b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"-----BEGIN EC PRIVATE KEY-----", b"\n", b"\r\n",
        b"-----END EC PRIVATE KEY-----", b"-----BEGIN ", b"-----", b"AAAA", CHAIN]), max_size=12).map(b"".join))
    def test_no_bytes_upset_the_cutting_of_blocks(self, data: bytes) -> None:
        for found in wucme.certificates(data):
            assert re.match(rb"-----BEGIN CERTIFICATE-----\s", found)
            assert found.endswith(b"-----END CERTIFICATE-----\n")
        with contextlib.suppress(wucme.PemError):
            assert wucme.facts(data).kind
        with contextlib.suppress(wucme.PemError):
            wucme.check_chain(data, KEY_HASH, NAMES, NOW)

    @bounded
    @given(data=spoilt(CHAIN) | spoilt(wucme.certificate_der(CHAIN)).map(
        lambda der: armour("CERTIFICATE", der) + INTERMEDIATE.pem))
    def test_a_spoilt_chain_is_refused_or_read(self, data: bytes) -> None:
        with contextlib.suppress(wucme.PemError):
            assert wucme.facts(data).fingerprint
        with contextlib.suppress(wucme.PemError):
            wucme.check_chain(data, KEY_HASH, NAMES, NOW)
        with contextlib.suppress(wucme.PemError):
            wucme.chain_matches(data, "root")

    @bounded
    @given(data=spoilt(wucme.key_pem(KEY)) | spoilt(KEY.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())).map(
            lambda der: armour("PRIVATE KEY", der)))
    def test_a_spoilt_key_is_refused_or_read(self, data: bytes) -> None:
        with contextlib.suppress(wucme.PemError):
            assert wucme.key_kind(wucme.parse_key(data).public_key())

    @pytest.mark.parametrize(("seconds", "text"), [
        (1773406331, "Mar 13 12:52:11 2026 GMT"), (0, "Jan 01 00:00:00 1970 GMT"),
        (253402300799, "Dec 31 23:59:59 9999 GMT"), (1e30, f"{1e30:.0f} s after 1970"),
    ])
    def test_gmt(self, seconds: float, text: str) -> None:
        assert wucme.gmt(seconds) == text


class TestHostName:
    @pytest.mark.parametrize(("text", "name"), [
        ("example.org", "example.org"),
        (" WWW.Example.ORG. ", "www.example.org"),
        ("*.example.org", "*.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.BÜCHER.example", "*.xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dmarc.a_b.example", "_dmarc.a_b.example"),
        ("localhost", "localhost"),
        ("1.example", "1.example"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
        (".".join(["a" * 49] * 5) + ".abc", ".".join(["a" * 49] * 5) + ".abc"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("::1", "::1"),
    ])
    def test_what_is_one(self, text: str, name: str) -> None:
        assert wucme.host_name(text) == name
        assert wucme.is_address(name) is (":" in name or name[-1].isdigit())

    @pytest.mark.parametrize("text", [
        "", ".", "..", " ", "a..example", "a..", ".example.org", "*", "*.", "*.*.example.org", "www.*.example.org",
        "w*.example.org",
        "-a.example", "a-.example", "a.example/x", "a.example:443", "https://a.example", "a b", "a\nb", "a;b", "a'b",
        "../x", "a" * 64 + ".example", "ü" * 64 + ".example", ".".join(["a" * 50] * 5) + ".abc", "192.0.2",
        "192.0.2.256", "1.2.3.4.5", "1", "2001:db8::g", "2001:db8::1/64", "[::1]:80",
        "fe80::1%eth0", "fe80::1%/../x", "::1%\nx", "stra\u00dfe.example", "a\u200db.example",
    ])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match=r".") as caught:
            wucme.host_name(text)
        assert not isinstance(caught.value, wucme.WucmeError)

    @bounded
    @given(text=st.text(st.sampled_from("aZ09-_.*:[]%/\\ \n\0;$'\"üß。١²ǅ\u200d"), max_size=12)
           | st.from_regex(r"\A[0-9a-f]{0,4}::[0-9a-f]{0,4}%?[a-z/.\n]{0,3}\Z") | st.text(max_size=80))
    def test_an_accepted_name_is_safe_everywhere_and_stays_as_it_is(self, text: str) -> None:
        try:
            name = wucme.host_name(text)
        except ValueError:
            return
        assert re.fullmatch(r"(\*\.)?[a-z0-9_.-]+|[0-9a-f:.]+", name)
        assert wucme.host_name(name) == name
        assert 0 < len(name) <= 253


def many(count: int) -> bytes:
    """A chain of so many certificates, each issued by the next."""
    issuers = [ROOT]
    for number in range(count - 1):
        issuers.append(Issuer(f"number {number}", issuers[-1]))
    return issuers[-1].issue(KEY, *NAMES) + b"".join(issuer.pem for issuer in reversed(issuers[1:]))


class TestCheckChain:
    @pytest.mark.parametrize(("chain", "extra"), [
        (CHAIN, []),
        (CHAIN + ROOT.pem, []),
        (INTERMEDIATE.issue(KEY, *NAMES), []),
        (CHAIN.replace(b"\n", b"\r\n"), []),
        (b"subject=\n" + CHAIN + b"\ntext without a newline", []),
        (INTERMEDIATE.chain(KEY, *NAMES, "b.example.org", "a.example.org"), ["a.example.org", "b.example.org"]),
        (INTERMEDIATE.chain(KEY, "EXAMPLE.org", "www.example.org"), []),
        (INTERMEDIATE.chain(KEY, span=(200, DAY)), []),
        (many(wucme.CHAIN_LENGTH), []),
    ], ids=brief)
    def test_a_good_chain_and_the_names_that_it_has_more(self, chain: bytes, extra: list[str]) -> None:
        assert wucme.check_chain(chain, KEY_HASH, NAMES, NOW) == extra

    @pytest.mark.parametrize(("chain", "reason"), [
        (b"", "sent no certificate"),
        (b"junk", "sent no certificate"),
        (INTERMEDIATE.chain(OTHER_KEY), "for another key"),
        (INTERMEDIATE.chain(KEY, "example.org"), "lacks www.example.org"),
        (INTERMEDIATE.issue(KEY), "lacks example.org, www.example.org"),
        (INTERMEDIATE.chain(KEY, span=(-DAY, 0)), "not valid now .*is the clock of this host right"),
        (INTERMEDIATE.chain(KEY, span=(301, DAY)), "not valid now"),
        (INTERMEDIATE.pem + INTERMEDIATE.issue(KEY, *NAMES), "is a CA's"),
        (CHAIN + CHAIN, "certificate 2 of the chain that the CA sent was not issued by the next"),
        (INTERMEDIATE.issue(KEY, *NAMES) + ROOT.pem, "certificate 1 of the chain that the CA sent was not issued by"),
        (CHAIN + wucme.key_pem(KEY), "more than certificates \\(PRIVATE KEY\\)"),
        (wucme.key_pem(OTHER_KEY) + CHAIN, "more than certificates"),
        (CHAIN + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a certificate"),
        (many(wucme.CHAIN_LENGTH + 1), f"a chain of {wucme.CHAIN_LENGTH + 1} certificates"),
    ], ids=brief)
    def test_a_bad_chain_is_refused(self, chain: bytes, reason: str) -> None:
        with pytest.raises(wucme.PemError, match=reason):
            wucme.check_chain(chain, KEY_HASH, NAMES, NOW)

    @pytest.mark.parametrize("value", [b"junk", bytes.fromhex("3004a3023000")])
    @pytest.mark.parametrize("oid", [x509.SubjectAlternativeName.oid, x509.AuthorityKeyIdentifier.oid,
                                     x509.BasicConstraints.oid])
    def test_an_extension_that_cannot_be_read_is_a_refusal(self, oid: x509.ObjectIdentifier, value: bytes) -> None:
        start, end = (datetime.fromtimestamp(NOW + seconds, timezone.utc) for seconds in (-DAY, DAY))
        builder = (x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(INTERMEDIATE.name)
                   .public_key(KEY.public_key()).serial_number(1).not_valid_before(start).not_valid_after(end)
                   .add_extension(x509.UnrecognizedExtension(oid, value), critical=False))
        leaf = builder.sign(INTERMEDIATE.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        with contextlib.suppress(wucme.PemError):
            assert wucme.facts(leaf).names == ()
        with pytest.raises(wucme.PemError):
            wucme.check_chain(leaf + INTERMEDIATE.pem, KEY_HASH, [], NOW)

    def test_a_signature_of_a_kind_not_known_yet_is_no_reason_to_refuse(self) -> None:
        known_kind, another = bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f")
        leaf = wucme.certificate_der(CHAIN)
        assert leaf.count(known_kind) == 2
        chain = armour("CERTIFICATE", leaf.replace(known_kind, another)) + INTERMEDIATE.pem
        assert wucme.check_chain(chain, KEY_HASH, NAMES, NOW) == []

    @pytest.mark.parametrize("identifiers", [True, False])
    def test_an_issuer_of_the_right_name_with_another_key_is_refused(self, identifiers: bool) -> None:
        real = Issuer("intermediate", ROOT, identifiers)
        imposter = Issuer("intermediate", ROOT, identifiers)
        leaf = real.issue(KEY, *NAMES)
        assert wucme.check_chain(leaf + real.pem, KEY_HASH, NAMES, NOW) == []
        with pytest.raises(wucme.PemError, match=r"certificate 1 .* was not issued by the next"):
            wucme.check_chain(leaf + imposter.pem, KEY_HASH, NAMES, NOW)

    def test_an_issuer_of_another_name_with_the_right_key_is_refused(self) -> None:
        real, other = Issuer("real", ROOT), Issuer("other", ROOT)
        renamed = ROOT.issue(real.key, subject=other.name, authority=True)
        with pytest.raises(wucme.PemError, match="was not issued by the next"):
            wucme.check_chain(real.issue(KEY, *NAMES) + renamed, KEY_HASH, NAMES, NOW)

    def test_key_identifiers_alone_tell_issuers_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        imposter = x509.load_pem_x509_certificate(Issuer("intermediate", ROOT).pem)
        leaf = x509.load_pem_x509_certificate(CHAIN)
        monkeypatch.setattr(imposter.public_key().__class__, "verify", lambda *_: None, raising=False)
        assert not wucme.issued_by(leaf, imposter)

    def test_a_chain_signed_with_rsa_is_verified(self) -> None:
        issuer, other = Issuer("r", ROOT), Issuer("r", ROOT)
        for one, key in ((issuer, rsa_key()), (other, rsa_key())):
            one.key = key  # type: ignore[assignment]
            one.pem = ROOT.issue(key, subject=one.name, authority=True)
        leaf = issuer.issue(KEY, *NAMES)
        assert wucme.check_chain(leaf + issuer.pem, KEY_HASH, NAMES, NOW) == []
        forged = x509.load_pem_x509_certificate(leaf)
        class Forged:
            def __getattr__(self, name: str) -> Any:
                return b"0" * 256 if name == "signature" else getattr(forged, name)
        assert not wucme.issued_by(Forged(), x509.load_pem_x509_certificate(issuer.pem))  # type: ignore[arg-type]


# --- 5. settings -------------------------------------------------------------------------------

def read_text(text: str, **options: str) -> wucme.Settings:
    """The settings of an ini called w.ini."""
    return wucme.read_settings(wucme.Source("w.ini", text), options)


def refusal(text: str, **options: str) -> str:
    """Why an ini is refused."""
    with pytest.raises(wucme.SettingsError) as caught:
        read_text(text, **options)
    return str(caught.value)


def same_settings(one: wucme.Settings, other: wucme.Settings) -> bool:
    """Whether two inis mean the same."""
    return one._replace(source=other.source, lists={}) == other._replace(lists={})


class TestSettings:
    @pytest.mark.parametrize("name", [name for name, field in wucme.SETTINGS.items() if not field.local])
    def test_every_default_is_a_text_that_gives_the_value_of_no_ini(self, name: str) -> None:
        scope = next(scope for scope in wucme.SCOPES if name in scope._field_defaults)
        written, plain = read_text(f"[wucme]\n{name} = {wucme.SETTINGS[name].default}\n"), read_text("")
        place = {"RunScope": "run", "CertificateScope": "default", "ServerScope": "other_server"}[scope.__name__]
        assert getattr(written, place) == getattr(plain, place)
        assert wucme.SETTINGS[name].help

    def test_the_defaults_of_the_design(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        found = read_text("")
        assert found.run._replace(host="") == wucme.RunScope(
            directory="/etc/wucme", log="/etc/wucme/wucme.log", backups=3, workers=4, orders=100, lock_wait=600,
            timeout=20, deadline=120, alert=(), metrics="", host="")
        assert found.run.host == os.uname().nodename
        assert found.default == wucme.CertificateScope(
            server=("letsencrypt",), names=(), key="ecdsa-p256", rotate=False, renew=wucme.Renewal(auto=True),
            listen=None, load=(), load_timeout=300, grace=10, profile="", chain="", csr="", challenge=("http-01",),
            listen_tls=None, webroot=(), stateless=False, hook=None, nsupdate=None, dns_wait=120,
            must_staple=False)
        assert found.other_server == wucme.ServerScope(
            url="", ca_file="", proxy="", contact=(), agree=False, eab_kid="", eab_hmac=wucme.Secret(""),
            eab_hmac_file="", eab_alg="HS256", profile="", chain="")

    def test_an_ordinary_user_has_a_directory_at_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("HOME", "/home/ann")
        found = read_text("").run
        assert (found.directory, found.log) == ("/home/ann/.wucme", "/home/ann/.wucme/wucme.log")

    def test_the_example_is_all_comments_and_uncommented_means_the_defaults(self) -> None:
        text = wucme.example_ini()
        assert all(line.startswith(("#", "[wucme]")) or not line for line in text.splitlines())
        general, _, certificate = text.partition("# [www.example.org]")
        shown = re.findall(r"(?m)^# (\w+) =(?: .*)?$", general)
        assert sorted(shown) == sorted(name for name, field in wucme.SETTINGS.items() if not field.local)
        assert same_settings(read_text(re.sub(r"(?m)^# (\w+ =.*)$", r"\1", general)), read_text(""))
        tail = read_text("[www.example.org]" + re.sub(r"(?m)^# (?!---)", "", certificate))
        section = tail.sections["www.example.org"]
        assert wucme.find_server(tail, "home")[1].url
        assert section.values.names == ("www.example.org", "example.org")
        assert [wucme.parse_item(item).text[0] for item in section.values.load] == ["+", "@"]

    @pytest.mark.parametrize(("key", "text", "value"), [
        ("directory", "/srv/x", "/srv/x"), ("directory", "/srv/../x/", "/x"), ("log", "/var/log/w", "/var/log/w"),
        ("backups", "0", 0), ("backups", "12", 12), ("workers", "1", 1),
        ("lock_wait", "0s", 0), ("lock_wait", "90s", 90), ("timeout", "2m", 120), ("deadline", "1h", 3600),
        ("load_timeout", "1d", 86400), ("host", "node-1.example_x", "node-1.example_x"),
        ("server", "letsencrypt letsencrypt-staging", ("letsencrypt", "letsencrypt-staging")),
        ("server", "https://ca.test/dir", ("https://ca.test/dir",)),
        ("server", "https://[2001:db8::1]:65535/d?x=[1] https://u:p@ca.test", ("https://[2001:db8::1]:65535/d?x=[1]",
                                                                               "https://u:p@ca.test")),
        ("key", "ecdsa-p384", "ecdsa-p384"), ("key", "rsa-4096", "rsa-4096"),
        ("rotate", "yes", True), ("rotate", "No", False), ("agree", "YES", True),
        ("renew", "never", wucme.Renewal()), ("renew", "auto", wucme.Renewal(auto=True)),
        ("renew", "30", wucme.Renewal(seconds=30 * DAY)), ("renew", "30d", wucme.Renewal(seconds=30 * DAY)),
        ("renew", "12h", wucme.Renewal(seconds=43200)), ("renew", "25%", wucme.Renewal(share=0.25)),
        ("challenge", "dns-01 http-01 dns-01", ("dns-01", "http-01")), ("webroot", "/a /b/", ("/a", "/b")),
        ("stateless", "yes", True), ("hook", "", None), ("nsupdate", "", None), ("dns_wait", "0s", 0.0),
        ("hook", "uacme:/h k", wucme.Hook("uacme", ("/h k",), ("/h k",))),
        ("hook", "certbot:a b,c d", wucme.Hook("certbot", ("/bin/sh", "-c", "a b"), ("/bin/sh", "-c", "c d"))),
        ("hook", "certbot:a", wucme.Hook("certbot", ("/bin/sh", "-c", "a"), ())),
        ("nsupdate", "/k", wucme.Updates("/k", ("", 53), "")),
        ("nsupdate", "/k ns.example zone.example", wucme.Updates("/k", ("ns.example", 53), "zone.example")),
        ("nsupdate", "/k ns.example:5353", wucme.Updates("/k", ("ns.example", 5353), "")),
        ("nsupdate", "/k [::1]:54", wucme.Updates("/k", ("::1", 54), "")),
        ("nsupdate", "/k 2001:db8::1", wucme.Updates("/k", ("2001:db8::1", 53), "")),
        ("listen_tls", ":8443", (("", 8443),)), ("listen_tls", "none", ()),
        ("listen", "none", ()), ("listen", "", None), ("listen", ":8080", (("", 8080),)),
        ("listen", "127.0.0.1:80 [::1]:81", (("127.0.0.1", 80), ("::1", 81))),
        ("contact", "a@example.org b@example.org", ("a@example.org", "b@example.org")),
        ("contact", "mailto:a@example.org", ("a@example.org",)),
        ("proxy", "http://a:%25$x@p:3128", "http://a:%25$x@p:3128"), ("ca_file", "/a/%d/$HOME", "/a/%d/$HOME"),
        ("load", "$ echo %(x)s $HOME ${A} %%", ("$ echo %(x)s $HOME ${A} %%",)),
        ("load", "$ date # no comment; this", ("$ date # no comment; this",)),
        ("load", "\n  +nginx\n# a comment\n\n  ; another\n  $ a = b", ("+nginx", "$ a = b")),
    ])
    def test_a_good_value(self, key: str, text: str, value: object) -> None:
        found = read_text(f"[wucme]\n{key} = {text}\n")
        for scope in (found.run, found.default, found.other_server):
            if hasattr(scope, key):
                assert getattr(scope, key) == value

    @pytest.mark.parametrize(("key", "text", "reason"), [
        ("backups", "", "whole number"), ("backups", "-1", "whole number"), ("backups", "3.5", "whole number"),
        ("backups", "²", ""), ("workers", "many", "whole number"), ("workers", "0", ""),
        ("lock_wait", "10", "must be a duration such as"), ("timeout", "1.5h", "duration"),
        ("deadline", "2 m", "duration"), ("timeout", "5M", "duration"), ("timeout", "", "duration"),
        ("host", "a/b", "letters, digits"), ("host", "../x", "letters, digits"), ("host", "-a", "letters, digits"),
        ("key", "rsa", "must be one of ecdsa-p256, "), ("key", "ECDSA-P256", "must be one of"),
        ("rotate", "true", "must be yes or no"), ("agree", "", "must be yes or no"),
        ("renew", "0%", "must be auto, never"), ("renew", "100%", "must be auto"), ("renew", "", "must be auto"),
        ("renew", "-3", "must be auto"), ("renew", "30 days", "must be auto"), ("renew", "9" * 309, ""),
        ("challenge", "http-02", "must be of http-01, dns-01, tls-alpn-01, dns-persist-01"),
        ("challenge", "", "must name a challenge type"), ("hook", "/h", "must be one of uacme, dehydrated"),
        ("hook", "lego:h", "the whole path of a file"), ("hook", "acme.sh:/h", "must be one of uacme"),
        ("hook", "certbot:", "must be one of"), ("nsupdate", "/k a b c", "must be KEYFILE [SERVER[:PORT]] [ZONE]"),
        ("nsupdate", "/k a:0", "must be :PORT"),
        ("listen", "80", "must be :PORT"), ("listen", ":0", "must be :PORT"), ("listen", ":65536", "must be :PORT"),
        ("listen", "a:http", "must be :PORT"), ("listen", ":²", ""),
        ("server", "", ""), ("server", "letsencript", "no such CA; did you mean letsencrypt?"),
        *(("server", f"{url}/", "must be an https:// URL") for url in (
            "http://ca.test", "https://", "https://ca.test:0", "https://ca.test:65536", "https://ca.test:x",
            "https://[::1", "https://[ca.test]", "https://ca[1].test", "https://u@v@ca.test", "xhttps://ca.test")),
        ("backups", "3 # three", "a comment needs a line of its own"),
        ("contact", "a@b.example ; mine", "a comment needs a line of its own"),
        ("listen", "::1", "must be :PORT"), ("listen", "2001:db8::1", "must be :PORT"),
        ("listen", "[::1:80", "must be :PORT"), ("listen", "[]:80", "must be :PORT"),
        ("hook", "certbot:,clean", "must be one of"), ("hook", "certbot: ", "must be one of"),
    ])
    def test_a_bad_value_is_refused_with_file_line_and_what_it_must_be(self, key: str, text: str, reason: str) -> None:
        told = refusal(f"[wucme]\n# comment\n{key} = {text}\n")
        assert told.startswith(f"w.ini:3: {key} = {text}".rstrip())
        assert reason in told

    @pytest.mark.parametrize(("text", "line", "reason"), [
        ("[wucme]\nrenwe = 30d", 2, "unknown setting 'renwe'; did you mean renew?"),
        ("[wucme]\n\ndirectroy = /x", 3, "did you mean directory?"),
        ("[wucme]\nload_timout = 5m", 2, "did you mean load_timeout?"),
        ("[wucme]\nzzz = 1", 2, "unknown setting 'zzz'"),
        ("[a.example]\nlisen = :1", 2, "did you mean listen?"),
        ("[wucme]\nkey = rsa-2048\nKEY = rsa-2048", 3, "key stands twice in [wucme]"),
        ("[wucme]\n[a.example]\n[wucme]\n", 3, "[wucme] stands twice"),
        ("\n key = rsa-2048\n[wucme]", 2, "'key = rsa-2048' stands before any section; begin with [wucme]"),
        ("[wucme]\nagree", 2, "is neither KEY = VALUE nor a section"),
        ("[wucme]\nagree: yes", 2, "is neither KEY = VALUE nor a section"),
        ("[wucme]\nload =\n  +nginx\n  renew = 30d\n", 4, "'renew = 30d' is indented and so belongs to load; move it"),
        ("[wucme]\nload = +nginx\n  Renew=30d\n", 3, "is indented and so belongs to load"),
        ("[wucme]\nkey = rsa-2048\n  renew = 30d\n", 3, "'renew = 30d' is indented and so belongs to key"),
        ("[wucme]\n[a.example]\nkey = rsa-2048\n  renew = 30d\n", 4, "is indented and so belongs to key"),
        ("[wucem]\nagree = yes", 1, "[wucem] is no host name and has no names = ...; did you mean wucme?"),
        ("[nothing like it]", 1, "is no host name"),
        ("[a.example]\nca_file = /x", 2, "ca_file belongs into [server NAME], not into [a.example]"),
        ("[a.example]\nbackups = 1", 2, "backups belongs into [wucme], not into [a.example]"),
        ("[server x]\nrenew = 1", 2, "renew belongs into [NAME], not into [server x]"),
        ("[wucme]\nnames = a.example", 2, "names belongs into [NAME], not into [wucme]"),
        ("[wucme]\n\nurl = https://ca.test/d", 3, "url belongs into [server NAME], not into [wucme]"),
        ("[server x]\nulr = https://x", 2, "unknown setting 'ulr'; did you mean url?"),
        ("[server x]\nurl = http://x", 2, "must be an https:// URL"),
        ("[server x]\nproxy = none\n[wucme]\nserver = x", 1, "[server x] needs a url"),
        ("[wucme]\n[a.example]\nserver = nowhere", 3, "no such CA"),
        ("[account]\nnames = a.example", 1, "cannot be a file name"),
        ("[account_x.example]", 1, "cannot be a file name"),
        ("[Account]\nnames = a.example", 1, "cannot be a file name"),
        ("[../a]\nnames = a.example", 1, "cannot be a file name"),
        ("[a/b.example]\nnames = a.example", 1, "cannot be a file name"),
        ("[a b.example]", 1, "cannot be a file name"),
        ("[a.example]\nnames = ..", 2, "'..' is neither a host name nor an IP address"),
        ("[a.example]\n[A.Example]", 2, "[A.Example] names the same certificate as [a.example]"),
        ("[*.a.example]\n[_.a.example]", 2, "names the same certificate as [*.a.example]"),
        ("# a page\x0cbreak, and\u2028more\n[wucme]\nzzz = 1", 3, "unknown setting 'zzz'"),
        ("  [wucme]\n  zzz = 1", 2, "unknown setting 'zzz'"),
        ("[wucme]\n  [a.example] # mine", 2, "nothing may stand behind a section's title"),
        ("[wucme]\nload = $ a\n  $ \0", 3, "no NUL anywhere"),
        ("[mail]\nnames =", 1, "[mail] is no host name and has no names"),
        ("[server]\nurl = https://ca.test/d", 1, "did you mean server NAME?"),
        ("[server a/b]\nurl = https://ca.test/d", 1, "[server a/b]: only letters, digits"),
        ("[server a b]\nurl = https://ca.test/d", 1, "[server a b]: only letters, digits"),
    ])
    def test_a_mistake_is_told_with_file_and_line(self, text: str, line: int, reason: str) -> None:
        told = refusal(text)
        assert told.startswith(f"w.ini:{line}: ")
        assert reason in told

    def test_options_stand_over_the_section_over_the_common_part_over_the_defaults(self) -> None:
        text = "[wucme]\nkey = rsa-2048\nrenew = 5\nbackups = 1\n[a.example]\nrenew = 6\nkey = rsa-3072\n[b.example]\n"
        found = read_text(text, key="rsa-4096", backups="2")
        a, b = found.sections["a.example"], found.sections["b.example"]
        assert (found.run.backups, found.run.workers) == (2, 4)
        assert [one.key for one in (found.default, a.values, b.values)] == ["rsa-4096"] * 3
        assert [one.renew.seconds for one in (found.default, a.values, b.values)] == [5 * DAY, 6 * DAY, 5 * DAY]
        assert read_text(text).sections["a.example"].values.key == "rsa-3072"
        assert [sorted(one.own) for one in (a, b)] == [["key", "names", "renew"], ["key", "names"]]

    def test_a_section_is_named_by_its_title_or_has_names(self) -> None:
        found = read_text("[WWW.Example.org]\n[mail]\nnames = a.example B.example a.example\n[*.c.example]\n"
                          "[2001:db8::1]")
        assert {label: one.values.names for label, one in found.sections.items()} == {
            "www.example.org": ("www.example.org",), "mail": ("a.example", "b.example"),
            "_.c.example": ("*.c.example",), "2001-db8--1": ("2001:db8::1",)}
        assert found.sections["www.example.org"].title == "WWW.Example.org"

    def test_several_servers(self) -> None:
        found = read_text("[wucme]\nserver = one letsencrypt https://three.test:9/d\nproxy = p:1\nca_file = /common\n"
                          "[server one]\nurl = https://one.test/d\nca_file = /one\n[server letsencrypt]\nproxy = none")
        one, two, three = (wucme.find_server(found, word) for word in found.default.server)
        assert (one[0], one[1].url, one[1].ca_file, one[1].proxy) == ("one", "https://one.test/d", "/one", "p:1")
        assert (two[1].url, two[1].ca_file, two[1].proxy) == (wucme.KNOWN_SERVERS["letsencrypt"], "/common", "none")
        assert (three[0], three[1].url) == ("three.test-9", "https://three.test:9/d")

    def test_a_section_may_take_back_the_profile_and_the_chain_of_all(self) -> None:
        found = read_text("[wucme]\nprofile = short\nchain = X1\n[a.example]\nprofile =\nchain =\n"
                          "[server letsencrypt]\nchain = X2", agree="yes")
        wanted, server = found.sections["a.example"].values, wucme.find_server(found, "letsencrypt")[1]
        assert [wanted.profile or server.profile, wanted.chain or server.chain] == ["", "X2"]

    def test_options_stand_over_a_section_of_a_server(self) -> None:
        found = read_text("[server one]\nurl = https://one.test/d\nca_file = /one", ca_file="/option", server="one")
        assert wucme.find_server(found, "one")[1] [:5] == ("https://one.test/d", "/option", "", (), False)

    def test_a_bad_option_is_refused_without_a_line(self) -> None:
        assert refusal("", renew="soon").startswith("the command line: renew = soon: must be auto")

    def test_each_item_of_a_list_is_found_again_in_the_file(self) -> None:
        found = read_text("[wucme]\nload = +nginx\n  $ a\n[a.example]\nload =\n\n # c\n  $ a\n  $ b")
        where = {item: found.source.where(found.lists[item], "load", item) for item in found.lists}
        assert where["+nginx"] == "w.ini:2"
        assert where["$ b"] == "w.ini:9"
        assert where["$ a"] in ("w.ini:3", "w.ini:8")

    def test_an_item_is_told_where_its_own_list_has_it(self) -> None:
        told = read_text("[wucme]\nalert =\n  @/bin/x\nload =\n  @/bin/x\n  @/bin/x")
        assert [told.source.where("wucme", key, "@/bin/x") for key in ("alert", "load")] == ["w.ini:3", "w.ini:5"]

    def test_what_an_option_says_is_told_without_a_line(self) -> None:
        ini = "[wucme]\nload = +nginx\n[a.example]\n"
        assert refusal(ini, server="nowhere").startswith("the command line: server = nowhere: no such CA")
        with pytest.raises(wucme.SettingsError, match=r"^the command line: nginx: "):
            wucme.load_items(read_text(ini, load="nginx"))
        with pytest.raises(wucme.SettingsError, match=r"^the command line: \+nginx: alert takes"):
            wucme.load_items(read_text(ini, alert="+nginx"))

    def test_no_message_shows_a_secret(self) -> None:
        told = refusal("[server letsencrypt]\neab_hmac = s3cret #mine")
        assert told == "w.ini:2: eab_hmac = ...: a comment needs a line of its own"

    @bounded
    @given(lines=st.lists(st.sampled_from(
        ["[wucme]", "[a.example]", "[server x]", "[server ]", "[]", "[", "[a", "names = a.b", "names = ", "load =",
         "  +x", "  key = x", "key = rsa-2048", "renew = 1%", "server = x https://", "url = https://x", "= x", "\0",
         "\ufeff",
         "x", " ", "#", "\x0c", "\x85[wucme]", "listen = :1 ", "host = ²", "backups = " + "9" * 5000, "%(x)s = $"])
        | st.text(max_size=20), max_size=8))
    def test_any_text_is_settings_or_refused(self, lines: list[str]) -> None:
        with contextlib.suppress(wucme.SettingsError):
            assert read_text("\n".join(lines)).run.directory


class TestIniFile:
    @bounded
    @given(data=st.binary(max_size=60) | spoilt(b"[wucme]\nrenew = 30d\nload =\n    +nginx\n    $ a = b\n[a.test]\n"))
    def test_any_file_is_settings_or_refused_with_its_name(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "w.ini").write_bytes(data)
        told = str(tmp_path)
        try:
            wucme.load_items(wucme.read_settings(wucme.read_source(str(tmp_path / "w.ini")), {}))
        except wucme.SettingsError as error:
            told = wucme.sentence(error)
        assert told.startswith(str(tmp_path))

    def test_ten_megabytes_are_no_ini(self, tmp_path: Path) -> None:
        (tmp_path / "w.ini").write_bytes(b"# \n" * (10 << 20))
        with pytest.raises(wucme.SettingsError, match="more than the 1048576 that are read"):
            wucme.read_source(str(tmp_path / "w.ini"))

    @pytest.mark.parametrize(("bits", "user", "fine"), [(0o644, 0, True), (0o646, 0, False), (0o646, 1000, True)])
    def test_an_ini_that_anyone_may_write_is_refused_as_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             bits: int, user: int, fine: bool) -> None:
        path = tmp_path / "w.ini"
        path.write_text("[wucme]\n")
        path.chmod(bits)
        monkeypatch.setattr(os, "geteuid", lambda: user)
        if fine:
            assert wucme.read_source(str(path)).text == "[wucme]\n"
        else:
            with pytest.raises(wucme.SettingsError, match="anyone may write it"):
                wucme.read_source(str(path))

    def test_byte_order_mark_and_crlf_are_accepted(self, tmp_path: Path) -> None:
        path = tmp_path / "w.ini"
        path.write_bytes("\ufeff[wucme]\r\nkey = rsa-2048\r\nload =\r\n  +nginx\r\n  $ é\r\n".encode())
        found = wucme.read_settings(wucme.read_source(str(path)), {})
        assert (found.default.key, found.default.load) == ("rsa-2048", ("+nginx", "$ é"))

    @pytest.mark.parametrize(("content", "reason"), [(b"[wucme]\n# \xff", "not UTF-8 text .* at byte 10"),
                                                     (b"#" * (1 << 21), "more than the 1048576 that are read")],
                             ids=brief)
    def test_what_is_no_text_is_refused(self, tmp_path: Path, content: bytes, reason: str) -> None:
        (tmp_path / "w.ini").write_bytes(content)
        with pytest.raises(wucme.SettingsError, match=rf"^{re.escape(str(tmp_path))}/w\.ini: .*{reason}"):
            wucme.read_source(str(tmp_path / "w.ini"))

    def test_no_ini_at_all_is_fine(self) -> None:
        assert wucme.read_source("") == wucme.Source("", "")

    def test_the_ini_is_looked_for_in_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        named, beside, home = (str(tmp_path / place / "wucme.ini") for place in ("named", "beside", "home/.wucme"))
        system, there = "/etc/wucme/wucme.ini", {named, beside, home, "/etc/wucme/wucme.ini"}
        monkeypatch.setattr(wucme, "__file__", str(tmp_path / "beside" / "wucme.py"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr(os.path, "exists", lambda path: path in there)
        assert wucme.find_ini(named) == named
        for expected in (beside, system, home):
            assert wucme.find_ini("") == expected
            there.remove(expected)
        assert wucme.find_ini("") == ""
        with pytest.raises(wucme.SettingsError, match=r"beside/wucme\.ini: there is no such file"):
            wucme.find_ini(beside)


def kept(path: Path, names: Sequence[str], options: Mapping[str, str]) -> tuple[wucme.Settings, list[str]]:
    """What `issue` works with, and what it says when it has kept the options in the ini."""
    source = wucme.read_source(str(path) if path.exists() else "")
    found, label = wucme.declare(wucme.read_settings(source, options), names, options)
    return found, wucme.keep_options(source, str(path), found.sections[label], options)


@pytest.mark.usefixtures("no_power_cuts")
class TestIssue:
    def test_declare_adds_a_section_named_by_the_first_name(self) -> None:
        found, label = wucme.declare(read_text("", key="rsa-2048"), ["*.B.example", "a.example"], {"key": "rsa-2048"})
        section = found.sections[label]
        assert (label, section.title, sorted(section.own)) == ("_.b.example", "*.b.example", ["key", "names"])
        assert section.values == found.default._replace(names=("*.b.example", "a.example"))

    @pytest.mark.parametrize("names", [["a.example"], ["A.example", "b.example"], ["a.example", "b.example"]])
    def test_declare_leaves_what_the_ini_says(self, names: list[str]) -> None:
        before = read_text("[a.example]\nnames = b.example a.example\nkey = rsa-2048")
        assert wucme.declare(before, names, {}) == (before, "a.example")

    @pytest.mark.parametrize(("names", "reason"), [
        ([], "issue needs the names"), (["a..b"], "'a..b' is neither a host name nor"),
        (["b.example", "c.example"], r"w.ini:2: \[b.example\] says which names its certificate has \(b.example\)"),
        (["account"], "account"), (["account_zerossl"], "account"), (["account_a.example"], "account"),
        (["fe80::1%/../../x"], "neither a host name nor"),
    ])
    def test_declare_refuses(self, names: list[str], reason: str) -> None:
        with pytest.raises(wucme.SettingsError, match=reason):
            wucme.declare(read_text("\n[b.example]"), names, {})

    def test_options_that_differ_are_kept_in_a_new_ini(self, tmp_path: Path) -> None:
        path = tmp_path / "etc" / "w.ini"
        options = {"key": "rsa-2048", "renew": "auto", "load": "+nginx\n$ b", "directory": "/srv/w", "agree": "yes"}
        before, lines = kept(path, ["a.example", "b.example"], options)
        assert path.read_text() == ("[wucme]\ndirectory = /srv/w\n\n[a.example]\nnames = a.example b.example\n"
                                    "key = rsa-2048\nload =\n    +nginx\n    $ b\n")
        assert lines == [f"for renewals, the options were written to {path}"]
        again = wucme.read_settings(wucme.read_source(str(path)), {})
        assert again.sections["a.example"].values == before.sections["a.example"].values
        assert again.run == before.run
        assert mode(path) == 0o644

    def test_options_are_added_to_an_ini_that_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "w.ini"
        path.write_text("[wucme]\nkey = rsa-2048")
        path.chmod(0o600)
        before, lines = kept(path, ["a.example"], {"key": "ecdsa-p256", "renew": "30", "proxy": "p:1"})
        assert path.read_text() == ("[wucme]\nkey = rsa-2048\n\n[a.example]\nnames = a.example\nkey = ecdsa-p256\n"
                                    "renew = 30\n")
        assert lines[0] == f"for renewals, write into {path} yourself: proxy = p:1"
        again = wucme.read_settings(wucme.read_source(str(path)), {})
        assert again.sections["a.example"].values == before.sections["a.example"].values
        assert mode(path) == 0o600

    def test_paths_are_kept_whole_and_blanks_around_a_value_are_not(
            self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path, here = tmp_path / "w.ini", str(tmp_path)
        kept(path, ["a.example"], {"webroot": "www /b/", "nsupdate": "k ns.example", "renew": " 30d ",
                                   "key": "rsa-2048 "})
        assert path.read_text() == (f"[a.example]\nnames = a.example\nwebroot = {here}/www /b\n"
                                    f"nsupdate = {here}/k ns.example\nrenew = 30d\nkey = rsa-2048\n")

    def test_options_for_a_section_that_is_there_are_not_kept_but_said(self, tmp_path: Path) -> None:
        path = tmp_path / "w.ini"
        path.write_text("[a.example]\n")
        assert kept(path, ["a.example"], {"key": "rsa-2048"})[1] == [
            f"[a.example] stands in {path} already; for renewals, change it there"]
        assert path.read_text() == "[a.example]\n"

    @pytest.mark.parametrize("options", [{}, {"key": "ecdsa-p256", "renew": "auto"}, {"agree": "yes"},
                                         {"backups": "3"}])
    def test_options_that_say_the_default_are_not_kept(self, tmp_path: Path, options: dict[str, str]) -> None:
        assert kept(tmp_path / "w.ini", ["a.example"], options)[1] == []
        assert not (tmp_path / "w.ini").exists()

    @settings(bounded, max_examples=25)
    @given(options=st.fixed_dictionaries({}, optional={
        "load": st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9).map("$ {}".format),
                         max_size=3).map("\n".join),
        "key": st.sampled_from(wucme.KEY_KINDS), "renew": st.sampled_from(["30", "25%", "never", "12h"]),
        "listen": st.sampled_from([":8080 [::1]:81", "none"]), "rotate": st.sampled_from(["yes", "no"]),
        "backups": st.sampled_from(["0", "3"]), "proxy": st.sampled_from(["none", "http://a:%25$s@p:1"])}))
    def test_reading_again_gives_the_same_settings(self, tmp_path: Path, options: dict[str, str]) -> None:
        wucme.remove(str(tmp_path / "w.ini"))
        before, lines = kept(tmp_path / "w.ini", ["b.example", "a.example"], options)
        again = wucme.read_settings(wucme.read_source(str(tmp_path / "w.ini") if lines else ""), {})
        again, _ = wucme.declare(again, ["b.example", "a.example"], {})
        assert again.sections["b.example"].values == before.sections["b.example"].values
        assert (again.run, again.other_server) == (before.run, before.other_server)


# --- 6. inventory ------------------------------------------------------------------------------

def put(directory: Path, stem: str, chain: bytes = CHAIN, key: Any = KEY) -> tuple[Path, Path]:
    """Write a pair."""
    paths = directory / f"wucme_c_{stem}.pem", directory / f"wucme_k_{stem}.pem"
    paths[0].write_bytes(chain)
    paths[1].write_bytes(wucme.key_pem(key))
    return paths


def look(directory: Path, stem: str = "x", own: Iterable[str] = (), **wanted: Any) -> wucme.Entry:
    """The entry of a pair, with what its files say."""
    none = wucme.Memory()
    return wucme.look(wucme.Entry(stem, str(directory / f"wucme_c_{stem}.pem"), str(directory / f"wucme_k_{stem}.pem"),
                                  none, none, DEFAULT._replace(**wanted), frozenset(own)))


def sections(text: str) -> dict[str, wucme.Section]:
    """The sections of an ini."""
    return read_text(text).sections


class TestInventory:
    def test_a_pair_is_found_with_its_names_and_its_key(self, tmp_path: Path) -> None:
        put(tmp_path, "x")
        found = wucme.scan(str(tmp_path), DEFAULT, {})
        entry = found.entries["x"]
        assert (found.files, list(found.entries)) == (2, ["x"])
        assert (entry.facts, entry.whole, entry.fault) == (wucme.facts(CHAIN), True, "")
        assert (entry.title, entry.wanted, entry.own) == ("www.example.org", DEFAULT, frozenset())

    def test_the_spelling_of_vms_is_found_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "WUCME_C_A_B.PEM").write_bytes(CHAIN)
        (tmp_path / "WUCME_K_A_B.PEM").write_bytes(wucme.key_pem(KEY))
        entry = wucme.scan(str(tmp_path), DEFAULT, sections("[a.b]\nkey = rsa-2048")).entries["a_b"]
        assert (Path(entry.chain).name, Path(entry.key).name) == ("WUCME_C_A_B.PEM", "WUCME_K_A_B.PEM")
        assert entry.whole
        assert entry.wanted.key == "rsa-2048"

    @pytest.mark.parametrize(("there", "missing"), [("WUCME_C_X.PEM", "WUCME_K_X.PEM"),
                                                    ("wucme_c_x.pem", "wucme_k_x.pem")])
    def test_a_key_that_is_missing_is_expected_in_the_same_spelling(self, tmp_path: Path, there: str,
                                                                    missing: str) -> None:
        (tmp_path / there).write_bytes(CHAIN)
        entry = wucme.scan(str(tmp_path), DEFAULT, {}).entries["x"]
        assert entry.key == str(tmp_path / missing)
        assert (entry.whole, entry.blocked, entry.fault) == (False, False, f"{entry.key}: No such file or directory")

    def test_what_is_declared_and_not_there_is_added(self, tmp_path: Path) -> None:
        put(tmp_path, "b.example")
        found = wucme.scan(str(tmp_path), DEFAULT, sections("[a.example]\n[B.example]\n")).entries
        assert {name for name, entry in found.items() if entry.facts} == {"b.example"}
        assert sorted(found) == ["a.example", "b.example"]
        assert found["a.example"].chain == str(tmp_path / "wucme_c_a.example.pem")
        assert found["a.example"].key == str(tmp_path / "wucme_k_a.example.pem")

    @pytest.mark.parametrize("order", ["[a.b.c]\n[a_b_c]\nnames = d.e\n", "[a_b_c]\nnames = d.e\n[a.b.c]\n"])
    def test_the_exact_title_goes_before_dots_as_underscores(self, tmp_path: Path, order: str) -> None:
        put(tmp_path, "a_b_c")
        found = wucme.scan(str(tmp_path), DEFAULT, sections(order)).entries
        assert sorted(found) == ["a.b.c", "a_b_c"]
        assert (found["a_b_c"].wanted.names, found["a_b_c"].whole) == (("d.e",), True)
        assert found["a.b.c"].facts is None

    def test_no_directory_is_an_empty_one(self, tmp_path: Path) -> None:
        assert wucme.scan(str(tmp_path / "none"), DEFAULT, {}) == wucme.Inventory(0, {})

    def test_files_are_counted_without_directories_and_what_is_our_own(self, tmp_path: Path) -> None:
        put(tmp_path, "x")
        counted = ["wucme_k_account.pem", "wucme_c_x.pem_2026021300200086", "README", ".hidden", "wucme_c_.pem",
                   "wucme_s_x", "wucme.log.1"]
        for name in [*counted, "wucme.log", "wucme.lock", "wucme_s_x.json", "wucme_l_host.json", "wucme_c_x.pem_tmp",
                     "WUCME_K_X.PEM_tmp", "wucme_s_x.json_tmp"]:
            (tmp_path / name).touch()
        (tmp_path / "tokens").mkdir()
        (tmp_path / "link").symlink_to("tokens")
        found = wucme.scan(str(tmp_path), DEFAULT, {})
        assert found.files == 2 + len(counted) + 1
        assert list(found.entries) == ["x"]

    def test_junk_of_every_kind_neither_blocks_nor_raises(self, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
        put(tmp_path, "good")
        os.mkfifo(tmp_path / "wucme_c_fifo.pem")
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("wucme_c_socket.pem")
        (tmp_path / "wucme_c_directory.pem").mkdir()
        (tmp_path / "wucme_c_dangling.pem").symlink_to("nowhere")
        (tmp_path / "wucme_c_loop.pem").symlink_to("wucme_c_loop.pem")
        (tmp_path / "wucme_c_empty.pem").touch()
        (tmp_path / "wucme_c_binary.pem").write_bytes(bytes(range(256)))
        for name in (b"wucme_c_new\nline.pem", b"wucme_c_\xff.pem", b"\xff", b"wucme_c_ .pem"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
        with (tmp_path / "wucme_c_huge.pem").open("wb") as huge:
            huge.truncate(1 << 40)
        (tmp_path / "wucme_s_good.json").symlink_to("/dev/zero")
        os.mkfifo(tmp_path / "wucme_s_fifo.json")
        for number in range(300):
            (tmp_path / f"file {number}").touch()
        start = time.monotonic()
        found = wucme.scan(str(tmp_path), DEFAULT, {})
        assert time.monotonic() - start < 5
        assert found.files == 2 + 2 + 2 + 2 + 4 + 1 + 300
        assert [name for name, entry in found.entries.items() if entry.whole] == ["good"]
        assert {name for name, entry in found.entries.items() if entry.blocked} >= {
            "fifo", "socket", "dangling", "loop", "huge"}
        assert all(entry.fault for name, entry in found.entries.items() if name != "good")

    @pytest.mark.parametrize(("chain", "key", "fault"), [
        (CHAIN, OTHER_KEY, ""), (b"junk", KEY, "wucme_c_x.pem: holds no certificate"),
    ])
    def test_a_pair_that_does_not_fit_is_not_whole(self, tmp_path: Path, chain: bytes, key: Any, fault: str) -> None:
        put(tmp_path, "x", chain, key)
        entry = look(tmp_path)
        assert (entry.whole, entry.blocked) == (False, False)
        assert entry.fault.endswith(fault)
        assert bool(entry.fault) is bool(fault)


@pytest.mark.usefixtures("no_power_cuts")
class TestMemory:
    @bounded
    @given(data=st.binary(max_size=20) | spoilt(json.dumps(wucme.Memory(window=(1.0, 2.0, 1.5))._asdict()).encode()))
    def test_any_bytes_are_a_memory_or_none(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x").write_bytes(data)
        memory = wucme.read_memory(str(tmp_path / "x"))
        wucme.decide(entry(known(90 * DAY, 80 * DAY), memory=memory), NOW)

    def test_what_is_remembered_comes_back(self, tmp_path: Path) -> None:
        put(tmp_path, "x")
        entry = wucme.remember(str(tmp_path), look(tmp_path), order="https://o", names=("a", "b"), problem="p\udcff")
        assert wucme.read_memory(str(tmp_path / "wucme_s_x.json")) == entry.memory
        assert entry.memory.facts == wucme.facts(CHAIN)
        assert mode(tmp_path / "wucme_s_x.json") == 0o600

    def test_nothing_new_is_not_written(self, tmp_path: Path) -> None:
        put(tmp_path, "x")
        entry = wucme.remember(str(tmp_path), look(tmp_path))
        (tmp_path / "wucme_s_x.json").unlink()
        wucme.remember(str(tmp_path), entry)
        assert not (tmp_path / "wucme_s_x.json").exists()

    @pytest.mark.parametrize("changed", ["", "wucme_c_x.pem", "wucme_k_x.pem"])
    def test_files_are_parsed_only_if_they_have_changed(self, tmp_path: Path, changed: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
        put(tmp_path, "x")
        entry = look(tmp_path)
        if changed:
            (tmp_path / changed).write_bytes(b"something else")
        parsed: list[bytes] = []
        monkeypatch.setattr(wucme, "facts", noting(parsed, lambda _: entry.facts))
        monkeypatch.setattr(wucme, "parse_key", noting(parsed, lambda _: KEY))
        again = wucme.look(entry)
        assert parsed == ([b"something else"] if changed else [])
        assert again.whole

    def test_a_memory_of_files_that_are_gone_is_not_believed(self, tmp_path: Path) -> None:
        for path in put(tmp_path, "x"):
            entry = look(tmp_path)
            content = path.read_bytes()
            path.unlink()
            assert not wucme.look(entry).whole
            path.write_bytes(content)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff", b"[" * 100000,
                                      b'{"order": 1}'], ids=brief)
    def test_a_torn_or_foreign_memory_is_empty(self, tmp_path: Path, text: bytes) -> None:
        (tmp_path / "m").write_bytes(text)
        assert wucme.read_memory(str(tmp_path / "m")) == wucme.Memory()

    @bounded
    @given(value=json_values | st.fixed_dictionaries({}, optional={
        **dict.fromkeys(wucme.Memory._fields, json_values), "names": st.lists(json_values, max_size=2),
        "facts": st.tuples(st.lists(json_values, max_size=2), *[st.floats()] * 2, *[st.text(max_size=3)] * 6)}))
    def test_a_memory_has_the_types_it_should_have_or_is_forgotten(self, tmp_path: Path, value: object) -> None:
        (tmp_path / "m").write_text(json.dumps(value))
        found = wucme.read_memory(str(tmp_path / "m"))
        about = found.facts or wucme.facts(CHAIN)
        assert all(isinstance(name, str) for name in (*found.names, *about.names))
        for name, default in wucme.Memory._field_defaults.items():
            assert name == "facts" or isinstance(getattr(found, name), type(default))
        assert [type(one) for one in about[1:]] == [float] * 2 + [str] * 6


# --- 7. plan -----------------------------------------------------------------------------------

def known(lifetime: float, age: float, names: tuple[str, ...] = NAMES, kind: str = "ecdsa-p256") -> wucme.Facts:
    """What a certificate says that has so long to live from its beginning, and began so long ago."""
    return wucme.Facts(names, NOW - age, NOW - age + lifetime, "CN=x", "1", "f", "k", kind, "")


def entry(about: wucme.Facts | None, renew: str = "auto", own: Iterable[str] = (), memory: wucme.Memory | None = None,
          **more: Any) -> wucme.Entry:
    """A certificate that needs no files."""
    places = {name: more.pop(name) for name in ("whole", "fault", "blocked") if name in more}
    remembered = memory or wucme.Memory()
    return wucme.Entry("x", "/d/wucme_c_x.pem", "/d/wucme_k_x.pem", remembered, remembered,
                       DEFAULT._replace(renew=wucme.a_renewal(renew), **more), frozenset(own), about,
                       **{"whole": about is not None, **places})


class TestRarity:
    @pytest.mark.parametrize(("lifetime", "gaps", "told"), [
        (90 * DAY, [DAY, DAY], False), (6 * DAY, [DAY], False), (DAY, [DAY], True), (DAY, [DAY, 300.0], False),
        (6 * DAY, [3 * DAY, 2 * DAY, 4 * DAY], True), (DAY, [], False), (3600.0, [1800.0], True),
        (3600.0, [600.0], False),
    ])
    def test_runs_must_come_at_least_twice_between_the_renewal_point_and_the_end(
            self, lifetime: float, gaps: list[float], told: bool) -> None:
        runs = list(itertools.accumulate([NOW - sum(gaps), *gaps]))
        said = list(wucme.too_rare([entry(known(lifetime, lifetime / 10))], runs))
        assert len(said) == told
        assert all(re.search(r"^www\.example\.org: runs come every [0-9.]+ hours, but .* run at least ", one)
                   for one in said)

    def test_what_is_never_renewed_or_not_there_needs_no_runs(self) -> None:
        assert not list(wucme.too_rare([entry(known(DAY, 0), renew="never"), entry(None)], [0.0, 9 * DAY]))


class TestPlan:
    @pytest.mark.parametrize(("lifetime", "renew", "left"), [
        (90 * DAY, "auto", 30 * DAY), (45 * DAY, "auto", 15 * DAY), (10 * DAY, "auto", 10 * DAY / 3),
        (10 * DAY - 1, "auto", 5 * DAY - 0.5), (6 * DAY, "auto", 3 * DAY), (3600, "auto", 1800),
        (90 * DAY, "30", 30 * DAY), (90 * DAY, "30d", 30 * DAY), (90 * DAY, "12h", DAY / 2),
        (90 * DAY, "10%", 9 * DAY), (3600, "50%", 1800), (6 * DAY, "30d", 30 * DAY), (90 * DAY, "0d", 0),
    ])
    def test_renewal_time(self, lifetime: float, renew: str, left: float) -> None:
        about = known(lifetime, 0)
        assert about.not_after - wucme.renewal_time(about, wucme.a_renewal(renew)) == pytest.approx(left)

    def test_never_is_the_end_of_time(self) -> None:
        assert wucme.renewal_time(known(DAY, 0), wucme.a_renewal("never")) == float("inf")

    @pytest.mark.parametrize(("left", "renew", "line"), [
        (28 * DAY + 82800, "30", "expires: 28 renew: -1"),
        (30 * DAY + 82800, "30", "expires: 30 renew: 0"),
        (30 * DAY - 1, "30", "expires: 29 renew: 0"),
        (60 * DAY, "30", "expires: 60 renew: 30"),
        (-1, "30", "expires: 0 renew: -30"),
        (-DAY, "30", "expires: -1 renew: -31"),
        (28 * DAY, "never", "expires: 28 renew: never"),
    ])
    def test_days_are_whole_and_truncated_toward_zero(self, left: float, renew: str, line: str) -> None:
        decision = wucme.decide(entry(known(90 * DAY, 90 * DAY - left), renew), NOW)
        assert wucme.dates(decision, NOW).endswith(f" GMT {line}")

    def test_the_line_of_dates(self) -> None:
        about = known(90 * DAY - 1, 0)._replace(not_before=1765630332.0, not_after=1773406331.0)
        line = wucme.dates(wucme.decide(entry(about, "30"), NOW), NOW)
        assert line == ("www.example.org !before: Dec 13 12:52:12 2025 GMT !after: Mar 13 12:52:11 2026 GMT "
                        "expires: 28 renew: -1")

    @bounded
    @given(lifetime=st.floats(60, 1e8), age=st.floats(0, 2),
           renew=st.sampled_from(["auto", "30", "1h", "1%", "25%", "99%", "never"]))
    @example(lifetime=60, age=1.5, renew="never")
    def test_the_exact_instant_decides(self, lifetime: float, age: float, renew: str) -> None:
        about = known(lifetime, lifetime * age)
        at = wucme.renewal_time(about, wucme.a_renewal(renew))
        for now in (NOW, at, at - 0.01, at + 0.01):
            decision = wucme.decide(entry(about, renew), now)
            assert decision.due is (now >= at if now < float("inf") else decision.due)
            assert decision.renew_at == at
            assert bool(decision.reason) is decision.due

    REASONS: tuple[tuple[str, dict[str, Any]], ...] = (
        ("forced", {}),
        ("/d/key: not readable", {"whole": False, "fault": "/d/key: not readable"}),
        ("its key does not fit the certificate", {"whole": False}),
        ("its names are now b.example", {"names": ("b.example",), "own": ["names"]}),
        ("its key should be rsa-2048, and is ecdsa-p256", {"key": "rsa-2048", "own": ["key"]}),
        ("expires in 5 days", {"renew": "6"}),
    )

    @pytest.mark.parametrize(("first", "second"), itertools.combinations(REASONS, 2))
    def test_the_first_reason_is_the_one_given(self, first: tuple[str, Any], second: tuple[str, Any]) -> None:
        both = {**second[1], **first[1], "own": [*first[1].get("own", []), *second[1].get("own", [])]}
        found = entry(known(90 * DAY, 84.5 * DAY), **{"renew": "1", **both})
        decision = wucme.decide(found, NOW, forced=first[0] == "forced")
        assert (decision.due, decision.reason) == (True, first[0])

    @pytest.mark.parametrize(("text", "change"), REASONS)
    def test_each_reason_alone(self, text: str, change: dict[str, Any]) -> None:
        found = entry(known(90 * DAY, 84.5 * DAY), **{"renew": "1", **change})
        decision = wucme.decide(found, NOW, forced=text == "forced")
        assert (decision.due, decision.reason) == (True, text)

    @pytest.mark.parametrize("change", [
        {}, {"own": ["names"], "names": ("example.org", "www.example.org")}, {"key": "rsa-2048"},
        {"own": ["key"]}, {"renew": "never"},
        {"own": ["names"], "names": ("example.org",), "memory": wucme.Memory(names=("example.org",))},
    ])
    def test_what_is_as_it_should_be_is_not_due(self, change: dict[str, Any]) -> None:
        assert wucme.decide(entry(known(90 * DAY, 0), **change), NOW)[1:3] == (False, "")

    @pytest.mark.parametrize("when", ["retry_at", "held_until"])
    @pytest.mark.parametrize(("ahead", "held"), [(6 * DAY, True), (8 * DAY, False), (float("inf"), False),
                                                 (float("nan"), False)])
    def test_what_was_written_by_a_wrong_clock_holds_nothing_back(self, when: str, ahead: float, held: bool) -> None:
        memory = wucme.Memory()._replace(**{when: NOW + ahead})     # type: ignore[arg-type]
        found = entry(known(90 * DAY, 89 * DAY), memory=memory)
        assert wucme.decide(found, NOW).held is held

    def test_what_is_declared_and_missing_is_due(self) -> None:
        assert wucme.decide(entry(None, names=("a.example",)), NOW)[1:3] == (True, "declared, and not there yet")
        broken = entry(None, names=("a.example",), fault="/d/x: holds no certificate")
        assert wucme.decide(broken, NOW)[1:3] == (True, "/d/x: holds no certificate")

    @pytest.mark.parametrize("blocked", [
        entry(None, names=("a.example",), fault="/d/x: not a regular file", blocked=True),
        entry(known(DAY, 2 * DAY), whole=False, fault="/d/x: Permission denied", blocked=True),
        entry(None, fault="/d/x: holds no certificate"),
        entry(known(DAY, 2 * DAY, names=()), fault="no names"),
    ])
    def test_what_cannot_be_renewed_is_not_due_even_by_force(self, blocked: wucme.Entry) -> None:
        assert wucme.decide(blocked, NOW, forced=True)[1:3] == (False, blocked.fault)

    @pytest.mark.parametrize("renew", ["auto", "never", "30", "25%"])
    @pytest.mark.parametrize(("start", "end"), [
        (NOW, 253402300799.0), (-62135596800.0, NOW), (NOW, NOW - 5 * DAY),
        (253402300799.0, -62135596800.0), (0.0, 0.0),
    ])
    def test_odd_dates_raise_nothing(self, start: float, end: float, renew: str) -> None:
        decision = wucme.decide(entry(known(1, 0)._replace(not_before=start, not_after=end), renew), NOW)
        assert " !after: " in wucme.dates(decision, NOW)
        found = wucme.certificate_json(decision, [])
        assert [wucme.epoch(found[key]) for key in ("not_before", "not_after")] == [start, end]
        assert wucme.certificate_text(decision, found, NOW)
        wucme.overdue([found], NOW)


# --- 8. challenges -----------------------------------------------------------------------------

WELL_KNOWN = "/.well-known/acme-challenge/"


class TestAnswers:
    @pytest.mark.parametrize("target", [
        "/.well-known/acme-challenge/tok", "/.well-known/acme-challenge/tok?x=/y",
        "/cgi-bin/wucme/.well-known/acme-challenge/tok",
        "http://a.example/.well-known/acme-challenge/tok", "http://a.example:80/p/.well-known/acme-challenge/tok?",
        "//.well-known/acme-challenge/tok", "/.well-known/acme-challenge/x/.well-known/acme-challenge/tok",
    ])
    def test_a_published_token_is_found_and_the_asking_is_noted(self, tmp_path: Path, target: str) -> None:
        answers, asked = wucme.Answers(str(tmp_path)), threading.Event()
        answers.publish("tok", "tok.print", asked)
        assert answers.find(target) == "tok.print"
        assert asked.is_set()

    @pytest.mark.parametrize("target", [
        "", "/", "*", "tok", "/tok", "?/.well-known/acme-challenge/tok", "/.well-known/acme-challenge/",
        "/.well-known/acme-challenge", "/.well-known/acme-challenge/tok2", "/.well-known/acme-challenge/to",
        "/.well-known/acme-challenge/TOK", "/.well-known/acme-challenge/tok/", "/.well-known/acme-challenge/tok%20",
        "/.well-known/acme-challenge/../acme-challenge/tok", "/.well-known/acme-challenge/%74ok",
        "/.well-known/acme-challenge/../../wucme_k_account.pem", "/.well-known/acme-challenge//tok",
        "/x.well-known/acme-challenge/tok", "/.well-known/ACME-challenge/tok", "/.well-known/acme-challenge/tok#x",
    ])
    def test_anything_else_is_not(self, tmp_path: Path, target: str) -> None:
        answers, asked = wucme.Answers(str(tmp_path)), threading.Event()
        answers.publish("tok", "tok.print", asked)
        assert answers.find(target) is None
        assert not asked.is_set()

    def test_a_token_is_in_a_file_that_all_may_read_while_it_is_published(self, tmp_path: Path) -> None:
        before = os.umask(0o077)
        answers = wucme.Answers(str(tmp_path))
        answers.publish("tok", "tok.print", threading.Event())
        os.umask(before)
        token = tmp_path / "tokens" / "tok"
        assert (token.read_text(), mode(token), mode(token.parent)) == ("tok.print", 0o644, 0o755)
        for _ in range(2):
            answers.withdraw("tok")
        assert not token.exists()
        assert answers.find(f"{WELL_KNOWN}tok") is None


class TestResponder:
    """The script as a CGI responder."""

    @pytest.fixture
    def tokens(self, tmp_path: Path) -> Path:
        """A directory with a published token, a key, and an ini that names it."""
        (tmp_path / "tokens").mkdir()
        (tmp_path / "tokens" / "tok").write_text("tok.print")
        (tmp_path / "tokens" / "empty").write_text("")
        (tmp_path / "wucme_k_account.pem").write_text("a key")
        (tmp_path / "w.ini").write_text(f"[wucme]\ndirectory = {tmp_path}\nnonsense = 1\n")
        return tmp_path

    def ask(self, path: str, **environ: str) -> tuple[str, bytes]:
        """Status and body for a request."""
        found = wucme.respond({"REQUEST_METHOD": "GET", "SCRIPT_NAME": "/cgi-bin/wucme", "PATH_INFO": path, **environ})
        head, _, body = found.partition(b"\r\n\r\n")
        lines = dict(line.split(": ") for line in head.decode().split("\r\n"))
        assert sorted(lines) == ["Content-Length", "Content-Type", "Status"]
        assert environ.get("REQUEST_METHOD") == "HEAD" or int(lines["Content-Length"]) == len(body)
        return lines["Status"], body

    @pytest.mark.parametrize(("script", "path"), [
        ("/cgi-bin/wucme", "/.well-known/acme-challenge/tok"), ("/.well-known/acme-challenge", "/tok"),
        ("", "/.well-known/acme-challenge/tok"), ("/.well-known/acme-challenge/tok", ""),
    ])
    def test_a_published_token_is_answered(self, tokens: Path, script: str, path: str) -> None:
        assert self.ask(path, WUCME_DIRECTORY=str(tokens), SCRIPT_NAME=script) == ("200 OK", b"tok.print")
        assert self.ask(path, WUCME_DIRECTORY=str(tokens), SCRIPT_NAME=script, REQUEST_METHOD="HEAD") == ("200 OK", b"")

    @pytest.mark.parametrize("path", [
        "", "/", "/tok", "/.well-known/acme-challenge/", "/.well-known/acme-challenge/../wucme_k_account.pem",
        "/.well-known/acme-challenge/tok/", "/.well-known/acme-challenge/TOK", "/.well-known/acme-challenge/empty",
        "/.well-known/acme-challenge/" + "x" * 256, "/.well-known/acme-challenge/tok\0",
        "/.well-known/acme-challenge/.", "/.well-known/acme-challenge/tok\n",
    ])
    def test_all_else_is_not_found(self, tokens: Path, path: str) -> None:
        assert self.ask(path, WUCME_DIRECTORY=str(tokens)) == ("404 Not Found", b"")

    def test_only_get_and_head(self, tokens: Path) -> None:
        for method in ("POST", "PUT", "DELETE", "get", ""):
            found = self.ask(f"{WELL_KNOWN}tok", WUCME_DIRECTORY=str(tokens), REQUEST_METHOD=method)
            assert found == ("404 Not Found", b"")

    def test_the_ini_names_the_directory_and_where_there_is_none_the_environment(self, tokens: Path) -> None:
        ini = str(tokens / "w.ini")
        assert self.ask(f"{WELL_KNOWN}tok", WUCME_INI=ini, WUCME_DIRECTORY="/nowhere")[0] == "200 OK"
        assert self.ask(f"{WELL_KNOWN}tok", WUCME_INI="/nowhere", WUCME_DIRECTORY=str(tokens))[0] == "200 OK"
        (tokens / "w.ini").write_text("no ini at all")
        assert self.ask(f"{WELL_KNOWN}tok", WUCME_INI=ini, WUCME_DIRECTORY=str(tokens))[0] == "200 OK"

    @pytest.mark.parametrize("arguments", [(), ("issue", "a.example.test"), ("--help",), ("-s", "%s")])
    def test_arguments_are_nothing_to_it(self, tokens: Path, arguments: tuple[str, ...]) -> None:
        before = snapshot(tokens)
        done = subprocess.run(
            [sys.executable, "-I", "-S", COMPILED, *arguments], capture_output=True, check=True,
            env={"GATEWAY_INTERFACE": "CGI/1.1", "WUCME_DIRECTORY": str(tokens), "REQUEST_METHOD": "GET",
                 "PATH_INFO": f"{WELL_KNOWN}tok", "WUCME_INI": "/nowhere"})
        assert done.stdout.startswith(b"Status: 200 OK\r\n")
        assert done.stdout.endswith(b"\r\n\r\ntok.print")
        assert snapshot(tokens) == before


def place(host: str, port: int, kind: str = "http-01") -> wucme.Place:
    """Where to listen."""
    return wucme.Place(kind, host, port)


HTTP, DNS, TLS, PERSIST = wucme.CHALLENGE_TYPES
UACME = wucme.Hook("uacme", ("/h",), ("/h",))
LEGO = wucme.Hook("lego", ("/h",), ("/h",))
NSUPDATE = wucme.Updates("/k", ("", 53), "")


def wanted(**changes: Any) -> wucme.CertificateScope:
    """The default settings of a certificate, but for some."""
    return DEFAULT._replace(**changes)


class TestWays:
    @pytest.mark.parametrize(("changes", "kind", "ways"), [
        ({}, HTTP, ("listen",)), ({}, TLS, ("listen_tls",)), ({}, DNS, ()), ({}, PERSIST, ("record",)),
        ({"listen": ()}, HTTP, ()), ({"listen": (("", 81),)}, HTTP, ("listen",)),
        ({"listen_tls": ()}, TLS, ()),
        ({"webroot": ("/w",)}, HTTP, ("webroot",)), ({"stateless": True}, HTTP, ("stateless",)),
        ({"webroot": ("/w",), "listen": (("", 81),)}, HTTP, ("listen", "webroot")),
        ({"hook": UACME}, HTTP, ("hook",)), ({"hook": UACME}, TLS, ("hook",)), ({"hook": UACME}, DNS, ("hook",)),
        ({"hook": UACME, "listen": ()}, HTTP, ("hook",)), ({"hook": UACME, "webroot": ("/w",)}, HTTP, ("webroot",)),
        ({"hook": LEGO}, HTTP, ("listen",)), ({"hook": LEGO}, DNS, ("hook",)), ({"hook": LEGO}, PERSIST, ("record",)),
        ({"nsupdate": NSUPDATE}, DNS, ("nsupdate",)), ({"nsupdate": NSUPDATE, "hook": LEGO}, DNS, ("nsupdate",)),
    ])
    def test_what_is_set_answers_else_a_hook_else_a_listener(
            self, changes: dict[str, Any], kind: str, ways: tuple[str, ...]) -> None:
        assert wucme.ways(wanted(**changes), kind) == (("tokens", *ways) if kind == HTTP else ways)

    @pytest.mark.parametrize(("changes", "kind", "places"), [
        ({}, HTTP, [place("", 80)]), ({}, TLS, [place("", 443, TLS)]), ({}, DNS, []), ({"webroot": ("/w",)}, HTTP, []),
        ({"listen": (("::1", 81), ("", 82))}, HTTP, [place("::1", 81), place("", 82)]), ({"listen": ()}, HTTP, []),
    ])
    def test_where_to_listen(self, changes: dict[str, Any], kind: str, places: list[wucme.Place]) -> None:
        assert wucme.places(wanted(**changes), kind) == places

    @pytest.mark.parametrize(("kind", "names"), [
        (HTTP, ("a.example", "192.0.2.1", "2001:db8::1")), (TLS, ("a.example", "192.0.2.1", "2001:db8::1")),
        (DNS, ("a.example", "*.a.example")), (PERSIST, ("a.example", "*.a.example")),
    ])
    def test_what_each_type_can_prove(self, kind: str, names: tuple[str, ...]) -> None:
        every = ("a.example", "*.a.example", "192.0.2.1", "2001:db8::1")
        assert tuple(name for name in every if wucme.proves(kind, name)) == names

    @pytest.mark.parametrize(("changes", "names", "kinds"), [
        ({"challenge": (HTTP, DNS), "nsupdate": NSUPDATE}, ["a.example", "*.a.example"], (HTTP, DNS)),
        ({"challenge": (DNS, HTTP)}, ["a.example"], (HTTP,)),
        ({"challenge": (TLS, HTTP)}, ["a.example", "::1"], (HTTP,)),
        ({"challenge": (PERSIST,)}, ["*.a.example"], (PERSIST,)),
    ])
    def test_the_types_that_can_be_answered_here_in_the_order_of_preference(
            self, changes: dict[str, Any], names: list[str], kinds: tuple[str, ...], log: wucme.Log) -> None:
        assert wucme.prospects(wanted(**changes), names, {place("", 443, TLS): "in use"}) == kinds
        assert all(kind in "".join(log.held) for kind in changes["challenge"] if kind not in kinds)

    @pytest.mark.parametrize(("changes", "names", "told"), [
        ({}, ["a.example", "*.a.example"], r"^\*\.a\.example: http-01 cannot prove it; set challenge = dns-01 or "),
        ({"challenge": (DNS,)}, ["192.0.2.1"], r"^192\.0\.2\.1: dns-01 cannot prove it; set challenge = http-01 or "),
        ({"challenge": (DNS,)}, ["a.example"], "^nothing answers dns-01 here: set nsupdate or hook$"),
        ({"challenge": (TLS,), "listen_tls": ()}, ["a.example"], "^nothing answers tls-alpn-01 here: set listen_tls"),
        ({"challenge": (TLS, DNS)}, ["a.example"], "^in use; nothing answers dns-01 here"),
        ({"challenge": (HTTP, DNS), "listen": (("", 80),)}, ["*.a.example"], "^nothing answers dns-01 here"),
    ])
    def test_a_name_that_nothing_here_can_prove_is_refused_with_the_remedy(
            self, changes: dict[str, Any], names: list[str], told: str) -> None:
        with pytest.raises(wucme.ChallengeError, match=told):
            wucme.prospects(wanted(**changes), names, {place("", 443, TLS): "in use"})

    RECORD = "ca.example; accounturi=https://ca.example/a/1"

    @pytest.mark.parametrize(("found", "wanted", "fits"), [
        (RECORD, RECORD, True), (f" CA.Example ;AccountURI = {RECORD[23:]} ", RECORD, True),
        (f"{RECORD}; policy=wildcard", RECORD, True), (RECORD, f"{RECORD}; policy=wildcard", False),
        (f"{RECORD}; policy=Wildcard", f"{RECORD}; policy=wildcard", True),
        (f"{RECORD}; persistUntil={int(NOW) + 9}", RECORD, True), (f"{RECORD}; persistUntil={int(NOW)}", RECORD, False),
        (f"{RECORD}; persistUntil=soon", RECORD, False), (f"{RECORD}2", RECORD, False),
        (f"{RECORD}; {RECORD[12:]}", RECORD, False), (f"x{RECORD}", RECORD, False), ("", RECORD, False),
        (f"{RECORD}; more=1", RECORD, False), ("v=spf1 -all", RECORD, False),
    ])
    def test_a_lasting_record_must_say_what_the_ca_wants(self, found: str, wanted: str, fits: bool) -> None:
        assert wucme.record_fits(found, wanted, NOW) is fits

    @bounded
    @given(st.text(), st.text())
    def test_any_text_may_stand_in_the_dns(self, found: str, wanted: str) -> None:
        assert wucme.record_fits(found, wanted, NOW) in (True, False)

    @pytest.mark.parametrize(("lines", "texts"), [
        (['"a b" "c"', '"\\"q\\" \\; \\\\"'], ["a bc", '"q" ; \\']), (["alias.example.", ""], ["", ""]),
    ])
    def test_the_strings_of_a_record_are_joined(self, lines: list[str], texts: list[str], tmp_path: Path) -> None:
        world = wucme.REAL._replace(command=lambda *_: wucme.Finished("", lines))
        task = wucme.Task(["a"], wanted(), [], 0.0, wucme.Answers(str(tmp_path)), world, threading.Event())
        assert wucme.record_texts(task, "a") == texts

    @staticmethod
    def task(tmp_path: Path, answers: Mapping[str, list[str]], **changes: Any) -> tuple[wucme.Task, list[str]]:
        """A task in a world in which dig answers so, and the questions that it was asked."""
        asked: list[str] = []

        def dig(argv: Sequence[str], *_: object, **__: object) -> wucme.Finished:
            asked.append(" ".join(word for word in argv[1:] if not word.startswith("+")))
            found = answers.get(asked[-1], [])
            return wucme.Finished(*(("exit status 9", [])) if found == ["!"] else ("", found))

        world = wucme.REAL._replace(command=dig)
        return wucme.Task(["a.example"], wanted(**changes), (), 0.0, wucme.Answers(str(tmp_path)), world,
                          threading.Event(), "a.example"), asked

    def test_an_alias_has_no_name_servers_of_its_own(self, tmp_path: Path) -> None:
        task, _ = self.task(tmp_path, {"-t CNAME -q www.a.example.": ["cloud.example."],
                                       "-t NS -q www.a.example.": ["cloud.example."],
                                       "-t NS -q a.example.": ["ns1.example.", "ns2.example."]})
        assert wucme.name_servers(task, "_acme-challenge.www.a.example.") == [["@ns1.example"], ["@ns2.example"]]

    def test_an_alias_that_the_updated_server_does_not_know_is_asked_of_the_dns(self, tmp_path: Path) -> None:
        task, asked = self.task(tmp_path, {"-t CNAME -q _acme-challenge.a.example.": ["x.other.example."],
                                           "-t CNAME -q x.other.example.": ["!"]},
                                nsupdate=wucme.Updates("/k", ("ns", 53), ""))
        assert wucme.record_name(task, "a.example") == "x.other.example."
        assert asked[0] == "@ns -p 53 -t CNAME -q _acme-challenge.a.example."

    @pytest.mark.parametrize("target", ["-f.", r"a\032b.", "x;y.", "a.b\nsend."])
    def test_an_alias_must_lead_to_a_host_name(self, target: str, tmp_path: Path) -> None:
        task, _ = self.task(tmp_path, {"-t CNAME -q _acme-challenge.a.example.": [target]})
        with pytest.raises(wucme.ChallengeError, match="which is no host name"):
            wucme.record_name(task, "a.example")

    def test_what_cannot_be_undone_stays_noted_and_stops_nothing_else(self, tmp_path: Path, log: wucme.Log) -> None:
        task, _ = self.task(tmp_path, {}, nsupdate=NSUPDATE)
        journal = wucme.Journal(task)
        proofs = [wucme.Proof(DNS, name, "t", "x") for name in ("a.example", "b.example")]
        (tmp_path / "file").touch()
        journal.add("webroot", proofs[1], str(tmp_path / "file"))
        journal.add("nsupdate", proofs[0], "_acme-challenge.a.example.")
        journal.add("hook", proofs[0])
        wucme.undo_all(journal, task, "done")
        assert not (tmp_path / "file").exists()
        assert [row.way for row in journal.rows] == ["hook"]
        assert "no hook for it is set any more" in "".join(log.held)
        path = tmp_path / "tokens" / ".a.example"
        assert mode(path) == 0o600
        again = wucme.Journal(task)     # of a next try
        again.add("webroot", proofs[1], str(tmp_path / "file"))
        wucme.undo_all(again, task, "failed")
        assert again.rows == journal.rows
        lines = list(wucme.undo_left(task, str(path)))
        assert len(lines) == 1
        assert "hook of a.example, left by a run that was stopped, cannot be undone" in lines[0]
        assert not path.exists()

    @bounded
    @given(found=deep_values)
    def test_any_journal_is_one_or_nothing(self, found: Any, tmp_path: Path) -> None:
        task, _ = self.task(tmp_path, {})
        (tmp_path / "x").write_text(json.dumps({"rows": found}))
        assert len(list(wucme.undo_left(task, str(tmp_path / "x")))) <= 9

    def test_on_a_signal_what_was_published_is_left_to_the_next_run(self, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
        task, _ = self.task(tmp_path, {})
        monkeypatch.setattr(wucme, "ending", wucme.Ending())
        journal = wucme.Journal(task)
        journal.add("webroot", wucme.Proof(HTTP, "a.example", "t", "x"), str(tmp_path / "file"))
        (tmp_path / "file").touch()
        wucme.ending.number = signal.SIGTERM
        wucme.undo_all(journal, task, "failed")
        assert (tmp_path / "file").exists()
        assert len(list(wucme.undo_left(task, journal.path))) == 1
        assert not (tmp_path / "file").exists()

    @pytest.mark.parametrize("name", ["a.example", "192.0.2.1", "2001:db8::1"])
    def test_the_certificate_of_tls_alpn_has_the_name_and_the_digest_and_nothing_else(self, name: str) -> None:
        pem = wucme.challenge_certificate(name, b"d" * 32)
        found = x509.load_pem_x509_certificate(wucme.certificates(pem)[0])
        assert wucme.facts(pem).names == (name,)
        proof = found.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"))
        assert (proof.critical, len(found.extensions)) == (True, 2)
        assert proof.value == x509.UnrecognizedExtension(proof.oid, b"\x04\x20" + b"d" * 32)
        assert wucme.key_of(pem) == wucme.facts(pem).key


def request(*names: str, key: Any = KEY) -> bytes:
    """A certificate signing request (PEM) for names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    wanted: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False) if names else builder
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def private_jwk(key: Any) -> dict[str, str]:
    """A private key as certbot writes it."""
    numbers = key.private_numbers()
    secret = {"d": numbers.private_value} if isinstance(key, ec.EllipticCurvePrivateKey) else {
        "d": numbers.d, "p": numbers.p, "q": numbers.q, "dp": numbers.dmp1, "dq": numbers.dmq1, "qi": numbers.iqmp}
    return {**wucme.json_web_key(key), **{
        name: wucme.base64url(value.to_bytes((value.bit_length() + 7) // 8, "big")) for name, value in secret.items()}}


class TestJwk:
    @pytest.mark.parametrize("text", ["a$bc", "ab\u00e9c", "abc=d", "a", "ab.c"])
    def test_what_is_no_base64_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"."):
            wucme.from_base64url(text)
        assert wucme.from_base64url("_-/ +\n8A==") == wucme.from_base64url("/+/+8A")

    @pytest.mark.parametrize("key", [KEY, rsa_key(), ec.generate_private_key(ec.SECP384R1())])
    def test_a_key_as_certbot_keeps_it(self, key: Any) -> None:
        assert wucme.key_pem(wucme.jwk_key(json.dumps(private_jwk(key)).encode())) == wucme.key_pem(key)

    @pytest.mark.parametrize("text", [b"{", b"{}", b"[]", b'{"kty": "EC", "crv": "P-256"}', b'{"kty": "RSA"}',
                                      json.dumps({**private_jwk(KEY), "crv": "X"}).encode(), b'{"kty": 7, "d": 7}'])
    def test_what_is_no_key_is_refused(self, text: bytes) -> None:
        with pytest.raises(wucme.PemError, match="neither a PEM private key nor a whole JWK"):
            wucme.jwk_key(text)


class TestRequests:
    def test_what_a_request_says(self) -> None:
        der, names, key = wucme.request_facts(request("b.example", "a.example"))
        assert x509.load_der_x509_csr(der).is_signature_valid
        assert (names, key) == (("b.example", "a.example"), KEY_HASH)
        assert wucme.request_facts(request())[1] == ()
        assert wucme.key_of(request("a.example")) == KEY_HASH == wucme.key_of(wucme.key_pem(KEY))

    @pytest.mark.parametrize("others", [(), ("b.example",), ("a.example", "b.example")])
    def test_its_common_name_is_one_of_its_names(self, others: tuple[str, ...]) -> None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A.example")])
        made = x509.CertificateSigningRequestBuilder().subject_name(subject)
        if others:
            names = x509.SubjectAlternativeName([x509.DNSName(name) for name in others])
            made = made.add_extension(names, critical=False)
        pem = made.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        assert set(wucme.request_facts(pem)[1]) == {"a.example", *others}

    @pytest.mark.parametrize("pem", [b"", b"x", wucme.key_pem(KEY), request("a.example").replace(b"M", b"N", 40),
                                     request("a.example")[:-40]], ids=brief)
    def test_what_is_no_request_is_refused_in_one_line(self, pem: bytes) -> None:
        with pytest.raises(wucme.PemError, match=r"^not a certificate signing request: .*$"):
            wucme.request_facts(pem)


class Fronts(NamedTuple):
    """A listener with a token published."""
    host: str
    port: int
    asked: threading.Event

    def connect(self) -> socket.socket:
        """A connection to it."""
        return socket.create_connection((self.host, self.port), 5)

    def say(self, data: bytes) -> bytes:
        """All that comes back for these bytes, to the end."""
        with self.connect() as peer, contextlib.suppress(ConnectionError):
            peer.sendall(data)
            return b"".join(iter(lambda: peer.recv(4096), b""))
        return b""




@pytest.fixture
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fronts]:
    """A listener on loopback, at an address that the test may choose."""
    answers, asked = wucme.Answers(str(tmp_path)), threading.Event()
    answers.publish("tok", "tok.print", asked)
    host = getattr(request, "param", LOOPBACKS[0])
    listener = wucme.Listener(place(host, 0), answers)
    yield Fronts(host, listener.servers[0].server_address[1], asked)
    listener.close()


GET = b"GET /.well-known/acme-challenge/tok HTTP/1.1\r\nHost: a\r\n\r\n"


class TestListener:
    @pytest.mark.parametrize("front", LOOPBACKS, indirect=True)
    def test_get(self, front: Fronts) -> None:
        start, _, body = front.say(GET).partition(b"\r\n\r\n")
        assert start.split(b"\r\n") == [b"HTTP/1.0 200 OK", b"Content-Type: application/octet-stream",
                                        b"Content-Length: 9"]
        assert body == b"tok.print"
        assert front.asked.is_set()

    def test_head(self, front: Fronts) -> None:
        assert front.say(GET.replace(b"GET", b"HEAD")) == front.say(GET)[:-9]

    @pytest.mark.parametrize(("request_line", "answer_line"), [
        (b"GET /.well-known/acme-challenge/other HTTP/1.1", b"HTTP/1.0 404 Not Found"),
        (b"GET / HTTP/1.0", b"HTTP/1.0 404 Not Found"),
        (b"GET http://b.example/x/.well-known/acme-challenge/tok HTTP/1.1", b"HTTP/1.0 200 OK"),
        (b"POST /.well-known/acme-challenge/tok HTTP/1.1", b"HTTP/1.0 501 Unsupported method ('POST')"),
    ])
    def test_what_is_answered(self, front: Fronts, request_line: bytes, answer_line: bytes) -> None:
        assert front.say(request_line + b"\r\n\r\n").split(b"\r\n")[0] == answer_line

    @pytest.mark.parametrize("data", [
        GET.replace(b"1.1", b"9.9"), GET.replace(b"/tok", b"/" + b"x" * 9000), GET.replace(b"tok", b"tok" * 3000),
        b"junk\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", b"GET\r\n\r\n", b"\r\n\r\n",
    ], ids=brief)
    def test_what_is_no_request_ends_the_connection_and_nothing_else(self, front: Fronts, data: bytes) -> None:
        start = time.monotonic()
        assert b"tok.print" not in front.say(data)
        assert time.monotonic() - start < 5
        assert b"tok.print" in front.say(GET)

    @bounded
    @given(data=st.binary(max_size=80) | spoilt(GET))
    def test_no_bytes_upset_the_listener(self, front: Fronts, data: bytes) -> None:
        with front.connect() as peer, contextlib.suppress(OSError):
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: peer.recv(4096), b""))
            assert b"tok.print" not in said or b"/.well-known/acme-challenge/tok" in data
        assert front.say(GET).endswith(b"tok.print")

    def test_http_without_a_version_gets_the_bare_answer(self, front: Fronts) -> None:
        assert front.say(b"GET /.well-known/acme-challenge/tok\r\n\r\n") == b"tok.print"

    def test_one_request_a_connection(self, front: Fronts) -> None:
        assert front.say(GET + GET).count(b"tok.print") == 1

    @pytest.mark.parametrize("more", [b"X: " + b"x" * 9000, b"X: x\r\n" * 2000, b"x" * 9000], ids=brief)
    def test_nobody_is_listened_to_for_more_than_8_kb(self, front: Fronts, more: bytes) -> None:
        start = time.monotonic()
        front.say(GET[:-2] + more)
        assert time.monotonic() - start < 5

    def test_hundreds_of_silent_connections_keep_nobody_out(self, front: Fronts) -> None:
        with contextlib.ExitStack() as stack:
            silent = []
            for number in range(wucme.OPEN_CONNECTIONS + 44):
                silent.append(stack.enter_context(front.connect()))
                start = time.monotonic()
                if number % 60 == 59:
                    assert front.say(GET).endswith(b"tok.print")
                    assert time.monotonic() - start < 3
            assert select.select([silent[0], silent[-1]], [], [], 0)[0] == [silent[0]]
            assert silent[0].recv(1) == b""

    def test_a_connection_has_so_many_seconds_in_all(self, front: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wucme, "CONNECTION_SECONDS", 0.1)
        start = time.monotonic()
        with front.connect() as peer, contextlib.suppress(ConnectionError):
            while not select.select([peer], [], [], 0.02)[0] and time.monotonic() - start < 2:
                peer.sendall(b"G")
        assert 0.08 < time.monotonic() - start < 2

    def test_closing_ends_it_all_at_once(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        listener = wucme.Listener(place("127.0.0.1", 0), wucme.Answers(str(tmp_path)))
        port = listener.servers[0].server_address[1]
        listener.close()
        wait_until(lambda: set(threading.enumerate()) <= before, 5)
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
            pass

    def test_no_host_is_every_address(self, tmp_path: Path) -> None:
        answers, asked = wucme.Answers(str(tmp_path)), threading.Event()
        answers.publish("tok", "tok.print", asked)
        for port in range(10000 + os.getpid() % 10000, 32000):      # below those of outgoing connections
            with contextlib.suppress(wucme.ChallengeError):
                listener = wucme.Listener(place("", port), answers)
                break
        found = [Fronts(address, port, asked).say(GET)[-9:] for address in LOOPBACKS]
        listener.close()
        assert found == [b"tok.print"] * len(LOOPBACKS)

    def test_a_busy_port_names_its_holder_and_others_are_opened(self, tmp_path: Path, log: wucme.Log) -> None:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            address = place("127.0.0.1", busy.getsockname()[1])
            wanted = [address, place("127.0.0.1", 0), address]
            found, refused = wucme.open_listeners(wanted, wucme.Answers(str(tmp_path)))
        assert len(found) == 1
        found[0].close()
        assert list(refused) == [address]
        assert refused[address].startswith(f"cannot listen on 127.0.0.1:{address.port}: in use by ")
        assert f"(pid {os.getpid()}); listen on another port" in refused[address]

    @pytest.mark.parametrize(("number", "reason"), [(13, "not permitted; run as root"), (99, "Cannot assign")])
    def test_why_not(self, number: int, reason: str) -> None:
        told = wucme.listen_reason("h", 80, OSError(number, "Cannot assign requested address"))
        assert told.startswith(f"cannot listen on h:80: {reason}")

    def test_a_host_without_ipv6_says_so_and_listens_on_ipv4(
            self, tmp_path: Path, log: wucme.Log, monkeypatch: pytest.MonkeyPatch) -> None:
        real = wucme.listener_class("http-01")

        def no_six(family: int, *arguments: Any) -> Any:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            return real(family, *arguments)

        monkeypatch.setattr(wucme, "listener_class", lambda _: no_six)
        listener = wucme.Listener(place("", 0), wucme.Answers(str(tmp_path)))
        families = [one.address_family for one in listener.servers]
        listener.close()
        assert families == [socket.AF_INET]
        assert "no IPv6 on port 0: Address family not supported by protocol; listening on IPv4 alone" in log.held[0]

    def test_an_address_that_is_not_ours_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(wucme.ChallengeError, match=r"cannot listen on 192\.0\.2\.1:1: "):
            wucme.Listener(place("192.0.2.1", 1), wucme.Answers(str(tmp_path)))


# --- 9. acme -----------------------------------------------------------------------------------

class PublicOnly(NamedTuple):
    """A key of which only the public half is known."""
    public: Any
    key_size: int

    def public_key(self) -> Any:
        """That half."""
        return self.public


def number(text: str) -> int:
    """A base64url number."""
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")


RFC_7638 = PublicOnly(rsa.RSAPublicNumbers(number("AQAB"), number(
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjh"
    "Mstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5"
    "hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
)).public_key(), 2048)
RFC_9449 = PublicOnly(ec.EllipticCurvePublicNumbers(
    number("l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs"), number("9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA"),
    ec.SECP256R1()).public_key(), 256)


def decoded(text: str) -> bytes:
    """What a base64url text without padding holds."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def response(status: int = 200, body: bytes = b"", **headers: str) -> wucme.Response:
    """An answer of a CA."""
    found = http.client.HTTPMessage()
    for name, value in headers.items():
        found[name.replace("_", "-")] = value
    return wucme.Response(status, found, body)


class TestAcme:
    @pytest.mark.parametrize(("key", "expected"), [
        (RFC_7638, "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"),
        (RFC_9449, "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"),
    ])
    def test_thumbprints_of_the_rfcs(self, key: Any, expected: str) -> None:
        assert wucme.thumbprint(key) == expected

    @pytest.mark.parametrize(("secret", "short"), [(379, "x"), (43, "y")])
    def test_a_coordinate_with_leading_zeros_has_its_full_length(self, secret: int, short: str) -> None:
        member = wucme.json_web_key(ec.derive_private_key(secret, ec.SECP256R1()))[short]
        assert (len(decoded(member)), decoded(member)[0]) == (32, 0)

    @pytest.mark.parametrize(("data", "text"), [(b"", ""), (b"\xfb\xff", "-_8"), (b"abc", "YWJj"), (b"a", "YQ")])
    def test_base64url(self, data: bytes, text: str) -> None:
        assert wucme.base64url(data) == text

    @pytest.mark.parametrize("payload", [None, {}, {"a": ["é", 1]}])
    @pytest.mark.parametrize(("key", "algorithm"), [
        (KEY, "ES256"), (ec.generate_private_key(ec.SECP384R1()), "ES384"), (rsa_key(), "RS256")])
    def test_what_is_signed_verifies(self, key: Any, algorithm: str, payload: dict[str, Any] | None) -> None:
        found = json.loads(wucme.signed(key, {"nonce": "n", "url": "https://ca.test/x"}, payload))
        assert set(found) == {"protected", "payload", "signature"}
        assert json.loads(decoded(found["protected"])) == {"alg": algorithm, "nonce": "n", "url": "https://ca.test/x"}
        assert (json.loads(decoded(found["payload"])) if found["payload"] else None) == payload
        data, signature = f"{found['protected']}.{found['payload']}".encode(), decoded(found["signature"])
        if algorithm == "RS256":
            key.public_key().verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            return
        size = len(signature) // 2
        assert size == key.key_size // 8
        r, s = (int.from_bytes(part, "big") for part in (signature[:size], signature[size:]))
        digest = hashes.SHA256() if algorithm == "ES256" else hashes.SHA384()
        key.public_key().verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(digest))

    @pytest.mark.parametrize(("value", "seconds"), [
        ("", 0), ("0", 0), ("120", 120), (" 7 ", 7), ("-5", 0), ("1.5", 0), ("soon", 0), ("²", 0), ("9" * 30, 7 * DAY),
        (email.utils.formatdate(NOW + 90, usegmt=True), 90), (email.utils.formatdate(NOW - 90, usegmt=True), 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 7 * DAY), ("Fri, 31 Dec 99999 23:59:59 GMT", 0),
        ("Fri, 99 Foo 2026 25:61:61 GMT", 0), ("Fri, 99 Jan 2027 00:00:00 GMT", 0),
        (f"Fri, 01 Jan 2027 {'9' * 400}:00:00 GMT", 0), ("Sat, 31 Feb 2026 00:00:00 GMT", 0),
        (time.asctime(time.gmtime(NOW + 90)), 90),
        (time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(NOW + 90)), 90),
    ])
    def test_how_long_to_wait(self, value: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "XYZ+5")
            time.tzset()
            assert wucme.asked_wait(response(Retry_After=value), NOW) == seconds
        time.tzset()
        assert wucme.asked_wait(response(), NOW) == 0

    @bounded
    @given(value=st.text(st.characters(max_codepoint=255), max_size=30) | st.from_regex(r"\A[A-Z, 0-9:+-]{0,30}\Z"))
    def test_no_answer_upsets_the_waiting(self, value: str) -> None:
        assert wucme.asked_wait(response(Retry_After=value.replace("\r", "").replace("\n", "")), NOW) >= 0

    @pytest.mark.parametrize(("problem", "text"), [
        ({"type": "urn:ietf:params:acme:error:caa", "detail": "CAA says no"}, "caa: CAA says no"),
        ({"detail": "no\n\x1b[31m"}, "refused: no\\n\\x1b[31m"),
        ({}, "refused: no detail given"),
        ({"type": 5, "detail": ["x"], "subproblems": "x"}, "5: ['x']"),
        ({"type": "a:b:dns", "detail": "two", "subproblems": [
            {"type": "a:b:caa", "detail": "one\r", "identifier": {"type": "dns", "value": "a.example"}},
            {"type": "a:b:dns", "detail": "none", "identifier": None}, 7]},
         "dns: two; a.example: caa: one\\r; ?: dns: none"),
    ])
    def test_problem_text(self, problem: dict[str, Any], text: str) -> None:
        assert wucme.problem_text(problem) == text

    def test_a_known_kind_of_refusal_comes_with_a_remedy(self) -> None:
        assert str(wucme.acme_error("no", {"type": "a:dns"})) == f"no ({wucme.REMEDIES['dns']})"
        assert str(wucme.acme_error("no", {"type": "a:other"})) == "no"

    def test_a_problem_is_no_longer_than_a_screen(self) -> None:
        assert len(wucme.problem_text({"detail": "x" * 10 ** 6})) <= 2000

    @bounded
    @given(problem=st.dictionaries(st.sampled_from(["type", "detail", "subproblems", "identifier"]), json_values))
    def test_no_problem_is_a_problem(self, problem: dict[str, Any]) -> None:
        assert wucme.problem_text(problem).isprintable()

    @bounded
    @given(found=st.dictionaries(st.sampled_from(["suggestedWindow", "explanationURL"]), deep_values |
                                 st.fixed_dictionaries({"start": any_line | st.just("2026-11-24T00:00:00Z"),
                                                        "end": any_line | st.just("2026-11-25T00:00:00.12345+01:00")})))
    def test_any_renewal_information_is_a_window_or_none(self, found: dict[str, Any]) -> None:
        window = wucme.parse_window(found)
        assert window is None or (window.start < window.end and window.about.isprintable())

    @bounded
    @given(text=st.text(st.characters(max_codepoint=255), max_size=60) | st.text(
        st.sampled_from("0123456789 -:,GMTFriNov"), max_size=30))
    def test_no_header_upsets_its_reader(self, text: str) -> None:
        assert wucme.http_date(text) is None or text
        assert len(wucme.alternates(response(Link=text))) <= 10
        with contextlib.suppress(ValueError):
            wucme.from_base64url(text)

    @pytest.mark.parametrize("body", [b"", b"[]", b"<html>\n", b"\xff", b"[" * 99999, b"null"], ids=brief)
    def test_what_is_no_object_is_quoted(self, body: bytes) -> None:
        with pytest.raises(wucme.NetworkError) as caught:
            wucme.read_object(response(body=body), "https://u")
        assert str(caught.value).startswith(f"https://u: no JSON object came, but {len(body)} bytes: ")
        assert len(str(caught.value)) < 200


def client() -> wucme.Client:
    """A client of https://ca.test:14000/dir that has not fetched anything."""
    made = object.__new__(wucme.Client)
    made.url = "https://ca.test:14000/dir"
    return made


DRAFT_02 = {"accountHashPrefix": "https://ca.example/account-hash/", "issuerDomainNames": ["ca.example", "b.example"]}


class TestLastingRecords:
    @pytest.mark.parametrize(("meta", "about", "name", "records"), [
        ({}, {"issuer-domain-names": ["ca.example"]}, "a.example", ["ca.example; accounturi=https://ca.example/acct/123"]),
        ({}, {"issuer-domain-names": ["ca.example"], "accounturi": "urn:1"}, "*.a.example",
         ["ca.example; accounturi=urn:1; policy=wildcard"]),
        (DRAFT_02, {}, "example.com", [
            f"{issuer}; accounturi=https://ca.example/account-hash/sha-256/5SQm7n6tPh2-PlLbCKGnViTXX5z19SCN4cPGQHSk-kw"
            for issuer in ("ca.example", "b.example")]),
        (DRAFT_02, {"issuerDomainNames": ["c.example"]}, "*.example.com", [
            "c.example; accounturi=https://ca.example/account-hash/sha-256/5SQm7n6tPh2-PlLbCKGnViTXX5z19SCN4cPGQHSk-kw"
            "; policy=wildcard"]),
        ({}, {}, "a.example", []), ({}, {"issuer-domain-names": "ca.example"}, "a.example", []),
        ({}, {"issuer-domain-names": ["a b", 'x"', "x; y", 7]}, "a.example", ["7; accounturi=https://ca.example/acct/123"]),
        ({}, {"issuer-domain-names": ["a"], "accounturi": 'u"; v'}, "a.example", []),
    ])
    def test_the_record_is_as_the_cas_draft_has_it(
            self, meta: dict[str, Any], about: dict[str, Any], name: str, records: list[str]) -> None:
        one = client()
        key: Any = RFC_7638
        one.account, one.key = "https://ca.example/acct/123", key
        one.directory = wucme.Directory("", "", "", "", "", "", "", {}, meta)
        assert one.persistent_records(wucme.Challenge(PERSIST, "", "", "pending", {}, about), name) == records


class TestClient:
    @pytest.mark.parametrize("url", ["https://ca.test:14000/", "https://ca.test:14000/a?b=c#d",
                                     "https://ca.test:14000"])
    def test_a_url_of_the_cas_own_host_is_taken(self, url: str) -> None:
        assert client().own_url(url, "order") == url

    @pytest.mark.parametrize("url", [
        None, 5, "", [], "order/1", "/order/1", "//ca.test:14000/x", "http://ca.test:14000/x", "https://ca.test/x",
        "https://ca.test:443/x", "https://evil.test:14000/x", "https://ca.test:14000@evil.test/x",
        "https://evil@ca.test:14000/x", "https://ca.test:14000.evil.test/", "https://ca.test:14000\\@evil.test/",
        "ftp://ca.test:14000/", "https://[::1/", "https://ca.test:14000/é", "https://xca.test:14000/",
        "https:ca.test:14000/",
    ])
    def test_any_other_is_refused_in_one_line(self, url: object) -> None:
        with pytest.raises(wucme.NetworkError, match=r"^https://ca\.test:14000/dir: the CA gave .* as its order, not"):
            client().own_url(url, "order")

    def test_a_refused_url_is_quoted_printably_and_in_part(self) -> None:
        with pytest.raises(wucme.NetworkError) as caught:
            client().own_url("http://\x1b\n" + "x" * 999, "order")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 250

    ORDER: dict[str, Any] = {  # noqa: RUF012 - a table that is only read
        "status": "ready", "identifiers": [{"type": "dns", "value": "A.example"}],
        "authorizations": ["https://ca.test:14000/a"], "finalize": "https://ca.test:14000/f"}

    def parsed(self, **change: Any) -> wucme.Order:
        """The order, with a change, as it is understood."""
        body = json.dumps({**self.ORDER, **change}).encode()
        made = client()
        made.world = wucme.REAL
        return made.parse_order("https://ca.test:14000/o", response(200, body, Retry_After="7"), ["a.example"])

    def test_an_order(self) -> None:
        assert self.parsed() == wucme.Order("https://ca.test:14000/o", "ready", ("https://ca.test:14000/a",),
                                            "https://ca.test:14000/f", "", {}, 7.0)

    @bounded
    @given(change=st.dictionaries(st.sampled_from(["status", "identifiers", "authorizations", "finalize", "certificate",
                                                   "error"]), deep_values))
    def test_any_order_is_one_or_is_refused(self, change: dict[str, Any]) -> None:
        with contextlib.suppress(wucme.NetworkError):
            assert wucme.problem_text(self.parsed(**change).error).isprintable()

    @pytest.mark.parametrize(("waits", "slept"), [
        ([0.0, 0.0, 0.0], [0.0, 0.25, 0.5]), ([3.0], [3.0]), ([0.0, 9.0, 0.0], [0.0, 9.0, 0.5]),
        ([3600.0], []), ([0.0, 3600.0], [0.0]),
    ])
    def test_an_order_is_looked_at_when_the_ca_wants_it_else_soon(self, waits: list[float], slept: list[float]) -> None:
        made, order = client(), self.parsed()
        found: list[float] = []
        made.world = wucme.REAL._replace(sleep=found.append, monotonic=lambda: sum(found))
        looks = [*(order._replace(status="processing", wait=wait) for wait in waits), order]
        made.fetch_order = lambda *_: looks.pop(0)      # type: ignore[method-assign]
        in_time = contextlib.nullcontext() if max(waits) < 60 else pytest.raises(wucme.NetworkError, match="deadline")
        with in_time:
            assert made.settle(looks.pop(0), ["a.example"], ["processing"], 60.0) == order
        assert found == slept

    @pytest.mark.parametrize("error", [wucme.AcmeError("wait", "rateLimited"), wucme.NetworkError("gone")])
    def test_the_verdict_on_an_order_stands_whatever_else_is_refused(self, error: wucme.WucmeError) -> None:
        def refuse(*_: object) -> wucme.Authorization:
            raise error

        made, verdict = client(), {"type": "urn:ietf:params:acme:error:caa", "detail": "CAA forbids it"}
        made.world = wucme.REAL
        made.authorization = refuse     # type: ignore[assignment, method-assign]
        assert made.complaint(self.parsed(status="invalid", error=verdict), ["a.example"]).kind == "caa"

    @bounded
    @given(change=st.dictionaries(st.sampled_from(["status", "identifier", "challenges"]), deep_values | st.lists(
        st.fixed_dictionaries({"type": st.sampled_from(["http-01", "dns-persist-01", "x"])}, optional={
            "url": any_line, "token": any_line | deep_values, "error": deep_values}), max_size=2)))
    def test_any_authorization_is_one_or_is_refused(self, change: dict[str, Any]) -> None:
        about = {"identifier": {"type": "dns", "value": "a.example"}, "status": "pending", **change}
        made = client()
        made.post = lambda *_: response(body=json.dumps(about).encode())        # type: ignore[method-assign]
        with contextlib.suppress(wucme.NetworkError):
            found = made.authorization("https://ca.test:14000/a", ["a.example"])
            assert all(re.fullmatch(wucme.BASE64URL, one.token) or one.kind == PERSIST for one in found.challenges)

    @bounded
    @given(change=st.dictionaries(st.sampled_from(["newNonce", "newOrder", "meta", "renewalInfo", "keyChange"]),
                                  deep_values | st.fixed_dictionaries({"profiles": deep_values,
                                                                       "termsOfService": deep_values})))
    def test_any_directory_is_one_or_is_refused(self, log: wucme.Log, change: dict[str, Any]) -> None:
        about = {name: f"https://ca.test:14000/{name}" for name in ("newNonce", "newAccount", "newOrder")}
        made = client()
        made.world = wucme.REAL
        made.send = lambda *_: response(body=json.dumps({**about, **change}).encode())      # type: ignore[method-assign]
        with contextlib.suppress(wucme.NetworkError):
            assert made.fetch_directory().terms.isprintable()

    @pytest.mark.parametrize("change", [
        {"identifiers": [{"value": "b.example"}]}, {"identifiers": None}, {"identifiers": [7]}, {"authorizations": []},
        {"authorizations": ["https://ca.test:14000/a"] * 2}, {"authorizations": "https://ca.test:14000/a"},
        {"authorizations": ["http://ca.test:14000/a"]}, {"authorizations": [None]}, {"finalize": None},
        {"finalize": "https://evil.test/f"}, {"certificate": "https://evil.test/c"}, {"certificate": 1},
    ])
    def test_an_order_that_is_not_ours_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(wucme.NetworkError):
            self.parsed(**change)


# --- 10. store ---------------------------------------------------------------------------------

NEW_CHAIN = INTERMEDIATE.chain(KEY, span=(0, 90 * DAY))
OTHER_CHAIN = INTERMEDIATE.chain(OTHER_KEY, span=(0, 90 * DAY))
STAMP = "2026021300200086"


def combined(directory: Path) -> None:
    """Write a pair as `rotate = yes` keeps it."""
    chain, key = put(directory, "x", wucme.key_pem(KEY) + CHAIN)
    chain.chmod(0o600)
    key.unlink()
    key.symlink_to(chain.name)


def plain(directory: Path) -> None:
    """Write a pair as `rotate = no` keeps it."""
    chain, key = put(directory, "x")
    chain.chmod(0o644)
    key.chmod(0o600)


def nothing(_: Path) -> None:
    """Write no pair."""


def half(directory: Path) -> None:
    """Write a key alone."""
    put(directory, "x")[1].chmod(0o600)
    (directory / "wucme_c_x.pem").unlink()


def misfit(directory: Path) -> None:
    """Write a chain with the key of another."""
    for path, bits in zip(put(directory, "x", OTHER_CHAIN), (0o644, 0o600)):
        path.chmod(bits)


SWITCHES = [(before, key, rotate) for before in (nothing, half, misfit, plain, combined) for key in (KEY, OTHER_KEY)
            for rotate in (False, True)]


def renewed(key: Any) -> tuple[bytes, bytes]:
    """The new certificate for a key, and that."""
    return NEW_CHAIN if key is KEY else OTHER_CHAIN, wucme.key_pem(key)


def steps(directory: Path, key: Any, rotate: bool) -> list[wucme.Step]:
    """What makes the new certificate for a key live."""
    return wucme.switch(look(directory, rotate=rotate), *renewed(key), STAMP)


def live(directory: Path) -> tuple[bytes, bytes]:
    """The certificates and the key that both live paths hold, which must fit."""
    chain, key = ((directory / f"wucme_{kind}_x.pem").read_bytes() for kind in "ck")
    assert wucme.key_hash(wucme.parse_key(key).public_key()) == wucme.facts(chain).key
    return b"".join(wucme.certificates(chain)), wucme.private_key(key)


def assert_switched(directory: Path, key: Any, rotate: bool) -> None:
    """The new pair is live, in the form and with the modes that `rotate` asks for."""
    chain, private = directory / "wucme_c_x.pem", directory / "wucme_k_x.pem"
    assert live(directory) == renewed(key)
    assert private.is_symlink() is rotate
    assert wucme.private_key(chain.read_bytes()) == (wucme.key_pem(key) if rotate else b"")
    assert (mode(chain), mode(private)) == (0o600 if rotate else 0o644, 0o600)
    assert not list(directory.glob("*_tmp"))


@pytest.mark.usefixtures("no_power_cuts")
class TestStore:
    @pytest.mark.parametrize(("before", "key", "rotate"), SWITCHES)
    def test_the_pair_is_whole_after_every_step_and_the_new_one_at_the_end(
            self, tmp_path: Path, no_umask: None, before: Callable[[Path], None], key: Any, rotate: bool) -> None:
        before(tmp_path)
        was_whole = look(tmp_path).whole
        old = live(tmp_path) if was_whole else None
        for step in steps(tmp_path, key, rotate):
            step.do()
            assert not was_whole or live(tmp_path) in (old, renewed(key))
            for path in tmp_path.iterdir():
                assert path.is_symlink() or not wucme.private_key(path.read_bytes()) or mode(path) == 0o600
        assert_switched(tmp_path, key, rotate)

    @pytest.mark.parametrize(("before", "key", "rotate"), SWITCHES)
    def test_a_run_that_was_killed_after_any_step_is_made_good_by_the_next(
            self, tmp_path: Path, no_umask: None, before: Callable[[Path], None], key: Any, rotate: bool) -> None:
        (tmp_path / "count").mkdir()
        before(tmp_path / "count")
        for killed_after in range(len(steps(tmp_path / "count", key, rotate)) + 1):
            place = tmp_path / str(killed_after)
            place.mkdir()
            before(place)
            for step in steps(place, key, rotate)[:killed_after]:
                step.do()
            wucme.sweep(str(place), os.listdir(place))
            for step in steps(place, key, rotate):
                step.do()
            assert_switched(place, key, rotate)

    @pytest.mark.parametrize(("before", "key", "rotate", "backups"), [
        (plain, KEY, False, {"c"}), (plain, OTHER_KEY, False, {"c", "k"}), (plain, OTHER_KEY, True, {"c", "k"}),
        (plain, KEY, True, {"c"}), (combined, OTHER_KEY, True, {"c"}), (combined, KEY, False, {"c"}),
        (nothing, KEY, True, set()), (misfit, KEY, False, {"c", "k"}),
    ])
    def test_backups_have_the_stamp_and_hold_the_old_files(self, tmp_path: Path, before: Callable[[Path], None],
                                                           key: Any, rotate: bool, backups: set[str]) -> None:
        before(tmp_path)
        old = {path.name: (path.read_bytes(), mode(path)) for path in tmp_path.iterdir()}
        for step in steps(tmp_path, key, rotate):
            step.do()
        found = {path.name: (path.read_bytes(), mode(path)) for path in tmp_path.glob(f"*_{STAMP}")}
        assert found == {f"wucme_{kind}_x.pem_{STAMP}": old[f"wucme_{kind}_x.pem"] for kind in backups}

    @pytest.mark.parametrize("rotate", [False, True])
    def test_modes_that_were_set_by_hand_are_kept(self, tmp_path: Path, rotate: bool) -> None:
        chain, key = put(tmp_path, "x")
        chain.chmod(0o640)
        key.chmod(0o400)
        for step in steps(tmp_path, OTHER_KEY, rotate):
            step.do()
        assert (mode(chain), mode(key)) == (0o400 if rotate else 0o640, 0o400)

    def test_a_renewal_with_the_key_kept_is_one_rename(self, tmp_path: Path) -> None:
        plain(tmp_path)
        path = tmp_path / "wucme_c_x.pem"
        assert [step.text for step in steps(tmp_path, KEY, False)] == [
            f"backed up {path} as {path}_{STAMP}", f"saving to {path}_tmp", f"renaming {path}_tmp to {path}"]

    def test_a_combined_file_holds_key_leaf_and_issuers_in_this_order(self, tmp_path: Path) -> None:
        for step in steps(tmp_path, KEY, True):
            step.do()
        assert (tmp_path / "wucme_c_x.pem").read_bytes() == wucme.key_pem(KEY) + NEW_CHAIN
        assert os.readlink(tmp_path / "wucme_k_x.pem") == "wucme_c_x.pem"

    def test_text_and_crlf_of_the_ca_do_not_go_live(self, tmp_path: Path) -> None:
        sent = b"text\r\n" + NEW_CHAIN.replace(b"\n", b"\r\n")
        for step in wucme.switch(look(tmp_path), sent, wucme.key_pem(KEY), STAMP):
            step.do()
        assert (tmp_path / "wucme_c_x.pem").read_bytes() == NEW_CHAIN

    @pytest.mark.parametrize("done", [0, 1])
    @pytest.mark.parametrize("waiting", [True, False])
    def test_a_switch_that_was_cut_short_when_the_new_pair_was_live_is_straightened(
            self, tmp_path: Path, done: int, waiting: bool) -> None:
        combined(tmp_path)
        if waiting:
            wucme.create(str(tmp_path / "wucme_k_x.pem_tmp"), live(tmp_path)[1])
        before = live(tmp_path)
        assert wucme.straighten(look(tmp_path, rotate=True)) == []
        for step in [step for step in wucme.straighten(look(tmp_path)) if "wucme_k_" in step.text][:2 * done]:
            step.do()
        for step in wucme.straighten(look(tmp_path)):
            step.do()
            assert live(tmp_path) == before
        assert not (tmp_path / "wucme_k_x.pem").is_symlink()
        assert wucme.private_key((tmp_path / "wucme_c_x.pem").read_bytes()) == b""
        assert [mode(tmp_path / f"wucme_{kind}_x.pem") for kind in "ck"] == [0o644, 0o600]
        assert wucme.straighten(look(tmp_path)) == []

    @pytest.mark.parametrize("keep", [0, 1, 3, 9])
    def test_prune_keeps_the_newest(self, tmp_path: Path, keep: int) -> None:
        stamps = ["2025123123595999", "2026010100000000", "2026010100000001", "2026021300200086"]
        others = ["wucme_c_x.pem", "wucme_c_x.pem_tmp", "wucme_c_x.pem_2026", "wucme_c_xypem_2026021300200086",
                  "wucme_c_x.pem_20260213002000860", "wucme_k_x.pem_2026021300200086"]
        for name in [*others, *(f"wucme_c_x.pem_{stamp}" for stamp in stamps)]:
            (tmp_path / name).touch()
        wucme.prune(str(tmp_path), ["wucme_c_x.pem"], keep)
        assert set(os.listdir(tmp_path)) == {*others, *(f"wucme_c_x.pem_{one}" for one in stamps[max(0, 4 - keep):])}

    def test_sweep_removes_what_was_left_but_for_what_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "tokens").mkdir()
        stale = ["wucme_c_x.pem_tmp", "WUCME_K_Y.PEM_tmp", "wucme_s_x.json_tmp", "tokens/a", "tokens/b"]
        spared = ["wucme_k_x.pem_tmp", "wucme_c_x.pem", "wucme_c_x.pem_2026021300200086", "other_tmp", "wucme.lock"]
        for name in [*stale, *spared]:
            (tmp_path / name).touch()
        (tmp_path / "wucme_s_x.json").write_text('{"order": "https://ca.test/order/1"}')
        gone = wucme.sweep(str(tmp_path), os.listdir(tmp_path))
        assert sorted(gone) == sorted(str(tmp_path / name) for name in stale)
        assert sorted(os.listdir(tmp_path)) == sorted([*spared, "tokens", "wucme_s_x.json"])
        assert os.listdir(tmp_path / "tokens") == []

    def test_a_change_of_an_account_key_is_not_swept_whatever_its_spelling(self, tmp_path: Path) -> None:
        spared = ["WUCME_K_ACCOUNT.PEM_tmp", "wucme_k_account.pem_tmp", "wucme_k_account_home.pem_tmp"]
        for name in [*spared, "wucme_k_accounts.example.pem_tmp"]:
            (tmp_path / name).touch()
        wucme.sweep(str(tmp_path), os.listdir(tmp_path))
        assert sorted(os.listdir(tmp_path)) == sorted(spared)

    @pytest.mark.parametrize("name", ["wucme_old_tmp", "tokens/old"])
    def test_a_directory_in_the_way_stops_no_sweep(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / "wucme_c_x.pem_tmp").touch()
        wucme.sweep(str(tmp_path), os.listdir(tmp_path))
        assert not (tmp_path / "wucme_c_x.pem_tmp").exists()

    @pytest.mark.parametrize(("state", "first", "own"), [
        ('{"directory": "https://ca.test/d"}', False, False), ('{"directory": "https://ca.test/d"}', True, False),
        ('{"directory": "https://other.test/d"}', True, True), ("", True, False), ("", False, True),
        ("{torn", True, False),
    ])
    def test_account_files(self, tmp_path: Path, state: str, first: bool, own: bool) -> None:
        (tmp_path / "WUCME_K_ACCOUNT.PEM").touch()
        (tmp_path / "wucme_s_account.json").write_text(state)
        found = wucme.account_files(str(tmp_path), "home", "https://ca.test/d", first)
        names = ("wucme_k_account_home.pem", "wucme_s_account_home.json") if own else \
            ("WUCME_K_ACCOUNT.PEM", "wucme_s_account.json")
        assert found == wucme.Account(*(str(tmp_path / name) for name in names))


# --- 11. load ----------------------------------------------------------------------------------

class TestItems:
    @bounded
    @given(sign=st.sampled_from("+@$>? "), rest=any_line | st.sampled_from(["nginx", "/bin/true 'a", "a\0b"]))
    def test_any_line_is_an_item_or_refused(self, sign: str, rest: str) -> None:
        with contextlib.suppress(ValueError):
            assert wucme.parse_item(f"{sign}{rest}".strip()).argv

    @pytest.mark.parametrize(("text", "argv", "options"), [
        ("+", ("nginx", "apache", "haproxy", "caddy", "lighttpd"), {}), ("+nginx", ("nginx",), {}),
        ("+ postfix", ("postfix",), {}), ("+systemd  a@b.service", ("systemd", "a@b.service"), {}),
        ("@/a/b", ("/a/b",), {}), ("@ /a/b 'c d' $e", ("/a/b", "c d", "$e"), {}),
        ("$ a | b 'c", ("/bin/sh", "-c", "a | b 'c"), {}), ("$a", ("/bin/sh", "-c", "a"), {}),
        ("> /a/{name}.pem", ("/a/{name}.pem",), {"what": "chain", "mode": "0644"}),
        (">'/a b' what=pair", ("/a b",), {"what": "pair", "mode": "0600"}),
        ("> /a what=key mode=640 owner=root:haproxy", ("/a",),
         {"what": "key", "mode": "640", "owner": "root:haproxy"}),
        ("> /a what=p12 password_file=/b", ("/a",), {"what": "p12", "mode": "0600", "password_file": "/b"}),
        ("? {name}:443", ("{name}", "443"), {}), ("?[::1]:25 starttls=smtp all sni=b", ("::1", "25"), {
            "starttls": "smtp", "all": "", "sni": "b"}),
    ])
    def test_a_good_item(self, text: str, argv: tuple[str, ...], options: dict[str, str]) -> None:
        assert wucme.parse_item(text) == wucme.Item(text, argv, options)

    @pytest.mark.parametrize(("text", "reason"), [
        ("+ngnix", "no such server; did you mean nginx?"), ("+nginx apache", "no such server"),
        ("+x", "there are nginx, apache"), ("+systemd", "no such server"), ("+systemd -x", "no such server"),
        ("+systemd a b", "no such server"),
        ("@", "whole path"), ("@ b", "whole path"), ("@'/a", "No closing quotation"),
        ("$", "$ needs a shell command"), ("$ ", "$ needs a shell command"),
        ("nginx", "an item begins with"), ("/a/b", "an item begins with"), ("!x", "an item begins with"),
        (">", "must be > FILE"), ("> a", "whole path of a file"), ("> /a/", "whole path of a file"),
        ("> /{names}", "only {name} is replaced"), ("> /a what=all", "what=all: must be one of chain, cert"),
        ("> /a mode=1777", "three octal digits"), ("> /a mode=rw", "three octal digits"),
        ("> /a what=key mode=0644", "would give the key to everyone"),
        ("> /a what=p12", "go together"), ("> /a password_file=/b", "go together"),
        ("> /a what=p12 password_file=b", "needs a whole path"), ("> /a owner=a:b:c", "USER, USER:GROUP"),
        ("> /a mod=0644", "'mod=0644' must be one of what= mode= owner= password_file="),
        ("> /a mode=", "once and with its value"), ("> /a mode=600 mode=600", "once and with its value"),
        ("? a", "must be :PORT, ADDRESS:PORT"), ("? 'a:1 b:2'", "needs HOST:PORT"), ("? :443", "needs HOST:PORT"),
        ("? a:0", "must be"),
        ("?", "must be ? HOST:PORT"), ("? a:1 all=yes", "once and with"), ("? a:1 sni", "must be one of"),
        ("? a:1 sni={names}", "only {name} is replaced"),
        ("? a:1 starttls=ftp", "must be one of smtp, imap, pop3"),
    ])
    def test_a_bad_item(self, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=re.escape(reason)):
            wucme.parse_item(text)

    @bounded
    @given(text=st.text(st.sampled_from("+@$>?{}=:/' name\\\"[]what1"), min_size=1, max_size=30))
    def test_any_text_is_an_item_or_refused(self, text: str) -> None:
        with contextlib.suppress(ValueError):
            assert wucme.parse_item(text).text == text

    @bounded
    @given(lists=st.lists(st.sets(st.sampled_from("gcafbed")).map(
        lambda some: sorted(some, key="gcafbed".index)), max_size=5))
    def test_every_list_keeps_its_own_order(self, lists: list[list[str]]) -> None:
        found = wucme.in_order(lists)
        assert sorted(found) == sorted({text for one in lists for text in one})
        for one in lists:
            assert [text for text in found if text in one] == one

    @pytest.mark.parametrize("lists", [["ab", "ba"], ["aba"], ["abc", "ca"]])
    def test_lists_that_contradict_each_other_lose_nothing(self, lists: list[str]) -> None:
        assert sorted(wucme.in_order(lists)) == sorted(set("".join(lists)))

    def test_duties_are_once_for_all_or_once_for_each(self) -> None:
        texts = ("$ a", "+nginx")
        items = {text: wucme.parse_item(text) for text in texts}
        one, two, other = (entry(known(1, 0), load=load)._replace(name=name) for name, load in
                           (("one", texts), ("two", texts), ("other", ("$ a",))))
        broken = entry(None, load=texts)
        found = wucme.duties([one, two, other, broken], items, lambda who, text: (who.name, text) != ("two", "$ a"))
        assert found == [wucme.Duty(items["$ a"], [one]), wucme.Duty(items["$ a"], [other]),
                         wucme.Duty(items["+nginx"], [one, two])]
        assert wucme.duties([one], items, lambda *_: False) == []

    @pytest.mark.parametrize("what", ["key", "pair", "p12 password_file=/p"])
    def test_a_copy_with_a_key_in_it_is_none_without(self, tmp_path: Path, what: str) -> None:
        chain, request = tmp_path / "chain", tmp_path / "request"
        chain.write_bytes(CHAIN)
        request.write_bytes(b"the key is elsewhere\n")
        duty = wucme.Duty(wucme.parse_item(f"> {tmp_path}/copy what={what}"),
                          [entry(known(1, 0))._replace(chain=str(chain), key=str(request))])
        assert wucme.perform(duty, RUN, wucme.World()) == f"there is no key in {request}"
        assert not (tmp_path / "copy").exists()

    @pytest.mark.parametrize(("server", "argv", "kept_options"), [
        ("nginx", ["nginx: master process /usr/sbin/nginx -g daemon off; -c /etc/x.conf -p/srv"],
         ["-c", "/etc/x.conf", "-p/srv"]),
        ("nginx", ["nginx: master process nginx"], []),
        ("nginx", ["/usr/sbin/nginx", "-c", "/a b", "-q"], ["-c", "/a b"]),
        ("apache", ["/usr/sbin/apache2", "-d", "/srv", "-k", "start", "-DSSL", "-f", "x.conf", "-D", "FOREGROUND"],
         ["-d", "/srv", "-DSSL", "-f", "x.conf", "-D", "FOREGROUND"]),
        ("apache", ["apache2", "-"], []), ("nginx", [""], []),
        ("haproxy", ["haproxy", "-Ws", "-f", "/a", "-f", "/b", "-p", "/run/x", "-sf", "7", "-x", "sockpair@3"],
         ["-f", "/a", "-f", "/b"]),
        ("caddy", ["caddy", "run", "--environ", "--config", "/a", "--adapter=x"], ["--config", "/a", "--adapter=x"]),
        ("caddy", ["caddy", "run", "-config", "/a", "-watch"], ["-config", "/a"]),
    ])
    def test_the_options_of_a_running_server_are_its_own(self, server: str, argv: list[str],
                                                         kept_options: list[str]) -> None:
        assert wucme.own_options(argv, wucme.STANDARD[server].options) == kept_options

    @pytest.mark.parametrize(("problem", "output", "text"), [
        ("", ["said"], ""), ("exit status 1", [], "exit status 1"), ("exit 1", ["a", "b", " "], "exit 1: b"),
        ("x", ["y" * 999], "x: " + "y" * 497), ("x", ["2026-02-13 00:20:00: (a.c) no"], "x: (a.c) no"),
    ])
    def test_a_problem_comes_with_the_last_that_was_said(self, problem: str, output: list[str], text: str) -> None:
        assert wucme.with_last_line(wucme.Finished(problem, output)) == text

    def test_what_a_procedure_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "environ", {"PATH": "/opt/bin", "LANG": "C"})
        found = wucme.load_environment(entry(known(1, 0)), "/d", "alpha")
        assert found == {
            "PATH": "/opt/bin:/usr/local/sbin:/usr/sbin:/sbin", "LANG": "C", "WUCME_NAME": "x",
            "WUCME_NAMES": "www.example.org example.org", "WUCME_CERT": "/d/wucme_c_x.pem",
            "WUCME_KEY": "/d/wucme_k_x.pem", "WUCME_DIRECTORY": "/d", "WUCME_HOST": "alpha", "WUCME_FINGERPRINT": "f"}


class TestStandard:
    """What + does with the servers that it finds, told by a world that only notes it."""

    MASTER = wucme.Process(4321, 1, ["nginx: master process nginx -c /x"])

    @pytest.mark.parametrize(("cgroup", "told", "unit"), [
        ("0::/system.slice/nginx.service\n", "MainPID=4321 CanReload=yes", "nginx.service"),
        ("9:name=systemd:/system.slice/nginx.service\n0::/\n", "CanReload=yes MainPID=4321", "nginx.service"),
        ("0::/system.slice/nginx.service\n", "MainPID=4321 CanReload=no", ""),
        ("0::/system.slice/supervisord.service\n", "MainPID=99 CanReload=yes", ""),
        ("0::/user.slice/a.service\n", "MainPID=0 CanReload=no", ""),
        ("0::/\n", "MainPID=4321 CanReload=yes", ""), ("0::/docker/abc\n", "MainPID=4321 CanReload=yes", ""),
        ("", "", ""),
    ])
    def test_the_unit_counts_only_with_the_server_as_its_main_process(
            self, cgroup: str, told: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(wucme, "proc_text", lambda pid, name: cgroup)
        monkeypatch.setattr(os.path, "isdir", lambda path: True)
        world = wucme.World(command=noting(asked, lambda *_, **__: wucme.Finished("", told.split())))
        assert wucme.unit_of(self.MASTER, 5, world) == unit

    @pytest.mark.parametrize(("unit", "catches", "done", "problem"), [
        ("x.service", True, [["test"], ["systemctl", "reload", "x.service"]], ""), ("", True, [["test"], ["kill"]], ""),
        ("", False, [["test"]], "cannot be told to reload: it takes no SIGHUP"),
    ])
    def test_it_reloads_by_its_unit_or_a_signal_that_it_takes(
            self, unit: str, catches: bool, done: list[list[str]], problem: str,
            monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[str]] = []

        def command(argv: list[str], *_: object, **__: object) -> wucme.Finished:
            seen.append(["test"] if "-t" in argv else argv)
            return wucme.Finished("", [])

        monkeypatch.setattr(wucme, "unit_of", lambda *_: unit)
        monkeypatch.setattr(wucme, "catches", lambda *_: catches)
        monkeypatch.setattr(os, "kill", lambda *_: seen.append(["kill"]))
        assert problem in wucme.reload_server("nginx", self.MASTER, 5, wucme.World(command=command))
        assert seen == done

    def test_a_test_is_done_twice_before_it_is_believed(self, log: wucme.Log) -> None:
        results = [wucme.Finished("exit status 1", ["key values mismatch"])] * 2
        paused: list[float] = []
        world = wucme.World(command=lambda *_, **__: results.pop(), sleep=paused.append)
        problem = wucme.reload_server("nginx", self.MASTER, 5, world)
        assert problem == ("nginx (pid 4321) was not reloaded, its configuration test failed: exit status 1: "
                           "key values mismatch")
        assert (results, paused[:1]) == ([], [1.0])

    def test_another_program_called_master_is_not_postfix(self, monkeypatch: pytest.MonkeyPatch,
                                                          log: wucme.Log) -> None:
        monkeypatch.setattr(wucme, "processes", lambda commands: [
            wucme.Process(5, 1, ["/opt/cyrus/master"]), wucme.Process(6, 1, [""])])
        duty = wucme.Duty(wucme.parse_item("+postfix"), [entry(known(1, 0))])
        assert wucme.perform(duty, RUN, wucme.World()) == ""
        assert "no postfix runs here" in log.held[0]


def prove(text: str, who: wucme.Entry, shown: Mapping[str, bytes], **more: Any) -> tuple[str, list[tuple[Any, ...]]]:
    """What a ? item comes to where addresses show these certificates, and what was asked for."""
    asked, times = [], iter(range(100))

    def connect(host: str, port: int, name: str, protocol: str, _: float) -> bytes:
        asked.append((host, port, name, protocol))
        if host not in shown:
            raise wucme.NetworkError("Connection refused")
        return shown[host]

    world = wucme.World(now=lambda: NOW, monotonic=lambda: next(times), sleep=lambda _: None, connect=connect,
                        resolve=lambda host: list(shown), **more)
    return wucme.perform(wucme.Duty(wucme.parse_item(text), [who]), RUN, world), asked


class TestProve:
    LEAF = INTERMEDIATE.issue(KEY, *NAMES)
    MINE = entry(wucme.facts(LEAF), grace=3)._replace(name="www.example.org")

    def test_the_certificate_on_disk_is_what_must_be_shown(self) -> None:
        assert prove("? a.example:443 sni=b starttls=imap", self.MINE, {"a.example": self.LEAF}) == (
            "", [("a.example", 443, "b", "imap")])

    @pytest.mark.parametrize(("shown", "problem"), [
        (INTERMEDIATE.issue(KEY, "old.example", span=(-9 * DAY, DAY)),
         r"^a asked for a shows another certificate, for old.example, serial [0-9a-f]+, that expires Feb 14 00:20:00 "),
        (INTERMEDIATE.issue(KEY, "old.example", span=(-9 * DAY, -DAY)), r"that expired Feb 12 00:20:00 2026 GMT"),
        (INTERMEDIATE.issue(KEY), "for no name"), (b"", "holds no certificate"),
        (None, "a asked for a shows no certificate: Connection refused"),
    ])
    def test_what_is_shown_instead_is_said_after_so_long(self, shown: bytes | None, problem: str) -> None:
        found, asked = prove("? a:443", self.MINE, {} if shown is None else {"a": shown})
        assert re.search(problem, found)
        assert len(asked) == 3

    def test_all_asks_each_address(self) -> None:
        old = INTERMEDIATE.issue(KEY, *NAMES)
        found, asked = prove("? a:443 all", self.MINE._replace(wanted=DEFAULT._replace(grace=0)),
                             {"127.0.0.1": self.LEAF, "::1": old})
        assert found.startswith("::1 asked for a shows another certificate")
        assert [one[0] for one in asked] == ["127.0.0.1", "::1"]

    def test_a_name_without_address_is_said(self) -> None:
        def resolve(_: str) -> list[str]:
            raise wucme.NetworkError("the name does not resolve")

        world = wucme.World(monotonic=lambda: 0, sleep=lambda _: None, resolve=resolve)
        who = self.MINE._replace(wanted=DEFAULT._replace(grace=0))
        assert wucme.perform(wucme.Duty(wucme.parse_item("? a:1 all"), [who]), RUN, world) == (
            "a: the name does not resolve")

    @pytest.mark.parametrize(("text", "name"), [
        ("? {name}:443", "www.example.org"), ("? 127.0.0.1:443", "www.example.org"),
        ("? a:1 sni={name}", "www.example.org"), ("? 127.0.0.1:443 sni=b", "b"), ("? b:443", "b"),
    ])
    def test_the_name_that_is_asked_for(self, text: str, name: str) -> None:
        assert wucme.server_name(wucme.parse_item(text), self.MINE) == name

    @pytest.mark.parametrize(("names", "name"), [
        (("a.example", "10.0.0.1"), "10.0.0.1"), (("*.example", "a.example"), "www.example"), ((), "10.0.0.1"),
    ])
    def test_an_address_is_asked_for_a_name_unless_the_certificate_is_for_it(self, names: tuple[str, ...],
                                                                             name: str) -> None:
        assert wucme.server_name(wucme.parse_item("? 10.0.0.1:443"), entry(known(1, 0, names))) == name

    @pytest.mark.parametrize(("names", "text", "concerned"), [
        (("a.example",), "? a.example:1", True), (("a.example",), "? A.Example:1", True),
        (("*.example",), "? a.example:1", True), (("*.example",), "? a.b.example:1", False),
        (("*.example",), "? example:1", False), (("b.example",), "? a.example:1", False),
        (("b.example",), "? a.example:1 sni=b.example", True), (("b.example",), "? b.example:1 sni=a.example", False),
        (("10.0.0.1",), "? 10.0.0.1:1", True), (("*.example",), "? 10.0.0.1:1", True),
        (("b.example",), "$ a.example:1", True),
    ])
    def test_a_proof_of_the_common_list_is_for_those_that_have_the_name(self, names: tuple[str, ...], text: str,
                                                                        concerned: bool) -> None:
        who = entry(known(1, 0, names))
        assert wucme.concerns(wucme.parse_item(text), who) is concerned
        assert wucme.concerns(wucme.parse_item(text), who._replace(own=frozenset({"load"})))


@pytest.mark.usefixtures("no_power_cuts")
class TestLedger:
    ENTRY = entry(known(1, 0), load=("+nginx", "$ a"))

    def test_what_is_struck_is_not_owed_any_more_and_that_lasts(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        assert ledger.owes(self.ENTRY, "+nginx")
        assert ledger.strike(self.ENTRY, "+nginx", "", NOW)
        ledger.save()
        for again in (ledger, wucme.Ledger(str(tmp_path), "alpha")):
            assert [again.owes(self.ENTRY, item) for item in ("+nginx", "$ a")] == [False, True]
            assert not again.stranger
        assert mode(tmp_path / "wucme_l_alpha.json") == 0o600
        assert wucme.Ledger(str(tmp_path), "beta").owes(self.ENTRY, "+nginx")

    def test_another_certificate_is_owed_anew_and_none_is_not(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        ledger.strike(self.ENTRY, "+nginx", "", NOW)
        other = self.ENTRY._replace(facts=known(1, 0)._replace(fingerprint="g"))
        assert ledger.owes(other, "+nginx")
        assert ledger.owes(self.ENTRY._replace(name="y"), "+nginx")
        assert not ledger.owes(self.ENTRY._replace(facts=None), "$ a")

    def test_a_failure_is_news_once_and_keeps_its_beginning(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        news = [ledger.strike(self.ENTRY, "$ a", problem, NOW + at)
                for at, problem in enumerate(["no", "no", "never", "", "", "no"])]
        assert news == [True, False, True, True, True, True]
        assert ledger.records["$ a"]["x"] == wucme.Loaded("f", "no", NOW + 5)
        ledger.strike(self.ENTRY, "$ a", "other", NOW + 9)
        assert ledger.records["$ a"]["x"].since == NOW + 5

    def test_a_failure_does_not_undo_what_was_loaded(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        ledger.strike(self.ENTRY, "$ a", "", NOW)
        ledger.strike(self.ENTRY, "$ a", "no", NOW)
        assert not ledger.owes(self.ENTRY, "$ a")

    def test_a_failed_proof_makes_reloads_owed_again(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        for item in ("+", "+nginx", "$ a", "? a:1"):
            ledger.strike(self.ENTRY, item, "", NOW)
        ledger.strike(self.ENTRY, "? a:1", "old", NOW)
        assert [item for item in ("+", "+nginx", "$ a", "? a:1") if ledger.owes(self.ENTRY, item)] == [
            "+", "+nginx", "? a:1"]

    def test_alarms_last(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        ledger.alarms["$ a"] = wucme.Alarm(("b", "c"), NOW)
        ledger.save()
        assert wucme.Ledger(str(tmp_path), "alpha").alarms == {"$ a": wucme.Alarm(("b", "c"), NOW)}

    def test_items_and_certificates_that_are_gone_are_forgotten(self, tmp_path: Path) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        for name in ("x", "y"):
            for item in ("+nginx", "$ a"):
                ledger.strike(self.ENTRY._replace(name=name), item, "", NOW)
        ledger.forget({"x": entry(known(1, 0), load=("$ a",))})
        assert {item: list(held) for item, held in ledger.records.items()} == {"+nginx": [], "$ a": ["x"]}
        ledger.save()
        kept = json.loads(Path(ledger.path).read_text())["certificates"]
        assert {name: list(items) for name, items in kept.items()} == {"x": ["$ a"]}
        assert wucme.Ledger(str(tmp_path), "alpha").records == {"$ a": {"x": wucme.Loaded("f")}}

    def test_another_machine_owes_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        ledger.strike(self.ENTRY, "+nginx", "", NOW)
        ledger.save()
        monkeypatch.setattr(wucme, "machine_id", lambda: "another")
        stranger = wucme.Ledger(str(tmp_path), "alpha")
        assert (stranger.stranger, stranger.owes(self.ENTRY, "+nginx")) == (True, True)
        stranger.save()
        assert not wucme.Ledger(str(tmp_path), "alpha").stranger

    def test_the_machine_is_told_by_a_checksum_of_its_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []
        for text in (b"one", b"two"):
            monkeypatch.setattr(wucme, "read", lambda path, text=text: text)
            found.append(wucme.machine_id())
        assert len(set(found)) == 2
        assert all(re.fullmatch("[0-9a-f]{8}", one) for one in found)

    def test_nothing_new_is_not_written(self, tmp_path: Path) -> None:
        wucme.Ledger(str(tmp_path), "alpha").save()
        assert os.listdir(tmp_path) == []

    @bounded
    @given(data=st.binary(max_size=9) | st.one_of(json_values, st.fixed_dictionaries({
        "machine": st.just(wucme.machine_id()), "alarms": json_values,
        "certificates": json_values | st.fixed_dictionaries({
            "x": json_values | st.fixed_dictionaries({"+nginx": json_values | st.tuples(
                json_values, json_values, json_values)})})})).map(lambda value: json.dumps(value).encode()))
    def test_a_torn_or_foreign_ledger_owes_everything(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "wucme_l_alpha.json").write_bytes(data)
        ledger = wucme.Ledger(str(tmp_path), "alpha")
        assert ledger.owes(self.ENTRY, "+nginx")
        for items in ledger.records.values():
            assert all([type(one) for one in about] == [str, str, float] for about in items.values())


# --- 12. report --------------------------------------------------------------------------------

class TestReport:
    @pytest.mark.parametrize(("states", "tally", "status"), [
        ([], "0 certs, 0 renewed, 0 failed", 0),
        (["current"], "1 certs, 0 renewed, 0 failed", 0),
        (["renewed", "current", "loaded"], "2 certs, 1 renewed, 0 failed", 0),
        (["failed", "renewed", "failed"], "3 certs, 1 renewed, 2 failed", 1),
        (["current", "owed"], "1 certs, 0 renewed, 0 failed, 1 owed", 1),
        (["renewed", "loaded", "owed", "owed"], "1 certs, 1 renewed, 0 failed, 2 owed", 1),
    ])
    def test_tally_and_exit_status(self, states: list[str], tally: str, status: int) -> None:
        found = [wucme.Outcome("x", state) for state in states]
        report = wucme.Report(193, [one for one in found if one.state not in ("loaded", "owed")],
                              [one for one in found if one.state in ("loaded", "owed")])
        assert (report.tally(), report.status, report.news) == (f"193 files, {tally}", status, False)

    @pytest.mark.parametrize("place", [0, 1])
    def test_news_of_any_kind_is_news(self, place: int) -> None:
        lists: list[list[wucme.Outcome]] = [[wucme.Outcome("x", "current")], []]
        lists[place].append(wucme.Outcome("x", "failed", "no", True))
        assert wucme.Report(1, *lists).news

    def test_the_keys_of_status_json(self) -> None:
        decision = wucme.decide(entry(known(90 * DAY, DAY), memory=wucme.Memory(problem="no", failures=1)), NOW)
        found = wucme.certificate_json(decision, [])
        assert list(found) == ["name", "file", "names", "issuer", "serial", "fingerprint", "not_before", "not_after",
                               "due", "reason", "renew_at", "failures", "loads"]
        assert found["failures"] == {"count": 1, "next": None, "problem": "no"}
        assert (found["not_before"], found["renew_at"]) == ("2026-02-12T00:20:00Z", "2026-04-13T00:20:00Z")
        assert json.loads(json.dumps(found)) == found

    def test_the_whole_of_status_json(self, tmp_path: Path) -> None:
        put(tmp_path, "x")
        found = wucme.standing(read_text(f"[wucme]\ndirectory = {tmp_path}\nload = $ a\nhost = alpha"), wucme.World(
            now=lambda: NOW)).about
        assert list(found) == ["version", "host", "last_run", "certificates"]
        assert (found["version"], found["host"], found["last_run"]) == (wucme.VERSION, "alpha", None)
        assert [list(load) for load in found["certificates"][0]["loads"]] == [["item", "state", "since", "problem"]]

    def test_a_certificate_that_is_not_there_has_nulls(self) -> None:
        loads = [{"item": "$ a", "state": "loaded", "since": None, "problem": ""}]
        found = wucme.certificate_json(wucme.decide(entry(None, names=("a.example",)), NOW), loads)
        assert [found[key] for key in ("names", "due", "not_after", "renew_at")] == [["a.example"], True, None, None]
        assert found["loads"] == [], "nothing was loaded"

    def test_problems_are_what_is_failing_missing_expired_or_owed(self) -> None:
        loads = [{"item": "$ a", "state": "owed", "since": None, "problem": "no\nway"},
                 {"item": "$ b", "state": "owed", "since": None, "problem": ""},
                 {"item": "$ c", "state": "loaded", "since": None, "problem": "old"}]
        found = [wucme.certificate_json(wucme.decide(who, NOW), loads[:at]) for at, who in (
            (3, entry(known(90 * DAY, DAY), memory=wucme.Memory(problem="refused"))),
            (0, entry(known(90 * DAY, 91 * DAY), names=("a.example",))), (0, entry(None, names=("b.example",))),
            (0, entry(known(90 * DAY, DAY))))]
        assert wucme.troubles(found, NOW) == [
            "www.example.org: failed: refused", "www.example.org: owed: $ a: no\\nway", "www.example.org: owed: $ b",
            "www.example.org: expired 2026-02-12T00:20:00Z", "b.example: not there"]

    @pytest.mark.parametrize(("age", "renew", "is_late"), [
        (66, "auto", False), (68, "auto", True), (91, "auto", False), (68, "10d", False), (81, "10d", True),
        (66, "never", False), (68, "never", True),
    ])
    def test_late_is_due_or_left_alone_in_the_last_quarter(self, age: float, renew: str, is_late: bool) -> None:
        found = wucme.certificate_json(wucme.decide(entry(known(90 * DAY, age * DAY), renew), NOW), [])
        assert bool(wucme.overdue([found], NOW)) is is_late
        assert wucme.overdue([wucme.certificate_json(wucme.decide(entry(None), NOW), [])], NOW) == []

    def test_metrics(self) -> None:
        loads = [{"item": "$ a", "state": "owed", "since": None, "problem": ""}]
        found = []
        for name, problem, failures in (('a"\\\n', "x", 3), ("b", "x", 0), ("c", "", 0)):
            memory = wucme.Memory(problem=problem, failures=failures)
            who = entry(known(90 * DAY, DAY), memory=memory)._replace(name=name)
            found.append(wucme.certificate_json(wucme.decide(who, NOW), loads))
        text = wucme.metrics_text({"certificates": found, "last_run": wucme.utc(NOW)})
        rows = [line for line in text.splitlines() if not line.startswith("#")]
        assert rows[3:6] == [f'wucme_certificate_failures{{name="{name}"}} {count}'
                             for name, count in (('a\\"\\\\\\\\n', 3), ("b", 1), ("c", 0))]
        assert rows[0] == f'wucme_certificate_expiry_timestamp_seconds{{name="a\\"\\\\\\\\n"}} {int(NOW + 89 * DAY)}'
        assert rows[-2:] == ['wucme_loads_owed{name="c"} 1', f"wucme_last_run_timestamp_seconds {int(NOW)}"]
        form = r'# (HELP|TYPE) wucme_\w+ .+|wucme_\w+(\{name="([^"\\]|\\["\\])*"\})? \d+'
        assert [line for line in text.splitlines() if not re.fullmatch(form, line)] == []
        assert text.endswith("\n")

    @pytest.mark.parametrize(("when", "text"), [
        (NOW, "2026-02-13T00:20:00Z"), (0, "1970-01-01T00:00:00Z"), (float("inf"), None), (float("nan"), None),
        (1e30, None), (1e12, None), (-1e11, None)])
    def test_utc(self, when: float, text: str | None) -> None:
        assert wucme.utc(when) == text

    @pytest.mark.parametrize(("age", "renew", "line"), [
        (DAY, "30", "expires in 89 days; renews after 2026-04-13"),
        (70 * DAY, "30", "expires in 20 days; due: expires in 20 days"),
        (DAY, "never", "expires in 89 days; renews after never"),
        (91 * DAY, "30", "expired; due: expired"),
    ])
    def test_status_for_a_person(self, in_utc: None, age: float, renew: str, line: str) -> None:
        decision = wucme.decide(entry(known(90 * DAY, age), renew), NOW)
        loads = [{"item": "$ \x1b", "state": "owed", "since": None, "problem": "no\nway"}]
        lines = wucme.certificate_text(decision, wucme.certificate_json(decision, loads), NOW)
        assert line in lines[0]
        assert lines[0].startswith("www.example.org")
        assert "owed: $ \\x1b: no\\nway" in lines[1]


# --- 13. run -----------------------------------------------------------------------------------

def set_up(tmp_path: Path, text: str = "", **options: str) -> wucme.Settings:
    """The settings of an ini, for this directory."""
    body = textwrap.dedent(text)
    return wucme.read_settings(wucme.Source("w.ini", body), {"directory": str(tmp_path), "host": "alpha", **options})


class TestRun:
    @pytest.mark.parametrize("text", ["[web-rsa]\nnames = a.example b.example\n[a.example]\n",
                                      "[a.example]\n[web-rsa]\nnames = a.example b.example\n"])
    def test_a_certificate_of_this_very_name_goes_before_others_for_it(self, tmp_path: Path, text: str) -> None:
        inventory = wucme.take_stock(set_up(tmp_path, text))
        assert [entry.name for entry in wucme.choose(inventory, ["A.example"])] == ["a.example"]
        assert [entry.name for entry in wucme.choose(inventory, ["web-rsa"])] == ["web-rsa"]

    def test_dotted_name_is_another_ones_only_if_nobody_has_it(self, tmp_path: Path) -> None:
        put(tmp_path, "a_b")
        put(tmp_path, "a_c")
        inventory = wucme.take_stock(set_up(tmp_path, "[a.b]\nnames = x.example\n[a_b]\nnames = y.example\n"))
        assert [entry.name for entry in wucme.choose(inventory, ["a.b", "a.c"])] == ["a.b", "a_c"]

    def test_no_ca_makes_for_more_orders_than_there_are_challenge_types(
            self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: wucme.Log) -> None:
        def refused(*_: Any) -> None:
            tries.append(1)
            error = wucme.AcmeError("of another type", "dns")
            error.spent = ["dns-01"] if len(tries) < 9 else []
            raise error

        tries: list[int] = []
        by: Any = SimpleNamespace(client=SimpleNamespace(
            own_url=lambda *_: "", fetch_order=lambda *_: SimpleNamespace(status="invalid")))
        settings = set_up(tmp_path, "[a.example]\n")
        one = wucme.take_stock(settings).entries["a.example"]
        task = wucme.Task(("a.example",), one.wanted, ("http-01",), 9e9, wucme.Answers(str(tmp_path)), wucme.REAL,
                          threading.Event(), one.name)
        monkeypatch.setattr(wucme, "obtain", refused)
        with pytest.raises(wucme.AcmeError, match="of another type"):
            wucme.obtain_by_some_way(one, by, task, settings.run)
        assert len(tries) == 1

    def test_refusal_counts_although_the_disk_fails_after_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            log: wucme.Log) -> None:
        def refused(*_: Any) -> None:
            error = wucme.AcmeError("no", "dns", 60.0)
            error.spent = ["http-01"]
            raise error

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        by: Any = SimpleNamespace(client=SimpleNamespace(
            own_url=lambda *_: "", fetch_order=lambda *_: SimpleNamespace(status="invalid")))
        settings = set_up(tmp_path, "[a.example]\n")
        one = wucme.take_stock(settings).entries["a.example"]
        task = wucme.Task(("a.example",), one.wanted, ("http-01", "dns-01"), 9e9, wucme.Answers(str(tmp_path)),
                          wucme.REAL, threading.Event(), one.name)
        monkeypatch.setattr(wucme, "obtain", refused)
        monkeypatch.setattr(wucme, "remember", full)
        with pytest.raises(wucme.AcmeError, match="no"):
            wucme.obtain_by_some_way(one, by, task, settings.run)

    def test_dry_run_names_the_ca_that_would_be_asked(self, tmp_path: Path) -> None:
        settings = set_up(tmp_path, "[a.example]\n", server="letsencrypt zerossl")
        one = wucme.take_stock(settings).entries["a.example"]
        wucme.remember(str(tmp_path), one, failures=3)
        assert wucme.foretell(settings, wucme.Request(), wucme.REAL) == [
            "would order a certificate for a.example at zerossl: declared, and not there yet"]

    def test_alarm_that_cannot_be_written_down_is_said(self, tmp_path: Path, log: wucme.Log) -> None:
        settings = set_up(tmp_path, "[a.example]\n", alert="$ true")
        ledger = tmp_path / "wucme_l_alpha.json"
        ledger.mkdir()
        report = wucme.rehearse(settings, wucme.Request("load"), wucme.REAL)
        assert [(one.title, one.state) for one in report.loads] == [(str(ledger), "owed")]
        assert report.loads[0].problem in "".join(log.held)

    # What is only for b.example is for no certificate of these.
    @pytest.mark.parametrize(("text", "load", "why"), [
        ("[a.example]\n", "$ true", "there is no certificate"), ("", "", "there is no certificate"),
        ("[x]\nnames = www.example.org\n", "", "the load list is empty"),
        ("[x]\nnames = www.example.org\n", "? 127.0.0.1:1 sni=b.example", "no item of the load list is for it")])
    def test_why_nothing_was_loaded(self, tmp_path: Path, log: wucme.Log, text: str, load: str, why: str) -> None:
        if "[x]" in text:
            put(tmp_path, "x")
        wucme.rehearse(set_up(tmp_path, f"[wucme]\nload = {load}\n{text}"), wucme.Request("load"), wucme.REAL)
        assert log.held[-1].endswith(f"nothing was loaded: {why}\n")


# --- 14. diagnosis -----------------------------------------------------------------------------

PUBLIC, OTHER = "1.1.1.1", "8.8.8.8"       # addresses that only stand in tables here: nothing is sent to them


def case(tmp_path: Path, *names: str, world: wucme.World = wucme.REAL,
         issuers: Mapping[str, Sequence[str]] | None = None, **settings: str) -> wucme.Case:
    """A certificate to be looked at."""
    found = wucme.read_settings(wucme.NOWHERE, {"directory": str(tmp_path), **settings})
    found, label = wucme.declare(found, names or ("a.example.test",), {})
    one = wucme.take_stock(found).entries[label]
    task = wucme.Task(wucme.wanted_names(one), one.wanted, (), 0.0, wucme.Answers(str(tmp_path)), world,
                      threading.Event(), "check")
    return wucme.Case(one, found, task, {}, issuers or {})


def told(findings: Iterable[wucme.Finding]) -> list[str]:
    """Findings as lines."""
    return [f"{one.level} {one.about}: {one.text}" for one in findings]


def site_map(pages: Mapping[tuple[str, str], tuple[int, str]]) -> Callable[[str, str, float], wucme.Response]:
    """A web of pages, by URL without the token and by address: status, and where it redirects to or what it says."""
    def visit(url: str, address: str, timeout: float) -> wucme.Response:
        start, _, token = url.rpartition("/")
        if (start, address) not in pages:
            raise wucme.NetworkError("Connection refused")
        status, text = pages[start, address]
        redirect = 300 <= status < 400
        return response(status, b"" if redirect else text.replace("TOKEN", token).encode(),
                        **({"Location": text.replace("TOKEN", token)} if redirect else {}))
    return visit


class TestDiagnosis:
    @pytest.mark.parametrize(("url", "address", "fault"), [
        ("http://b.example/x", OTHER, ""), ("https://b.example/", OTHER, ""), ("https://b.example:443/", OTHER, ""),
        ("http://b.example:443/", OTHER, ""), ("http://b.example:8080/", OTHER, "port 8080 is neither 80 nor 443"),
        ("ftp://b.example/", OTHER, "ftp is not http or https; port 0 is neither 80 nor 443"),
        ("http://192.168.1.86/", "192.168.1.86", "a private address, not a name; 192.168.1.86 is the private address "
                                                 "192.168.1.86"),
        (f"http://{OTHER}/", OTHER, "an address, not a name"),
        ("http://inner/", OTHER, "inner is no name of the public DNS"),
        ("http://b.example/", "10.0.0.1", "b.example is the private address 10.0.0.1"),
        ("http://[::1]/", "::1", "a private address, not a name; ::1 is no name of the public DNS; ::1 is the private "
                                 "address ::1"),
    ])
    def test_where_public_cas_are_not_redirected_to(self, url: str, address: str, fault: str) -> None:
        assert wucme.redirect_fault(url, address, PUBLIC) == fault

    def test_a_name_that_is_private_here_may_lead_to_another_one(self) -> None:
        assert wucme.redirect_fault("http://b.example/", "10.0.0.1", "10.0.0.2") == ""

    START = "http://a.example.test/.well-known/acme-challenge"

    @pytest.mark.parametrize(("pages", "line"), [
        ({(START, PUBLIC): (200, "TOKEN.check\n")}, f"ok a.example.test: {PUBLIC}: a token published now is answered"),
        ({(START, PUBLIC): (200, "TOKEN.other")},
         f"problem a.example.test: {PUBLIC}: not a token published now, but HTTP status 200 came; pass /.well-known/"),
        ({(START, PUBLIC): (404, "")},
         f"problem a.example.test: {PUBLIC}: not a token published now, but HTTP status 404"),
        ({}, f"note a.example.test: {PUBLIC}: port 80 gives no answer to this host: Connection refused; behind a "),
        ({(START, PUBLIC): (302, "https://b.example/x/TOKEN"), ("https://b.example/x", OTHER): (200, "TOKEN.check")},
         f"ok a.example.test: {PUBLIC}: a token published now is answered, redirected to https://b.example/x/"),
        ({(START, PUBLIC): (302, "http://192.168.1.86/TOKEN"),
          ("http://192.168.1.86", "192.168.1.86"): (200, "TOKEN.check")},
         f"problem a.example.test: {PUBLIC}, redirected to http://192.168.1.86/"),
        ({(START, PUBLIC): (301, "http://none.example/TOKEN")}, "problem a.example.test: "),
        ({(START, PUBLIC): (302, "https://b.example/x/TOKEN")},
         f"problem a.example.test: {PUBLIC}, redirected to https://b.example/x/"),
        ({(START, PUBLIC): (301, "http://[/TOKEN")}, "problem a.example.test: "),
        ({(START, PUBLIC): (302, "/.well-known/acme-challenge/TOKEN")}, "problem a.example.test: "),
    ])
    def test_the_token_is_looked_for_as_the_ca_looks(
            self, tmp_path: Path, pages: Mapping[tuple[str, str], tuple[int, str]], line: str) -> None:
        def resolve(host: str) -> list[str]:
            found = {"a.example.test": [PUBLIC], "b.example": [OTHER]}.get(host)
            if not found:
                raise wucme.NetworkError("the name does not resolve")
            return found

        world = wucme.REAL._replace(visit=site_map(pages), resolve=resolve)
        lines = told(wucme.about_reach(case(tmp_path, world=world)))
        assert len(lines) == 1
        assert lines[0].startswith(line)
        assert not list((tmp_path / "tokens").iterdir())

    def test_what_is_this_hosts_and_gives_no_answer_is_a_problem(self, tmp_path: Path) -> None:
        world = wucme.REAL._replace(visit=site_map({}), resolve=lambda _: ["127.0.0.1"])
        assert told(wucme.about_reach(case(tmp_path, world=world))) == [
            "problem a.example.test: 127.0.0.1: port 80 gives no answer: Connection refused; open it, or see who has "
            "it"]

    def test_no_token_is_tried_where_none_can_be(self, tmp_path: Path) -> None:
        assert told(wucme.about_reach(case(tmp_path, hook="uacme:/h"))) == []
        assert told(wucme.about_reach(case(tmp_path, challenge="dns-01"))) == []
        assert "no account key yet" in told(wucme.about_reach(case(tmp_path, stateless="yes")))[0]

    def test_where_the_names_lead(self, tmp_path: Path) -> None:
        def resolve(host: str) -> list[str]:
            if host == "none.example.test":
                raise wucme.NetworkError("the name does not resolve")
            return ["127.0.0.1", PUBLIC, "2001:db8::1"]

        one = case(tmp_path, "a.example.test", "none.example.test", world=wucme.REAL._replace(resolve=resolve))
        private = "(private: a public CA needs another one from its own DNS)"
        assert told(wucme.about_addresses(one)) == [
            f"ok a.example.test: 127.0.0.1 is this host's {private}",
            f"note a.example.test: {PUBLIC} is not this host's: right if it is a router's or front's that passes "
            "/.well-known/acme-challenge/ on to here",
            f"note a.example.test: 2001:db8::1 is not this host's {private}: right if it is a router's or front's that "
            "passes /.well-known/acme-challenge/ on to here",
            "problem none.example.test: the name does not resolve here: give it an A or AAAA record"]
        assert told(wucme.about_addresses(case(tmp_path, "*.a.example.test", challenge="dns-01"))) == []

    @pytest.mark.parametrize(("records", "name", "problem"), [
        ({}, "www.a.example", ""), ({"a.example.": ['0 issue "ca.test"']}, "www.a.example", ""),
        ({"a.example.": ['0 issue "CA.test; x=y"', '0 iodef "mailto:a@b"']}, "www.a.example", ""),
        ({"a.example.": ['0 issue "other.test"']}, "www.a.example",
         "CAA at a.example allows other.test, but letsencrypt is ca.test: change the record, or the server"),
        ({"a.example.": ['0 issue ";"']}, "a.example", "CAA at a.example allows no CA"),
        ({"www.a.example.": ['0 issue "ca.test"'], "a.example.": ['0 issue ";"']}, "www.a.example", ""),
        ({"www.a.example.": ['0 iodef "mailto:a@b"'], "a.example.": ['0 issue ";"']}, "www.a.example", ""),
        ({"a.example.": ['0 issue "ca.test"', '0 issuewild ";"']}, "a.example", ""),
        ({"a.example.": ['0 issue "ca.test"', '0 issuewild ";"']}, "*.a.example", "CAA at a.example allows no CA"),
        ({"a.example.": ['0 issue "ca.test"']}, "*.a.example", ""),
        ({"www.a.example.": ["elsewhere.test.", '0 issue ";"']}, "www.a.example", "CAA at www.a.example allows no CA"),
    ])
    def test_caa(self, tmp_path: Path, records: Mapping[str, list[str]], name: str, problem: str) -> None:
        def dig(argv: Sequence[str], *_: Any, **__: Any) -> wucme.Finished:
            return wucme.Finished("", list(records.get(argv[-1], [])))

        one = case(tmp_path, name, world=wucme.REAL._replace(command=dig), issuers={"letsencrypt": ["ca.test"]})
        lines = told(wucme.about_caa(one))
        assert lines == [] if not problem else lines[0].startswith(f"problem {name}: {problem}")

    def test_caa_without_dig_is_a_note(self, tmp_path: Path) -> None:
        world = wucme.REAL._replace(command=lambda *_, **__: wucme.Finished("cannot be run: No such file", []))
        assert told(wucme.about_caa(case(tmp_path, "a.example", "b.example", world=world)))[0].startswith(
            "note a.example: CAA records could not be looked up: dig CAA a.example.: cannot be run")

    def test_what_is_missing_on_this_host(self, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("#!/bin/sh\n")
        (tmp_path / "there").chmod(0o755)
        load = "\n".join([f"@{tmp_path}/there", f"@{tmp_path}/none x", "$ anything", "+nginx",
                          f"> {tmp_path}/{{name}}.pem", f"> {tmp_path}/none/x.pem", "> /x owner=nobody-at-all"])
        lines = told(wucme.about_loads(case(tmp_path, load=load)))
        assert lines == [
            f"problem a.example.test: load: @{tmp_path}/none x: {tmp_path}/none is not there, or cannot be executed",
            f"problem a.example.test: load: > {tmp_path}/none/x.pem: {tmp_path}/none is not there",
            "problem a.example.test: load: > /x owner=nobody-at-all: owner=nobody-at-all: no such user or group on "
            "this host"]
        assert told(wucme.about_loads(case(tmp_path)))[0].startswith("note a.example.test: the load list is empty")
        one = case(tmp_path, webroot=f"{tmp_path} {tmp_path}/none", hook=f"uacme:{tmp_path}/none",
                   nsupdate=f"{tmp_path}/k")
        assert [line.partition(": is not there")[0] for line in told(wucme.about_files(one))] == [
            f"problem a.example.test: {what}" for what in
            (f"webroot {tmp_path}/none", f"hook {tmp_path}/none", f"nsupdate {tmp_path}/k")]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root must be careful")
    def test_where_anyone_may_replace_a_procedure(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "open" / "x").write_text("")
        (tmp_path / "open" / "x").chmod(0o755)
        said = told(wucme.about_loads(case(tmp_path, load=f"@{tmp_path}/open/x")))[0]
        assert said.endswith(f"chmod o-w {tmp_path}/open")

    def test_all_that_is_missing_for_a_copy_is_told_apart(self, tmp_path: Path) -> None:
        one = case(tmp_path, load=f"> {tmp_path}/none/x.p12 what=p12 password_file={tmp_path}/secret")
        assert told(wucme.about_loads(one))[0].endswith(
            f": {tmp_path}/none is not there; {tmp_path}/secret is not there")

    def test_copies_that_overwrite_one_another_are_found(self, tmp_path: Path) -> None:
        settings = set_up(tmp_path, "[wucme]\nload = > /tmp/x.pem\n[a.example]\n[b.example]\n")
        with pytest.raises(wucme.SettingsError, match=r"would be written for a\.example and for b\."):
            next(wucme.diagnose(settings, wucme.Request("check"), wucme.REAL))

    def test_a_name_that_no_ca_takes_is_a_problem(self, tmp_path: Path) -> None:
        settings = set_up(tmp_path, "[wucme]\nserver = https://localhost:9/\nproxy = none\nload = @/nope\n"
                                    "listen = none\nchallenge = dns-01\nhook = uacme:/bin/true\n")
        directory = Path(settings.run.directory)
        now = datetime.now(timezone.utc)
        fakeca.make_pair(directory, "odd", ["1.2.3"], now - timedelta(1), now + timedelta(80))
        lines = told(wucme.diagnose(settings, wucme.Request("check"), wucme.REAL))
        assert (f"problem 1.2.3: {directory}/wucme_c_odd.pem: '1.2.3' is neither a host name nor an IP address; "
                "declare it, with names = ...") in lines
        assert "problem 1.2.3: load: @/nope: /nope is not there, or cannot be executed" in lines

    @pytest.mark.parametrize(("level", "text", "late"), [
        ("ok", "answers, and its clock agrees", 0),
        ("problem", "this host's clock is 3600 s ahead of the CA's: set it", 3600),
        ("problem", "this host's clock is 3600 s behind the CA's: set it", -3600)])
    def test_the_ca_and_its_clock(self, fake: fakeca.FakeCA, tmp_path: Path, level: str, text: str, late: int) -> None:
        settings = wucme.read_settings(wucme.NOWHERE, {"directory": str(tmp_path), "server": fake.url,
                                                       "ca_file": str(fake.ca_file), "agree": "yes"})
        issuers: dict[str, Sequence[str]] = {}
        world = wucme.REAL._replace(now=lambda: float(int(time.time())) + late)
        found = list(wucme.about_server(settings, fake.url, world, issuers))
        assert [one.level for one in found] == [level]
        assert text in re.sub(r"3(599|601)", "3600", found[0].text)
        assert issuers == {fake.url: ["fakeca.example"]}
        unasked = settings._replace(other_server=settings.other_server._replace(agree=False))
        assert told(wucme.about_server(unasked, fake.url, world, issuers))[1:] == [
            f"note {fake.url}: no account yet: the first order asks whether you agree to its terms (agree = yes)"]


# --- shape: what holds of the script as a whole ------------------------------------------------

SOURCE = SCRIPT.read_text("utf-8")
BANNER = re.compile(r"^# === (\d+)\. ([a-z ]+): .* =+$")
# What the code of a section may use besides its own and the head (0); types in annotations may be any above.
LAYERS: dict[int, tuple[str, set[int]]] = {
    1: ("errors", set()),
    2: ("world", {1}),
    3: ("files", {1}),
    4: ("pem", {1}),
    5: ("settings", {1, 3, 4}),
    6: ("inventory", {1, 3, 4}),
    7: ("plan", {4, 6}),
    8: ("challenges", {1, 2, 3, 4, 5}),
    9: ("acme", {1, 2, 4, 7, 8}),
    10: ("store", {1, 3, 4, 6}),
    11: ("load", {1, 2, 3, 4, 5}),
    12: ("report", {1, 7}),
    13: ("run", set(range(1, 13))),
    14: ("diagnosis", set(range(1, 14))),
    15: ("uacme", set(range(1, 15))),
    16: ("command line", set(range(1, 16))),
}


class Part(NamedTuple):
    """A top-level statement of the script, and the number of its section."""
    section: int
    node: ast.stmt


def parts() -> list[Part]:
    """The top-level statements, each with its section."""
    starts = [(line, int(match[1])) for line, text in enumerate(SOURCE.splitlines(), 1)
              if (match := BANNER.match(text))]
    return [Part(max(((line, number) for line, number in starts if line < node.lineno), default=(0, 0))[1], node)
            for node in ast.parse(SOURCE, feature_version=(3, 9)).body]


PARTS = parts()


def bound(node: ast.stmt) -> set[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


class Bare(ast.NodeTransformer):
    """Takes the annotations away."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def globals_of(table: symtable.SymbolTable) -> set[str]:
    """The global names that a piece of code uses, by Python's own rules of scope."""
    own = {one.get_name() for one in table.get_symbols() if one.is_referenced() and one.is_global()}
    return own.union(*(globals_of(child) for child in table.get_children()))


class Use(NamedTuple):
    """The global names that a section uses in its code, and in its annotations."""
    section: int
    code: set[str]
    annotations: set[str]


@cache
def uses() -> list[Use]:
    """What every top-level statement uses."""
    found = []
    for section, node in parts():
        notes = [getattr(one, place, None) for one in ast.walk(node) for place in ("annotation", "returns")]
        named = {one.id for note in notes if note for one in ast.walk(note) if isinstance(one, ast.Name)}
        bare = ast.fix_missing_locations(Bare().visit(node))
        found.append(Use(section, globals_of(symtable.symtable(ast.unparse(bare), "part", "exec")), named))
    return found


HOME = {name: part.section for part in PARTS for name in bound(part.node)}


def calls(section: Callable[[int], bool], *names: str) -> list[str]:
    """Where one of these is called in certain sections."""
    return [f"line {node.lineno}: {ast.unparse(node.func)}" for part in PARTS if section(part.section)
            for node in ast.walk(part.node) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


class TestShape:
    def test_the_sections_are_those_of_the_floor_plan_in_order(self) -> None:
        banners = [(int(match[1]), match[2]) for line in SOURCE.splitlines() if (match := BANNER.match(line))]
        assert banners == [(number, name) for number, (name, _) in LAYERS.items()]
        assert len(SOURCE.split("\n# === ")) == len(LAYERS) + 1

    def test_the_manual_lists_them_in_reading_order(self) -> None:
        listed = (wucme.__doc__ or "").partition("READING ORDER\n")[2]
        found = re.findall(r"(?<!\S)(\d+) ([a-z]+(?: [a-z]+)*)", listed)
        assert [(int(number), name) for number, name in found] == [(one, name) for one, (name, _) in LAYERS.items()]

    @pytest.mark.parametrize("section", LAYERS)
    def test_a_section_uses_only_what_its_row_names(self, section: int) -> None:
        allowed = {0, section} | LAYERS[section][1]
        assert {name: LAYERS[HOME[name]][0] for use in uses() if use.section == section
                for name in use.code if HOME.get(name, section) not in allowed} == {}

    def test_names_come_from_above_annotations_included(self) -> None:
        assert [(use.section, name) for use in uses() for name in use.code | use.annotations
                if use.section and HOME.get(name, 0) > use.section] == []

    def test_no_name_is_defined_twice(self) -> None:
        names = [name for part in PARTS if isinstance(part.node, (ast.FunctionDef, ast.ClassDef))
                 for name in bound(part.node)]
        assert len(names) == len(set(names)) > 100

    def test_only_the_last_sections_print(self) -> None:
        assert calls(lambda section: section not in (13, 16), "print") == []
        assert calls(lambda section: section in (13, 16), "print")

    def test_only_files_opens_files_but_for_the_readers_of_proc(self) -> None:
        openers = ("open", "os.open", "io.open", "os.fdopen", "tempfile.mkstemp")
        assert len(calls(lambda section: section == 2, *openers)) == 1
        assert calls(lambda section: section not in (2, 3), *openers) == []

    def test_only_world_and_challenges_touch_processes_and_network(self) -> None:
        outside = {"subprocess", "socket", "http", "ssl", "socketserver"}
        text = "".join(f"{part.section} {ast.unparse(part.node)}\n" for part in PARTS if part.section not in (0, 2, 8))
        assert re.findall(rf"(?m)^.*\b(?:import|from) (?:{'|'.join(outside)})\b.*$", text) == []
        assert [use for use in uses() if use.section not in (0, 2, 8) and use.code & outside] == []

    def test_the_head_says_what_it_needs(self) -> None:
        block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SOURCE)
        assert block
        lines = (line[2:].partition(" = ") for line in block["content"].splitlines())
        found = {key: ast.literal_eval(value) for key, _, value in lines}
        assert found == {"requires-python": ">=3.9", "dependencies": ["cryptography>=3.4.8"]}

    def test_the_shipped_ini_is_the_example(self) -> None:
        assert (SCRIPT.parent / "wucme.ini").read_text("utf-8") == wucme.example_ini()

    def test_what_the_readme_says_is_backed_by_tests_that_there_are(self) -> None:
        named = re.findall(r"`(test_\w+)`", (SCRIPT.parent / "README.md").read_text("utf-8"))
        mine = Path(__file__).read_text("utf-8")
        assert [name for name in named if f"    def {name}(" not in mine] == []
        assert len(named) > 30

    def test_an_idle_run_imports_nothing_heavy(self, tmp_path: Path) -> None:
        now, key = time.time(), new_key()
        put(tmp_path, "x", INTERMEDIATE.issue(key, "a.example", now=now), key)
        wucme.remember(str(tmp_path), look(tmp_path), ask_at=time.time() + DAY)
        (tmp_path / "w.ini").write_text(f"[wucme]\ndirectory = {tmp_path}\nserver = https://ca.test:14000/dir\n")
        code = ("import sys, wucme; status = wucme.main(sys.argv[1:]); heavy = ('cryptography', 'ssl', 'http', "
                "'urllib', 'logging', 'dataclasses', 'subprocess', 'asyncio', 'socket', 'argparse', 'threading', "
                # Python 3.9's own importlib.util has typing.
                "*['typing'][sys.version_info < (3, 10):]); "
                "print(status, [name for name in heavy if name in sys.modules])")
        done = subprocess.run(
            [sys.executable, "-c", code, "--ini", tmp_path / "w.ini", "run", "--backups=2"], capture_output=True,
            text=True, check=True, cwd="/",
            env={**ENVIRONMENT, "PYTHONPATH": str(BUILT), "PYTHONDONTWRITEBYTECODE": "1"})
        assert (done.stdout, done.stderr) == ("0 []\n", "")
        assert "1 certs, 0 renewed, 0 failed" in (tmp_path / "wucme.log").read_text()

    def test_an_idle_run_looks_once_at_each_file_of_a_certificate(self, tmp_path: Path) -> None:
        code = textwrap.dedent("""
            import collections, json, os, sys, wucme
            made = collections.Counter()
            def counted(name, call):
                return lambda *args, **more: made.update([name]) or call(*args, **more)
            for name in ("open", "read", "close", "stat", "lstat", "fstat", "unlink", "rename", "replace", "fsync"):
                setattr(os, name, counted(name, getattr(os, name)))
            status = wucme.main(sys.argv[1:])
            print(json.dumps([status, made]))
            """)
        (tmp_path / "w.ini").write_text(f"[wucme]\ndirectory = {tmp_path}\nload = > /{{name}}\n")
        ledger, seen = wucme.Ledger(str(tmp_path), "alpha"), []
        for name in ("a", "b"):
            put(tmp_path, name)
            entry = wucme.remember(str(tmp_path), look(tmp_path, name), ask_at=time.time() + DAY)
            ledger.strike(entry, "> /{name}", "", NOW)
            ledger.save()
            done = subprocess.run(
                [sys.executable, "-c", code, "--ini", tmp_path / "w.ini", "--host", "alpha", "--renew", "never"],
                capture_output=True, text=True, check=True, cwd="/",
                env={**ENVIRONMENT, "PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"})
            status, made = json.loads(done.stdout)
            assert (status, done.stderr) == (0, "")
            seen.append(collections.Counter(made))
        # The state is read; for chain and key it is enough to see that they have not changed, and whose they are.
        assert seen[1] - seen[0] == {"open": 1, "fstat": 1, "read": 1, "close": 1, "lstat": 2}


# === Run: the script as a process, against CAs that are real or hostile ========================

class Done(NamedTuple):
    """How a run of the script ended."""
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it logged, without the time stamps."""
        return [line.partition(": ")[2] for line in self.err.splitlines()]


HOSTS: list[Host] = []      # all that there were


class Host:
    """A host as the script sees it: a home, an ini, a directory."""

    def __init__(self, home: Path, server: str = "", ca_file: object = "", listen: str = "none") -> None:
        self.home, self.directory, self.ini = home, home / "certificates", home / "wucme.ini"
        self.directory.mkdir()
        self.settings = {"directory": str(self.directory), "server": server, "ca_file": str(ca_file), "agree": "yes",
                         "listen": listen, "host": "alpha", "lock_wait": "20s"}
        self.within: Sequence[str] = ()         # a command that the script is started by
        # No CA but those of the tests can be reached, whatever an ini names.
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1",
                            "https_proxy": "http://127.0.0.1:9", "no_proxy": "localhost,127.0.0.1"}
        self.said = ""
        HOSTS.append(self)
        self.write()

    def write(self, *load: str, sections: str = "", **changes: str) -> None:
        """Write the ini: these load items, these changes, these further sections."""
        texts = {**self.settings, **changes}
        items = "".join(f"\n    {item}" for item in load)
        self.ini.write_text("[wucme]\n" + "".join(f"{key} = {text}\n" for key, text in texts.items() if text)
                            + (f"load ={items}\n" if load else "") + textwrap.dedent(sections))

    def command(self, *arguments: object) -> list[str]:
        """The command line of a run with this ini."""
        return [*self.within, sys.executable, "-W", "error", COMPILED, "--ini", str(self.ini), *map(str, arguments)]

    def run(self, *arguments: object, **environment: str) -> Done:
        """Run the script to its end, as cron would."""
        done = subprocess.run(self.command(*arguments), env={**self.environment, **environment}, cwd=self.home,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False)
        result = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        self.said += result.out + result.err
        assert "Traceback" not in result.err
        return result

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start the script, to be ended by the test."""
        return subprocess.Popen(self.command(*arguments), env=self.environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def chain(self, name: str = "a.example.test") -> Path:
        """The chain file of a certificate."""
        return self.directory / f"wucme_c_{name}.pem"

    def key(self, name: str = "a.example.test") -> Path:
        """The key file of a certificate."""
        return self.directory / f"wucme_k_{name}.pem"

    def pair(self, name: str = "a.example.test") -> tuple[bytes, bytes]:
        """Both live files, which must fit."""
        chain, key = self.chain(name).read_bytes(), self.key(name).read_bytes()
        assert wucme.facts(chain).key == wucme.key_hash(wucme.parse_key(key).public_key())
        return chain, key

    def old_pair(self, *names: str, days: float = 5, stem: str = "") -> tuple[bytes, bytes]:
        """Put a certificate there that is near its end."""
        now = datetime.now(timezone.utc)
        found = fakeca.make_pair(self.directory, stem or names[0], list(names), now - timedelta(85),
                                 now + timedelta(days))
        return found[0].read_bytes(), found[1].read_bytes()

    def left(self) -> set[str]:
        """What is in the directory that no finished run should leave."""
        return {path.name for path in self.directory.rglob("*") if path.name.endswith("_tmp")
                or path.parent.name == "tokens"}


def in_world(host: Host, changes: str, *arguments: object) -> Done:
    """Run the script in a changed world: expressions in which `real()` is the true time and `asked` a counter."""
    code = ("import itertools, sys, time, wucme\nreal, asked = time.time, itertools.count()\n"
            f"sys.exit(wucme.main(sys.argv[1:], wucme.REAL._replace({changes})))")
    environment = {**host.environment, "PYTHONPATH": str(BUILT)}
    done = subprocess.run([sys.executable, "-c", code, "--ini", str(host.ini), *map(str, arguments)], env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False)
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def by_clock(host: Host, now: str, *arguments: object) -> Done:
    """Run the script with another clock."""
    return in_world(host, f"now=lambda: {now}", *arguments)


HASTE = "sleep=lambda seconds: time.sleep(seconds / 20)"      # for tests in which there is nothing to wait for


def secrets_of(directory: Path) -> set[str]:
    """The private keys and MAC keys in the files of a directory, in every form in which one might be told."""
    found = set()
    for path in (path for path in directory.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20):
        content = path.read_bytes()
        found |= {content.decode().strip()} if path.name == "mac" else set()
        for block in wucme.blocks(content, "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"):
            found |= {line for line in block.decode("ascii", "replace").splitlines()[1:-1] if len(line) > 20}
            with contextlib.suppress(wucme.PemError):
                numbers: Any = wucme.parse_key(block).private_numbers()
                secret = getattr(numbers, "private_value", 0) or numbers.d
                found |= {str(secret), f"{secret:x}", wucme.base64url(secret.to_bytes(512, "big").lstrip(b"\0"))}
    return found


def told_secrets(host: Host) -> list[str]:
    """Where a secret of a host is written that is not a file for it."""
    told = {"its output": host.said, **{str(path): path.read_text("utf-8", "replace") for path in host.home.rglob("*")
                                        if path.is_file() and re.search(r"\.(log|json|lock|told)(_tmp)?$", path.name)}}
    return [f"{where}: {secret[:12]}..." for secret in secrets_of(host.home) for where, text in told.items()
            if secret in text]


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_told() -> Iterator[None]:
    """Compares, when all tests are over, all that was logged and printed with all keys that there were."""
    gc.freeze()         # what is there before the tests is no rubbish: to look for that takes a tenth of a second
    yield
    assert [told for host in HOSTS for told in told_secrets(host)] == []


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a directory: its mode and content."""
    return {str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in sorted(directory.rglob("*"))}


@pytest.fixture(scope="session")
def pebble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testbed.Pebble]:
    """The test CA, one for all tests."""
    with testbed.Pebble(tmp_path_factory.mktemp("pebble"), binaries=testbed.pebble_binaries()) as ca:
        yield ca


@pytest.fixture
def host(pebble: testbed.Pebble, tmp_path: Path) -> Host:
    """A host whose CA is pebble."""
    return Host(tmp_path, pebble.directory_url, pebble.ca_file, f"127.0.0.1:{pebble.http_port}")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[fakeca.FakeCA]:
    """A CA that can be told to misbehave."""
    with fakeca.FakeCA(tmp_path, testbed.free_ports(1)[0]) as ca:
        yield ca
    assert not ca.faults


@pytest.fixture
def lab(fake: fakeca.FakeCA, tmp_path: Path) -> Host:
    """A host whose CA is the fake one."""
    return Host(tmp_path, fake.url, fake.ca_file, f"127.0.0.1:{fake.http_port}")


def orders(fake: fakeca.FakeCA) -> int:
    """How many orders a CA was asked for."""
    return sum(path == "/new-order" for _, path, _ in fake.requests)


@pytest.mark.pebble
@pytest.mark.process
class TestPebble:
    """The main job against pebble."""

    def test_first_certificate_without_ini(self, host: Host, pebble: testbed.Pebble) -> None:
        host.ini.unlink()
        arguments = ["--agree", "--server", pebble.directory_url, "--ca-file", pebble.ca_file, "--directory",
                     host.directory, "--listen", f"127.0.0.1:{pebble.http_port}"]
        done = host.run("issue", "a.example.test", "B.example.test.", *arguments)
        assert done.status == 0, done.err
        chain, _ = host.pair()
        assert wucme.facts(chain).names == ("a.example.test", "b.example.test")
        assert len(wucme.certificates(chain)) == 2
        assert f"certificate: {host.chain()}" in done.out
        assert "the load list is empty" in done.out
        assert (mode(host.chain()), mode(host.key())) == (0o644, 0o600)
        assert [mode(path) for path in host.directory.glob("wucme_k_account*.pem")] == [0o600]
        assert f"listen = 127.0.0.1:{pebble.http_port}" in host.ini.read_text()
        assert host.run("renew", "--force").status == 0, "the ini that was written serves the renewal"
        assert not host.left()

    def test_terms_are_asked_for_at_a_terminal(self, host: Host) -> None:
        host.write(agree="no")
        refused = host.run("issue", "a.example.test")
        assert refused.status == 1
        assert "terms of service at" in refused.err
        assert "--agree" in refused.err
        said = at_terminal(host.command("issue", "a.example.test"), host, {b"[y/N] ": b"y\n"})
        assert "do you agree" in said.lower()
        assert "1 renewed, 0 failed" in said
        host.pair()

    def test_nothing_due(self, host: Host, pebble: testbed.Pebble) -> None:
        assert host.run("issue", "a.example.test").status == 0
        assert host.run() == Done(0, "", ""), "asks once when to renew"
        before, files = pebble.log(), snapshot(host.directory)
        assert host.run() == Done(0, "", "")
        assert pebble.log() == before
        assert set(snapshot(host.directory)) == set(files)
        said = at_terminal(host.command(), host)
        assert "expires: 89 renew: 59" in said
        assert "1 certs, 0 renewed, 0 failed" in said

    def test_forced_renewal_keeps_the_key(self, host: Host, pebble: testbed.Pebble) -> None:
        host.run("issue", "a.example.test")
        old_chain, old_key = host.pair()
        host.chain().chmod(0o640)
        done = host.run("renew", "a.example.test", "--force")
        chain, key = host.pair()
        assert done.status == 0
        assert chain != old_chain
        assert key == old_key
        backups = list(host.directory.glob("wucme_c_*.pem_*"))
        assert [path.read_bytes() for path in backups] == [old_chain]
        assert re.fullmatch(r".*\.pem_\d{16}", str(backups[0]))
        assert mode(host.chain()) == 0o640
        assert any(line.startswith("backed up") and line.endswith(backups[0].name) for line in done.lines)
        assert verifies(chain, pebble.root(), "a.example.test")

    def test_backups_are_pruned(self, host: Host) -> None:
        host.run("issue", "a.example.test")
        for _ in range(4):
            assert host.run("renew", "--force", "--backups", "2").status == 0
        assert len(list(host.directory.glob("wucme_c_*.pem_*"))) == 2

    def test_the_seed_transaction(self, host: Host, tmp_path: Path) -> None:
        now = datetime.now(timezone.utc)
        fakeca.make_pair(host.directory, "x", ["x86vms.domain.net"], now - timedelta(61),
                         now + timedelta(days=28, hours=23))
        old = {kind: (host.directory / f"wucme_{kind}_x.pem").rename(
            host.directory / f"WUCME_{kind.upper()}_X86VMS_DOMAIN_NET.PEM") for kind in "ck"}
        chain, key = old["c"].read_bytes(), old["k"].read_bytes()
        (host.directory / "wucme_k_account.pem").write_bytes(fakeca.key_pem(fakeca.make_key()))
        for number in range(190):
            (host.directory / f"WASD_CONFIG_{number}.CONF").write_text("# copied\n")
        mail = tmp_path / "pmdf"
        mail.mkdir()
        procedure = tmp_path / "wasd_cert_to_pmdf.sh"
        procedure.write_text(f'#!/bin/sh\nset -e\numask 022\ncp "$WUCME_CERT" {mail}/MAIL-PUB.PEM\n'
                             f'chmod 644 {mail}/MAIL-PUB.PEM\nrm -f {mail}/MAIL-PRIV.PEM\n'
                             f'(umask 077; cp "$WUCME_KEY" {mail}/MAIL-PRIV.PEM)\n'
                             f'echo "restarted for $WUCME_NAMES" | tee -a {mail}/restarts\n')
        procedure.chmod(0o755)
        host.write("+", f"@{procedure}", renew="30")
        done = host.run()
        assert done.status == 0, done.err
        assert done.lines[-1] == "193 files, 1 certs, 1 renewed, 0 failed"
        assert any("expires: 28 renew: -1" in line and line.startswith("x86vms.domain.net !before: ")
                   for line in done.lines)
        name = str(old["c"])
        steps = ["certificate management", name, f"loading key from {host.directory}/wucme_k_account.pem",
                 "making or finding the account at ", "account location: ",
                 "x86vms.domain.net: creating new order", "x86vms.domain.net: order URL: ",
                 "x86vms.domain.net: retrieving authorization", "x86vms.domain.net: starting challenge",
                 "x86vms.domain.net: polling order status", "x86vms.domain.net: finalizing order",
                 "x86vms.domain.net: retrieving certificate", f"saving certificate to {name}_tmp",
                 f"reading private key {old['k']}", f"backed up {name} as {name}_",
                 f"renaming {name}_tmp to {name}", "wuCME successful x86vms.domain.net renewal",
                 "load succeeded: + (", f"load succeeded: @{procedure} ("]
        assert [step for step in steps if in_turn(step, done.lines, steps)] == steps
        assert "fetching directory at " in done.err         # beside what is done here
        assert old["k"].read_bytes() == key
        assert old["c"].read_bytes() != chain
        assert wucme.facts(old["c"].read_bytes()).names == ("x86vms.domain.net",)
        assert (mail / "MAIL-PUB.PEM").read_bytes() == old["c"].read_bytes()
        assert (mode(mail / "MAIL-PUB.PEM"), mode(mail / "MAIL-PRIV.PEM")) == (0o644, 0o600)
        assert (mail / "restarts").read_text() == "restarted for x86vms.domain.net\n"
        assert [path.read_bytes() for path in host.directory.glob("WUCME_C_*.PEM_*")] == [chain]

    def test_several_certificates_one_of_them_refused(self, host: Host, tmp_path: Path) -> None:
        host.write(f"$ echo $WUCME_NAME >> {tmp_path}/loaded", sections="""
            [one.example.test]
            [two.example.test]
            names = two.example.test www.two.example.test
            [blocked-domain.example]
            [127.0.0.1]
            """)
        done = host.run()
        assert done.status == 1
        assert sorted((tmp_path / "loaded").read_text().split()) == ["127.0.0.1", "one.example.test",
                                                                    "two.example.test"]
        failures = [line for line in done.lines if "failed: " in line]
        assert len(failures) == 1
        assert failures[0].startswith("blocked-domain.example: failed: rejectedIdentifier: ")
        assert "this CA gives no certificate for such a name" in failures[0]
        assert done.lines[-1] == "0 files, 4 certs, 3 renewed, 1 failed"
        assert wucme.facts(host.chain("127.0.0.1").read_bytes()).names == ("127.0.0.1",)
        again = host.run()
        assert (again.status, again.err) == (1, ""), "the same failure is not told twice"

    def test_name_that_nobody_answers_for(self, host: Host, pebble: testbed.Pebble) -> None:
        host.write(listen=f"127.0.0.1:{testbed.free_ports(1)[0]}")
        done = host.run("issue", "a.example.test")
        assert done.status == 1
        assert "a.example.test: failed: a.example.test: connection: " in done.err
        assert "port 80 of the name must lead to the listener" in done.err
        assert not host.left()

    def test_changes_of_the_settings_are_due(self, host: Host) -> None:
        host.run("issue", "a.example.test")
        host.write(sections="[a.example.test]\nnames = a.example.test c.example.test\n")
        done = host.run()
        assert "due: its names are now a.example.test c.example.test" in done.err
        assert wucme.facts(host.pair()[0]).names == ("a.example.test", "c.example.test")
        old_key = host.pair()[1]
        host.write(sections="[a.example.test]\nnames = a.example.test c.example.test\nkey = ecdsa-p384\n")
        assert "due: its key should be ecdsa-p384, and is ecdsa-p256" in host.run().err
        chain, key = host.pair()
        assert wucme.facts(chain).kind == "ecdsa-p384"
        assert key != old_key
        assert not host.key().is_symlink()
        assert host.run().err == ""

    def test_rotation_and_back(self, host: Host) -> None:
        host.run("issue", "a.example.test")
        first = host.pair()[1]
        host.write(rotate="yes")
        host.run("renew", "--force")
        second = wucme.private_key(host.pair()[1])
        assert host.key().is_symlink()
        assert mode(host.chain()) == 0o600
        assert second != first
        host.run("renew", "--force")
        third = wucme.private_key(host.pair()[1])
        assert third != second
        host.write()
        host.run("renew", "--force")
        assert host.pair()[1] == third, "without rotate the key stays"
        assert not host.key().is_symlink()
        assert wucme.private_key(host.chain().read_bytes()) == b""
        assert (mode(host.chain()), mode(host.key())) == (0o644, 0o600)

    def test_lost_key_and_spoilt_chain_are_repaired(self, host: Host) -> None:
        host.write(sections="[a.example.test]\n")
        host.run()
        host.key().unlink()
        assert "renewed, 0 failed" in host.run().err
        host.pair()
        host.chain().write_bytes(host.chain().read_bytes()[:300])
        assert host.run().status == 0
        host.pair()

    def test_no_secret_is_logged(self, host: Host) -> None:
        done = host.run("issue", "a.example.test", "--verbose")
        log = (host.directory / "wucme.log").read_text() + done.err + done.out
        for path in (host.key(), host.directory / "wucme_k_account.pem"):
            for line in path.read_text().splitlines()[1:-1]:
                assert line not in log
        assert mode(host.directory / "wucme.log") == 0o600

    @pytest.mark.parametrize("nonces", [50])
    def test_many_nonces_are_refused(self, tmp_path: Path, nonces: int) -> None:
        with testbed.Pebble(tmp_path / "pebble", binaries=testbed.pebble_binaries(), nonce_reject=nonces,
                            retry_after=(1, 1)) as ca:
            host = Host(tmp_path, ca.directory_url, ca.ca_file, f"127.0.0.1:{ca.http_port}")
            assert host.run("issue", "a.example.test", "b.example.test").status == 0
            host.pair()


def at_terminal(command: Sequence[str], host: Host, answers: Mapping[bytes, bytes] | None = None) -> str:
    """Run a command at a terminal, answering what it asks; what it printed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], list(command), host.environment)      # noqa: S606 - the point is the terminal
    said, left = b"", dict(answers or {})
    with contextlib.suppress(OSError):      # the terminal is gone when the command is
        while data := os.read(terminal, 4096):
            said += data
            for question in [question for question in left if question in said]:
                os.write(terminal, left.pop(question))
    os.close(terminal)
    os.waitpid(pid, 0)
    return said.decode()


def in_turn(step: str, lines: Sequence[str], steps: Sequence[str]) -> bool:
    """Whether a step stands among the lines, after all steps before it."""
    at = -1
    for one in steps[:steps.index(step) + 1]:
        at = next((number for number, line in enumerate(lines) if number > at and line.startswith(one)), len(lines))
    return at < len(lines)


def verifies(chain: bytes, root: bytes, name: str) -> bool:
    """Whether a TLS client that trusts the root takes the chain (by its signatures and dates)."""
    certificates = [x509.load_pem_x509_certificate(pem) for pem in [*wucme.certificates(chain), root]]
    return name in wucme.facts(chain).names and all(
        wucme.issued_by(one, issuer) for one, issuer in zip(certificates, certificates[1:]))


REFUSED = {     # each misbehaviour of a CA, and what the one line about it must say
    "html_directory": "no JSON object came",
    "empty_directory": "no JSON object came",
    "null_directory": "no JSON object came",
    "list_directory": "no JSON object came",
    "utf16_directory": "not an https URL of its own host",
    "deep_directory": "no JSON object came",
    "endless_body": "more than 1 MiB",
    "cut_body": "",
    "redirect_http": "redirects to http://",
    "redirect_file": "redirects to file:///etc/passwd",
    "redirect_loop": "redirects are not followed",
    "directory_http_urls": "not an https URL of its own host",
    "directory_file_urls": "not an https URL",
    "directory_other_host": "not an https URL of its own host",
    "error_500_html": "HTTP status 500",
    "bad_nonce_for_ever": "badNonce",
    "rate_limited": "rateLimited: too many certificates",
    "problem_escapes": "rejectedIdentifier: \\x1b[31mred",
    "subproblems": "a.example.test: ",
    "order_invalid_at_finalize": "",
    "order_other_names": "the CA made an order for other.example",
    "no_authorizations": "authorizations for 2 names",
    "many_authorizations": "authorizations for 2 names",
    "authz_other_host": "not an https URL of its own host",
    "finalize_other_host": "not an https URL",
    "authz_other_name": "an authorization for 'other.example', not asked for",
    "challenge_http_url": "not an https URL",
    "challenge_file_url": "not an https URL",
    "challenge_other_host": "not an https URL",
    "no_challenges": "the CA offers nothing known here",
    "token_traversal": "a token that is none: '../../etc/x'",
    "token_absolute": "a token that is none",
    "token_newline": "a token that is none",
    "token_nul": "a token that is none",
    "token_shell": "a token that is none",
    "token_escape": "a token that is none",
    "token_empty": "a token that is none",
    "token_number": "a token that is none",
    "token_long": "a token that is none",
    "location_missing": "as its order",
    "no_certificate_url": "gives no certificate",
    "no_nonce": "gave no nonce",
    "nonce_huge": "gave no nonce",
    "cert_other_key": "is for another key",
    "cert_other_name": "lacks a.example.test",
    "cert_missing_name": "lacks b.example.test",
    "cert_no_san": "lacks a.example.test",
    "cert_is_ca": "is a CA's",
    "cert_expired": "not valid now",
    "cert_not_yet": "is the clock of this host right?",
    "chain_reversed": "is a CA's",
    "chain_unlinked": "was not issued by the next",
    "chain_with_key": "more than certificates (PRIVATE KEY)",
    "cert_html": "no certificate",
    "cert_empty": "no certificate",
    "cert_der": "no certificate",
    "cert_cut": "no certificate",
    "cert_nul": "not a certificate",
    "cert_huge": "more than 1 MiB",
}
HARMLESS = ["bad_nonce_once", "account_gone", "no_meta", "no_renewal_info", "cert_extra_name", "cert_crlf",
            "cert_content_type"]


def test_the_whole_job_on_this_python(fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
    lab.write(f"$ echo $WUCME_NAME >> {tmp_path}/loaded", rotate="yes", key="rsa-2048")
    assert lab.run("issue", "a.example.test", "127.0.0.1").status == 0
    assert lab.run("renew", "--force", "--key", "ecdsa-p384").status == 0
    assert wucme.facts(lab.pair()[0]).kind == "ecdsa-p384"
    assert (tmp_path / "loaded").read_text() == "a.example.test\na.example.test\n"
    assert lab.run() == Done(0, "", "")


@pytest.mark.process
class TestCertificationAuthority:
    """What a CA may do to us, and what it may not."""

    @pytest.mark.parametrize("misdeed", REFUSED)
    def test_refused_in_one_line(self, misdeed: str, fake: fakeca.FakeCA, lab: Host) -> None:
        before = lab.old_pair("a.example.test", "b.example.test")
        fake.misbehave(misdeed)
        done = lab.run()
        failures = [line for line in done.lines if line.startswith("a.example.test: failed: ")]
        assert (done.status, len(failures)) == (1, 1), done.err
        assert REFUSED[misdeed] in failures[0]
        assert failures[0].isprintable()
        assert len(failures[0]) < 1000
        assert lab.pair() == before
        assert not [name for name in lab.left() if name.startswith("wucme_c") or "_" not in name]
        assert not fake.strangers
        assert len(fake.requests) < 60
        fake.misbehave()
        assert lab.run("renew", "a.example.test", "--force").status == 0, "the next run heals"
        assert lab.pair() != before
        assert not lab.left()

    def test_taken_as_it_comes(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test", "b.example.test")
        for misdeed in HARMLESS:
            before = lab.pair()
            (lab.directory / "wucme_s_account.json").unlink()       # or no directory would be asked for
            fake.misbehave(misdeed)
            done = lab.run("renew", "--force")
            assert (done.status, lab.pair() == before) == (0, False), (misdeed, done.err)
            assert b"\r" not in lab.pair()[0]
            assert lab.run() == Done(0, "", ""), misdeed
            ordered = [payload for _, path, payload in fake.requests if path == "/new-order"][-1]
            assert ("replaces" in ordered) is (misdeed != "no_renewal_info")

    @pytest.mark.parametrize("misdeed", ["drip", "silent@finalize"])
    def test_one_request_has_a_deadline(self, misdeed: str, fake: fakeca.FakeCA, lab: Host) -> None:
        before = lab.old_pair("a.example.test")
        fake.misbehave(misdeed)
        begun = time.monotonic()
        done = lab.run("--timeout", "1s")
        assert "no whole answer within 1 s" in done.err
        assert time.monotonic() - begun < 20
        assert lab.pair() == before

    @pytest.mark.parametrize("misdeed", ["order_pending_for_ever", "order_processing_for_ever"])
    def test_unfinished_order_is_taken_up_again(self, misdeed: str, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave(misdeed)
        done = lab.run("--deadline", "1s", "--rotate")
        assert "until the deadline; a later run goes on with it" in done.err
        fake.misbehave()
        done = lab.run("--rotate")
        assert done.status == 0, done.err
        assert "taking up the order" in done.err
        assert orders(fake) == 1
        assert lab.key().is_symlink()
        assert not lab.left()

    def test_unreachable(self, lab: Host) -> None:
        before = lab.old_pair("a.example.test")
        lab.write(server=f"https://127.0.0.1:{testbed.free_ports(1)[0]}/directory")
        done = lab.run()
        assert (done.status, lab.pair()) == (1, before)
        assert "Connection refused" in done.err

    def test_untrusted(self, lab: Host) -> None:
        lab.old_pair("a.example.test")
        lab.write(ca_file="")
        assert "set ca_file to the certificate that signed it" in lab.run().err
        lab.write(ca_file="/nonexistent/ca.pem")
        assert "ca_file /nonexistent/ca.pem" in lab.run().err

    def test_account_is_found_again_by_its_key(self, fake: fakeca.FakeCA, lab: Host) -> None:
        assert lab.run("issue", "a.example.test", "--contact", "me@example.test").status == 0
        (lab.directory / "wucme_s_account.json").unlink()
        lab.write(agree="no")
        assert lab.run("renew", "--force").status == 0
        assert len(fake.accounts) == 1

    def test_requests_of_one_renewal(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        fake.requests.clear()
        before = fake.connections
        assert lab.run("renew", "--force").status == 0
        paths = [path.split("/")[1] for _, path, _ in fake.requests]
        assert [path for path, _ in itertools.groupby(paths)] == [
            "new-nonce", "new-order", "authz", "challenge", "order", "finalize", "cert"]
        assert fake.connections - before == 1

    @pytest.mark.parametrize(("change", "used"), [
        (lambda known, _: known, True), (lambda known, _: {**known, "at": known["at"] - 86300}, True),
        (lambda known, _: {**known, "at": known["at"] - 86401}, False),
        (lambda known, _: {**known, "at": known["at"] + 60}, False), (lambda known, _: {**known, "at": "x"}, False),
        (lambda known, url: {**known, "directory": {**known["directory"], "newNonce": f"{url}/moved"}}, False),
        (lambda known, _: {**known, "directory": {**known["directory"], "newNonce": "https://evil.test/"}}, False),
        (lambda known, _: {**known, "directory": {}}, False), (lambda *_: [7], False), (lambda *_: None, False),
    ])
    def test_a_directory_is_used_for_a_day_while_it_holds(
            self, fake: fakeca.FakeCA, lab: Host, change: Callable[[Any, str], object], used: bool) -> None:
        assert lab.run("account", "new").status == 0
        state = lab.directory / "wucme_s_account.json"
        found = json.loads(state.read_text())
        state.write_text(json.dumps({**found, "known": change(found["known"], fake.url.rpartition("/")[0])}))
        fake.requests.clear()
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        assert ("/directory" not in [path for _, path, _ in fake.requests]) == used

    def test_a_directory_is_fetched_again_after_a_refusal(self, fake: fakeca.FakeCA, lab: Host) -> None:
        assert lab.run("account", "new").status == 0
        state = lab.directory / "wucme_s_account.json"
        known = json.loads(state.read_text())
        known["known"]["directory"]["newOrder"] = f"{fake.url.rpartition('/')[0]}/moved"
        state.write_text(json.dumps(known))
        assert [lab.run("issue", "a.example.test").status for _ in range(2)] == [1, 0]

    def test_a_directory_is_fetched_again_after_a_redirect(self, fake: fakeca.FakeCA, lab: Host) -> None:
        assert lab.run("account", "new").status == 0
        fake.misbehave("redirect_file@new-order")
        assert "redirects are not followed" in lab.run("issue", "a.example.test").err
        fake.misbehave()
        fake.requests.clear()
        assert lab.run("issue", "a.example.test").status == 0
        assert "/directory" in [path for _, path, _ in fake.requests]

    def test_so_many_orders_a_run_and_the_most_urgent_first(self, fake: fakeca.FakeCA, lab: Host) -> None:
        for name, days in (("late", 20), ("later", 25), ("latest", 28)):
            lab.old_pair(f"{name}.example.test", days=days)
        done = lab.run("--orders", "2")
        assert done.status == 1
        assert done.lines[-1] == "6 files, 3 certs, 2 renewed, 0 failed"
        assert "1 more are due, and left to the next run (orders = 2): latest.example.test" in done.err
        assert orders(fake) == 2
        assert lab.run("--orders", "2").status == 0
        assert orders(fake) == 3

    def test_one_connection_a_worker(self, fake: fakeca.FakeCA, lab: Host) -> None:
        for number in range(12):
            lab.old_pair(f"n{number}.example.test")
        done = lab.run("--workers", "3")
        assert done.lines[-1] == "24 files, 12 certs, 12 renewed, 0 failed"
        assert fake.connections <= 4

    def test_two_cas(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        (tmp_path / "second").mkdir()
        with fakeca.FakeCA(tmp_path / "second", fake.http_port) as other:
            lab.write(sections=f"[server second]\nurl = {other.url}\nca_file = {other.ca_file}\n"
                               "[a.example.test]\n[b.example.test]\nserver = second\n")
            done = lab.run()
            assert done.status == 0, done.err
            assert (len(fake.issued), len(other.issued)) == (1, 1)
            assert (lab.directory / "wucme_k_account_second.pem").exists()
            assert json.loads((lab.directory / "wucme_s_account_second.json").read_text())["directory"] == other.url
            assert lab.run("renew", "--force").status == 0
            assert (len(fake.accounts), len(other.accounts)) == (1, 1)

    def test_an_order_that_its_ca_still_works_on_is_not_paid_for_twice(self, fake: fakeca.FakeCA, lab: Host,
                                                                       tmp_path: Path) -> None:
        (tmp_path / "second").mkdir()
        with fakeca.FakeCA(tmp_path / "second", fake.http_port) as other:
            lab.write(deadline="1s", sections=f"[server second]\nurl = {other.url}\nca_file = {other.ca_file}\n"
                                              f"[a.example.test]\nserver = {fake.url} second\n")
            fake.misbehave("order_pending_for_ever")
            done = lab.run()
        assert (done.status, orders(fake), orders(other)) == (1, 1, 0), done.err
        assert "a later run goes on with it" in done.err

    def test_urls_of_a_dead_order_are_not_followed(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        state = {"order": "https://localhost:1/order/7", "order_server": fake.url}
        (lab.directory / "wucme_s_a.example.test.json").write_text(json.dumps(state))
        assert lab.run().status == 0


@pytest.mark.process
class TestWhenToRenew:
    """Renewal information, and the memory of failures."""

    def window(self, fake: fakeca.FakeCA, start: float, end: float) -> None:
        """Set the CA's window, in days from now."""
        now = datetime.now(timezone.utc)
        fake.window = now + timedelta(start), now + timedelta(end)

    def asked(self, fake: fakeca.FakeCA) -> int:
        """How often the CA was asked when to renew."""
        return sum(path.startswith("/renewal-info/") for _, path, _ in fake.requests)

    def test_certificate_identifier(self) -> None:
        key = fakeca.make_key()
        serial, issuer = 0x0087654321, bytes.fromhex("69885B6B87464041E1B37B847BA0AE2CDE01C8D4")
        name = x509.Name([])
        certificate = x509.CertificateBuilder(name, name, key.public_key(), serial, datetime(2026, 1, 1),  # noqa: DTZ001
                                              datetime(2027, 1, 1)).add_extension(                         # noqa: DTZ001
            x509.AuthorityKeyIdentifier(issuer, None, None), False).sign(key, hashes.SHA256())
        assert wucme.certificate_id(certificate) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"

    def test_one_of_two_certificates_for_a_name(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test", days=80, stem="web-rsa")
        lab.write(sections="[web-rsa]\nnames = a.example.test\n")
        done = lab.run("issue", "a.example.test")
        assert (done.status, lab.chain().exists()) == (0, True), done.err
        assert "is not due before" not in done.out
        assert f"certificate: {lab.chain()}" in done.out

    def test_order_that_may_not_be_looked_at_now_is_not_paid_for_twice(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave("order_pending_for_ever")
        assert lab.run("--deadline", "2s").status == 1
        fake.misbehave("rate_limited@order")
        assert lab.run().status == 1
        assert orders(fake) == 1
        fake.misbehave()
        assert lab.run("renew", "--force", "a.example.test").status == 0
        assert orders(fake) == 1

    def test_one_that_was_not_asked_for_is_no_failure(self, fake: fakeca.FakeCA, lab: Host) -> None:
        for name in ("a.example.test", "b.example.test"):
            lab.old_pair(name)
        lab.key("b.example.test").unlink()
        done = lab.run("renew", "a.example.test")
        assert (done.status, "failed:" in done.err) == (0, False), done.err
        assert lab.run().status == 0
        assert lab.pair("b.example.test")

    @pytest.mark.parametrize("declared", [True, False])
    def test_whether_a_first_certificate_is_tried_again(self, fake: fakeca.FakeCA, lab: Host, declared: bool) -> None:
        fake.misbehave("error_500_html")
        lab.write(sections="[a.example.test]\n" * declared)
        done = lab.run("issue", "a.example.test", "--timeout", "2s")
        assert (done.status, "nothing is tried again by itself" in done.err) == (1, not declared)

    def test_window_in_the_past_is_due(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        before = lab.pair()
        self.window(fake, -2, -1)
        done = lab.run()
        assert done.status == 0, done.err
        assert "the CA would have it renewed from " in done.err
        assert lab.pair()[0] != before[0]
        payload = [payload for _, path, payload in fake.requests if path == "/new-order"][-1]
        assert payload["replaces"] == wucme.facts(before[0]).ari

    def test_window_is_asked_for_when_the_ca_says(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        self.window(fake, 10, 20)
        assert [lab.run() for _ in range(3)] == [Done(0, "", "")] * 3
        assert self.asked(fake) == 1
        state = json.loads((lab.directory / "wucme_s_a.example.test.json").read_text())
        assert state["window"][0] <= state["window"][2] <= state["window"][1]
        assert 21000 < state["ask_at"] - time.time() < 22000
        state["ask_at"] = 0.0
        (lab.directory / "wucme_s_a.example.test.json").write_text(json.dumps(state))
        lab.run()
        again = json.loads((lab.directory / "wucme_s_a.example.test.json").read_text())
        assert again["window"] == state["window"], "drawn once for a window"
        assert self.asked(fake) == 2

    @pytest.mark.parametrize("trouble", ["no_renewal_info", "html_directory", "silent@renewal-info", "error_500_html"])
    def test_trouble_with_it_is_never_fatal(self, fake: fakeca.FakeCA, lab: Host, trouble: str) -> None:
        lab.run("issue", "a.example.test")
        fake.misbehave(trouble)
        assert lab.run("--timeout", "1s") == Done(0, "", "")
        fake.misbehave()
        assert lab.run() == Done(0, "", ""), "and not asked for again at once"
        assert self.asked(fake) <= 1

    def test_never_means_never(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        self.window(fake, -2, -1)
        assert lab.run("--renew", "never") == Done(0, "", "")
        assert self.asked(fake) == 0

    @pytest.mark.parametrize("refusal", ["problem_escapes", "error_500_html@new-order"])
    def test_replacement_that_is_refused_is_ordered_without(self, fake: fakeca.FakeCA, lab: Host, refusal: str) -> None:
        lab.run("issue", "a.example.test")
        fake.misbehave(refusal, times=1 if "500" not in refusal else 3)
        assert in_world(lab, HASTE, "renew", "--force").status == 0
        payloads = [payload for _, path, payload in fake.requests if path == "/new-order"]
        assert "replaces" not in payloads[-1]
        assert "replaces" in payloads[-2]

    def test_refusals_are_remembered(self, fake: fakeca.FakeCA, lab: Host) -> None:
        fake.failing_names.add("a.example.test")
        lab.old_pair("a.example.test")
        assert lab.run().status == 1
        assert lab.run() == Done(1, "", ""), "backs off, and says so only by its status"
        assert orders(fake) == 1
        assert "not tried again before" in lab.run("status").out
        found = json.loads(lab.run("status", "--json").out)["certificates"][0]["failures"]
        assert found["count"] == 1
        assert found["next"] > found["problem"][:0]
        lab.run("renew", "a.example.test")
        assert orders(fake) == 2, "naming it by hand skips the ladder"
        state = json.loads((lab.directory / "wucme_s_a.example.test.json").read_text())
        assert state["failures"] == 2
        assert 500 < state["retry_at"] - time.time() < 700
        fake.failing_names.clear()
        assert lab.run("renew", "a.example.test").status == 0
        assert wucme.read_memory(str(lab.directory / "wucme_s_a.example.test.json")).failures == 0

    def test_retry_after_yields_to_force_alone(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave("rate_limited")
        fake.retry_after = "3600"
        lab.run()
        fake.misbehave()
        assert lab.run("renew", "a.example.test").status == 1
        assert orders(fake) == 1
        assert lab.run("renew", "a.example.test", "--force").status == 0

    def test_unreachable_ca_does_not_climb_the_ladder(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave("error_500_html")
        lab.run()
        fake.misbehave()
        assert lab.run().status == 0

    def test_runs_that_come_too_rarely_are_warned_of(self, lab: Host) -> None:
        assert lab.run("issue", "a.example.test").status == 0
        lock, now = lab.directory / "wucme.lock", time.time()
        assert json.loads(lock.read_text())["runs"] == []
        lock.write_text(json.dumps({"runs": [now - 40 * DAY, "x", now - 20 * DAY]}))
        done = lab.run()
        assert done.status == 0
        assert any(re.search(r"^a\.example\.test: runs come every 480\.0 hours, .* run at least every", line)
                   for line in done.lines), done.err
        lab.run("renew", "a.example.test")
        assert len(json.loads(lock.read_text())["runs"]) == 3
        # The run that renews judges by what it got, and not by the window that was for the old one.
        state = lab.directory / "wucme_s_a.example.test.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "window": [now - 9, now - 7, now - 8],
                                     "ask_at": now + 3600}))
        lock.write_text(json.dumps({"runs": [now - 40 * DAY, now - 20 * DAY]}))
        done = lab.run()
        assert "1 renewed" in done.err
        assert "a.example.test: runs come every" in done.err
        assert lab.run() == Done(0, "", "")

    def test_next_ca_when_one_cannot_be_reached(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        lab.write(server="dead alive", sections=f"""
            [server dead]
            url = https://127.0.0.1:{testbed.free_ports(1)[0]}/directory
            [server alive]
            url = {fake.url}
            [a.example.test]
            """)
        done = lab.run()
        assert done.status == 0, done.err
        assert "trying the next CA" in done.err
        (lab.directory / "wucme_k_account_alive.pem").stat()
        assert "trying the next CA" not in lab.run("renew", "--force").err, "the one that issued is asked first"

    def test_next_ca_after_three_refusals(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        (tmp_path / "second").mkdir()
        with fakeca.FakeCA(tmp_path / "second", fake.http_port) as other:
            fake.failing_names.add("a.example.test")
            lab.write(server="first second", sections=f"[server first]\nurl = {fake.url}\nca_file = {fake.ca_file}\n"
                      f"[server second]\nurl = {other.url}\nca_file = {other.ca_file}\n[a.example.test]\n")
            assert [lab.run("renew", "a.example.test").status for _ in range(4)] == [1, 1, 1, 0]
            assert (orders(fake), orders(other)) == (3, 1)


@pytest.mark.process
class TestAccountsAndProfiles:
    """What a CA may want, and what may be done with an account."""

    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    def test_bound_account(self, tmp_path: Path, algorithm: str) -> None:
        mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
        with fakeca.FakeCA(tmp_path, testbed.free_ports(1)[0], eab={"kid-1": mac}) as fake:
            lab = Host(tmp_path, fake.url, fake.ca_file, f"127.0.0.1:{fake.http_port}")
            refused = lab.run("issue", "a.example.test")
            assert "externalAccountRequired" in refused.err
            assert "an account made on its web site first" in refused.err
            (tmp_path / "mac").write_text(f"  {mac}\n")
            lab.write(eab_kid="kid-1", eab_hmac_file=str(tmp_path / "mac"), eab_alg=algorithm)
            done = lab.run("issue", "a.example.test", "--verbose")
            assert done.status == 0, done.err
            assert mac not in done.err + (lab.directory / "wucme.log").read_text()

    def test_profiles(self, tmp_path: Path) -> None:
        with fakeca.FakeCA(tmp_path, testbed.free_ports(1)[0], profiles={"classic": "90 days", "short": "6"}) as fake:
            lab = Host(tmp_path, fake.url, fake.ca_file, f"127.0.0.1:{fake.http_port}")
            refused = lab.run("issue", "a.example.test", "--profile", "shrot")
            assert "the CA has no profile shrot, but classic, short" in refused.err
            assert orders(fake) == 0
            assert lab.run("issue", "a.example.test", "--profile", "short").status == 0
            assert [payload["profile"] for _, path, payload in fake.requests if path == "/new-order"] == ["short"]
            lab.write(sections="[a.example.test]\nprofile = classic\n")
            assert "due: its profile is now classic" in lab.run().err
            assert lab.run() == Done(0, "", "")

    @pytest.mark.pebble
    def test_preferred_chain(self, tmp_path: Path) -> None:
        with testbed.Pebble(tmp_path / "pebble", binaries=testbed.pebble_binaries(), alternate_roots=2) as ca:
            host = Host(tmp_path, ca.directory_url, ca.ca_file, f"127.0.0.1:{ca.http_port}")
            for number in range(3):
                root = x509.load_pem_x509_certificate(ca.root(number))
                done = host.run("issue", "a.example.test", "--force", "--chain", root.subject.rfc4514_string())
                assert done.status == 0, done.err
                assert verifies(host.pair()[0], ca.root(number), "a.example.test")
            assert "offers no such chain" in host.run("renew", "--force", "--chain", "Nobody").err

    def test_account_verbs(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.write(agree="no")
        assert "terms of service" in lab.run("account", "show").err
        assert lab.run("account", "new", "--agree", "--contact", "me@example.test").status == 0
        shown = lab.run("account", "new").out
        assert "status:  valid" in shown
        assert "contact: mailto:me@example.test" in shown
        assert "mailto:you@example.test" in lab.run("account", "update", "--contact", "you@example.test").out
        old = (lab.directory / "wucme_k_account.pem").read_bytes()
        assert lab.run("account", "newkey").status == 0
        assert (lab.directory / "wucme_k_account.pem").read_bytes() != old
        assert lab.run("issue", "a.example.test").status == 0
        assert len(fake.accounts) == 1
        assert lab.run("account", "deactivate").status == 0
        assert next(iter(fake.accounts.values())).status == "deactivated"
        assert not (lab.directory / "wucme_k_account.pem").exists()
        assert lab.run("account", "close").status == 2

    @pytest.mark.parametrize("terms", ["", "no_terms"])
    def test_only_account_new_makes_one(self, fake: fakeca.FakeCA, lab: Host, terms: str) -> None:
        fake.misbehave(*filter(None, [terms]))
        for verb in ("show", "update", "newkey", "deactivate"):
            done = lab.run("account", verb)
            assert (done.status, "no account yet" in done.err, "agree = yes" in done.err) == (2, True, False)
        assert not fake.accounts
        assert lab.run("account", "new").status == 0
        assert len(fake.accounts) == 1

    def test_account_that_the_ca_lost_is_made_again_only_if_its_terms_are_agreed_to(
            self, fake: fakeca.FakeCA, lab: Host) -> None:
        assert lab.run("account", "new").status == 0
        fake.accounts.clear()
        lab.write(agree="no")
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert f"the CA has lost the account {fake.base}/account/" in done.err
        assert f"its terms of service at {fake.base}/terms must be agreed to: set agree = yes" in done.err
        assert not fake.accounts
        assert lab.run("issue", "a.example.test", "--agree").status == 0
        assert len(fake.accounts) == 1

    def test_account_key_of_certbot_is_taken_over(self, fake: fakeca.FakeCA, lab: Host) -> None:
        key = new_key()
        path = lab.directory / "wucme_k_account.pem"
        path.write_text(json.dumps(private_jwk(key)))
        done = lab.run("account", "new")
        assert done.status == 0, done.err
        assert path.read_bytes() == wucme.key_pem(key)
        assert "status:  valid" in done.out

    def test_key_change_that_was_cut_short_in_the_writing(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("account", "new")
        (lab.directory / "wucme_k_account.pem_tmp").write_text("-----BEGIN PRIV")
        assert lab.run("issue", "a.example.test").status == 0
        assert not lab.left()

    @pytest.mark.parametrize("heard", [True, False])
    def test_key_change_that_was_cut_short(self, fake: fakeca.FakeCA, lab: Host, heard: bool) -> None:
        lab.run("account", "new")
        key = lab.directory / "wucme_k_account.pem"
        old = key.read_bytes()
        if heard:
            lab.run("account", "newkey")
            key.rename(f"{key}_tmp")
            key.write_bytes(old)
        else:
            Path(f"{key}_tmp").write_bytes(fakeca.key_pem(fakeca.make_key()))
        assert lab.run("issue", "a.example.test").status == 0
        assert (key.read_bytes() == old) is not heard
        assert len(fake.accounts) == 1
        assert not lab.left()

    def test_revoked_certificate_is_replaced_with_a_new_key(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        chain, key = lab.pair()
        assert lab.run("revoke", "a.example.test", "--reason", "nonsense").status == 2
        done = lab.run("revoke", "a.example.test", "--reason", "keyCompromise")
        assert done.status == 0, done.err
        assert "the next run gets another, with a new key" in done.out
        assert fake.revoked == [int(wucme.facts(chain).serial, 16)]
        assert "due: it was revoked" in lab.run().err
        assert lab.pair()[1] != key
        assert lab.run() == Done(0, "", "")

    def test_what_holds_no_certificate_is_not_revoked(self, lab: Host) -> None:
        path = lab.home / "empty.pem"
        path.touch()
        done = lab.run("revoke", path)
        assert (done.status, done.out) == (1, "")
        assert done.err.endswith(f"failed: {path}: holds no certificate\n")

    def test_revocation_by_the_certificates_own_key(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        for name in ("wucme_k_account.pem", "wucme_s_account.json"):
            (lab.directory / name).unlink()
        done = lab.run("revoke", lab.chain())
        assert done.status == 0, done.err
        assert len(fake.revoked) == 1


@pytest.mark.process
class TestInterruption:
    """Runs that are killed, stopped, or meet another."""

    def held(self, fake: fakeca.FakeCA, lab: Host) -> subprocess.Popen[str]:
        """A run that waits in the middle of an order."""
        lab.old_pair("a.example.test")
        fake.always_valid = True        # or what became of the order would hang on the moment of the kill
        fake.misbehave("order_pending_for_ever")
        process = lab.start()
        wait_until(lambda: any(path.startswith("/challenge") for _, path, _ in fake.requests))
        return process

    def test_killed_run_is_swept_up_and_gone_on_with(self, fake: fakeca.FakeCA, lab: Host) -> None:
        with self.held(fake, lab) as process:
            assert lab.left()
            process.kill()
        (lab.directory / "wucme_c_a.example.test.pem_tmp").write_text("half a chain")
        fake.misbehave()
        done = lab.run()
        assert done.status == 0, done.err
        assert orders(fake) == 1
        assert not lab.left()

    def test_a_key_that_waits_is_not_made_anew_when_its_order_is_gone_on_with(self, fake: fakeca.FakeCA,
                                                                              lab: Host) -> None:
        fake.always_valid = True
        fake.misbehave("order_pending_for_ever")
        lab.write(deadline="1s", sections="[a.example.test]\n")
        assert "a later run goes on with it" in lab.run().err
        waiting = (lab.directory / "wucme_k_a.example.test.pem_tmp").stat()     # the only copy, perhaps signed already
        fake.misbehave()
        assert lab.run().status == 0
        assert (lab.key().stat().st_ino, lab.key().stat().st_mtime_ns) == (waiting.st_ino, waiting.st_mtime_ns)

    def test_run_that_was_killed_when_the_new_pair_was_live_is_ended_by_the_next(self, fake: fakeca.FakeCA,
                                                                                 lab: Host) -> None:
        assert lab.run("issue", "a.example.test", "--rotate").status == 0
        state = lab.directory / "wucme_s_a.example.test.json"
        about = {"order": "https://ca.test/order/1", "order_server": fake.url, "problem": "No space left on device"}
        state.write_text(json.dumps({**json.loads(state.read_text()), **about}))
        waiting = lab.directory / "wucme_k_a.example.test.pem_tmp"
        waiting.write_bytes(lab.key().read_bytes())
        lab.write(rotate="no")
        assert lab.run("status").status == 1
        assert lab.run().status == 0
        assert not lab.left()
        assert not lab.key().is_symlink()
        assert b"PRIVATE" not in lab.pair()[0]
        assert (orders(fake), lab.run("status").status) == (1, 0)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_stopped_by_a_signal(self, fake: fakeca.FakeCA, lab: Host, number: signal.Signals) -> None:
        with self.held(fake, lab) as process:
            begun = time.monotonic()
            process.send_signal(number)
            _, said = process.communicate(timeout=10)
        assert process.returncode == 128 + number
        assert time.monotonic() - begun < 5
        assert f"stopped by {number.name}" in said
        assert "Traceback" not in said
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", fake.http_port)) != 0

    def test_500_silent_and_2000_hostile_callers_keep_nobody_out(self, fake: fakeca.FakeCA, lab: Host) -> None:
        reset = struct.pack("ii", 1, 0)
        hostile = [b"", b"G", GET[:-2], GET, b"junk\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\0" * 100, GET * 3,
                   b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx", b"GET /" + b"x" * 8200]
        with self.held(fake, lab) as process, contextlib.ExitStack() as stack:
            token, front = next((lab.directory / "tokens").iterdir()), Fronts("127.0.0.1", fake.http_port,
                                                                              threading.Event())
            silent = []
            for number in range(500):
                silent.append(stack.enter_context(front.connect()))
                if number % 100 == 99:
                    front.say(GET)      # waits until all are accepted, or the kernel lets the next wait for a second
            for number in range(2000):
                with front.connect() as peer, contextlib.suppress(OSError):
                    peer.sendall(hostile[number // 2 % len(hostile)])
                    if number % 2:
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    else:               # or all would wait a second for each 128 that are not accepted yet
                        peer.shutdown(socket.SHUT_WR)
                        peer.recv(1)
                if number % 200 == 199:
                    start = time.monotonic()
                    assert front.say(GET.replace(b"tok", token.name.encode())).endswith(token.read_bytes())
                    assert time.monotonic() - start < 3
            assert select.select(silent[:1], [], [], 0)[0]
            about = wucme.proc_text(process.pid, "status")
            assert int(re.findall(r"VmHWM:\s+(\d+)", about)[0]) < 100 * 1024
            assert int(re.findall(r"Threads:\s+(\d+)", about)[0]) < wucme.OPEN_CONNECTIONS + 20
            fake.misbehave()
            front.say(GET.replace(b"tok", token.name.encode()))     # as a CA that looks again, or it would wait longer
            assert process.wait(60) == 0

    def test_callers_that_hold_on_do_not_hold_up_the_end(self, fake: fakeca.FakeCA, lab: Host) -> None:
        with self.held(fake, lab) as process, contextlib.ExitStack() as stack:
            front = Fronts("127.0.0.1", fake.http_port, threading.Event())
            for number in range(300):
                stack.enter_context(front.connect()).sendall(GET[:number % len(GET)])
                if number % 100 == 99:
                    front.say(GET)      # as above
            begun = time.monotonic()
            process.terminate()
            process.communicate(timeout=10)
            assert time.monotonic() - begun < 5
            assert process.returncode == 143
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", fake.http_port)) != 0

    @pytest.mark.parametrize(("number", "again"), [(signal.SIGKILL, "one\ntwo\none\ntwo\nthree\n"),
                                                   (signal.SIGTERM, "one\ntwo\ntwo\nthree\n")])
    def test_run_that_ends_amid_its_loads_leaves_the_rest_to_the_next(self, lab: Host, tmp_path: Path,
                                                                     number: signal.Signals, again: str) -> None:
        lab.old_pair("a.example.test", days=80)
        done, gate = tmp_path / "done", tmp_path / "gate"
        os.mkfifo(gate)
        lab.write(*[f"$ echo {word} >> {done}" + f"; test -e {tmp_path}/open || cat {gate}" * (word == "two")
                    for word in ("one", "two", "three")], renew="never")
        with lab.start() as process:
            wait_until(lambda: done.exists() and done.read_text() == "one\ntwo\n")
            process.send_signal(number)
            process.communicate(timeout=10)
        (tmp_path / "open").touch()
        with contextlib.suppress(OSError):      # what a killed run started goes on: let it end
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        assert lab.run().status == 0
        assert done.read_text() == again, "all of it again after a kill, what is left after a signal"
        assert lab.run() == Done(0, "", "")

    def test_load_is_ended_with_its_children(self, lab: Host, tmp_path: Path) -> None:
        lab.old_pair("a.example.test", days=80)
        lab.write(f"$ sleep 321 & echo $! > {tmp_path}/child; wait", renew="never")
        with lab.start() as process:
            wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
            process.terminate()
            process.communicate(timeout=10)
        assert process.returncode == 143
        wait_until(lambda: not alive(int((tmp_path / "child").read_text())))

    def test_second_run_waits_and_orders_nothing(self, fake: fakeca.FakeCA, lab: Host) -> None:
        with self.held(fake, lab) as first:
            assert "another run is at work" in lab.run("--lock-wait", "0s").err
            with lab.start("--verbose") as second:
                assert second.stderr is not None
                assert any("waiting for another run to end (pid " in line for line in second.stderr)
                fake.misbehave()
                assert first.wait(20) == 0
                assert second.wait(20) == 0
        assert orders(fake) == 1

    def test_lock_is_not_inherited(self, lab: Host, tmp_path: Path) -> None:
        lab.old_pair("a.example.test", days=80)
        lab.write(f"$ (setsid sleep 30 & echo $! > {tmp_path}/daemon) ; true", renew="never")
        begun = time.monotonic()
        try:
            assert lab.run().status == 0
            assert lab.run("--lock-wait", "0s").status == 0
            assert time.monotonic() - begun < 10
        finally:
            os.kill(int((tmp_path / "daemon").read_text()), signal.SIGKILL)

    def test_disk_that_is_full(self, fake: fakeca.FakeCA, lab: Host) -> None:
        before = lab.old_pair("a.example.test")
        lab.run("status")
        limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *lab.command()]
        done = subprocess.run(limited, env=lab.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert lab.pair() == before
        assert lab.run().status == 0


@pytest.mark.process
class TestListenerAndOrder:
    """The listener is there before the order, or there is no order."""

    def test_busy_port_names_its_holder(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        lab.write(sections=f"[b.example.test]\nlisten = 127.0.0.1:{testbed.free_ports(1)[0]}\n")
        fake.always_valid = True
        with socket.create_server(("127.0.0.1", fake.http_port)):
            done = lab.run()
        assert f"127.0.0.1:{fake.http_port}: in use by " in done.err
        assert f"(pid {os.getpid()})" in done.err
        assert orders(fake) == 1, "only the certificate that needs the port fails before its order"

    def test_nothing_listens_when_nothing_is_due(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("issue", "a.example.test")
        with socket.create_server(("127.0.0.1", fake.http_port)):
            assert lab.run() == Done(0, "", "")

    def test_tokens_are_published_while_the_order_runs(self, fake: fakeca.FakeCA, lab: Host) -> None:
        seen: list[tuple[int, bool]] = []

        def look(name: str, token: str, keyauth: str) -> bool:
            path = lab.directory / "tokens" / token
            seen.append((mode(path), path.read_text() == keyauth))
            return True

        fake.validate = look
        assert lab.run("issue", "a.example.test").status == 0
        assert seen == [(0o644, True)]
        assert mode(lab.directory / "tokens") == 0o755
        assert not lab.left()

    def test_wildcards_are_not_ordered(self, fake: fakeca.FakeCA, lab: Host) -> None:
        done = lab.run("issue", "*.example.test")
        assert "http-01 cannot prove it; set challenge = dns-01 or dns-persist-01" in done.err
        assert orders(fake) == 0


@pytest.fixture(scope="session")
def bind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testbed.Bind]:
    """A real name server, one for all tests."""
    with testbed.Bind(tmp_path_factory.mktemp("bind")) as server:
        yield server


@pytest.fixture(scope="session")
def pebble_of_bind(bind: testbed.Bind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[testbed.Pebble]:
    """The test CA, asking that name server."""
    directory = tmp_path_factory.mktemp("pebble_of_bind")
    with testbed.Pebble(directory, binaries=testbed.pebble_binaries(), dns=bind.address) as ca:
        yield ca


@pytest.fixture
def zone(bind: testbed.Bind, pebble_of_bind: testbed.Pebble, tmp_path: Path) -> Host:
    """A host whose CA asks a name server that the host may change."""
    host = Host(tmp_path, pebble_of_bind.directory_url, pebble_of_bind.ca_file)
    host.settings.update(listen="", challenge="dns-01", nsupdate=f"{bind.key_file} {bind.address}")
    host.write()
    return host


@pytest.fixture(scope="session")
def caddy(bind: testbed.Bind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[testbed.CaddyCA]:
    """A second CA, of other people's code."""
    private = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0
    names = ["tls.example.test", "www.tls.example.test"] if private else []
    directory = tmp_path_factory.mktemp("caddy")
    with testbed.CaddyCA(directory, binary=testbed.setup("caddy"), dns=bind.address, tls_names=names) as ca:
        yield ca


@pytest.fixture
def other(caddy: testbed.CaddyCA, tmp_path: Path) -> Host:
    """A host whose CA is the second one."""
    return Host(tmp_path, caddy.directory_url, caddy.ca_file, f"127.0.0.1:{caddy.http_port}")


def recorder(directory: Path, script: str = "", name: str = "hook") -> Path:
    """A hook that notes how it is called, in NAME.notes, and then runs a shell script."""
    hook, note = directory / name, "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    hook.write_text(f'#!/bin/sh\n{sys.executable} -S -c {shlex.quote(note)} "$@" >> {directory}/{name}.notes\n'
                    + textwrap.dedent(script))
    hook.chmod(0o755)
    return hook


def noted(hook: Path) -> list[tuple[list[str], dict[str, str]]]:
    """How a recorder was called: arguments and environment of each call."""
    notes = hook.with_name(f"{hook.name}.notes")
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


def arguments(hook: Path) -> list[str]:
    """The arguments of each call of a recorder, in a line."""
    return [" ".join(call) for call, _ in noted(hook)]


class Documents:
    """A web server of somebody else's, that answers with what `find` finds for a path."""

    def __init__(self, port: int, find: Callable[[str], bytes | None]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = find(self.path)
                self.send_response(200 if body else 404)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)

    def __enter__(self) -> Documents:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def validating(hook: Path, met: dict[str, dict[str, str]]) -> Callable[[str, str, str], bool]:
    """A way to validate that is content, and notes the answers that a hook should have got and its calls so far."""
    def validate(name: str, token: str, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        met[name] = {"name": name, "token": token, "text": text, "hex": digest.hex(), "digest": fakeca.b64(digest),
                     "calls": str(len(noted(hook)))}
        return True

    return validate


HOOKS = [       # family and type; the arguments of begin and end; what stands in the environment, and what must not
    ("uacme", "http-01", "begin http-01 {name} {token} {text}", "done http-01 {name} {token} {text}",
     {"UACME_TYPE": "http-01", "UACME_IDENT": "{name}", "UACME_TOKEN": "{token}", "UACME_AUTH": "{text}"}),
    ("uacme", "dns-01", "begin dns-01 {name} {token} {digest}", "done dns-01 {name} {token} {digest}",
     {"UACME_TYPE": "dns-01", "UACME_AUTH": "{digest}"}),
    ("uacme", "tls-alpn-01", "begin tls-alpn-01 {name} {token} {digest}", "done tls-alpn-01 {name} {token} {digest}",
     {"UACME_VERBOSE": "0"}),
    ("dehydrated", "http-01", "deploy_challenge {name} {token} {text}", "clean_challenge {name} {token} {text}",
     {"CHALLENGETYPE": "http-01"}),
    ("dehydrated", "dns-01", "deploy_challenge {name} {token} {digest}", "clean_challenge {name} {token} {digest}",
     {"CHALLENGETYPE": "dns-01"}),
    ("dehydrated", "tls-alpn-01", "deploy_challenge {name} {token} {hex}", "clean_challenge {name} {token} {hex}",
     {"CHALLENGETYPE": "tls-alpn-01"}),
    ("certbot", "http-01", "", "", {"CERTBOT_DOMAIN": "{name}", "CERTBOT_IDENTIFIER": "{name}",
                                    "CERTBOT_VALIDATION": "{text}", "CERTBOT_TOKEN": "{token}"}),
    ("certbot", "dns-01", "", "", {"CERTBOT_VALIDATION": "{digest}", "CERTBOT_TOKEN": None}),
    ("mod_md", "dns-01", "setup {name} {digest}", "teardown {name} {digest}", {}),
]
END = {"uacme": "failed ", "dehydrated": "clean_challenge ", "mod_md": "teardown ", "certbot": ""}


@pytest.mark.process
class TestHooks:
    """Hooks of other programs, called as those call them."""

    @pytest.mark.parametrize("case", HOOKS, ids=lambda case: f"{case[0]}-{case[1]}")
    def test_a_hook_is_called_as_its_family_is(
            self, case: tuple[str, str, str, str, Mapping[str, str | None]], fake: fakeca.FakeCA, lab: Host,
            tmp_path: Path) -> None:
        family, kind, begin, end, environment = case
        hook, ends = recorder(tmp_path, "echo set by $$"), recorder(tmp_path, name="ends")
        met: dict[str, dict[str, str]] = {}
        fake.validate = validating(hook, met)
        wildcard = "*." if kind == "dns-01" else ""
        setting = f"{family}:{hook}" + (f",{ends}" if family == "certbot" else "")
        lab.write(challenge=kind, listen="", hook=setting,
                  sections=f"[a.example.test]\nnames = {wildcard}a.example.test b.example.test\n")
        done = lab.run()
        assert done.status == 0, done.err
        assert {one["calls"] for one in met.values()} == {"2"}, "all are published before any is validated"
        calls = noted(hook) + noted(ends)
        for expected, found in [(begin, calls[:2]), (end, calls[2:])]:
            assert sorted(" ".join(call) for call, _ in found) == sorted(
                expected.format_map(one) for one in met.values())
        for one, (call, told) in itertools.product(met.values(), calls):
            if one["name"] in call or told.get("CERTBOT_DOMAIN") == one["name"]:
                assert {key: told.get(key) for key in environment} == {
                    key: text and text.format_map(one) for key, text in environment.items()}

    def test_certbot_hooks_are_told_of_the_rest(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        begin = recorder(tmp_path, "echo '  id 17 '; echo and more; echo for me >&2")
        end = recorder(tmp_path, name="end")
        fake.always_valid = True
        lab.write(challenge="dns-01", listen="", hook=f"certbot:{begin} --one 'a word' && true,{end} --two",
                  sections="[a.example.test]\nnames = a.example.test *.a.example.test b.example.test\n")
        done = lab.run()
        assert done.status == 0, done.err
        assert [call for call, _ in noted(begin)] == [["--one", "a word"]] * 3, "the shell takes the command"
        assert [told["CERTBOT_REMAINING_CHALLENGES"] for _, told in noted(begin)] == ["2", "1", "0"]
        names = {"a.example.test", "b.example.test"}
        assert {name for _, told in noted(begin) for name in told["CERTBOT_ALL_DOMAINS"].split(",")} >= names
        assert all("CERTBOT_AUTH_OUTPUT" not in told for _, told in noted(begin))
        assert len(noted(end)) == 3
        assert all(told["CERTBOT_AUTH_OUTPUT"].startswith("id 17 \nand more") for _, told in noted(end))

    def test_a_certbot_hook_that_fails_is_noted_and_no_more(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path
                                                            ) -> None:
        hook = recorder(tmp_path, "exit 3")
        fake.always_valid = True
        lab.write(challenge="dns-01", listen="", hook=f"certbot:{hook},{hook}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        assert "hook failed: exit status 3" in done.err
        assert len(noted(hook)) == 2

    def test_a_hook_may_decline_and_the_next_type_has_an_order_of_its_own(
            self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        hook = recorder(tmp_path, '[ "$2" = http-01 ]')
        fake.always_valid = True
        lab.write(challenge="dns-01 http-01", listen="", hook=f"uacme:{hook}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        calls = [call.split()[:2] for call in arguments(hook)]
        assert calls == [["begin", "dns-01"], ["begin", "http-01"], ["done", "http-01"]], "no end of what was declined"
        assert orders(fake) == 2
        assert [payload for _, path, payload in fake.requests if path.startswith("/authz") and payload] == [
            {"status": "deactivated"}], "what the first order left pending"

    @pytest.mark.parametrize("family", ["dehydrated", "mod_md"])
    def test_a_hook_that_fails_gives_way_to_the_next_type(self, family: str, fake: fakeca.FakeCA, lab: Host,
                                                          tmp_path: Path) -> None:
        hook = recorder(tmp_path, '[ "$CHALLENGETYPE" = http-01 ]')
        lab.write(challenge="dns-01 http-01", hook=f"{family}:{hook}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        assert orders(fake) == 2
        assert "the hook" in done.err
        assert not lab.left()

    def test_a_hook_that_declines_everything(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        hook = recorder(tmp_path, "echo not mine; exit 1")
        lab.write(challenge="http-01 dns-01 tls-alpn-01", listen="", listen_tls="", hook=f"uacme:{hook}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert [call.split()[0] for call in arguments(hook)] == ["begin"] * 3
        assert len([line for line in done.lines if "failed: " in line]) == 1
        assert "not mine" in done.err
        assert lab.left() <= {"wucme_k_a.example.test.pem_tmp"}, "of the order that the next run takes up"

    @pytest.mark.parametrize("family", ["uacme", "dehydrated", "mod_md"])
    def test_what_was_begun_is_ended_when_a_later_name_fails(self, family: str, fake: fakeca.FakeCA, lab: Host,
                                                             tmp_path: Path) -> None:
        hook = recorder(tmp_path, f"""
            case "$1 $*" in begin*b.example*|deploy*b.example*|setup*b.example*) [ -e {tmp_path}/mended ];; esac
            """)
        fake.always_valid = True
        lab.write(challenge="dns-01", listen="", hook=f"{family}:{hook}",
                  sections="[a.example.test]\nnames = a.example.test b.example.test\n")
        done = lab.run()
        assert done.status == 1
        assert "b.example.test" in "".join(line for line in done.lines if "failed: " in line)
        ends = [call for call in arguments(hook) if call.startswith(END[family])]
        assert len([call for call in ends if "a.example.test" in call]) == 1
        assert not any(path.startswith("/challenge") for _, path, _ in fake.requests)
        (tmp_path / "mended").touch()
        assert lab.run().status == 0
        assert orders(fake) == 1, "the order is taken up again"

    @pytest.mark.parametrize("family", ["uacme", "dehydrated", "mod_md", "certbot"])
    def test_what_was_begun_is_ended_when_the_ca_is_not_content(self, family: str, fake: fakeca.FakeCA, lab: Host,
                                                                tmp_path: Path) -> None:
        hook, end = recorder(tmp_path), recorder(tmp_path, name="end")
        fake.failing_names = {"a.example.test"}
        lab.write(challenge="dns-01", listen="", hook=f"{family}:{hook}" + (f",{end}" if family == "certbot" else ""))
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        last = (noted(end) or noted(hook))[-1]
        assert " ".join(last[0]).startswith(END[family])
        assert "a.example.test" in [*last[0], last[1].get("CERTBOT_DOMAIN")]

    def test_a_hook_that_hangs_is_killed_with_its_children(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path
                                                           ) -> None:
        hook = recorder(tmp_path, f'[ "$1" != begin ] || {{ sleep 321 & echo $! > {tmp_path}/child; wait; }}')
        lab.write(challenge="dns-01", listen="", hook=f"uacme:{hook}", load_timeout="1s")
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert re.search(r"failed: .*hook.* 1 s", done.err), done.err
        wait_until(lambda: not alive(int((tmp_path / "child").read_text())))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_what_was_begun_is_ended_after_a_signal(self, number: signal.Signals, fake: fakeca.FakeCA, lab: Host,
                                                    tmp_path: Path) -> None:
        hook = recorder(tmp_path)
        fake.always_valid = True
        fake.misbehave("order_pending_for_ever")
        lab.write(challenge="dns-01", listen="", hook=f"uacme:{hook}")
        with lab.start("issue", "a.example.test") as process:
            wait_until(lambda: any(path.startswith("/challenge") for _, path, _ in fake.requests))
            process.send_signal(number)
            process.communicate(timeout=10)
        fake.misbehave()
        lab.run()
        calls = [call.split() for call in arguments(hook)]
        assert {call[3] for call in calls if call[0] != "begin"} == {call[3] for call in calls}, "then or next"

    def test_what_a_hook_prints_is_bounded_and_harmless(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        hook = recorder(tmp_path, r"printf '\033[31mred\007\n'; yes flood | head -n 100000")
        fake.always_valid = True
        lab.write(challenge="dns-01", listen="", hook=f"uacme:{hook}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0
        log = (lab.directory / "wucme.log").read_text()
        assert r"\x1b[31mred\x07" in log
        assert len(log) < 2_000_000
        assert "\x1b" not in log + done.err

    def test_a_hook_is_handed_no_secret(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        hook = recorder(tmp_path)
        fake.always_valid = True
        lab.write(challenge="dns-01", listen="", hook=f"uacme:{hook}")
        assert lab.run("issue", "a.example.test").status == 0
        told = (tmp_path / "hook.notes").read_text()
        for key in lab.directory.glob("wucme_k_*.pem"):
            assert key.read_text().splitlines()[1] not in told

    @pytest.mark.parametrize("hook", ["uacme:{}/missing", "dehydrated:{}/missing"])
    def test_a_hook_that_is_not_there(self, hook: str, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        lab.write(challenge="dns-01", listen="", hook=hook.format(tmp_path))
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert f"{tmp_path}/missing" in done.err

    def test_a_hook_that_anyone_may_write(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root needs to care")
        hook = recorder(tmp_path)
        hook.chmod(0o777)
        lab.write(challenge="dns-01", listen="", hook=f"uacme:{hook}")
        assert "anyone may write" in lab.run("issue", "a.example.test").err
        assert not noted(hook)

    @pytest.mark.servers
    def test_uacmes_own_hook_for_a_web_root(self, host: Host, pebble: testbed.Pebble, tmp_path: Path) -> None:
        hook = testbed.setup("uacme") / "uacme.sh"
        with Documents(pebble.http_port, lambda path: content(tmp_path / path.rpartition("/")[2])):
            host.write(listen="", hook=f"uacme:{hook}")
            done = host.run("issue", "a.example.test", "b.example.test", UACME_CHALLENGE_PATH=str(tmp_path))
        assert done.status == 0, done.err
        assert not [path for path in tmp_path.iterdir() if len(path.name) == 43], "its tokens are gone"

    @pytest.mark.servers
    def test_uacmes_own_hook_for_the_dns(self, zone: Host, bind: testbed.Bind, tmp_path: Path) -> None:
        hook = testbed.setup("uacme") / "nsupdate.sh"
        (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
        (tmp_path / "sleep").chmod(0o755)       # or each call takes five seconds
        zone.environment["PATH"] = f"{tmp_path}:{bind.path}"
        zone.write(nsupdate="", hook=f"uacme:{hook}")
        done = zone.run("issue", "u1.example.test", "*.u2.example.test")
        assert done.status == 0, done.err
        assert bind.ask("_acme-challenge.u1.example.test") == bind.ask("_acme-challenge.u2.example.test") == []

    @pytest.mark.servers
    def test_the_example_of_dehydrated(self, zone: Host, bind: testbed.Bind, tmp_path: Path) -> None:
        example = testbed.setup("dehydrated") / "hook.sh"
        text, count = re.subn(r"# (printf 'server .* nsupdate) -k \S+", r"\1", example.read_text())
        assert count == 2, "its own lines for nsupdate, which it offers as comments"
        (tmp_path / "hook.sh").write_text(text)
        (tmp_path / "hook.sh").chmod(0o755)
        zone.environment["PATH"] = bind.path
        zone.write(nsupdate="", hook=f"dehydrated:{tmp_path}/hook.sh")
        done = zone.run("issue", "d.example.test", "*.d.example.test")
        assert done.status == 0, done.err
        assert bind.ask("_acme-challenge.d.example.test") == []

    @pytest.mark.servers
    def test_a_lego_hook_is_called_with_where_the_record_stands_in_the_end(
            self, zone: Host, bind: testbed.Bind, tmp_path: Path) -> None:
        hook = recorder(tmp_path, f"""
            [ "$1" = present ] && do=add || do=delete
            printf "server 127.0.0.1 {bind.port}\\nupdate $do $2 1 TXT $3\\nsend\\n" | nsupdate
            """)
        zone.environment["PATH"] = bind.path
        zone.write(nsupdate="", hook=f"lego:{hook}")
        done = zone.run("issue", "l.example.test", "*.alias.example.test")
        assert done.status == 0, done.err
        calls = [call for call, _ in noted(hook)]
        assert sorted(call[0] for call in calls) == ["cleanup"] * 2 + ["present"] * 2
        assert {call[1] for call in calls} == {"_acme-challenge.l.example.test.", "alias.validation.elsewhere.test."}
        assert len({call[2] for call in calls}) == 2
        assert bind.ask("alias.validation.elsewhere.test") == []


def greeted(port: int, name: str, protocol: str) -> bytes | None:
    """The certificate that a TLS server shows for a name and an ALPN protocol; None where it takes neither."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as plain, \
            context.wrap_socket(plain, server_hostname=name) as secure:
        return secure.getpeercert(True) if secure.selected_alpn_protocol() == protocol else None
    return None


def content(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    return path.read_bytes() if path.is_file() else None


@pytest.mark.pebble
@pytest.mark.process
class TestChallenges:
    """All types of challenges, each answered in all ways that there are."""

    @pytest.mark.servers
    def test_dns_by_nsupdate(self, zone: Host, bind: testbed.Bind) -> None:
        bind.update('add _acme-challenge.one.example.test 1 TXT "of another"')
        done = zone.run("issue", "one.example.test")
        assert done.status == 0, done.err
        zone.pair("one.example.test")
        assert bind.ask("_acme-challenge.one.example.test") == ["of another"]
        assert zone.run("renew", "--force").status == 0

    @pytest.mark.servers
    def test_a_wildcard_and_its_base_share_a_record(self, zone: Host, bind: testbed.Bind) -> None:
        done = zone.run("issue", "two.example.test", "*.two.example.test")
        assert done.status == 0, done.err
        assert set(wucme.facts(zone.pair("two.example.test")[0]).names) == {"*.two.example.test", "two.example.test"}
        assert bind.ask("_acme-challenge.two.example.test") == []

    @pytest.mark.servers
    @pytest.mark.parametrize("name", ["alias", "chained"])
    def test_a_record_is_set_where_a_cname_leads(self, name: str, zone: Host, bind: testbed.Bind) -> None:
        done = zone.run("issue", f"{name}.example.test", f"*.{name}.example.test")
        assert done.status == 0, done.err
        assert f"setting {name}.validation.elsewhere.test. TXT " in done.err
        assert bind.ask(f"{name}.validation.elsewhere.test") == []

    @pytest.mark.servers
    @pytest.mark.parametrize("patience", ["60s", "1s"])
    def test_every_name_server_is_waited_for(self, patience: str, fake: fakeca.FakeCA, tmp_path: Path) -> None:
        addresses = [testbed.own_address(53), testbed.own_address(53)]
        zones = {"example.test": ["* A 127.0.0.1"]}
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(testbed.Bind(tmp_path / "first", zones, servers=addresses))
            second = stack.enter_context(testbed.Bind(tmp_path / "second", zones, of=first))
            for address, server in zip(addresses, (first, second)):
                stack.enter_context(testbed.port_53(address, server.port))
            fake.validate = lambda name, token, text: fakeca.b64(hashlib.sha256(text.encode()).digest()) in second.ask(
                f"_acme-challenge.{name}")
            host = Host(tmp_path, fake.url, fake.ca_file)
            host.environment["PATH"] = first.path
            host.write(listen="", challenge="dns-01", nsupdate=f"{first.key_file} {addresses[0]}", dns_wait=patience)
            with host.start("issue", "lag.example.test") as process:
                wait_until(lambda: first.ask("_acme-challenge.lag.example.test"))
                if patience == "60s":
                    assert process.poll() is None
                    assert not any(path.startswith("/challenge") for _, path, _ in fake.requests)
                    second.refresh()
                _, said = process.communicate(timeout=30)
            assert first.ask("_acme-challenge.lag.example.test") == []
        assert process.returncode == (0 if patience == "60s" else 1), said
        if patience == "1s":
            assert "ns2.example.test" in said
            assert "dns_wait" in said
            assert not any(path.startswith("/challenge") for _, path, _ in fake.requests)

    @pytest.mark.servers
    def test_a_wrong_key_is_said_and_leaves_nothing(self, zone: Host, bind: testbed.Bind, tmp_path: Path) -> None:
        (tmp_path / "wrong.key").write_text(re.sub('secret ".', 'secret "A' if 'secret "B' in bind.key_file.read_text()
                                                   else 'secret "B', bind.key_file.read_text()))
        (tmp_path / "wrong.key").chmod(0o600)
        zone.write(nsupdate=f"{tmp_path}/wrong.key {bind.address}")
        done = zone.run("issue", "three.example.test")
        assert done.status == 1
        failure = next(line for line in done.lines if "failed: " in line)
        assert "nsupdate" in failure
        assert re.search("NOTAUTH|BADSIG|bad", failure)
        assert "stays behind" not in done.err, "for nothing was set"
        assert bind.ask("_acme-challenge.three.example.test") == []

    @pytest.mark.servers
    @pytest.mark.parametrize(("setting", "said"), [("/nonexistent/key {address}", "/nonexistent/key"),
                                                   ("{key} 127.0.0.1:1", "127.0.0.1")])
    def test_updates_that_cannot_be(self, setting: str, said: str, zone: Host, bind: testbed.Bind) -> None:
        zone.write(nsupdate=setting.format(key=bind.key_file, address=bind.address))
        done = zone.run("issue", "four.example.test")
        assert done.status == 1
        assert said in done.err
        assert "Traceback" not in done.err

    @pytest.mark.servers
    def test_a_lasting_record_is_asked_for_once(self, zone: Host, bind: testbed.Bind) -> None:
        zone.environment["PATH"] = bind.path
        zone.write(nsupdate="", challenge="dns-persist-01")
        bind.update('add _validation-persist.five.example.test 1 TXT "other.example; accounturi=https://other.example/1"')
        done = zone.run("issue", "five.example.test")
        assert done.status == 1
        record = re.search(r'(_validation-persist\.five\.example\.test)\S* .*TXT "(.*?accounturi=.*?)"', done.err)
        assert record, done.err
        assert "other.example/1" in done.err, "what was found instead"
        bind.update(f'add {record[1]} 1 TXT "{record[2]}"')
        assert zone.run("issue", "five.example.test").status == 0
        assert zone.run("renew", "--force").status == 0
        assert record[2] in bind.ask(record[1]), "it stays"

    @pytest.mark.servers
    def test_a_lasting_record_for_a_wildcard_says_so(self, zone: Host, bind: testbed.Bind) -> None:
        zone.environment["PATH"] = bind.path
        zone.write(nsupdate="", challenge="dns-persist-01")
        said = zone.run("issue", "*.six.example.test", "six.example.test").err
        record = re.search(r'TXT "([^"]*; policy=wildcard)"', said)
        assert record, said
        bind.update(f'add _validation-persist.six.example.test 1 TXT "{record[1].replace("; policy=wildcard", "")}"')
        assert zone.run("issue", "*.six.example.test", "six.example.test").status == 1, "that of the base is too little"
        bind.update(f'add _validation-persist.six.example.test 1 TXT "{record[1]}"')
        done = zone.run("issue", "*.six.example.test", "six.example.test")
        assert done.status == 0, done.err

    @pytest.mark.servers
    @pytest.mark.parametrize("draft", [0, 1, 2])
    @pytest.mark.parametrize("wildcard", ["", "*."])
    def test_lasting_records_of_each_draft(self, draft: int, wildcard: str, fake: fakeca.FakeCA, lab: Host,
                                           bind: testbed.Bind) -> None:
        fake.draft, fake.records = draft, bind.ask
        name = f"draft{draft}{'w' * len(wildcard)}.example.test"
        lab.environment["PATH"] = bind.path
        lab.write(listen="", challenge="dns-persist-01")
        record = re.search(rf'(_validation-persist\.{name})\S* .*TXT "(.*?)"', lab.run("issue", wildcard + name).err)
        assert record
        bind.update(f'add {record[1]} 1 TXT "{record[2]}"')
        done = lab.run("issue", wildcard + name)
        assert done.status == 0, done.err
        assert ("account-hash/sha-256/" in record[2]) == (draft == 2)

    def test_the_check_value_of_lasting_records(self) -> None:
        assert fakeca.account_digest("example.com", "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
                                     "https://ca.example/acct/123") == "5SQm7n6tPh2-PlLbCKGnViTXX5z19SCN4cPGQHSk-kw"

    def test_tls_alpn(self, host: Host, pebble: testbed.Pebble) -> None:
        host.write(challenge="tls-alpn-01", listen="",
                   listen_tls=f"127.0.0.1:{pebble.tls_port} [::1]:{pebble.tls_port}")
        names = ["a.example.test", "b.example.test", "127.0.0.1", "::1"]
        done = host.run("issue", *names)
        assert done.status == 0, done.err
        assert set(wucme.facts(host.pair()[0]).names) == set(names)
        assert not host.left()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", pebble.tls_port)) != 0

    def test_the_tls_alpn_listener_shows_its_certificate_to_that_question_alone(
            self, fake: fakeca.FakeCA, lab: Host) -> None:
        port = testbed.free_ports(1)[0]
        seen: list[tuple[bytes | None, ...]] = []

        def look(name: str, token: str, text: str) -> bool:
            questions = [(name, "acme-tls/1"), (name, "http/1.1"), ("other.example.test", "acme-tls/1")]
            seen.append((*(greeted(port, *question) for question in questions),
                         b"\x04\x20" + hashlib.sha256(text.encode()).digest()))
            return True

        fake.validate = look
        lab.write(challenge="tls-alpn-01", listen="", listen_tls=f"127.0.0.1:{port}")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        der, without, of_another, proof = seen[0]
        assert (without, of_another) == (None, None)
        extensions = x509.load_der_x509_certificate(der or b"").extensions
        assert [*extensions.get_extension_for_class(x509.SubjectAlternativeName).value] == [
            x509.DNSName("a.example.test")]
        found = extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"))
        assert isinstance(found.value, x509.UnrecognizedExtension)
        assert (found.critical, found.value.value) == (True, proof)

    @pytest.mark.servers
    def test_http_over_ipv6(self, zone: Host, pebble_of_bind: testbed.Pebble) -> None:
        zone.write(challenge="http-01", nsupdate="", listen=f"[::1]:{pebble_of_bind.http_port}")
        done = zone.run("issue", "v.six.example.test", "::1")
        assert done.status == 0, done.err
        assert set(wucme.facts(zone.pair("v.six.example.test")[0]).names) == {"v.six.example.test", "::1"}

    def test_addresses_over_both_protocols(self, host: Host, pebble: testbed.Pebble) -> None:
        host.write(listen=f"127.0.0.1:{pebble.http_port} [::1]:{pebble.http_port}")
        done = host.run("issue", "127.0.0.1", "::1")
        assert done.status == 0, done.err
        assert set(wucme.facts(host.pair("127.0.0.1")[0]).names) == {"127.0.0.1", "::1"}

    @pytest.mark.parametrize("count", [1, 2])
    def test_web_roots(self, count: int, host: Host, pebble: testbed.Pebble, tmp_path: Path) -> None:
        roots = [tmp_path / f"root{number}" for number in range(count)]
        kept = roots[0] / ".well-known"
        kept.mkdir(parents=True, mode=0o750)
        roots[-1].mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(kept, 65534, 65534)
        before = kept.stat()
        seen: set[int] = set()

        def find(path: str) -> bytes | None:
            found = {content(root / path.lstrip("/")) for root in roots}
            seen.update(mode(root / path.lstrip("/")) for root in roots)
            return found.pop() if len(found) == 1 else None

        host.write(listen="", webroot=" ".join(map(str, roots)))
        with Documents(pebble.http_port, find):
            done = host.run("issue", "a.example.test", "b.example.test")
        assert done.status == 0, done.err
        assert seen == {0o644}
        after = kept.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert not [path for root in roots for path in root.rglob("*") if path.is_file()]

    def test_a_web_root_that_cannot_be_written(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        (tmp_path / "root").write_text("a file")
        lab.write(listen="", webroot=f"{tmp_path}/root")
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert f"{tmp_path}/root" in next(line for line in done.lines if "failed: " in line)

    def test_a_server_that_answers_by_itself(self, host: Host, pebble: testbed.Pebble) -> None:
        host.write(listen="", stateless="yes")

        def find(path: str) -> bytes:
            key = wucme.parse_key((host.directory / "wucme_k_account.pem").read_bytes())
            return f"{path.rpartition('/')[2]}.{wucme.thumbprint(key)}".encode()

        with Documents(pebble.http_port, find):
            done = host.run("issue", "a.example.test")
        assert done.status == 0, done.err

    def test_what_is_not_offered_is_passed_over(self, fake: fakeca.FakeCA, lab: Host) -> None:
        fake.offered = {"unheard-of-01", "dns-persist-01", "http-01"}
        lab.write(challenge="tls-alpn-01 dns-01 http-01", listen_tls=f"127.0.0.1:{testbed.free_ports(1)[0]}",
                  hook="mod_md:/bin/true")
        done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err
        assert orders(fake) == 1
        assert "unheard" not in done.err

    def test_nothing_that_is_wanted_is_offered(self, fake: fakeca.FakeCA, lab: Host) -> None:
        fake.offered = {"unheard-of-01", "dns-01"}
        done = lab.run("issue", "a.example.test")
        assert done.status == 1
        assert "dns-01" in next(line for line in done.lines if "failed: " in line)

    def test_a_type_whose_port_is_busy_gives_way_to_the_next(self, fake: fakeca.FakeCA, lab: Host) -> None:
        port = testbed.free_ports(1)[0]
        lab.write(challenge="tls-alpn-01 http-01", listen_tls=f"127.0.0.1:{port}")
        with socket.create_server(("127.0.0.1", port)):
            done = lab.run("issue", "a.example.test")
        assert done.status == 0, done.err

    def test_each_name_by_the_type_that_can_prove_it(self, fake: fakeca.FakeCA, lab: Host) -> None:
        fake.validate = lambda name, token, text: True
        lab.write(challenge="http-01 dns-01", hook="mod_md:/bin/true")
        done = lab.run("issue", "a.example.test", "*.b.example.test")
        assert done.status == 0, done.err
        kinds = {path.rpartition("/")[2] for _, path, _ in fake.requests if path.startswith("/challenge/")}
        assert kinds == {"http-01", "dns-01"}

    def test_what_is_left_of_a_failed_order_is_given_up(self, fake: fakeca.FakeCA, lab: Host) -> None:
        going_on = threading.Event()
        fake.validate = lambda name, token, text: name != "b.example.test" and going_on.wait(20)
        try:
            done = lab.run("issue", "a.example.test", "b.example.test")
        finally:
            going_on.set()
        assert done.status == 1
        given_up = [path for _, path, payload in fake.requests if payload == {"status": "deactivated"}]
        assert len(given_up) == 1
        assert given_up[0].startswith("/authz/")

    def test_rsa_and_ecdsa_side_by_side(self, host: Host, pebble: testbed.Pebble) -> None:
        host.write(sections="""
            [a.example.test]
            [a-rsa]
            names = a.example.test
            key = rsa-2048
            """)
        done = host.run()
        assert done.status == 0, done.err
        kinds = {stem: wucme.facts(host.pair(stem)[0]) for stem in ("a.example.test", "a-rsa")}
        assert {stem: (facts.kind, facts.names) for stem, facts in kinds.items()} == {
            "a.example.test": ("ecdsa-p256", ("a.example.test",)), "a-rsa": ("rsa-2048", ("a.example.test",))}
        again = host.run("renew", "--force", "--challenge", "tls-alpn-01", "--listen-tls",
                         f"127.0.0.1:{pebble.tls_port}", "a-rsa", "a.example.test")
        assert again.status == 0, again.err
        kinds["a.example.test"] = wucme.facts(host.pair()[0])
        assert host.run("renew", "a-rsa", "--force").status == 0
        assert wucme.facts(host.pair("a-rsa")[0]).kind == "rsa-2048"
        assert wucme.facts(host.pair()[0]) == kinds["a.example.test"]

    def test_a_request_whose_key_is_elsewhere(self, host: Host, tmp_path: Path) -> None:
        key = new_key()
        names = x509.SubjectAlternativeName([x509.DNSName("csr.example.test"), x509.DNSName("www.csr.example.test")])
        request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, False).sign(
            key, hashes.SHA256())
        (tmp_path / "my.csr").write_bytes(request.public_bytes(serialization.Encoding.PEM))
        done = host.run("issue", "--csr", tmp_path / "my.csr")
        assert done.status == 0, done.err
        facts = wucme.facts(host.chain("csr.example.test").read_bytes())
        assert facts.names == ("csr.example.test", "www.csr.example.test")
        assert facts.key == wucme.key_hash(key.public_key())
        assert not host.key("csr.example.test").exists()
        both = (tmp_path / "my.csr").read_bytes() + wucme.key_pem(key)
        (tmp_path / "my.csr").write_bytes(both)             # as some tools write it
        assert host.run("renew", "--force").status == 0
        assert host.run().status == 0
        assert (tmp_path / "my.csr").read_bytes() == both
        assert sorted(path.name for path in tmp_path.glob("my.csr*")) == ["my.csr"]
        for bad in (b"", CHAIN, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
            (tmp_path / "bad.csr").write_bytes(bad)
            refused = host.run("issue", "--csr", tmp_path / "bad.csr")
            assert refused.status in (1, 2)
            assert "--csr" in refused.err


@pytest.mark.process
@pytest.mark.servers
class TestSecondCertificationAuthority:
    """The same certificates from Smallstep's code, which has other habits than Let's Encrypt's."""

    def test_http(self, other: Host, caddy: testbed.CaddyCA) -> None:
        done = other.run("issue", "a.example.test", "b.example.test")
        assert done.status == 0, done.err
        chain, key = other.pair()
        assert verifies(chain, caddy.root(), "b.example.test")
        assert other.run("renew", "--force").status == 0
        assert other.pair()[1] == key
        assert other.run().status == 0

    def test_dns_with_a_wildcard(self, other: Host, bind: testbed.Bind) -> None:
        other.write(listen="", challenge="dns-01", nsupdate=f"{bind.key_file} {bind.address}")
        done = other.run("issue", "caddy.example.test", "*.caddy.example.test")
        assert done.status == 0, done.err
        assert set(wucme.facts(other.pair("caddy.example.test")[0]).names) == {
            "caddy.example.test", "*.caddy.example.test"}
        assert bind.ask("_acme-challenge.caddy.example.test") == []

    def test_tls_alpn_and_addresses(self, other: Host, caddy: testbed.CaddyCA) -> None:
        if not caddy.tls_names:
            raise testbed.Missing("only root can lead this CA to a port of ours")
        address = caddy.tls_address
        other.write(challenge="tls-alpn-01", listen="", listen_tls=f"{address}:443")
        done = other.run("issue", *caddy.tls_names, address)
        assert done.status == 0, done.err
        assert set(wucme.facts(other.pair(caddy.tls_names[0])[0]).names) == {*caddy.tls_names, address}
        other.write(listen=f"{address}:80")
        done = other.run("issue", address)
        assert done.status == 0, done.err

    def test_a_challenge_that_stays_pending_is_posted_again(self, other: Host, caddy: testbed.CaddyCA) -> None:
        caddy.refusing = 1
        done = other.run("issue", "again.example.test")
        assert caddy.refusing == 0
        assert done.status == 0, done.err

    def test_a_challenge_that_never_succeeds_ends_with_its_error(self, other: Host, caddy: testbed.CaddyCA) -> None:
        caddy.refusing = 1000
        try:
            done = in_world(other, HASTE, "issue", "never.example.test")
        finally:
            caddy.refusing = 0
        assert done.status == 1
        failure = next(line for line in done.lines if "failed: " in line)
        assert "never.example.test" in failure
        assert "502" in failure or "connection" in failure
        assert not other.left()


@pytest.mark.process
class TestLoad:
    """The load list, and the ledger that drives it."""

    @pytest.fixture
    def tame(self, tmp_path: Path) -> Host:
        """A host with a certificate that is not due."""
        host = Host(tmp_path)
        host.settings["server"] = "letsencrypt"
        host.old_pair("a.example.test", days=80)
        host.write()
        return host

    def test_items_run_in_order_with_their_environment(self, tame: Host, tmp_path: Path) -> None:
        procedure = tmp_path / "with blank.sh"
        procedure.write_text('#!/bin/sh\necho "$1|$WUCME_NAME|$WUCME_NAMES|$WUCME_CERT|$WUCME_KEY|$WUCME_DIRECTORY|'
                             f'$WUCME_HOST|$WUCME_FINGERPRINT|$PWD|$(umask)" > {tmp_path}/told\n')
        procedure.chmod(0o755)
        tame.write("$ echo first; echo to stderr >&2", f"@'{procedure}' 'one argument'", "$ : %s $$ \\; # all of it")
        done = tame.run(PATH="/usr/bin:/bin")
        assert done.status == 0, done.err
        assert [line for line in done.lines if line.startswith("load ")] == [
            "load succeeded: $ echo first; echo to stderr >&2 (a.example.test)",
            f"load succeeded: @'{procedure}' 'one argument' (a.example.test)",
            "load succeeded: $ : %s $$ \\; # all of it (a.example.test)"]
        told = (tmp_path / "told").read_text().strip().split("|")
        about = wucme.facts(tame.pair()[0])
        assert told[:9] == ["one argument", "a.example.test", "a.example.test", str(tame.chain()), str(tame.key()),
                            str(tame.directory), "alpha", about.fingerprint, "/"]
        assert any(line.endswith(": to stderr") for line in done.lines)
        assert tame.run() == Done(0, "", "")

    def test_failed_load_is_owed_until_it_passes(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"$ cat {tmp_path}/switch", f"$ echo x >> {tmp_path}/other")
        done = tame.run()
        assert done.status == 1
        assert "No such file or directory; it is owed, and tried again by the next run" in done.err
        assert done.lines[-1] == "2 files, 1 certs, 0 renewed, 0 failed, 1 owed"
        assert tame.run() == Done(1, "", ""), "tried again, failed as before: not told twice"
        assert "owed since " in tame.run("status").out
        assert tame.run("status").status == 1
        (tmp_path / "switch").write_text("on\n")
        assert "load succeeded" in tame.run().err
        assert (tmp_path / "other").read_text() == "x\n", "what was done is not done again"
        assert tame.run() == Done(0, "", "")
        assert tame.run("status").status == 0

    def test_what_is_owed_follows_the_list_and_the_certificate(self, tame: Host, tmp_path: Path) -> None:
        count = tmp_path / "count"
        first, second = f"$ echo one >> {count}", f"$ echo two >> {count}"
        tame.write(first)
        tame.run()
        tame.write(first, second)
        tame.run()
        assert count.read_text().split() == ["one", "two"]
        tame.write(second)
        tame.run()
        tame.write(first, second)
        tame.run()
        assert count.read_text().split() == ["one", "two", "one"], "a removed item is forgotten"
        tame.old_pair("a.example.test", days=81)
        tame.run()
        assert count.read_text().split()[3:] == ["one", "two"], "a certificate put there by hand is loaded"

    @pytest.mark.parametrize("text", ["\0\xff", '{"machine": "other", "certificates": {}}', "[" * 100000], ids=brief)
    def test_spoilt_ledger_means_owed(self, tame: Host, tmp_path: Path, text: str) -> None:
        tame.write(f"$ echo x >> {tmp_path}/count")
        tame.run()
        (tame.directory / "wucme_l_alpha.json").write_text(text)
        assert tame.run().status == 0
        assert (tmp_path / "count").read_text() == "x\nx\n"
        assert tame.run() == Done(0, "", "")

    def test_each_host_loads_for_itself(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"$ echo $WUCME_HOST >> {tmp_path}/count")
        tame.run()
        tame.run("--host", "beta")
        tame.run()
        assert (tmp_path / "count").read_text().split() == ["alpha", "beta"]

    def test_flood_is_bounded(self, tame: Host) -> None:
        tame.write("$ head -c 50000000 /dev/zero; printf '\\033[31m\\n'; seq 100000")
        done = tame.run()
        assert done.status == 0
        assert len(done.err) < 2_000_000
        assert "\x1b" not in done.err

    def test_procedure_that_is_not_there_is_owed(self, tame: Host) -> None:
        tame.write("@/nonexistent/procedure")
        done = tame.run()
        assert done.status == 1
        assert "cannot be run: No such file or directory" in done.err

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root refuses to run what anyone may write")
    def test_procedure_that_anyone_may_write(self, tame: Host, tmp_path: Path) -> None:
        procedure = tmp_path / "open.sh"
        procedure.write_text("#!/bin/sh\ntouch ran\n")
        procedure.chmod(0o777)
        tame.write(f"@{procedure}")
        assert f"chmod o-w {procedure}" in tame.run().err

    @pytest.mark.parametrize(("item", "said"), [
        ("$ exit 127", "exit status 127"), ("$ kill -9 $$", "killed by signal 9"), ("$ no-such-command", "not found"),
        ("@/", "Permission denied"), ("@/nonexistent", "No such file or directory"),
        ("$ printf '\\000\\377\\033[2J'; exit 3", "\\x1b[2J"),
    ])
    def test_whatever_fails_is_owed_and_the_rest_is_done(self, tame: Host, tmp_path: Path, item: str,
                                                         said: str) -> None:
        tame.write(item, f"$ echo x >> {tmp_path}/rest")
        for _ in range(2):
            done = tame.run("--verbose")
            assert (done.status, done.lines[-1]) == (1, "2 files, 1 certs, 0 renewed, 0 failed, 1 owed")
            assert said in done.err
            assert all(line.isprintable() for line in done.err.splitlines())
        assert (tmp_path / "rest").read_text() == "x\n"

    def test_garbage_on_the_output_is_no_failure(self, tame: Host) -> None:
        tame.write("$ head -c 200000 /dev/urandom; head -c 100000 /dev/urandom >&2")
        assert tame.run().status == 0
        log = (tame.directory / "wucme.log").read_text()
        assert all(line.isprintable() for line in log.splitlines())
        assert len(log) < 1_000_000

    def test_load_that_takes_too_long_is_stopped_with_its_children_and_the_next_is_done(self, tame: Host,
                                                                                        tmp_path: Path) -> None:
        tame.write(f"$ sleep 321 & echo $! > {tmp_path}/child; (sleep 322 & echo $! > {tmp_path}/grandchild); wait",
                   "$ echo after", load_timeout="1s")
        begun = time.monotonic()
        done = tame.run()
        assert time.monotonic() - begun < 6
        assert (done.status, "stopped after 1 s (load_timeout)" in done.err) == (1, True)
        assert "load succeeded: $ echo after" in done.err
        for name in ("child", "grandchild"):
            pid = int((tmp_path / name).read_text())
            wait_until(functools.partial(lambda pid: not alive(pid), pid))

    def test_bomb_of_children_ends_with_the_run(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"$ for n in $(seq 200); do sleep 323 & echo $! >> {tmp_path}/bomb; done; exit 4")
        assert "exit status 4" in tame.run().err
        pids = [int(pid) for pid in (tmp_path / "bomb").read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert len(pids) == 200

    @pytest.mark.parametrize("text", ["\0\xff", '{"facts": 7, "retry_at": "x", "window": [1]}',
                                      '{"retry_at": 1e300, "held_until": 1e300, "ask_at": 1e300, "failures": -5}',
                                      '{"order": "file:///etc/passwd", "order_server": 3}', "[" * 100000], ids=brief)
    def test_state_that_is_spoilt_is_learnt_again(self, fake: fakeca.FakeCA, lab: Host, text: str) -> None:
        before = lab.old_pair("a.example.test")
        for name in ("s_a.example.test", "s_account", "l_alpha"):
            (lab.directory / f"wucme_{name}.json").write_text(text)
        (lab.directory / "wucme.lock").write_text(text)
        lab.run("status")
        assert lab.run().status == 0
        assert lab.pair() != before
        assert lab.run() == Done(0, "", "")

    def test_load_verb_repeats_the_list(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"$ echo x >> {tmp_path}/count")
        assert tame.run("load", "--dry-run").out == f"would run $ echo x >> {tmp_path}/count for a.example.test\n"
        assert not (tmp_path / "count").exists()
        tame.old_pair("b.example.test", days=80)
        assert "b.example.test" not in tame.run("load", "a.example.test", "--dry-run").out
        for kind in "ck":
            (tame.directory / f"wucme_{kind}_b.example.test.pem").unlink()
        for _ in range(2):
            assert tame.run("load").status == 0
        assert tame.run("load", "a.example.test").status == 0
        assert (tmp_path / "count").read_text() == "x\nx\nx\n"
        assert tame.run("load", "b.example.test").status == 2

    def test_what_is_missing_on_the_host_is_owed(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"> {tmp_path}/none/x.pem", f"> {tmp_path}/x.pem owner=no-such-user",
                   f"> {tmp_path}/x.p12 what=p12 password_file={tmp_path}/password", "@/nonexistent/procedure")
        done = tame.run()
        assert done.status == 1
        assert f"{tmp_path}/none: no such directory; make it" in done.err
        assert "owner=no-such-user: no such user or group on this host" in done.err
        assert f"{tmp_path}/password: No such file or directory; it is owed" in done.err
        assert done.lines[-1].endswith("4 owed")
        assert tame.run() == Done(1, "", "")
        assert not list(tmp_path.glob("*.pem"))
        (tmp_path / "password").write_text("\n")
        assert f"{tmp_path}/password: holds no password" in tame.run().err

    def test_copies(self, tame: Host, tmp_path: Path) -> None:
        (tmp_path / "password").write_text("secret\n")
        whats = {"chain": 0o644, "cert": 0o644, "issuers": 0o644, "key": 0o600, "pair": 0o600, "p12": 0o600}
        chain, key = tame.pair()
        leaf, issuer = wucme.certificates(chain)
        tame.write(*(f"> {tmp_path}/{{name}}.{what} what={what}"
                     + (f" password_file={tmp_path}/password" if what == "p12" else "") for what in whats),
                   f"> {tmp_path}/shared what=key mode=0640 owner={'daemon:' if os.geteuid() == 0 else ':'}"
                   f"{'daemon' if os.geteuid() == 0 else os.getegid()}")
        done = tame.run()
        assert done.status == 0, done.err
        made = {what: tmp_path / f"a.example.test.{what}" for what in whats}
        assert {what: mode(path) for what, path in made.items()} == whats
        held = {what: path.read_bytes() for what, path in made.items()}
        expected = {"chain": chain, "cert": leaf, "issuers": issuer, "key": key, "pair": key + chain}
        assert {what: held[what] for what in expected} == expected
        assert wucme.p12_holds(held["p12"], expected["pair"], b"secret")
        assert not wucme.p12_holds(held["p12"], expected["pair"], b"other")
        assert not wucme.p12_holds(held["p12"], key + leaf, b"secret")
        shared = tmp_path / "shared"
        assert (mode(shared), shared.owner() == "daemon") == (0o640, os.geteuid() == 0)
        inodes = {path: path.stat().st_ino for path in [shared, *made.values()]}
        shared.chmod(0o600)
        assert tame.run("load").status == 0
        assert [path for path, inode in inodes.items() if path.stat().st_ino != inode] == [shared]
        assert mode(shared) == 0o640
        assert not list(tmp_path.glob(".*"))

    def test_copies_of_a_combined_file_hold_no_key(self, tame: Host, tmp_path: Path) -> None:
        chain, key = tame.pair()
        tame.chain().write_bytes(key + chain)
        tame.key().unlink()
        tame.key().symlink_to(tame.chain().name)
        tame.write(f"> {tmp_path}/chain", f"> {tmp_path}/pair what=pair")
        assert tame.run().status == 0
        assert (tmp_path / "chain").read_bytes() == chain
        assert (tmp_path / "pair").read_bytes() == key + chain

    @pytest.mark.parametrize("item", ["> {place}/x.pem", "> {place}/./x.pem what=key"])
    def test_two_copies_in_one_place_are_refused(self, tame: Host, tmp_path: Path, item: str) -> None:
        tame.old_pair("b.example.test", days=80)
        tame.write("$ true", item.format(place=tmp_path))
        for arguments in ((), ("load",), ("--dry-run",)):
            done = tame.run(*arguments)
            assert done.status == 2
            assert re.search(r"wucme.ini:\d+: > .*/x.pem would be written for a.example.test and for b", done.err)
        tame.write(f"> {tmp_path}/{{name}}.pem", f"> {tmp_path}/./{{name}}.pem what=key")
        assert "/a.example.test.pem would be written for a.example.test and for a.example.test" in tame.run().err
        tame.write(f"> {tame.directory}/x.pem")
        assert "is in wucme's own directory" in tame.run().err

    def test_proof_that_fails_has_the_server_reloaded_again(self, tame: Host, tmp_path: Path) -> None:
        old = tame.old_pair("a.example.test", days=70)
        systemctl = tmp_path / "bin/systemctl"
        systemctl.parent.mkdir()
        systemctl.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
        systemctl.chmod(0o755)
        path = f"{systemctl.parent}:{os.environ['PATH']}"
        with testbed.TlsServer(tmp_path / "web", testbed.Site("x", tame.chain(), tame.key())) as server:
            tame.old_pair("a.example.test", days=80)
            tame.write("+systemd web", f"? 127.0.0.1:{server.port}", grace="0s")
            done = tame.run(PATH=path)
            assert done.status == 1
            assert "load succeeded: +systemd web" in done.err
            assert (f"127.0.0.1 asked for a.example.test shows another certificate, for a.example.test, serial "
                    f"{wucme.facts(old[0]).serial}, that expires {wucme.gmt(wucme.facts(old[0]).not_after)}; it is owed"
                    ) in done.err
            assert len([load for load in json.loads(tame.run("status", "--json").out)["certificates"][0]["loads"]
                        if load["state"] == "owed"]) == 2
            systemctl.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\nkill -HUP {server.pid}\n")
            tame.write("+systemd web", f"? 127.0.0.1:{server.port}")
            assert tame.run(PATH=path).status == 0
            assert (tmp_path / "asked").read_text() == "try-reload-or-restart web\n" * 2
            assert tame.run(PATH=path) == Done(0, "", "")

    def test_common_proof_is_not_owed_by_a_certificate_without_the_name(self, tame: Host) -> None:
        tame.write("? other.example.test:443")
        assert tame.run() == Done(0, "", "")
        assert tame.run("load", "--dry-run").out == "nothing to do\n"
        assert json.loads(tame.run("status", "--json").out)["certificates"][0]["loads"] == []

    def test_systemctl_that_fails_is_owed(self, tame: Host) -> None:
        tame.write("+systemd no-such-unit")
        done = tame.run()
        assert (done.status, "load failed: +systemd no-such-unit" in done.err) == (1, True)

    @pytest.mark.servers
    @pytest.mark.pebble
    @pytest.mark.parametrize("kind", [testbed.Nginx, testbed.Apache, testbed.Haproxy, testbed.Caddy, testbed.Lighttpd,
                                      testbed.Postfix, testbed.Dovecot])
    def test_server_serves_the_new_certificate(self, kind: type[testbed.WebServer], host: Host,
                                               pebble: testbed.Pebble, tmp_path: Path) -> None:
        before, pair, name = host.old_pair("a.example.test"), tmp_path / "pair.pem", kind.__name__.lower()
        pair.write_bytes(before[1] + before[0])
        site = testbed.Site("a.example.test", pair if name == "haproxy" else host.chain(), host.key())

        def shown() -> str:
            return hashlib.sha256(shown_by(server.port, server.protocol)).hexdigest()

        def on_disk() -> str:
            return wucme.facts(host.pair()[0]).fingerprint

        with kind(tmp_path / "server", [site]) as server:
            host.write(f"> {pair} what=pair", f"+{name}", f"? 127.0.0.1:{server.port}"
                       + (f" starttls={server.protocol}" if server.protocol else ""))
            assert shown() == wucme.facts(before[0]).fingerprint
            seamless = name in ("nginx", "apache", "haproxy")
            with visitors(shown) if seamless else contextlib.nullcontext([]) as visits:
                done = host.run()
                assert done.status == 0, done.err
                wait_until(lambda: on_disk() in (visits if seamless else [shown()]))
            assert on_disk() != wucme.facts(before[0]).fingerprint
            assert set(visits) <= {on_disk(), wucme.facts(before[0]).fingerprint}, "nobody was turned away"
            assert len(set(visits)) == (2 if seamless else 0)
            good = server.config.read_text()
            server.config.write_text(f"{good}\n{server.broken}\n")
            host.settings["grace"] = "0s"
            host.write(f"> {pair} what=pair", f"+{name}")
            done = in_world(host, HASTE, "renew", "--force")
            assert done.status == 1
            assert re.search(r"load failed: \+.*it is owed", done.err)
            assert "nonsense" in done.err, done.err
            server.config.write_text(good)
            assert shown() != on_disk()
            count = pebble.log().count("order-plz")
            assert host.run().status == 0
            wait_until(lambda: shown() == on_disk())
            assert pebble.log().count("order-plz") == count, "paying what is owed takes no order"
            assert host.run() == Done(0, "", "")

    @pytest.mark.servers
    def test_haproxy_without_a_master_is_not_killed(self, tame: Host, tmp_path: Path) -> None:
        pair = tmp_path / "pair.pem"
        tame.write(f"> {pair} what=pair")
        tame.run()

        class Alone(testbed.Haproxy):
            def _command(self) -> list[str]:
                return [word for word in super()._command() if word != "-W"]

        with Alone(tmp_path / "server", [testbed.Site("a.example.test", pair, pair)]) as server:
            tame.write("+haproxy")
            assert "it takes no SIGUSR2; start it with -W" in tame.run().err
            assert shown_by(server.port)

    @pytest.mark.servers
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can start it as another user")
    def test_lighttpd_that_could_not_read_the_key_is_not_reloaded(self, tame: Host, tmp_path: Path) -> None:
        class Lighttpd(testbed.Lighttpd):
            user = "www-data"

        with contextlib.ExitStack() as stack:
            place = stack.enter_context(testbed.reachable())
            for path in (tame.chain(), tame.key()):
                (place / path.name).write_bytes(path.read_bytes())
                (place / path.name).chmod(mode(path))
            site = testbed.Site("a.example.test", *(place / path.name for path in (tame.chain(), tame.key())))
            server = stack.enter_context(Lighttpd(place / "server", [site]))
            tame.write("+lighttpd")
            done = tame.run()
            assert "was not reloaded, its configuration test failed" in done.err
            assert "Permission denied" in done.err
            assert done.status == 1
            assert shown_by(server.port)


def readme(*words: str) -> str:
    """The one block of code in the README that has all of these words."""
    blocks = re.findall(r"(?m)(?:^    .*\n)+", (SCRIPT.parent / "README.md").read_text("utf-8"))
    [found] = [textwrap.dedent(block) for block in blocks if all(word in block for word in words)]
    return found


def install(path: Path, text: str, **changes: object) -> Path:
    """Write a procedure, with changes for this test; each must be possible."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, str(new))
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.process
class TestRecipes:
    """What the README shows, as it stands there."""

    @pytest.mark.servers
    @pytest.mark.pebble
    def test_mail_servers_with_copies_of_their_own(self, host: Host, tmp_path: Path) -> None:
        """The load list of the document that this started from: + and a procedure for the mail server."""
        before, tls = host.old_pair("a.example.test"), tmp_path / "tls"
        tls.mkdir()
        public, private = tls / "mail-pub.pem", tls / "mail-priv.pem"
        public.write_bytes(before[0])
        private.write_bytes(before[1])
        mail = testbed.Site("a.example.test", public, private)
        with testbed.Nginx(tmp_path / "web", [testbed.Site("a.example.test", host.chain(), host.key())]) as web, \
                testbed.Postfix(tmp_path / "postfix", [mail]) as postfix, \
                testbed.Dovecot(tmp_path / "dovecot", [mail]) as dovecot:
            procedure = install(tmp_path / "cert_to_mail.sh", readme("# cert_to_mail.sh"), **{
                "/etc/mail/tls": tls, "doveadm reload": f"doveadm -c {dovecot.config} reload"})
            changes = {"/usr/local/sbin/cert_to_mail.sh": procedure, "/etc/mail/tls": tls,
                       "mail.example.org:25": f"127.0.0.1:{postfix.port}",
                       "mail.example.org:143": f"127.0.0.1:{dovecot.port}"}
            for words in (("@/usr/local/sbin/cert_to_mail.sh", ":143"), ("+postfix", ":143")):
                items = readme(*words)
                for old, new in changes.items():
                    items = items.replace(old, str(new))
                host.write(*(line.strip() for line in items.splitlines()[1:]))
                done = host.run("renew", "--force", MAIL_CONFIG=str(postfix.directory))
                assert done.status == 0, done.err
                assert [mode(path) for path in (public, private)] == [0o644, 0o600]
                assert (public.read_bytes(), private.read_bytes()) == host.pair()
                fingerprint = wucme.facts(host.pair()[0]).fingerprint
                wait_until(lambda wanted=fingerprint: {wanted} == {  # type: ignore[misc]
                    hashlib.sha256(shown_by(one.port, one.protocol)).hexdigest() for one in (web, postfix, dovecot)})
            assert host.run() == Done(0, "", "")

    @pytest.mark.servers
    def test_handing_on_to_other_hosts_one_of_them_down(self, tmp_path: Path) -> None:
        host, there = Host(tmp_path), tmp_path / "there"
        host.settings.update(server="letsencrypt", grace="5s")
        chain, key = host.old_pair("a.example.test", days=80)
        there.mkdir()
        pair = there / "a.example.test.pem"
        old = Path(fakeca.make_pair(tmp_path, "old", ["old.example"], datetime.now(timezone.utc) - timedelta(9),
                                    datetime.now(timezone.utc) + timedelta(9))[0])
        pair.write_bytes(old.read_bytes() + old.with_name("wucme_k_old.pem").read_bytes())
        with testbed.TlsServer(tmp_path / "web", testbed.Site("x", pair, pair)) as server:
            take = install(tmp_path / "bin/take_cert.sh", readme("# take_cert.sh"), **{
                "/etc/haproxy/certs": there, "systemctl reload haproxy": f"kill -HUP {server.pid}"})
            hand = install(tmp_path / "bin/hand_on.sh", readme("# hand_on.sh"))
            with testbed.Sshd(tmp_path / "sshd", take, "web1") as sshd:
                install(tmp_path / "bin/ssh", f'#!/bin/sh\nexec {testbed.program("ssh")} -F {sshd.config} "$@"\n')
                path = f"{tmp_path}/bin:{os.environ['PATH']}"
                host.write(f"@{hand} web1", f"@{hand} web2", f"? 127.0.0.1:{server.port} sni=a.example.test",
                           f"> {tmp_path}/net/{{name}}.pem what=pair")
                done = host.run(PATH=path)
                assert done.status == 1
                assert re.findall(r"load failed: (\S+) (\S+)", done.err) == [
                    (f"@{hand}", "web2"), (">", f"{tmp_path}/net/{{name}}.pem")]
                assert "Connection refused" in done.err
                assert (pair.read_bytes(), mode(pair)) == (key + chain, 0o600)
                inode = pair.stat().st_ino
                sshd.config.write_text(sshd.config.read_text().replace("Host web1", "Host web1 web2"))
                (tmp_path / "net").mkdir()
                assert host.run(PATH=path).status == 0
                assert pair.stat().st_ino != inode
                assert (tmp_path / "net/a.example.test.pem").read_bytes() == key + chain
                refused = subprocess.run([tmp_path / "bin/ssh", "web1", "../x"], stdin=subprocess.DEVNULL,
                                         capture_output=True, check=False, env={"PATH": path})
                assert b"../x: not a name" in refused.stderr
                torn = subprocess.run([tmp_path / "bin/ssh", "web1", "a.example.test"], input=chain[:-40],
                                      capture_output=True, check=False, env={"PATH": path})
                assert torn.returncode == 1
                assert pair.read_bytes() == key + chain

    def test_alerts(self, tmp_path: Path) -> None:
        host = Host(tmp_path)
        host.old_pair("a.example.test", days=80)
        for name in ("sendmail", "curl"):
            install(tmp_path / f"bin/{name}", f'#!/bin/sh\n(echo "$@"; cat) >{tmp_path}/{name}\n')
        example = readme("alert =", "sendmail").replace("/var/lib/prometheus/node-exporter", str(tmp_path))
        host.write(server="letsencrypt")
        host.ini.write_text(host.ini.read_text() + example.partition("[wucme]\n")[2] + "load = $ false\n")
        assert host.run(PATH=f"{tmp_path}/bin:{os.environ['PATH']}").status == 1
        mail = (tmp_path / "sendmail").read_text().splitlines()
        subject = "wucme on alpha: 1 problem"
        assert mail[:6] == ["-t", "To: root", f"Subject: {subject}", "", subject, ""]
        arguments, text = (tmp_path / "curl").read_text().splitlines()
        assert arguments.startswith("-fsS -m 20 -d @- -H Content-Type: application/json https://")
        assert json.loads(text)["text"].splitlines() == mail[4:]
        assert "wucme_loads_owed" in (tmp_path / "wucme.prom").read_text()


@contextlib.contextmanager
def visitors(visit: Callable[[], str]) -> Iterator[list[str]]:
    """Visits without a pause from before until after, and what each came to: a certificate or an error."""
    found: list[str] = []
    over = threading.Event()

    def visits() -> None:
        while not over.is_set():
            try:
                found.append(visit())
            except OSError as error:
                found.append(repr(error))

    thread = threading.Thread(target=visits)
    thread.start()
    try:
        wait_until(lambda: bool(found))
        yield found
    finally:
        over.set()
        thread.join()


def shown_by(port: int, protocol: str = "") -> bytes:
    """The certificate (DER) that a server shows, after STARTTLS where it is a mail server."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if protocol == "smtp":
        with smtplib.SMTP("127.0.0.1", port, timeout=5) as smtp:
            smtp.starttls(context=context)
            assert isinstance(smtp.sock, ssl.SSLSocket)
            return smtp.sock.getpeercert(True) or b""
    if protocol == "imap":
        with imaplib.IMAP4("127.0.0.1", port, timeout=5) as imap:
            imap.starttls(context)
            assert isinstance(imap.sock, ssl.SSLSocket)
            return imap.sock.getpeercert(True) or b""
    with socket.create_connection(("127.0.0.1", port), 5) as plain, \
            context.wrap_socket(plain, server_hostname="a.example.test") as secure:
        return secure.getpeercert(True) or b""


@bounded
@given(words=st.lists(any_line | st.sampled_from(["run", "issue", "a.example", "--force", "--renew", "30d", "--", "-",
                                               "--no-agree", "--load=+nginx", "--listen", "--ini"]), max_size=6))
def test_any_command_line_is_understood_or_refused(words: list[str]) -> None:
    with contextlib.suppress(wucme.SettingsError):
        wucme.read_arguments(words)


@pytest.mark.process
class TestAlerts:
    """Who is told when something is wrong, and the numbers for a monitor."""

    @pytest.fixture
    def tame(self, tmp_path: Path) -> Host:
        """A host with a certificate that is not due, and an alert that writes what it is told."""
        host = Host(tmp_path)
        host.settings.update(server="letsencrypt", alert=(
            '$ (echo "$WUCME_SUBJECT|$WUCME_PROBLEMS|$WUCME_HOST|$WUCME_DIRECTORY"; cat; echo ---)'
            f" >> {tmp_path}/mail"))
        host.old_pair("a.example.test", days=80)
        host.write()
        return host

    def told(self, host: Host) -> list[list[str]]:
        """The alerts so far, by line."""
        mail = host.home / "mail"
        return [text.splitlines() for text in mail.read_text().split("---\n")[:-1]] if mail.exists() else []

    def test_alert_comes_when_the_problems_change(self, tame: Host, tmp_path: Path) -> None:
        assert tame.run() == Done(0, "", "")
        assert self.told(tame) == []
        tame.write(f"$ cat {tmp_path}/switch")
        assert tame.run().status == 1
        assert tame.run("load").status == 1
        assert tame.run().status == 1
        [first] = self.told(tame)
        assert first[:3] == [f"wucme on alpha: 1 problem|1|alpha|{tame.directory}", "wucme on alpha: 1 problem", ""]
        assert first[3].startswith(f"a.example.test: owed: $ cat {tmp_path}/switch: exit status 1: cat: ")
        assert first[-1].startswith(f"1 certs in {tame.directory}; last run: ")
        (tmp_path / "switch").write_text("")
        assert tame.run().status == 0
        assert [one[1] for one in self.told(tame)[1:]] == ["wucme on alpha: all is well again"]
        assert tame.run() == Done(0, "", "")
        assert len(self.told(tame)) == 2

    def test_alert_for_a_late_certificate_comes_daily(self, tame: Host) -> None:
        tame.old_pair("a.example.test", days=5)
        tame.write(renew="never")
        for _ in range(2):
            assert tame.run().status == 0
        [only] = self.told(tame)
        assert "a.example.test: not renewed, ends 20" in only[3]
        path = tame.directory / "wucme_l_alpha.json"
        state = json.loads(path.read_text())
        for about in state["alarms"].values():
            about[1] -= 86400
        path.write_text(json.dumps(state))
        tame.run()
        assert len(self.told(tame)) == 2

    def test_alert_that_fails_is_tried_again_and_the_other_is_not_repeated(self, tame: Host, tmp_path: Path) -> None:
        tame.settings["alert"] += f"\n    $ cat {tmp_path}/switch"
        tame.write("$ false")
        for _ in range(2):
            done = tame.run()
            assert done.status == 1
            assert f"alert failed: $ cat {tmp_path}/switch: exit status 1" in done.err
        assert len(self.told(tame)) == 1
        (tmp_path / "switch").write_text("")
        assert "alert succeeded" in tame.run("--verbose").err

    def test_alert_is_an_item_that_is_checked(self, tame: Host) -> None:
        tame.settings["alert"] = "+nginx"
        tame.write()
        done = tame.run()
        assert (done.status, "alert takes @ (a procedure) and $" in done.err) == (2, True)
        assert re.search(r"wucme.ini:\d+: \+nginx", done.err)

    def test_dry_run_and_staging_alarm_nobody(self, tame: Host) -> None:
        tame.settings["metrics"] = str(tame.home / "wucme.prom")
        tame.write("$ false")
        tame.run("--dry-run")
        tame.run("--staging")
        assert self.told(tame) == []
        assert not (tame.home / "wucme.prom").exists()

    def test_metrics_are_written_by_each_run(self, tame: Host, tmp_path: Path) -> None:
        path = tmp_path / "wucme.prom"
        tame.settings.update(metrics=str(path), alert="")
        tame.write("$ false")
        assert tame.run().status == 1
        assert mode(path) == 0o644
        end = int(wucme.facts(tame.pair()[0]).not_after)
        assert f'wucme_certificate_expiry_timestamp_seconds{{name="a.example.test"}} {end}\n' in path.read_text()
        assert 'wucme_loads_owed{name="a.example.test"} 1\n' in path.read_text()
        tame.write()
        assert tame.run() == Done(0, "", "")
        assert 'wucme_loads_owed{name="a.example.test"} 0\n' in path.read_text()
        tame.settings["metrics"] = str(tmp_path / "none/wucme.prom")
        tame.write()
        done = tame.run()
        assert (done.status, "none/wucme.prom" in done.err) == (1, True)
README = (SCRIPT.parent / "README.md").read_text("utf-8")
OUTSIDE, INSIDE = "127.0.0.1", "127.5.0.9"


def recipe(title: str, **changes: str) -> str:
    """A configuration as the README has it, with other addresses, ports and paths."""
    found = re.search(rf"(?ms)^### {title}$.*?^```\w+\n(.*?)^```$", README)
    assert found, title
    text = found[1]
    for old, new in {"192.168.0.0/16": "127.5.0.0/16", **changes}.items():
        assert old in text or old.startswith(("127", "192", "/usr")), (title, old)
        text = text.replace(old, new)
    return text


class Page(NamedTuple):
    """What a web server answered."""
    status: int
    body: str


def page(port: int, path: str = "/", name: str = "x86vms.example.org", source: str = OUTSIDE,
         method: str = "GET") -> Page:
    """Ask a web server of this machine for a page, from this address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request(method, path, headers={"Host": name})
        answer = connection.getresponse()
        return Page(answer.status, answer.read().decode())


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that the users of web servers may pass through, with a copy of the script."""
    with tempfile.TemporaryDirectory(prefix="wucme-") as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "wucme.py").write_bytes(SCRIPT.read_bytes())
        (home / "wucme.py").chmod(0o755)
        yield home


@pytest.fixture
def inside(pebble: testbed.Pebble, public: Path) -> Host:
    """A host whose web server calls the script, in a public directory; its CA is pebble."""
    return Host(public, pebble.directory_url, pebble.ca_file)


# What each front answers for the name of somebody else, and where that stands in its configuration.
NEIGHBOUR = {
    "nginx": "{text}server {{ listen {at}; server_name other.example.org; return 200 other; }}",
    "apache": "{text}<VirtualHost *:{port}>\nServerName other.example.org\nRewriteEngine on\nErrorDocument 200 other\n"
              "RewriteRule ^ - [R=200]\n</VirtualHost>",
    "haproxy": "{text}\nbackend other\n  http-request return status 200 content-type text/plain string other\n",
    "caddy": "{text}http://other.example.org:{port} {{\n bind 127.0.0.1\n respond other\n}}\n",
}


def front_text(kind: str, port: int, inner: str) -> str:
    """The README's configuration of a front at a port of loopback, with the name of somebody else beside."""
    at = f"127.0.0.1:{port}"
    changes = {"nginx": {"listen 80": f"listen {at}"}, "apache": {"*:80": f"*:{port}"},
               "haproxy": {"bind :80": f"bind {at}", "use_backend": "default_backend other\n    use_backend"},
               "caddy": {"x86vms.example.org {": f"x86vms.example.org:{port} {{\n    bind 127.0.0.1"}}[kind]
    text = recipe(f"Front: {kind}", **{"192.168.1.86:80": inner, "192.168.1.86": inner, **changes})
    return NEIGHBOUR[kind].format(text=text, at=at, port=port)


def inner_text(kind: str, home: Path) -> str:
    """The README's configuration of a web server that calls the script, with a page of its own."""
    pages = home / "pages"
    pages.mkdir(mode=0o755)
    (pages / "index.html").write_text("inner page")
    own = {"apache": f'DocumentRoot "{pages}"\n<Directory "{pages}">\nRequire all granted\n</Directory>\n',
           "lighttpd": f'server.document-root := "{pages}"\n'}[kind]
    return own + recipe(f"Inner host: {kind} and CGI", **{"/usr/local/sbin/wucme.py": f"{home}/wucme.py"})


@pytest.mark.process
@pytest.mark.servers
class TestFronts:
    """The script behind real web servers, configured as the README says."""

    @pytest.mark.parametrize("kind", ["apache", "lighttpd"])
    def test_a_web_server_calls_the_script_as_another_user(self, kind: str, public: Path) -> None:
        host = Host(public, "https://ca.test/")
        tokens = host.directory / "tokens"
        tokens.mkdir()
        (tokens / "tok").write_text("tok.print")
        (tokens / "private").write_text("secret")
        (tokens / "private").chmod(0o600)
        host.ini.chmod(0o644)
        port = testbed.free_ports(1)[0]
        with testbed.PlainWeb(public / "web", kind, inner_text(kind, public), port):
            for path in (WELL_KNOWN, f"/cgi-bin/wucme{WELL_KNOWN}"):
                for name in ("x86vms.example.org", "x86vms.example.org:80", "127.0.0.1", "[::1]:80"):
                    assert page(port, f"{path}tok", name) == (200, "tok.print")
                assert page(port, f"{path}tok", method="HEAD") == (200, "")
                assert page(port, f"{path}other").status == 404
                assert page(port, f"{path}..%2f..%2fwucme.ini").status == 404
                if os.geteuid() == 0:
                    assert page(port, f"{path}private").status == 404, "it runs as somebody else"
            assert page(port, "/cgi-bin/wucme/").status != 200
            assert page(port, "/index.html") == (200, "inner page")

    @pytest.mark.pebble
    @pytest.mark.parametrize(("kind", "inner"), [
        ("nginx", "listener"), ("apache", "lighttpd"), ("haproxy", "apache"), ("caddy", "listener")])
    def test_a_front_passes_the_challenge_on_and_nothing_else_changes(
            self, kind: str, inner: str, inside: Host, pebble: testbed.Pebble, public: Path) -> None:
        port, behind = pebble.http_port, testbed.free_ports(1)[0]
        inside.write(listen="none" if inner != "listener" else f"127.0.0.1:{behind}")
        inside.ini.chmod(0o644)
        with contextlib.ExitStack() as stack:
            if inner != "listener":
                stack.enter_context(testbed.PlainWeb(public / "inner", inner, inner_text(inner, public), behind))
            stack.enter_context(testbed.PlainWeb(public / "front", kind, front_text(kind, port, f"127.0.0.1:{behind}"),
                                                 port))
            done = inside.run("issue", "x86vms.example.org")
            assert done.status == 0, done.err
            teapot = 403 if kind == "apache" else 418
            assert page(port).status == teapot
            assert page(port, "/x/.well-known/acme-challenge/tok").status == teapot
            assert page(port, f"{WELL_KNOWN}none").status in (404, 502, 503)
            for path in ("/", f"{WELL_KNOWN}tok"):
                assert page(port, path, "other.example.org") == (200, "other"), "the neighbour is not disturbed"
            if inner != "listener":
                assert page(port, "/index.html", source=INSIDE) == (200, "inner page")
                (inside.directory / "tokens" / "tok").write_text("tok.print")
                for name in ("x86vms.example.org", f"x86vms.example.org:{port}", "X86VMS.example.org"):
                    assert page(port, f"{WELL_KNOWN}tok", name) == (200, "tok.print")

    @pytest.mark.pebble
    def test_a_front_may_redirect_to_the_inner_hosts_public_name(self, inside: Host, pebble: testbed.Pebble,
                                                                 public: Path) -> None:
        behind = testbed.free_ports(1)[0]
        text = recipe("Front: a redirect", **{"listen 80": f"listen 127.0.0.1:{pebble.http_port}",
                                              "x86vms.example.org": f"x86vms.example.org:{behind}"})
        inside.write(listen=f"127.0.0.1:{behind}")
        with testbed.PlainWeb(public / "front", "nginx", text, pebble.http_port):
            assert inside.run("issue", "www.example.org").status == 0
            assert page(pebble.http_port, f"{WELL_KNOWN}tok", "www.example.org").status == 302

    @pytest.mark.pebble
    def test_tokens_may_be_plain_files_of_a_web_server(self, inside: Host, pebble: testbed.Pebble,
                                                       public: Path) -> None:
        text = recipe("Inner host: tokens as plain files", **{"listen 80": f"listen 127.0.0.1:{pebble.http_port}",
                                                              "/etc/wucme": str(inside.directory)})
        with testbed.PlainWeb(public / "web", "nginx", text, pebble.http_port):
            assert inside.run("issue", "a.example.test").status == 0

    @pytest.mark.pebble
    @pytest.mark.parametrize("kind", ["nginx", "apache", "haproxy", "caddy"])
    def test_stateless(self, kind: str, inside: Host, pebble: testbed.Pebble, public: Path) -> None:
        told = inside.run("thumbprint")
        assert (told.status, told.err) == (0, "")
        first, *pieces = told.out.split("\n\n")
        key = wucme.parse_key((inside.directory / "wucme_k_account.pem").read_bytes())
        assert first == wucme.thumbprint(key)
        lines = next(piece for piece in pieces if piece.startswith(f"# {kind}")).partition("\n")[2]
        assert first in lines
        port = pebble.http_port
        around = {"nginx": f"server {{ listen 127.0.0.1:{port};\n{lines}\n}}",
                  "apache": f"<VirtualHost *:{port}>\n{lines}\n</VirtualHost>",
                  "haproxy": f"frontend web\n bind 127.0.0.1:{port}\n{lines}",
                  "caddy": f"http://:{port} {{\n bind 127.0.0.1\n{lines}\n}}"}[kind]
        inside.write(stateless="yes", listen="")
        with testbed.PlainWeb(public / "web", kind, around, port):
            done = inside.run("issue", "a.example.test")
            assert done.status == 0, done.err
            assert "listening" not in done.err
            assert page(port, f"{WELL_KNOWN}aB-_9") == (200, f"aB-_9.{first}")
            assert first not in page(port, f"{WELL_KNOWN}a/b").body
            assert first not in page(port, "/x.well-known/acme-challenge/tok").body

    def test_the_thumbprint_tells_wasd_where_to_ask(self, inside: Host) -> None:
        inside.write(sections="[x86vms.example.org]\n")
        told = inside.run("thumbprint", "--host", "192.168.1.86").out
        wasd = re.search(r"(?s)### Front: WASD.*?```wasd\n(.*?)```", README)
        assert wasd
        assert textwrap.dedent(told.partition("# WASD")[2].partition("\n")[2]) == wasd[1]


@pytest.mark.process
@pytest.mark.servers
class TestProxies:
    """The way out through real proxies."""

    @pytest.mark.parametrize("kind", ["squid", "tinyproxy"])
    def test_with_a_password(self, kind: str, fake: fakeca.FakeCA, lab: Host, public: Path) -> None:
        lab.environment["no_proxy"] = ""
        with testbed.ForwardProxy(public / "proxy", kind, "ann", "s3cret") as proxy:
            lab.write(proxy=proxy.url("ann", "s3cr%65t"))
            assert lab.run("issue", "a.example.test").status == 0
            assert 0 < proxy.used() < 10, "connections are kept"
            before, count = lab.pair(), orders(fake)
            lab.write()
            for user in ("", "ann:wrong@"):
                done = lab.run("renew", "a.example.test", "--force", https_proxy=f"http://{user}127.0.0.1:{proxy.port}")
                assert done.status == 1
                assert re.search(rf"cannot reach localhost:\d+ through the proxy 127\.0\.0\.1:{proxy.port}: Tunnel "
                                 r"connection failed: 40[17] ", done.err)
                assert "set proxy = http://USER:PASSWORD@HOST:PORT" in done.err
                assert "wrong" not in done.err
            assert (lab.pair(), orders(fake)) == (before, count)
            assert lab.run("renew", "--force", https_proxy=proxy.url(), no_proxy="localhost").status == 0
        assert lab.pair() != before
        before = lab.pair()
        done = lab.run("renew", "--force", https_proxy=proxy.url())
        assert done.status == 1
        assert f"through the proxy 127.0.0.1:{proxy.port}: Connection refused" in done.err
        assert lab.pair() == before
        assert lab.run("renew", "--force", no_proxy="localhost").status == 0, "nothing is held against it"

    @pytest.mark.parametrize("kind", ["squid", "tinyproxy"])
    def test_without_a_password_from_the_environment(self, kind: str, lab: Host, public: Path) -> None:
        with testbed.ForwardProxy(public / "proxy", kind) as proxy:
            assert lab.run("issue", "a.example.test", https_proxy=proxy.url(), no_proxy="").status == 0
            assert proxy.used()

    @pytest.mark.pebble
    def test_out_through_a_proxy_and_in_through_a_front_and_no_other_way(
            self, inside: Host, pebble: testbed.Pebble, public: Path) -> None:
        with contextlib.ExitStack() as stack:
            node = stack.enter_context(testbed.nodes(public, 1))[0]
            text = front_text("nginx", pebble.http_port, f"{node.address}:80")
            stack.enter_context(testbed.PlainWeb(public / "front", "nginx", text, pebble.http_port))
            proxy = stack.enter_context(testbed.ForwardProxy(public / "proxy", "tinyproxy", "ann", "s3cret",
                                                             ["127.0.0.1", node.gateway]))
            inside.within = node.within
            inside.write(listen="", proxy="none")
            assert "cannot reach localhost" in inside.run("issue", "x86vms.example.org").err
            inside.write(listen="", proxy=proxy.url("ann", "s3cret"))
            done = inside.run("issue", "x86vms.example.org")
            assert done.status == 0, done.err
            inside.pair("x86vms.example.org")


@pytest.mark.process
class TestCluster:
    """Several hosts, with one directory or with none in common."""

    @pytest.mark.pebble
    @pytest.mark.servers
    def test_hosts_that_start_together_order_once_load_each_and_answer_for_each_other(
            self, inside: Host, pebble: testbed.Pebble, public: Path) -> None:
        names = "a.example.test", "b.example.test"
        with contextlib.ExitStack() as stack:
            hosts = stack.enter_context(testbed.nodes(public, 2))
            gateways = ["127.0.0.1", *(one.gateway for one in hosts)]
            proxy = stack.enter_context(testbed.ForwardProxy(public / "proxy", "tinyproxy", addresses=gateways))
            inside.write(f"$ echo $WUCME_HOST $WUCME_NAME >> {public}/loaded", listen="none",
                         sections="".join(f"[{name}]\n" for name in names))
            inside.ini.chmod(0o644)
            text = recipe("Inner host: lighttpd and CGI", **{"/usr/local/sbin/wucme.py": f"{public}/wucme.py"})
            for name, one in zip(names, hosts):
                stack.enter_context(testbed.PlainWeb(public / name, "lighttpd", text, pebble.http_port,
                                                     address=one.address, within=one.within))
                pebble.dns("add-a", host=name, addresses=[one.address])
                stack.callback(pebble.dns, "clear-a", host=name)
            runs = []
            for host, one in zip(("alpha", "beta"), hosts):
                inside.within = one.within
                inside.environment.update(https_proxy=f"http://{one.gateway}:{proxy.port}", no_proxy="")
                runs.append(inside.start("--host", host))
            said = [run.communicate(timeout=60)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
        log = (inside.directory / "wucme.log").read_text()
        assert len(re.findall("creating new order", log)) == 2
        loaded = (public / "loaded").read_text().splitlines()
        assert sorted(loaded) == [f"{host} {name}" for host in ("alpha", "beta") for name in names]
        assert not inside.left()

    def test_a_host_that_is_killed_holds_no_other_up(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.write(f"$ echo $WUCME_HOST >> {lab.home}/loaded", sections="[a.example.test]\n")
        asked, goes_on = threading.Event(), threading.Event()

        def validate(name: str, token: str, keyauth: str) -> bool:
            asked.set()
            return goes_on.wait(60)

        fake.validate = validate
        first = lab.start()
        assert asked.wait(30)
        first.kill()
        first.communicate()
        goes_on.set()
        done = lab.run("--host", "beta", "--lock-wait", "0s")
        assert done.status == 0, done.err
        assert orders(fake) == 1, "the order is taken up"
        assert lab.run().status == 0
        assert (lab.home / "loaded").read_text().split() == ["beta", "alpha"]
        assert not lab.left()

    def test_a_host_that_was_away_catches_up(self, lab: Host) -> None:
        lab.write(f"$ echo $WUCME_HOST $WUCME_FINGERPRINT >> {lab.home}/loaded", sections="[a.example.test]\n")
        for arguments in ((), ("--host", "beta"), ("renew", "--force"), ("renew", "--force"), ("--host", "beta"),
                          ("--host", "beta")):
            assert lab.run(*arguments).status == 0
        loaded = [line.split() for line in (lab.home / "loaded").read_text().splitlines()]
        assert [host for host, _ in loaded] == ["alpha", "beta", "alpha", "alpha", "beta"]
        assert loaded[-1][1] == wucme.facts(lab.pair()[0]).fingerprint

    @pytest.mark.pebble
    @pytest.mark.servers
    def test_without_a_common_directory_one_orders_each_answers_and_the_pair_is_handed_on(
            self, inside: Host, pebble: testbed.Pebble, public: Path) -> None:
        found = re.search(r"(?s)### Cluster without a common directory.*?```ini\n(.*?)```.*?```ini\n(.*?)```", README)
        assert found
        (public / "second").mkdir()
        second = Host(public / "second", pebble.directory_url, pebble.ca_file)
        first, other = (text.replace("+nginx", f"$ echo {number} >> {public}/loaded")
                        for number, text in enumerate(found.groups(), 1))
        first = first.replace("scp -p", "cp -p").replace("root@node2:/etc/wucme/", f"{second.directory}/")
        first = first.replace("ssh root@node2 /usr/local/sbin/wucme.py", shlex.join(second.command()))
        for host, text in ((inside, first), (second, other)):
            host.ini.write_text(text + "".join(f"{key} = {host.settings[key]}\n" for key in
                                               ("directory", "server", "ca_file", "agree", "host")))
        print_of_account = inside.run("thumbprint").out.splitlines()[0]
        answer_all = (f"server {{ listen 127.0.0.1:{pebble.http_port};\nlocation ~ /([^/]+)$ {{ "
                      f"return 200 $1.{print_of_account}; }} }}")
        with testbed.PlainWeb(public / "web", "nginx", answer_all, pebble.http_port):
            assert inside.run("issue", "www.example.org").status == 0
            assert second.pair("www.example.org") == inside.pair("www.example.org")
            assert inside.run("renew", "--force").status == 0
        assert second.pair("www.example.org") == inside.pair("www.example.org")
        assert mode(second.key("www.example.org")) == 0o600
        assert (public / "loaded").read_text().split() == ["1", "2"] * 2
        assert second.run().status == 0


@pytest.mark.process
class TestCheck:
    """What `check` says before an order is spent, with real sockets and names of the test's own."""

    @pytest.fixture(autouse=True)
    def no_dns(self, lab: Host) -> None:
        """A dig that knows no record, so that nobody is asked."""
        tool = lab.home / "bin" / "dig"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        lab.environment["PATH"] = f"{tool.parent}:{testbed.SYSTEM_PATH}"

    def check(self, lab: Host, names: Mapping[str, Sequence[str]], *arguments: str, path: str = "") -> Done:
        """Run it where /etc/hosts has these names."""
        hosts = lab.home / "hosts"
        lines = [f"{address} {name}\n" for name, addresses in {"localhost": ["127.0.0.1"], **names}.items()
                 for address in addresses]
        hosts.write_text("".join(lines))
        mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
        testbed.need(*testbed.MOUNTS)
        done = subprocess.run(
            [testbed.program("unshare"), "-m", "sh", "-c", mount, str(hosts), *lab.command("check", *arguments)],
            env={**lab.environment, **({"PATH": path} if path else {})}, capture_output=True, text=True, timeout=60,
            check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def test_all_is_well_before_the_first_order(self, fake: fakeca.FakeCA, lab: Host) -> None:
        address = testbed.own_address(80)
        lab.write("$ true", listen=f"{address}:80")
        done = self.check(lab, {"a.example.test": [address]}, "a.example.test")
        assert (done.status, done.err) == (0, "")
        assert done.out.splitlines() == [
            f"ok      {fake.url}: {fake.url} answers, and its clock agrees",
            f"ok      a.example.test: http-01: {address}:80 can be listened on",
            f"ok      a.example.test: {address} is this host's "
            "(private: a public CA needs another one from its own DNS)",
            f"ok      a.example.test: {address}: a token published now is answered"]
        assert orders(fake) == 0
        assert lab.left() == set()
        assert self.check(lab, {"a.example.test": [address]}, "a.example.test", "--quiet").out == ""

    def test_what_would_go_wrong_is_said_with_its_remedy(self, fake: fakeca.FakeCA, lab: Host) -> None:
        address = testbed.own_address(80)
        lab.write("@/nonexistent/procedure", listen=f"{address}:80", sections="[a.example.test]\n[b.example.test]\n")
        text = (f"server {{ listen {address}:80; server_name a.example.test; "
                "return 302 http://127.0.0.9$request_uri; }\n"
                f"server {{ listen {address}:80; server_name b.example.test; return 404; }}")
        with testbed.PlainWeb(lab.home / "web", "nginx", text, 80, address=address):
            done = self.check(lab, {"a.example.test": [address], "b.example.test": [address]})
        assert done.status == 1
        for part in (f"problem a.example.test: cannot listen on {address}:80: in use by nginx (pid ",
                     "problem a.example.test: load: @/nonexistent/procedure: /nonexistent/procedure is not there",
                     f"problem a.example.test: {address}, redirected to http://127.0.0.9/.well-known/acme-challenge/",
                     "a private address, not a name",
                     f"problem b.example.test: {address}: not a token published now, but HTTP status 404 came; pass "
                     "/.well-known/acme-challenge/ of this name on to what answers here"):
            assert part in done.out
        assert orders(fake) == 0

    @pytest.mark.parametrize("answers", ["listen", "webroot", "stateless", "cgi"])
    def test_every_way_to_answer_is_tried(self, answers: str, lab: Host, public: Path) -> None:
        address = testbed.own_address(80)
        print_of_account = lab.run("thumbprint").out.splitlines()[0]
        (public / "www").mkdir(mode=0o755)
        texts = {"listen": "", "webroot": f"root {public}/www;",
                 "stateless": f'location ~ "/([^/]+)$" {{ return 200 "$1.{print_of_account}"; }}',
                 "cgi": f"location /.well-known/acme-challenge/ {{ alias {public}/tokens/; }}"}
        changes = {"listen": {"listen": f"{address}:80"}, "webroot": {"webroot": f"{public}/www"},
                   "stateless": {"stateless": "yes"}, "cgi": {"listen": "none", "directory": str(public)}}[answers]
        lab.write("$ true", **{"listen": "", **changes})
        with contextlib.ExitStack() as stack:
            if answers != "listen":
                text = f"server {{ listen {address}:80; {texts[answers]} }}"
                stack.enter_context(testbed.PlainWeb(public / "web", "nginx", text, 80, address=address))
            done = self.check(lab, {"a.example.test": [address]}, "a.example.test")
        assert done.status == 0, done.out
        assert f"ok      a.example.test: {address}: a token published now is answered" in done.out
        assert ("port 80 here: " in done.out) == (answers != "listen")

    def test_caa_as_the_dns_has_it(self, lab: Host, tmp_path: Path) -> None:
        address = testbed.own_address(80)
        lab.write("$ true", listen=f"{address}:80")
        zones = {"example.test": ('@ CAA 0 issue "fakeca.example"', 'b CAA 0 issue "other.example"')}
        names = {"a.example.test": [address], "b.example.test": [address]}
        with testbed.Bind(tmp_path / "bind", zones) as bind:
            done = self.check(lab, names, *names, path=bind.path)
        assert re.findall("(?m)^.*CAA.*$", done.out) == [
            "problem b.example.test: CAA at b.example.test allows other.example, but "
            f"{lab.settings['server']} is fakeca.example: change the record, or the server"]

    def test_it_waits_for_no_lock_and_needs_no_certificate(self, lab: Host) -> None:
        lab.write(listen=f"127.0.0.1:{testbed.free_ports(1)[0]}")
        lock = wucme.take_lock(str(lab.directory / "wucme.lock"))
        assert lab.run("check").status == 0
        assert lock is not None
        os.close(lock)

    def test_a_ca_that_cannot_be_reached(self, lab: Host) -> None:
        lab.write(server="https://127.0.0.1:1/", listen=f"127.0.0.1:{testbed.free_ports(1)[0]}")
        done = lab.run("check", "a.example.test")
        assert done.status == 1
        assert "problem https://127.0.0.1:1/: cannot reach 127.0.0.1:1: Connection refused; look at" in done.out


@pytest.mark.process
class TestCommandLine:
    """What a person meets first."""

    def test_runs_alone_from_anywhere(self, tmp_path: Path) -> None:
        copy = tmp_path / "x" / "wucme.py"
        copy.parent.mkdir()
        copy.write_bytes(SCRIPT.read_bytes())
        done = subprocess.run([sys.executable, str(copy), "--help"], cwd="/", capture_output=True, text=True,
                              check=True)
        assert done.stdout.startswith("wucme - ")
        assert all(f"  {name} = " in done.stdout for name in wucme.SETTINGS)
        assert "@S" not in done.stdout
        assert done.stderr == ""

    def test_version_has_the_hash_of_the_file(self, tmp_path: Path) -> None:
        done = subprocess.run([sys.executable, str(SCRIPT), "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"wucme {wucme.VERSION} sha256 {hashlib.sha256(SCRIPT.read_bytes()).hexdigest()}\n"

    @pytest.mark.parametrize("arguments", [(), ("issue", "a.example.test"), ("status",)])
    def test_without_cryptography(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT), *arguments], capture_output=True, text=True,
                              check=False, env={"HOME": str(tmp_path)})
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert all(word in done.stderr for word in ("apt install", "dnf install", "pip install", "uv run"))

    @pytest.mark.parametrize(("arguments", "said"), [
        (("isue", "a.example.test"), "did you mean issue?"),
        (("issue",), "issue needs the names"),
        (("issue", "bad..name"), "is neither a host name nor"),
        (("status", "a.example.test"), "status takes no names"),
        (("--lisen", ":80"), "--lisen: no such option; did you mean --listen?"),
        (("--verb",), "--verb: no such option; did you mean --verbose?"),
        (("renew", "-f"), "option -f not recognized (see --help)"),
        (("--quiet=yes",), "option --quiet must not have an argument (see --help)"),
        (("renew", "--load"), "option --load requires argument (see --help)"),
        (("--load", "--quiet"), "--load needs a value, and --quiet is an option (see --help)"),
        (("renew", "--", "--quiet"), "--quiet: no such certificate"),
        (("--listen", "80"), "must be :PORT, ADDRESS:PORT or [ADDRESS]:PORT"),
        (("--force",), "--force goes with issue and renew"),
        (("status", "--csr", "x"), "--csr goes with issue, not with status"),
        (("check", "--install"), "--install goes with timer, not with check"),
        (("revoke", "a.example.test", "--dry-run"), "--dry-run goes with run and issue and renew and load and timer"),
        (("account", "deactivate", "--dry-run"), "not with account"),
        (("renew", "nobody.example.test"), "no such certificate"),
        (("issue", "a.example.test", "--server", "letsencript"), "did you mean letsencrypt?"),
        (("--server", "letsencript"), "did you mean letsencrypt?"),
        (("--ini", "/nonexistent.ini"), "/nonexistent.ini: there is no such file"),
        (("--load", "!now"), "an item begins with +"),
    ])
    def test_usage_errors(self, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
        host = Host(tmp_path)
        host.write(server="letsencrypt")
        done = host.run(*arguments)
        assert done.status == 2
        assert said in done.err
        assert len(done.err.splitlines()) == 1

    def test_options_stand_before_or_behind_words_whatever_the_environment_says(
            self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POSIXLY_CORRECT", "1")
        words, given = wucme.read_arguments(
            ["--load", "$ a", "renew", "--load=+nginx", "x", "--no-agree", "--", "--force", "--", "y"])
        assert words == ["renew", "x", "--force", "--", "y"]
        assert given == {"load": "$ a\n+nginx", "agree": "no"}

    @pytest.mark.parametrize("arguments", [("--dry-run",), ("status",), ("status", "--json"), ("load", "--dry-run"),
                                           ("issue", "b.example.test", "--dry-run"), ("renew", "--force", "--dry-run")])
    def test_looks_and_changes_nothing(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        host = Host(tmp_path)
        host.old_pair("a.example.test")
        host.write("$ touch ran", server="letsencrypt")
        before = snapshot(tmp_path)
        assert "a.example.test" in host.run(*arguments).out
        assert snapshot(tmp_path) == before

    def test_dry_run_says_what_it_would_do(self, tmp_path: Path) -> None:
        host = Host(tmp_path)
        host.old_pair("a.example.test")
        host.write("$ true", server="letsencrypt")
        assert host.run("--dry-run").out.splitlines() == [
            "would order a certificate for a.example.test at letsencrypt: expires in 4 days",
            "would run $ true for a.example.test"]
        assert "at letsencrypt-staging" in host.run("issue", "b.example.test", "--dry-run", "--staging").out

    def test_staging_is_for_its_ca_and_loads_nothing_whatever_else_is_said(self, tmp_path: Path) -> None:
        host = Host(tmp_path)
        done = host.run("issue", "b.example.test", "--dry-run", "--staging", "--server", "zerossl", "--load", "$ true")
        assert done.out.splitlines() == [
            "would order a certificate for b.example.test at letsencrypt-staging: declared, and not there yet"]

    def test_status_json(self, tmp_path: Path) -> None:
        host = Host(tmp_path)
        host.old_pair("a.example.test", days=80)
        host.write("$ false", server="letsencrypt")
        host.run()
        done = host.run("status", "--json")
        found = json.loads(done.out)
        assert (done.status, done.err, found["host"]) == (1, "", "alpha")
        assert found["certificates"][0]["loads"][0]["state"] == "owed"
        assert found["certificates"][0]["names"] == ["a.example.test"]

    def test_secrets_are_private_whatever_the_umask(self, fake: fakeca.FakeCA, lab: Host) -> None:
        old = os.umask(0)
        try:
            lab.write(f"$ umask > {lab.home}/umask")
            assert lab.run("issue", "a.example.test").status == 0
        finally:
            os.umask(old)
        private = {path.name for path in lab.directory.iterdir() if path.is_file() and mode(path) == 0o600}
        assert private == {"wucme_k_a.example.test.pem", "wucme_k_account.pem", "wucme_s_a.example.test.json",
                           "wucme_s_account.json", "wucme_l_alpha.json", "wucme.log", "wucme.lock"}
        assert (lab.home / "umask").read_text().strip() == "0000"

    def test_status_pipe_that_closes(self, tmp_path: Path) -> None:
        host = Host(tmp_path)
        host.old_pair("a.example.test", days=80)
        host.write(server="letsencrypt")
        done = subprocess.run(["sh", "-c", f"{shlex.join(host.command('status'))} | true"], env=host.environment,
                              capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr


YEAR = 365 * DAY


@pytest.mark.process
class TestTime:
    """Clocks that are wrong, certificates that are due for ever, names that are dead."""

    @pytest.mark.parametrize("off", [-50 * YEAR, -7200, 7200, 50 * YEAR])
    def test_clock_that_is_off_is_named_before_any_order(self, fake: fakeca.FakeCA, lab: Host, off: float) -> None:
        before = lab.old_pair("a.example.test")
        lab.write(sections="[b.example.test]\n")
        done = by_clock(lab, f"real() + {off}")
        assert done.status == 1
        assert "set the clock" in done.err
        assert (orders(fake), lab.pair()) == (0, before)
        again = lab.run()
        assert again.status == 0, again.err     # nothing of it is remembered

    @pytest.mark.parametrize("step", [-1800, 1800])
    def test_clock_that_steps_during_a_run_harms_nothing(self, fake: fakeca.FakeCA, lab: Host, step: float) -> None:
        before = lab.old_pair("a.example.test")
        done = by_clock(lab, f"real() + {step} * (next(asked) % 2)")
        assert done.status == 0, done.err
        assert lab.pair() != before

    def test_clock_that_leaps_during_a_run_makes_nothing_bad_go_live(self, fake: fakeca.FakeCA, lab: Host) -> None:
        before = lab.old_pair("a.example.test")
        done = by_clock(lab, f"real() + (real() > {time.time()} and bool(sys.modules.get('cryptography.x509')) and "
                             f"next(asked) > 40 and {9 * YEAR})")
        assert (done.status, lab.pair() == before) in ((0, False), (1, True)), done.err

    def test_certificate_that_is_due_again_at_once_is_renewed_once_a_run_and_said(self, fake: fakeca.FakeCA,
                                                                                  lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.days = 0.05
        done = lab.run("--quiet")
        assert done.status == 0
        assert "due again at once" in done.err
        assert orders(fake) == 1

    def test_cron_every_minute_against_a_dead_name_keeps_to_the_ladder(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test", days=20)
        fake.failing_names.add("a.example.test")
        minutes = [*range(130), *range(1500, 1700, 5)]
        code = textwrap.dedent(f"""
            import time, wucme
            at, begun, real = 0, time.time(), wucme.http_date
            wucme.http_date = lambda text: (real(text) or 0) + at       # the CA's clock goes with ours
            world = wucme.REAL._replace(now=lambda: begun + at)
            for at in [60 * minute for minute in {minutes}]:
                wucme.log = wucme.Log()
                assert wucme.main(["--ini", {str(lab.ini)!r}], world) == 1
            """)
        subprocess.run([sys.executable, "-c", code], check=True, timeout=90, stderr=subprocess.DEVNULL,
                       env={**lab.environment, "PYTHONPATH": str(BUILT)})
        assert orders(fake) == 5, "at once, after 1, 10 and 100 minutes, and after a day"

    def test_bad_certificate_counts_as_a_refusal(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave("cert_other_key")
        assert [lab.run().status for _ in range(3)] == [1, 1, 1]
        assert orders(fake) == 1


@pytest.mark.process
class TestTwoRuns:
    """Two at once, of one host and of two."""

    @pytest.mark.parametrize("hosts", [("alpha", "alpha"), ("alpha", "beta")])
    @pytest.mark.parametrize("lead", [0, 0.05, 0.1])
    def test_one_order_and_every_load_as_owed(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path,
                                              hosts: tuple[str, str], lead: float) -> None:
        before = lab.old_pair("a.example.test")
        lab.write(f"$ echo $WUCME_HOST $WUCME_FINGERPRINT >> {tmp_path}/loads")
        with lab.start("--host", hosts[0]) as first:
            time.sleep(lead)
            with lab.start("--host", hosts[1]) as second:
                said = [process.communicate(timeout=60) for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), said
        assert lab.pair() != before
        assert orders(fake) == 1
        fingerprint = wucme.facts(lab.pair()[0]).fingerprint
        assert sorted((tmp_path / "loads").read_text().splitlines()) == sorted(
            {f"{host} {fingerprint}" for host in hosts})
        assert not lab.left()

    def test_lock_of_a_killed_run_holds_nobody(self, lab: Host, tmp_path: Path) -> None:
        lab.old_pair("a.example.test", days=80)
        lab.write(f"$ echo $$ > {tmp_path}/pid; sleep 60", renew="never")
        with lab.start() as process:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
            process.kill()
        lab.write("$ true", renew="never")
        try:
            assert lab.run("--lock-wait", "0s").status == 0
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def peak(host: Host, *arguments: object) -> tuple[int, int]:
    """Exit status of a run, and the most memory that it had, in KiB."""
    code = ("import re, sys, wucme\nstatus = wucme.main(sys.argv[1:])\n"
            "print(status, re.search('VmHWM:\\\\s+([0-9]+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", code, "--ini", str(host.ini), *map(str, arguments)], check=True,
                          env={**host.environment, "PYTHONPATH": str(BUILT)}, capture_output=True, timeout=90)
    status, kib = map(int, done.stdout.split())
    return status, kib


@pytest.mark.process
class TestHarmLimits:
    """What a bad CA costs: memory, time, and nothing of others."""

    @pytest.mark.parametrize("misdeed", ["endless_body", "deep_directory", "many_authorizations", "nonce_huge",
                                         "token_long", "cert_huge"])
    def test_memory_is_bounded(self, fake: fakeca.FakeCA, lab: Host, misdeed: str) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave(misdeed)
        status, kib = peak(lab)
        assert status == 1
        assert kib < 100 * 1024

    @pytest.mark.parametrize("misdeed", ["silent@finalize", "order_pending_for_ever", "error_503_retry_after",
                                         "cert_huge"])
    def test_certificates_of_other_cas_are_renewed_and_loaded(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path,
                                                              misdeed: str) -> None:
        (tmp_path / "second").mkdir()
        with fakeca.FakeCA(tmp_path / "second", fake.http_port) as other:
            lab.write(f"$ echo $WUCME_NAME >> {tmp_path}/loads", timeout="1s", deadline="1s",
                      sections=f"[server good]\nurl = {other.url}\nca_file = {other.ca_file}\n"
                               "[a.example.test]\n[b.example.test]\nserver = good\n")
            fake.misbehave(misdeed)
            done = lab.run()
        assert done.status == 1
        assert done.lines[-1] == "0 files, 2 certs, 1 renewed, 1 failed"
        assert (tmp_path / "loads").read_text() == "b.example.test\n"
        lab.pair("b.example.test")

    @pytest.mark.parametrize(("misdeed", "wait"), [
        ("error_503_retry_after@new-order", "315360000"), ("error_503_retry_after", "-1"),
        ("rate_limited", "315360000"), ("rate_limited", "Fri, 31 Dec 9999 23:59:59 GMT"), ("rate_limited", "9" * 4000),
        ("rate_limited", "\x1b[2J"),
    ], ids=brief)
    def test_any_retry_after_ends_the_run_and_holds_for_a_week_at_most(
            self, fake: fakeca.FakeCA, lab: Host, misdeed: str, wait: str) -> None:
        before = lab.old_pair("a.example.test")
        fake.misbehave(misdeed)
        fake.retry_after = wait
        assert lab.run().status == 1
        assert len(fake.requests) < 20
        assert lab.pair() == before
        fake.misbehave()
        week = 8 * DAY
        assert by_clock(lab, f"real() + {week} * (sys._getframe(1).f_code.co_name not in ('check_clock', 'store', "
                             "'conclude'))").status == 0
        assert lab.pair() != before

    def test_every_misbehaviour_of_the_ca_is_tried(self) -> None:
        text = Path(__file__).read_text("utf-8")
        assert [name for name in sorted(fakeca.MODES) if f'"{name}' not in text] == []

    def test_terms_that_have_changed_are_named(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test")
        fake.misbehave("terms_changed")
        assert "userActionRequired: agree to the terms" in lab.run().err
        fake.misbehave("error_500_always")
        assert "HTTP status 500" in lab.run("renew", "a.example.test").err

    @pytest.mark.parametrize(("more", "said"), [
        ({"server_names": ("other.example",)}, "Hostname mismatch"),
        ({"server_dates": (datetime(2001, 1, 1, tzinfo=timezone.utc), datetime(2002, 1, 1, tzinfo=timezone.utc))},
         "certificate has expired); is the clock of this host right?"),
    ])
    def test_https_of_the_ca_must_be_as_it_should_be(self, tmp_path: Path, more: dict[str, Any], said: str) -> None:
        with fakeca.FakeCA(tmp_path, **more) as ca:
            lab = Host(tmp_path, ca.url, ca.ca_file, "none")
            lab.old_pair("a.example.test")
            lab.write(listen=f"127.0.0.1:{testbed.free_ports(1)[0]}")
            assert said in lab.run().err
            assert not ca.requests

    def test_name_of_the_ca_that_does_not_resolve_is_no_failure_of_the_certificate(self, lab: Host) -> None:
        lab.old_pair("a.example.test")
        lab.write(server="https://nobody.invalid/directory", proxy="none")
        assert "the name does not resolve" in lab.run().err
        about = wucme.read_memory(str(lab.directory / "wucme_s_a.example.test.json"))
        assert (about.failures, about.retry_at) == (0, 0)

    def test_one_of_many_names_that_fails_stops_none_of_the_others(self, fake: fakeca.FakeCA, lab: Host,
                                                                   tmp_path: Path) -> None:
        names = [f"n{number}.example.test" for number in range(30)]
        for name in names:
            lab.old_pair(name)
        fake.failing_names.add(names[7])
        lab.write(f"$ echo $WUCME_NAME >> {tmp_path}/loads")
        done = lab.run()
        assert done.status == 1
        assert done.lines[-1] == "60 files, 30 certs, 29 renewed, 1 failed"
        assert set((tmp_path / "loads").read_text().split()) == {*names}, "the one that failed is loaded as it is"


NOBODY = 65534


def as_nobody(*command: str, rights: Sequence[str] = ()) -> list[str]:
    """A command as an ordinary user runs it, with these rights more."""
    more = [f"--{kind}-caps=+{right}" for right in rights for kind in ("inh", "ambient")]
    user = [testbed.program("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*user, *more, *command]


def need(command: Sequence[str]) -> None:
    """Skip a test if this machine forbids what it needs, as containers may."""
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"not allowed here: {shlex.join(command)}")


# Runs a script, and writes down what it does on the disk as `strace -y -s 0` would.
RECORDER = """
import os, runpy, sys
write, trace = os.write, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
def recorded(name, real):
    def call(*given, **more):
        result = real(*given, **more)
        told = [f"{one}<{os.readlink(f'/proc/self/fd/{one}')}>" if type(one) is int else f'"{one}"' for one in given
                if type(one) is not bytes]
        write(trace, f"1 {name}({', '.join(told)})\\n".encode())
        return result
    return call
for name in ("fsync", "replace", "write", "pwrite"):
    setattr(os, name, recorded({"replace": "rename"}.get(name, name), getattr(os, name)))
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that an ordinary user can reach and write in."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        Path(name).chmod(0o755)
        yield Path(name)


# Runs a command with a CA of its own, which asks at port 80; "root" is served there, or our answers as a CGI script.
WITH_CA = """
import functools, http.server, subprocess, sys, threading
from pathlib import Path
import fakeca
home, way = Path(sys.argv[1]), sys.argv[2]
class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass
class Cgi(Files):
    def do_GET(self):
        about = {"GATEWAY_INTERFACE": "CGI/1.1", "WUCME_DIRECTORY": str(home / "certificates"),
                 "REQUEST_METHOD": "GET", "PATH_INFO": self.path}
        other = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", sys.executable]
        done = subprocess.run([*other, home / "wucme.py"], env=about, stdout=subprocess.PIPE)
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\n" + done.stdout)
if way in ("webroot", "cgi"):
    handler = functools.partial(Files if way == "webroot" else Cgi, directory=str(home / "root"))
    threading.Thread(target=http.server.HTTPServer(("127.0.0.1", 80), handler).serve_forever, daemon=True).start()
with fakeca.FakeCA(home, 80) as fake:
    sys.exit(subprocess.call([*sys.argv[3:], "--server", fake.url, "--ca-file", str(fake.ca_file)]))
"""
REDIRECT = """table inet wucme {
  chain wucme {
    type nat hook output priority -100
    tcp dport 80 redirect to :8402
  }
}
"""


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
class TestWithoutRoot:
    """What README says may be granted, each in a network of its own."""

    @pytest.mark.parametrize(("way", "options", "status"), [
        ("nothing", [], 1), ("ambient", [], 0), ("setcap", [], 0), ("sysctl", [], 0),
        ("redirect", ["--listen", "127.0.0.1:8402"], 0), ("webroot", ["--webroot", "root"], 0),
        ("cgi", ["--listen", "none"], 0)])
    def test_what_can_be_granted(self, open_place: Path, way: str, options: list[str], status: int) -> None:
        need(as_nobody(sys.executable, "-c", ""))
        need([testbed.program("unshare"), "-n", "true"])
        python, prepare = sys.executable, "true"
        if way == "setcap":
            python = str(shutil.copy(os.path.realpath(sys.executable), open_place / "python"))
            need([testbed.program("setcap"), "cap_net_bind_service=+ep", python])
        elif way == "sysctl":
            prepare = "echo 80 > /proc/sys/net/ipv4/ip_unprivileged_port_start"
        elif way == "redirect":
            (open_place / "rules").write_text(REDIRECT)
            prepare = f"{testbed.program('nft')} -f rules"
            need(["unshare", "-n", "sh", "-c", f"cd {open_place}; {prepare}"])
        elif way == "webroot":
            (open_place / "root").mkdir()
            os.chown(open_place / "root", NOBODY, NOBODY)
        script = str(shutil.copy(SCRIPT, open_place))
        run = as_nobody(python, script, "issue", "a.example.test", "--agree", "--directory", "certificates", *options,
                        rights=["net_bind_service"] if way == "ambient" else [])
        with_ca = shlex.join([sys.executable, "-c", WITH_CA, str(open_place), way, *run])
        paths = [str(SCRIPT.parent / ".ci"), *(path for path in sys.path if path.endswith("-packages"))]
        environment = {"PATH": os.environ["PATH"], "HOME": str(open_place), "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(["unshare", "-n", "sh", "-c", f"ip link set lo up && {prepare} && {with_ca}"],
                              cwd=open_place, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, "80: not permitted" in done.stderr) == (status, way == "nothing"), done.stderr
        chain = open_place / "certificates" / "wucme_c_a.example.test.pem"
        assert [path.stat().st_uid for path in [chain] if path.exists()] == ([NOBODY] if status == 0 else [])


def unit(settings: dict[str, str], text: str = "", **more: str) -> str:
    """The service unit for an ini."""
    body = "".join(f"{key} = {value}\n" for key, value in settings.items())
    source = wucme.Source("/etc/wucme/wucme.ini", f"[wucme]\n{body}{textwrap.dedent(text)}")
    found = wucme.read_settings(source, more)
    launch = wucme.Launch("/opt/a b/100%", ["/bin/true", "a b", "$x", "100%"])
    return wucme.service(found, launch)


# Runs a command as a unit of systemd would be: all read-only but for the paths named, and with these rights alone.
CONFINED = """
for at in $1; do [ ! -e "$at" ] || mount --bind "$at" "$at"; done
for at in $(awk '{ print $2 }' /proc/self/mounts | sort -ur); do
  case " $1 /proc /sys /dev" in
    *" $at "*) ;;
    *) case $at in /proc/*|/sys/*|/dev/*) ;; *) mount -o remount,bind,ro "$at" || exit 99;; esac;;
  esac
done
rights=$2
shift 2
exec setpriv --no-new-privs --inh-caps=-all --bounding-set="-all$rights" "$@"
"""


@pytest.mark.process
class TestTimer:
    """What makes it run every hour."""

    @pytest.mark.parametrize(("text", "strict"), [
        ("", True), ("load = > /a/b.pem", True), ("load = ? a.example:443", True), ("load = +", False),
        ("load = @/a/b", False), ("load = $ true", False), ("alert = $ true", False), ("hook = uacme:/a/b", False),
        ("nsupdate = /a/key", False), ("[a.example]\nload = +nginx", False), ("[a.example]\nhook = lego:/a/b", False),
        ("[a.example]\nload = > /a/b.pem", True)])
    def test_unit_allows_what_the_settings_need(self, text: str, strict: bool) -> None:
        found = unit({}, text)
        assert ["ProtectSystem=strict" in found, "NoNewPrivileges=true" in found, "CapabilityBoundingSet=" in found,
                "ReadWritePaths=" in found] == [strict] * 4
        for setting in ("Type=oneshot", "PrivateTmp=true", "ProtectKernelModules=true", "ProtectControlGroups=true",
                        f"UMask={'0077' if strict else '0022'}", "MemoryMax=", "TimeoutStartSec="):
            assert setting in found

    def test_directories_that_are_written_are_named(self) -> None:
        found = unit({"directory": "/var/c%d", "log": "/var/log/a b/w.log", "metrics": "/var/m/w.prom",
                      "webroot": "/srv/one /srv/two"}, """\
            load =
                > /etc/one/{name}/x.pem
                > /etc/two/pre-{name}.pem
            [a.example]
            webroot = /srv/three
            load = > /etc/three/x.pem
            """)
        assert re.findall("ReadWritePaths=(.*)", found) == [
            '-/var/c%%d "-/var/log/a b" -/var/m -/etc/three -/etc/one -/etc/two -/srv/one -/srv/two -/srv/three']
        assert 'WorkingDirectory=/opt/a b/100%%\nExecStart=/bin/true "a b" "$$x" 100%%\n' in found

    def test_time_limit_is_longer_than_all_deadlines(self) -> None:
        limit, more, longest = (int(re.findall("TimeoutStartSec=(.*)", text)[0]) for text in (
            unit({}), unit({}, "load = $ true"), unit({"deadline": "1h", "lock_wait": "2h"})))
        assert (limit, more, longest) == (7800, 8100, 3600 * 62)

    @pytest.mark.parametrize("load", ["> /tmp/x.pem", "+nginx"])
    def test_units_are_what_systemd_takes(self, tmp_path: Path, load: str) -> None:
        verify = [testbed.program("systemd-analyze"), "verify", str(tmp_path / "wucme.service"),
                  str(tmp_path / "wucme.timer")]
        text = unit({"directory": '/a "b" $c %d\\e', "load": load})
        (tmp_path / "wucme.timer").write_text(wucme.TIMER)
        for spoilt in ("", "Umsk=1\n"):
            (tmp_path / "wucme.service").write_text(text + spoilt)
            done = subprocess.run(verify, capture_output=True, text=True, check=False)
            assert ("Umsk" in done.stderr) if spoilt else (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can confine what root does")
    def test_renewal_within_what_the_unit_allows(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        need([testbed.program("unshare"), "-m", "sh", "-c", "mount --bind /tmp /tmp"])
        lab.old_pair("a.example.test")
        os.chown(lab.key(), NOBODY, NOBODY)
        copies, elsewhere, hidden = (tmp_path / name for name in ("copies", "elsewhere", "root"))
        for path in (copies, elsewhere, hidden):
            path.mkdir()
        os.chown(copies, NOBODY, NOBODY)
        copies.chmod(0o700)
        lab.write(f"> {copies}/{{name}}.pem what=pair owner=nobody:nogroup", webroot=str(hidden))
        text = lab.run("timer", "systemd").out
        paths = re.findall("(?m)^ReadWritePaths=(.*)", text)[0].replace("-/", "/")
        rights = re.sub("CAP_(?=[A-Z])", ",+", re.findall("(?m)^CapabilityBoundingSet=(.*)", text)[0]).replace(" ", "")
        confined = ["unshare", "-m", "sh", "-c", CONFINED, "sh", paths, rights.lower()]

        def run() -> Done:
            done = subprocess.run([*confined, *lab.command("--rotate", "--workers", "1")], env=lab.environment, cwd="/",
                                  capture_output=True, text=True, check=False, timeout=60)
            return Done(done.returncode, done.stdout, done.stderr)

        done = run()
        assert done.status == 0, done.err
        about = (copies / "a.example.test.pem").stat()
        assert (about.st_uid, about.st_mode & 0o777) == (NOBODY, 0o600)
        assert lab.chain().stat().st_uid == NOBODY
        lab.write(f"> {elsewhere}/{{name}}.pem", webroot=str(hidden))
        done = run()
        assert (done.status, "Read-only file system" in done.err) == (1, True), "the confinement holds"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can confine what root does")
    def test_procedures_do_what_they_must_within_what_the_unit_allows(self, fake: fakeca.FakeCA, lab: Host,
                                                                      tmp_path: Path) -> None:
        read_only = "".join(f"mount --bind {at} {at}; mount -o remount,bind,ro {at}; " for at in ("/proc/sys", "/sys"))
        confined = ["unshare", "-m", "sh", "-c", f'set -e; {read_only} umask 022; exec "$@"', "sh",
                    testbed.program("setpriv"), "--bounding-set=-sys_module,-syslog"]
        need([*confined, "true"])
        lab.old_pair("a.example.test")
        lab.write(f"$ cp $WUCME_CERT {tmp_path}/public; chown nobody {tmp_path}/public")
        assert "ProtectSystem" not in lab.run("timer", "systemd").out
        done = subprocess.run([*confined, *lab.command()], env=lab.environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        about = (tmp_path / "public").stat()
        assert (about.st_uid, about.st_mode & 0o777) == (NOBODY, 0o644)

    def installer(self, tmp_path: Path) -> Callable[..., tuple[int, str]]:
        """The script with places of its own for units and tables, and with its own crontab and systemctl."""
        units, tables, programs, home = (tmp_path / name for name in ("units", "cron.d", "programs", "sbin"))
        for path in (units, tables, programs, home):
            path.mkdir(exist_ok=True)
        shutil.copy(SCRIPT, home)
        called, table = tmp_path / "called", tmp_path / "table"
        for name, text in {"systemctl": f'echo "$@" >> {called}', "crontab":
                           f"case $1 in -l) cat {table};; -) cat > {table}.new; mv {table}.new {table};; esac"}.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        (tmp_path / "w.ini").write_text(f"[wucme]\ndirectory = {tmp_path}/certificates\nhost = alpha\n")
        start = f"import sys; sys.path.insert(0, {str(home)!r}); import os, wucme\n"
        start += f"wucme.UNITS, wucme.CRON_FILE, wucme.BOOTED = {str(units)!r}, {str(tables / 'wucme')!r}, 'none'\n"
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

        def run(*words: str, root: bool = True) -> tuple[int, str]:
            more = "" if root else "os.geteuid = lambda: 1000\n"
            done = subprocess.run([sys.executable, "-c", f"{start}{more}sys.exit(wucme.main())", "timer", "--ini",
                                   str(tmp_path / "w.ini"), *words], env=environment, text=True, capture_output=True,
                                  check=False)
            return done.returncode, done.stdout + done.stderr

        return run

    @pytest.mark.skipif(os.geteuid() != 0, reason="units are for root")
    def test_one_form_takes_the_place_of_the_other(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        called, table = tmp_path / "called", tmp_path / "cron.d" / "wucme"
        status, shown = run("systemd")
        assert (status, list((tmp_path / "units").iterdir())) == (0, []), "nothing is changed"
        assert shown.endswith("# to put that in place: timer systemd --install\n")
        for _ in range(2):
            assert run("cron", "--install") == (0, f"wucme runs every hour by cron: {table}\n"
                                                f"to undo that: rm {table}\n")
        command = f"root cd {tmp_path}/sbin && {sys.executable} -m wucme --ini {tmp_path}/w.ini\n"
        assert re.fullmatch(rf"#.*\n[1-9]\d? \* \* \* \* {re.escape(command)}", table.read_text())
        assert (os.listdir(tmp_path / "cron.d"), called.exists()) == (["wucme"], False)
        status, said = run("systemd", "--install")
        assert (status, called.read_text()) == (0, "daemon-reload\nenable --now wucme.timer\n")
        assert "to undo that: systemctl disable --now wucme.timer; rm " in said
        assert not table.exists()
        written = {path.name: path.read_text() for path in (tmp_path / "units").iterdir()}
        assert sorted(written) == ["wucme.service", "wucme.timer"]
        assert all(text.partition("\n")[2].rstrip() in shown for text in written.values()), "as was shown"
        assert run("cron", "--install")[0] == 0
        assert called.read_text().splitlines()[2:] == ["disable --now wucme.timer"]
        for setting in ("OnCalendar=hourly", "RandomizedDelaySec=", "Persistent=true"):
            assert setting in written["wucme.timer"]

    def test_crontab_of_a_user_keeps_its_other_lines(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        table = tmp_path / "table"
        for before, kept in (("", ""), 2 * (f"# mine {tmp_path}/sbin/wucme.py\n5 * * * * a %b\n",)):
            table.write_text(before) if before else table.unlink(missing_ok=True)
            for _ in range(2):
                assert run("cron", "--install", root=False)[0] == 0
            lines = table.read_text()
            assert lines.startswith(kept)
            assert re.fullmatch(rf"\d+ \* \* \* \* cd {re.escape(str(tmp_path))}/sbin && \S+ -m wucme --ini \S+"
                                "  # by wucme.py timer\n", lines[len(kept):])
        assert run("systemd", root=False)[0] == 2

    @pytest.mark.skipif(os.geteuid() != 0, reason="units are for root")
    def test_what_was_there_stays_until_the_new_form_is_in_place(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        assert run("cron", "--install")[0] == 0
        (tmp_path / "programs" / "systemctl").write_text("#!/bin/sh\necho no bus; exit 1\n")
        status, said = run("systemd", "--install")
        assert (status, "systemctl daemon-reload: exit status 1: no bus" in said) == (1, True)
        assert (tmp_path / "cron.d" / "wucme").exists()

    def test_tables_that_cannot_be_read_are_passed_over(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        (tmp_path / "cron.d" / "other").write_bytes(bytes(2 << 20))
        (tmp_path / "table").write_text("")
        assert run("cron", "--install", root=False)[0] == 0

    @pytest.mark.skipif(os.geteuid() != 0, reason="the tables of the system are for root")
    @pytest.mark.parametrize("place", ["cron.d/other", "table"])
    def test_never_twice(self, tmp_path: Path, place: str) -> None:
        run = self.installer(tmp_path)
        here = f"{tmp_path}/sbin"
        for other in (f"#{here}/wucme.py", f"#cd {here} && python3 -m wucme", "cd /home/alice && python3 -m wucme",
                      f"cd {here} && python3 -m wucme_exporter", f"cd {here}2 && python3 -m wucme"):
            (tmp_path / place).write_text(f"{other}\n")
            assert run("cron", "--install")[0] == 0, other
        for command in (f"{here}/wucme.py", f"cd {here} && python3 -m wucme", f"cd '{here}'; python3 -mwucme --quiet"):
            (tmp_path / place).write_text(f"23 */6 * * * root {command}\n")
            for form, root in (("cron", True), ("systemd", True), ("cron", False)):
                status, said = run(form, "--install", root=root)
                assert (status, "has wucme run already; take that out, then try again" in said) == (1, True)

    def test_what_runs_every_hour_need_not_be_compiled(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        assert run("cron", "--install")[0] == 0
        made = next((tmp_path / "sbin" / "__pycache__").iterdir())
        line = (tmp_path / "cron.d" / "wucme" if os.geteuid() == 0 else tmp_path / "table").read_text().splitlines()[-1]
        command = line[line.index("cd "):]

        def hourly() -> Done:
            done = subprocess.run(["sh", "-c", command], env={**ENVIRONMENT, "PYTHONVERBOSE": "1"}, cwd="/", text=True,
                                  capture_output=True, check=False)
            return Done(done.returncode, done.stdout, done.stderr)

        done = hourly()
        assert (done.status, f"# code object from '{made}'" in done.err) == (0, True)
        assert "0 certs, 0 renewed" in (tmp_path / "certificates" / "wucme.log").read_text()
        assert (made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777) == (0o644, 0o755), "for others too"
        script = tmp_path / "sbin" / "wucme.py"
        before = script.stat()
        script.write_text(SOURCE.replace('VERSION = "1.0"', 'VERSION = "9.9"'))
        os.utime(script, ns=(before.st_atime_ns, before.st_mtime_ns))
        command += " --version"
        assert hourly().out.startswith("wucme 9.9 "), "whatever its time says"
        made.unlink()
        made.parent.chmod(0o555)
        assert hourly().status == 0, "then it is compiled"

    @pytest.mark.skipif(os.geteuid() != 0, reason="what root trusts")
    def test_what_was_compiled_is_trusted_as_the_script_is(self, tmp_path: Path) -> None:
        run = self.installer(tmp_path)
        assert run("cron", "--install")[0] == 0
        made = next((tmp_path / "sbin" / "__pycache__").iterdir())

        def a_run() -> str:
            done = subprocess.run([sys.executable, tmp_path / "sbin" / "wucme.py", "--ini", tmp_path / "w.ini"],
                                  env=ENVIRONMENT, text=True, capture_output=True, check=False)
            return done.stderr

        assert a_run() == ""
        for path, user, mode, words in ((made.parent, NOBODY, 0o755, f"user {NOBODY}"),
                                        (made.parent, 0, 0o775, "group 0 may write it"), (made, NOBODY, 0o644, "user")):
            os.chown(path, user, 0)
            path.chmod(mode)
            assert re.search(rf"others than root may change.*{re.escape(str(path))} \(.*{words}", a_run())
            os.chown(path, 0, 0)
            path.chmod(0o755)
        made.parent.chmod(0o777)
        status, said = run("cron", "--install")
        assert (status, f"anyone may write {made.parent}" in said) == (2, True), "not only when it runs"

    @pytest.mark.parametrize(("name", "words"), [("wucme.py", "-m wucme"), ("wucme", "{}/wucme"),
                                                 ("wucme-1.0.py", "{}/wucme-1.0.py")])
    def test_a_script_that_is_no_module_is_run_as_a_file(self, tmp_path: Path, name: str, words: str) -> None:
        launch = wucme.launch_of(wucme.read_settings(wucme.NOWHERE, {"directory": "/d"}), f"{tmp_path}/{name}")
        assert launch == (str(tmp_path), [sys.executable, *words.format(tmp_path).split()])

    def test_modules_are_looked_for_beside_what_a_link_leads_to(self, tmp_path: Path) -> None:
        (tmp_path / "link.py").symlink_to("opt/wucme.py")
        found = wucme.launch_of(wucme.read_settings(wucme.NOWHERE, {"directory": "/d"}), f"{tmp_path}/link.py")
        assert found == (f"{tmp_path}/opt", [sys.executable, "/".join([str(tmp_path), "link.py"])]), "not to be listed"
        (tmp_path / "opt").mkdir()
        found = wucme.launch_of(wucme.read_settings(wucme.NOWHERE, {"directory": "/d"}), f"{tmp_path}/link.py")
        assert found == (f"{tmp_path}/opt", [sys.executable, "-m", "wucme"])

    @pytest.mark.parametrize(("line", "word"), [("log = logs/w.log", "logs/w.log"), ("webroot = /a ../b", "../b"),
                                                ("nsupdate = dns.key /x", "dns.key"), ("metrics = ~/m.prom", "")])
    def test_paths_that_depend_on_where_it_is_started_are_refused(self, tmp_path: Path, line: str, word: str) -> None:
        run = self.installer(tmp_path)
        with (tmp_path / "w.ini").open("a") as ini:
            ini.write(f"{line}\n")
        status, said = run("cron")
        if word:
            assert said == (f"wucme: {tmp_path}/w.ini:4: {line}: timer needs whole paths, for {word} depends on where "
                            "a run is started\n")
        assert status == 2 * bool(word)

    @pytest.mark.parametrize("words", [("hourly",), ("cron", "systemd"), ("--load", "+nginx"), ("--backups", "9")])
    def test_what_it_does_not_take(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        status, said = self.installer(tmp_path)(*words)
        assert (status, "timer takes systemd or cron, and settings from the ini alone" in said) == (2, True)


@pytest.mark.process
class TestOddPlaces:
    """Disks, names, limits and surroundings that are not as they should be."""

    def test_disk_that_takes_nothing_is_met_before_an_order_is_spent(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("account", "new")
        before = lab.old_pair("a.example.test")
        limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *lab.command()]
        done = subprocess.run(limited, env=lab.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "File too large" in done.stderr
        assert (orders(fake), lab.pair()) == (0, before)

    def test_link_at_a_live_path_is_replaced_and_what_it_led_to_is_left_alone(self, fake: fakeca.FakeCA, lab: Host,
                                                                               tmp_path: Path) -> None:
        lab.old_pair("a.example.test")
        old = lab.pair()
        for number, path in enumerate((lab.chain(), lab.key())):
            path.rename(tmp_path / f"target{number}")
            path.symlink_to(tmp_path / f"target{number}")
        os.link(tmp_path / "target0", tmp_path / "hard")
        assert lab.run("--key", "ecdsa-p384").status == 0
        assert lab.pair()[0] != old[0]
        assert not lab.chain().is_symlink()
        assert [(tmp_path / name).read_bytes() for name in ("target0", "target1", "hard")] == [old[0], old[1], old[0]]

    def test_file_names_of_every_kind_are_names_and_nothing_else(self, fake: fakeca.FakeCA, lab: Host,
                                                                 tmp_path: Path) -> None:
        stems = [b"new\nline", b"a b", b"$(touch pwned)", b";touch pwned;`touch pwned`", b"-rf", b"\xff\xfe", b"%s%n",
                 b"\x1b[31m", b"..", b"x" * 200]
        for number, stem in enumerate(stems):
            lab.old_pair(f"n{number}.example.test", stem=os.fsdecode(stem))
        lab.write("$ test -f \"$WUCME_CERT\"")
        fake.failing_names.add("n5.example.test")
        done = lab.run()
        assert done.lines[-1] == "20 files, 10 certs, 9 renewed, 1 failed"
        assert not list(tmp_path.rglob("pwned"))
        assert all(line.isprintable() for line in done.err.splitlines())
        assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in done.err.splitlines())
        log = (lab.directory / "wucme.log").read_bytes()
        assert not set(log) & {0x1b, 0xff}
        assert lab.run("status", "--json").status == 1

    @pytest.mark.parametrize("limit", [4, 6, 8, 10, 12, 16])
    def test_too_few_descriptors_lose_no_load(self, lab: Host, tmp_path: Path, limit: int) -> None:
        lab.old_pair("a.example.test", days=80)
        lab.write(f"$ echo x >> {tmp_path}/loads", renew="never")
        limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *lab.command()]
        done = subprocess.run(limited, env=lab.environment, capture_output=True, text=True, check=False)
        count = (tmp_path / "loads").read_text() if (tmp_path / "loads").exists() else ""
        assert (done.returncode == 0) is (count == "x\n"), done.stderr
        assert lab.run().status == 0
        assert (tmp_path / "loads").read_text() == "x\n"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked to trust")
    def test_what_others_than_root_may_change_is_one_warning(self, fake: fakeca.FakeCA, lab: Host,
                                                             tmp_path: Path) -> None:
        lab.old_pair("a.example.test", days=80)
        procedure, hook = tmp_path / "procedure", tmp_path / "hook"
        for path in (procedure, hook):
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        lab.write(f"@{procedure}", renew="never", hook=f"uacme:{hook}")
        assert "trusts" not in lab.run().err
        lab.ini.chmod(0o664)
        procedure.chmod(0o775)
        os.chown(hook, 12345, 0)
        os.chown(lab.key(), 12346, 0)
        os.chown(lab.directory, 0, 12347)
        lab.directory.chmod(0o775)
        done = lab.run()
        assert (done.status, done.err.count("others than root may change what root trusts")) == (0, 1)
        line = next(line for line in done.lines if "trusts" in line)
        assert [path for path in (lab.ini, procedure, hook, lab.key(), lab.directory) if f"{path} (" not in line] == []
        assert [f"(it belongs to user {number})" in line for number in (12345, 12346)] == [True, True]
        assert lab.run() == Done(0, "", ""), "it is told once"
        log = (lab.directory / "wucme.log").read_text()
        assert log.count("others than root") == 2, "but logged by each run"
        procedure.chmod(0o755)
        assert f"{procedure} (" not in lab.run().err
        for path in (lab.directory, tmp_path):
            path.chmod(0o777)
            done = lab.run()
            assert (done.status, len(done.lines)) == (2, 1)
            assert done.lines[0].endswith(f" and root trusts it; chmod o-w {path}")
            path.chmod(0o755)

    @contextlib.contextmanager
    def of_nobody(self, lab: Host) -> Iterator[tuple[Path, Callable[[], Done]]]:
        """A directory of certificates that is not there yet, and a run over it by a user who has no part in it."""
        need(as_nobody(sys.executable, "-c", ""))
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            home.chmod(0o755)
            command = as_nobody(sys.executable, str(shutil.copy(SCRIPT, home)), "--directory", f"{home}/certificates")

            def run() -> Done:
                done = subprocess.run(command, cwd=home, env={**lab.environment, "HOME": name}, capture_output=True,
                                      text=True, check=False)
                return Done(done.returncode, done.stdout, done.stderr)

            yield home / "certificates", run

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_key_of_somebody_else_is_said(self, lab: Host) -> None:
        with self.of_nobody(lab) as (directory, run):
            shutil.copytree(lab.directory, directory)
            fakeca.make_pair(directory, "a.example.test", ["a.example.test"], datetime.now(timezone.utc) - timedelta(1),
                             datetime.now(timezone.utc) + timedelta(80))
            os.chown(directory, NOBODY, NOBODY)
            done = run()
            key = directory / "wucme_k_a.example.test.pem"
            assert f"{key}: Permission denied: it belongs to user 0, and this runs as user {NOBODY}\n" in done.err
            assert done.status == 1

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root has what is not nobody's")
    def test_directory_of_somebody_else_is_said(self, lab: Host) -> None:
        why = f": Permission denied: it belongs to user 0, and this runs as user {NOBODY}\n"
        with self.of_nobody(lab) as (directory, run):
            lock = directory / "wucme.lock"
            done = run()
            assert (done.status, done.out) == (1, "")
            assert f": failed: {directory}: cannot be made: {directory.parent}{why}" in done.err
            directory.mkdir()
            assert f": failed: {directory}{why}" in run().err
            lock.touch(0o600)
            assert f": failed: {lock}{why}" in run().err

    def test_run_that_takes_too_long_leaves_the_rest_to_the_next_but_loads(self, fake: fakeca.FakeCA, lab: Host,
                                                                           tmp_path: Path) -> None:
        lab.old_pair("a.example.test")
        lab.write(f"$ echo x >> {tmp_path}/loads")
        command = lab.command()
        command[3:4] = ["-c", f"import sys; sys.path.insert(0, {str(BUILT)!r}); import wucme\n"
                        "wucme.DEADLINES = 0; sys.exit(wucme.main())"]
        done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, check=False)
        assert "a.example.test: failed: not begun, for this run has taken too long already; the next one does it\n" \
            in done.stderr
        assert (done.returncode, orders(fake), (tmp_path / "loads").read_text()) == (1, 0, "x\n")
        assert lab.run().status == 0
        assert (orders(fake), (tmp_path / "loads").read_text()) == (1, "x\nx\n")

    def test_output_that_nobody_takes_stops_no_renewal(self, fake: fakeca.FakeCA, lab: Host) -> None:
        for redirection in (">&- 2>&- <&-", ">/dev/full 2>/dev/full", "2>&1 | true"):
            before = lab.old_pair("a.example.test")
            done = subprocess.run(["sh", "-c", f"{shlex.join(lab.command('--verbose'))} {redirection}"], check=False,
                                  env=lab.environment, stdin=subprocess.DEVNULL)
            assert done.returncode == 0
            assert lab.pair() != before
        assert lab.run() == Done(0, "", "")

    def test_empty_environment(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        lab.old_pair("a.example.test")
        lab.write(f"$ env > {tmp_path}/told; ls / | cat > /dev/null")
        done = subprocess.run(lab.command(), env={}, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin\n" in (tmp_path / "told").read_text()

    @pytest.mark.parametrize("tracer", ["strace", "python"])
    def test_names_and_renames_reach_the_disk_in_order(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path,
                                                       tracer: str) -> None:
        lab.old_pair("a.example.test")
        trace, command = tmp_path / "trace", lab.command("--rotate")
        if tracer == "strace":
            calls = "trace=fsync,rename,renameat,renameat2,write,pwrite64"
            strace = [testbed.program("strace"), "-f", "-qq", "-y", "-s", "0", "-o", str(trace), "-e", calls]
            need([*strace, "true"])
            command = [*strace, *command]
        else:
            command[3:4] = ["-c", RECORDER, str(trace), COMPILED]
        done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, done.stderr
        flushed, renamed, waiting = set(), 0, False
        for line in trace.read_text().splitlines():
            call, _, rest = line.partition(" ")[2].strip().partition("(")
            paths = re.findall(r'[<"]([^<>"]*)[>"]', rest)
            if call == "fsync":
                flushed.add(paths[0])
                waiting = waiting and paths[0] != str(lab.directory)
            elif call.startswith("rename"):
                assert not waiting, "the directory is flushed before the next rename"
                target = os.readlink(paths[1]) if os.path.islink(paths[1]) else ""
                assert paths[0] in flushed or target, f"{paths[0]} is flushed before it is renamed"
                renamed, waiting = renamed + 1, True
            else:
                flushed -= set(paths[:1])
        assert not waiting
        assert renamed >= 7


@pytest.mark.process
def test_children_are_told_no_secret(tmp_path: Path) -> None:
    mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    with fakeca.FakeCA(tmp_path, testbed.free_ports(1)[0], eab={"kid-1": mac}) as fake:
        lab = Host(tmp_path, fake.url, fake.ca_file, f"127.0.0.1:{fake.http_port}")
        (tmp_path / "mac").write_text(mac)
        told = tmp_path / "children.told"
        lab.write(f"$ cat /proc/$$/environ /proc/$$/cmdline /proc/$PPID/environ /proc/$PPID/cmdline > {told}",
                  eab_kid="kid-1", eab_hmac=mac, rotate="yes")
        assert lab.run("issue", "a.example.test", "--verbose").status == 0
    assert b"WUCME_KEY=" in told.read_bytes()
    assert b"--verbose" in told.read_bytes()
    assert len(secrets_of(tmp_path)) > 6
    assert told_secrets(lab) == []
    lab.said += lab.key().read_text()
    assert told_secrets(lab), "or this test could not see one"
    lab.said = ""


# --- as uacme: the same calls, by uacme itself and by wucme.py --uacme, side by side ------------

class Twin(NamedTuple):
    """One of two programs that are called alike: how, where, and what its hook noted."""
    command: list[str]
    home: Path
    environment: dict[str, str]

    def run(self, arguments: Sequence[object], **environment: str) -> Done:
        """Run it in its home, with its own directory for {home}."""
        words = [str(word).replace("{home}", str(self.home)) for word in arguments]
        done = subprocess.run([*self.command, *words], env={**self.environment, **environment}, cwd=self.home,
                              check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        assert b"Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def files(self) -> dict[str, str]:
        """Modes by path of all that is in its directory, and of what is beside its requests; the time taken away."""
        found = [*(self.home / "conf").rglob("*"), *self.home.glob("*.pem")] + [self.home / "conf"]
        return {re.sub(r"-1\d{9}(?=\.pem)", "-EPOCH", str(path.relative_to(self.home))): oct(mode(path))
                for path in found if path.exists()}

    def calls(self) -> list[str]:
        """The calls of its hook in their order, but of declined ones, since a CA may offer in any order."""
        calls = [re.sub(r"[\w-]{43}", "X", call) for call in arguments(self.home / "hook")]
        ends = [re.sub("^(done|failed)", "begin", call) for call in [*calls[1:], ""]]
        return [call for call, end in zip(calls, ends) if not call.startswith("begin") or call == end]

    def certificate(self, name: str = "a.example.test") -> wucme.Facts:
        """What its live certificate says, whose key must fit."""
        about = wucme.facts((self.home / "conf" / name / "cert.pem").read_bytes())
        key = wucme.parse_key((self.home / "conf/private" / name / "key.pem").read_bytes())
        assert about.key == wucme.key_hash(key.public_key())
        return about


def our_twin(home: Path, url: str, ca_file: Path, *options: str) -> Twin:
    """wucme.py as uacme, with a directory of its own in a home of its own."""
    home.mkdir()
    command = [sys.executable, "-W", "error", COMPILED, "--uacme", "-a", url, "-c", f"{home}/conf", *options]
    return Twin(command, home, {"PATH": os.environ["PATH"], "HOME": str(home), "UACME_CAINFO": str(ca_file),
                                "PYTHONDONTWRITEBYTECODE": "1", "no_proxy": "localhost"})


@pytest.fixture(scope="module")
def pebble24(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testbed.Pebble]:
    """A test CA that is old enough for the uacme of Debian, and believes whatever a hook has accepted."""
    directory = tmp_path_factory.mktemp("pebble24")
    with testbed.Pebble(directory, binaries=testbed.setup("pebble24"), always_valid=True,
                        authz_reuse=100, nonce_reject=0) as ca:
        yield ca


SECONDS = itertools.count()


class Twins(NamedTuple):
    """uacme and wucme.py as uacme, each with a directory and an account of its own at one CA."""
    theirs: Twin
    ours: Twin

    def both(self, *arguments: object, status: int) -> None:
        """Run both alike, which must end with this status and leave the same behind."""
        for path in [path for twin in self for path in twin.home.rglob("*-17????????.pem")]:
            # uacme fails where a second has two of them.
            path.rename(path.with_name(re.sub(r"-1\d{9}", f"-1{next(SECONDS):09}", path.name)))
        ends = [twin.run(arguments) for twin in self]
        assert [end.status for end in ends] == [status, status], ends
        assert self.theirs.files() == self.ours.files()
        assert len({len(list((twin.home / "conf").rglob("*.pem"))) for twin in self}) == 1
        calls = [twin.calls() for twin in self]
        assert sorted(calls[0]) == sorted(calls[1])
        for one, after in zip(calls[1], calls[1][1:]):
            assert after.startswith("begin ") or one == re.sub("^[a-z]+", "begin", after), "one name after the other"


HTTP_ONLY = '[ "$1" != begin ] || [ "$2" = http-01 ]\n'


@pytest.fixture
def twins(pebble24: testbed.Pebble, tmp_path: Path) -> Twins:
    """Both programs, with hooks that take nothing but http-01."""
    ours = our_twin(tmp_path / "ours", pebble24.directory_url, pebble24.ca_file)
    home = tmp_path / "theirs"
    home.mkdir()
    binary, environment = testbed.uacme_trusting(home, pebble24.ca_file)
    theirs = Twin([binary, *(word.replace("/ours/", "/theirs/") for word in ours.command[5:])], home,
                  {**ours.environment, "HOME": str(home), **environment})
    for twin in (theirs, ours):
        recorder(twin.home, HTTP_ONLY)
    return Twins(theirs, ours)


BAD_CALLS = ["", "-V", "-?", "--help", "--version", "what", "-x issue a.b", "issue", "new a b", "deactivate now",
             "newkey now", "revoke", "revoke a b c", "revoke nowhere.pem", "-b 100 -y new", "-b 2049 -y new",
             "-t EC -b 521 -y new", "-t DSA new", "-d 0 issue a.b", "-d x issue a.b", "-r -1 revoke a", "-r x revoke a",
             "-s new", "-e nocolon -y new", "-h nowhere issue a.b", "-l 0 issue a.b", "-l A issue a.b",
             "-l AA issue a.b", "issue a.b", "update", "-n new", "issue a..b",
             "issue *", "issue a/../b.c", "issue a.*.b"]


@pytest.mark.process
@pytest.mark.pebble
@pytest.mark.servers
class TestLikeUacme:
    """What uacme does and what wucme.py --uacme does: exit status, files, their modes, the calls of the hook."""

    def test_calls_that_it_refuses(self, twins: Twins) -> None:
        for call in BAD_CALLS:
            twins.both(*call.split(), status=2)
        assert twins.ours.files() == {}

    def test_accounts(self, twins: Twins, pebble24: testbed.Pebble) -> None:
        twins.both("new", status=2)
        twins.both("new", "-yv", "x@example.org", status=0)
        twins.both("--yes", "new", status=2)
        twins.both("update", "y@example.org", status=0)
        twins.both("update", status=0)
        twins.both("-n", "newkey", status=2)
        twins.both("newkey", "-t", "ec", "--bits=384", status=0)
        kinds = [wucme.key_kind(wucme.parse_key((twin.home / "conf/private/key.pem").read_bytes()).public_key())
                 for twin in twins]
        assert kinds == ["ecdsa-p384", "ecdsa-p384"]
        twins.both("deactivate", status=0)
        twins.both("update", "z@example.org", status=2)

    def test_certificates(self, twins: Twins) -> None:
        twins.both("-y", "new", status=0)
        names = "a.example.test", "b.example.test"
        twins.both("-n", "-h", "{home}/hook", "issue", *names, status=2)
        twins.both("issue", *names, status=2)
        twins.both("-h", "{home}/hook", "issue", *names, status=0)
        first = [twin.certificate() for twin in twins]
        assert [set(one.names) for one in first] == [set(names)] * 2
        assert [one.kind for one in first] == ["rsa-2048"] * 2
        twins.both("issue", "--ho={home}/hook", *names, status=1)
        twins.both("issue", "-v", "a.example.test", status=1)
        twins.both("-h", "{home}/hook", "issue", "b.example.test", "-t", "EC", status=0)
        assert [twin.certificate("b.example.test").kind for twin in twins] == ["ecdsa-p256"] * 2
        twins.both("-h", "{home}/hook", "issue", *names, "c.example.test", status=0)
        twins.both("--force", "-n", "-h", "{home}/hook", "issue", *names, status=0)
        twins.both("-d", "91", "-h", "{home}/hook", "issue", *names, status=0)
        twins.both("-d", "80", "-h", "{home}/hook", "issue", *names, status=1)
        assert all(twin.certificate() != before for twin, before in zip(twins, first))

    def test_wildcards_addresses_and_declined_types(self, twins: Twins) -> None:
        twins.both("-y", "new", status=0)
        twins.both("-h", "{home}/hook", "issue", "*.wild.test", status=2)
        for twin in twins:
            recorder(twin.home, '[ "$1" != begin ] || [ "$2" = dns-01 ]\n')
        twins.both("-h", "{home}/hook", "issue", "*.wild.test", status=0)
        assert "begin dns-01 wild.test X X" in twins.ours.calls()
        twins.both("-h", "{home}/hook", "issue", "127.0.0.1", status=2)
        for twin in twins:
            recorder(twin.home, "[ $1 = begin ] && kill -9 $$; true\n")
            assert twin.run(["-h", "{home}/hook", "issue", "killed.test"]).status == 2
            assert sum(" killed.test " in call and "begin" in call for call in arguments(twin.home / "hook")) == 1
        assert twins.theirs.files() == twins.ours.files()

    def test_signing_requests(self, twins: Twins) -> None:
        twins.both("-y", "new", status=0)
        request = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "c.example.test")]))
        names = [x509.DNSName(f"{letter}.example.test") for letter in "cd"]
        request = request.add_extension(x509.SubjectAlternativeName(names), False)
        pem = request.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        for twin in twins:
            (twin.home / "r.1.csr").write_bytes(pem)
            (twin.home / "junk.csr").write_bytes(b"junk")
        twins.both("-h", "{home}/hook", "issue", "junk.csr", status=2)
        twins.both("-h", "{home}/hook", "issue", "r.1.csr", "e.example.test", status=2)
        twins.both("-h", "{home}/hook", "issue", "r.1.csr", status=0)
        twins.both("-h", "{home}/hook", "issue", "r.1.csr", status=1)
        twins.both("-h", "{home}/hook", "issue", "{home}/r.1.csr", "-f", status=0)
        found = wucme.facts((twins.ours.home / "r.1-cert.pem").read_bytes())
        assert (found.key, set(found.names)) == (wucme.key_hash(KEY.public_key()), {"c.example.test", "d.example.test"})

    def test_revocations(self, twins: Twins) -> None:
        twins.both("-y", "new", status=0)
        cert, key = "{home}/conf/a.example.test/cert.pem", "{home}/conf/private/a.example.test/key.pem"
        for extra in ([], ["-r", "1"], [key]):
            twins.both("-h", "{home}/hook", "issue", "a.example.test", status=0)
            twins.both("revoke", cert, *extra, status=0)
        twins.both("revoke", key, status=2)
        twins.both("revoke", cert, status=2)

    def test_either_goes_on_with_what_the_other_made(self, twins: Twins) -> None:
        twins.both("-y", "new", "-t", "EC", status=0)
        for first, then in (twins, twins[::-1]):
            name = f"{first.home.name}.example.test"
            issue = ["-h", "{home}/hook", "issue", name]
            assert first.run(issue).status == 0
            crossed = Twin([word.replace(str(then.home), str(first.home)) for word in then.command], then.home,
                           then.environment)
            assert crossed.run(issue).status == 1
            assert crossed.run(["-f", *issue]).status == 0, "with its account, its keys and its directory"
            first.certificate(name)


@pytest.fixture
def alike(fake: fakeca.FakeCA, tmp_path: Path) -> Twin:
    """wucme.py as uacme with an account at a CA that can be told to misbehave."""
    twin = our_twin(tmp_path / "alike", fake.url, fake.ca_file)
    recorder(twin.home, HTTP_ONLY)
    fake.always_valid = True
    assert twin.run(["-y", "new"]).status == 0
    return twin


ISSUE = ["-h", "{home}/hook", "issue", "a.example.test"]


@pytest.mark.process
class TestAsUacme:
    """What only uacme 1.8 does, and what is done better than there."""

    def test_check_says_whether_it_is_due(self, alike: Twin) -> None:
        assert alike.run(["check", "a.example.test"]).status == 2, "there is no key yet"
        assert alike.run(ISSUE).status == 0
        before = alike.files()
        assert alike.run(["check", "a.example.test"]).status == 1
        assert alike.run(["-i", "-d", "365", "check", "a.example.test"]).status == 0
        assert alike.run(["check", "a.example.test", "b.example.test"]).status == 0
        assert alike.run(["check", "-f", "a.example.test"]).status == 0
        assert alike.files() == before

    @pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
    def test_window_of_the_ca_counts_in_utc_and_alone(self, fake: fakeca.FakeCA, alike: Twin, zone: str) -> None:
        assert alike.run(ISSUE).status == 0
        old, now = alike.certificate(), datetime.now(timezone.utc)
        fake.window = now + timedelta(hours=2), now + timedelta(hours=3)
        assert alike.run([*ISSUE, "-d", "365"], TZ=zone).status == 1
        fake.window = now - timedelta(hours=3), now - timedelta(hours=2)
        assert alike.run(["-i", "check", "a.example.test"], TZ=zone).status == 1
        assert alike.run(ISSUE, TZ=zone).status == 0
        payload = [payload for _, path, payload in fake.requests if path == "/new-order"][-1]
        assert payload["replaces"] == old.ari

    def test_a_new_key_comes_with_each_certificate_or_not_at_all(self, fake: fakeca.FakeCA, alike: Twin) -> None:
        assert alike.run(["-k", "-t", "EC", *ISSUE]).status == 0
        old, before = alike.certificate(), alike.files()
        assert "conf/private/a.example.test/key-EPOCH.pem" not in before
        assert alike.run(["-k", "-n", *ISSUE]).status == 2
        fake.failing_names.add("a.example.test")
        assert alike.run(["-f", "-k", *ISSUE]).status == 2
        assert arguments(alike.home / "hook")[-1].startswith("failed http-01 a.example.test ")
        assert (alike.certificate(), alike.files()) == (old, before)
        fake.failing_names.clear()
        assert alike.run(["-f", "-k", "-t", "EC", *ISSUE]).status == 0
        assert alike.certificate().key != old.key
        assert alike.files() == {**before, "conf/private/a.example.test/key-EPOCH.pem": "0o400",
                                 "conf/a.example.test/cert-EPOCH.pem": "0o444"}

    def test_a_certificate_that_does_not_fit_is_not_put_there(self, fake: fakeca.FakeCA, alike: Twin) -> None:
        assert alike.run(ISSUE).status == 0
        old, before = alike.certificate(), alike.files()
        fake.misbehave("cert_other_key")
        assert alike.run(["-f", *ISSUE]).status == 2
        assert (alike.certificate(), alike.files()) == (old, before)

    def test_modes_that_were_changed_stay(self, alike: Twin) -> None:
        assert alike.run(ISSUE).status == 0
        (alike.home / "conf/private").chmod(0o750)
        (alike.home / "conf/private/a.example.test/key.pem").chmod(0o440)
        before = alike.files()
        assert alike.run(["-f", "-k", *ISSUE]).status == 0
        assert {path: mode for path, mode in alike.files().items() if path in before} == before

    def test_a_lasting_record_is_offered_as_it_must_stand(self, fake: fakeca.FakeCA, alike: Twin) -> None:
        recorder(alike.home, '[ "$1" != begin ] || [ "$2" = dns-persist-01 ]\n')
        fake.records = lambda name: [noted(alike.home / "hook")[-1][0][4].strip('"')]
        assert alike.run(["-h", "{home}/hook", "issue", "*.a.example.test"]).status == 0
        calls = [call for call, _ in noted(alike.home / "hook") if call[1] == "dns-persist-01"]
        account = next(iter(fake.accounts.values())).url
        text = f'"fakeca.example; accounturi={account}; policy=wildcard"'
        assert calls == [[verb, "dns-persist-01", "a.example.test", "fakeca.example", text]
                         for verb in ("begin", "done")]
        assert not [call for call, _ in noted(alike.home / "hook") if call[1] == "unheard-of-01"]

    def test_rate_limits_are_told_with_their_end(self, fake: fakeca.FakeCA, alike: Twin) -> None:
        fake.misbehave("rate_limited")
        fake.retry_after = "3600"
        done = alike.run(ISSUE)
        assert done.status == 2
        assert "rateLimited: too many certificates" in done.err
        assert sum(path == "/new-order" for _, path, _ in fake.requests) == 1

    @pytest.mark.parametrize("bits", ["", ":256", ":384", ":512"])
    def test_accounts_bound_to_others(self, tmp_path: Path, bits: str) -> None:
        mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
        with fakeca.FakeCA(tmp_path, eab={"kid-1": mac}) as fake:
            twin = our_twin(tmp_path / "home", fake.url, fake.ca_file)
            assert twin.run(["-y", "-e", f"kid-2:{mac}{bits}", "new"]).status == 2
            assert twin.run(["-y", "-e", f"kid-1:{mac}{bits}", "new"]).status == 0
            binding = next(payload for _, path, payload in fake.requests[::-1]
                           if path == "/new-account" and "externalAccountBinding" in payload)["externalAccountBinding"]
        header = json.loads(fakeca.unb64(binding["protected"]))
        assert (header["alg"], header["kid"]) == (f"HS{bits[1:] or 256}", "kid-1")

    def test_profiles_and_staples(self, tmp_path: Path) -> None:
        with fakeca.FakeCA(tmp_path, profiles={"shortlived": "six days"}) as fake:
            fake.always_valid = True
            twin = our_twin(tmp_path / "home", fake.url, fake.ca_file)
            recorder(twin.home, HTTP_ONLY)
            assert twin.run(["-y", "new"]).status == 0
            done = twin.run(["-p", "long", *ISSUE])
            assert (done.status, "shortlived" in done.err) == (2, True)
            assert twin.run(["-m", "-p", "shortlived", *ISSUE]).status == 0
            csr = next(payload["csr"] for _, path, payload in fake.requests[::-1] if path.startswith("/finalize/"))
            assert [payload["profile"] for _, path, payload in fake.requests if path == "/new-order"] == ["shortlived"]
        found = wucme.extension(x509.load_der_x509_csr(fakeca.unb64(csr)), x509.TLSFeature)
        assert found is not None
        assert list(found) == [x509.TLSFeatureType.status_request]

    def test_what_a_hook_says_is_passed_on(self, alike: Twin) -> None:
        recorder(alike.home, "echo heard; pwd; umask\n" + HTTP_ONLY)
        done = alike.run(ISSUE)
        assert done.status == 0
        assert f"heard\n{alike.home}\n" in done.err
        assert re.sub(r"(?m)^(heard|/.*|00\d\d)\n", "", done.err) == "", "and nothing else without -v"
        assert {told["UACME_CONFDIR"] for _, told in noted(alike.home / "hook")} == {f"{alike.home}/conf"}
        assert noted(alike.home / "hook")[0][1]["UACME_VERBOSE"] == "0"
        assert "heard" in alike.run(["-vvf", *ISSUE]).err
        assert noted(alike.home / "hook")[-1][1]["UACME_VERBOSE"] == "2"

    @pytest.mark.parametrize(("answer", "status"), [(b"y\n", "successful"), (b"n\n" * 9, "no challenge was taken up")])
    def test_without_a_hook_it_asks(self, fake: fakeca.FakeCA, alike: Twin, lab: Host, answer: bytes,
                                    status: str) -> None:
        fake.offered = {"http-01", "unheard-of-01"}
        command = [*alike.command, "-v", "issue", "a.example.test"]
        lab.environment.update(alike.environment)
        said = at_terminal(command, lab, {b"[y/N] ": answer})
        assert re.search(r"challenge=http-01 ident=a.example.test token=([\w-]+) key_auth=\1\.[\w-]+\r", said)
        assert status in said
        if answer == b"y\n":
            alike.certificate()

    def test_without_a_hook_and_a_terminal_it_says_what_is_missing(self, fake: fakeca.FakeCA, alike: Twin) -> None:
        fake.offered = {"http-01"}
        done = alike.run(["issue", "a.example.test"])
        assert done.status == 2
        assert "a.example.test: no challenge was taken up; " in done.err
        assert "(without -h a terminal is asked)" in done.err

    def test_its_proxy_and_directory_of_cas(self, fake: fakeca.FakeCA, alike: Twin, tmp_path: Path) -> None:
        port = fake.server.server_port
        openssl = [testbed.program("openssl"), "x509", "-noout", "-hash", "-in", str(fake.ca_file)]
        (tmp_path / "cas").mkdir()
        name = subprocess.check_output(openssl, text=True).strip()
        (tmp_path / "cas" / f"{name}.0").symlink_to(fake.ca_file)
        more = {"UACME_CAINFO": "", "no_proxy": ""}
        assert alike.run(["update"], **more).status == 2
        proxy = Proxy(port)
        with Loopback(proxy) as where:
            done = alike.run(["update"], **more, UACME_CAPATH=str(tmp_path / "cas"),
                             UACME_PROXY=f"http://user:pw@127.0.0.1:{where.port}")
        assert done.status == 0, done.err
        assert f"CONNECT localhost:{port} " in proxy.heads[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UACME_PROXY", "proxy.example")
            assert wucme.texts_of({})["proxy"] == "proxy.example:1080"

    @pytest.mark.pebble
    @pytest.mark.servers
    def test_its_own_hook_for_a_web_root(self, pebble: testbed.Pebble, tmp_path: Path) -> None:
        twin, hook = our_twin(tmp_path / "h", pebble.directory_url, pebble.ca_file), testbed.setup("uacme") / "uacme.sh"
        twin.run(["-y", "new"])
        with Documents(pebble.http_port, lambda path: content(tmp_path / path.rpartition("/")[2])):
            done = twin.run(["-h", hook, "issue", "a.example.test", "b.example.test"],
                            UACME_CHALLENGE_PATH=str(tmp_path))
        assert done.status == 0, done.err
        assert twin.certificate().names == ("a.example.test", "b.example.test")
        assert not [path for path in tmp_path.iterdir() if len(path.name) == 43], "its tokens are gone"

    @pytest.mark.pebble
    @pytest.mark.servers
    def test_its_own_hook_for_the_dns(self, bind: testbed.Bind, pebble_of_bind: testbed.Pebble, tmp_path: Path) -> None:
        hook, ca = testbed.setup("uacme") / "nsupdate.sh", pebble_of_bind
        twin = our_twin(tmp_path / "h", ca.directory_url, ca.ca_file)
        twin.run(["-y", "new"])
        (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
        (tmp_path / "sleep").chmod(0o755)       # or each call takes five seconds
        done = twin.run(["-h", hook, "issue", "*.u3.example.test"], PATH=f"{tmp_path}:{bind.path}")
        assert done.status == 0, done.err
        assert bind.ask("_acme-challenge.u3.example.test") == []

    @pytest.mark.pebble
    def test_the_chain_of_its_choice(self, tmp_path: Path) -> None:
        with testbed.Pebble(tmp_path / "ca", binaries=testbed.pebble_binaries(), always_valid=True,
                            alternate_roots=2) as ca:
            twin = our_twin(tmp_path / "home", ca.directory_url, ca.ca_file)
            recorder(twin.home)
            twin.run(["-y", "new"])
            path, roots = twin.home / "conf/a.example.test/cert.pem", []

            def issued(*options: str) -> str:
                assert twin.run(["-f", *options, *ISSUE]).status == 0
                return wucme.parse_certificate(wucme.certificates(path.read_bytes())[-1]).issuer.rfc4514_string()

            roots = [issued(*options) for options in (["-t", "EC"], ["-l", "1"], ["-l", "2"], ["-l", "9"])]
            mark = wucme.authority_key(wucme.parse_certificate(wucme.certificates(path.read_bytes())[-1]))
            assert issued("-l", mark[:4].hex(":")) == roots[0]
        assert len(set(roots)) == 3
        assert roots[0] == roots[3]


@pytest.mark.process
@pytest.mark.skipif(Path(wucme.UACME_DIRECTORY).exists(), reason="this machine has a directory of uacme's")
class TestAsUacmeInAFlatDirectory:
    """The command of wuCME's own log, in a directory of its kind."""

    def run(self, lab: Host, *arguments: object) -> Done:
        """Run it in the directory, as that program runs itself."""
        done = subprocess.run([sys.executable, "-W", "error", COMPILED, "--uacme", *map(str, arguments)],
                              env={**lab.environment, "WUCME_INI": str(lab.ini)}, cwd=lab.directory, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
        assert "Traceback" not in done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def test_does_what_the_log_of_wucme_shows(self, fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        lab.write(f"$ touch {tmp_path}/loaded", renew="30d")
        assert lab.run("account", "new").status == 0
        fakeca.make_pair(lab.directory, "X86VMS_DOMAIN_NET", ["x86vms.domain.net"], datetime.now(timezone.utc)
                         - timedelta(62), datetime.now(timezone.utc) + timedelta(28.9))
        chain, key = (lab.directory / f"wucme_{kind}_X86VMS_DOMAIN_NET.pem" for kind in "ck")
        old, old_key = chain.read_bytes(), key.read_bytes()
        fake.http_host = "127.0.0.1"
        assert self.run(lab, "check", "x86vms.domain.net").status == 0
        done = self.run(lab, "--verbose", "issue", "x86vms.domain.net")
        assert done.status == 0, done.err
        said = ["expires: 28 renew: -1", "loading key from ", "using the directory of",
                "creating new order for x86vms.domain.net", "order URL: ", "retrieving authorization at",
                "starting challenge at", "polling order status at", "finalizing order at", "retrieving certificate at",
                f"saving certificate to {chain}_tmp", f"reading private key {key}", f"backed up {chain} as {chain}_20",
                f"renaming {chain}_tmp to {chain}", "wuCME successful x86vms.domain.net renewal"]
        for text in said:
            assert text in done.err, text
        assert chain.read_bytes() != old
        assert key.read_bytes() == old_key
        assert not (tmp_path / "loaded").exists(), "its manager does that"
        assert self.run(lab, "--verbose", "issue", "x86vms.domain.net").status == 1
        assert self.run(lab, "check", "x86vms.domain.net").status == 1
        lab.run()
        assert (tmp_path / "loaded").exists()

    def test_verbs_are_those_of_the_directory(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("account", "new")
        assert self.run(lab, "update", "x@example.org").status == 0
        assert next(iter(fake.accounts.values())).contact == ["mailto:x@example.org"]
        assert self.run(lab, "issue", "a.example.test").status == 0
        fake.failing_names.add("b.example.test")
        assert self.run(lab, "issue", "b.example.test").status == 2
        assert self.run(lab, "-r", "4", "revoke", lab.chain()).status == 0
        assert fake.revoked
        assert self.run(lab, "-r", "99", "revoke", lab.chain()).status == 2
        assert self.run(lab, "newkey").status == 0
        assert self.run(lab, "deactivate").status == 0

    def test_check_of_what_cannot_be_used_is_no_answer(self, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.run("account", "new")
        fakeca.make_pair(lab.directory, "a.example.test", ["a.example.test"], datetime.now(timezone.utc)
                         - timedelta(89), datetime.now(timezone.utc) + timedelta(1))
        assert self.run(lab, "check", "a.example.test").status == 0
        key: Any = ed25519.Ed25519PrivateKey.generate()
        lab.key().write_bytes(wucme.key_pem(key))
        done = self.run(lab, "check", "a.example.test")
        assert (done.status, "of a kind that CAs do not take" in done.err) == (2, True)


class TestUacmeOptions:
    @pytest.mark.parametrize(("words", "texts"), [
        ("-a https://ca/dir", {"server": "https://ca/dir"}), ("--staging", {"server": "letsencrypt-staging"}),
        ("-e k:abc", {"eab_kid": "k", "eab_hmac": "abc", "eab_alg": "HS256"}),
        ("--eab=k:abc:512", {"eab_kid": "k", "eab_hmac": "abc", "eab_alg": "HS512"}),
        ("-d 7", {"renew": "7d"}), ("-kl 2", {"rotate": "yes", "chain": "2"}),
        ("-yp short", {"agree": "yes", "profile": "short"}),
        ("--must-staple --no-ocsp -i", {"must_staple": "yes"}), ("-f -n -v -r 3 -b 3072 -t rsa -c /x", {}),
    ])
    def test_options_become_settings(self, monkeypatch: pytest.MonkeyPatch, words: str, texts: dict[str, str]) -> None:
        for name in ("CAINFO", "CAPATH", "PROXY"):
            monkeypatch.delenv(f"UACME_{name}", raising=False)
        _, given, _ = wucme.read_call(["issue", *words.split(), "a.b"])
        assert wucme.texts_of(given) == texts
        wucme.read_settings(wucme.NOWHERE, texts)

    @pytest.mark.parametrize("words", ["-s -a https://ca/dir", "-k -n", "-e a:b:128", "-d 0", "-l A", "-r x", "-t DSA",
                                       pytest.param(f"-b {'9' * 5000}", id="digits")])
    def test_what_cannot_be_is_refused(self, words: str) -> None:
        with pytest.raises(wucme.SettingsError):
            wucme.read_call(["issue", *words.split(), "a.b"])

    @pytest.mark.parametrize(("words", "kind"), [
        ("", "ecdsa-p384"), ("-t EC", "ecdsa-p256"), ("-b 3072", "rsa-3072"), ("-t RSA", "rsa-2048")])
    def test_kind_of_new_keys_in_a_directory_of_wucme(self, words: str, kind: str, tmp_path: Path, log: wucme.Log,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "WUCME_K_ACCOUNT.PEM").touch()
        (tmp_path / "wucme.ini").write_text("[wucme]\nkey = ecdsa-p384\n")
        monkeypatch.setenv("WUCME_INI", str(tmp_path / "wucme.ini"))
        monkeypatch.setattr(wucme, "UACME_DIRECTORY", str(tmp_path / "none"))
        monkeypatch.chdir(tmp_path)
        call = wucme.understand_call([*words.split(), "issue", "a.example"], wucme.REAL)
        assert (call.top, call.settings.run.directory) == ("", str(tmp_path))
        assert call.settings.default.key == kind

    @pytest.mark.parametrize(("given", "kind"), [({}, "rsa-2048"), ({"t": "EC"}, "ecdsa-p256"),
                                                 ({"b": "8192"}, "rsa-8192"), ({"t": "ec", "b": "384"}, "ecdsa-p384")])
    def test_kinds_of_keys(self, given: dict[str, str], kind: str) -> None:
        assert wucme.key_asked(given) == kind
