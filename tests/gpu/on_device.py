"""Print the figures that a module of this folder finds on a GPU: `python -m tests.gpu.on_device MODULE gpu|mock [ARGUMENT ...]`."""

from __future__ import annotations

import importlib
import json
import sys


def main(module: str, device: str, *arguments: str) -> None:
    if device == "mock":
        from tests.mock_cuda import install

        install.install(devices=2)
        from tests.mock_cuda.collectives import install_backend

        install_backend()
    print(json.dumps(importlib.import_module(f"tests.gpu.{module}").figures(*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
