"""The names that other trainers give to settings, and what they are called here."""

from typing import NamedTuple


class ForeignKey(NamedTuple):
    """Whose name it is, and what to do instead."""

    owner: str
    mend: str


def _table(owner: str, keys: dict[str, str]) -> dict[str, ForeignKey]:
    return {key: ForeignKey(owner, mend) for key, mend in keys.items()}


_PATH = "here it is path in a [[directory]] of the dataset TOML"
_CAPTIONS = "captions lie beside the files as <name>.txt, or as caption_extension says"
_RANK = "here it is rank in [adapter]"
_ALPHA = "here it is alpha in [adapter]"
_LR = "here it is lr in [optimizer]"
_SHIFT = "here it is shift in [model]"
_SAMPLING = "here it is timestep_sample_method in [model]"
_FP8 = "here it is transformer_dtype = 'float8' in [model]"
_CHECKPOINT_PATH = "here it is ckpt_path in [model]"
_BATCH = "here it is micro_batch_size_per_gpu in the run TOML"
_DROPOUT = "here it is uncond_fraction in the run TOML"
_REPEATS = "here it is num_repeats"
_FRAMES = "here it is frame_buckets, whole numbers of frames"

_WEIGHT = "here it is weight in a [[directory]] of the dataset TOML"

FOREIGN_KEYS: dict[str, ForeignKey] = {
    **_table(
        "musubi-tuner",
        {
            "target_frames": _FRAMES,
            "frame_extraction": "here it is video_clip_mode, with the same names",
            "source_fps": "here it is fps",
            "video_directory": _PATH,
            "image_directory": _PATH,
            "video_jsonl_file": _PATH,
            "image_jsonl_file": _PATH,
            "resolution": "here it is resolutions, a list",
            "enable_bucket": "here it is enable_ar_bucket",
            "batch_size": _BATCH,
            "cache_directory": "here it is cache_dir in the run TOML, one for all folders",
            "general": "here such settings stand at the top of the dataset TOML",
            "datasets": "here each folder is a [[directory]]",
            "dit": "here it is transformer_path in [model]",
            "vae": "here it is vae_path in [model]",
            "t5": "here it is llm_path in [model]",
            "dataset_config": "here it is dataset",
            "network_module": "here it is type in [adapter]",
            "network_dim": _RANK,
            "network_alpha": _ALPHA,
            "network_weights": "here it is init_from_existing in [adapter]",
            "network_dropout": "here it is dropout in [adapter]",
            "base_weights": "here it is fuse_adapters",
            "base_weights_multiplier": "here it is weight in each entry of fuse_adapters",
            "max_train_steps": "here it is max_steps",
            "max_train_epochs": "here it is epochs",
            "discrete_flow_shift": _SHIFT,
            "timestep_sampling": _SAMPLING,
            "min_timestep": "here it is min_t in [model], from 0 to 1",
            "max_timestep": "here it is max_t in [model], from 0 to 1",
            "optimizer_type": "here it is type in [optimizer]",
            "optimizer_args": "here each argument is a key of [optimizer]",
            "max_grad_norm": "here it is gradient_clipping",
            "fp8_base": _FP8,
            "fp8_scaled": _FP8,
            "output_name": "files are named by epoch or step; remove it",
            "save_state": "here it is checkpoint_every_n_minutes",
        },
    ),
    **_table(
        "sd-scripts",
        {
            "image_dir": _PATH,
            "train_data_dir": _PATH,
            "subsets": "here each folder is a [[directory]]",
            "class_tokens": "here it is caption_prefix",
            "shuffle_caption": "here it is shuffle_tags, and cache_shuffle_num orders of each",
            "caption_separator": "here it is cache_shuffle_delimiter",
            "keep_tokens": "here it is keep_first",
            "is_reg": "here it is a [[directory]] with a weight; is_regularization = true keeps what the model knew",
            "prior_loss_weight": _WEIGHT,
            "flip_aug": "here it is flip",
            "masked_loss": "here mask_path in a [[directory]] of the dataset TOML is enough",
            "conditioning_data_dir": "masks for the loss are here mask_path in a [[directory]]",
            "random_crop": "here it is crop = 'random'",
            "alpha_mask": "masks for the loss are here files of their own, in mask_path of a [[directory]]",
            "unet_lr": _LR,
        },
    ),
    **_table(
        "ai-toolkit",
        {
            "folder_path": _PATH,
            "dataset_path": _PATH,
            "caption_ext": "here it is caption_extension",
            "num_frames": _FRAMES,
            "shrink_video_to_frames": "here it is video_clip_mode = 'spread'",
            "caption_dropout_rate": _DROPOUT,
            "linear": _RANK,
            "linear_alpha": _ALPHA,
            "lokr_factor": "here it is factor in [adapter]",
            "lokr_full_rank": "here a very large rank in [adapter] keeps a LoKr's matrices whole",
            "network": "here it is [adapter]",
            "train": "here such settings stand at the top of the run TOML",
            "steps": "here it is max_steps",
            "save_every": "here it is save_every_n_steps",
            "max_step_saves_to_keep": "saved models are never deleted; remove it (keep_last is for checkpoints)",
            "name_or_path": _CHECKPOINT_PATH,
            "timestep_type": _SAMPLING,
            "loss_multiplier": _WEIGHT,
            "flip_x": "here it is flip",
            "mask_min_value": "grey in a mask counts in part: make its black parts that grey",
            "quantize": _FP8,
        },
    ),
    **_table(
        "SimpleTuner",
        {
            "instance_data_dir": _PATH,
            "repeats": _REPEATS,
            "is_regularisation_data": "here it is is_regularization",
            "lora_rank": _RANK,
            "lora_alpha": _ALPHA,
            "train_batch_size": _BATCH,
            "num_train_epochs": "here it is epochs",
            "checkpointing_steps": "here it is checkpoint_every_n_minutes or checkpoint_every_n_epochs",
            "checkpoints_total_limit": "here it is keep_last",
            "caption_dropout_probability": _DROPOUT,
            "flow_schedule_shift": _SHIFT,
            "pretrained_model_name_or_path": _CHECKPOINT_PATH,
            "caption_strategy": _CAPTIONS,
            "lr_warmup_steps": "here it is warmup_steps",
            "gradient_checkpointing": "here it is activation_checkpointing",
            "learning_rate": _LR,
            "mixed_precision": "here it is dtype in [model]",
        },
    ),
    **_table(
        "DeepSpeed",
        {
            "deepspeed": "its settings are made from the keys at the top of the run TOML; remove it",
            "zero_optimization": "a pipeline runs without ZeRO; remove it",
            "train_micro_batch_size_per_gpu": _BATCH,
            "bf16": "here it is dtype in [model]",
            "fp16": "here it is dtype in [model]",
        },
    ),
}
