"""How an engine and a shard come to trust each other, before any frame: both prove that they hold the cluster's token
without sending it, for this shard and this model, then agree on what rows look like and how they travel. Both parts are
generators over messages (each sends what it yields); knows nothing of sockets.

    engine -> shard   nonce
    shard -> engine   nonce
    engine -> shard   shard id, model, proof
    shard -> engine   proof, the device that it computes on
    engine -> shard   terms (with a memfd beside them, if rows lie in one)
    shard -> engine   agreed

A message is magic, version, length, and a msgpack map. Magic and version stay where they are for ever."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import msgpack

from .expert_frames import DTYPES, PROTOCOL_VERSION
from .row_slots import MAX_SLOT_BYTES, slot_bytes
from .transport import HandshakeRefused, RowLayout

MAX_MESSAGE_BYTES = 4096
MAX_CALLS = 1024
"""In flight on one connection."""
PREFIX = struct.Struct("<4sHH")
"""Magic, protocol version, bytes that follow."""
_MAGIC = b"HRDX"
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_REASONS = {
    "version": "speaks another protocol version",
    "token": "holds another token",
    "shard": "is another shard",
    "model": "holds another model's weights",
    "layout": "computes rows of another size or dtype",
    "limits": "does not take calls of that size or number",
    "slots": "cannot use the shared memory",
    "full": "has no room for another peer",
    "silent": "did not hear from this end in time",
    "left": "is going away",
    "failed": "failed at the handshake",
    "garbage": "did not understand this end",
}

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """What the engine wants of the connection."""

    hidden: int
    dtype: int
    """A code of `expert_frames.DTYPES`."""
    max_rows: int
    max_calls: int
    rows: str
    """Where rows travel: "stream" (behind their frames), "host" (a memfd) or "cuda" (memory of a GPU)."""
    cuda: list[Any] | None = None
    """The GPU memory's handle."""


def encode_message(message: Mapping[str, Any], version: int = PROTOCOL_VERSION) -> bytes:
    """A message as it travels."""
    body = msgpack.packb(dict(message))
    assert body is not None
    assert len(body) <= MAX_MESSAGE_BYTES
    return PREFIX.pack(_MAGIC, version, len(body)) + body


def decode_prefix(prefix: bytes) -> int:
    """The length of the message behind these 8 bytes. Raises `HandshakeRefused`."""
    magic, version, length = PREFIX.unpack(prefix)
    if magic != _MAGIC or length > MAX_MESSAGE_BYTES:
        raise HandshakeRefused("the peer speaks another protocol", "garbage")
    if version != PROTOCOL_VERSION:
        message = f"the peer speaks version {version} of the protocol, this end version {PROTOCOL_VERSION}"
        raise HandshakeRefused(message, "version")
    return length


def decode_body(body: bytes) -> Message:
    """The map in a message. Raises `HandshakeRefused`."""
    try:
        message = msgpack.unpackb(body)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise HandshakeRefused(f"a handshake message is not msgpack: {error}", "garbage") from error
    if type(message) is not dict:
        _garbage()
    return message


def refusal(reason: str) -> bytes:
    """The message that ends a handshake."""
    return encode_message({"refused": reason})


def engine_part(token: str, shard_id: str, model: str) -> Generator[Message, Message, str]:
    """The engine's messages up to the shard's proof; takes the shard's, returns the type of the shard's device. Raises
    `HandshakeRefused`."""
    mine = os.urandom(_NONCE_BYTES)
    answer = yield {"nonce": mine}
    _check_refusal(answer)
    theirs = _nonce(answer)
    secret = _Secret(token, mine, theirs, shard_id, model)
    answer = yield {"shard": shard_id, "model": model, "proof": secret.proof("engine")}
    _check_refusal(answer)
    secret.check("shard", answer)
    return _text(answer, "device")


def shard_part(token: str, shard_id: str, model: str, layout: RowLayout) -> Generator[Message, Message, Terms]:
    """The shard's messages; takes the engine's (start it with `next`, which gives nothing to send), and returns what
    the engine wants, checked. Raises `HandshakeRefused`, of which the engine shall be told the reason."""
    hello = yield {}
    theirs, mine = _nonce(hello), os.urandom(_NONCE_BYTES)
    claim = yield {"nonce": mine}
    named, weights = _text(claim, "shard"), _text(claim, "model")
    _Secret(token, theirs, mine, named, weights).check("engine", claim)
    if named != shard_id:
        raise HandshakeRefused(f"an engine is looking for shard {named}", "shard")
    if weights != model:
        raise HandshakeRefused(f"an engine runs the model {weights}", "model")
    secret = _Secret(token, theirs, mine, shard_id, model)
    wanted = yield {"proof": secret.proof("shard"), "device": layout.device.type}
    return _terms(wanted, layout)


def agreed() -> Message:
    """The shard's last message."""
    return {"agreed": True}


def check_agreed(message: Message) -> None:
    """Raise `HandshakeRefused` unless the shard agreed."""
    _check_refusal(message)
    if message != agreed():
        _garbage()


class _Secret:
    """Proofs of one handshake: of the token, bound to both nonces, to the prover's role, to the shard and the model."""

    def __init__(self, token: str, engine_nonce: bytes, shard_nonce: bytes, shard_id: str, model: str) -> None:
        self._key = token.encode()
        self._facts = [PROTOCOL_VERSION, engine_nonce, shard_nonce, shard_id, model]

    def proof(self, role: str) -> bytes:
        text = msgpack.packb([role, *self._facts])
        assert text is not None
        return hmac.digest(self._key, text, hashlib.sha256)

    def check(self, role: str, message: Message) -> None:
        proof = message.get("proof")
        if type(proof) is not bytes or len(proof) != _PROOF_BYTES:
            _garbage()
        if not hmac.compare_digest(proof, self.proof(role)):
            raise HandshakeRefused("the peer does not hold this cluster's token", "token")


def _terms(message: Message, layout: RowLayout) -> Terms:
    names = {field.name for field in fields(Terms)}
    if set(message) != names or any(type(message[name]) is not int for name in names - {"rows", "cuda"}):
        _garbage()
    terms = Terms(**message)
    if terms.rows not in ("stream", "host", "cuda") or (terms.rows == "cuda") != (type(terms.cuda) is list):
        _garbage()
    if terms.hidden != layout.hidden or terms.dtype != DTYPES[layout.dtype]:
        raise HandshakeRefused(f"an engine sends rows of {terms.hidden}, dtype {terms.dtype}", "layout")
    if not (1 <= terms.max_calls <= MAX_CALLS and terms.max_rows >= 1):
        raise HandshakeRefused(f"an engine wants {terms.max_calls} calls of {terms.max_rows} rows", "limits")
    if slot_bytes(layout, terms.max_rows) > MAX_SLOT_BYTES:
        raise HandshakeRefused(f"an engine wants calls of {terms.max_rows} rows", "limits")
    return terms


def terms_message(layout: RowLayout, max_rows: int, max_calls: int, rows: str, cuda: list[Any] | None) -> Message:
    """The engine's terms."""
    return asdict(Terms(layout.hidden, DTYPES[layout.dtype], max_rows, max_calls, rows, cuda))


def _nonce(message: Message) -> bytes:
    nonce = message.get("nonce")
    if type(nonce) is not bytes or len(nonce) != _NONCE_BYTES:
        _garbage()
    return nonce


def _text(message: Message, name: str) -> str:
    text = message.get(name)
    if type(text) is not str:
        _garbage()
    return text


def _check_refusal(message: Message) -> None:
    """For the engine's part only. Whatever the peer says, the reason is one of `_REASONS`."""
    if "refused" in message:
        reason = str(message["refused"])
        what = _REASONS.get(reason, "refused for a reason that this end does not know")
        raise HandshakeRefused(f"the shard {what}", reason if reason in _REASONS else "garbage")


def _garbage() -> NoReturn:
    raise HandshakeRefused("a handshake message lacks what it should hold", "garbage")
