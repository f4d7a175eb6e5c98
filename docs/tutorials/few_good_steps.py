# %% [markdown]
# # Few good steps
#
# You have a model, and its evaluations are expensive. Try, in this order:
#
# 1. `gd.sample(flow, key, number, num_steps=20)`: the defaults, which need no tuning.
# 2. [`gddim_eqx.GaussianStart`][], for 2 to 10 evaluations: a start in closed form, from
#    the mean and covariance of the data. It costs nothing.
# 3. [`gddim_eqx.fit_solver`][] with `learn="times"`: optimise the time grid for your model
#    and any solver.
# 4. [`gddim_eqx.fit_solver`][]: learn coefficients and the start too, for 3 to 10
#    evaluations.
#
# Here we measure what each gains: first with a model that is exact, then with a network.

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
# The same key gives every solver the same noise. So the error of a sample is its distance
# from that of an accurate solution. Choose a solver by this rather than by the FID, which
# needs thousands of samples and includes the error of the network. The median ignores the
# few samples that end in another mode.


# %%
def draw(**options):
    return np.asarray(gd.sample(flow, jax.random.key(0), 256, **options).x)


exact = draw(num_steps=120)


def error(**options):
    return float(np.median(np.linalg.norm(draw(**options) - exact, axis=1)))


# %% [markdown]
# ## Grid and order
#
# [`gddim_eqx.time_grid`][] has several grids; [`gddim_eqx.GDDIM`][] has orders 1 to 4, in
# data space or in noise space.

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
# ## A start in closed form
#
# At high noise levels the model's predictions are close to those of normal data with the
# same mean and covariance. Before the first evaluation, the solver can use these:

# %%
data = gd.GaussianMixture(centres, 0.05).sample(jax.random.key(2), 1000)
start = gd.GaussianStart(gd.NormalData.from_samples(np.asarray(data)))
for n in (3, 4, 5, 8):
    print(
        f"{n} evaluations: {error(num_steps=n):.3f}, {error(num_steps=n, start=start):.3f}"
    )

# %% [markdown]
# More in [Sample in 2 to 10 evaluations](../how_to/few_evaluations.md).
#
# ## An adapted grid
#
# Which grid is best depends on the data. [`gddim_eqx.fit_solver`][] moves the times, by
# gradient descent through the solver, to reduce the error of a few dozen samples (pilots).
# The new times serve all other samples:

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
# Here 8 steps on an adapted grid are as accurate as 20 on the default grid. For many steps
# adapting a grid is not worth the time.
#
# ## A learned solver
#
# [`gddim_eqx.fit_solver`][] also learns corrections of the solver's coefficients, and with
# `start=` its time and slope. Whatever is learned, a step remains exact if the data are a
# single point:
# `gd.fit_solver(flow, flow.process.prior(key, (64,)), num_steps=5, start=start).solver`. A
# quarter of the pilots is held back, to choose between what was learned and the start.
# [`gddim_eqx.checkpoints.save`][] keeps the solver, which has its times and its start.
#
# It costs, once per model, about `4 * 200 * 8 * num_steps` evaluations, as each of 200
# iterations takes 8 pilots; 50 per pilot for accurate solutions; and a few to choose. With
# 64 pilots and 5 steps this is as much as drawing 8,000 samples. For the small network
# below it takes two minutes on two CPU cores. The solvers for the included models come with
# them:

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
# By default, `sample` starts in closed form here too, as the network knows the standard
# deviation of its data. For this model 5 learned evaluations have the FID of 10 from noise:
# 1.6 and 1.7, where 5 from noise have 2.5 (1,000 samples each). For sample quality rather
# than accuracy there is the regime `"sharpest"`: with the covariance of the images, 5
# evaluations have 1.2.
#
# Adaptive step sizes do not help with a small budget: a `PIDController` controls the error
# of each step, but not how it propagates, and rejects many steps. Use one to reach a
# tolerance.
