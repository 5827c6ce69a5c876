"""SHA-256 digests, in hexadecimal, of bytes and of JSON values."""

import hashlib
import json
from typing import Any

__all__ = ["canonical", "sha256"]


def canonical(values: Any) -> bytes:
    """JSON values as the bytes to digest: the same for equal values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """The digest of some bytes."""
    return hashlib.sha256(data).hexdigest()
