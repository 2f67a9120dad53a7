"""A trained ResNet-20 and a few real images in the current folder, to try things on."""

from pathlib import Path

import numpy as np

from raqu_onnx.bundled import bundled_arrays, bundled_model

Path("model.onnx").write_bytes(bundled_model("resnet20"))
for part, images in (("calibration", 64), ("selection", 100), ("test", 200)):
    np.savez(f"{part}.npz", **{name: array[:images] for name, array in bundled_arrays(part).items()})
