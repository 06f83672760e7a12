"""Who may use the service: a file of names and keys."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from trip_rt.errors import InputError
from trip_rt.plain_files import read_text
from trip_rt.serving.api_errors import ApiError

_LEAST = 16  # characters of a key
_EXPECTED = "a file of lines such as: alice 4hT9…, a name and a key"


class ApiKeys:
    """Keys and whose they are. Without any, everybody is the owner ""."""

    def __init__(self, owners: dict[str, str] | None = None):
        self._owners = {_digest(key): owner for key, owner in (owners or {}).items()}

    @property
    def required(self) -> bool:
        return bool(self._owners)

    def owner(self, authorization: str | None) -> str:
        """Whose key the header carries; ApiError 401 where it is nobody's. It takes as long whichever key it is."""
        if not self._owners:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for digest, owner in self._owners.items():
            if hmac.compare_digest(digest, given):
                found = owner
        if found is None or scheme.lower() != "bearer":
            said = "a key that is not known" if authorization else "no API key"
            raise ApiError(
                401,
                f"authorization: found {said}, expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def read_keys(path: Path) -> ApiKeys:
    """The keys in a file of lines NAME KEY; empty lines and those that begin with # are left out."""
    owners: dict[str, str] = {}
    for number, line in enumerate(read_text(path, _EXPECTED, 1 << 20).splitlines(), 1):
        if not (words := line.split()) or line.lstrip().startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < _LEAST or len(words[0]) > 64:
            raise InputError(
                f"{path}, line {number}: expected a name, a space and a key of at least {_LEAST} characters"
            )
        name, key = words
        if name in owners.values() or key in owners:
            raise InputError(f"{path}, line {number}: found a name or a key for the second time, expected new ones")
        owners[key] = name
    if not owners:
        raise InputError(f"{path}: found no keys, expected {_EXPECTED}")
    return ApiKeys(owners)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
