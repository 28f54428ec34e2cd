"""The pictures of the losses: `python docs/pictures.py` draws them anew, by calls of the losses themselves.

Each curve is a group of the SVG that is named after its axes and its label, by which a test finds it and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fusedloss as fl

FOLDER = Path(__file__).parent / "pictures"
#: Text stays text, every point is there, and a picture drawn twice is the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fusedloss", "path.simplify": False, "font.size": 9}

#: Of two classes, the target's probability.
P = torch.linspace(0.002, 0.998, 125, dtype=torch.float64)


def of_two_classes(loss: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the target's logit, at each probability of `P`."""
    z = torch.stack([P.logit(), torch.zeros_like(P)], -1).requires_grad_()
    rows = loss(z, torch.zeros(len(P), dtype=torch.int64), reduction="none", impl="reference", **options)
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    return rows.detach(), gradient[:, 0]


#: Cosine of an anchor and its only positive, beside eight negatives of cosine 0.
COSINE = torch.linspace(-1, 1, 81, dtype=torch.float64)


def of_a_pair(temperature: float) -> tuple[Tensor, Tensor]:
    """Contrastive loss and its derivative by the cosine."""
    cosine = COSINE.clone().requires_grad_()
    rows = []
    for c in cosine:
        positive = torch.stack([c, (1 - c.detach() ** 2).sqrt()])  # a unit vector at the values that are drawn
        contrast = torch.cat([positive[None], torch.tensor([[0.0, 1.0]]).double().expand(8, 2)])
        labels = torch.tensor([0] + [1] * 8)
        anchor = torch.tensor([[1.0, 0.0]]).double()
        rows.append(
            fl.supcon_loss(
                anchor, labels[:1], temperature=temperature, normalize=False, contrast=contrast, contrast_labels=labels
            )
        )
    losses = torch.stack(rows)
    (gradient,) = torch.autograd.grad(losses.sum(), cosine)
    return losses.detach(), gradient


def draw(curves: dict[str, tuple[Tensor, Tensor]], x: Tensor, xlabel: str, by: str, top: float) -> Figure:
    """Losses up to `top` beside their derivatives."""
    figure = Figure(figsize=(8, 3.2))
    figure.subplots_adjust(0.06, 0.15, 0.98, 0.9, wspace=0.2)
    axes: list[Axes] = list(figure.subplots(1, 2))
    for axis, title in zip(axes, ("loss", f"derivative by {by}"), strict=True):
        axis.set(title=title, xlabel=xlabel, xlim=(round(float(x[0])), 1))
        axis.locator_params(axis="x", nbins=5)
        axis.axhline(0, color="0.8", linewidth=0.8)
    for label, values in curves.items():
        for axis, name, y in zip(axes, ("loss", "derivative"), values, strict=True):
            dashed = {"linestyle": "--", "color": "black"} if "detach" in label else {}
            axis.plot(x, y, label=label, gid=f"{name}-{label}".replace(", ", "-"), linewidth=1.4, **dashed)
    axes[0].set_ylim(-0.02 * top, top)
    low = min(float(gradient.min()) for _, gradient in curves.values())
    high = max(float(gradient.max()) for _, gradient in curves.values())
    axes[1].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes[0].legend(frameon=False, loc="upper right")
    return figure


def cross_entropy() -> Figure:
    curves = {f"label_smoothing={e:g}": of_two_classes(fl.cross_entropy, label_smoothing=e) for e in (0.0, 0.1, 0.3)}
    return draw(curves, P, "p of the target", "the target's logit", 4)


def focal() -> Figure:
    curves = {f"gamma={g:g}": of_two_classes(fl.focal_loss, gamma=g) for g in (0.0, 0.5, 1.0, 2.0, 5.0)}
    return draw(curves, P, "p of the target", "the target's logit", 4)


def mixed_cross_entropy() -> Figure:
    curves = {f"alpha={a:g}": of_two_classes(fl.mixed_cross_entropy, alpha=a) for a in (0.0, 0.25, 0.5)}
    return draw(curves, P, "p of the target", "the target's logit", 4)


def dsc() -> Figure:
    """The target's term alone, and where its derivative is positive: there the loss pushes p down again."""
    curves = {f"alpha={a:g}": of_two_classes(fl.dsc_loss, alpha=a, form="target") for a in (0.0, 0.01, 0.5, 1.0)}
    curves["alpha=1, detach_weight"] = of_two_classes(fl.dsc_loss, alpha=1.0, form="target", detach_weight=True)
    figure = draw(curves, P, "p of the target", "the target's logit", 1.05)
    least = figure.axes[0]
    for alpha in (0.5, 1.0):
        loss, gradient = curves[f"alpha={alpha:g}"]
        turn = int((gradient > 0).nonzero()[0, 0])
        least.plot(P[turn], loss[turn], "o", color="black", markersize=4)
        at = (float(P[turn]), float(loss[turn]))
        least.annotate(f"p = 1/(1+{alpha:g})", at, (0, -12), textcoords="offset points")
    figure.axes[1].axhspan(0, figure.axes[1].get_ylim()[1], color="0.93", zorder=0)
    figure.axes[1].text(0.03, 0.93, "pushes p down", transform=figure.axes[1].transAxes, color="0.4")
    return figure


def tversky() -> Figure:
    curves = {f"alpha={a:g}": of_two_classes(fl.tversky_loss, alpha=a) for a in (0.1, 0.3, 0.6, 0.9)}
    return draw(curves, P, "p of the target", "the target's logit", 0.95)


def supcon() -> Figure:
    curves = {f"temperature={t:g}": of_a_pair(t) for t in (0.1, 0.3, 1.0)}
    return draw(curves, COSINE, "cosine of anchor and positive", "the cosine", 14)


PICTURES = (cross_entropy, focal, mixed_cross_entropy, dsc, tversky, supcon)


def save(picture: Callable[[], Figure], folder: Path) -> Path:
    path = folder / f"{picture.__name__}.svg"
    with rc_context(STYLE):
        picture().savefig(path, metadata={"Date": None, "Creator": None})
    return path


if __name__ == "__main__":
    for picture in PICTURES:
        print(save(picture, FOLDER))
