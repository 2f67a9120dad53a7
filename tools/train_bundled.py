"""Train, export and check the models that the package ships, and write their data.

    python tools/train_bundled.py --model all

Needs the package's extra `train` and the IDX files of Fashion-MNIST (Debian package
`dataset-fashion-mnist`). Exits with 1 where an exported model stays under its bar on the 10,000
test images. The test images decide nothing: what the last epoch gives is exported.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
from fashion_mnist import DataError, LabelledImages, split, write_data_file

REPOSITORY = Path(__file__).resolve().parent.parent
DATA_FILE = "fashion_mnist.npz"

#: The least accuracy on the 10,000 test images with which a model ships, in percent.
ACCURACY_BARS = {"resnet20": 93.0, "mobilenetv2": 91.5}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=(*ACCURACY_BARS, "all"), default="all", help="what to train")
    parser.add_argument("--epochs", type=_positive, help="training epochs (unset: each model's own)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the IDX .gz files",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=REPOSITORY / "raqu_onnx" / "bundled",
        help="where models and data are written",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, order and augmentation")
    parser.add_argument(
        "--threads",
        type=_positive,
        default=2,
        help="torch's threads; another number, other rounding",
    )
    parser.add_argument(
        "--evaluate-only",
        action="store_true",
        help="train nothing: measure the models already there",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def accuracy(model_path: Path, data: LabelledImages, batch_size: int = 500) -> float:
    """Return the percentage of `data` that the ONNX model classifies right in onnxruntime."""
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    right = 0
    for start in range(0, len(data), batch_size):
        pixels = data.images[start : start + batch_size, np.newaxis].astype(np.float32) / np.float32(255)
        (logits,) = session.run(["logits"], {"input": pixels})
        right += int(np.count_nonzero(np.argmax(logits, axis=1) == data.labels[start : start + batch_size]))
    return 100.0 * right / len(data)


def train_and_export(name: str, data: LabelledImages, path: Path, options: argparse.Namespace) -> None:
    """Train network `name` from scratch and write it to `path`."""
    # torch is slow to import, and --evaluate-only does without it.
    from bundled_training import RECIPES, export, make_deterministic, train

    recipe = RECIPES[name]
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    make_deterministic(options.seed, options.threads)
    export(train(name, data, recipe, _report), path)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return the exit status."""
    options = parse_arguments(arguments)
    try:
        splits = split(options.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.evaluate_only:
        write_data_file(splits, options.output_dir / DATA_FILE)
    passed = True
    for name in ACCURACY_BARS if options.model == "all" else [options.model]:
        path = options.output_dir / f"{name}.onnx"
        if not options.evaluate_only:
            train_and_export(name, splits.training, path, options)
        measured, bar = accuracy(path, splits.test), ACCURACY_BARS[name]
        selection = accuracy(path, splits.selection)
        verdict = "ok" if measured >= bar else "UNDER THE BAR"
        line = f"{name}: test {measured:.2f} % (bar {bar} %: {verdict}), selection {selection:.2f} %"
        print(line, flush=True)
        passed = passed and measured >= bar
    return 0 if passed else 1


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
