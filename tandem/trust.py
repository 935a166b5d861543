"""Who may speak to a process of the cluster over gRPC: who shows the shared token, or a certificate, or both.

Without either, whoever reaches the port may; `tandem.config` then allows no port but loopback's. No other module opens
gRPC ports and channels.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio
from pydantic import SecretStr

from tandem.errors import ConfigError

TOKEN_KEY = "tandem-token"  # noqa: S105 - a name, not a secret
NAME_OVERRIDE = "grpc.ssl_target_name_override"

Options = Sequence[tuple[str, Any]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class Settings(Protocol):
    """What is asked of a process's settings; see `RouterConfig` and `WorkerConfig`."""

    @property
    def token(self) -> SecretStr | None:
        """The cluster's shared secret."""

    @property
    def tls_cert(self) -> Path | None:
        """The process's own certificate chain, PEM."""

    @property
    def tls_key(self) -> Path | None:
        """Its key, PEM."""

    @property
    def tls_ca(self) -> Path | None:
        """Who must have signed the certificates of others, PEM."""

    @property
    def tls_name(self) -> str:
        """The name in others' certificates; empty: the address they are called at."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """One process's half of mutual TLS; all PEM."""

    chain: bytes
    key: bytes = field(repr=False)
    authority: bytes
    name: str = ""
    """See `Settings.tls_name`."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How this process knows the others, and they it. `Trust()` trusts everybody."""

    token: str = field(default="", repr=False)
    certificates: Certificates | None = None

    @classmethod
    def of(cls, settings: Settings) -> Trust:
        """What a process's settings say. Raises ConfigError for files that cannot be read."""
        token = settings.token.get_secret_value() if settings.token is not None else ""
        chain, key, authority = settings.tls_cert, settings.tls_key, settings.tls_ca
        if chain is None or key is None or authority is None:
            return cls(token)
        read = (_read(chain, "--tls-cert"), _read(key, "--tls-key"), _read(authority, "--tls-ca"))
        return cls(token, Certificates(*read, settings.tls_name))

    def server(self, options: Options = ()) -> grpc.aio.Server:
        """A server that answers calls with the token alone. Open its ports with `listen`."""
        if not self.token:
            return grpc.aio.server(options=list(options))
        return grpc.aio.server(options=list(options), interceptors=[_Gate(self.token)])

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Opens a port of `server`; returns which. Raises RuntimeError when it is not free.

        A Unix socket needs no certificate: its folder says who may use it.
        """
        mine = self.certificates
        if mine is None or address.startswith("unix:"):
            return server.add_insecure_port(address)
        pair = [(mine.key, mine.chain)]
        return server.add_secure_port(address, grpc.ssl_server_credentials(pair, mine.authority, True))

    def channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """A connection to another process, whose every call shows the token."""
        mine, given = self.certificates, list(options)
        if mine is None or address.startswith("unix:"):
            made = grpc.aio.insecure_channel(address, options=given)
        else:
            if mine.name:
                given.append((NAME_OVERRIDE, mine.name))
            credentials = grpc.ssl_channel_credentials(mine.authority, mine.key, mine.chain)
            made = grpc.aio.secure_channel(address, credentials, options=given)
        if self.token:
            _show_token(made, self.token)
        return made


ANYONE = Trust()
"""For processes on one machine's loopback."""


def same_secret(given: str | bytes, digest: bytes) -> bool:
    """Whether `given` is the secret with this SHA-256 digest, in a time that says nothing of how near it is."""
    data = given if isinstance(given, bytes) else given.encode("utf-8", "surrogateescape")
    return hmac.compare_digest(hashlib.sha256(data).digest(), digest)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{setting} is {path}; it cannot be read: {reason}") from None


def _show_token(channel: grpc.aio.Channel, token: str) -> None:
    """Adds the token to every call of a channel. Interceptors would stand in each message's way."""
    own = (TOKEN_KEY, token)
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        make = getattr(channel, kind)

        def with_token(*args: Any, make: Callable[..., Any] = make, **named: Any) -> Callable[..., Any]:
            call = make(*args, **named)

            @functools.wraps(call.__call__)
            def started(*args: Any, metadata: Sequence[tuple[str, str]] | None = None, **named: Any) -> Any:
                return call(*args, metadata=(own, *(metadata or ())), **named)

            return started

        setattr(channel, kind, with_token)


class _Gate(grpc.aio.ServerInterceptor):
    """Ends calls without the token before anything of theirs is read."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """grpc.aio.ServerInterceptor"""
        for name, value in handler_call_details.invocation_metadata or ():
            if name == TOKEN_KEY and same_secret(value, self._digest):
                return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)  # fits calls of every kind


async def _refuse(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or not this cluster's")
    raise AssertionError("abort returned")
