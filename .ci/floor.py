"""The least that a Python program can get a certificate with, to measure others by: no checks, no memory, no mercy.

    floor.py HOME URL CA_FILE PORT CONNECTIONS [NAME,NAME...]...

Each last argument is a certificate. Answers http-01 at PORT of 127.0.0.1; without a certificate it makes the account.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import http.client
import json
import queue
import socketserver
import ssl
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

Json = dict[str, Any]


def b64(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Account:
    """One account, and the connections that are open to its CA."""

    def __init__(self, home: Path, url: str, ca_file: str) -> None:
        self.home, self.url, self.file = home, urllib.parse.urlsplit(url), home / "account.json"
        self.context = ssl.create_default_context(cafile=ca_file or None)
        self.context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        self.idle: queue.SimpleQueue[http.client.HTTPSConnection] = queue.SimpleQueue()
        self.nonces: collections.deque[str] = collections.deque()
        self.asked: dict[str, threading.Event] = collections.defaultdict(threading.Event)
        self.kid = ""
        self.directory: Json = {}
        if self.file.exists():
            known = json.loads(self.file.read_text())
            self.key, self.kid = serialization.load_pem_private_key(known["key"].encode(), None), known["kid"]
            self.directory = known["directory"]
        else:
            self.key = ec.generate_private_key(ec.SECP256R1())
        assert isinstance(self.key, ec.EllipticCurvePrivateKey)
        numbers = self.key.public_key().public_numbers()
        self.jwk = {"crv": "P-256", "kty": "EC", "x": b64(numbers.x.to_bytes(32, "big")),
                    "y": b64(numbers.y.to_bytes(32, "big"))}
        self.thumbprint = b64(hashlib.sha256(json.dumps(self.jwk, separators=(",", ":")).encode()).digest())
        self.directory = self.directory or json.loads(self.request("GET", url)[1])

    def request(self, method: str, url: str, body: bytes | None = None) -> tuple[Any, bytes]:
        """Sends one request on a connection that is free, or a new one."""
        try:
            link = self.idle.get_nowait()
        except queue.Empty:
            link = http.client.HTTPSConnection(self.url.hostname or "", self.url.port, context=self.context, timeout=60)
        link.request(method, urllib.parse.urlsplit(url).path, body,
                     {"Content-Type": "application/jose+json", "User-Agent": "floor"})
        answer = link.getresponse()
        data = answer.read()
        self.idle.put(link)
        if "Replay-Nonce" in answer.headers:
            self.nonces.append(answer.headers["Replay-Nonce"])
        assert answer.status < 400, (url, answer.status, data)
        return answer.headers, data

    def post(self, url: str, payload: Json | None) -> tuple[Any, bytes]:
        """Sends one signed request."""
        assert isinstance(self.key, ec.EllipticCurvePrivateKey)
        try:
            nonce = self.nonces.pop()
        except IndexError:
            nonce = self.request("HEAD", self.directory["newNonce"])[0]["Replay-Nonce"]
            self.nonces.remove(nonce)
        who: Json = {"kid": self.kid} if self.kid else {"jwk": self.jwk}
        head = b64(json.dumps({"alg": "ES256", "nonce": nonce, "url": url, **who}).encode())
        body = "" if payload is None else b64(json.dumps(payload).encode())
        r, s = utils.decode_dss_signature(self.key.sign(f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256())))
        signature = b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        return self.request("POST", url, json.dumps({"protected": head, "payload": body,
                                                     "signature": signature}).encode())

    def register(self) -> None:
        """Makes the account."""
        headers, _ = self.post(self.directory["newAccount"], {"termsOfServiceAgreed": True})
        pem = self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                     serialization.NoEncryption()).decode()
        self.file.write_text(json.dumps({"key": pem, "kid": headers["Location"], "directory": self.directory}))

    def start(self, url: str) -> str:
        """Has the CA ask for the proof of one name; the token."""
        found = json.loads(self.post(url, None)[1])
        challenge = next(one for one in found["challenges"] if one["type"] == "http-01")
        self.post(challenge["url"], {})
        return str(challenge["token"])

    def settle(self, url: str, busy: tuple[str, ...]) -> Json:
        """Asks until an order has left these states."""
        while True:
            order: Json = json.loads(self.post(url, None)[1])
            if order["status"] not in busy:
                return order
            time.sleep(0.01)

    def obtain(self, names: list[str], pool: ThreadPoolExecutor | None) -> None:
        """Gets one certificate."""
        identifiers = [{"type": "dns", "value": name} for name in names]
        headers, data = self.post(self.directory["newOrder"], {"identifiers": identifiers})
        order, url = json.loads(data), headers["Location"]
        key = ec.generate_private_key(ec.SECP256R1())
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        subject = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        request = builder.add_extension(subject, critical=False).sign(key, hashes.SHA256())
        for token in list((pool.map if pool else map)(self.start, order["authorizations"])):
            self.asked[token].wait(30)
        self.settle(url, ("pending",))
        csr = b64(request.public_bytes(serialization.Encoding.DER))
        order = json.loads(self.post(order["finalize"], {"csr": csr})[1])
        if order["status"] == "processing":
            order = self.settle(url, ("processing",))
        chain = self.post(order["certificate"], None)[1]
        (self.home / f"{names[0]}.key").write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        (self.home / f"{names[0]}.pem").write_bytes(chain)


class Answer(socketserver.StreamRequestHandler):
    """Answers any token."""

    account: Account

    def handle(self) -> None:
        """Reads the head of one request, and answers."""
        token = self.rfile.readline().split()[1].rpartition(b"/")[2].decode()
        while self.rfile.readline().strip():
            pass
        text = f"{token}.{self.account.thumbprint}"
        self.wfile.write(f"HTTP/1.0 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        self.account.asked[token].set()


class Listener(socketserver.ThreadingTCPServer):
    """Where the CA asks."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128


def main() -> None:
    """Does what the command line says."""
    home, url, ca_file, port, connections, *wanted = sys.argv[1:]
    account = Account(Path(home), url, ca_file)
    if not wanted:
        account.register()
        return
    Answer.account = account
    listener = Listener(("127.0.0.1", int(port)), Answer)
    threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
    certificates = [names.split(",") for names in wanted]
    with ThreadPoolExecutor(int(connections)) as pool:
        if len(certificates) == 1:
            account.obtain(certificates[0], pool if len(certificates[0]) > 1 else None)
        else:
            list(pool.map(lambda names: account.obtain(names, None), certificates))


if __name__ == "__main__":
    main()
