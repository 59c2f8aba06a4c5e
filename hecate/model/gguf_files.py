"""Read a GGUF file once, where transformers reads it for the configuration, for the weights and for the tokenizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Let what transformers does with GGUF files take a third of the time within the block.

    - The header is parsed once, out of an ordinary array: numpy's arrays over mapped files take a microsecond more for each of its million
      slices. The file is mapped all the same.
    - What the header says of configuration and tokenizer is kept, and each caller gets a copy.
    - The table of tensor names of an architecture is made once; transformers asks for it for each module of the model.
    - Its progress bar, which it also draws into files, is left out.
    """
    try:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as reading
    except ImportError:  # transformers will say what to install if it is needed
        yield
        return
    places: tuple[tuple[Any, str], ...] = ((gguf, "GGUFReader"), (gguf, "get_tensor_name_map"), (reading, "load_gguf_checkpoint"))
    originals = [getattr(owner, name) for owner, name in places]
    reader, name_map, load = originals
    for (owner, name), once in zip(places, (_once_from_arrays(reader), functools.cache(name_map), _header_once(load)), strict=True):
        setattr(owner, name, once)
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _once_from_arrays(reader: Any) -> Any:
    import numpy as np

    class ArrayReader(reader):
        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self._array = mapped.view(np.ndarray)

    return functools.cache(ArrayReader)


def _header_once(load: Any) -> Any:
    """`load_gguf_checkpoint` of transformers, which keeps what it has found without tensors."""
    header = functools.cache(lambda path: load(path, return_tensors=False))

    def loaded(path: Any, return_tensors: bool = False, **more: Any) -> Any:
        return load(path, return_tensors=True, **more) if return_tensors else copy.deepcopy(header(path))

    return loaded
