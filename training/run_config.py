"""The training configuration: strict dataclasses, read from TOML and overridden from the command line.

Of every value the comment says whether the paper (arXiv 2511.14716) states it or we chose it.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.errors import ConfigError

OBJECTIVES = ("dsd", "stop_gradient", "naive")


@dataclass(frozen=True)
class ModelSection:
    """The network: a preset of dsd_serve/config.py, and what differs from it."""

    preset: str = "demo"
    image_size: int | None = None
    patch_size: int | None = None
    latent_dim: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class DataSection:
    """Where the images are; see training/sources.py for the layouts."""

    path: str = ""
    validation: str = ""  # held-out images of the same layout; empty: the last 1 % of `path` is held out
    classes: tuple[int, ...] = ()  # ImageNet-1k labels to keep; empty: all
    resize: str = "fit"  # "fit": as the server does; "adm": as ADM does, which FID statistics of ImageNet are made with
    shuffle_shards: int = 0  # so many tar shards are shuffled at a time, read nearly in a row; 0: all images at once
    flip: bool = True  # horizontal flips; the paper states augmentation, not which
    memory_gb: float = 8.0  # decoded images up to this size are held in memory, by all processes of a machine
    num_workers: int = 2  # processes that decode where they are not, of each process that trains


@dataclass(frozen=True)
class LossSection:
    """The objective and its parts. The paper states the parts, none of the weights: all numbers are our choice."""

    objective: str = "dsd"  # stated: dsd is both cures; stop_gradient the first alone; naive none
    denoise_weight: float = 1.0
    denoise_weighting: str = "velocity"  # "uniform", or "velocity": 1 / (1 - t)^2 with 1 - t floored, as UNITE's code
    denoise_floor: float = 0.3  # of 1 - t in that weight
    num_draws: int = 2  # noise draws per encoding (UNITE: 1 to 14)
    t_mean: float = 0.0  # t = sigmoid(normal(t_mean, t_std)); the paper's distribution is unknown
    t_std: float = 1.0
    t_shift: float = 1.0  # s in t' = s t / (1 - (1 - s) t), after that: below 1 towards noise (UNITE: 0.5), 1 is off
    class_dropout: float = 0.1  # share of rows whose label becomes null_label, for guidance
    ema_target: bool = True  # stated: the target comes from an EMA copy; false: from the online encoder
    gradient_through_z_t: bool = True  # inferred from the paper's P(z1, t, eps): only the target is detached
    mask_ratio: float = 0.25  # stated: augmentation, masking its example. Share of patches hidden from the encoder ...
    mask_probability: float = 0.0  # ... in this share of images
    reconstruction_weight: float = 4.0  # stated: a reconstruction task
    reconstruction_norm: str = "l1"  # "l1" or "l2"
    reconstruction_noise: float = 0.5  # share of images whose latents are noised before decoding (UNITE)
    reconstruction_t: float = 0.7  # lowest t of that noise
    pyramid_weight: float = 0.0  # ours: l1 of every band of a Laplacian pyramid; perceptual, and needs no weights
    lpips_weight: float = 0.0  # UNITE: 1.0 beside an l1 of weight 1, of images in [0, 1]; needs its weights:
    lpips_file: str = ""  # a safetensors file that you have, see training/teachers.py; nothing is downloaded
    alignment_weight: float = 0.25  # stated: ViT layer alignment; ours: denoise rows at a layer to the target encoder's
    alignment_layer: int = 0  # 1 is the first block; 0: the middle one
    vision_weight: float = 0.0  # REPA (arXiv 2410.06940): 0.5. A later paper lists DSD with a vision model
    vision_model: str = ""  # an ONNX file of your choice, see training/teachers.py; the same layer as alignment_layer
    representation_weight: float = 0.25  # stated: self-distillation of representations; ours: encode rows, cosine
    classification_weight: float = 0.1  # stated: a classification loss; ours: linear, on the mean of the tokens


@dataclass(frozen=True)
class OptimSection:
    """Optimiser and length. The paper states none of it, but 50 epochs for its results."""

    steps: int = 1000
    batch_size: int = 128  # images per step, over all devices
    micro_batch_size: int = 128  # images per forward pass; steps accumulate gradients over them
    name: str = "adamw"  # or "muon" (UNITE): Muon for the matrices of the blocks, AdamW for all else
    lr: float = 1e-3  # of both: Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982)
    lr_final: float = 0.05  # share of lr that is left at the end of the cosine
    warmup_steps: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95  # of Muon (its authors')
    grad_clip: float = 1.0
    ema_decay: float = 0.999  # of the EMA copy, which is the target encoder and what is exported


@dataclass(frozen=True)
class RunSection:
    """Where and how it runs."""

    dir: str = ""  # empty: runs/NAME of the configuration file
    start_from: str = ""  # a model directory whose weights a new run begins with, both the network's and the EMA copy's
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the device multiplies it natively
    compile: str = "auto"  # on, off, or auto: torch.compile on CUDA
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    eval_images: int = 512
    samples_per_class: int = 8  # images of each of the first ten classes at every evaluation; 0: none
    sample_steps: int = 25
    sample_guidance: float = 1.0


@dataclass(frozen=True)
class MonitorSection:
    """What tells collapse from health at every evaluation; a sentence warns when it is crossed. All ours: the study of
    docs/collapse.png has 0.07 and 0.02 for naive training, 0.15 for a rank that is squeezed, 0.57 and 0.96 for DSD."""

    rank_share: float = 0.25  # least effective rank of the latents, as a share of their channels; 0: off
    picture_std: float = 0.1  # least spread of the latents between images, of at most about 1; 0: off
    psnr_drop: float = 2.0  # dB that reconstruction may lie below its best so far


@dataclass(frozen=True)
class TrainConfig:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)

    def __post_init__(self) -> None:
        check(self)

    def model_config(self) -> ModelConfig:
        """The network that this configuration trains."""
        if self.model.preset not in PRESETS:
            raise ConfigError(f"model.preset must be one of {', '.join(PRESETS)}, got {self.model.preset!r}")
        changes = {key: value for key, value in asdict(self.model).items() if key != "preset" and value is not None}
        # A velocity predictor is part of what the baselines are: the clean-latent loss is the second cure.
        prediction = "latents" if self.loss.objective == "dsd" else "velocity"
        return replace(PRESETS[self.model.preset], **changes, prediction=prediction, classes=self.data.classes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build from nested mappings. ConfigError names a section or key that is unknown or of the wrong type."""
        return build(cls, values, "")


def build(kind: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a section with keys, got {values!r}")
    hints = get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"unknown key {prefix}{unknown[0]!r}; known are {', '.join(sorted(hints))}")
    built = {}
    for key, value in values.items():
        hint = hints[key]
        built[key] = build(hint, value, f"{prefix}{key}.") if is_dataclass(hint) else convert(hint, value, prefix + key)
    return kind(**built)


def convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, strictly: no strings for numbers, but whole numbers for floats."""
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        return tuple(convert(get_args(hint)[0], item, key) for item in value)
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
        raise ConfigError(f"{key} must be of type {names}, got {value!r}")
    return value


def check(config: TrainConfig) -> None:
    """The rules between and within values; raises ConfigError."""
    loss, optim, run = config.loss, config.optim, config.run
    one_of("loss.objective", loss.objective, OBJECTIVES)
    one_of("loss.denoise_weighting", loss.denoise_weighting, ("uniform", "velocity"))
    one_of("loss.reconstruction_norm", loss.reconstruction_norm, ("l1", "l2"))
    one_of("optim.name", optim.name, ("adamw", "muon"))
    one_of("data.resize", config.data.resize, ("fit", "adm"))
    one_of("run.precision", run.precision, ("auto", "fp32", "bf16"))
    one_of("run.compile", run.compile, ("auto", "on", "off"))
    for section, names in (
        (loss, ("class_dropout", "mask_ratio", "mask_probability", "reconstruction_noise", "reconstruction_t")),
        (optim, ("lr_final", "ema_decay", "momentum")),
    ):
        for name in names:
            if not 0 <= getattr(section, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(section, name)}")
    positive = {
        "loss.num_draws": loss.num_draws,
        "loss.denoise_floor": loss.denoise_floor,
        "loss.t_shift": loss.t_shift,
        "optim.steps": optim.steps,
        "optim.batch_size": optim.batch_size,
        "optim.micro_batch_size": optim.micro_batch_size,
        "optim.lr": optim.lr,
        "optim.grad_clip": optim.grad_clip,
        "run.log_every": run.log_every,
        "run.eval_every": run.eval_every,
        "run.save_every": run.save_every,
        "run.eval_images": run.eval_images,
        "run.sample_steps": run.sample_steps,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value}")
    for item in fields(config.monitor):
        if getattr(config.monitor, item.name) < 0:
            raise ConfigError(f"monitor.{item.name} must be 0 or more, got {getattr(config.monitor, item.name)}")
    for name, value in (
        ("run.samples_per_class", run.samples_per_class),
        ("data.shuffle_shards", config.data.shuffle_shards),
        ("data.num_workers", config.data.num_workers),
    ):
        if value < 0:
            raise ConfigError(f"{name} must be 0 or more, got {value}")
    for item in fields(loss):
        if item.name.endswith("_weight") and getattr(loss, item.name) < 0:
            raise ConfigError(f"loss.{item.name} must be 0 or more, got {getattr(loss, item.name)}")
    for weight, name in (("lpips_weight", "lpips_file"), ("vision_weight", "vision_model")):
        if getattr(loss, weight) and not getattr(loss, name):
            raise ConfigError(f"loss.{weight} is above 0, so loss.{name} must name a file")
    if len(optim.betas) != 2:
        raise ConfigError(f"optim.betas must be two numbers, got {list(optim.betas)}")
    if optim.batch_size % optim.micro_batch_size:
        raise ConfigError(
            "optim.batch_size must be a multiple of optim.micro_batch_size, "
            f"got {optim.batch_size} and {optim.micro_batch_size}"
        )
    model = config.model_config()
    if loss.alignment_layer > model.depth:
        raise ConfigError(f"loss.alignment_layer must be at most the depth, {model.depth}, got {loss.alignment_layer}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply overrides like `optim.lr=3e-4` or `data.classes=[1,207]` (values as in TOML)."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise ConfigError(f"an override reads section.key=value, got {override!r}")
        values.setdefault(section, {})
        if not isinstance(values[section], dict):
            raise ConfigError(f"{section} must be a section with keys, got {values[section]!r}")
        values[section][name] = parse_value(text)
    values.setdefault("run", {})
    if isinstance(values["run"], dict):
        values["run"].setdefault("dir", f"runs/{path.stem}")
    return TrainConfig.from_dict(values)


def parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string, so that shells need no second pair of quotes
