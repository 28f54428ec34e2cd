"""What models do to their logits, which goes into the linear form or is refused by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_models import VOCABULARY, assert_close, attributes_of, gradients_of, llama, transformers
from torch import Tensor

from fusedloss.integrations.transformers import fuse


class Changed(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.change(self.lm_head(self.model(input_ids).last_hidden_state))
        return {"loss": self.loss_function(logits, labels, self.vocab_size, **kwargs), "logits": logits}


FOREIGN = {
    "order": (lambda z: z * (z > 9), "'>' not supported between"),
    "method": (lambda z: z.clamp(max=5), "'clamp' of the logits is not understood"),
    "assignment": (
        lambda z: z.__setitem__((..., 5), -1e4) or z,
        "'assignment to elements' of the logits",
    ),
    "comparison": (lambda z: z * (z == 0), "'==' of the logits is not understood"),
    "tensor factor": (lambda z: z * torch.ones(VOCABULARY), "'multiplication' of the logits and a tensor of shape"),
    "tensor divisor": (lambda z: z / torch.ones(VOCABULARY), "'division' of the logits and a tensor of shape"),
    "bias after the cap": (lambda z: torch.tanh(z) + torch.ones(VOCABULARY), "'addition' of the logits and a tensor"),
    "bias of positions": (lambda z: z + torch.ones(8, 1), "'addition' of the logits and a tensor"),
    "chosen classes": (lambda z: F.pad(z[..., torch.arange(7)], (0, VOCABULARY - 7)), "of logits of shape"),
    "factor of 0": (lambda z: z * 0, "'multiplication' of the logits and 0"),
    "two caps": (lambda z: torch.tanh(torch.tanh(z)), "'tanh' of soft-capped logits"),
    "negative cap": (lambda z: torch.tanh(z) * -2.0, "'multiplication' of the logits and -2.0"),
    "another axis": (lambda z: z[..., None], "of logits of shape"),
    "classes apart": (lambda z: z.view(2, -1), "of logits of shape"),
    "half precision": (lambda z: z.to(torch.float16), "to\\(torch.float16\\)"),
    "on the left": (lambda z: torch.ones(VOCABULARY) + z, "'add' of the logits is not understood"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_work_on_the_logits_is_refused_by_name(change: str) -> None:
    model = llama(Changed)
    before = attributes_of(model)
    work, message = FOREIGN[change]
    Changed.change = staticmethod(work)
    with pytest.raises(ValueError, match=f"Changed cannot be fused: .*({message})"):
        fuse(model)
    assert attributes_of(model) == before


KNOWN = {
    "a cap, then a scale": lambda z: 2 * (torch.tanh(z * 3.0) / 0.5),
    "scale and bias": lambda z: (z / 0.5 + torch.ones(1, VOCABULARY)) * 3 + torch.linspace(0, 1, VOCABULARY),
    "casts and shapes": lambda z: z.to(z.device)[:, :].reshape((-1, z.size(-1))).view(*z.shape).contiguous().float(),
    "cap by method": lambda z: (z / 2.0).tanh() * 2.0,
}


@pytest.mark.parametrize("change", KNOWN)
def test_known_work_on_the_logits_goes_into_the_linear_form(change: str, batch: dict[str, Tensor]) -> None:
    model = llama(Changed).train()
    Changed.change = staticmethod(KNOWN[change])
    loss = model(**batch)["loss"]
    expected = gradients_of(loss, model)
    fused = fuse(model)(**batch)["loss"]
    torch.testing.assert_close(fused, loss)
    assert_close(gradients_of(fused, model), expected, 1e-5)


#: What a model computes in place of the mean of the cross-entropy, of logits (tokens, V) and labels.
CRITERIA = {
    "class weights": (lambda z, t: F.cross_entropy(z, t, torch.ones(VOCABULARY)), "cross_entropy with weight"),
    "smoothed": (lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1), "by 0.1; pass label_smoothing to fuse"),
    "the old sum": (lambda z, t: F.cross_entropy(z, t, size_average=False), "cross_entropy with size_average"),
    "three dimensions": (lambda z, t: F.cross_entropy(z.view(1, 16, VOCABULARY), t[None]), "3 dimensions instead of"),
    "by itself": (lambda *_: torch.ones((), requires_grad=True), "Changed cannot be fused: Changed computed its loss"),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize("kind", CRITERIA)
def test_a_cross_entropy_of_another_kind_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, message = CRITERIA[kind]
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z.view(-1, VOCABULARY)), raising=False)
    monkeypatch.setattr(Changed, "loss_function", staticmethod(lambda z, t, *_: criterion(z, t.flatten())))
    for loss in ("focal_loss", "cross_entropy")[: 1 + (kind == "by itself")]:
        with pytest.raises(ValueError, match=message):
            fuse(llama(Changed), loss)
