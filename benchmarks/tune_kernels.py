"""Tune our kernels for the GPU at hand, over the layers of `benchmarks.kernels`, and keep what is found in `kernels/tuned`.

python -m benchmarks.tune_kernels [--shape 7B ...]
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch import Tensor

from benchmarks.kernel_cases import SHAPES, LayerShape, make_inputs
from benchmarks.kernels import ours
from hecate.kernels.common.autotune import save, tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], help="only this one; may be repeated")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune_kernels: no GPU here; the tables of launch configurations are what runs without tuning")
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
        return "nothing is faster than what is in force"
    return f"{', '.join(found.configs)} in {save(found, torch.cuda.get_device_name())}"


if __name__ == "__main__":
    main()
