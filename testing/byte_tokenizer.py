"""A tokenizer of single bytes with a chat template, built in memory."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# This is ChatML as in SmolLM2, without its default system message: "<s>role\ncontent<e>\n".
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '<e>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def build_byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte (ids 0 to 255), <s> (256), and <e> (257), which ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    return PreTrainedTokenizerFast(**{"tokenizer_object": tokenizer, "eos_token": "<e>", "chat_template": TEMPLATE} | options)
