"""A DiT in PyTorch whose state dict has the tensor names of the published checkpoints."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        batch, tokens, width = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(F.layer_norm(x, (width,), eps=1e-6), shift_1, scale_1)
        q, k, v = self.attn.qkv(h).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate_1[:, None] * self.attn.proj(h)
        h = modulate(F.layer_norm(x, (width,), eps=1e-6), shift_2, scale_2)
        return x + gate_2[:, None] * self.mlp.fc2(F.gelu(self.mlp.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """x [B, C, H, W], t [B], labels [B] -> [B, out, H, W]."""

    def __init__(self, depth, width, heads, patch, size, channels, out_channels, classes):
        super().__init__()
        self.patch, self.out_channels, self.side, self.width = patch, out_channels, size // patch, width
        self.pos_embed = nn.Parameter(self.positions(), requires_grad=False)
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * out_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def positions(self):
        """[1, N, D]: sines and cosines of the column, then of the row."""
        quarter = self.width // 4
        omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        rows, columns = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        angles = [position.flatten()[:, None] * omega for position in (columns, rows)]
        return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()

    def forward(self, x, t, labels):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.y_embedder.embedding_table(
            labels
        )
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulate(F.layer_norm(x, (self.width,), eps=1e-6), shift, scale))
        x = x.reshape(-1, self.side, self.side, self.patch, self.patch, self.out_channels)
        size = self.side * self.patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, size, size)
