# %% [markdown]
# # Sample a known distribution
#
# This tutorial needs no network. The data are a mixture of Gaussians, for which the exact
# noise prediction is known under every process. All errors below are therefore due to the
# solver alone. To use your own network, replace `data.model(process)`.

# %%
import warnings

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd


plt.rcParams["figure.facecolor"] = "white"
# Below, Tsit5 diverges with few steps.
warnings.filterwarnings("ignore", "The samples have a root mean square")

# %% [markdown]
# ## Process, model, term
#
# The data are eight Gaussians on a circle. Critically-damped Langevin diffusion (CLD) adds
# a velocity to each data point, so a state is a [`gddim_eqx.Phase`][] of `x` and `v`.

# %%
angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
data = gd.GaussianMixture(centres, 0.05)

process = gd.CLD((2,))
model = data.model(process)  # called as model(t, u, args), on a whole batch
term = gd.ProbabilityFlow(process, model)

# %% [markdown]
# ## Solve
#
# The grid runs from noise, at `ts[0]`, to data. [`gddim_eqx.ProbabilityFlow`][] is a
# Diffrax term. [`gddim_eqx.GDDIM`][] is a Diffrax solver that evaluates the model once per
# step. `decode` extracts the data from the states.

# %%
ts = gd.time_grid(process, 20)
noise = process.prior(jax.random.key(0), (500,))


def solve(solver, ts):
    sol = dfx.diffeqsolve(
        term, solver, ts[0], ts[-1], None, noise, stepsize_controller=dfx.StepTo(ts)
    )
    return process.decode(sol.ys)[-1]


x = solve(gd.GDDIM(), ts)

# %% [markdown]
# ## Use another solver
#
# You can use any Diffrax ODE solver instead:

# %%
x_tsit5 = solve(dfx.Tsit5(), ts)

# %% [markdown]
# ## Count evaluations and measure the error
#
# Tsit5 evaluates the model six times per step, so comparing equal numbers of steps is not
# fair. [`gddim_eqx.sample`][] does all of the above in one call (noise, grid and solve). It
# also checks that all samples are finite, and counts evaluations. The same key gives every
# solver the same noise, so samples can be compared one by one with an accurate solution.
#
# No solver is accurate for all samples. A few start near the boundary between two basins of
# attraction and end in another mode. We therefore report the median error, and the fraction
# of samples farther than 0.5 from the accurate solution ("astray").


# %%
def compare(flow):
    draw = lambda solver, n: gd.sample(flow, jax.random.key(1), 500, n, solver)
    exact = draw(dfx.Tsit5(), 120).x
    samples = {}
    name = type(flow.process).__name__
    lines = [f"{name:5}  steps  evaluations  median error  astray"]
    for solver, numbers in [(gd.GDDIM(), (10, 20, 50)), (dfx.Tsit5(), (3, 8, 20))]:
        for n in numbers:
            x, evaluations = draw(solver, n)
            name = type(solver).__name__
            samples[f"{name}, {evaluations} evaluations"] = x
            error = np.linalg.norm(x - exact, axis=1)
            median, astray = np.median(error), np.mean(error > 0.5)
            lines += [f"{name}  {n:5}  {evaluations:11}  {median:12.1e}  {astray:6.1%}"]
    print("\n".join(lines))
    return samples


def scatter(samples):
    number = len(samples)
    figure, axes = plt.subplots(
        1, number, figsize=(2.3 * number, 2.8), layout="constrained"
    )
    for axis, (title, points) in zip(axes, samples.items(), strict=True):
        axis.scatter(*np.asarray(points).T, s=5, alpha=0.5, linewidths=0)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title=title)
        outside = (np.abs(points) > 2).any(axis=1).mean()
        axis.set(xticks=[], yticks=[], xlabel=f"{outside:.0%} outside this square")


samples = compare(term)
names = "GDDIM, 20 evaluations", "Tsit5, 19 evaluations", "Tsit5, 121 evaluations"
scatter({"noise": noise.x} | {name: samples[name] for name in names})

# %% [markdown]
# ## Compute log likelihoods
#
# For a process with a velocity, the flow does not give the density of the data alone.
# [`gddim_eqx.log_likelihood_bound`][] estimates a lower bound with random velocities. For
# an exact model the bound is tight, and only the error of the estimate remains.

# %%
points = data.sample(jax.random.key(2), 6)


def exact_log_density(x, shrink=1.0, noise=0.0):
    variance = (shrink * data.scale) ** 2 + noise
    squares = ((x[:, None] - shrink * centres) ** 2).sum(-1) / variance
    return jax.nn.logsumexp(-squares / 2, axis=1) - jnp.log(8 * 2 * jnp.pi * variance)


def report(**rows):
    values = lambda row: " ".join(f"{value:6.2f}" for value in row)
    print("\n".join(f"{name:6} {values(row)}" for name, row in rows.items()))


key = jax.random.key(3)
bound = gd.log_likelihood_bound(term, points, key, num_draws=100).value
report(bound=bound, exact=exact_log_density(points))

# %% [markdown]
# ## Use another process
#
# Change `CLD` to `VP`, and nothing else. (States are now arrays rather than pairs, which
# `decode` and the solvers handle.)

# %%
process = gd.VP((2,))
model = data.model(process)
term = gd.ProbabilityFlow(process, model)
_ = compare(term)

# %% [markdown]
# Without a velocity, [`gddim_eqx.log_likelihood`][] computes the density. It is that of the
# data plus the small amount of noise left at `process.t_min`, where sampling ends. For this
# mixture, it is known exactly:

# %%
shrink = process.transition(process.t_min, 0.0).blocks[0, 0]
noise = process.covariance(process.t_min).blocks[0, 0]
flow = gd.log_likelihood(term, points).value
report(flow=flow, exact=exact_log_density(points, shrink, noise))

# %% [markdown]
# ## Next steps
#
# - [Few good steps](few_good_steps.md) covers grids, orders and learned solvers.
# - [Train on digits](train_on_digits.md) replaces the exact model with a network.
