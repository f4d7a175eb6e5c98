"""NCSN++ in NumPy and SciPy, for one sample, channels last, with parameters under the names
that Flax gives them. As in Flax they are made when they are first used."""

import collections
import math

import msgpack
import numpy as np
import scipy.signal
import scipy.special

import gddim_eqx as gd
from examples import authors_config


def silu(x):
    return x * scipy.special.expit(x)


def resampled(x, taps, up, down, before, after):
    """StyleGAN2's `upfirdn2d`: put zeros after each pixel, pad, convolve, leave out."""
    height, width, channels = x.shape
    y = np.zeros((height * up, width * up, channels))
    y[::up, ::up] = x
    # Negative padding cuts.
    grown = [(max(before, 0), max(after, 0))] * 2 + [(0, 0)]
    y = np.pad(y, grown)
    first, last = max(-before, 0), max(-after, 0)
    y = y[first : y.shape[0] - last, first : y.shape[1] - last]
    taps = np.asarray(taps, float) / sum(taps)
    kernel = up**2 * np.outer(taps, taps)[:, :, None]
    return scipy.signal.convolve(y, kernel, "valid", "direct")[::down, ::down]


def correlated(x, kernel):
    return np.stack(
        [
            scipy.signal.correlate(x, kernel[..., i], "valid", "direct")[..., 0]
            for i in range(kernel.shape[-1])
        ],
        axis=-1,
    )


class Oracle:
    """Called with a time and an input; `parameters` are there after the first call."""

    def __init__(self, config, seed=0):
        self.config = config
        self.parameters = {}
        self.random = np.random.default_rng(seed)
        self.taps = tuple(config["fir_kernel"]) if config["fir"] else (1, 1)

    def parameter(self, name, *shape, scale=None):
        name = self.path + name
        if name not in self.parameters:
            fan = math.prod(shape[:-1]) if len(shape) > 1 else 4
            values = self.random.normal(size=shape) * (scale or fan**-0.5)
            self.parameters[name] = values.astype(np.float32)
        assert self.parameters[name].shape == shape
        return self.parameters[name].astype(np.float64)

    def within(self, kind, function, *arguments):
        """Call a function within the next module of a kind."""
        outside = self.path
        number = self.counts[outside + kind]
        self.counts[outside + kind] += 1
        self.path = f"{outside}{kind}_{number}/"
        result = function(*arguments)
        self.path = outside
        return result

    def dense(self, x, size):
        kernel = lambda: self.parameter("kernel", x.shape[-1], size)
        return self.within("Dense", lambda: x @ kernel() + self.parameter("bias", size))

    def pointwise(self, x, size):
        kernel = lambda: self.parameter("W", x.shape[-1], size)
        return self.within("NIN", lambda: x @ kernel() + self.parameter("b", size))

    def convolution(self, x, out, size=3, stride=1):
        def run():
            kernel = self.parameter("kernel", size, size, x.shape[-1], out)
            # What "SAME" means in TensorFlow for even heights.
            border = (0, 1) if stride == 2 else (size // 2, size // 2)
            y = correlated(np.pad(x, (border, border, (0, 0))), kernel)
            return y[::stride, ::stride] + self.parameter("bias", out)

        return self.within("Conv", run)

    def normalised(self, x):
        def run():
            groups = min(x.shape[-1] // 4, 32)
            y = x.reshape(-1, groups, x.shape[-1] // groups)
            y = y - y.mean((0, 2), keepdims=True)
            y = y / np.sqrt((y**2).mean((0, 2), keepdims=True) + 1e-6)
            scale = self.parameter("scale", x.shape[-1], scale=1.0)
            return y.reshape(x.shape) * scale + self.parameter("bias", x.shape[-1])

        return self.within("GroupNorm", run)

    def enlarged(self, x):
        extra = len(self.taps) - 2
        return resampled(x, self.taps, 2, 1, (extra + 1) // 2 + 1, extra // 2)

    def reduced(self, x):
        extra = len(self.taps) - 2
        return resampled(x, self.taps, 1, 2, (extra + 1) // 2, extra // 2)

    def downsample(self, x, out, convolve):
        def filtered():
            kernel = self.parameter("weight", 3, 3, x.shape[-1], out)
            extra = len(self.taps)
            y = resampled(x, self.taps, 1, 1, (extra + 1) // 2, extra // 2)
            return correlated(y, kernel)[::2, ::2] + self.parameter("bias", out)

        if not convolve:
            return self.within("Downsample", self.reduced, x)
        if self.config["fir"]:
            return self.within("Downsample", self.within, "Conv2d", filtered)
        return self.within("Downsample", self.convolution, x, out, 3, 2)

    def upsample(self, x):
        def filtered():
            # A transposed convolution, then the filter.
            kernel = self.parameter("weight", 3, 3, x.shape[-1], x.shape[-1])
            apart = np.zeros((2 * x.shape[0] + 3, 2 * x.shape[1] + 3, x.shape[2]))
            apart[2:-2:2, 2:-2:2] = x
            extra = len(self.taps) - 4
            y = correlated(apart, kernel)
            y = 4 * resampled(y, self.taps, 1, 1, (extra + 1) // 2 + 1, extra // 2 + 1)
            return y + self.parameter("bias", x.shape[-1])

        if not self.config["resamp_with_conv"]:
            return self.within("Upsample", self.enlarged, x)
        if self.config["fir"]:
            return self.within("Upsample", self.within, "Conv2d", filtered)
        repeated = x.repeat(2, 0).repeat(2, 1)
        return self.within("Upsample", self.convolution, repeated, x.shape[-1])

    def added(self, x, y):
        return (x + y) / (np.sqrt(2) if self.config["skip_rescale"] else 1)

    def attention(self, x):
        def run():
            channels = x.shape[-1]
            h = self.normalised(x).reshape(-1, channels)
            query, key, value = (self.pointwise(h, channels) for _ in range(3))
            weights = scipy.special.softmax(query @ key.T * channels**-0.5, axis=-1)
            return self.added(x, self.pointwise(weights @ value, channels).reshape(x.shape))

        return self.within("AttnBlockpp", run)

    def block(self, x, out, embedding, change=None):
        biggan = self.config["resblock_type"] == "biggan"

        def run(x):
            h = silu(self.normalised(x))
            if change is not None:
                h, x = change(h), change(x)
            h = self.convolution(h, out)
            if embedding is not None:
                h = h + self.dense(silu(embedding), out)
            h = self.convolution(silu(self.normalised(h)), out)
            if x.shape[-1] != out or change is not None:
                x = self.convolution(x, out, 1) if biggan else self.pointwise(x, out)
            return self.added(x, h)

        return self.within(f"ResnetBlock{'BigGAN' if biggan else 'DDPM'}pp", run, x)

    def embedding(self, label):
        size = self.config["nf"]
        if self.config["embedding_type"] == "fourier":
            frequencies = lambda: self.parameter("W", size, scale=16.0)
            phases = self.within("GaussianFourierProjection", frequencies)
            phases = np.log(label) * phases * 2 * np.pi
        else:
            phases = label * 10_000 ** (-np.arange(size // 2) / (size // 2 - 1))
        if not self.config.get("conditional", True):
            return None
        features = np.concatenate([np.sin(phases), np.cos(phases)])
        return self.dense(silu(self.dense(features, 4 * size)), 4 * size)

    def __call__(self, t, x):
        self.path, self.counts = "", collections.Counter()
        config, size = self.config, self.config["nf"]
        biggan = config["resblock_type"] == "biggan"
        attended = lambda h: (
            self.attention(h) if h.shape[0] in config["attn_resolutions"] else h
        )
        embedding = self.embedding(999 * t)
        pyramid, hs = x, [self.convolution(x, size)]
        for level, multiplier in enumerate(config["ch_mult"]):
            for _ in range(config["num_res_blocks"]):
                hs.append(attended(self.block(hs[-1], size * multiplier, embedding)))
            if level < len(config["ch_mult"]) - 1:
                channels = hs[-1].shape[-1]
                if biggan:
                    h = self.block(hs[-1], channels, embedding, self.reduced)
                else:
                    h = self.downsample(hs[-1], channels, config["resamp_with_conv"])
                if config["progressive_input"] == "residual":
                    pyramid = self.downsample(pyramid, channels, True)
                    h = pyramid = self.added(pyramid, h)
                hs.append(h)
        h = self.block(hs[-1], hs[-1].shape[-1], embedding)
        h = self.block(self.attention(h), h.shape[-1], embedding)
        for level, multiplier in reversed(list(enumerate(config["ch_mult"]))):
            for _ in range(config["num_res_blocks"] + 1):
                h = np.concatenate([h, hs.pop()], axis=-1)
                h = self.block(h, size * multiplier, embedding)
            h = attended(h)
            if level > 0 and biggan:
                h = self.block(h, h.shape[-1], embedding, self.enlarged)
            elif level > 0:
                h = self.upsample(h)
        return self.convolution(silu(self.normalised(h)), x.shape[-1])


def write_checkpoint(path, parameters, **others):
    """As Flax writes it, with the state that the authors' code keeps."""

    def pack(x):
        form = (x.shape, x.dtype.name, x.tobytes())
        return msgpack.ExtType(1 if x.ndim else 3, msgpack.packb(form))

    tree = {}
    for name, value in parameters.items():
        *outer, last = name.split("/")
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    state = dict(params_ema=tree, step=np.int32(7), rng=np.zeros(2, np.uint32)) | others
    state = {key: value for key, value in state.items() if value is not None}
    path.write_bytes(msgpack.packb(state, default=pack))


config = dict(
    nf=8,
    ch_mult=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[8],
    resamp_with_conv=True,
    conditional=True,
    fir=True,
    fir_kernel=[1, 3, 3, 1],
    skip_rescale=True,
    resblock_type="biggan",
    progressive="none",
    progressive_input="residual",
    progressive_combine="sum",
    embedding_type="fourier",
    fourier_scale=16,
    init_scale=0.0,
    dropout=0.1,
    normalization="GroupNorm",
    nonlinearity="swish",
    scale_by_sigma=False,
    conv_size=3,
)


def authors_network(folder, size=(16, 16), channels=2, **changes):
    """A network from a checkpoint with random parameters, and what it should compute."""
    oracle = Oracle(config | changes)
    oracle(0.5, np.zeros((*size, channels)))
    write_checkpoint(folder / "checkpoint", oracle.parameters)
    network = authors_config.network(oracle.config, channels, size)
    return gd.checkpoints.load_authors(folder / "checkpoint", network), oracle
