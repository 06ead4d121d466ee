"""Numbers as a person reads them. In: seconds, bytes, rates. Out: short text."""


def in_words_s(seconds: float) -> str:
    """Two units at most: 120 ms, 45 s, 3 min 20 s, 1 h 12 min, 2 d 4 h."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def in_words_bytes(size: float) -> str:
    """Binary units, three digits: 12.3 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def in_words_rate(per_s: float) -> str:
    """Images a second: whole from 100 on, with thousands apart."""
    return f"{per_s:,.0f} images/s" if per_s >= 100 else f"{per_s:.3g} images/s"


def in_words_share(share: float) -> str:
    """A share as per cent: 0.4 %, 38 %."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
