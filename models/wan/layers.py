"""Wan's transformer as pipeline layers around diffusers' own modules: embed, block, head.

What passes between layers is `(x, text, time6, time)`, floats only:
    x      [B, T, H', W', D]  hidden states in the compute dtype; the token grid is its shape, so no integers are sent
    text   [B, I + S, D]      I image states of CLIP, where the model takes them, then caption states, in the compute
                              dtype; the last row stands for all rows up to I + 512
    time6  [B, T', 6, D]      shift, scale and gate of the two halves of a block, float32; T' is T where latent frames
                              differ in t, else 1
    time   [B, T', D]         for the head's modulation, float32
"""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from models.wan.variants import TEXT_LENGTH

Boundary = tuple[Tensor, Tensor, Tensor, Tensor]

TIMESTEP_SCALE = 1000.0  # Wan counts time from 0 to 1000, the pipeline from 0 to 1
ROTARY_GRIDS_KEPT = 4  # 33 MB each at 832x480 and 81 frames


def timestep_sinusoid(t: Tensor, dim: int) -> Tensor:
    """Cosines then sines of t over geometric frequencies down to 1/10000 (the official `sinusoidal_embedding_1d`).

    Args:
        t: model timesteps in [0, 1000], [...].

    Returns:
        [..., dim], float32. Angles are float64: at t near 1000 a float32 angle has lost 4 of its 7 digits.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=t.device))
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class RotaryTables:
    """Rotary cosines and sines of the token grids seen last, one object for all blocks of a skeleton.

    Not a module: its tables are made from nothing but the grid and belong to no layer.
    """

    def __init__(self, rope: WanRotaryPosEmbed) -> None:
        self._rope = rope
        self._tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()

    @torch.compiler.disable  # the cache is Python state; compiled code would check it on each call
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the grid of x [B, T, H', W', D], each [1, L, 1, head dim] on its device."""
        grid = x.shape[1:4]
        key = (*grid, x.device)
        if key not in self._tables:
            _, rows, columns = self._rope.patch_size
            # diffusers asks for the latents, but reads only their shape
            latents = torch.empty(1, 1, grid[0], grid[1] * rows, grid[2] * columns, device="meta")
            cos, sin = self._rope(latents)
            self._tables[key] = (cos.to(x.device), sin.to(x.device))
            if len(self._tables) > ROTARY_GRIDS_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


class EmbedLayer(nn.Module):
    """Latents, timestep, caption and image states to the first boundary."""

    def __init__(self, skeleton: WanTransformer3DModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_embedding = skeleton.patch_embedding
        self.condition_embedder = skeleton.condition_embedder
        self._freq_dim: int = skeleton.config.freq_dim
        self._compute_dtype = compute_dtype

    def forward(self, inputs: tuple[Tensor, ...]) -> Boundary:
        """`(x_t, t, text[, image])` to the boundary.

        Args:
            inputs: x_t [B, C, T, H, W] float32, mask and condition among its channels where the model takes them; t in
                [0, 1], [B] or [B, T]; text [B, S, text dim]; image [B, I, image dim], CLIP's states of the given
                frames, where the model has an image embedder.
        """
        x_t, t, text, *image = inputs
        x = self.patch_embedding(x_t.to(self._compute_dtype)).movedim(1, -1).contiguous()
        time, time6 = self._embed_time(t if t.ndim == 2 else t[:, None])
        text = self.condition_embedder.text_embedder(text.to(self._compute_dtype))
        if image:
            text = torch.cat([self._embed_image(*image).to(text.dtype), text], dim=1)
        return x, text, time6, time

    def _embed_image(self, image: Tensor) -> Tensor:
        """[B, I, image dim] to [B, I, D]. Autocast runs its products in the compute dtype and not its norms, as it does
        in the official code, whose states come in as float16 and whose position embedding is float32."""
        embedder = self.condition_embedder.image_embedder
        if embedder.pos_embed is not None:
            image = image.unflatten(1, (2, -1)).flatten(0, 1)  # diffusers joins the two frames of a sample itself
        return embedder(image.float())

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, T'] to [B, T', D] and [B, T', 6, D], all in float32: in bfloat16 t near 1000 would be 4 apart."""
        embedder = self.condition_embedder.time_embedder
        with torch.autocast(t.device.type, enabled=False):
            sinusoid = timestep_sinusoid(t.double() * TIMESTEP_SCALE, self._freq_dim)
            time = _linear_float32(embedder.linear_2, F.silu(_linear_float32(embedder.linear_1, sinusoid)))
            time6 = _linear_float32(self.condition_embedder.time_proj, F.silu(time)).unflatten(-1, (6, -1))
        return time, time6


def _linear_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` in float32 even where a full fine-tune keeps the weights in another dtype."""
    return F.linear(x, linear.weight.float(), linear.bias.float())


class BlockLayer(nn.Module):
    """One transformer block: boundary to boundary."""

    checkpointable = True

    def __init__(self, block: WanTransformerBlock, rotary: RotaryTables, image_states: int = 0) -> None:
        """`image_states` are the CLIP states before the caption's, whose number diffusers' attention reads off."""
        super().__init__()
        self.block = block
        self._rotary = rotary
        self._text_rows = image_states + TEXT_LENGTH

    def forward(self, boundary: Boundary) -> Boundary:
        x, text, time6, time = boundary
        tokens = self._transform(x.flatten(1, 3), _widened(text, self._text_rows), time6, self._rotary(x))
        return tokens.view_as(x), text, time6, time

    def _transform(self, tokens: Tensor, text: Tensor, time6: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """What `WanTransformerBlock.forward` does, with its own parts and casts, to tokens [B, L, D].

        diffusers wants time6 widened to [B, L, 6, D] where frames differ in t: with TI2V-5B at 121 frames of 1280x704
        2 GB a sample, and as much again with the table added. Here tokens are viewed as [B, T', L / T', D] instead.
        """
        block, groups = self.block, (time6.shape[1], -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + time6.float()).chunk(6, dim=2)
        x = tokens.unflatten(1, groups)

        normed = (block.norm1(x.float()) * (1 + scale1) + shift1).type_as(x)
        attended = block.attn1(normed.flatten(1, 2), None, None, rotary).unflatten(1, groups)
        x = (x.float() + attended * gate1).type_as(x)

        normed = block.norm2(x.float()).type_as(x)
        x = x + block.attn2(normed.flatten(1, 2), text, None, None).unflatten(1, groups)

        normed = (block.norm3(x.float()) * (1 + scale2) + shift2).type_as(x)
        widened = block.ffn(normed.flatten(1, 2)).unflatten(1, groups)
        return (x.float() + widened.float() * gate2).type_as(x).flatten(1, 2)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block proper: what it is given has one shape a bucket, while captions differ in length, and each
        length would be compiled anew until torch gives up and runs uncompiled."""
        self._transform = torch.compile(self._transform, *args, **kwargs)


def _widened(text: Tensor, rows: int) -> Tensor:
    """[B, S, D] to [B, rows, D], the last row repeated: rows of padding are all alike, and embedded they still are."""
    missing = rows - text.shape[1]
    return torch.cat([text, text[:, -1:].expand(-1, missing, -1)], dim=1) if missing else text


class HeadLayer(nn.Module):
    """The last boundary to the prediction."""

    def __init__(self, skeleton: WanTransformer3DModel) -> None:
        super().__init__()
        self.norm_out = skeleton.norm_out
        self.proj_out = skeleton.proj_out
        # The head's modulation hangs on the skeleton itself. Sharing the dict, and not only the parameter in it, keeps
        # both in step when a stage replaces the meta parameter by a real one, on whichever side it does so.
        assert set(skeleton._parameters) == {"scale_shift_table"}, "diffusers gave the model parameters of its own"
        self._parameters = skeleton._parameters
        self._patch: tuple[int, int, int] = tuple(skeleton.config.patch_size)

    def forward(self, boundary: Boundary) -> Tensor:
        """The velocity v [B, C, T, H, W], float32."""
        x, _, _, time = boundary
        shift, scale = (self.scale_shift_table.float() + time[:, :, None]).chunk(2, dim=2)
        tokens = x.flatten(1, 3).unflatten(1, (time.shape[1], -1))
        modulated = self.norm_out(tokens.float()) * (1 + scale) + shift
        patches = self.proj_out(modulated.to(x.dtype).flatten(1, 2)).float()
        return _unpatchify(patches.unflatten(1, x.shape[1:4]), self._patch)


def _unpatchify(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, T', H', W', pt * ph * pw * C] to [B, C, T, H, W]."""
    split = patches.unflatten(-1, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return split.flatten(6, 7).flatten(4, 5).flatten(2, 3)
