"""Keys of other training programs that this one does not have, each with its equivalent here."""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS = (
    "`weights: FILE` names a file of trained ones (safetensors, or torch.save's state dict), `weights: imagenet` "
    "torchvision's; add `head: new` for other classes"
)
_NET = "the net is named by `net` (`qkd ls nets` lists them; path/to/file.py:function is one of your own)"
_DATA = "the data set is named by `data.name`; `data.path` is the folder of an npz or folder set"
_SIZE = "classes, channels and size of the images come from the data set"

# Only names that are not keys here; the binder finds our own keys in the wrong place.
FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(("pretrained", "pretrain", "pretrained_weights", "checkpoint", "checkpoint_path", "ckpt",
                     "ckpt_path", "load_from", "state_dict"), _WEIGHTS),
    **dict.fromkeys(("arch", "architecture", "backbone", "model", "model_name"), _NET),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "dataroot", "train_dir"), _DATA),
    **dict.fromkeys(("num_classes", "n_classes", "in_channels", "in_chans", "input_size"), _SIZE),
    **dict.fromkeys(("resume", "resume_from"), "a run resumes by itself: the same command again, with the same name"),
    **dict.fromkeys(("gpu", "gpus", "gpu_id", "use_cuda"), "where to train is `device`: auto, cpu or cuda:0"),
    **dict.fromkeys(("output_dir", "save_dir", "work_dir", "log_dir"), "the folder is --runs-dir and the run's `name`"),
}  # fmt: skip


def foreign_hint(key: str) -> str:
    """Return the equivalent of another program's key; empty if it is not known.

    Example:
        >>> foreign_hint("resume")
        'a run resumes by itself: the same command again, with the same name'
    """
    return FOREIGN.get(key.lower().replace("-", "_"), "")
