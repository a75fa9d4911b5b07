"""What the weights' norms truly are, beside what the solver believes: the report of `NormScaler.audit`."""

from dataclasses import dataclass

from specscale.tables import aligned


@dataclass(frozen=True)
class Certificate:
    """One weight's true norm; of a tensor that is several matrices, the worst of them."""

    name: str
    count: int
    """Matrices in the tensor."""
    shape: tuple[int, int]
    """`(m, n)` of one matrix."""
    target: float
    """The largest target."""
    norm: float
    """The largest norm: exact to float64 where `miss` is 0, else attained, so that the true norm is no smaller."""
    excess: float
    """The worst norm / target - 1: what the method leaves above the target, with an exact solver too."""
    error: float
    """The worst (norm that is held) / norm - 1: what the solver has not seen is negative."""
    method: str
    """`"svd"` or `"lanczos"` for the spectral norm, `"sum"` for the Frobenius norm; in float64."""
    miss: float
    """The probability that the true norm is larger than `norm` by more than the audit's tolerance."""


@dataclass(frozen=True)
class Audit:
    """The certificates of a model's weights, in its order; `print` shows them as a table."""

    certificates: list[Certificate]
    tolerance: float
    """The relative distance between `norm` and what a norm may really be where `miss` is not 0."""

    @property
    def miss(self) -> float:
        """The probability that any weight's norm is larger than stated, by more than the tolerance."""
        return sum(one.miss for one in self.certificates)

    @property
    def worst_error(self) -> float:
        """The largest error of the solver, as a positive part of the norm."""
        return max(abs(one.error) for one in self.certificates)

    @property
    def worst_excess(self) -> float:
        """The largest excess."""
        return max(one.excess for one in self.certificates)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "matrices", "shape", "target", "norm", "excess", "solver's error", "method", "miss")
        ]
        for one in self.certificates:
            numbers = (f"{one.target:.4g}", f"{one.norm:.6g}", f"{one.excess:+.3%}", f"{one.error:+.1e}")
            m, n = one.shape
            rows.append((one.name, str(one.count), f"{m}x{n}", *numbers, one.method, f"{one.miss:.0e}"))
        said = "every norm is exact in float64"
        if self.miss:
            said = (
                f"a norm by lanczos may be larger by {self.tolerance:.0e}, and by more with probability {self.miss:.0e}"
            )
        return f"{aligned(rows)}\n{said}"
