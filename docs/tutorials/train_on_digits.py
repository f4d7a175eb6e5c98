# %% [markdown]
# # Train on digits
#
# [`gddim_eqx.training`](../api/training.md) provides a loss for all processes, shuffled
# batches and a training loop. This tutorial trains a small network on scikit-learn's scans
# of digits, with 8x8 pixels.

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
# A network is called on single samples, as `network(t, x)`. [`gddim_eqx.nn.NetworkModel`][]
# turns it into a model for the process. With `data_std`, the standard deviation of the
# data, the network is preconditioned: its output is of order 1 at all times, and the model
# predicts the data. Always pass it. Without it, training takes far longer, especially for
# CLD.
#
# `Trainer` scales integer images to [-1, 1]. Samples have the same range.

# %%
process = gd.VP((8, 8, 1))
network = gd.nn.presets.mlp((8, 8, 1), key=jax.random.key(0), width=384)
data_std = float(np.std(images / 127.5 - 1))
model = gd.nn.NetworkModel(process, network, data_std=data_std)

# %% [markdown]
# For CLD, use `gd.CLD` instead of `gd.VP`, and build the network with
# `gd.nn.presets.mlp((8, 8, 2), 1, key=jax.random.key(0), width=384)`. The input has two
# channels, data and velocity; the output still has one. For 2-D points under CLD, use
# `gd.nn.TimeMLP(4, 2, key=jax.random.key(0))`.

# %% [markdown]
# ## Train
#
# [`gddim_eqx.training.DataWeighting`][] gives errors of the data prediction equal weight at
# all times. `weighting="noise"`, the paper's loss, gives equal weight to errors of the
# noise prediction. Late times then hardly count, although they determine the overall
# appearance of a sample. If a model knows only the standard deviation of the data, its loss
# is about 1. The best possible loss is well above 0, because late states contain little
# information about the data. Small decreases of the loss therefore matter.

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
# `state.averaged` is the model with the exponential moving average of its parameters. Pass
# the same `predicts` to `DenoisingLoss` and to [`gddim_eqx.ProbabilityFlow`][].

# %%
flow = gd.ProbabilityFlow(process, state.averaged, "data")
numbers = (3, 5, 10, 20, 50)
samples = {n: gd.to_uint8(gd.sample(flow, jax.random.key(2), 800, n).x) for n in numbers}
show({f"{n} evaluations": x for n, x in samples.items()} | {"data": images})

# %% [markdown]
# After less than a minute of training, these look roughly like digits. They improve with
# longer training and a wider network: run `make demo`, or
# `python examples/train.py digits`. The latter gives these samples after four minutes:
#
# ![Samples after four minutes of training](../digits.png)

# %% [markdown]
# ## Measure the sample quality
#
# The Fréchet distance of pixels compares equal numbers of samples and real images. (For
# larger images use features, from [`gddim_eqx.metrics.Inception`][] or your own
# classifier.) The last line is the distance between two halves of the data, the smallest
# value to expect.

# %%
flat = lambda x: x.reshape(len(x), -1) / 127.5 - 1
order = np.random.default_rng(0).permutation(len(images))
one, other = images[order[:800]], images[order[800:1600]]
rows = {f"{n} evaluations": x for n, x in samples.items()} | {"other digits": other}
distance = lambda x: gd.metrics.frechet_distance(flat(x), flat(one))
print("\n".join(f"{name:>14}: {distance(x):.2f}" for name, x in rows.items()))

# %% [markdown]
# Beyond 10 evaluations, the distance no longer decreases: the remaining error is the
# network's. A comparison like this tells you whether to spend time on the solver or on
# training.
#
# ## Save and load
#
# The file describes the network and the process, so nothing else is needed to load it. For
# your own network, pass one of the same structure: `load(path, like=network)`.

# %%
gd.checkpoints.save("digits.npz", flow)
loaded = gd.checkpoints.load("digits.npz")
x, _ = gd.sample(loaded, jax.random.key(2), 800, 20)
print("same samples:", bool((gd.to_uint8(x) == samples[20]).all()))

# %% [markdown]
# ## Next steps
#
# - [`gddim_eqx.training.fit`][] also writes metrics, and checkpoints from which an
#   interrupted run resumes. `examples/train.py` uses all of this.
# - `examples/quickstart.py` implements the training loop with Equinox and Optax only.
#   `process.perturb(key, x, t)` returns a noised state and the noise to predict.
# - [A conditional model](conditional_model.md) trains with labels.
