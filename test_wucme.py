"""Tests of wucme.py, in the order of its sections: `make test`, or a part: `make test ARGS="-k load"`.

The first part needs nothing but Python, cryptography, pytest and hypothesis. What is marked `pebble` needs that
test CA, what is marked `servers` needs nginx and apache2 from Debian; `.ci/setup` gets the first, `.ci/run` both.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pty
import re
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import fakeca
import pytest
import testbed
from cryptography import x509
from cryptography.hazmat.primitives import hashes

import wucme

SCRIPT = Path(wucme.__file__).resolve()


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


class Host:
    """A host as the script sees it: a home, an ini, a directory."""

    def __init__(self, home: Path, server: str = "", ca_file: object = "", listen: str = "none") -> None:
        self.home, self.directory, self.ini = home, home / "certificates", home / "wucme.ini"
        self.directory.mkdir()
        self.settings = {"directory": str(self.directory), "server": server, "ca_file": str(ca_file), "agree": "yes",
                         "listen": listen, "host": "alpha", "lock_wait": "20s"}
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        self.write()

    def write(self, *load: str, sections: str = "", **changes: str) -> None:
        """Write the ini: these load items, these changes, these further sections."""
        texts = {**self.settings, **changes}
        items = "".join(f"\n    {item}" for item in load)
        self.ini.write_text("[wucme]\n" + "".join(f"{key} = {text}\n" for key, text in texts.items() if text)
                            + (f"load ={items}\n" if load else "") + textwrap.dedent(sections))

    def command(self, *arguments: object) -> list[str]:
        """The command line of a run with this ini."""
        return [sys.executable, "-W", "error", str(SCRIPT), "--ini", str(self.ini), *map(str, arguments)]

    def run(self, *arguments: object, **environment: str) -> Done:
        """Run the script to its end, as cron would."""
        done = subprocess.run(self.command(*arguments), env={**self.environment, **environment}, cwd=self.home,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False)
        result = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
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


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a directory: its mode and content."""
    return {str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in sorted(directory.rglob("*"))}


def mode(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def wait_until(true: Callable[[], object], seconds: float = 15) -> None:
    """Wait for something to become true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.01)


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
        assert mode(host.directory / "wucme_k_account.pem") == 0o600
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
                 "fetching directory at ", "making or finding the account at ", "account location: ",
                 "x86vms.domain.net: creating new order", "x86vms.domain.net: order URL: ",
                 "x86vms.domain.net: retrieving authorization", "x86vms.domain.net: starting challenge",
                 "x86vms.domain.net: polling order status", "x86vms.domain.net: finalizing order",
                 "x86vms.domain.net: retrieving certificate", f"saving certificate to {name}_tmp",
                 f"reading private key {old['k']}", f"backed up {name} as {name}_",
                 f"renaming {name}_tmp to {name}", "wuCME successful x86vms.domain.net renewal",
                 "load succeeded: + (", f"load succeeded: @{procedure} ("]
        assert [step for step in steps if in_turn(step, done.lines, steps)] == steps
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
                            va_nosleep=False, retry_after=(1, 1)) as ca:
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
    "no_challenges": "offers no http-01 challenge",
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

    @pytest.mark.parametrize("misdeed", HARMLESS)
    def test_taken_as_it_comes(self, misdeed: str, fake: fakeca.FakeCA, lab: Host) -> None:
        lab.old_pair("a.example.test", "b.example.test")
        assert lab.run("renew", "--force").status == 0
        fake.misbehave(misdeed)
        done = lab.run("renew", "--force")
        assert done.status == 0, done.err
        assert b"\r" not in lab.pair()[0]
        assert lab.run() == Done(0, "", "")

    @pytest.mark.parametrize("misdeed", ["silent", "drip", "silent@finalize"])
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
            "directory", "new-order", "authz", "challenge", "order", "finalize", "order", "cert"]
        assert fake.connections - before == 1

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
            assert lab.run().status == 0
            assert (len(fake.issued), len(other.issued)) == (1, 1)
            assert (lab.directory / "wucme_k_account_second.pem").exists()
            assert json.loads((lab.directory / "wucme_s_account_second.json").read_text())["directory"] == other.url
            assert lab.run("renew", "--force").status == 0
            assert (len(fake.accounts), len(other.accounts)) == (1, 1)

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
        assert lab.run("renew", "--force").status == 0
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
        assert json.loads((lab.directory / "wucme_s_a.example.test.json").read_text())["failures"] == 0

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

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_stopped_by_a_signal(self, fake: fakeca.FakeCA, lab: Host, number: signal.Signals) -> None:
        with self.held(fake, lab) as process:
            begun = time.monotonic()
            process.send_signal(number)
            _, said = process.communicate(timeout=10)
        assert process.returncode == 128 + number
        assert time.monotonic() - begun < 1
        assert f"stopped by {number.name}" in said
        assert "Traceback" not in said
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", fake.http_port)) != 0

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
            with lab.start() as second:
                time.sleep(0.3)
                fake.misbehave()
                assert first.wait(20) == 0
                assert second.wait(20) == 0
                assert second.stderr is not None
                assert "waiting for another run to end (pid " in (said := second.stderr.read()) or not said
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


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return wucme.proc_text(pid, "stat").rpartition(") ")[2][:1] not in ("", "Z")


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
        assert "http-01 cannot prove a wildcard" in done.err
        assert orders(fake) == 0


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

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 7, "certificates": []}', "\0\xff",
                                      '{"certificates": 1}', '{"machine": "other", "certificates": {}}', "[" * 100000])
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

    def test_time_limit(self, tame: Host) -> None:
        tame.write("$ sleep 60", "$ echo after", load_timeout="1s")
        done = tame.run()
        assert "stopped after 1 s (load_timeout)" in done.err
        assert "load succeeded: $ echo after" in done.err
        assert done.status == 1

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

    def test_load_verb_repeats_the_list(self, tame: Host, tmp_path: Path) -> None:
        tame.write(f"$ echo x >> {tmp_path}/count")
        assert tame.run("load", "--dry-run").out == f"would load $ echo x >> {tmp_path}/count for a.example.test\n"
        assert not (tmp_path / "count").exists()
        for _ in range(2):
            assert tame.run("load").status == 0
        assert tame.run("load", "a.example.test").status == 0
        assert (tmp_path / "count").read_text() == "x\nx\nx\n"
        assert tame.run("load", "b.example.test").status == 2

    @pytest.mark.servers
    @pytest.mark.parametrize("kind", [testbed.Nginx, testbed.Apache])
    def test_web_server_serves_the_new_certificate(
            self, kind: type[testbed.WebServer], fake: fakeca.FakeCA, lab: Host, tmp_path: Path) -> None:
        before = lab.old_pair("a.example.test")
        site = testbed.Site("a.example.test", lab.chain(), lab.key())
        name = kind.__name__.lower()
        lab.write(f"+{name}")

        def shown() -> str:
            return hashlib.sha256(shown_by(server.port)).hexdigest()

        with kind(tmp_path / "server", [site]) as server:
            assert shown() == wucme.facts(before[0]).fingerprint
            done = lab.run()
            assert done.status == 0, done.err
            assert f"load succeeded: +{name} (a.example.test)" in done.err
            assert lab.pair() != before
            wait_until(lambda: shown() == wucme.facts(lab.pair()[0]).fingerprint)
            good = server.config.read_text()
            server.config.write_text(good + "\nnonsense on;\n")
            done = lab.run("renew", "--force")
            assert done.status == 1
            assert "was not reloaded, its configuration test failed" in done.err
            assert "nonsense" in done.err
            assert shown() != wucme.facts(lab.pair()[0]).fingerprint
            server.config.write_text(good)
            count = orders(fake)
            assert lab.run().status == 0
            wait_until(lambda: shown() == wucme.facts(lab.pair()[0]).fingerprint)
            assert orders(fake) == count, "paying what is owed takes no order"


def shown_by(port: int) -> bytes:
    """The certificate (DER) that a TLS server shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 5) as plain, \
            context.wrap_socket(plain, server_hostname="a.example.test") as secure:
        return secure.getpeercert(True) or b""


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
        (("--lisen", ":80"), "--lisen"),
        (("--listen", "80"), "must be :PORT, ADDRESS:PORT or [ADDRESS]:PORT"),
        (("--force",), "--force goes with issue and renew"),
        (("renew", "nobody.example.test"), "no such certificate"),
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
            "would load $ true for a.example.test"]
        assert "at letsencrypt-staging" in host.run("issue", "b.example.test", "--dry-run", "--staging").out

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
