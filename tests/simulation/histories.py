"""One seed, one history: who asks what and when, and what breaks meanwhile.

Faults are those of processes, networks, databases and providers. They are few in each history, so that what was
promised about each can be checked; over many seeds they meet in every way.

Deliberately absent: what must hold at the end (`tests.simulation.check`).
"""

from collections.abc import Callable

from tests.simulation.fleet import DELTAS, Fleet, Parts
from tests.simulation.world import World

__all__ = ["FAULTS", "PATIENCE_S", "history"]

PATIENCE_S = 300.0
"""When the last client must have been answered: three turns in a row, each lost twice and waiting for its lease."""

ORGS = ("acme", "other")


def history(seed: int, parts: Parts = Parts()) -> Fleet:  # noqa: B008  frozen
    """Run the history of a seed to its end, faults healed and leases lapsed."""
    world = World(seed)
    chance = world.chance
    fleet = Fleet(world, parts, rps=chance.choice([1000.0, 1000.0, 2.0]))
    if chance.random() < 0.6:
        fleet.between = parts.between(world)
    for _ in range(chance.randint(1, 3)):
        fleet.add_worker()
    _ask(fleet)
    if chance.random() < 0.3:
        fleet.broke = True
        fleet.script += [(chance.choice(["refused", "cut", "eof"]), chance.randint(0, DELTAS)) for _ in range(2)]
    if chance.random() < 0.75:
        fleet.broke = True
        for _ in range(chance.randint(1, 3)):
            world.after(chance.uniform(0.0, 3.0), _break, fleet, chance.choice(FAULTS))
    world.run(PATIENCE_S, lambda: fleet.settled)
    world.loss, fleet.database_down = 0.0, False
    if fleet.between is not None:
        fleet.between.down = False
    # What is left running ends, and what was lost is swept.
    world.run(world.now_s + 60.0, lambda: False)
    return fleet


def _ask(fleet: Fleet) -> None:
    chance = fleet.world.chance
    for org_id in ORGS[: chance.choice([1, 2])]:
        for number in range(chance.choice([1, 1, 2])):
            thread_id = f"{org_id}-{number}"
            fleet.records.make_thread(org_id, thread_id)
            contents = ["same"] if chance.random() < 0.6 else ["same", "next"]
            keyed = chance.random() < 0.5
            for _ in range(chance.randint(2, 5)):
                content = chance.choice(contents)
                fleet.send(
                    chance.uniform(0.0, 2.0),
                    org_id,
                    thread_id,
                    content,
                    stream=chance.random() < 0.5,
                    idempotency_key=content if keyed else None,
                )

    for org_id in ORGS[: chance.choice([0, 0, 1, 2])]:
        for _ in range(chance.randint(1, 4)):
            fleet.ask(chance.uniform(0.0, 2.0), org_id, "same")


# -- faults ------------------------------------------------------------------------------------------------------


def _break(fleet: Fleet, fault: Callable[[Fleet], None]) -> None:
    fleet.world.counts[fault.__name__.strip("_").replace("_", " ")] += 1
    fault(fleet)


def _crash(fleet: Fleet) -> None:
    if fleet.workers:
        chance = fleet.world.chance
        fleet.crash(chance.choice(fleet.workers), restart_s=chance.choice([0.2, 2.0, 20.0]))


def _pause(fleet: Fleet) -> None:
    if fleet.workers:
        chance = fleet.world.chance
        chance.choice(fleet.workers).machine.pause(chance.choice([0.5, 4.0, 15.0]))


def _lose(fleet: Fleet) -> None:
    world = fleet.world
    world.loss = world.chance.choice([0.05, 0.3])
    world.after(world.chance.uniform(0.5, 5.0), setattr, world, "loss", 0.0)


def _slow(fleet: Fleet) -> None:
    world = fleet.world
    world.slowest_s = world.chance.choice([0.3, 2.0])
    world.after(world.chance.uniform(0.5, 5.0), setattr, world, "slowest_s", 0.01)


def _stop_database(fleet: Fleet) -> None:
    fleet.database_down = True
    fleet.world.after(fleet.world.chance.uniform(0.2, 12.0), setattr, fleet, "database_down", False)


def _step_clock(fleet: Fleet) -> None:
    # Of the database's clock. Far back is left out: every lease would last as much longer, which nobody promises away.
    fleet.database_skew_s += fleet.world.chance.choice([-1.0, 1.0, 20.0, 3600.0])


def _stop_between(fleet: Fleet) -> None:
    if fleet.between is not None:
        fleet.between.down = True
        fleet.world.after(fleet.world.chance.choice([0.3, 5.0, 20.0]), setattr, fleet.between, "down", False)


def _flush_between(fleet: Fleet) -> None:
    if fleet.between is not None:
        fleet.between.flush()


FAULTS = (
    _stop_between,
    _flush_between,
    _crash,
    _crash,
    _pause,
    _pause,
    _lose,
    _slow,
    _stop_database,
    _step_clock,
)
