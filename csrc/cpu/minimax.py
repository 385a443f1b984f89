"""Makes the polynomials of exp2 in simd.hpp, and prints how far they are from 2^x.

    python csrc/cpu/minimax.py

Remez's exchange: of the polynomials p of a degree, the one whose largest relative error p(x) / 2^x - 1 on [-1/2, 1/2]
is smallest. Its error takes that value, with alternating signs, at one place more than it has free coefficients.
"""

from __future__ import annotations

from mpmath import mp, mpf

mp.dps = 40
SAMPLES = 4000  # of the interval, where the largest errors are looked for


def minimax(degree: int, exact_at_zero: bool) -> tuple[list[mpf], mpf]:
    """The coefficients, that of x^0 first, and the largest relative error.

    With `exact_at_zero` the first is 1. The error is then 0 at 0, where its sign changes once more than it alternates.
    """
    powers = range(1 if exact_at_zero else 0, degree + 1)
    constant = 1 if exact_at_zero else 0
    grid = [mpf(i) / SAMPLES - mpf(1) / 2 for i in range(SAMPLES + 1)]
    two_to = [mp.power(2, x) for x in grid]
    count = len(powers) + 1
    places = [round(SAMPLES * (1 - mp.cos(mp.pi * (2 * i + 1) / (2 * count))) / 2) for i in range(count)]  # Chebyshev's
    while True:
        system, right = mp.matrix(count, count), mp.matrix(count, 1)
        for row, place in enumerate(places):
            x = grid[place]
            sign = (-1) ** row * (-1 if exact_at_zero and x < 0 else 1)
            for column, power in enumerate(powers):
                system[row, column] = x**power
            system[row, count - 1] = sign * two_to[place]
            right[row] = two_to[place] - constant
        solved = list(mp.lu_solve(system, right))
        coefficients = [mpf(1)] * constant + solved[:-1]
        errors = [mp.polyval(coefficients[::-1], x) / y - 1 for x, y in zip(grid, two_to, strict=True)]
        found = extrema(errors, count)
        if found == places:
            return coefficients, max(map(abs, errors))
        places = found


def extrema(errors: list[mpf], count: int) -> list[int]:
    """Where each stretch of one sign of the errors is largest: the `count` stretches with the largest."""
    peaks: list[int] = []
    for i, error in enumerate(errors):
        if error == 0:
            continue
        if peaks and (errors[peaks[-1]] > 0) == (error > 0):
            peaks[-1] = max(peaks[-1], i, key=lambda at: abs(errors[at]))
        else:
            peaks.append(i)
    return sorted(sorted(peaks, key=lambda at: -abs(errors[at]))[:count])


if __name__ == "__main__":
    for dtype, degree, exact_at_zero, digits in (("float", 5, True, 12), ("double", 11, False, 20)):
        coefficients, error = minimax(degree, exact_at_zero)
        print(f"{dtype}: largest relative error {mp.nstr(error, 3)} before the coefficients are rounded")
        for power, coefficient in reversed(list(enumerate(coefficients))):
            print(f"  x^{power:<3}{mp.nstr(coefficient, digits)}")
