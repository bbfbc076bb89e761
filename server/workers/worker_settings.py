"""The settings of an HTTP worker: its share of the server's, and how they travel to it."""

from dataclasses import replace
from typing import Any

import msgspec

from server.settings import Settings


def of_one_worker(settings: Settings) -> Settings:
    """The settings of one HTTP worker, which has its share of what bounds the memory of a process."""
    count = settings.http_workers
    return replace(
        settings,
        max_uploads_mb=settings.max_uploads_mb / count,
        max_decode_mb=settings.max_decode_mb / count,
        max_encode_mb=settings.max_encode_mb / count,
        max_connections=settings.max_connections // count,
    )


def settings_of(values: dict[str, Any]) -> Settings:
    """The inverse of `values_of`."""
    return msgspec.convert(values, Settings, dec_hook=lambda kind, value: kind(value))


def values_of(settings: Settings) -> dict[str, Any]:
    """Settings as they travel to a worker."""
    return msgspec.to_builtins(settings, enc_hook=str)
