import io

import numpy as np


def read_latents(data, shape):
    return np.load(io.BytesIO(data), allow_pickle=False)


def write_latents(z, form):
    b = io.BytesIO()
    np.save(b, z)
    return b.getvalue()
