"""Exponential Adams methods and Diffrax's solvers on a stiff partial differential equation.

The Kuramoto-Sivashinsky equation u_t = -u u_x - u_xx - u_xxxx on a periodic interval of
length 32 pi, with 256 Fourier coefficients, from t = 0 to 20, while the first front forms.
The table shows errors at the final time, evaluations of the nonlinear part, and seconds.
`KenCarp4` and `Kvaerno5` are implicit: their stages are solved by Newton's method, with a
256 x 256 Jacobian.

    python benchmarks/semilinear.py
    python benchmarks/semilinear.py --quick  # only to see that it runs

Draws `semilinear.png` into `--output`.
"""

import argparse
import time
from pathlib import Path

import diffrax as dfx
import equinox as eqx
import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib
import numpy as np

import gddim_eqx as gd


matplotlib.use("agg")

import matplotlib.pyplot as plt


_length = 32 * np.pi


class Equation:
    """The equation in Fourier coefficients, with a count of evaluations."""

    def __init__(self, size: int):
        self.size, self.evaluations = size, 0
        self.basis = gd.FourierBasis()
        k = self.basis.frequencies(size) * 2 * np.pi / _length
        self.linear = jnp.asarray(k**2 - k**4)
        self.wave = jnp.fft.rfftfreq(size, 1 / size) * 2 * np.pi / _length

    def nonlinear(self, t, u, args):
        jax.debug.callback(self._count)
        # Dealiased by the two-thirds rule.
        square = jnp.fft.rfft(u**2)
        kept = jnp.arange(len(square)) <= self.size // 3
        return jnp.fft.irfft(jnp.where(kept, -0.5j * self.wave * square, 0), self.size)

    def _count(self):
        self.evaluations += 1

    def term(self) -> gd.Semilinear:
        return gd.Semilinear(self.linear, self.nonlinear, basis=self.basis)

    def start(self):
        x = _length * jnp.arange(self.size) / self.size
        return self.basis.forward(jnp.cos(x / 16) * (1 + jnp.sin(x / 16)))

    def solve(self, solver, controller, t1, dt0=None, ts=None):
        term, saveat = self.term(), dfx.SaveAt(t1=True) if ts is None else dfx.SaveAt(ts=ts)
        if isinstance(solver, dfx.KenCarp4):  # Explicit and implicit part.
            linear = dfx.ODETerm(lambda t, y, args: self.linear * y)
            term = dfx.MultiTerm(dfx.ODETerm(term.force), linear)

        @eqx.filter_jit
        def run(y0):
            return dfx.diffeqsolve(
                term,
                solver,
                0.0,
                t1,
                dt0,
                y0,
                stepsize_controller=controller,
                saveat=saveat,
                max_steps=200_000,
                throw=False,
            )

        y0 = self.start()
        jax.block_until_ready(run(y0))
        jax.effects_barrier()
        self.evaluations, begin = 0, time.perf_counter()
        sol = jax.block_until_ready(run(y0))
        seconds = time.perf_counter() - begin
        jax.effects_barrier()
        return np.asarray(sol.ys), self.evaluations, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="A stiff partial differential equation.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    args = parser.parse_args()
    # First, so that no result is lost.
    args.output.mkdir(parents=True, exist_ok=True)
    size, t1 = (32, 0.5) if args.quick else (256, 20.0)
    equation = Equation(size)
    tight = dfx.PIDController(rtol=1e-10, atol=1e-10)
    exact = equation.solve(gd.ExponentialAdams(), tight, t1)[0][-1]
    tolerances = [1e-4] if args.quick else [1e-2, 1e-3, 1e-4, 1e-6, 1e-8]
    numbers = [10] if args.quick else [100, 200, 400, 1000, 2000]
    adaptive = {
        "ExponentialAdams()": gd.ExponentialAdams(),
        "ExponentialAdams(2)": gd.ExponentialAdams(2),
        "Tsit5": dfx.Tsit5(),
        "KenCarp4": dfx.KenCarp4(),
        "Kvaerno5": dfx.Kvaerno5(),
    }
    if args.quick:
        adaptive = {"ExponentialAdams()": gd.ExponentialAdams()}
    runs = [
        (name, solver, dfx.PIDController(rtol=x, atol=x), None, f"tolerance {x:.0e}")
        for name, solver in adaptive.items()
        # At tighter tolerances, implicit solvers take minutes.
        for x in tolerances
        if x >= 1e-4 or not isinstance(solver, dfx.AbstractImplicitSolver)
    ]
    runs += [
        (f"{name}, fixed", adaptive[name], dfx.ConstantStepSize(), t1 / n, f"{n} steps")
        for name in ("ExponentialAdams()", "ExponentialAdams(2)")
        if name in adaptive
        for n in numbers
    ]
    print("| solver | setting | evaluations | error | seconds |\n" + "| --- " * 5 + "|")
    points = {}
    for name, solver, controller, dt0, setting in runs:
        y, evaluations, seconds = equation.solve(solver, controller, t1, dt0)
        error = float(np.linalg.norm(y[-1] - exact) / np.linalg.norm(exact))
        points.setdefault(name, []).append((evaluations, error))
        shown = f"{error:.1e}" if np.isfinite(error) else "diverges"
        print(f"| {name} | {setting} | {evaluations} | {shown} | {seconds:.3f} |")
    _draw(equation, t1, points, args.output / "semilinear.png")


def _draw(equation, t1, points, path) -> None:
    ts = jnp.linspace(0, t1, 200)
    controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
    y = equation.solve(gd.ExponentialAdams(), controller, t1, ts=ts)[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.imshow(
        equation.basis.inverse(jnp.asarray(y)),
        aspect="auto",
        origin="lower",
        extent=(0, _length, 0, t1),
        cmap="RdBu",
    )
    left.set(xlabel="x", ylabel="t", title="Kuramoto-Sivashinsky")
    for name, pairs in points.items():
        evaluations, errors = np.array(pairs).T
        right.loglog(evaluations, errors, "o-", label=name)
    right.set(xlabel="evaluations", ylabel="relative error at final time", ylim=(1e-9, 10))
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
