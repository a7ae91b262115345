"""Real servers for the tests and the demo: a test CA with its DNS server, and TLS servers, on loopback.

Each is a context manager that keeps its files in a directory of its own and ends its processes,
whatever happens: with the context, and when this process is killed too.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import http.client
import ipaddress
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CI = Path(__file__).resolve().parent
DAYS_90 = 90 * 86400
READY_WITHIN = 15.0
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
APACHE_MODULES = Path("/usr/lib/apache2/modules")


class Missing(unittest.SkipTest):
    """Says that this machine lacks a program; pytest takes it for a skip with this reason."""


class NotReady(RuntimeError):
    """Says that a server did not start, with the end of its log."""


def program(name: str) -> str:
    """Finds a program on the PATH or in the system directories that an ordinary PATH leaves out."""
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise Missing(f"{name} is not installed here")
    return found


def need(*command: str) -> None:
    """Tries a command that a container may forbid even to root."""
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise Missing(f"not allowed here: {shlex.join(command)}")


MOUNTS = ("unshare", "-m", "sh", "-c", "mount --bind /tmp /tmp")
WIRES = ("unshare", "-n", "ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")


@functools.cache
def _setup(what: str) -> tuple[bool, str]:
    """Asks `.ci/setup` once for a program, and returns whether it was got, and where it is or the reason."""
    done = subprocess.run([sys.executable, CI / "setup", what], capture_output=True, text=True, check=False)
    told = done.stdout if done.returncode == 0 else done.stderr
    return done.returncode == 0, (told.splitlines() or ["no reason given"])[-1]


def setup(what: str) -> Path:
    """Returns where `.ci/setup` has put a program, got from Debian if need be."""
    got, told = _setup(what)
    if not got:
        raise Missing(told.removeprefix("setup: "))
    return Path(told)


def uacme_trusting(directory: Path, ca_file: Path) -> tuple[str, dict[str, str]]:
    """Finds uacme, and has it trust a CA in `certs` of its working directory, which must be `directory`.

    It takes no option for that before its release 1.7.6: it gets a copy of its libcurl with another path in it.
    """
    binary = program("uacme")
    told = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    library = next((Path(line.split()[2]) for line in told.splitlines() if "libcurl" in line), None)
    before, after = b"/etc/ssl/certs\0", b"certs\0"
    if library is None or library.read_bytes().count(before) != 1:
        raise Missing("uacme here has no libcurl that looks into /etc/ssl/certs")
    for name in ("certs", "lib"):
        (directory / name).mkdir()
    changed = library.read_bytes().replace(before, after.ljust(len(before), b"\0"))
    (directory / "lib" / library.name).write_bytes(changed)
    shutil.copy(ca_file, directory / "certs")
    return binary, {"LD_LIBRARY_PATH": str(directory / "lib")}


def pebble_binaries() -> Path:
    """Returns the directory of pebble and pebble-challtestsrv."""
    return setup("pebble")


# --- processes and ports --------------------------------------------------------------------------


def _is_free(port: int) -> bool:
    """Tells whether a port can be bound for TCP and for UDP."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def free_ports(count: int) -> list[int]:
    """Picks ports below those of outgoing connections, so that the kernel gives none away meanwhile."""
    candidates = random.sample(range(10000, 32000), 1000)
    ports = [port for port, _ in zip((port for port in candidates if _is_free(port)), range(count))]
    if len(ports) < count:
        raise NotReady("there are no free ports")
    return ports


def own_address(*ports: int) -> str:
    """Picks a loopback address on which these ports, which may want root, are free."""
    for _ in range(20):
        address = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
        try:
            for port in ports:
                socket.create_server((address, port)).close()
            return address
        except PermissionError:
            raise Missing(f"only root may listen on port {ports[0]} here") from None
        except OSError:
            continue
    raise NotReady(f"there is no address whose ports {ports} are free")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server with its children: politely, then by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a server as a process group that ends with the context.

    A guard waits on a pipe that only we hold open: should we be killed, it ends the group instead.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:
        with subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -s TERM -- "-$1"', "guard", str(process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as guard:
            try:
                yield process
            finally:
                guard.kill()
    finally:
        _stop(process)


def _tail(log: Path) -> str:
    """Returns the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def until_ready(process: subprocess.Popen[bytes], log: Path, answers: Callable[[], object]) -> None:
    """Waits until a server answers without an error, or raises with the end of its log."""
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            answers()
            return
        except OSError as error:
            if process.poll() is not None:
                raise NotReady(f"{log.stem} ended at once:\n{_tail(log)}") from None
            if time.monotonic() > deadline:
                raise NotReady(f"{log.stem} does not answer ({error}):\n{_tail(log)}") from None
        time.sleep(0.02)


def connects(port: int) -> None:
    """Opens and closes a connection."""
    socket.create_connection(("127.0.0.1", port), timeout=2).close()


S = TypeVar("S", bound="Server")


class Server:
    """What all servers here share: a directory, and processes that live as long as the context."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._running = contextlib.ExitStack()

    def __enter__(self: S) -> S:
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._running = stack
            self._start()
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._running.close()

    def _start(self) -> None:
        """Starts the processes and returns when they answer."""
        raise NotImplementedError

    def _run(
        self,
        name: str,
        command: Sequence[str],
        answers: Callable[[], object],
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts one process, logging to NAME.log, and waits until it answers."""
        log = self.directory / f"{name}.log"
        process = self._running.enter_context(running(command, log, env))
        until_ready(process, log, answers)
        return process


# --- certificates ---------------------------------------------------------------------------------


_KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Authority:
    """A home-made CA, for the HTTPS of the test CA and for certificates that are to be replaced."""

    def __init__(self, name: str = "home-made CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = {use: use in ("key_cert_sign", "crl_sign") for use in _KEY_USES}
        builder = self._builder(self._name, self._key.public_key(), days=3650)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float
    ) -> x509.CertificateBuilder:
        """Begins a certificate that was valid an hour ago and is for `days` more."""
        now = datetime.datetime.now(datetime.timezone.utc)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority, critical=False)
        )

    def issue(self, *names: str, days: float = 90) -> tuple[bytes, bytes]:
        """Issues a certificate for names and addresses, and returns it and its key as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = self._builder(x509.Name([]), key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(usage, critical=False)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=True
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def _general_name(name: str) -> x509.GeneralName:
    """Makes the entry of a certificate for a host name or an address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def served(port: int, name: str, ca: bytes) -> bytes:
    """Returns the certificate (DER) that a server here presents for a name, verified up to `ca` (PEM)."""
    context = ssl.create_default_context(cadata=ca.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    plain = socket.create_connection(("127.0.0.1", port), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname=name) as secure:
        leaf = secure.getpeercert(binary_form=True)
    assert leaf is not None
    return leaf


# --- the DNS --------------------------------------------------------------------------------------


EXAMPLE_ZONES = {
    "example.test": (
        "* A 127.0.0.1",
        "*.six AAAA ::1",
        "_acme-challenge.alias CNAME alias.validation.elsewhere.test.",
        "_acme-challenge.chained CNAME hop.elsewhere.test.",
    ),
    "elsewhere.test": ("* A 127.0.0.1", "hop CNAME chained.validation"),
}


class Bind(Server):
    """BIND's name server, on 127.0.0.1 and ::1 at `port`, with zones that can be changed with the key of `key_file`.

    Zones map a name to records as zone files have them. Their name servers are the addresses of `servers`, else
    localhost. Every name outside of them does not exist. A Bind `of` another has its zones from there, and learns of
    changes only by `refresh`. `path` is a PATH whose dig and nsupdate take this server for the DNS of the world.
    """

    def __init__(
        self,
        directory: Path,
        zones: Mapping[str, Sequence[str]] = EXAMPLE_ZONES,
        *,
        servers: Sequence[str] = (),
        of: Bind | None = None,
    ) -> None:
        super().__init__(directory)
        self.zones = zones
        self.servers = servers
        self.of = of
        self.port = free_ports(1)[0]
        self.address = f"127.0.0.1:{self.port}"
        self.key_file: Path = of.key_file if of else self.directory / "wucme.key"
        self.path = os.pathsep.join([str(self.directory / "bin"), SYSTEM_PATH])

    def _start(self) -> None:
        """Writes key, zones and tools, and starts the server."""
        named, dig, nsupdate = program("named"), program("dig"), program("nsupdate")
        if not self.of:
            self.key_file.write_bytes(subprocess.check_output([program("tsig-keygen"), "wucme"]))
            self.key_file.chmod(0o600)
        ask = f"{dig} @127.0.0.1 -p {self.port}"
        self._tool("dig", f"""
            for word; do
                case $word in
                    @127.0.0.1|@localhost.|@localhost) where=here; word="@127.0.0.1 -p {self.port}" ;;
                    @*.*[a-z]*) where=there; word=@$({ask} +short "${{word#@}}" A) ;;
                    @*) where=there ;;
                esac
                words="$words $word"
            done
            [ "$where" ] && exec {dig} $words
            exec {ask} $words
            """)
        given = f"-p {self.port} -k {shlex.quote(str(self.key_file))}"
        self._tool("nsupdate", f"sed 's/^ *server localhost[.]*/server 127.0.0.1/' | {nsupdate} {given} \"$@\"\n")
        for zone, records in ({} if self.of else {**self.zones, ".": ("localhost A 127.0.0.1",)}).items():
            self._zone_file(zone).write_text("\n".join(self._zone(zone, records)) + "\n")
        config = self.directory / "named.conf"
        config.write_text("\n".join(self._configuration()) + "\n")
        self._run("named", [named, "-f", "-g", "-c", str(config)], self._answers)

    def _tool(self, name: str, script: str) -> None:
        """Writes a program of `path`."""
        file = self.directory / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}")
        file.chmod(0o755)

    def _zone_file(self, zone: str) -> Path:
        """Names the file of a zone."""
        return self.directory / f"{zone.strip('.') or 'root'}.zone"

    def _zone(self, zone: str, records: Sequence[str]) -> Iterator[str]:
        """Writes a zone; nothing of it may be cached for longer than a second."""
        servers = self.servers if zone != "." else ()
        names = {f"ns{number}": address for number, address in enumerate(servers, 1)}
        yield f"$ORIGIN {zone.strip('.')}.\n$TTL 1"
        yield f"@ SOA {'ns1' if names else 'localhost.'} hostmaster 1 3600 3600 36000 1"
        yield from [f"@ NS {name}\n{name} A {address}" for name, address in names.items()] or ["@ NS localhost."]
        yield from records

    def _configuration(self) -> Iterator[str]:
        """Writes the configuration of the server."""
        yield f'options {{ directory "{self.directory}"; pid-file none; session-keyfile none; notify no;'
        yield f"listen-on port {self.port} {{ 127.0.0.1; }}; listen-on-v6 port {self.port} {{ ::1; }};"
        yield "allow-query { any; }; allow-transfer { any; }; dnssec-validation no; empty-zones-enable no; };"
        yield f'controls {{ }};\ninclude "{self.key_file}";'
        for zone in self.zones if self.of else [*self.zones, "."]:
            yield f'zone "{zone}" {{ file "{self._zone_file(zone)}";'
            if self.of:
                yield f"type secondary; primaries {{ 127.0.0.1 port {self.of.port}; }}; }};"
            else:
                yield "type primary; allow-update { key wucme; }; };"

    def _answers(self) -> None:
        """Asks for each zone once."""
        for zone in self.zones:
            if not self.ask(zone, "SOA"):
                raise ConnectionError(f"{zone} is not served yet")

    def ask(self, name: str, kind: str = "TXT") -> list[str]:
        """Returns the data of a name's records as this server has them."""
        command = ["dig", "+short", "+tcp", "+time=2", "+tries=1", name, kind]
        done = subprocess.run(command, env={"PATH": self.path}, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if not line.startswith(";")]
        return ["".join(shlex.split(line)) if line.startswith('"') else line for line in lines]

    def update(self, *commands: str) -> None:
        """Changes records, such as `update("add a.example.test 1 TXT x")`."""
        text = "\n".join([f"server 127.0.0.1 {self.port}", *(f"update {command}" for command in commands), "send\n"])
        subprocess.run(["nsupdate"], input=text, env={"PATH": self.path}, text=True, check=True)

    def refresh(self) -> None:
        """Tells a server that has its zones from another to look there for changes."""
        for zone in self.zones:
            subprocess.run(
                ["dig", "+opcode=notify", "-b", "127.0.0.1", zone, "SOA"],
                env={"PATH": self.path}, stdout=subprocess.DEVNULL, check=True,
            )


class _Datagram(socketserver.BaseRequestHandler):
    """Passes one question on and its answer back, over UDP."""

    def handle(self) -> None:
        """Passes one datagram each way."""
        assert isinstance(self.server, _DatagramRelay)
        question, here = self.request
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there, contextlib.suppress(OSError):
            there.settimeout(5)
            there.connect(("127.0.0.1", self.server.target))
            there.send(question)
            here.sendto(there.recv(65535), self.client_address)


class _Stream(socketserver.StreamRequestHandler):
    """Passes questions on and answers back, over TCP."""

    def handle(self) -> None:
        """Passes messages, each with its length before it, until either side ends."""
        assert isinstance(self.server, _StreamRelay)
        target = ("127.0.0.1", self.server.target)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))
            there = stack.enter_context(socket.create_connection(target, timeout=5))
            answers = stack.enter_context(there.makefile("rwb"))
            for source, sink in itertools.cycle([(self.rfile, answers), (answers, self.wfile)]):
                length = source.read(2)
                if not length:
                    return
                sink.write(length + source.read(int.from_bytes(length, "big")))
                sink.flush()


class _DatagramRelay(socketserver.ThreadingUDPServer):
    """The UDP side of a relay to a port here."""

    daemon_threads = True

    def __init__(self, address: str, target: int) -> None:
        self.target = target
        super().__init__((address, 53), _Datagram)


class _StreamRelay(socketserver.ThreadingTCPServer):
    """The TCP side of a relay to a port here."""

    daemon_threads = True

    def __init__(self, address: str, target: int) -> None:
        self.target = target
        super().__init__((address, 53), _Stream)


@contextlib.contextmanager
def port_53(address: str, port: int) -> Iterator[None]:
    """Lets a DNS server of 127.0.0.1 answer at another loopback address too, at the port that all others expect."""
    with contextlib.ExitStack() as stack:
        for relay in (_DatagramRelay, _StreamRelay):
            server = stack.enter_context(relay(address, port))
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.shutdown)
        yield


# --- the test CA ----------------------------------------------------------------------------------


@functools.cache
def _dns_flags(challtestsrv: Path) -> tuple[str, ...]:
    """Returns the flags that differ among versions of pebble-challtestsrv: no DoH, and DNS at an address."""
    usage = subprocess.run([challtestsrv, "-h"], capture_output=True, text=True, check=False).stderr
    dns = "-dnsserver" if "-dnsserver" in usage else "-dns01"
    return ("-doh", "", dns) if "-doh " in usage else (dns,)


class Pebble(Server):
    """pebble, Let's Encrypt's test CA, with a DNS server of its own, in which every name is 127.0.0.1.

    Where `dns` is the address of another server it asks that. It looks for http-01 answers at `http_port` and for
    tls-alpn-01 at `tls_port`. Seconds of `retry_after` are for authorizations and orders; `eab` maps key identifiers
    to MAC keys, and makes them required.
    """

    def __init__(
        self,
        directory: Path,
        *,
        binaries: Path,
        nonce_reject: int = 5,
        authz_reuse: int = 0,
        va_nosleep: bool = True,
        always_valid: bool = False,
        strict: bool = True,
        validity: int = DAYS_90,
        profiles: Mapping[str, Mapping[str, object]] | None = None,
        retry_after: tuple[int, int] = (0, 0),
        eab: Mapping[str, str] | None = None,
        alternate_roots: int = 0,
        chain_length: int = 1,
        dns: str = "",
    ) -> None:
        super().__init__(directory)
        self.acme_port, self.management_port, self.http_port, self.tls_port = free_ports(4)
        own_dns, self._challtestsrv = (0, 0) if dns else free_ports(2)
        self.directory_url = f"https://localhost:{self.acme_port}/dir"
        self.dns_address = dns or f"127.0.0.1:{own_dns}"
        self.ca_file = self.directory / "ca.pem"
        self._binaries = binaries.absolute()
        self._strict = strict
        self._environment = {
            "PEBBLE_WFE_NONCEREJECT": str(nonce_reject),
            "PEBBLE_AUTHZREUSE": str(authz_reuse),
            "PEBBLE_VA_NOSLEEP": str(int(va_nosleep)),
            "PEBBLE_VA_ALWAYS_VALID": str(int(always_valid)),
            "PEBBLE_ALTERNATE_ROOTS": str(alternate_roots),
            "PEBBLE_CHAIN_LENGTH": str(chain_length),
        }
        self._settings = {
            "listenAddress": f"127.0.0.1:{self.acme_port}",
            "managementListenAddress": f"127.0.0.1:{self.management_port}",
            "certificate": str(self.directory / "server.pem"),
            "privateKey": str(self.directory / "server.key"),
            "httpPort": self.http_port,
            "tlsPort": self.tls_port,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": eab is not None,
            "externalAccountMACKeys": dict(eab or {}),
            "domainBlocklist": ["blocked-domain.example"],
            "retryAfter": {"authz": retry_after[0], "order": retry_after[1]},
            "keyAlgorithm": "ecdsa",
            "certificateValidityPeriod": validity,
            "profiles": profiles or {"default": {"description": "the only one", "validityPeriod": validity}},
        }

    def _start(self) -> None:
        """Starts the DNS server, then the CA."""
        authority = Authority("test CA, HTTPS")
        certificate, key = authority.issue("localhost", "127.0.0.1")
        for name, text in (("ca.pem", authority.pem), ("server.pem", certificate), ("server.key", key)):
            (self.directory / name).write_bytes(text)
        config = self.directory / "pebble.json"
        config.write_text(json.dumps({"pebble": self._settings}, indent=1))
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(self.ca_file))),
        )
        if self._challtestsrv:
            self._start_dns()
        options = [f"-config={config}", f"-dnsserver={self.dns_address}", *(["-strict"] if self._strict else [])]
        self._run(
            "pebble",
            [str(self._binaries / "pebble"), *options],
            lambda: self._fetch(self.directory_url),
            {**os.environ, **self._environment},
        )

    def _start_dns(self) -> None:
        """Starts the DNS server of its own."""
        names = self._binaries / "pebble-challtestsrv"
        options = [f"-management=127.0.0.1:{self._challtestsrv}", "-defaultIPv4=127.0.0.1", "-defaultIPv6="]
        options += ["-http01=", "-https01=", "-tlsalpn01=", *_dns_flags(names), self.dns_address]
        self._run("challtestsrv", [str(names), *options], lambda: connects(self._challtestsrv))

    def _fetch(self, url: str, body: object | None = None) -> bytes:
        """Gets an address, or posts JSON to it."""
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(urllib.request.Request(url, data), timeout=5) as answer:
            content: bytes = answer.read()
        return content

    def management(self, path: str, body: object | None = None) -> bytes:
        """Asks pebble's management interface, such as `/cert-status-by-serial/1a2b`."""
        return self._fetch(f"https://localhost:{self.management_port}{path}", body)

    def root(self, number: int = 0) -> bytes:
        """Returns the root (PEM) that issued chains end at; those of `alternate_roots` are 1, 2, ..."""
        return self.management(f"/roots/{number}")

    def dns(self, command: str, **arguments: object) -> bytes:
        """Changes or asks the DNS server, such as `dns("set-txt", host="_acme-challenge.a.test.", value="x")`.

        The final dot of a TXT record's host is needed by old versions.
        """
        return self._fetch(f"http://127.0.0.1:{self._challtestsrv}/{command}", arguments)

    def log(self) -> str:
        """Returns what pebble has logged."""
        return (self.directory / "pebble.log").read_text(errors="replace")


class _Forward(BaseHTTPRequestHandler):
    """A proxy that sends every request to one port here, whatever host it names."""

    def do_GET(self) -> None:
        """Passes a request on with its Host, and the answer back."""
        assert isinstance(self.server, _Proxy)
        url = urllib.parse.urlsplit(self.path)
        inner = http.client.HTTPConnection("127.0.0.1", self.server.ca.http_port, timeout=10)
        try:
            if self.server.ca.refusing:
                self.server.ca.refusing -= 1
                raise OSError("refused for the sake of a test")
            inner.request("GET", url.path, headers={"Host": url.netloc})
            answer = inner.getresponse()
            body, status = answer.read(), answer.status
        except OSError as error:
            body, status = str(error).encode(), 502
        finally:
            inner.close()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class _Proxy(ThreadingHTTPServer):
    """The proxy of a CA that would go to port 80."""

    daemon_threads = True

    def __init__(self, ca: CaddyCA) -> None:
        self.ca = ca
        super().__init__(("127.0.0.1", 0), _Forward)


class CaddyCA(Server):
    """Caddy's acme_server: a CA of other people's code (Smallstep's), which asks the DNS server of `dns`.

    Names get their http-01 questions at `http_port`, through a proxy. It dials port 443 for tls-alpn-01, and only root
    can lead a name's elsewhere: those of `tls_names` are at `tls_address` for it. An address is dialled as it is. The
    next questions of http-01, as many as `refusing` says, get no answer.
    """

    def __init__(self, directory: Path, *, binary: Path, dns: str, tls_names: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self.acme_port, self.http_port = free_ports(2)
        self.directory_url = f"https://localhost:{self.acme_port}/acme/local/directory"
        self.ca_file = self.directory / "data/pki/authorities/local/root.crt"
        self.tls_names = tls_names
        self.refusing = 0
        self.tls_address = own_address(443, 80) if tls_names else ""
        self._binary = binary
        self._dns = dns

    def _configuration(self) -> str:
        """Writes the configuration in Caddy's language."""
        return f"""{{
            admin off
            persist_config off
            skip_install_trust
            auto_https disable_redirects
            https_port {self.acme_port}
            default_bind 127.0.0.1
            storage file_system "{self.directory}/data"
            pki {{
                ca local {{
                    intermediate_lifetime 400d
                }}
            }}
        }}
        https://localhost:{self.acme_port} {{
            tls internal
            acme_server {{
                lifetime 90d
                resolvers udp/{self._dns}
                allow_wildcard_names
            }}
        }}
        """

    def _start(self) -> None:
        """Starts the proxy and the CA, with a private /etc/hosts where names have to be elsewhere."""
        proxy = _Proxy(self)
        self._running.callback(proxy.server_close)
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        self._running.callback(proxy.shutdown)
        config, hosts = self.directory / "Caddyfile", self.directory / "hosts"
        config.write_text(self._configuration())
        # By a name of its own, or it would be taken for a web server that runs here.
        binary = self.directory / "second-ca"
        binary.symlink_to(self._binary)
        command = [str(binary), "run", "--config", str(config), "--adapter", "caddyfile"]
        if self.tls_names:
            lines = ["127.0.0.1 localhost", *(f"{self.tls_address} {name}" for name in self.tls_names)]
            hosts.write_text("\n".join(lines) + "\n")
            mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
            need(*MOUNTS)
            need(*MOUNTS)
            command = [program("unshare"), "-m", "sh", "-c", mount, str(hosts), *command]
        home = str(self.directory)
        environment = {"PATH": SYSTEM_PATH, "HOME": home, "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home,
                       "HTTP_PROXY": f"http://127.0.0.1:{proxy.server_port}"}
        self._run("caddy", command, self._answers, environment)

    def _answers(self) -> None:
        """Asks for the directory."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        opener.open(self.directory_url, timeout=5).close()

    def root(self) -> bytes:
        """Returns the root (PEM) that issued chains end at."""
        return self.ca_file.read_bytes()


# --- TLS servers ----------------------------------------------------------------------------------


class Site(NamedTuple):
    """A name that a server answers for over TLS, and the files of its certificate and key."""

    name: str
    certificate: Path
    key: Path


class TlsServer(Server):
    """A small TLS server that reads its certificate anew upon SIGHUP, for where there is no nginx."""

    def __init__(self, directory: Path, site: Site) -> None:
        super().__init__(directory)
        self.site = site
        self.port = free_ports(1)[0]
        self.pid = 0

    def _start(self) -> None:
        """Runs this module as a program."""
        command = [sys.executable, __file__, str(self.port), str(self.site.certificate), str(self.site.key)]
        self.pid = self._run("tlsserver", command, lambda: connects(self.port)).pid


@contextlib.contextmanager
def reachable() -> Iterator[Path]:
    """Makes a temporary directory that every user may pass through, as those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="wucme-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class WebServer(Server):
    """A server of Debian's with TLS sites on one port, told apart by name, and its own configuration."""

    protocol = ""               # what STARTTLS is spoken in
    broken = "nonsense on;"     # what spoils its configuration

    def __init__(self, directory: Path, sites: Sequence[Site], *, extra: str = "") -> None:
        super().__init__(directory)
        self.sites = sites
        self.extra = extra
        self.port = free_ports(1)[0]
        self.pid = 0
        self.config = self.directory / "server.conf"

    def _configuration(self) -> str:
        """Writes the configuration in the server's own language."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        raise NotImplementedError

    def _start(self) -> None:
        """Starts the master process, which starts its workers."""
        command = self._command()
        self.config.write_text(self._configuration())
        name = Path(command[0]).name
        self.pid = self._run(name, command, lambda: connects(self.port), self._environment()).pid

    def _environment(self) -> dict[str, str]:
        """Returns the environment of the server."""
        return dict(os.environ)


class Nginx(WebServer):
    """nginx; `extra` stands within its http block."""

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        return [program("nginx"), "-p", str(self.directory), "-c", str(self.config)]

    def _configuration(self) -> str:
        """Writes nginx's configuration; as root the workers stay root, to reach temporary directories."""
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        servers = [
            f"server {{ listen 127.0.0.1:{self.port} ssl; server_name {site.name}; "
            f"ssl_certificate {site.certificate}; ssl_certificate_key {site.key}; }}"
            for site in self.sites
        ]
        return "\n".join([
            "user root;" if os.geteuid() == 0 else "",
            "daemon off; worker_processes 1; pid nginx.pid; error_log error.log; events { }",
            "http {",
            "access_log off;",
            *[f"{path}_temp_path {path};" for path in paths],
            *servers,
            self.extra,
            "}\n",
        ])


class Apache(WebServer):
    """Debian's apache2; `extra` is added to its configuration, and `modules` to its modules."""

    def __init__(
        self, directory: Path, sites: Sequence[Site], *, extra: str = "", modules: Sequence[str] = ()
    ) -> None:
        super().__init__(directory, sites, extra=extra)
        self.modules = ["mpm_event", "authz_core", "socache_shmcb", "ssl", *modules]

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        return [program("apache2"), "-d", str(self.directory), "-f", str(self.config), "-D", "FOREGROUND"]

    def _configuration(self) -> str:
        """Writes apache's configuration; as root the workers are Debian's www-data."""
        servers = [
            f"<VirtualHost 127.0.0.1:{self.port}>\nServerName {site.name}\nSSLEngine on\n"
            f"SSLCertificateFile {site.certificate}\nSSLCertificateKeyFile {site.key}\n</VirtualHost>"
            for site in self.sites
        ]
        return "\n".join([
            *[f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so" for name in self.modules],
            "User www-data\nGroup www-data" if os.geteuid() == 0 else "",
            f"ServerName localhost\nListen 127.0.0.1:{self.port}",
            f"DefaultRuntimeDir {self.directory}\nPidFile apache.pid\nErrorLog error.log\nMutex posixsem",
            "StartServers 1\nServerLimit 2\nThreadsPerChild 8\nMinSpareThreads 1\nMaxSpareThreads 16",
            "MaxRequestWorkers 16\nSSLSessionCache none",
            *servers,
            self.extra + "\n",
        ])


class Haproxy(WebServer):
    """haproxy with a master process; a site's certificate file must hold the key too."""

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        return [program("haproxy"), "-W", "-db", "-f", str(self.config)]

    def _configuration(self) -> str:
        """Writes haproxy's configuration."""
        files = " ".join(f"crt {site.certificate}" for site in self.sites)
        return "\n".join([
            "defaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s",
            f"frontend tls\n  bind 127.0.0.1:{self.port} ssl {files}",
            "  http-request return status 200\n" + self.extra,
        ])


class Caddy(WebServer):
    """caddy, as Debian has it."""

    broken = "nonsense.example {\n nonsense\n}"

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        return [program("caddy"), "run", "--config", str(self.config), "--adapter", "caddyfile"]

    def _environment(self) -> dict[str, str]:
        """Returns an environment whose home is ours."""
        return {**os.environ, "HOME": str(self.directory), "XDG_DATA_HOME": str(self.directory / "data")}

    def _configuration(self) -> str:
        """Writes a Caddyfile that obtains no certificates."""
        sites = [
            f"https://{site.name}:{self.port} {{\n bind 127.0.0.1\n tls {site.certificate} {site.key}\n}}"
            for site in self.sites
        ]
        options = f"{{\n admin 127.0.0.1:{free_ports(1)[0]}\n auto_https off\n}}"
        return "\n".join([options, *sites, self.extra + "\n"])


class Lighttpd(WebServer):
    """lighttpd with its OpenSSL module; as root it becomes the user `user` once it listens."""

    user = ""
    broken = 'include "/nonsense"'

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        if not Path("/usr/lib/lighttpd/mod_openssl.so").exists():
            raise Missing("lighttpd-mod-openssl is not installed here")
        return [program("lighttpd"), "-D", "-f", str(self.config)]

    def _configuration(self) -> str:
        """Writes lighttpd's configuration, for one site."""
        site = self.sites[0]
        return "\n".join([
            'server.modules = ("mod_openssl")',
            f'server.document-root = "{self.directory}"\nserver.bind = "127.0.0.1"\nserver.port = {self.port}',
            f'server.username = "{self.user}"' if self.user else "",
            f'ssl.engine = "enable"\nssl.pemfile = "{site.certificate}"\nssl.privkey = "{site.key}"',
            self.extra + "\n",
        ])


class Postfix(WebServer):
    """postfix, for one site: SMTP with STARTTLS, and nothing is delivered. Needs root."""

    protocol = "smtp"

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        if os.geteuid() != 0:
            raise Missing("postfix can be started by root only")
        program("postfix")
        # With -d it stays in the process group that ends with us.
        return [str(self._postconf("daemon_directory") / "master"), "-d"]

    def _postconf(self, name: str) -> Path:
        """Asks for a default of Debian's."""
        asked = [program("postconf"), "-dh", name]
        return Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())

    def _environment(self) -> dict[str, str]:
        """Names the configuration, as postfix does for its own."""
        return {**os.environ, "MAIL_CONFIG": str(self.directory)}

    def _start(self) -> None:
        """Makes what postfix needs beside its main.cf, then starts it."""
        self.config = self.directory / "main.cf"
        self.place = self._running.enter_context(reachable())
        # postfix would make these itself, in some seconds.
        modes = {"incoming": 0o700, "active": 0o700, "deferred": 0o700, "defer": 0o700, "bounce": 0o700, "hold": 0o700}
        modes |= {"corrupt": 0o700, "flush": 0o700, "saved": 0o700, "trace": 0o700, "private": 0o700, "pid": 0o755}
        modes |= {"public": 0o2710, "maildrop": 0o1730}
        for path in (self.place / "data", *(self.place / "queue" / name for name in modes)):
            path.mkdir(parents=True)
            shutil.chown(path, "root" if path.name == "pid" else "postfix")
            path.chmod(modes.get(path.name, 0o700))
        for name in ("public", "maildrop"):
            shutil.chown(self.place / "queue" / name, group="postdrop")
        services = [
            f"127.0.0.1:{self.port} inet n - n - - smtpd",
            "postlog unix-dgram n - n - 1 postlogd",
            "tlsmgr unix - - n 1000? 1 tlsmgr",
            "rewrite unix - - n - - trivial-rewrite",
            "cleanup unix n - n - 0 cleanup",
            "qmgr unix n - n 300 1 qmgr",
            "anvil unix - - n - 1 anvil",
            "proxymap unix - - n - - proxymap",
        ]
        (self.directory / "master.cf").write_text("\n".join(services) + "\n")
        super()._start()

    def _configuration(self) -> str:
        """Writes main.cf."""
        site = self.sites[0]
        return "\n".join([
            "compatibility_level = 3.6",
            f"queue_directory = {self.place}/queue\ndata_directory = {self.place}/data",
            f"maillog_file = {self.directory}/mail.log\nmaillog_file_prefixes = {self.directory}",
            "inet_interfaces = 127.0.0.1\nmydestination =\nalias_maps =\nalias_database =",
            f"myhostname = {site.name}\nsmtpd_tls_security_level = may",
            f"smtpd_tls_cert_file = {site.certificate}\nsmtpd_tls_key_file = {site.key}",
            self.extra + "\n",
        ])


class Dovecot(WebServer):
    """dovecot, for one site: IMAP and POP3 with STARTTLS. Needs root."""

    protocol = "imap"
    broken = "nonsense = on"

    def _command(self) -> list[str]:
        """Names the program and its arguments."""
        if os.geteuid() != 0:
            raise Missing("dovecot can be started by root only")
        self.pop3_port = free_ports(1)[0]
        return [program("dovecot"), "-F", "-c", str(self.config)]

    def _configuration(self) -> str:
        """Writes dovecot's configuration."""
        site, place = self.sites[0], self.directory
        ports = {"imap": self.port, "imaps": 0, "pop3": self.pop3_port, "pop3s": 0}
        listeners = {
            name: f"inet_listener {name} {{\n port = {port}\n}}\n" for name, port in ports.items()
        }
        return "\n".join([
            f"base_dir = {place}/run\nstate_dir = {place}/state\nlog_path = {place}/error.log",
            "protocols = imap pop3\nlisten = 127.0.0.1\nssl = yes",
            f"ssl_cert = <{site.certificate}\nssl_key = <{site.key}",
            "passdb {\n driver = static\n args = password=x\n}",
            "userdb {\n driver = static\n args = uid=65534 gid=65534\n}",
            f"service imap-login {{\n chroot =\n{listeners['imap']}{listeners['imaps']}}}",
            f"service pop3-login {{\n chroot =\n{listeners['pop3']}{listeners['pop3s']}}}",
            self.extra + "\n",
        ])


class Sshd(Server):
    """sshd that lets one key in, to run one command; `config` is for ssh, in which `hosts` are this one."""

    def __init__(self, directory: Path, command: Path, *hosts: str) -> None:
        super().__init__(directory)
        self.command = command
        self.hosts = hosts
        self.port = free_ports(1)[0]
        self.config = self.directory / "ssh_config"

    def _start(self) -> None:
        """Makes the keys, then starts it; as root with a /run of its own, which must have a certain directory."""
        server, keygen = program("sshd"), program("ssh-keygen")
        for name in ("host", "user"):
            key = ["-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name)]
            subprocess.run([keygen, *key], check=True)
        public = (self.directory / "user.pub").read_text()
        (self.directory / "authorized_keys").write_text(f'command="{self.command}",restrict {public}')
        (self.directory / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory}/host\nPidFile none\n"
            f"AuthorizedKeysFile {self.directory}/authorized_keys\nStrictModes no\nUsePAM no\n"
        )
        self.config.write_text(
            f"Host {' '.join(self.hosts)}\n HostName 127.0.0.1\n Port {self.port}\n"
            f" IdentityFile {self.directory}/user\n"
            f" StrictHostKeyChecking no\n UserKnownHostsFile {self.directory}/known_hosts\n"
            f"Host *\n HostName 127.0.0.1\n Port {free_ports(1)[0]}\n"
        )
        command = [server, "-D", "-e", "-f", str(self.directory / "sshd_config")]
        if os.geteuid() == 0:
            script = 'mount -t tmpfs none /run; mkdir -m 755 /run/sshd; exec "$@"'
            need(*MOUNTS)
            need(*MOUNTS)
            command = [program("unshare"), "-m", "sh", "-c", script, "sh", *command]
        self._run("sshd", command, lambda: connects(self.port))
_NGINX_PATHS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_AS_ROOT = os.geteuid() == 0
# What stands around a piece of configuration to make it whole: {text} is the piece, {port} where to listen.
AROUND = {
    "nginx": (
        f"{'user www-data;' if _AS_ROOT else ''} daemon off; worker_processes 1; pid nginx.pid; error_log error.log;\n"
        "events {{ }}\nhttp {{\naccess_log off;\n"
        + "\n".join(f"{path}_temp_path {path};" for path in _NGINX_PATHS) + "\n{text}\n}}\n"
    ),
    "apache": (
        "".join(
            f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so\n"
            for name in ("mpm_event", "authz_core", "alias", "cgid", "proxy", "proxy_http", "rewrite")
        )
        + ("User www-data\nGroup www-data\n" if _AS_ROOT else "")
        + "ServerName localhost\nListen {address}:{port}\nDefaultRuntimeDir {directory}\nPidFile apache.pid\n"
        "ErrorLog error.log\nMutex posixsem\nScriptSock cgisock\nStartServers 1\nServerLimit 1\n"
        "ThreadsPerChild 16\nMinSpareThreads 1\nMaxSpareThreads 16\nMaxRequestWorkers 16\n{text}\n"
    ),
    "haproxy": "defaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n{text}\n",
    "caddy": "{{\n  admin off\n  auto_https off\n}}\n{text}\n",
    "lighttpd": (
        'server.document-root = "{directory}"\nserver.bind = "{address}"\nserver.port = {port}\n'
        "server.modules = ()\n"
        + ('server.username = "www-data"\nserver.groupname = "www-data"\n' if _AS_ROOT else "") + "{text}\n"
    ),
}
START = {
    "nginx": ("nginx", "-p", "{directory}", "-c", "{config}"),
    "apache": ("apache2", "-d", "{directory}", "-f", "{config}", "-D", "FOREGROUND"),
    "haproxy": ("haproxy", "-db", "-f", "{config}"),
    "caddy": ("caddy", "run", "--config", "{config}", "--adapter", "caddyfile"),
    "lighttpd": ("lighttpd", "-D", "-f", "{config}"),
}


class PlainWeb(Server):
    """A web server of one of the kinds of START without TLS, configured by a piece of text, at a port and address.

    As root the requests are handled by another user, www-data, where the server can do that. `within` is a command to
    start it by, such as one that enters a network namespace.
    """

    def __init__(
        self, directory: Path, kind: str, text: str, port: int, *, address: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        super().__init__(directory)
        self.kind, self.text, self.port, self.address, self.within = kind, text, port, address, within

    def _start(self) -> None:
        """Writes the configuration and starts the server."""
        self.directory.chmod(0o755)
        config = self.directory / "server.conf"
        fields = {"directory": self.directory, "config": config, "address": self.address, "port": self.port}
        config.write_text(AROUND[self.kind].format(text=self.text, **fields))
        command = [word.format_map(fields) for word in START[self.kind]]
        home = str(self.directory)
        environment = {"PATH": SYSTEM_PATH, "HOME": home, "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home}
        self._run(
            self.kind,
            [*self.within, program(command[0]), *command[1:]],
            lambda: socket.create_connection((self.address, self.port), timeout=2).close(),
            {**environment, **{name: text for name, text in os.environ.items() if name == "CI_RUN_ID"}},
        )


class ForwardProxy(Server):
    """An HTTP proxy for CONNECT, squid or tinyproxy, at these addresses; it may want a user and password."""

    def __init__(
        self, directory: Path, kind: str, user: str = "", password: str = "", addresses: Sequence[str] = ("127.0.0.1",)
    ) -> None:
        super().__init__(directory)
        self.kind, self.user, self.password, self.addresses = kind, user, password, addresses
        self.port = free_ports(1)[0]
        self.access = self.directory / "access.log"

    def _squid(self) -> Iterator[str]:
        """Writes squid's configuration."""
        yield from (f"http_port {address}:{self.port}" for address in self.addresses)
        yield "pid_filename none\ncache deny all\nnetdb_filename none\npinger_enable off\nshutdown_lifetime 0 seconds"
        yield f"visible_hostname localhost\ncoredump_dir {self.directory}\ncache_log {self.directory}/cache.log"
        yield f"access_log stdio:{self.access}\ndns_nameservers 127.0.0.1"
        if self.user:
            known = self.directory / "passwords"
            coded = subprocess.check_output([program("openssl"), "passwd", "-apr1", self.password], text=True)
            known.write_text(f"{self.user}:{coded}")
            yield f"auth_param basic program /usr/lib/squid/basic_ncsa_auth {known}"
            yield "auth_param basic children 1 startup=1\nacl known proxy_auth REQUIRED\nhttp_access allow known"
        yield "http_access deny all" if self.user else "http_access allow all"

    def _tinyproxy(self) -> Iterator[str]:
        """Writes tinyproxy's configuration."""
        yield from (f"Listen {address}" for address in self.addresses)
        yield f'Port {self.port}\nTimeout 10\nMaxClients 20\nLogFile "{self.access}"\nLogLevel Connect'
        yield f"BasicAuth {self.user} {self.password}" if self.user else ""

    def _start(self) -> None:
        """Writes the configuration and starts the proxy."""
        self.directory.chmod(0o777)     # squid writes as a user of its own
        config = self.directory / "proxy.conf"
        lines = {"squid": self._squid, "tinyproxy": self._tinyproxy}[self.kind]()
        config.write_text("\n".join(lines) + "\n")
        options = {"squid": ["-N", "-f", str(config)], "tinyproxy": ["-d", "-c", str(config)]}[self.kind]
        self._run(self.kind, [program(self.kind), *options], lambda: connects(self.port))

    def url(self, user: str = "", password: str = "") -> str:
        """Returns how it is named in settings."""
        return f"http://{f'{user}:{password}@' if user else ''}{self.addresses[-1]}:{self.port}"

    def used(self) -> int:
        """Returns how many connections it was asked for."""
        return self.access.read_text(errors="replace").count("CONNECT localhost:") if self.access.exists() else 0


class Node(NamedTuple):
    """A host of its own: a command to start programs on it by, its address, and ours on the wire between."""

    within: list[str]
    address: str
    gateway: str


@contextlib.contextmanager
def nodes(directory: Path, count: int) -> Iterator[list[Node]]:
    """Makes hosts as network namespaces, each with one wire to this machine and no other way out."""
    ip, enter = program("ip"), program("nsenter")
    if not _AS_ROOT:
        raise Missing("only root may make network namespaces")
    need(*WIRES)
    need(*WIRES)
    own, net = os.readlink("/proc/self/ns/net"), random.randint(0, 255)
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(count):
            holder = stack.enter_context(running([program("unshare"), "-n", "sleep", "1000"], directory / "node.log"))
            until_ready(holder, directory / "node.log", functools.partial(_differs, holder.pid, own))
            gateway, address = (f"198.18.{net}.{4 * number + end}" for end in (1, 2))
            within, wire = [enter, "-t", str(holder.pid), "-n"], f"wu{os.getpid() % 10**7}-{number}"
            commands = [[ip, "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)],
                        [ip, "addr", "add", f"{gateway}/30", "dev", wire], [ip, "link", "set", wire, "up"],
                        [*within, ip, "addr", "add", f"{address}/30", "dev", "eth0"],
                        [*within, ip, "link", "set", "eth0", "up"], [*within, ip, "link", "set", "lo", "up"]]
            for command in commands:
                subprocess.run(command, check=True)
            found.append(Node(within, address, gateway))
        yield found


def _differs(pid: int, own: str) -> None:
    """Raises OSError as long as a process is in our own network namespace."""
    if os.readlink(f"/proc/{pid}/ns/net") == own:
        raise ConnectionError("not yet")


class _Hello(socketserver.BaseRequestHandler):
    """Shakes hands with the certificate of the moment and says hello."""

    def handle(self) -> None:
        """Serves one connection."""
        assert isinstance(self.server, _TlsListener)
        self.request.settimeout(5)
        wrap = self.server.context.wrap_socket
        with contextlib.suppress(OSError), wrap(self.request, server_side=True) as secure:
            secure.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n")


class _TlsListener(socketserver.ThreadingTCPServer):
    """Listens for TLS connections, with a certificate that can be read anew."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, certificate: str, key: str) -> None:
        self._files = (certificate, key)
        self.context = self._read()
        super().__init__(("127.0.0.1", port), _Hello)

    def _read(self) -> ssl.SSLContext:
        """Reads certificate and key."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._files)
        return context

    def reload(self, *_signal: object) -> None:
        """Reads certificate and key anew; where they cannot be used the old ones stay."""
        try:
            self.context = self._read()
        except OSError as error:
            print(f"reload failed: {error}", flush=True)


def main() -> None:
    """Runs the small TLS server: PORT CERTIFICATE KEY."""
    port, certificate, key = sys.argv[1:]
    listener = _TlsListener(int(port), certificate, key)
    signal.signal(signal.SIGHUP, listener.reload)
    listener.serve_forever()


if __name__ == "__main__":
    main()
