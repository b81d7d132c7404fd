"""When does a cron expression fire next?

This file decides what a five-field cron expression means: whether it is legal, which minutes it names, and at which
instant it fires after a given one. It knows nothing of meshes, clocks or timers: every instant is an argument.
SPEC.md, chapter "Cron expressions", has the rules; their ids stand beside the lines that enforce them.

Theory of operation. Parsing turns each field into a sorted tuple of numbers, so matching is membership. The search
runs on the *wall clock*, field by field: the next month that is named, in it the next day, then hour, then minute;
nothing steps through time minute by minute, so a leap day years away costs microseconds. Only then is a wall time
turned into an instant, the one place that knows about daylight saving: a wall time may not exist (the clock jumped over
it) or exist twice (the clock went back). Fixed-time and wildcard jobs take these differently, as in Debian's cron.

    >>> cron = Cron("CRON_TZ=Europe/Riga 30 9 * * MON-FRI")
    >>> cron.next(datetime.fromisoformat("2026-01-02T12:00+00:00")).isoformat()
    '2026-01-05T09:30:00+02:00'
    >>> cron.explain()
    'at 09:30 on Monday to Friday, Europe/Riga'

Sections: 1 limits and tables, 2 the error, 3 parsing, 4 the schedule, 5 wall clock, 6 wall clock to instant, 7 words.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from calendar import monthrange
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import MAXYEAR, date, datetime, time, timedelta, timezone, tzinfo
from typing import NamedTuple
from zoneinfo import ZoneInfo

# --- 1. Limits and tables ---------------------------------------------------------------------------------------------

MAX_LENGTH = 256  # characters of a whole expression
HORIZON = 100  # years; the rarest date, 29 February on a given weekday, can be 40 years away
UTC = timezone.utc
MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)
ZONE_PREFIX = "CRON_TZ="
MONTHS = tuple("January February March April May June July August September October November December".split())
WEEKDAYS = tuple("Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split())


class Field(NamedTuple):
    """One of the five positions: the range of its numbers, and names, where `names[i]` stands for `low + i`."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


FIELDS = (  # CRON-1, CRON-3
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day-of-month", 1, 31),
    Field("month", 1, 12, MONTHS),
    Field("day-of-week", 0, 7, WEEKDAYS),
)
MACROS = {  # CRON-4
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

# part = ( "*" / value [ "-" value ] ) [ "/" digits ]; the text is ASCII by now (CRON-8)
PART = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?")
# zone = word *( "/" word ), so that a name can never lead out of the time zone database
ZONE = re.compile(r"[A-Za-z][\w+-]*(?:/[\w+-]+)*")

# --- 2. The error -----------------------------------------------------------------------------------------------------


class CronError(ValueError):
    """The expression is not legal. The only exception that parsing raises (CRON-7).

    `field` is the name of one of FIELDS, "zone", or "expression" when no single field is to blame; `part` is the
    offending text; `problem` says what is wrong with it. `str()` joins the three.
    """

    def __init__(self, field: str, part: str, problem: str) -> None:
        super().__init__(field, part, problem)
        self.field, self.part, self.problem = field, part, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.part!r}: {self.problem}"


# --- 3. Parsing -------------------------------------------------------------------------------------------------------


def _split(expr: str) -> tuple[tzinfo, list[str]]:
    """Cut an expression into its zone and its five fields, macros replaced."""
    _check_text(expr)
    words = expr.split()
    zone = _zone(words.pop(0).removeprefix(ZONE_PREFIX)) if expr.lstrip().startswith(ZONE_PREFIX) else UTC  # CRON-5
    if len(words) == 1 and words[0].startswith("@"):
        if words[0].lower() not in MACROS:
            raise CronError("expression", words[0], "is none of " + " ".join(MACROS))
        words = MACROS[words[0].lower()].split()
    if len(words) != len(FIELDS):  # CRON-1
        raise CronError("expression", " ".join(words), f"has {len(words)} fields; five are needed")
    return zone, words


def _check_text(expr: str) -> None:
    """Refuse what no later step should have to think about: other types, long input, strange characters."""
    if not isinstance(expr, str):
        raise CronError("expression", type(expr).__name__, "is not text")
    if len(expr) > MAX_LENGTH:  # CRON-8
        raise CronError("expression", expr[:20], f"begins a text longer than {MAX_LENGTH} characters")
    for char in expr:
        if not (" " <= char <= "~" or char == "\t"):  # CRON-8
            raise CronError("expression", char, "is not a printable ASCII character")


def _zone(name: str) -> tzinfo:
    """The time zone called `name`. UTC needs no time zone data base."""
    if name == "UTC":
        return UTC
    try:
        if ZONE.fullmatch(name):
            return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # no such file; a file that is not a zone; a directory
        pass
    raise CronError("zone", name, "is not a known time zone")  # CRON-5


def _numbers(field: Field, text: str) -> tuple[int, ...]:
    """All numbers that a field's comma-separated list names, sorted."""
    return tuple(sorted({number for part in text.split(",") for number in _part(field, part)}))  # CRON-2


def _part(field: Field, part: str) -> range:
    """The numbers of one part: `*`, `a`, `a-b`, `*/n`, `a-b/n` or `a/n`, which runs to the field's end (CRON-2)."""
    match = PART.fullmatch(part)
    if not match:
        raise CronError(field.name, part, "is not a value, a range or a step" if part else "is an empty part")
    first, last, step = match.groups()
    low = _value(field, part, first) if first else field.low
    high = _value(field, part, last) if last else low if first and not step else field.high
    if high < low and last.upper() == "SUN":
        high = 7  # CRON-3: a range may end on Sunday
    if high < low:
        raise CronError(field.name, part, "runs backwards")  # CRON-7
    if step and not int(step):
        raise CronError(field.name, part, "has a step of 0")  # CRON-7
    return range(low, high + 1, int(step or 1))


def _value(field: Field, part: str, word: str) -> int:
    """A number or, in any case of letters, a name of three letters (CRON-3)."""
    names = [name[:3].upper() for name in field.names]
    if word.upper() in names:
        return field.low + names.index(word.upper())
    if not word.isdigit():
        raise CronError(field.name, part, f"{word} is not a number" + (" or a three-letter name" if names else ""))
    if not field.low <= int(word) <= field.high:
        raise CronError(field.name, part, f"{word} is outside {field.low}-{field.high}")  # CRON-7
    return int(word)


# --- 4. The schedule --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Cron:
    """A parsed cron expression: an immutable value. Raises CronError if `expr` is not legal.

    Two are equal, and hash alike, when they have the same fields and zone, however these were spelled.
    """

    expr: str = field(compare=False)  # as written, but single spaces
    zone: tzinfo = field(init=False)
    minutes: tuple[int, ...] = field(init=False)
    hours: tuple[int, ...] = field(init=False)
    days: tuple[int, ...] = field(init=False)
    months: tuple[int, ...] = field(init=False)
    weekdays: tuple[int, ...] = field(init=False)  # 1 Monday to 7 Sunday, as in date.isoweekday()
    either: bool = field(init=False)  # True: one matching day field is enough. False: both must match
    wildcard: bool = field(init=False)  # True: follows the clock through daylight saving (CRON-14)

    def __post_init__(self) -> None:
        zone, texts = _split(self.expr)
        minutes, hours, days, months, weekdays = (_numbers(f, text) for f, text in zip(FIELDS, texts))
        star = [text.startswith("*") for text in texts]
        expr = " ".join(self.expr.split())
        values = dict(expr=expr, zone=zone, minutes=minutes, hours=hours, days=days, months=months)
        values["weekdays"] = tuple(sorted({day or 7 for day in weekdays}))  # CRON-3: 0 and 7 are Sunday
        values["either"] = not star[2] and not star[4]  # CRON-6
        values["wildcard"] = star[0] or star[1]  # CRON-14
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else
        if not self.either and min(days) > max(monthrange(2000, month)[1] for month in months):  # a leap year
            raise CronError("day-of-month", texts[2], "never occurs in the months named")  # CRON-9

    def __repr__(self) -> str:
        return f"Cron({self.expr!r})"

    def __str__(self) -> str:
        return self.expr

    def next(self, after: datetime) -> datetime:
        """The first firing strictly later than `after` (aware), in the schedule's zone (CRON-10).

        Raises TypeError for a naive `after`; CronError if there is none in HORIZON years or before the calendar ends.
        Compare it in UTC: to Python a wall time that exists twice equals no time of another zone (PEP 495).
        """
        try:
            return self._next(_utc(after))
        except OverflowError:
            raise CronError("expression", self.expr, "does not fire again") from None  # CRON-9

    def iter(self, after: datetime) -> Iterator[datetime]:
        """Every firing later than `after` (aware), in order. Raises as `next` does."""
        while True:
            after = self.next(after)
            yield after

    def matches(self, moment: datetime) -> bool:
        """Whether the schedule fires in the minute that contains `moment`. Raises TypeError if `moment` is naive."""
        minute = _utc(_utc(moment).astimezone(self.zone).replace(second=0, microsecond=0))
        try:
            return self.next(minute - SECOND) < minute + MINUTE
        except CronError:
            return False

    # --- 5. Wall clock: no zone, no daylight saving ------------------------------------------------------------------

    def _wall(self, start: datetime) -> datetime:
        """The first wall time at or after the minute of `start` that the fields name."""
        for day in self._days(start.date()):
            at = self._time(start.time() if day == start.date() else time.min)
            if at is not None:
                return datetime.combine(day, at)
        raise OverflowError("the calendar ends")

    def _days(self, start: date) -> Iterator[date]:
        """Named days from `start` on. Visits only named months and, where it can, only named days (CRON-11)."""
        candidates = range(1, 32) if self.either else self.days
        for year in range(start.year, MAXYEAR + 1):
            for month in self.months:
                if (year, month) < (start.year, start.month):
                    continue
                length = monthrange(year, month)[1]
                for number in candidates:
                    if number <= length and (day := date(year, month, number)) >= start and self._fits(day):
                        yield day

    def _fits(self, day: date) -> bool:
        """Whether the two day fields together accept `day` (CRON-6)."""
        in_month, in_week = day.day in self.days, day.isoweekday() in self.weekdays
        return (in_month or in_week) if self.either else (in_month and in_week)

    def _time(self, start: time) -> time | None:
        """The first named time of day at or after the minute of `start`, None if the day has no more."""
        for hour in self.hours:
            if hour > start.hour:
                return time(hour, self.minutes[0])
            if hour == start.hour and start.minute <= self.minutes[-1]:
                return time(hour, self.minutes[bisect_left(self.minutes, start.minute)])
        return None

    # --- 6. Wall clock to instant: daylight saving --------------------------------------------------------------------

    def _next(self, now: datetime) -> datetime:
        """As `next`, for an instant in UTC; raises OverflowError if there is none."""
        local = now.astimezone(self.zone)
        wall = local.replace(tzinfo=None)
        if not self.wildcard:
            return self._search(wall, now, fold=0)  # CRON-13: of a repeated time, the first
        found = self._search(wall, now, local.fold)
        repeats = _utc(local.replace(fold=1)) - now  # how far the clock will go back over this minute, if it does
        if repeats:  # CRON-14: and what it then shows again counts again
            found = min(found, self._search(wall - repeats, now, fold=1), key=_utc)
        return found

    def _search(self, wall: datetime, now: datetime, fold: int) -> datetime:
        """The first firing after `now` among wall times from `wall` on, repeated ones read as PEP 495's `fold` says."""
        while wall.year <= now.year + HORIZON:
            wall = self._wall(wall)
            when, missing = self._instant(wall, fold)
            local = when.astimezone(self.zone)
            if when > now and not (missing and self.wildcard):  # CRON-10; CRON-14: a lost minute is not made up for
                return local
            wall = max(wall + MINUTE, local.replace(tzinfo=None))  # past a gap in one step
        raise OverflowError("all that it names falls into gaps")

    def _instant(self, wall: datetime, fold: int) -> tuple[datetime, bool]:
        """(When the clock shows `wall`, False); if it never does, (when the gap ends, True). In UTC. CRON-12"""
        first, second = (_utc(wall.replace(tzinfo=self.zone, fold=f)) for f in (0, 1))
        if first > second:  # PEP 495: so it is for a missing time, and the change lies between the two
            return self._turn(second, first), True
        return (second if fold else first), False

    def _turn(self, early: datetime, late: datetime) -> datetime:
        """The instant in (early, late] at which the zone's clock changes, by bisection to the second."""
        before = early.astimezone(self.zone).utcoffset()

        def changed(seconds: int) -> bool:
            return (early + SECOND * seconds).astimezone(self.zone).utcoffset() != before

        return early + SECOND * bisect_left(range((late - early) // SECOND), True, key=changed)

    # --- 7. Words -----------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The schedule in English."""
        months = "in " + _list(self.months, MONTHS, 1) if len(self.months) < 12 else ""
        return " ".join(filter(None, [self._time_words(), self._day_words(), months])) + f", {self.zone}"

    def _time_words(self) -> str:
        if len(self.minutes) == 1 and len(self.hours) <= 3:
            return "at " + _join([f"{hour:02}:{self.minutes[0]:02}" for hour in self.hours])
        hours = f" of hour {_list(self.hours)}" if len(self.hours) < 24 else ""
        step = 60 // len(self.minutes)
        if step == 60 or self.minutes != tuple(range(0, 60, step)):
            return f"at minute {_list(self.minutes)}" + (hours or " of every hour")
        return ("every minute" if step == 1 else f"every {step} minutes") + hours

    def _day_words(self) -> str:
        days = f"on day {_list(self.days)} of the month" if len(self.days) < 31 else ""
        weekdays = f"on {_list(self.weekdays, WEEKDAYS)}" if len(self.weekdays) < 7 else ""
        if days and weekdays:
            return f"{days} or {weekdays}" if self.either else f"{days} if {weekdays}"
        return "" if self.either else days or weekdays


def _list(numbers: Sequence[int], names: Sequence[str] = (), low: int = 0) -> str:
    """Sorted numbers in words, `names` beginning at `low`; three or more in a row become a range."""
    runs: list[list[str]] = []
    for previous, number in zip((None, *numbers), numbers):
        if number - 1 != previous:
            runs.append([])
        runs[-1].append(names[(number - low) % len(names)] if names else str(number))
    return _join([word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)])


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _utc(moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        raise TypeError("a datetime without a time zone does not name an instant")
    return moment.astimezone(UTC)
