"""The reference backend: runs a mapped model from manifest, cells and ONNX file, on virtual crossbars."""
