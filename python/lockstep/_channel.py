"""Channels to workers: TLS, and the token that every call carries."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import grpc

from .errors import InvalidRequest

# Calls to a peer that is silent (its host is gone, its process stopped) are UNAVAILABLE after 25 s, tries to connect to
# it after 5 s. Workers admit a ping every 10 s.
LIVENESS_OPTIONS = [
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what newer versions of gRPC go by
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 5_000),
]
_TOKEN = re.compile(r"[!-~]{16,4096}")


class Credentials:
    """What a caller shows, and whom it trusts. token: None for none. tls_ca: a PEM file of authorities; None: no TLS."""

    def __init__(self, token: str | None = None, tls_ca: str | pathlib.Path | None = None):
        if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
            # What it is stays out of messages and logs.
            raise InvalidRequest("token: want 16 to 4096 printable ASCII characters without spaces")
        self._metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self._tls = None
        if tls_ca is not None:
            try:
                authorities = pathlib.Path(tls_ca).read_bytes()
            except OSError as error:
                raise InvalidRequest(f"tls_ca: {error}, want a PEM file") from None
            if b"-----BEGIN CERTIFICATE-----" not in authorities:
                raise InvalidRequest(f"tls_ca: no certificate in {str(tls_ca)!r}, want a PEM file")
            self._tls = grpc.ssl_channel_credentials(authorities)

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> Any:
        """For stubs; has close()."""
        return self._guarded(grpc, address, options)

    def aio_channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> Any:
        return self._guarded(grpc.aio, address, options)

    def _guarded(self, module: Any, address: str, options: Sequence[tuple[str, Any]]) -> Any:
        if self._tls is None:
            channel = module.insecure_channel(address, options)
        else:
            channel = module.secure_channel(address, self._tls, options)
        return channel if self._metadata is None else _TokenChannel(channel, self._metadata)


def read_token(path: str | pathlib.Path) -> str:
    """The first line of a file."""
    with open(path, encoding="ascii", errors="replace") as file:
        return file.readline(4098).removesuffix("\n")


class _TokenChannel:
    """Makes calls that carry the metadata. What stubs need of a channel, of either API; gRPC's interceptors would wrap
    every stream's messages as well."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]):
        self._channel, self._metadata = channel, metadata

    def _method(self, kind: str, *arguments: Any, **options: Any) -> _TokenCall:
        return _TokenCall(getattr(self._channel, kind)(*arguments, **options), self._metadata)

    def unary_unary(self, *arguments: Any, **options: Any) -> _TokenCall:
        return self._method("unary_unary", *arguments, **options)

    def unary_stream(self, *arguments: Any, **options: Any) -> _TokenCall:
        return self._method("unary_stream", *arguments, **options)

    def stream_unary(self, *arguments: Any, **options: Any) -> _TokenCall:
        return self._method("stream_unary", *arguments, **options)

    def stream_stream(self, *arguments: Any, **options: Any) -> _TokenCall:
        return self._method("stream_stream", *arguments, **options)

    def close(self) -> Any:
        return self._channel.close()

    def __enter__(self) -> _TokenChannel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _TokenCall:
    def __init__(self, method: Any, metadata: tuple[tuple[str, str], ...]):
        self._call, self._metadata = method, metadata

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(*arguments, metadata=self._metadata, **options)

    def future(self, *arguments: Any, **options: Any) -> Any:
        return self._call.future(*arguments, metadata=self._metadata, **options)
