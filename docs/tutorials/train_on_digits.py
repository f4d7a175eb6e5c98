# %% [markdown]
# # Train on digits
#
# [`gddim_eqx.training`](../api/training.md) has a loss for all processes, shuffled batches
# and a loop. Here it trains a small network on scikit-learn's scans of digits, 8x8 pixels.

# %%
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import gddim_eqx as gd
from gddim_eqx.training import (
    Batches,
    DataWeighting,
    DenoisingLoss,
    fit,
    StratifiedTimes,
    Trainer,
)


plt.rcParams["figure.facecolor"] = "white"

levels, _ = load_digits(return_X_y=True)  # From 0 to 16.
images = (levels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)


def show(rows):
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8, 0.75 * len(rows)), layout="constrained"
    )
    for axis, (name, x) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        x = np.pad(x[:16, ..., 0], ((0, 0), (1, 1), (1, 1)))
        axis.imshow(np.hstack(x), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)


show({"data": images})

# %% [markdown]
# ## Network and model
#
# A network is called on single samples, `network(t, x)`; [`gddim_eqx.nn.NetworkModel`][]
# makes it a model of the process. With `data_std`, the standard deviation of the data, the
# network is preconditioned: its output is of order 1 at all times, and the model predicts
# data. Always pass this. Without it training takes far longer, above all for CLD.
#
# `Trainer` scales integer images to [-1, 1], and samples have that range too.

# %%
process = gd.VP((8, 8, 1))
network = gd.nn.presets.mlp((8, 8, 1), key=jax.random.key(0), width=384)
data_std = float(np.std(images / 127.5 - 1))
model = gd.nn.NetworkModel(process, network, data_std=data_std)

# %% [markdown]
# For CLD, replace `gd.VP` by `gd.CLD`, and make the network by
# `gd.nn.presets.mlp((8, 8, 2), 1, key=jax.random.key(0), width=384)`: its input has two
# channels, those of the data and of the velocity, and its output still one. For points in
# the plane under CLD the network is `gd.nn.TimeMLP(4, 2, key=jax.random.key(0))`.

# %% [markdown]
# ## Train
#
# [`gddim_eqx.training.DataWeighting`][] gives errors of the data prediction equal weight at
# all times. With `weighting="noise"`, the paper's loss, errors of the noise prediction have
# equal weight, and late times, which decide what a sample looks like as a whole, hardly
# count. A model that knows only the standard deviation of the data has a loss of about 1.
# The best possible loss is well above 0, as late states say little about their data, so
# small decreases matter.

# %%
num_steps = 1200
weighting = DataWeighting(process, data_std)
loss = DenoisingLoss(process, "data", times=StratifiedTimes(), weighting=weighting)
learning_rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, num_steps)
trainer = Trainer(loss, optax.adam(learning_rate), ema_decay=0.99)
losses = []
begin = time.perf_counter()
state = fit(
    trainer,
    trainer.init(model, jax.random.key(1)),
    Batches(images, 128),
    num_steps,
    logs=[lambda step, metrics: losses.append(metrics["loss"])],
    log_every=300,
    progress=False,
)
seconds = time.perf_counter() - begin
print(f"{seconds:.0f} s; loss", ", ".join(f"{value:.2f}" for value in losses))

# %% [markdown]
# ## Sample
#
# `state.averaged` is the model with the average of its recent parameters. Pass the same
# `predicts` to `DenoisingLoss` and to [`gddim_eqx.ProbabilityFlow`][].

# %%
flow = gd.ProbabilityFlow(process, state.averaged, "data")
numbers = (3, 5, 10, 20, 50)
samples = {n: gd.to_uint8(gd.sample(flow, jax.random.key(2), 800, n).x) for n in numbers}
show({f"{n} evaluations": x for n, x in samples.items()} | {"data": images})

# %% [markdown]
# These look roughly like digits, after less than a minute of training. Longer training and
# a wider network improve them: `make demo`, or `python examples/train.py digits`, whose
# samples these are after four minutes:
#
# ![Samples after four minutes of training](../digits.png)

# %% [markdown]
# ## Measure
#
# The Frechet distance of pixels, between as many samples as real images. (For larger images
# use features: [`gddim_eqx.metrics.Inception`][], or a classifier of your own.) The last
# line is the distance between two halves of the data, the least to expect.

# %%
flat = lambda x: x.reshape(len(x), -1) / 127.5 - 1
order = np.random.default_rng(0).permutation(len(images))
one, other = images[order[:800]], images[order[800:1600]]
rows = {f"{n} evaluations": x for n, x in samples.items()} | {"other digits": other}
distance = lambda x: gd.metrics.frechet_distance(flat(x), flat(one))
print("\n".join(f"{name:>14}: {distance(x):.2f}" for name, x in rows.items()))

# %% [markdown]
# From 10 evaluations on it no longer falls: what remains is the error of the network. This
# tells whether to spend time on the solver or on training.
#
# ## Save and load
#
# The file describes the network and the process, so nothing else is needed to load it. For
# a network of your own, pass one of the same structure: `load(path, like=network)`.

# %%
gd.checkpoints.save("digits.npz", flow)
loaded = gd.checkpoints.load("digits.npz")
x, _ = gd.sample(loaded, jax.random.key(2), 800, 20)
print("same samples:", bool((gd.to_uint8(x) == samples[20]).all()))

# %% [markdown]
# ## Next
#
# - [`gddim_eqx.training.fit`][] also writes checkpoints, from which an interrupted run
#   resumes, and metrics; `examples/train.py` uses all of it.
# - `examples/quickstart.py` writes the training loop by hand, with Equinox and Optax only:
#   `process.perturb(key, x, t)` returns a noised state and the noise to predict.
# - [Conditional models](conditional_model.md).
