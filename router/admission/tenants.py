"""API keys and the tenants they stand for, from a YAML or JSON file. Keys are kept as SHA-256 digests only.

tenants:
  - name: research
    keys: [sk-secret, "sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"]
    requests_per_minute: 600
    tokens_per_minute: 1000000
    concurrency: 32
    priority: 5
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tandem.errors import BadRequest, ConfigError, Unauthorized

MAX_TENANTS = 10_000
MAX_KEYS = 64
HASHED = "sha256:"
Limit = Annotated[int, Field(ge=0, lt=1 << 53)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._@-]+$")]


def _printable(key: str) -> str:
    if not PRINTABLE.fullmatch(key):
        raise ValueError("a key must be printable ASCII characters, with no space at either end: HTTP carries no other")
    return key


PRINTABLE = re.compile(r"[!-~]([ -~]*[!-~])?")
Key = Annotated[str, Field(min_length=8, max_length=512), AfterValidator(_printable)]


class Tenant(BaseModel):
    """One tenant's identity and limits; 0 is no limit. The file's keys are not kept here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    """Prompt and output tokens."""
    concurrency: Limit = 0
    """HTTP requests at work at once."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of its requests, and the most that they may ask for."""
    salt: str | None = None
    """Apart from this, no cache is shared with other tenants; default: the name. Tenants with equal salts share."""
    operator: bool = False
    """May see every tenant's requests explained, and where workers are reached."""

    def priority_of(self, asked: int | None) -> int:
        """The priority of a request. Raises BadRequest when it asks for more than the tenant may."""
        if asked is None:
            return self.priority
        if self.name and asked > self.priority:
            raise BadRequest(f"priority is {asked}; this key allows at most {self.priority}", "priority")
        return asked

    def salt_of(self, given: str) -> str:
        """The salt of a request's cache: the tenant's and the request's own, never equal to another pair's."""
        if not self.name:
            return given
        parts = json.dumps([self.name if self.salt is None else self.salt, given])
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


NOBODY = Tenant(name="")
"""Who asks where no keys are configured: everybody, without limits."""
CLUSTER = Tenant(name="", operator=True)
"""Who shows the cluster's own token."""


class _Entry(Tenant):
    name: Name
    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_KEYS)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: Annotated[list[_Entry], Field(min_length=1, max_length=MAX_TENANTS)]


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def presented(authorization: str | None, api_key: str | None) -> str:
    """The key in a request's headers, or nothing."""
    scheme, _, key = (authorization or "").partition(" ")
    return (key if scheme.lower() == "bearer" else api_key or "").strip()


class Keyring:
    """Finds the tenant of a key. An empty one, `Keyring({})`, lets everybody in as NOBODY."""

    def __init__(self, by_digest: Mapping[str, Tenant]) -> None:
        self._by_digest = dict(by_digest)

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._by_digest

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """All tenants, each once."""
        return tuple({tenant.name: tenant for tenant in self._by_digest.values()}.values())

    def tenant(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        """Who presents `Authorization: Bearer KEY`, or `x-api-key: KEY`. Raises Unauthorized.

        A key is looked up by its digest: how long that takes tells nothing of keys that are nearly the same.
        """
        if self.open:
            return NOBODY
        key = presented(authorization, api_key)
        if not key:
            raise Unauthorized("no API key was given; send it as `Authorization: Bearer KEY`")
        tenant = self._by_digest.get(digest(key))
        if tenant is None:
            raise Unauthorized("the API key is not known here")
        return tenant


def read_keys(path: Path) -> Keyring:
    """Reads a file of tenants. Raises ConfigError that names the field and its line, and never a key."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = type(error).__name__ if isinstance(error, yaml.YAMLError) else error
        raise ConfigError(f"--api-keys is {path}; it cannot be read: {reason}", "api_keys") from None
    try:
        entries = _File.model_validate(content).tenants
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        where = f"line {_line(yaml.compose(text), fault['loc'])}: {where}" if fault["loc"] else where
        says = fault["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--api-keys is {path}; {where}: {says}", "api_keys") from None
    return Keyring(_by_digest(entries, path))


def _line(node: yaml.Node | None, place: Sequence[int | str]) -> int:
    """The line, from 1 on, of a value in a document; of what should hold it where it is not there."""
    line = 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            break
        if node is None:
            break
        line = node.start_mark.line + 1
    return line


def _by_digest(entries: Iterable[_Entry], path: Path) -> dict[str, Tenant]:
    found: dict[str, Tenant] = {}
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise ConfigError(f"--api-keys is {path}; the tenant {entry.name} is there twice", "api_keys")
        names.add(entry.name)
        tenant = Tenant(**entry.model_dump(exclude={"keys"}))
        for key in entry.keys:
            kept = key.removeprefix(HASHED).lower() if key.startswith(HASHED) else digest(key)
            if len(kept) != 64 or not set(kept) <= set("0123456789abcdef"):
                raise ConfigError(f"--api-keys is {path}; a {HASHED} of {entry.name} is not 64 hexadecimal digits")
            if kept in found:
                raise ConfigError(f"--api-keys is {path}; a key of {entry.name} is there twice", "api_keys")
            found[kept] = tenant
    return found
