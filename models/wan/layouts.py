"""Where each component of a Wan checkpoint lies: official folders, diffusers folders and single files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.wan.config import WanModelConfig
from models.weights import weight_files

TRANSFORMER_STEM = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")

# where a component lies inside ckpt_path: official first, then diffusers, then names under which single files travel
TRANSFORMER_PLACES = (".", "transformer")
VAE_PLACES = ("Wan2.1_VAE.pth", "vae", "Wan2.1_VAE.safetensors", "wan_2.1_vae.safetensors")
TEXT_PLACES = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "models_t5_umt5-xxl-enc-bf16.safetensors")
TOKENIZER_PLACES = ("google/umt5-xxl", "tokenizer")

# folders of Wan2.2 A14B, which holds two transformers: high noise, low noise
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


class WanFiles(NamedTuple):
    """What was found."""

    transformer: tuple[Path, ...]  # all shards, also those that are absent
    transformer_config: Path | None  # None where shapes have to tell
    config_is_own: bool  # the config lies beside the transformer, so it must be right
    vae: Path  # file or diffusers folder
    text: Path  # file or transformers folder
    tokenizer: Path  # folder


def find_files(config: WanModelConfig) -> WanFiles:
    """Look every component up.

    Raises:
        ValueError: all that is missing in one message, a line each: key, folder, and what was looked for.
    """
    if config.ckpt_path is not None and not config.ckpt_path.is_dir():
        raise ValueError(f"[model] ckpt_path = '{config.ckpt_path}' is not a folder")
    problems: list[str] = []
    transformer = _transformer_files(config, problems)
    transformer_config, config_is_own = _transformer_config(config, transformer)
    vae = _one("VAE", "vae_path", config.vae_path, config.ckpt_path, VAE_PLACES, problems)
    text = _one("UMT5 text encoder", "llm_path", config.llm_path, config.ckpt_path, TEXT_PLACES, problems)
    tokenizer = _tokenizer(config, problems)
    if problems:
        raise ValueError("\n".join(problems))
    assert vae and text and tokenizer
    return WanFiles(tuple(transformer), transformer_config, config_is_own, vae, text, tokenizer)


def _transformer_files(config: WanModelConfig, problems: list[str]) -> list[Path]:
    if config.transformer_path is not None:
        return _given_transformer(config.transformer_path, problems)
    folder = config.ckpt_path
    assert folder is not None, "the config asks for one of the two"
    for high, low in EXPERT_FOLDERS:
        if (folder / high).is_dir() and (folder / low).is_dir():
            problems.append(
                f"[model] ckpt_path = '{folder}' holds two transformers (Wan2.2 A14B): choose one with "
                f"transformer_path = '{folder / high}' (high noise) or '{folder / low}' (low noise)"
            )
            return []
    for place in TRANSFORMER_PLACES:
        if found := weight_files(folder / place, TRANSFORMER_STEM):
            return found
    looked_for = " or ".join(f"{Path(place) / TRANSFORMER_STEM}*.safetensors" for place in TRANSFORMER_PLACES)
    problems.append(
        f"[model] ckpt_path = '{folder}' has no transformer; looked for {looked_for}. "
        "Download it there, or set transformer_path"
    )
    return []


def _given_transformer(path: Path, problems: list[str]) -> list[Path]:
    key = f"[model] transformer_path = '{path}'"
    if not path.exists():
        problems.append(f"{key} does not exist")
    elif path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        problems.append(f"{key} is not one of {', '.join(WEIGHT_SUFFIXES)}; GGUF cannot be trained on")
    elif found := weight_files(path, TRANSFORMER_STEM) or weight_files(path, ""):
        return found
    else:
        problems.append(f"{key} has no .safetensors file")
    return []


def _transformer_config(config: WanModelConfig, files: Sequence[Path]) -> tuple[Path | None, bool]:
    """The config.json beside the transformer, else that of ckpt_path, which may belong to another size."""
    if not files:
        return None, False
    beside = files[0].parent / "config.json"
    if beside.is_file():
        return beside, True
    for place in TRANSFORMER_PLACES if config.ckpt_path else ():
        candidate = config.ckpt_path / place / "config.json"
        if candidate.is_file():
            return candidate, False
    return None, False


def _one(
    what: str, key: str, given: Path | None, folder: Path | None, places: Sequence[str], problems: list[str]
) -> Path | None:
    """`given` if it exists, else the first of `places` in `folder`."""
    if given is not None:
        if given.is_dir() or (given.suffix in WEIGHT_SUFFIXES and given.is_file()):
            return given
        wrong = f"is not one of {', '.join(WEIGHT_SUFFIXES)}" if given.is_file() else "does not exist"
        problems.append(f"[model] {key} = '{given}' {wrong}")
        return None
    if folder is None:
        problems.append(f"[model] {key} is missing: without ckpt_path it must name the {what}")
        return None
    for place in places:
        if (folder / place).exists():
            return folder / place
    problems.append(
        f"[model] ckpt_path = '{folder}' has no {what}; looked for {', '.join(places)}. Download it there, or set {key}"
    )
    return None


def _tokenizer(config: WanModelConfig, problems: list[str]) -> Path | None:
    if config.tokenizer_path is not None:
        if not config.tokenizer_path.is_dir():
            problems.append(f"[model] tokenizer_path = '{config.tokenizer_path}' is not a folder")
        return config.tokenizer_path
    roots = [root for root in (config.ckpt_path, config.llm_path and config.llm_path.parent) if root]
    for folder in (root / place for root in roots for place in TOKENIZER_PLACES):
        if folder.is_dir():
            return folder
    where = f"in {' or '.join(map(str, roots))}; looked for {', '.join(TOKENIZER_PLACES)}. Download it there, or "
    problems.append(f"[model] no UMT5 tokenizer {where if roots else 'to be found: '}set tokenizer_path")
    return None
