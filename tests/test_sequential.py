"""Fitting node after node: what is kept exactly, what it gains, and what must not break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from sequential_cases import (
    Case,
    assert_equal,
    assert_sound,
    everything,
    loaded,
    prepared,
)
from tensors import normal

from raqu_onnx import OptimizeConfig, optimize
from raqu_onnx.annotations import BITS, MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import open_dataset
from raqu_onnx.evaluation import collect, make_session, score
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass
from raqu_onnx.rounding import DAMPING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.quantized import QuantizedNode


def outputs(proto: onnx.ModelProto, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of a graph by name."""
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = make_session(proto.SerializeToString(), level="disable-all", threads=1)
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


@pytest.fixture(scope="module")
def shared() -> Case:
    """For tests that change nothing."""
    return everything()


def images(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures of ten smooth patterns, and which one each shows."""
    patterns = np.repeat(np.repeat(normal(10, 3, 3, 3, seed=0), 3, 2), 3, 3)
    labels = np.random.default_rng(seed).integers(0, 10, samples)
    return np.maximum(patterns[labels] + 0.5 * normal(samples, 3, 9, 9, seed=seed), 0), labels


def classifier(layers: int = 4, width: int = 16, samples: int = 192) -> Case:
    """Convolutions in a row, where errors add up, and a last layer that is fitted to tell the patterns apart."""
    steps = "".join(
        f"c{i} = Conv <pads = [1, 1, 1, 1]> (r{i}, w{i}, b{i}) r{i + 1} = Relu (c{i}) " for i in range(layers)
    )
    text = f"""g (float[n, 3, 9, 9] r0) => (float[n, 10] y)
        {{ {steps} p = MaxPool <kernel_shape = [3, 3], strides = [3, 3]> (r{layers})
           f = Flatten (p) y = Gemm (f, w, b) }}"""
    weights: dict[str, Any] = {"w": np.zeros((width * 9, 10)), "b": (10,)}
    for i in range(layers):
        weights |= {f"w{i}": (width, width if i else 3, 3, 3), f"b{i}": (width,)}
    x, labels = images(512, 1)
    features = outputs(to_proto(loaded(text, weights)), ["f"], {"r0": x})["f"]
    second = features.T @ features
    second += 0.01 * np.trace(second) / len(second) * np.eye(len(second))
    weights["w"] = 8 * np.linalg.solve(second, features.T @ np.eye(10)[labels])
    return Case(loaded(text, weights), {"r0": images(samples, 2)[0]})


# --------------------------------------------------------------------------------------------------------- the same


def test_the_same_data_gives_the_same_bytes_whatever_was_quantized_before(shared: Case) -> None:
    first = shared.sequential.quantize(shared.bits(3))
    shared.sequential.quantize(shared.bits(5, 4))
    assert_equal(first, shared.sequential.quantize(shared.bits(3)))
    assert_equal(first, everything().sequential.quantize(shared.bits(3)))
    assert_sound(first)


def test_a_first_node_whose_input_stays_float_is_fitted_to_its_own_weight(shared: Case) -> None:
    first = shared.names[0]
    bits = shared.bits(4, None)
    np.testing.assert_array_equal(
        shared.sequential.quantize(bits)[first].codes, shared.quantizer.quantize(first, bits[first]).codes
    )
    # Further on inputs differ, and so do the codes.
    apart = shared.quantizer.quantize(shared.names[1], bits[shared.names[1]])
    assert (shared.sequential.quantize(bits)[shared.names[1]].codes != apart.codes).any()


def test_eight_bits_are_almost_float(shared: Case) -> None:
    found = shared.score(shared.sequential.quantize(shared.bits(8, 8)))
    assert found.sqnr_db is not None
    assert found.sqnr_db > 33
    assert found.kl is not None
    assert found.kl < 1e-3
    weights_only = shared.score(shared.sequential.quantize(shared.bits(8, None)))
    assert weights_only.sqnr_db is not None
    assert weights_only.sqnr_db > 38


def test_nodes_without_room_for_a_bias_get_none(shared: Case) -> None:
    for node in shared.sequential.quantize(shared.bits(2)).values():
        assert (node.real_bias() is None) == (node.node.op_type == "MatMul")
        assert node.codes.shape == node.node.layout.shape
        assert node.scales.shape == (node.node.layout.channels,)


def test_the_mean_output_of_every_node_with_a_bias_stays() -> None:
    case = everything()
    for node in mapped_nodes(case.model):
        BITS.set(node, NodeBits(2, 6))
    # Of the node whose output is only added to a value, it is the sum whose mean stays.
    names = [{"b": "s1"}.get(name, name) for name in (MAPPED.require(n).output_name for n in mapped_nodes(case.model))]
    assert "s1" in names
    before = to_proto(case.model)
    case.quantizer.fit_sequentially(case.model, case.data)
    emitted = QuantizeWeightsPass(threads=1)(case.model).model
    quantized = [QUANTIZED.require(node) for node in mapped_nodes(emitted)]
    emitted = InsertQDQPass()(emitted).model
    expected, found = (outputs(proto, names, {"x": normal(40, 3, 8, 8)}) for proto in (before, to_proto(emitted)))
    for name, node in zip(names, quantized, strict=True):
        if node.bias is None:
            continue
        axes = tuple(i for i in range(expected[name].ndim) if i != 1)
        varies = np.abs(expected[name] - expected[name].mean(axes, keepdims=True)).mean()
        assert np.abs(found[name] - expected[name]).mean() > 0.05 * varies, "the outputs themselves do not stay"
        difference = np.abs(found[name].mean(axes) - expected[name].mean(axes))
        # The bias itself is rounded to its step.
        assert (difference <= 0.5 * node.bias_scales() + 1e-4 * np.abs(expected[name]).max()).all(), name


# ------------------------------------------------------------------------------------------------------- what it gains


@pytest.mark.parametrize("bits", [2, 3])
def test_low_widths_lose_less_than_node_by_node(bits: int) -> None:
    case = classifier()
    x, labels = images(256, 3)
    unseen = open_dataset({"r0": x, "labels": labels}, model_inputs(case.model))
    reference = collect(make_session(to_proto(case.model).SerializeToString(), threads=1), unseen)
    assert (score(reference).top1 or 0) > 0.9
    alone = case.score(case.one_by_one(case.bits(bits)), unseen)
    together = case.score(case.sequential.quantize(case.bits(bits)), unseen)
    assert together.kl is not None
    assert alone.kl is not None
    assert together.kl < 0.7 * alone.kl
    assert (together.top1 or 0) >= (alone.top1 or 0)


def test_dropped_kernels_are_made_up_for() -> None:
    case = classifier(layers=3)
    bits = case.bits(8)
    bits[case.names[0]] = NodeBits((0,) * 3 + (8,) * 13, 8)
    found = case.sequential.quantize(bits)
    assert not found[case.names[0]].codes[:3].any()
    assert not found[case.names[0]].bias[:3].any()  # type: ignore[index]
    alone, together = (case.score(quantized).kl for quantized in (case.one_by_one(bits), found))
    assert alone is not None
    assert together is not None
    assert together < 0.5 * alone


def test_a_node_without_a_bias_makes_up_for_the_mean_error_with_its_weights() -> None:
    model = loaded(
        "g (float[n, 12] x) => (float[n, 6] y) { a = MatMul (x, w1)  y = MatMul (a, w2) }",
        {"w1": normal(12, 20), "w2": normal(20, 6)},
    )
    x = 5 * normal(1, 12, seed=5) + 0.2 * normal(200, 12)
    case = Case(model, {"x": x})
    bits = {case.names[0]: NodeBits(2, None), case.names[1]: NodeBits(8, None)}
    w1, w2 = (case.quantizer.sources[name].weight for name in case.names)

    def mean_error(quantized: Mapping[str, QuantizedNode]) -> float:
        first, second = (quantized[name].weight() for name in case.names)
        return float(np.abs((x @ first @ second - x @ w1 @ w2).mean(0)).max())

    assert mean_error(case.sequential.quantize(bits)) < 0.1 * mean_error(case.one_by_one(bits))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_bundled_nets_lose_less_than_node_by_node(name: str) -> None:
    proto = onnx.ModelProto.FromString(bundled_model(name))
    case = Case(prepared(proto), {"input": bundled_arrays("calibration")["input"][:32]})
    test = bundled_arrays("test")
    unseen = open_dataset({"input": test["input"][:192], "labels": test["labels"][:192]}, model_inputs(case.model))
    bits = case.bits(2)
    for end in (case.names[0], case.names[-1]):
        bits[end] = NodeBits(8, 8)
    alone = case.score(case.one_by_one(bits), unseen)
    together = case.score(case.sequential.quantize(bits), unseen)
    assert together.kl is not None
    assert alone.kl is not None
    assert together.top1 is not None
    assert together.kl < 0.4 * alone.kl
    assert together.top1 > 0.82


def test_too_little_memory_to_keep_float_inputs_changes_nothing(shared: Case) -> None:
    expected = shared.sequential.quantize(shared.bits(3))
    assert shared.sequential._kept is not None
    for quarter in range(96, 56, -1):
        tight = everything(memory_bytes=round(2 ** (quarter / 4)))
        if tight.sequential._kept is None:
            break
    assert tight.sequential._kept is None
    assert sum(len(batch) for batch in tight.sequential._feeds["x"]) == 40
    assert_equal(expected, tight.sequential.quantize(shared.bits(3)))
    assert_equal(expected, tight.sequential.quantize(shared.bits(3)))


@pytest.mark.parametrize("without", [frozenset(), frozenset(("shrinkage",))])
def test_samples_that_are_much_alike_are_trusted_less(without: frozenset[Any]) -> None:
    """Sixteen pictures each of four scenes, the last of which is held out, and as many of 64 scenes."""
    text = """g (float[n, 8, 9, 9] x) => (float[n, 16, 7, 7] y) { y = Conv (x, w, b) }"""
    proto = loaded(text, {"w": (16, 8, 3, 3), "b": (16,)})
    scenes, noise = normal(64, 8, 9, 9, seed=1), normal(64, 8, 9, 9, seed=2)
    many = Case(proto, {"x": scenes + 0.01 * noise}, without=without)
    feeds = {"x": np.repeat(scenes[:4], 16, axis=0) + 0.01 * noise}
    few = Case(proto, feeds, without=without)
    (name,) = many.names
    assert many.sequential._damping == {name: DAMPING}
    assert (few.sequential._damping[name] > DAMPING) == (not without)
    weights = few.sequential.quantize(few.bits(3))[name].codes
    # The same where float values are not kept for want of memory, and whatever is asked for first.
    tight = Case(proto, feeds, without=without)
    tight.sequential._kept, tight.sequential._damping = None, {}
    tight.sequential.quantize(tight.bits(5, 4))
    assert tight.sequential._damping == few.sequential._damping
    assert (weights == tight.sequential.quantize(tight.bits(3))[name].codes).all()
    plain = Case(proto, feeds, without=frozenset({"shrinkage"}))
    assert (weights == plain.sequential.quantize(plain.bits(3))[name].codes).all() == bool(without)


# ------------------------------------------------------------------------------------------------------- the emitted


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("activation", [(8, 8), (3, 8), None])
def test_the_search_judges_what_is_emitted(activation: tuple[int, int] | None) -> None:
    config = OptimizeConfig(
        weight_bits=(2, 8), activation_bits=activation, evaluations=3, max_crossbars=3, max_accuracy_drop=5.0, threads=1
    )
    data = {"calibration": "calibration.npz", "selection": "selection.npz", "evaluation": "selection.npz"}
    result = optimize("model.onnx", "out", **data, chip="chip.toml", config=config)
    assert result.search is not None
    chosen = result.search.chosen
    assert min(np.min(width) for width in chosen.bits.weights) < 5
    selection = open_dataset("selection.npz", model_inputs(load_model("model.onnx")))
    reference = collect(make_session("model.onnx", threads=1), selection)
    found = score(collect(make_session("out/model.onnx", level="disable-all", threads=1), selection), reference)
    assert found.kl is not None
    assert found.kl > 1e-4
    report = json.loads(Path("out/report.json").read_text())
    ours = next(row for row in report["figures"] if row["label"] == "ours")
    for judged in (vars(chosen.score), ours["selection"], report["levels"]["disable-all"]):
        assert (judged["top1"], judged["agreement"]) == (found.top1, found.agreement)
        assert judged["kl"] == pytest.approx(found.kl, rel=1e-3)
        assert judged["sqnr_db"] == pytest.approx(found.sqnr_db, abs=1e-2)
    emitted = [row["weight"] for row in report["bits"].values()]
    assert emitted == pytest.approx([float(np.mean(width)) for width in chosen.bits.weights])
