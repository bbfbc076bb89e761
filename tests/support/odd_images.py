"""A corpus of odd image files and of odd layouts of data sets, made by code."""

import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dsd_serve.imaging.codec import write_image
from tests.support.data import sample_image

GOOD = write_image(sample_image(1, 1))
JPEG = write_image(sample_image(2, 1), "jpeg")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (20, 20))
    image.putpalette([0, 0, 0, 255, 0, 0])
    return saved(image, "PNG", **({"transparency": 0} if transparent else {}))


def image(mode: str, *size: int) -> Image.Image:
    return Image.new(mode, size or (20, 20))


# Files: what training makes of each, under the name given first. True: an image; else a part of the reason.
FILES: dict[str, tuple[str, bytes, bool | str]] = {
    "a PNG": ("a.png", GOOD, True),
    "a JPEG": ("a.jpg", JPEG, True),
    "a WebP": ("a.webp", write_image(sample_image(3, 1), "webp"), True),
    "an upper-case ending": ("A.JPG", JPEG, True),
    "a mixed-case ending": ("A.JpEg", JPEG, True),
    "a PNG called JPEG": ("a.JPEG", GOOD, True),
    "a JPEG called PNG": ("a.png", JPEG, True),
    "a jfif": ("a.jfif", JPEG, True),
    "a wide image": ("a.png", saved(image("RGB", 200, 10), "PNG"), True),
    "a tall image": ("a.png", saved(image("RGB", 3, 300), "PNG"), True),
    "one pixel": ("a.png", saved(image("RGB", 1, 1), "PNG"), True),
    "grey": ("a.png", saved(image("L"), "PNG"), True),
    "black and white": ("a.png", saved(image("1"), "PNG"), True),
    "grey with opacity": ("a.png", saved(image("LA"), "PNG"), True),
    "colour with opacity": ("a.png", saved(image("RGBA"), "PNG"), True),
    "sixteen bits": ("a.png", saved(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG"), True),
    "a palette": ("a.png", palette(False), True),
    "a palette with a transparent colour": ("a.png", palette(True), True),
    "CMYK": ("a.jpg", saved(image("CMYK"), "JPEG"), True),
    "a progressive JPEG": ("a.jpg", saved(image("RGB"), "JPEG", progressive=True), True),
    **{f"EXIF orientation {n}": ("a.jpg", turned(n), True) for n in (1, 3, 6, 8)},
    "spaces and dots in its name": (" a b..c .png", GOOD, True),
    "a name in another script": ("金毛犬.png", GOOD, True),
    "an animated WebP": (
        "a.webp",
        saved(image("RGB"), "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]),
        "animated",
    ),
    "an animated PNG": (
        "a.png",
        saved(image("RGB"), "PNG", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]),
        "animated",
    ),
    "an empty file": ("a.png", b"", "not a readable image"),
    "text": ("a.jpg", b"<html>404</html>", "not a readable image"),
    "a cut-off PNG": ("a.png", GOOD[: len(GOOD) // 2], "the file is truncated"),
    "a cut-off JPEG": ("a.jpg", JPEG[: len(JPEG) // 2], "broken"),
    "a GIF called PNG": ("a.png", saved(image("P"), "GIF"), "not a readable image"),
    "a TIFF called JPEG": ("a.jpg", saved(image("RGB"), "TIFF"), "not a readable image"),
    "a false size": ("a.png", GOOD[:16] + b"\0\1\0\0\0\1\0\0" + GOOD[24:], "checksum"),
}


def fill(folder: Path, count: int = 6, label: int = 1) -> Path:
    """`count` images in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(write_image(sample_image(label, number)))
    return folder


def cats_and_dogs(root: Path, *names: str, count: int = 6) -> Path:
    for label, name in enumerate(names or ("cat", "dog")):
        fill(root / name, count, label)
    return root


def write_csv(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    fill(root / "images")
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root / name


def write_parquet(root: Path, name: str = "train.parquet", metadata: object = None, **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, root / name)
    return root


def class_label(*names: str) -> object:
    return {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}


def write_tar(root: Path, *members: tuple[str, bytes | str], name: str = "a.tar") -> Path:
    with tarfile.open(root / name, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            content = data.encode() if isinstance(data, str) else data
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root


ROWS = [{"bytes": GOOD, "path": None}] * 4
Made = Callable[[Path], Path]
LAYOUTS: dict[str, tuple[Made, tuple[str, ...] | str | None]] = {}


def layout(expected: tuple[str, ...] | str | None) -> Callable[[Made], Made]:
    """A layout and its class names, None if it has no classes, or a part of the sentence that refuses it."""

    def add(make: Made) -> Made:
        LAYOUTS[make.__name__.replace("_", " ")] = make, expected
        return make

    return add


@layout(("cat", "dog"))
def two_folders(root: Path) -> Path:
    return cats_and_dogs(root)


@layout(("Café", "a b", "Ёж", "金毛犬", "🐕"))
def names_in_any_script(root: Path) -> Path:
    return cats_and_dogs(root, "金毛犬", "Café", "Ёж", "a b", "🐕")


@layout(("Café", "cat"))
def a_decomposed_name(root: Path) -> Path:
    return cats_and_dogs(root, unicodedata.normalize("NFD", "Café"), "cat")


@layout("two classes named 'Café'")
def a_name_composed_and_decomposed(root: Path) -> Path:
    return cats_and_dogs(root, "Café", unicodedata.normalize("NFD", "Café"))


@layout("two classes named 'cat'")
def a_name_with_a_space_after_it(root: Path) -> Path:
    return cats_and_dogs(root, "cat", "cat ")


@layout("must have 1 to 200 characters, got 240")
def a_very_long_name(root: Path) -> Path:
    return cats_and_dogs(root, "c" * 240)


@layout("without control characters")
def a_line_break_in_a_name(root: Path) -> Path:
    return cats_and_dogs(root, "c\nat", "dog")


@layout("without control characters")
def a_name_that_is_not_unicode(root: Path) -> Path:
    return cats_and_dogs(root, os.fsdecode(b"\xff\xfe"), "dog")


@layout(("cat",))
def one_class(root: Path) -> Path:
    return cats_and_dogs(root, "cat")


@layout(("Cat", "cat"))
def names_that_differ_in_case(root: Path) -> Path:
    return cats_and_dogs(root, "Cat", "cat")


@layout(("2019", "2020"))
def years(root: Path) -> Path:
    return cats_and_dogs(root, "2019", "2020")


@layout(("7", "cat"))
def a_number_and_a_name(root: Path) -> Path:
    return cats_and_dogs(root, "7", "cat")


@layout(("dog", "n02099601"))
def a_wnid_and_a_name(root: Path) -> Path:
    return cats_and_dogs(root, "n02099601", "dog")


@layout(None)
def images_without_folders(root: Path) -> Path:
    return fill(root)


@layout("both at its top (0.png) and in folders (cat)")
def images_at_the_top_and_in_folders(root: Path) -> Path:
    fill(root, 2)
    return cats_and_dogs(root)


@layout(None)
def images_and_an_empty_folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return fill(root)


@layout(("cat", "dog"))
def an_empty_class(root: Path) -> Path:
    (root / "bird").mkdir()
    return cats_and_dogs(root)


@layout(("cat", "dog"))
def deep_folders(root: Path) -> Path:
    fill(root / "cat/2020/may", 3)
    return cats_and_dogs(root)


@layout(("cat", "dog"))
def what_systems_leave_behind(root: Path) -> Path:
    for name in ("__MACOSX/cat", "@eaDir", ".hidden", "cat/.thumbnails"):
        fill(root / name, 2)
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/._0.png", "dog/desktop.ini", "README.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    return cats_and_dogs(root)


@layout(("cat", "dog"))
def a_link_to_the_parent(root: Path) -> Path:
    cats_and_dogs(root)
    (root / "cat/up").symlink_to("..")
    (root / "all").symlink_to(root)
    (root / "dog/self").symlink_to(".")
    return root


@layout(("cat", "dog"))
def links_to_images_and_folders_elsewhere(root: Path) -> Path:
    fill(root / "elsewhere")
    (root / "data/cat").mkdir(parents=True)
    (root / "data/cat/a.png").symlink_to(root / "elsewhere/0.png")
    (root / "data/cat/b.png").symlink_to(root / "elsewhere/1.png")
    (root / "data/dog").symlink_to(root / "elsewhere")
    return root / "data"


@layout(("cat", "dog"))
def pipes_and_folders_called_png(root: Path) -> Path:
    os.mkfifo(cats_and_dogs(root) / "cat/pipe.png")
    fill(root / "cat/folder.png", 1)
    return root


@layout("holds neither parquet nor tar files nor PNG, JPEG or WebP images")
def an_empty_folder(root: Path) -> Path:
    return root


@layout("of other formats there are 1 .gif, 1 .heic")
def only_other_formats(root: Path) -> Path:
    (root / "a.gif").write_bytes(b"GIF89a")
    (root / "b.HEIC").write_bytes(b"x")
    return root


@layout("holds parts of a data set (train, val), not classes: give data.path=")
def parts_of_a_data_set(root: Path) -> Path:
    cats_and_dogs(root / "train")
    cats_and_dogs(root / "val")
    return root


@layout("too few images to hold 2 out")
def one_image(root: Path) -> Path:
    return fill(root, 1)


@layout("too few images to hold 2 out")
def one_image_of_each_class(root: Path) -> Path:
    return cats_and_dogs(root, count=1)


@layout("there is no ")
def nowhere(root: Path) -> Path:
    return root / "nowhere"


@layout("is an archive; unpack it")
def an_archive(root: Path) -> Path:
    (root / "a.zip").write_bytes(b"PK")
    return root / "a.zip"


@layout("is not a parquet file")
def an_image_as_the_path(root: Path) -> Path:
    return fill(root) / "0.png"


@layout("images cannot be read, more than data.broken_share=0.05 allows")
def every_second_image_broken(root: Path) -> Path:
    fill(root, 20)
    for number in range(0, 20, 2):
        (root / f"{number}.png").write_bytes(b"x")
    return root


@layout(("cat", "dog"))
def a_csv(root: Path) -> Path:
    return write_csv(root, "file,class\n" + "".join(f"images/{n}.png,{'cat' if n < 3 else 'dog'}\n" for n in range(6)))


@layout(("chat, noir", "Ёж"))
def a_csv_as_excel_writes_it(root: Path) -> Path:
    rows = "".join(f"images/{n}.png;{'Ёж' if n < 3 else chr(34) + 'chat, noir' + chr(34)}\r\n" for n in range(6))
    return write_csv(root, "\ufefffilename;label\r\n" + rows + "\r\n")


@layout(("cat",))
def a_tsv(root: Path) -> Path:
    return write_csv(root, "path\tcategory\n" + "".join(f"images/{n}.png\tcat\n" for n in range(6)), "labels.tsv")


@layout(None)
def a_csv_without_classes(root: Path) -> Path:
    return write_csv(root, "image\n" + "".join(f"images/{n}.png\n" for n in range(6)))


@layout("needs a first line that names its columns")
def a_csv_without_a_first_line(root: Path) -> Path:
    return write_csv(root, "images/0.png,cat\nimages/1.png,dog\n")


@layout("line 3: the column class must name a class, and is empty")
def a_csv_with_a_gap(root: Path) -> Path:
    return write_csv(root, "file,class\nimages/0.png,cat\nimages/1.png,\n")


@layout("line 3: 2 columns are named, got 3")
def a_csv_with_a_long_line(root: Path) -> Path:
    return write_csv(root, "file,class\nimages/0.png,cat\nimages/1.png,cat,dog\n")


@layout("is in the classes 'cat' and 'dog'; an image has one class")
def a_csv_with_two_classes_of_an_image(root: Path) -> Path:
    return write_csv(root, "file,class\nimages/0.png,cat\nimages/0.png,dog\n")


@layout("may be in the columns class or label; name one with data.label_column")
def a_csv_with_two_columns_of_classes(root: Path) -> Path:
    return write_csv(root, "file,class,label\nimages/0.png,cat,1\n")


@layout("lists no images")
def a_csv_of_one_line(root: Path) -> Path:
    return write_csv(root, "file,class\n")


@layout("is not text in UTF-8")
def a_csv_in_latin_1(root: Path) -> Path:
    return write_csv(root, "file,class\nimages/0.png,Café\n".encode("latin-1"))


@layout("images cannot be read")
def a_csv_of_missing_files(root: Path) -> Path:
    return write_csv(root, "file,class\n" + "".join(f"missing/{n}.png,cat\n" for n in range(6)))


@layout("is not a readable CSV file")
def a_csv_with_an_open_quote(root: Path) -> Path:
    return write_csv(root, 'file,class\nimages/0.png,"cat\n')


@layout(("cat", "dog"))
def parquet_of_hugging_face(root: Path) -> Path:
    return write_parquet(root, metadata=class_label("cat", "dog"), image=ROWS, label=[0, 1, 1, 0])


@layout(("cat", "dog"))
def parquet_with_texts(root: Path) -> Path:
    return write_parquet(root, img=[GOOD] * 4, label=["dog", "cat", "dog", "cat"])


@layout(None)
def parquet_without_classes(root: Path) -> Path:
    return write_parquet(root, image=ROWS, caption=["a", "b", "c", "d"])


@layout("may be in the columns label or fine_label")
def parquet_with_two_columns_of_classes(root: Path) -> Path:
    return write_parquet(root, image=ROWS, label=[0] * 4, fine_label=[0] * 4)


@layout("has images of the label -1")
def parquet_of_a_test_set(root: Path) -> Path:
    return write_parquet(root, metadata=class_label("cat", "dog"), image=ROWS, label=[-1] * 4)


@layout("has labels up to 5, but names only 2 classes")
def parquet_with_too_few_names(root: Path) -> Path:
    return write_parquet(root, metadata=class_label("cat", "dog"), image=ROWS, label=[0, 1, 5, 0])


@layout("0 to 999 are those of ImageNet-1k; data.labels=own")
def parquet_with_large_numbers(root: Path) -> Path:
    return write_parquet(root, image=ROWS, label=[0, 1, 5000, 0])


@layout("1 images have no class")
def parquet_with_a_gap(root: Path) -> Path:
    return write_parquet(root, image=ROWS, label=["a", None, "b", "b"])


@layout("a class must be a whole number or a text, got list")
def parquet_with_many_classes_of_an_image(root: Path) -> Path:
    return write_parquet(root, image=ROWS, label=[[0], [1], [0, 1], [0]])


@layout("needs a column image with the bytes")
def parquet_with_addresses(root: Path) -> Path:
    return write_parquet(root, image=["https://a/b.png"] * 4, label=[0] * 4)


@layout(("cat",))
def parquet_with_broken_metadata(root: Path) -> Path:
    return write_parquet(root, metadata=["nonsense"], image=ROWS, label=["cat"] * 4)


@layout(("cat", "dog"))
def shards_with_names(root: Path) -> Path:
    members = [
        (f"{n}.{kind}", GOOD if kind == "png" else ("cat", "dog")[n % 2]) for n in range(6) for kind in ("png", "cls")
    ]
    return write_tar(root, *members)


@layout(("cat", "dog"))
def shards_with_json(root: Path) -> Path:
    members: list[tuple[str, bytes | str]] = []
    for n in range(6):
        members += [(f"{n}.png", GOOD), (f"{n}.json", json.dumps({"key": n, "label": ("cat", "dog")[n % 2]}))]
    return write_tar(root, *members)


@layout(("cat", "dog"))
def shards_with_a_file_of_names(root: Path) -> Path:
    (root / "classnames.txt").write_text("cat\ndog\n")
    members = [(f"{n}.{kind}", GOOD if kind == "png" else str(n % 2)) for n in range(6) for kind in ("png", "cls")]
    return write_tar(root, *members)


@layout(None)
def shards_without_classes(root: Path) -> Path:
    return write_tar(root, *[(f"{n}.png", GOOD) for n in range(6)])


@layout("has numbers and b.tar has names as classes")
def shards_of_two_kinds(root: Path) -> Path:
    write_tar(root, ("0.png", GOOD), ("0.cls", "1"))
    return write_tar(root, ("1.png", GOOD), ("1.cls", "cat"), name="b.tar")


@layout("image 1 needs a member 1.cls with its class, as others have")
def shards_with_a_gap(root: Path) -> Path:
    return write_tar(root, ("0.png", GOOD), ("0.cls", "cat"), ("1.png", GOOD))
