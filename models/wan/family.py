"""WanFamily: ties Wan's config, files, layers and formats to the interface that the trainer knows."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from models import flow_match, masks
from models.adapters import by_module, kind_of
from models.base import Activations, Draw, Encoder, MediaSpec, Merge, MicroBatch, ModelFamily, Outline, WeightSource
from models.targets import without_excluded
from models.wan import activations, conditioning, export, variants
from models.wan.adapter_files import BaseWeights, base_weights, save_adapter
from models.wan.adapter_formats import check_formats
from models.wan.adapter_reader import LinearShape, load_adapter
from models.wan.checkpoint import look_up, open_transformer
from models.wan.config import WanModelConfig
from models.wan.experts import NAMES, alone, expert_of_step, high_noise_share, t_range
from models.wan.keymaps import TRANSFORMER
from models.wan.layers import (
    BlockLayer,
    EmbedLayer,
    HeadLayer,
    RotaryTables,
)
from models.wan.layouts import WanFiles
from models.wan.merge_reader import load_merge
from models.wan.metadata import of_model
from models.wan.outline import num_tokens, outline
from models.wan.storage import choose_storage, resized, swap_casting_modules
from models.wan.variants import TEXT_LENGTH
from models.weights import WeightReader

ROTARY_POSITIONS = 1024  # per axis, as the official tables have it


class WanFamily(ModelFamily):
    """Wan2.1 and Wan2.2, of any size: text to video, image to video, first and last frame to video."""

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
        found = look_up(config)
        self._sizes, self._variant, self._expert = found.sizes, found.variant, found.expert
        self._storage = choose_storage(config, found.reader)
        problems = [*found.problems]
        with _noted(problems):
            found.reader.check(self._expected_shapes())
        pair = config.expert == "both" and self._variant.boundary is not None
        self._experts = self._take_turns(problems) if pair else {}
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))  # what two experts share is missing once
        assert found.files is not None, "without problems everything was found"
        self._files: WanFiles = found.files
        turns = list(self._experts.values())
        self._t_range = turns[0]._t_range if turns else t_range(config, self._variant, self._expert)

    @classmethod
    def outline(cls, config: WanModelConfig) -> Outline:
        return outline(config)

    def _take_turns(self, problems: list[str]) -> dict[str, "WanFamily"]:
        """The two of `expert = "both"`, high noise first; what is wrong with them goes into `problems`."""
        built: dict[str, WanFamily] = {}
        for expert, name in NAMES.items():
            with _noted(problems):
                own = alone(self._config, self._variant, expert)
                built[name] = WanFamily(own, pseudo_huber_c=self._pseudo_huber_c)
        if len(built) == len(NAMES):
            with _noted(problems):
                self._high_noise_share = high_noise_share(self._config, self._variant)
        kinds = {(family._variant, family._sizes) for family in built.values()}
        if len(kinds) > 1:
            problems.append(
                f"[model] ckpt_path = '{self._config.ckpt_path}' holds two transformers that are no pair: "
                f"{' and '.join(family.title for family in built.values())}; download both of one model"
            )
        return built

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.build_skeleton().named_parameters()}

    @property
    def title(self) -> str:
        part = f"{self._expert} noise" if self._expert else "both experts" if self._experts else ""
        return variants.full_title(self._variant, self._sizes, part)

    @property
    def expert_suffix(self) -> str:
        """Of the files of an expert of Wan2.2 A14B: `_high_noise`, `_low_noise`, or nothing."""
        return f"_{NAMES[self._expert]}" if self._expert else ""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._config.compute_dtype

    def media_spec(self) -> MediaSpec:
        assert self._variant.media is not None, "detection refuses variants without"
        return self._variant.media

    def tokens(self, width: int, height: int, frames: int) -> int:
        return num_tokens(self.media_spec(), width, height, frames)

    def encoders(self) -> Sequence[Encoder]:
        """VAE, what the variant makes of given frames, then UMT5."""
        from models.wan.condition import WanConditionEncoder
        from models.wan.image import WanImageEncoder
        from models.wan.text import WanTextEncoder
        from models.wan.vae import WanVAEEncoder

        files, config, variant = self._files, self._config, self._variant
        both_ends = variant.frames_given == "first and last"
        encoders: list[Encoder] = [WanVAEEncoder(files.vae, config.encoder_dtype, variant.vae)]
        if variant.frames_given != "none":
            encoders.append(WanConditionEncoder(files.vae, config.encoder_dtype, both_ends))
        if files.clip:
            encoders.append(WanImageEncoder(files.clip, config.clip_dtype, both_ends))
        text = WanTextEncoder(files.text, files.tokenizer, config.compute_dtype, config.text_max_length)
        return (*encoders, text)

    def experts(self) -> Mapping[str, ModelFamily]:
        return self._experts or {"": self}

    def expert_at(self, step: int) -> str:
        if not self._experts:
            return ""
        return NAMES[expert_of_step(step, self._config.switch_every, self._high_noise_share)]

    def expert_shares(self) -> Mapping[str, float]:
        if not self._experts:
            return {"": 1.0}
        share = self._high_noise_share
        return {NAMES["high"]: float(share), NAMES["low"]: float(1 - share)}

    def blank_sample(self, width: int, height: int, frames: int) -> dict[str, Tensor]:
        media, variant = self.media_spec(), self._variant
        cells = (frames - 1) // media.frame_stride + 1, height // media.latent_stride, width // media.latent_stride
        shapes = {
            "latents": (self._sizes.out_dim, *cells),
            "text": (self._config.text_max_length, self._sizes.text_dim),
            **({"condition": (self._sizes.out_dim, *cells)} if variant.frames_given != "none" else {}),
            **({"image": (variant.image_states, self._sizes.image_dim)} if variant.image_states else {}),
        }
        return {name: flow_match.seeded_noise(shape, number) for number, (name, shape) in enumerate(shapes.items())}

    def activations(self, width: int, height: int, frames: int, adapter: str | None, rank: int) -> Activations:
        length, bytes_a_number = self.tokens(width, height, frames), self.compute_dtype.itemsize
        states = self._variant.image_states
        return activations.activations(self._sizes, length, bytes_a_number, states, adapter, rank)

    def trial(self) -> ModelFamily:
        """One block of two heads, so with the real one's shapes of attention and its float8 scales."""
        small = copy.copy(self)
        small._sizes = variants.smallest(self._sizes)
        small._storage = resized(self._storage, small._sizes)
        return small

    def micro_batch(self, samples: Sequence[Mapping[str, Tensor]], draws: Sequence[Draw]) -> MicroBatch:
        """`samples` have `latents` [C, T, H, W] and `text` [S, text dim] at its true length; where the variant is given
        frames, `condition` [C, T, H, W], and where it takes image states, `image` [I, image dim]. Some may have a
        `mask`, see `models.masks`.

        Returns:
            inputs (x_t [B, C or 36, T, H, W] float32, t [B] float32, text [B, S, text dim], see `_padded`[, image]);
            target (v [B, C, T, H, W],). Where TI2V-5B trains a sample as image to video (`draw.choice` below
            `i2v_fraction`) t is [B, T], 0 on that sample's first frame, and target (v, weight [B, 1, T, 1, 1]). Where
            a sample has a mask, target is (v, weight, mask [B, 1, T, H, W]), with a weight of 1 if there is none.
        """
        latents = _stacked(samples, "latents").float()
        noise = torch.stack([flow_match.seeded_noise(tuple(latents.shape[1:]), draw.seed) for draw in draws])
        t = self._timesteps([draw.quantile for draw in draws], latents)
        weight: list[Tensor] = []
        mask = masks.loss_mask(samples, *latents.shape[2:])
        clean = torch.tensor([self._is_image_to_video(draw, latents.shape[2]) for draw in draws])
        if clean.any():
            t, *weight = conditioning.with_clean_first_frame(t, clean, latents.shape[2])
        elif mask:
            weight = [torch.ones(len(t), 1, 1, 1, 1)]
        x_t, v = flow_match.noisy_and_target(latents, noise, t)
        if self._variant.frames_given != "none":
            x_t = conditioning.with_condition(x_t, _stacked(samples, "condition"), self._variant.frames_given)
        text = _padded([sample["text"] for sample in samples])
        image = (_stacked(samples, "image"),) if self._variant.image_states else ()
        return MicroBatch((x_t, t, text, *image), (v, *weight, *mask))

    def _is_image_to_video(self, draw: Draw, frames: int) -> bool:
        """Whether a sample of TI2V-5B is given its first latent frame; an image, being one, has nothing else."""
        return self._variant.first_frame_clean and frames > 1 and draw.choice < self._config.i2v_fraction

    def _timesteps(self, quantiles: Sequence[float], latents: Tensor) -> Tensor:
        config = self._config
        height, width = latents.shape[-2:]
        shift = flow_match.flux_shift((height // 2) * (width // 2)) if config.flux_shift else config.shift or 1.0
        return flow_match.timestep(
            torch.tensor(quantiles, dtype=torch.float64),
            config.timestep_sample_method,
            config.sigmoid_scale,
            shift,
            *self._t_range,
        )

    def build_skeleton(self) -> nn.Module:
        """diffusers' transformer with parameters on meta in their storage dtypes, rotary tables real."""
        with torch.device("meta"):
            skeleton = WanTransformer3DModel(**self._sizes.diffusers_arguments())
        skeleton.rope = WanRotaryPosEmbed(self._sizes.dim // self._sizes.num_heads, variants.PATCH, ROTARY_POSITIONS)
        swap_casting_modules(skeleton, self._storage)
        for name, parameter in list(skeleton.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            stored = nn.Parameter(torch.empty_like(parameter, dtype=self.storage_dtype(name)), parameter.requires_grad)
            setattr(skeleton.get_submodule(owner), leaf, stored)
        return skeleton

    def pipeline_layers(self, skeleton: nn.Module) -> list[nn.Module]:
        assert isinstance(skeleton, WanTransformer3DModel)
        rotary = RotaryTables(skeleton.rope)
        blocks = [BlockLayer(block, rotary, self._variant.image_states) for block in skeleton.blocks]
        return [EmbedLayer(skeleton, self.compute_dtype), *blocks, HeadLayer(skeleton)]

    def open_weights(self) -> WeightReader:
        reader = open_transformer(self._config, self._files.transformer)
        reader.check(self._expected_shapes())
        return reader

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._storage.dtype(name)

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
        """`target` is (v,), (v, weight) or (v, weight, mask), see `micro_batch`; a mean is over what has a weight."""
        velocity, *rest = target
        return flow_match.flow_loss(prediction, velocity, self._pseudo_huber_c, *rest)

    def save_adapter(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        metadata: Mapping[str, str],
        formats: Sequence[str] = (),
        weights: WeightSource | None = None,
    ) -> list[Path]:
        kind = kind_of(next(iter(by_module(tensors).values())))
        told = of_model({"base_model": self.title, **metadata}, self._variant, self._sizes, self.expert_suffix, kind)
        return save_adapter(tensors, folder, told, formats, self.expert_suffix, self._base(weights))

    def load_adapter(self, path: Path, weights: WeightSource | None = None) -> dict[str, Tensor]:
        base = self._base(weights)
        return load_adapter(path, _linears(self.build_skeleton()), self.expert_suffix, base)

    def load_merge(self, path: Path, weights: WeightSource | None = None) -> Merge:
        return load_merge(path, self._expected_shapes(), self.expert_suffix, self._base(weights))

    def _base(self, weights: WeightSource | None) -> BaseWeights:
        return base_weights(lambda: weights or self.open_weights())

    def check_formats(self, kind: str, formats: Sequence[str]) -> None:
        check_formats(kind, formats)

    def save_full(self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
        layout = self._config.save_layout
        told = of_model({"base_model": self.title, **metadata}, self._variant, self._sizes, self.expert_suffix)
        place = export.model_folder(folder, layout, self.expert_suffix)
        config = export.config_of(self._sizes, self._variant, layout)
        return export.save_full(tensors, place, config, told, layout=layout)


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Go on after a `ValueError`, whose lines go into `problems`."""
    try:
        yield
    except ValueError as error:
        problems += str(error).splitlines()


def _stacked(samples: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    return torch.stack([sample[key] for sample in samples])


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


def _linears(skeleton: nn.Module) -> dict[str, LinearShape]:
    """The Linear modules of the blocks of a skeleton without adapters, by name."""
    assert isinstance(skeleton, WanTransformer3DModel)
    return {
        f"blocks.{name}": LinearShape(module.out_features, module.in_features)
        for name, module in skeleton.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
