"""Bring your own model: five conventions, one line each.

Diffusion and flow-matching models differ in the path from data to noise, in what they
predict, and in their time input. Here are five networks in the conventions of other
projects, all for the same data, eight Gaussians on a ring. As these networks are exact, all
rows of the table agree, up to the discretisation error with few steps:

    python examples/bring_your_model.py

Takes less than a minute on two CPU cores.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import gddim_eqx as gd
from gddim_eqx.metrics import sliced_wasserstein


_angles = 2 * jnp.pi * jnp.arange(8) / 8
_centres = jnp.stack([jnp.cos(_angles), jnp.sin(_angles)], axis=-1)
_std = 0.05


def denoise(x: Array, signal: Array, noise: Array) -> Array:
    """The mean of the data given `x = signal * data + noise * eps`: the exact data
    prediction, from which the networks below are computed."""
    variance = (signal * _std) ** 2 + noise**2
    rest = x[:, None] - signal * _centres[None]
    weights = jax.nn.softmax(-0.5 * (rest**2).sum(-1) / variance, axis=-1)
    means = _centres[None] + signal * _std**2 / variance * rest
    return (weights[..., None] * means).sum(1)


# 1. DDPM: predicts the noise, from the index of one of 1,000 noise levels.

_betas = np.linspace(1e-4, 0.02, 1000)
_alphas_cumprod = jnp.cumprod(1 - _betas)


def ddpm_network(x, index):
    alpha = jnp.interp(index, jnp.arange(1000.0), _alphas_cumprod)
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    return (x - signal * denoise(x, signal, noise)) / noise


def ddpm() -> gd.ProbabilityFlow:
    process = gd.VP.from_betas((2,), _betas)
    network = lambda index, x, args: ddpm_network(x, index)
    return gd.ProbabilityFlow(process, gd.WithTime(process, network, "index"), "noise")


# 2. EDM: predicts the data, from the noise level.


def edm_network(x, sigma):
    return denoise(x, jnp.ones_like(sigma), sigma)


def edm() -> gd.ProbabilityFlow:
    model = lambda t, x, args: edm_network(x, t)
    return gd.ProbabilityFlow(gd.EDM((2,)), model, "data")


# 3. Flow matching: predicts the velocity, from 1000 t, with noise at t = 0, data at t = 1.


def flow_network(x, time):
    t = 1 - time / 1000
    data = denoise(x, 1 - t, t)
    return (data - x) / t


def flow_matching() -> gd.ProbabilityFlow:
    # In gddim_eqx time runs from data to noise, so the velocity has the opposite sign.
    model = lambda t, x, args: -flow_network(x, 1000 * (1 - t))
    return gd.ProbabilityFlow(gd.RectifiedFlow((2,)), model, "flow")


# 4. Latent diffusion with zero-terminal SNR: predicts v, and comes with a configuration.

_config = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def v_network(x, index):
    roots = jnp.sqrt(jnp.cumprod(1 - jnp.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    signal = jnp.interp(index, jnp.arange(1000.0), roots)
    noise = jnp.sqrt(1 - signal**2)
    data = denoise(x, signal, noise)
    return signal * (x - signal * data) / noise - noise * data


def v_prediction() -> gd.ProbabilityFlow:
    process, predicts, network_time, _, _ = gd.process_from_config(_config, (2,))
    model = lambda t, x, args: v_network(x, network_time(t))
    return gd.ProbabilityFlow(process, model, predicts)


# 5. score_sde: predicts the score of the continuous VP diffusion, from 999 t.


def score_network(x, label):
    t = label / 999
    integral = 0.1 * t + 0.5 * (20 - 0.1) * t**2
    signal, variance = jnp.exp(-0.5 * integral), -jnp.expm1(-integral)
    return -(x - signal * denoise(x, signal, jnp.sqrt(variance))) / variance


def score_sde() -> gd.ProbabilityFlow:
    model = lambda t, x, args: score_network(x, 999 * t)
    return gd.ProbabilityFlow(gd.VP((2,)), model, "score")


CONVENTIONS = {
    "DDPM: noise, from an index": ddpm,
    "EDM: data, from sigma": edm,
    "flow matching: velocity, from 1000 t": flow_matching,
    "zero-terminal SNR: v, from an index": v_prediction,
    "score_sde: score, from 999 t": score_sde,
}


def distances(number: int, evaluations: list[int]) -> dict[str, list[float]]:
    """The sliced Wasserstein distances between samples and data, for each convention."""
    data = gd.GaussianMixture(_centres, _std).sample(jax.random.key(1), number)
    found = {}
    for name, make in CONVENTIONS.items():
        samples = [
            gd.sample(make(), jax.random.key(0), number, num_steps=steps)[0]
            for steps in evaluations
        ]
        found[name] = [sliced_wasserstein(np.asarray(x), np.asarray(data)) for x in samples]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Five models in their own conventions.")
    parser.add_argument("--number", type=int, default=4000, help="samples per row")
    number = parser.parse_args().number
    evaluations = [5, 20]
    print(f"Sliced Wasserstein distance between {number} GDDIM() samples and data, with")
    print(f"{'':38}" + "".join(f"{n:>8}" for n in evaluations) + "   evaluations")
    for name, row in distances(number, evaluations).items():
        print(f"{name:38}" + "".join(f"{x:8.4f}" for x in row))
    other = gd.GaussianMixture(_centres, _std).sample(jax.random.key(2), number)
    data = gd.GaussianMixture(_centres, _std).sample(jax.random.key(1), number)
    floor = sliced_wasserstein(np.asarray(other), np.asarray(data))
    print(f"{'other data':38}" + f"{floor:8.4f}" * len(evaluations))


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
