# %% [markdown]
# # What CLD and BDM do to a distribution
#
# All processes are linear, $\mathrm{d}u = F_t u\,\mathrm{d}t + G_t\,\mathrm{d}w$, and turn
# any data into Gaussian noise. They differ in how they do this.
#
# - **VP** shrinks the data and adds noise directly to every coordinate.
# - **CLD** adds noise only to a velocity, which moves the data. The paths of the data are
#   therefore smooth.
# - **BDM** shrinks the high frequencies of an image first: it blurs the data while adding
#   noise.

# %%
import warnings

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd


plt.rcParams["figure.facecolor"] = "white"
# Below, one solver diverges.
warnings.filterwarnings("ignore", "The samples have a root mean square")

# %% [markdown]
# ## Position and velocity
#
# The first figure shows paths of four points that start at -1 and 1, over the density of a
# mixture of two Gaussians around -1 and 1. Diffrax solves the forward diffusion as an SDE
# with the coefficients `process.drift` and `process.diffusion`.

# %%
points = jnp.array([[-1.0], [-1.0], [1.0], [1.0]])
width = 0.1  # of the Gaussians
ts = jnp.linspace(0, 1, 501)


def forward(process, key):
    """The paths of the points, at times ts."""
    start, _ = process.perturb(key, points, 0.0)  # CLD draws a velocity
    shape = jax.eval_shape(lambda: start)
    brownian = dfx.UnsafeBrownianPath(shape, key)
    terms = dfx.MultiTerm(
        dfx.ODETerm(lambda t, u, args: process.drift(t).mv(u)),
        dfx.ControlTerm(lambda t, u, args: process.diffusion(t), brownian),
    )
    sol = dfx.diffeqsolve(
        terms,
        dfx.Euler(),
        0.0,
        1.0,
        None,
        start,
        saveat=dfx.SaveAt(ts=ts),
        stepsize_controller=dfx.StepTo(ts),
        adjoint=dfx.ForwardMode(),
    )
    return sol.ys


@eqx.filter_jit
def density(process, component, values):
    """The marginal density of position (component 0) or velocity (1) at times ts."""

    def at(t):
        mean = process.transition(t, 0.0).blocks[component, 0]
        variance = process.covariance(t).blocks[component, component]
        variance = variance + (width * mean) ** 2
        squares = (values[:, None] - jnp.array([-1, 1]) * mean) ** 2 / variance
        return jnp.exp(-squares / 2).mean(1) / jnp.sqrt(2 * jnp.pi * variance)

    return jax.vmap(at)(ts).T


vp, cld = gd.VP((1,)), gd.CLD((1,))


def draw_paths():
    of_vp, of_cld = (forward(process, jax.random.key(1)) for process in (vp, cld))
    figure, axes = plt.subplots(1, 3, figsize=(8.8, 2.8), layout="constrained")
    panels = [
        ("VP: $x$", vp, 0, of_vp, 3.0),
        ("CLD: position $x$", cld, 0, of_cld.x, 3.0),
        ("CLD: velocity $v$", cld, 1, of_cld.v, 1.5),
    ]
    for axis, (title, process, component, paths, limit) in zip(axes, panels, strict=True):
        values = jnp.linspace(-limit, limit, 301)
        shade = density(process, component, values) ** 0.5
        axis.pcolormesh(ts, values, shade, cmap="Greys", vmax=1.6, rasterized=True)
        axis.plot(ts, paths[..., 0], linewidth=1)
        axis.set(title=title, xlabel="$t$", ylim=(-limit, limit))


draw_paths()

# %% [markdown]
# Sampling runs from right to left. Under CLD, only the velocity is driven by noise, so only
# its equation contains a score. This is the score of the velocity given the position, whose
# distribution is Gaussian at both ends. The random initial velocity, of variance
# $\gamma M$, is part of the noise that a network predicts.
#
# ## Blurring
#
# The next figure shows a test image under VP and under BDM. The last row is the mean under
# BDM without the noise, rescaled to the contrast of the image. Fine rings fade first.
# States of [`gddim_eqx.BDM`][] are cosine coefficients; `process.to_data` converts them to
# images.

# %%
radius = jnp.hypot(*jnp.meshgrid(jnp.arange(64) - 31.5, jnp.arange(64) - 31.5))
image = jnp.cos(radius**2 / 26)[..., None]  # rings, the finer the farther out
times = jnp.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6])


@eqx.filter_jit
def noised(process):
    """The image at each of the times, with the same noise."""
    perturb = lambda t: process.perturb(jax.random.key(0), image, t)[0]
    return process.to_data(jax.vmap(perturb)(times))


@eqx.filter_jit
def blurred(process):
    def mean(t):
        transition = process.transition(t, 0.0)
        contrast = transition.blocks[0, 0, 0, 0]  # of frequency 0
        return transition.mv(process.encode(image)) / contrast

    return process.to_data(jax.vmap(mean)(times))


def draw_images():
    vp, bdm = gd.VP(image.shape), gd.BDM(image.shape)
    rows = {"VP": noised(vp), "BDM": noised(bdm), "mean of BDM": blurred(bdm)}
    figure, axes = plt.subplots(3, len(times), figsize=(8.4, 3.4), layout="constrained")
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, x in zip(row, images, strict=True):
            axis.imshow(x[..., 0], cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for axis, t in zip(axes[0], times, strict=True):
        axis.set_title(f"$t={t:.2f}$", fontsize=9)


draw_images()

# %% [markdown]
# ## R versus L
#
# A network predicts the noise $\epsilon$ in $u_t = \Psi(t, 0)\,x_0 + K_t\,\epsilon$, where
# $\Psi$ is the transition and $K_t K_t^\top = \Sigma_t$ the covariance. For VP and BDM,
# $K_t$ is one positive number per coordinate, and unique. For CLD, it is a 2 by 2 matrix,
# and can be multiplied by any rotation. The Cholesky factor $L_t$ is the obvious choice,
# and a bad one.
#
# For data at a single point, the score is $-\Sigma_t^{-1} (u - \Psi(t, 0)\,x_0)$. Along the
# probability flow, the deviation from the mean, $d_t$, therefore satisfies
#
# $$\dot d_t = \left(F_t + \tfrac{1}{2} G_t G_t^\top \Sigma_t^{-1}\right) d_t.$$
#
# Let $R_t$ be the square root of $\Sigma_t$ that satisfies the same equation (gDDIM,
# equation 17). Then the noise prediction $R_t^{-1} d_t$ is constant, and a step that
# extrapolates it is exact for any step size. In the frame $L_t = R_t Q_t$, the prediction
# is multiplied by a rotation, $Q_t^\top$.
#
# The next figure shows noise predictions along the flow for two data points, from five
# initial states (solid: position; dashed: velocity).

# %%
data = gd.GaussianMixture([[-1.0], [1.0]])
flow = gd.ProbabilityFlow(cld, data.model(cld))
grid = gd.time_grid(cld, 400)
start = cld.prior(jax.random.key(0), (5,))
states = dfx.diffeqsolve(
    flow,
    gd.GDDIM(),
    grid[0],
    grid[-1],
    None,
    start,
    saveat=dfx.SaveAt(ts=grid),
    stepsize_controller=dfx.StepTo(grid),
).ys


@jax.jit
def predictions(states):
    frame = lambda name: jax.vmap(lambda t, u: flow.noise(t, u, None, name))
    return frame("R")(grid, states), frame("cholesky")(grid, states)


in_r, in_l = predictions(states)


def draw_noise():
    figure, axes = plt.subplots(1, 3, figsize=(8.8, 2.8), layout="constrained")
    panels = [
        ("position and velocity", states),
        ("noise prediction in $R_t$", in_r),
        ("noise prediction in $L_t$", in_l),
    ]
    for axis, (title, values) in zip(axes, panels, strict=True):
        for i in range(5):
            axis.semilogx(grid, values.x[:, i, 0], color=f"C{i}", linewidth=1)
            axis.semilogx(grid, values.v[:, i, 0], "--", color=f"C{i}", linewidth=1)
        axis.set(title=title, xlabel="$t$", ylim=(-3, 3))


draw_noise()

# %% [markdown]
# In $R_t$, predictions change only while the flow chooses between the two points. Before
# and after, they are constant. In $L_t$, they keep rotating: about once until $t = 0.2$,
# and then at a rate proportional to $1 / t$.
#
# ## The effect on samples
#
# The same solver, of order 2, extrapolates in both frames. The model is the same too: the
# frame in which a model predicts (`frame` of [`gddim_eqx.ProbabilityFlow`][]) need not be
# that of the solver.

# %%
angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
process = gd.CLD((2,))
ring = gd.ProbabilityFlow(process, gd.GaussianMixture(centres, 0.05).model(process))


def draw(solver, n):
    ts = gd.time_grid(process, n, "quadratic")
    return np.asarray(gd.sample(ring, jax.random.key(0), 500, solver=solver, ts=ts).x)


in_r, in_l = gd.GDDIM(2, "noise"), gd.GDDIM(2, "noise", frame="cholesky")
exact = np.asarray(gd.sample(ring, jax.random.key(0), 500, 120).x)
error = lambda x: np.median(np.linalg.norm(x - exact, axis=1))
lines = ["steps     R_t     L_t"]
for n in (10, 20, 50, 100):
    lines += [f"{n:5} {error(draw(in_r, n)):7.1e} {error(draw(in_l, n)):7.1e}"]
print("\n".join(lines))


def draw_samples():
    samples = {"$R_t$, 20 steps": draw(in_r, 20), "$L_t$, 20 steps": draw(in_l, 20)}
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), layout="constrained")
    for axis, (title, x) in zip(axes, {"exact": exact, **samples}.items(), strict=True):
        axis.scatter(*x.T, s=4, alpha=0.5, linewidths=0)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title=title)
        axis.set(xticks=[], yticks=[])


draw_samples()

# %% [markdown]
# In $L_t$, 10 steps diverge, and with more steps the errors are two to three times as
# large.
#
# `GDDIM()`, the default, extrapolates the *data* prediction. This needs no frame, and is
# also constant for data at a single point. For VP and BDM, $R_t = L_t$ is one number per
# coordinate.
