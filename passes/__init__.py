"""Passes on onnx_ir models; each stands in a file of its own and runs in any onnx_ir pipeline."""

from __future__ import annotations

from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.check import CheckPass
from raqu_onnx.passes.equalize import EqualizePass
from raqu_onnx.passes.fold_batchnorm import FoldBatchNormPass
from raqu_onnx.passes.fold_constants import FoldConstantsPass
from raqu_onnx.passes.fuse_matmul_bias import FuseMatMulBiasPass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.normalize_gemm import NormalizeGemmPass
from raqu_onnx.passes.place_crossbars import PlaceCrossbarsPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass
from raqu_onnx.passes.search_bits import SearchBitsPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.passes.widen_half import WidenHalfPass
from raqu_onnx.passes.write_manifest import WriteManifestPass
from raqu_onnx.passes.write_qonnx import WriteQonnxPass

__all__ = [
    "PASSES",
    "AnnotateTilingPass",
    "CalibratePass",
    "CheckPass",
    "EqualizePass",
    "FoldBatchNormPass",
    "FoldConstantsPass",
    "FuseMatMulBiasPass",
    "InsertQDQPass",
    "NormalizeGemmPass",
    "PlaceCrossbarsPass",
    "QuantizeWeightsPass",
    "SearchBitsPass",
    "TidyPass",
    "WidenHalfPass",
    "WriteManifestPass",
    "WriteQonnxPass",
]

#: Every pass by its name; the first five are what `tidy` is made of.
PASSES = {
    item.name: item
    for item in (
        FoldConstantsPass,
        NormalizeGemmPass,
        FoldBatchNormPass,
        FuseMatMulBiasPass,
        WidenHalfPass,
        TidyPass,
        AnnotateTilingPass,
        EqualizePass,
        CalibratePass,
        SearchBitsPass,
        QuantizeWeightsPass,
        InsertQDQPass,
        PlaceCrossbarsPass,
        WriteManifestPass,
        WriteQonnxPass,
        CheckPass,
    )
}
