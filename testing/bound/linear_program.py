"""Linear programs with bounded variables, and lower bounds on their minimum that do not depend on a solver's tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np

from hecate.errors import UserError, install_hint

Term = tuple[Any, Any, Any]
"""arrays of variables, coefficients and rows, broadcast against each other; row r is the sum of coefficient·variable where the row is r"""


class LinearProgram:
    """The program min c·x with A x <= a, B x = b and every x between two bounds, built block by block.

    Variables and rows are identified by integers, in arrays of any shape.
    """

    def __init__(self) -> None:
        self._lower: list[np.ndarray] = []
        self._upper: list[np.ndarray] = []
        self._count = 0
        self._cost: list[tuple[np.ndarray, np.ndarray]] = []
        self._at_most = _Rows()
        self._equal = _Rows()

    def variables(self, lower: Any, upper: Any) -> np.ndarray:
        """Add a variable for each entry of `lower` and `upper`, broadcast and finite. Returns the variables' indices in that shape."""
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
        """Add a row for each entry of the flattened `bounds`: the sum of the terms is at most the bound."""
        self._at_most.add(bounds, terms)

    def equal(self, bounds: Any, *terms: Term) -> None:
        """Add a row for each entry of the flattened `bounds`: the sum of the terms equals the bound."""
        self._equal.add(bounds, terms)

    def least(self, enough: float) -> float:
        """Return a lower bound on the objective. It is close to the minimum, or at least `enough` if no x is feasible.

        For any multipliers y >= 0 of the inequalities and v of the equations, c·x >= (c + yA + vB)·x - y·a - v·b for every feasible x
        (Lagrangian duality). The minimum of the right side over the variables' bounds is found entry by entry, so the bound holds
        exactly for any y and v; the solver's multipliers make it tight.

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
            # An additional variable with a high cost makes x = lower feasible when it is 1. An infeasible program then has an
            # expensive solution, with multipliers that prove it.
            A = hstack([A, np.minimum(a - A @ lower, 0.0)[:, None]], format="csr")
            B = hstack([B, (b - B @ lower)[:, None]], format="csr")
            cost, lower, upper = np.append(cost, 10 * enough), np.append(lower, 0.0), np.append(upper, 1.0)
            result = linprog(cost, A, a, B, b, np.column_stack([lower, upper]), method="highs-ipm")
        if result.status != 0:  # on a numerical failure the variables' bounds alone give the lower bound
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
        """Return the matrix's values, and their rows and columns."""
        if not self._entries:
            return np.zeros(0), (np.zeros(0, dtype=int), np.zeros(0, dtype=int))
        values, places, columns = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        return values, (places, columns)
