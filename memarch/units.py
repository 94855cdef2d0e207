"""Numbers as people say them."""


def count(n: int) -> str:
    """1234 -> 1.23k: three digits that matter."""
    return _scaled(n, 1000, ("", "k", "M", "G", "T"))


def size(n: int) -> str:
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(n: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(n), 0
    while value >= 999.5 and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{units[unit]}"
