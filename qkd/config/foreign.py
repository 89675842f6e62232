"""Config keys of other training programs, each with its equivalent here."""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS = (
    "`weights: FILE` loads trained weights (safetensors, or a torch.save state dict), `weights: imagenet` "
    "torchvision's; add `head: new` if your classes differ"
)
_NET = "use `net` to name the net (`qkd ls nets` lists them; path/to/file.py:function is one of your own)"
_DATA = "use `data.name` to name the data set; `data.path` is the folder of an npz or folder set"
_SIZE = "classes, channels and size of the images come from the data set"

# Only names that are not keys here; the binder recognizes our own keys in the wrong place.
FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(("pretrained", "pretrain", "pretrained_weights", "checkpoint", "checkpoint_path", "ckpt",
                     "ckpt_path", "load_from", "state_dict"), _WEIGHTS),
    **dict.fromkeys(("arch", "architecture", "backbone", "model", "model_name"), _NET),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "dataroot", "train_dir"), _DATA),
    **dict.fromkeys(("num_classes", "n_classes", "in_channels", "in_chans", "input_size"), _SIZE),
    **dict.fromkeys(("resume", "resume_from"), "a run resumes automatically: repeat the command with the same name"),
    **dict.fromkeys(("gpu", "gpus", "gpu_id", "use_cuda"), "use `device`: auto, cpu or cuda:0"),
    **dict.fromkeys(("output_dir", "save_dir", "work_dir", "log_dir"), "use --runs-dir and the run's `name`"),
}  # fmt: skip


def foreign_hint(key: str) -> str:
    """Return the equivalent of another program's key; empty if the key is unknown.

    Example:
        >>> foreign_hint("resume")
        'a run resumes automatically: repeat the command with the same name'
    """
    return FOREIGN.get(key.lower().replace("-", "_"), "")
