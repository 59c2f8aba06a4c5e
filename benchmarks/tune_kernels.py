"""Tune our kernels for this machine's GPU on the layers of `benchmarks.kernels`, and write the result to `kernels/tuned`.

python -m benchmarks.tune_kernels [--shape 7B ...]
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch import Tensor

from benchmarks.autotune import save, tune
from benchmarks.kernel_cases import SHAPES, LayerShape, make_inputs
from benchmarks.kernels import ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], help="only this one; may be repeated")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune_kernels: this machine has no GPU; without tuning, kernels use the tables of configurations")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for shape in SHAPES:
        if options.shape is None or shape.name in options.shape:
            print(f"{shape.name}: {_tune(shape)}")


def _tune(shape: LayerShape) -> str:
    inputs = make_inputs(shape, torch.device("cuda"))
    layer = ours(inputs)

    def step() -> list[Tensor]:
        y_TD, gradients = layer.step(inputs.dy_TD)
        return [y_TD.detach(), *gradients]

    found = tune(step, inputs.x_TD.device)
    if not found.configs:
        return "nothing is faster than the current configurations"
    return f"{', '.join(found.configs)} in {save(found, torch.cuda.get_device_name())}"


if __name__ == "__main__":
    main()
