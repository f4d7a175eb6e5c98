# %% [markdown]
# # Few good steps
#
# You have a model, and its evaluations are expensive. In this order:
#
# 1. `gd.sample(flow, key, number, num_steps=20)`: the default, which needs no tuning.
# 2. `gd.adapted_grid(flow, u, 8)`: optimise the time grid for your model. Any solver.
# 3. `gd.fit_solver(flow, u, 5)`: learn the coefficients too, for 5 to 10 evaluations.
#
# Below we measure what each gains, first on a model that is exact, then on a network.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd


plt.rcParams["figure.facecolor"] = "white"

angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
process = gd.CLD((2,))
flow = gd.ProbabilityFlow(process, gd.GaussianMixture(centres, 0.05).model(process))

# %% [markdown]
# ## Measure the error
#
# The same key gives every solver the same noise. So the error of a sample is its distance
# from that of an accurate solution. Choose a solver by this, not by the FID, which takes
# thousands of samples and includes the error of the network. The median ignores the few
# samples that end in another mode.

# %%
draw = lambda **options: gd.sample(flow, jax.random.key(0), 512, **options).x
exact = draw(num_steps=500)


def error(**options):
    return float(np.median(np.linalg.norm(draw(**options) - exact, axis=1)))


# %% [markdown]
# ## Grid and order
#
# [`gddim_eqx.time_grid`][] has several grids; [`gddim_eqx.GDDIM`][] has orders 1 to 4, in
# data space or in noise space. The defaults, `"clock"` and order 4 in data space, are
# seldom far from the best.

# %%
numbers = [5, 8, 10, 15, 20, 30, 50]
grids = {
    f'"{name}"': [error(ts=gd.time_grid(process, n, name)) for n in numbers]
    for name in ("uniform", "quadratic", "log_snr", "clock")
}
solvers = {
    'GDDIM(1, "noise")': (gd.GDDIM(1, "noise"), "quadratic"),  # DDIM, for VP
    'GDDIM(3, "noise")': (gd.GDDIM(3, "noise"), "quadratic"),  # the paper
    "GDDIM(2)": (gd.GDDIM(2), "clock"),
    "GDDIM()": (gd.GDDIM(), "clock"),
}
orders = {
    name: [error(ts=gd.time_grid(process, n, grid), solver=solver) for n in numbers]
    for name, (solver, grid) in solvers.items()
}

# %% [markdown]
# ## An adapted grid
#
# Which grid is best depends on the data. [`gddim_eqx.adapted_grid`][] moves the times, by
# gradient descent through the solver, on a few dozen samples (pilots). It works with any
# solver for ODEs.

# %%
pilots = process.prior(jax.random.key(1), (64,))
begin = time.perf_counter()
adapted = gd.adapted_grid(flow, pilots, 8)
seconds = time.perf_counter() - begin
adapted_error = error(ts=adapted.ts)
print(f"8 steps: {error(num_steps=8):.1e}; adapted: {adapted_error:.1e}, {seconds:.0f} s")

# %% [markdown]
# ## A learned solver
#
# [`gddim_eqx.fit_solver`][] also learns a few numbers per step. A third of the pilots is held
# back, to choose between what was learned and what it began with, so the result is not worse
# than `GDDIM()` on those. Whatever is learned, a step remains exact if the data are a
# single point.

# %%
begin = time.perf_counter()
fitted = gd.fit_solver(flow, pilots, 5, progress=False)
seconds = time.perf_counter() - begin
learned_error = error(solver=fitted.solver, ts=fitted.ts)
print(f"5 steps: {error(num_steps=5):.1e}; learned: {learned_error:.1e}, {seconds:.0f} s")


# %%
def plot(axis, curves, title):
    for name, values in curves.items():
        axis.loglog(numbers, values, "o-", markersize=4, label=name)
    axis.loglog(8, adapted_error, "k*", markersize=11, label="adapted grid")
    axis.loglog(5, learned_error, "rP", markersize=9, label="learned solver")
    axis.set(xlabel="evaluations", title=title)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_both():
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    plot(axes[0], grids, "GDDIM() on four grids")
    plot(axes[1], orders, "four solvers")
    axes[0].set_ylabel("median error")


plot_both()

# %% [markdown]
# ## What learning costs
#
# Once per model: about `4 * num_iterations * num_steps` evaluations on the pilots, and 200 for
# their accurate solutions. By default `fit_solver` takes 120 iterations and `adapted_grid` 60.
# With 64 pilots and 5 steps this costs as much as drawing 33,000 samples in 5 steps. Above,
# nearly all of the time is compilation. For the small network below learning took two minutes
# on two CPU cores; for a larger one on images of 32x32 an hour and a half.
#
# Save the result with `gd.checkpoints.save("solver.npz", fitted.solver)`: it has its times.
#
# ## On a network
#
# A solver that was learned for one of the included models:

# %%
flow = gd.checkpoints.pretrained("fashion-mnist-vp")
learned = gd.checkpoints.pretrained_solver("fashion-mnist-vp", 5)
rows = {
    "GDDIM(), 5 evaluations": gd.sample(flow, jax.random.key(0), 32, 5),
    "learned, 5 evaluations": gd.sample(flow, jax.random.key(0), 32, solver=learned),
    "GDDIM(), 100 evaluations": gd.sample(flow, jax.random.key(0), 32, 100),
}
exact = np.asarray(rows["GDDIM(), 100 evaluations"].x)


def show(rows):
    figure, axes = plt.subplots(3, 1, figsize=(9, 2.8), layout="constrained")
    for axis, (name, (x, _)) in zip(axes, rows.items(), strict=True):
        distance = np.sqrt(((np.asarray(x) - exact) ** 2).mean((1, 2, 3)))
        axis.imshow(np.hstack(gd.to_uint8(x[:12]))[..., 0], cmap="gray")
        axis.set(xticks=[], yticks=[])
        label = f"{name}\nerror {np.median(distance):.2f}" if distance.any() else name
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


show(rows)

# %% [markdown]
# In FID, 5 learned evaluations are worth about 10 of `GDDIM()` for this model: 1.58 and 1.67,
# where 5 of `GDDIM()` have 2.46 (1,000 samples).
#
# Not worth trying for a small number of evaluations: adaptive step sizes. They control the
# error of a step, not how it propagates; `PIDController` rejects many steps. Use them to
# reach a tolerance.
