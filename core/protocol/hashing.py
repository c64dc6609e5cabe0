"""Block hashes: the identity of cached KV.

What it is: the typed cache key of a request and the hash chain over its full blocks. A block's hash is
blake2b-128(parent hash || its token ids as little-endian int32); the chain's root is the digest of the `CacheKey`, so that a change of
weights, adapter, tenant, rope or layout can never hit another's blocks (design: KV identity is a typed key).
What it does not know: where blocks live, who uses them.
"""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from penstock.core.protocol.columns import I32

HASH_BYTES = 16


class CacheKey(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What must be equal, besides the tokens, for two requests to share KV. All are part of the chain's root."""

    weights: str
    """Digest of the checkpoint's identity, and the weights epoch."""
    layout: str
    """dtype, block size, heads, rope: EngineFacts.kv_layout."""
    adapter: str = ""
    tenant_salt: str = ""

    def root(self) -> bytes:
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=HASH_BYTES, person=b"penstock-kv-root").digest()


def next_hash(parent: bytes, tokens: bytes) -> bytes:
    """Hash of one full block whose ids are `tokens` (little-endian int32 bytes)."""
    return hashlib.blake2b(parent + tokens, digest_size=HASH_BYTES).digest()


def chain(root: bytes, tokens: I32, block_size: int) -> bytes:
    """Concatenated hashes of the full blocks of `tokens` (a partial last block has none)."""
    data = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    width = 4 * block_size
    out = bytearray()
    parent = root
    for start in range(0, len(data) - width + 1, width):
        parent = next_hash(parent, data[start : start + width])
        out += parent
    return bytes(out)
