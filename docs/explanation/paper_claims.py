# %% [markdown]
# # The paper's claims, in two dimensions
#
# The paper (gDDIM; Zhang, Tao & Chen, ICLR 2023) evaluates the method on images, with FIDs.
# This page reproduces each claim on data whose score is known exactly: eight clusters on a
# ring. It therefore measures the sampler alone.
#
# The paper's q, the number of evaluations that a step combines, is `order` here. In tables
# and in the authors' option `deis_order`, q is the degree of the polynomial and counts from
# 0. There, `order` is q + 1: their best sampler, `deis_order=2`, is `gd.GDDIM(3, "noise")`.
# All solves below use the authors' quadratic grid.

# %%
import warnings

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import gddim_eqx as gd


# Below, some solvers diverge.
warnings.filterwarnings("ignore", "The samples have a root mean square")
angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
shapes = {gd.VP: (2,), gd.CLD: (2,), gd.BDM: (1, 2, 1)}  # an image of two pixels


def ring(process_class):
    process = process_class(shapes[process_class])
    means = centres.reshape(8, *process.shape)
    return gd.ProbabilityFlow(process, gd.GaussianMixture(means, 0.05).model(process))


def draw(flow, num_steps, solver, lam=0.0):
    """Draw 2,000 samples, or return NaN if they are not finite."""
    ts = gd.time_grid(flow.process, num_steps, "quadratic")
    lam = lam and jnp.asarray(lam)  # an array, to avoid recompilation
    try:
        samples = gd.sample(flow, jax.random.key(0), 2000, solver=solver, lam=lam, ts=ts)
    except FloatingPointError:
        return np.full((2000, 2), np.nan)
    return np.asarray(samples.x).reshape(2000, 2)


def show(title, columns, rows):
    print(f"{title:20}" + "".join(f"{name:>9}" for name in columns))
    for name, values in rows.items():
        print(f"{name:20}" + "".join(f"{value:9.1e}" for value in values))


vp, cld, bdm = (ring(process_class) for process_class in (gd.VP, gd.CLD, gd.BDM))
exact = draw(cld, 500, gd.GDDIM())


def error(num_steps, solver):
    """The median distance to the exact solution from the same noise, under CLD."""
    return np.median(np.linalg.norm(draw(cld, num_steps, solver) - exact, axis=1))


# %% [markdown]
# ## For data at a single point, a step of any size is exact
#
# Propositions 1, 4 and 6: for any process, the noise prediction with respect to $R_t$ is
# constant along the flow. For the reverse diffusion, the distribution of a step is known.
# The table shows the standard deviation of samples after two steps from the prior to
# `t_min`, with and without noise. The correct value is that of the process.

# %%
point = jnp.array([0.7, -0.3])
rows = {}
for process_class, shape in shapes.items():
    process = process_class(shape)
    mixture = gd.GaussianMixture(point.reshape(1, *shape))
    flow = gd.ProbabilityFlow(process, mixture.model(process))
    found = [draw(flow, 2, gd.GDDIM(1, "noise"), lam) for lam in (0.0, 1.0)]
    right = jnp.sqrt(process.covariance(process.t_min).blocks[0, 0].mean())
    rows[process_class.__name__] = [right, *((x - point).std() for x in found)]
show("standard deviation", ["right", "lam=0", "lam=1"], rows)

# %% [markdown]
# (In float32, one step under CLD cannot be exact: see
# [questions](../reference/faq.md#do-i-need-double-precision).)
#
# ## $R_t$ versus $L_t$
#
# Table 1: under CLD, the noise can be extrapolated in either frame. The errors in $L_t$ are
# larger. With 20 evaluations, they are larger than the ring.

# %%
steps = (20, 30, 40, 50)
rows = {
    "L_t, order 1": gd.GDDIM(1, "noise", frame="cholesky"),
    "L_t, order 3": gd.GDDIM(3, "noise", frame="cholesky"),
    "R_t, order 1": gd.GDDIM(1, "noise"),
    "R_t, order 3": gd.GDDIM(3, "noise"),
}
rows = {name: [error(n, solver) for n in steps] for name, solver in rows.items()}
show("CLD, evaluations", steps, rows)

# %% [markdown]
# ## Orders
#
# Equation 19: higher orders are better. `GDDIM()`, the default, is not the paper's sampler.
# It extrapolates the data prediction, and corrects every step with the evaluation of the
# next step.

# %%
steps = (10, 20, 50, 100)
solvers = {f'GDDIM({q}, "noise")': gd.GDDIM(q, "noise") for q in (1, 2, 3, 4)}
solvers["GDDIM()"] = gd.GDDIM()
rows = {name: [error(n, solver) for n in steps] for name, solver in solvers.items()}
show("CLD, evaluations", steps, rows)

# %% [markdown]
# ## Correcting with a second evaluation
#
# The paper reports predictors only. With few evaluations, they are better than
# predictor-corrector pairs, which take two evaluations per step.

# %%
pair = gd.GDDIM(3, "noise", reevaluate=True)
rows = {
    "predictor": [error(n, gd.GDDIM(3, "noise")) for n in steps],
    "and corrector": [error(n // 2, pair) for n in steps],
}
show("CLD, evaluations", steps, rows)

# %% [markdown]
# ## Stochasticity
#
# Table 2: 50 evaluations, order 1, and increasing noise. In the paper, samples get worse as
# $\lambda$ increases, and are better than those of Euler-Maruyama. To compare
# distributions, we measure the width of the clusters, which is 0.05 in the data.


# %%
def width(*args):
    """The root mean square distance to the nearest of the centres, per coordinate."""
    distances = np.linalg.norm(draw(*args)[:, None] - np.asarray(centres), axis=-1)
    return np.sqrt(np.mean(distances.min(1) ** 2) / 2)


levels = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
solvers = {"gDDIM, order 1": gd.GDDIM(1, "noise"), "Euler-Maruyama": dfx.Euler()}
rows = {
    name: [width(cld, 50, solver, lam) for lam in levels]
    for name, solver in solvers.items()
}
show("CLD, lam", levels, rows)

# %% [markdown]
# As in the paper, Euler-Maruyama needs the noise, and is worse below $\lambda = 1$. With an
# exact score, gDDIM does not get worse as $\lambda$ increases.
#
# ## Acceleration for VP, BDM and CLD
#
# Table 3: the same sampler works for all three processes with few evaluations. For VP,
# `GDDIM(3, "noise")` is DEIS. The ancestral sampler is `GDDIM(1, "noise")` with `lam=1`.
# Heun's method takes two evaluations per step. The tables show the width of the clusters
# again. The noise at `t_min` adds little to it.

# %%
for name, flow in {"VP": vp, "BDM": bdm, "CLD": cld}.items():
    rows = {
        "gDDIM": [width(flow, n, gd.GDDIM(3, "noise")) for n in steps],
        "Heun": [width(flow, n // 2, dfx.Heun()) for n in steps],
        "ancestral": [width(flow, n, gd.GDDIM(1, "noise"), 1.0) for n in steps],
    }
    show(f"{name}, evaluations", steps, rows)

# %% [markdown]
# The remaining claims are about images: see [the paper's experiments](../cifar10.md). For
# tables with more solvers and metrics, see Evidence, for example
# [on a ring](../benchmarks/tables_ring.md).
