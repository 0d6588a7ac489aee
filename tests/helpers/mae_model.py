"""A masked autoencoder with the names, arguments and formulas of facebookresearch/mae's, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError("images of the wrong size")
        return self.proj(x).flatten(2).mT


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class MaskedAutoencoderViT(nn.Module):
    """Names, arguments and formulas of facebookresearch/mae's class."""

    def __init__(
        self,
        img_size=24,
        patch_size=8,
        in_chans=3,
        embed_dim=32,
        depth=2,
        num_heads=4,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        norm_pix_loss=False,
    ) -> None:
        nn.Module.__init__(self)  # not super(): the body serves other classes too
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        rows = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, rows, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(0.1 * torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, rows, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss

    def patchify(self, imgs):
        p = self.patch_embed.patch_size[0]
        assert imgs.shape[2] == imgs.shape[3] and imgs.shape[2] % p == 0
        cells = imgs.unfold(2, p, p).unfold(3, p, p)  # [N, 3, rows, columns, p, p]
        return cells.permute(0, 2, 3, 4, 5, 1).reshape(len(imgs), -1, 3 * p * p)

    def random_masking(self, x, mask_ratio):
        batch, length, _ = x.shape
        order = torch.rand(batch, length, device=x.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        kept = order[:, : int(length * (1 - mask_ratio))]
        mask = torch.ones(batch, length, device=x.device).scatter(1, kept, 0.0)
        return x[torch.arange(batch)[:, None], kept], mask, restore

    def forward_encoder(self, x, mask_ratio):
        x, mask, restore = self.random_masking(self.patch_embed(x) + self.pos_embed[:, 1:], mask_ratio)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        hidden = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        tokens = torch.cat([x[:, 1:], hidden], dim=1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        errors = (pred - target).square().mean(-1)
        return (errors * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, mask), pred, mask
