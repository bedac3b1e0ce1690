"""Where each component of a Wan checkpoint lies: official folders, diffusers folders and single files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from models.wan.config import WanModelConfig
from models.wan.tokenizer import carries_tokenizer
from models.wan.variants import Variant
from models.weights import weight_files

Expert = Literal["high", "low"]

TRANSFORMER_STEM = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")

# where a component lies inside ckpt_path: official first, then diffusers, then names under which single files travel
TRANSFORMER_PLACES = (".", "transformer")
VAE_PLACES = {
    "2.1": ("Wan2.1_VAE.pth", "vae", "Wan2.1_VAE.safetensors", "wan_2.1_vae.safetensors"),
    "2.2": ("Wan2.2_VAE.pth", "vae", "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors"),
}
TEXT_PLACES = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "models_t5_umt5-xxl-enc-bf16.safetensors")
CLIP_PLACES = (
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "image_encoder",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    "clip_vision_h.safetensors",
)
TOKENIZER_PLACES = ("google/umt5-xxl", "tokenizer")

# folders of Wan2.2 A14B, which holds two transformers: high noise, low noise. SimpleTuner has diffusers' the other way
# round; diffusers' pipeline_wan.py runs `transformer` above the boundary and `transformer_2` below
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
# how files and folders of one expert are called: high_noise_model, HighNoise, wan2.2_i2v_low_noise_14B, I2V-A14B-HIGH
_EXPERT_NAMES = (r"(?<![fs])(high|low)[-_. ]?noise", r"A14B[-_. ](high|low)(?![a-z])")

# key -> folder of a ComfyUI installation's models/, and what its files are called there
COMFYUI_FOLDERS = {
    "transformer_path": ("diffusion_models", "*wan*"),
    "vae_path": ("vae", "*wan*"),
    "llm_path": ("text_encoders", "*umt5*"),
    "clip_path": ("clip_vision", "*clip_vision_h*"),
}


class TransformerFiles(NamedTuple):
    """One transformer."""

    files: tuple[Path, ...]  # all shards, also those that are absent
    key: str  # of `[model]`, which gave them
    config: Path | None = None  # None where shapes have to tell
    config_is_own: bool = False  # the config lies beside the transformer, so it must be right
    pipeline: Path | None = None  # diffusers' model_index.json
    expert: Expert | None = None  # whose it is by its place or name

    @property
    def location(self) -> Path:
        """The file, or the folder of the shards."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


class WanFiles(NamedTuple):
    """What was found."""

    transformer: tuple[Path, ...]  # all shards, also those that are absent
    vae: Path  # file or diffusers folder
    text: Path  # file or transformers folder
    tokenizer: Path | None  # folder; None where the text encoder's file carries it
    clip: Path | None  # file or transformers folder; None where the variant has none


def find_transformer(config: WanModelConfig, problems: list[str]) -> TransformerFiles | None:
    """The files of the transformer to train; those of the high-noise expert for `expert = "both"`.

    Args:
        problems: what is wrong is added, a line each; the result is then None.

    Raises:
        ValueError: ckpt_path is no folder, or a shard index cannot be read.
    """
    folder = config.ckpt_path
    if folder is not None and not folder.is_dir():
        file = f" but a file; set transformer_path = '{folder}' instead" if folder.is_file() else ""
        raise ValueError(f"[model] ckpt_path = '{folder}' is not a folder{file}")
    key = "transformer_path" if config.transformer_path else "ckpt_path"
    files = _given_transformer(config, problems) if config.transformer_path else _own_transformer(config, problems)
    if not files:
        return None
    found = TransformerFiles(tuple(files), key)
    own, is_own = _transformer_config(config, files)
    pipeline = files[0].parent.parent / "model_index.json"
    return found._replace(
        config=own,
        config_is_own=is_own,
        pipeline=pipeline if pipeline.is_file() else None,
        expert=named_expert(found.location, len(files) == 1),
    )


def find_files(
    config: WanModelConfig, transformer: TransformerFiles | None, variant: Variant | None, problems: list[str]
) -> WanFiles | None:
    """Look up what the variant needs besides; where it is not known, what every variant needs.

    Args:
        problems: what is missing is added, a line each: key, folder, and what was looked for. The result is then None.
    """
    places = VAE_PLACES[variant.vae] if variant else tuple(dict.fromkeys(sum(VAE_PLACES.values(), ())))
    vae = _one("VAE", "vae_path", config, places, problems)
    text = _one("UMT5 text encoder", "llm_path", config, TEXT_PLACES, problems)
    tokenizer = _tokenizer(config, text, problems)
    clip = None
    if variant and variant.image_states:
        clip = _one("CLIP image encoder", "clip_path", config, CLIP_PLACES, problems)
    elif variant and config.clip_path:
        problems.append(f"[model] clip_path = '{config.clip_path}': {variant.title} takes no CLIP; remove clip_path")
    if problems:
        return None
    assert transformer and vae and text
    return WanFiles(transformer.files, vae, text, tokenizer, clip)


def expert_folders(folder: Path | None) -> dict[Expert, Path]:
    """The folders of Wan2.2's transformers inside a ckpt_path; none where it is a model of one transformer."""
    for names in EXPERT_FOLDERS if folder else ():
        found: dict[Expert, Path] = {e: folder / n for e, n in zip(("high", "low"), names, strict=True)}
        # of diffusers' names the first alone is every other model's
        if found["low"].is_dir() or (names[0] != "transformer" and found["high"].is_dir()):
            return {expert: path for expert, path in found.items() if path.is_dir()}
    return {}


def named_expert(location: Path, is_file: bool) -> Expert | None:
    """Whose transformer it is by the name of its file, or else of its folder; None where neither tells."""
    location = location.absolute()
    folder = location.parent if is_file else location
    for name in (location.stem, folder.name):
        for pattern in _EXPERT_NAMES:
            told = {found.lower() for found in re.findall(pattern, name, re.IGNORECASE)}
            if len(told) == 1:
                return "high" if told == {"high"} else "low"
    inside = expert_folders(folder.parent)
    return next((expert for expert, path in inside.items() if path.name == folder.name), None)


def _own_transformer(config: WanModelConfig, problems: list[str]) -> list[Path]:
    folder = config.ckpt_path
    assert folder is not None, "the config asks for one of the two"
    experts = expert_folders(folder)
    key = f"[model] ckpt_path = '{folder}'"
    if config.expert == "both" and len(experts) < 2:
        either = " or ".join(" and ".join(names) for names in EXPERT_FOLDERS)
        problems.append(f"{key} does not hold the two transformers that expert = 'both' needs; looked for {either}")
        return []
    if experts:
        return _expert_transformer(config, experts, problems)
    for place in TRANSFORMER_PLACES:
        if found := weight_files(folder / place, TRANSFORMER_STEM):
            return found
    looked_for = " or ".join(f"{Path(place) / TRANSFORMER_STEM}*.safetensors" for place in TRANSFORMER_PLACES)
    problems.append(
        _comfyui("transformer_path", folder)
        or f"{key} has no transformer; looked for {looked_for}. Download it there, or set transformer_path"
    )
    return []


def _expert_transformer(config: WanModelConfig, experts: dict[Expert, Path], problems: list[str]) -> list[Path]:
    key = f"[model] ckpt_path = '{config.ckpt_path}'"
    if config.expert is None and len(experts) > 1:
        problems.append(
            f"{key} holds two transformers (Wan2.2 A14B): {experts['high'].name} (high noise) and "
            f"{experts['low'].name} (low noise). Set expert = 'high', 'low' or 'both'"
        )
        return []
    wanted: Expert = "high" if config.expert == "both" else config.expert or next(iter(experts))
    if wanted not in experts:
        there = ", ".join(path.name for path in experts.values())
        problems.append(f"{key} has {there} only, and expert = '{wanted}' is another; download it there")
        return []
    if found := weight_files(experts[wanted], TRANSFORMER_STEM):
        return found
    problems.append(
        f"{key} has no transformer for the {wanted}-noise expert; looked for "
        f"{experts[wanted].name}/{TRANSFORMER_STEM}*.safetensors. Download it there"
    )
    return []


def _given_transformer(config: WanModelConfig, problems: list[str]) -> list[Path]:
    path = config.transformer_path
    assert path is not None
    key = f"[model] transformer_path = '{path}'"
    if not path.exists():
        problems.append(f"{key} does not exist")
    elif path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        problems.append(f"{key} is not one of {', '.join(WEIGHT_SUFFIXES)}; GGUF cannot be trained on")
    elif found := weight_files(path, TRANSFORMER_STEM) or weight_files(path, ""):
        return found
    elif experts := expert_folders(path):
        choice = " or ".join(f"'{folder}'" for folder in experts.values())
        problems.append(f"{key} holds the transformers of Wan2.2 A14B in folders; set it to {choice}")
    else:
        gguf = "; GGUF cannot be trained on" if any(path.glob("*.gguf")) else ""
        problems.append(f"{key} has no .safetensors file{gguf}")
    return []


def _transformer_config(config: WanModelConfig, files: Sequence[Path]) -> tuple[Path | None, bool]:
    """The config.json beside the transformer, else that of ckpt_path, which may belong to another size."""
    beside = files[0].parent / "config.json"
    if beside.is_file():
        return beside, True
    places = [config.ckpt_path / place for place in TRANSFORMER_PLACES] if config.ckpt_path else []
    for place in (*places, *expert_folders(config.ckpt_path).values()):
        candidate = place / "config.json"
        if candidate.is_file():
            return candidate, False
    return None, False


def _one(what: str, key: str, config: WanModelConfig, places: Sequence[str], problems: list[str]) -> Path | None:
    """What `key` gives if it exists, else the first of `places` in ckpt_path."""
    given, folder = getattr(config, key), config.ckpt_path
    if given is not None:
        if given.is_dir() or (given.suffix in WEIGHT_SUFFIXES and given.is_file()):
            return given
        kinds = f"is not one of {', '.join(WEIGHT_SUFFIXES)}{'; GGUF cannot be read' * (given.suffix == '.gguf')}"
        wrong = kinds if given.is_file() else "does not exist"
        problems.append(f"[model] {key} = '{given}' {wrong}")
        return None
    if folder is None:
        problems.append(f"[model] {key} is missing: without ckpt_path it must name the {what}")
        return None
    if comfyui := _comfyui(key, folder):
        problems.append(comfyui)
        return None
    for place in places:
        if (folder / place).exists():
            return folder / place
    problems.append(
        f"[model] ckpt_path = '{folder}' has no {what}; looked for {', '.join(places)}. Download it there, or set {key}"
    )
    return None


def _comfyui(key: str, folder: Path) -> str | None:
    """What to write instead, where `folder` is ComfyUI's models folder: it holds many of each, so none is taken."""
    if not (folder / "diffusion_models").is_dir():
        return None
    name, pattern = COMFYUI_FOLDERS[key]
    files = sorted(path for path in (folder / name).glob("*") if path.suffix in WEIGHT_SUFFIXES)
    likely = [path for path in files if path.match(pattern)] or files
    example = likely[0] if likely else folder / name / "FILE.safetensors"
    return f"[model] ckpt_path = '{folder}' is a ComfyUI folder, which has no fixed {key}; set {key} = '{example}'"


def _tokenizer(config: WanModelConfig, text: Path | None, problems: list[str]) -> Path | None:
    if config.tokenizer_path is not None:
        if not config.tokenizer_path.is_dir():
            problems.append(
                f"[model] tokenizer_path = '{config.tokenizer_path}' is not a folder; name the one that holds "
                "tokenizer.json or spiece.model"
            )
        return config.tokenizer_path
    roots = [root for root in (config.ckpt_path, config.llm_path and config.llm_path.parent) if root]
    for folder in (root / place for root in roots for place in TOKENIZER_PLACES):
        if folder.is_dir():
            return folder
    if text and carries_tokenizer(text):
        return None
    where = f"in {' or '.join(map(str, roots))}; looked for {', '.join(TOKENIZER_PLACES)}. Download it there, or "
    problems.append(f"[model] no UMT5 tokenizer {where if roots else 'to be found: '}set tokenizer_path")
    return None
