"""The flow convention: t = 0 is noise, t = 1 is data.

    z_t = t z + (1 - t) noise
    velocity = dz_t/dt = z - noise = (z_hat - z_t) / (1 - t)
    z_r = z_t + (r - t) velocity

t = 1 is never evaluated. The functions take numpy arrays and torch tensors alike: z, z_t, z_hat and noise
[..., L, C]; t and r are floats, or broadcast against these.
"""

from typing import Any


def add_noise(z: Any, noise: Any, t: Any) -> Any:
    """The point z_t on the straight path from noise (t = 0) to z (t = 1)."""
    return t * z + (1 - t) * noise


def velocity(z_hat: Any, z_t: Any, t: Any) -> Any:
    """The velocity at z_t that the clean estimate z_hat implies; t < 1."""
    return (z_hat - z_t) / (1 - t)


def jump(z_hat: Any, z_t: Any, t: Any, r: Any) -> Any:
    """The point z_r that is reached from z_t in a straight line with the velocity of z_hat; 0 <= t <= r <= 1, t < 1.

    At r = 1 it is z_hat.
    """
    return z_t + (r - t) * velocity(z_hat, z_t, t)


def from_velocity(v: Any, z_t: Any, t: Any) -> Any:
    """The clean estimate that a velocity at z_t implies: the inverse of `velocity`."""
    return z_t + (1 - t) * v
