# %% [markdown]
# # Few good steps
#
# You have a model, and its evaluations are expensive. Try the following, in this order:
#
# 1. `gd.sample(flow, key, number, num_steps=20)`: the defaults, which need no tuning.
# 2. [`gddim_eqx.GaussianStart`][], for 2 to 10 evaluations: a closed-form start from the
#    mean and covariance of the data, at no cost.
# 3. [`gddim_eqx.fit_solver`][] with `learn="times"`: optimise the time grid for your model
#    and any solver.
# 4. [`gddim_eqx.fit_solver`][]: learn the coefficients and the start too, for 3 to 10
#    evaluations.
#
# This tutorial measures the gain from each, first with an exact model, then with a network.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd


plt.rcParams["figure.facecolor"] = "white"

angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
process = gd.VP((2,))
flow = gd.ProbabilityFlow(process, gd.GaussianMixture(centres, 0.05).model(process))

# %% [markdown]
# ## Measure the error
#
# The same key gives every solver the same noise. The error of a sample is therefore its
# distance from the corresponding sample of an accurate solution. Use this rather than the
# FID to choose a solver: the FID needs thousands of samples and includes the error of the
# network. The median ignores the few samples that end in another mode.


# %%
def draw(**options):
    return np.asarray(gd.sample(flow, jax.random.key(0), 256, **options).x)


exact = draw(num_steps=120)


def error(**options):
    return float(np.median(np.linalg.norm(draw(**options) - exact, axis=1)))


# %% [markdown]
# ## Grid and order
#
# [`gddim_eqx.time_grid`][] provides several grids. [`gddim_eqx.GDDIM`][] has orders 1 to 4,
# with data or noise predictions.

# %%
numbers = [5, 8, 10, 15, 20, 30, 50]
grids = {
    f'"{name}"': [error(ts=gd.time_grid(process, n, name)) for n in numbers]
    for name in ("uniform", "quadratic", "log_snr", "clock")
}
solvers = {
    'GDDIM(1, "noise"): DDIM': (gd.GDDIM(1, "noise"), "quadratic"),
    'GDDIM(3, "noise"): the paper': (gd.GDDIM(3, "noise"), "quadratic"),
    "GDDIM()": (gd.GDDIM(), "clock"),
}
orders = {
    name: [error(ts=gd.time_grid(process, n, grid), solver=solver) for n in numbers]
    for name, (solver, grid) in solvers.items()
}

# %% [markdown]
# ## A closed-form start
#
# At high noise levels, the predictions of the model are close to those for normal data with
# the same mean and covariance. The solver can use these before the first evaluation:

# %%
data = gd.GaussianMixture(centres, 0.05).sample(jax.random.key(2), 1000)
start = gd.GaussianStart(gd.NormalData.from_samples(np.asarray(data)))
for n in (3, 4, 5, 8):
    print(
        f"{n} evaluations: {error(num_steps=n):.3f}, {error(num_steps=n, start=start):.3f}"
    )

# %% [markdown]
# For more, see [Sample in 2 to 10 evaluations](../how_to/few_evaluations.md).
#
# ## An adapted grid
#
# The best grid depends on the data. [`gddim_eqx.fit_solver`][] adjusts the times with
# gradient descent through the solver, to reduce the error of a few dozen samples (pilots).
# The new times work for all other samples:

# %%
pilots = process.prior(jax.random.key(1), (64,))
fitted = gd.fit_solver(flow, pilots, 8, learn="times", start=None, progress=False)
adapted = error(ts=fitted.ts)
print(f"error in 8 steps: {error(num_steps=8):.1e}; on an adapted grid: {adapted:.1e}")


# %%
def plot(axis, curves, title):
    for name, values in curves.items():
        axis.loglog(numbers, values, "o-", markersize=4, label=name)
    axis.loglog(8, adapted, "k*", markersize=11, label="GDDIM(), adapted grid")
    axis.set(xlabel="evaluations", title=title)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_both():
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
    plot(axes[0], grids, "GDDIM(), four grids")
    plot(axes[1], orders, "three solvers")
    axes[0].set_ylabel("median error")


plot_both()

# %% [markdown]
# Here 8 steps on an adapted grid are as accurate as 20 on the default grid. With many
# steps, adapting the grid is not worth the time.
#
# ## A learned solver
#
# [`gddim_eqx.fit_solver`][] also learns corrections to the solver's coefficients and, with
# `start=`, the time and slope of the start:
# `gd.fit_solver(flow, flow.process.prior(key, (64,)), num_steps=5, start=start).solver`.
# Whatever is learned, a step remains exact if the data are a single point. A quarter of the
# pilots are held out, to choose between the learned solver and the initial one.
# [`gddim_eqx.checkpoints.save`][] saves the solver together with its times and its start.
#
# This costs, once per model, about `4 * 200 * 8 * num_steps` evaluations (each of 200
# iterations uses 8 pilots), 50 per pilot for accurate solutions, and a few for the choice.
# With 64 pilots and 5 steps, this is as much as drawing 8,000 samples. For the small
# network below it takes two minutes on two CPU cores. The included models come with learned
# solvers:

# %%
flow = gd.checkpoints.pretrained("fashion-mnist-vp")
start = gd.GaussianStart(gd.checkpoints.pretrained_data("fashion-mnist"))
learned = gd.checkpoints.pretrained_solver("fashion-mnist-vp", 5)
rows = {
    "from noise, 5 evaluations": gd.sample(flow, jax.random.key(0), 12, 5, start=None),
    "start, 5 evaluations": gd.sample(flow, jax.random.key(0), 12, 5, start=start),
    "learned, 5 evaluations": gd.sample(flow, jax.random.key(0), 12, solver=learned),
    "GDDIM(), 100 evaluations": gd.sample(flow, jax.random.key(0), 12, 100),
}


def show(rows):
    exact = np.asarray(rows["GDDIM(), 100 evaluations"].x)
    figure, axes = plt.subplots(4, 1, figsize=(8, 3.2), layout="constrained")
    for axis, (name, (x, _)) in zip(axes, rows.items(), strict=True):
        distance = np.sqrt(((np.asarray(x) - exact) ** 2).mean((1, 2, 3)))
        axis.imshow(np.hstack(gd.to_uint8(x))[..., 0], cmap="gray")
        axis.set(xticks=[], yticks=[])
        label = f"{name}\nmedian error {np.median(distance):.2f}"
        label = label if distance.any() else name
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


show(rows)

# %% [markdown]
# By default, `sample` uses a closed-form start here too, because the model stores the
# standard deviation of its data. For this model, the learned solver with 5 evaluations
# matches the FID of 10 evaluations from noise (1.6 and 1.7), while 5 from noise reach 2.5
# (1,000 samples each). For sample quality rather than accuracy, use the regime
# `"sharpest"`: with the covariance of the images, it reaches 1.2 with 5 evaluations.
#
# Adaptive step sizes do not help with a small budget. A `PIDController` controls the error
# of each step but not how it propagates, and it rejects many steps. Use one to reach a
# given tolerance.
