"""Datasets from folders of pictures."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from raqu_onnx.data import InputSpec, PictureOptions, open_dataset, split
from raqu_onnx.errors import DataError

F32 = np.dtype(np.float32)
RGB = (InputSpec("image", F32, ("n", 3, 4, 6)),)
GRAY = (InputSpec("image", F32, ("n", 1, 4, 6)),)


def paint(path, value, size=(4, 6), mode="RGB"):
    """A picture of one colour; `size` is height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path)


def only(folder, inputs=RGB, **options):
    (batch,) = open_dataset(folder, inputs, pictures=PictureOptions(**options)).batches(64)
    return batch


def refused(folder, inputs=RGB, **options):
    with pytest.raises(DataError) as info:
        list(open_dataset(folder, inputs, pictures=PictureOptions(**options)).batches(64))
    text = str(info.value)
    assert "\n" not in text
    return text


# Pixels -------------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_and_normalised_per_channel(tmp_path):
    paint(tmp_path / "a.png", (255, 102, 0))
    array = only(tmp_path, mean=(0.5, 0.4, 0.25), std=(0.5, 1.0, 0.25)).feeds["image"]
    assert array.dtype == F32
    assert array.shape == (1, 3, 4, 6)
    np.testing.assert_allclose(array[0, :, 1, 2], [1.0, 0.0, -1.0], atol=1e-6)
    raw = only(tmp_path, scale=1.0, mean=(127.0,), std=(128.0,)).feeds["image"]
    np.testing.assert_allclose(raw[0, :, 0, 0], [1.0, -25 / 128, -127 / 128], rtol=1e-6)


def test_layout_channels_and_type_follow_the_model(tmp_path):
    paint(tmp_path / "a.png", (255, 0, 0))
    nhwc = only(tmp_path, (InputSpec("image", F32, (1, 4, 6, 3)),), layout="nhwc").feeds["image"]
    assert nhwc.shape == (1, 4, 6, 3)
    assert nhwc[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    gray = only(tmp_path, GRAY).feeds["image"]
    np.testing.assert_allclose(gray, 76 / 255, rtol=1e-6)  # ITU-R 601: 0.299 of 255.
    pixels = only(tmp_path, (InputSpec("image", np.dtype(np.uint8), ("n", 3, 4, 6)),)).feeds["image"]
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 3, 5].tolist() == [255, 0, 0]
    half = only(tmp_path, (InputSpec("image", np.dtype(np.float16), ("n", 3, 4, 6)),)).feeds["image"]
    assert half.dtype == np.float16


def test_palette_transparent_and_bilevel_pictures_are_converted(tmp_path):
    paint(tmp_path / "a.png", (9, 9, 9, 128), mode="RGBA")
    paint(tmp_path / "b.gif", 9, mode="P")
    paint(tmp_path / "c.png", 1, mode="1")
    array = only(tmp_path, scale=1.0).feeds["image"]
    assert array[[0, 2], :, 0, 0].tolist() == [[9] * 3, [255] * 3]


def test_the_crop_is_the_centre_of_the_resized_picture(tmp_path):
    # Three vertical bands, the middle one as wide as the crop is.
    bands = np.zeros((8, 36, 3), np.uint8)
    bands[:, 12:24] = 200
    Image.fromarray(bands).save(tmp_path / "a.png")
    fitted = only(tmp_path, scale=1.0).feeds["image"]
    assert (fitted[:, :, :, 1:-1] == 200).all()
    # A picture that has the crop's size already is taken as it is.
    ramp = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(only(tmp_path, scale=1.0).feeds["image"][0], ramp.transpose(2, 0, 1))
    # The shorter side becomes 8, so the crop cuts 2 above and below, and 3 left and right.
    frame = np.zeros((8, 12, 3), np.uint8)
    frame[2:6, 3:9] = 50
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert (only(tmp_path, scale=1.0, resize=8).feeds["image"] == 50).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (7, 5), (400, 300)])
@pytest.mark.parametrize("resize", [None, 6, 11])
def test_pictures_of_any_size_fill_the_crop(tmp_path, size, resize):
    paint(tmp_path / "a.png", (7, 8, 9), size)
    array = only(tmp_path, scale=1.0, resize=resize).feeds["image"]
    assert (array == np.array([7, 8, 9]).reshape(1, 3, 1, 1)).all()


# Order, labels and digest -------------------------------------------------------------------------------------------


def test_pictures_come_sorted_and_other_files_do_not_count(tmp_path):
    for value, name in enumerate(["a.png", "b.JPG", "c/d.bmp", "z.png"]):
        paint(tmp_path / name, (value, value, value))
    (tmp_path / "README.txt").write_text("no picture")
    paint(tmp_path / ".hidden" / "x.png", 0)
    paint(tmp_path / ".x.png", 0)
    dataset = open_dataset(tmp_path, RGB, pictures=PictureOptions(scale=1.0))
    assert (dataset.size, dataset.has_labels, dataset.name) == (4, False, tmp_path.name)
    for _ in range(2):
        got = [v for b in dataset.batches(3) for v in b.feeds["image"][:, 0, 0, 0]]
        np.testing.assert_allclose(got, [0, 1, 2, 3], atol=1)


def test_class_folders_give_labels_and_empty_ones_keep_their_place(tmp_path):
    for name in ("dog/1.png", "dog/deep/2.png", "cat/3.png"):
        paint(tmp_path / name, 0)
    (tmp_path / "cow").mkdir()
    dataset = open_dataset(tmp_path, RGB)
    (batch,) = dataset.batches(8)
    assert batch.labels.tolist() == [0, 2, 2]  # cat, cow, dog
    low, high = split(dataset, 0.5, 0)
    assert sorted(int(i) for side in (low, high) for b in side.batches(1) for i in b.labels) == [0, 2, 2]


def test_numbered_class_folders_out_of_place_are_warned_of(tmp_path, caplog):
    for name in ("2", "10"):
        paint(tmp_path / name / "1.png", 0)
    assert only(tmp_path).labels.tolist() == [0, 1]
    assert "give labels.csv" in caplog.text


@pytest.mark.parametrize("head", ["", "name,label\n", "\ufeffname, label\n"])
def test_a_table_gives_labels(tmp_path, head):
    paint(tmp_path / "a.png", 0)
    paint(tmp_path / "sub" / "b, c.png", 0)
    (tmp_path / "labels.csv").write_text(head + '"sub/b, c.png",7\n\na.png, 3\n', encoding="utf-8")
    assert only(tmp_path).labels.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("a.png,1\n", "no label for picture 'b.png'"),
        ("a.png,1\nb.png,2\nc.png,3\n", "names 'c.png', which is no picture here"),
        ("a.png,1\na.png,2\nb.png,2\n", "line 2 names 'a.png' again"),
        ("a.png,cat\nb.png,2\n", "line 1 is 'a.png,cat', expected a picture's name and its class index"),
        ("a.png,-1\nb.png,2\n", "line 1 is 'a.png,-1'"),
        ("a.png\nb.png,2\n", "line 1 is 'a.png'"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, table, text):
    paint(tmp_path / "a.png", 0)
    paint(tmp_path / "b.png", 0)
    (tmp_path / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'labels.csv'}: ")
    assert text in message


def test_loose_pictures_beside_class_folders_are_refused(tmp_path):
    for name in ("cat/1.png", "dog/1.png", "loose.png"):
        paint(tmp_path / name, 0)
    assert "'loose.png' lies in none; move it, or give the classes in labels.csv" in refused(tmp_path)


def test_the_digest_follows_names_sizes_labels_and_settings(tmp_path):
    def digest(inputs=RGB, **options):
        return open_dataset(tmp_path, inputs, pictures=PictureOptions(**options)).digest

    paint(tmp_path / "a.png", 0)
    first = digest()
    assert digest() == first
    assert digest(size=(4, 6)) == first
    seen = {first, digest(mean=(0.5,)), digest(resize=9), digest(GRAY)}
    (tmp_path / "labels.csv").write_text("a.png,0")
    seen.add(digest())
    paint(tmp_path / "b.png", 0)
    (tmp_path / "labels.csv").write_text("a.png,0\nb.png,1")
    seen.add(digest())
    assert len(seen) == 6


# What cannot be read ------------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_named(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.png"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    content = path.read_bytes()
    for cut in (0, 10, 60, len(content) // 2):
        path.write_bytes(content[:cut])
        assert refused(tmp_path).startswith(f"{path}: cannot be read (")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_picture_never_gives_a_traceback(tmp_path):
    rng = np.random.default_rng(0)
    refusals = 0
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "ppm"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(path)
        content = path.read_bytes()
        for _ in range(40):
            changed = bytearray(content)
            for place in rng.integers(0, min(len(content), 200), 3):
                changed[place] = rng.integers(256)
            path.write_bytes(bytes(changed))
            with contextlib.suppress(DataError):
                only(tmp_path)
                refusals -= 1
            refusals += 1
        path.unlink()
    assert refusals > 40


def test_an_oversized_picture_is_refused(tmp_path, monkeypatch):
    paint(tmp_path / "a.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert f"{tmp_path / 'a.png'}: cannot be read (Image size (24 pixels) exceeds limit" in refused(tmp_path)


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "a.png")
    assert "a.png: has more than 8 bits per channel" in refused(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert f"{tmp_path}: holds no picture; known are .bmp" in refused(tmp_path)


def test_missing_pillow_names_the_extra(tmp_path, monkeypatch):
    paint(tmp_path / "a.png", 0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'raqu-onnx[images]'" in refused(tmp_path)


def test_labels_given_for_a_folder_are_refused(tmp_path):
    paint(tmp_path / "a.png", 0)
    with pytest.raises(DataError, match="takes its labels from the source itself"):
        open_dataset(tmp_path, RGB, labels=np.arange(1))


# What does not fit the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        (RGB * 2, {}, "feeds one input of rank 4, the model has 'image' float32[n, 3, 4, 6], 'image'"),
        ((InputSpec("x", F32, ("n", 3)),), {}, "feeds one input of rank 4, the model has 'x' float32[n, 3]"),
        (RGB, {"layout": "nhwc"}, "layout nhwc gives model input 'image' float32[n, 3, 4, 6] 6 channels"),
        ((InputSpec("x", F32, ("n", "c", 4, 6)),), {}, "unknown channels, pictures have 1 or 3"),
        ((InputSpec("x", F32, ("n", 3, "h", "w")),), {}, "leaves height or width free; give the picture option size"),
        (RGB, {"size": (6, 4)}, "picture option size is 6 x 4, which model input 'image' float32[n, 3, 4, 6] does not"),
        (RGB, {"resize": 5}, "picture option resize is 5, below the crop of 4 x 6; give at least 6"),
        (RGB, {"mean": (0.5, 0.5)}, "picture option mean has 2 values, the model has 3 channels; give 1 or 3"),
        (GRAY, {"std": (0.5,) * 3}, "picture option std has 3 values, the model has 1 channels"),
        ((InputSpec("x", np.dtype(np.int8), ("n", 3, 4, 6)),), {}, "takes no pictures (float or uint8 does)"),
        ((InputSpec("x", np.dtype(np.uint8), ("n", 3, 4, 6)),), {"mean": (1.0,)}, "takes pixels as they are"),
        ((), {}, "the model has no input that data could feed"),
        ((InputSpec("x", F32, None),), {}, "model input 'x' has no known rank"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(tmp_path, inputs, options, text):
    paint(tmp_path / "a.png", 0)
    assert text in refused(tmp_path, inputs, **options)


def test_size_serves_a_model_with_free_height_and_width(tmp_path):
    paint(tmp_path / "a.png", 0, (20, 20))
    inputs = (InputSpec("x", F32, ("n", 3, "h", "w")),)
    assert only(tmp_path, inputs, size=(5, 7)).feeds["x"].shape == (1, 3, 5, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (0, 4)},
        {"size": (4,)},
        {"resize": 0},
        {"scale": 0.0},
        {"mean": ()},
        {"mean": (float("nan"),)},
        {"std": (0.0,)},
        {"layout": "hwc"},
        {"crop": 3},
    ],
)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValidationError):
        PictureOptions(**options)
