"""What workers tell each other of shared work: who leads it, who is interested, and that it has ended.

A worker that follows work of another says so to its leader, and says it again every two seconds: that it waits, and
whether it wants the text. The leader counts it among those who wait, so that nobody's leaving ends what another needs,
and tells the relay the log for as long as somebody wants it. Interest that is not said again lapses. So a lost word,
an emptied server or a dead worker leaves nothing wrong for longer than a few seconds, and nobody keeps lists that must
survive. While nothing can be said at all nothing lapses.

Nothing here decides. Rows say who leads a turn and how it ended; a worker that is told nothing looks at the row.

Words go the quick way, and what must arrive also the slow one: through the database, where others look twice a second.

Deliberately absent: turns and calls (whatever is led is a `Led`), and who may ask for what.
"""

import asyncio
import hmac
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol, Self

from oncewise.core.coalesce import Waiter
from oncewise.core.errands import Errands
from oncewise.core.keys import request_key
from oncewise.core.relaying import Mirror, Outbox
from oncewise.core.stream_hub import StreamLog
from oncewise.errors import CoordinationUnavailable, Failure, NotFound, OncewiseError, TurnCancelled
from oncewise.ports import Coordination, Signal, Signals

__all__ = ["Fleet", "Following", "Led"]

RENEW_S = 2.0
LAPSE_S = 7.0
LINGER_S = 2.0
LOST_S = 20.0
"""For how long a lost worker is remembered: longer than anything that it holds by a lease."""
ASK_S = 1.0
ASK_SLOWLY_S = 2.5

_NOTHING: Mapping[str, Any] = MappingProxyType({})

Hearer = Callable[[Signal], None]
Answerer = Callable[[Signal], Mapping[str, Any] | None]


class Led(Protocol):
    """Shared work that this worker leads, as other workers may ask of it."""

    @property
    def requesters(self) -> int:
        """How many wait for it."""
        ...

    async def watch(self) -> StreamLog | None:
        """Its log, for a viewer."""
        ...

    def board(self) -> Waiter[Any] | None:
        """An interest in it for those who wait in another worker; None if it is over."""
        ...

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:
        """End it for everyone."""
        ...


class _Interest:
    """That of one other worker in one piece of work led here; it lapses unless it is said again."""

    def __init__(self) -> None:
        self.text = False
        self.waiter: Waiter[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.waiter is not None:
            self.waiter.leave()
            self.waiter = None


class _Leading:
    """A piece of work that is led here, and who is interested elsewhere."""

    def __init__(self, work: Led) -> None:
        self.work = work
        self.interests: dict[str, _Interest] = {}


class Following:
    """This worker's interest in work that another one leads. Made by `Fleet.follow`; `leave` ends it.

    Attributes:
        owner: Address of the worker that leads it now, as far as is known.
    """

    def __init__(self, fleet: "Fleet", name: str, owner: str, ended: Callable[[], None]) -> None:
        self.name = name
        self.owner = owner
        self.ended = ended
        self._fleet = fleet
        self._holds = False
        self._mirror: Mirror | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._saying: asyncio.Handle | None = None
        self._renew()

    def _renew(self) -> None:
        self.say()
        self._timer = asyncio.get_running_loop().call_later(RENEW_S, self._renew)

    def say(self) -> None:
        """Tell the leader of this interest now; what changes in one step is told in one word."""
        if self._saying is None:
            self._saying = asyncio.get_running_loop().call_soon(self._say)

    def _say(self) -> None:
        self._saying = None
        data = {"text": self._mirror is not None, "holds": self._holds}
        self._fleet.tell(Signal("follow", self.name, data=data), self.owner)

    def hold(self) -> None:
        """From now on requests wait for this work here."""
        self._holds = True
        self.say()

    def let_go(self, *, withdrawn: bool = False) -> None:
        """No request waits for it here any more.

        Args:
            withdrawn: The last one was cancelled and did not just leave; the work stops if nobody else waits.
        """
        self._holds = False
        word = Signal("let_go", self.name, data={"withdrawn": withdrawn})
        self._fleet.tell(word, self.owner, surely=withdrawn)

    def repeat(
        self,
        log: StreamLog,
        reset: Callable[[int], tuple[str, Mapping[str, Any]]],
        told: Callable[[], None],
        *,
        closes: bool = True,
    ) -> None:
        """Repeat the text of the work in a log of this worker; see `Mirror` for the rest."""
        relay = self._fleet.relay
        if self._mirror is None and relay is not None:
            self._mirror = Mirror(relay, self.name, log, reset, told, closes=closes)
            self.say()

    @property
    def heard(self) -> int:
        """Pieces of text that came so far."""
        return 0 if self._mirror is None else self._mirror.heard

    @property
    def ending(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and data of the end, once that came."""
        return None if self._mirror is None else self._mirror.ending

    def leave(self) -> None:
        """Be interested no more. Calling it again does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._saying is not None:
                self._saying.cancel()
            if self._mirror is not None:
                self._mirror.close()
            self._fleet.forget(self)
            self._fleet.tell(Signal("leave", self.name), self.owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.leave()


class Fleet:
    """This worker among the others. Made and closed by the composition root.

    Args:
        secret: Of the deployment; names are keyed with it.
        coordination: The quick way; None if there is none.
        slow: The way through the database; None where there are surely no others.
        keep_s: Seconds for which others may read a log after its last event.

    Attributes:
        relay, claims: Those of the quick way.
        errands: What is done beside requests, and ended with the fleet.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        coordination: Coordination | None = None,
        slow: Signals | None = None,
        keep_s: float = 60.0,
    ) -> None:
        self._secret = secret
        self._quick = None if coordination is None else coordination.signals
        self._slow = slow
        self.relay = None if coordination is None else coordination.relay
        self.claims = None if coordination is None else coordination.claims
        self._outbox = None if coordination is None else Outbox(coordination.relay, keep_s=keep_s)
        self.errands = Errands()
        self._led: dict[str, _Leading] = {}
        self._following: dict[str, list[Following]] = {}
        self._lost: dict[str, float] = {}
        self._hearers: dict[str, Hearer] = {
            "follow": self._followed,
            "let_go": self._let_go,
            "leave": self._left,
            "ended": self._told_end,
            "answer": self._answered,
        }
        self.answer("stop", self._stop)
        self._asked: dict[str, asyncio.Queue[Mapping[str, Any]]] = {}
        self._numbers = iter(range(1, 2**62))
        for signals in (self._quick, self._slow):
            if signals is not None:
                signals.listen(self._hear)

    @property
    def prompt(self) -> bool:
        """Whether others hear at once, as far as is known."""
        return self._quick is not None and self._quick.prompt

    @property
    def away(self) -> bool:
        """Whether there is a quick way, and it does not work."""
        return self._quick is not None and not self._quick.prompt

    @property
    def address(self) -> str:
        """Where others reach this worker; empty if there are none."""
        for signals in (self._quick, self._slow):
            if signals is not None:
                return signals.address
        return ""

    @property
    def idle(self) -> bool:
        """Whether there is nothing that another worker could have a word about."""
        return not (self._led or self._following or self._asked)

    def name(self, kind: str, tenant: str, *parts: Any) -> str:
        """What workers call a piece of work among each other. It tells nothing to who has not the secret."""
        digest = request_key(tenant, kind, *parts).digest
        return hmac.digest(self._secret, digest.encode("ascii"), "sha256").hex()

    # -- leading -------------------------------------------------------------------------------------------------

    def lead(self, name: str, work: Led) -> None:
        """Others may follow this work from now on."""
        self._led[name] = _Leading(work)

    def ended(self, name: str, work: Led, *, linger_s: float = 0.0) -> None:
        """Tell those who follow that there is an end to be read.

        Who comes late may still be told the log for `linger_s` seconds, where it is the only place of the end.
        """
        leading = self._led.get(name)
        if leading is None or leading.work is not work:
            return
        for address in leading.interests:
            self.tell(Signal("ended", name), address)
        if linger_s > 0:
            asyncio.get_running_loop().call_later(linger_s, self._drop, name, leading)
        else:
            self._drop(name, leading)

    def _drop(self, name: str, leading: _Leading) -> None:
        if self._led.get(name) is leading:
            del self._led[name]
        for interest in leading.interests.values():
            interest.end()
        leading.interests.clear()

    def _followed(self, signal: Signal) -> None:
        leading = self._led.get(signal.name)
        if leading is None:
            self.tell(Signal("ended", signal.name), signal.sender)
            return
        interest = leading.interests.setdefault(signal.sender, _Interest())
        if interest.timer is not None:
            interest.timer.cancel()
        interest.timer = asyncio.get_running_loop().call_later(LAPSE_S, self._lapse, signal, interest)
        interest.text = bool(signal.data.get("text"))
        self._count(leading, interest, holds=bool(signal.data.get("holds")))
        if interest.text and self._outbox is not None:
            self.errands.run(self._publish(signal.name, leading))

    @staticmethod
    def _count(leading: _Leading, interest: _Interest, *, holds: bool) -> None:
        if holds and interest.waiter is None:
            with suppress(OncewiseError):
                interest.waiter = leading.work.board()
        elif not holds and interest.waiter is not None:
            # That it let go was said as well, and may have been lost.
            interest.waiter.leave()
            interest.waiter = None

    async def _publish(self, name: str, leading: _Leading) -> None:
        log = await leading.work.watch()
        wanted = any(interest.text for interest in leading.interests.values())
        if log is not None and wanted and self._outbox is not None:
            self._outbox.publish(name, log)

    def _let_go(self, signal: Signal) -> None:
        leading = self._led.get(signal.name)
        if leading is None:
            return
        interest = leading.interests.get(signal.sender)
        if interest is not None and interest.waiter is not None:
            interest.waiter.leave()
            interest.waiter = None
        if signal.data.get("withdrawn") and leading.work.requesters == 0:
            leading.work.stop(TurnCancelled().failure())

    def _lapse(self, signal: Signal, interest: _Interest) -> None:
        if self.prompt:
            self._left(signal)
        else:
            # Nobody can say anything now. Whoever is still interested says so when that is over.
            interest.timer = asyncio.get_running_loop().call_later(LAPSE_S, self._lapse, signal, interest)

    def _left(self, signal: Signal) -> None:
        leading = self._led.get(signal.name)
        interest = None if leading is None else leading.interests.pop(signal.sender, None)
        if leading is None or interest is None:
            return
        interest.end()
        if self._outbox is not None and not any(other.text for other in leading.interests.values()):
            self._outbox.withdraw(signal.name)

    def _stop(self, signal: Signal) -> Mapping[str, Any] | None:
        leading = self._led.get(signal.name)
        if leading is None:
            return None
        keep_partial = bool(signal.data.get("keep_partial", True))
        leading.work.stop(TurnCancelled().failure(), keep_partial=keep_partial)
        return _NOTHING

    # -- following -----------------------------------------------------------------------------------------------

    def follow(self, name: str, owner: str, ended: Callable[[], None]) -> Following:
        """Follow work of another worker until that is left.

        Args:
            name: As `name` makes it.
            owner: Address of its leader.
            ended: Called when the leader says that it has ended, or that it does not lead it; must not block.
        """
        following = Following(self, name, owner, ended)
        self._following.setdefault(name, []).append(following)
        return following

    def owners_lost(self, owners: frozenset[str]) -> None:
        """Workers are lost: what they led has ended for whoever follows it here, or is about to."""
        until_s = asyncio.get_running_loop().time() + LOST_S
        self._lost = {address: at_s for address, at_s in self._lost.items() if not self._is_past(at_s)}
        self._lost.update(dict.fromkeys(owners, until_s))
        for followings in list(self._following.values()):
            for following in followings:
                if following.owner in owners:
                    following.ended()

    def is_lost(self, address: str) -> bool:
        """Whether a worker was lost a moment ago, so that what is said to be its own still is nobody's."""
        return address in self._lost and not self._is_past(self._lost[address])

    @staticmethod
    def _is_past(at_s: float) -> bool:
        return asyncio.get_running_loop().time() >= at_s

    def forget(self, following: Following) -> None:
        """For `Following.leave`."""
        others = self._following.get(following.name, [])
        if following in others:
            others.remove(following)
        if not others:
            self._following.pop(following.name, None)

    # -- words ---------------------------------------------------------------------------------------------------

    def stop(self, name: str, owner: str | None, *, keep_partial: bool = True) -> None:
        """Ask the leader of some work, or whoever leads it, to stop it for everyone. May be said again."""
        self.tell(Signal("stop", name, data={"keep_partial": keep_partial}), owner, surely=True)

    def tell(self, signal: Signal, to: str | None, *, surely: bool = False) -> None:
        """Send a word, without waiting.

        Args:
            signal: The word.
            to: Whom, or None for all others.
            surely: Also the slow way, should the quick one not be there.
        """
        if self.prompt or surely:
            self.errands.run(self._send(signal, to, surely=surely))

    async def _send(self, signal: Signal, to: str | None, *, surely: bool) -> Signals:
        """Send a word; return the way it went.

        Raises:
            CoordinationUnavailable: it went no way.
        """
        if self._quick is not None:
            try:
                await self._quick.send(signal, to)
            except CoordinationUnavailable:
                if not surely:
                    raise
            else:
                return self._quick
        if self._slow is None:
            raise CoordinationUnavailable
        await self._slow.send(signal, to)
        return self._slow

    async def ask(self, kind: str, name: str = "", data: Mapping[str, Any] = _NOTHING) -> Mapping[str, Any]:
        """Ask all other workers; return the first answer.

        Raises:
            NotFound: all that are there say no, or nobody says yes within a second or two.
        """
        number = str(next(self._numbers))
        answers: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self._asked[number] = answers
        try:
            way = self._quick if self.prompt else self._slow
            if way is None or await way.others() == 0:
                raise NotFound
            way = await self._send(Signal(kind, name, data={**data, "ask": number}), None, surely=True)
            return await self._answer(answers, await way.others(), ASK_S if way is self._quick else ASK_SLOWLY_S)
        except CoordinationUnavailable:
            raise NotFound from None
        finally:
            del self._asked[number]

    @staticmethod
    async def _answer(answers: "asyncio.Queue[Mapping[str, Any]]", others: int, patience_s: float) -> Mapping[str, Any]:
        refused: set[str] = set()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while len(refused) < others:
                    answer = await answers.get()
                    if answer["found"]:
                        return answer
                    refused.add(answer["sender"])
        raise NotFound

    def answer(self, kind: str, answerer: Answerer) -> None:
        """Answer what others ask of a kind: with values, or with None for no."""
        self._hearers[kind] = lambda signal: self._reply(signal, answerer(signal))

    def hear(self, kind: str, hearer: Hearer) -> None:
        """Be told of words of a kind."""
        self._hearers[kind] = hearer

    def _hear(self, signal: Signal) -> None:
        hearer = self._hearers.get(signal.kind)
        # A worker of another version may say what this one does not know.
        if hearer is not None:
            hearer(signal)

    def _told_end(self, signal: Signal) -> None:
        for following in list(self._following.get(signal.name, ())):
            following.ended()

    def _answered(self, signal: Signal) -> None:
        asked = self._asked.get(signal.name)
        if asked is not None:
            asked.put_nowait({**signal.data, "sender": signal.sender})

    def _reply(self, signal: Signal, answer: Mapping[str, Any] | None) -> None:
        number = signal.data.get("ask")
        if number is not None:
            data = {**(answer or {}), "found": answer is not None}
            self.tell(Signal("answer", number, data=data), signal.sender, surely=True)

    async def aclose(self) -> None:
        """Give what was said and told a moment to go out, then stop."""
        for name, leading in list(self._led.items()):
            self._drop(name, leading)
        if self._outbox is not None:
            await self._outbox.aclose()
        await self.errands.aclose()
