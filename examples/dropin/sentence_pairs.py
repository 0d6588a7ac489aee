"""Sentence embeddings with sentence-transformers: its MultipleNegativesRankingLoss, names and their explanations.

The pairs are real text that every Python carries: the functions and classes of its standard library, and the first
sentence of each one's docstring. The model is a static embedding (a mean of learnt word vectors), trained from nothing.

    python -m examples.dropin.sentence_pairs               # sentence-transformers as it is
    python -m examples.dropin.sentence_pairs --sslfast     # one line more: sslfast.patch("sentence_transformers")
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import sslfast

from . import common

WIDTH = 512


@functools.cache
def standard_library() -> list[tuple[str, str]]:
    """("json dump", "Serialize obj as a JSON formatted stream to fp"), read from the sources: nothing is imported."""
    pairs = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        todo = list(ast.parse(file.read_bytes()).body)
        for node in todo:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                todo += node.body if isinstance(node, ast.ClassDef) else []
                name = re.sub(r"(?<=[a-z])(?=[A-Z])|_+", " ", f"{file.stem} {node.name}")
                text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                text = " ".join(text.split()).partition(". ")[0]
                if len(text.split()) >= 3:
                    pairs.append((" ".join(name.split()), text))
    return list(dict.fromkeys(pairs))


def static_model(texts: list[str]) -> SentenceTransformer:
    """A static embedding over a vocabulary of the training texts' words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=8000, special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=WIDTH)], device="cpu")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parse(arguments, __doc__, batch_size=2048, data=None)
    if options.sslfast:
        sslfast.patch("sentence_transformers")

    torch.manual_seed(options.seed)
    pairs = standard_library()
    if len(pairs) < options.batch_size:
        sys.exit(f"--batch-size {options.batch_size}: this Python's standard library has {len(pairs)} pairs")
    model = static_model([text for pair in pairs for text in pair])
    criterion = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    meter = common.Meter("sentence_pairs", options)
    for batch in meter.steps(common.batches(len(pairs), options)):
        columns = zip(*(pairs[i] for i in batch.tolist()), strict=True)
        anchors, texts = (model(model.preprocess(list(c)))["sentence_embedding"] for c in columns)
        optimizer.zero_grad()
        meter.loss_begins(anchors, texts)
        loss = criterion.compute_loss_from_embeddings([anchors, texts], labels=None)
        loss.backward()
        optimizer.step()
        meter.losses.append(loss.item())
    return meter.report()


if __name__ == "__main__":
    main()
