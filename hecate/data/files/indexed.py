"""Read samples from an indexed data set, whose documents are already token ids on disk.

They are cut and trained on in the same way as documents of the `text` format.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hecate.config import DataSource
from hecate.data.encode import STOP_AT_BAD_SAMPLES, BadSamples, Counts, Encoded, Samples, Skipped, end_of_sequence
from hecate.data.files.formats import Fault
from hecate.data.files.indexed_files import IndexedFiles, open_indexed
from hecate.data.files.syntax import bad_sample_error
from hecate.data.quarantine import write_quarantine
from hecate.errors import UserError

_TOKENS_AT_A_TIME = 1 << 24


@dataclass(frozen=True, eq=False)
class IndexedSource(Samples):
    """All samples of an indexed data set, in its order; the counterpart of `EncodedSource`. A long document makes several samples."""

    name: str
    path: str
    weight: float
    files: IndexedFiles
    end: int  # the end-of-sequence id, appended to every document that does not end with it
    firsts: NDArray[np.int64]  # [samples]; the index in files.ids at which each sample begins
    starts: NDArray[np.int64]  # [samples + 1]; the total length of the samples before each one, in tokens
    lines: NDArray[np.int64]  # [samples]; the number of each sample's document, from 1
    counts: Counts
    content: str  # the xxh3-64 hash of all ids

    def sample(self, index: int) -> Encoded:
        first, document = self.firsts[index], int(self.lines[index])
        behind = first + self.starts[index + 1] - self.starts[index] + 1
        ids = self.files.ids[first : min(behind, self.files.bounds[document])].astype(np.int32)
        if behind > self.files.bounds[document]:
            ids = np.append(ids, np.int32(self.end))
        return Encoded(ids[:-1], ids[1:], document)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """A digest of the ids of each sample's document, uint64 [samples]."""
        documents = np.unique(self.lines)
        bounds = self.files.bounds
        ids = (self.files.ids[bounds[document - 1] : bounds[document]].astype(np.int32) for document in documents.tolist())
        digests = np.array([xxhash.xxh3_64_intdigest(one.tobytes()) for one in ids], np.uint64)
        return digests[np.searchsorted(documents, self.lines)]

    def digest(self) -> str:
        """Return the xxh3-64 hash of all tokens and cuts, by which a resume detects that the data or the tokenizer changed."""
        digest = xxhash.xxh3_64(f"{self.content} {self.end}".encode())
        for array in (self.firsts, self.starts):
            digest.update(array.tobytes())
        return digest.hexdigest()


def encode_indexed(
    source: DataSource,
    prefix: str,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    bad: BadSamples = STOP_AT_BAD_SAMPLES,
) -> IndexedSource:
    """Cut the documents of the indexed data set `prefix` into samples of at most seq_len tokens.

    Documents are cut as `encode_source` cuts those of a text file, and its other arguments mean the same. The ids must be those
    of `tokenizer`, which is only asked for its end-of-sequence id. A bad sample is a document without a token to learn.

    Raises:
        UserError: a bad sample, as `bad.rule` says; an unusable file; an id outside the model's vocabulary.
    """
    files = open_indexed(prefix)
    content = _check_ids(prefix, files, vocab_size)
    bounds = files.bounds
    lengths = np.diff(bounds)
    last = files.ids[np.maximum(bounds[1:] - 1, 0)] if len(files.ids) else lengths
    end = end_of_sequence(tokenizer)
    # A document with its end-of-sequence id has one target fewer than ids: nothing predicts the first id.
    learned = lengths - ((lengths > 0) & (last == end))
    without = np.flatnonzero(learned < 1)
    faults = [_without_targets(prefix, files, int(document)) for document in without]
    if faults and bad.rule != "skip":
        raise bad_sample_error(faults[0])
    skipped = Skipped.of(faults)
    skipped.report(source.path, len(lengths) - len(faults), speaks=bad.speaks)
    if faults and bad.quarantine is not None:
        write_quarantine(bad.quarantine, faults)
    pieces = -(-np.maximum(learned, 0) // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    sizes = np.minimum(learned[document] - within * seq_len, seq_len)
    return IndexedSource(
        name=source.name,
        path=source.path,
        weight=source.weight,
        files=files,
        end=end,
        firsts=bounds[document] + within * seq_len,
        starts=np.cumsum(np.append(0, sizes), dtype=np.int64),
        lines=document + 1,
        counts=Counts(kept=len(lengths) - len(faults), truncated=0, skipped=len(faults)),
        content=content,
    )


def _check_ids(prefix: str, files: IndexedFiles, vocab_size: int) -> str:
    """Return the hash of all ids. Raises UserError if one is outside the model's vocabulary."""
    digest = xxhash.xxh3_64(str(files.ids.dtype).encode())
    for first in range(0, len(files.ids), _TOKENS_AT_A_TIME):
        part = files.ids[first : first + _TOKENS_AT_A_TIME]
        digest.update(part.tobytes())
        for extreme in (int(part.argmin()), int(part.argmax())):
            if not 0 <= part[extreme] < vocab_size:
                document = int(np.searchsorted(files.bounds, first + extreme, side="right"))
                raise UserError(
                    f"{prefix}.bin: document {document} has token id {part[extreme]}, but the model's vocabulary is 0 to {vocab_size - 1}\n"
                    "the data set was made with another tokenizer: train a model that uses that one, or make the data set again"
                )
    return digest.hexdigest()


def _without_targets(prefix: str, files: IndexedFiles, document: int) -> Fault:
    ids = files.ids[files.bounds[document] : files.bounds[document + 1]]
    return Fault(f"{prefix}.bin", document + 1, "the document has no token to learn", raw=str(ids.tolist()).encode())
