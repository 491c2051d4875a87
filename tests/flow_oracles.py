"""Exact velocities of simple distributions, for the tests of `mila_jax.flow`."""

import functools

import numpy as np
import jax
import jax.numpy as jnp

from mila_jax.flow.rectified_flow import align
from mila_jax.flow.sampler import sample_window

QUICK = {"xla_backend_optimization_level": 0}  # these programs run for microseconds and compile for seconds


def gaussian_velocity(mean, deviation):
    """Velocity of data N(mean, deviation² I)."""

    def velocity(latents, levels, conditions):
        level = align(levels, latents)
        residual = (latents - (1 - level) * mean) / ((1 - level) ** 2 * deviation**2 + level**2)
        return mean + (1 - level) * deviation**2 * residual - level * residual

    return velocity


def ar1(frames, rho=0.97):
    """Covariance of a stationary first-order autoregressive process."""
    i = np.arange(frames)
    return rho ** np.abs(i[:, None] - i)


def conditional(covariance, known):
    """(regression on the first `known` frames, covariance of the others given them)."""
    head, cross = covariance[:known, :known], covariance[known:, :known]
    regression = cross @ np.linalg.inv(head)
    return regression, covariance[known:, known:] - regression @ cross.T


def linear_velocity(covariance):
    """Velocity of zero-mean Gaussian data whose frames have this covariance; every sample must have the same levels."""

    def velocity(latents, levels, conditions):
        level = levels[0, 0]
        keep = 1 - level
        total = keep[:, None] * covariance * keep + jnp.diag(level**2)
        inverse = jnp.linalg.inv(total + 1e-9 * jnp.eye(len(level)))
        matrix = (covariance * keep) @ inverse - level[:, None] * inverse
        return jnp.einsum("ij,bvjhwc->bvihwc", matrix, latents)

    return velocity


@functools.partial(jax.jit, compiler_options=QUICK)
def _run_linear(x, schedule, covariance):
    return sample_window(linear_velocity(covariance), x, schedule, None)


def transfer_matrix(covariance, schedule):
    """What the sampler does to the start of a window of such data: end = matrix @ start (it is linear), float64."""
    frames = len(covariance)
    basis = jnp.eye(frames)[:, None, :, None, None, None]
    end = _run_linear(basis, schedule, jnp.asarray(covariance, jnp.float32))
    return np.asarray(end[:, 0, :, 0, 0, 0], np.float64).T


def wasserstein(a, b):
    """Squared 2-Wasserstein distance per dimension between N(0, a) and N(0, b)."""
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b @ root)
    return (np.trace(a + b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()) / len(a)
