"""Keys that other training programs have and this one has not, each with the way to say it here."""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS = (
    "`weights: FILE` names a file of trained ones (safetensors, or torch.save's state dict), `weights: imagenet` "
    "torchvision's; `head: new` beside it is for other classes"
)
_NET = "the net is named by `net` (`qkd ls nets` lists them; path/to/file.py:function is one of your own)"
_DATA = "the data set is named by `data.name`; `data.path` is the folder of an npz or folder set"
_SIZE = "classes, channels and size of the images come from the data set"

# Only names that mean nothing here; a key of ours in another place is found by the binder.
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
    """Return how to say here what a key of another program says; empty where it is not known.

    Example:
        >>> foreign_hint("resume")
        'a run resumes by itself: the same command again, with the same name'
    """
    return FOREIGN.get(key.lower().replace("-", "_"), "")
