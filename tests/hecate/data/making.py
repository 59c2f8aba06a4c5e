"""Write and encode small files of samples and of token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.config.schema import FieldNames
from hecate.data.encode import BadSamples, Counts, EncodedSource, encode_source
from hecate.data.files.synthetic_tasks import has_verifiers


@dataclass(frozen=True)
class Source:
    path: str
    name: str = "source"
    weight: float = 1.0
    format: str = "auto"
    fields: FieldNames | None = None
    delimiter: str | None = None
    sample_by: str | None = None
    roles_to_train: tuple[str, ...] | None = None
    train_on_eos: str | None = None


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Records as lines; a `bytes` record is written as it is."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records]
    path.write_bytes(b"".join(lines))
    return path


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A record of alternating user and assistant turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def with_bad_samples(options: dict[str, Any]) -> dict[str, Any]:
    """The same arguments of `encode_source`, in which what is done with bad samples is one value."""
    of_bad = {"on_bad_sample": "rule", "quarantine": "quarantine", "speaks": "speaks"}
    given = {name: options[key] for key, name in of_bad.items() if key in options}
    return {key: value for key, value in options.items() if key not in of_bad} | ({"bad": BadSamples(**given)} if given else {})


def encode_records(folder: Path, records: list[Any], tokenizer: Any, **options: Any) -> EncodedSource:
    path = write_jsonl(folder / "data.jsonl", records)
    return encode_source(Source(str(path)), tokenizer, **{"seq_len": 256, "vocab_size": 258} | with_bad_samples(options))


def source_of_lengths(lengths: list[int], name: str = "source", weight: float = 1.0) -> EncodedSource:
    """A source whose tokens are all different: sample i of length n holds 1000 * i + 0..n-1."""
    ids = [1000 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]
    targets = [np.append(part[1:], part[-1] + 1) for part in ids]
    return EncodedSource(
        name=name,
        path=f"{name}.jsonl",
        weight=weight,
        input_ids=np.concatenate(ids),
        targets=np.concatenate(targets).astype(np.int32),
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        lines=np.arange(1, len(lengths) + 1),
        counts=Counts(kept=len(lengths), truncated=0, skipped=0),
    )


def write_index(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16, pieces: int = 1) -> str:
    """By Megatron's own builder; each document in so many sequences."""
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for part in np.array_split(np.array(document, dtype=np.int64), pieces):
            builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


def needs_reasoning_gym() -> None:
    """Skip the test where reasoning-gym is not installed. Only hecate's own code imports it, also where pycosat is missing."""
    if not has_verifiers():
        pytest.skip("reasoning-gym is not installed")
