"""The shape of a DSD network, and the named sizes.

The paper (arXiv 2511.14716) states only the parameter counts 42M, 118M and 205M at 256x256 with 1000 classes; every
other number here is our choice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsd_serve.errors import ConfigError, shown

PREDICTIONS = ("latents", "velocity")
MOST = {  # far above any useful network, so that a wrong file cannot exhaust memory
    "image_size": 4096,
    "patch_size": 4096,
    "latent_dim": 65536,
    "hidden_size": 65536,
    "depth": 1024,
    "num_heads": 1024,
    "num_classes": 100_000,
}
LEAST = {"num_classes": 0}  # of the others: 1
MOST_LATENTS = 2**24  # numbers in the latents of one image
MOST_NAME = 200  # characters of the name of a class
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network and its inputs and outputs.

    image_size, patch_size: pixels. latent_dim: channels C of one latent token. prediction: the meaning of the
    trunk's output in a denoise row, "latents" (the clean estimate itself, DSD) or "velocity" (the baselines of the
    collapse study); `denoise` returns the clean estimate either way. num_classes: 0 for a model without classes, which
    has only `null_label`. classes: the labels that were trained, empty for all. class_names: the name of each label;
    empty: labels are those of ImageNet-1k. class_wnids: the WordNet id of each label, "" where there is none; empty:
    there are none (or ImageNet-1k's). flow_map: the network takes the time r to jump to as a further input.
    Raises ConfigError if the numbers do not fit together.
    """

    image_size: int
    patch_size: int
    latent_dim: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = IMAGENET_CLASSES
    prediction: str = "latents"
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    class_wnids: tuple[str, ...] = ()
    flow_map: bool = False

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            least = LEAST.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size must be divisible by patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be divisible by num_heads, got {self.hidden_size} and {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size must be divisible by 4 for 2-D positions, got {self.hidden_size}")
        if self.latent_dim < 2:
            raise ConfigError("latent_dim must be 2 or more: the latent normaliser works over channels")
        if self.grid_size**2 * self.latent_dim > MOST_LATENTS:
            raise ConfigError(
                f"the latents of one image must be at most {MOST_LATENTS} numbers, got {self.grid_size}^2 x "
                f"{self.latent_dim}: raise patch_size or lower latent_dim"
            )
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {shown(self.prediction)}")
        if not isinstance(self.flow_map, bool):
            raise ConfigError(f"flow_map must be true or false, got {shown(self.flow_map)}")
        if self.flow_map and not self.late_blocks:
            raise ConfigError(f"a flow map needs a depth of 3 or more, for a third of its blocks, got {self.depth}")
        for label in self.classes:
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.num_classes:
                raise ConfigError(f"classes must be labels from 0 to {self.num_classes - 1}, got {shown(label)}")
        if len(set(self.classes)) != len(self.classes):
            raise ConfigError("classes must not name a label twice")
        if not self.class_names and self.num_classes > IMAGENET_CLASSES:
            raise ConfigError(f"class_names must name all {self.num_classes} classes: ImageNet-1k has fewer")
        for name, values, least in (("class_names", self.class_names, 1), ("class_wnids", self.class_wnids, 0)):
            if values and len(values) != self.num_classes:
                raise ConfigError(f"{name} must have {self.num_classes} items, one for each class, got {len(values)}")
            for text in values:
                if not isinstance(text, str) or not least <= len(text) <= MOST_NAME or text != text.strip():
                    raise ConfigError(
                        f"{name} must be texts of {least} to {MOST_NAME} characters without spaces around them, "
                        f"got {shown(text)}"
                    )
                if not text.isprintable():
                    raise ConfigError(f"{name} must be texts without control characters, got {shown(text)}")
        if self.class_wnids and not self.class_names:
            raise ConfigError("class_wnids need class_names")

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

    @property
    def grid_size(self) -> int:
        """Latent tokens along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, C) of one image's latents."""
        return self.grid_size**2, self.latent_dim

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of one image."""
        return 3, self.image_size, self.image_size

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """The labels that the network has seen, in order."""
        return tuple(sorted(self.classes)) if self.classes else tuple(range(self.num_classes))

    @property
    def drawable_labels(self) -> tuple[int, ...]:
        """The labels that images are drawn with: the trained classes, or the null label if there are none."""
        return self.trained_classes or (self.null_label,)

    @property
    def late_blocks(self) -> int:
        """The blocks at the end of the network that see r instead of t in a flow map (DMF, arXiv 2510.24474)."""
        return self.depth // 3

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        d, patch = self.hidden_size, 3 * self.patch_size**2
        block = 4 * d * d + d // self.num_heads + 3 * d * mlp_size(d) + 6 * d
        borders = 2 * (patch * d + self.latent_dim * d) + d + d + self.latent_dim + patch
        embeddings = 3 * d + (FREQUENCIES + d + 2) * d + (self.num_classes + 1) * d
        return self.depth * block + borders + embeddings + 6 * d * d + d

    def flops_per_row(self) -> int:
        """Floating-point operations of the matrix products of one denoise row (a multiply and an add count as two)."""
        tokens, d = self.latent_shape[0], self.hidden_size
        block = 2 * tokens * (4 * d * d + 3 * d * mlp_size(d)) + 2 * 2 * tokens * tokens * d
        borders = 2 * tokens * 2 * self.latent_dim * d
        conditioning = 2 * (FREQUENCIES * d + d * d + 6 * d * d)
        return self.depth * block + borders + conditioning * (2 if self.flow_map else 1)

    def to_dict(self) -> dict[str, Any]:
        """As in config.json. Keys that an ordinary model of ImageNet-1k does not need are left out, so that its hash
        stays as it was."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value or key not in LEFT_OUT_IF_EMPTY}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; ConfigError names a key that is unknown or missing."""
        if not isinstance(values, Mapping):
            raise ConfigError("the model configuration must be an object")
        lists = {key: values[key] for key in ("classes", *OWN_CLASSES) if key in values}
        for key, value in lists.items():
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{key} of the model configuration must be a list, got {shown(value)}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"unknown key {shown(unknown[0])} in the model configuration; known are {', '.join(sorted(known))}"
            )
        try:
            return cls(**{**values, **{key: tuple(value) for key, value in lists.items()}})
        except TypeError as error:
            raise ConfigError(f"the model configuration is incomplete: {error}") from None


OWN_CLASSES = ("class_names", "class_wnids")  # the keys of models whose classes are not ImageNet-1k's
LEFT_OUT_IF_EMPTY = (*OWN_CLASSES, "flow_map")
LATENT_EPS = 1e-5  # of the normalisation of each latent token over its channels
FREQUENCIES = 256  # width of the sinusoidal features of t, as in DiT


def mlp_size(hidden_size: int) -> int:
    """Inner width of a SwiGLU layer that costs 8 d^2 parameters, rounded to a multiple of 32."""
    return max(32, round(8 * hidden_size / 3 / 32) * 32)


PRESETS = {
    "dsd-s": ModelConfig(image_size=256, patch_size=16, latent_dim=32, hidden_size=384, depth=22, num_heads=6),
    "dsd-m": ModelConfig(image_size=256, patch_size=16, latent_dim=32, hidden_size=768, depth=16, num_heads=12),
    "dsd-b": ModelConfig(image_size=256, patch_size=16, latent_dim=32, hidden_size=768, depth=28, num_heads=12),
    "demo": ModelConfig(image_size=32, patch_size=8, latent_dim=32, hidden_size=192, depth=6, num_heads=6),
}
