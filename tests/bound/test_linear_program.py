from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from testing.bound.linear_program import LinearProgram

optimize = pytest.importorskip("scipy.optimize")


def two_variables(total: float) -> LinearProgram:
    """min 2x + 3y with x + y = total, x <= y + 1, x <= 10, x and y in [0, 4]."""
    program = LinearProgram()
    x, y = program.variables([0.0, 0.0], 4.0)
    program.minimize([x, y], [2.0, 3.0])
    program.equal([total], ([x, y], 1.0, 0))
    program.at_most([1.0, 10.0], (x, 1.0, [0, 1]), (y, -1.0, 0))
    return program


def test_a_minimum_by_hand() -> None:
    # As much x as may be: x = 3, y = 2.
    assert two_variables(5.0).least(100.0) == pytest.approx(12.0)


@pytest.mark.parametrize("total", [-1.0, 9.0])
def test_what_is_not_feasible_is_dear(total: float) -> None:
    assert two_variables(total).least(100.0) >= 100.0


def test_rows_of_one_block_and_of_the_next() -> None:
    program = LinearProgram()
    x = program.variables(np.zeros((2, 3)), 10.0)
    program.minimize(x, np.array([[1.0, 2.0, 3.0]]))
    # Each row of x sums to 6 at least; its first column to 5 at most; its second entry is 2 at most in either row.
    program.at_most([-6.0, -6.0], (x, -1.0, np.array([[0], [1]])))
    program.at_most([5.0], (x[:, 0], 1.0, 0))
    program.at_most([2.0, 2.0], (x[:, 1], 1.0, np.arange(2)))
    # Of 12, 5 at 1, 4 at 2 and 3 at 3.
    assert program.least(100.0) == pytest.approx(5 + 8 + 9)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_solver_says_it_is_no_more_than_the_minimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, random = optimize.linprog, np.random.default_rng(seed)

    def careless(*args: Any, **kwargs: Any) -> Any:
        found = solve(*args, **kwargs)

        def off(multipliers: np.ndarray) -> SimpleNamespace:
            return SimpleNamespace(marginals=multipliers + random.normal(0, 2, multipliers.shape))

        return SimpleNamespace(status=0, ineqlin=off(found.ineqlin.marginals), eqlin=off(found.eqlin.marginals))

    monkeypatch.setattr(optimize, "linprog", careless)
    assert two_variables(5.0).least(100.0) <= 12.0 + 1e-9


def test_a_solver_that_gives_up_leaves_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "linprog", lambda *args, **kwargs: SimpleNamespace(status=4))
    assert two_variables(5.0).least(100.0) == 0.0
