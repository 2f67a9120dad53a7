"""Models whose weights lie in files of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_files import TEXT, external, proto_of, refused, run

from raqu_onnx.errors import ModelError, OutputError
from raqu_onnx.model_io import load_model, model_digest, save_model, to_proto


def test_external_data_loads_and_is_mapped(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin", offset=16, length=48)
    (tmp_path / "w.bin").write_bytes(bytes(16) + np.arange(12, dtype=np.float32).tobytes())
    model = load_model(path)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(run(model), run(load_model(proto_of())))


def test_relative_path_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(48))
    monkeypatch.chdir(tmp_path)
    model = load_model("m.onnx", check_weights=False)
    monkeypatch.chdir("/")
    assert model.graph.initializers["w"].const_value.numpy().sum() == 0


def test_missing_external_data(tmp_path: Path) -> None:
    message = refused(external(tmp_path, "w.bin"), check_weights=False)
    assert message.endswith("initializer 'w': external data 'w.bin' does not exist")


@pytest.mark.parametrize(("offset", "length"), [(None, None), (4, None), (0, 48), (10**9, None)])
def test_external_data_that_is_too_short(tmp_path: Path, offset: int | None, length: int | None) -> None:
    path = external(tmp_path, "w.bin", offset=offset, length=length)
    (tmp_path / "w.bin").write_bytes(bytes(47))
    assert "is too short: 47 bytes" in refused(path, check_weights=False)


@pytest.mark.parametrize(("offset", "length"), [(-8, None), (0, 47), ("zero", None)])
def test_external_data_with_a_wrong_extent(tmp_path: Path, offset: int | None, length: int | None) -> None:
    path = external(tmp_path, "w.bin", offset=offset, length=length)
    (tmp_path / "w.bin").write_bytes(bytes(4800))
    refused(path, check_weights=False)


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../w.bin", "sub/../../w.bin", "..\\w.bin", "C:\\w.bin", "", "a\0b"]
)
def test_external_data_outside_the_folder_is_never_opened(
    tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(48))
    path = external(folder, location)
    monkeypatch.setattr(ir.ExternalTensor, "_load", lambda _: pytest.fail("opened"))
    assert "initializer 'w'" in refused(path)
    with pytest.raises(ModelError, match="initializer 'w'"):
        model_digest(path)


def test_external_data_through_a_link_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(48))
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    monkeypatch.setattr(ir.ExternalTensor, "_load", lambda _: pytest.fail("opened"))
    assert "points outside the model's folder" in refused(external(folder, "w.bin"))
    (folder / "sub").symlink_to(tmp_path)
    assert "points outside the model's folder" in refused(external(folder, "sub/w.bin"))


def test_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(bytes(48))
    (tmp_path / "w.bin").symlink_to(tmp_path / "real.bin")
    load_model(external(tmp_path, "w.bin"))


def test_strange_external_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(external(tmp_path, "pipe"))
    (tmp_path / "a.bin").write_bytes(bytes(48))
    (tmp_path / "b.bin").hardlink_to(tmp_path / "a.bin")
    assert "hard links" in refused(external(tmp_path, "b.bin"))


def test_external_data_of_a_message_has_no_folder(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin")
    assert "give the path" in refused(onnx.load(path, load_external_data=False))


def test_large_external_data_is_not_read(tmp_path: Path) -> None:
    text = TEXT.replace("float[batch, 4]", "float[batch, 30000]").replace("float[batch, 3]", "float[batch, 30000]")
    proto = proto_of(text, b=np.ones(30000, np.float32))
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[30000, 30000], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(30000 * 30000 * 4)  # sparse: 3.6 GB that take no room
    start = time.perf_counter()
    model = load_model(path, check_weights=False)
    assert time.perf_counter() - start < 0.5
    assert model.graph.initializers["w"].shape == (30000, 30000)
    with pytest.raises(ModelError, match="do not fit into one message"):
        to_proto(model)
    with pytest.raises(OutputError, match="do not fit into one ONNX file"):
        save_model(model, tmp_path / "out.onnx", external_data=False)
