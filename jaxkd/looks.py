"""How figures look, whatever they show: colours, markers and words of arms and algorithms, and how they are written."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class _Looks(dict[str, str]):
    """Looks of models by name; one that is not listed has a look made from its name, always the same."""

    def __init__(self, known: dict[str, str], of_others: Callable[[str], str]):
        super().__init__(known)
        self._of_others = of_others

    def __missing__(self, name: str) -> str:
        return self._of_others(name)


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A choice by name; unlike `hash`, the same in every process."""
    return lambda name: choices[zlib.crc32(name.encode()) % len(choices)]


# Okabe and Ito's colours: told apart under every common colour blindness, and in order of lightness for print.
_COLOURS = {
    "kd_align": "#D55E00",
    "kd_align_sharpened": "#E69F00",
    "align_kd": "#0072B2",
    "align_kd_sharpened": "#56B4E9",
    "kd_align_anchored": "#009E73",
    "base_start_student_reference": "#CC79A7",
    "aligned_base": "#555555",
    "student": "#999999",
    "base": "#000000",
}
COLOURS = _Looks(_COLOURS, _one_of(("#882255", "#44AA99", "#999933", "#332288", "#661100")))

_LABELS = {
    "base": "base",
    "student": "student",
    "aligned_base": "aligned base",
    "kd_align": "KD→Align",
    "kd_align_sharpened": "KD→Align,\nsharpened",
    "align_kd": "Align→KD",
    "align_kd_sharpened": "Align→KD,\nsharpened",
    "kd_align_anchored": "KD→Align,\nanchored on base",
    "base_start_student_reference": "base start,\nstudent reference",
}
LABELS = _Looks(_LABELS, lambda name: name.replace("_", " "))

_MARKERS = {"kd_align": "o", "kd_align_sharpened": "s", "align_kd": "^", "align_kd_sharpened": "v"}
_MARKERS |= {"kd_align_anchored": "D", "base_start_student_reference": "P"}
_MARKERS |= {"aligned_base": "<", "student": ">", "base": "X"}
MARKERS = _Looks(_MARKERS, _one_of(("p", "h", "H", "8", "d", "*")))

ALGORITHM_LABELS = {
    "reinforce": "REINFORCE",
    "ppo": "PPO",
    "grpo": "GRPO",
    "online_dpo": "online DPO",
    "offline_dpo_ref": "offline DPO\n(reference pairs)",
    "offline_dpo_data": "offline DPO\n(data pairs)",
}


def arm_name(name: str) -> str:
    """A model's label on one line."""
    return LABELS[name].replace("\n", " ")


def algorithm_name(name: str) -> str:
    """An algorithm's label on one line."""
    return ALGORITHM_LABELS.get(name, name).replace("\n", " ")


STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
}


def save(figure, paths: Sequence[Path]) -> None:
    """Write and close a figure; without a time stamp, so that the same results give the same bytes."""
    for path in paths:
        figure.savefig(path, dpi=180, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
        # Laid out once: finding the layout takes longer than drawing.
        figure.set_layout_engine("none")
    plt.close(figure)
