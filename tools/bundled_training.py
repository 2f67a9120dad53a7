"""Train one network of the bundled family with torch and export it to ONNX."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from bundled_networks import NETWORKS
from fashion_mnist import LabelledImages
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, update_bn
from torch_export import write_onnx

_SIZE = 28
_SHIFT = 2


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum, one learning rate cycle, averaged weights."""

    epochs: int
    batch_size: int = 128
    peak_learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    average_decay: float = 0.998
    bfloat16: bool = False


RECIPES: dict[str, Recipe] = {
    "resnet20": Recipe(epochs=16, bfloat16=True),
    "mobilenetv2": Recipe(epochs=12, weight_decay=1e-4, label_smoothing=0.0),
}


def make_deterministic(seed: int, threads: int) -> None:
    """Seed torch; the result still depends on the machine type and the number of threads."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # It costs time and only matters to code that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_num_threads(threads)


def augment(padded: Tensor, indices: Tensor) -> Tensor:
    """Pick images of `padded` ``[N, 32, 32]``, shift them by up to 2 pixels, mirror half.

    Returns:
        Float images ``[B, 1, 28, 28]`` in 0..1.
    """
    count = len(indices)
    positions = torch.arange(_SIZE)
    rows = torch.randint(0, 2 * _SHIFT + 1, (count, 1)) + positions
    columns = torch.randint(0, 2 * _SHIFT + 1, (count, 1)) + positions
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    picked = padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.unsqueeze(1).float().div_(255).contiguous(memory_format=torch.channels_last)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay the weight matrices only, never biases and BatchNormalization's scales."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(name: str, data: LabelledImages, recipe: Recipe, report: Callable[[str], None]) -> nn.Module:
    """Train network `name` on `data`; return the last averaged weights, in evaluation mode."""
    network = NETWORKS[name]()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(network, avg_fn=lambda mean, new, _: mean.lerp(new, 1 - recipe.average_decay))
    padded = functional.pad(torch.from_numpy(data.images), (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
    labels = torch.from_numpy(data.labels).long()
    steps = len(data) // recipe.batch_size
    optimizer = torch.optim.SGD(
        parameter_groups(network, recipe.weight_decay),
        lr=recipe.peak_learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.peak_learning_rate,
        total_steps=recipe.epochs * steps,
        cycle_momentum=False,
    )
    start = time.monotonic()
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        total = 0.0
        order = torch.randperm(len(data))[: steps * recipe.batch_size]
        for indices in torch.split(order, recipe.batch_size):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
                logits = network(augment(padded, indices))
            loss = functional.cross_entropy(logits.float(), labels[indices], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            total += loss.item()
        elapsed = time.monotonic() - start
        report(f"{name}: epoch {epoch}/{recipe.epochs}, loss {total / steps:.4f}, {elapsed:.0f} s")
    batches = torch.split(torch.arange(len(data)), recipe.batch_size)
    update_bn((augment(padded, indices) for indices in batches), average)
    average.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return average.module.eval()


def export(network: nn.Module, path: Path) -> None:
    """Write `network` as checked ONNX: BatchNormalization unfolded, no trace of this machine."""
    temporary = path.with_name(f".{path.name}.partial")
    write_onnx(network, (1, _SIZE, _SIZE), temporary)
    model = onnx.load(temporary)
    _strip_traces(model)
    _separate_initializers(model.graph)
    model.graph.name = path.stem
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, temporary)
    temporary.replace(path)


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove doc strings and metadata: exporters write stack traces with file paths there."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    graph = model.graph
    for message in (
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")


def _separate_initializers(graph: onnx.GraphProto) -> None:
    """Undo the merging of equal initializers, for which the exporter puts Identity nodes."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.input[0] in initializers]:
        copy = graph.initializer.add()
        copy.CopyFrom(initializers[node.input[0]])
        copy.name = node.output[0]
        graph.node.remove(node)
