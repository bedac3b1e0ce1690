"""WanFamily: ties Wan's config, files, layers and formats to the interface that the trainer knows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from models import flow_match
from models.base import Draw, Encoder, MediaSpec, MicroBatch, ModelFamily
from models.casting import CastLinear, CastRMSNorm
from models.lora import without_excluded
from models.wan import export, variants
from models.wan.config import WanModelConfig
from models.wan.keymaps import TRANSFORMER
from models.wan.layers import (
    BlockLayer,
    EmbedLayer,
    HeadLayer,
    RotaryTables,
)
from models.wan.layouts import WanFiles, find_files
from models.wan.variants import TEXT_LENGTH
from models.weights import WeightReader

ROTARY_POSITIONS = 1024  # per axis, as the official tables have it

# parameter of the skeleton -> the WanModelConfig property with its frozen dtype, or float32; the first match counts
STORAGE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.*\.)?scale_shift_table"), "float32"),
    (re.compile(r"condition_embedder\.time_(embedder|proj)\..*"), "float32"),
    (re.compile(r"blocks\.\d+\.(.*\.)?norm\w*\.(weight|bias)"), "float32"),
    (re.compile(r"blocks\.\d+\..*\.weight"), "linear_dtype"),
    (re.compile(r".*"), "compute_dtype"),
)


class WanFamily(ModelFamily):
    """Wan2.1 text to video, of any size."""

    Config: ClassVar[type] = WanModelConfig

    def __init__(self, config: WanModelConfig, *, pseudo_huber_c: float | None = None) -> None:
        """Look at configs and tensor headers; load nothing.

        Args:
            pseudo_huber_c: pseudo-Huber loss with this c instead of squared error.

        Raises:
            ValueError: files that are missing, incomplete, of another model, or of a Wan that is not supported yet.
        """
        self._config = config
        self._pseudo_huber_c = pseudo_huber_c
        self._files: WanFiles = find_files(config)
        reader = self._reader()
        self._sizes, self._variant = self._identify(reader)
        reader.check(self._expected_shapes())

    def _reader(self) -> WeightReader:
        return WeightReader(self._files.transformer, TRANSFORMER, what="transformer")

    def _identify(self, reader: WeightReader) -> tuple[variants.Architecture, variants.Variant]:
        told = variants.read_config(self._files.transformer_config) if self._files.transformer_config else {}
        shown = variants.sizes_from_shapes(reader.shapes())
        if not self._files.config_is_own and told.get("dim") != shown.get("dim"):
            told = {}  # the config.json in ckpt_path is for another size than the file in transformer_path
        try:
            sizes = variants.architecture(told, reader.shapes())
            return sizes, variants.detect(sizes, reader.stored_names())
        except ValueError as error:
            raise ValueError("; ".join([f"transformer {reader.location}: {error}", *reader.broken])) from error

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.build_skeleton().named_parameters()}

    @property
    def title(self) -> str:
        return f"{self._variant.title} {variants.size_name(self._sizes)}"

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._config.compute_dtype

    def media_spec(self) -> MediaSpec:
        assert self._variant.media is not None, "detection refuses variants without"
        return self._variant.media

    def tokens(self, width: int, height: int, frames: int) -> int:
        """T * H/2 * W/2: the VAE takes 4 x 8 x 8 pixels to one latent, a patch 1 x 2 x 2 latents to one token."""
        return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)

    def encoders(self) -> Sequence[Encoder]:
        """VAE, then UMT5."""
        from models.wan.text import WanTextEncoder
        from models.wan.vae import WanVAEEncoder

        return (
            WanVAEEncoder(self._files.vae, self._config.encoder_dtype),
            WanTextEncoder(
                self._files.text, self._files.tokenizer, self._config.compute_dtype, self._config.text_max_length
            ),
        )

    def micro_batch(self, samples: Sequence[Mapping[str, Tensor]], draws: Sequence[Draw]) -> MicroBatch:
        """`samples` have `latents` [C, T, H, W] and `text` [S, text dim] at its true length.

        Returns:
            inputs (x_t [B, C, T, H, W] float32, t [B] float32, text [B, S, text dim], see `_padded`); target (v,).
        """
        latents = torch.stack([sample["latents"].float() for sample in samples])
        noise = torch.stack([flow_match.seeded_noise(tuple(latents.shape[1:]), draw.seed) for draw in draws])
        t = self._timesteps([draw.quantile for draw in draws], latents)
        x_t, v = flow_match.noisy_and_target(latents, noise, t)
        text = _padded([sample["text"] for sample in samples])
        return MicroBatch((x_t, t, text), (v,))

    def _timesteps(self, quantiles: Sequence[float], latents: Tensor) -> Tensor:
        config = self._config
        height, width = latents.shape[-2:]
        shift = flow_match.flux_shift((height // 2) * (width // 2)) if config.flux_shift else config.shift or 1.0
        return flow_match.timestep(
            torch.tensor(quantiles, dtype=torch.float64),
            config.timestep_sample_method,
            config.sigmoid_scale,
            shift,
            config.min_t,
            config.max_t,
        )

    def build_skeleton(self) -> nn.Module:
        """diffusers' transformer with parameters on meta in their storage dtypes, rotary tables real."""
        with torch.device("meta"):
            skeleton = WanTransformer3DModel(**self._sizes.diffusers_arguments())
        skeleton.rope = WanRotaryPosEmbed(self._sizes.dim // self._sizes.num_heads, variants.PATCH, ROTARY_POSITIONS)
        self._swap_casting_modules(skeleton.blocks)
        for name, parameter in list(skeleton.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            stored = nn.Parameter(torch.empty_like(parameter, dtype=self.storage_dtype(name)), parameter.requires_grad)
            setattr(skeleton.get_submodule(owner), leaf, stored)
        return skeleton

    def _swap_casting_modules(self, blocks: nn.Module) -> None:
        """Put in modules that cast on use, where what is stored differs from what is computed in."""
        config = self._config
        for name, module in list(blocks.named_modules()):
            if isinstance(module, nn.RMSNorm) and config.compute_dtype != torch.float32:
                swapped: nn.Module = CastRMSNorm(module.normalized_shape, module.eps, device="meta")
            elif isinstance(module, nn.Linear) and config.linear_dtype != config.compute_dtype:
                swapped = CastLinear(module, config.linear_dtype, config.compute_dtype)
            else:
                continue
            owner, _, leaf = name.rpartition(".")
            setattr(blocks.get_submodule(owner), leaf, swapped)

    def pipeline_layers(self, skeleton: nn.Module) -> list[nn.Module]:
        assert isinstance(skeleton, WanTransformer3DModel)
        rotary = RotaryTables(skeleton.rope)
        blocks = [BlockLayer(block, rotary) for block in skeleton.blocks]
        return [EmbedLayer(skeleton, self.compute_dtype), *blocks, HeadLayer(skeleton)]

    def open_weights(self) -> WeightReader:
        reader = self._reader()
        reader.check(self._expected_shapes())
        return reader

    def storage_dtype(self, name: str) -> torch.dtype:
        kind = next(kind for pattern, kind in STORAGE if pattern.fullmatch(name))
        return torch.float32 if kind == "float32" else getattr(self._config, kind)

    def lora_targets(self, skeleton: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
        """Every Linear in the blocks: q, k, v, o of both attentions, and the two of the feed-forward part.

        Args:
            skeleton: without adapters.
            exclude: entries of `[adapter] exclude_modules`, over official or diffusers' names.

        Raises:
            ValueError: an entry that matches nothing.
        """
        targets = list(_linears(skeleton))
        return without_excluded(targets, exclude, {name: TRANSFORMER.from_skeleton(name) or "" for name in targets})

    def loss(self, prediction: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        return flow_match.flow_loss(prediction, target[0], self._pseudo_huber_c)

    def save_adapter(
        self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str], formats: Sequence[str] = ()
    ) -> list[Path]:
        return [export.save_lora(tensors, folder, metadata)]

    def load_adapter(self, path: Path) -> dict[str, Tensor]:
        return export.load_lora(path, _linears(self.build_skeleton()))

    def save_full(self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
        return export.save_full(tensors, folder, self._sizes.official_config(self._variant.model_type), metadata)


def _padded(texts: Sequence[Tensor]) -> Tensor:
    """[S_i, text dim] each to [B, S, text dim], zeros below the caption and at least one row of them.

    Wan was trained with zeros up to 512 rows, and cross attention sees them. They are all alike, so one row stands for
    those that follow until a block widens it (`layers.BlockLayer`): less to embed and far less to send between stages.
    """
    longest = max(map(len, texts))
    assert longest <= TEXT_LENGTH, f"{longest} tokens of text; the encoder cuts at {TEXT_LENGTH}"
    padded = texts[0].new_zeros(len(texts), min(longest + 1, TEXT_LENGTH), texts[0].shape[1])
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return padded


def _linears(skeleton: nn.Module) -> dict[str, export.LinearShape]:
    """The Linear modules of the blocks of a skeleton without adapters, by name."""
    assert isinstance(skeleton, WanTransformer3DModel)
    return {
        f"blocks.{name}": export.LinearShape(module.out_features, module.in_features)
        for name, module in skeleton.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
