"""A user's file, for mypy: each line that tells it to ignore an error must be one, by that name, or mypy complains."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import fusedloss as fl

z, hidden, layer, t = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)


def poly1(s: fl.Statistics) -> Tensor:
    return s.ce + s.q


# What a loss returns.

for loss in (
    fl.cross_entropy(z, t),
    fl.focal_loss(z, t, gamma=torch.tensor(2.0), weight=None, reduction="sum", normalizer=None, impl="cpu"),
    fl.mixed_cross_entropy(z, t, alpha=0.1, top_k=2, label_smoothing=0.1, smoothing_over="others"),
    fl.dsc_loss(z, t, level="class", form="one_vs_rest", z_loss=0.0, return_stats=False),
    fl.flex_loss(z, t, poly1, statistics=("top",), over="rows"),
    fl.linear_focal_loss(hidden, layer, t, gamma=1.0, softcap=30.0, budget=2**20, impl="triton_fused"),
    fl.linear_dsc_loss(hidden, layer, t, alpha=0.5, linear_bias=None, sequence_parallel=False, ignore_index=0),
    fl.linear_flex_loss(hidden, layer, t, poly1, normalizer="token_weight", token_weight=torch.ones(2)),
    fl.supcon_loss(hidden, t, positives="in", reduction="mean_all"),
):
    assert_type(loss, Tensor)

loss, stats = fl.focal_loss(z, t, gamma=3.0, return_stats=True)
assert_type(loss, Tensor)
assert_type(stats, fl.RowStats)
loss, stats = fl.linear_dsc_loss(hidden, layer, t, return_stats=True)
assert_type(stats.argmax, Tensor)

# A misspelt option, and one that the loss does not take.

fl.focal_loss(z, t, gama=1.0)  # type: ignore[call-overload]
fl.focal_loss(z, t, gama=1.0, return_stats=True)  # type: ignore[call-overload]
fl.cross_entropy(z, t, ignore_idx=0)  # type: ignore[call-overload]
fl.dsc_loss(z, t, label_smoothing=0.1)  # type: ignore[call-overload]
fl.mixed_cross_entropy(z, t)  # type: ignore[call-overload]
fl.linear_focal_loss(hidden, layer, t, soft_cap=3.0)  # type: ignore[call-overload]
fl.linear_cross_entropy(hidden, layer, t, inplace_backward=True)  # type: ignore[call-overload]
fl.supcon_loss(hidden, t, temprature=0.1)  # type: ignore[call-arg]
fl.nn.FocalLoss(gama=1.0)  # type: ignore[call-arg]
fl.nn.FocalLoss(token_weight=torch.ones(2))  # type: ignore[call-arg]
fl.nn.DiceLoss(label_smoothing=0.1)  # type: ignore[call-arg]
fl.nn.MixedCrossEntropyLoss()  # type: ignore[call-arg]
fl.nn.DistillationLoss(label_smoothing=0.1)  # type: ignore[call-arg]
fl.nn.LinearDistillationLoss(4, 3, teacher_cap=3.0)  # type: ignore[call-arg]
fl.nn.LinearFocalLoss(4, 3, soft_cap=3.0)  # type: ignore[call-arg]
fl.nn.LinearDSCLoss(4, 3, inplace_backward=True)  # type: ignore[call-arg]
fl.nn.SupConLoss(temprature=0.1)  # type: ignore[call-arg]
fl.nn.CrossEntropySupConLoss(label_smothing=0.1)  # type: ignore[call-arg]
fl.nn.FocalLoss().forward(z, t, gama=1.0)  # type: ignore[call-arg]

# A choice that there is not.

fl.cross_entropy(z, t, reduction="avg")  # type: ignore[call-overload]
fl.cross_entropy(z, t, smoothing_over="rest")  # type: ignore[call-overload]
fl.dsc_loss(z, t, form="target_only")  # type: ignore[call-overload]
fl.dice_loss(z, t, level="batch")  # type: ignore[call-overload]
fl.flex_loss(z, t, poly1, over="sets")  # type: ignore[call-overload]
fl.focal_loss(z, t, impl="triton_fused")  # type: ignore[call-overload]
fl.linear_cross_entropy(hidden, layer, t, reduction="avg")  # type: ignore[call-overload]
fl.linear_cross_entropy(hidden, layer, t, impl="gpu")  # type: ignore[call-overload]
fl.supcon_loss(hidden, t, positives="both")  # type: ignore[arg-type]
fl.nn.DSCLoss(level="batch")  # type: ignore[arg-type]
fl.nn.DistillationLoss(divergence="kl")  # type: ignore[arg-type]
fl.nn.CrossEntropyLoss(reduction="avg")  # type: ignore[arg-type]
fl.nn.LinearCrossEntropyLoss(4, 3, reduction="avg")  # type: ignore[arg-type]
fl.nn.SupConLoss(reduction="avg")  # type: ignore[arg-type]

# What is right for modules.

fl.nn.FocalLoss(gamma=torch.nn.Parameter(torch.tensor(1.0)), weight=torch.ones(3), inplace_backward=True)
fl.nn.MixedCrossEntropyLoss(alpha=fl.nn.AlphaSchedule(10), normalizer=torch.nn.Identity(), smoothing_over="others")
fl.nn.LinearDSCLoss(4, 3, alpha=0.5, bias=True, dtype=torch.float64, softcap=30.0, drop_ignored=False)
fl.nn.LinearDistillationLoss(4, 3, divergence="jsd", beta=0.5, bias=True, softcap=30.0).forward(hidden, hidden, layer)
fl.nn.CrossEntropySupConLoss(lam=0.5, label_smoothing=0.1, weight=torch.ones(3))
fl.nn.FlexLoss(poly1, statistics=("top",)).forward(z, t, candidates=t, group=None, return_stats=True)
