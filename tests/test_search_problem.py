"""What a search measures on real models and data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from raqu_onnx.data import open_dataset
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.search import Bits, Goal, SearchSettings, search
from raqu_onnx.search import judge as judge_module
from raqu_onnx.search.problem import Problem
from raqu_onnx.spool import Spool, SpoolError


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_sensitivity_is_measured_on_the_samples_asked_for(batch: str | int, small_net: Any, small_data: Any) -> None:
    judged: list[int] = []
    found = real_problem(small_net(batch=batch), small_data(48), sensitivity_samples=20, batch_size=16)
    stream = found._judge._simulator.stream

    def counted(*arguments: Any) -> Any:
        judged.append(0)
        for batch, outputs in stream(*arguments):
            judged[-1] += batch.size
            yield batch, outputs

    found._judge._simulator.stream = counted  # type: ignore[method-assign]
    assert found.quick_fidelity(Bits.uniform(len(found.nodes), 2, 8)) > 0
    # Whole batches of 16, or of what the model fixes.
    assert judged == [32 if batch == "N" else 20]


def test_sensitivity_is_measured_on_samples_from_all_over_the_data(small_net: Any, small_data: Any) -> None:
    data = small_data(48)
    # The middle one of three batches stands for all.
    middle = {name: values[16:32] for name, values in data.items()}
    bits = Bits.uniform(3, 3, 8)
    whole = real_problem(small_net(), data, sensitivity_samples=16, batch_size=16)
    part = real_problem(small_net(), data, selection=middle, sensitivity_samples=16, batch_size=16)
    assert whole.quick_fidelity(bits) == part.quick_fidelity(bits) > 0


@pytest.mark.parametrize("sizes", [[64, *[1] * 200], [64] * 5 + [4], [1] * 40, [7]])
@pytest.mark.parametrize("samples", [1, 20, 256, 320, 1000])
def test_batches_for_sensitivity_hold_as_many_samples_as_are_asked_for(sizes: list[int], samples: int) -> None:
    batches = object.__new__(judge_module._Batches)
    batches._sizes = sizes
    places = batches.spread(samples)
    held = sum(sizes[place] for place in places)
    assert held >= samples or places == frozenset(range(len(sizes)))
    assert held <= samples + 2 * max(sizes) or len(places) < 3 or held <= 1.5 * samples + max(sizes)


def test_an_output_without_one_row_per_sample_is_compared_batch_by_batch(small_net: Any, small_data: Any) -> None:
    net = small_net()
    net.graph.node.append(helper.make_node("ReduceMean", ["logits"], ["mean"], "mean_of_all", keepdims=1))
    net.graph.output.insert(0, helper.make_tensor_value_info("mean", TensorProto.FLOAT, [1, 1]))
    found = real_problem(net, small_data(48), sensitivity_samples=16, batch_size=16)
    assert np.isfinite(found.quick_fidelity(Bits.uniform(len(found.nodes), 8, 8)))


def test_a_source_may_fill_the_same_arrays_again(small_net: Any, small_data: Any) -> None:
    data = small_data(48)

    class Reader:
        """Gives every batch in the same memory, as many data loaders do."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.starts = iter(range(0, 48, 16))
            self.memory = np.zeros((16, 3, 8, 8), np.float32)

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self.starts, None)
            if start is None:
                return None
            self.memory[:] = data["input"][start : start + 16]
            return {"input": self.memory}

    unlabelled = {"input": data["input"]}
    bits = Bits.uniform(3, 3, 8)
    expected = real_problem(small_net(), unlabelled, batch_size=16).score(bits)
    assert real_problem(small_net(), Reader(), batch_size=16).score(bits) == expected


def test_selection_data_beyond_memory_and_disk_is_read_again(
    small_net: Any, small_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = Bits.uniform(3, 3, 8)
    expected = real_problem(small_net(), small_data(48), batch_size=16).score(bits)
    for room in (10_000, 0):
        monkeypatch.setattr(judge_module, "Spool", lambda room=room: Spool(room))
        assert real_problem(small_net(), small_data(48), batch_size=16).score(bits) == expected

    def full() -> Any:
        raise SpoolError("no room")

    monkeypatch.setattr(judge_module, "Spool", lambda: SimpleNamespace(append=lambda _: full()))
    assert real_problem(small_net(), small_data(48), batch_size=16).score(bits) == expected


def test_the_task_decides_what_candidates_are_judged_by(small_net: Any, small_data: Any) -> None:
    bits = Bits.uniform(3, 3, 8)
    values = real_problem(small_net(), small_data(48), task="regression")
    assert values.reference.metric == "1 - noise/signal"
    found = values.score(bits)
    assert (found.top1, found.kl) == (None, None)
    assert values.quick_fidelity(bits) == pytest.approx(10 ** (-values.score(bits).sqnr_db / 10), rel=0.5)
    assert real_problem(small_net(), small_data(48)).reference.metric == "top-1"


def test_a_chip_of_several_sizes_is_filled_by_crossbars(small_net: Any, small_data: Any) -> None:
    """Large crossbars serve a budget that small ones would exceed many times over."""
    kinds = [
        {"name": "small", "rows": 16, "cols": 8, "cell_bits": 2, "count": 100},
        {"name": "large", "rows": 64, "cols": 32, "cell_bits": 2, "count": 4},
    ]
    chip = Chip.model_validate(
        {
            "schema_version": 1, "name": "mixed", "encoding": "offset", "sharing": "time", "dac_bits": 1,
            "crossbars": kinds,
        }
    )  # fmt: skip
    free = real_problem(small_net(), small_data(48), chip=chip)
    assert (free.crossbars((2, 2, 2)) or 0) > 3
    found = real_problem(small_net(), small_data(48), chip=chip, max_crossbars=3, evaluations=2)
    result = search(found, Goal(max_crossbars=3, max_accuracy_drop=None))
    assert result.chosen.crossbars <= 3
    # What is left of the budget got bits.
    assert max(result.chosen.bits.weights) > 2


def real_problem(
    net: onnx.ModelProto,
    data: Any,
    chip: Chip | None = None,
    max_crossbars: int | None = None,
    selection: Any = None,
    **options: Any,
) -> Problem:
    model = load_model(net)
    dataset = open_dataset(data, model_inputs(model))
    for item in (TidyPass(), AnnotateTilingPass(), CalibratePass(dataset)):
        model = item(model).model
    quantizer = build_quantizer(model, "offset", QuantizerSettings("mse"))
    settings = SearchSettings(threads=1, **options)
    chosen_on = dataset if selection is None else open_dataset(selection, model_inputs(model))
    return Problem(model, quantizer, chip or load_chip("generic"), chosen_on, settings, max_crossbars=max_crossbars)
