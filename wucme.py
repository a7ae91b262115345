#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography>=3.4.8"]
# ///
"""wucme - keeps the TLS certificates of a host renewed, and loaded into its servers

SYNOPSIS
  wucme.py [run]                      do all that is due and owed, then exit (for cron)
  wucme.py issue NAME...              obtain one certificate for these names, or for a signing
                                      request: issue --csr FILE
  wucme.py renew [NAME...] [--force]  look at these certificates only; --force: renew them now
  wucme.py load [NAME...]             run the load list now for the certificates as they are
  wucme.py status [--json]            what is there, what is due, what is owed
  wucme.py check [NAME...]            what would go wrong, before an order is spent: addresses, port 80,
                                      redirects, CAA, clock, CA; publishes a token for a moment
  wucme.py revoke NAME|FILE [--reason keyCompromise|superseded|cessationOfOperation|...]
  wucme.py timer [systemd|cron] [--install]
                                      what has it run every hour; --install puts it in place
  wucme.py account new|show|update|newkey|deactivate
                                      the account at the (first) CA; --server names another
  wucme.py thumbprint                 print the account key's thumbprint, and what makes web servers
                                      answer every challenge with it (stateless = yes)
  wucme.py --uacme ...                everything behind it is for uacme 1.8's command line: see UACME

DESCRIPTION
  One run reads the settings, takes the lock of the directory, cleans up after a killed run, looks
  at every file of the directory, decides with a reason what is due, opens the challenge listener,
  obtains the certificates side by side from the CA (ACME, RFC 8555), checks each one, backs up the
  old one and renames the new one into place, runs the load list, and reports. A certificate that
  fails never stops another. With nothing due and nothing owed it sends nothing, prints nothing
  (unless at a terminal), and exits 0.

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
  --install      with timer: put that in place of what is there
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

CGI
  Called by a web server (with GATEWAY_INTERFACE in its environment) this program answers the CA's
  challenges, and does nothing else: a path that ends in /.well-known/acme-challenge/TOKEN gets that
  file of tokens/, every other is not found. It looks for the directory in the ini if this user may
  read it, then in $WUCME_DIRECTORY, then takes /etc/wucme. Set listen = none for it.

EXIT STATUS
  0 all is well; 1 something failed, or a load is owed, or the lock was not got; 2 usage or
  settings; 143, 130 ended by SIGTERM, SIGINT. status: 1 if anything is owed, failing or expired,
  or if no run was seen for two days. check: 1 if it finds a problem.

SECURITY
  Made to run as root. It reads the ini and its directory, writes to these, its log, and where > and
  metrics say, contacts the CA (https only, always verified) and what ? names, and runs what the load
  list says. It listens on the challenge port only while an order runs, and answers there from memory.
  Keys are 0600 from the first byte, copies of them have their mode and owner from the first byte; an
  ini, a script, a procedure or a directory that anyone may write is refused, and one warning names
  what a group or another user may change.

UACME
  wucme.py --uacme takes the options and commands of uacme 1.8 (new, update, deactivate, newkey,
  issue, check, revoke) and does what that does: in its directory (-c, else /etc/ssl/uacme), with its
  files and modes, its hook's calls, its environment and its exit status: 0 done, 1 not due, 2 failed;
  for check 0 is due and 1 is not. A cron line changes by one word, and back. It reads no ini, loads
  nothing, and remembers nothing between runs. Without -c and without /etc/ssl/uacme, where the current
  directory or wucme's own holds wucme_k_account.pem, it works on that one, by the ini.

READING ORDER
  The file reads upward: a section uses only what stands above it.
   1 errors      2 world      3 files       4 pem     5 settings   6 inventory   7 plan
   8 challenges  9 acme      10 store      11 load   12 report    13 run        14 diagnosis
  15 uacme      16 command line
"""
from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import functools
import gc
import json
import os
import re
import signal
import stat
import sys
import time

# What costs milliseconds to import (cryptography, ssl, http, subprocess, typing ...) is imported where or
# when it is used: on most days a run needs none of it.
TYPE_CHECKING = False           # as typing has it; a type checker takes it for true
if TYPE_CHECKING:
    import http.client
    import queue
    import socket
    import ssl
    import subprocess
    import tempfile
    import threading
    import urllib.parse
    import urllib.request
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, NamedTuple, NoReturn, TypeVar, Union, cast

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

    PrivateKey = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey]
    T = TypeVar("T")
else:
    class Fields(type):
        """Makes a class of named fields a kind of tuple; typing.NamedTuple would take a fifth of an idle run for it."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            made = collections.namedtuple(name, fields, defaults=[body.pop(one) for one in fields if one in body])
            for key, value in body.items():
                setattr(made, key, value)
            return made

    class NamedTuple(metaclass=Fields):
        """What such a class is derived from."""

    def cast(_: Any, value: Any) -> Any:
        """The value, of which the type checker knows less than we do."""
        return value

    class Later:
        """A module that is imported when something of it, or of these parts, is first used."""

        def __init__(self, name: str, *parts: str) -> None:
            self.name, self.module = name, None
            for part in parts:
                setattr(self, part, Later(f"{name}.{part}"))

        def __getattr__(self, name: str) -> Any:
            if self.module is None:
                import importlib
                self.module = importlib.import_module(self.name)
            return getattr(self.module, name)

    queue, socket, ssl, subprocess, tempfile, threading = (
        Later(name) for name in ("queue", "socket", "ssl", "subprocess", "tempfile", "threading"))
    http, urllib = Later("http", "client"), Later("urllib", "parse", "request")
    x509 = Later("cryptography.x509")
    hashes, serialization = (Later(f"cryptography.hazmat.primitives.{name}") for name in ("hashes", "serialization"))
    ec, padding, rsa, utils = (Later(f"cryptography.hazmat.primitives.asymmetric.{name}")
                               for name in ("ec", "padding", "rsa", "utils"))

VERSION = "1.0"
USER_AGENT = f"wucme/{VERSION} Python-http.client/{sys.version_info[0]}.{sys.version_info[1]}"
Json = dict[str, "Any"]


# === 1. errors: what can go wrong, each a sentence for a person ===============================
# Each is raised where it is known and caught twice: once for each certificate, and in main.

class WucmeError(Exception):
    """Something failed, and the text says what, where and what to do."""
    spent: Sequence[str] = ()       # the challenge types that it is no use to try again in this run


class SettingsError(WucmeError):
    """The ini or the command line asks for something that cannot be."""


class FileError(WucmeError):
    """A file or directory is not as it must be."""


class PemError(WucmeError):
    """A certificate or key does not parse, or does not fit."""


class KeyKindError(PemError):
    """A private key that is whole, and of no use here."""


class ChallengeError(WucmeError):
    """Nothing here can answer challenges of these types."""

    def __init__(self, text: str, *kinds: str) -> None:
        super().__init__(text)
        self.spent = kinds


class NetworkError(WucmeError):
    """The CA could not be reached, or cannot do its work now."""


class ProtocolError(NetworkError):
    """What came back is not ACME, or not what was asked for."""


class UnfinishedError(NetworkError):
    """The CA still works on an order; a later run goes on with it."""


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
# Times in what a program prints: a failure that only differs in them is no news.
STAMP = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*Z?:? *"
AT_ONCE = 10                    # requests for one certificate
OUTPUT_BYTES = 1 << 16          # kept of what a load command prints; the rest is read and dropped
HELD_LINES = 4000               # printed at the end of a run, of more only the last, and what went wrong


class Log:
    """What is said: to a file at once, and to the terminal at once or (for cron) at the end if worth it."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.time
        self.descriptor = -1
        self.live = False           # at a terminal: each line at once
        self.loud = 0               # verbose: details too
        self.quiet = False          # only what went wrong is printed
        # Not at a terminal: lines that may be printed at the end, those of what went wrong, and how many there were.
        self.held: collections.deque[str] = collections.deque(maxlen=HELD_LINES)
        self.wrong: list[str] = []
        self.count = 0

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
            self.wrong += [line] * wrong
            self.count += 1

    def detail(self, text: str) -> None:
        """Write one line that only --verbose wants."""
        if self.loud:
            self(text)

    def flush(self) -> None:
        """Print what was held back."""
        last = set(self.held)
        earlier = [line for line in self.wrong if line not in last]
        if (left_out := self.count - len(self.held) - len(earlier)) > 0:
            where = ": see the log" if self.descriptor >= 0 else ""
            earlier.append(f"... {left_out} lines before these are left out here{where} ...\n")
        for line in [*earlier, *self.held]:
            self.show(line)
        self.held.clear()
        self.wrong, self.count = [], 0

    @staticmethod
    def show(line: str) -> None:
        """Print to stderr, whatever became of it."""
        with contextlib.suppress(ValueError, RuntimeError, AttributeError):
            try:
                sys.stderr.write(line)
                sys.stderr.flush()
            except OSError:         # Python would try again at the end, and exit with 120
                sys.stderr = cast("Any", None)


log = Log()


class Response(NamedTuple):
    """An answer to one HTTPS request."""
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def time_left(until: float) -> float:
    """The seconds to a deadline; socket.timeout when it is over."""
    left = until - time.monotonic()
    if left <= 0:
        raise socket.timeout("deadline")
    return left


def outcome(call: Callable[[], Any]) -> Any:
    """What a call ends in: its result, or its error."""
    try:
        return call()
    except BaseException as error:
        return error


def result_of(ended: Any) -> Any:
    """The result that a call ended in; if that is an error, raises it."""
    if isinstance(ended, BaseException):
        raise ended
    return ended


@contextlib.contextmanager
def beside(call: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Make a call beside what is done meanwhile, and wait for its end; gives what has its result, or raises its error.

    On a signal there is no time to wait for it.
    """
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(outcome(call)), daemon=True)
    thread.start()
    try:
        yield lambda: result_of(ended[0])
    except Exception:
        thread.join()
        raise
    thread.join()


def get_ready_to_dial() -> None:
    """Import what a connection is begun with, while no other thread is held up by that, or holds it up."""
    import importlib
    importlib.import_module("socket")


def timed(kind: Any) -> Any:
    """A kind of socket that gives up at its `until` however slowly bytes drip in."""
    def recv_into(self: Any, *args: Any, **more: Any) -> Any:
        self.settimeout(time_left(self.until))
        return kind.recv_into(self, *args, **more)

    return type("Timed", (kind,), {"recv_into": recv_into})


def dial(until: float, host: str, port: int) -> Any:
    """A plain connection that gives up at `until`; each address of the host has its share of the time."""
    # Bytes spare it the tables of IDNA.
    addresses = socket.getaddrinfo(host.encode() if host.isascii() else host, port, type=socket.SOCK_STREAM)
    while True:
        *kind, _name, address = addresses.pop(0)
        with contextlib.ExitStack() as stack:
            try:
                plain = stack.enter_context(timed(socket.socket)(*kind))
                plain.until = until
                plain.settimeout(time_left(until) / (len(addresses) + 1))
                plain.connect(address)
                stack.pop_all()
                return plain
            except OSError:         # also where a kernel knows no IPv6
                if not addresses:
                    raise


@functools.cache
def tls_context(ca_file: str) -> ssl.SSLContext:
    """A TLS context that trusts the CAs of this host, or those of a file or directory instead."""
    try:
        context = ssl.create_default_context(capath=ca_file) if os.path.isdir(ca_file) else \
            ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise NetworkError(f"ca_file {ca_file}: no PEM file with certificates ({error.strerror})") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file and hasattr(ssl, "VERIFY_X509_STRICT"):
        # Python 3.13 asks of every CA what home-made ones rarely have.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def begin_tls(plain: Any, name: str, context: ssl.SSLContext | None = None) -> Any:
    """The connection with TLS begun on it, within its `until`; without a context any certificate will do."""
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.sslsocket_class = timed(ssl.SSLSocket)
    plain.settimeout(time_left(plain.until))
    secure: Any = context.wrap_socket(plain, server_hostname=name or None)
    secure.until = plain.until
    return secure


def network_reason(error: Exception, timeout: float) -> str:
    """Why a host was not reached, with what to do where that is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        by_date = error.verify_code in (9, 10)      # not valid yet, expired
        remedy = "is the clock of this host right?" if by_date else \
            "for a private CA set ca_file to the certificate that signed it"
        return f"its certificate is not trusted ({error.verify_message}); {remedy}"
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if isinstance(error, socket.timeout):
        return f"no whole answer within {timeout:g} s"
    text = sentence(error) if isinstance(error, OSError) else printable(str(error) or type(error).__name__)
    refused = re.match("Tunnel connection failed: 40[17]", text)        # says http.client; tinyproxy has 401 too
    return f"{text}; set proxy = http://USER:PASSWORD@HOST:PORT" if refused else text


def proxy_at(url: str) -> tuple[str, int, dict[str, str]]:
    """Host and port of a proxy, and the header with its password if it has one."""
    try:
        by = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        host, port = by.hostname, by.port or 3128
    except ValueError:
        host = None
    if not host or by.scheme not in ("", "http"):
        raise NetworkError(f"proxy {url.rpartition('@')[2]}: only http://HOST:PORT can be used")
    if by.username is None:
        return host, port, {}
    import base64
    user = ":".join(urllib.parse.unquote(part or "") for part in (by.username, by.password))
    return host, port, {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def converse(connection: Any, method: str, at: urllib.parse.SplitResult, headers: Mapping[str, str],
             body: bytes | None = None) -> Any:
    """Send a request; the answer, with its body still to be read."""
    connection.request(method, (at.path or "/") + (f"?{at.query}" if at.query else ""), body,
                       {"User-Agent": USER_AGENT, **headers})
    return connection.getresponse()


class Http:
    """HTTPS for one worker: a connection that is kept for the next request, through the proxy that the rules name."""

    def __init__(self, timeout: float, ca_file: str = "", proxy: str = "") -> None:
        self.timeout = timeout
        self.proxy = proxy
        self.until = 0.0                # the end of the present request, on the monotonic clock
        self.through = ""               # the proxy of the last connection, for messages
        self.ca_file = ca_file
        if ca_file:                     # what is wrong with it is said first
            tls_context(ca_file)
        self.kept: Any = None
        self.origin = ""                # host and port that it leads to

    def connect(self, host: str, port: int) -> None:
        """Connect to an origin, direct or by CONNECT, and begin TLS."""
        proxy = self.proxy
        if not proxy and not urllib.request.proxy_bypass(f"{host}:{port}"):
            proxy = urllib.request.getproxies().get("https", "")
        by, at, headers = proxy_at(proxy) if proxy and proxy != "none" else (host, port, None)
        self.through = "" if headers is None else f" through the proxy {by}:{at}"
        # To load the trust store takes as long as a round trip.
        with beside(lambda: http.client.HTTPSConnection(by, at, context=tls_context(self.ca_file))) as made:
            plain = dial(self.until, by, at)
        self.kept = made()
        self.kept._create_connection = lambda *_: plain
        if headers is not None:
            self.kept.set_tunnel(host, port, headers)
        http.client.HTTPConnection.connect(self.kept)       # HTTPSConnection's own knows of no deadline
        self.kept.sock = begin_tls(self.kept.sock, host, tls_context(self.ca_file))

    def request(self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> Response:
        """One request, `timeout` seconds in total; NetworkError says who was not reached and why."""
        try:
            at = urllib.parse.urlsplit(url)
        except ValueError as error:
            raise NetworkError(f"{url}: {error}") from error
        if at.scheme != "https" or not at.hostname:
            raise NetworkError(f"{url}: only https is used")
        self.until = time.monotonic() + self.timeout
        if at.netloc != self.origin:
            self.close()
        self.origin = at.netloc
        while True:
            kept = self.kept
            try:
                return self.attempt(method, at, body, headers)
            except (http.client.HTTPException, OSError, ValueError) as error:
                self.close()
                # A kept connection may have been closed meanwhile: once more on a new one.
                if not kept or isinstance(error, socket.timeout):
                    raise NetworkError(f"cannot reach {at.netloc}{self.through}: "
                                       f"{network_reason(error, self.timeout)}") from error

    def attempt(self, method: str, at: urllib.parse.SplitResult, body: bytes | None,
                headers: Mapping[str, str]) -> Response:
        """Send on the kept connection or a new one, and read the whole answer."""
        if self.kept is None:
            self.connect(at.hostname or "", at.port or 443)
        self.kept.sock.until = self.until
        with contextlib.closing(converse(self.kept, method, at, headers, body)) as response:
            data = response.read(BODY_BYTES + 1)
            if response.will_close or not response.isclosed():
                self.close()
        if len(data) > BODY_BYTES:
            raise NetworkError(f"{at.netloc}: an answer of more than {BODY_BYTES >> 20} MiB")
        if missing := response.length or 0:
            raise NetworkError(f"{at.netloc}: an answer of {len(data)} bytes where {len(data) + missing} were promised")
        return Response(response.status, response.headers, data)

    def close(self) -> None:
        """Close what is kept."""
        if self.kept is not None:
            self.kept.close()
            self.kept = None


class Finished(NamedTuple):
    """How a command ended: problem is "" for exit status 0."""
    problem: str
    output: list[str]


def with_last_line(finished: Finished) -> str:
    """The problem of a command with the last that it said, "" for none."""
    said = [line for line in finished.output if line.strip()][-1:] if finished.problem else []
    return re.sub(STAMP, "", ": ".join([finished.problem, *said]))[:500]       # or each failure would be news


def drain(pipe: Any, kept: bytearray) -> None:
    """Read a pipe to its end, so that the writer never waits, and keep only so much."""
    with pipe:
        while data := pipe.read(1 << 16):
            kept += data[:OUTPUT_BYTES - len(kept)]


class Ending:
    """Ends the program on a signal, and what was started with it; never in the moment between two of these."""

    def __init__(self) -> None:
        self.number = 0
        self.starting: set[int] = set()     # threads that are starting a process
        self.groups: set[int] = set()       # process groups that run

    def __call__(self, number: int, _: object) -> None:
        """Take a signal, in the main thread."""
        if self.number:             # it is ending already
            return
        self.number = number
        # While none is starting, threading may still be on its way in.
        if not self.starting or threading.get_ident() not in self.starting:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Let a signal wait for the end of this."""
        me = threading.get_ident()
        self.starting.add(me)
        try:
            if self.number:
                raise SystemExit(128 + self.number)
            yield
        finally:
            self.starting.discard(me)
            if self.number:
                raise SystemExit(128 + self.number)

    def kill(self) -> None:
        """Kill what other threads have running."""
        until = time.monotonic() + 0.5
        while self.starting and time.monotonic() < until:
            time.sleep(0.01)
        for group in list(self.groups):
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)


ending = Ending()


def child_environment() -> dict[str, str]:
    """The caller's environment, with a PATH that cron's lacks."""
    path = os.environ.get("PATH") or "/usr/local/bin:/usr/bin:/bin"
    return {**os.environ, "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin"}


def start(argv: Sequence[str], given: str, **how: Any) -> Any:
    """Start a command in a process group of its own, with this to read, and what it says in a pipe."""
    with tempfile.TemporaryFile() if given else contextlib.nullcontext() as text:
        if text:
            text.write(given.encode("utf-8", "surrogateescape"))
            text.seek(0)
        return subprocess.Popen(argv, stdin=text or subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, bufsize=0, start_new_session=True, **how)


def command(argv: Sequence[str], env: Mapping[str, str], timeout: float, *, given: str = "", cwd: str = "/",
            **how: Any) -> Finished:
    """Run a command to its end; its process group is killed as one on time-out or signal."""
    process, kept = None, bytearray()
    try:
        with ending.put_off():
            process = start(argv, given, env=env, cwd=cwd, **how)
            ending.groups.add(process.pid)
        reader = threading.Thread(target=drain, args=(process.stdout, kept), daemon=True)
        reader.start()
        status = process.wait(timeout)
        problem = f"exit status {status}" if status > 0 else f"killed by signal {-status}" if status else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {timeout:g} s (load_timeout)"
    except (OSError, ValueError) as error:
        return Finished(f"cannot be run: {getattr(error, 'strerror', None) or error}", [])
    finally:
        if process is not None:
            if process.poll() is None:
                # It may run as another user (sudo), or hang in the kernel.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(5)
            ending.groups.discard(process.pid)
    reader.join(0.5)            # not longer: a daemon left behind may hold the pipe for ever
    return Finished(problem, bytes(kept).decode("utf-8", "backslashreplace").splitlines())


def proc_text(pid: int | str, name: str) -> str:
    """A file of /proc, "" where it cannot be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read(1 << 16).decode("utf-8", "surrogateescape")
    return ""


def proc_link(pid: int | str, name: str) -> str:
    """A link of /proc, "" where it cannot be read."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/{name}")
    return ""


class Process(NamedTuple):
    """A running program."""
    pid: int
    parent: int
    argv: list[str]


def processes(commands: Sequence[str]) -> list[Process]:
    """The processes with one of these command names, in our own process and network namespaces."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        head, _, rest = proc_text(pid, "stat").rpartition(") ")
        name = head.partition("(")[2]
        if name not in commands or rest.startswith("Z"):
            continue
        if all(proc_link(pid, f"ns/{kind}") in ("", proc_link("self", f"ns/{kind}")) for kind in ("pid", "net")):
            found.append(Process(pid, int(rest.split()[1]), proc_text(pid, "cmdline").rstrip("\0").split("\0")))
    return found


def credentials(pid: int) -> dict[str, Any]:
    """As whom a process runs, in the words of `start`; {} if that is ourselves or cannot be had."""
    lines = re.findall(r"(?m)^(Uid|Gid|Groups):[ \t]*(.*)$", proc_text(pid, "status"))
    found = {key: [int(number) for number in numbers.split()] for key, numbers in lines}
    if os.geteuid() != 0 or len(found) < 3 or found["Uid"][1] == 0:
        return {}
    return {"user": found["Uid"][1], "group": found["Gid"][1], "extra_groups": found["Groups"]}


def catches(pid: int, number: int) -> bool:
    """Whether a process has a use for a signal; one that it has none for may end it."""
    mask = re.search(r"(?m)^SigCgt:\s*([0-9a-f]+)$", proc_text(pid, "status"))
    return bool(mask and int(mask[1], 16) >> (number - 1) & 1)


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
            line = answers.readline(1000)
            while line[3:4] == b"-" or (line[:2] == b"* " and not line.startswith(wanted)):
                line = answers.readline(1000)
            if not line.startswith(wanted):
                raise NetworkError(f"no STARTTLS: it said {line.decode('utf-8', 'replace').strip() or 'nothing'!r}")


def served(host: str, port: int, name: str, protocol: str, timeout: float) -> bytes:
    """The certificate (PEM) that a server shows for a name, trusted or not, in `timeout` seconds; NetworkError."""
    try:
        with contextlib.closing(dial(time.monotonic() + timeout, host, port)) as plain:
            ask_for_tls(plain, protocol)
            with begin_tls(plain, name) as secure:
                return ssl.DER_cert_to_PEM_cert(secure.getpeercert(True) or b"").encode()
    except (OSError, ValueError) as error:
        raise NetworkError(network_reason(error, timeout)) from error


def resolve(host: str) -> list[str]:
    """Every address of a name; NetworkError if it has none."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None)))
    except (OSError, ValueError) as error:
        raise NetworkError(network_reason(error, 0)) from error


def visit(url: str, address: str, timeout: float) -> Response:
    """What stands at a URL, asked at one address, whatever certificate is shown; NetworkError for no answer."""
    try:
        at = urllib.parse.urlsplit(url)
        host, port = at.hostname or "", at.port or (443 if at.scheme == "https" else 80)
        with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
            connection.sock = dial(time.monotonic() + timeout, address, port)
            if at.scheme == "https":
                connection.sock = begin_tls(connection.sock, host)
            response = converse(connection, "GET", at, {"Connection": "close"})
            return Response(response.status, response.headers, response.read(8192))
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise NetworkError(network_reason(error, timeout)) from error


def is_ours(address: str) -> bool:
    """Whether an address is one of this host's."""
    with contextlib.suppress(OSError), \
            socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def port_holder(port: int) -> str:
    """Who listens on a TCP port here, for a message: "nginx (pid 12)", or "" where it cannot be seen."""
    rows = [row.split() for table in ("tcp", "tcp6") for row in proc_text("self", f"net/{table}").splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if pid.isdigit() and any(proc_link(pid, f"fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd")):
                return f"{proc_text(pid, 'comm').strip()} (pid {pid})"
    return ""


def ask(question: str) -> bool:
    """Ask at the terminal; without one the answer is no."""
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return False
    log.show(f"{question} [y/N] ")
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        log.show("\n")
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
    visit: Callable[[str, str, float], Response] = visit
    ask: Callable[[str], bool] = ask


REAL = World()


class Job(NamedTuple):
    """Something to be done beside others; no longer than so many seconds are waited for it."""
    name: str
    act: Callable[[], Any]
    limit: float


def gather(jobs: Sequence[Job], width: int, world: World,
           until: float = float("inf")) -> Generator[tuple[str, Any], None, None]:
    """The jobs as they end, so many at once, each with its result or error; none is waited for without end.

    Those that could not be begun before `until`, on the monotonic clock, end with an error.
    """
    if not jobs:
        return
    waiting = list(jobs)
    ended: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    ends: dict[str, float] = {}     # of what is being done, when it is given up

    def work() -> None:
        with contextlib.suppress(IndexError):       # none is left
            while True:
                job, now = waiting.pop(0), world.monotonic()
                ends[job.name] = now + job.limit
                late = NetworkError("not begun, for this run has taken too long already; the next one does it")
                ended.put((job.name, outcome(job.act) if now < until else late))

    for _ in jobs[:width]:
        threading.Thread(target=work, daemon=True).start()
    left = len(jobs)
    try:
        while left:
            try:
                name, result = ended.get(timeout=1.0)
            except queue.Empty:
                now = world.monotonic()
                for name, end in list(ends.items()):
                    if end < now:
                        ended.put((name, NetworkError("did not end within the deadline; a later run goes on with it")))
                        threading.Thread(target=work, daemon=True).start()      # in place of the one that hangs
                continue
            if ends.pop(name, None) is not None:
                left -= 1
                yield name, result
    finally:
        waiting.clear()             # nobody waits for the rest


def at_once(calls: Mapping[str, Callable[[], T]], limit: float, world: World) -> list[T]:
    """What these calls return, several made at once, in their order; raises the first error as soon as there is one."""
    if len(calls) < 2:
        return [call() for call in calls.values()]
    with contextlib.closing(gather([Job(*one, limit) for one in calls.items()], AT_ONCE, world)) as ended:
        results = {name: result_of(end) for name, end in ended}
    return [results[name] for name in calls]


# === 3. files: the only disk ===================================================================
# Nothing is written over: a file is made beside its target, flushed to the disk, and renamed. Modes
# are set at creation, before the first byte.

LOG, LOCK = "wucme.log", "wucme.lock"


def file_label(name: str) -> str:
    """NAME as it stands in file names: *. becomes _. and : becomes -."""
    return name.lower().replace("*.", "_.").replace(":", "-")


def reserved(label: str) -> bool:
    """Whether NAME is taken by the account files."""
    return label == "account" or label.startswith("account_")


class Owner(NamedTuple):
    """Mode and owner of a file; -1 for whom the file system makes it."""
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


def other_owner(path: str, error: OSError) -> str:
    """Whose a path is, where that is why we may not; "" otherwise."""
    uid, us = owner(path, 0).uid, os.geteuid()
    if error.errno != errno.EACCES or uid == us:
        return ""
    return f": it belongs to user {uid}, and this runs as user {us}"


NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


@contextlib.contextmanager
def opened(path: str, flags: int, **where: int) -> Iterator[int]:
    """The descriptor of a file, made private if it is new, while it is needed."""
    descriptor = os.open(path, flags, 0o600, **where)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: str, cap: int = 1 << 20) -> bytes:
    """The content of a regular file of at most `cap` bytes; FileError for anything else, never a wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:            # not by `opened`, which takes longer than to read
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise FileError(f"{path}: not a regular file")
            if about.st_size > cap:
                raise FileError(f"{path}: {about.st_size} bytes, more than the {cap} that are read")
            return os.read(descriptor, about.st_size or cap)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}{other_owner(path, error)}") from error


def signature(path: str) -> tuple[str, bool]:
    """Size, modification time and inode, by which a file is known again ("" for none), and whether it is ours alone."""
    try:
        about = os.lstat(path)
        # Root's or ours, no link, and no group may write it; its directory is another question.
        ours = stat.S_ISREG(about.st_mode) and not about.st_mode & stat.S_IWGRP and (
            not about.st_uid or about.st_uid == os.geteuid())
        if stat.S_ISLNK(about.st_mode):
            about = os.stat(path)
    except OSError:
        return "", False
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ino}", ours


def sync_directory(path: str) -> None:
    """Flush the directory that holds a path, so that a rename in it survives a power cut."""
    with opened(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte."""
    while data:
        data = data[os.write(descriptor, data):]


OURS = Owner(0o600, -1, -1)         # private, and whoever runs this owns it


def remove(path: str, **where: int) -> None:
    """Delete a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path, **where)


def create(path: str, data: bytes, like: Owner = OURS, strict: bool = False) -> None:
    """Make a new file, on the disk when this returns; what was there goes; `strict`: OSError if not its owner's."""
    remove(path)
    with opened(path, NEW_FILE) as descriptor:
        try:
            os.fchown(descriptor, like.uid, like.gid)
        except PermissionError:         # not root: ours then
            if strict:
                raise
        os.fchmod(descriptor, like.mode)
        write_all(descriptor, data)
        os.fsync(descriptor)


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
    if os.path.isfile(path) and not os.path.islink(path) and read(path) == data and \
            all(wanted in (-1, found) for wanted, found in zip(like, owner(path, 0))):
        return
    temporary = os.path.join(directory, f".{base}_tmp")     # hidden: some servers read every file of a directory
    try:
        create(temporary, data, like, strict=True)
        rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise FileError(f"{path}: cannot be written there with this owner: {error.strerror}") from error


def link(to: str, path: str, by: str) -> None:
    """Make a path a symbolic link in one step, durably; `by` is a name that is free for it."""
    remove(by)
    os.symlink(to, by)
    rename(by, path)


def keep(path: str, target: str) -> None:
    """Give the present content of a path a second name."""
    remove(target)
    os.link(path, target)


def back_up(path: str, target: str) -> None:
    """Keep the present content of a path under another name: a second link, or (with a key in it) a private copy."""
    content = read(path)
    secret = b"PRIVATE KEY" in content
    if not secret and not os.path.islink(path):
        with contextlib.suppress(OSError):
            keep(path, target)
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


def lineage(path: str) -> Iterator[tuple[str, os.stat_result, bool]]:
    """What decides what is found at a path: itself, whether a link or not, and (False) the directories on the way."""
    to_see, seen = [(os.path.abspath(path), True)], set()
    for at, own in to_see:
        if at in seen:
            continue
        seen.add(at)
        above = os.path.dirname(at)
        with contextlib.suppress(OSError):
            about = os.lstat(at)
            yield at, about, own
            if stat.S_ISLNK(about.st_mode):
                to_see.append((os.path.normpath(os.path.join(os.path.realpath(above), os.readlink(at))), own))
        to_see.append((above, False))


def compiled(path: str) -> str:
    """Where Python keeps what it makes of a program that is started as a module."""
    import importlib.util
    return importlib.util.cache_from_source(path)


def compile_ahead(path: str) -> None:
    """Have Python keep what it makes of a program, if it may: for all, and as long as the program stays the same."""
    import py_compile
    umask = os.umask(0o022)
    with contextlib.suppress(OSError):
        py_compile.compile(path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    os.umask(umask)


def anyone_may_write(path: str) -> str:
    """Why root must not trust what is at a path: every user may change it, or put another in its place; "" if not."""
    for at, about, own in lineage(path) if os.geteuid() == 0 else ():
        barred = stat.S_ISLNK(about.st_mode) or (about.st_mode & stat.S_ISVTX and not own)     # sticky, as /tmp is
        if about.st_mode & stat.S_IWOTH and not barred:
            return f"{path}: anyone may write {'it' if at == path else at}, and root trusts it; chmod o-w {at}"
    return ""


def others_may_write(path: str) -> str:
    """Which user or group may change what decides what is found at a path, in words; "" if only root and we may."""
    for at, about, own in lineage(path):
        if about.st_uid not in (0, os.geteuid()):
            return f"{at} (it belongs to user {about.st_uid})"
        if own and about.st_mode & stat.S_IWGRP and not stat.S_ISLNK(about.st_mode):
            return f"{at} (group {about.st_gid} may write it)"
    return ""


def open_append(path: str) -> int:
    """The descriptor of a regular file to add lines to, private if it is new; OSError if it is anything else."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def read_json(path: str) -> Json:
    """A state file; what is not there, torn, or foreign counts as empty."""
    try:
        found = json.loads(read(path, 1 << 26).decode())
    except (FileError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def plant(base: str, below: Sequence[str], name: str, data: bytes) -> None:
    """Put a new public file into a directory that may be somebody else's, below some steps.

    It goes from descriptor to descriptor, so that nobody who may write there can lead it elsewhere: a link is followed
    only where none but root and we could have made it. It lives for a moment only, and is not flushed to the disk.
    """
    def give(descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)
        with contextlib.suppress(PermissionError):      # not root: ours then
            os.fchown(descriptor, whose.st_uid, whose.st_gid)

    flags = os.O_RDONLY | os.O_DIRECTORY
    at = os.open(base, flags)
    try:
        whose = os.fstat(at)
        for step in below:
            here, made = os.fstat(at), False
            with contextlib.suppress(FileExistsError):
                os.mkdir(step, 0o700, dir_fd=at)
                made = True
            safe = here.st_uid in (0, os.geteuid()) and not here.st_mode & 0o022
            inner = os.open(step, flags if safe else flags | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
            if made and os.fstat(at).st_uid == os.geteuid():
                give(at, 0o755)
        remove(name, dir_fd=at)
        with opened(name, NEW_FILE, dir_fd=at) as new:
            write_all(new, data)
            give(new, 0o644)
    except OSError as error:
        link = " (a link that another user could have made is not followed)"
        raise FileError(f"{os.path.join(base, *below, name)}: {error.strerror}"
                        + link * (error.errno in (errno.ELOOP, errno.ENOTDIR))) from error
    finally:
        os.close(at)


def make_directory(path: str) -> None:
    """Make a directory that a web server's user may pass through, with its parents, durably, whatever the umask."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if above:
        make_directory(above)
    try:
        os.mkdir(path)
        os.chmod(path, 0o755)
        sync_directory(path)
    except FileExistsError:
        if not os.path.isdir(path):     # else another worker made it meanwhile
            raise
    except PermissionError as error:
        above = above or "."
        raise FileError(f"{path}: cannot be made: {above}: {error.strerror}{other_owner(above, error)}") from error


def take_lock(path: str) -> int | None:
    """The descriptor that holds the lock, or None while another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except PermissionError as error:
        at = path if os.path.exists(path) else os.path.dirname(path)
        raise FileError(f"{at}: {error.strerror}{other_owner(at, error)}") from error
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
BASE64URL = r"[A-Za-z0-9_-]{1,256}"  # as challenges and nonces are
SKEW_SECONDS = 300              # how far our clock and the CA's may differ
HOST_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"


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
    at, beginning = 0, re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s")
    while begin := beginning.search(pem, at):
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
    try:
        found = x509.load_pem_x509_certificate(pem)
        list(found.extensions)
        return found
    except Exception as error:      # cryptography has several of its own for what is none
        raise PemError(f"not a certificate: {printable(str(error))[:100]}") from error


CURVES = {b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07": "SECP256R1", b"\x06\x05\x2b\x81\x04\x00\x22": "SECP384R1",
          b"\x06\x05\x2b\x81\x04\x00\x23": "SECP521R1"}        # by their identifiers in DER


def parse_odd_key(pem: bytes) -> PrivateKey | None:
    """An EC key whose number is longer or shorter than RFC 5915 asks, as GnuTLS writes it; None for others."""
    import base64
    with contextlib.suppress(ValueError, IndexError):
        der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
        at = der.index(b"\x02\x01\x01\x04") + 4       # version 1, and an OCTET STRING of less than 128 bytes
        number = int.from_bytes(der[at + 1:at + 1 + der[at]], "big")
        for identifier, curve in CURVES.items():
            if identifier in der:
                return ec.derive_private_key(number, getattr(ec, curve)())
    return None


def parse_key(pem: bytes) -> PrivateKey:
    """An unencrypted EC or RSA private key; PemError where it is none."""
    found = private_key(pem)
    try:
        key: Any = serialization.load_pem_private_key(found, None)
    except TypeError as error:
        raise KeyKindError("the private key is encrypted; wucme needs it in the clear") from error
    except Exception as error:      # cryptography has several of its own for what is no key
        key = parse_odd_key(found)
        if key is None:
            raise PemError("holds no whole private key" if found else "holds no private key") from error
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise KeyKindError(f"a private key of a kind that CAs do not take ({type(key).__name__.strip('_')}); "
                           "put an EC or RSA pair there, or move this one elsewhere")
    return key


def new_key(kind: str) -> PrivateKey:
    """A new private key of one of KEY_KINDS."""
    family, _, size = kind.partition("-")
    if family == "rsa":
        return rsa.generate_private_key(65537, int(size))
    return ec.generate_private_key(getattr(ec, f"SEC{size.upper()}R1")())


def key_pem(key: PrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def key_kind(public: Any) -> str:
    """The kind of a public key, as KEY_KINDS names it."""
    if isinstance(public, rsa.RSAPublicKey):
        return f"rsa-{public.key_size}"
    if isinstance(public, ec.EllipticCurvePublicKey):
        return f"ecdsa-{public.curve.name}".replace("secp", "p").replace("r1", "")
    return type(public).__name__.strip("_")


def key_hash(public: Any) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo, in hexadecimal."""
    import hashlib
    return hashlib.sha256(public.public_bytes(serialization.Encoding.DER,
                                              serialization.PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def validity(certificate: x509.Certificate) -> tuple[float, float]:
    """notBefore and notAfter in seconds since 1970; old releases of cryptography have naive times only."""
    import datetime
    start, end = (getattr(certificate, f"{field}_utc", None)
                  or getattr(certificate, field).replace(tzinfo=datetime.timezone.utc)
                  for field in ("not_valid_before", "not_valid_after"))
    return start.timestamp(), end.timestamp()


def extension(certificate: x509.Certificate | x509.CertificateSigningRequest, kind: type[T]) -> T | None:
    """What an extension of a certificate says, None where it has none of that kind."""
    return next((one.value for one in certificate.extensions if isinstance(one.value, kind)), None)


def alternative_names(certificate: x509.Certificate | x509.CertificateSigningRequest) -> tuple[str, ...]:
    """The DNS names and IP addresses of the subjectAltName, lower case, in its order."""
    return tuple(str(name.value).lower() for name in extension(certificate, x509.SubjectAlternativeName) or ()
                 if isinstance(name, (x509.DNSName, x509.IPAddress)))


def authority_key(certificate: x509.Certificate) -> bytes:
    """The identifier of the key that a certificate was signed by, b"" where it has none."""
    found = extension(certificate, x509.AuthorityKeyIdentifier)
    return (found and found.key_identifier) or b""


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


def from_base64url(text: str) -> bytes:
    """The bytes of base64url or base64, padded or not, with blanks in it; ValueError for what is neither."""
    import base64
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def jwk_key(text: bytes) -> PrivateKey:
    """The private key of a JWK (RFC 7517), as certbot keeps its account keys; PemError where it is none."""
    def number(name: str) -> int:
        return int.from_bytes(from_base64url(found[name]), "big")

    try:
        found = json.loads(text)
        if found["kty"] == "EC":
            return ec.derive_private_key(number("d"), getattr(ec, f"SEC{found['crv'].replace('-', '')}R1")())
        return rsa.RSAPrivateNumbers(number("p"), number("q"), number("d"), number("dp"), number("dq"), number("qi"),
                                     rsa.RSAPublicNumbers(number("e"), number("n"))).private_key()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PemError("neither a PEM private key nor a whole JWK") from error


def certificate_id(certificate: x509.Certificate) -> str:
    """What renewalInfo calls a certificate: authority key identifier and serial number, both as in its DER."""
    issuer, number = authority_key(certificate), certificate.serial_number
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return f"{base64url(issuer)}.{base64url(serial)}" if issuer else ""


def facts(chain: bytes) -> Facts:
    """What the first certificate of a chain says; PemError where there is none."""
    found = certificates(chain)
    if not found:
        raise PemError("holds no certificate")
    leaf = parse_certificate(found[0])
    try:
        public = leaf.public_key()
        return Facts(alternative_names(leaf), *validity(leaf), leaf.issuer.rfc4514_string(), f"{leaf.serial_number:x}",
                     leaf.fingerprint(hashes.SHA256()).hex(), key_hash(public), key_kind(public), certificate_id(leaf))
    except Exception as error:      # of what may stand in a certificate not all is known to cryptography
        raise PemError(f"a certificate that cannot be read: {printable(str(error))[:100]}") from error


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    return ":" in name or name.replace(".", "").isdigit()


def host_name(text: str) -> str:
    """A DNS name (with *. before it perhaps) or IP address in the form that CAs want; ValueError if neither."""
    name = text.strip().lower().removesuffix(".")
    bare = name.strip("[]")
    if is_address(bare) and "%" not in bare:
        import ipaddress
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(bare))
    if set(name) & set("\u00df\u03c2\u200c\u200d"):     # Python's old IDNA makes another domain of it (UTS 46, 7)
        raise ValueError(f"{printable(text)!r} must be written in its xn-- form")
    if not name.isascii():
        name = name.encode("idna").decode()
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or not all(re.fullmatch(HOST_LABEL, label) for label in labels) or labels[-1].isdigit():
        raise ValueError(f"{printable(text)!r} is neither a host name nor an IP address")
    return name


def alternatives(names: Iterable[str]) -> x509.SubjectAlternativeName:
    """The subjectAltName of these names and addresses."""
    import ipaddress
    return x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name)) if is_address(name)
                                        else x509.DNSName(name) for name in names])


def signing_request(key: PrivateKey, names: Iterable[str], staple: bool = False) -> bytes:
    """A CSR (DER) with an empty subject and exactly these names (RFC 8555, 7.4); `staple`: as RFC 7633 says."""
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(alternatives(names), critical=False)
    if staple:
        builder = builder.add_extension(x509.TLSFeature([x509.TLSFeatureType.status_request]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def request_facts(pem: bytes) -> tuple[bytes, tuple[str, ...], str]:
    """A CSR as DER, the names that it asks for, and SHA-256 of its public key; PemError for what is none."""
    try:
        request = x509.load_pem_x509_csr(pem)
        if not request.is_signature_valid:
            raise ValueError("its signature is wrong")
        common = [str(one.value).lower() for one in request.subject if one.oid.dotted_string == "2.5.4.3"]
        return (request.public_bytes(serialization.Encoding.DER),
                tuple(dict.fromkeys([*common, *alternative_names(request)])), key_hash(request.public_key()))
    except Exception as error:      # cryptography has several of its own for what is none
        raise PemError(f"not a certificate signing request: {printable(str(error))[:100]}") from error


def key_of(pem: bytes) -> str:
    """SHA-256 of the public half of the key in a PEM text: of a private key, or of a CSR whose key is elsewhere."""
    if private_key(pem) or not blocks(pem, "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"):
        return key_hash(parse_key(pem).public_key())
    return request_facts(pem)[2]


def challenge_certificate(name: str, digest: bytes) -> bytes:
    """The certificate, behind its key, that answers tls-alpn-01 for a name or address (RFC 8737 section 3)."""
    import datetime
    key = new_key("ecdsa-p256")
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(1)
    subject = x509.Name([])
    proof = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"), b"\x04\x20" + digest)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(),
                                      now - day, now + day)
    builder = builder.add_extension(alternatives([name]), critical=True).add_extension(proof, critical=True)
    return key_pem(key) + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether names, key identifiers and signature say that one certificate was issued by the other."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    theirs, own = authority_key(certificate), extension(issuer, x509.SubjectKeyIdentifier)
    if certificate.issuer != issuer.subject or (theirs and own and theirs != own.digest):
        return False
    pss = x509.SignatureAlgorithmOID.RSASSA_PSS     # its parameters cannot be had from old releases
    try:
        public, algorithm = issuer.public_key(), certificate.signature_hash_algorithm
        if isinstance(public, ec.EllipticCurvePublicKey) and algorithm:
            public.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
        elif isinstance(public, rsa.RSAPublicKey) and algorithm and certificate.signature_algorithm_oid != pss:
            public.verify(certificate.signature, certificate.tbs_certificate_bytes, padding.PKCS1v15(), algorithm)
    except UnsupportedAlgorithm:                    # newer than this cryptography: names and identifiers have to do
        return True
    except (InvalidSignature, ValueError):
        return False
    return True


def chain_matches(chain: bytes, wanted: str) -> bool:
    """Whether a certificate of a chain, or its issuer, is the one that `chain` means."""
    digits = wanted.replace(":", "").lower()
    for one in map(parse_certificate, certificates(chain)):
        marks = one.fingerprint(hashes.SHA256()).hex(), authority_key(one).hex()
        if wanted.lower() in one.issuer.rfc4514_string().lower() or any(
                len(digits) >= 4 and mark.startswith(digits) for mark in marks):
            return True
    return False


def certificate_der(chain: bytes) -> bytes:
    """The first certificate of a chain as DER."""
    return parse_certificate(certificates(chain)[0]).public_bytes(serialization.Encoding.DER)


def gmt(when: float) -> str:
    """A time as certificates print it: Mar 13 12:52:11 2026 GMT."""
    try:
        return time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(when))
    except (OverflowError, ValueError, OSError):
        return f"{when:.0f} s after 1970"


def check_chain(chain: bytes, key: str, names: Sequence[str], now: float) -> list[str]:
    """Refuse (PemError) a chain that must not go live; the names that it has beyond those asked for."""
    others = {label for label, _ in pem_blocks(chain)} - {"CERTIFICATE"}
    if others:
        raise PemError(f"the CA sent more than certificates ({', '.join(sorted(others))})")
    found = [parse_certificate(pem) for pem in certificates(chain)]
    if not 0 < len(found) <= CHAIN_LENGTH:
        raise PemError(f"the CA sent {f'a chain of {len(found)} certificates' if found else 'no certificate'}")
    leaf, basic = facts(chain), extension(found[0], x509.BasicConstraints)
    missing = sorted(set(names) - set(leaf.names))
    fault = "is a CA's" if basic and basic.ca else \
        "is for another key" if leaf.key != key else \
        f"lacks {', '.join(missing)}" if missing else \
        f"is not valid now ({gmt(leaf.not_before)} to {gmt(leaf.not_after)}); is the clock of this host right?" \
        if not leaf.not_before - SKEW_SECONDS <= now < leaf.not_after else ""
    if fault:
        raise PemError(f"the certificate that the CA sent {fault}")
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
CHALLENGE_TYPES = ("http-01", "dns-01", "tls-alpn-01", "dns-persist-01")
HOOK_FAMILIES = ("uacme", "dehydrated", "certbot", "lego", "mod_md")
SAFE_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]*"
HTTPS_URL = (r"(?i:https)://(?:[^][\s/?#@]*@)?(?:\[(?:[0-9a-fA-F]*:){2,}[0-9a-fA-F:.]*\]|[^][\s/?#@:]+)"
             r"(?::([0-9]{0,9}))?(?:[/?#]\S*)?")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INI_HEAD = """\
# wucme.ini: settings of wucme.py; see wucme.py --help.
#
# Looked for at --ini FILE, $WUCME_INI, beside wucme.py, /etc/wucme/wucme.ini, ~/.wucme/wucme.ini.
# Every setting has a default and is shown at it: take away the "# " to change one. The lists load and alert
# go on in the next lines, indented. There are no comments behind a value. Durations: 20s 10m 12h 30d.
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
    form: str               # shown for a default that is empty
    local: bool             # whether it makes sense in a section of its own only


def setting(kind: Callable[[str], T], default: str, text: str, form: str = "", local: bool = False) -> T:
    """Declare a setting where its value will stand; for the type checker it has that value's type."""
    return cast("T", Setting(kind, default, text, form, local))


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


class Hook(NamedTuple):
    """A program that answers challenges, and the family by whose rules it is called."""
    family: str
    begin: tuple[str, ...]
    end: tuple[str, ...]            # () for none


Address = tuple[str, int]       # host and port


class Updates(NamedTuple):
    """A TSIG key file for nsupdate, and the server and zone to change, "" for what the DNS says."""
    key: str
    server: Address
    zone: str


def of_form(pattern: str, fault: str, convert: Callable[[str], T]) -> Callable[[str], T]:
    """The reader of texts of one form; ValueError says what a text must be."""
    def read_text(text: str) -> T:
        if not re.fullmatch(pattern, text):
            raise ValueError(fault)
        return convert(text)

    return read_text


def each(reader: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """The reader of several values with blanks between, of which each counts once."""
    return lambda text: tuple(dict.fromkeys(reader(word) for word in text.split()))


def seconds(text: str) -> float:
    """The seconds of a duration."""
    return float(text[:-1]) * SECONDS[text[-1]]


def renewal(text: str) -> Renewal:
    """auto, never, a duration, a bare number of days, or a percentage of the lifetime."""
    if text.endswith("%"):
        return Renewal(share=int(text[:-1]) / 100)
    if text[0].isdigit():
        return Renewal(seconds=seconds(f"{text}d" if text.isdigit() else text))
    return Renewal(auto=text == "auto")


def a_url(text: str) -> str:
    """An https URL, or none."""
    at = re.fullmatch(HTTPS_URL, text)      # to load urllib.parse takes longer than to read all settings
    if text and not (at and 0 < int(at[1] or 443) < 65536):
        raise ValueError("must be an https:// URL, https://HOST[:PORT][/PATH]")
    return text


def a_path(text: str) -> str:
    """A path, ~ allowed."""
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def an_address(text: str) -> Address:
    """An address to listen on, as host and port; host "" is every address."""
    match = re.fullmatch(r"(\[.+\]|[^][:]*):([0-9]{1,5})", text)
    if not match or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{text!r} must be :PORT, ADDRESS:PORT or [ADDRESS]:PORT")
    return match[1].strip("[]"), int(match[2])


def some_addresses(text: str) -> tuple[Address, ...] | None:
    """Addresses to listen on, or none; None where that is left open."""
    return each(an_address)("" if text == "none" else text) if text else None


def some_lines(text: str) -> tuple[str, ...]:
    """One entry a line."""
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def a_hook(text: str) -> Hook | None:
    """FAMILY:FILE, for certbot COMMAND[,CLEANUP]; or none."""
    family, _, rest = text.partition(":")
    if family == "certbot":
        begin, _, end = rest.partition(",")
        return Hook(family, ("/bin/sh", "-c", begin), ("/bin/sh", "-c", end) if end else ())
    return Hook(family, (rest,), (rest,)) if text else None


def some_updates(text: str) -> Updates | None:
    """KEYFILE [SERVER[:PORT]] [ZONE], or none."""
    key, server, zone = [*text.split(), "", "", ""][:3]
    lone = server.count(":") != 1 and not server.startswith("[")
    return Updates(a_path(key), (server, 53) if lone else an_address(server), zone) if text else None


DURATION_FAULT = "must be a duration such as 20s, 10m, 12h or 30d"
a_duration = of_form("[0-9]{1,9}[smhd]", DURATION_FAULT, seconds)
a_limit = of_form("0*[1-9][0-9]{0,8}[smhd]", f"{DURATION_FAULT}, at least 1s", seconds)
a_renewal = of_form("auto|never|0*[1-9][0-9]?%|[0-9]{1,9}[smhd]?",
                    "must be auto, never, a duration such as 30d or 12h, or a share such as 25%", renewal)
a_count = of_form("[0-9]+", "must be a whole number", int)
a_number = of_form("0*[1-9][0-9]*", "must be a whole number, at least 1", int)
a_flag = of_form("(?i:yes|no)", "must be yes or no", lambda text: text.lower() == "yes")
a_label = of_form(f"({SAFE_NAME})?", "only letters, digits, '.', '_' and '-' can be used", str)
a_key_kind = of_form("|".join(KEY_KINDS), f"must be one of {', '.join(KEY_KINDS)}", str)
an_hmac = of_form("HS(256|384|512)", "must be HS256, HS384 or HS512", str)     # RFC 7518 section 3.2
a_challenge = of_form("|".join(CHALLENGE_TYPES), f"must be of {', '.join(CHALLENGE_TYPES)}", str)
hook_or_none = of_form(f"(({'|'.join(HOOK_FAMILIES)}):/.*|certbot:\\s*[^,\\s].*)?",
                       f"must be one of {', '.join(HOOK_FAMILIES)}, a colon, and the whole path of a file", a_hook)
updates_or_none = of_form(r"(\S+(\s+\S+){0,2})?", "must be KEYFILE [SERVER[:PORT]] [ZONE]", some_updates)
some_contacts = each(lambda word: word.removeprefix("mailto:"))
some_paths = each(a_path)
some_challenges = of_form(".+", "must name a challenge type", each(a_challenge))
some_servers = of_form(".+", "must name a CA", each(lambda word: a_url(word) if "://" in word else word))


class RunScope(NamedTuple):
    """Settings of the whole run."""
    directory: str = setting(
        a_path, "", "where certificates, keys and state are; default: /etc/wucme for root, else ~/.wucme", "PATH")
    log: str = setting(a_path, "", "the log file; default: wucme.log in the directory", "PATH")
    backups: int = setting(a_count, "3", "how many old certificates (and keys) are kept of each")
    workers: int = setting(a_number, "4", "how many certificates are obtained side by side")
    orders: int = setting(a_number, "100", "how many certificates are ordered in one run, the most urgent first; the "
                          "rest are left to the next")
    lock_wait: float = setting(a_duration, "10m", "how long to wait for another run to end")
    timeout: float = setting(a_limit, "20s", "the longest that one request to the CA may take, in all")
    deadline: float = setting(a_limit, "2m", "the longest that one certificate may take; a later run goes "
                              "on with its order. A run that has taken 30 times as long leaves the rest to the next")
    alert: tuple[str, ...] = setting(
        some_lines, "", "@ and $ items, one a line, that get the report to read when the set of problems changes, and "
        "daily for a certificate that is late in the last quarter of its life", "ITEM")
    metrics: str = setting(a_path, "", "a file for Prometheus (textfile collector), written by each run", "PATH")
    host: str = setting(
        a_label, "", "this host's name in a directory that several share; default: the host name", "NAME")


class CertificateScope(NamedTuple):
    """Settings of one certificate."""
    server: tuple[str, ...] = setting(
        some_servers, "letsencrypt", f"the CA: {', '.join(KNOWN_SERVERS)}, the name of a [server NAME] section, or the "
        "URL of an ACME directory; several in order of preference: the next is asked when one cannot be reached, or "
        "has refused three times")
    names: tuple[str, ...] = setting(each(host_name), "", "host names and IP addresses; default: the section's title",
                                     "NAME...", local=True)
    key: str = setting(a_key_kind, "ecdsa-p256", f"kind of a new key: {', '.join(KEY_KINDS)}")
    rotate: bool = setting(a_flag, "no", "make a new key for each renewal; the chain file then holds the key too, "
                           "and the key file is a link to it")
    renew: Renewal = setting(a_renewal, "auto", "when: auto (a third of the lifetime left, half under 10 days), "
                             "30d, 12h, 25%, never; a bare number is days")
    profile: str = setting(str, "", "which of the profiles that the CA offers; default: the CA's choice", "NAME")
    chain: str = setting(
        str, "", "if the CA offers several chains, the first with a certificate whose name holds this text, or whose "
        "SHA-256 fingerprint or key identifier begins so; a number: that one of the alternates", "TEXT")
    csr: str = setting(a_path, "", "a signing request (PEM) for just these names, whose key is kept elsewhere", "PATH",
                       local=True)
    must_staple: bool = setting(a_flag, "no", "ask for a certificate that counts with a stapled OCSP answer alone (RFC "
                                "7633); few CAs still give one", local=True)
    challenge: tuple[str, ...] = setting(
        some_challenges, "http-01", "how control of the names is proved, in order of preference: "
        f"{', '.join(CHALLENGE_TYPES)}; when one fails the next is tried in a new order")
    listen: tuple[Address, ...] | None = setting(
        some_addresses, "", "where http-01 is answered while an order runs, several by blanks; the CA asks at port 80, "
        "or whatever your router makes of it; default: :80, or none where webroot, stateless or a hook answers; none "
        "and nothing else: a web server answers, from tokens/ or by this program as its CGI script", "ADDRESS:PORT")
    listen_tls: tuple[Address, ...] | None = setting(
        some_addresses, "", "the same for tls-alpn-01; the CA asks at port 443; default: :443, or none where a hook "
        "answers", "ADDRESS:PORT")
    webroot: tuple[str, ...] = setting(some_paths, "", "document roots of a web server that answers http-01, by blanks",
                                       "PATH...")
    stateless: bool = setting(a_flag, "no", "yes: a web server answers every http-01 token by itself")
    hook: Hook | None = setting(
        hook_or_none, "", "a program that answers challenges for which nothing else is set, and the family by whose "
        "rules it is called: uacme:FILE, dehydrated:FILE, certbot:COMMAND[,CLEANUP], lego:FILE, mod_md:FILE",
        "FAMILY:FILE")
    nsupdate: Updates | None = setting(
        updates_or_none, "", "answer dns-01 by nsupdate with this TSIG key file, at this server and in this zone if "
        "the DNS does not say the right ones", "KEYFILE [SERVER[:PORT]] [ZONE]")
    dns_wait: float = setting(
        a_duration, "2m", "the longest to wait until every name server of the zone has the record of dns-01")
    load: tuple[str, ...] = setting(
        some_lines, "", "what to do when a certificate is new, one item a line: see LOAD LIST", "ITEM")
    load_timeout: float = setting(a_limit, "5m", "the longest that one item of load may take")
    grace: float = setting(a_duration, "10s", "how long a ? item waits for the server to serve the new certificate")


class ServerScope(NamedTuple):
    """Settings of one CA."""
    url: str = setting(a_url, "", "URL of its ACME directory, for a CA that is not known", "URL", local=True)
    ca_file: str = setting(a_path, "", "trust this PEM file alone for its HTTPS; default: the system's CAs", "PATH")
    proxy: str = setting(str, "", "HTTP proxy to reach it by, http://[USER:PASSWORD@]HOST:PORT, or none; "
                         "default: $https_proxy and $no_proxy", "URL")
    contact: tuple[str, ...] = setting(some_contacts, "", "mail address for a new account; optional at most CAs",
                                       "ADDRESS")
    agree: bool = setting(a_flag, "no", "yes: you agree to its terms of service")
    eab_kid: str = setting(str, "", "key identifier for an account bound to one that you have with the CA", "TEXT")
    eab_hmac: Secret = setting(Secret, "", "its MAC key, base64url; not an option", "TEXT")
    eab_hmac_file: str = setting(a_path, "", "a file that holds the MAC key instead", "PATH")
    profile: str = setting(str, "", "the profile of certificates that name none", "NAME", local=True)
    chain: str = setting(str, "", "the chain of certificates that name none", "TEXT", local=True)
    eab_alg: str = setting(an_hmac, "HS256", "its algorithm: HS256, HS384 or HS512")


SCOPES: dict[Any, tuple[str, str]] = {       # with the title of its section, and what it is of
    RunScope: ("[wucme]", "the whole run"),
    CertificateScope: ("[NAME]", "each certificate; also in a section [NAME]"),
    ServerScope: ("[server NAME]", "each CA; also in a section [server NAME]")}
SETTINGS: dict[str, Setting] = {name: field for scope in reversed(SCOPES)
                                for name, field in scope._field_defaults.items()}


class Source(NamedTuple):
    """The text that settings came from, to say where something stands."""
    path: str
    text: str

    def where(self, section: str, key: str = "", item: str = "") -> str:
        """FILE:LINE of a section, of a key in it, or of one line of that key's list; else it is an option."""
        here, at, margin, found = "", "", 0, "the command line"
        for number, line in enumerate(self.text.split("\n"), 1):
            text, indent = line.strip(), len(line) - len(line.lstrip())
            if not text or text[0] in "#;":
                continue
            if not at or indent <= margin:              # else it goes on with what the key says
                margin = indent
                if text[0] == "[":
                    here, at, text = text[1:-1], "", ""
                else:
                    word, _, text = (part.strip() for part in text.partition("="))
                    at = word.lower()
            if here == section and at in ("", key) and item in ("", text):
                found = f"{self.path}:{number}"
                if at == key:
                    break
        return found


NOWHERE = Source("", "")


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
    """A hint at what was probably meant; "" if nothing is near."""
    import difflib
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


INI_FAULTS = {
    "DuplicateOptionError": "{0.option} stands twice in [{0.section}]; keep one",
    "DuplicateSectionError": "[{0.section}] stands twice; join the two",
    "MissingSectionHeaderError": "{1!r} stands before any section; begin with [wucme]",
}


def parse_ini(source: Source) -> dict[str, dict[str, str]]:
    """The sections of an ini as texts; SettingsError with file and line for what is not one."""
    import configparser
    parser = configparser.RawConfigParser(delimiters=("=",), default_section="")
    lines = source.text.split("\n")
    for number, line in enumerate(lines, 1):
        if "\0" in line or re.match(r"\[.*[^]\s]\s*$|\s*\[[^]]*\]\s+[#;]", line):
            raise SettingsError(f"{source.path}:{number}: {printable(line)!r}: nothing may stand behind a section's "
                                "title, and no NUL anywhere")
    try:
        parser.read_file(lines)
    except configparser.Error as error:
        about: Any = error
        number = about.lineno if hasattr(about, "lineno") else about.errors[0][0]
        fault = INI_FAULTS.get(type(error).__name__, "{1!r} is neither KEY = VALUE nor a section")
        raise SettingsError(f"{source.path}:{number}: {fault.format(error, lines[number - 1].strip())}") from error
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
        shown = "..." if kind is Secret else printable(text)
        raise SettingsError(f"{source.where(section, key)}: {key} = {shown}: {error}") from error


def read_texts(source: Source, title: str, texts: Mapping[str, str], *scopes: Any) -> dict[str, Any]:
    """The values of a section that may have settings of these scopes; SettingsError for a key of none of them."""
    known = [name for scope in scopes for name in scope._fields if title != "wucme" or not SETTINGS[name].local]
    for key in texts:
        if key not in known:
            home = next((home for scope, (home, _) in SCOPES.items() if key in scope._fields), "")
            raise SettingsError(f"{source.where(title, key)}: " + (
                f"{key} belongs into {home}, not into [{title}]" if home else
                f"unknown setting {key!r}{nearest(key, known)}"))
    return {key: parse_value(source, title, key, text) for key, text in texts.items()}


def pick(scope: Any, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of several layers that belong to one scope; the last layer that has one counts."""
    return {key: value for layer in layers for key, value in layer.items() if key in scope._fields}


def default_directory() -> str:
    """Where certificates are kept unless the settings say otherwise."""
    found = os.path.expanduser("~/.wucme") if os.geteuid() else "/etc/wucme"
    if found.startswith("~"):
        raise SettingsError("this user has no home directory; set directory = PATH, or --directory")
    return found


def find_ini(named: str) -> str:
    """The ini in use: the one named (which must be there), else the first that is there, else ""."""
    if named and not os.path.exists(named):
        raise SettingsError(f"{named}: there is no such file")
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wucme.ini")
    paths = named, beside, "/etc/wucme/wucme.ini", os.path.expanduser("~/.wucme/wucme.ini")
    return next(filter(os.path.exists, paths), "")


def read_source(path: str) -> Source:
    """The text of an ini, "" for none; SettingsError if it cannot be read or anyone may write it."""
    if not path:
        return NOWHERE
    if fault := anyone_may_write(path):
        raise SettingsError(fault)
    try:
        return Source(path, read(path).decode("utf-8-sig"))
    except FileError as error:
        raise SettingsError(str(error)) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_section(source: Source, title: str, texts: Mapping[str, str], default: CertificateScope,
                 given: Mapping[str, Any]) -> Section:
    """The section of one certificate, over the defaults and under the options of this call."""
    if not texts.get("names") and "." not in title and ":" not in title:
        raise SettingsError(f"{source.where(title)}: [{title}] is no host name and has no names = ..."
                            f"{nearest(title.lower(), ['wucme', 'server NAME'])}")
    texts = {**texts, "names": texts.get("names") or title}
    own = pick(CertificateScope, read_texts(source, title, texts, CertificateScope), given)
    label = file_label(title)
    if not re.fullmatch(SAFE_NAME, label) or reserved(label):
        raise SettingsError(f"{source.where(title)}: [{title}] cannot be a file name; use letters, digits, "
                            "'.', '_' and '-', not account or account_*")
    return Section(title, default._replace(**own), frozenset(own))


def find_server(settings: Settings, name: str, title: str = "wucme") -> tuple[str, ServerScope]:
    """The CA that a `server` word means, with its short name; SettingsError if it means none."""
    found = settings.servers.get(name)
    if found and found.url:
        return name, found
    if name.startswith("https://"):
        return re.sub(r"[^A-Za-z0-9._-]", "-", name.split("/")[2]), settings.other_server._replace(url=name)
    if found:
        raise SettingsError(f"{settings.source.where(f'server {name}')}: [server {name}] needs a url")
    raise SettingsError(f"{settings.source.where(title, 'server')}: server = {name}: no such CA"
                        f"{nearest(name, settings.servers)} (there are {', '.join(settings.servers)}, or the URL of an "
                        "ACME directory)")


def read_settings(source: Source, options: Mapping[str, str]) -> Settings:
    """All settings out of the ini and the options; SettingsError for the first thing wrong."""
    texts = parse_ini(source)
    common = texts.pop("wucme", {})
    given = read_texts(NOWHERE, "", options, *SCOPES)
    plain = {key: field.kind(field.default) for key, field in SETTINGS.items()}
    shared = read_texts(source, "wucme", common, *SCOPES)
    run, default, other = (scope(**pick(scope, plain, shared, given)) for scope in SCOPES)
    other = other._replace(profile="", chain="")        # [wucme] says these of certificates
    servers = {name: other._replace(url=url) for name, url in KNOWN_SERVERS.items()}
    sections: dict[str, Section] = {}
    for title, body in texts.items():
        kind, _, name = title.partition(" ")
        label = file_label(title)
        if kind == "server" and name:
            if not re.fullmatch(SAFE_NAME, name):
                raise SettingsError(f"{source.where(title)}: [{title}]: only letters, digits, '.', '_' and '-' can be "
                                    "used")
            own = read_texts(source, title, body, ServerScope)
            servers[name] = servers.get(name, other)._replace(**pick(ServerScope, own, given))
        elif label in sections:
            raise SettingsError(f"{source.where(title)}: [{title}] names the same certificate as "
                                f"[{sections[label].title}]")
        else:
            sections[label] = read_section(source, title, body, default, given)
    directory = run.directory or default_directory()
    run = run._replace(directory=directory, log=run.log or os.path.join(directory, LOG),
                       host=run.host or os.uname().nodename)
    lists = {line: title for title, body in [*texts.items(), ("wucme", common), ("", options)]
             for line in some_lines(body.get("load", ""))}
    settings = Settings(run, default, sections, servers, other, source, lists)
    for title, scope in [("wucme", default), *((one.title, one.values) for one in sections.values())]:
        for name in scope.server:
            find_server(settings, name, "" if "server" in given else title)
    return settings


def wrapped(text: str, width: int, indent: str) -> str:
    """Text broken into lines."""
    import textwrap
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def ini_section(title: str, texts: Mapping[str, str]) -> str:
    """A section as an ini has it."""
    lines = [f"[{title}]"]
    for key, text in texts.items():
        items = some_lines(text) if SETTINGS[key].kind is some_lines else ()
        lines += [f"{key} ={'' if items else f' {text}'}", *(f"    {item}" for item in items)]
    return "\n".join(lines) + "\n"


def declare(settings: Settings, names: Sequence[str], options: Mapping[str, str]) -> tuple[Settings, str]:
    """The settings with what `issue` asks for as a section, unless the ini has one; and that one's label."""
    wanted = parse_value(NOWHERE, "", "names", " ".join(names))
    csr = a_path(options.get("csr", ""))
    try:
        if csr and not wanted:
            wanted = request_facts(read(csr))[1]
    except WucmeError as error:
        raise SettingsError(f"--csr: {error}") from error
    if not wanted:
        raise SettingsError("issue needs the names that the certificate is for")
    label = file_label(wanted[0])
    known = settings.sections.get(label)
    if known and len(wanted) > 1 and set(known.values.names) != set(wanted):
        raise SettingsError(f"{settings.source.where(known.title)}: [{known.title}] says which names its certificate "
                            f"has ({' '.join(known.values.names)}); change them there")
    known = known or read_section(NOWHERE, wanted[0], {"names": " ".join(wanted)}, settings.default, {})
    given = pick(CertificateScope, read_texts(NOWHERE, "", options, *SCOPES))
    section = known._replace(values=known.values._replace(**given), own=known.own | set(given))
    lists = {**dict.fromkeys(section.values.load, ""), **settings.lists}
    return settings._replace(sections={**settings.sections, label: section}, lists=lists), label


WHOLE: dict[Any, Callable[[str], str]] = {      # how paths become such as do not depend on where a command is given
    a_path: a_path, some_paths: lambda text: " ".join(some_paths(text)),
    updates_or_none: lambda text: re.sub(r"^\S+", lambda key: a_path(key[0]), text)}


def unsaid(plain: Settings, options: Mapping[str, str]) -> dict[str, str]:
    """The options that the ini does not say already, as it should say them."""
    said = {**plain.other_server._asdict(), **plain.default._asdict(), **plain.run._asdict()}
    return {key: WHOLE.get(SETTINGS[key].kind, str)(text.strip()) for key, text in options.items()
            if key != "agree" and parse_value(NOWHERE, "", key, text) != said[key]}


def keep_options(source: Source, path: str, section: Section, options: Mapping[str, str]) -> list[str]:
    """Write the options of a first issue into the ini, so that renewals do the same; lines that say so."""
    plain = read_settings(source, {})
    new = unsaid(plain, options)
    own = pick(CertificateScope, new)
    common = {key: text for key, text in new.items() if key not in own}
    secret = "@" in common.get("proxy", "")
    lines, added = [], []
    if common and source.text.strip():
        shown = {**common, "proxy": "..."} if secret else common
        lines.append(f"for renewals, write into {path} yourself: "
                     + "; ".join(f"{key} = {text}" for key, text in shown.items()))
    elif common:
        added.append(ini_section("wucme", common))
    if own and file_label(section.title) in plain.sections:
        lines.append(f"[{section.title}] stands in {path} already; for renewals, change it there")
    elif own:
        added.append(ini_section(section.title, {"names": " ".join(section.values.names), **own}))
    if added:
        old = source.text.rstrip("\n") + "\n\n" if source.text.strip() else ""
        try:
            make_directory(os.path.dirname(path))
            replace(path, (old + "\n".join(added)).encode(), 0o600 if secret else 0o644)
            lines.append(f"for renewals, the options were written to {path}")
        except OSError as error:
            lines.append(f"{sentence(error)}; for renewals, write this into an ini yourself:\n" + "\n".join(added))
    return lines


def example_ini() -> str:
    """The shipped wucme.ini: every setting, commented out at its default."""
    parts = [INI_HEAD, "[wucme]"]
    for scope, (_, whose) in SCOPES.items():
        parts.append(f"# --- of {whose} ---\n")
        parts += [f"{wrapped(field.help, 98, '# ')}\n# {f'{name} = {field.default}'.strip()}\n"
                  for name, field in scope._field_defaults.items() if not field.local]
    return "\n".join(parts) + INI_TAIL


def settings_help() -> str:
    """The settings as the manual lists them."""
    lines = ["SETTINGS (in wucme.ini, or as options)"]
    for scope, (_, whose) in SCOPES.items():
        lines.append(f"  of {whose}:")
        for name, field in scope._field_defaults.items():
            lines += [f"  {name} = {field.default or field.form}" + "  (in a section only)" * field.local,
                      wrapped(field.help, 96, "      ")]
    return "\n".join(lines) + "\n"


# === 6. inventory: what is in the directory ====================================================
# Looks, and changes nothing. What a certificate said is remembered with size, time and inode of its
# files, so that a run with nothing to do parses none.

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

    @property
    def settled(self) -> bool:
        """Whether no attempt is under way, and none went wrong."""
        return not (self.order or self.order_server or self.problem or self.failures or self.retry_at
                    or self.held_until)


MEMORY_TYPES = {key: type(default) for key, default in Memory._field_defaults.items()}
FACTS_TYPES = [list, float, float, *[str] * 6]          # as a state file has them


class Entry(NamedTuple):
    """One certificate: its files, what they say, and what the settings want of it."""
    name: str                       # NAME, as in its state file
    chain: str                      # path of the chain
    key: str                        # path of the key, or of the CSR that stands for it
    memory: Memory
    written: Memory                 # as its state file has it
    wanted: CertificateScope
    own: frozenset[str] = frozenset()
    facts: Facts | None = None
    whole: bool = False             # whether certificate and key are there and fit
    fault: str = ""                 # why the files cannot be used
    blocked: bool = False           # whether they cannot even be looked into
    guarded: bool = False           # whether the key file is ours alone

    @property
    def title(self) -> str:
        """What to call it in a message: the first of its names."""
        names = self.wanted.names or (self.facts.names if self.facts else ())
        return names[0] if names else self.name

    @property
    def files(self) -> tuple[str, ...]:
        """The live paths that are ours to write."""
        return (self.chain,) if self.wanted.csr else (self.chain, self.key)


class Inventory(NamedTuple):
    """The directory as it was found: how many files, its certificates by NAME, and the files not made live."""
    files: int
    entries: dict[str, Entry]
    waiting: Sequence[str] = ()


def state_path(directory: str, name: str) -> str:
    """Where the memory of one certificate is kept."""
    return f"{directory}/wucme_s_{name.lower()}.json"


def read_memory(path: str) -> Memory:
    """The memory of one certificate; whatever does not look as it should is forgotten."""
    found = read_json(path)
    kept = {key: value for key, value in found.items() if type(value) is MEMORY_TYPES.get(key)}
    about, names, window = found.get("facts"), found.get("names"), found.get("window")
    kept["server"] = sys.intern(kept.get("server", ""))
    if isinstance(about, list) and list(map(type, about)) == FACTS_TYPES and {*map(type, about[0])} <= {str} \
            and abs(about[1]) + abs(about[2]) < 1e15:
        # One copy is enough of what others say too: file names, other certificates, the ledger.
        about[3], about[5], about[7] = sys.intern(about[3]), sys.intern(about[5]), sys.intern(about[7])
        kept["facts"] = Facts(tuple(map(sys.intern, about[0])), *about[1:])
        if kept.get("key_hash") == about[6]:
            kept["key_hash"] = about[6]
    if isinstance(names, list) and {*map(type, names)} <= {str}:
        kept["names"] = tuple(map(sys.intern, names))
    if isinstance(window, list) and list(map(type, window)) == [float] * 3:
        kept["window"] = tuple(window)
    return Memory(**kept)


def look(entry: Entry) -> Entry:
    """The entry with what its two files say, from memory where they have not changed."""
    memory, fault, blocked = entry.memory, "", False
    (chain, _), (key, guarded) = signature(entry.chain), signature(entry.key)
    path = entry.chain
    try:
        if memory.facts is None or memory.chain != chain or not chain:
            memory = memory._replace(chain="", facts=None)
            memory = memory._replace(facts=facts(read(path)), chain=chain)
        path = entry.key
        if memory.key != key or not key or not memory.key_hash:
            memory = memory._replace(key="", key_hash="")
            memory = memory._replace(key_hash=key_of(read(path)), key=key)
    except FileError as error:
        fault, blocked = str(error), os.path.lexists(path)
    except PemError as error:
        fault, blocked = f"{path}: {error}", isinstance(error, KeyKindError)
    about = memory.facts
    if about and not about.names and not entry.wanted.names:
        fault, blocked = f"{entry.chain}: names nothing in its subjectAltName; declare it, with names = ...", True
    whole = not fault and about is not None and memory.key_hash == about.key
    return Entry(*entry[:3], memory, *entry[4:7], about, whole, fault, blocked, guarded)


def key_spelling(name: str) -> str:
    """The file name of the key that goes with a chain's, in the same spelling: WUCME_C_X, WUCME_K_X."""
    return f"{name[:6]}{'K' if name[6] == 'C' else 'k'}{name[7:]}"


def dropped(items: list[T]) -> Iterator[T]:
    """The items of a list in their order, each out of memory when nobody else has it."""
    items.reverse()
    while items:
        yield items.pop()


def list_names(directory: str) -> tuple[int, list[str], dict[str, str], list[str]]:
    """The names in a directory: how many, those of chains and, by NAME, of keys, and those not made live.

    It takes one look; subdirectories and wucme's own state are none of them.
    """
    files = 0
    chains: list[str] = []
    keys: dict[str, str] = {}
    waiting: list[str] = []
    with os.scandir(directory) if os.path.isdir(directory) else contextlib.nullcontext(()) as found:
        for item in found:
            name = item.name
            plain = name.lower()
            kind, end = plain[:8], plain[-4:]
            if end == "_tmp":
                waiting.append(name)
            elif not ((kind in ("wucme_s_", "wucme_l_") and plain.endswith(".json")) or plain in (LOG, LOCK)
                      or item.is_dir(follow_symlinks=False)):
                files += 1
                if kind == "wucme_k_" and end == ".pem":
                    keys[name[8:-4].lower()] = name
                elif kind == "wucme_c_" and end == ".pem" and len(plain) > 12 and not reserved(plain[8:-4]):
                    chains.append(name)
    chains.sort()
    return files, chains, keys, waiting


def scan(directory: str, default: CertificateScope, sections: Mapping[str, Section]) -> Inventory:
    """Every certificate of a directory, found or declared; other files are counted and left alone."""
    files, chains, keys, waiting = list_names(directory)
    by_stem = {**{label.replace(".", "_"): section for label, section in sections.items()}, **sections}
    entries: dict[str, Entry] = {}
    declared, nothing = set(), Entry._field_defaults["own"]
    for name in dropped(chains):
        stem = sys.intern(name[8:-4].lower())
        section = by_stem.get(stem)
        key = keys.get(stem) or key_spelling(name)
        memory = read_memory(state_path(directory, stem))
        values = section.values if section else default
        entries[stem] = look(Entry(stem, f"{directory}/{name}", values.csr or f"{directory}/{key}", memory, memory,
                                   values, section.own if section else nothing))
        if section:
            declared.add(section.title)
    for label, section in sections.items():
        if section.title not in declared:
            paths = [os.path.join(directory, f"wucme_{kind}_{label}.pem") for kind in "ck"]
            memory = read_memory(state_path(directory, label))
            entries[label] = Entry(label, paths[0], section.values.csr or paths[1], memory, memory, section.values,
                                   section.own)
    return Inventory(files, entries, tuple(waiting))


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


NEVER = float("inf")                        # the end of time
LONGEST_WAIT = 7 * 86400.0                  # no rate limit of a CA is longer
LADDER = (60.0, 600.0, 6000.0, 86400.0)     # seconds to the next try after so many refusals by a CA


def next_try(failures: int, chance: float, now: float) -> float:
    """When to try again after a CA's n-th refusal in a row; `chance` from 0 to 1 spreads the hosts."""
    return now + LADDER[min(failures, len(LADDER)) - 1] * (0.9 + 0.2 * chance)


def settle_window(window: Window, kept: tuple[float, ...], chance: float) -> tuple[float, ...]:
    """A window with the instant drawn in it; what was drawn in the same window before stays."""
    start, end, _ = window
    return kept if kept[:2] == (start, end) else (start, end, start + (end - start) * chance)


def renewal_time(about: Facts, rule: Renewal) -> float:
    """The instant at which `renew` wants a certificate renewed; never is the end of time."""
    lifetime = about.not_after - about.not_before
    if rule.seconds is not None:
        return about.not_after - rule.seconds
    if rule.share is not None:
        return about.not_after - lifetime * rule.share
    if rule.auto:
        return about.not_after - lifetime / (2 if lifetime < 10 * 86400 else 3)
    return NEVER


def due_at(entry: Entry) -> float:
    """The instant at which a certificate is due by its dates or its CA's wish; the end of time for never."""
    at = renewal_time(entry.facts, entry.wanted.renew) if entry.facts else NEVER
    return min(at, entry.memory.window[2]) if entry.memory.window and at < NEVER else at


def wanted_names(entry: Entry) -> tuple[str, ...]:
    """The names that a new certificate should have: those of the settings, else those it has."""
    return entry.wanted.names or (entry.facts.names if entry.facts else ())


def changed(entry: Entry, about: Facts) -> str:
    """How a certificate differs from what its own section asks for, or ""."""
    wanted, has = set(entry.wanted.names), set(about.names)
    # A CA may add names of its own: then what was ordered counts.
    if "names" in entry.own and wanted != has and not wanted == set(entry.memory.names) <= has:
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
    if not entry.whole:
        yield entry.fault or "its key does not fit the certificate"
    if entry.own and (difference := changed(entry, about)):
        yield difference
    if entry.memory.revoked == about.fingerprint and not entry.wanted.csr:      # else its user must make a new key
        yield "it was revoked"
    window = entry.memory.window
    if window and now >= window[2] and not entry.wanted.renew.never:
        explained = f" ({entry.memory.about})" if entry.memory.about else ""
        yield f"the CA would have it renewed from {gmt(window[0])} to {gmt(window[1])}{explained}"
    if now >= at:
        yield f"expires in {days(about.not_after - now)} days" if now < about.not_after else "expired"


def decide(entry: Entry, now: float, named: bool = False, forced: bool = False) -> Decision:
    """Whether a certificate is due, with the reason in words; `named` skips our ladder, `forced` all."""
    at = due_at(entry)
    if entry.blocked or not wanted_names(entry):
        return Decision(entry, False, entry.fault, at)
    if forced:
        return Decision(entry, True, "forced", at)
    reason = next(reasons(entry, now, at), "")
    if not reason:
        return Decision(entry, False, "", at)
    waits = (entry.memory.held_until, 0.0 if named else entry.memory.retry_at)
    # What lies farther ahead was written when the clock was wrong.
    wait = max((one for one in waits if one <= now + LONGEST_WAIT), default=0.0)
    if now < wait:
        return Decision(entry, False, f"{reason}; not tried again before {gmt(wait)}", at, held=True)
    return Decision(entry, True, reason, at)


def too_rare(entries: Iterable[Entry], runs: Sequence[float]) -> Iterator[str]:
    """What to say of each certificate that could expire between two runs, so rarely do they come."""
    gap = min((late - early for early, late in zip(runs, runs[1:])), default=0.0)
    for entry in entries if gap > 0 else ():
        room = entry.facts.not_after - due_at(entry) if entry.facts else 0.0
        if 0 < room < 2 * gap:
            yield (f"{entry.title}: runs come every {gap / 3600:.1f} hours, but from the time to renew it to "
                   f"its end there are only {room / 3600:.1f}: run at least every {room / 4 / 3600:.1f} hours")


def dates(decision: Decision, now: float) -> str:
    """The line that shows the dates of a certificate, and the days to its end and to its renewal."""
    about = decision.entry.facts
    if about is None:
        return f"{decision.entry.title}: {decision.reason}"
    renew = "never" if decision.renew_at == NEVER else str(days(decision.renew_at - now))
    return (f"{decision.entry.title} !before: {gmt(about.not_before)} !after: {gmt(about.not_after)} "
            f"expires: {days(about.not_after - now)} renew: {renew}")


# === 8. challenges: how the CA's question is answered ==========================================
# Each way to answer notes what it is about to publish; what is noted is undone at the end, or by the next run.
# The listeners answer from memory and by exact name; their sockets have a deadline, the oldest goes first.

WELL_KNOWN = "/.well-known/acme-challenge/"
OPEN_CONNECTIONS = 256
CONNECTION_SECONDS = 10.0
REQUEST_BYTES = 8192
COMMAND_SECONDS = 30.0          # for dig and nsupdate


class ChallengeType(NamedTuple):
    """A challenge type: the settings that answer it, and where the CA asks."""
    ways: tuple[str, ...]
    port: int = 0               # 0: it asks the DNS


CHALLENGES = {
    "http-01": ChallengeType(("listen", "webroot", "stateless"), 80),
    "dns-01": ChallengeType(("nsupdate",)),
    "tls-alpn-01": ChallengeType(("listen_tls",), 443),
    "dns-persist-01": ChallengeType(("record",)),
}


class Dialect(NamedTuple):
    """How a family of hooks is called: the form in which it gets the answer to each type, and templates."""
    values: Mapping[str, str]
    begin: tuple[str, ...]
    end: tuple[str, ...]
    environment: Mapping[str, str] = {}     # what comes out empty is left out
    failure: str = "abort"                  # what a failed start means: abort, decline (no end call then), ignore
    waits: bool = False                     # whether its caller waits for the name servers


DIALECTS = {
    "uacme": Dialect(
        {"http-01": "text", "dns-01": "digest", "tls-alpn-01": "digest", "dns-persist-01": "record"},
        ("begin", "{kind}", "{name}", "{token}", "{value}"), ("{verdict}", "{kind}", "{name}", "{token}", "{value}"),
        {"UACME_METHOD": "{verdict}", "UACME_TYPE": "{kind}", "UACME_IDENT": "{name}", "UACME_TOKEN": "{token}",
         "UACME_AUTH": "{value}", "UACME_CONFDIR": "{directory}", "UACME_VERBOSE": "{verbose}"}, failure="decline"),
    "dehydrated": Dialect(
        {"http-01": "text", "dns-01": "digest", "tls-alpn-01": "hex"},
        ("deploy_challenge", "{name}", "{token}", "{value}"), ("clean_challenge", "{name}", "{token}", "{value}"),
        {"BASEDIR": "{directory}", "CERTDIR": "{directory}", "ALPNCERTDIR": "{directory}", "WELLKNOWN": "{tokens}",
         "CHALLENGETYPE": "{kind}", "altnames": "{names}", "COMMAND": "sign_domains"}),
    "certbot": Dialect(
        {"http-01": "text", "dns-01": "digest"}, (), (),
        {"CERTBOT_DOMAIN": "{name}", "CERTBOT_IDENTIFIER": "{name}", "CERTBOT_VALIDATION": "{value}",
         "CERTBOT_TOKEN": "{http_token}", "CERTBOT_REMAINING_CHALLENGES": "{rest}", "CERTBOT_ALL_DOMAINS": "{all}",
         "CERTBOT_ALL_IDENTIFIERS": "{all}", "CERTBOT_AUTH_OUTPUT": "{output}"}, failure="ignore"),
    "lego": Dialect({"dns-01": "digest"}, ("present", "{fqdn}", "{value}"), ("cleanup", "{fqdn}", "{value}"),
                    waits=True),
    "mod_md": Dialect({"dns-01": "digest"}, ("setup", "{name}", "{value}"), ("teardown", "{name}", "{value}")),
}


class Proof(NamedTuple):
    """What proves control of one name to the CA."""
    kind: str
    name: str                   # without *.
    token: str
    text: str                   # key authorization (RFC 8555 section 8.1); for dns-persist-01 the records that will do

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key authorization."""
        import hashlib
        return hashlib.sha256(self.text.encode()).digest()


class Answers:
    """What the listeners answer now, and which tokens the CA has asked for."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.join(directory, "tokens")
        self.texts: dict[str, tuple[str, threading.Event]] = {}
        self.contexts: dict[str, tuple[Any, str, threading.Event]] = {}     # by server name: TLS context and token
        self.heard: set[str] = set()

    def publish(self, token: str, text: str, asked: threading.Event) -> None:
        """Answer this token from now on; the event is set when it is asked for."""
        make_directory(self.directory)
        plant(self.directory, [], token, text.encode())
        self.texts[token] = text, asked

    def withdraw(self, token: str) -> None:
        """Answer this token no more."""
        self.texts.pop(token, None)
        remove(os.path.join(self.directory, token))

    def hear(self, token: str, where: str, asked: threading.Event) -> None:
        """Note that the CA has asked."""
        log.detail(f"challenge {token} asked for at {where}")
        if token not in self.heard:     # once: strangers may ask too
            asked.set()
        self.heard.add(token)

    def find(self, target: str) -> str | None:
        """The answer to a request target, absolute or prefixed; None for what is not published."""
        before, found, token = target.partition("?")[0].rpartition(WELL_KNOWN)
        answer = self.texts.get(token) if found else None
        if answer is None:
            return None
        text, asked = answer
        self.hear(token, before + WELL_KNOWN, asked)
        return text

    def greet(self, connection: Any, name: str | None, _: object) -> int | None:
        """Choose the certificate for a TLS greeting; an alert where there is none."""
        where = (name or "").lower()
        found = self.contexts.get(where)
        if found is None:
            return 112                  # unrecognized_name (RFC 6066 section 3)
        connection.context, token, asked = found
        connection.question = token, where, asked
        return None


def listener_class(kind: str) -> Any:  # noqa: C901 - four small classes, not one long function
    """The server that listens for one challenge type, made on the days when it is needed."""
    import http.server
    import io
    import socketserver

    class Capped(io.BufferedReader):
        """A request that ends after so many bytes, whatever its sender goes on to send."""
        left = REQUEST_BYTES

        def readline(self, _: int | None = -1) -> bytes:
            """The next line, as far as the budget goes; it is less than any limit that is asked for."""
            line = super().readline(self.left)
            self.left -= len(line)
            return line

    class Page(http.server.BaseHTTPRequestHandler):
        server: Any
        timeout = 5                     # between two packets; the server has a total

        def setup(self) -> None:
            super().setup()
            self.rfile = Capped(self.rfile.detach())

        def do_GET(self) -> None:
            body = (self.server.answers.find(self.path) or "").encode()
            self.send_response_only(200 if body else 404)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Greeting(socketserver.BaseRequestHandler):
        server: Any

        def handle(self) -> None:
            self.request.settimeout(5)
            self.request.do_handshake()
            if self.request.selected_alpn_protocol() == "acme-tls/1":       # else it was not the CA's
                self.server.answers.hear(*self.request.question)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 128, True

        def __init__(self, family: int, address: tuple[str, int], answers: Answers) -> None:
            self.address_family, self.answers = family, answers
            self.guests: dict[Any, float] = {}      # open connections, the oldest first, and the end of each
            self.guard = threading.Lock()           # none is closed while it is cut
            super().__init__(address, Page if kind == "http-01" else Greeting)
            if kind == "tls-alpn-01":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.set_alpn_protocols(["acme-tls/1"])
                context.sni_callback = answers.greet
                self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

        def server_bind(self) -> None:
            if self.address_family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            super().server_bind()

        def process_request(self, request: Any, client_address: Any) -> None:
            self.guests[request] = time.monotonic() + CONNECTION_SECONDS
            super().process_request(request, client_address)

        def service_actions(self) -> None:
            """Cut those whose time is over, and the oldest of too many; their threads see the end of it."""
            with self.guard:
                for guest, until in list(self.guests.items()):
                    if until < time.monotonic() or len(self.guests) > OPEN_CONNECTIONS:
                        del self.guests[guest]
                        with contextlib.suppress(OSError):      # by the plain way: its thread may be in the handshake
                            socket.socket.shutdown(guest, socket.SHUT_RDWR)

        def shutdown_request(self, request: Any) -> None:
            with self.guard:
                self.guests.pop(request, None)
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


class Place(NamedTuple):
    """Where a challenge type is answered: host "" is every address."""
    kind: str
    host: str
    port: int


class Listener:
    """The listeners of one place, answering until closed."""

    def __init__(self, place: Place, answers: Answers) -> None:
        server, host = listener_class(place.kind), place.host
        self.servers: list[Any] = []
        try:
            for address in [host] if host else ["::", "0.0.0.0"]:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                try:
                    self.servers.append(server(family, (address, place.port), answers))
                except OSError as error:
                    # A host without IPv6 listens on IPv4 alone.
                    if host or family == socket.AF_INET or error.errno in (errno.EADDRINUSE, errno.EACCES):
                        raise
                    log(f"no IPv6 on port {place.port}: {error.strerror}; listening on IPv4 alone")
        except OSError as error:
            for one in self.servers:
                one.server_close()
            raise ChallengeError(listen_reason(host, place.port, error), place.kind) from error
        for one in self.servers:
            threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        for one in self.servers:
            with contextlib.suppress(OSError):      # wakes its thread at once, where the kernel can
                one.socket.shutdown(socket.SHUT_RDWR)
            one.shutdown()          # or its thread would poll a closed socket for ever
            one.server_close()


def respond(environ: Mapping[str, str]) -> bytes:
    """The answer of this program as a CGI script (RFC 3875): a published token, or 404."""
    named = ""
    with contextlib.suppress(WucmeError, OSError, KeyError):    # the ini may be private, this user not who renews
        named = parse_ini(read_source(find_ini(environ.get("WUCME_INI", ""))))["wucme"]["directory"]
    directory = named or environ.get("WUCME_DIRECTORY") or "/etc/wucme"
    method, body = environ.get("REQUEST_METHOD"), b""
    _, found, token = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).rpartition(WELL_KNOWN)
    if found and re.fullmatch(BASE64URL, token) and method in ("GET", "HEAD"):
        with contextlib.suppress(WucmeError):
            body = read(os.path.join(a_path(directory), "tokens", token), REQUEST_BYTES)
    head = (f"Status: {'200 OK' if body else '404 Not Found'}\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    return head.encode() + (b"" if method == "HEAD" else body)


def ways(wanted: CertificateScope, kind: str) -> tuple[str, ...]:
    """How a challenge type is answered for a certificate: by what is set for it, else a hook, else a listener."""
    about = CHALLENGES[kind]
    found = tuple(way for way in about.ways if getattr(wanted, way, True))
    if not found and wanted.hook and kind in DIALECTS[wanted.hook.family].values:
        found = ("hook",)
    if not found and about.port and getattr(wanted, about.ways[0]) is None:
        found = about.ways[:1]
    # Also with listen = none and nothing else: a web server may have this program as CGI script.
    return ("tokens", *found) if kind == "http-01" else found


def places(wanted: CertificateScope, kind: str) -> list[Place]:
    """Where a certificate wants a challenge type to be listened for."""
    about = CHALLENGES[kind]
    if not about.port or about.ways[0] not in ways(wanted, kind):
        return []
    return [Place(kind, *address) for address in getattr(wanted, about.ways[0]) or (("", about.port),)]


def open_listeners(wanted: Iterable[Place], answers: Answers) -> tuple[list[Listener], dict[Place, str]]:
    """The listeners of these places; and, for each place that cannot be had, why."""
    found, refused = [], {}
    for place in dict.fromkeys(wanted):
        try:
            found.append(Listener(place, answers))
            log(f"listening on {place.host}:{place.port} for the CA")
        except ChallengeError as error:
            refused[place] = str(error)
    return found, refused


def proves(kind: str, name: str) -> bool:
    """Whether a challenge type can prove a name at all: at a port all but wildcards, by the DNS all but addresses."""
    return not (name.startswith("*.") if CHALLENGES[kind].port else is_address(name))


def prospects(wanted: CertificateScope, names: Sequence[str], refused: Mapping[Place, str]) -> tuple[str, ...]:
    """The challenge types that can be answered here, the preferred first; ChallengeError for a name that has none."""
    problems = {kind: next((refused[place] for place in places(wanted, kind) if place in refused), "") if
                ways(wanted, kind) else f"nothing answers {kind} here: set {', '.join(CHALLENGES[kind].ways)} or hook"
                for kind in wanted.challenge}
    for name in names:
        fit = [problem for kind, problem in problems.items() if proves(kind, name)]
        if not fit:
            raise ChallengeError(f"{name}: {' and '.join(wanted.challenge)} cannot prove it; set challenge = "
                                 + " or ".join(kind for kind in CHALLENGES if proves(kind, name)))
        if all(fit):
            raise ChallengeError("; ".join(dict.fromkeys(fit)))
    for kind, problem in problems.items():
        if problem:
            log(f"{names[0]}: {kind} cannot be used: {problem}")
    return tuple(kind for kind, problem in problems.items() if not problem)


class Task(NamedTuple):
    """One certificate whose names are to be proved, and what that takes."""
    names: Sequence[str]
    wanted: CertificateScope
    kinds: Sequence[str]        # challenge types, the preferred first
    until: float                # by the monotonic clock
    answers: Answers
    world: World
    asked: threading.Event      # set when a listener hears the CA ask
    label: str = ""             # NAME of the certificate


LASTING = ("webroot", "nsupdate", "hook")       # the ways by which what is published outlives this process


class Published(NamedTuple):
    """What answers for a name, and is to be undone: by which way it came there, and where it is."""
    way: str
    place: str                  # file, record or server name; of a hook what it printed
    proof: Proof


def noted(path: str) -> list[Published]:
    """What a journal tells; what does not look as it should is left out."""
    found = read_json(path).get("rows")
    return [Published(row[0], row[1], Proof(*map(str, row[2]))) for row in (found if isinstance(found, list) else [])
            if isinstance(row, list) and [type(part) for part in row] == [str, str, list] and len(row[2]) == 4]


class Journal:
    """All that is published for one certificate; what outlives this process is kept in tokens/ until it is undone."""

    def __init__(self, task: Task) -> None:
        self.path = os.path.join(task.answers.directory, f".{task.label}")
        self.names = task.names
        # A try before this one may have left what it could not undo.
        self.rows = [row for row in noted(self.path) if row.way in LASTING]
        self.written = bool(self.rows)

    def save(self) -> None:
        """Write down what a later run would have to undo."""
        lasting = [row for row in self.rows if row.way in LASTING]
        if lasting:
            make_directory(os.path.dirname(self.path))
            create(self.path, json.dumps({"names": self.names, "rows": lasting}).encode())
        elif self.written:
            remove(self.path)
        self.written = bool(lasting)

    def add(self, way: str, proof: Proof, place: str = "") -> None:
        """Note something that is about to be published."""
        self.rows.append(Published(way, place, proof))
        self.save()


def by_tokens(task: Task, proofs: Sequence[Proof], journal: Journal) -> None:
    """Have the listener and tokens/ answer http-01."""
    for one in proofs:
        journal.add("tokens", one)
        task.answers.publish(one.token, one.text, task.asked)


def by_webroot(task: Task, proofs: Sequence[Proof], journal: Journal) -> None:
    """Have a web server answer http-01 from its document roots."""
    steps = WELL_KNOWN.strip("/").split("/")
    for root in task.wanted.webroot:
        for one in proofs:
            journal.add("webroot", one, os.path.join(root, *steps, one.token))
            plant(root, steps, one.token, one.text.encode())


def by_greeting(task: Task, proofs: Sequence[Proof], journal: Journal) -> None:
    """Have the listener answer tls-alpn-01 (RFC 8737; for addresses RFC 8738 section 6)."""
    import ipaddress
    answers, world = task.answers, task.world
    for one in sorted(proofs, key=lambda proof: proof.name):
        name = ipaddress.ip_address(one.name).reverse_pointer if is_address(one.name) else one.name
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["acme-tls/1"])
        path = os.path.join(os.path.dirname(answers.directory), f"wucme_{one.token}_tmp")
        create(path, challenge_certificate(one.name, one.digest))
        try:
            context.load_cert_chain(path)
        finally:
            remove(path)
        # Only one answer can be given for a name: another certificate with it comes first, or waits.
        while answers.contexts.setdefault(name, (context, one.token, task.asked))[1] != one.token:
            if world.monotonic() > task.until:
                raise ChallengeError(f"{name}: another certificate's proof of it takes too long")
            world.sleep(0.05)
        journal.add("listen_tls", one, name)


def all_said(finished: Finished) -> str:
    """The problem of a DNS tool and all that it said."""
    missing = " (Debian has it in bind9-dnsutils)" if finished.problem.startswith("cannot be run") else ""
    problem = finished.problem.replace(" (load_timeout)", "")
    return "; ".join([problem, *finished.output])[:400] + missing


def updated_server(task: Task) -> list[str]:
    """The server that is updated, as arguments of dig; [] where the DNS says which."""
    host, port = task.wanted.nsupdate.server if task.wanted.nsupdate else ("", 53)
    return [f"@{host}", "-p", str(port)] if host else []


def ask_dns(task: Task, kind: str, name: str, at: Sequence[str] = ()) -> list[str]:
    """What the DNS says, in the words of dig; ChallengeError where it cannot be asked."""
    argv = ["dig", "+short", "+time=3", "+tries=2", *(at or updated_server(task)), "-t", kind, "-q", name]
    finished = task.world.command(argv, child_environment(), COMMAND_SECONDS)
    if finished.problem:
        raise ChallengeError(f"dig {kind} {name}: {all_said(finished)}")
    return finished.output


def record_texts(task: Task, name: str, at: Sequence[str] = ()) -> list[str]:
    """The texts of the TXT records of a name, the strings of each joined."""
    records = (re.findall(r'"((?:[^"\\]|\\.)*)"', line) for line in ask_dns(task, "TXT", name, at))
    return [re.sub(r"\\(.)", r"\1", "".join(strings)) for strings in records]


def cname(task: Task, at: str) -> str:
    """Where a name is an alias for, "" if it is none: by the server that is updated, else by the DNS at large."""
    found = [line for line in ask_dns(task, "CNAME", at) if line.endswith(".")]
    if not found and updated_server(task):      # it may not know the zone in which the alias stands
        with contextlib.suppress(ChallengeError):
            found = [line for line in ask_dns(task, "CNAME", at, ["+recurse"]) if line.endswith(".")]
    if found and not re.fullmatch(r"\w[\w.-]*", found[0]):
        raise ChallengeError(f"{at}: an alias for {printable(found[0])}, which is no host name")
    return found[0].lower() if found else ""


def record_name(task: Task, name: str) -> str:
    """Where the record of dns-01 for a name stands in the end, as others may be told to keep it."""
    at = f"_acme-challenge.{name}."
    for _ in range(10):
        further = cname(task, at)
        if not further:
            return at
        at = further
    raise ChallengeError(f"{name}: the CNAMEs at _acme-challenge.{name} have no end")


def name_servers(task: Task, at: str) -> list[list[str]]:
    """The name servers of a record's zone, as arguments of dig; the one that is updated where it has its own port."""
    to = updated_server(task)
    if to and to[-1] != "53":
        return [to]
    zone = at
    while zone.strip("."):
        # Of an alias dig would show where it leads, and the servers of that.
        servers = [] if cname(task, zone) else [line for line in ask_dns(task, "NS", zone) if line.endswith(".")]
        if servers:
            return [[f"@{server.rstrip('.')}"] for server in servers]
        zone = zone.partition(".")[2]
    return []


def await_records(task: Task, records: Sequence[tuple[str, str]]) -> None:
    """Wait until all name servers have these records; ChallengeError after dns_wait."""
    until = task.world.monotonic() + task.wanted.dns_wait
    for at in dict.fromkeys(at for at, _ in records):
        wanted = {text for where, text in records if where == at}
        for server in name_servers(task, at):
            pause = 0.25
            while True:
                with contextlib.suppress(ChallengeError):
                    if wanted <= set(record_texts(task, at, server)):
                        break
                if task.world.monotonic() + pause > until:
                    raise ChallengeError(f"{at}: the name server {server[0][1:]} has not got the record after "
                                         f"{task.wanted.dns_wait:g} s (dns_wait)")
                task.world.sleep(pause)
                pause = min(pause * 2, 5.0)


def update(task: Task, what: str, at: str, text: str) -> str:
    """Add or delete one TXT record by nsupdate (RFC 2136); the problem, or ""."""
    to = cast("Updates", task.wanted.nsupdate)
    lines = [f"server {to.server[0]} {to.server[1]}"] if to.server[0] else []
    lines += [f"zone {to.zone}"] if to.zone else []
    lines += [f'update {what} {at} {"60 " if what == "add" else ""}IN TXT "{text}"', "send", ""]
    finished = task.world.command(["nsupdate", "-t", "20", "-k", to.key], child_environment(), COMMAND_SECONDS,
                                  given="\n".join(lines))
    return f"nsupdate: {at}: {all_said(finished)}" if finished.problem else ""


def by_nsupdate(task: Task, proofs: Sequence[Proof], journal: Journal) -> None:
    """Answer dns-01 by records in a zone that takes updates."""
    added = []
    for one in proofs:
        at, text = record_name(task, one.name), base64url(one.digest)
        log(f"{task.names[0]}: setting {at} TXT {text}")
        journal.add("nsupdate", one, at)
        problem = update(task, "add", at, text)
        if problem:
            if not update(task, "delete", at, text) or "REFUSED" in problem or "NOTAUTH" in problem:
                journal.rows.pop()      # it is not there
            raise ChallengeError(problem)
        added.append((at, text))
    await_records(task, added)


def undo_update(task: Task, row: Published, _: str) -> None:
    """Delete the record that proved a name."""
    if not task.wanted.nsupdate:
        raise ChallengeError(f"{row.place}: nsupdate is not set any more")
    if problem := update(task, "delete", row.place, base64url(row.proof.digest)):
        raise ChallengeError(problem)


def record_fits(found: str, wanted: str, now: float) -> bool:
    """Whether a record of dns-persist-01 says what it must, and still holds."""
    def parse(text: str) -> dict[str, str]:
        issuer, *tags = text.split(";")
        pairs = [(tag.strip().lower(), value.strip()) for tag, _, value in (one.partition("=") for one in tags)]
        return {**dict(pairs), "issuer": issuer.strip().lower()} if len(dict(pairs)) == len(pairs) else {}

    have, want = parse(found), parse(wanted)
    until = have.pop("persistuntil", "")
    policy = have.pop("policy", "").lower()
    return (want.pop("policy", policy) == policy and have == want
            and (not until or (until.isdigit() and int(until[:15]) > now)))


def by_record(task: Task, proofs: Sequence[Proof], _: Journal) -> None:
    """See that the lasting records of dns-persist-01 are there; nobody but the owner of the zone sets them."""
    missing = []
    for one in proofs:
        at, wanted = f"_validation-persist.{one.name}.", one.text.splitlines()
        found = record_texts(task, at)
        if not any(record_fits(text, line, task.world.now()) for text in found for line in wanted):
            missing.append(f'set this record once, it stays: {at} IN TXT "{wanted[0]}"'
                           + (f" (found: {' and '.join(found)})" if found else ""))
    if missing:
        raise ChallengeError("; ".join(missing))


def hook_fields(task: Task, one: Proof, dialect: Dialect) -> dict[str, str]:
    """What the templates of a dialect can hold, for one proof."""
    value = {"text": one.text, "digest": base64url(one.digest), "hex": one.digest.hex(),
             "record": f'"{one.text.partition(chr(10))[0]}"'}[dialect.values[one.kind]]
    return {"kind": one.kind, "name": one.name, "token": one.token, "value": value, "output": "", "rest": "",
            "http_token": one.token if one.kind == "http-01" else "", "names": " ".join(task.names),
            "all": ",".join(task.names), "verbose": str(log.loud), "tokens": task.answers.directory,
            "directory": os.path.dirname(task.answers.directory),
            "fqdn": record_name(task, one.name) if dialect.waits else ""}


def call_hook(task: Task, argv: Sequence[str], templates: Sequence[str], fields: Mapping[str, str]) -> Finished:
    """Call a hook, with what its dialect wants it to be told."""
    hook = cast("Hook", task.wanted.hook)
    if fault := anyone_may_write(argv[0]):
        raise ChallengeError(fault)
    environment = {key: told for key, text in DIALECTS[hook.family].environment.items()
                   if (told := text.format_map(fields))}
    finished = task.world.command([*argv, *(text.format_map(fields) for text in templates)],
                                  {**child_environment(), **environment}, task.wanted.load_timeout)
    for line in finished.output:
        log(f"{task.names[0]}: hook: {line}")
    return finished


def by_hook(task: Task, proofs: Sequence[Proof], journal: Journal) -> None:
    """Have a program of the user's answer."""
    hook = cast("Hook", task.wanted.hook)
    dialect = DIALECTS[hook.family]
    records = []
    for number, one in enumerate(proofs, 1):
        fields = {**hook_fields(task, one, dialect), "rest": str(len(proofs) - number), "verdict": "begin"}
        journal.add("hook", one)
        finished = call_hook(task, hook.begin, dialect.begin, fields)
        journal.rows[-1] = journal.rows[-1]._replace(place="\n".join(finished.output).strip())
        records.append((fields["fqdn"], fields["value"]))
        told = with_last_line(finished)
        if dialect.failure == "decline" and told.startswith("exit status"):
            journal.rows.pop()          # nothing was begun
            raise ChallengeError(f"{one.name}: the hook {hook.begin[0]} declines {one.kind}: {told}", one.kind)
        if told and dialect.failure != "ignore":
            raise ChallengeError(f"{one.name}: the hook {hook.begin[0]} aborts {one.kind}: {told}")
        if told:
            log(f"{task.names[0]}: the hook failed: {told}")
    if dialect.waits:
        await_records(task, records)


def undo_hook(task: Task, row: Published, verdict: str) -> None:
    """Tell a hook that it may clean up what it did for a name; what it makes of that is its own affair."""
    hook = task.wanted.hook
    if not hook or row.proof.kind not in DIALECTS[hook.family].values:
        raise ChallengeError("no hook for it is set any more")
    if hook.end:
        fields = {**hook_fields(task, row.proof, DIALECTS[hook.family]), "verdict": verdict, "output": row.place}
        finished = call_hook(task, hook.end, DIALECTS[hook.family].end, fields)
        if finished.problem:
            log(f"{task.names[0]}: the hook failed to clean up: {with_last_line(finished)}")


WAYS = {"tokens": by_tokens, "webroot": by_webroot, "listen_tls": by_greeting, "nsupdate": by_nsupdate,
        "record": by_record, "hook": by_hook}
UNDO: dict[str, Callable[[Task, Published, str], object]] = {
    "tokens": lambda task, row, _: task.answers.withdraw(row.proof.token),
    "webroot": lambda _, row, __: remove(row.place),
    "listen_tls": lambda task, row, _: task.answers.contexts.pop(row.place, None),
    "nsupdate": undo_update, "hook": undo_hook}


def undone(task: Task, row: Published, verdict: str) -> str:
    """Undo one thing that was published; the problem, or ""."""
    try:
        UNDO[row.way](task, row, verdict)
    except (WucmeError, OSError) as error:
        return sentence(error)
    return ""


def undo_all(journal: Journal, task: Task, verdict: str) -> None:
    """Undo what is published; what cannot be undone now stays noted. On a signal there is no time for it."""
    if ending.number:
        return
    left = {row: problem for row in journal.rows if (problem := undone(task, row, verdict))}
    for row, problem in left.items():
        log(f"{task.names[0]}: {row.way} cannot be undone, the next run tries once more: {problem}")
    journal.rows = list(left)
    journal.save()


def undo_left(task: Task, path: str) -> Iterator[str]:
    """Undo what the journal of a killed run tells, once; a line for each."""
    for one in noted(path):
        problem = undone(task, one, "failed") if one.way in LASTING else "nobody knows how"
        yield (f"{task.names[0]}: {one.way} of {one.proof.name}, left by a run that was stopped, "
               + (f"cannot be undone, see to it yourself: {problem}" if problem else "is undone"))
    remove(path)


@contextlib.contextmanager
def answering(task: Task, proofs: Sequence[Proof]) -> Iterator[None]:
    """Answer the CA's questions for as long as this is open; ChallengeError says what cannot be answered, and why."""
    journal, verdict = Journal(task), "failed"
    try:
        for kind in dict.fromkeys(one.kind for one in proofs):
            some = [one for one in proofs if one.kind == kind]
            try:
                for way in ways(task.wanted, kind):
                    if way in WAYS:     # stateless and listen need nothing more
                        WAYS[way](task, some, journal)
            except (WucmeError, OSError) as error:
                raise ChallengeError(sentence(error), kind) from error
        yield
        verdict = "done"
    finally:
        undo_all(journal, task, verdict)


# === 9. acme: the protocol, RFC 8555 ===========================================================
# One type for each object of the RFC, one function for each operation. All that a CA sends is taken
# for hostile: every URL is https and of the CA's own host, every token is checked, nothing is endless.

NONCE_TRIES = 20
FAULT_TRIES = 3
PATIENCE_SECONDS = 10.0         # a CA that is out of order for longer is left to the next run
KNOWN_SECONDS = 86400.0         # how long a CA's directory is used without being fetched again
CLOCK_SECONDS = 3600.0          # how far our clock and the CA's may differ: CAs date certificates back so far
POLL_SECONDS = (0.25, 5.0)      # the first and the longest pause between two looks, unless the CA says,
ASKED_SECONDS = 0.02            # and the first one after the CA has asked for an answer
REMEDIES = {        # by problem type, or by challenge and problem type
    "connection": "the CA could not reach this host: port 80 of the name must lead to the listener",
    "tls-alpn-01 connection": "the CA could not reach this host: port 443 of the name must lead to the listener",
    "dns": "the name does not resolve for the CA: look at its A, AAAA and CAA records",
    "dns-01 dns": "the CA finds no TXT record at _acme-challenge: look at the name servers of the zone",
    "unauthorized": "something else answered on port 80 of the name: look where it leads, also its AAAA address",
    "incorrectResponse": "something else answered on port 80 of the name: look where it leads",
    "dns-01 unauthorized": "the CA finds other TXT records at _acme-challenge: look at the name servers of the zone",
    "tls-alpn-01 unauthorized": "something else answered on port 443 of the name: look where it leads",
    "dns-persist-01 unauthorized": "the CA does not find the record at _validation-persist",
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
    meta: Json


class Order(NamedTuple):
    """An order (section 7.1.3)."""
    url: str
    status: str
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str
    error: Json
    wait: float                 # seconds before the CA wants to be asked again


class Challenge(NamedTuple):
    """A challenge of a kind that is known here (section 7.1.5)."""
    kind: str
    url: str
    token: str
    status: str
    error: Json
    about: Json


class Authorization(NamedTuple):
    """An authorization (section 7.1.4); name as it was asked for, with *."""
    url: str
    name: str
    status: str
    challenges: tuple[Challenge, ...]


def octets(number: int, bits: int) -> bytes:
    """A number of at most so many bits, in as many bytes as these take."""
    return number.to_bytes((bits + 7) // 8, "big")


def json_web_key(key: PrivateKey) -> dict[str, str]:
    """The public half of an account key as a JWK, with the members in the order of RFC 7638."""
    numbers: Any = key.public_key().public_numbers()
    if hasattr(numbers, "n"):
        return {"e": base64url(octets(numbers.e, numbers.e.bit_length())), "kty": "RSA",
                "n": base64url(octets(numbers.n, key.key_size))}
    return {"crv": f"P-{key.key_size}", "kty": "EC",
            "x": base64url(octets(numbers.x, key.key_size)), "y": base64url(octets(numbers.y, key.key_size))}


def thumbprint(key: PrivateKey) -> str:
    """The account key's thumbprint (RFC 7638), which every key authorization ends in."""
    import hashlib
    return base64url(hashlib.sha256(json.dumps(json_web_key(key), separators=(",", ":")).encode()).digest())


def jws_algorithm(key: PrivateKey) -> str:
    """The JWS algorithm of an account key (RFC 7518 section 3.1)."""
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256"
    return {"ecdsa-p256": "ES256", "ecdsa-p384": "ES384"}.get(key_kind(key.public_key()), "ES512")


def sign(key: PrivateKey, data: bytes) -> bytes:
    """A JWS signature; for EC the two numbers side by side, not DER (RFC 7518 section 3.4)."""
    digest = getattr(hashes, f"SHA{jws_algorithm(key)[2:]}")()
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), digest)
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(digest)))
    return octets(r, key.key_size) + octets(s, key.key_size)


def jws(header: Json, payload: Json | None, by: Callable[[bytes], bytes]) -> Json:
    """A flattened JWS (section 6.2); payload None is a POST-as-GET (section 6.3)."""
    protected = base64url(json.dumps(header).encode())
    body = "" if payload is None else base64url(json.dumps(payload).encode())
    return {"protected": protected, "payload": body, "signature": base64url(by(f"{protected}.{body}".encode()))}


def signed(key: PrivateKey, header: Json, payload: Json | None) -> bytes:
    """A JWS by an account key, as it is sent."""
    return json.dumps(jws({"alg": jws_algorithm(key), **header}, payload, functools.partial(sign, key))).encode()


def http_date(text: str) -> float | None:
    """The time that a header says, which is GMT in all three forms of it (RFC 9110); None where it says none."""
    import datetime
    import email.utils
    try:
        found = email.utils.parsedate(text)
        return datetime.datetime(*found[:6], tzinfo=datetime.timezone.utc).timestamp() if found else None
    except (TypeError, ValueError, OverflowError):
        return None


def asked_wait(response: Response, now: float) -> float:
    """Seconds that the CA asks to wait (a number or a date, RFC 9110), a week at most; 0 where it does not say."""
    value = (response.headers.get("Retry-After") or "").strip()
    wait = float(value[:12]) if value.isascii() and value.isdigit() else (http_date(value) or 0.0) - now
    return min(max(0.0, wait), LONGEST_WAIT)


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


def member(found: Json, key: str, kind: type[T]) -> T:
    """A member of an object that the CA sent; an empty one where it is missing, or of another kind."""
    value = found.get(key)
    return value if isinstance(value, kind) else kind()


def problem_kind(problem: Json) -> str:
    """The type of a problem document without its prefix (section 6.7)."""
    return str(problem.get("type") or "").rpartition(":")[2]


def problem_text(problem: Json) -> str:
    """A problem document on one line, with what it says of each name (section 6.7.1)."""
    texts = [f"{problem_kind(problem) or 'refused'}: {problem.get('detail') or 'no detail given'}"]
    for part in member(problem, "subproblems", list):
        if isinstance(part, dict):
            who = part.get("identifier")
            name = who.get("value") if isinstance(who, dict) else "?"
            texts.append(f"{name}: {problem_kind(part)}: {part.get('detail')}")
    return printable("; ".join(texts)[:2000])


def acme_error(text: str, problem: Json, spent: Sequence[str] = (), wait: float = 0.0) -> AcmeError:
    """The error for what the CA said, with what to do about it; a remedy is for the first type of challenge `spent`."""
    kind = problem_kind(problem)
    remedy = REMEDIES.get(" ".join([*spent[:1], kind])) or REMEDIES.get(kind)
    error = AcmeError(f"{text} ({remedy})" if remedy else text, kind, wait)
    error.spent = spent
    return error


ASK_SECONDS = (60.0, 86400.0, 21600.0)      # ARI: the shortest and longest wait that a CA may ask for, and without


def parse_window(found: Json) -> Window | None:
    """The suggestedWindow of a renewalInfo (RFC 9773 section 4.2); None for one that makes no sense."""
    import datetime
    window = member(found, "suggestedWindow", dict)
    texts = [re.sub(r"\.\d+", "", str(window.get(key)).upper()).replace("Z", "+00:00") for key in ("start", "end")]
    try:
        start, end = (datetime.datetime.fromisoformat(text).timestamp() for text in texts)
    except (ValueError, OverflowError):
        return None
    return Window(start, end, printable(member(found, "explanationURL", str))[:300]) if start < end else None


class Applicant(NamedTuple):
    """What a new account is made with: contact, and the account elsewhere that it is bound to."""
    contact: Sequence[str]
    kid: str
    mac: str
    mac_algorithm: str


def bound(key: PrivateKey, who: Applicant, url: str) -> Json:
    """The externalAccountBinding of an account key (section 7.3.4)."""
    import hmac
    try:
        secret = from_base64url(who.mac)
    except ValueError as error:
        raise PemError("eab_hmac: the MAC key is not base64") from error
    return jws({"alg": who.mac_algorithm, "kid": who.kid, "url": url}, json_web_key(key),
               lambda data: hmac.digest(secret, data, f"sha{who.mac_algorithm[2:]}"))


def alternates(response: Response) -> list[str]:
    """The URLs of the other chains that a CA offers (section 7.4.2)."""
    links = ",".join(response.headers.get_all("Link") or [])
    return re.findall(r'<([^<>]+)>\s*;[^<]*rel="?alternate"?', links)[:10]


class Client:
    """One account at one CA; several workers use it, and as many connections as they need at once.

    It is in touch with the CA when it is made: by its directory, or where that is `known`, by a nonce.
    """

    def __init__(self, url: str, world: World, connect: Callable[[], Http], known: Any = None) -> None:
        self.url = url
        self.world = world
        self.connect = connect
        self.key = cast("PrivateKey", None)     # of the account, once it is open
        self.account = ""
        self.idle: collections.deque[Http] = collections.deque()
        self.guard = threading.Lock()
        self.nonces: collections.deque[str] = collections.deque(maxlen=64)
        self.known: Json = {}                   # the directory as the CA sent it and when, for as long as it holds
        try:
            self.directory = self.known_directory(known) or self.fetch_directory()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self.idle:
            self.idle.pop().close()

    def send(self, method: str, url: str, body: bytes | None = None) -> Response:
        """One request; keeps the nonce that comes back, whatever else does (section 6.5)."""
        headers = {"Content-Type": "application/jose+json"} if body else {}
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
        if re.fullmatch(BASE64URL, nonce):
            self.nonces.append(nonce)
        if 300 <= response.status < 400:
            self.known = {}
            target = printable(response.headers.get("Location") or "nowhere")
            raise ProtocolError(f"{url}: redirects to {target}; redirects are not followed, give the right URL")
        return response

    def known_directory(self, known: Any) -> Directory | None:
        """The directory as it was not long ago, if the CA still gives nonces by it."""
        with contextlib.suppress(ProtocolError, AttributeError, KeyError, TypeError):
            if 0 <= self.world.now() - known["at"] < KNOWN_SECONDS:
                directory = self.parse_directory(known["directory"])
                response = self.send("HEAD", directory.new_nonce)
                self.check_clock(response)
                if response.status < 400 and self.nonces:
                    log(f"using the directory of {gmt(known['at'])} from {self.url}")
                    self.known = known
                    return directory
        return None

    def fetch_directory(self) -> Directory:
        """The directory of the CA."""
        log(f"fetching directory at {self.url}")
        response = self.send("GET", self.url)
        if response.status != 200:
            raise NetworkError(f"{self.url}: HTTP status {response.status} where an ACME directory should be")
        self.check_clock(response)
        found = read_object(response, self.url)
        self.known = {"at": self.world.now(), "directory": found}
        return self.parse_directory(found)

    def check_clock(self, response: Response) -> None:
        """ProtocolError if the CA's clock and ours differ by too much."""
        date = http_date(response.headers.get("Date") or "")
        if date is not None and abs(date - self.world.now()) > CLOCK_SECONDS:
            raise ProtocolError(f"{self.url}: the CA's clock shows {gmt(date)} and this host's "
                                f"{gmt(self.world.now())}; set the clock, certificates cannot be judged by it")

    def parse_directory(self, found: Json) -> Directory:
        """A directory, if all that it must name is the CA's own (section 7.1.1)."""
        meta = member(found, "meta", dict)
        needed = [self.own_url(found.get(key), key) for key in ("newNonce", "newAccount", "newOrder")]
        others = [self.own_url(found[key], key) if key in found else ""
                  for key in ("keyChange", "revokeCert", "renewalInfo")]
        terms = printable(str(meta.get("termsOfService") or ""))
        return Directory._make([*needed, *others, terms, member(meta, "profiles", dict), meta])

    def own_url(self, value: object, what: str) -> str:
        """A URL that the CA gave, if it is https and of the CA's host."""
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
        for _ in range(NONCE_TRIES):        # another worker may take the one that was asked for
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
        self.known = {}             # it may be the directory that is not what it was
        if response.status >= 500 and problem_kind(problem) != "rateLimited":
            return NetworkError(f"{self.url}: the CA is out of order: {problem_text(problem)}")
        return acme_error(problem_text(problem), problem, wait=wait)

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
        try:
            self.post(self.directory.revoke, {"certificate": base64url(certificate), "reason": reason}, by=by)
        except AcmeError as error:
            if error.kind != "alreadyRevoked":
                raise

    def register_again(self, lost: str, who: Applicant, agreed: bool) -> None:
        """Make the account anew with the same key, once, when the CA has lost it; SettingsError if not `agreed`."""
        terms = self.directory.terms
        with self.guard:
            if self.account == lost and not self.register(who, agreed or not terms):
                raise SettingsError(f"{self.url}: the CA has lost the account {lost}; to make it again, its terms of "
                                    f"service at {terms} must be agreed to: set agree = yes, or use --agree")

    def new_order(self, names: Sequence[str], profile: str = "", replaces: str = "") -> Order:
        """A new order for these names (section 7.4), by a profile, in place of an old certificate (RFC 9773, 5)."""
        if profile and profile not in self.directory.profiles:
            self.known = {}
            raise SettingsError(f"{self.url}: the CA has no profile {profile}, but "
                            + (", ".join(map(printable, self.directory.profiles)) or "none at all"))
        identifiers = [{"type": "ip" if is_address(name) else "dns", "value": name} for name in names]
        wanted = {"identifiers": identifiers, "profile": profile, "replaces": replaces}
        try:
            response = self.post(self.directory.new_order, {key: value for key, value in wanted.items() if value})
        except (AcmeError, NetworkError) as error:
            if not replaces or getattr(error, "kind", "") in ("rateLimited", "accountDoesNotExist"):
                raise
            log(f"{names[0]}: the CA does not take the order as a replacement; once more without: {error}")
            return self.new_order(names, profile)
        return self.parse_order(self.own_url(response.headers.get("Location"), "order"), response, names)

    def fetch_order(self, url: str, names: Sequence[str]) -> Order:
        """An order as it stands now."""
        return self.parse_order(url, self.post(url, None), names)

    def parse_order(self, url: str, response: Response, names: Sequence[str]) -> Order:
        """An order, if it is for the names that were asked for and no larger than they need."""
        found = read_object(response, url)
        values = {str(one.get("value")).lower() for one in member(found, "identifiers", list) if isinstance(one, dict)}
        if values != set(names):
            raise ProtocolError(f"{url}: the CA made an order for {printable(' '.join(sorted(values)))[:200]}, "
                               f"not for {' '.join(names)}")
        urls = found.get("authorizations")
        if not isinstance(urls, list) or not 1 <= len(urls) <= len(names):
            raise ProtocolError(f"{url}: the CA wants {len(urls) if isinstance(urls, list) else 'no'} "
                               f"authorizations for {len(names)} names")
        certificate = found.get("certificate")
        return Order(url, str(found.get("status")), tuple(self.own_url(one, "authorization") for one in urls),
                     self.own_url(found.get("finalize"), "finalize"),
                     self.own_url(certificate, "certificate") if certificate else "",
                     member(found, "error", dict), asked_wait(response, self.world.now()))

    def authorization(self, url: str, names: Sequence[str]) -> Authorization:
        """An authorization, with those of its challenges whose types are known here (section 7.5)."""
        found = read_object(self.post(url, None), url)
        who = found.get("identifier")
        value = str(who.get("value") if isinstance(who, dict) else "").lower()
        # Some say that it is for a wildcard, and all mean it if the bare name was not asked for.
        wildcard = found.get("wildcard") is True or value not in names
        name = f"*.{value.removeprefix('*.')}" if wildcard else value
        if name not in names:
            raise ProtocolError(f"{url}: the CA wants an authorization for {printable(value)[:100]!r}, not asked for")
        challenges = [self.parse_challenge(one) for one in member(found, "challenges", list)
                      if isinstance(one, dict) and str(one.get("type")) in CHALLENGES]
        return Authorization(url, name, str(found.get("status")), tuple(filter(None, challenges)))

    def parse_challenge(self, found: Json) -> Challenge | None:
        """A challenge; None for one without the token that it needs (section 8)."""
        kind, token = str(found["type"]), found.get("token")
        if kind == "dns-persist-01":
            token = ""
        elif token is None:
            return None
        elif not isinstance(token, str) or not re.fullmatch(BASE64URL, token) or len(token) > 200:      # it names files
            raise ProtocolError(f"{self.url}: the CA sent a token that is none: {printable(repr(token))[:100]}")
        return Challenge(kind, self.own_url(found.get("url"), "challenge"), token, str(found.get("status")),
                         member(found, "error", dict), found)

    def answer(self, challenge: Challenge) -> None:
        """Have the CA look for an answer; twice more if it says at once that it did not find it (section 8.2)."""
        for pause in (1.0, 3.0, 0.0):
            found = read_object(self.post(challenge.url, {}), challenge.url)
            problem = member(found, "error", dict)
            if found.get("status") != "pending" or not problem:
                return
            if not pause:
                raise acme_error(problem_text(problem), problem, [challenge.kind])
            self.world.sleep(pause)

    def persistent_records(self, challenge: Challenge, name: str) -> list[str]:
        """The records of which one satisfies dns-persist-01 for a name, as the CA's draft of it has them."""
        import hashlib
        meta, about = self.directory.meta, challenge.about
        prefix, uri = meta.get("accountHashPrefix"), about.get("accounturi") or self.account
        wildcard, domain = name.startswith("*."), name.removeprefix("*.")
        if isinstance(prefix, str):         # draft -02: a digest in place of the account's URL
            digest = hashlib.sha256(bytes([len(domain)]) + f"{domain}{thumbprint(self.key)}{self.account}".encode())
            uri = f"{prefix}sha-256/{base64url(digest.digest())}"
        issuers = next((found for found in (about.get("issuerDomainNames"), about.get("issuer-domain-names"),
                                            meta.get("issuerDomainNames")) if isinstance(found, list)), [])
        policy = "; policy=wildcard" if wildcard else ""
        return [f"{issuer}; accounturi={uri}{policy}" for issuer in issuers[:10]
                if re.fullmatch(r"[A-Za-z0-9.-]+", str(issuer)) and re.fullmatch(r"[!-:<-~]+", str(uri))]

    def renewal_window(self, name: str) -> tuple[Window | None, float]:
        """The window that the CA suggests for a certificate, None for none, and the seconds to the next question."""
        url = f"{self.directory.renewal_info.rstrip('/')}/{name}"
        response = self.send("GET", url)
        if response.status != 200:
            self.known = {}
            raise NetworkError(f"{url}: HTTP status {response.status} where renewal information should be")
        wait = asked_wait(response, self.world.now()) or ASK_SECONDS[2]
        return parse_window(read_object(response, url)), min(max(wait, ASK_SECONDS[0]), ASK_SECONDS[1])

    def settle(self, order: Order, names: Sequence[str], busy: Sequence[str], until: float,
               asked: threading.Event | None = None) -> Order:
        """Look at an order until it leaves the `busy` states; UnfinishedError at the deadline (section 7.4).

        The first look is at once, unless the CA wants it later, or a listener is still to be `asked`.
        """
        pause = POLL_SECONDS[0] if asked else 0.0
        while order.status in busy:
            wait = max(order.wait, pause)
            if self.world.monotonic() + wait > until:
                raise UnfinishedError(f"the CA left the order {order.status} until the deadline; a later run goes on "
                                      f"with it ({order.url})")
            if order.wait or asked is None:
                self.world.sleep(wait)
            elif asked.wait(pause):
                asked.clear()
                pause = ASKED_SECONDS
            order = self.fetch_order(order.url, names)
            pause = min(pause * 2, POLL_SECONDS[1]) or POLL_SECONDS[0]
        return order

    def abandon(self, order: Order, names: Sequence[str]) -> list[Authorization]:
        """Give up an order: what is still pending of it is deactivated (section 7.5.2); its authorizations as found."""
        def give_up(url: str) -> Authorization:
            found = self.authorization(url, names)
            if found.status == "pending":
                with contextlib.suppress(WucmeError):       # a courtesy
                    self.post(url, {"status": "deactivated"})
            return found

        return at_once({url: functools.partial(give_up, url) for url in order.authorizations}, PATIENCE_SECONDS,
                       self.world)

    def complaint(self, order: Order, names: Sequence[str]) -> AcmeError:
        """Why an order turned invalid, name by name."""
        found = []
        with contextlib.suppress(WucmeError):       # the verdict stands, whatever else cannot be learnt
            found = [(one.name, challenge) for one in self.abandon(order, names)
                     for challenge in one.challenges if challenge.error]
        if not found:
            return acme_error(problem_text(order.error), order.error)
        text = "; ".join(f"{name}: {problem_text(one.error)}" for name, one in found)
        return acme_error(text, found[0][1].error, [one.kind for _, one in found])


def take_up(client: Client, found: Authorization, kinds: Sequence[str]) -> tuple[Challenge, Proof]:
    """The challenge to take up, of those that the CA offers for a name, and what proves it."""
    offered = {one.kind: one for one in found.challenges}
    for one in (offered[kind] for kind in kinds if kind in offered and proves(kind, found.name)):
        text = "\n".join(client.persistent_records(one, found.name)) if one.kind == "dns-persist-01" else \
            f"{one.token}.{thumbprint(client.key)}"
        if text:
            return one, Proof(one.kind, found.name.removeprefix("*."), one.token, text)
    raise ChallengeError(f"{found.name}: to prove it the CA offers {' and '.join(offered) or 'nothing known here'}, of "
                         f"which nothing is set up here (challenge = {' '.join(kinds)})", *kinds)


def authorize(client: Client, order: Order, task: Task) -> tuple[Order, float]:
    """Prove control of every name of an order; it as the CA left it, and the deadline for the rest (section 7.5)."""
    names, until = task.names, task.until
    if order.status != "pending":
        return order, until
    world = client.world
    for url in order.authorizations:
        log(f"{names[0]}: retrieving authorization at {url}")
    found = at_once({url: functools.partial(client.authorization, url, names) for url in order.authorizations},
                    until - world.monotonic(), world)
    pending = [take_up(client, one, task.kinds) for one in found if one.status == "pending"]
    begun = world.monotonic()
    with answering(task, [proof for _, proof in pending]):
        until += world.monotonic() - begun      # to publish may take longer than all the rest
        waiting = {one.url: functools.partial(client.answer, one) for one, _ in pending if one.status == "pending"}
        for challenge, _ in pending:
            log(f"{names[0]}: starting challenge at {challenge.url} ({challenge.kind})")
        at_once(waiting, until - world.monotonic(), world)
        log(f"{names[0]}: polling order status at {order.url}")
        heard = [challenge for challenge, proof in pending if places(task.wanted, proof.kind)]
        order = client.settle(order._replace(wait=0.0), names, ("pending",), until, task.asked if heard else None)
        if order.status == "invalid":
            if heard:
                log(f"{names[0]}: " + ("the CA has asked the listener here, and was answered"
                                       if any(one.token in task.answers.heard for one in heard)
                                       else "no request of the CA came to the listener here"))
            raise client.complaint(order, names)
    return order, until


def choose_chain(client: Client, first: Response, preferred: str) -> bytes:
    """The chain that is preferred, of all that the CA offers; its first where none is."""
    number = int(preferred) if re.fullmatch("[0-9]{1,3}", preferred) else 0
    if not preferred or (not number and chain_matches(first.body, preferred)):
        return first.body
    for url in alternates(first)[number - 1:number] if number else alternates(first):
        body = client.post(client.own_url(url, "alternate chain"), None).body
        if number or chain_matches(body, preferred):
            return body
    log(f"chain = {preferred}: the CA offers no such chain; its default is taken")
    return first.body


def finish(client: Client, order: Order, names: Sequence[str], request: bytes, until: float) -> Response:
    """Hand in the request of a ready order and fetch the chain (sections 7.4, 7.4.2)."""
    if order.status == "ready":
        log(f"{names[0]}: finalizing order at {order.finalize}")
        order = client.parse_order(order.url, client.post(order.finalize, {"csr": base64url(request)}), names)
    order = client.settle(order, names, ("processing", "ready"), until)
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
    rotate, linked = entry.wanted.rotate and not entry.wanted.csr, is_linked(entry)
    old_key = private_key(read(entry.key)) if entry.whole and not entry.wanted.csr else b""
    same = old_key == private_key(key)
    replaced = [entry.chain] if same or linked else [entry.key, entry.chain]
    first = [Step(f"backed up {path} as {path}_{stamp}", back_up, (path, f"{path}_{stamp}"))
             for path in replaced if os.path.exists(path)]
    if same and not linked and not rotate:
        return first + put_plain(entry, chain)
    last = [] if rotate else put_key(entry, key) + put_plain(entry, chain)
    if not entry.whole and not rotate:
        return first + last
    # The key changes under a live pair: through one file that holds both, and a link to it.
    secret = owner(entry.key, 0o600)
    both = put(entry.chain, key + chain, secret)
    if not linked:
        first += put(entry.chain, old_key + b"".join(certificates(read(entry.chain))), secret) if entry.whole else both
        first.append(Step(f"linking {entry.key} to {entry.chain}", link,
                          (os.path.basename(entry.chain), entry.key, f"{entry.chain}_tmp")))
    return first + (both if entry.whole or linked else []) + last


def straighten(entry: Entry) -> list[Step]:
    """The steps that are left of a switch to plain files that was cut short after the new pair had gone live."""
    both = read(entry.chain)
    key = private_key(both)
    if entry.wanted.rotate or not key:
        return []
    return (put_key(entry, key) if is_linked(entry) else []) + put_plain(entry, b"".join(certificates(both)))


def prune(directory: str, bases: Iterable[str], keep: int) -> None:
    """Delete all but the newest backups of each of these live files."""
    left = dict.fromkeys(bases, keep)
    for name in sorted(os.listdir(directory), reverse=True):
        base, _, stamp = name.rpartition("_")
        if base in left and re.fullmatch("[0-9]{16}", stamp):
            left[base] -= 1
            if left[base] < 0:
                remove(os.path.join(directory, name))


def remember(directory: str, entry: Entry, **changes: Any) -> Entry:
    """Write the memory of a certificate, if it is other than what is written already, and has a directory."""
    memory = entry.memory._replace(**changes)
    if directory and memory != entry.written:
        said = {key: value for key, value in memory._asdict().items() if value}
        replace(state_path(directory, entry.name), json.dumps(said).encode())
    return entry._replace(memory=memory, written=memory)


def sweep(directory: str, waiting: Iterable[str]) -> list[str]:
    """Delete what a killed run left: files never made live, and published tokens; a key whose order goes on stays."""
    stale = [os.path.join(directory, name) for name in waiting
             if name[:6].lower() == "wucme_" and name.endswith("_tmp") and not (name[6:8].lower() == "k_" and (
                 reserved(name[8:-8].lower()) or read_memory(state_path(directory, name[8:-8])).order))]
    tokens = os.path.join(directory, "tokens")
    if os.path.isdir(tokens) and not os.path.islink(tokens):
        stale += [os.path.join(tokens, name) for name in os.listdir(tokens) if re.fullmatch(BASE64URL, name)]
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

SYSTEMD_UNIT = r"systemd\s+[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*"
# postfix check tells its log alone what is wrong.
POSTFIX_TEST = 'postconf >/dev/null || exit; postfix check || { echo "see the log of postfix"; exit 1; }'


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


Parsed = tuple[tuple[str, ...], "Mapping[str, str]"]      # the last two of an Item


def parse_standard(rest: str) -> Parsed:
    """+: a known server, a unit of systemd, or nothing for all web servers."""
    if not rest:
        return tuple(name for name, kind in STANDARD.items() if kind.web), {}
    if rest in STANDARD or re.fullmatch(SYSTEMD_UNIT, rest):
        return tuple(rest.split()), {}
    known = [*STANDARD, "systemd UNIT"]
    raise ValueError(f"no such server{nearest(rest, known)} (there are {', '.join(known)})")


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
    if not words or re.search("[{}]", (words[0] + options.get("sni", "")).replace("{name}", "")):
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
    found = some_addresses(place) or ()
    if len(found) != 1 or not found[0][0]:
        raise ValueError("? needs HOST:PORT")
    protocol = options.get("starttls", "")
    if protocol not in STARTTLS:
        raise ValueError(f"starttls={protocol}: must be one of {', '.join(filter(None, STARTTLS))}")
    return (found[0][0], str(found[0][1])), options


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
    """A checksum of what makes this machine this machine; too short to tell it."""
    import binascii
    try:
        text = read("/etc/machine-id")
    except FileError:
        text = os.uname().nodename.encode()
    return f"{binascii.crc32(text):08x}"        # to load hashlib takes longer than the rest of it


def is_row(value: Any, *types: type) -> bool:
    """Whether a value out of a state file is a list of just these types."""
    return isinstance(value, list) and [type(one) for one in value] == list(types)


class Ledger:
    """What this host has loaded, by certificate and item, and whom it has alarmed; written down as it happens."""

    def __init__(self, directory: str, host: str) -> None:
        self.path = os.path.join(directory, f"wucme_l_{host}.json")
        self.machine = machine_id()
        found = read_json(self.path)
        self.stranger = bool(found) and found.get("machine") != self.machine
        tables: list[Any] = [found.get("certificates"), found.get("alarms")]
        held, told = (one if isinstance(one, dict) and not self.stranger else {} for one in tables)
        self.records: dict[str, dict[str, Loaded]] = {}     # by item, then by certificate
        for name, items in held.items():
            for text, about in items.items() if isinstance(items, dict) else ():
                if is_row(about, str, str, float):
                    self.records.setdefault(text, {})[sys.intern(name)] = Loaded(sys.intern(about[0]), *about[1:])
        self.alarms = {text: Alarm(tuple(about[0]), about[1]) for text, about in told.items()
                       if is_row(about, list, float)}
        self.changed, self.told = self.stranger, dict(self.alarms)      # against the file

    def done(self, entry: Entry, item: str) -> Loaded:
        """What an item was last done for."""
        return self.records.get(item, {}).get(entry.name, Loaded())

    def owes(self, entry: Entry, item: str) -> bool:
        """Whether an item is still to be done for the certificate on disk."""
        return entry.facts is not None and self.done(entry, item).fingerprint != entry.facts.fingerprint

    def note(self, entry: Entry, item: str, about: Loaded) -> None:
        """Put down how an item stands."""
        self.changed |= self.done(entry, item) != about
        self.records.setdefault(item, {})[entry.name] = about

    def strike(self, entry: Entry, item: str, problem: str, now: float) -> bool:
        """Note how an item ended; whether that is news. After a failed proof reloads are owed again."""
        before = self.done(entry, item)
        if not problem:
            self.note(entry, item, Loaded(entry.facts.fingerprint if entry.facts else ""))
            return True
        self.note(entry, item, before._replace(problem=problem, since=before.since if before.problem else now))
        if item[0] == "?":
            for text, held in self.records.items():
                if text[:1] in ("+", "?") and entry.name in held:
                    self.note(entry, text, held[entry.name]._replace(fingerprint=""))
        return before.problem != problem

    def forget(self, entries: Mapping[str, Entry]) -> None:
        """Drop the items that no list has any more."""
        for text, held in self.records.items():
            for name in [name for name in held if name not in entries or text not in entries[name].wanted.load]:
                del held[name]
                self.changed = True

    def save(self) -> None:
        """Write it, if anything in it is new."""
        if self.changed or self.alarms != self.told:
            by_name: dict[str, dict[str, Loaded]] = {}
            for text, held in self.records.items():
                for name, about in held.items():
                    by_name.setdefault(name, {})[text] = about
            content = {"machine": self.machine, "certificates": by_name, "alarms": self.alarms}
            replace(self.path, json.dumps(content).encode())
            self.changed, self.told = False, dict(self.alarms)


class Duty(NamedTuple):
    """One item to be done now, for these certificates."""
    item: Item
    entries: list[Entry]


def in_order(lists: Iterable[Sequence[str]]) -> list[str]:
    """The items of several lists, each once, so that every list's own order is kept where that can be."""
    found = dict.fromkeys(tuple(one) for one in lists)
    before: dict[str, list[str]] = {text: [] for one in found for text in one}
    for one in found:
        for earlier, text in zip(one, one[1:]):
            before[text].append(earlier)
    if len(found) > 1:
        import graphlib
        with contextlib.suppress(graphlib.CycleError):
            return list(graphlib.TopologicalSorter(before).static_order())
    return list(before)


def server_name(item: Item, entry: Entry) -> str:
    """The name that a proof asks the server for: sni, else the host; for an address a name of the certificate."""
    asked = item.options.get("sni", item.argv[0]).replace("{name}", entry.name)
    names = entry.facts.names if entry.facts else ()
    if "sni" in item.options or asked in names or not names or not is_address(asked):
        return asked
    return names[0].replace("*", "www")


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
        groups = [owing] if text[0] == "+" and owing else [[entry] for entry in owing]
        found += [Duty(items[text], group) for group in groups]
    return found


def load_environment(entry: Entry, directory: str, host: str) -> dict[str, str]:
    """What a procedure or command is told of the certificate that it is run for."""
    about = entry.facts
    return {**child_environment(), "WUCME_NAME": entry.name, "WUCME_NAMES": " ".join(about.names if about else ()),
            "WUCME_CERT": entry.chain, "WUCME_KEY": "" if entry.wanted.csr else entry.key,
            "WUCME_DIRECTORY": directory, "WUCME_HOST": host,
            "WUCME_FINGERPRINT": about.fingerprint if about else ""}


def own_options(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """Those of these options of a command line that it has, with their values."""
    words = argv[0].partition("master process ")[2].split() if len(argv) == 1 else argv
    kept = []
    for word, following in zip(words[1:], [*words[2:], ""]):
        if word in options:
            kept += [word, following]
        elif word.partition("=")[0] in options or word[:2] in options:
            kept.append(word)
    return kept


def server_command(kind: Standard, master: Process, timeout: float, world: World, argv: Sequence[str]) -> Finished:
    """Run a command about a server as the server itself runs: program, options, environment, directory, user."""
    program = proc_link(master.pid, "exe").replace(" (deleted)", "") or kind.commands[0]
    variables = (pair.partition("=") for pair in proc_text(master.pid, "environ").split("\0"))
    # What haproxy's master tells itself would have the test wait instead of reading its configuration.
    environment = {name: value for name, equals, value in variables
                   if equals and not name.startswith("HAPROXY_MWORKER")} or child_environment()
    where = proc_link(master.pid, "cwd")
    return world.command([argv[0] or program, *argv[1:], *own_options(master.argv, kind.options)], environment,
                         timeout, cwd=where if os.path.isdir(where) else "/", **credentials(master.pid))


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
    run = functools.partial(server_command, kind, master, timeout, world)
    tested = run(kind.test) if kind.test else Finished("", [])
    if tested.problem:          # it may have opened one of two files before a rename and the other after it
        world.sleep(1.0)
        tested = run(kind.test)
    if tested.problem:
        for line in tested.output:
            log(f"+{name}: {line}")
        return f"{who} was not reloaded, its configuration test failed: {with_last_line(tested)}"
    if unit := unit_of(master, timeout, world):
        return with_last_line(world.command(["systemctl", "reload", unit], child_environment(), timeout))
    if isinstance(kind.reload, tuple):
        return with_last_line(run(kind.reload))
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
    problems = []
    for name in names:
        found = {one.pid: one for one in processes(STANDARD[name].commands) if STANDARD[name].path in one.argv[0]}
        problems += [reload_server(name, one, timeout, world) for one in found.values() if one.parent not in found]
    if not problems:
        log(f"{duty.item.text}: no {' or '.join(names)} runs here; it reads the new files when it starts")
    return "; ".join(filter(None, problems))


def run_item(item: Item, environment: Mapping[str, str], timeout: float, world: World, *, title: str,
             given: str = "") -> str:
    """Run a procedure or command with something to read; the problem, or ""."""
    if item.text[0] == "@" and (fault := anyone_may_write(item.argv[0])):
        return fault
    finished = world.command(item.argv, environment, timeout, given=given)
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
    """Mode and owner of a copy, by their names on this host; what is not named is left to the file system."""
    import grp
    import pwd
    user, _, group = text.partition(":")
    try:
        return Owner(int(mode, 8), pwd.getpwnam(user).pw_uid if user else -1,
                     grp.getgrnam(group).gr_gid if group else -1)
    except KeyError as error:
        raise FileError(f"owner={text}: no such user or group on this host") from error


def write_copy(duty: Duty, _: RunScope, __: World) -> str:
    """Put the copy of a > item in place; WucmeError for what is in the way."""
    entry, options = duty.entries[0], duty.item.options
    what, path = options["what"], destination(duty.item, entry)
    # From parsed blocks: the chain file may hold the key too.
    chain, key = certificates(read(entry.chain)), private_key(read(entry.key))
    if WHATS[what] and not key:
        return f"there is no key in {entry.key}"
    parts = {"chain": chain, "cert": chain[:1], "issuers": chain[1:], "key": [key]}
    data = b"".join(parts.get(what, [key, *chain]))     # pair, and what p12 is made of
    if what == "p12":
        password = read(options["password_file"]).strip(b"\r\n")
        held = read(path) if os.path.isfile(path) else b""
        if not password:
            return f"{options['password_file']}: holds no password"
        data = held if p12_holds(held, data, password) else make_p12(data, entry.title, password)
    if not data:
        return f"there are no {what} in {entry.chain}"
    deploy(path, data, copy_owner(options.get("owner", ""), options["mode"]))
    return ""


def shown_instead(item: Item, entry: Entry, host: str, world: World) -> str:
    """What a server shows in place of the certificate on disk; "" if it is that."""
    name = server_name(item, entry)
    asked = f"{host} asked for {name} shows"
    try:
        shown = facts(world.connect(host, int(item.argv[1]), name, item.options.get("starttls", ""), CONNECT_SECONDS))
    except WucmeError as error:
        return f"{asked} no certificate: {error}"
    if entry.facts and shown.fingerprint == entry.facts.fingerprint:
        return ""
    return (f"{asked} another certificate, for {' '.join(shown.names) or 'no name'}, serial {shown.serial}, "
            f"that {'expired' if shown.not_after <= world.now() else 'expires'} {gmt(shown.not_after)}")


def prove_once(item: Item, entry: Entry, world: World) -> str:
    """Compare what a server shows with what is on disk; the problem, or ""."""
    host = item.argv[0].replace("{name}", entry.name)
    try:
        hosts = world.resolve(host) if "all" in item.options else [host]
    except NetworkError as error:
        return f"{host}: {error}"
    return "; ".join(filter(None, (shown_instead(item, entry, one, world) for one in hosts)))


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
    words: str                          # what it does
    act: Callable[[Duty, RunScope, World], str]


KINDS = {
    "+": Kind(parse_standard, "test and reload", standard_load),
    "@": Kind(parse_procedure, "run", procedure),
    "$": Kind(parse_command, "run", procedure),
    ">": Kind(parse_copy, "write", write_copy),
    "?": Kind(parse_proof, "prove", prove),
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
    state: str                          # current, renewed, held or failed; loaded, owed or (of neither) warned
    problem: str = ""
    news: bool = False


CURRENT = Outcome("", "current")        # of every certificate that needs nothing


class Report(NamedTuple):
    """What became of a run."""
    files: int
    certificates: list[Outcome]
    loads: list[Outcome]

    def count(self, *states: str) -> int:
        """How many ended in one of these states."""
        return sum(one.state in states for one in self.certificates + self.loads)

    def tally(self) -> str:
        """The last line of a run."""
        owed = self.count("owed")
        return (f"{self.files} files, {len(self.certificates)} certs, {self.count('renewed')} renewed, "
                f"{self.count('failed')} failed" + (f", {owed} owed" if owed else ""))

    @property
    def status(self) -> int:
        """The exit status."""
        return int(self.count("failed", "held", "owed") > 0)

    @property
    def news(self) -> bool:
        """Whether there is anything to tell someone who did not ask."""
        return any(one.news for one in self.certificates + self.loads)


def utc(when: float) -> str | None:
    """A time for machines, in UTC; None for never, and for what is not in the years 1 to 9999."""
    if not -62135596800 <= when < 253402300800:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)).zfill(20)


def local_time(when: float) -> str:
    """A time for a person, in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) if utc(when) else "never"


def epoch(text: str | None) -> int:
    """The time that `utc` wrote; 0 for None."""
    import calendar
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) if text else 0


def certificate_json(decision: Decision, loads: list[Json]) -> Json:
    """One certificate as status --json has it."""
    entry, about, memory = decision.entry, decision.entry.facts, decision.entry.memory
    next_time = max(memory.retry_at, memory.held_until)
    return {"name": entry.name, "file": entry.chain, "names": list(about.names if about else entry.wanted.names),
            **{key: getattr(about, key, None) for key in ("issuer", "serial", "fingerprint")},
            "not_before": about and utc(about.not_before), "not_after": about and utc(about.not_after),
            "due": decision.due, "reason": decision.reason, "renew_at": utc(decision.renew_at),
            "failures": {"count": memory.failures, "next": utc(next_time) if memory.problem and next_time else None,
                         "problem": memory.problem}, "loads": loads if about else []}


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
        lines.append(": ".join(filter(None, [f"    {load['state']}{since}", load["item"], load["problem"]])))
    return [printable(line) for line in lines]


def troubles(found: Iterable[Json], now: float) -> list[str]:
    """Each thing that is wrong with certificates and their loads, as status --json has them."""
    lines = []
    for one in found:
        wrong = [f"failed: {one['failures']['problem']}"] if one["failures"]["problem"] else []
        if (one["not_after"] or "") <= (utc(now) or ""):
            wrong.append(f"expired {one['not_after']}" if one["not_after"] else "not there")
        wrong += [": ".join(filter(None, ["owed", load["item"], load["problem"]]))
                  for load in one["loads"] if load["state"] == "owed"]
        lines += [printable(f"{(one['names'] or [one['name']])[0]}: {text}") for text in wrong]
    return lines


def overdue(found: Iterable[Json], now: float) -> list[str]:
    """The certificates in the last quarter of their life that should be renewed by now, or that nothing renews."""
    lines = []
    for one in found:
        start, end = epoch(one["not_before"]), epoch(one["not_after"])
        if end - (end - start) / 4 < now < end and (one["renew_at"] or "") <= (utc(now) or ""):
            lines.append(printable(f"{(one['names'] or [one['name']])[0]}: not renewed, ends {one['not_after']}"))
    return lines


def alert_text(run: RunScope, wrong: Sequence[str], lines: Sequence[str]) -> tuple[dict[str, str], str]:
    """What an item of `alert` finds in its environment, and what it reads."""
    state = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "all is well again"
    subject = f"wucme on {run.host}: {state}"
    told = {"WUCME_SUBJECT": subject, "WUCME_PROBLEMS": str(len(wrong)), "WUCME_HOST": run.host,
            "WUCME_DIRECTORY": run.directory}
    return told, "\n".join([subject, "", *wrong, *([""] if wrong else []), *lines, ""])


def metrics_text(about: Json) -> str:
    """What status found, for Prometheus (text format 0.0.4)."""
    ends, failures, owed = [], [], []       # each as what stands behind the name of the metric
    for one in about["certificates"]:
        label = f'{{name={json.dumps(printable(one["name"]), ensure_ascii=False)}}}'
        ends.append(f"{label} {epoch(one['not_after'])}")
        failures.append(f"{label} {one['failures']['count'] or int(bool(one['failures']['problem']))}")
        owed.append(f"{label} {sum(load['state'] == 'owed' for load in one['loads'])}")
    lines = []
    for name, text, values in (
            ("certificate_expiry_timestamp_seconds", "when the certificate ends", ends),
            ("certificate_failures", "how often it failed in a row since the last success", failures),
            ("loads_owed", "load items not done yet for the certificate on disk", owed),
            ("last_run_timestamp_seconds", "when wucme last ran", [f" {epoch(about['last_run'])}"])):
        lines += [f"# HELP wucme_{name} {text}\n# TYPE wucme_{name} gauge\n",
                  *(f"wucme_{name}{value}\n" for value in values)]
    return "".join(lines)


# === 13. run: the one place that knows the order =================================================

DEADLINES = 30                  # the time in which a run may begin to obtain certificates, in deadlines of one
TRUST = "trust"                 # the alarm, of no item, that others may change what root trusts
ALARM_SECONDS = 23 * 3600.0     # a day, less what cron may be early
# What is remembered of attempts when there is nothing to be done any more.
SETTLED: Mapping[str, Any] = {"order": "", "order_server": "", "problem": "", "failures": 0, "retry_at": 0.0,
                              "held_until": 0.0}


class Request(NamedTuple):
    """What the command line asks for."""
    verb: str = "run"
    names: tuple[str, ...] = ()
    force: bool = False
    dry_run: bool = False
    json: bool = False
    options: Mapping[str, str] = {}     # the settings among the options
    ini: str = ""                       # the ini that was named
    staging: bool = False
    reason: str = "unspecified"         # of a revocation
    install: bool = False


Tended = tuple[Entry, Outcome]      # a certificate as it is afterwards, and what became of it


class Opened(NamedTuple):
    """An account at a CA, ready for use."""
    client: Client
    server: ServerScope
    account: Account
    who: Applicant


class Obtained(NamedTuple):
    """A chain as the CA sent it, the key it was ordered for (None where its user has it), and what to remember."""
    entry: Entry
    chain: bytes
    key: PrivateKey | None
    server: str


@contextlib.contextmanager
def locked(run: RunScope, world: World, counts: bool = False) -> Iterator[list[float]]:
    """Hold the lock of the directory, after waiting up to lock_wait for another run; FileError if it goes on.

    Gives the times of the last runs that count, this one included if it does.
    """
    make_directory(run.directory)
    path = os.path.join(run.directory, LOCK)
    until, told = world.monotonic() + run.lock_wait, False
    while (descriptor := take_lock(path)) is None:
        who = read_json(path)
        holder = printable(f"pid {who.get('pid')} on {who.get('host')} since {who.get('since')}")
        if world.monotonic() >= until:
            raise FileError(f"another run is at work in {run.directory} ({holder}); nothing was done")
        if not told:
            log(f"waiting for another run to end ({holder})")
        told = True
        world.sleep(0.25)
    try:
        kept = read_json(path).get("runs")
        runs = [float(one) for one in (kept if isinstance(kept, list) else []) if isinstance(one, (int, float))]
        runs = [*runs, world.now()][-4:] if counts else runs
        about = {"pid": os.getpid(), "host": run.host, "since": utc(world.now()), "runs": runs}
        with contextlib.suppress(OSError):      # it is for the others to read; the lock holds without
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield runs
    finally:
        os.close(descriptor)


def take_stock(settings: Settings) -> Inventory:
    """The certificates of the directory, found and declared."""
    return scan(settings.run.directory, settings.default, settings.sections)


def load_items(settings: Settings) -> dict[str, Item]:
    """Every item of load and alert, by its text; SettingsError for the first that can never work."""
    items = {}
    for key, lines in ("load", settings.lists), ("alert", dict.fromkeys(settings.run.alert, "wucme")):
        for text, section in lines.items():
            try:
                items[text] = parse_item(text)
                if key == "alert" and text[0] not in "@$":
                    raise ValueError("alert takes @ (a procedure) and $ (a shell command)")
            except ValueError as error:
                raise SettingsError(f"{settings.source.where(section, key, text)}: {printable(text)}: "
                                    f"{error}") from error
    return items


def check_copies(settings: Settings, items: Mapping[str, Item], inventory: Inventory) -> None:
    """Refuse (SettingsError) copies that would overwrite one another, or wucme's own files."""
    taken: dict[str, Entry] = {}
    for entry in inventory.entries.values():
        for text in dict.fromkeys([text for text in entry.wanted.load if text[0] == ">"]):
            path, fault = destination(items[text], entry), ""
            if path.rpartition("/")[0] == settings.run.directory:
                fault = "is in wucme's own directory"
            elif path in taken:
                fault = (f"would be written for {taken[path].title} and for {entry.title}; put {{name}} into it, or "
                         "the item into the section of one")
            if fault:
                where = settings.source.where(settings.lists[text], "load", text)
                raise SettingsError(f"{where}: {printable(text)}: {path} {fault}")
            taken[path] = entry


def choose(inventory: Inventory, names: Sequence[str]) -> list[Entry]:
    """The certificates that names mean, all for none; SettingsError for a name that means none."""
    entries = list(inventory.entries.values())
    if not names:
        return entries
    # Two may be for one name: the one that is called so goes first.
    known = {**{entry.title: entry for entry in entries}, **{entry.name.replace("_", "."): entry for entry in entries},
             **inventory.entries}
    for name in names:
        if name.lower() not in known:
            raise SettingsError(f"{printable(name)}: no such certificate{nearest(name.lower(), known)}")
    return list({known[name.lower()].name: known[name.lower()] for name in names}.values())


def run_mark(now: float) -> str:
    """The run's mark on its backups: local time with hundredths."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(now)) + f"{int(now * 100) % 100:02d}"


def note_account(client: Client, account: Account) -> None:
    """Remember the URL of an account and the directory of its CA, if that is news."""
    state = {"directory": client.url, "account": client.account, "known": client.known}
    if client.account and read_json(account.state) != state:
        replace(account.state, json.dumps(state).encode())


def reach(settings: Settings, world: World, word: str, known: object = None) -> Client:
    """A client of the CA that a `server` word means, without an account."""
    _, server = find_server(settings, word)
    return Client(server.url, world, lambda: world.http(settings.run.timeout, server.ca_file, server.proxy), known)


def applicant(server: ServerScope) -> Applicant:
    """What a new account at a CA is made with."""
    file = server.eab_hmac_file
    mac = Secret(read(file).decode("ascii", "replace")) if file else server.eab_hmac
    return Applicant(server.contact, server.eab_kid, mac, server.eab_alg)


def account_key(account: Account) -> PrivateKey:
    """The key of an account, made if there is none."""
    path = account.key
    if not os.path.exists(path):
        log(f"making an account key, {path}")
        replace(path, key_pem(new_key("ecdsa-p256")))
    log(f"loading key from {path}")
    text = read(path)
    try:
        if not text.lstrip().startswith(b"{"):
            return parse_key(text)
        key = jwk_key(text)
        log(f"{path} holds a JWK; it is kept as PEM from now on")
        replace(path, key_pem(key))
        return key
    except PemError as error:
        raise PemError(f"{path}: {error}") from error


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


def sign_up(client: Client, server: ServerScope, who: Applicant, world: World) -> None:
    """Make an account at a CA; SettingsError unless its terms are agreed to."""
    terms = client.directory.terms
    if terms and not server.agree and not world.ask(f"Do you agree to the CA's terms of service at {terms}?"):
        raise SettingsError(f"{server.url}: no account yet, and the CA's terms of service at {terms} must be "
                            "agreed to first: set agree = yes, or use --agree")
    client.register(who, True)


def is_limit(error: Exception) -> bool:
    """Whether a CA but says not now, which ends no order."""
    return isinstance(error, AcmeError) and error.kind == "rateLimited"


def start_order(by: Opened, entry: Entry, names: Sequence[str]) -> Order:
    """The order that an earlier run could not finish, else a new one."""
    client, memory = by.client, entry.memory
    if memory.order and memory.order_server == client.url:
        try:
            order = client.fetch_order(client.own_url(memory.order, "order"), names)
            if order.status in ("pending", "ready", "processing", "valid"):
                log(f"{names[0]}: taking up the order {order.url}")
                return order
        except (AcmeError, ProtocolError) as error:
            if is_limit(error):
                raise
    log(f"{names[0]}: creating new order for {' '.join(names)} at {client.directory.new_order}")
    account, about = client.account, entry.facts
    replaces = about.ari if about and client.directory.renewal_info and memory.server == client.url else ""
    profile = entry.wanted.profile or by.server.profile
    try:
        order = client.new_order(names, profile, replaces)
    except AcmeError as error:
        if error.kind != "accountDoesNotExist":
            raise
        client.register_again(account, by.who, by.server.agree)
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


def prepare(entry: Entry, order: Order, server: str, run: RunScope) -> tuple[Entry, PrivateKey | None, bytes]:
    """Choose the key for an order, and write down what a killed run needs to go on with it.

    Gives what the order is finished with: the certificate as it is remembered, its key (None with a CSR), the request.
    """
    key = None if entry.wanted.csr else choose_key(entry, order.url == entry.memory.order)
    entry = remember(run.directory, entry, order=order.url, order_server=server)
    if not key:
        return entry, key, request_facts(read(entry.wanted.csr))[0]
    waiting, text = f"{entry.key}_tmp", key_pem(key)
    # What waits may be the only copy of a key that a CA has signed already: it is not made anew.
    if (not entry.whole or key_hash(key.public_key()) != entry.memory.key_hash) and not (
            os.path.isfile(waiting) and read(waiting) == text):
        create(waiting, text, owner(entry.key, 0o600))
        sync_directory(entry.key)
    return entry, key, signing_request(key, wanted_names(entry), entry.wanted.must_staple)


def obtain(entry: Entry, by: Opened, task: Task, run: RunScope) -> Obtained:
    """Take one certificate through the whole of ACME."""
    client, names = by.client, task.names
    asked = request_facts(read(entry.wanted.csr))[1] if entry.wanted.csr else names
    if set(asked) != set(names):
        raise PemError(f"{entry.wanted.csr}: asks for {' '.join(asked) or 'no name'}, not for {' '.join(names)}")
    create(f"{entry.chain}_tmp", bytes(1 << 14))    # a disk that takes nothing is met before an order is spent
    order = start_order(by, entry, names)
    with beside(functools.partial(prepare, entry, order, client.url, run)) as prepared:
        order, until = authorize(client, order, task)
    entry, key, request = prepared()
    first = finish(client, order, names, request, until)
    chain = choose_chain(client, first, entry.wanted.chain or by.server.chain)
    return Obtained(entry, chain, key, client.url)


def give_up_order(entry: Entry, client: Client, run: RunScope) -> Entry:
    """Forget an order that cannot be finished, here and at the CA."""
    memory = read_memory(state_path(run.directory, entry.name))
    with contextlib.suppress(WucmeError):       # a courtesy
        order = client.fetch_order(client.own_url(memory.order, "order"), wanted_names(entry))
        if order.status == "pending":
            client.abandon(order, wanted_names(entry))
    return remember(run.directory, entry._replace(memory=memory, written=memory), order="", order_server="")


def obtain_by_some_way(entry: Entry, by: Opened, task: Task, run: RunScope) -> Obtained:
    """Obtain one certificate by the first challenge types that work; each further try is a new order."""
    met: list[Exception] = []
    while True:
        try:
            if met:
                entry = give_up_order(entry, by.client, run)
            return obtain(entry, by, task, run)
        except (WucmeError, OSError) as error:
            met.append(error)
            left = tuple(kind for kind in task.kinds if kind not in getattr(error, "spent", ()))
            if left == task.kinds or not all(any(proves(kind, name) for kind in left) for name in task.names):
                break
            log(f"{task.names[0]}: {sentence(error)}; trying {' or '.join(left)}")
            task = task._replace(kinds=left, until=task.world.monotonic() + run.deadline)
    # What the CA refused must count for the ladder, whatever failed afterwards.
    refusals = [one for one in met if isinstance(one, AcmeError)]
    if refusals:
        raise max(refusals, key=lambda one: one.retry_after) from met[-1]
    raise met[0] if len(met) == 1 else ChallengeError("; ".join(map(sentence, met)))


def preference(entry: Entry, settings: Settings) -> list[str]:
    """The CAs to ask, in order: the one that issued first, but another after each three refusals."""
    words = sorted(entry.wanted.server, key=lambda word: find_server(settings, word)[1].url != entry.memory.server)
    turn = entry.memory.failures // 3 % len(words)
    return words[turn:] + words[:turn]


def once(make: Callable[[str], T]) -> Callable[[str], T]:
    """Make something for each word when it is first asked for; what fails then, fails all who ask."""
    import _thread
    guard = _thread.allocate_lock()     # that of threading, which an idle run need not load

    @functools.cache
    def made(word: str) -> T | Exception:
        try:
            return make(word)
        except Exception as error:
            return error

    def get(word: str) -> T:
        with guard:
            found = made(word)
        if isinstance(found, Exception):
            raise found
        return found

    return get


def touch(get: Callable[[str], object], entries: Iterable[Entry], settings: Settings) -> None:
    """Make what these certificates will need of their first CAs; what fails here, fails who needs it."""
    for word in dict.fromkeys(preference(entry, settings)[0] for entry in entries):
        with contextlib.suppress(Exception):
            get(word)


class Clients:
    """The CAs that a run needs: `reach` is a client of one, for questions that need no account, `enter` the account."""

    def __init__(self, settings: Settings, world: World, make: bool = True) -> None:      # `make` an account
        self.settings, self.world, self.make = settings, world, make
        self.until = world.monotonic() + DEADLINES * settings.run.deadline      # nothing is begun later
        self.reached: dict[str, Client] = {}        # by `server` word, like what is asked for
        self.reach = once(self.recall)
        self.enter = once(self.sign_in)

    def recall(self, word: str) -> Client:
        """A client of a CA, with what is remembered of it."""
        state = read_json(account_of(self.settings, word).state) if self.settings.run.directory else {}
        if state.get("directory") != find_server(self.settings, word)[1].url:
            state = {}
        self.reached[word] = client = reach(self.settings, self.world, word, state.get("known"))
        with contextlib.suppress(ProtocolError):        # also where none is remembered
            client.account = client.own_url(state.get("account"), "account")
        return client

    def sign_in(self, word: str) -> Opened:
        """Open the account at a CA; if there is none, it is made if it may be and the terms are agreed to."""
        account, server = account_of(self.settings, word), find_server(self.settings, word)[1]
        key, client, who = account_key(account), self.reach(word), applicant(server)
        client.key = key
        if os.path.exists(f"{account.key}_tmp"):        # a change of the key was cut short
            finish_key_change(client, account, who)
        if not client.account and not client.register(who, self.make and server.agree):
            if not self.make:
                raise SettingsError(f"{server.url}: no account yet; account new makes one, as the first order does "
                                    "(the CA's terms of service must be agreed to, if it has any)")
            sign_up(client, server, who, self.world)
        note_account(client, account)
        return Opened(client, server, account, who)

    def close(self) -> None:
        """Close the connections, and remember what became of the accounts."""
        for word, client in list(self.reached.items()):      # a worker that was given up may reach one yet
            client.close()
            if self.settings.run.directory:
                with contextlib.suppress(OSError):      # the account can be asked for again
                    note_account(client, account_of(self.settings, word))


def obtain_somewhere(entry: Entry, kinds: Sequence[str], clients: Clients, answers: Answers, run: RunScope) -> Obtained:
    """Obtain one certificate from the first of its CAs that can be reached."""
    monotonic, words = clients.world.monotonic, preference(entry, clients.settings)
    until = monotonic() + run.deadline
    task = Task(wanted_names(entry), entry.wanted, kinds, until, answers, clients.world, threading.Event(), entry.name)
    while True:
        try:
            return obtain_by_some_way(entry, clients.enter(words.pop(0)), task, run)
        except NetworkError as error:
            if not words or isinstance(error, UnfinishedError) or monotonic() > until:
                raise
            log(f"{entry.title}: {error}; trying the next CA")


def store(obtained: Obtained, run: RunScope, mark: str, now: float,
          change: Callable[..., list[Step]] = switch) -> Entry:
    """Check a certificate as it would go live, and make it live by the steps of a `change`."""
    entry, names = obtained.entry, wanted_names(obtained.entry)
    if obtained.key is None:
        public, secret = key_of(read(entry.key)), b""
    else:
        public = key_hash(obtained.key.public_key())
        kept = entry.whole and public == entry.memory.key_hash
        secret = private_key(read(entry.key)) if kept else key_pem(obtained.key)
    temporary, waiting = f"{entry.chain}_tmp", f"{entry.key}_tmp"
    log(f"saving certificate to {temporary}")
    create(temporary, obtained.chain)
    log(f"reading private key {waiting if os.path.exists(waiting) else entry.key}")
    try:
        extra = check_chain(read(temporary), public, names, now)
    except PemError as error:       # an order is spent: as good as a refusal
        raise AcmeError(str(error), "badCertificate") from error
    if extra:
        log(f"{entry.title}: the CA added {' '.join(extra)}")
    for step in change(entry, obtained.chain, secret, mark):
        if not step.text.startswith("saving"):
            log(step.text)
        step.do()
    for path in entry.files:
        remove(f"{path}_tmp")
    log(f"wuCME successful {entry.title} {'renewal' if entry.facts else 'issue'}")
    found = look(entry)
    if not found.whole:
        raise FileError(f"{found.fault or entry.key}: the new pair does not fit on the disk")
    with contextlib.suppress(OSError):      # it is live: what follows must not undo that
        found = remember(run.directory, found, server=obtained.server, names=names, profile=entry.wanted.profile,
                         window=(), about="", ask_at=0.0, **SETTLED)
    return found


def own_share(run: RunScope, name: str) -> float:
    """A number from 0 to 1 that is this host's and certificate's own."""
    import hashlib
    return int(hashlib.sha256(os.fsencode(f"{run.host} {name}")).hexdigest()[:8], 16) / 0xffffffff


def fail(entry: Entry, error: Exception, run: RunScope, now: float) -> Outcome:
    """Note why a certificate failed; only a CA's refusal counts for the ladder, and (but a limit) ends the order."""
    problem = sentence(error)
    log(f"{entry.title}: failed: {problem}", wrong=True)
    written = read_memory(state_path(run.directory, entry.name))
    memory = written._replace(problem=problem)
    if isinstance(error, AcmeError):
        failures = memory.failures + 1
        memory = memory._replace(failures=failures, retry_at=next_try(failures, own_share(run, entry.name), now),
                                 held_until=now + error.retry_after if error.retry_after else 0.0)
    over = isinstance(error, (AcmeError, PemError)) and not is_limit(error)
    if over:
        memory = memory._replace(order="", order_server="")
    with contextlib.suppress(OSError):      # the disk may be what failed
        for path in entry.files if over else entry.files[:1]:
            remove(f"{path}_tmp")
        remember(run.directory, entry._replace(memory=memory, written=written))
    return Outcome(entry.title, "failed", problem, news=problem != entry.memory.problem)


def patience(entry: Entry, run: RunScope) -> float:
    """The seconds after which a certificate is given up for this run, whatever its worker does."""
    wanted = entry.wanted
    slow = 2 * wanted.load_timeout * len(wanted_names(entry)) if wanted.hook else 0.0
    each = run.deadline + 3 * run.timeout + (wanted.dns_wait if wanted.nsupdate or slow else 0.0)
    return len(wanted.challenge) * each + slow


def check_names(entry: Entry) -> Sequence[str]:
    """The names to order; PemError for one found in a certificate that no CA would take."""
    for name in wanted_names(entry):
        try:
            host_name(name)
        except ValueError as error:
            raise PemError(f"{entry.chain}: {error}; declare it, with names = ...") from error
    return wanted_names(entry)


def conclude(entry: Entry, result: Any, run: RunScope, now: float, world: World) -> Tended:
    """Make live what was obtained; the entry as it is then, with its outcome."""
    try:
        found = store(result_of(result), run, run_mark(now), world.now())
        if found.facts and now >= renewal_time(found.facts, found.wanted.renew):
            log(f"{entry.title}: the new certificate is due again at once: it lives shorter than renew expects; "
                "every run will renew it", wrong=True)
        return found, Outcome(entry.title, "renewed", "", True)
    except Exception as error:      # whatever it is, it must not stop the others
        return entry, fail(entry, error, run, now)


@contextlib.contextmanager
def listening(entries: Sequence[Entry], answers: Answers) -> Iterator[dict[Place, str]]:
    """Listen where certificates want it for as long as this is open; gives why it cannot be done at some places."""
    listeners, refused = open_listeners((place for entry in entries for kind in entry.wanted.challenge
                                         for place in places(entry.wanted, kind)), answers)
    try:
        yield refused
    finally:
        for listener in listeners:
            listener.close()


def renew_all(due: Iterable[Entry], settings: Settings, clients: Clients, now: float) -> Iterator[Tended]:
    """Obtain and store every certificate that is due, the most urgent first."""
    run, world = settings.run, clients.world
    ranked = sorted(due, key=lambda entry: entry.facts.not_after if entry.facts else now)
    urgent, later = ranked[:run.orders], ranked[run.orders:]
    if later:
        log(f"{len(later)} more are due, and left to the next run (orders = {run.orders}): "
            + ", ".join(entry.title for entry in later[:3]) + " ..." * (len(later) > 3))
    for entry in later:
        yield entry, Outcome(entry.title, "held")
    answers, begun, jobs = Answers(run.directory), {}, []
    # The CAs are called while listeners and keys are seen to.
    get_ready_to_dial()
    with beside(lambda: touch(clients.reach, urgent, settings)), listening(urgent, answers) as refused:
        for entry in urgent:
            try:
                kinds = prospects(entry.wanted, check_names(entry), refused)
            except WucmeError as error:
                yield entry, fail(entry, error, run, now)
                continue
            begun[entry.name] = entry
            jobs.append(Job(entry.name, functools.partial(obtain_somewhere, entry, kinds, clients, answers, run),
                            patience(entry, run)))
        # Accounts first: the user may be asked about terms.
        touch(clients.enter, begun.values(), settings)
        for name, result in gather(jobs, run.workers, world, clients.until):
            yield conclude(begun[name], result, run, now, world)
        with contextlib.suppress(OSError):      # too many backups do no harm
            prune(run.directory, (os.path.basename(path) for one in urgent for path in one.files), run.backups)


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
    entry = entry._replace(memory=memory)
    with contextlib.suppress(OSError):
        return remember(run.directory, entry)
    return entry


def ask_windows(decisions: Iterable[Decision], settings: Settings, clients: Clients, now: float) -> dict[str, Entry]:
    """The certificates that are not due otherwise and whose CA is to be asked again when to renew them (RFC 9773)."""
    def question(entry: Entry) -> Any:
        client = clients.reach(issuing(entry, settings))
        return client.renewal_window(entry.facts.ari if entry.facts else "") if client.directory.renewal_info \
            else (None, ASK_SECONDS[2])

    found = {one.entry.name: one.entry for one in decisions
             if not now < one.entry.memory.ask_at <= now + ASK_SECONDS[1] and not one.due and not one.held
             and one.entry.facts and one.entry.facts.ari and not one.entry.wanted.renew.never}
    jobs = [Job(name, functools.partial(question, entry), patience(entry, settings.run))
            for name, entry in found.items()]
    for name, result in gather(jobs, settings.run.workers, clients.world, clients.until):
        found[name] = advised(found[name], result, settings.run, now)
    return found


def save(ledger: Ledger) -> list[Outcome]:
    """Write the ledger down; an outcome if it cannot be."""
    try:
        ledger.save()
        return []
    except OSError as error:
        problem = f"{ledger.path}: what was loaded cannot be written down, and is loaded again: {error.strerror}"
        log(problem, wrong=True)
        return [Outcome(ledger.path, "owed", problem, True)]


def pay(todo: Iterable[Duty], run: RunScope, ledger: Ledger, world: World) -> Iterator[Outcome]:
    """Do what is to be loaded; an item that fails does not stop the next, and stays owed."""
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
                yield Outcome(entry.title, "owed" if problem else "loaded", problem, news)
            if world.monotonic() - saved > 1:
                with contextlib.suppress(OSError):
                    ledger.save()
                saved = world.monotonic()
    finally:
        with contextlib.suppress(OSError):      # tried, and said, once more in the end
            ledger.save()


class Standing(NamedTuple):
    """What status found."""
    lines: list[str]
    about: Json
    status: int


def load_json(entry: Entry, items: Mapping[str, Item], ledger: Ledger) -> list[Json]:
    """The load list of one certificate, as status --json has it."""
    done = [(text, ledger.done(entry, text)) for text in entry.wanted.load if concerns(items[text], entry)]
    return [{"item": text, "state": "owed" if ledger.owes(entry, text) else "loaded",
             "since": utc(last.since) if last.problem else None, "problem": last.problem} for text, last in done]


def standing(settings: Settings, world: World) -> Standing:
    """What is there, what is due, what is owed; looks only."""
    now, run, items = world.now(), settings.run, load_items(settings)
    held, _ = signature(os.path.join(run.directory, LOCK))
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
    ledger.alarms = {item: about for item, about in ledger.alarms.items() if item in (TRUST, *run.alert)}
    for item in run.alert:
        last = ledger.alarms.get(item, Alarm())
        if wrong == last.problems and not (late and now - last.at > ALARM_SECONDS):
            continue
        problem = run_item(items[item], {**child_environment(), **environment}, settings.default.load_timeout, world,
                           title="alert", given=text)
        log(f"alert failed: {item}: {problem}" if problem else f"alert succeeded: {item}", wrong=bool(problem))
        if problem:
            yield Outcome(item, "owed", problem, True)
        else:
            ledger.alarms[item] = Alarm(wrong, now)
    try:
        if run.metrics:
            replace(run.metrics, metrics_text(found.about).encode(), 0o644)
    except OSError as error:
        log(f"metrics cannot be written: {sentence(error)}", wrong=True)
        yield Outcome(run.metrics, "owed", sentence(error), True)


def examine(inventory: Inventory, request: Request, now: float) -> list[Decision]:
    """What to do about each certificate; one that was not asked for is not due."""
    entries, named = inventory.entries, bool(request.names)
    chosen = {entry.name for entry in choose(inventory, request.names)} if named else entries
    return [decide(entry, now, named, request.force) if entry.name in chosen else decide(entry, now)._replace(due=False)
            for entry in entries.values()]


def pass_by(decision: Decision, run: RunScope, now: float) -> Outcome:
    """See to a certificate that is not due: what a stopped run left is ended, and what went wrong forgotten."""
    entry = decision.entry
    outcome = Outcome(entry.title, "held") if decision.held else CURRENT
    over = entry.whole and not decision.reason and not entry.memory.settled
    settled = entry.memory._replace(**SETTLED) if over else entry.memory
    if settled == entry.written and not entry.fault:
        return outcome
    try:
        if entry.fault and (entry.blocked or not wanted_names(entry)):
            raise FileError(entry.fault)
        if entry.memory.order and not settled.order:
            for step in straighten(entry):
                log(step.text)
                step.do()
            remove(f"{entry.files[-1]}_tmp")
    except (WucmeError, OSError) as error:
        return fail(entry, error, run, now)
    with contextlib.suppress(OSError):      # it can be learnt again
        remember(run.directory, entry._replace(memory=settled))
    return outcome


def tend(decisions: Iterable[Decision], settings: Settings, clients: Clients, now: float) -> Iterator[Tended]:
    """See to every certificate: each comes back as it is afterwards, with its outcome."""
    due = []
    for one in decisions:
        entry = one.entry
        if entry.facts and (one.due or log.live):
            log(entry.chain)
            log(dates(one, now))
        if one.due or one.held:
            log(f"{entry.title}: due: {one.reason}" + (f": {entry.memory.problem}" if one.held else ""))
        if one.due:
            due.append(entry)
        else:
            yield entry, pass_by(one, settings.run, now)
    if due:
        yield from renew_all(due, settings, clients, now)


def clean_up(inventory: Inventory, settings: Settings, world: World) -> None:
    """Finish or undo what a run that was stopped left behind."""
    directory = settings.run.directory
    for path in sweep(directory, inventory.waiting):
        log(f"removed {path}, left by a run that was stopped")
    answers = Answers(directory)
    for name in os.listdir(answers.directory) if os.path.isdir(answers.directory) else ():
        path = os.path.join(answers.directory, name)
        names = read_json(path).get("names") if name.startswith(".") else None
        if isinstance(names, list) and names:
            entry = inventory.entries.get(name[1:])
            wanted = entry.wanted if entry else settings.default
            task = Task([str(one) for one in names], wanted, (), 0.0, answers, world, threading.Event(), name[1:])
            for line in undo_left(task, path):
                log(line)


def others_trusted(settings: Settings, items: Mapping[str, Item], entries: Iterable[Entry],
                   ledger: Ledger) -> Iterator[Outcome]:
    """One warning, news once, if root trusts what a group or another user may change."""
    scopes = [settings.default, *(section.values for section in settings.sections.values())]
    kept = compiled(os.path.abspath(__file__))
    paths = [__file__, kept, os.path.dirname(kept), settings.source.path or __file__,
             settings.run.directory, *(entry.key for entry in entries if entry.wanted.csr or not entry.guarded),
             *(scope.hook.begin[0] for scope in scopes if scope.hook),
             *(item.argv[0] for item in items.values() if item.text[0] == "@")]
    found = tuple(dict.fromkeys(filter(None, map(others_may_write, paths)))) if os.geteuid() == 0 else ()
    told = ledger.alarms.pop(TRUST, Alarm()).problems
    if found:
        ledger.alarms[TRUST] = Alarm(found)
        log(f"others than root may change what root trusts: {', '.join(found)}", wrong=True)
        yield Outcome("", "warned", "", found != told)


def open_ledger(run: RunScope) -> Ledger:
    """This host's ledger."""
    ledger = Ledger(run.directory, run.host)
    if ledger.stranger:
        log(f"{ledger.path} was written on another machine: two hosts call themselves {run.host} (set host), or this "
            "one was copied; everything is loaded anew")
    return ledger


def run_once(settings: Settings, request: Request, world: World) -> Report:
    """The whole job, once: look, ask, decide, obtain, store, load, report."""
    items, run = load_items(settings), settings.run
    with locked(run, world, request.verb == "run") as runs, contextlib.closing(Clients(settings, world)) as clients:
        now = world.now()
        log("certificate management")
        ledger = open_ledger(run)       # before the rest, for what reading it takes is free again then
        inventory = take_stock(settings)
        check_copies(settings, items, inventory)
        decisions = examine(inventory, request, now)
        if told := ask_windows(decisions, settings, clients, now):
            inventory.entries.update(told)
            decisions = examine(inventory, request, now)
        clean_up(inventory, settings, world)
        entries, outcomes, loads = inventory.entries, [], []
        for entry, outcome in tend(dropped(decisions), settings, clients, now):
            entries[entry.name] = entry
            outcomes.append(outcome)
        for warning in too_rare(entries.values(), runs):
            log(warning, wrong=True)
            loads.append(Outcome("", "warned", warning, True))
        ledger.forget(entries)
        loads += others_trusted(settings, items, entries.values(), ledger)
        loads += pay(duties(entries.values(), items, ledger.owes), run, ledger, world)
        loads += alarm(settings, items, ledger, world)
        loads += save(ledger)
        report = Report(inventory.files, outcomes, loads)
        log(report.tally())
    return report


def rehearse(settings: Settings, request: Request, world: World) -> Report:
    """Run the load list now for the certificates as they are, owed or not."""
    items = load_items(settings)
    with locked(settings.run, world):
        inventory = take_stock(settings)
        check_copies(settings, items, inventory)
        entries = choose(inventory, request.names)
        ledger = open_ledger(settings.run)
        loads = list(pay(duties(entries, items, lambda *_: True), settings.run, ledger, world))
        if not loads:
            lists = [entry.wanted.load for entry in entries if entry.whole]
            log("nothing was loaded: " + ("no item of the load list is for it" if any(lists) else
                                          "the load list is empty" if lists else "there is no certificate"))
        loads += alarm(settings, items, ledger, world)
        loads += save(ledger)
        return Report(inventory.files, [CURRENT] * len(entries), loads)


def foretell(settings: Settings, request: Request, world: World) -> list[str]:
    """What a run (or a load) would do, in words; nothing is changed."""
    items, now = load_items(settings), world.now()
    inventory = take_stock(settings)
    check_copies(settings, items, inventory)
    lines = []
    if request.verb == "load":
        todo = duties(choose(inventory, request.names), items, lambda *_: True)
    else:
        ledger, decisions = Ledger(settings.run.directory, settings.run.host), examine(inventory, request, now)
        renewed = {one.entry.name for one in decisions if one.due}
        lines = [f"would order a certificate for {' '.join(wanted_names(one.entry))} at "
                 f"{preference(one.entry, settings)[0]}: {one.reason}" if one.due else
                 dates(one, now) + ("" if not one.entry.facts else f": due: {one.reason}" if one.held else ": not due")
                 for one in decisions]
        todo = duties(inventory.entries.values(), items,
                      lambda entry, text: entry.name in renewed or ledger.owes(entry, text))
    lines += [f"would {KINDS[one.item.text[0]].words} {one.item.text} for "
              f"{', '.join(entry.title for entry in one.entries)}" for one in todo]
    return [printable(line) for line in lines] or ["nothing to do"]


def issue(settings: Settings, request: Request, world: World) -> Report:
    """The first certificate for some names: a run for it alone, then what its user wants to know."""
    fresh, label = declare(settings, request.names, request.options)
    section = fresh.sections[label]
    for word in section.values.server:
        find_server(fresh, word, section.title)
    report = run_once(fresh, request._replace(names=(label,)), world)
    found = choose(take_stock(fresh), [label])[0]
    if not found.whole and label not in settings.sections:
        log("nothing was issued, and nothing is tried again by itself: mend the cause and give the same command again")
    # Others may have its title; what was due comes last.
    state = [CURRENT.state, *(one.state for one in report.certificates if one.title == found.title)][-1]
    if not found.whole or state in ("failed", "held"):
        return report
    if state == "current":
        when = local_time(decide(found, world.now()).renew_at)
        print(f"{found.title} is not due before {when}; --force renews it now")
    print(f"certificate: {found.chain}\n{'request:    ' if found.wanted.csr else 'key:        '} {found.key}")
    if not section.values.load:
        print("the load list is empty: no server is told of a new certificate (see LOAD LIST in --help)")
    path = settings.source.path or request.ini or os.path.join(default_directory(), "wucme.ini")
    for line in keep_options(settings.source, path, section, request.options) if not request.staging else ():
        print(line)
    return report


STATELESS = """\
# With this a web server answers every http-01 challenge of this account by itself, on any host: set
# stateless = yes. When the account gets another key it has to be done again.

# nginx: in each server of port 80
    location ~ "^/\\.well-known/acme-challenge/([-_a-zA-Z0-9]+)$" {
        default_type text/plain;
        return 200 "$1.@PRINT@";
    }

# apache (mod_rewrite): in each VirtualHost of port 80
    <LocationMatch "^/\\.well-known/acme-challenge/(?<token>[-_a-zA-Z0-9]+)$">
        RewriteEngine on
        RewriteRule "^" "-" [END,R=200]
        ErrorDocument 200 "%{env:MATCH_TOKEN}.@PRINT@"
    </LocationMatch>

# haproxy: in the frontend of port 80
    acl acme path -m reg ^/\\.well-known/acme-challenge/[-_a-zA-Z0-9]+$
    http-request return status 200 content-type text/plain lf-string "%[path,field(4,/)].@PRINT@" if acme

# caddy: in each site of http://
    @acme path_regexp token ^/\\.well-known/acme-challenge/([-_a-zA-Z0-9]+)$
    respond @acme "{re.token.1}.@PRINT@"

# WASD: in WASD_CONFIG_MAP of a front; it passes challenges on to this host, for each of its names
    [[@NAME@:80]]
    redirect /.well-known/acme-challenge/* \\
             /http://@HOST@/cgi-bin/wucme/.well-known/acme-challenge/*
    pass http://@HOST@/cgi-bin/wucme/.well-known/acme-challenge/*"""


def show_thumbprint(settings: Settings, _: Request, __: World) -> Report:
    """Print the account key's thumbprint, and what makes web servers answer every challenge with it."""
    host, mark = settings.run.host, thumbprint(account_key(account_of(settings, settings.default.server[0])))
    name = next((name for one in settings.sections.values() for name in one.values.names), host)
    print(f"{mark}\n")
    print(STATELESS.replace("@PRINT@", mark).replace("@HOST@", host).replace("@NAME@", name))
    return Report(0, [], [])


REASONS = {"unspecified": 0, "keyCompromise": 1, "affiliationChanged": 3, "superseded": 4, "cessationOfOperation": 5}


def revoke(settings: Settings, request: Request, world: World) -> Report:
    """Revoke a certificate, by its name or its file, and say what that means for those who serve it."""
    if len(request.names) != 1 or request.reason not in REASONS:
        raise SettingsError(f"revoke takes one name or file, and --reason {', '.join(REASONS)}")
    name, run = request.names[0], settings.run
    with locked(run, world), contextlib.closing(Clients(settings, world)) as clients:
        inventory = take_stock(settings)
        path = name if os.path.isfile(name) else choose(inventory, [name])[0].chain
        chain = read(path)
        try:
            fingerprint, der = facts(chain).fingerprint, certificate_der(chain)
        except PemError as error:
            raise PemError(f"{path}: {error}") from error
        found = [one for one in inventory.entries.values() if one.facts and one.facts.fingerprint == fingerprint]
        client = clients.enter(issuing(found[0], settings) if found else settings.default.server[0]).client
        try:
            client.revoke(der, REASONS[request.reason])
        except AcmeError as error:
            if error.kind != "unauthorized" or not found or not found[0].whole or found[0].wanted.csr:
                raise
            log(f"{name}: the account may not revoke it ({error}); once more by the certificate's own key")
            client.revoke(der, REASONS[request.reason], by=parse_key(read(found[0].key)))
        print(f"{name} is revoked")
        for entry in found:
            remember(run.directory, entry, revoked=fingerprint)
            print("servers still serve it: " + (
                f"make a new key and a request, {entry.key}; the next run then gets another" if entry.wanted.csr else
                f"the next run gets another, with a new key; wucme.py renew {entry.name} does so at once"))
    return Report(inventory.files, [], [])


def show_account(opened: Opened, _: str) -> list[str]:
    """The account as the CA has it."""
    about = opened.client.account_object()
    contact = about.get("contact")
    return [f"account: {opened.client.account}", f"key:     {opened.account.key}", f"status:  {about.get('status')}",
            f"contact: {' '.join(map(str, contact)) if isinstance(contact, list) else 'none'}"]


def update_account(opened: Opened, mark: str) -> list[str]:
    """The account with the contact of the settings, or none."""
    opened.client.account_object({"contact": [f"mailto:{address}" for address in opened.who.contact]})
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
    return [f"the account at {opened.client.url} is deactivated for ever; its key is now {path}_{mark}"]


ACCOUNT_VERBS: dict[str, Callable[[Opened, str], list[str]]] = {
    "new": show_account, "show": show_account, "update": update_account, "newkey": new_account_key,
    "deactivate": deactivate_account}


def account_verb(settings: Settings, request: Request, world: World) -> Report:
    """See to the account at a CA: new, show, update, newkey, deactivate."""
    action = " ".join(request.names)
    if action not in ACCOUNT_VERBS:
        raise SettingsError(f"account takes one of {', '.join(ACCOUNT_VERBS)}")
    with locked(settings.run, world), contextlib.closing(Clients(settings, world, action == "new")) as clients:
        opened = clients.enter(settings.default.server[0])
        for line in ACCOUNT_VERBS[action](opened, run_mark(world.now())):
            print(printable(line))
    return Report(0, [], [])


UNITS, BOOTED = "/etc/systemd/system", "/run/systemd/system"
CRON_FILE = "/etc/cron.d/wucme"
OWN_TABLE = "your crontab"
OWN_LINE = "# by wucme.py timer"
CRONTAB = f"""\
{{ crontab -l 2>/dev/null | grep -v '{OWN_LINE}$'; printf '%s\\n' "$WUCME_LINE"; }} | crontab -"""
TIMER = """\
[Timer]
OnCalendar=hourly
RandomizedDelaySec=1h
FixedRandomDelay=true
Persistent=true

[Install]
WantedBy=timers.target
"""
SERVICE = """\
[Unit]
Description=wucme: renews certificates, and loads them into their servers
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
WorkingDirectory={}
ExecStart={}
TimeoutStartSec={:.0f}
PrivateTmp=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectKernelLogs=true
ProtectControlGroups=true
MemoryMax=1G
{}"""
# What its user wants run must be able to do what it does under cron, and may leave a server behind.
LOOSE = """\
UMask=0022
KillMode=process
"""
STRICT = """\
UMask=0077
ProtectSystem=strict
ReadWritePaths={}
NoNewPrivileges=true
CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_CHOWN CAP_FOWNER CAP_DAC_OVERRIDE
"""


class Schedule(NamedTuple):
    """A way to have wucme run every hour: what is written where, what is run then, and what undoes it."""
    texts: dict[str, str]
    then: Sequence[Sequence[str]]
    undo: str


def unit_word(text: str) -> str:
    """A word as units have it (systemd.syntax, and systemd.unit for its specifiers)."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return text if re.fullmatch("[-A-Za-z0-9/._%=]+", text) else f'"{text}"'


class Launch(NamedTuple):
    """How a run is started: where, and by which words."""
    directory: str
    argv: Sequence[str]


def module_name(script: str) -> str:
    """The name by which Python can start a script as a module, which it keeps compiled; "" if it has none."""
    name, _, end = os.path.basename(script).rpartition(".")
    return name if end == "py" and name.isidentifier() else ""


def launch_of(settings: Settings, script: str) -> Launch:
    """How to start a run of this script with this ini, with as little to compile as can be."""
    real, ini = os.path.realpath(script), settings.source.path      # beside which Python looks for modules
    directory, module = os.path.dirname(real), module_name(real)
    how = ["-m", module] if module and os.access(directory, os.R_OK) else [script]
    return Launch(directory, [sys.executable, *how, *(["--ini", ini] if ini else [])])


def refuse_relative(source: Source) -> None:
    """Refuse (SettingsError) an ini in which paths depend on where a run is started."""
    for title, texts in parse_ini(source).items():
        for key, text in texts.items():
            kind, words = SETTINGS[key].kind, text.split()
            for word in (words if kind is some_paths else words[:1]) if kind in WHOLE else ():
                if word[0] not in "/~":
                    raise SettingsError(f"{source.where(title, key)}: {key} = {printable(text)}: timer needs whole "
                                        f"paths, for {word} depends on where a run is started")


def service(settings: Settings, launch: Launch) -> str:
    """The unit of a run: it may do as little as the settings allow."""
    items, run = load_items(settings), settings.run
    scopes = [settings.default, *(section.values for section in settings.sections.values())]
    if any(text[0] in "+@$" for text in items) or any(scope.hook or scope.nsupdate for scope in scopes):
        confined = LOOSE
    else:
        files = [run.log, run.metrics, *(item.argv[0].partition("{name}")[0] for item in items.values()
                                         if item.text[0] == ">")]
        paths = [run.directory, *map(os.path.dirname, filter(None, files)),
                 *(path for scope in scopes for path in scope.webroot)]
        confined = STRICT.format(" ".join(unit_word(f"-{path}") for path in dict.fromkeys(paths)))
    limit = run.lock_wait + 2 * DEADLINES * run.deadline + len(items) * settings.default.load_timeout
    return SERVICE.format(launch.directory.replace("%", "%%"),
                          " ".join(unit_word(word).replace("$", "$$") for word in launch.argv), limit, confined)


def by_systemd(settings: Settings, launch: Launch) -> Schedule:
    """A timer of systemd."""
    if os.geteuid() != 0:
        raise SettingsError("timer: only root can install a unit of systemd; timer cron takes your own crontab")
    texts = {f"{UNITS}/wucme.service": service(settings, launch), f"{UNITS}/wucme.timer": TIMER}
    return Schedule(texts, [("systemctl", "daemon-reload"), ("systemctl", "enable", "--now", "wucme.timer")],
                    f"systemctl disable --now wucme.timer; rm {' '.join(texts)}; systemctl daemon-reload")


def by_cron(settings: Settings, launch: Launch) -> Schedule:
    """A line for cron, in a table of the system or of the user."""
    import shlex
    when = f"{1 + int(58 * own_share(settings.run, 'timer'))} * * * *"      # not at :00, when everybody comes
    line = f"cd {shlex.quote(launch.directory)} && {shlex.join(launch.argv)}".replace("%", r"\%")
    root, then = os.geteuid() == 0, []
    if root and os.path.exists(f"{UNITS}/wucme.timer"):
        then.append(("systemctl", "disable", "--now", "wucme.timer"))
    if root and os.path.isdir(os.path.dirname(CRON_FILE)):
        return Schedule({CRON_FILE: f"{when} root {line}\n"}, then, f"rm {CRON_FILE}")
    line = f"{when} {line}  {OWN_LINE}"
    return Schedule({OWN_TABLE: f"{line}\n"}, [*then, ("env", f"WUCME_LINE={line}", "sh", "-c", CRONTAB)],
                    f"crontab -e, and take out the line that ends in {OWN_LINE}")


def has_it_run(line: str, script: str) -> bool:
    """Whether a line of a table of cron runs a script, as a file or as a module, and is not ours to replace."""
    text = line.partition("#")[0]
    as_module = rf"{re.escape(os.path.dirname(script))}(?![\w.-]).*\s-m\s*['\"]?{module_name(script) or '$'}(?![\w.])"
    return bool(script in text or re.search(as_module, text)) and not line.endswith(OWN_LINE)


def other_tables(script: str, world: World) -> Iterator[str]:
    """The tables of cron that run this script by a line that is not ours to replace."""
    paths, folder = ["/etc/crontab"], os.path.dirname(CRON_FILE)
    with contextlib.suppress(OSError):
        paths += [os.path.join(folder, name) for name in os.listdir(folder)]
    tables = {}
    for path in paths:
        with contextlib.suppress(FileError):        # what cannot be read has no lines
            tables[path] = read(path).decode("utf-8", "replace").splitlines()
    tables[OWN_TABLE] = world.command(("crontab", "-l"), child_environment(), 60.0).output
    return (name for name, lines in tables.items() if name != CRON_FILE
            and any(has_it_run(line, path) for line in lines for path in (script, os.path.realpath(script))))


def timer(settings: Settings, request: Request, world: World) -> list[str]:
    """Show what makes wucme run every hour, or put it there in place of what was there; lines that say so."""
    if request.options or request.staging or request.names not in ((), ("systemd",), ("cron",)):
        raise SettingsError("timer takes systemd or cron, and settings from the ini alone")
    form = (*request.names, "systemd" if os.geteuid() == 0 and os.path.isdir(BOOTED) else "cron")[0]
    script = os.path.abspath(__file__)
    refuse_relative(settings.source)
    launch = launch_of(settings, script)
    plan = (by_systemd if form == "systemd" else by_cron)(settings, launch)
    if not request.install:
        return [*(f"# {path}\n{text}" for path, text in plan.texts.items()),
                f"# to put that in place: timer {form} --install"]
    for table in other_tables(script, world):
        raise FileError(f"{table} has wucme run already; take that out, then try again")
    make_directory(settings.run.directory)
    if "-m" in launch.argv:
        compile_ahead(os.path.realpath(script))
    for path, text in plan.texts.items():
        if path != OWN_TABLE:
            replace(path, f"# made, and replaced, by wucme.py timer --install\n{text}".encode(), 0o644)
    for words in plan.then:
        if problem := with_last_line(world.command(words, child_environment(), 60.0)):
            raise FileError(f"{' '.join(words)}: {problem}")
    if form == "systemd":
        remove(CRON_FILE)
    return [f"wucme runs every hour by {form}: {' '.join(plan.texts)}", f"to undo that: {plan.undo}"]


def open_log(run: RunScope) -> None:
    """Begin to write the log file; without one the run goes on."""
    make_directory(run.directory)
    try:
        log.descriptor = open_append(run.log)
    except OSError as error:
        log(f"no log is written: {sentence(error)}")


# === 14. diagnosis: what would go wrong, before an order is spent =================================
# A check looks at one thing of one certificate (or one CA) and says what it finds; it takes no lock,
# and all that it publishes is a token of its own for a moment.

OK, NOTE, PROBLEM = "ok", "note", "problem"
VISIT_SECONDS = 5.0
REDIRECTS = 10                  # that CAs follow
CAA_RECORD = r'[0-9]+ (issue|issuewild) "([^";]*).*"'


class Finding(NamedTuple):
    """One thing that was found: how bad it is, of what, and what to do about it."""
    level: str
    about: str
    text: str


class Case(NamedTuple):
    """One certificate to be looked at, in its surroundings."""
    entry: Entry
    settings: Settings
    task: Task                          # as an order would have it, but for hooks and updates
    refused: Mapping[Place, str]        # where it cannot be listened, and why
    issuers: Mapping[str, Sequence[str]]    # by `server` word: what CAA records may call the CA


def about_server(settings: Settings, word: str, world: World, issuers: dict[str, Sequence[str]]) -> Iterator[Finding]:
    """Whether a CA can be reached, as what CAA records know it, and whether its clock agrees with ours."""
    _, server = find_server(settings, word)
    try:
        with contextlib.closing(reach(settings, world, word)) as client:
            told = client.directory.meta.get("caaIdentities")
            issuers[word] = [str(one).lower() for one in told] if isinstance(told, list) else []
            date = http_date(client.send("GET", client.url).headers.get("Date") or "")
    except WucmeError as error:
        yield Finding(PROBLEM, word, f"{error}; look at this host's network, proxy, DNS and clock")
        return
    late = date - world.now() if date else 0.0
    if abs(late) > SKEW_SECONDS:
        yield Finding(PROBLEM, word, f"this host's clock is {abs(late):.0f} s {'behind' if late > 0 else 'ahead of'} "
                      "the CA's: set it, or new certificates are refused as not valid now")
    else:
        yield Finding(OK, word, f"{server.url} answers, and its clock agrees")
    if not server.agree and not os.path.exists(account_of(settings, word).state):
        yield Finding(NOTE, word, "no account yet: the first order asks whether you agree to its terms (agree = yes)")


def obstacle(item: Item, entry: Entry) -> str:
    """What stands in the way of an item of the load list, or ""."""
    if item.text[0] == "@":
        path = item.argv[0]
        return anyone_may_write(path) if os.access(path, os.X_OK) else f"{path} is not there, or cannot be executed"
    if item.text[0] != ">":
        return ""
    try:
        copy_owner(item.options.get("owner", ""), item.options["mode"])
    except FileError as error:
        return str(error)
    needed = os.path.dirname(destination(item, entry)), item.options.get("password_file", "/")
    return "; ".join(f"{one} is not there" for one in needed if not os.path.exists(one))


def about_loads(case: Case) -> Iterator[Finding]:
    """Whether procedures, directories and owners of the load list are there."""
    entry = case.entry
    for text in entry.wanted.load:
        if problem := obstacle(parse_item(text), entry):
            yield Finding(PROBLEM, entry.title, f"load: {text}: {problem}")
    if not entry.wanted.load:
        yield Finding(NOTE, entry.title, "the load list is empty: no server is told of a new certificate")


def about_files(case: Case) -> Iterator[Finding]:
    """Whether what the settings name is on this host."""
    import shutil
    wanted, path = case.entry.wanted, child_environment()["PATH"]
    programs = {"dig": any(kind.startswith("dns-") for kind in wanted.challenge), "nsupdate": wanted.nsupdate}
    found: dict[str, Any] = {f"webroot {one}": os.path.isdir(one) for one in wanted.webroot}
    if wanted.hook:
        found[f"hook {wanted.hook.begin[0]}"] = os.access(wanted.hook.begin[0], os.X_OK)
    if wanted.nsupdate:
        found[f"nsupdate {wanted.nsupdate.key}"] = os.access(wanted.nsupdate.key, os.R_OK)
    found.update({f"program {one} (Debian: bind9-dnsutils)": shutil.which(one, path=path)
                  for one, used in programs.items() if used})
    if wanted.csr:
        found[f"csr {wanted.csr}"] = os.access(wanted.csr, os.R_OK)
    for what, there in found.items():
        if not there:
            yield Finding(PROBLEM, case.entry.title, f"{what}: is not there, or cannot be used by this user")


def about_ports(case: Case) -> Iterator[Finding]:
    """Whether the listeners can be had, and who else has the port."""
    wanted, title = case.entry.wanted, case.entry.title
    for kind in wanted.challenge:
        for place in places(wanted, kind):
            refusal = case.refused.get(place)
            yield Finding(PROBLEM, title, refusal) if refusal else \
                Finding(OK, title, f"{kind}: {place.host}:{place.port} can be listened on")
    if "http-01" in wanted.challenge and not places(wanted, "http-01"):
        holder = port_holder(CHALLENGES["http-01"].port)
        yield Finding(OK, title, f"port 80 here: {holder}") if holder else \
            Finding(NOTE, title, "nobody listens on port 80 here: right if another host answers, or passes on to here")


def called_at(case: Case, kinds: Iterable[str]) -> dict[str, list[str]]:
    """The names that the CA connects to for these challenge types, and where to, as this host knows it."""
    found: dict[str, list[str]] = {}
    for name in case.task.names:
        if any(kind in kinds and proves(kind, name) for kind in case.entry.wanted.challenge):
            found[name] = []
            with contextlib.suppress(NetworkError):
                found[name] = [name] if is_address(name) else case.task.world.resolve(name)
    return found


def is_private(address: str) -> bool:
    """Whether no public CA can reach an address."""
    import ipaddress
    return not ipaddress.ip_address(address.partition("%")[0]).is_global


def about_addresses(case: Case) -> Iterator[Finding]:
    """Where the names lead, against the addresses of this host."""
    for name, found in called_at(case, [kind for kind, about in CHALLENGES.items() if about.port]).items():
        if not found:
            yield Finding(PROBLEM, name, "the name does not resolve here: give it an A or AAAA record")
        for address in found:
            private = " (private: a public CA needs another one from its own DNS)" if is_private(address) else ""
            if is_ours(address):
                yield Finding(OK, name, f"{address} is this host's{private}")
            else:
                yield Finding(NOTE, name, f"{address} is not this host's{private}: right if it is a router's or "
                              f"front's that passes {WELL_KNOWN} on to here")


def caa_tags(case: Case, name: str) -> tuple[str, list[tuple[str, str]]]:
    """The CAA records (RFC 8659) that count for a name, as tags and values, and where they stand."""
    at = name.removeprefix("*.")
    while at:
        lines = [line for line in ask_dns(case.task, "CAA", f"{at}.") if not line.endswith(".")]
        if lines:
            matches = (re.fullmatch(CAA_RECORD, line.lower()) for line in lines)
            return at, [(found[1], found[2].strip()) for found in matches if found]
        at = at.partition(".")[2]
    return "", []


def about_caa(case: Case) -> Iterator[Finding]:
    """Whether CAA records allow the CAs."""
    for name in (name for name in case.task.names if not is_address(name)):
        try:
            at, tags = caa_tags(case, name)
        except ChallengeError as error:
            yield Finding(NOTE, name, f"CAA records could not be looked up: {error}")
            return
        wild = [value for tag, value in tags if tag == "issuewild" and name.startswith("*.")]
        allowed = wild or [value for tag, value in tags if tag == "issue"]
        for word, known in case.issuers.items():
            if word in case.entry.wanted.server and allowed and known and not set(allowed) & set(known):
                yield Finding(PROBLEM, name, f"CAA at {at} allows {' '.join(filter(None, allowed)) or 'no CA'}, but "
                              f"{word} is {' or '.join(known)}: change the record, or the server")


def redirect_fault(url: str, address: str, home: str) -> str:
    """Why a public CA does not follow a redirect, or ""; home is the address that it came from."""
    at = urllib.parse.urlsplit(url)
    host, port = at.hostname or "", at.port or {"http": 80, "https": 443}.get(at.scheme, 0)
    faults = ((at.scheme not in ("http", "https"), f"{at.scheme} is not http or https"),
              (port not in (80, 443), f"port {port} is neither 80 nor 443"),
              (is_address(host), f"{'a private' if is_private(address) else 'an'} address, not a name"),
              ("." not in host, f"{host} is no name of the public DNS"),
              (is_private(address) and not is_private(home), f"{host} is the private address {address}"))
    return "; ".join(text for wrong, text in faults if wrong)


def trail(world: World, url: str, address: str) -> tuple[list[str], str, Response]:
    """Follow redirects as public CAs do: the way, what they refuse of it (it ends there), and the last answer."""
    way: list[str] = []
    home, response = address, world.visit(url, address, VISIT_SECONDS)
    while 300 <= response.status < 400 and (target := response.headers.get("Location")) and len(way) < REDIRECTS:
        try:
            url = urllib.parse.urljoin(url, target)
            way.append(url)
            host = urllib.parse.urlsplit(url).hostname or ""
            address = host if is_address(host) else world.resolve(host)[0]
            if fault := redirect_fault(url, address, home):
                return way, fault, response
            response = world.visit(url, address, VISIT_SECONDS)
        except (ValueError, NetworkError) as error:
            return way, f"leads nowhere ({error})", response
    return way, "", response


def about_visit(name: str, address: str, proof: Proof, world: World) -> Iterator[Finding]:
    """Whether a token that is published now is answered at one address of a name."""
    host = f"[{name}]" if ":" in name else name
    try:
        way, fault, last = trail(world, f"http://{host}{WELL_KNOWN}{proof.token}", address)
    except NetworkError as error:
        if is_ours(address):
            yield Finding(PROBLEM, name, f"{address}: port 80 gives no answer: {error}; open it, or see who has it")
        else:
            yield Finding(NOTE, name, f"{address}: port 80 gives no answer to this host: {error}; behind a router that "
                          "says little (hairpin NAT), ask from outside")
        return
    by = f", redirected to {' and '.join(way)}" if way else ""
    if fault:
        yield Finding(PROBLEM, name, f"{address}{by}: {fault}: public CAs do not follow; pass the request on instead")
    elif last.status == 200 and last.body.decode("utf-8", "replace").strip() == proof.text:
        yield Finding(OK, name, f"{address}: a token published now is answered{by}")
    else:
        yield Finding(PROBLEM, name, f"{address}: not a token published now, but HTTP status {last.status} came{by}; "
                      f"pass {WELL_KNOWN} of this name on to what answers here")


def about_reach(case: Case) -> Iterator[Finding]:
    """Whether the CA's question would be answered at each address of each name."""
    import secrets
    wanted, token, called = case.entry.wanted, secrets.token_urlsafe(24), called_at(case, ["http-01"])
    if not called or "hook" in ways(wanted, "http-01"):
        return
    try:
        key = parse_key(read(account_of(case.settings, wanted.server[0]).key))
        text = f"{token}.{thumbprint(key)}"
    except WucmeError:
        text = f"{token}.check"
        if "stateless" in ways(wanted, "http-01"):
            yield Finding(NOTE, case.entry.title, "stateless = yes, and no account key yet: see wucme.py thumbprint")
            return
    proof = Proof("http-01", case.task.names[0], token, text)
    try:
        with answering(case.task, [proof]):
            for name, addresses in called.items():
                for address in addresses:
                    yield from about_visit(name, address, proof, case.task.world)
    except ChallengeError as error:
        yield Finding(PROBLEM, case.entry.title, str(error))


def suspects(settings: Settings, inventory: Inventory, request: Request) -> list[Entry]:
    """The certificates to look at: those named, be they there or not, else all."""
    found = [] if request.names else list(inventory.entries.values())
    for name in request.names:
        try:
            found += choose(inventory, [name])
        except SettingsError:
            fresh, label = declare(settings, [name], request.options)
            found += choose(take_stock(fresh), [label])
    return found


def diagnose(settings: Settings, request: Request, world: World) -> Iterator[Finding]:
    """Look at all that an order would need, and say what is found."""
    items, inventory = load_items(settings), take_stock(settings)
    check_copies(settings, items, inventory)
    make_directory(settings.run.directory)
    entries, answers = suspects(settings, inventory, request), Answers(settings.run.directory)
    issuers: dict[str, Sequence[str]] = {}
    for word in dict.fromkeys(word for entry in entries for word in entry.wanted.server):
        yield from about_server(settings, word, world, issuers)
    with listening(entries, answers) as refused:
        for entry in entries:
            plain = entry.wanted._replace(hook=None, nsupdate=None)
            names: Sequence[str] = ()
            try:
                names = check_names(entry)
            except PemError as error:
                yield Finding(PROBLEM, entry.title, str(error))
            task = Task(names, plain, (), 0.0, answers, world, threading.Event(), f"check-{os.getpid()}")
            for check in (about_loads, about_files, about_ports, about_addresses, about_caa, about_reach):
                yield from check(Case(entry, settings, task, refused, issuers))


# === 15. uacme: its command line and its directory =============================================
# wucme.py --uacme is uacme 1.8: its options, files, modes, hook calls and exit codes. A call of it becomes
# settings, and an entry whose paths are uacme's; the rooms above do the rest.

UACME_DIRECTORY = "/etc/ssl/uacme"


class Switch(NamedTuple):
    """An option of uacme: its long name, what its value must be ("" if it has none), the settings that it makes."""
    name: str
    form: str = ""
    settings: Mapping[str, str] = {}


UACME_OPTIONS = {
    "a": Switch("acme-url", "https://.+", {"server": "{0}"}),
    "b": Switch("bits", "[0-9]{1,5}"),
    "c": Switch("confdir", ".+"),
    "d": Switch("days", "0*[1-9][0-9]{0,8}", {"renew": "{0}d"}),
    "e": Switch("eab", "[^:]+:[A-Za-z0-9_=-]+(:(256|384|512))?",
                {"eab_kid": "{1[0]}", "eab_hmac": "{1[1]}", "eab_alg": "HS{1[2]}"}),
    "f": Switch("force"),
    "h": Switch("hook", ".+", {"hook": "uacme:{2}", "challenge": "http-01 dns-01 tls-alpn-01"}),
    "i": Switch("no-ari"),
    "k": Switch("rotate-key", "", {"rotate": "yes"}),
    "l": Switch("alternate", "0*[1-9][0-9]*|[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2})+", {"chain": "{0}"}),
    "m": Switch("must-staple", "", {"must_staple": "yes"}),
    "n": Switch("never-create"),
    "o": Switch("no-ocsp"),
    "p": Switch("profile", ".+", {"profile": "{0}"}),
    "r": Switch("reason", "[0-9]{1,4}"),
    "s": Switch("staging", "", {"server": "letsencrypt-staging"}),
    "t": Switch("type", "(?i:rsa|ec)"),
    "v": Switch("verbose"),
    "V": Switch("version"),
    "y": Switch("yes", "", {"agree": "yes"}),
    "?": Switch("help"),
}


class Call(NamedTuple):
    """One call of uacme: its command with the words behind it, its options by letter, and what they come to."""
    verb: str
    words: Sequence[str]
    given: Mapping[str, str]
    settings: Settings
    top: str                    # uacme's directory, "" for a flat one of wucme's own
    clients: Clients


def read_call(argv: Sequence[str]) -> tuple[list[str], dict[str, str], int]:
    """The words and options of a command line of uacme's, and how verbose it is; SettingsError."""
    import getopt
    letters = "".join(letter + ":" * bool(one.form) for letter, one in UACME_OPTIONS.items())
    names = [one.name + "=" * bool(one.form) for one in UACME_OPTIONS.values()]
    try:
        pairs, words = getopt.gnu_getopt(list(argv), letters, names)
    except getopt.GetoptError as error:
        raise SettingsError(f"--uacme: {error}") from error
    known = {f"--{one.name}": letter for letter, one in UACME_OPTIONS.items()}
    pairs = [(known.get(option, option[1:]), value) for option, value in pairs]
    given = dict(pairs)
    for letter, value in given.items():
        form = UACME_OPTIONS[letter].form
        if not re.fullmatch(form, value):
            raise SettingsError(f"--uacme: -{letter} {printable(value)}: must be of the form {form}")
    if {"V", "?"} & set(given) or not words or words[0] not in UACME_VERBS:
        raise SettingsError(f"wucme {VERSION}, as uacme: one of {', '.join(UACME_VERBS)}; options: " + " ".join(
            f"-{letter}|--{one.name}" for letter, one in UACME_OPTIONS.items()))
    if {"a", "s"} <= set(given) or {"k", "n"} <= set(given):
        raise SettingsError("--uacme: -a does not go with -s, nor -k with -n")
    return words, given, pairs.count(("v", ""))


def key_asked(given: Mapping[str, str]) -> str:
    """The kind of new keys that a call of uacme's wants; SettingsError."""
    is_rsa = given.get("t", "rsa").lower() == "rsa"
    bits = int(given.get("b", "2048" if is_rsa else "256"))
    if bits not in (range(2048, 8193, 8) if is_rsa else (256, 384)):
        raise SettingsError("--uacme: -b must be 256 or 384 for EC, and for RSA a multiple of 8 from 2048 to 8192")
    return f"rsa-{bits}" if is_rsa else f"ecdsa-p{bits}"


def texts_of(given: Mapping[str, str]) -> dict[str, str]:
    """The settings that uacme's options and environment make."""
    proxy = os.environ.get("UACME_PROXY", "")
    texts = {"ca_file": os.environ.get("UACME_CAINFO") or os.environ.get("UACME_CAPATH", ""),
             "proxy": proxy if not proxy or re.search(r":\d+$", proxy) else f"{proxy}:1080"}
    for letter, value in given.items():
        parts = value, [*value.split(":"), "256"], os.path.abspath(value)
        texts.update({key: text.format(*parts) for key, text in UACME_OPTIONS[letter].settings.items()})
    if "h" in given and not os.access(given["h"], os.R_OK | os.X_OK):
        raise SettingsError(f"--uacme: -h {given['h']}: not a program that may be read and run")
    return {key: text for key, text in texts.items() if text}


def understand_call(argv: Sequence[str], world: World) -> Call:
    """What a command line of uacme's asks for, and of which directory; SettingsError where that cannot be."""
    (verb, *words), given, log.loud = read_call(argv)
    log.live, log.quiet = log.loud > 0, not log.loud
    kind, texts = key_asked(given), texts_of(given)
    least, most = UACME_VERBS[verb][1:]
    if not least <= len(words) <= most:
        raise SettingsError(f"--uacme: {verb} takes {least} to {most} arguments")
    if verb in ("new", "update"):
        texts["contact"] = " ".join(words)
    if "c" not in given and not os.path.isdir(UACME_DIRECTORY):
        source = read_source(find_ini(os.environ.get("WUCME_INI", "")))
        for flat in (os.getcwd(), read_settings(source, texts).run.directory):
            _, _, keys, _ = list_names(flat)
            if "account" in keys:
                asked = {"key": kind} if {"t", "b"} & set(given) else {}        # else what the ini says
                settings = read_settings(source, {**texts, **asked, "directory": flat})
                return Call(verb, words, given, settings, "", Clients(settings, world))
    settings = read_settings(NOWHERE, {"renew": "30d", "deadline": "40m", "load_timeout": "40m", **texts})
    settings = settings._replace(default=settings.default._replace(key=kind), run=settings.run._replace(directory=""))
    return Call(verb, words, given, settings, given.get("c", UACME_DIRECTORY), Clients(settings, world))


def overheard(command: Callable[..., Finished], *arguments: Any, **more: Any) -> Finished:
    """Run a hook where we are, and pass on what it says."""
    finished = command(*arguments, cwd=os.getcwd(), **more)
    for line in [] if log.live else finished.output:
        log.show(f"{printable(line)}\n")
    return finished


def uacme_key(call: Call, path: str, maker: str, directories: Mapping[str, int] = {}) -> PrivateKey:
    """The key in a file of uacme's; the command `maker` makes it and its directories (with their modes), unless -n."""
    missing = [one for one in (*directories, path) if not os.path.exists(one)]
    if missing and (call.verb != maker or "n" in call.given):
        raise FileError(f"{missing[0]}: not there (only `new` makes the first one, and nothing does with -n)")
    for directory, mode in directories.items():
        if not os.path.isdir(directory):
            os.mkdir(directory)
            os.chmod(directory, mode)
            sync_directory(directory)
    if not os.path.exists(path):
        log(f"making a key, {path}")
        create(path, key_pem(new_key(call.settings.default.key)), Owner(0o400, -1, -1))
        sync_directory(path)
    return account_key(Account(path, ""))


def supersede(path: str, new: str, stamp: str) -> list[Step]:
    """The steps that put a new file in place, the old one kept under uacme's name for it."""
    old = f"{path[:-4]}-{stamp}.pem"
    kept = [Step(f"backed up {path} as {old}", keep, (path, old))] if os.path.exists(path) else []
    return [*kept, Step(f"renaming {new} to {path}", rename, (new, path))]


def uacme_switch(entry: Entry, chain: bytes, key: bytes, stamp: str) -> list[Step]:
    """The steps that make a checked chain live in uacme's way, and a new key with it."""
    waiting = f"{entry.chain}_tmp"
    same = entry.wanted.csr or key_of(read(entry.key)) == key_of(key)
    return [Step(f"saving to {waiting}", create, (waiting, b"".join(certificates(chain)), owner(entry.chain, 0o444))),
            *supersede(entry.chain, waiting, stamp), *([] if same else supersede(entry.key, f"{entry.key}_tmp", stamp))]


def open_account(call: Call) -> Opened:
    """The account in uacme's directory, not yet looked for at the CA; `new` alone may make its key."""
    word, path = call.settings.default.server[0], os.path.join(call.top, "private", "key.pem")
    key = uacme_key(call, path, "new", {call.top: 0o755, os.path.dirname(path): 0o700})
    client, server = call.clients.reach(word), find_server(call.settings, word)[1]
    client.key = key
    return Opened(client, server, Account(path, ""), applicant(server))


def found_account(opened: Opened) -> Opened:
    """An account that the CA knows; AcmeError if it does not."""
    if not opened.client.register(opened.who, False):
        raise AcmeError(f"{opened.client.url}: no account has the key {opened.account.key}; `new` makes one")
    return opened


def uacme_new(call: Call) -> None:
    """Make an account; one that is there already is an error, as it is to uacme."""
    opened = open_account(call)
    if opened.client.register(opened.who, False):
        raise AcmeError(f"{opened.client.url}: there is an account with the key {opened.account.key} already")
    sign_up(opened.client, opened.server, opened.who, call.clients.world)


def uacme_change(call: Call) -> None:
    """Replace the contact of the account, or close it for good."""
    opened = found_account(open_account(call))
    contact = [f"mailto:{address}" for address in opened.who.contact]
    opened.client.account_object({"contact": contact} if call.verb == "update" else {"status": "deactivated"})


def uacme_newkey(call: Call) -> None:
    """Give the account another key."""
    opened, new = found_account(open_account(call)), os.path.join(call.top, "private", "newkey.pem")
    opened.client.change_key(uacme_key(call, new, "newkey"))
    for step in supersede(opened.account.key, new, str(int(call.clients.world.now()))):
        log(step.text)
        step.do()


def uacme_revoke(call: Call) -> None:
    """Revoke the certificate in a file, by its own key if that is given, and put the file aside."""
    path, *keys = call.words
    chain = read(path)
    serial = facts(chain).serial
    key = uacme_key(call, keys[0], "") if keys else None
    client = call.clients.reach(call.settings.default.server[0]) if key else found_account(open_account(call)).client
    log(f"revoking {path}, serial number {serial}")
    client.revoke(certificate_der(chain), int(call.given.get("r", "0")), key)
    rename(path, os.path.join(os.path.dirname(path), f"revoked-{int(call.clients.world.now())}.pem"))


def uacme_entry(call: Call, server: str) -> Entry:
    """The certificate that a call is about, in uacme's places; its key and directories are made if they may be."""
    word, wanted = call.words[0], call.settings.default
    if os.path.isfile(word):
        if call.words[1:]:
            raise SettingsError(f"--uacme: {word} is a file: a signing request has its names in it, and takes no more")
        wanted = wanted._replace(csr=os.path.abspath(word), names=request_facts(read(word))[1])
        chain, key = f"{os.path.splitext(wanted.csr)[0]}-cert.pem", wanted.csr
    else:
        wanted = wanted._replace(names=parse_value(NOWHERE, "", "names", " ".join(call.words)))
        name = word.removeprefix("*.")
        public, private = os.path.join(call.top, name), os.path.join(call.top, "private", name)
        chain, key = os.path.join(public, "cert.pem"), os.path.join(private, "key.pem")
        uacme_key(call, key, "issue", {private: 0o700, public: 0o755})
    # A name more than was asked for is no reason to renew; and who issued is not known, but taken to be this CA.
    memory = Memory(names=wanted.names, server=server)
    return look(Entry(word, chain, key, memory, memory, wanted, frozenset(["names"])))


def uacme_advised(entry: Entry, client: Client, run: RunScope, now: float) -> Entry:
    """An entry with what the CA says of when to renew it, which then counts alone until its last day."""
    about, window = entry.facts, None
    if about and about.ari and about.not_after - now >= 86400 and client.directory.renewal_info:
        try:
            window, _ = client.renewal_window(about.ari)
        except WucmeError as error:
            log.detail(f"{entry.title}: no renewal information: {error}")
    if window is None:
        return entry
    # Nothing is remembered: what is drawn is this host's and certificate's own, and so the same each day.
    memory = entry.memory._replace(window=settle_window(window, (), own_share(run, entry.name)), about=window.about)
    return entry._replace(memory=memory, wanted=entry.wanted._replace(renew=Renewal(seconds=86400.0)))


class Unwritten(Journal):
    """What is published for one name; uacme's directory has no place for a note of it."""

    def save(self) -> None:
        """Write nothing."""


def by_asking(task: Task, one: Proof) -> None:
    """Have whoever sits at the terminal answer."""
    value = hook_fields(task, one, DIALECTS["uacme"])["value"]
    log.show(f"challenge={one.kind} ident={one.name} token={one.token} key_auth={value}\n")
    if not task.world.ask("Is it answered, and to be taken up?"):
        raise ChallengeError(f"{one.name}: nobody answers {one.kind} (without -h a terminal is asked)", one.kind)


def prove_name(client: Client, order: Order, found: Authorization, kind: str, task: Task) -> None:
    """Prove one name by a challenge of one type, to the end; ChallengeError if that is declined."""
    challenge, proof = take_up(client, found, (kind,))
    proof = proof._replace(token=proof.token or proof.text.partition(";")[0])
    journal, verdict = Unwritten(task), "failed"
    try:
        if task.wanted.hook:
            by_hook(task, [proof], journal)
        else:
            by_asking(task, proof)
        log(f"{found.name}: starting challenge at {challenge.url} ({kind})")
        client.answer(challenge)
        pause = POLL_SECONDS[0]
        while (found := client.authorization(found.url, task.names)).status == "pending":
            if client.world.monotonic() > task.until:
                raise NetworkError(f"{found.url}: the CA left it pending until the deadline")
            client.world.sleep(pause)
            pause = min(pause * 2, POLL_SECONDS[1])
        if found.status != "valid":
            raise client.complaint(order, task.names)
        verdict = "done"
    finally:
        undo_all(journal, task, verdict)


def prove_in_turn(client: Client, order: Order, task: Task) -> None:
    """Prove the names of an order one after another, each by the first challenge that is not declined."""
    for url in order.authorizations if order.status == "pending" else ():
        found, declined = client.authorization(url, task.names), ["no challenge was taken up"]
        for one in found.challenges if found.status == "pending" else ():
            try:
                prove_name(client, order, found, one.kind, task)
                break
            except ChallengeError as error:
                if not error.spent:
                    raise
                log(str(error))
                declined.append(str(error))
        else:
            if found.status != "valid":
                raise ChallengeError(f"{found.name}: {'; '.join(declined)}")


def uacme_obtain(call: Call, entry: Entry, opened: Opened) -> None:
    """Obtain a certificate and make it live, in uacme's order of things."""
    run, world, client = call.settings.run, call.clients.world, opened.client
    task = Task(entry.wanted.names, entry.wanted, (), world.monotonic() + run.deadline, Answers(call.top), world,
                threading.Event())
    try:
        order = start_order(opened, entry, task.names)
        prove_in_turn(client, order, task)
        entry = remember(run.directory, entry, order=order.url, order_server=client.url)
        obtained = obtain(entry, opened, task, run)
        store(obtained, run, str(int(world.now())), world.now(), uacme_switch)
    finally:
        for path in entry.files:
            remove(f"{path}_tmp")


def uacme_issue(call: Call) -> int:
    """Issue a certificate if that is due, else 1; for check: 0 if it is due, else 1."""
    opened = open_account(call)
    entry, now = uacme_entry(call, opened.client.url), call.clients.world.now()
    log(f"checking existence and expiration of {entry.chain}")
    entry = entry if "i" in call.given else uacme_advised(entry, opened.client, call.settings.run, now)
    decision = decide(entry, now, forced="f" in call.given)
    log(dates(decision, now))
    if entry.blocked:
        raise FileError(entry.fault)
    log(f"{entry.title}: {f'due: {decision.reason}' if decision.due else 'not due'}")
    if decision.due and call.verb == "issue":
        uacme_obtain(call, entry, found_account(opened))
    return 0 if decision.due else 1


UACME_VERBS: dict[str, tuple[Callable[[Call], int | None], int, int]] = {       # with how many arguments each takes
    "new": (uacme_new, 0, 1), "update": (uacme_change, 0, 1), "deactivate": (uacme_change, 0, 0),
    "newkey": (uacme_newkey, 0, 0), "issue": (uacme_issue, 1, 100), "check": (uacme_issue, 1, 100),
    "revoke": (uacme_revoke, 1, 2)}


def in_flat(call: Call) -> int:
    """Do what uacme is asked for in a directory of wucme's own, by the verbs of that; nothing is loaded."""
    settings, clients, world = call.settings, call.clients, call.clients.world
    open_log(settings.run)
    if call.verb == "revoke":
        reason = next((name for name, code in REASONS.items() if code == int(call.given.get("r", "0"))), "")
        return revoke(settings, Request("revoke", tuple(call.words[:1]), reason=reason), world).status
    if call.verb not in ("issue", "check"):
        return account_verb(settings, Request("account", (call.verb,)), world).status
    by_request = os.path.isfile(call.words[0])
    settings, label = declare(settings, () if by_request else call.words, {"csr": call.words[0]} if by_request else {})
    with locked(settings.run, world):
        now, inventory = world.now(), take_stock(settings)
        found, forced = choose(inventory, [label])[0], "f" in call.given
        told = ask_windows([decide(found, now, True, forced)], settings, clients, now)
        decision = decide(told.get(found.name, found), now, True, forced)
        if found.blocked:
            raise FileError(found.fault)
        if call.verb == "check":
            return 0 if decision.due else 1
        clean_up(inventory, settings, world)
        (_, outcome), = tend([decision], settings, clients, now)
    return {"renewed": 0, "current": 1}.get(outcome.state, 2)


def uacme(argv: Sequence[str], world: World) -> int:
    """wucme.py --uacme: 0 done, 1 nothing to do, 2 failed or a usage error; for check 0 is due, 1 is not."""
    log.clock = world.now
    try:
        call = understand_call(argv, world._replace(command=functools.partial(overheard, world.command)))
        directory = call.top or call.settings.run.directory
        if fault := anyone_may_write(os.path.abspath(__file__)) or anyone_may_write(directory):
            raise SettingsError(fault)
        with contextlib.closing(call.clients):
            status = (UACME_VERBS[call.verb][0] if call.top else in_flat)(call) or 0
    except (WucmeError, OSError) as error:
        log(f"failed: {sentence(error)}", wrong=True)
        status = 2
    log.flush()
    return status


# === 16. command line: what was asked for, and how it ends =====================================

VERBS = {"run": run_once, "issue": issue, "renew": run_once, "load": rehearse, "status": None, "check": None,
         "revoke": revoke, "account": account_verb, "thumbprint": show_thumbprint, "timer": None}
FLAGS = ("force", "dry_run", "staging", "quiet", "verbose", "json", "install", "version", "help")
ONLY_WITH = {"force": ("issue", "renew"), "install": ("timer",), "csr": ("issue",), "reason": ("revoke",),
             "json": ("status",), "dry_run": ("run", "issue", "renew", "load", "timer")}


def version() -> str:
    """Version and SHA-256 of this very file, to compare with a release."""
    import hashlib
    return f"wucme {VERSION} sha256 {hashlib.sha256(read(os.path.abspath(__file__))).hexdigest()}"


def manual() -> str:
    """The text of --help."""
    return (__doc__ or "").replace("@SETTINGS@", settings_help()).replace("@SERVERS@", ", ".join(STANDARD))


def known_options() -> dict[str, tuple[str, str]]:
    """Every option: the flag or setting that it is of, and what it says of that, "" for what stands behind it."""
    found = {name: (name, "") for name in ("ini", "reason", "csr")}
    found |= {flag.replace("_", "-"): (flag, "yes") for flag in FLAGS}
    for key, field in SETTINGS.items():
        option = key.replace("_", "-")
        if field.kind is a_flag:
            found |= {option: (key, "yes"), f"no-{option}": (key, "no")}
        elif not field.local and field.kind is not Secret:
            found[option] = key, ""
    return found


def take_apart(argv: Sequence[str], known: Mapping[str, tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The options of a command line with their values, and its words; SettingsError for what is no option.

    For so many options argparse would take longer than an idle run does for all its work.
    """
    import getopt
    forms = [f"{name}{'' if said else '='}" for name, (_, said) in known.items()]
    end = argv.index("--") if "--" in argv else len(argv)
    for word in argv[:end]:
        option = word.partition("=")[0]
        if option[:2] == "--" and option[2:] not in known:      # getopt would take a part of one for it
            near = nearest(option, [f"--{name}" for name in known])
            raise SettingsError(f"{printable(option)}: no such option{near} (see --help)")
    pairs, words, rest = [], [], list(argv[:end])
    try:
        while rest:             # gnu_getopt would heed POSIXLY_CORRECT, and take options behind a word for words
            found, rest = getopt.getopt(rest, "", forms)
            pairs += found
            words += rest[:1]
            rest = rest[1:]
    except getopt.GetoptError as error:
        raise SettingsError(f"{printable(str(error))} (see --help)") from error
    return pairs, [*words, *argv[end + 1:]]


def read_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line, and what its options say, by flag or setting as an ini has it; SettingsError."""
    known = known_options()
    pairs, words = take_apart(argv, known)
    given: dict[str, str] = {}
    for option, value in pairs:
        key, said = known[option[2:]]
        if value[:2] == "--":
            raise SettingsError(f"{option} needs a value, and {value} is an option (see --help)")
        several = key in given and key in SETTINGS and SETTINGS[key].kind is some_lines
        given[key] = f"{given[key]}\n{value}" if several else said or value
    return words, given


def staging(settings: Settings) -> Settings:
    """The same settings for trying out: the staging CA, a directory of its own, no loads."""
    tame: Json = {"server": ("letsencrypt-staging",), "load": ()}
    return settings._replace(
        run=settings.run._replace(directory=os.path.join(settings.run.directory, "staging"), alert=(), metrics=""),
        default=settings.default._replace(**tame), lists={},
        sections={label: one._replace(values=one.values._replace(**tame)) for label, one in settings.sections.items()})


def act(settings: Settings, request: Request, world: World) -> int:
    """Do what the verb says; the exit status."""
    if request.verb == "timer":
        print("\n".join(timer(settings, request._replace(install=request.install and not request.dry_run), world)))
        return 0
    if request.dry_run:
        if request.verb == "issue":
            settings, label = declare(settings, request.names, request.options)
            request = request._replace(names=(label,))
        print("\n".join(foretell(settings, request, world)))
        return 0
    if request.verb == "status":
        found = standing(settings, world)
        print(json.dumps(found.about, indent=1) if request.json else "\n".join(found.lines))
        return found.status
    if request.verb == "check":
        status = 0
        for one in diagnose(settings, request, world):
            if one.level == PROBLEM:
                status = 1
            if one.level == PROBLEM or not log.quiet:
                print(f"{one.level:8}{printable(f'{one.about}: {one.text}')}", flush=True)
        return status
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


def check_words(verb: str, names: Sequence[str], given: Mapping[str, str]) -> None:
    """Refuse (SettingsError) verbs that there are not, and names and options that do not go with this one."""
    if verb not in VERBS:
        raise SettingsError(f"{printable(verb)}: no such command{nearest(verb, VERBS)} (there are {', '.join(VERBS)})")
    if names and verb in ("run", "status", "thumbprint"):
        raise SettingsError(f"{verb} takes no names; for one certificate: renew {names[0]}")
    for option, verbs in ONLY_WITH.items():
        if option in given and verb not in verbs:
            raise SettingsError(f"--{option.replace('_', '-')} goes with {' and '.join(verbs)}, not with {verb}")


def understand(words: Sequence[str], given: Mapping[str, str]) -> tuple[Settings, Request]:
    """What the command line and the ini ask for; SettingsError where they ask for what cannot be."""
    verb, *names = words or ["run"]
    check_words(verb, names, given)
    # Trying out is for one CA and loads nothing, whatever other options say.
    options = {key: text for key, text in given.items()
               if key in SETTINGS and not ("staging" in given and key in ("server", "load"))}
    named = a_path(given.get("ini") or os.environ.get("WUCME_INI", ""))
    fresh = verb == "issue" and named and not os.path.exists(named)
    common = {key: text for key, text in options.items()
              if verb != "issue" or key not in CertificateScope._field_defaults}
    settings = read_settings(read_source("" if fresh else find_ini(named)), common)
    script = os.path.abspath(__file__)
    for path in (script, compiled(script), settings.run.directory):
        if fault := anyone_may_write(path):
            raise SettingsError(fault)
    request = Request(verb, tuple(names), options=options, ini=named, reason=given.get("reason") or "unspecified",
                      **pick(Request, {flag: flag in given for flag in FLAGS}))
    return staging(settings) if request.staging else settings, request


def main(argv: Sequence[str] | None = None, world: World = REAL) -> int:
    """The program: 0 all is well, 1 something failed or is owed, 2 usage or settings."""
    secure_streams()
    if "GATEWAY_INTERFACE" in os.environ:       # called by a web server: answers the CA, and does nothing else
        os.write(1, respond(os.environ))
        return 0
    gc.set_threshold(100_000)       # what is made by the thousand lives to the end
    umask = os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ending)
    world = world._replace(command=functools.partial(world.command, umask=umask))
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["--uacme"]:
            need_cryptography()
            return uacme(argv[1:], world)
        words, given = read_arguments(argv)
        if "help" in given or "version" in given:
            print(manual() if "help" in given else version())
            return 0
        need_cryptography()
        log.clock, log.loud, log.quiet = world.now, int("verbose" in given), "quiet" in given
        log.live = not log.quiet and (log.loud > 0 or sys.stderr.isatty())
        settings, request = understand(words, given)
        return act(settings, request, world)
    except SystemExit as error:
        ending.kill()
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


def leave(status: int) -> NoReturn:
    """End with this status, and leave it to the kernel to take down what is left."""
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 1
    os._exit(status)            # Python's own way takes as long as a look at a hundred certificates


if __name__ == "__main__":
    leave(main())
