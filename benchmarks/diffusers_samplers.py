"""The error at small NFE, compared with the samplers of the diffusers package.

Eight Gaussians on a ring under DDPM's noise schedule of 1,000 betas, with the exact noise
prediction. All samplers start from the same noise and end at the first index. The error of
a sample is its distance from the end point of the exact flow, RMS per coordinate; the table
shows medians over samples. UniPC and DPM-Solver++ (2M) are run on four grids each, and the
best is shown for each NFE. Needs diffusers and torch (`pip install ".[interop]"`); without
them only `GDDIM` is run.

    python benchmarks/diffusers_samplers.py
    python benchmarks/diffusers_samplers.py --quick  # only to see that it runs
"""

import argparse
import importlib.util

import diffrax as dfx
import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np

import gddim_eqx as gd


_betas = np.linspace(1e-4, 0.02, 1000)
_angles = 2 * np.pi * np.arange(8) / 8
_mixture = gd.GaussianMixture(np.stack([np.cos(_angles), np.sin(_angles)], -1), 0.05)
_process = gd.VP.from_betas((2,), _betas)
_flow = gd.ProbabilityFlow(_process, _mixture.model(_process))


def solve(solver, ts, u):
    return _end(solver, ts[0], ts[-1], u, dfx.StepTo(ts))


def _end(solver, t0, t1, u, controller):
    sol = dfx.diffeqsolve(_flow, solver, t0, t1, None, u, stepsize_controller=controller)
    assert sol.ys is not None
    return sol.ys[0]


def theirs(name: str, options: dict, number: int, u: np.ndarray) -> np.ndarray:
    """Samples from one of the schedulers of diffusers."""
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    options = options | dict(trained_betas=_betas, final_sigmas_type="sigma_min")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(number)
    noise = jax.jit(lambda t, x: _flow.model(t, x, None))
    x = torch.from_numpy(np.array(u))
    for index in scheduler.timesteps:
        time = _process.time(float(index))
        prediction = np.array(noise(time, jnp.asarray(x.numpy())))
        x = scheduler.step(torch.from_numpy(prediction), index, x).prev_sample
    return x.numpy()


_samplers = {
    "UniPC": ("UniPCMultistepScheduler", dict(solver_order=3)),
    "DPM-Solver++ (2M)": ("DPMSolverMultistepScheduler", {}),
}
_grids = (
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="linspace"),
    dict(use_karras_sigmas=True),
    dict(use_exponential_sigmas=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Comparison with diffusers.")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    quick = parser.parse_args().quick
    numbers, size = ([5], 16) if quick else ([5, 8, 10, 15, 20], 512)
    u = _process.prior(jax.random.key(0), (size,))
    tight = dfx.PIDController(rtol=1e-9, atol=1e-9)
    exact = _end(dfx.Dopri8(), 1.0, _process.t_min, u, tight)

    def error(x):
        return float(np.median(np.sqrt(((np.asarray(x) - exact) ** 2).mean(-1))))

    rows = {
        "GDDIM()": [
            error(solve(gd.GDDIM(), gd.time_grid(_process, n), u)) for n in numbers
        ],
        "GDDIM(), log-SNR grid": [
            error(solve(gd.GDDIM(), gd.time_grid(_process, n, "log_snr"), u))
            for n in numbers
        ],
    }
    if importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
        for label, (name, options) in _samplers.items():
            rows[label] = [
                np.nanmin([error(theirs(name, options | x, n, u)) for x in _grids])
                for n in numbers
            ]
    else:
        print('diffusers and torch are not installed: pip install ".[interop]"\n')
    print("| median error | " + " | ".join(map(str, numbers)) + " |")
    print("| --- " * (len(numbers) + 1) + "|")
    for label, row in rows.items():
        print(f"| {label} | " + " | ".join(f"{x:.1e}" for x in row) + " |")


if __name__ == "__main__":
    main()
