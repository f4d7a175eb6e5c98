# %% [markdown]
# # A conditional model
#
# This tutorial trains a single network with and without labels, using
# `condition_dropout`, and guides it with [`gddim_eqx.classifier_free_guidance`][]. Labels
# are passed to training with the data, and to the sampler as `args`.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import gddim_eqx as gd
from gddim_eqx.training import Batches, DenoisingLoss, fit, StratifiedTimes, Trainer


plt.rcParams["figure.facecolor"] = "white"
colours = np.array(["tab:blue", "tab:orange", "tab:green"])

# %% [markdown]
# ## Labelled data
#
# The data are three arms that overlap near the origin.

# %%
random = np.random.default_rng(0)
labels = np.arange(6000) % 3
radius = np.abs(random.normal(1.0, 0.5, 6000))
angle = 2 * np.pi / 3 * labels + 0.8 * radius + 0.35 * random.normal(size=6000)
points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
points = points.astype(np.float32)

# %% [markdown]
# ## Train
#
# `num_classes` adds an embedding of the labels 0 to 2 to the network. Label 3,
# `network.no_condition`, is the null label. `condition_dropout` replaces a tenth of the
# labels with the null label.

# %%
process = gd.VP((2,))
network = gd.nn.presets.points(2, key=jax.random.key(0), num_classes=3)
model = gd.nn.NetworkModel(process, network, data_std=float(points.std()))
loss = DenoisingLoss(
    process,
    "data",  # what a preconditioned model predicts
    weighting="noise",
    times=StratifiedTimes(),
    condition_dropout=0.1,
    no_condition=network.no_condition,
)
learning_rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, 1200)
trainer = Trainer(loss, optax.adam(learning_rate), ema_decay=0.99)
batches = Batches((points, labels), 128)
start = trainer.init(model, jax.random.key(1))
state = fit(trainer, start, batches, 1200, progress=False)

# %% [markdown]
# ## Guide
#
# The guided prediction is `unconditional + scale * (conditional - unconditional)`. Scale 1
# is the conditional model. Larger scales move samples away from what their class shares
# with the others. `args` contains one label per sample. The scale is not compiled into the
# program, so changing it does not trigger recompilation. It may also be one number per
# sample, or a function of time.
#
# A guided step takes two evaluations of the network.

# %%
args, key = np.arange(600) % 3, jax.random.key(2)
samples = {"data": points[:600]}
flow = gd.ProbabilityFlow(process, state.averaged)
for scale in (1.0, 2.0, 4.0):
    guided = gd.classifier_free_guidance(flow, scale=scale)
    x, _ = gd.sample(guided, key, 600, 20, args=args)
    samples[f"scale {scale:.0f}"] = x


def scatter(samples, args):
    figure, axes = plt.subplots(
        1, len(samples), figsize=(2.3 * len(samples), 2.7), layout="constrained"
    )
    for axis, (title, x) in zip(axes, samples.items(), strict=True):
        axis.scatter(*np.asarray(x).T, s=4, c=colours[args], alpha=0.6, linewidths=0)
        axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=title)
        axis.set(xticks=[], yticks=[])


scatter(samples, args)

# %% [markdown]
# With scale 1, samples follow the distribution of their class. Larger scales trade
# diversity for agreement with the label. If samples overshoot, guide only at intermediate
# times, with `interval=(0.1, 0.8)`.
#
# ## Other conditions
#
# - For unconditional samples, pass `args=np.full(600, network.no_condition)`.
# - To use the same label for every sample without passing `args`, use
#   [`gddim_eqx.with_args`][].
# - To push samples away from one class, pass `with_args(flow, 0)` as the `unconditional`
#   argument of [`gddim_eqx.classifier_free_guidance`][].
#
# ## Next steps
#
# - Two of the included models are class-conditional: `fashion-mnist-cld-classes` and
#   `fashion-mnist-vp-classes`. See [`gddim_eqx.checkpoints.pretrained`][].
# - To condition on context vectors rather than labels, create the network with
#   `context_size`.
# - Two kinds of guidance need no training with conditions:
#   [`gddim_eqx.posterior_guidance`][] conditions on a measurement, and
#   [`gddim_eqx.classifier_guidance`][] uses the gradient of a classifier.
