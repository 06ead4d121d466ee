"""Functions that give the same bits on every machine.

In and out: float64. They use only operations that IEEE 754 rounds exactly (+ - * / sqrt, and moving the binary point),
never the machine's exp, log or cos, whose last bits differ from one library to the next.
"""

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

_LN2 = 0.6931471805599453
_HALF_PI = 1.5707963267948966


def exp(x: F64) -> F64:
    """e^x to 13 digits for |x| up to 8: a short series at x/1024, squared ten times."""
    y = x / 1024
    y = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5))))
    for _ in range(10):
        y = y * y
    return y


def log(x: float) -> float:
    """The inverse of `exp` by Newton's rule."""
    y = 0.0
    for _ in range(64):
        y += x / float(exp(np.float64(y))) - 1  # type: ignore[arg-type]  # a scalar is an array of no axes
    return y


def power(base: F64, exponent: float) -> F64:
    """base^exponent for bases in (0, 1] and exponents of 0 and more, to 12 digits; 0 where it is below 1e-300."""
    mantissa, places = np.frexp(base)  # base = mantissa * 2^places, with a mantissa in [0.5, 1)
    z = (mantissa - 1) / (mantissa + 1)
    series = np.zeros_like(z)
    for n in range(33, 0, -2):  # log(mantissa) = 2 artanh(z), and |z| is at most 1/3
        series = series * (z * z) + 1.0 / n
    x = exponent * (places * _LN2 + 2 * z * series)
    turns = np.maximum(np.rint(x / _LN2), -1000.0)
    result = np.ldexp(exp(np.maximum(x - turns * _LN2, -1.0)), turns.astype(np.int32))
    return np.where(x < -690.0, 0.0, np.minimum(result, 1.0))


def quarter_cosine(share: F64) -> F64:
    """cos(share * pi/2) for shares in [0, 1], to 13 places: a series at an eighth of the angle, doubled three times."""
    angle = share * (_HALF_PI / 8)
    square = angle * angle
    y = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56 * (1 - square / 90))))
    for _ in range(3):
        y = 2 * y * y - 1
    return y


def sin_cos(x: F64) -> tuple[F64, F64]:
    """Sine and cosine to 12 digits for |x| up to pi, by their series."""
    term, sums = np.ones_like(x), [np.zeros_like(x), np.ones_like(x)]
    for n in range(1, 28):
        term = term * x / n
        sums[n % 2 == 0] = sums[n % 2 == 0] + (term if n % 4 < 2 else -term)
    return sums[0], sums[1]
