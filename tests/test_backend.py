"""The reference backend on whole models: bit-exact sums of every node, both ways to run, and onnx's own interface."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import raqu_onnx.backend as backend
from raqu_onnx import optimize, validate
from raqu_onnx.backend import engines
from raqu_onnx.backend.engines import RecombinedNode, SlicedNode
from raqu_onnx.backend.folder import MappedModel, open_folder
from raqu_onnx.backend.partition import cut
from raqu_onnx.backend.session import CrossbarSession, Plan, Setting
from raqu_onnx.bundled import bundled_arrays
from raqu_onnx.cell_errors import CellErrors
from raqu_onnx.converters import Adc
from raqu_onnx.errors import ConfigError, DataError, ManifestError
from raqu_onnx.evaluation import make_session
from raqu_onnx.manifest import digest_of, read_manifest
from raqu_onnx.session_model import with_outputs

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"helpers_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


folders = load(ROOT / "tests" / "test_validate.py")
reference = load(ROOT / "tools" / "integer_reference.py")

NETS = {"pictures": folders.picture_net, "sequences": folders.sequence_net}
SHAPES = {"pictures": (2, 3, 8, 8), "sequences": (2, 4, 8)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Result folders with random codes, made once each."""
    known: dict[str, Path] = {}

    def make(chip: str, net: str = "pictures", **settings_: Any) -> Path:
        key = f"{chip}/{net}/{settings_}"
        if key not in known:
            folder = tmp_path_factory.mktemp("result")
            dac_bits = settings_.pop("dac_bits", 1)
            built = folders.small_chip(**folders.CHIPS[chip]).model_copy(update={"dac_bits": dac_bits})
            folders.write_folder(folder, built, source=NETS[net](), seed=len(known), **settings_)
            known[key] = folder
        return known[key]

    return make


def codes_of(mapped: MappedModel, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Input codes of every mapped node, from onnxruntime."""
    tensors = [entry.activation.tensor for entry in mapped.manifest.nodes if entry.activation is not None]
    session = make_session(with_outputs(mapped.model, tensors), level="disable-all", threads=1)
    return dict(zip(tensors, session.run(tensors, feeds), strict=True))


def check_every_node(folder: Path, feeds: dict[str, np.ndarray]) -> int:
    """Sums from cells, slice by slice and recombined, are those of the operators' texts; gives the nodes checked."""
    mapped = open_folder(folder)
    codes = codes_of(mapped, feeds)
    protos = {node.name: node for node in onnx.load(folder / "model.onnx").graph.node}
    for entry in mapped.manifest.nodes:
        act = entry.activation
        assert act is not None
        x, weight = codes[act.tensor], mapped.codes[entry.name].astype(np.int64)
        proto = protos[entry.name]
        expected = reference.integer_sums(
            proto, x.astype(np.int64) - act.zero_point, weight, constant_left=entry.constant_left
        )
        sliced = SlicedNode(mapped.view, entry, weight, mapped.cells, adc=Adc(None))
        np.testing.assert_array_equal(sliced.sums(x), expected, err_msg=entry.name)
        fast = RecombinedNode(mapped.view, entry, mapped.cells, threads=1)
        np.testing.assert_array_equal(fast.sums(x), expected, err_msg=entry.name)
    return len(mapped.manifest.nodes)


def random_feeds(net: str, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(0, 2, SHAPES[net]).astype(np.float32)}


# ------------------------------------------------------------------------------------------------------ nodes and nets


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("chip", folders.CHIPS)
def test_every_node_gives_the_operators_integers(made: Callable[..., Path], chip: str, net: str) -> None:
    """Mixed and dropped kernels, groups, padding, strides, dilation, zero points that are not 0."""
    assert check_every_node(made(chip, net, dac_bits=1 + len(chip) % 3), random_feeds(net)) >= 3


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("chip", ["isaac", "differential-row", "pairs, split"])
def test_both_ways_agree_and_are_near_onnxruntime(made: Callable[..., Path], chip: str, net: str) -> None:
    folder, feeds = made(chip, net), random_feeds(net)
    plan = Plan(open_folder(folder), threads=1)
    fast = CrossbarSession(plan).run(None, feeds)
    sliced = CrossbarSession(plan, Setting(sliced=True)).run(None, feeds)
    there = make_session(folder / "model.onnx", level="disable-all", threads=1).run(None, feeds)
    for one, other, expected in zip(fast, sliced, there, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == expected.shape
        assert np.linalg.norm(one - expected) <= 0.02 * np.linalg.norm(expected)


def test_cells_come_from_the_file_where_there_is_one(tmp_path: Path) -> None:
    """Other levels in the file give other sums, and without the file the codes are programmed."""
    folder = tmp_path / "result"
    folders.write_folder(folder, folders.small_chip("twos-complement"), source=folders.sequence_net())
    feeds = random_feeds("sequences")

    def run() -> np.ndarray:
        return np.asarray(CrossbarSession(Plan(open_folder(folder), 1)).run(None, feeds)[0])

    right = run()
    with np.load(folder / "cells.npz") as archive:
        levels = {key: archive[key] for key in archive.files}
    key = sorted(levels)[0]
    levels[key] = np.where(levels[key] > 0, 0, levels[key]).astype(np.uint8)
    np.savez(folder / "cells.npz", **levels)
    assert not np.array_equal(run(), right)
    (folder / "cells.npz").unlink()
    np.testing.assert_array_equal(run(), right)


def test_each_node_between_runs_once(made: Callable[..., Path]) -> None:
    model = open_folder(made("offset")).model
    manifest = read_manifest(made("offset") / "manifest.json")
    stages = cut(model, manifest.nodes)
    ran = [node.name for stage in stages if stage.segment for node in stage.segment.model.proto.graph.node]
    assert len(set(ran)) == len(ran)
    mapped = {entry.name for entry in manifest.nodes}
    assert not mapped & set(ran)
    assert [stage.node.name for stage in stages if stage.node] == [
        node.name for node in model.graph if node.name in mapped
    ]
    # Dequantized weights are needed by nobody: the cells hold them.
    assert not [name for name in ran if name.endswith("_wdq")]


def test_odd_graphs_run(tmp_path: Path) -> None:
    """A node that nobody reads; outputs that are inputs, initializers or read on; a body that reads from around."""
    m = folders.FloatModel([], {})
    y = m.add("Conv", "x", (4, 3, 3, 3), bias=4)
    m.add("Conv", y, (2, 4, 1, 1))
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", [y], ["inner"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("inner", 1, None)],
    )
    m.weights["sure"] = np.array(True)
    m.nodes.append(onnx.helper.make_node("If", ["sure"], ["chosen"], "if", then_branch=inner, else_branch=inner))
    m.nodes.append(onnx.helper.make_node("Shape", ["chosen"], ["sizes"], "shape"))
    out = m.add("Conv", "chosen", (2, 4, 3, 3), bias=2)
    m.nodes.append(onnx.helper.make_node("Flatten", [out], ["flat"], "flat"))
    m.weights["constant"] = np.arange(3.0, dtype=np.float32)
    proto = folders.float_model(m, [2, 3, 8, 8], [out, y, "flat", "constant", "x"])
    proto.graph.output.append(onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [4]))
    folders.write_folder(tmp_path / "result", folders.small_chip("offset"), source=proto)
    feeds = random_feeds("pictures")
    session = CrossbarSession(Plan(open_folder(tmp_path / "result"), 1))
    expected = make_session(tmp_path / "result" / "model.onnx", level="disable-all", threads=1).run(None, feeds)
    for one, other in zip(session.run(None, feeds), expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=0.02 * np.abs(other).max())
    np.testing.assert_array_equal(session.run(["sizes"], feeds)[0], [2, 4, 6, 6])


def test_replicas_take_turns(made: Callable[..., Path]) -> None:
    """A second copy with other cells computes every second position."""
    mapped = open_folder(made("offset", "sequences", cells=False))
    view, entry = mapped.view, mapped.manifest.nodes[0]
    codes, act = mapped.codes[entry.name], entry.activation
    assert act is not None
    copies = tuple(p.model_copy(update={"replica": 1, "crossbar": p.crossbar + 1000}) for p in entry.placements)
    twice = entry.model_copy(update={"placements": (*entry.placements, *copies)})

    class Shifted:
        def crossbar(self, kind: int, number: int) -> np.ndarray:
            levels = mapped.cells.crossbar(kind, number % 1000)
            return np.zeros_like(levels) if number >= 1000 else levels

    x = codes_of(mapped, random_feeds("sequences"))[act.tensor]
    whole = SlicedNode(view, entry, codes, mapped.cells, adc=Adc(None)).sums(x)
    found = SlicedNode(view, twice, codes, Shifted(), adc=Adc(None)).sums(x)
    flat, expected = (np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) for array in (found, whole))
    np.testing.assert_array_equal(flat[::2], expected[::2])
    assert (flat[1::2] != expected[1::2]).any()


def test_validate_runs_the_whole_model(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = validate(made("offset"), threads=1)
    assert report.passed
    assert "run.crossbars" in {check.name for check in report.checks}
    right = CrossbarSession._run_node
    monkeypatch.setattr(CrossbarSession, "_run_node", lambda *given: 1.5 * right(*given))
    assert {check.name for check in validate(made("offset"), threads=1).failures} == {"run.crossbars"}


@pytest.mark.parametrize("way", ["SlicedNode", "RecombinedNode"])
def test_validate_checks_both_ways(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """One sum that is off by one in one node is found."""
    right = getattr(engines, way).sums

    def wrong(self: Any, codes: np.ndarray) -> np.ndarray:
        found = np.array(right(self, codes), np.float64)
        found.flat[-1] += 1
        return found

    monkeypatch.setattr(f"raqu_onnx.backend.engines.{way}.sums", wrong)
    failures = validate(made("offset"), threads=1).failures
    assert "cells.mvm" in {check.name for check in failures}
    assert any("1 of" in check.detail for check in failures)


# --------------------------------------------------------------------------------------------- exactness and memory


@pytest.mark.parametrize("limit", [1 << 17, 1 << 12, 1])
def test_wide_sums_are_exact(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """With less room in single precision, inputs are cut into pieces, and at last double precision takes over."""
    monkeypatch.setattr(engines, "_EXACT", limit)
    for net in NETS:
        check_every_node(made("differential-column", net), random_feeds(net, 5))


def test_vectors_are_cut_out_in_parts(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_VECTOR_VALUES", 1)
    check_every_node(made("offset"), random_feeds("pictures", 3))


# ------------------------------------------------------------------------------------------------------ bundled models


@pytest.fixture(scope="module", params=["resnet20", "mobilenetv2"])
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "result"
    arrays = {name: array[:16] for name, array in bundled_arrays("calibration").items()}
    model = ROOT / "raqu_onnx" / "bundled" / f"{request.param}.onnx"
    optimize(
        model, folder, calibration=arrays, weight_bits=4, evaluations=0, weight_method="mse", cells=True, threads=1
    )
    return folder


def test_bundled_models_are_bit_exact(bundled: Path) -> None:
    arrays = bundled_arrays("test")
    name = next(key for key in arrays if key != "labels")
    feeds = {name: arrays[name][:4]}
    assert check_every_node(bundled, feeds) >= 20
    plan = Plan(open_folder(bundled), threads=1)
    fast = CrossbarSession(plan).run(None, feeds)[0]
    np.testing.assert_array_equal(CrossbarSession(plan, Setting(sliced=True)).run(None, feeds)[0], fast)
    lossless = CrossbarSession(plan, Setting(adc=Adc(max(plan.lossless_bits().values()))))
    np.testing.assert_array_equal(lossless.run(None, feeds)[0], fast)
    assert sum(node.conversions for node in lossless.reports()) > 0
    assert not any(node.clipped for node in lossless.reports())
    narrow = CrossbarSession(plan, Setting(adc=Adc(4)))
    assert not np.array_equal(narrow.run(None, feeds)[0], fast)
    assert any(node.clipped for node in narrow.reports())


@pytest.mark.parametrize("chip", ["isaac", "differential-column, pairs", "differential-row", "twos-complement"])
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_every_node_of_the_bundled_models_in_every_encoding(tmp_path: Path, name: str, chip: str) -> None:
    """Random codes of mixed widths with dropped kernels, and zero points that are not 0."""
    settings_ = {**folders.CHIPS[chip], "rows": 128, "cols": 128}
    proto = onnx.load(ROOT / "raqu_onnx" / "bundled" / f"{name}.onnx")
    folders.write_folder(tmp_path / "result", folders.small_chip(**settings_), source=proto)
    image = bundled_arrays("test")["input"][:1]
    assert check_every_node(tmp_path / "result", {"input": image}) >= 20


# --------------------------------------------------------------------------------------------------- onnx's interface


def test_it_is_a_backend_like_any_other(made: Callable[..., Path]) -> None:
    folder, feeds = made("offset"), random_feeds("pictures")
    assert issubclass(backend.CrossbarBackend, onnx.backend.base.Backend)
    assert backend.supports_device("CPU")
    assert backend.supports_device("CPU:0")
    assert not backend.supports_device("CUDA")
    rep = backend.prepare(folder, "CPU", threads=1)
    assert isinstance(rep, onnx.backend.base.BackendRep)
    outputs = rep.run([feeds["x"]])
    names = [output.name for output in ort.InferenceSession(folder / "model.onnx").get_outputs()]
    assert list(outputs._fields) == [name if name.isidentifier() else f"_{i}" for i, name in enumerate(names)]
    for inputs in (feeds["x"], (feeds["x"],), feeds):
        for one, other in zip(rep.run(inputs), outputs, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(outputs[names[0]], outputs[0])
    np.testing.assert_array_equal(backend.run_model(folder / "model.onnx", feeds, sliced=True)[0], outputs[0])
    proto = onnx.load(folder / "model.onnx")
    found = backend.run_model(proto, feeds, manifest=folder / "manifest.json", cells=folder / "cells.npz")
    np.testing.assert_array_equal(found[0], outputs[0])
    assert backend.is_compatible(folder)
    assert not backend.is_compatible(folder, "CUDA")
    assert not backend.is_compatible(proto)


def test_options_of_prepare_reach_the_crossbars(made: Callable[..., Path]) -> None:
    folder, feeds = made("offset"), random_feeds("pictures")
    ideal = backend.run_model(folder, feeds)[0]
    noisy = CellErrors(variation=0.2)
    assert not np.array_equal(backend.run_model(folder, feeds, adc_bits=3)[0], ideal)
    one = backend.run_model(folder, feeds, errors=noisy, seed=1)[0]
    np.testing.assert_array_equal(backend.run_model(folder, feeds, errors=noisy, seed=1)[0], one)
    assert not np.array_equal(backend.run_model(folder, feeds, errors=noisy, seed=2)[0], one)


def test_misuse_is_refused_in_one_line(made: Callable[..., Path]) -> None:
    folder = made("offset")
    proto = onnx.load(folder / "model.onnx")
    rep = backend.prepare(folder)
    x = random_feeds("pictures")["x"]
    for error, said, call in (
        (ConfigError, "CUDA", lambda: backend.prepare(folder, "CUDA")),
        (ConfigError, "manifest", lambda: backend.prepare(proto)),
        (ConfigError, "cells", lambda: backend.prepare(folder, cells="cells.npz")),
        (ConfigError, "--adc-bits.*found 0", lambda: backend.prepare(folder, adc_bits=0)),
        (ConfigError, "single node", lambda: backend.run_node(proto.graph.node[0], [x])),
        (ConfigError, "batch", lambda: rep.run([x], batch=3)),
        (DataError, "2 given", lambda: rep.run([x, x])),
        (DataError, "y given", lambda: rep.run({"y": x})),
        (DataError, "cannot be run", lambda: rep.run([x[:, :2]])),
        (ManifestError, "manifest.json", lambda: backend.prepare(folder / "absent")),
    ):
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(AttributeError, match="prepair"):
        backend.prepair  # type: ignore[attr-defined]  # noqa: B018


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    import json

    folder = tmp_path / "result"
    folders.write_folder(folder, folders.small_chip("offset"))
    path = folder / "manifest.json"
    sound = path.read_text()

    def damage(change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> str:
        data = json.loads(sound)
        change(data)
        data["digest"] = digest_of(data) if sealed else data["digest"]
        path.write_text(json.dumps(data))
        with pytest.raises(ManifestError) as caught:
            open_folder(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def set_seed(data: dict[str, Any]) -> None:
        data["seed"] = 99

    def move(data: dict[str, Any]) -> None:
        data["nodes"][0]["placements"][0]["rows"] = [40, 60]

    def miscount(data: dict[str, Any]) -> None:
        data["nodes"][0]["bits"][0][1] += 1

    assert "manifest.digest" in damage(set_seed, sealed=False)
    assert "placement" in damage(move)
    assert "node.bits" in damage(miscount)
    path.write_text(sound)
    (folder / "cells.npz").write_bytes(b"nothing")
    with pytest.raises(ManifestError, match=r"cells\.npz"):
        open_folder(folder)
