"""Everything that a judge is made of, in a form that travels to another process or machine.

A judge that is built from it gives the same floats as one that is built from the model itself: the same graph, the same
arrays and the same batches go into the same functions. `tests/test_workers.py` holds one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from raqu_onnx.data_base import Batch, Dataset
from raqu_onnx.quantizer import ModelQuantizer
from raqu_onnx.search.judge import Judge
from raqu_onnx.session_model import session_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from raqu_onnx.dropping import DropRules
    from raqu_onnx.encodings import SignedEncoding
    from raqu_onnx.quantizer import NodeSource, QuantizerSettings
    from raqu_onnx.search.result import SearchSettings

__all__ = ["HeldDataset", "JudgeSource"]


class HeldDataset(Dataset):
    """The batches of another dataset, in memory or in the files of a folder.

    Args:
        base: The dataset, which is read once.
        batch_size: Samples per batch that will be asked for.
        folder: Where arrays are written, one file each; they stay in memory without one.
    """

    def __init__(self, base: Dataset, batch_size: int, folder: Path | None = None) -> None:
        super().__init__(base.name, base.digest, base.inputs, has_labels=base.has_labels, synthetic=base.synthetic)
        self._pieces: list[dict[str, NDArray[Any] | Path]] = []
        self._labels: list[NDArray[np.int64] | None] = []
        self._sizes: list[int] = []
        for batch in base.batches(batch_size):
            # Copies: a source may fill the same arrays again.
            piece: dict[str, NDArray[Any] | Path] = {}
            for position, (name, array) in enumerate(batch.feeds.items()):
                if folder is None:
                    piece[name] = np.array(array)
                    continue
                path = folder / f"{base.digest[:16]}-{len(self._pieces)}-{position}.npy"
                np.save(path, array, allow_pickle=False)
                piece[name] = path
            self._pieces.append(piece)
            self._labels.append(None if batch.labels is None else np.array(batch.labels))
            self._sizes.append(batch.size)
            self._note_labels(batch.labels)

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(self._sizes)

    def read(self, most: int, indices: NDArray[np.intp] | None = None) -> Iterator[Batch]:  # noqa: ARG002
        """Yield the batches that were read, or the wanted samples of each."""
        start = 0
        for piece, labels, size in zip(self._pieces, self._labels, self._sizes, strict=True):
            batch = Batch({name: _array(value) for name, value in piece.items()}, labels)
            if indices is None:
                yield batch
            else:
                first, last = np.searchsorted(indices, [start, start + size])
                if last > first:
                    yield batch.select(indices[first:last] - start)
            start += size


def _array(value: NDArray[Any] | Path) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    array: NDArray[Any] = np.load(value, mmap_mode="r", allow_pickle=False)
    return array


@dataclass(frozen=True)
class JudgeSource:
    """What a judge is made of.

    Attributes:
        proto: The tidied float model without its large weights.
        weights: Those weights by name.
        nodes: What is known of each mapped node.
        scheme: The chip's signed encoding.
        method: How weights and ranges are chosen.
        rules: What follows from dropped kernels.
        calibration: Samples that weights are fitted on, None where the method fits on statistics.
        selection: Data that candidates are judged on.
        settings: How they are judged; threads must be given.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, NDArray[Any]]
    nodes: Mapping[str, NodeSource]
    scheme: SignedEncoding
    method: QuantizerSettings
    rules: DropRules | None
    calibration: HeldDataset | None
    selection: HeldDataset
    settings: SearchSettings

    @classmethod
    def of(
        cls,
        model: ir.Model,
        quantizer: ModelQuantizer,
        selection: Dataset,
        settings: SearchSettings,
        folder: Path | None = None,
    ) -> JudgeSource:
        """Gather it.

        Args:
            model: The tidied, mapped and calibrated float model.
            quantizer: Its quantizer.
            selection: Data that candidates are judged on.
            settings: How they are judged.
            folder: Where data is written for processes of this machine; it travels along without one.
        """
        source = session_model(model)
        # What the quantizer took, not the data that it took it from: others might take other samples.
        fit_data = quantizer.fit_data
        held = None if fit_data is None else HeldDataset(fit_data, _FIT_BATCH, folder)
        return cls(
            source.proto,
            {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in source.weights.items()},
            dict(quantizer.sources),
            quantizer.scheme,
            quantizer.settings,
            quantizer.rules,
            held,
            HeldDataset(selection, settings.batch_size, folder),
            settings,
        )

    def build(self) -> Judge:
        """The judge."""
        model = ir.serde.deserialize_model(self.proto)
        for name, array in self.weights.items():
            model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        quantizer = ModelQuantizer(self.nodes, self.scheme, self.method, self.rules)
        if self.calibration is not None:
            quantizer.fit_sequentially(model, self.calibration, whole=True)
        return Judge(model, quantizer, self.selection, self.settings)


# Samples that are read at once; batches are cut anew.
_FIT_BATCH = 32
