"""Rules that the configurations share. Each raises `UsageError`: first the rule, then what was received."""

import re

from catdog.errors import UsageError


def flag(field: str) -> str:
    """The command-line flag of a field.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + field.rstrip("_").replace("_", "-")


def require(condition: bool, rule: str, received: object) -> None:
    """Raise `UsageError` with the rule and what was received, unless `condition` holds. `rule` opens with the flag."""
    if not condition:
        name = rule.split()[0]
        raise UsageError(f"{rule}. Received: {name}={received}")


def at_least(config: object, minimum: int, *fields: str) -> None:
    """Each field is None, or at least `minimum`."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or value >= minimum, f"{flag(field)} must be at least {minimum}", value)


def in_order(config: object, low: str, high: str) -> None:
    """The field `low` is at most the field `high`, where both are given."""
    least, most = getattr(config, low), getattr(config, high)
    if least is not None and most is not None and least > most:
        raise UsageError(f"{flag(low)} must be at most {flag(high)}. Received: {flag(low)}={least} {flag(high)}={most}")


def is_url(config: object, *fields: str) -> None:
    """Each field is None, or has a character that is no space."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or bool(value.strip()), f"{flag(field)} must be a path or a URL", repr(value))


def is_fraction(config: object, *fields: str) -> None:
    """Each field is a number between 0 and 1, both included."""
    for field in fields:
        value = getattr(config, field)
        require(0 <= value <= 1, f"{flag(field)} must lie between 0 and 1", value)


def is_time_of_day(config: object, field: str) -> None:
    """The field is None, or a time such as 06:00."""
    value = getattr(config, field)
    is_time = value is None or re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value) is not None
    require(is_time, f"{flag(field)} must be a time from 00:00 to 23:59", value)


def are_urls(config: object, field: str) -> None:
    """The field is a tuple of at least one text, and each has a character that is no space."""
    urls = getattr(config, field)
    require(bool(urls), f"{flag(field)} must name a place", "()")
    for url in urls:
        require(bool(url.strip()), f"{flag(field)} must be a path or a URL", repr(url))


def are_globs(config: object, *fields: str) -> None:
    """Each field is a tuple of texts, and each has a character that is no space."""
    for field in fields:
        for glob in getattr(config, field):
            require(bool(glob.strip()), f"{flag(field)} must be a glob", repr(glob))
