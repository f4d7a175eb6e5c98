# %% [markdown]
# # What CLD and BDM do to a distribution
#
# All processes are linear, $\mathrm{d}u = F_t u\,\mathrm{d}t + G_t\,\mathrm{d}w$, and turn
# any data into Gaussian noise. They differ in how.
#
# - **VP** shrinks the data, and adds noise to every coordinate directly.
# - **CLD** adds noise to a velocity only, which moves the data: their paths are smooth.
# - **BDM** shrinks high frequencies of an image first: the data are blurred while noise is
#   added.

# %%
import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd


plt.rcParams["figure.facecolor"] = "white"

# %% [markdown]
# ## Position and velocity
#
# Data points near -1 and 1, along Brownian paths. The forward diffusion is an SDE for
# Diffrax, with the coefficients `process.drift` and `process.diffusion`.

# %%
points = jnp.array([[-1.0], [-1.0], [-1.0], [1.0], [1.0], [1.0]])
width = 0.1  # of the two Gaussians
ts = jnp.linspace(0, 1, 501)


def forward(process, key):
    """The paths of the points, at times ts."""
    start, _ = process.perturb(key, points, 0.0)  # CLD draws a velocity
    shape = jax.eval_shape(lambda: start)
    brownian = dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, shape, key)
    terms = dfx.MultiTerm(
        dfx.ODETerm(lambda t, u, args: process.drift(t).mv(u)),
        dfx.ControlTerm(lambda t, u, args: process.diffusion(t), brownian),
    )
    saved = dfx.SaveAt(ts=ts)
    return dfx.diffeqsolve(terms, dfx.Euler(), 0.0, 1.0, 1e-3, start, saveat=saved).ys


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
of_vp, of_cld = (forward(process, jax.random.key(2)) for process in (vp, cld))


def draw_paths():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = [
        ("VP: $x$", vp, 0, of_vp),
        ("CLD: position $x$", cld, 0, of_cld.x),
        ("CLD: velocity $v$", cld, 1, of_cld.v),
    ]
    for axis, (title, process, component, paths) in zip(axes, panels, strict=True):
        values = jnp.linspace(-2.5, 2.5, 301) * (1 if component == 0 else 0.6)
        shade = density(process, component, values)
        axis.pcolormesh(ts, values, shade**0.5, cmap="Greys", vmax=1.6, rasterized=True)
        axis.plot(ts, paths[..., 0], linewidth=1)
        axis.set(title=title, xlabel="$t$")


draw_paths()

# %% [markdown]
# Sampling runs from right to left. Under CLD the score is needed for the velocity only, and
# it is the score of the velocity given the position. The initial velocity, with variance
# $\gamma M$, belongs to the noise: networks are trained on it as on the rest.
#
# ## Blurring
#
# One image under VP and under BDM; below, BDM's mean alone, at the contrast of the data. States
# of [`gddim_eqx.BDM`][] are cosine coefficients, and `to_data` makes images of them.

# %%
pretrained = gd.checkpoints.pretrained("fashion-mnist-bdm")
image = gd.sample(pretrained, jax.random.key(3), 1, 20).x[0]  # any image would do
times = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def noised(process, t):
    u, _ = process.perturb(jax.random.key(0), image, t)
    return process.to_data(u)


def blurred(process, t):
    mean = process.transition(t, 0.0).mv(process.encode(image))
    contrast = process.transition(t, 0.0).blocks[0, 0, 0, 0]  # of frequency 0
    return process.to_data(mean / contrast)


def draw_images():
    vp, bdm = gd.VP(image.shape), gd.BDM(image.shape)
    rows = [("VP", noised, vp), ("BDM", noised, bdm), ("mean of BDM", blurred, bdm)]
    figure, axes = plt.subplots(3, len(times), figsize=(10, 4), layout="constrained")
    for row, (name, function, process) in zip(axes, rows, strict=True):
        for axis, t in zip(row, times, strict=True):
            axis.imshow(function(process, t)[..., 0], cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"$t={t}$" if process is vp else "", fontsize=9)
        row[0].set_ylabel(name)


draw_images()

# %% [markdown]
# ## R against L
#
# A network predicts noise: $\epsilon$ in $u_t = \Psi(t, 0)\,x_0 + K_t\,\epsilon$, where
# $\Psi$ is the transition and $K_t K_t^\top = \Sigma_t$ the covariance. If noise is added to
# one component only, $K_t$ is a number per coordinate, and unique. For CLD it is a 2 by 2
# matrix, and any $K_t$ times a rotation is another. The Cholesky factor $L_t$ is the usual
# choice, and a bad one.
#
# For data at one point, the score is $-\Sigma_t^{-1} (u - \Psi(t, 0)\,x_0)$. So along the
# probability flow the deviation from the mean, $d_t$, satisfies
#
# $$\dot d_t = \left(F_t + \tfrac{1}{2} G_t G_t^\top \Sigma_t^{-1}\right) d_t.$$
#
# Let $R_t$ be the square root of $\Sigma_t$ that satisfies the same equation (gDDIM, equation
# 17). Then $R_t^{-1} d_t$ is constant: the noise prediction does not change, a step that
# extrapolates it is exact, whatever its length. In the frame $L_t = R_t Q_t$ it is multiplied
# by the rotation $Q_t^\top$, which turns the faster the closer $t$ is to 0.
#
# Here is the noise prediction along the flow of two data points, from five initial states,
# position solid and velocity dashed:

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
def predictions(frame):
    return jax.vmap(lambda t, u: flow.noise(t, u, None, frame))(grid, states)


in_r = jax.vmap(lambda t, u: flow.noise(t, u, None, "R"))(grid, states)
in_l = jax.vmap(lambda t, u: flow.noise(t, u, None, "cholesky"))(grid, states)


def draw_noise():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
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
# In $R_t$ predictions change only while the flow chooses between the two points, and are
# constant before and after. In $L_t$ they keep turning.
#
# ## What it means for samples
#
# The same solver, of order 2, in both frames, with 20 evaluations. The model is the same, and
# the frame in which it predicts does not matter: a prediction in one is converted to the
# other.

# %%
angles = jnp.arange(8) * jnp.pi / 4
centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
process = gd.CLD((2,))
ring = gd.ProbabilityFlow(process, gd.GaussianMixture(centres, 0.05).model(process))
draw = lambda solver, n: gd.sample(ring, jax.random.key(0), 1000, n, solver).x
exact = draw(gd.GDDIM(), 500)
samples = {
    "$R_t$": draw(gd.GDDIM(2, "noise"), 20),
    "$L_t$": draw(gd.GDDIM(2, "noise", factor="cholesky"), 20),
}


def draw_samples():
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.4), layout="constrained")
    for axis, (title, x) in zip(axes, {"exact flow": exact, **samples}.items()):
        error = np.median(np.linalg.norm(x - exact, axis=1))
        axis.scatter(*np.asarray(x).T, s=3, alpha=0.5, linewidths=0)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title=title)
        axis.set(xticks=[], yticks=[], xlabel=f"median error {error:.1e}")


draw_samples()

# %% [markdown]
# `GDDIM()`, the default, extrapolates the prediction of the *data*, which needs no frame. For
# data at one point it too is constant.
