"""How far a fleet goes: the page is what the recorded costs make it, and its arithmetic is right."""

import re
from statistics import median
from xml.etree import ElementTree as ET

import pytest
from bench.fleet import scale
from bench.fleet.plot import Line, plot
from bench.fleet.scale import Costs, Load, Model, limits, load, parts

from tests.docs.reference import ROOT

FOLDER = ROOT / "docs" / "explanation"


@pytest.fixture(name="model", scope="module")
def _model() -> Model:
    return Model.of(scale.recorded())


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page, without the heads of its columns."""
    text = (FOLDER / "scale.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return lines[1:]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_and_its_plots_are_what_the_recorded_costs_make() -> None:
    """`python -m bench.fleet.scale` writes them."""
    documents = scale.recorded()
    assert (FOLDER / "scale.md").read_text() == scale.page(documents)
    for name, picture in scale.plots(documents).items():
        assert (FOLDER / name).read_text() == picture
        ET.fromstring(picture)


def test_the_rows_of_the_arithmetic_add_up() -> None:
    """As they stand on the page, to half a unit of their last digit each."""
    *each, whole = rows("The arithmetic, for 100 workers")
    for column, digit in ((1, 1.0), (2, 0.001), (3, 1.0), (4, 0.001)):
        assert sum(number(row[column]) for row in each) == pytest.approx(
            number(whole[column]), abs=digit * len(each) / 2
        )


def test_the_arithmetic_follows_from_the_table_of_costs() -> None:
    """Turns, and deltas, from the figures that a reader sees; they are rounded."""
    cost = {row[0]: row for row in rows("What work costs")}
    each = {row[0]: row for row in rows("The arithmetic, for 100 workers")}
    turn = cost["a turn, asked for as JSON, 1 s long"]
    assert number(each["turns"][3]) == pytest.approx(100 * 4 * number(turn[4]), rel=0.01)
    text = (FOLDER / "scale.md").read_text()
    deltas, us, seconds = re.findall(r"\n([\d,]+) x ([\d.]+) µs = ([\d.]+) s of processor time", text)[0]
    assert number(deltas) == pytest.approx(100 * 4 * 0.99 * 200)
    assert number(deltas) * float(us) / 1e6 == pytest.approx(float(seconds), rel=0.01)
    assert number(each["deltas, told and read once"][2]) == pytest.approx(float(seconds), abs=0.001)


def test_what_ends_first_is_named() -> None:
    """It is the one of the fewest workers, and the text says the same as the table."""
    table = rows("What ends first")
    ends = [number(row[1].removesuffix(" workers")) for row in table if row[1] != "-"]
    assert ends == sorted(ends)
    text = (FOLDER / "scale.md").read_text()
    assert f"**The first bottleneck is {table[0][0]}**, from {ends[0]:.0f} workers on" in text


# -- the model -----------------------------------------------------------------------------------------------------


def test_costs_are_differences_of_scenarios() -> None:
    """A follower costs what eleven requests cost more than one, by ten."""
    document = scale.recorded()["costs"]

    def sql_bytes(what: str) -> float:
        return median(run["sql_sent"] + run["sql_received"] for run in document["runs"] if run["what"] == what)

    by_hand = (sql_bytes("turn, 10 follow here") - sql_bytes("turn")) / 10
    assert scale.prices(document).here.sql_bytes == pytest.approx(by_hand)


def test_a_turn_takes_redis_and_sql_what_its_protocol_says() -> None:
    """Pacing takes three commands and the claim of the call two.

    A claim, an attempt, the end and the mark of what was shown are four transactions.
    """
    price = scale.prices(scale.recorded()["costs"])
    assert price.turn.commands == pytest.approx(5, abs=0.5)
    assert price.turn.writes == pytest.approx(4, abs=0.5)
    assert price.here.commands == pytest.approx(0, abs=0.2)
    assert price.shown.commands == 0
    assert 1 < price.passed_40.commands < price.passed_1.commands < 2.5


def test_what_grows_with_the_fleet_and_what_with_its_square(model: Model) -> None:
    """Twice the fleet costs twice as much, but for the looks for dead workers, which cost four times as much."""
    work = Load()
    for what, cost in parts(model, work, 1000).items():
        twice = parts(model, work, 2000)[what]
        wanted = 4 if what == "looks for dead workers" else 2
        if abs(cost.sql_us) > 1 and what != "followers at the same worker":
            assert twice.sql_us / cost.sql_us == pytest.approx(wanted, rel=0.01)


def test_one_worker_passes_nothing_on(model: Model) -> None:
    """No delta goes through Redis where nobody else is."""
    each = parts(model, Load(followers=5), 1)
    assert each["deltas, told and read once"] == Costs() == each["followers elsewhere"]


def test_followers_are_spread_over_workers_as_dice_fall() -> None:
    """Two followers at two workers: none, one or two of them elsewhere, which are at most one worker."""
    assert Load(followers=1).elsewhere(100) == pytest.approx(0.99)
    assert Load(followers=2).elsewhere(2) == pytest.approx(0.75)
    assert Load(followers=10_000).elsewhere(3) == pytest.approx(2)


def test_a_limit_ends_where_the_load_reaches_it(model: Model) -> None:
    """One worker fewer is fine."""
    work = Load()
    for limit, workers in limits(model, work):
        if workers is None:
            continue
        assert limit.used(load(model, work, workers), workers) > limit.of
        assert limit.used(load(model, work, workers - 1), workers - 1) <= limit.of


# -- plots ---------------------------------------------------------------------------------------------------------


def test_a_plot_can_be_read_on_light_and_on_dark_pages() -> None:
    """And without colours: each line has its label, and labels do not cover each other."""
    lines = [Line(name, [(1, value), (100, value * 1.01)]) for name, value in (("one & only", 5.0), ("other", 5.1))]
    picture = plot("Title", "workers", "cores", lines)
    assert "prefers-color-scheme: dark" in picture
    texts = [each for each in ET.fromstring(picture).iter() if each.tag.endswith("text")]
    labels = {each.text: float(each.get("y", 0)) for each in texts if each.text in ("one & only", "other")}
    assert abs(labels["one & only"] - labels["other"]) >= 14
