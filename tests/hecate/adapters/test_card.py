"""The model card."""

from __future__ import annotations

from pathlib import Path

from hecate.adapters.card import adapter_card, full_model_card, how_trained
from hecate.adapters.peft.description import LoraDescription
from hecate.config import Config, DataConfig, DataSource, ModelConfig, MoeConfig
from tests.hecate.adapters.exporting import (
    save_mixlora,
)


def test_a_folder_has_a_card(tmp_path: Path) -> None:
    extra = {"training": {"steps": 12, "data": ["chats", "sums"]}}
    card = (save_mixlora(tmp_path / "adapter", Path("base: model"), extra=extra) / "README.md").read_text()
    header = card.split("---")[1]
    for text in ("library_name: hecate", 'base_model: "base: model"', "- mixlora"):
        assert text in header
    for text in ("| steps | 12 |", "| data | chats, sums |", "| experts | 3 |", "hecate generate"):
        assert text in card


def test_a_whole_model_has_a_card() -> None:
    """Also one that had no base model, as Megatron's models."""
    made = Config(
        model=ModelConfig(name_or_path="models/tiny"),
        data=DataConfig(train=(DataSource(path="sums.jsonl", name="sums"),)),
        moe=MoeConfig(family="full", num_experts=6, top_k=3),
        max_steps=7,
        output_dir="runs/x",
    )
    card = full_model_card(made, "models/tiny", 6).decode()
    header = card.split("---")[1]
    for text in ("library_name: transformers", 'base_model: "models/tiny"', "- hecate", "- mixtral"):
        assert text in header
    for text in ("| experts | 6 |", "| experts for each token | 3 |", "| family | full |", "| steps | 7 |", "| data | sums |"):
        assert text in card
    assert "| trained beside experts and routers | nothing |" in card
    assert "AutoModelForCausalLM.from_pretrained(FOLDER)" in card
    assert "hecate generate FOLDER" in card
    assert "base_model" not in full_model_card(made, None, 6).decode()


def test_the_card_says_what_was_trained(tmp_path: Path) -> None:
    made = Config(
        model=ModelConfig(name_or_path="models/tiny"),
        data=DataConfig(train=(DataSource(path="a.jsonl", name="a|b"),)),
        output_dir="runs/a",
        max_steps=7,
    )
    value = {"peft_type": "LORA", "base_model_name_or_path": "b", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    card = adapter_card({**value, "hecate": {"extra": {"training": how_trained(made)}}}, LoraDescription.loading).decode()
    for text in ("| steps | 7 |", "| data | a\\|b |", "| family | mixlora |", "library_name: peft", "PeftModel.from_pretrained"):
        assert text in card


def test_text_of_others_is_shown_and_gives_no_links_or_tags(tmp_path: Path) -> None:
    """Keys and values of an adapter's extra metadata."""
    extra = {"training": {"<script>alert(1)</script>": "[free](http://x) `a`|b\r\n# c", "data": ["![x](http://y)"]}}
    card = (save_mixlora(tmp_path / "adapter", Path("base"), extra=extra) / "README.md").read_text()
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; | \\[free\\](http://x) \\`a\\`\\|b # c |" in card
    assert "<script" not in card
    assert "![x]" not in card
