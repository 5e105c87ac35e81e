"""What a server is told when it starts."""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from fewer import checks
from fewer.errors import FewerError
from fewer.methods import resolve_prompt
from fewer.prompts.protect import named
from fewer.types import Budget

_MOST = 1e9
"""Megabytes or seconds that anybody may want; more, or no end, is a slip."""


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts; what cannot work is refused here, before it listens.

    Args:
        host: the address that it is bound to. On a loopback address, requests that name another host are refused:
            they come from pages that had their name pointed at this machine.
        upstream: the base URL that chats are forwarded to, as OpenAI's clients take it; one without a path gets `/v1`.
        method: what chats are shortened by, and texts that name no method.
        keep: the share of the tokens of a chat's compressible messages that may stay.
        frozen: how many leading messages of a chat stay as they are, because a provider has them cached.
        protect: classes of things that stay in chats, such as "numbers".
        tokenizer: what counts tokens where a request names none, see `fewer.prompts.counting.counter`.
        limit_mb: the largest body, in MB of 10^6 bytes; for `/v1/restore` eight times that, since a patch is escaped.
        timeout: seconds that compressing may take, waiting included.
        upstream_timeout: seconds that the upstream may be silent.
        workers: texts that are compressed at once by methods without a model; each model does one at a time.
        queue: how many calls may wait or run; more are told to come again.
    """

    host: str = "127.0.0.1"
    upstream: str | None = None
    method: str = "llmlingua2"
    keep: float = 0.5
    frozen: int = 0
    protect: tuple[str, ...] = ()
    tokenizer: str | None = None
    limit_mb: float = 5.0
    timeout: float = 60.0
    upstream_timeout: float = 300.0
    workers: int = 4
    queue: int = 100

    def __post_init__(self) -> None:
        for label in ("host", "upstream", "tokenizer"):
            value = getattr(self, label)
            if not (isinstance(value, str) or (value is None and label != "host")):
                raise FewerError(f"{label}={value!r} must be text")
        if not self.host.strip():
            raise FewerError(
                f"host={self.host!r} would be every address; say 127.0.0.1, or 0.0.0.0 where that is meant"
            )
        resolve_prompt(self.method)
        if Budget.parse(self.keep).fraction is None:
            raise FewerError(f"keep={self.keep!r}: prompts take the share that stays, in (0, 1]")
        if not isinstance(self.protect, tuple | list) or not all(isinstance(name, str) for name in self.protect):
            raise FewerError(f"protect={self.protect!r} must be a tuple of names, such as ('numbers',)")
        for name in self.protect:
            named(name)
        for label in ("limit_mb", "timeout", "upstream_timeout"):
            value = getattr(self, label)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value <= _MOST:  # nan too
                raise FewerError(f"{label}={value!r} must be a number, at most {_MOST:g}")
            if not value > 0:
                raise FewerError(f"{label}={value} lets nothing through; give more than 0")
        checks.counts(workers=self.workers, queue=self.queue)
        checks.counts(least=0, frozen=self.frozen)
        if self.upstream is not None:
            self.base  # noqa: B018  # read once, so that what is wrong in it is said now

    @property
    def limit(self) -> int:
        """The largest body in bytes."""
        return int(self.limit_mb * 1_000_000)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def chats(self) -> str:
        """Where chats are forwarded to."""
        return f"{self.base}/chat/completions"

    @property
    def base(self) -> str:
        """The upstream's base URL, which has a path and no slash at its end."""
        said = self.upstream or ""
        try:
            parts = urlsplit(said)
            port = parts.port
        except ValueError as why:
            raise FewerError(f"upstream={said!r} is no URL: {why}") from None
        if parts.username or parts.password:
            raise FewerError("upstream: it holds a name or a password, which logs would show; clients send the key")
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
            raise FewerError(f"upstream={said!r}: give http:// or https://, a host, and a path such as /v1; no more")
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, is this machine's own. No network is asked."""
    name = host.strip("[]").lower().removesuffix(".")
    if name == "localhost":
        return True
    try:  # the system reads an address as it does to listen there: 127.1 is one too
        found = socket.getaddrinfo(name, None, flags=socket.AI_NUMERICHOST)[0][4][0]
    except (OSError, ValueError):
        return False
    address = ipaddress.ip_address(found)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
