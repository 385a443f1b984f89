"""The polynomials of exp2 in simd.hpp are those of minimax.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

CPU = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


@pytest.mark.parametrize(
    ("dtype", "degree", "exact_at_zero", "documented"), [("float", 5, True, 9.2e-8), ("double", 11, False, 4e-18)]
)
def test_coefficients(dtype, degree, exact_at_zero, documented):
    code = (CPU / "simd.hpp").read_text()
    body = re.search(rf"Vec<{dtype}> exp2\(.*?\n}}\n", code, re.DOTALL)[0]
    written = re.findall(r"(?:p = splat\(|p \* f \+ )([\d.e-]+)", body)
    coefficients, error = runpy.run_path(str(CPU / "minimax.py"))["minimax"](degree, exact_at_zero)
    rounded = np.float32 if dtype == "float" else np.float64
    assert [rounded(x) for x in written] == [rounded(str(x)) for x in reversed(coefficients)]
    print(f"{dtype}: largest relative error {float(error):.3g} before the coefficients are rounded")
    assert error < documented
    assert f"{documented:.2g}".replace("e-0", "e-") in code.split("template <bool Clamp>")[0]
