"""The training configuration: strict pydantic models, read from TOML and overridden from the command line.

The comment at each value says whether the paper (arXiv 2511.14716) states it, related work such as UNITE
(arXiv 2603.22283) uses it, or we chose it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    field_validator,
    model_validator,
)

from dsd_serve.config import IMAGENET_CLASSES, PRESETS, ModelConfig
from dsd_serve.errors import ConfigError
from training.config_file import Section, read_config

FromList = Strict(False)  # of a tuple: TOML has lists; the items stay strict
Share = Annotated[float, Field(ge=0, le=1)]
Objective = Literal["dsd", "stop_gradient", "naive"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


class ModelSection(Section):
    """The network: a preset of dsd_serve/config.py, and what differs from it."""

    preset: str = "demo"
    image_size: int | None = None
    patch_size: int | None = None
    latent_dim: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    num_classes: int | None = None  # left out: that of the data
    class_names: Annotated[
        tuple[str, ...], FromList
    ] = ()  # the name of each label, to fix their order; left out: those of the data

    @field_validator("preset")
    @classmethod
    def known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            raise ConfigError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return name

    @model_validator(mode="after")
    def classes_have_names(self) -> Self:
        number, names = self.num_classes, self.class_names
        if number is not None and number != len(names) and (names or number not in (0, IMAGENET_CLASSES)):
            raise ConfigError(
                f"model.num_classes must be the number of model.class_names, {len(names)}, or without names "
                f"{IMAGENET_CLASSES} for the classes of ImageNet-1k, got {number}; leave it out to take the data's"
            )
        return self


class DataSection(Section):
    """The images, and their augmentation; see training/sources for the layouts.

    A step flips, crops and then changes colours; the random numbers depend on the seed and the position in the run.
    """

    path: str = ""
    validation: str = ""  # held-out images, with classes of the same names; empty: a share of `path` is held out
    validation_share: Share = 0.0  # of each class; 0: see training/dataset.py
    labels: Literal["auto", "imagenet", "own", "none"] = "auto"  # auto: ImageNet's if all names are its wnids or labels
    classes: tuple[int | str, ...] = ()  # classes to keep, by name, wnid or label; empty: all
    image_column: str = ""  # of parquet, CSV and hf:NAME; empty: the one with a usual name
    label_column: str = ""  # as image_column; a key of the .json members of webdataset shards
    broken_share: Share = 0.05  # images that cannot be read are skipped up to this share; beyond it the run stops
    resize: Literal["fit", "adm"] = (
        "fit"  # as the server does; or as ADM, with which FID statistics of ImageNet are made
    )
    shuffle_shards: NonNegativeInt = 0  # tar shards shuffled at a time, read nearly in a row; 0: all images at once
    balance: bool = False  # batches have equally many images of each class, as far as possible; rare images repeat
    flip: bool = True  # horizontal flips; the paper has augmentation, but does not say which
    crop: Share = 1.0  # smallest share of the area of a random square crop; 1: off
    colour: Share = 0.0  # largest change of brightness, contrast and saturation, as a share; 0: off
    memory_gb: float = 8.0  # decoded images up to this size are held in memory, by all processes of a machine
    num_workers: NonNegativeInt = 2  # decoding processes for each training process, if images are not held in memory

    @field_validator("classes", mode="before")
    @classmethod
    def names_or_labels(cls, values: Any) -> Any:
        if not isinstance(values, list | tuple):
            raise ConfigError(f"data.classes must be a list, got {values!r}")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ConfigError(f"data.classes must be a list of names or labels, got {value!r}")
        return tuple(values)

    @model_validator(mode="after")
    def possible_values(self) -> Self:
        if self.crop == 0:
            raise ConfigError("data.crop must be above 0: images are cropped to this share of their area, got 0")
        if self.balance and self.shuffle_shards:
            raise ConfigError("data.balance mixes all images, so data.shuffle_shards must be 0")
        return self


class LossSection(Section):
    """The objective and its parts. The paper states the parts but not their weights: all numbers are our choice."""

    objective: Objective = "dsd"  # stated: dsd is both remedies; stop_gradient the first alone; naive none
    denoise_weight: NonNegativeFloat = 1.0
    denoise_weighting: Literal["uniform", "velocity"] = "velocity"  # 1 / (1 - t)^2, 1 - t floored, as UNITE's code
    denoise_floor: PositiveFloat = 0.3  # of 1 - t in that weight
    num_draws: PositiveInt = 2  # noise draws per encoding (UNITE: 1 to 14)
    t_mean: float = 0.0  # t = sigmoid(normal(t_mean, t_std)); the paper's distribution is unknown
    t_std: float = 1.0
    t_shift: PositiveFloat = 1.0  # s in t' = s t / (1 - (1 - s) t): below 1 towards noise (UNITE: 0.5), 1 is off
    class_dropout: Share = 0.1  # share of rows whose label becomes null_label, for guidance
    gradient_through_z_t: bool = True  # inferred from the paper's P(z1, t, eps): only the target is detached
    mask_ratio: Share = (
        0.25  # stated: masking as an example of augmentation. Share of patches hidden from the encoder ...
    )
    mask_probability: Share = 0.0  # ... in this share of images
    reconstruction_weight: NonNegativeFloat = 4.0  # stated: a reconstruction task
    reconstruction_norm: Literal["l1", "l2"] = "l1"
    reconstruction_noise: Share = 0.5  # share of images whose latents are noised before decoding (UNITE)
    reconstruction_t: Share = 0.7  # lowest t of that noise
    pyramid_weight: NonNegativeFloat = 0.0  # ours: l1 of every band of a Laplacian pyramid; needs no network
    lpips_weight: NonNegativeFloat = 0.0  # UNITE: 1.0 with an l1 of weight 1, of images in [0, 1]; its weights are in
    lpips_file: str = ""  # a safetensors file that you have, see training/teachers.py; nothing is downloaded
    alignment_weight: NonNegativeFloat = 0.25  # stated: ViT layer alignment; ours: of denoise rows to the EMA encoder
    alignment_layer: int = 0  # 1 is the first block; 0: the middle one
    vision_weight: NonNegativeFloat = 0.0  # REPA (arXiv 2410.06940): 0.5. A later paper lists DSD with a vision model
    vision_model: str = ""  # an ONNX file of your choice, see training/teachers.py; the same layer as alignment_layer
    representation_weight: NonNegativeFloat = 0.25  # stated: self-distillation of representations; ours: encode, cosine
    classification_weight: NonNegativeFloat = 0.1  # stated: a classification loss; ours: linear, on the tokens' mean

    @model_validator(mode="after")
    def networks_are_named(self) -> Self:
        for weight, name in (("lpips_weight", "lpips_file"), ("vision_weight", "vision_model")):
            if getattr(self, weight) and not getattr(self, name):
                raise ConfigError(f"loss.{weight} is above 0, so loss.{name} must name a file")
        return self


class OptimSection(Section):
    """Optimiser and length. The paper states only 50 epochs for its results."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 128  # images per step, over all devices
    micro_batch_size: PositiveInt = 128  # images per forward pass; steps accumulate gradients over them
    name: Literal["adamw", "muon"] = "muon"  # UNITE: Muon for the matrices of the blocks, AdamW for all else
    lr: PositiveFloat = 1e-3  # of both: Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982)
    lr_final: Share = 0.05  # share of lr that is left at the end of the cosine
    warmup_steps: int = 200
    weight_decay: float = 0.01
    betas: Annotated[tuple[float, ...], FromList, Field(min_length=2, max_length=2)] = (0.9, 0.95)  # of AdamW
    momentum: Share = 0.95  # of Muon (its authors')
    grad_clip: PositiveFloat = 1.0
    frozen: Annotated[tuple[str, ...], FromList] = ()  # modules that keep the weights of run.start_from, like blocks.0
    ema_decay: Share = 0.999  # of the EMA copy, which is the target encoder and what is exported

    @model_validator(mode="after")
    def whole_micro_batches(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                "optim.batch_size must be a multiple of optim.micro_batch_size, "
                f"got {self.batch_size} and {self.micro_batch_size}"
            )
        return self


class RunSection(Section):
    """The run: folder, seed, device and intervals."""

    dir: str = ""  # empty: runs/NAME of the configuration file
    # A model directory or hf:org/name whose weights a new run begins with, both the network's and the EMA copy's.
    start_from: str = ""
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device multiplies it natively
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA
    log_every: PositiveInt = 20
    eval_every: PositiveInt = 500
    save_every: PositiveInt = 500
    samples_per_class: NonNegativeInt = 8  # images of each of the first ten classes at every evaluation; 0: none


class TrainRunSection(RunSection):
    """The run, and its evaluations on held-out images."""

    eval_images: PositiveInt = 512
    sample_steps: PositiveInt = 25
    sample_guidance: float = 1.0


class MonitorSection(Section):
    """Thresholds for collapse and memorisation; crossing one logs a warning.

    All ours: in the study of docs/collapse.png the effective rank, as a share of the channels, is 0.07 for naive
    training, 0.15 for stop-gradient and 0.57 for DSD; the spread is 0.02, 0.8 and 0.96.
    """

    rank_share: NonNegativeFloat = 0.25  # least effective rank of the latents, as a share of their channels; 0: off
    image_std: NonNegativeFloat = 0.1  # least spread of the latents between images, of at most about 1; 0: off
    psnr_drop: NonNegativeFloat = 2.0  # dB by which reconstruction may fall below its best so far
    overfit_evals: NonNegativeInt = 3  # evaluations in a row in which held-out images get worse, training images better
    overfit_drop: NonNegativeFloat = 0.2  # dB that held-out images must lose over these evaluations (psnr_0.5)


class RunConfig(Section):
    """The settings of every run."""

    optim: OptimSection = OptimSection()
    run: RunSection = RunSection()


class TrainConfig(RunConfig):
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    run: TrainRunSection = TrainRunSection()
    monitor: MonitorSection = MonitorSection()

    @model_validator(mode="after")
    def layer_is_in_network(self) -> Self:
        depth = self.network_config().depth
        if self.loss.alignment_layer > depth:
            raise ConfigError(
                f"loss.alignment_layer must be at most the depth, {depth}, got {self.loss.alignment_layer}"
            )
        return self

    def network_config(self) -> ModelConfig:
        """The network that this configuration trains. (`model_config` is pydantic's name for its own options.)"""
        changes = self.model.model_dump(exclude={"preset"}, exclude_none=True)
        if self.model.class_names:
            changes["num_classes"] = len(self.model.class_names)
        # A velocity predictor is part of what the baselines are: the clean-latent loss is the second remedy.
        prediction = "latents" if self.loss.objective == "dsd" else "velocity"
        number = changes.get("num_classes", IMAGENET_CLASSES)
        labels = [item for item in self.data.classes if isinstance(item, int) and item < number]
        # Names get their labels from the data, see `with_classes`.
        classes = tuple(labels) if len(labels) == len(self.data.classes) else ()
        return replace(PRESETS[self.model.preset], **changes, prediction=prediction, classes=classes)

    def with_classes(self, num_classes: int, names: tuple[str, ...], labels: tuple[int, ...]) -> "TrainConfig":
        """This configuration with the class table of its data, of which `labels` are kept (all: empty)."""
        model = {"num_classes": num_classes, "class_names": names}
        sections = {
            "model": {**self.model.model_dump(), **model},
            "data": {**self.data.model_dump(), "classes": labels},
        }
        return self.from_dict({**self.to_dict(), **sections})


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply overrides like `optim.lr=3e-4` (values as in TOML)."""
    return read_config(TrainConfig, path, overrides, f"runs/{path.stem}")
