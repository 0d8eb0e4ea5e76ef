"""Any history of requests on `/v1`: one row each, each call paid once, and nothing saved that nobody got.

Requests come, leave, retry and are cancelled; the provider answers, fails after some text or refuses. Money is counted
in whole dollars a call, which the provider says, so that sums are exact.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from types import MappingProxyType
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import StreamHub
from oncewise.errors import OncewiseError, ProviderError
from oncewise.model import CompletionRequest, Role
from oncewise.service.accounts import CLIENT_GONE, Accounts, Ended, Share
from oncewise.service.attempts import ProviderLane
from oncewise.service.completions import CompletionAsk, Completions, CompletionTicket
from oncewise.service.model_names import ModelNames
from tests.support.virtual_time import run_virtual, turns

ABANDON_S = 5.0

Op = tuple[str, int, int]
"""What happens, to which of those there are, and how many turns of the loop go by afterwards."""

histories = st.lists(
    st.tuples(
        st.sampled_from(
            ["share"] * 5
            + ["sample", "sample", "retry", "leave", "leave", "leave", "say", "say", "finish", "finish"]
            + ["break", "refuse", "cancel", "sleep", "wait", "drain"]
        ),
        st.integers(0, 7),
        st.integers(0, 4),
    ),
    max_size=40,
)


class Provider:
    """Does what the history says, call by call."""

    name = "p"

    def __init__(self) -> None:
        self.orders: list[asyncio.Queue[str]] = []

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
        orders: asyncio.Queue[str] = asyncio.Queue()
        self.orders.append(orders)
        while (order := await orders.get()) in ("say", "break"):
            if order == "break":
                raise ProviderError
            yield {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}
        if order == "refuse":
            raise ProviderError(retryable=False)
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "cost": 1}
        yield {"choices": [{"index": 0, "delta": {"content": "."}, "finish_reason": "stop"}], "usage": usage}


class History:
    """Plays operations and keeps what must be true of the rows."""

    def __init__(self) -> None:
        self.provider = Provider()
        clock_s = asyncio.get_running_loop().time
        lane = ProviderLane(self.provider, Pacer(LocalLimiter(1e9, 1000, clock_s), concurrency=3), "m", RetryBudget())
        ids = iter(range(10_000))
        self.desk = Completions(
            {"p": lane},
            ModelNames({"p": "m"}, default_provider="p"),
            logs=StreamHub(retention_s=0.0),
            ids=lambda: f"call{next(ids)}",
            abandon_after_s=ABANDON_S,
            chance=lambda: 0.0,
        )
        self.rows: list[tuple[Ended, Share]] = []
        self.accounts = Accounts(lambda ended, share: self.rows.append((ended, share)))
        self.requests: list[tuple[CompletionTicket, asyncio.Task[None]]] = []
        self.refused = 0
        self.cancels: list[asyncio.Task[bool]] = []

    async def play(self, history: list[Op]) -> None:
        steps: Mapping[str, Callable[[int], object]] = {
            "share": lambda n: self.arrive({"seed": n % 2}),
            "sample": lambda n: self.arrive({"temperature": 1}),
            "retry": lambda n: self.arrive({"temperature": 1}, is_retry=True),
            "leave": self.leave,
            "cancel": self.cancel,
            "drain": lambda n: self.desk.drain() if n == 0 else None,
        }
        for step, n, pause in history:
            if step in ("say", "finish", "break", "refuse"):
                if self.provider.orders:
                    self.provider.orders[n % len(self.provider.orders)].put_nowait(step)
            elif step in ("sleep", "wait"):
                await asyncio.sleep(1.0 if step == "sleep" else ABANDON_S + 1)
            else:
                steps[step](n)
            await turns(pause)
        await self.end()

    def arrive(self, fields: dict[str, Any], **more: Any) -> None:
        body = MappingProxyType({"model": "p/m", "messages": [{"role": "user"}], **fields})
        request_id = f"r{len(self.requests)}"
        try:
            ticket = self.desk.send("acme", CompletionAsk(request_id, body, **more))
        except OncewiseError:
            self.refused += 1
            return
        self.requests.append((ticket, asyncio.create_task(self.serve(request_id, ticket))))

    async def serve(self, request_id: str, ticket: CompletionTicket) -> None:
        """What a route does."""
        result, code = None, None
        with ticket:
            try:
                result = await ticket.result()
            except OncewiseError as error:
                code = error.code
            except asyncio.CancelledError:
                code = CLIENT_GONE
            now_s = asyncio.get_running_loop().time()
            self.accounts.close(Ended(request_id, "acme", "v1", False, 0.0, now_s, 0, code), ticket, result)

    def leave(self, n: int) -> None:
        if self.requests:
            self.requests[n % len(self.requests)][1].cancel()

    def cancel(self, n: int) -> None:
        if self.requests:
            run = self.requests[n % len(self.requests)][0].run
            if ("acme", run.call_id) in self.desk._runs:
                self.cancels.append(asyncio.create_task(self.desk.cancel("acme", run.call_id)))

    async def end(self) -> None:
        """Let everything come to its end, and look at the rows."""
        await self.desk.aclose(0.0)
        await asyncio.gather(*(task for _, task in self.requests), *self.cancels, return_exceptions=True)
        await turns(5)
        assert self.desk.flights.stats().tasks == 0
        # A request whose task was cancelled before its first step never came to its route.
        began = [ticket for ticket, _ in self.requests if ticket.accounted]
        assert len(self.rows) == len(began)
        assert len({ended.request_id for ended, _ in self.rows}) == len(self.rows)
        self.check_money()

    def check_money(self) -> None:
        paid = [share for _, share in self.rows if share.pays]
        # One payer a call, with all its attempts. A leader that never came to its route would be the exception.
        assert len({share.call_id for share in paid}) == len(paid)
        routed = {share.call_id for share in paid}
        led = [ticket for ticket, _ in self.requests if ticket.role in (Role.LEADER, Role.BYPASS)]
        if all(ticket.run.call_id in routed for ticket in led):
            assert sum(share.calls for share in paid) == len(self.provider.orders)
        for ended, share in self.rows:
            assert share.pays is (share.role in (Role.LEADER, Role.BYPASS))
            assert share.pays or share.calls == 0
            assert share.bill is not None
            if ended.error_code is None:
                assert (share.bill.told_usd, share.bill.usage.total_tokens) == (1.0, 3)
            # Whoever shares a call sees the same bill as whoever pays for it, if both are there at its end.
        told = {share.call_id: share.bill.told_usd for share in paid}
        for ended, share in self.rows:
            if ended.error_code is None and share.call_id in told:
                assert told[share.call_id] == 1.0


@given(histories)
@example([("share", 0, 3), ("share", 0, 0), ("say", 0, 2), ("leave", 0, 1), ("finish", 0, 3)])
@example([("sample", 0, 3), ("leave", 0, 1), ("retry", 0, 1), ("finish", 0, 3)])
@example([("share", 0, 3), ("leave", 0, 1), ("wait", 0, 0), ("share", 0, 3), ("finish", 1, 3)])
@example([("share", 0, 3), ("break", 0, 3), ("say", 1, 1), ("break", 1, 3)])
@example([("share", 0, 3), ("say", 0, 2), ("cancel", 0, 0), ("share", 0, 3), ("finish", 1, 2)])
@example([("share", 0, 3), ("leave", 0, 1), ("drain", 0, 3)])
def test_every_history_is_accounted_for(history: list[Op]) -> None:
    """See the module."""

    async def main() -> None:
        await History().play(history)

    run_virtual(main())
