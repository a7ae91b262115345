"""A strict ACME CA (RFC 8555, 8738, 9773) for tests: on loopback, and wicked on request."""
from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import re
import secrets
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Json = dict[str, Any]
PublicKey = Union[ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey]
PrivateKey = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey]
ERROR = "urn:ietf:params:acme:error:"
CURVES: Mapping[str, tuple[ec.EllipticCurve, str, hashes.HashAlgorithm]] = {
    "P-256": (ec.SECP256R1(), "ES256", hashes.SHA256()),
    "P-384": (ec.SECP384R1(), "ES384", hashes.SHA384()),
}
Dates = tuple[datetime, datetime]
FOREVER = datetime(2000, 1, 1, tzinfo=timezone.utc), datetime(2099, 12, 31, tzinfo=timezone.utc)
HTML = b"<!DOCTYPE html><html><body><h1>It works!</h1></body></html>\n"
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


# === Keys and certificates ===


def make_key(kind: str = "ecdsa-p256") -> PrivateKey:
    """Make a key: ecdsa-p256, ecdsa-p384, rsa-BITS or ed25519."""
    family, _, size = kind.partition("-")
    if family == "ecdsa":
        return ec.generate_private_key(CURVES[size.upper().replace("P", "P-")][0])
    if family == "rsa":
        return rsa.generate_private_key(65537, int(size))
    return ed25519.Ed25519PrivateKey.generate()


def key_pem(key: PrivateKey) -> bytes:
    """Write a key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def public_der(key: Any) -> bytes:
    """Write a public key as DER, by which keys are compared."""
    return bytes(key.public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def identifier(name: str) -> Json:
    """Make the ACME identifier of a DNS name or an address."""
    try:
        return {"type": "ip", "value": str(ipaddress.ip_address(name))}
    except ValueError:
        return {"type": "dns", "value": name}


def subject_names(names: list[str]) -> x509.SubjectAlternativeName:
    """Make the SAN of DNS names and addresses."""
    is_ip = {name: identifier(name)["type"] == "ip" for name in names}
    return x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address(name)) if is_ip[name] else x509.DNSName(name) for name in names]
    )


def names_of(thing: x509.Certificate | x509.CertificateSigningRequest) -> list[str]:
    """List the names in a SAN, sorted."""
    san = thing.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in san.get_values_for_type(x509.IPAddress)]
    return sorted(san.get_values_for_type(x509.DNSName) + addresses)


def utc(moment: datetime) -> datetime:
    """Move to UTC and drop the zone, as certificate builders of all versions want it."""
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment.tzinfo else moment


def certify(
    issuer: str, subject: str, key: PublicKey, signer: PrivateKey, dates: Dates, is_ca: bool,
    *more: x509.ExtensionType,
) -> x509.Certificate:
    """Sign a certificate; no date is refused, not even a foolish one."""
    by, of = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]) for name in (issuer, subject))
    builder = x509.CertificateBuilder(
        issuer_name=by, subject_name=of, public_key=key, serial_number=x509.random_serial_number(),
        not_valid_before=utc(dates[0]), not_valid_after=utc(dates[1]),
    )
    usage = x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False)
    builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True).add_extension(usage, True)
    for extension in (x509.SubjectKeyIdentifier.from_public_key(key), *more):
        builder = builder.add_extension(extension, False)
    return builder.sign(signer, hashes.SHA256())


class Authority:
    """A root, an intermediate, and the certificates that it issues; lives maps their ids to their dates."""

    def __init__(self, name: str = "Fake") -> None:
        """Make the two keys and certificates, P-256."""
        root, self.name, top, self.key = f"{name} Root", f"{name} Intermediate", make_key(), make_key()
        self.aki, aki = map(x509.AuthorityKeyIdentifier.from_issuer_public_key,
                            (self.key.public_key(), top.public_key()))
        self.root = certify(root, root, top.public_key(), top, FOREVER, True).public_bytes(PEM)
        middle = certify(root, self.name, self.key.public_key(), top, FOREVER, True, aki)
        self.intermediate = middle.public_bytes(PEM)
        self.lives: dict[str, Dates] = {}

    def cert_id(self, serial: int) -> str:
        """Name one of its certificates as RFC 9773 does."""
        octets = serial.to_bytes(serial.bit_length() // 8 + 1, "big")
        return f"{b64(self.aki.key_identifier or b'')}.{b64(octets)}"

    def issue(
        self, public_key: PublicKey, names: list[str], days: float = 90,
        not_before: datetime | None = None, *, not_after: datetime | None = None,
        is_ca: bool = False, san: bool = True, aki: bool = True,
    ) -> list[bytes]:
        """Issue a certificate: leaf and intermediate, PEM."""
        start = not_before or datetime.now(timezone.utc) - timedelta(hours=1)
        dates = start, not_after or start + timedelta(days=days)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        more = [usage] + [subject_names(names)] * san + [self.aki] * aki
        leaf = certify(self.name, names[0], public_key, self.key, dates, is_ca, *more)
        self.lives[self.cert_id(leaf.serial_number)] = dates
        return [leaf.public_bytes(PEM), self.intermediate]


def make_pair(
    directory: Path, stem: str, names: list[str], not_before: datetime, not_after: datetime,
    key: PrivateKey | None = None, suffix_upper: bool = False, authority: Authority | None = None,
) -> tuple[Path, Path]:
    """Write wucme_c_STEM.pem (leaf and intermediate) and wucme_k_STEM.pem, and give both paths."""
    key, suffix, issuer = key or make_key(), ".PEM" if suffix_upper else ".pem", authority or Authority()
    paths = directory / f"wucme_c_{stem}{suffix}", directory / f"wucme_k_{stem}{suffix}"
    chain = issuer.issue(key.public_key(), names, not_before=not_before, not_after=not_after)
    paths[0].write_bytes(b"".join(chain))
    paths[1].touch(0o600)
    paths[1].write_bytes(key_pem(key))
    return paths


# === Messages and JSON Web Signatures ===


@dataclass
class Reply:
    """An answer: the body is JSON, bytes, or parts without end; status 0 is silence."""

    status: int
    body: Json | bytes | Iterator[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"


class Refusal(Exception):
    """A problem document as the answer."""

    def __init__(self, status: int, kind: str, detail: str, *, headers: Json | None = None, **more: Any):
        """Hold the HTTP status, the ACME error type, the detail, headers and further members."""
        document = {"type": ERROR + kind, "detail": detail, "status": status, **more}
        self.reply = Reply(status, document, headers or {}, "application/problem+json")


@dataclass(eq=False)
class Account:
    """An account and its key."""

    url: str
    jwk: Json
    key: PublicKey | None = None
    contact: list[str] = field(default_factory=list)
    status: str = "valid"


NOBODY = Account("", {})


@dataclass
class Request:
    """A request to a place, and the object there; payload is "" for POST-as-GET, None for GET."""

    method: str
    path: str
    headers: Message
    body: bytes
    place: str = ""
    ident: str = ""
    payload: Any = None
    account: Account = NOBODY
    jwk: Json = field(default_factory=dict)


@dataclass(eq=False)
class Authz:
    """An authorization."""

    url: str
    account: Account
    identifier: Json
    wildcard: bool
    token: str
    status: str = "pending"
    tried: str = ""
    problem: Json | None = None


@dataclass(eq=False)
class Order:
    """An order; state is empty until finalize."""

    url: str
    account: Account
    names: list[str]
    authzs: list[Authz]
    extra: Json
    state: str = ""
    polls: int = 0
    key: Any = None
    chain: list[bytes] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Tell the status, which depends on the authorizations."""
        states = {authz.status for authz in self.authzs}
        if self.state or states == {"valid"}:
            return "processing" if self.polls else self.state or "ready"
        return "pending" if states <= {"valid", "pending"} else "invalid"


def b64(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: Any) -> bytes:
    """Decode base64url, with neither padding nor foreign letters."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (TypeError, ValueError):
        data = b""
    if b64(data) != text:
        raise Refusal(400, "malformed", "this is not base64url")
    return data


def stamp(moment: datetime) -> str:
    """Write a moment as RFC 3339 has it."""
    return utc(moment).strftime("%Y-%m-%dT%H:%M:%SZ")


class Jws(NamedTuple):
    """A flattened JWS, taken apart; payload is "" where it is empty."""

    header: Json
    payload: Any
    signature: bytes
    signed: bytes


def open_jws(body: Any) -> Jws:
    """Take a flattened JWS apart, or refuse."""
    try:
        jws = json.loads(body) if isinstance(body, bytes) else body
        if set(jws) != {"protected", "payload", "signature"}:
            raise Refusal(400, "malformed", "a flattened JWS has three members")
        header, text = json.loads(unb64(jws["protected"])), unb64(jws["payload"])
        payload = json.loads(text) if text else ""
    except (ValueError, TypeError) as error:
        raise Refusal(400, "malformed", f"this is no JWS: {error}") from error
    if not isinstance(header, dict) or (not isinstance(payload, dict) and payload != ""):
        raise Refusal(400, "malformed", "header and payload have to be objects")
    return Jws(header, payload, unb64(jws["signature"]), f"{jws['protected']}.{jws['payload']}".encode())


def load_jwk(jwk: Any) -> PublicKey:
    """Make the public key of a JWK: P-256, P-384 or RSA, in its one lawful form."""
    try:
        if set(jwk) == {"crv", "kty", "x", "y"} and jwk["kty"] == "EC":
            curve, x, y = CURVES[jwk["crv"]][0], unb64(jwk["x"]), unb64(jwk["y"])
            if len(x) == len(y) == curve.key_size // 8:
                return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\4" + x + y)
        if set(jwk) == {"e", "kty", "n"} and jwk["kty"] == "RSA":
            e, n = unb64(jwk["e"]), unb64(jwk["n"])
            if e[0] and n[0] and len(n) in (256, 384, 512):
                return rsa.RSAPublicNumbers(int.from_bytes(e, "big"), int.from_bytes(n, "big")).public_key()
    except (ValueError, TypeError, LookupError) as error:
        raise Refusal(400, "badPublicKey", f"this is no key: {error}") from error
    raise Refusal(400, "badPublicKey", "this key is not accepted here")


def thumbprint(jwk: Json) -> str:
    """Compute the thumbprint of RFC 7638."""
    return b64(hashlib.sha256(json.dumps(jwk, sort_keys=True, separators=(",", ":")).encode()).digest())


def account_digest(domain: str, thumb: str, url: str) -> str:
    """Compute how dns-persist-01 names an account from its draft -02 on."""
    return b64(hashlib.sha256(bytes([len(domain)]) + f"{domain}{thumb}{url}".encode()).digest())


def check_signature(jws: Jws, key: Any) -> None:
    """Refuse a JWS that this key has not signed."""
    curve, alg, digest = CURVES.get(f"P-{key.key_size}", (None, "RS256", hashes.SHA256()))
    if jws.header.get("alg") != alg:
        algorithms = ["ES256", "ES384", "RS256"]
        raise Refusal(400, "badSignatureAlgorithm", "the alg does not fit the key", algorithms=algorithms)
    size = len(jws.signature) // 2
    r, s = (int.from_bytes(half, "big") for half in (jws.signature[:size], jws.signature[size:]))
    try:
        if not curve:
            key.verify(jws.signature, jws.signed, padding.PKCS1v15(), digest)
        elif len(jws.signature) == curve.key_size // 4:
            key.verify(encode_dss_signature(r, s), jws.signed, ec.ECDSA(digest))
        else:
            raise InvalidSignature
    except InvalidSignature as error:
        raise Refusal(400, "malformed", "the signature of the JWS is wrong") from error


# === The server ===


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Answer one request of any method."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1 << 20))
        scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
        request = Request(self.command, self.path, self.headers, body)
        self.send(self.server.ca.handle(request, f"{scheme}://{self.headers.get('Host')}"))

    do_HEAD = do_POST = do_GET

    def send(self, reply: Reply) -> None:
        """Send an answer, or hold one's peace until the end."""
        if not reply.status:
            self.close_connection = self.server.ca.stopping.wait()
            return
        body = json.dumps(reply.body).encode() if isinstance(reply.body, dict) else reply.body
        parts = [body] if isinstance(body, bytes) else body
        length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {"Connection": "close"}
        self.send_response(reply.status)
        for name, value in {"Content-Type": reply.kind, **length, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts if self.command != "HEAD" else []:
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr clean."""


class Server(ThreadingHTTPServer):
    """The listener, that speaks TLS, and plain HTTP to clients led astray."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ca: FakeCA) -> None:
        """Bind a free port."""
        self.ca = ca
        super().__init__(("127.0.0.1", 0), Handler)

    def server_bind(self) -> None:
        """Bind without a look at the DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Count a connection, and keep its socket to close it at the end."""
        connection, peer = super().get_request()
        self.ca.connections += 1
        self.ca.sockets.add(connection)
        return connection, peer

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        mine = [request]
        try:
            if request.recv(1, socket.MSG_PEEK) == b"\x16":
                request = self.ca.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                mine.append(request)
                self.ca.sockets.add(request)
            Handler(request, client_address, self)
        finally:
            request.close()
            self.ca.sockets.difference_update(mine)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep stderr clean, but not what is an error of this CA."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            self.ca.faults.append(error)


class FakeCA:
    """The CA, as a context manager: attributes may be read, and the first group of them set, at any time."""

    def __init__(
        self, directory: Path, http_port: int = 80, *, eab: Mapping[str, str] | None = None,
        profiles: Mapping[str, str] | None = None, authority: Authority | None = None,
        server_names: tuple[str, ...] = ("localhost", "127.0.0.1"), server_dates: Dates = FOREVER,
    ) -> None:
        """Bind a port; eab maps key ids to base64url MAC keys, profiles names to descriptions."""
        self.http_port, self.http_host = http_port, "127.0.0.1"
        self.http_prefix = "/.well-known/acme-challenge/"
        self.eab, self.profiles = dict(eab or {}), dict(profiles or {})
        self.authority = authority or Authority()
        self.always_valid, self.reuse_authorizations, self.failing_names = False, False, set[str]()
        self.validate: Callable[[str, str, str], bool | Json] = self.fetch
        self.clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
        self.days, self.processing_polls, self.poll_after, self.retry_after = 90.0, 0, "", "1"
        self.offered: set[str] | None = None    # challenge types; None for all
        self.draft, self.records = 1, cast(Callable[[str], list[str]], lambda name: [])  # of dns-persist-01, and TXT
        self.window: Dates | None = None
        self.window_after = "21600"
        self.requests: list[tuple[str, str, Any]] = []
        self.issued, self.revoked, self.strangers = list[x509.Certificate](), list[int](), list[str]()
        self.connections, self.faults = 0, list[BaseException]()
        self.accounts, self.orders, self.authzs = dict[str, Account](), dict[str, Order](), dict[str, Authz]()
        self.modes: dict[str, tuple[str, float]] = {}
        self.nonces, self.count, self.lock = set[str](), itertools.count(1), threading.RLock()
        self.stopping, self.sockets = threading.Event(), set[socket.socket]()
        self.ca_file, self.tls = directory / "fakeca.pem", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_tls(directory / "fakeca_server.pem", list(server_names), server_dates)
        self.server = Server(self)
        self.base = f"https://localhost:{self.server.server_port}"
        self.stranger = f"https://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.base}/directory"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def load_tls(self, path: Path, names: list[str], dates: Dates) -> None:
        """Make the TLS certificate, from a little CA of its own."""
        web, key = Authority("Web"), make_key()
        chain = web.issue(key.public_key(), names, not_before=dates[0], not_after=dates[1])
        self.ca_file.write_bytes(web.root)
        path.write_bytes(key_pem(key) + b"".join(chain))
        self.tls.load_cert_chain(path)

    def __enter__(self) -> FakeCA:
        """Serve."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop at once, whoever is connected."""
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        deadline = time.monotonic() + 1
        while self.sockets and time.monotonic() < deadline:
            for connection in list(self.sockets):
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
            time.sleep(0.002)

    def misbehave(self, *modes: str, times: float = float("inf")) -> None:
        """Behave like this from now on: NAME or NAME@PLACE, e.g. silent@finalize; without any: well."""
        parts = [mode.partition("@") for mode in modes]
        if unknown := {name for name, _, _ in parts} - MODES:
            raise KeyError(f"no such misbehaviour: {sorted(unknown)}")
        self.modes = {name: (place, 1 if name in ONCE else times) for name, _, place in parts}

    def active(self, request: Request, table: Mapping[str, tuple[Any, ...]]) -> Iterator[Any]:
        """Give the misbehaviours of a table that strike at this request."""
        for name in self.modes.keys() & table.keys():
            place, left = self.modes[name]
            places, *deed = table[name]
            if left > 0 and {"*", request.place, request.method} & set((place or places).split()):
                self.modes[name] = place, left - 1
                yield deed

    def handle(self, request: Request, origin: str) -> Reply:
        """Answer a request, and note it."""
        request.place, _, request.ident = request.path.partition("?")[0][1:].partition("/")
        with self.lock:
            self.strangers += [origin + request.path] * (origin != self.base)
            try:
                reply = self.dispatch(request)
                for (change,) in self.active(request, AFTER) if reply.status < 300 else ():
                    reply.body = change(self, request, reply.body)
            except Refusal as refusal:
                reply = refusal.reply
            finally:
                self.requests.append((request.method, request.path, request.payload))
            self.finish_headers(request, reply)
            return reply

    def finish_headers(self, request: Request, reply: Reply) -> None:
        """Add the headers that every answer carries."""
        self.nonces.add(nonce := secrets.token_urlsafe(16))
        links = [f'<{self.url}>;rel="index"', reply.headers.get("Link")]
        reply.headers.update({"Replay-Nonce": nonce, "Link": ", ".join(filter(None, links))})
        reply.headers.update({"Retry-After": self.retry_after} if reply.status in (429, 503) else {})
        for name, value in self.active(request, HEADERS):
            reply.headers[name] = value
        reply.headers = {name: value for name, value in reply.headers.items() if value}

    def dispatch(self, request: Request) -> Reply:
        """Check a request, and lead it to its place."""
        reading = request.place in ("directory", "new-nonce", "renewal-info")
        if request.place not in ROUTES:
            raise Refusal(404, "malformed", "there is nothing here")
        if not request.headers.get("User-Agent"):
            raise Refusal(400, "malformed", "a User-Agent is required")
        if (request.method == "POST") == reading:
            raise Refusal(405, "malformed", f"{request.method} is not allowed here")
        if not reading:
            self.verify(request)
        for (instead,) in self.active(request, BEFORE):
            return cast(Reply, instead(self, request))
        return ROUTES[request.place](self, request)

    def verify(self, request: Request) -> None:
        """Check the JWS of a request, and find its account."""
        if request.headers.get("Content-Type") != "application/jose+json":
            raise Refusal(415, "malformed", "the content type has to be application/jose+json")
        jws = open_jws(request.body)
        request.payload = jws.payload
        if jws.header.get("url") != self.base + request.path:
            raise Refusal(401, "unauthorized", "the url of the JWS is not the one asked")
        by_key = request.place == "new-account" or (request.place == "revoke-cert" and "jwk" in jws.header)
        if set(jws.header) != {"alg", "nonce", "url", "jwk" if by_key else "kid"}:
            raise Refusal(400, "malformed", f"the protected header has {sorted(jws.header)}")
        if jws.header["nonce"] not in self.nonces:
            raise Refusal(400, "badNonce", "this nonce is not known, or used")
        self.nonces.remove(jws.header["nonce"])
        if by_key:
            request.jwk = jws.header["jwk"]
            check_signature(jws, load_jwk(request.jwk))
            return
        if jws.header["kid"] not in self.accounts:
            raise Refusal(400, "accountDoesNotExist", "this account is not known")
        request.account = self.accounts[jws.header["kid"]]
        check_signature(jws, request.account.key)
        if request.account.status != "valid":
            raise Refusal(401, "unauthorized", f"this account is {request.account.status}")

    # --- directory, nonces, accounts ---

    def directory(self, request: Request) -> Reply:
        """Answer the directory."""
        words = {"newNonce": "new-nonce", "newAccount": "new-account", "newOrder": "new-order",
                 "revokeCert": "revoke-cert", "keyChange": "key-change", "renewalInfo": "renewal-info"}
        meta: Json = {"termsOfService": f"{self.base}/terms", "caaIdentities": ["fakeca.example"],
                      "website": self.base, "externalAccountRequired": bool(self.eab)}
        meta.update({"profiles": self.profiles} if self.profiles else {})
        hashed = {"issuerDomainNames": ["fakeca.example"], "accountHashPrefix": f"{self.base}/account-hash/"}
        meta.update(hashed if self.draft == 2 else {})
        return Reply(200, {**{word: f"{self.base}/{path}" for word, path in words.items()}, "meta": meta})

    def new_nonce(self, request: Request) -> Reply:
        """Answer nothing but the nonce."""
        return Reply(200 if request.method == "HEAD" else 204, b"", {"Cache-Control": "no-store"})

    def show_account(self, account: Account, status: int = 200) -> Reply:
        """Answer an account."""
        body = {"status": account.status, "contact": account.contact, "termsOfServiceAgreed": True}
        return Reply(status, body, {"Location": account.url})

    def owner(self, jwk: Json) -> Account | None:
        """Find the account of a key."""
        return next((account for account in self.accounts.values() if account.jwk == jwk), None)

    def new_account(self, request: Request) -> Reply:
        """Register an account, or find it again."""
        account, asked = self.owner(request.jwk), request.payload or {}
        if account and account.status != "valid":
            raise Refusal(401, "unauthorized", f"this account is {account.status}")
        if account:
            return self.show_account(account)
        if asked.get("onlyReturnExisting"):
            raise Refusal(400, "accountDoesNotExist", "no account has this key")
        if asked.get("termsOfServiceAgreed") is not True:
            raise self.terms()
        if self.eab:
            self.check_eab(asked.get("externalAccountBinding"), request.jwk)
        account = Account(f"{self.base}/account/{next(self.count)}", request.jwk, load_jwk(request.jwk))
        self.set_contact(account, asked)
        self.accounts[account.url] = account
        return self.show_account(account, 201)

    def terms(self) -> Refusal:
        """Make the refusal for want of an agreement."""
        link, page = f'<{self.base}/terms>;rel="terms-of-service"', f"{self.base}/agree"
        return Refusal(403, "userActionRequired", "agree to the terms", headers={"Link": link}, instance=page)

    def set_contact(self, account: Account, asked: Json) -> None:
        """Take the contacts over, unless one is no mail address."""
        for address in asked.get("contact", []):
            scheme, _, rest = address.partition(":")
            if scheme != "mailto":
                raise Refusal(400, "unsupportedContact", f"{address} is no mailto: address")
            if "@" not in rest or set(",?") & set(rest):
                raise Refusal(400, "invalidContact", f"{address} is not one mail address")
        account.contact = asked.get("contact", account.contact)

    def check_eab(self, binding: Any, jwk: Json) -> None:
        """Refuse a new account that is not bound to a known external one."""
        if not binding:
            raise Refusal(403, "externalAccountRequired", "an external account binding is required")
        jws = open_jws(binding)
        alg, kid = jws.header.get("alg"), jws.header.get("kid")
        if jws.header != {"alg": alg, "kid": kid, "url": f"{self.base}/new-account"} or jws.payload != jwk:
            raise Refusal(400, "malformed", "the external account binding is not as it should be")
        if alg not in ("HS256", "HS384", "HS512") or kid not in self.eab:
            raise Refusal(403, "unauthorized", "this external account is not known")
        if hmac.new(unb64(self.eab[kid]), jws.signed, f"sha{alg[2:]}").digest() != jws.signature:
            raise Refusal(403, "unauthorized", "the MAC of the external account binding is wrong")

    def account(self, request: Request) -> Reply:
        """Show, change or deactivate an account."""
        account, asked = request.account, request.payload or {}
        if account.url != self.base + request.path:
            raise Refusal(403, "unauthorized", "this is the account of another")
        self.set_contact(account, asked)
        account.status = "deactivated" if asked.get("status") == "deactivated" else account.status
        return self.show_account(account)

    def key_change(self, request: Request) -> Reply:
        """Give an account another key."""
        inner, account = open_jws(request.payload), request.account
        if set(inner.header) != {"alg", "jwk", "url"} or inner.header["url"] != self.base + request.path:
            raise Refusal(400, "malformed", "the inner protected header is not as it should be")
        key = load_jwk(inner.header["jwk"])
        check_signature(inner, key)
        if inner.payload != {"account": account.url, "oldKey": account.jwk}:
            raise Refusal(400, "malformed", "the inner payload is not as it should be")
        if other := self.owner(inner.header["jwk"]):
            raise Refusal(409, "malformed", "this key has an account", headers={"Location": other.url})
        account.jwk, account.key = inner.header["jwk"], key
        return self.show_account(account)

    # --- orders ---

    def find(self, request: Request, things: Mapping[str, Any]) -> Any:
        """Find an order or authorization by its number, for its owner."""
        thing = things.get(request.ident.partition("/")[0])
        if not thing or thing.account is not request.account:
            raise Refusal(404, "malformed", "this account has nothing here")
        return thing

    def only_read(self, request: Request) -> None:
        """Refuse a payload."""
        if request.payload != "":
            raise Refusal(400, "malformed", "the payload of POST-as-GET has to be empty")

    def new_order(self, request: Request) -> Reply:
        """Make an order."""
        asked, number = request.payload or {}, str(next(self.count))
        names = self.check_names(asked.get("identifiers", []))
        if {"notBefore", "notAfter"} & set(asked):
            raise Refusal(400, "malformed", "notBefore and notAfter are not supported")
        if "profile" in asked and asked["profile"] not in self.profiles:
            raise Refusal(400, "invalidProfile", "there is no such profile")
        if "replaces" in asked and asked["replaces"] not in self.authority.lives:
            raise Refusal(404, "malformed", "the certificate to replace is not known")
        orders = [order for order in self.orders.values() if order.status != "invalid"]
        if "replaces" in asked and asked["replaces"] in [order.extra.get("replaces") for order in orders]:
            raise Refusal(409, "alreadyReplaced", "this certificate has an order that replaces it")
        extra = {word: asked[word] for word in ("profile", "replaces") if word in asked}
        authzs = [self.authorize(request.account, name) for name in names]
        order = Order(f"{self.base}/order/{number}", request.account, names, authzs, extra)
        self.orders[number] = order
        return Reply(201, self.show_order(order), {"Location": order.url})

    def check_names(self, identifiers: Any) -> list[str]:
        """Refuse names that are not in their one lawful form."""
        names = [entry["value"] for entry in identifiers]
        if not names or identifiers != [identifier(name) for name in names] or len(set(names)) < len(names):
            raise Refusal(400, "malformed", "the identifiers are not as they should be")
        for name in names:
            if not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]+", name):
                raise Refusal(400, "rejectedIdentifier", f"{name!r} is no name")
            if "*." + name.partition(".")[2] in set(names) - {name}:
                raise Refusal(400, "malformed", f"{name} is redundant beside a wildcard")
        return names

    def authorize(self, account: Account, name: str) -> Authz:
        """Make an authorization, or take a valid one again where that is wanted."""
        wildcard, number = name.startswith("*."), str(next(self.count))
        base = identifier(name[2:] if wildcard else name)
        for old in self.authzs.values() if self.reuse_authorizations else ():
            if (old.account, old.identifier, old.wildcard, old.status) == (account, base, wildcard, "valid"):
                return old
        url, token = f"{self.base}/authz/{number}", secrets.token_urlsafe(32)
        return self.authzs.setdefault(number, Authz(url, account, base, wildcard, token))

    def show_order(self, order: Order) -> Json:
        """Write an order."""
        number = order.url.rpartition("/")[2]
        body = {
            "status": order.status, "expires": stamp(self.clock() + timedelta(days=7)), **order.extra,
            "identifiers": [identifier(name) for name in order.names],
            "authorizations": [authz.url for authz in order.authzs],
            "finalize": f"{self.base}/finalize/{number}",
        }
        return {**body, "certificate": f"{self.base}/cert/{number}"} if order.status == "valid" else body

    def waiting(self, status: str) -> dict[str, str]:
        """Ask a client to wait, where that is wanted."""
        return {"Retry-After": self.poll_after if status in ("pending", "processing") else ""}

    def order(self, request: Request) -> Reply:
        """Show an order."""
        self.only_read(request)
        order: Order = self.find(request, self.orders)
        reply = Reply(200, self.show_order(order), self.waiting(order.status))
        order.polls = max(0, order.polls - 1)
        return reply

    def finalize(self, request: Request) -> Reply:
        """Issue the certificate of an order."""
        order: Order = self.find(request, self.orders)
        if order.status != "ready":
            raise Refusal(403, "orderNotReady", f"this order is {order.status}")
        order.key = self.check_csr(order, unb64((request.payload or {}).get("csr")))
        start = self.clock() - timedelta(hours=1)
        order.chain = self.authority.issue(order.key, order.names, self.days, start)
        self.issued.append(x509.load_pem_x509_certificate(order.chain[0]))
        order.state, order.polls = "valid", self.processing_polls
        return Reply(200, self.show_order(order), {"Location": order.url, **self.waiting(order.status)})

    def check_csr(self, order: Order, der: bytes) -> PublicKey:
        """Refuse a CSR that does not fit its order."""
        try:
            csr = x509.load_der_x509_csr(der)
            names, key = names_of(csr), csr.public_key()
        except (ValueError, x509.ExtensionNotFound) as error:
            raise Refusal(400, "badCSR", f"this is no CSR with names: {error}") from error
        common = {entry.value for entry in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)}
        if names != sorted(order.names) or not common <= set(names):
            raise Refusal(400, "badCSR", f"the names are {names}, not those of the order")
        if not csr.is_signature_valid or not isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)):
            raise Refusal(400, "badCSR", "the signature is wrong, or the key of a kind not accepted")
        if public_der(key) in [public_der(account.key) for account in self.accounts.values()]:
            raise Refusal(400, "badCSR", "this is an account key")
        return key

    def cert(self, request: Request) -> Reply:
        """Answer a chain."""
        self.only_read(request)
        order: Order = self.find(request, self.orders)
        if order.status != "valid":
            raise Refusal(404, "malformed", "there is no certificate yet")
        return Reply(200, b"".join(order.chain), kind="application/pem-certificate-chain")

    def revoke_cert(self, request: Request) -> Reply:
        """Revoke a certificate, for its owner or the holder of its key."""
        asked = request.payload or {}
        cert = x509.load_der_x509_certificate(unb64(asked.get("certificate")))
        if self.authority.cert_id(cert.serial_number) not in self.authority.lives:
            raise Refusal(404, "malformed", "this certificate is not known")
        chains = [order.chain for order in self.orders.values() if order.account is request.account]
        by_key = request.jwk and public_der(load_jwk(request.jwk)) == public_der(cert.public_key())
        if not by_key and [cert.public_bytes(PEM), self.authority.intermediate] not in chains:
            raise Refusal(403, "unauthorized", "this is the certificate of another")
        if asked.get("reason", 0) not in (0, 1, 3, 4, 5):
            raise Refusal(400, "badRevocationReason", "this reason is not accepted")
        if cert.serial_number in self.revoked:
            raise Refusal(400, "alreadyRevoked", "this certificate is revoked already")
        self.revoked.append(cert.serial_number)
        return Reply(200)

    def renewal_info(self, request: Request) -> Reply:
        """Advise when to renew: in the window that is set, else at two thirds of the lifetime."""
        if request.ident not in self.authority.lives:
            raise Refusal(404, "malformed", "this certificate is not known")
        start, end = self.authority.lives[request.ident]
        first, last = self.window or (end - (end - start) / 3, end - (end - start) / 4)
        window = {"start": stamp(first), "end": stamp(last)}
        return Reply(200, {"suggestedWindow": window}, {"Retry-After": self.window_after})

    # --- authorizations ---

    def challenges(self, authz: Authz) -> list[Json]:
        """Write the challenges: first two that clients may not know, one of them without a token."""
        kinds = ["unheard-of-01", "dns-persist-01"] + ["http-01", "tls-alpn-01"] * (not authz.wildcard)
        kinds += ["dns-01"] * (authz.identifier["type"] == "dns")
        kinds = [kind for kind in kinds if self.offered is None or kind in self.offered]
        persist: Json = {"issuerDomainNames" if self.draft == 2 else "issuer-domain-names": ["fakeca.example"]}
        persist.update({"accounturi": authz.account.url} if self.draft == 1 else {})
        url, entries = authz.url.replace("/authz/", "/challenge/"), []
        for kind in kinds:
            entry = {"type": kind, "url": f"{url}/{kind}", "status": "pending"}
            if kind == authz.tried:
                entry["status"] = authz.status if authz.status != "pending" else "processing"
            error = {"error": authz.problem} if kind == authz.tried and authz.problem else {}
            entries.append({**entry, **(persist if kind == "dns-persist-01" else {"token": authz.token}), **error})
        return entries

    def authz(self, request: Request) -> Reply:
        """Show or deactivate an authorization."""
        authz: Authz = self.find(request, self.authzs)
        if request.payload == {"status": "deactivated"}:
            authz.status = "deactivated"
        else:
            self.only_read(request)
        body: Json = {
            "identifier": authz.identifier, "status": authz.status, "challenges": self.challenges(authz),
            "expires": stamp(self.clock() + timedelta(days=7)),
        }
        body.update({"wildcard": True} if authz.wildcard else {})
        return Reply(200, body, self.waiting(authz.status))

    def challenge(self, request: Request) -> Reply:
        """Show a challenge, or begin to validate it."""
        authz: Authz = self.find(request, self.authzs)
        kind = request.ident.partition("/")[2]
        if request.payload not in ("", {}) or kind not in [entry["type"] for entry in self.challenges(authz)]:
            raise Refusal(400, "malformed", "a challenge that is here is answered by {}")
        if request.payload == {} and authz.status == "pending" and not authz.tried:
            authz.tried = kind
            threading.Thread(target=self.attempt, args=(authz,), daemon=True).start()
        entry = next(entry for entry in self.challenges(authz) if entry["type"] == kind)
        return Reply(200, entry, {"Link": f'<{authz.url}>;rel="up"'})

    def attempt(self, authz: Authz) -> None:
        """Validate a challenge, in a thread of its own."""
        name, answer = authz.identifier["value"], f"{authz.token}.{thumbprint(authz.account.jwk)}"
        verdict: bool | Json = name not in self.failing_names
        if authz.tried == "dns-persist-01":
            verdict = any(self.is_lasting(record, authz) for record in self.records(f"_validation-persist.{name}"))
        elif verdict and not self.always_valid:
            try:
                verdict = self.validate(name, authz.token, answer)
            except (OSError, ValueError, http.client.HTTPException) as error:
                verdict = {"type": f"{ERROR}connection", "detail": f"{name}: {error!r}", "status": 400}
        wrong = {"type": f"{ERROR}unauthorized", "detail": f"{name} did not show the answer", "status": 403}
        with self.lock:
            authz.status = "valid" if verdict is True else "invalid"
            authz.problem = None if verdict is True else verdict or wrong

    def is_lasting(self, record: str, authz: Authz) -> bool:
        """Tell whether a record of dns-persist-01 is for this CA, this account and this name."""
        issuer, *tags = (part.strip() for part in record.split(";"))
        said = dict(tag.split("=", 1) for tag in tags)
        uri = authz.account.url
        if self.draft == 2:
            digest = account_digest(authz.identifier["value"], thumbprint(authz.account.jwk), uri)
            uri = f"{self.base}/account-hash/sha-256/{digest}"
        policy = not authz.wildcard or said.get("policy") == "wildcard"
        return issuer == "fakeca.example" and said.get("accounturi") == uri and policy

    def fetch(self, name: str, token: str, answer: str) -> bool:
        """Fetch a key authorization over HTTP and compare it."""
        host = f"[{name}]" if ":" in name else name
        connection = http.client.HTTPConnection(self.http_host, self.http_port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", self.http_prefix + token, headers={"Host": host})
            found = connection.getresponse()
            return found.status == 200 and found.read(4096).rstrip() == answer.encode()


ROUTES: Mapping[str, Callable[[FakeCA, Request], Reply]] = {
    "directory": FakeCA.directory, "new-nonce": FakeCA.new_nonce, "renewal-info": FakeCA.renewal_info,
    "new-account": FakeCA.new_account, "account": FakeCA.account, "key-change": FakeCA.key_change,
    "new-order": FakeCA.new_order, "order": FakeCA.order, "finalize": FakeCA.finalize, "cert": FakeCA.cert,
    "revoke-cert": FakeCA.revoke_cert, "authz": FakeCA.authz, "challenge": FakeCA.challenge,
}


# === Misbehaviours ===


def problem(status: int, kind: str, detail: str, **more: Any) -> Reply:
    """Answer a problem document."""
    return Refusal(status, kind, detail, **more).reply


def redirect(place: str) -> Reply:
    """Send the client elsewhere."""
    return Reply(302, b"", {"Location": place})


def drip(ca: FakeCA) -> Iterator[bytes]:
    """Make a body of one byte a second."""
    while not ca.stopping.wait(1):
        yield b" "


def forget_account(ca: FakeCA, request: Request) -> Reply:
    """Lose the account that asks."""
    ca.accounts.pop(request.account.url, None)
    return problem(400, "accountDoesNotExist", "this account is not known")


def refuse_names(request: Request) -> Reply:
    """Refuse each name of an order by itself."""
    parts = [{"type": f"{ERROR}caa", "detail": f"CAA forbids {entry['value']}", "identifier": entry}
             for entry in request.payload["identifiers"]]
    return problem(403, "compound", "some names are refused", subproblems=parts)


def fail_order(ca: FakeCA, request: Request) -> Reply:
    """Turn an order invalid."""
    order: Order = ca.find(request, ca.orders)
    order.state = "invalid"
    order.extra["error"] = {"type": f"{ERROR}caa", "detail": "CAA forbids it", "status": 403}
    return Reply(200, ca.show_order(order))


def without(body: Json, member: str, **changes: Any) -> Json:
    """Take a member away, and change others."""
    return {name: value for name, value in {**body, **changes}.items() if name != member}


def swap(value: Any, old: str, new: str) -> Any:
    """Replace text everywhere in a JSON value."""
    return json.loads(json.dumps(value).replace(old, new))


def set_token(body: Json, token: Any) -> Json:
    """Give every challenge that has a token this one."""
    changed = [{**entry, "token": token} if "token" in entry else entry for entry in body["challenges"]]
    return {**body, "challenges": changed}


def reissue(ca: FakeCA, request: Request, **changes: Any) -> bytes:
    """Issue another certificate for an order."""
    order: Order = ca.find(request, ca.orders)
    right = {"public_key": order.key, "names": order.names, "days": ca.days, "not_before": ca.clock()}
    return b"".join(ca.authority.issue(**{**right, **changes}))


def names(ca: FakeCA, request: Request) -> list[str]:
    """List the names of an order."""
    return list(ca.find(request, ca.orders).names)


def pems(chain: bytes) -> list[bytes]:
    """Take a chain apart."""
    return re.findall(rb"-----BEGIN.*?-----END[^\n]*\n", chain, re.DOTALL)


OTHER = identifier("other.example")
SHOWN = "new-order order finalize"
BY_KID = "account new-order order authz challenge finalize cert"
ONCE = {"bad_nonce_once", "account_gone"}
ESCAPES = "\x1b[31mred\x1b]0;x\x07\r\nINFO: \x00\x9b2J\u202e"
BEFORE: Mapping[str, tuple[str, Callable[[FakeCA, Request], Reply]]] = {
    "html_directory": ("directory", lambda c, r: Reply(200, HTML, kind="text/html")),
    "empty_directory": ("directory", lambda c, r: Reply(200)),
    "null_directory": ("directory", lambda c, r: Reply(200, b"null")),
    "list_directory": ("directory", lambda c, r: Reply(200, b"[]")),
    "utf16_directory": ("directory", lambda c, r: Reply(200, '{"newNonce": "\u20ac"}'.encode("utf-16"))),
    "deep_directory": ("directory", lambda c, r: Reply(200, b"[" * 100_000 + b"]" * 100_000)),
    "endless_body": ("directory", lambda c, r: Reply(200, itertools.repeat(b" " * 65536))),
    "cut_body": ("directory", lambda c, r: Reply(200, iter([b'{"newNonce": ']), {"Content-Length": "1000"})),
    "drip": ("directory", lambda c, r: Reply(200, drip(c))),
    "silent": ("*", lambda c, r: Reply(0)),
    "redirect_http": ("directory", lambda c, r: redirect(c.url.replace("https", "http"))),
    "redirect_file": ("directory", lambda c, r: redirect("file:///etc/passwd")),
    "redirect_loop": ("directory", lambda c, r: redirect(c.base + r.path)),
    "error_500_always": ("*", lambda c, r: problem(500, "serverInternal", "out of order")),
    "error_500_html": ("*", lambda c, r: Reply(500, HTML, kind="text/html")),
    "error_503_retry_after": ("*", lambda c, r: problem(503, "serverInternal", "under maintenance")),
    "bad_nonce_once": ("POST", lambda c, r: problem(400, "badNonce", "this nonce is no good")),
    "bad_nonce_for_ever": ("POST", lambda c, r: problem(400, "badNonce", "this nonce is no good")),
    "account_gone": (BY_KID, forget_account),
    "terms_changed": ("new-order", lambda c, r: c.terms().reply),
    "rate_limited": ("new-order", lambda c, r: problem(429, "rateLimited", "too many certificates")),
    "problem_escapes": ("new-order", lambda c, r: problem(403, "rejectedIdentifier", ESCAPES)),
    "subproblems": ("new-order", lambda c, r: refuse_names(r)),
    "order_pending_for_ever": ("finalize", lambda c, r: problem(403, "orderNotReady", "this order is pending")),
    "order_invalid_at_finalize": ("finalize", fail_order),
}
AFTER: Mapping[str, tuple[str, Callable[[FakeCA, Request, Any], Any]]] = {
    "no_meta": ("directory", lambda c, r, b: without(b, "meta")),
    "no_renewal_info": ("directory", lambda c, r, b: without(b, "renewalInfo")),
    "no_terms": ("directory", lambda c, r, b: {**b, "meta": {}}),
    "directory_http_urls": ("directory", lambda c, r, b: swap(b, "https://", "http://")),
    "directory_file_urls": ("directory", lambda c, r, b: swap(b, c.base, "file:///etc")),
    "directory_other_host": ("directory", lambda c, r, b: swap(b, c.base, c.stranger)),
    "order_pending_for_ever": (SHOWN, lambda c, r, b: without(b, "certificate", status="pending")),
    "order_processing_for_ever": ("order finalize", lambda c, r, b: (
        without(b, "certificate", status="processing") if b["status"] == "valid" else b)),
    "order_other_names": (SHOWN, lambda c, r, b: {**b, "identifiers": [OTHER]}),
    "no_certificate_url": (SHOWN, lambda c, r, b: without(b, "certificate")),
    "no_authorizations": (SHOWN, lambda c, r, b: {**b, "authorizations": []}),
    "many_authorizations": (SHOWN, lambda c, r, b: {
        **b, "authorizations": [f"{b['authorizations'][0]}?{number}" for number in range(10_000)]}),
    "authz_other_host": (SHOWN, lambda c, r, b: {
        **b, "authorizations": swap(b["authorizations"], c.base, c.stranger)}),
    "finalize_other_host": (SHOWN, lambda c, r, b: {
        **b, "finalize": swap(b["finalize"], c.base, c.stranger)}),
    "authz_other_name": ("authz", lambda c, r, b: {**b, "identifier": OTHER}),
    "challenge_http_url": ("authz", lambda c, r, b: swap(b, "https://", "http://")),
    "challenge_file_url": ("authz", lambda c, r, b: swap(b, c.base, "file:///etc")),
    "challenge_other_host": ("authz", lambda c, r, b: swap(b, c.base, c.stranger)),
    "no_challenges": ("authz", lambda c, r, b: {**b, "challenges": []}),
    "token_traversal": ("authz", lambda c, r, b: set_token(b, "../../etc/x")),
    "token_absolute": ("authz", lambda c, r, b: set_token(b, "/etc/x")),
    "token_newline": ("authz", lambda c, r, b: set_token(b, "abc\ndef\r\n\r\nGET / HTTP/1.1")),
    "token_nul": ("authz", lambda c, r, b: set_token(b, "abc\0def")),
    "token_shell": ("authz", lambda c, r, b: set_token(b, "$(touch pwned);`touch pwned`")),
    "token_escape": ("authz", lambda c, r, b: set_token(b, ESCAPES)),
    "token_empty": ("authz", lambda c, r, b: set_token(b, "")),
    "token_number": ("authz", lambda c, r, b: set_token(b, 12345)),
    "token_long": ("authz", lambda c, r, b: set_token(b, "x" * 65536)),
    "cert_other_key": ("cert", lambda c, r, b: reissue(c, r, public_key=make_key().public_key())),
    "cert_other_name": ("cert", lambda c, r, b: reissue(c, r, names=["other.example"])),
    "cert_missing_name": ("cert", lambda c, r, b: reissue(c, r, names=names(c, r)[:-1] or ["other.example"])),
    "cert_extra_name": ("cert", lambda c, r, b: reissue(c, r, names=names(c, r) + ["other.example"])),
    "cert_no_san": ("cert", lambda c, r, b: reissue(c, r, san=False)),
    "cert_is_ca": ("cert", lambda c, r, b: reissue(c, r, is_ca=True)),
    "cert_expired": ("cert", lambda c, r, b: reissue(c, r, not_before=c.clock() - timedelta(c.days + 2))),
    "cert_not_yet": ("cert", lambda c, r, b: reissue(c, r, not_before=c.clock() + timedelta(2))),
    "chain_reversed": ("cert", lambda c, r, b: b"".join(reversed(pems(b)))),
    "chain_unlinked": ("cert", lambda c, r, b: pems(b)[0] + Authority().intermediate),
    "chain_with_key": ("cert", lambda c, r, b: b + key_pem(make_key())),
    "cert_html": ("cert", lambda c, r, b: HTML),
    "cert_empty": ("cert", lambda c, r, b: b""),
    "cert_der": ("cert", lambda c, r, b: base64.b64decode(b"".join(pems(b)[0].splitlines()[1:-1]))),
    "cert_cut": ("cert", lambda c, r, b: b[:300]),
    "cert_nul": ("cert", lambda c, r, b: b[:200] + b"\0" + b[200:]),
    "cert_huge": ("cert", lambda c, r, b: b + pems(b)[1] * (60_000_000 // len(pems(b)[1]))),
    "cert_crlf": ("cert", lambda c, r, b: (b"the chain\n\n" + b + b"\nthe end\n").replace(b"\n", b"\r\n")),
}
HEADERS: Mapping[str, tuple[str, str, str]] = {
    "no_nonce": ("*", "Replay-Nonce", ""),
    "nonce_huge": ("*", "Replay-Nonce", "x" * 60_000),
    "location_missing": ("new-order", "Location", ""),
    "cert_content_type": ("cert", "Content-Type", "text/plain; charset=utf-8"),
}
MODES = {*BEFORE, *AFTER, *HEADERS}
