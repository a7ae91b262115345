#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography>=3.4.8"]
# ///
"""wucme - keeps the TLS certificates of a host renewed, and loaded into its servers

SYNOPSIS
  wucme.py [run]                      do all that is due and owed, then exit (for cron)
  wucme.py issue NAME...              obtain one certificate for these names
  wucme.py renew [NAME...] [--force]  look at these certificates only; --force: renew them now
  wucme.py load [NAME...]             run the load list now for the certificates as they are
  wucme.py status [--json]            what is there, what is due, what is owed
  wucme.py revoke NAME|FILE [--reason keyCompromise|superseded|cessationOfOperation|...]
  wucme.py account new|show|update|newkey|deactivate
                                      the account at the (first) CA; --server names another

DESCRIPTION
  One run reads the settings, takes the lock of the directory, cleans up after a killed run, looks
  at every file of the directory, decides with a reason what is due, opens the challenge listener,
  obtains the certificates side by side from the CA (ACME, RFC 8555, challenge http-01), checks
  each one, backs up the old one and renames the new one into place, runs the load list, and
  reports. A certificate that fails never stops another. With nothing due and nothing owed it
  sends nothing, prints nothing (unless at a terminal), and exits 0.

  Certificates are found, not listed: every wucme_c_NAME.pem in the directory is renewed with its
  key wucme_k_NAME.pem. A section [NAME] in the ini declares one that does not exist yet, or
  changes how one is treated.

OPTIONS
  --ini FILE     the ini; else $WUCME_INI, wucme.ini beside the script, /etc/wucme/wucme.ini,
                 ~/.wucme/wucme.ini; none at all is fine
  --force        renew although nothing is due (with issue and renew)
  --dry-run      say what would be done, and change nothing
  --staging      use Let's Encrypt's staging CA and DIRECTORY/staging; nothing is loaded
  --quiet        print errors only      --verbose  print each request too
  --json         with status: for machines
  --version      the version, and the SHA-256 of this file
  --help         this text
  and every setting below, with "-" for "_": --listen :8080; --load may be repeated.

@SETTINGS@
LOAD LIST
  Each line of load is one item, told by its first character:
    +         test the configuration of the web servers that run here, and reload them: once a run
    +nginx    the same for one kind of server:
              @SERVERS@
    +systemd UNIT    have systemd reload (else restart) a unit, if it runs: once a run
    @FILE     run a procedure, with arguments if any: once for each certificate
    $ COMMAND run a shell command: once for each certificate
    > FILE [what=chain|cert|issuers|key|pair|p12] [mode=0640] [owner=USER:GROUP]
              write a copy in one step, if it differs: once for each certificate. chain is the
              default; pair is key and chain in one; p12 needs password_file=FILE. The mode is 0600
              with a key inside, else 0644. What is at FILE is replaced, a symbolic link too; but
              no directory is made, and none (nor a link to one) is written into
    ? HOST:PORT [sni=NAME] [starttls=smtp|imap|pop3] [all]
              connect, and compare the certificate that is served with the one on disk, for up to
              grace: once for each certificate; one of the common list only for certificates that
              have the name. all: each address of HOST. If it fails, the + items are done again
  {name} in > and ? is the certificate's NAME. Procedures and commands find WUCME_NAME,
  WUCME_NAMES, WUCME_CERT, WUCME_KEY, WUCME_FINGERPRINT, WUCME_DIRECTORY and WUCME_HOST in their
  environment. An item is owed as long as the certificate on disk is not the one that it was last
  done for with success on this host: what fails, or is missed, is tried again by every run. Items
  must be harmless to repeat.
  Items of alert are @ or $. They read the report, and find WUCME_SUBJECT (a line), WUCME_PROBLEMS
  (how many), WUCME_HOST and WUCME_DIRECTORY.

FILES (in the directory)
  wucme_c_NAME.pem                    the chain, leaf first
  wucme_k_NAME.pem                    its private key
  wucme_k_account.pem                 the key of the ACME account (..._account_SERVER for more CAs)
  wucme_X_NAME.pem_tmp                not live yet
  wucme_X_NAME.pem_YYYYMMDDhhmmsscc   backups, one stamp a run
  wucme_s_NAME.json                   memory of one certificate, or of the account
  wucme_l_HOST.json                   what was loaded on one host
  wucme.log, wucme.lock, tokens/      log, lock, challenge answers while an order runs

EXIT STATUS
  0 all is well; 1 something failed, or a load is owed, or the lock was not got; 2 usage or
  settings; 143, 130 ended by SIGTERM, SIGINT. status: 1 if anything is owed, failing or expired,
  or if no run was seen for two days.

SECURITY
  Made to run as root. It reads the ini and its directory, writes to these, its log, and where > and
  metrics say, contacts the CA (https only, always verified) and what ? names, and runs what the load
  list says. It listens on the challenge port only while an order runs, and answers there from memory.
  Keys are 0600 from the first byte, copies of them have their mode and owner from the first byte; an
  ini, a script or a procedure that anyone may write is refused.

READING ORDER
  The file reads upward: a section uses only what stands above it.
   1 errors      2 world      3 files       4 pem     5 settings   6 inventory   7 plan
   8 challenges  9 acme      10 store      11 load   12 report    13 run        16 command line
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn, TypeVar, Union, cast

if TYPE_CHECKING:
    import argparse
    import configparser
    import http.client
    import queue
    import subprocess
    import threading
    import urllib.parse

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    PrivateKey = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey]

# What costs milliseconds to import (cryptography, ssl, http, subprocess ...) is imported where it is
# used: on most days a run needs none of it.

VERSION = "1.0"
USER_AGENT = f"wucme/{VERSION} Python-http.client/{sys.version_info[0]}.{sys.version_info[1]}"
T = TypeVar("T")
Json = dict[str, Any]


# === 1. errors: what can go wrong, each a sentence for a person ===============================
# WucmeError
#   SettingsError   usage or ini: exit 2, before anything is touched
#   FileError       the directory or a file of it
#   PemError        a certificate or a key is not what it should be
#     KeyKindError    a key is one that cannot be used here
#   ListenerError   the challenge cannot be answered from here
#   NetworkError    the CA was not reached, or is out of order
#     ProtocolError   it did not speak ACME, or of something else
#   AcmeError       the CA said no
# Each is raised where it is known and caught twice: once for each certificate, and in main.

class WucmeError(Exception):
    """Something failed, and the text says what, where and what to do."""


class SettingsError(WucmeError):
    """The ini or the command line asks for something that cannot be."""


class FileError(WucmeError):
    """A file or directory is not as it must be."""


class PemError(WucmeError):
    """A certificate or key does not parse, or does not fit."""


class KeyKindError(PemError):
    """A private key that is whole, and of no use here."""


class ListenerError(WucmeError):
    """Nothing here can answer the challenge."""


class NetworkError(WucmeError):
    """The CA could not be reached, or cannot do its work now."""


class ProtocolError(NetworkError):
    """What came back is not ACME, or not what was asked for."""


class AcmeError(WucmeError):
    """The CA refused, with its problem type (RFC 8555 section 6.7) and when to come back."""

    def __init__(self, text: str, kind: str = "", retry_after: float = 0) -> None:
        super().__init__(text)
        self.kind = kind
        self.retry_after = retry_after


def printable(text: str) -> str:
    """The text on one line, with control characters and undecodable bytes made visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sentence(error: BaseException) -> str:
    """What an error says to a person, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return printable(f"{where}{error.strerror}")
    kind = "" if isinstance(error, (WucmeError, OSError)) else f"internal error, {type(error).__name__}: "
    return printable(f"{kind}{error}")


# === 2. world: clock, log, network, processes ==================================================
# The only place that opens connections, starts processes and asks for the time. What the rest needs
# of it travels as one value, World, so that a test can hand in another.

BODY_BYTES = 1 << 20            # no answer of a CA is longer
OUTPUT_BYTES = 1 << 16          # kept of what a load command prints; the rest is read and dropped


class Log:
    """What is said: to a file at once, and to the terminal at once or (for cron) at the end if worth it."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.time
        self.descriptor = -1
        self.live = False           # at a terminal: each line at once
        self.loud = False           # verbose: details too
        self.quiet = False          # only what went wrong is printed
        self.held: list[str] = []   # not at a terminal: lines that may be printed at the end

    def __call__(self, text: str, wrong: bool = False) -> None:
        """Write one line for one event; `wrong` is what even --quiet prints."""
        now = self.clock()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = f"{stamp}.{int(now * 100) % 100:02d}: {printable(text)}\n"
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):      # a full disk must not stop a renewal
                os.write(self.descriptor, line.encode())
        if self.live:
            self.show(line)
        elif wrong or not self.quiet:
            self.held.append(line)

    def detail(self, text: str) -> None:
        """Write one line that only --verbose wants."""
        if self.loud:
            self(text)

    def flush(self) -> None:
        """Print what was held back."""
        for line in self.held:
            self.show(line)
        self.held.clear()

    @staticmethod
    def show(line: str) -> None:
        """Print to stderr, whatever became of it."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            sys.stderr.write(line)
            sys.stderr.flush()


log = Log()


class Response(NamedTuple):
    """An answer to one HTTPS request."""
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def time_left(until: float) -> float:
    """The seconds to a deadline; TimeoutError when it is over."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline")
    return min(left, 3600.0)


def tls_context(ca_file: str) -> Any:
    """A verifying TLS context whose sockets give up at `until` however slowly bytes drip in."""
    import ssl

    class Socket(ssl.SSLSocket):
        until = float("inf")

        def recv_into(self, *args: Any, **more: Any) -> int:
            self.settimeout(time_left(self.until))
            return super().recv_into(*args, **more)

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise NetworkError(f"ca_file {ca_file}: no PEM file with certificates ({error.strerror})") from error
    context.sslsocket_class = Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file and hasattr(ssl, "VERIFY_X509_STRICT"):
        # Python 3.13 asks of every CA what home-made ones rarely have.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def dial(until: float, *arguments: Any) -> Any:
    """A plain connection that gives up at `until` however slowly bytes drip in."""
    import socket

    class Socket(socket.socket):
        def recv_into(self, *args: Any, **more: Any) -> int:
            self.settimeout(time_left(until))
            return super().recv_into(*args, **more)

    plain = socket.create_connection(*arguments)
    timeout = plain.gettimeout()
    found = Socket(plain.family, plain.type, plain.proto, plain.detach())
    found.settimeout(timeout)
    return found


def network_reason(error: Exception, timeout: float) -> str:
    """Why a host was not reached, with what to do where that is known."""
    import socket
    import ssl
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"its certificate is not trusted ({error.verify_message}); "
                "for a private CA set ca_file to the certificate that signed it")
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if isinstance(error, (TimeoutError, socket.timeout)):
        return f"no whole answer within {timeout:g} s"
    return sentence(error) if isinstance(error, OSError) else printable(str(error) or type(error).__name__)


class Http:
    """HTTPS for one worker: one kept connection to each origin, through the proxy that the rules name."""

    def __init__(self, timeout: float, ca_file: str = "", proxy: str = "") -> None:
        self.timeout = timeout
        self.proxy = proxy
        self.context = tls_context(ca_file)
        self.kept: dict[str, http.client.HTTPSConnection] = {}

    def connect(self, host: str, port: int) -> http.client.HTTPSConnection:
        """A connection object for an origin, direct or by CONNECT."""
        import http.client
        import urllib.parse
        import urllib.request
        proxy = self.proxy
        if not proxy and not urllib.request.proxy_bypass(f"{host}:{port}"):
            proxy = urllib.request.getproxies().get("https", "")
        if not proxy or proxy == "none":
            return http.client.HTTPSConnection(host, port, timeout=self.timeout, context=self.context)
        by = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        if by.scheme not in ("", "http") or not by.hostname:
            raise NetworkError(f"proxy {by.hostname or proxy}: only http://HOST:PORT can be used")
        connection = http.client.HTTPSConnection(by.hostname, by.port or 3128, timeout=self.timeout,
                                                 context=self.context)
        headers = {}
        if by.username is not None:
            import base64
            user = ":".join(urllib.parse.unquote(part or "") for part in (by.username, by.password))
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        cast(Any, connection)._create_connection = functools.partial(dial, time.monotonic() + self.timeout)
        connection.set_tunnel(host, port, headers)
        return connection

    def request(self, method: str, url: str, body: bytes | None = None,
                headers: Mapping[str, str] | None = None) -> Response:
        """One request, `timeout` seconds in total; NetworkError says who was not reached and why."""
        import http.client
        import socket
        import urllib.parse
        at = urllib.parse.urlsplit(url)
        if at.scheme != "https" or not at.hostname:
            raise NetworkError(f"{url}: only https is used")
        while True:
            kept = at.netloc in self.kept
            try:
                return self.attempt(method, at, body, headers or {})
            except (http.client.HTTPException, OSError, ValueError) as error:
                self.drop(at.netloc)
                # A kept connection may have been closed meanwhile: once more on a new one.
                if not kept or isinstance(error, (TimeoutError, socket.timeout)):
                    raise NetworkError(f"cannot reach {at.netloc}: {network_reason(error, self.timeout)}") from error

    def attempt(self, method: str, at: urllib.parse.SplitResult, body: bytes | None,
                headers: Mapping[str, str]) -> Response:
        """Send on the kept connection or a new one, and read the whole answer."""
        origin = at.netloc
        connection = self.kept.get(origin)
        if connection is None:
            connection = self.kept[origin] = self.connect(at.hostname or "", at.port or 443)
            connection.connect()
        cast(Any, connection.sock).until = time.monotonic() + self.timeout
        connection.request(method, (at.path or "/") + (f"?{at.query}" if at.query else ""), body,
                           {"User-Agent": USER_AGENT, **headers})
        with contextlib.closing(connection.getresponse()) as response:
            data = response.read(BODY_BYTES + 1)
            whole = response.isclosed()
        if response.will_close or not whole:
            self.drop(origin)
        if len(data) > BODY_BYTES:
            raise NetworkError(f"{origin}: an answer of more than {BODY_BYTES >> 20} MiB")
        promised = response.headers.get("Content-Length")
        if promised and method != "HEAD" and promised != str(len(data)):
            raise NetworkError(f"{origin}: an answer of {len(data)} bytes where {printable(promised)} were promised")
        return Response(response.status, response.headers, data)

    def drop(self, origin: str) -> None:
        """Forget a connection that cannot be used again."""
        connection = self.kept.pop(origin, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close what is kept."""
        for origin in list(self.kept):
            self.drop(origin)


class Finished(NamedTuple):
    """How a command ended: problem is "" for exit status 0."""
    problem: str
    output: list[str]


def drain(descriptor: int, kept: bytearray) -> None:
    """Read a pipe to its end, so that the writer never waits, and keep only so much."""
    while data := os.read(descriptor, 1 << 16):
        kept += data[:OUTPUT_BYTES - len(kept)]
    os.close(descriptor)


class Ending:
    """Ends the program on a signal, but for the moments in which that would leave something behind."""

    def __init__(self) -> None:
        self.number = 0
        self.waits = False

    def __call__(self, number: int, _: object) -> None:
        """Take a signal."""
        self.number = number
        if not self.waits:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Let a signal wait for the end of this."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            if self.number:
                raise SystemExit(128 + self.number)


ending = Ending()


def start(argv: Sequence[str], data: bytes, output: int, **how: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, with this to read and no more."""
    import subprocess
    given = os.memfd_create("input")
    try:
        os.write(given, data)
        os.lseek(given, 0, os.SEEK_SET)
        return subprocess.Popen(argv, stdin=given, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                **how)
    finally:
        os.close(given)


def command(argv: Sequence[str], env: Mapping[str, str], timeout: float, data: bytes = b"", cwd: str = "/",
            **how: Any) -> Finished:
    """Run a command to its end; its process group is killed as one on time-out or signal."""
    import subprocess
    import threading
    ours, theirs = os.pipe()
    kept = bytearray()
    reader = threading.Thread(target=drain, args=(ours, kept), daemon=True)
    process = None
    try:
        try:
            with ending.put_off():
                process = start(argv, data, theirs, env=dict(env), cwd=cwd, **how)
        finally:
            os.close(theirs)
            reader.start()
        status = process.wait(timeout)
        problem = f"exit status {status}" if status > 0 else f"killed by signal {-status}" if status else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {timeout:g} s (load_timeout)"
    except (OSError, ValueError) as error:
        problem = f"cannot be run: {getattr(error, 'strerror', None) or error}"
    finally:
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(0.5)            # not longer: a daemon left behind may hold the pipe for ever
    return Finished(problem, bytes(kept).decode("utf-8", "backslashreplace").splitlines())


def proc_text(pid: int | str, name: str) -> str:
    """A file of /proc, "" where it cannot be read."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(1 << 16).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def proc_link(pid: int | str, name: str) -> str:
    """A link of /proc, "" where it cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


class Process(NamedTuple):
    """A running program."""
    pid: int
    parent: int
    command: str
    argv: list[str]


def processes(commands: Sequence[str]) -> list[Process]:
    """The processes with one of these command names, in our own process and network namespaces."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        head, _, rest = proc_text(pid, "stat").rpartition(") ")
        name = head.partition("(")[2]
        if name not in commands or rest.startswith("Z"):
            continue
        spaces = [proc_link(pid, f"ns/{kind}") for kind in ("pid", "net")]
        if all(space in ("", proc_link("self", f"ns/{kind}")) for space, kind in zip(spaces, ("pid", "net"))):
            argv = proc_text(pid, "cmdline").rstrip("\0").split("\0")
            found.append(Process(pid, int(rest.split()[1]), name, argv))
    return found


def credentials(pid: int) -> dict[str, Any]:
    """As whom a process runs, in the words of `start`; {} if that is ourselves or cannot be had."""
    found = dict(re.findall(r"(?m)^(Uid|Gid|Groups):[ \t]*(.*)$", proc_text(pid, "status")))
    if os.geteuid() != 0 or len(found) < 3 or found["Uid"].split()[1] == "0":
        return {}
    return {"user": int(found["Uid"].split()[1]), "group": int(found["Gid"].split()[1]),
            "extra_groups": [int(group) for group in found["Groups"].split()]}


def catches(pid: int, number: int) -> bool:
    """Whether a process has a use for a signal; one that it has none for may end it."""
    mask = re.search(r"(?m)^SigCgt:\s*([0-9a-f]+)$", proc_text(pid, "status"))
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


# What is said before TLS begins: what is sent, and how the answer to it begins.
STARTTLS: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "": (),
    "smtp": ((b"", b"220"), (b"EHLO [127.0.0.1]\r\n", b"250"), (b"STARTTLS\r\n", b"220")),
    "imap": ((b"", b"* OK"), (b"a STARTTLS\r\n", b"a OK")),
    "pop3": ((b"", b"+OK"), (b"STLS\r\n", b"+OK")),
}


def ask_for_tls(plain: Any, protocol: str) -> None:
    """Bring a connection to where TLS begins; NetworkError if the server will not."""
    with plain.makefile("rb") as answers:
        for said, wanted in STARTTLS[protocol]:
            plain.sendall(said)
            goes_on = True
            while goes_on:
                line = answers.readline(1000)
                goes_on = line[3:4] == b"-" or (line[:2] == b"* " and not line.startswith(wanted))
            if not line.startswith(wanted):
                raise NetworkError(f"no STARTTLS: it said {line.decode('utf-8', 'replace').strip() or 'nothing'!r}")


def served(host: str, port: int, name: str, protocol: str, timeout: float) -> bytes:
    """The certificate (PEM) that a server shows for a name, trusted or not, in `timeout` seconds; NetworkError."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with contextlib.closing(dial(time.monotonic() + timeout, (host, port), timeout)) as plain:
            ask_for_tls(plain, protocol)
            with context.wrap_socket(plain, server_hostname=name or None) as secure:
                return ssl.DER_cert_to_PEM_cert(secure.getpeercert(True) or b"").encode()
    except (OSError, ValueError) as error:
        raise NetworkError(network_reason(error, timeout)) from error


def resolve(host: str) -> list[str]:
    """Every address of a name; NetworkError if it has none."""
    import socket
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None)))
    except (OSError, ValueError) as error:
        raise NetworkError(network_reason(error, 0)) from error


def port_holder(port: int) -> str:
    """Who listens on a TCP port here, for a message: "nginx (pid 12)", or "" where it cannot be seen."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        for row in proc_text("self", table).splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for pid in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if pid.isdigit() and any(proc_link(pid, f"fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd")):
                return f"{proc_text(pid, 'comm').strip()} (pid {pid})"
    return ""


def ask(question: str) -> bool:
    """Ask at the terminal; without one the answer is no."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        sys.stderr.write("\n")
    return answer.strip().lower() in ("y", "yes")


class World(NamedTuple):
    """What lies outside of the program: times in seconds, `now` since 1970 UTC."""
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    http: Callable[..., Http] = Http
    command: Callable[..., Finished] = command
    connect: Callable[..., bytes] = served
    resolve: Callable[[str], list[str]] = resolve
    ask: Callable[[str], bool] = ask


REAL = World()


# === 3. files: the only disk ===================================================================
# Nothing is written over: a file is made beside its target, flushed to the disk, and renamed. Modes
# are set at creation, before the first byte.

def file_label(name: str) -> str:
    """NAME as it stands in file names: *. becomes _. and : becomes -."""
    return name.lower().replace("*.", "_.").replace(":", "-")


def reserved(label: str) -> bool:
    """Whether NAME is taken by the account files."""
    return label == "account" or label.startswith("account_")


def read(path: str, cap: int = 1 << 20) -> bytes:
    """The content of a regular file of at most `cap` bytes; FileError for anything else, never a wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise FileError(f"{path}: not a regular file")
        if about.st_size > cap:
            raise FileError(f"{path}: {about.st_size} bytes, more than the {cap} that are read")
        return os.read(descriptor, cap)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def signature(path: str) -> str:
    """Size, modification time and inode, by which a file is known again; "" where there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return ""
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ino}"


def sync_directory(path: str) -> None:
    """Flush the directory that holds a path, so that a rename in it survives a power cut."""
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte."""
    while data:
        data = data[os.write(descriptor, data):]


class Owner(NamedTuple):
    """Mode and owner of a file."""
    mode: int
    uid: int
    gid: int


def owner(path: str, mode: int) -> Owner:
    """Mode and owner that a new file in this place should have: the present one's, else `mode` and ours."""
    try:
        about = os.stat(path)
        return Owner(stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid)
    except OSError:
        return Owner(mode, os.geteuid(), os.getegid())


OURS = Owner(0o600, -1, -1)         # private, and whoever runs this owns it


def create(path: str, data: bytes, like: Owner = OURS, strict: bool = False) -> None:
    """Make a new file, on the disk when this returns; what is there goes; OSError if `strict` and not its owner's."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if like.uid not in (-1, os.geteuid()) or like.gid not in (-1, os.getegid()):
            with contextlib.suppress(*() if strict else (PermissionError,)):        # not root: ours then
                os.fchown(descriptor, like.uid, like.gid)
        os.fchmod(descriptor, like.mode)
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: str, target: str) -> None:
    """Put a file in place in one step, durably."""
    os.replace(source, target)
    sync_directory(target)


def replace(path: str, data: bytes, mode: int = 0o600) -> None:
    """Write a whole file in one step, keeping the mode and owner of the one it replaces."""
    create(f"{path}_tmp", data, owner(path, mode))
    rename(f"{path}_tmp", path)


def deploy(path: str, data: bytes, like: Owner) -> None:
    """Put a copy in place in one step, with just this mode and owner, unless it is there; FileError if it cannot."""
    directory, base = os.path.split(path)
    if not os.path.isdir(directory):
        raise FileError(f"{directory}: no such directory; make it, with the owner and mode that it should have")
    if os.path.isdir(path):
        raise FileError(f"{path}: a directory, or a link to one; give the path of a file in it")
    if os.path.isfile(path) and not os.path.islink(path) and owner(path, 0) == like and read(path) == data:
        return
    temporary = os.path.join(directory, f".{base}_tmp")     # hidden: some servers read every file of a directory
    try:
        create(temporary, data, like, strict=True)
        rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise FileError(f"{path}: cannot be written there with this owner: {error.strerror}") from error


def remove(path: str) -> None:
    """Delete a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def link(to: str, path: str, by: str) -> None:
    """Make a path a symbolic link in one step, durably; `by` is a name that is free for it."""
    remove(by)
    os.symlink(to, by)
    rename(by, path)


def back_up(path: str, target: str) -> None:
    """Keep the present content of a path under another name: a second link, or (with a key in it) a private copy."""
    remove(target)
    content = read(path)
    secret = b"PRIVATE KEY" in content
    if not secret and not os.path.islink(path):
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    create(target, content, OURS if secret else owner(path, 0o600))


def secure_streams() -> None:
    """Give what was closed a place to go, so that no file of ours takes the number of a standard stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def anyone_may_write(path: str) -> bool:
    """Whether every user of the machine may change this file."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IWOTH)
    except OSError:
        return False


def open_append(path: str) -> int:
    """The descriptor of a regular file to add lines to, private if it is new; OSError if it is anything else."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def read_json(path: str) -> Json:
    """A state file; what is not there, torn, or foreign counts as empty."""
    try:
        found = json.loads(read(path, 1 << 26))
    except (FileError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_directory(path: str) -> None:
    """Make a directory that a web server's user may pass through, with its parents, whatever the umask."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent and not os.path.isdir(parent):
        make_directory(parent)
    os.mkdir(path)
    os.chmod(path, 0o755)


def take_lock(path: str) -> int | None:
    """The descriptor that holds the lock, or None while another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise FileError(f"{path}: cannot be locked here ({error.strerror}); "
                        "the directory must be on a file system with locks") from error
    return descriptor


# === 4. pem: keys, requests, chains ============================================================
# Pure: bytes in, values out. Nothing here knows of files or of the network.

KEY_KINDS = ("ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096")
CHAIN_LENGTH = 10               # certificates; no CA sends more
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,256}")      # base64url, as challenges and nonces are
SKEW_SECONDS = 300              # how far our clock and the CA's may differ
PEM_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s")
HOST_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class Facts(NamedTuple):
    """What a certificate says of itself; times in seconds since 1970 UTC, octets in hexadecimal."""
    names: tuple[str, ...]
    not_before: float
    not_after: float
    issuer: str
    serial: str
    fingerprint: str            # SHA-256 of the certificate
    key: str                    # SHA-256 of its public key
    kind: str                   # one of KEY_KINDS, or another in words
    ari: str                    # its name in renewalInfo (RFC 9773 section 4.1), "" if it can have none


def pem_blocks(pem: bytes) -> Iterator[tuple[str, bytes]]:
    """Label and text of each PEM block (RFC 7468), line ends made plain; in one pass, whatever the text holds."""
    at = 0
    while begin := PEM_BEGIN.search(pem, at):
        closing = b"-----END " + begin[1] + b"-----"
        stop = pem.find(closing, begin.end())
        if stop < 0:
            return
        at = stop + len(closing)
        yield begin[1].decode(), pem[begin.start():at].replace(b"\r", b"") + b"\n"


def blocks(pem: bytes, *labels: str) -> list[bytes]:
    """The PEM blocks with one of these labels."""
    return [text for label, text in pem_blocks(pem) if label in labels]


def certificates(pem: bytes) -> list[bytes]:
    """The certificates of a PEM text, in its order."""
    return blocks(pem, "CERTIFICATE")


def private_key(pem: bytes) -> bytes:
    """The private key of a PEM text; b"" where there is none."""
    found = blocks(pem, "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    return found[0] if found else b""


def parse_certificate(pem: bytes) -> x509.Certificate:
    """One certificate, its extensions too; PemError where it is none."""
    from cryptography import x509
    try:
        found = x509.load_pem_x509_certificate(pem)
        list(found.extensions)
        return found
    except Exception as error:      # cryptography has several of its own for what is none
        raise PemError(f"not a certificate: {printable(str(error))[:100]}") from error


def parse_key(pem: bytes) -> PrivateKey:
    """An unencrypted EC or RSA private key; PemError where it is none."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    try:
        key = serialization.load_pem_private_key(private_key(pem), None)
    except TypeError as error:
        raise KeyKindError("the private key is encrypted; wucme needs it in the clear") from error
    except Exception as error:      # cryptography has several of its own for what is no key
        raise PemError("holds no whole private key" if private_key(pem) else "holds no private key") from error
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise KeyKindError(f"a private key of a kind that CAs do not take ({type(key).__name__.strip('_')}); "
                           "put an EC or RSA pair there, or move this one elsewhere")
    return key


def new_key(kind: str) -> PrivateKey:
    """A new private key of one of KEY_KINDS."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    family, _, size = kind.partition("-")
    if family == "rsa":
        return rsa.generate_private_key(65537, int(size))
    return ec.generate_private_key(ec.SECP256R1() if size == "p256" else ec.SECP384R1())


def key_pem(key: PrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8."""
    from cryptography.hazmat.primitives import serialization
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def key_kind(public: Any) -> str:
    """The kind of a public key, as KEY_KINDS names it."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    if isinstance(public, rsa.RSAPublicKey):
        return f"rsa-{public.key_size}"
    if isinstance(public, ec.EllipticCurvePublicKey):
        return f"ecdsa-p{public.key_size}"
    return type(public).__name__.strip("_")


def key_hash(public: Any) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo, in hexadecimal."""
    import hashlib

    from cryptography.hazmat.primitives import serialization
    return hashlib.sha256(public.public_bytes(serialization.Encoding.DER,
                                              serialization.PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def validity(certificate: x509.Certificate) -> tuple[float, float]:
    """notBefore and notAfter in seconds since 1970; old releases of cryptography have naive times only."""
    import datetime
    times = []
    for field in ("not_valid_before", "not_valid_after"):
        aware = getattr(certificate, f"{field}_utc", None)
        times.append((aware or getattr(certificate, field).replace(tzinfo=datetime.timezone.utc)).timestamp())
    return times[0], times[1]


def alternative_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses of the subjectAltName, lower case, in its order."""
    from cryptography import x509
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value).lower() for name in names if isinstance(name, (x509.DNSName, x509.IPAddress)))


def make_p12(pair: bytes, name: str, password: bytes) -> bytes:
    """Key and chain as PKCS #12."""
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
    leaf, *issuers = map(parse_certificate, certificates(pair))
    return pkcs12.serialize_key_and_certificates(name.encode(), parse_key(pair), leaf, issuers,
                                                 BestAvailableEncryption(password))


def p12_holds(data: bytes, pair: bytes, password: bytes) -> bool:
    """Whether a PKCS #12 file opens with this password and has this key and chain in it."""
    from cryptography.hazmat.primitives.serialization import pkcs12
    try:
        key, leaf, issuers = pkcs12.load_key_and_certificates(data, password)
    except Exception:       # cryptography has several of its own for what is none
        return False
    held = {certificate.serial_number for certificate in [leaf, *issuers] if certificate}
    return (key is not None and key_hash(key.public_key()) == key_hash(parse_key(pair).public_key())
            and held == {parse_certificate(pem).serial_number for pem in certificates(pair)})


def base64url(data: bytes) -> str:
    """base64url without padding (RFC 7515)."""
    import base64
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def certificate_id(certificate: x509.Certificate) -> str:
    """What renewalInfo calls a certificate: authority key identifier and serial number, both as in its DER."""
    from cryptography import x509
    try:
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return ""
    number = certificate.serial_number
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return f"{base64url(issuer)}.{base64url(serial)}" if issuer else ""


def facts(chain: bytes) -> Facts:
    """What the first certificate of a chain says; PemError where there is none."""
    import hashlib

    from cryptography.hazmat.primitives import serialization
    found = certificates(chain)
    if not found:
        raise PemError("holds no certificate")
    leaf = parse_certificate(found[0])
    try:
        public = leaf.public_key()
        issuer = leaf.issuer.rfc4514_string()
        not_before, not_after = validity(leaf)
        return Facts(alternative_names(leaf), not_before, not_after, issuer, f"{leaf.serial_number:x}",
                     hashlib.sha256(leaf.public_bytes(serialization.Encoding.DER)).hexdigest(),
                     key_hash(public), key_kind(public), certificate_id(leaf))
    except Exception as error:      # of what may stand in a certificate not all is known to cryptography
        raise PemError(f"a certificate that cannot be read: {printable(str(error))[:100]}") from error


def host_name(text: str) -> str:
    """A DNS name (with *. before it perhaps) or IP address in the form that CAs want; ValueError if neither."""
    import ipaddress
    name = text.strip().rstrip(".").lower()
    with contextlib.suppress(ValueError):
        if "%" not in name:
            return str(ipaddress.ip_address(name.strip("[]")))
    if not name.isascii():
        name = name.encode("idna").decode()
    labels = name[2:].split(".") if name.startswith("*.") else name.split(".")
    if len(name) > 253 or not all(HOST_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise ValueError(f"{printable(text)!r} is neither a host name nor an IP address")
    return name


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    return ":" in name or name.replace(".", "").isdigit()


def signing_request(key: PrivateKey, names: Iterable[str]) -> bytes:
    """A CSR (DER) with an empty subject and exactly these names (RFC 8555 section 7.4)."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    wanted: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(name)) if is_address(name)
                                      else x509.DNSName(name) for name in names]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether names, key identifiers and signature say that one certificate was issued by the other."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    if certificate.issuer != issuer.subject:
        return False
    with contextlib.suppress(x509.ExtensionNotFound):
        theirs = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        if theirs is not None and theirs != own:
            return False
    public, algorithm = issuer.public_key(), certificate.signature_hash_algorithm
    pss = x509.SignatureAlgorithmOID.RSASSA_PSS     # its parameters cannot be had from old releases
    try:
        if isinstance(public, ec.EllipticCurvePublicKey) and algorithm:
            public.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
        elif isinstance(public, rsa.RSAPublicKey) and algorithm and certificate.signature_algorithm_oid != pss:
            public.verify(certificate.signature, certificate.tbs_certificate_bytes, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True


def chain_matches(chain: bytes, wanted: str) -> bool:
    """Whether a certificate of a chain, or its issuer, is the one that `chain` means."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    digits = wanted.replace(":", "").lower()
    for pem in certificates(chain):
        one = parse_certificate(pem)
        marks = [one.fingerprint(hashes.SHA256()).hex()]
        with contextlib.suppress(x509.ExtensionNotFound):
            identifier = one.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
            marks.append((identifier or b"").hex())
        if wanted.lower() in one.issuer.rfc4514_string().lower() or any(
                len(digits) >= 4 and mark.startswith(digits) for mark in marks):
            return True
    return False


def certificate_der(chain: bytes) -> bytes:
    """The first certificate of a chain as DER."""
    from cryptography.hazmat.primitives import serialization
    return parse_certificate(certificates(chain)[0]).public_bytes(serialization.Encoding.DER)


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may issue others."""
    from cryptography import x509
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def gmt(when: float) -> str:
    """A time as certificates print it: Mar 13 12:52:11 2026 GMT."""
    try:
        return time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(when))
    except (OverflowError, ValueError, OSError):
        return f"{when:.0f} s after 1970"


def check_chain(chain: bytes, key: PrivateKey, names: Sequence[str], now: float) -> list[str]:
    """Refuse (PemError) a chain that must not go live; the names that it has beyond those asked for."""
    others = {label for label, _ in pem_blocks(chain)} - {"CERTIFICATE"}
    if others:
        raise PemError(f"the CA sent more than certificates ({', '.join(sorted(others))})")
    found = [parse_certificate(pem) for pem in certificates(chain)]
    if not 0 < len(found) <= CHAIN_LENGTH:
        raise PemError(f"the CA sent {f'a chain of {len(found)} certificates' if found else 'no certificate'}")
    leaf = facts(chain)
    if is_authority(found[0]):
        raise PemError("the certificate that the CA sent is a CA's")
    if leaf.key != key_hash(key.public_key()):
        raise PemError("the certificate that the CA sent is for another key")
    missing = sorted(set(names) - set(leaf.names))
    if missing:
        raise PemError(f"the certificate that the CA sent lacks {', '.join(missing)}")
    if not leaf.not_before - SKEW_SECONDS <= now < leaf.not_after:
        raise PemError(f"the certificate that the CA sent is not valid now ({gmt(leaf.not_before)} to "
                       f"{gmt(leaf.not_after)}); is the clock of this host right?")
    for place, (one, issuer) in enumerate(zip(found, found[1:]), 1):
        if not issued_by(one, issuer):
            raise PemError(f"certificate {place} of the chain that the CA sent was not issued by the next")
    return sorted(set(leaf.names) - set(names))


# === 5. settings: one table, and the ini that it reads =========================================
# A setting is declared once, as a field of the class of its scope: its type, how its text is read,
# its default, its sentence of help. The ini reader, the options, --help and wucme.ini come from there.

KNOWN_SERVERS = {
    "letsencrypt": "https://acme-v02.api.letsencrypt.org/directory",
    "letsencrypt-staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
    "zerossl": "https://acme.zerossl.com/v2/DV90",
    "google": "https://dv.acme-v02.api.pki.goog/directory",
    "google-test": "https://dv.acme-v02.test-api.pki.goog/directory",
    "sslcom": "https://acme.ssl.com/sslcom-dv-ecc",
    "actalis": "https://acme-api.actalis.com/acme/directory",
}
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
DURATION = re.compile(r"([0-9]{1,9})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INI_HEAD = """\
# wucme.ini: settings of wucme.py; see wucme.py --help.
#
# Looked for at --ini FILE, $WUCME_INI, beside wucme.py, /etc/wucme/wucme.ini, ~/.wucme/wucme.ini.
# Every setting has a default and is shown at it: take away the "# " to change one. A value may go on
# in the next lines if they are indented. There are no comments behind a value. Durations: 20s 10m 12h 30d.
"""
INI_TAIL = """
# --- one certificate; without names its title is its name ---
# [www.example.org]
# names = www.example.org example.org
# load =
#     +nginx
#     @/usr/local/sbin/cert_to_mail.sh

# --- one CA, for `server = home` ---
# [server home]
# url = https://ca.home.example/acme/directory
# ca_file = /etc/ssl/home-ca.pem
"""


class Setting(NamedTuple):
    """One setting: how its text becomes a value, its default, and what it means."""
    kind: Callable[[str], Any]
    default: str
    help: str
    form: str
    local: bool             # whether it makes sense in a section of its own only


def setting(kind: Callable[[str], T], default: str, text: str, form: str = "", local: bool = False) -> T:
    """Declare a setting where its value will stand; for the type checker it has that value's type."""
    return cast(T, Setting(kind, default, text, form, local))


class Secret(str):
    """A text that no message shows."""

    def __repr__(self) -> str:
        return "'(secret)'"


class Renewal(NamedTuple):
    """When to renew: so long before the end, or at such a share of the lifetime left; neither: never."""
    seconds: float | None = None
    share: float | None = None
    auto: bool = False

    @property
    def never(self) -> bool:
        """Whether nothing but its user renews it."""
        return self == Renewal()


def a_url(text: str) -> str:
    """An https URL, or none."""
    import urllib.parse
    if text:
        at = urllib.parse.urlsplit(text)
        if at.scheme != "https" or not at.hostname or at.port == 0:
            raise ValueError("must be an https:// URL")
    return text


def a_path(text: str) -> str:
    """A path, ~ allowed."""
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def a_label(text: str) -> str:
    """A word that can stand in a file name."""
    if text and not SAFE_NAME.fullmatch(text):
        raise ValueError("only letters, digits, '.', '_' and '-' can be used")
    return text


def a_flag(text: str) -> bool:
    """Yes or no."""
    if text.lower() not in ("yes", "no"):
        raise ValueError("must be yes or no")
    return text.lower() == "yes"


def a_count(text: str) -> int:
    """A whole number, zero or more."""
    if not text.isdigit():
        raise ValueError("must be a whole number")
    return int(text)


def a_number(text: str) -> int:
    """A whole number, one or more."""
    if not a_count(text):
        raise ValueError("must be a whole number, at least 1")
    return int(text)


def a_duration(text: str) -> float:
    """A time such as 20s, 10m, 12h or 30d, in seconds."""
    match = DURATION.fullmatch(text)
    if not match:
        raise ValueError("must be a duration such as 20s, 10m, 12h or 30d")
    return float(match[1]) * SECONDS[match[2]]


def a_limit(text: str) -> float:
    """A duration of a second or more."""
    if not a_duration(text):
        raise ValueError("must be at least 1s")
    return a_duration(text)


def a_renewal(text: str) -> Renewal:
    """auto, never, a duration, a bare number of days, or a percentage of the lifetime."""
    if text in ("auto", "never"):
        return Renewal(auto=text == "auto")
    if text.isdigit():
        text += "d"
    if text.endswith("%") and text[:-1].isdigit() and 0 < int(text[:-1]) < 100:
        return Renewal(share=int(text[:-1]) / 100)
    try:
        return Renewal(seconds=a_duration(text))
    except ValueError:
        raise ValueError("must be auto, never, a duration such as 30d or 12h, or a share such as 25%") from None


def a_key_kind(text: str) -> str:
    """One of KEY_KINDS."""
    if text not in KEY_KINDS:
        raise ValueError(f"must be one of {', '.join(KEY_KINDS)}")
    return text


def an_hmac(text: str) -> str:
    """A JWS MAC algorithm (RFC 7518 section 3.2)."""
    if text not in ("HS256", "HS384", "HS512"):
        raise ValueError("must be HS256, HS384 or HS512")
    return text


def some_words(text: str) -> tuple[str, ...]:
    """Words with blanks between."""
    return tuple(text.split())


def some_lines(text: str) -> tuple[str, ...]:
    """One entry a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def some_servers(text: str) -> tuple[str, ...]:
    """Names or URLs of CAs, one at least."""
    words = some_words(text)
    if not words:
        raise ValueError("must name a CA")
    return tuple(a_url(word) if "://" in word else word for word in words)


def some_names(text: str) -> tuple[str, ...]:
    """Host names and addresses, each once, in order."""
    return tuple(dict.fromkeys(host_name(word) for word in text.split()))


def some_addresses(text: str) -> tuple[tuple[str, int], ...]:
    """Addresses to listen on, as host and port; host "" is every address."""
    found = []
    for word in text.split() if text != "none" else ():
        host, colon, port = word.rpartition(":")
        if not colon or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{word!r} must be :PORT, ADDRESS:PORT or [ADDRESS]:PORT")
        found.append((host.strip("[]"), int(port)))
    return tuple(found)


class RunScope(NamedTuple):
    """Settings of the whole run."""
    directory: str = setting(a_path, "", "where certificates, keys and state are; default: /etc/wucme for "
                             "root, else ~/.wucme", "PATH")
    log: str = setting(a_path, "", "the log file; default: wucme.log in the directory", "PATH")
    backups: int = setting(a_count, "3", "how many old certificates (and keys) are kept of each", "NUMBER")
    workers: int = setting(a_number, "4", "how many certificates are obtained side by side", "NUMBER")
    lock_wait: float = setting(a_duration, "10m", "how long to wait for another run to end", "DURATION")
    timeout: float = setting(a_limit, "20s", "the longest that one request to the CA may take, in all",
                             "DURATION")
    deadline: float = setting(a_limit, "2m", "the longest that one certificate may take; a later run goes "
                              "on with its order", "DURATION")
    alert: tuple[str, ...] = setting(
        some_lines, "", "@ and $ items, one a line, that get the report to read when the set of problems changes, and "
        "daily for a certificate that is late in the last quarter of its life", "ITEM")
    metrics: str = setting(a_path, "", "a file for Prometheus (textfile collector), written by each run", "PATH")
    host: str = setting(a_label, "", "this host's name in a directory that several share; default: the host "
                        "name", "NAME")


class CertificateScope(NamedTuple):
    """Settings of one certificate."""
    server: tuple[str, ...] = setting(
        some_servers, "letsencrypt", "the CA: " + ", ".join(KNOWN_SERVERS) + ", the name of a [server NAME] section, "
        "or the URL of an ACME directory; several in order of preference: the next is asked when one cannot be "
        "reached, or has refused three times", "SERVER...")
    names: tuple[str, ...] = setting(some_names, "", "host names and IP addresses; default: the section's title",
                                     "NAME...", local=True)
    key: str = setting(a_key_kind, "ecdsa-p256", "kind of a new key: " + ", ".join(KEY_KINDS), "KIND")
    rotate: bool = setting(a_flag, "no", "make a new key for each renewal; the chain file then holds the key too, "
                           "and the key file is a link to it")
    renew: Renewal = setting(a_renewal, "auto", "when: auto (a third of the lifetime left, half under 10 days), "
                             "30d, 12h, 25%, never; a bare number is days", "WHEN")
    profile: str = setting(str, "", "which of the profiles that the CA offers; default: the CA's choice", "NAME")
    chain: str = setting(str, "", "if the CA offers several chains, the first with a certificate whose name holds this "
                         "text, or whose SHA-256 fingerprint or key identifier begins so", "TEXT")
    listen: tuple[tuple[str, int], ...] = setting(
        some_addresses, ":80", "where the http-01 challenge is answered while an order runs; several by blanks; "
        "the CA asks at port 80, or whatever your router makes of it", "ADDRESS:PORT")
    load: tuple[str, ...] = setting(some_lines, "", "what to do when a certificate is new, one item a line: see "
                                    "LOAD LIST", "ITEM")
    load_timeout: float = setting(a_limit, "5m", "the longest that one item of load may take", "DURATION")
    grace: float = setting(a_duration, "10s", "how long a ? item waits for the server to serve the new certificate",
                           "DURATION")


class ServerScope(NamedTuple):
    """Settings of one CA."""
    url: str = setting(a_url, "", "URL of its ACME directory, for a CA that is not known", "URL", local=True)
    ca_file: str = setting(a_path, "", "trust this PEM file alone for its HTTPS; default: the system's CAs", "PATH")
    proxy: str = setting(str, "", "HTTP proxy to reach it by, http://[USER:PASSWORD@]HOST:PORT, or none; "
                         "default: $https_proxy and $no_proxy", "URL")
    contact: tuple[str, ...] = setting(some_words, "", "mail address for a new account; optional at most CAs",
                                       "ADDRESS")
    agree: bool = setting(a_flag, "no", "yes: you agree to its terms of service")
    eab_kid: str = setting(str, "", "key identifier for an account bound to one that you have with the CA", "TEXT")
    eab_hmac: Secret = setting(Secret, "", "its MAC key, base64url; not an option", "TEXT")
    eab_hmac_file: str = setting(a_path, "", "a file that holds the MAC key instead", "PATH")
    profile: str = setting(str, "", "the profile of certificates that name none", "NAME", local=True)
    chain: str = setting(str, "", "the chain of certificates that name none", "TEXT", local=True)
    eab_alg: str = setting(an_hmac, "HS256", "its algorithm: HS256, HS384 or HS512", "NAME")


SCOPES: tuple[Any, ...] = (RunScope, CertificateScope, ServerScope)
SETTINGS: dict[str, Setting] = {name: field for scope in reversed(SCOPES)
                                for name, field in scope._field_defaults.items()}


class Source(NamedTuple):
    """The text that settings came from, to say where something stands."""
    path: str
    text: str

    def where(self, section: str, key: str = "", item: str = "") -> str:
        """FILE:LINE of a section, of a key in it, or of one line of that key's list."""
        lines = self.text.splitlines()
        start = next((at for at, line in enumerate(lines, 1) if line.strip() == f"[{section}]"), 0)
        for at, line in enumerate(lines[start:] if start else (), start + 1):
            plain = line.strip()
            if line.startswith("["):
                break
            words = plain.partition("=")
            is_key = words[0].strip().lower() == key
            if (plain == item or (is_key and words[2].strip() == item)) if item else (key and is_key):
                return f"{self.path}:{at}"
        return f"{self.path}:{start}" if start else self.path or "the command line"


class Section(NamedTuple):
    """A certificate that the ini names: its settings, and which of them it sets itself."""
    title: str
    values: CertificateScope
    own: frozenset[str]


class Settings(NamedTuple):
    """Everything that was asked for."""
    run: RunScope
    default: CertificateScope
    sections: dict[str, Section]            # by title, lower case
    servers: dict[str, ServerScope]         # by name
    other_server: ServerScope               # for a CA without a section of its own
    source: Source
    lists: dict[str, str]                   # each line of a load list, and the section that has it


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what was probably meant, or a full stop."""
    import difflib
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else "."


def ini_fault(error: configparser.Error) -> str:
    """LINE: what is wrong, for what the reader of inis refuses."""
    import configparser
    if isinstance(error, configparser.DuplicateOptionError):
        return f"{error.lineno}: {error.option} stands twice in [{error.section}]; keep one"
    if isinstance(error, configparser.DuplicateSectionError):
        return f"{error.lineno}: [{error.section}] stands twice; join the two"
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"{error.lineno}: {printable(error.line.strip())!r} stands before any section; begin with [wucme]"
    lines = getattr(error, "errors", None)
    number, line = lines[0] if lines else (0, str(error))
    return f"{number}: {printable(str(line))} is neither KEY = VALUE nor a section"


def parse_ini(source: Source) -> dict[str, dict[str, str]]:
    """The sections of an ini as texts; SettingsError with file and line for what is not one."""
    import configparser
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    for number, line in enumerate(source.text.splitlines(), 1):
        if "\0" in line or (line.startswith("[") and not line.rstrip().endswith("]")):
            raise SettingsError(f"{source.path}:{number}: {printable(line)!r}: nothing may stand behind a section's "
                                "title, and no NUL anywhere")
    try:
        parser.read_string(source.text)
    except configparser.Error as error:
        raise SettingsError(f"{source.path}:{ini_fault(error)}") from error
    return {title: dict(parser.items(title)) for title in parser.sections()}


def parse_value(source: Source, section: str, key: str, text: str) -> Any:
    """The value of one setting, or SettingsError with file, line and what it must be."""
    kind, text = SETTINGS[key].kind, text.strip()
    several = kind is some_lines
    for line in some_lines(text)[not several:]:
        word, equals, _ = line.partition("=")
        if not several or (equals and word.strip().lower() in SETTINGS):
            raise SettingsError(f"{source.where(section, key, line)}: {line!r} is indented and so belongs to "
                                f"{key}; move it to the left")
    try:
        if not several and re.search(r"\s[;#]", text):
            raise ValueError("a comment needs a line of its own")
        return kind(text)
    except ValueError as error:
        raise SettingsError(f"{source.where(section, key)}: {key} = {printable(text)}: {error}") from error


def pick(source: Source, section: str, texts: Mapping[str, str], scope: Any) -> dict[str, Any]:
    """The values of those settings in a section that belong to one scope."""
    return {key: parse_value(source, section, key, text) for key, text in texts.items()
            if key in scope._field_defaults}


def default_values(scope: Any) -> dict[str, Any]:
    """Every setting of a scope at its default."""
    return {key: field.kind(field.default) for key, field in scope._field_defaults.items()}


def default_directory() -> str:
    """Where certificates are kept unless the settings say otherwise."""
    if os.geteuid() == 0:
        return "/etc/wucme"
    found = os.path.expanduser("~/.wucme")
    if found.startswith("~"):
        raise SettingsError("this user has no home directory; set directory = PATH, or --directory")
    return found


def find_ini(named: str) -> str:
    """The ini in use: the one named (which must be there), else the first that is there, else ""."""
    if named:
        if not os.path.exists(named):
            raise SettingsError(f"{named}: there is no such file")
        return named
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wucme.ini")
    for path in (beside, "/etc/wucme/wucme.ini", os.path.expanduser("~/.wucme/wucme.ini")):
        if os.path.exists(path):
            return path
    return ""


def read_source(path: str) -> Source:
    """The text of an ini, "" for none; SettingsError if it cannot be read or anyone may write it."""
    if not path:
        return Source("", "")
    if os.geteuid() == 0 and anyone_may_write(path):
        raise SettingsError(f"{path}: anyone may write this file, and it says what root runs; chmod o-w {path}")
    try:
        return Source(path, read(path).decode("utf-8-sig"))
    except (FileError, UnicodeDecodeError) as error:
        raise SettingsError(f"{sentence(error)}" if isinstance(error, FileError)
                            else f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def check_keys(source: Source, title: str, texts: Mapping[str, str], scopes: Sequence[Any]) -> None:
    """Refuse a key that is unknown, or that belongs into another section."""
    known = [name for scope in scopes for name, field in scope._field_defaults.items()
             if len(scopes) == 1 or not field.local]
    for key in texts:
        if key in known:
            continue
        where = source.where(title, key)
        if key in SETTINGS:
            homes = [home for home, scope in zip(("[wucme]", "[NAME]", "[server NAME]"), SCOPES)
                     if key in scope._field_defaults]
            raise SettingsError(f"{where}: {key} belongs into {homes[0]}, not into [{title}]")
        raise SettingsError(f"{where}: unknown setting {key!r}{nearest(key, known)}")


def read_section(source: Source, title: str, texts: dict[str, str], default: CertificateScope,
                 options: dict[str, Any]) -> Section:
    """The section of one certificate, over the defaults and under the options of this call."""
    name = title.lower()
    if "names" not in texts and "." not in title and ":" not in title:
        raise SettingsError(f"{source.where(title)}: [{title}] is no host name and has no names = ..."
                            f"{nearest(name, ['wucme', 'server'])}")
    check_keys(source, title, texts, [CertificateScope])
    own = pick(source, title, texts, CertificateScope)
    if not own.get("names"):
        own["names"] = parse_value(source, title, "names", title)
    label = file_label(name)
    if not SAFE_NAME.fullmatch(label) or label == "account" or label.startswith("account_"):
        raise SettingsError(f"{source.where(title)}: [{title}] cannot be a file name; use letters, digits, "
                            "'.', '_' and '-', not account")
    return Section(title, default._replace(**{**own, **options}), frozenset(own) | frozenset(options))


def find_server(settings: Settings, name: str, title: str = "wucme") -> tuple[str, ServerScope]:
    """The CA that a `server` word means, with its short name; SettingsError if it means none."""
    found = settings.servers.get(name)
    if found is not None and found.url:
        return name, found
    where = settings.source.where(title, "server")
    if name.startswith("https://"):
        label = re.sub(r"[^A-Za-z0-9._-]", "-", name.split("/")[2])
        return label, settings.other_server._replace(url=name)
    if found is not None:
        raise SettingsError(f"{settings.source.where(f'server {name}')}: [server {name}] needs a url")
    raise SettingsError(f"{where}: server = {name}: no such CA{nearest(name, settings.servers)} Known are "
                        f"{', '.join(settings.servers)}, or give the URL of its ACME directory")


def read_settings(source: Source, options: Mapping[str, str]) -> Settings:
    """All settings out of the ini and the options; SettingsError for the first thing wrong."""
    texts = parse_ini(source)
    here = Source("", "")
    given = {scope: pick(here, "", options, scope) for scope in SCOPES}
    common = texts.pop("wucme", {})
    check_keys(source, "wucme", common, SCOPES)
    merged = {scope: {**default_values(scope), **pick(source, "wucme", common, scope), **given[scope]}
              for scope in SCOPES}
    default = CertificateScope(**merged[CertificateScope])
    other = ServerScope(**merged[ServerScope])
    servers = {name: other._replace(url=url) for name, url in KNOWN_SERVERS.items()}
    sections: dict[str, Section] = {}
    for title, body in texts.items():
        kind, _, name = title.partition(" ")
        if kind == "server" and name:
            check_keys(source, title, body, [ServerScope])
            base = servers.get(name, other)
            servers[name] = base._replace(**{**pick(source, title, body, ServerScope), **given[ServerScope]})
        else:
            section = read_section(source, title, body, default, given[CertificateScope])
            if file_label(title) in sections:
                raise SettingsError(f"{source.where(title)}: [{title}] names the same certificate as "
                                    f"[{sections[file_label(title)].title}]")
            sections[file_label(title)] = section
    run = RunScope(**merged[RunScope])
    run = run._replace(directory=run.directory or default_directory())
    run = run._replace(log=run.log or os.path.join(run.directory, "wucme.log"), host=run.host or os.uname().nodename)
    lists = {line: title for title, body in [*texts.items(), ("wucme", common), ("", options)]
             for line in some_lines(body.get("load", ""))}
    settings = Settings(run, default, sections, servers, other, source, lists)
    for title, scope in [("wucme", default), *((one.title, one.values) for one in sections.values())]:
        for name in scope.server:
            find_server(settings, name, title)
    return settings


def wrapped(text: str, width: int, indent: str) -> str:
    """Text broken into lines."""
    import textwrap
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def ini_section(title: str, texts: Mapping[str, str]) -> str:
    """A section as an ini has it."""
    lines = [f"[{title}]"]
    for key, text in texts.items():
        items = text.splitlines() if SETTINGS[key].kind is some_lines else []
        lines += [f"{key} ={'' if items else f' {text}'}", *(f"    {item}" for item in items)]
    return "\n".join(lines) + "\n"


def declare(settings: Settings, names: Sequence[str], options: Mapping[str, str]) -> tuple[Settings, str]:
    """The settings with what `issue` asks for as a section, unless the ini has one; and that one's label."""
    try:
        wanted = some_names(" ".join(names))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not wanted:
        raise SettingsError("issue needs the names that the certificate is for")
    label = file_label(wanted[0])
    if reserved(label):
        raise SettingsError(f"{wanted[0]}: account and account_* are wucme's own names; give another name first")
    known = settings.sections.get(label)
    if known and len(wanted) > 1 and set(known.values.names) != set(wanted):
        raise SettingsError(f"{settings.source.where(known.title)}: [{known.title}] says which names its certificate "
                            f"has ({' '.join(known.values.names)}); change them there")
    given = pick(Source("", ""), "", options, CertificateScope)
    known = known or Section(wanted[0], settings.default._replace(names=wanted), frozenset({"names"}))
    section = known._replace(values=known.values._replace(**given), own=known.own | set(given))
    lists = {**settings.lists, **{line: "" for line in section.values.load if line not in settings.lists}}
    return settings._replace(sections={**settings.sections, label: section}, lists=lists), label


def unsaid(plain: Settings, options: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The options that the ini does not say already: those of a certificate, and those of the run or the CA."""
    own: dict[str, str] = {}
    common: dict[str, str] = {}
    for key, given in options.items():
        kind = SETTINGS[key].kind
        text = a_path(given) if kind is a_path else given
        said = [getattr(scope, key) for scope in (plain.run, plain.default, plain.other_server) if hasattr(scope, key)]
        if key != "agree" and kind(text) not in said:
            (own if key in CertificateScope._field_defaults else common)[key] = text
    return own, common


def keep_options(source: Source, path: str, section: Section, options: Mapping[str, str]) -> list[str]:
    """Write the options of a first issue into the ini, so that renewals do the same; lines that say so."""
    plain = read_settings(source, {})
    own, common = unsaid(plain, options)
    before = [source.text.rstrip("\n") + "\n"] if source.text.strip() else []
    secret = "@" in common.get("proxy", "")
    parts, lines = [], []
    if common and not before:
        parts.append(ini_section("wucme", common))
    elif common:
        shown = {**common, "proxy": "..."} if secret else common
        lines.append(f"for renewals, write into {path} yourself: "
                     + "; ".join(f"{key} = {text}" for key, text in shown.items()))
    if own and file_label(section.title) in plain.sections:
        lines.append(f"[{section.title}] stands in {path} already; for renewals, change it there")
    elif own:
        parts.append(ini_section(section.title, {"names": " ".join(section.values.names), **own}))
    if parts:
        try:
            make_directory(os.path.dirname(path))
            replace(path, "\n".join(before + parts).encode(), 0o600 if secret else 0o644)
            lines.append(f"for renewals, the options were written to {path}")
        except OSError as error:
            lines.append(f"{sentence(error)}; for renewals, write this into an ini yourself:\n" + "\n".join(parts))
    return lines


def example_ini() -> str:
    """The shipped wucme.ini: every setting, commented out at its default."""
    parts = [INI_HEAD]
    titles = ("[wucme]\n# --- of the whole run ---\n", "# --- of each certificate; also in a section [NAME] ---\n",
              "# --- of each CA; also in a section [server NAME] ---\n")
    for title, scope in zip(titles, SCOPES):
        parts.append(title)
        parts += [f"{wrapped(field.help, 98, '# ')}\n# {f'{name} = {field.default}'.strip()}\n"
                  for name, field in scope._field_defaults.items() if not field.local]
    return "\n".join(parts) + INI_TAIL


def settings_help() -> str:
    """The settings as the manual lists them."""
    titles = ("of the run", "of a certificate", "of a CA")
    lines = ["SETTINGS (in wucme.ini, or as options)"]
    for title, scope in zip(titles, SCOPES):
        lines.append(f"  {title}:")
        for name, field in scope._field_defaults.items():
            lines.append(f"  {name} = {field.default or field.form}" + ("  (in a section only)" if field.local else ""))
            lines.append(wrapped(field.help, 96, "      "))
    return "\n".join(lines) + "\n"


# === 6. inventory: what is in the directory ====================================================
# Looks, and changes nothing. What a certificate said is remembered with size, time and inode of its
# files, so that a run with nothing to do parses none.

CERTIFICATE_FILE = re.compile(r"wucme_c_(.+)\.pem", re.I)
OWN_FILE = re.compile(r"wucme\.(log|lock)|wucme_[sl]_.*\.json|.*_tmp", re.I | re.S)


class Memory(NamedTuple):
    """What is remembered of one certificate between runs."""
    chain: str = ""                 # signature of the chain file that `facts` were read from
    key: str = ""                   # signature of the key file, and
    key_hash: str = ""              # what public key it has
    facts: Facts | None = None
    server: str = ""                # directory URL of the CA that issued
    names: tuple[str, ...] = ()     # as ordered
    order: str = ""                 # URL of an order that is not finished
    order_server: str = ""          # directory URL of the CA that has it
    profile: str = ""               # as ordered
    problem: str = ""               # why the last attempt failed
    failures: int = 0               # how often a CA said no since the last success
    retry_at: float = 0.0           # not before this time again, by our own ladder
    held_until: float = 0.0         # not before this time again, said the CA
    window: tuple[float, ...] = ()  # ARI: start and end of the CA's renewal window, and the instant drawn in it
    about: str = ""                 # ARI: where the CA explains it
    ask_at: float = 0.0             # ARI: when to ask again
    revoked: str = ""               # fingerprint of a certificate that we revoked


class Entry(NamedTuple):
    """One certificate: its files, what they say, and what the settings want of it."""
    name: str                       # NAME, as in its state file
    chain: str                      # path of the chain
    key: str                        # path of the key
    memory: Memory
    written: Memory                 # as its state file has it
    wanted: CertificateScope
    own: frozenset[str] = frozenset()
    facts: Facts | None = None
    fits: bool = False              # whether the key is the certificate's
    fault: str = ""                 # why the files cannot be used
    blocked: bool = False           # whether they cannot even be looked into

    @property
    def title(self) -> str:
        """What to call it in a message: the first of its names."""
        names = self.wanted.names or (self.facts.names if self.facts else ())
        return names[0] if names else self.name

    @property
    def whole(self) -> bool:
        """Whether certificate and key are there and fit."""
        return self.facts is not None and self.fits


class Inventory(NamedTuple):
    """The directory as it was found: how many files, and its certificates by NAME."""
    files: int
    entries: dict[str, Entry]


def state_path(directory: str, name: str) -> str:
    """Where the memory of one certificate is kept."""
    return os.path.join(directory, f"wucme_s_{name.lower()}.json")


def read_memory(path: str) -> Memory:
    """The memory of one certificate; whatever does not look as it should is forgotten."""
    found = read_json(path)
    kept = {key: found[key] for key, default in Memory._field_defaults.items()
            if key in found and key not in ("facts", "names", "window") and isinstance(found[key], type(default))}
    about, names, window = found.get("facts"), found.get("names"), found.get("window")
    if isinstance(about, list) and [type(part) for part in about] == [list, float, float, *[str] * 6] \
            and all(isinstance(name, str) for name in about[0]) and abs(about[1]) + abs(about[2]) < 1e15:
        kept["facts"] = Facts(tuple(about[0]), *about[1:])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        kept["names"] = tuple(names)
    if isinstance(window, list) and [type(part) for part in window] == [float] * 3:
        kept["window"] = tuple(window)
    return Memory(**kept)


def look(entry: Entry) -> Entry:
    """The entry with what its two files say, from memory where they have not changed."""
    memory, fault, blocked = entry.memory, "", False
    chain, key = signature(entry.chain), signature(entry.key)
    path = entry.chain
    try:
        if memory.facts is None or memory.chain != chain or not chain:
            memory = memory._replace(chain="", facts=None)
            memory = memory._replace(facts=facts(read(path)), chain=chain)
        path = entry.key
        if memory.key != key or not key or not memory.key_hash:
            memory = memory._replace(key="", key_hash="")
            memory = memory._replace(key_hash=key_hash(parse_key(read(path)).public_key()), key=key)
    except FileError as error:
        fault, blocked = str(error), os.path.lexists(path)
    except PemError as error:
        fault, blocked = f"{path}: {error}", isinstance(error, KeyKindError)
    about = memory.facts
    if about and not about.names and not entry.wanted.names:
        fault, blocked = f"{entry.chain}: names nothing in its subjectAltName; declare it, with names = ...", True
    return entry._replace(memory=memory, facts=about, fault=fault, blocked=blocked,
                          fits=not fault and about is not None and memory.key_hash == about.key)


def key_spelling(name: str) -> str:
    """The file name of the key that goes with a chain's, in the same spelling: WUCME_C_X, WUCME_K_X."""
    return f"{name[:6]}{'K' if name[6] == 'C' else 'k'}{name[7:]}"


def scan(directory: str, default: CertificateScope, sections: Mapping[str, Section]) -> Inventory:
    """Every certificate of a directory, found or declared; other files are counted and left alone."""
    found: list[str] = []
    present: dict[str, str] = {}
    files = 0
    with os.scandir(directory) if os.path.isdir(directory) else contextlib.nullcontext(()) as listing:
        for item in listing:
            name = item.name
            if item.is_dir(follow_symlinks=False) or OWN_FILE.fullmatch(name):
                continue
            files += 1
            if name[:6].lower() == "wucme_":
                present[name.lower()] = name
                if CERTIFICATE_FILE.fullmatch(name) and not reserved(name[8:-4].lower()):
                    found.append(name)
    by_stem = {**{label.replace(".", "_"): section for label, section in sections.items()}, **sections}
    entries: dict[str, Entry] = {}
    declared = set()
    for name in sorted(found):
        stem = name[8:-4].lower()
        section = by_stem.get(stem)
        key = present.get(key_spelling(name).lower(), key_spelling(name))
        memory = read_memory(state_path(directory, stem))
        entries[stem] = look(Entry(stem, os.path.join(directory, name), os.path.join(directory, key), memory, memory,
                                   section.values if section else default,
                                   section.own if section else frozenset()))
        declared.add(section.title if section else "")
    for label, section in sections.items():
        if section.title not in declared:
            paths = [os.path.join(directory, f"wucme_{kind}_{label}.pem") for kind in "ck"]
            memory = read_memory(state_path(directory, label))
            entries[label] = Entry(label, paths[0], paths[1], memory, memory, section.values, section.own)
    return Inventory(files, entries)


# === 7. plan: which certificates are due =======================================================
# Pure: no clock, no disk, no network. The first reason that holds is the one that is given.

class Decision(NamedTuple):
    """What to do about one certificate, why, and when it would be due by its dates alone."""
    entry: Entry
    due: bool
    reason: str
    renew_at: float
    held: bool = False              # due, but not to be tried yet


class Window(NamedTuple):
    """When a CA would have a certificate renewed (RFC 9773 section 4.2), and where it says why."""
    start: float
    end: float
    about: str


LADDER = (60.0, 600.0, 6000.0, 86400.0)     # seconds to the next try after so many refusals by a CA


def next_try(failures: int, chance: float, now: float) -> float:
    """When to try again after a CA's n-th refusal in a row; `chance` from 0 to 1 spreads the hosts."""
    return now + LADDER[min(failures, len(LADDER)) - 1] * (0.9 + 0.2 * chance)


def settle_window(window: Window, kept: tuple[float, ...], chance: float) -> tuple[float, ...]:
    """A window with the instant drawn in it; what was drawn in the same window before stays."""
    if kept[:2] == (window.start, window.end):
        return kept
    return window.start, window.end, window.start + (window.end - window.start) * chance


def renewal_time(about: Facts, rule: Renewal) -> float:
    """The instant at which `renew` wants a certificate renewed; never is the end of time."""
    lifetime = about.not_after - about.not_before
    if rule.seconds is not None:
        return about.not_after - rule.seconds
    if rule.share is not None:
        return about.not_after - lifetime * rule.share
    if rule.auto:
        return about.not_after - lifetime / (2 if lifetime < 10 * 86400 else 3)
    return float("inf")


def wanted_names(entry: Entry) -> tuple[str, ...]:
    """The names that a new certificate should have: those of the settings, else those it has."""
    return entry.wanted.names or (entry.facts.names if entry.facts else ())


def changed(entry: Entry, about: Facts) -> str:
    """How a certificate differs from what its own section asks for, or ""."""
    # A CA may add names of its own: then what was ordered counts.
    extra = set(entry.wanted.names) == set(entry.memory.names) and set(entry.wanted.names) <= set(about.names)
    if "names" in entry.own and set(entry.wanted.names) != set(about.names) and not extra:
        return f"its names are now {' '.join(entry.wanted.names)}"
    if "profile" in entry.own and entry.memory.server and entry.wanted.profile != entry.memory.profile:
        return f"its profile is now {entry.wanted.profile or 'the default'}"
    if "key" in entry.own and about.kind != entry.wanted.key:
        return f"its key should be {entry.wanted.key}, and is {about.kind}"
    return ""


def days(seconds: float) -> int:
    """Whole days, truncated toward zero."""
    return int(seconds / 86400) if abs(seconds) < 1e12 else 0


def reasons(entry: Entry, now: float, at: float) -> Iterator[str]:
    """Why a certificate is due, the first reason first."""
    about = entry.facts
    if about is None:
        yield entry.fault or "declared, and not there yet"
        return
    if not entry.fits:
        yield entry.fault or "its key does not fit the certificate"
    if changed(entry, about):
        yield changed(entry, about)
    if entry.memory.revoked == about.fingerprint:
        yield "it was revoked"
    window = entry.memory.window
    if window and now >= window[2] and not entry.wanted.renew.never:
        explained = f" ({entry.memory.about})" if entry.memory.about else ""
        yield f"the CA would have it renewed from {gmt(window[0])} to {gmt(window[1])}{explained}"
    if now >= max(at, about.not_after):
        yield "expired"
    if now >= at:
        yield f"expires in {days(about.not_after - now)} days"


def decide(entry: Entry, now: float, named: bool = False, forced: bool = False) -> Decision:
    """Whether a certificate is due, with the reason in words; `named` skips our ladder, `forced` all."""
    at = renewal_time(entry.facts, entry.wanted.renew) if entry.facts else float("inf")
    if entry.memory.window and at < float("inf"):
        at = min(at, entry.memory.window[2])
    if entry.blocked or not wanted_names(entry):
        return Decision(entry, False, entry.fault, at)
    if forced:
        return Decision(entry, True, "forced", at)
    reason = next(reasons(entry, now, at), "")
    wait = max(entry.memory.held_until, 0 if named else entry.memory.retry_at)
    if reason and now < wait:
        return Decision(entry, False, f"{reason}; not tried again before {gmt(wait)}", at, held=True)
    return Decision(entry, bool(reason), reason, at)


def dates(decision: Decision, now: float) -> str:
    """The line that shows the dates of a certificate, and the days to its end and to its renewal."""
    about = decision.entry.facts
    if about is None:
        return f"{decision.entry.title}: {decision.reason}"
    renew = "never" if decision.renew_at == float("inf") else str(days(decision.renew_at - now))
    return (f"{decision.entry.title} !before: {gmt(about.not_before)} !after: {gmt(about.not_after)} "
            f"expires: {days(about.not_after - now)} renew: {renew}")


# === 8. challenges: how the CA's question is answered ==========================================
# A token is answered from memory, by exact name, whatever Host and prefix the question came with.
# Each is in tokens/ too while its order runs. Sockets have a deadline, and the oldest goes first.

WELL_KNOWN = "/.well-known/acme-challenge/"
OPEN_CONNECTIONS = 256
CONNECTION_SECONDS = 10.0
REQUEST_BYTES = 8192


class Answers:
    """The tokens that are published now, and which of them the CA has asked for."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.join(directory, "tokens")
        self.texts: dict[str, str] = {}
        self.asked: dict[str, threading.Event] = {}
        self.heard: set[str] = set()

    def publish(self, token: str, text: str, asked: threading.Event) -> None:
        """Answer this token from now on; the event is set whenever it is asked for."""
        make_directory(self.directory)
        create(os.path.join(self.directory, token), text.encode(), OURS._replace(mode=0o644))
        self.texts[token], self.asked[token] = text, asked

    def withdraw(self, token: str) -> None:
        """Answer this token no more."""
        self.texts.pop(token, None)
        self.asked.pop(token, None)
        remove(os.path.join(self.directory, token))

    def find(self, target: str) -> str | None:
        """The answer to a request target, absolute or prefixed; None for what is not published."""
        before, found, token = target.partition("?")[0].rpartition(WELL_KNOWN)
        text = self.texts.get(token) if found else None
        asked = self.asked.get(token)
        if text is not None and asked is not None:
            log.detail(f"challenge {token} asked for at {before}{WELL_KNOWN}")
            self.heard.add(token)
            asked.set()
        return text


class Guests:
    """The open connections of a listener: so many, each for so long; the oldest makes room."""

    def __init__(self) -> None:
        import threading
        self.open: dict[Any, float] = {}
        self.guard = threading.Lock()

    def admit(self, guest: Any) -> None:
        """A new connection."""
        with self.guard:
            while len(self.open) >= OPEN_CONNECTIONS:
                self.dismiss(next(iter(self.open)))
            self.open[guest] = time.monotonic() + CONNECTION_SECONDS

    def dismiss(self, guest: Any) -> None:
        """Cut a connection; its thread sees the end of it."""
        del self.open[guest]
        with contextlib.suppress(OSError):
            guest.shutdown(2)

    def dismiss_late(self) -> None:
        """Cut those whose time is over."""
        with self.guard:
            for late in [guest for guest, until in self.open.items() if until < time.monotonic()]:
                self.dismiss(late)

    def forget(self, guest: Any) -> None:
        """A connection that has ended."""
        with self.guard:
            self.open.pop(guest, None)


class Capped:
    """A request that ends after so many bytes, whatever its sender goes on to send."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.left = REQUEST_BYTES

    def readline(self, limit: int = -1) -> bytes:
        """The next line, as far as the budget goes."""
        line: bytes = self.stream.readline(self.left if limit < 0 else min(limit, self.left))
        self.left -= len(line)
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def listener_class() -> Any:  # noqa: C901 - two small classes, not one long function
    """The listening server, made on the days when it is needed."""
    import http.server
    import socket
    import socketserver

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5                     # between two packets; Guests have a total

        def setup(self) -> None:
            super().setup()
            self.rfile = cast(Any, Capped(self.rfile))

        def do_GET(self) -> None:
            body = (cast(Any, self.server).answers.find(self.path) or "").encode()
            self.send_response_only(200 if body else 404)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 128

        def __init__(self, family: int, address: tuple[str, int], answers: Answers) -> None:
            self.address_family, self.answers, self.guests = family, answers, Guests()
            super().__init__(address, Handler)

        def server_bind(self) -> None:
            # Not HTTPServer's, which waits for a resolver to name this host.
            if self.address_family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = "", self.server_address[1]

        def process_request(self, request: Any, client_address: Any) -> None:
            self.guests.admit(request)
            super().process_request(request, client_address)

        def service_actions(self) -> None:
            self.guests.dismiss_late()

        def shutdown_request(self, request: Any) -> None:
            self.guests.forget(request)
            super().shutdown_request(request)

        def handle_error(self, *_: Any) -> None:
            """A caller that goes away is no error of ours."""

    return Server


def listen_reason(host: str, port: int, error: OSError) -> str:
    """Why an address cannot be listened on, and what to do."""
    what = f"cannot listen on {host}:{port}"
    if error.errno == errno.EADDRINUSE:
        holder = port_holder(port)
        return (f"{what}: in use{f' by {holder}' if holder else ''}; listen on another port and let that server "
                f"pass {WELL_KNOWN} on to it")
    if error.errno == errno.EACCES:
        return (f"{what}: not permitted; run as root, or listen on a port from 1024 on that a router or server "
                "passes to")
    return f"{what}: {error.strerror}"


class Listener:
    """The listeners of one address, answering until closed."""

    def __init__(self, host: str, port: int, answers: Answers) -> None:
        import socket
        import threading
        server = listener_class()
        self.servers: list[Any] = []
        self.serving = False
        families = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")] if not host else \
            [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]
        try:
            for family, address in families:
                try:
                    self.servers.append(server(family, (address, port), answers))
                except OSError as error:
                    # A host without IPv6 listens on IPv4 alone.
                    if host or family != socket.AF_INET6 or error.errno in (errno.EADDRINUSE, errno.EACCES):
                        raise
        except OSError as error:
            self.close()
            raise ListenerError(listen_reason(host, port, error)) from error
        self.serving = True
        for one in self.servers:
            threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        for one in self.servers:
            if self.serving:
                one.shutdown()      # or its thread would poll a closed socket for ever
            one.server_close()


def open_listeners(addresses: Iterable[tuple[str, int]], answers: Answers) -> tuple[list[Listener], dict[Any, str]]:
    """The listeners of these addresses; and, for each address that cannot be had, why."""
    found, refused = [], {}
    for address in dict.fromkeys(addresses):
        try:
            found.append(Listener(*address, answers))
            log(f"listening on {address[0]}:{address[1]} for the CA")
        except ListenerError as error:
            refused[address] = str(error)
    return found, refused


# === 9. acme: the protocol, RFC 8555 ===========================================================
# One type for each object of the RFC, one function for each operation. All that a CA sends is taken
# for hostile: every URL is https and of the CA's own host, every token is checked, nothing is endless.

NONCE_TRIES = 20
FAULT_TRIES = 3
PATIENCE_SECONDS = 10.0         # a CA that is out of order for longer is left to the next run
POLL_SECONDS = (0.25, 5.0)      # the first and the longest pause between two looks, unless the CA says,
ASKED_SECONDS = 0.02            # and the first one after the CA has asked for an answer
REMEDIES = {
    "connection": "the CA could not reach this host: port 80 of the name must lead to the listener",
    "dns": "the name does not resolve for the CA: look at its A, AAAA and CAA records",
    "unauthorized": "something else answered on port 80 of the name: look where it leads, also its AAAA address",
    "incorrectResponse": "something else answered on port 80 of the name: look where it leads",
    "caa": "a CAA record of the name forbids this CA: change the record or the server",
    "rejectedIdentifier": "this CA gives no certificate for such a name",
    "unsupportedIdentifier": "this CA gives no certificate for such a name",
    "rateLimited": "wait as it says; issue with --staging while trying things out",
    "externalAccountRequired": "this CA wants an account made on its web site first",
    "userActionRequired": "read and agree to the terms that it names",
    "invalidContact": "set contact to a mail address that receives mail",
    "accountDoesNotExist": "the account key is unknown there; was it made with another CA?",
}


class Directory(NamedTuple):
    """Where a CA's operations are (section 7.1.1), "" for what it has not, and what it says of itself."""
    new_nonce: str
    new_account: str
    new_order: str
    key_change: str
    revoke: str
    renewal_info: str
    terms: str
    profiles: Mapping[str, Any]


class Order(NamedTuple):
    """An order (section 7.1.3)."""
    url: str
    status: str
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str
    error: Json


class Challenge(NamedTuple):
    """A challenge of a kind that is answered here (section 7.1.5)."""
    url: str
    token: str
    status: str


class Authorization(NamedTuple):
    """An authorization (section 7.1.4)."""
    name: str
    status: str
    challenge: Challenge | None
    errors: tuple[Json, ...]


def json_web_key(key: PrivateKey) -> dict[str, str]:
    """The public half of an account key as a JWK, with the members in the order of RFC 7638."""
    numbers: Any = key.public_key().public_numbers()
    if hasattr(numbers, "n"):
        parts = [numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big"),
                 numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")]
        return {"e": base64url(parts[0]), "kty": "RSA", "n": base64url(parts[1])}
    size = (key.key_size + 7) // 8
    return {"crv": f"P-{key.key_size}", "kty": "EC",
            "x": base64url(numbers.x.to_bytes(size, "big")), "y": base64url(numbers.y.to_bytes(size, "big"))}


def thumbprint(key: PrivateKey) -> str:
    """The account key's thumbprint (RFC 7638), which every key authorization ends in."""
    import hashlib
    return base64url(hashlib.sha256(json.dumps(json_web_key(key), separators=(",", ":")).encode()).digest())


def jws_algorithm(key: PrivateKey) -> str:
    """The JWS algorithm of an account key (RFC 7518 section 3.1)."""
    return {"rsa": "RS256", "ecdsa-p256": "ES256", "ecdsa-p384": "ES384"}.get(
        "rsa" if hasattr(key, "decrypt") else key_kind(key.public_key()), "ES512")


def sign(key: PrivateKey, data: bytes) -> bytes:
    """A JWS signature; for EC the two numbers side by side, not DER (RFC 7518 section 3.4)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, utils
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    digest = {256: hashes.SHA256(), 384: hashes.SHA384()}.get(key.key_size, hashes.SHA512())
    size = (key.key_size + 7) // 8
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(digest)))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def signed(key: PrivateKey, header: Json, payload: Json | None) -> bytes:
    """A flattened JWS (section 6.2); payload None is a POST-as-GET (section 6.3)."""
    protected = base64url(json.dumps({"alg": jws_algorithm(key), **header}).encode())
    body = "" if payload is None else base64url(json.dumps(payload).encode())
    signature = base64url(sign(key, f"{protected}.{body}".encode()))
    return json.dumps({"protected": protected, "payload": body, "signature": signature}).encode()


def asked_wait(response: Response, now: float) -> float:
    """Seconds that the CA asks to wait, 0 where it does not say: a number or a date (RFC 9110)."""
    import email.utils
    value = (response.headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:12]), 10 ** 9))
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def read_object(response: Response, url: str) -> Json:
    """The JSON object of an answer; NetworkError names what came instead."""
    try:
        found = json.loads(response.body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        start = response.body[:60].decode("utf-8", "replace")
        raise ProtocolError(f"{url}: no JSON object came, but {len(response.body)} bytes: {printable(start)!r}")
    return found


def problem_kind(problem: Json) -> str:
    """The type of a problem document without its prefix (section 6.7)."""
    return str(problem.get("type") or "").rpartition(":")[2]


def problem_text(problem: Json) -> str:
    """A problem document on one line, with what it says of each name (section 6.7.1)."""
    texts = [f"{problem_kind(problem) or 'refused'}: {problem.get('detail') or 'no detail given'}"]
    parts = problem.get("subproblems")
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict):
            who = part.get("identifier")
            name = who.get("value") if isinstance(who, dict) else "?"
            texts.append(f"{name}: {problem_kind(part)}: {part.get('detail')}")
    return printable("; ".join(texts)[:2000])


def with_remedy(text: str, kind: str) -> str:
    """What the CA said, and what to do about it."""
    return f"{text} ({REMEDIES[kind]})" if kind in REMEDIES else text


ASK_SECONDS = (60.0, 86400.0, 21600.0)      # ARI: the shortest and longest wait that a CA may ask for, and without


def parse_window(found: Json) -> Window | None:
    """The suggestedWindow of a renewalInfo (RFC 9773 section 4.2); None for one that makes no sense."""
    import datetime
    window = found.get("suggestedWindow")
    times = []
    for key in ("start", "end"):
        text = str(window.get(key)) if isinstance(window, dict) else ""
        try:
            at = datetime.datetime.fromisoformat(re.sub(r"\.\d+", "", text.upper()).replace("Z", "+00:00"))
            times.append(at.timestamp())
        except (ValueError, OverflowError):
            return None
    about = found.get("explanationURL")
    if times[0] >= times[1]:
        return None
    return Window(times[0], times[1], printable(about)[:300] if isinstance(about, str) else "")


def mac_key(text: str) -> bytes:
    """A MAC key as CAs hand it out: base64url or base64, padded or not, with blanks in it."""
    import base64
    plain = "".join(text.split()).replace("+", "-").replace("/", "_").rstrip("=")
    return base64.urlsafe_b64decode(plain + "=" * (-len(plain) % 4))


class Applicant(NamedTuple):
    """What a new account is made with: contact, and the account elsewhere that it is bound to."""
    contact: Sequence[str]
    kid: str
    mac: str
    mac_algorithm: str


def bound(key: PrivateKey, who: Applicant, url: str) -> Json:
    """The externalAccountBinding of an account key (section 7.3.4)."""
    import hashlib
    import hmac
    protected = base64url(json.dumps({"alg": who.mac_algorithm, "kid": who.kid, "url": url}).encode())
    payload = base64url(json.dumps(json_web_key(key)).encode())
    try:
        secret = mac_key(who.mac)
    except ValueError as error:
        raise PemError("eab_hmac: the MAC key is not base64") from error
    digest = hmac.new(secret, f"{protected}.{payload}".encode(), getattr(hashlib, f"sha{who.mac_algorithm[2:]}"))
    return {"protected": protected, "payload": payload, "signature": base64url(digest.digest())}


def alternates(response: Response) -> list[str]:
    """The URLs of the other chains that a CA offers (section 7.4.2)."""
    links = ",".join(response.headers.get_all("Link") or [])
    return re.findall(r'<([^<>]+)>\s*;[^<]*rel="?alternate"?', links)[:10]


class Client:
    """One account at one CA; several workers use it, and as many connections as they need at once."""

    def __init__(self, url: str, world: World, connect: Callable[[], Http]) -> None:
        import collections
        import threading
        self.url = url
        self.world = world
        self.connect = connect
        self.key = cast("PrivateKey", None)     # of the account, once it is open
        self.account = ""
        self.idle: collections.deque[Http] = collections.deque()
        self.guard = threading.Lock()
        self.nonces: collections.deque[str] = collections.deque(maxlen=64)
        try:
            self.directory = self.fetch_directory()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self.idle:
            self.idle.pop().close()

    def send(self, method: str, url: str, body: bytes | None = None) -> Response:
        """One request; keeps the nonce that comes back, whatever else does (section 6.5)."""
        headers = {"Content-Type": "application/jose+json"} if body is not None else {}
        try:
            http = self.idle.pop()
        except IndexError:
            http = self.connect()
        try:
            response = http.request(method, url, body, headers)
        finally:
            self.idle.append(http)
        log.detail(f"{method} {url}: {response.status}")
        nonce = response.headers.get("Replay-Nonce") or ""
        if TOKEN.fullmatch(nonce):
            self.nonces.append(nonce)
        if 300 <= response.status < 400:
            target = printable(response.headers.get("Location") or "nowhere")
            raise NetworkError(f"{url}: redirects to {target}; redirects are not followed, give the right URL")
        return response

    def fetch_directory(self) -> Directory:
        """The directory of the CA."""
        log(f"fetching directory at {self.url}")
        response = self.send("GET", self.url)
        if response.status != 200:
            raise NetworkError(f"{self.url}: HTTP status {response.status} where an ACME directory should be")
        found = read_object(response, self.url)
        meta = found.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        profiles = meta.get("profiles")
        needed = [self.own_url(found.get(key), key) for key in ("newNonce", "newAccount", "newOrder")]
        others = [self.own_url(found[key], key) if key in found else ""
                  for key in ("keyChange", "revokeCert", "renewalInfo")]
        return Directory(needed[0], needed[1], needed[2], others[0], others[1], others[2],
                         printable(str(meta.get("termsOfService") or "")),
                         profiles if isinstance(profiles, dict) else {})

    def own_url(self, value: object, what: str) -> str:
        """A URL that the CA gave, if it is https and of the CA's host."""
        import urllib.parse
        try:
            at, own = urllib.parse.urlsplit(str(value)), urllib.parse.urlsplit(self.url)
            if isinstance(value, str) and value.isascii() and (at.scheme, at.netloc) == ("https", own.netloc):
                return value
        except ValueError:
            pass
        raise ProtocolError(f"{self.url}: the CA gave {printable(repr(value))[:100]} as its {what}, "
                           "not an https URL of its own host")

    def nonce(self) -> str:
        """A fresh nonce (section 7.2)."""
        for _ in range(FAULT_TRIES * 2):        # another worker may take the one that was asked for
            try:
                return self.nonces.pop()
            except IndexError:
                self.send("HEAD", self.directory.new_nonce)
        raise NetworkError(f"{self.directory.new_nonce}: the CA gave no nonce")

    def post(self, url: str, payload: Json | None, by: PrivateKey | None = None) -> Response:
        """A signed request, sent again for a refused nonce or a passing fault; AcmeError for a refusal.

        It is signed by the account, or by a key that stands for itself.
        """
        identity: Json = {"jwk": json_web_key(by)} if by else {"kid": self.account}
        tries = faults = 0
        while True:
            tries += 1
            header = {**identity, "nonce": self.nonce(), "url": url}
            response = self.send("POST", url, signed(by or self.key, header, payload))
            if response.status < 400:
                return response
            try:
                problem = read_object(response, url)
            except NetworkError:
                problem = {"detail": f"HTTP status {response.status} from {url}"}
            if problem_kind(problem) == "badNonce" and tries < NONCE_TRIES:
                continue
            faults += 1
            wait = asked_wait(response, self.world.now())
            pause = max(wait, 0.5 * faults)
            if response.status < 500 or faults == FAULT_TRIES or pause > PATIENCE_SECONDS:
                raise self.refusal(response, problem, wait)
            self.world.sleep(pause)

    def refusal(self, response: Response, problem: Json, wait: float) -> WucmeError:
        """The error for an answer that says no, or for a CA that is out of order."""
        if response.status >= 500 and problem_kind(problem) != "rateLimited":
            return NetworkError(f"{self.url}: the CA is out of order: {problem_text(problem)}")
        kind = problem_kind(problem)
        return AcmeError(with_remedy(problem_text(problem), kind), kind, wait)

    def register(self, who: Applicant, agreed: bool) -> str:
        """The URL of this key's account, made if `agreed` and there is none yet; "" if there is none (7.3)."""
        payload: Json = {"termsOfServiceAgreed": True} if agreed else {"onlyReturnExisting": True}
        if who.contact and agreed:
            payload["contact"] = [f"mailto:{address}" for address in who.contact]
        if who.kid and agreed:
            payload["externalAccountBinding"] = bound(self.key, who, self.directory.new_account)
        log(f"{'making or finding the' if agreed else 'looking for an'} account at {self.directory.new_account}")
        try:
            response = self.post(self.directory.new_account, payload, by=self.key)
        except AcmeError as error:
            if error.kind == "accountDoesNotExist" and not agreed:
                return ""
            raise
        self.account = self.own_url(response.headers.get("Location"), "account")
        log(f"account location: {self.account}")
        return self.account

    def account_object(self, change: Json | None = None) -> Json:
        """The account as the CA has it, after a change if one is given (sections 7.3.2, 7.3.6)."""
        return read_object(self.post(self.account, change), self.account)

    def change_key(self, new: PrivateKey) -> None:
        """Have the account answer to another key from now on (section 7.3.5)."""
        inner = signed(new, {"jwk": json_web_key(new), "url": self.directory.key_change},
                       {"account": self.account, "oldKey": json_web_key(self.key)})
        self.post(self.directory.key_change, json.loads(inner))
        self.key = new

    def revoke(self, certificate: bytes, reason: int, by: PrivateKey | None = None) -> None:
        """Revoke a certificate (DER), by the account or by the certificate's own key (section 7.6)."""
        payload = {"certificate": base64url(certificate), "reason": reason}
        try:
            self.post(self.directory.revoke, payload, by=by)
        except AcmeError as error:
            if error.kind != "alreadyRevoked":
                raise

    def register_again(self, lost: str, who: Applicant) -> None:
        """Make the account anew with the same key, once, when the CA has lost it."""
        with self.guard:
            if self.account == lost:
                self.register(who, True)

    def new_order(self, names: Sequence[str], profile: str = "", replaces: str = "") -> Order:
        """A new order for these names (section 7.4), by a profile, in place of an old certificate (RFC 9773, 5)."""
        if profile and profile not in self.directory.profiles:
            raise SettingsError(f"{self.url}: the CA has no profile {profile}, but "
                            + (", ".join(map(printable, self.directory.profiles)) or "none at all"))
        identifiers = [{"type": "ip" if is_address(name) else "dns", "value": name} for name in names]
        payload: Json = {"identifiers": identifiers, **({"profile": profile} if profile else {})}
        try:
            response = self.post(self.directory.new_order, {**payload, **({"replaces": replaces} if replaces else {})})
        except (AcmeError, NetworkError) as error:
            if not replaces or getattr(error, "kind", "") in ("rateLimited", "accountDoesNotExist"):
                raise
            log(f"{names[0]}: the CA does not take the order as a replacement; once more without: {error}")
            response = self.post(self.directory.new_order, payload)
        url = self.own_url(response.headers.get("Location"), "order")
        return self.parse_order(url, read_object(response, url), names)

    def fetch_order(self, url: str, names: Sequence[str]) -> tuple[Order, float]:
        """An order as it stands now, and the seconds to wait before the next look."""
        response = self.post(url, None)
        return self.parse_order(url, read_object(response, url), names), asked_wait(response, self.world.now())

    def parse_order(self, url: str, found: Json, names: Sequence[str]) -> Order:
        """An order, if it is for the names that were asked for and no larger than they need."""
        parts = found.get("identifiers")
        values = {str(part.get("value")).lower() for part in (parts if isinstance(parts, list) else [])
                  if isinstance(part, dict)}
        if values != set(names):
            raise ProtocolError(f"{url}: the CA made an order for {printable(' '.join(sorted(values)))[:200]}, "
                               f"not for {' '.join(names)}")
        urls = found.get("authorizations")
        if not isinstance(urls, list) or not 1 <= len(urls) <= len(names):
            raise ProtocolError(f"{url}: the CA wants {len(urls) if isinstance(urls, list) else 'no'} "
                               f"authorizations for {len(names)} names")
        certificate, error = found.get("certificate"), found.get("error")
        return Order(url, str(found.get("status")), tuple(self.own_url(one, "authorization") for one in urls),
                     self.own_url(found.get("finalize"), "finalize"),
                     self.own_url(certificate, "certificate") if certificate else "",
                     error if isinstance(error, dict) else {})

    def authorization(self, url: str, names: Sequence[str]) -> Authorization:
        """An authorization, with its http-01 challenge; others are passed over (section 7.5)."""
        found = read_object(self.post(url, None), url)
        who = found.get("identifier")
        name = str(who.get("value") if isinstance(who, dict) else "").lower()
        if name not in {one[2:] if one.startswith("*.") else one for one in names}:
            raise ProtocolError(f"{url}: the CA wants an authorization for {printable(name)[:100]!r}, not asked for")
        challenge, errors = None, []
        listed = found.get("challenges")
        for one in listed if isinstance(listed, list) else []:
            if not isinstance(one, dict):
                continue
            if isinstance(one.get("error"), dict):
                errors.append(one["error"])
            if one.get("type") == "http-01":
                token = one.get("token")
                if not isinstance(token, str) or not TOKEN.fullmatch(token):
                    raise ProtocolError(f"{url}: the CA sent a token that is none: {printable(repr(token))[:100]}")
                challenge = Challenge(self.own_url(one.get("url"), "challenge"), token, str(one.get("status")))
        return Authorization(name, str(found.get("status")), challenge, tuple(errors))

    def renewal_window(self, name: str) -> tuple[Window | None, float]:
        """The window that the CA suggests for a certificate, None for none, and the seconds to the next question."""
        url = f"{self.directory.renewal_info.rstrip('/')}/{name}"
        response = self.send("GET", url)
        if response.status != 200:
            raise NetworkError(f"{url}: HTTP status {response.status} where renewal information should be")
        wait = asked_wait(response, self.world.now()) or ASK_SECONDS[2]
        return parse_window(read_object(response, url)), min(max(wait, ASK_SECONDS[0]), ASK_SECONDS[1])

    def settle(self, order: Order, names: Sequence[str], busy: Sequence[str], until: float,
               asked: threading.Event | None = None) -> Order:
        """Look at an order until it leaves the `busy` states; NetworkError at the deadline (section 7.4)."""
        pause, wait = POLL_SECONDS[0], 0.0
        while True:
            if asked is not None and asked.wait(pause):
                asked.clear()
                pause = ASKED_SECONDS
            order, wait = self.fetch_order(order.url, names)
            if order.status not in busy:
                return order
            if self.world.monotonic() + max(wait, pause) > until:
                raise NetworkError(f"the CA left the order {order.status} until the deadline; a later run goes on "
                                   f"with it ({order.url})")
            if asked is None or wait:
                self.world.sleep(max(wait, pause))
            pause = min(pause * 2, POLL_SECONDS[1])

    def complaint(self, order: Order, names: Sequence[str]) -> AcmeError:
        """Why an order turned invalid, name by name."""
        problems = [(f"{found.name}: ", problem) for found in
                    (self.authorization(url, names) for url in order.authorizations) for problem in found.errors]
        problems = problems or [("", order.error)]
        kind = problem_kind(problems[0][1])
        text = "; ".join(f"{who}{problem_text(problem)}" for who, problem in problems)
        return AcmeError(with_remedy(text, kind), kind)


def authorize(client: Client, order: Order, names: Sequence[str], answers: Answers, until: float) -> Order:
    """Prove control of every name of an order; the order comes back as the CA left it (section 7.5)."""
    import threading
    if order.status != "pending":
        return order
    pending, asked = [], threading.Event()
    for url in order.authorizations:
        log(f"{names[0]}: retrieving authorization at {url}")
        found = client.authorization(url, names)
        if found.status != "pending":
            continue
        if found.challenge is None:
            raise ListenerError(f"{found.name}: the CA offers no http-01 challenge for it")
        pending.append(found.challenge)
    try:
        for one in pending:
            answers.publish(one.token, f"{one.token}.{thumbprint(client.key)}", asked)
        for one in [one for one in pending if one.status == "pending"]:
            log(f"{names[0]}: starting challenge at {one.url}")
            client.post(one.url, {})
        log(f"{names[0]}: polling order status at {order.url}")
        order = client.settle(order, names, ("pending",), until, asked if pending else None)
        if order.status == "invalid":
            unheard = [one.token for one in pending if one.token not in answers.heard]
            log(f"{names[0]}: " + ("no request of the CA came to the listener here" if len(unheard) == len(pending)
                                   else "the CA has asked the listener here, and was answered"))
        return order
    finally:
        for one in pending:
            answers.withdraw(one.token)


def choose_chain(client: Client, first: Response, preferred: str) -> bytes:
    """The chain that is preferred, of all that the CA offers; its first where none is."""
    if not preferred or chain_matches(first.body, preferred):
        return first.body
    for url in alternates(first):
        body = client.post(client.own_url(url, "alternate chain"), None).body
        if chain_matches(body, preferred):
            return body
    log(f"chain = {preferred}: the CA offers no such chain; its default is taken")
    return first.body


def finish(client: Client, order: Order, names: Sequence[str], request: bytes, until: float) -> Response:
    """Hand in the request of a ready order and fetch the chain (sections 7.4, 7.4.2)."""
    if order.status == "ready":
        log(f"{names[0]}: finalizing order at {order.finalize}")
        client.post(order.finalize, {"csr": base64url(request)})
        order = client.settle(order, names, ("processing", "ready"), until)
    elif order.status == "processing":
        order = client.settle(order, names, ("processing",), until)
    if order.status == "invalid":
        raise client.complaint(order, names)
    if order.status != "valid" or not order.certificate:
        raise NetworkError(f"{order.url}: the CA calls the order {printable(order.status)[:40]!r} and "
                           "gives no certificate")
    log(f"{names[0]}: retrieving certificate at {order.certificate}")
    return client.post(order.certificate, None)


# === 10. store: how a new certificate becomes the live one ======================================
# A switch is a list of steps, made first and done after, each one whole by itself: at every instant
# both live paths hold a pair that fits. Recovery has nothing of its own to do but to sweep.

class Step(NamedTuple):
    """One thing to do, in words and as a call of the files section."""
    text: str
    act: Callable[..., None]
    arguments: tuple[Any, ...]

    def do(self) -> None:
        """Do it."""
        self.act(*self.arguments)


def put(path: str, data: bytes, like: Owner) -> list[Step]:
    """The steps that replace the content of a live path."""
    return [Step(f"saving to {path}_tmp", create, (f"{path}_tmp", data, like)),
            Step(f"renaming {path}_tmp to {path}", rename, (f"{path}_tmp", path))]


def is_linked(entry: Entry) -> bool:
    """Whether the key path is a link to the chain file, which holds both."""
    return os.path.islink(entry.key) and os.readlink(entry.key) in (entry.chain, os.path.basename(entry.chain))


def back_ups(paths: Iterable[str], stamp: str) -> list[Step]:
    """The steps that keep what these live paths hold."""
    return [Step(f"backed up {path} as {path}_{stamp}", back_up, (path, f"{path}_{stamp}"))
            for path in paths if os.path.exists(path)]


def put_plain(entry: Entry, chain: bytes) -> list[Step]:
    """The steps that put a chain alone into the chain file, which is no secret any more if it held a key."""
    held_key = os.path.exists(entry.chain) and private_key(read(entry.chain))
    like = owner(entry.chain, 0o644)
    return put(entry.chain, chain, like._replace(mode=0o644) if held_key else like)


def put_key(entry: Entry, key: bytes) -> list[Step]:
    """The steps that put a key into the key file; one that waits beside it is the only copy, and is but renamed."""
    waiting = f"{entry.key}_tmp"
    steps = put(entry.key, key, owner(entry.key, 0o600))
    return steps[1:] if os.path.exists(waiting) and read(waiting) == key else steps


def switch(entry: Entry, chain: bytes, key: bytes, stamp: str) -> list[Step]:
    """The steps that make a checked chain and its key the live pair of an entry."""
    chain = b"".join(certificates(chain))
    rotate, linked = entry.wanted.rotate, is_linked(entry)
    old_key = private_key(read(entry.key)) if entry.whole else b""
    same = old_key == private_key(key)
    first = back_ups([entry.chain] if same or linked else [entry.key, entry.chain], stamp)
    if same and not linked and not rotate:
        return first + put_plain(entry, chain)
    last = [] if rotate else put_key(entry, key) + put_plain(entry, chain)
    if not entry.whole and not rotate:
        return first + last
    # The key changes under a live pair: through one file that holds both, and a link to it.
    secret = owner(entry.key, 0o600)
    both = put(entry.chain, key + chain, secret)
    if not linked:
        old_chain = b"".join(certificates(read(entry.chain))) if entry.whole else b""
        first += put(entry.chain, old_key + old_chain, secret) if entry.whole else both
        first.append(Step(f"linking {entry.key} to {entry.chain}", link,
                          (os.path.basename(entry.chain), entry.key, f"{entry.chain}_tmp")))
    return first + (both if entry.whole or linked else []) + last


def prune(path: str, keep: int) -> None:
    """Delete all but the newest backups of a live path."""
    directory, base = os.path.split(path)
    form = re.compile(re.escape(base) + r"_\d{16}")
    for name in sorted((name for name in os.listdir(directory) if form.fullmatch(name)), reverse=True)[keep:]:
        remove(os.path.join(directory, name))


def remember(directory: str, entry: Entry, **changes: Any) -> Entry:
    """Write the memory of a certificate, if it is other than what is written already."""
    memory = entry.memory._replace(**changes)
    if memory != entry.written:
        replace(state_path(directory, entry.name), json.dumps(memory._asdict()).encode())
    return entry._replace(memory=memory, written=memory)


def sweep(directory: str) -> list[str]:
    """Delete what a killed run left: files never made live, and published tokens; a key whose order goes on stays."""
    stale = [os.path.join(directory, name) for name in os.listdir(directory)
             if name[:6].lower() == "wucme_" and name.endswith("_tmp") and not name.startswith("wucme_k_account")
             and not (name[6:8].lower() == "k_" and read_memory(state_path(directory, name[8:-8])).order)]
    tokens = os.path.join(directory, "tokens")
    if os.path.isdir(tokens) and not os.path.islink(tokens):
        stale += [os.path.join(tokens, name) for name in os.listdir(tokens) if TOKEN.fullmatch(name)]
    gone = []
    for path in stale:
        with contextlib.suppress(OSError):      # not ours: a directory, say
            os.unlink(path)
            gone.append(path)
    return gone


class Account(NamedTuple):
    """Where the account at one CA is kept."""
    key: str
    state: str


def account_files(directory: str, server: str, url: str, first: bool) -> Account:
    """The account files of a CA: the plain ones if they are recorded as its own, or as nobody's if it is first."""
    names = {name.lower(): name for name in os.listdir(directory)}
    plain = Account(os.path.join(directory, names.get("wucme_k_account.pem", "wucme_k_account.pem")),
                    state_path(directory, "account"))
    recorded = read_json(plain.state).get("directory")
    if recorded == url or (first and not isinstance(recorded, str)):
        return plain
    return Account(os.path.join(directory, f"wucme_k_account_{server}.pem"),
                   state_path(directory, f"account_{server}"))


# === 11. load: what is owed to the servers ======================================================
# An item is owed by this host as long as the certificate on disk is not the one that it last did
# with success. There is no other way in which anything is loaded.

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
UNIT = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*")


# postfix check tells its log alone what is wrong.
POSTFIX_TEST = 'postconf >/dev/null || exit; postfix check || { echo "see the log of postfix"; exit 1; }'
STAMP = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*Z?:? *")


class Standard(NamedTuple):
    """A server that `+` knows: how to find it, test its configuration, and have it read its files again."""
    commands: tuple[str, ...]           # names of its processes
    test: tuple[str, ...]               # "" is the program that runs; none where the reload refuses what is bad
    options: tuple[str, ...]            # those of its own options (with a value) that test and reload must repeat
    reload: signal.Signals | tuple[str, ...]
    web: bool = True                    # whether a bare + means it
    path: str = ""                      # what its program's path has in it, where its name says little


STANDARD = {
    "nginx": Standard(("nginx",), ("", "-t", "-q"), ("-c", "-p"), signal.SIGHUP),
    "apache": Standard(("apache2", "httpd"), ("", "-t"), ("-d", "-f", "-D", "-C", "-c"), signal.SIGUSR1),
    "haproxy": Standard(("haproxy",), ("", "-c"), ("-f", "-C"), signal.SIGUSR2),
    "caddy": Standard(("caddy",), (), ("--config", "-config", "-c", "--adapter", "-adapter", "-a"),
                      ("", "reload", "--force")),
    "lighttpd": Standard(("lighttpd",), ("", "-tt"), ("-f", "-m"), signal.SIGUSR1),
    "postfix": Standard(("master",), ("/bin/sh", "-c", POSTFIX_TEST), (), ("postfix", "reload"), False, "postfix"),
    "dovecot": Standard(("dovecot",), ("doveconf", "-x", "-h", "base_dir"), ("-c",), signal.SIGHUP, False),
}
WHATS = {"chain": False, "cert": False, "issuers": False, "key": True, "pair": True, "p12": True}   # is a key in it?
CONNECT_SECONDS = 10.0


class Item(NamedTuple):
    """One item of a load list: what it acts on, and how."""
    text: str
    argv: tuple[str, ...]
    options: Mapping[str, str] = {}


Parsed = tuple[tuple[str, ...], Mapping[str, str]]      # the last two of an Item


def parse_standard(rest: str) -> Parsed:
    """+: a known server, a unit of systemd, or nothing for all web servers."""
    words = rest.split()
    if not words:
        return tuple(name for name, kind in STANDARD.items() if kind.web), {}
    if rest in STANDARD or (words[0] == "systemd" and len(words) == 2 and UNIT.fullmatch(words[1])):
        return tuple(words), {}
    known = [*STANDARD, "systemd UNIT"]
    raise ValueError(f"no such server{nearest(rest, known)} + knows {', '.join(known)}")


def parse_procedure(rest: str) -> Parsed:
    """@: a file with arguments."""
    import shlex
    argv = shlex.split(rest)
    if not argv or not argv[0].startswith("/"):
        raise ValueError("@ needs the whole path of a file")
    return tuple(argv), {}


def parse_command(rest: str) -> Parsed:
    """$: a line for the shell."""
    if not rest:
        raise ValueError("$ needs a shell command")
    return ("/bin/sh", "-c", rest), {}


def parse_options(rest: str, form: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A place with {name} in it perhaps, and what is said of it: WORD or KEY=VALUE, each once."""
    import shlex
    words = shlex.split(rest)
    options: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key + equals not in known or key in options or bool(equals) != bool(value):
            raise ValueError(f"{word!r} must be one of {' '.join(known)}, once and with its value")
        options[key] = value
    if not words or re.search("[{}]", words[0].replace("{name}", "")):
        raise ValueError(f"must be {form}, and only {{name}} is replaced in it")
    return words[0], options


def parse_copy(rest: str) -> Parsed:
    """>: where a copy goes, of what, with which mode and owner."""
    place, options = parse_options(rest, "> FILE", ("what=", "mode=", "owner=", "password_file="))
    what = options.setdefault("what", "chain")
    secret = WHATS.get(what, False)
    mode = options.setdefault("mode", "0600" if secret else "0644")
    for wrong, remedy in (
            (not place.startswith("/") or place.endswith("/"), "> needs the whole path of a file"),
            (what not in WHATS, f"what={what}: must be one of {', '.join(WHATS)}"),
            (not re.fullmatch("0?[0-7]{3}", mode), f"mode={mode}: must be three octal digits, such as 0640"),
            (secret and mode[-1] != "0", f"mode={mode} would give the key to everyone; end it in 0"),
            ((what == "p12") != ("password_file" in options), "what=p12 and password_file= go together"),
            (not options.get("password_file", "/").startswith("/"), "password_file= needs a whole path"),
            (options.get("owner", "x").count(":") > 1, "owner= must be USER, USER:GROUP or :GROUP")):
        if wrong:
            raise ValueError(remedy)
    return (place,), options


def parse_proof(rest: str) -> Parsed:
    """?: where a server is asked for its certificate, by which name and protocol."""
    place, options = parse_options(rest, "? HOST:PORT", ("sni=", "starttls=", "all"))
    at = some_addresses(place)
    if not at or not at[0][0]:
        raise ValueError("? needs HOST:PORT")
    protocol = options.get("starttls", "")
    if protocol not in STARTTLS:
        raise ValueError(f"starttls={protocol}: must be one of {', '.join(filter(None, STARTTLS))}")
    return (at[0][0], str(at[0][1])), options


class Loaded(NamedTuple):
    """What one item was last done for, and what is wrong since when."""
    fingerprint: str = ""
    problem: str = ""
    since: float = 0.0


class Alarm(NamedTuple):
    """What an item of `alert` was last told, and when."""
    problems: tuple[str, ...] = ()
    at: float = 0.0


def machine_id() -> str:
    """A digest of what makes this machine this machine."""
    import hashlib
    try:
        text = read("/etc/machine-id")
    except FileError:
        text = os.uname().nodename.encode()
    return hashlib.sha256(b"wucme " + text).hexdigest()[:32]


class Ledger:
    """What this host has loaded, by certificate and item, and whom it has alarmed; written down as it happens."""

    def __init__(self, directory: str, host: str) -> None:
        self.path = os.path.join(directory, f"wucme_l_{host}.json")
        self.machine = machine_id()
        found = read_json(self.path)
        self.stranger = bool(found) and found.get("machine") != self.machine
        self.records: dict[str, dict[str, Loaded]] = {}
        self.alarms: dict[str, Alarm] = {}
        held, told = (found.get(key) if not self.stranger else None for key in ("certificates", "alarms"))
        for name, items in (held.items() if isinstance(held, dict) else ()):
            if isinstance(items, dict):
                self.records[name] = {text: Loaded(*about) for text, about in items.items()
                                      if isinstance(about, list) and list(map(type, about)) == [str, str, float]}
        for text, about in (told.items() if isinstance(told, dict) else ()):
            if isinstance(about, list) and list(map(type, about)) == [list, float]:
                self.alarms[text] = Alarm(tuple(about[0]), about[1])
        self.saved = "" if self.stranger else self.text()

    def text(self) -> str:
        """All of it, as it is written down."""
        return json.dumps({"machine": self.machine, "certificates": self.records, "alarms": self.alarms})

    def owes(self, entry: Entry, item: str) -> bool:
        """Whether an item is still to be done for the certificate on disk."""
        done = self.records.get(entry.name, {}).get(item)
        return entry.facts is not None and (done is None or done.fingerprint != entry.facts.fingerprint)

    def strike(self, entry: Entry, item: str, problem: str, now: float) -> bool:
        """Note how an item ended; whether that is news. After a failed proof reloads are owed again."""
        items = self.records.setdefault(entry.name, {})
        before = items.get(item, Loaded())
        if problem:
            items[item] = before._replace(problem=problem, since=before.since if before.problem else now)
        else:
            items[item] = Loaded(entry.facts.fingerprint if entry.facts else "")
        if problem and item[0] == "?":
            items.update({text: about._replace(fingerprint="") for text, about in items.items() if text[0] in "+?"})
        return not problem or before.problem != problem

    def forget(self, entries: Mapping[str, Entry]) -> None:
        """Drop the items that no list has any more."""
        for name in list(self.records):
            items = self.records[name]
            wanted = entries[name].wanted.load if name in entries else ()
            self.records[name] = {text: about for text, about in items.items() if text in wanted}
            if not self.records[name]:
                del self.records[name]

    def save(self) -> None:
        """Write it, if anything in it is new."""
        text = self.text()
        if text != self.saved:
            replace(self.path, text.encode())
            self.saved = text


class Duty(NamedTuple):
    """One item to be done now, for these certificates."""
    item: Item
    entries: list[Entry]


def in_order(lists: Iterable[Sequence[str]]) -> list[str]:
    """The items of several lists, each once, so that every list's own order is kept where that can be."""
    import graphlib
    found = list(dict.fromkeys(tuple(one) for one in lists))
    before: dict[str, list[str]] = {}
    for one in found:
        for place, text in enumerate(one):
            before.setdefault(text, []).extend(one[max(0, place - 1):place])
    if len(found) > 1:
        with contextlib.suppress(graphlib.CycleError):
            return list(graphlib.TopologicalSorter(before).static_order())
    return list(before)


def server_name(item: Item, entry: Entry) -> str:
    """The name that a proof asks the server for: sni, else the host; for an address a name of the certificate."""
    host, names = item.argv[0].replace("{name}", entry.name), entry.facts.names if entry.facts else ()
    if "sni" in item.options or host in names or not is_address(host):
        return item.options.get("sni", host).replace("{name}", entry.name)
    return names[0].replace("*", "www") if names else host


def concerns(item: Item, entry: Entry) -> bool:
    """Whether an item is for a certificate: a proof that is asked for in general, only if it has that name."""
    if item.text[0] != "?" or "load" in entry.own:
        return True
    name, names = server_name(item, entry).lower(), entry.facts.names if entry.facts else ()
    return name in names or f"*.{name.partition('.')[2]}" in names


def duties(entries: Iterable[Entry], items: Mapping[str, Item], due: Callable[[Entry, str], bool]) -> list[Duty]:
    """What is to be done now, in order: + once for all certificates, the others once for each."""
    whole = [entry for entry in entries if entry.whole]
    found = []
    for text in in_order(entry.wanted.load for entry in whole):
        owing = [entry for entry in whole if text in entry.wanted.load and concerns(items[text], entry)
                 and due(entry, text)]
        groups = [owing] if KINDS[text[0]].once and owing else [[entry] for entry in owing]
        found += [Duty(items[text], group) for group in groups]
    return found


def child_environment() -> dict[str, str]:
    """The caller's environment, with a PATH that cron's lacks."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}:{SBIN}"}


def load_environment(entry: Entry, directory: str, host: str) -> dict[str, str]:
    """What a procedure or command is told of the certificate that it is run for."""
    about = entry.facts
    return {**child_environment(), "WUCME_NAME": entry.name, "WUCME_NAMES": " ".join(about.names if about else ()),
            "WUCME_CERT": entry.chain, "WUCME_KEY": entry.key, "WUCME_DIRECTORY": directory, "WUCME_HOST": host,
            "WUCME_FINGERPRINT": about.fingerprint if about else ""}


def own_options(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """Those of these options of a command line that it has, with their values."""
    words = argv[0].partition("master process ")[2].split() if len(argv) == 1 else list(argv)
    kept = []
    for word, following in zip(words[1:], [*words[2:], ""]):
        if word in options:
            kept += [word, following]
        elif word.partition("=")[0] in options or word[:2] in options:
            kept.append(word)
    return kept


def server_command(kind: Standard, argv: Sequence[str], master: Process, timeout: float, world: World) -> Finished:
    """Run a command about a server as the server itself runs: program, options, environment, directory, user."""
    program = proc_link(master.pid, "exe").replace(" (deleted)", "") or kind.commands[0]
    variables = (pair.partition("=") for pair in proc_text(master.pid, "environ").split("\0"))
    # What haproxy's master tells itself would have the test wait instead of reading its configuration.
    environment = {name: value for name, equals, value in variables
                   if equals and not name.startswith("HAPROXY_MWORKER")} or child_environment()
    where = proc_link(master.pid, "cwd")
    return world.command([argv[0] or program, *argv[1:], *own_options(master.argv, kind.options)], environment,
                         timeout, cwd=where if os.path.isdir(where) else "/", **credentials(master.pid))


def with_last_line(finished: Finished) -> str:
    """The problem of a command with the last that it said, "" for none."""
    said = [line for line in finished.output if line.strip()][-1:] if finished.problem else []
    return STAMP.sub("", ": ".join([finished.problem, *said]))[:500]       # or each failure would be news


def unit_of(master: Process, timeout: float, world: World) -> str:
    """The unit of systemd that a server is the main process of, if it can be reloaded, or ""."""
    unit = re.search(r"(?m)/([^/\n]+\.service)$", proc_text(master.pid, "cgroup"))
    if not unit or not os.path.isdir("/run/systemd/system"):
        return ""
    told = world.command(["systemctl", "show", "--property=MainPID,CanReload", unit[1]], child_environment(), timeout)
    return unit[1] if {f"MainPID={master.pid}", "CanReload=yes"} <= set(told.output) else ""


def reload_server(name: str, master: Process, timeout: float, world: World) -> str:
    """Test the configuration of one running server and have it reload; the problem, or ""."""
    kind, who = STANDARD[name], f"{name} (pid {master.pid})"
    tested = Finished("", [])
    for pause in (1.0, 0.0) if kind.test else ():
        tested = server_command(kind, kind.test, master, timeout, world)
        if not tested.problem:
            break
        # It may have opened one of two files before a rename and the other after it.
        world.sleep(pause)
    if tested.problem:
        for line in tested.output:
            log(f"+{name}: {line}")
        return f"{who} was not reloaded, its configuration test failed: {with_last_line(tested)}"
    unit = unit_of(master, timeout, world)
    if unit:
        return with_last_line(world.command(["systemctl", "reload", unit], child_environment(), timeout))
    if isinstance(kind.reload, tuple):
        return with_last_line(server_command(kind, kind.reload, master, timeout, world))
    if not catches(master.pid, kind.reload):
        hint = "; start it with -W" if name == "haproxy" else ""
        return f"{who} cannot be told to reload: it takes no {kind.reload.name}{hint}"
    try:
        os.kill(master.pid, kind.reload)
    except OSError as error:
        return f"{who} cannot be told to reload: {error.strerror}"
    return ""


def standard_load(duty: Duty, _: RunScope, world: World) -> str:
    """Reload the servers of a + item that run here; the problems, or ""."""
    names, timeout = duty.item.argv, duty.entries[0].wanted.load_timeout
    if names[0] == "systemd":
        return with_last_line(world.command(["systemctl", "try-reload-or-restart", names[1]], child_environment(),
                                            timeout))
    problems, running = [], []
    for name in names:
        found = [one for one in processes(STANDARD[name].commands) if STANDARD[name].path in one.argv[0]]
        for master in [one for one in found if one.parent not in {other.pid for other in found}]:
            running.append(name)
            problems.append(reload_server(name, master, timeout, world))
    if not running:
        log(f"{duty.item.text}: no {' or '.join(names)} runs here; it reads the new files when it starts")
    return "; ".join(filter(None, problems))


def run_item(item: Item, environment: Mapping[str, str], timeout: float, world: World, *, title: str,
             data: bytes = b"") -> str:
    """Run a procedure or command with something to read; the problem, or ""."""
    if os.geteuid() == 0 and item.text[0] == "@" and anyone_may_write(item.argv[0]):
        return f"{item.argv[0]}: anyone may write this file, and root would run it; chmod o-w {item.argv[0]}"
    finished = world.command(item.argv, environment, timeout, data)
    for line in finished.output:
        log(f"{title}: {item.text[:40]}: {line}")
    return with_last_line(finished)


def procedure(duty: Duty, run: RunScope, world: World) -> str:
    """Run an @ or $ item for its certificate; the problem, or ""."""
    entry = duty.entries[0]
    return run_item(duty.item, load_environment(entry, run.directory, run.host), entry.wanted.load_timeout, world,
                    title=entry.title)


def destination(item: Item, entry: Entry) -> str:
    """The path of the copy that a > item makes of a certificate."""
    return os.path.normpath(item.argv[0].replace("{name}", entry.name))


def copy_owner(text: str, mode: str) -> Owner:
    """Mode and owner of a copy, by their names on this host; what is not named is ours."""
    import grp
    import pwd
    user, _, group = text.partition(":")
    try:
        return Owner(int(mode, 8), pwd.getpwnam(user).pw_uid if user else os.geteuid(),
                     grp.getgrnam(group).gr_gid if group else os.getegid())
    except KeyError as error:
        raise FileError(f"owner={text}: no such user or group on this host") from error


def write_copy(duty: Duty, _: RunScope, __: World) -> str:
    """Put the copy of a > item in place; WucmeError for what is in the way."""
    entry, options = duty.entries[0], duty.item.options
    what, path = options["what"], destination(duty.item, entry)
    # From parsed blocks: the chain file may hold the key too.
    chain, key = certificates(read(entry.chain)), private_key(read(entry.key))
    data = b"".join({"cert": chain[:1], "issuers": chain[1:], "key": [key], "pair": [key, *chain]}.get(what, chain))
    if what == "p12":
        pair, password = b"".join([key, *chain]), read(options["password_file"]).strip(b"\r\n")
        held = read(path) if os.path.isfile(path) else b""
        if not password:
            return f"{options['password_file']}: holds no password"
        data = held if p12_holds(held, pair, password) else make_p12(pair, entry.title, password)
    if not data:
        return f"there are no {what} in {entry.chain}"
    deploy(path, data, copy_owner(options.get("owner", ""), options["mode"]))
    return ""


def shown_instead(entry: Entry, pem: bytes, now: float) -> str:
    """Which certificate a server shows in place of the one on disk; "" if it is that."""
    shown = facts(pem)
    if entry.facts and shown.fingerprint == entry.facts.fingerprint:
        return ""
    return (f"another certificate, for {' '.join(shown.names) or 'no name'}, serial {shown.serial}, "
            f"that {'expired' if shown.not_after <= now else 'expires'} {gmt(shown.not_after)}")


def prove_once(item: Item, entry: Entry, world: World) -> str:
    """Compare what a server shows with what is on disk; the problem, or ""."""
    host, name = item.argv[0].replace("{name}", entry.name), server_name(item, entry)
    problems = []
    try:
        hosts = world.resolve(host) if "all" in item.options else [host]
    except NetworkError as error:
        return f"{host}: {error}"
    for one in hosts:
        try:
            problem = shown_instead(entry, world.connect(one, int(item.argv[1]), name, item.options.get("starttls", ""),
                                                         CONNECT_SECONDS), world.now())
        except WucmeError as error:
            problem = f"no certificate: {error}"
        problems += [f"{one} asked for {name} shows {problem}"] if problem else []
    return "; ".join(problems)


def prove(duty: Duty, _: RunScope, world: World) -> str:
    """Wait until a server shows the certificate that is on disk, for up to `grace`; the problem, or ""."""
    entry = duty.entries[0]
    until = world.monotonic() + entry.wanted.grace
    while (problem := prove_once(duty.item, entry, world)) and world.monotonic() < until:
        world.sleep(0.25)
    return problem


class Kind(NamedTuple):
    """What the first character of an item says: how the rest is read, and how it is done."""
    parse: Callable[[str], Parsed]
    once: bool                          # once for all certificates, not once for each
    words: str                          # what it does
    act: Callable[[Duty, RunScope, World], str]


KINDS = {
    "+": Kind(parse_standard, True, "test and reload", standard_load),
    "@": Kind(parse_procedure, False, "run", procedure),
    "$": Kind(parse_command, False, "run", procedure),
    ">": Kind(parse_copy, False, "write", write_copy),
    "?": Kind(parse_proof, False, "prove", prove),
}


def parse_item(text: str) -> Item:
    """One line of a load list; ValueError for what can never work."""
    if text[0] not in KINDS:
        raise ValueError("an item begins with + (known servers), @ (a procedure), $ (a shell command), > (a copy) or "
                         "? (a proof)")
    return Item(text, *KINDS[text[0]].parse(text[1:].strip()))


def perform(duty: Duty, run: RunScope, world: World) -> str:
    """Do one item now; the problem, or ""."""
    return KINDS[duty.item.text[0]].act(duty, run, world)


# === 12. report: how it went ====================================================================
# Pure: values in, text and exit status out.

class Outcome(NamedTuple):
    """What became of one certificate, or of one item of a load list."""
    title: str
    state: str                          # current, renewed or failed; loaded or owed
    problem: str = ""
    news: bool = False


class Report(NamedTuple):
    """What became of a run."""
    files: int
    certificates: list[Outcome]
    loads: list[Outcome]

    def count(self, state: str) -> int:
        """How many ended in a state."""
        return sum(one.state == state for one in [*self.certificates, *self.loads])

    def tally(self) -> str:
        """The last line of a run."""
        owed = self.count("owed")
        return (f"{self.files} files, {len(self.certificates)} certs, {self.count('renewed')} renewed, "
                f"{self.count('failed')} failed" + (f", {owed} owed" if owed else ""))

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if any(self.count(state) for state in ("failed", "held", "owed")) else 0

    @property
    def news(self) -> bool:
        """Whether there is anything to tell someone who did not ask."""
        return any(one.news for one in [*self.certificates, *self.loads])


def utc(when: float) -> str | None:
    """A time for machines, in UTC; None for never."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
    except (OverflowError, ValueError, OSError):
        return None


def local_time(when: float) -> str:
    """A time for a person, in local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    except (OverflowError, ValueError, OSError):
        return "never"


def epoch(text: str) -> float:
    """The time that `utc` wrote."""
    import calendar
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def certificate_json(decision: Decision, loads: list[Json]) -> Json:
    """One certificate as status --json has it."""
    entry, about = decision.entry, decision.entry.facts
    problem, next_time = entry.memory.problem, max(entry.memory.retry_at, entry.memory.held_until)
    return {"name": entry.name, "file": entry.chain, "names": list(about.names if about else entry.wanted.names),
            "issuer": about.issuer if about else None, "serial": about.serial if about else None,
            "fingerprint": about.fingerprint if about else None,
            "not_before": utc(about.not_before) if about else None,
            "not_after": utc(about.not_after) if about else None,
            "due": decision.due, "reason": decision.reason, "renew_at": utc(decision.renew_at),
            "failures": {"count": entry.memory.failures, "next": utc(next_time) if problem and next_time else None,
                         "problem": problem}, "loads": loads}


def certificate_text(decision: Decision, found: Json, now: float) -> list[str]:
    """One certificate as status shows it to a person."""
    about = decision.entry.facts
    left = f"expires in {days(about.not_after - now)} days" if about and now < about.not_after else \
        "expired" if about else "not there"
    state = f"due: {decision.reason}" if decision.due else \
        decision.reason or f"renews after {local_time(decision.renew_at)}"
    lines = [f"{' '.join(found['names']) or decision.entry.name}: {left}; {state}"]
    if found["failures"]["problem"]:
        lines.append(f"    failed: {found['failures']['problem']}")
    for load in found["loads"]:
        since = f" since {local_time(epoch(load['since']))}" if load["since"] else ""
        problem = f": {load['problem']}" if load["problem"] else ""
        lines.append(f"    {load['state']}{since}: {load['item']}{problem}")
    return [printable(line) for line in lines]


def troubles(found: Iterable[Json], now: float) -> list[str]:
    """Each thing that is wrong with certificates and their loads, as status --json has them."""
    lines = []
    for one in found:
        wrong = [f"failed: {one['failures']['problem']}"] if one["failures"]["problem"] else []
        if not one["not_after"] or one["not_after"] <= (utc(now) or ""):
            wrong.append(f"expired {one['not_after']}" if one["not_after"] else "not there")
        wrong += [f"owed: {load['item']}" + (f": {load['problem']}" if load["problem"] else "")
                  for load in one["loads"] if load["state"] == "owed"]
        lines += [printable(f"{(one['names'] or [one['name']])[0]}: {text}") for text in wrong]
    return lines


def overdue(found: Iterable[Json], now: float) -> list[str]:
    """The certificates in the last quarter of their life that should be renewed by now, or that nothing renews."""
    lines = []
    for one in found:
        start, end = (epoch(one[key] or "1970-01-01T00:00:00Z") for key in ("not_before", "not_after"))
        if end - (end - start) / 4 < now < end and (one["renew_at"] or "") <= (utc(now) or ""):
            lines.append(printable(f"{(one['names'] or [one['name']])[0]}: not renewed, ends {one['not_after']}"))
    return lines


def alert_text(run: RunScope, wrong: Sequence[str], lines: Sequence[str]) -> tuple[dict[str, str], str]:
    """What an item of `alert` finds in its environment, and what it reads."""
    subject = f"wucme on {run.host}: {len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else \
        f"wucme on {run.host}: all is well again"
    told = {"WUCME_SUBJECT": subject, "WUCME_PROBLEMS": str(len(wrong)), "WUCME_HOST": run.host,
            "WUCME_DIRECTORY": run.directory}
    return told, "\n".join([subject, "", *wrong, *([""] if wrong else []), *lines, ""])


def metrics_text(about: Json) -> str:
    """What status found, for Prometheus (text format 0.0.4)."""
    rows: list[tuple[str, str, Callable[[Json], Any]]] = [
        ("certificate_expiry_timestamp_seconds", "when the certificate ends",
         lambda one: int(epoch(one["not_after"])) if one["not_after"] else 0),
        ("certificate_failures", "how often it failed in a row since the last success",
         lambda one: one["failures"]["count"] or int(bool(one["failures"]["problem"]))),
        ("loads_owed", "load items not done yet for the certificate on disk",
         lambda one: sum(load["state"] == "owed" for load in one["loads"]))]
    lines = []
    for name, text, value in rows:
        lines += [f"# HELP wucme_{name} {text}", f"# TYPE wucme_{name} gauge"]
        lines += [f'wucme_{name}{{name={json.dumps(printable(one["name"]), ensure_ascii=False)}}} {value(one)}'
                  for one in about["certificates"]]
    return "\n".join([*lines, "# HELP wucme_last_run_timestamp_seconds when wucme last ran",
                      "# TYPE wucme_last_run_timestamp_seconds gauge",
                      f"wucme_last_run_timestamp_seconds {int(epoch(about['last_run']))}", ""])


# === 13. run: the one place that knows the order =================================================

LOCK = "wucme.lock"
ALARM_SECONDS = 23 * 3600.0     # a day, less what cron may be early


class Request(NamedTuple):
    """What the command line asks for."""
    verb: str = "run"
    names: tuple[str, ...] = ()
    force: bool = False
    dry_run: bool = False
    as_json: bool = False
    options: Mapping[str, str] = {}     # the settings among the options
    ini: str = ""                       # the ini that was named
    staging: bool = False
    reason: str = "unspecified"         # of a revocation


Tended = tuple[Entry, Outcome]      # a certificate as it is afterwards, and what became of it


class Opened(NamedTuple):
    """An account at a CA, ready for use."""
    client: Client
    server: ServerScope
    account: Account
    who: Applicant


class Job(NamedTuple):
    """Something to be done for one certificate, beside others."""
    name: str
    act: Callable[[], Any]


class Obtained(NamedTuple):
    """A chain as the CA sent it, the key it was ordered for, and what to remember."""
    entry: Entry
    chain: bytes
    key: PrivateKey
    server: str


@contextlib.contextmanager
def locked(run: RunScope, world: World) -> Iterator[None]:
    """Hold the lock of the directory, after waiting up to lock_wait for another run; FileError if it goes on."""
    make_directory(run.directory)
    path = os.path.join(run.directory, LOCK)
    until, told = world.monotonic() + run.lock_wait, False
    while True:
        descriptor = take_lock(path)
        if descriptor is not None:
            break
        who = read_json(path)
        holder = printable(f"pid {who.get('pid')} on {who.get('host')} since {who.get('since')}")
        if world.monotonic() >= until:
            raise FileError(f"another run is at work in {run.directory} ({holder}); nothing was done")
        if not told:
            log(f"waiting for another run to end ({holder})")
        told = True
        world.sleep(0.25)
    try:
        about = {"pid": os.getpid(), "host": run.host, "since": utc(world.now())}
        with contextlib.suppress(OSError):      # it is for the others to read; the lock holds without
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def take_stock(settings: Settings) -> Inventory:
    """The certificates of the directory, found and declared."""
    return scan(settings.run.directory, settings.default, settings.sections)


def load_items(settings: Settings) -> dict[str, Item]:
    """Every item of load and alert, by its text; SettingsError for the first that can never work."""
    items = {}
    for text, section, key in [*((text, section, "load") for text, section in settings.lists.items()),
                               *((text, "wucme", "alert") for text in settings.run.alert)]:
        try:
            items[text] = parse_item(text)
            if key == "alert" and text[0] not in "@$":
                raise ValueError("alert takes @ (a procedure) and $ (a shell command)")
        except ValueError as error:
            where = settings.source.where(section, key, text)
            raise SettingsError(f"{where}: {printable(text)}: {error}") from error
    return items


def check_copies(settings: Settings, items: Mapping[str, Item], inventory: Inventory) -> None:
    """Refuse (SettingsError) copies that would overwrite one another, or wucme's own files."""
    taken: dict[str, str] = {}
    for entry in inventory.entries.values():
        for text in dict.fromkeys(text for text in entry.wanted.load if text[0] == ">"):
            path = destination(items[text], entry)
            where = settings.source.where(settings.lists[text], "load", text)
            if os.path.dirname(path) == settings.run.directory:
                raise SettingsError(f"{where}: {printable(text)}: {path} is in wucme's own directory")
            if path in taken:
                raise SettingsError(f"{where}: {printable(text)}: {path} would be written for {taken[path]} and for "
                                    f"{entry.title}; put {{name}} into it, or the item into the section of one")
            taken[path] = entry.title


def choose(inventory: Inventory, names: Sequence[str]) -> list[Entry]:
    """The certificates that names mean, all for none; SettingsError for a name that means none."""
    if not names:
        return list(inventory.entries.values())
    known = {alias: entry for entry in inventory.entries.values()
             for alias in (entry.name, entry.name.replace("_", "."), entry.title)}
    for name in names:
        if name.lower() not in known:
            raise SettingsError(f"{printable(name)}: no such certificate{nearest(name.lower(), known)}")
    return list({known[name.lower()].name: known[name.lower()] for name in names}.values())


def run_mark(now: float) -> str:
    """The run's mark on its backups: local time with hundredths."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(now)) + f"{int(now * 100) % 100:02d}"


def note_account(client: Client, account: Account) -> None:
    """Remember the URL of an account, if that is news."""
    state = {"directory": client.url, "account": client.account}
    if client.account and read_json(account.state) != state:
        replace(account.state, json.dumps(state).encode())


def reach(settings: Settings, word: str, world: World) -> Client:
    """A client of the CA that a `server` word means, without an account."""
    _, server = find_server(settings, word)
    return Client(server.url, world, lambda: world.http(settings.run.timeout, server.ca_file, server.proxy))


def applicant(server: ServerScope) -> Applicant:
    """What a new account at a CA is made with."""
    mac = server.eab_hmac
    if server.eab_hmac_file:
        mac = Secret(read(server.eab_hmac_file).decode("ascii", "replace"))
    return Applicant(server.contact, server.eab_kid, mac, server.eab_alg)


def account_key(account: Account) -> PrivateKey:
    """The key of an account, made if there is none."""
    if not os.path.exists(account.key):
        log(f"making an account key, {account.key}")
        replace(account.key, key_pem(new_key("ecdsa-p256")))
    log(f"loading key from {account.key}")
    try:
        return parse_key(read(account.key))
    except PemError as error:
        raise PemError(f"{account.key}: {error}") from error


def account_of(settings: Settings, word: str) -> Account:
    """The files of the account at the CA that a `server` word means."""
    label, server = find_server(settings, word)
    return account_files(settings.run.directory, label, server.url, word == settings.default.server[0])


def finish_key_change(client: Client, account: Account, who: Applicant) -> None:
    """Find out which of two keys the CA has for an account, and drop the other."""
    old, path = client.key, f"{account.key}_tmp"
    with contextlib.suppress(PemError):     # cut short before the CA heard of it
        client.key = parse_key(read(path))
        if client.register(who, False):
            rename(path, account.key)
            return
    client.key = old
    remove(path)


def enter(settings: Settings, word: str, client: Client, key: PrivateKey, world: World) -> Opened:
    """Open the account at a CA; it is made if there is none and the terms are agreed to."""
    account, server = account_of(settings, word), find_server(settings, word)[1]
    client.key = key
    who = applicant(server)
    state = read_json(account.state)
    if os.path.exists(f"{account.key}_tmp"):        # a change of the key was cut short
        finish_key_change(client, account, who)
    if state.get("directory") == server.url:
        with contextlib.suppress(ProtocolError):
            client.account = client.own_url(state.get("account"), "account")
    if not client.account and not client.register(who, server.agree):
        terms = client.directory.terms
        if terms and not world.ask(f"Do you agree to the CA's terms of service at {terms}?"):
            raise SettingsError(f"{server.url}: no account yet, and the CA's terms of service at {terms} must be "
                                "agreed to first: set agree = yes, or use --agree")
        client.register(who, True)
    note_account(client, account)
    return Opened(client, server, account, who)


def start_order(by: Opened, entry: Entry, names: Sequence[str]) -> Order:
    """The order that an earlier run could not finish, else a new one."""
    client, memory = by.client, entry.memory
    if memory.order and memory.order_server == client.url:
        with contextlib.suppress(AcmeError, ProtocolError):
            order, _ = client.fetch_order(client.own_url(memory.order, "order"), names)
            if order.status in ("pending", "ready", "processing", "valid"):
                log(f"{names[0]}: taking up the order {order.url}")
                return order
    log(f"{names[0]}: creating new order for {' '.join(names)} at {client.directory.new_order}")
    account, about = client.account, entry.facts
    replaces = about.ari if about and client.directory.renewal_info and memory.server == client.url else ""
    profile = entry.wanted.profile or by.server.profile
    try:
        order = client.new_order(names, profile, replaces)
    except AcmeError as error:
        if error.kind != "accountDoesNotExist":
            raise
        client.register_again(account, by.who)
        order = client.new_order(names, profile, replaces)
    log(f"{names[0]}: order URL: {order.url}")
    return order


def choose_key(entry: Entry, resumed: bool) -> PrivateKey:
    """The key for a new certificate: the present one if it may stay, else one that waits in the _tmp file."""
    revoked = entry.facts is not None and entry.memory.revoked == entry.facts.fingerprint
    if not revoked and (not entry.wanted.rotate or not entry.whole):
        with contextlib.suppress(WucmeError):
            key = parse_key(read(entry.key))
            if "key" not in entry.own or key_kind(key.public_key()) == entry.wanted.key:
                return key
    if resumed:
        with contextlib.suppress(WucmeError):
            return parse_key(read(f"{entry.key}_tmp"))
    return new_key(entry.wanted.key)


def obtain(entry: Entry, by: Opened, answers: Answers, run: RunScope, until: float) -> Obtained:
    """Take one certificate through the whole of ACME, with what a killed run needs to go on written down."""
    client, names = by.client, wanted_names(entry)
    order = start_order(by, entry, names)
    key = choose_key(entry, order.url == entry.memory.order)
    entry = remember(run.directory, entry, order=order.url, order_server=client.url)
    if not entry.whole or key_hash(key.public_key()) != entry.memory.key_hash:
        create(f"{entry.key}_tmp", key_pem(key), owner(entry.key, 0o600))
        sync_directory(entry.key)
    order = authorize(client, order, names, answers, until)
    first = finish(client, order, names, signing_request(key, names), until)
    chain = choose_chain(client, first, entry.wanted.chain or by.server.chain)
    return Obtained(entry, chain, key, client.url)


def preference(entry: Entry, settings: Settings) -> list[str]:
    """The CAs to ask, in order: the one that issued first, but another after each three refusals."""
    words = sorted(entry.wanted.server, key=lambda word: find_server(settings, word)[1].url != entry.memory.server)
    turn = entry.memory.failures // 3 % len(words)
    return words[turn:] + words[:turn]


class Clients:
    """The CAs that a run needs, each reached once and entered once; what fails, fails all who need it."""

    def __init__(self, settings: Settings, world: World) -> None:
        import threading
        self.settings, self.world = settings, world
        self.reached: dict[str, Client | Exception] = {}
        self.entered: dict[str, Opened | Exception] = {}
        self.guard = threading.RLock()

    def once(self, table: dict[str, Any], word: str, make: Callable[[], Any]) -> Any:
        """What was made for this word, or the error that was met; made when first asked for."""
        with self.guard:
            if word not in table:
                try:
                    table[word] = make()
                except Exception as error:
                    table[word] = error
            if isinstance(table[word], Exception):
                raise table[word]
            return table[word]

    def reach(self, word: str) -> Client:
        """A client of a CA, for questions that need no account."""
        return cast(Client, self.once(self.reached, word, lambda: reach(self.settings, word, self.world)))

    def enter(self, word: str) -> Opened:
        """The account at a CA."""
        def make() -> Opened:
            key = account_key(account_of(self.settings, word))
            return enter(self.settings, word, self.reach(word), key, self.world)

        return cast(Opened, self.once(self.entered, word, make))

    def close(self) -> None:
        """Close the connections, and remember what became of the accounts."""
        for client in self.reached.values():
            if isinstance(client, Client):
                client.close()
        for found in self.entered.values():
            if isinstance(found, Opened):
                with contextlib.suppress(OSError):      # the account can be asked for again
                    note_account(found.client, found.account)


def obtain_somewhere(entry: Entry, clients: Clients, answers: Answers, run: RunScope) -> Obtained:
    """Obtain one certificate from the first of its CAs that can be reached."""
    monotonic, words = clients.world.monotonic, preference(entry, clients.settings)
    until = monotonic() + run.deadline
    for word in words[:-1]:
        try:
            return obtain(entry, clients.enter(word), answers, run, until)
        except NetworkError as error:
            if monotonic() > until:
                raise
            log(f"{entry.title}: {error}; trying the next CA")
    return obtain(entry, clients.enter(words[-1]), answers, run, until)


def store(obtained: Obtained, run: RunScope, mark: str, now: float) -> Entry:
    """Check a certificate as it would go live, and make it live."""
    entry, key = obtained.entry, obtained.key
    names = wanted_names(entry)
    temporary = f"{entry.chain}_tmp"
    log(f"saving certificate to {temporary}")
    create(temporary, obtained.chain)
    waiting = f"{entry.key}_tmp"
    log(f"reading private key {waiting if os.path.exists(waiting) else entry.key}")
    extra = check_chain(read(temporary), key, names, now)
    if extra:
        log(f"{entry.title}: the CA added {' '.join(extra)}")
    secret = private_key(read(entry.key)) if entry.whole and key_hash(key.public_key()) == entry.memory.key_hash \
        else key_pem(key)
    for step in switch(entry, obtained.chain, secret, mark):
        if not step.text.startswith("saving"):
            log(step.text)
        step.do()
    for path in (f"{entry.key}_tmp", temporary):
        remove(path)
    for path in (entry.chain, entry.key):
        prune(path, run.backups)
    log(f"wuCME successful {entry.title} {'renewal' if entry.facts else 'issue'}")
    found = look(entry)
    if not found.whole:
        raise FileError(f"{found.fault or entry.key}: the new pair does not fit on the disk")
    with contextlib.suppress(OSError):      # it is live: what follows must not undo that
        remember(run.directory, found, server=obtained.server, names=tuple(names), order="", order_server="",
                 profile=entry.wanted.profile, problem="", failures=0, retry_at=0.0, held_until=0.0, window=(),
                 about="", ask_at=0.0)
    return found


def own_share(run: RunScope, entry: Entry) -> float:
    """A number from 0 to 1 that is this host's and certificate's own."""
    import hashlib
    return int(hashlib.sha256(f"{run.host} {entry.name}".encode()).hexdigest()[:8], 16) / 0xffffffff


def fail(entry: Entry, error: Exception, run: RunScope, now: float) -> Outcome:
    """Note why a certificate failed; only a CA's refusal counts for the ladder, and ends the order."""
    problem = sentence(error)
    news = problem != entry.memory.problem
    log(f"{entry.title}: failed: {problem}", wrong=True)
    written = read_memory(state_path(run.directory, entry.name))
    memory = written._replace(problem=problem)
    if isinstance(error, AcmeError):
        failures = memory.failures + 1
        memory = memory._replace(failures=failures, retry_at=next_try(failures, own_share(run, entry), now),
                                 held_until=now + error.retry_after if error.retry_after else 0.0)
    with contextlib.suppress(OSError):      # the disk may be what failed
        remove(f"{entry.chain}_tmp")
        if isinstance(error, (AcmeError, PemError)):
            memory = memory._replace(order="", order_server="")
            remove(f"{entry.key}_tmp")
        remember(run.directory, entry._replace(memory=memory, written=written))
    return Outcome(entry.title, "failed", problem, news)


def work(jobs: queue.Queue[Job], results: queue.Queue[tuple[Job, Any]], started: dict[str, float],
         world: World) -> None:
    """What a worker does: one job after the other, each ending in a value."""
    import queue
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return
        started[job.name] = world.monotonic()
        try:
            results.put((job, job.act()))
        except BaseException as error:
            results.put((job, error))


def gather(jobs: list[Job], run: RunScope, world: World) -> Iterator[tuple[str, Any]]:
    """The jobs as they end, each with what was obtained or the error; none is waited for without end."""
    import queue
    import threading
    waiting: queue.Queue[Job] = queue.Queue()
    results: queue.Queue[tuple[Job, Any]] = queue.Queue()
    started: dict[str, float] = {}
    for job in jobs:
        waiting.put(job)
    for _ in range(min(run.workers, len(jobs))):
        threading.Thread(target=work, args=(waiting, results, started, world), daemon=True).start()
    left = {job.name: job for job in jobs}
    while left:
        try:
            job, result = results.get(timeout=1.0)
        except queue.Empty:
            limit = world.monotonic() - run.deadline - 3 * run.timeout
            late = [name for name in left if started.get(name, limit + 1) < limit]
            if not late:
                continue
            job, result = left[late[0]], NetworkError("did not end within the deadline; a later run goes on with it")
        if left.pop(job.name, None):
            yield job.name, result


def check_challenge(entry: Entry, refused: Mapping[tuple[str, int], str]) -> None:
    """Refuse, before any order, a certificate whose challenge cannot be answered from here."""
    for name in wanted_names(entry):
        if name.startswith("*."):
            raise ListenerError(f"{name}: http-01 cannot prove a wildcard")
        try:
            host_name(name)
        except ValueError as error:
            raise PemError(f"{entry.chain}: {error}; declare it, with names = ...") from error
    if not entry.wanted.listen:
        raise ListenerError("listen = none: nothing here answers the challenge")
    for address in entry.wanted.listen:
        if address in refused:
            raise ListenerError(refused[address])


def conclude(entry: Entry, result: Any, run: RunScope, now: float, world: World) -> Tended:
    """Make live what was obtained; the entry as it is then, with its outcome."""
    try:
        if isinstance(result, BaseException):
            raise result
        return store(result, run, run_mark(now), world.now()), Outcome(entry.title, "renewed", "", True)
    except Exception as error:      # whatever it is, it must not stop the others
        return entry, fail(entry, error, run, now)


def renew_all(due: Iterable[Decision], settings: Settings, clients: Clients, now: float) -> Iterator[Tended]:
    """Obtain and store every certificate that is due, the most urgent first."""
    run = settings.run
    urgent = sorted((one.entry for one in due), key=lambda entry: entry.facts.not_after if entry.facts else now)
    answers = Answers(run.directory)
    listeners, refused = open_listeners((address for entry in urgent for address in entry.wanted.listen), answers)
    jobs = []
    try:
        for entry in urgent:
            try:
                check_challenge(entry, refused)
                jobs.append(Job(entry.name, functools.partial(obtain_somewhere, entry, clients, answers, run)))
            except WucmeError as error:
                yield entry, fail(entry, error, run, now)
        entries = {entry.name: entry for entry in urgent}
        for job in jobs:        # accounts first: the user may be asked about terms; what fails here fails the jobs
            with contextlib.suppress(Exception):
                clients.enter(preference(entries[job.name], settings)[0])
        for name, result in gather(jobs, run, clients.world):
            yield conclude(entries[name], result, run, now, clients.world)
    finally:
        for listener in listeners:
            listener.close()


def issuing(entry: Entry, settings: Settings) -> str:
    """The `server` word of the CA that issued a certificate; the first of its settings where that is not known."""
    urls = {server.url: word for word, server in settings.servers.items()}
    return urls.get(entry.memory.server, entry.memory.server) or entry.wanted.server[0]


def advised(entry: Entry, result: Any, run: RunScope, now: float) -> Entry:
    """An entry with what its CA said of when to renew it; trouble with that is never more than a note."""
    import random
    memory = entry.memory
    if isinstance(result, Exception):
        log.detail(f"{entry.title}: no renewal information: {sentence(result)}")
        memory = memory._replace(ask_at=now + ASK_SECONDS[2])
    elif isinstance(result, BaseException):
        raise result
    else:
        window, wait = result
        drawn = settle_window(window, memory.window, random.random()) if window else ()     # noqa: S311 - no secret
        memory = memory._replace(window=drawn, about=window.about if window else "", ask_at=now + wait)
    with contextlib.suppress(OSError):
        return remember(run.directory, entry._replace(memory=memory))
    return entry._replace(memory=memory)


def ask_windows(decisions: Iterable[Decision], settings: Settings, clients: Clients, now: float) -> dict[str, Entry]:
    """The certificates that are not due otherwise and whose CA is to be asked again when to renew them (RFC 9773)."""
    def question(entry: Entry) -> Any:
        client = clients.reach(issuing(entry, settings))
        return client.renewal_window(entry.facts.ari if entry.facts else "") if client.directory.renewal_info \
            else (None, ASK_SECONDS[2])

    found = {one.entry.name: one.entry for one in decisions if not one.due and not one.held and one.entry.facts
             and one.entry.facts.ari and now >= one.entry.memory.ask_at and not one.entry.wanted.renew.never}
    jobs = [Job(name, functools.partial(question, entry)) for name, entry in found.items()]
    for name, result in gather(jobs, settings.run, clients.world):
        found[name] = advised(found[name], result, settings.run, now)
    return found


def save(ledger: Ledger) -> str:
    """Write the ledger down; the problem, or ""."""
    try:
        ledger.save()
    except OSError as error:
        return f"{ledger.path}: what was loaded cannot be written down, and is loaded again: {error.strerror}"
    return ""


def pay(todo: Iterable[Duty], run: RunScope, ledger: Ledger, world: World) -> list[Outcome]:
    """Do what is to be loaded; an item that fails does not stop the next, and stays owed."""
    outcomes = []
    saved = world.monotonic()
    try:
        for duty in todo:
            who = ", ".join(entry.title for entry in duty.entries)
            try:
                problem = perform(duty, run, world)
            except Exception as error:      # whatever it is, it must not stop the others
                problem = sentence(error)
            log(f"{'load failed' if problem else 'load succeeded'}: {duty.item.text} ({who})"
                + (f": {problem}; it is owed, and tried again by the next run" if problem else ""), wrong=bool(problem))
            for entry in duty.entries:
                news = ledger.strike(entry, duty.item.text, problem, world.now())
                outcomes.append(Outcome(entry.title, "owed" if problem else "loaded", problem, news))
            if world.monotonic() - saved > 1:
                save(ledger)
                saved = world.monotonic()
    finally:
        problem = save(ledger)
        if problem:
            log(problem, wrong=True)
            outcomes.append(Outcome(ledger.path, "owed", problem, True))
    return outcomes


class Standing(NamedTuple):
    """What status found."""
    lines: list[str]
    about: Json
    status: int


def load_json(entry: Entry, items: Mapping[str, Item], ledger: Ledger) -> list[Json]:
    """The load list of one certificate, as status --json has it."""
    found = []
    for text in (text for text in entry.wanted.load if concerns(items[text], entry)):
        done = ledger.records.get(entry.name, {}).get(text, Loaded())
        found.append({"item": text, "state": "owed" if ledger.owes(entry, text) else "loaded",
                      "since": utc(done.since) if done.problem else None, "problem": done.problem})
    return found


def standing(settings: Settings, world: World) -> Standing:
    """What is there, what is due, what is owed; looks only."""
    now, run, items = world.now(), settings.run, load_items(settings)
    held = signature(os.path.join(run.directory, LOCK))
    seen = int(held.split()[1]) / 1e9 if held else 0.0
    ledger = Ledger(run.directory, run.host)
    entries = take_stock(settings).entries
    lines, found = [], []
    for decision in (decide(entry, now) for entry in entries.values()):
        found.append(certificate_json(decision, load_json(decision.entry, items, ledger)))
        lines += certificate_text(decision, found[-1], now)
    if entries and not any(entry.wanted.load for entry in entries.values()):
        lines.append("the load list is empty: no server is told of a new certificate")
    lines.append(f"{len(entries)} certs in {run.directory}; last run: {local_time(seen) if seen else 'never'}")
    about = {"version": VERSION, "host": run.host, "last_run": utc(seen) if seen else None, "certificates": found}
    return Standing(lines, about, 1 if troubles(found, now) or now - seen > 2 * 86400 else 0)


def alarm(settings: Settings, items: Mapping[str, Item], ledger: Ledger, world: World) -> Iterator[Outcome]:
    """Tell those whom `alert` names, if it is news to them, and write `metrics`; what could not be told is owed."""
    run, now = settings.run, world.now()
    if not run.alert and not run.metrics:
        return
    found = standing(settings, world)
    late = overdue(found.about["certificates"], now)
    wrong = (*troubles(found.about["certificates"], now), *late)
    environment, text = alert_text(run, wrong, found.lines)
    ledger.alarms = {item: about for item, about in ledger.alarms.items() if item in run.alert}
    for item in run.alert:
        last = ledger.alarms.get(item, Alarm())
        if wrong == last.problems and not (late and now - last.at > ALARM_SECONDS):
            continue
        problem = run_item(items[item], {**child_environment(), **environment}, settings.default.load_timeout, world,
                           title="alert", data=text.encode())
        log(f"alert failed: {item}: {problem}" if problem else f"alert succeeded: {item}", wrong=bool(problem))
        if problem:
            yield Outcome(item, "owed", problem, True)
        else:
            ledger.alarms[item] = Alarm(wrong, now)
    save(ledger)
    try:
        if run.metrics:
            replace(run.metrics, metrics_text(found.about).encode(), 0o644)
    except OSError as error:
        log(f"metrics cannot be written: {sentence(error)}", wrong=True)
        yield Outcome(run.metrics, "owed", sentence(error), True)


def examine(inventory: Inventory, request: Request, now: float) -> list[Decision]:
    """What to do about each certificate; one that was not asked for is not due."""
    chosen = {entry.name for entry in choose(inventory, request.names)}
    named = chosen if request.names else set()
    decisions = [decide(entry, now, entry.name in named, request.force and entry.name in chosen)
                 for entry in inventory.entries.values()]
    return [one if one.entry.name in chosen else one._replace(due=False) for one in decisions]


def tend(decisions: Iterable[Decision], settings: Settings, clients: Clients, now: float) -> Iterator[Tended]:
    """See to every certificate: each comes back as it is afterwards, with its outcome."""
    run = settings.run
    for one in decisions:
        if one.entry.facts and (one.due or log.live):
            log(one.entry.chain)
            log(dates(one, now))
        if one.due:
            log(f"{one.entry.title}: due: {one.reason}")
        elif one.entry.fault and not one.held:
            yield one.entry, fail(one.entry, FileError(one.entry.fault), run, now)
        else:
            if one.held:
                log(f"{one.entry.title}: due: {one.reason}: {one.entry.memory.problem}")
            spent = one.entry.whole and not one.held and not decide(one.entry, now).due
            with contextlib.suppress(OSError):      # it can be learnt again
                remember(run.directory, one.entry, **({"order": "", "order_server": ""} if spent else {}))
            yield one.entry, Outcome(one.entry.title, "held" if one.held else "current")
    due = [one for one in decisions if one.due]
    if due:
        yield from renew_all(due, settings, clients, now)


def open_ledger(run: RunScope) -> Ledger:
    """This host's ledger."""
    ledger = Ledger(run.directory, run.host)
    if ledger.stranger:
        log(f"{ledger.path} was written on another machine: two hosts call themselves {run.host} (set host), or this "
            "one was copied; everything is loaded anew")
    return ledger


def run_once(settings: Settings, request: Request, world: World) -> Report:
    """The whole job, once: look, ask, decide, obtain, store, load, report."""
    items = load_items(settings)
    run = settings.run
    clients = Clients(settings, world)
    with locked(run, world), contextlib.closing(clients):
        now = world.now()
        log("certificate management")
        inventory = take_stock(settings)
        check_copies(settings, items, inventory)
        told = ask_windows(examine(inventory, request, now), settings, clients, now)
        inventory = inventory._replace(entries={**inventory.entries, **told})
        decisions = examine(inventory, request, now)
        for path in sweep(run.directory):
            log(f"removed {path}, left by a run that was stopped")
        entries, outcomes = {}, []
        for entry, outcome in tend(decisions, settings, clients, now):
            entries[entry.name] = entry
            outcomes.append(outcome)
        ledger = open_ledger(run)
        ledger.forget(entries)
        loads = pay(duties(entries.values(), items, ledger.owes), run, ledger, world)
        loads += alarm(settings, items, ledger, world)
        report = Report(inventory.files, outcomes, loads)
        log(report.tally())
    return report


def rehearse(settings: Settings, request: Request, world: World) -> Report:
    """Run the load list now for the certificates as they are, owed or not."""
    items = load_items(settings)
    with locked(settings.run, world):
        inventory = take_stock(settings)
        check_copies(settings, items, inventory)
        entries = {entry.name: entry for entry in choose(inventory, request.names)}
        ledger = open_ledger(settings.run)
        loads = pay(duties(entries.values(), items, lambda *_: True), settings.run, ledger, world)
        loads += alarm(settings, items, ledger, world)
        if not loads:
            log("nothing was loaded: " + ("the load list is empty" if entries else "there is no certificate"))
        return Report(inventory.files, [Outcome(entry.title, "current") for entry in entries.values()], loads)


def foretell(settings: Settings, request: Request, world: World) -> list[str]:
    """What a run (or a load) would do, in words; nothing is changed."""
    items, run, now = load_items(settings), settings.run, world.now()
    inventory = take_stock(settings)
    check_copies(settings, items, inventory)
    decisions = examine(inventory, request, now)
    lines = []
    for one in decisions if request.verb != "load" else ():
        if one.due:
            lines.append(f"would order a certificate for {' '.join(wanted_names(one.entry))} at "
                         f"{one.entry.wanted.server[0]}: {one.reason}")
        else:
            lines.append(f"{dates(one, now)}: {f'due: {one.reason}' if one.held else 'not due'}")
    ledger = Ledger(run.directory, run.host)
    if request.verb == "load":
        todo = duties(choose(inventory, request.names), items, lambda *_: True)
    else:
        renewed = {one.entry.name for one in decisions if one.due}
        todo = duties((one.entry for one in decisions), items, lambda entry, text: entry.name in renewed or
                      ledger.owes(entry, text))
    lines += [f"would {KINDS[one.item.text[0]].words} {one.item.text} for "
              f"{', '.join(entry.title for entry in one.entries)}" for one in todo]
    return [printable(line) for line in lines] or ["nothing to do"]


def issue(settings: Settings, request: Request, world: World) -> Report:
    """The first certificate for some names: a run for it alone, then what its user wants to know."""
    fresh, label = declare(settings, request.names, request.options)
    section = fresh.sections[label]
    report = run_once(fresh, request._replace(names=(label,)), world)
    found = choose(take_stock(fresh), [label])[0]
    if not found.whole:
        log("nothing was issued, and nothing is tried again by itself: mend the cause and give the same command again")
    state = next((one.state for one in report.certificates if one.title == found.title), "failed")
    if not found.whole or state in ("failed", "held"):
        return report
    if state == "current":
        when = local_time(decide(found, world.now()).renew_at)
        print(f"{found.title} is not due before {when}; --force renews it now")
    print(f"certificate: {found.chain}\nkey:         {found.key}")
    if not section.values.load:
        print("the load list is empty: no server is told of a new certificate (see LOAD LIST in --help)")
    path = settings.source.path or request.ini or os.path.join(default_directory(), "wucme.ini")
    for line in keep_options(settings.source, path, section, request.options) if not request.staging else ():
        print(line)
    return report


REASONS = {"unspecified": 0, "keyCompromise": 1, "affiliationChanged": 3, "superseded": 4, "cessationOfOperation": 5}


def revoke(settings: Settings, request: Request, world: World) -> Report:
    """Revoke a certificate, by its name or its file, and say what that means for those who serve it."""
    if len(request.names) != 1 or request.reason not in REASONS:
        raise SettingsError(f"revoke takes one name or file, and --reason {', '.join(REASONS)}")
    name = request.names[0]
    run = settings.run
    clients = Clients(settings, world)
    with locked(run, world), contextlib.closing(clients):
        inventory = take_stock(settings)
        if os.path.isfile(name):
            chain = read(name)
            fingerprint = facts(chain).fingerprint
            found = [one for one in inventory.entries.values() if one.facts and one.facts.fingerprint == fingerprint]
        else:
            found = choose(inventory, [name])
            chain = read(found[0].chain)
        word = issuing(found[0], settings) if found else settings.default.server[0]
        der = certificate_der(chain)
        client = clients.enter(word).client
        try:
            client.revoke(der, REASONS[request.reason])
        except AcmeError as error:
            if error.kind != "unauthorized" or not found or not found[0].fits:
                raise
            log(f"{name}: the account may not revoke it ({error}); once more by the certificate's own key")
            client.revoke(der, REASONS[request.reason], by=parse_key(read(found[0].key)))
        print(f"{name} is revoked")
        for entry in found:
            remember(run.directory, entry, revoked=entry.facts.fingerprint if entry.facts else "")
            print("servers still serve it: the next run gets another, with a new key; for now: wucme.py renew "
                  f"{entry.name}")
    return Report(inventory.files, [], [])


def show_account(opened: Opened, _: str) -> list[str]:
    """The account as the CA has it."""
    about = opened.client.account_object()
    contact = about.get("contact")
    return [f"account: {opened.client.account}", f"key:     {opened.account.key}", f"status:  {about.get('status')}",
            f"contact: {' '.join(map(str, contact)) if isinstance(contact, list) else 'none'}"]


def update_account(opened: Opened, mark: str) -> list[str]:
    """The account with the contact of the settings, or none."""
    wanted = [f"mailto:{address}" for address in opened.who.contact]
    opened.client.account_object({"contact": wanted})
    return show_account(opened, mark)


def new_account_key(opened: Opened, mark: str) -> list[str]:
    """A new key for the account; the new one is on the disk before the CA hears of it."""
    if not opened.client.directory.key_change:
        raise AcmeError(f"{opened.client.url}: the CA cannot change keys")
    key, path = new_key("ecdsa-p256"), opened.account.key
    create(f"{path}_tmp", key_pem(key), owner(path, 0o600))
    sync_directory(path)
    try:
        opened.client.change_key(key)
    except AcmeError:
        remove(f"{path}_tmp")
        raise
    back_up(path, f"{path}_{mark}")
    rename(f"{path}_tmp", path)
    return [f"the account has a new key, {path}; the old one is {path}_{mark}"]


def deactivate_account(opened: Opened, mark: str) -> list[str]:
    """The account closed for good; its key is put aside."""
    opened.client.account_object({"status": "deactivated"})
    path = opened.account.key
    rename(path, f"{path}_{mark}")
    remove(opened.account.state)
    opened.client.account = ""
    return [f"the account {opened.client.url} is deactivated for ever; its key is {path}_{mark}"]


ACCOUNT_VERBS: dict[str, Callable[[Opened, str], list[str]]] = {
    "new": show_account, "show": show_account, "update": update_account, "newkey": new_account_key,
    "deactivate": deactivate_account}


def account_verb(settings: Settings, request: Request, world: World) -> Report:
    """See to the account at a CA: new, show, update, newkey, deactivate."""
    action = request.names[0] if len(request.names) == 1 else ""
    if action not in ACCOUNT_VERBS:
        raise SettingsError(f"account takes one of {', '.join(ACCOUNT_VERBS)}")
    word = settings.default.server[0]
    if action != "new":             # none is made by the way
        world = world._replace(ask=lambda _: False)
        settings = settings._replace(
            servers={name: server._replace(agree=False) for name, server in settings.servers.items()},
            other_server=settings.other_server._replace(agree=False))
    clients = Clients(settings, world)
    with locked(settings.run, world), contextlib.closing(clients):
        opened = clients.enter(word)
        for line in ACCOUNT_VERBS[action](opened, run_mark(world.now())):
            print(printable(line))
    return Report(0, [], [])


# === 16. command line: what was asked for, and how it ends =====================================

VERBS = {"run": run_once, "issue": issue, "renew": run_once, "load": rehearse, "status": None, "revoke": revoke,
         "account": account_verb}


def version() -> str:
    """Version and SHA-256 of this very file, to compare with a release."""
    import hashlib
    return f"wucme {VERSION} sha256 {hashlib.sha256(read(os.path.abspath(__file__))).hexdigest()}"


def manual() -> str:
    """The text of --help."""
    return (__doc__ or "").replace("@SETTINGS@", settings_help()).replace("@SERVERS@", ", ".join(STANDARD))


def argument_parser() -> argparse.ArgumentParser:
    """The command line, every setting included."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            word = message.rsplit(maxsplit=1)[-1]
            hint = nearest(word, self._option_string_actions) if word.startswith("--") else ";"
            raise SettingsError(f"{message}{hint} See --help")

    parser = Parser(prog="wucme.py", add_help=False, allow_abbrev=False)
    parser.add_argument("verb", nargs="?", default="run")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ini", default=os.environ.get("WUCME_INI", ""))
    parser.add_argument("--reason", default="unspecified")
    for flag in ("force", "dry-run", "staging", "quiet", "verbose", "json", "version", "help"):
        parser.add_argument(f"--{flag}", action="store_true")
    for name, field in SETTINGS.items():
        option, dest = f"--{name.replace('_', '-')}", f"set_{name}"
        if field.kind is a_flag:
            parser.add_argument(option, dest=dest, action=argparse.BooleanOptionalAction, default=None)
        elif not field.local and field.kind is not Secret:
            parser.add_argument(option, dest=dest, action="append" if field.kind is some_lines else "store")
    return parser


def option_texts(arguments: Json) -> dict[str, str]:
    """The settings among the options, as texts like those of an ini."""
    given = {key[4:]: value for key, value in arguments.items() if key.startswith("set_") and value is not None}
    return {key: "\n".join(value) if isinstance(value, list) else value if isinstance(value, str)
            else "yes" if value else "no" for key, value in given.items()}


def staging(settings: Settings) -> Settings:
    """The same settings for trying out: the staging CA, a directory of its own, no loads."""
    def tame(scope: CertificateScope) -> CertificateScope:
        return scope._replace(server=("letsencrypt-staging",), load=())

    return settings._replace(
        run=settings.run._replace(directory=os.path.join(settings.run.directory, "staging"), alert=(), metrics=""),
        default=tame(settings.default), lists={},
        sections={label: one._replace(values=tame(one.values)) for label, one in settings.sections.items()})


def open_log(run: RunScope) -> None:
    """Begin to write the log file; without one the run goes on."""
    make_directory(run.directory)
    try:
        log.descriptor = open_append(run.log)
    except OSError as error:
        log(f"no log is written: {sentence(error)}")


def act(settings: Settings, request: Request, world: World) -> int:
    """Do what the verb says; the exit status."""
    if request.dry_run:
        if request.verb == "issue":
            settings, label = declare(settings, request.names, request.options)
            request = request._replace(names=(label,))
        print("\n".join(foretell(settings, request, world)))
        return 0
    if request.verb == "status":
        found = standing(settings, world)
        print(json.dumps(found.about, indent=1) if request.as_json else "\n".join(found.lines))
        return found.status
    open_log(settings.run)
    verb = cast("Callable[[Settings, Request, World], Report]", VERBS[request.verb])
    report = verb(settings, request, world)
    if report.news or request.names:
        log.flush()
    sys.stdout.flush()
    return report.status


def need_cryptography() -> None:
    """Say at once, not on the day of a renewal, that the one library this needs is missing."""
    import importlib.util
    if importlib.util.find_spec("cryptography") is None:
        raise SettingsError("the Python package cryptography is missing: apt install python3-cryptography, "
                            "dnf install python3-cryptography, pip install cryptography, or uv run wucme.py")


def understand(arguments: Json) -> tuple[Settings, Request]:
    """What the command line and the ini ask for; SettingsError where they ask for what cannot be."""
    verb, names = arguments["verb"], tuple(arguments["names"])
    if verb not in VERBS:
        raise SettingsError(f"{printable(verb)}: no such command{nearest(verb, VERBS)} There are {', '.join(VERBS)}")
    if names and verb in ("run", "status"):
        raise SettingsError(f"{verb} takes no names; for one certificate: renew {names[0]}")
    if arguments["force"] and verb not in ("issue", "renew"):
        raise SettingsError(f"--force goes with issue and renew, not with {verb}")
    options = option_texts(arguments)
    named = os.path.abspath(os.path.expanduser(arguments["ini"])) if arguments["ini"] else ""
    fresh = verb == "issue" and named and not os.path.exists(named)
    if os.geteuid() == 0 and anyone_may_write(os.path.abspath(__file__)):
        raise SettingsError(f"{__file__}: anyone may write this file, and root runs it; chmod o-w {__file__}")
    common = {key: text for key, text in options.items()
              if verb != "issue" or key not in CertificateScope._field_defaults}
    settings = read_settings(read_source("" if fresh else find_ini(named)), common)
    return (staging(settings) if arguments["staging"] else settings,
            Request(verb, names, arguments["force"], arguments["dry_run"], arguments["json"], options, named,
                    arguments["staging"], arguments["reason"]))


def main(argv: Sequence[str] | None = None, world: World = REAL) -> int:
    """The program: 0 all is well, 1 something failed or is owed, 2 usage or settings."""
    secure_streams()
    umask = os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ending)
    world = world._replace(command=functools.partial(world.command, umask=umask))
    try:
        arguments = vars(argument_parser().parse_intermixed_args(argv))
        if arguments["help"] or arguments["version"]:
            print(manual() if arguments["help"] else version())
            return 0
        need_cryptography()
        log.clock, log.loud, log.quiet = world.now, arguments["verbose"], arguments["quiet"]
        log.live = not arguments["quiet"] and (sys.stderr.isatty() or arguments["verbose"])
        settings, request = understand(arguments)
        return act(settings, request, world)
    except SystemExit as error:
        log(f"stopped by {signal.Signals(int(error.code or 0) - 128).name}")
        log.flush()
        raise
    except SettingsError as error:
        log.show(f"wucme: {sentence(error)}\n")
        return 2
    except (WucmeError, OSError) as error:
        log(f"failed: {sentence(error)}", wrong=True)
        log.flush()
        return 1


if __name__ == "__main__":
    sys.exit(main())
