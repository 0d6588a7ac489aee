"""How others mask words, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def hf_mask_tokens(
    input_ids: Tensor, special_mask: Tensor, mask_id: int, vocab_size: int, probability: float
) -> tuple[Tensor, Tensor]:
    """BERT's masking by the formula of transformers' ``DataCollatorForLanguageModeling.torch_mask_tokens``.

    Args:
        input_ids: [B, S] int64; written to, as there.
        special_mask: [B, S] bool, True: never chosen.

    Returns:
        inputs and labels, [B, S] int64.
    """
    labels = input_ids.clone()
    chance = torch.full(labels.shape, probability)
    chance.masked_fill_(special_mask, value=0.0)
    chosen = torch.bernoulli(chance).bool()
    labels[~chosen] = -100
    masked = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & chosen
    input_ids[masked] = mask_id
    random = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & chosen & ~masked
    words = torch.randint(vocab_size, labels.shape, dtype=torch.long)
    input_ids[random] = words[random]
    return input_ids, labels
