"""Operations: health for whoever restarts and routes, figures for whoever runs the server."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import PlainTextResponse

from oncewise.api.documents import Health, Performance, Readiness
from oncewise.api.routes.common import Arrived, reply
from oncewise.api.schema import WrittenOut
from oncewise.bootstrap import DEGRADED
from oncewise.errors import OrgMismatch

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/health", response_model=Health)
@router.get("/health/liveness", response_model=Health)
@router.get("/health/liveliness", response_model=Health, include_in_schema=False)
async def live() -> Response:
    """The process answers."""
    return reply({"status": "ok"})


@router.get("/health/readiness", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(exchange: Arrived) -> Response:
    """Whether new work is taken on: everything that requests need answers, and the server is not stopping.

    Without Redis, if it is configured, requests are served all the same: the status is then `degraded`, with 200.
    """
    checks = await exchange.services.ready()
    if all(state in ("ok", DEGRADED) for state in checks.values()):
        return reply({"status": DEGRADED if DEGRADED in checks.values() else "ok", "checks": checks})
    answer = reply({"status": "unavailable", "checks": checks}, 503)
    answer.headers["retry-after"] = "1"
    return answer


OrgName = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Only those of this tenant.")]


async def _figures_of(exchange: Arrived) -> str | None:
    return exchange.figures_of()


@router.get("/api/metrics/performance", response_model=Performance)
async def performance(
    exchange: Arrived,
    own: Annotated[str | None, Depends(_figures_of)],
    last_n: Annotated[int, WrittenOut, Query(ge=1, le=10_000)] = 50,
    org_id: OrgName = None,
) -> Response:
    """Figures over the last finished requests: of all tenants or of `org_id`, with a tenant's API key of that one."""
    if own is not None and org_id not in (None, own):
        raise OrgMismatch
    return reply(await exchange.services.metrics.performance(last_n, own or org_id))


async def _for_operators(exchange: Arrived) -> None:
    exchange.check_operator()


@router.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(_for_operators)])
async def metrics(exchange: Arrived) -> Response:
    """Counters and gauges in Prometheus' text format."""
    await exchange.services.metrics.flush()
    return Response(exchange.services.prometheus.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
