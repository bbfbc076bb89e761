"""Models in Python: a model directory on an engine behind a batcher. The server and Triton use it too.

```python
with dsd_serve.load() as model:  # the demo model
    model.generate("golden retriever", seed=7).save("dog.png")
    model.edit("photo.jpg", "alp", strength=0.6, seed=1)
    z = model.encode("photo.jpg")  # float32 [L, C]
    model.decode(z)
```
"""

import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd_serve.backends import Backend, Job, ModelInfo
from dsd_serve.errors import ClosedError, InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.imaging.inputs import ImageInput, plain, read_input, read_mask
from dsd_serve.labels import ImageClass
from dsd_serve.params import FIELDS, MAX_SEED, SamplingParams, whole, with_values
from dsd_serve.programs import Generate, Interpolate, OnPreviews, Reconstruct, Task, WalkEnd, between, walk_fractions
from dsd_serve.rows import Decode, Encode, Latents, Pixels

ClassName = str | int
OnImagePreview = Callable[[int, int, Image.Image], None]

MAX_IMAGES = 1_000_000  # of one call
UNDER_WAY = 256  # tasks of one call that the backend holds at a time, at least


class Model:
    """One network that draws, edits, encodes and decodes images. All methods may be called from any thread; the rows of
    concurrent calls share batches. `load` opens one; `close` or a `with` block ends it.

    Classes are given by index, wnid or name. Images are given as a path, the bytes of a PNG, JPEG or WebP file, a PIL
    image, or uint8 [H, W, 3]; their centre square is scaled to the network's size. Images are returned as PIL images
    in RGB, [S, S] at the network's size unless `size` scales them, with `info["dsd"]`, the JSON of the settings that
    draw them again; `dsd_serve.to_png` writes it into a file. `settings` are fields of SamplingParams, by default the
    model's recommendation. Without a seed a random one is used. size: 8 to 16384 pixels; n: 1 to 1,000,000 images.
    Raises InputError for a wrong argument, ClosedError after `close`, EngineError when the network fails.

    info: name, config, defaults and fingerprint of the model. backend: carries out its tasks.
    """

    def __init__(self, backend: Backend, info: ModelInfo) -> None:
        self.backend, self.info = backend, info
        self.closed = False

    @property
    def classes(self) -> list[ImageClass]:
        """The classes that the model was trained on."""
        return list(self.info.table.trained)

    @overload
    def generate(
        self,
        classes: ClassName | None = None,
        *,
        n: None = None,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> Image.Image: ...

    @overload
    def generate(
        self,
        classes: ClassName | Sequence[ClassName] | None = None,
        *,
        n: int | None = None,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> list[Image.Image]: ...

    def generate(
        self,
        classes: ClassName | Sequence[ClassName] | None = None,
        *,
        n: int | None = None,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draw images of classes: one image for one class, a list if `n` or a list of classes is given. A model
        without classes takes none.

        n: images of each class; image i has index `index + i`, as in a request to a server.
        on_preview(number, step, image): called from another thread with the clean estimate of image `number` every
        `preview_every` steps, by default after each.
        """
        one = isinstance(classes, str) or not isinstance(classes, Iterable)
        names = [classes] if one else list(cast(Sequence[ClassName], classes))
        found = [self.info.find_class(plain(name)) for name in names]
        params = self.params(seed, n, on_preview, settings)
        drawn = [(target, p) for target in found for p in self.towards(target, params, settings)]
        tasks = [Generate(self.info.label_of(target), p) for target, p in drawn]
        images = self.draw(tasks, [self.info.settings_of(target, p) for target, p in drawn], size, on_preview)
        return images[0] if one and n is None else images

    @overload
    def edit(
        self,
        image: ImageInput,
        class_: ClassName | None = None,
        *,
        strength: float = 0.6,
        mask: ImageInput | NDArray[np.bool_] | None = None,
        n: None = None,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> Image.Image: ...

    @overload
    def edit(
        self,
        image: ImageInput,
        class_: ClassName | None = None,
        *,
        strength: float = 0.6,
        mask: ImageInput | NDArray[np.bool_] | None = None,
        n: int,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> list[Image.Image]: ...

    def edit(
        self,
        image: ImageInput,
        class_: ClassName | None = None,
        *,
        strength: float = 0.6,
        mask: ImageInput | NDArray[np.bool_] | None = None,
        n: int | None = None,
        seed: int | None = None,
        size: int | None = None,
        on_preview: OnImagePreview | None = None,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Redraw an image, towards a class if one is given; a list of `n` variants if `n` is given.

        strength: the amount of noise in (0, 1], and the share of the steps that run, rounded up; 1 keeps nothing of the
        image. mask: an image, white where it is redrawn, or bool [H, W], True there; the rest keeps its pixels. n,
        on_preview: as in `generate`.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {shown(strength)}", "strength")
        target = self.info.find_class(plain(class_), optional=True)
        params = self.towards(target, self.params(seed, n, on_preview, settings), settings)
        pixels = self.read(image)
        drawn = None if mask is None else read_mask(mask, self.info.config.image_size)
        tasks = self.info.edits(pixels, target, params, float(strength), drawn)
        about = [{**self.info.settings_of(target, p), "strength": strength} for p in params]
        images = self.draw(tasks, about, size, on_preview)
        return images[0] if n is None else images

    def walk(
        self,
        start: ClassName | ImageInput | None = None,
        end: ClassName | ImageInput | None = None,
        *,
        n: int = 8,
        seed: int | None = None,
        end_seed: int | None = None,
        size: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """`n` images from `start` to `end`, both included: between two classes, or between two images.

        A str or an int is a class, so give a file as a Path. A model without classes walks between two seeds if both
        ends are left out. Between classes the noise goes from that of `seed` to that of `end_seed` (default: `seed`),
        and the clean estimates of both classes are averaged. Between images the latents are interpolated; nothing is
        sampled, so seeds and settings are rejected.
        """
        whole("n", n, 2, MAX_IMAGES)
        fractions = walk_fractions(n)
        ends = [start, end]
        if all(one is None or isinstance(one, str | int) for one in ends):
            found = [self.info.find_class(one, name) for one, name in zip(ends, ("start", "end"), strict=True)]
            (params,) = self.towards(found[0], self.params(seed, None, None, settings), settings)
            end_seed = params.seed if end_seed is None else end_seed
            whole("end_seed", end_seed, 0, MAX_SEED)
            from_ = WalkEnd(self.info.label_of(found[0]), params.seed, params.index)
            to = WalkEnd(self.info.label_of(found[1]), end_seed, params.index)
            tasks: list[Task] = [Interpolate(from_, to, fraction, params) for fraction in fractions]
            common = self.info.walk_settings_of(from_, to, params)
        elif any(one is None or isinstance(one, str | int) for one in ends):
            raise InputError("start and end must be two classes or two images, got one of each")
        else:
            if seed is not None or end_seed is not None or settings:
                raise InputError("a walk between images needs no noise, so leave out seed and sampling settings")
            z, z_end = self.run([Encode(self.read(cast(ImageInput, one))) for one in ends])
            tasks = [Decode(between(z, z_end, fraction, on_sphere=False)) for fraction in fractions]
            common = {"model": self.info.name}
        about = [{**common, "fraction": round(fraction, 6)} for fraction in fractions]
        return self.draw(tasks, about, size)

    @overload
    def encode(self, images: ImageInput) -> Latents: ...

    @overload
    def encode(self, images: list[ImageInput] | tuple[ImageInput, ...]) -> list[Latents]: ...

    def encode(self, images: ImageInput | list[ImageInput] | tuple[ImageInput, ...]) -> Latents | list[Latents]:
        """Latents float32 [L, C] of an image, or a list of them: L tokens in row-major order, zero mean and unit
        variance over the C channels of each."""
        several = list(images) if isinstance(images, list | tuple) else [images]
        results = self.run(Encode(self.read(image)) for image in several)
        return results if isinstance(images, list | tuple) else cast(Latents, results[0])

    @overload
    def decode(self, latents: Latents, *, size: int | None = None) -> Image.Image: ...

    @overload
    def decode(self, latents: Sequence[Latents], *, size: int | None = None) -> list[Image.Image]: ...

    def decode(
        self, latents: Latents | Sequence[Latents], *, size: int | None = None
    ) -> Image.Image | list[Image.Image]:
        """The image of latents [L, C]; a list of images for a list of them or for [N, L, C]."""
        one = not isinstance(latents, Iterable) or (len(latents) > 0 and np.ndim(latents[0]) == 1)
        several = [self.checked(z) for z in ([latents] if one else latents)]
        images = self.draw([Decode(z) for z in several], [{} for _ in several], size)
        return images[0] if one else images

    def reconstruct(self, image: ImageInput, *, size: int | None = None) -> Image.Image:
        """Encode an image and decode its latents. `info["psnr"]` is the PSNR to the network's input, in dB."""
        pixels = self.read(image)
        (result,) = self.run([Reconstruct(pixels)])
        made = codec.resized(result, checked_size(size))
        made.info["psnr"] = round(codec.psnr(pixels[None], result[None]), 2)
        codec.attach_settings(made, {"psnr": made.info["psnr"]})
        return made

    def close(self) -> None:
        """Finish running work and free the engine. Later calls raise ClosedError."""
        self.closed = True
        self.backend.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else ""
        return f"<Model {self.info.name}, {len(self.classes)} classes, {self.info.config.image_size} pixels{state}>"

    # Shared by the methods above.

    def params(
        self, seed: int | None, n: int | None, on_preview: OnImagePreview | None, settings: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """The parameters of each of n images."""
        if unknown := sorted(set(settings) - set(FIELDS)):
            known = ", ".join(name for name in FIELDS if name != "seed")
            raise InputError(f"there is no setting {shown(unknown[0])}; the settings are {known}", unknown[0])
        whole("n", 1 if n is None else n, 1, MAX_IMAGES)
        values = {name: plain(value) for name, value in settings.items()}
        values["seed"] = secrets.randbelow(2**32) if seed is None else plain(seed)
        values["preview_every"] = 0 if on_preview is None else settings.get("preview_every", 1)
        first = with_values(self.info.defaults, values)
        return [replace(first, index=first.index + i) for i in range(1 if n is None else n)]

    def towards(
        self, target: ImageClass | None, params: Sequence[SamplingParams], settings: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """The parameters of images towards a class, or towards none, where guidance is off."""
        return self.info.towards(target, params, settings.get("guidance_scale"), "guidance_scale", "class_")

    def read(self, image: ImageInput) -> Pixels:
        """The centre square of an image at the network's size, uint8 [3, H, W]. Raises InputError."""
        return read_input(image, self.info.config.image_size)

    def checked(self, latents: object) -> Latents:
        shape = self.info.config.latent_shape
        z = np.asarray(latents)
        if z.dtype.kind not in "fiu" or z.shape != shape:
            raise InputError(f"latents must be numbers of shape {list(shape)}, got {z.dtype} {shown(list(z.shape))}")
        if not np.isfinite(z).all():
            raise InputError("latents must be finite numbers, got NaN or infinity")
        return np.ascontiguousarray(z, np.float32)

    def draw(
        self,
        tasks: Sequence[Task],
        about: Sequence[Mapping[str, Any]],
        size: int | None,
        on_preview: OnImagePreview | None = None,
    ) -> list[Image.Image]:
        """The images of tasks, each with its settings in `info`."""
        side = checked_size(size)

        def forward(number: int, step: int, pixels: Pixels) -> None:
            assert on_preview is not None
            on_preview(number, step, codec.resized(pixels, side))

        images = [codec.resized(pixels, side) for pixels in self.run(tasks, None if on_preview is None else forward)]
        for image, settings in zip(images, about, strict=True):
            codec.attach_settings(image, settings)
        return images

    def run(self, tasks: Iterable[Task], on_preview: OnPreviews | None = None) -> list[Any]:
        """The results of tasks, in order."""
        return list(self.results(tasks, on_preview))

    def results(self, tasks: Iterable[Task], on_preview: OnPreviews | None = None) -> Generator[Any, None, None]:
        """The results of tasks as they are ready, in order. The backend holds UNDER_WAY tasks at a time, or as many as
        fill two batches; closing the iterator cancels them."""
        if self.closed:
            raise ClosedError("the model is closed; load it again")
        jobs: deque[Job] = deque()

        def previews_of(number: int) -> OnPreviews | None:
            return None if on_preview is None else lambda _, step, pixels: on_preview(number, step, pixels)

        try:
            for number, task in enumerate(tasks):
                jobs.extend(self.backend.submit_tasks([task], on_preview=previews_of(number)))
                if len(jobs) >= max(UNDER_WAY, 2 * self.backend.budget):
                    yield jobs[0].future.result()
                    jobs.popleft()
            while jobs:
                yield jobs[0].future.result()
                jobs.popleft()
        finally:
            for job in jobs:
                job.cancel()  # does nothing to those that are done


def checked_size(size: int | None) -> int | None:
    if size is not None:
        whole("size", size, 8, 16_384)
    return size
