"""Certificates, and a router's application over a scripted cluster."""

from __future__ import annotations

import datetime as dt
import ipaddress
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from router.admission.callers import Callers
from router.admission.quota import Quotas
from router.explain.recorder import Recorder
from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from router.requests.defaults import GenerationDefaults
from tandem.config import RouterConfig
from tandem.testing.router import FakeDispatcher
from tandem.testing.tokenizer import END, byte_level_tokenizer
from tandem.text.prompt import PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.trust import Certificates
from tandem.types import ModelInfo

KEY, OPERATOR, TOKEN, METRICS = "key-of-a-tenant", "key-of-an-operator", "token-of-the-cluster", "token-for-metrics"
KEYS = {"tenants": [{"name": "a", "keys": [KEY]}, {"name": "o", "keys": [OPERATOR], "operator": True}]}


class Authority:
    """Signs certificates for 127.0.0.1 and for `tandem`."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.pem = self._signed(self._key, self._name, x509.BasicConstraints(ca=True, path_length=None))

    def issue(self, name: str = "") -> Certificates:
        """One process's certificates."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "process")])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        names = [x509.DNSName(name)] if name else [address]
        chain = self._signed(key, subject, x509.SubjectAlternativeName(names))
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return Certificates(chain, key.private_bytes(pem, form, serialization.NoEncryption()), self.pem, name)

    def _signed(self, key: ec.EllipticCurvePrivateKey, subject: x509.Name, extension: x509.ExtensionType) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(extension, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class OneText:
    """A `TextSource` with one tokeniser."""

    def __init__(self, text: PromptTokenizer) -> None:
        self._text = text

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        return self._text

    async def defaults(self, model: ModelInfo) -> GenerationDefaults:
        return GenerationDefaults()


@dataclass
class Front:
    """A router's HTTP side over a scripted cluster."""

    app: FastAPI
    dispatcher: FakeDispatcher
    callers: Callers


def front(keys: Path | None = None, token: str = "", metrics_token: str = "") -> Front:
    """keys: as `--api-keys`."""
    tokenizer = Tokenizer(byte_level_tokenizer())
    end = tokenizer.encode(END)[0]
    info = ModelInfo("tiny", "/models/secret-folder/tiny", "f" * 32, tokenizer.size, 512, (end,))
    dispatcher = FakeDispatcher(info, lambda request, choice: [*tokenizer.encode("Hello"), end])
    callers = Callers(Quotas("r", time.monotonic), token, metrics_token)
    if keys is not None:
        callers.load(keys)
    stories = Recorder(64, 1 << 20, 60.0, time.monotonic)
    config = RouterConfig(max_body_mib=8.0)
    api = Api(config, dispatcher, OneText(PromptTokenizer(tokenizer)), RouterMetrics(), stories, callers)
    return Front(create_app(config, api), dispatcher, callers)


def caller(made: Front, **headers: str) -> httpx.AsyncClient:
    """A client of a front."""
    transport = httpx.ASGITransport(made.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://router", headers=headers)
