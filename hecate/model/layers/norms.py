"""The RMS norms of a loaded model in torch's fused kernel: on a GPU one launch in each pass, where transformers has a dozen operators."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def fuse_norms(model: nn.Module, dtype: torch.dtype) -> None:
    """Put `nn.RMSNorm` in the place of every module that computes the same. The parameters stay the same objects under the same names.

    Results change by rounding: the kernel multiplies by the weight before it rounds, most models of transformers after that. A model in
    float64 is left as it is, since transformers computes its norms in float32.

    Args:
        dtype: the type of the hidden states; norms with weights of another type are left as they are, too.
    """
    if dtype.itemsize > 4:
        return
    for path, module in list(model.named_modules()):
        epsilon = rms_epsilon(module)
        if epsilon is not None and module.weight.dtype == dtype:
            fused = nn.RMSNorm(len(module.weight), epsilon, device="meta")
            fused.weight = module.weight
            model.set_submodule(path, fused.train(module.training))


def rms_epsilon(module: nn.Module) -> float | None:
    """The ε of a module that computes x · rsqrt(mean(x²) + ε) · weight and nothing else; None: it does not.

    No class is asked for. The module's own forward is run on the host with a random weight and random rows, one of them so small that ε
    counts. What takes a second argument, as a norm with a gate does, is another module even if its result is the same without.
    """
    numbers = [value for value in vars(module).values() if isinstance(value, float)]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if [name for name, _ in tensors] != ["weight"] or len(numbers) != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return None
    (epsilon,), (width, *others) = numbers, tensors[0][1].shape
    if others:
        return None
    weight, large, small = torch.randn((3, width), generator=torch.Generator().manual_seed(0))
    x = torch.stack([large, small * epsilon**0.5])
    return epsilon if _same(_own(module, weight, x), F.rms_norm(x, (width,), weight, epsilon)) else None


def _own(module: nn.Module, weight: Tensor, x: Tensor) -> object:
    """What the module makes of `x` with this weight; None: it takes no such input."""
    try:
        with torch.no_grad():
            return functional_call(module, {"weight": weight}, (x,))
    except (RuntimeError, ValueError):
        return None


def _same(got: object, wanted: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got.float(), wanted, rtol=1e-5, atol=1e-6)
