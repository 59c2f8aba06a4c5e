"""Linear programs over boxes, with lower bounds on their minimum that do not depend on a solver's tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np

from hecate.errors import UserError, install_hint

Term = tuple[Any, Any, Any]
"""variables, coefficients and rows, broadcast against each other: row r has the sum of coefficient·variable over all places where r is"""


class LinearProgram:
    """min c·x with A x <= a, B x = b and x in a box, put together block by block. Variables and rows are named by arrays of integers."""

    def __init__(self) -> None:
        self._lower: list[np.ndarray] = []
        self._upper: list[np.ndarray] = []
        self._count = 0
        self._cost: list[tuple[np.ndarray, np.ndarray]] = []
        self._at_most = _Rows()
        self._equal = _Rows()

    def variables(self, lower: Any, upper: Any) -> np.ndarray:
        """New variables, one for each entry of `lower` and `upper`, broadcast; both finite. Returns their indices, in that shape."""
        low, high = np.broadcast_arrays(np.asarray(lower, dtype=float), np.asarray(upper, dtype=float))
        assert (low <= high).all(), (low, high)
        indices = self._count + np.arange(low.size).reshape(low.shape)
        self._lower.append(low.ravel())
        self._upper.append(high.ravel())
        self._count += low.size
        return indices

    def minimize(self, variables: Any, coefficients: Any) -> None:
        """Add coefficient·variable to the objective."""
        columns, values = np.broadcast_arrays(np.asarray(variables), np.asarray(coefficients, dtype=float))
        self._cost.append((columns.ravel(), values.ravel()))

    def at_most(self, bounds: Any, *terms: Term) -> None:
        """Rows, one for each entry of the flattened `bounds`: the terms' sum is at most the bound."""
        self._at_most.add(bounds, terms)

    def equal(self, bounds: Any, *terms: Term) -> None:
        """Rows, one for each entry of the flattened `bounds`: the terms' sum is the bound."""
        self._equal.add(bounds, terms)

    def least(self, enough: float) -> float:
        """A number that the objective is nowhere below: its minimum within the solver's tolerance; `enough` or more if nothing is feasible.

        For multipliers y >= 0 of the inequalities and any v of the equations, c·x >= (c + yA + vB)·x - y·a - v·b wherever x is feasible,
        and over the box the right side's minimum is plain to see. The solver's multipliers make it the best.

        Raises:
            UserError: scipy is not installed.
        """
        try:
            from scipy.optimize import linprog
            from scipy.sparse import csr_array, hstack
        except ImportError as error:
            raise UserError(f"the lower bound needs scipy, which is not installed\n  {install_hint('bench')}") from error
        cost = np.zeros(self._count)
        for columns, values in self._cost:
            np.add.at(cost, columns, values)
        lower, upper = np.concatenate(self._lower), np.concatenate(self._upper)
        (A, a), (B, b) = ((csr_array(r.entries(), shape=(r.count, self._count)), r.bounds()) for r in (self._at_most, self._equal))
        result = linprog(cost, A, a, B, b, np.column_stack([lower, upper]), method="highs-ipm")
        if result.status == 2:
            # One more variable, dear, which at 1 lets x = lower pass: infeasible becomes expensive, with multipliers to show it.
            A = hstack([A, np.minimum(a - A @ lower, 0.0)[:, None]], format="csr")
            B = hstack([B, (b - B @ lower)[:, None]], format="csr")
            cost, lower, upper = np.append(cost, 10 * enough), np.append(lower, 0.0), np.append(upper, 1.0)
            result = linprog(cost, A, a, B, b, np.column_stack([lower, upper]), method="highs-ipm")
        if result.status != 0:  # numerical trouble: the box alone
            return float(np.minimum(cost * lower, cost * upper).sum())
        y, v = np.minimum(result.ineqlin.marginals, 0.0), result.eqlin.marginals
        reduced = cost - A.T @ y - B.T @ v
        return float(a @ y + b @ v + np.minimum(reduced * lower, reduced * upper).sum())


class _Rows:
    def __init__(self) -> None:
        self.count = 0
        self._bounds: list[np.ndarray] = []
        self._entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, bounds: Any, terms: tuple[Term, ...]) -> None:
        limits = np.asarray(bounds, dtype=float).ravel()
        for variables, coefficients, rows in terms:
            columns, values, places = np.broadcast_arrays(variables, coefficients, rows)
            columns, values, places = columns.ravel(), values.ravel().astype(float), places.ravel()
            kept = values != 0
            self._entries.append((values[kept], places[kept] + self.count, columns[kept]))
        self._bounds.append(limits)
        self.count += limits.size

    def bounds(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *self._bounds])

    def entries(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Values, and their rows and columns."""
        if not self._entries:
            return np.zeros(0), (np.zeros(0, dtype=int), np.zeros(0, dtype=int))
        values, places, columns = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        return values, (places, columns)
