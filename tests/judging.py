"""What a judge of a small net is made of."""

from __future__ import annotations

from typing import Any

from raqu_onnx.data import Dataset, open_dataset
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes import AnnotateTilingPass, CalibratePass, TidyPass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.quantizer import ModelQuantizer, QuantizerSettings
from raqu_onnx.search import SearchSettings

__all__ = ["judge_parts"]


def judge_parts(net: Any, data: Any, **settings: Any) -> tuple[Any, ModelQuantizer, Dataset, SearchSettings]:
    """Model, quantizer, data and settings for a `Judge`; batches have 16 samples."""
    model = TidyPass()(load_model(net)).model
    AnnotateTilingPass()(model)
    dataset = open_dataset(data, model_inputs(model))
    CalibratePass(dataset, pairs=True, threads=1)(model)
    quantizer = build_quantizer(model, "offset", QuantizerSettings("sequential", threads=1))
    return model, quantizer, dataset, SearchSettings(threads=1, batch_size=16, sensitivity_samples=20, **settings)
