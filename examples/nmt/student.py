"""A network that learns from another one."""

from __future__ import annotations

from typing import Any

import torch
from data import PAD, Batch
from model import Transformer
from trainer import Trainer

import fusedloss as fl


class Student(Trainer):
    """Learns from the hidden states of a teacher, and from the reference."""

    def __init__(self, *arguments: Any, teacher: Transformer, soft: float, temperature: float) -> None:
        super().__init__(*arguments)
        self._teacher, self._soft, self._temperature = teacher.eval().requires_grad_(False), soft, temperature

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean of soft * T^2 * KL(teacher | student) + (1 - soft) * CE; the logits of neither model are stored."""
        with torch.no_grad():
            teacher_hidden = self._teacher(batch.source, batch.target_in)  # (B, T, E)
        hidden = self.model(batch.source, batch.target_in)  # (B, T, D)
        return self._soft * fl.linear_distillation_loss(
            hidden,
            self.model.output_weight,
            teacher_hidden,
            self._teacher.output_weight,
            temperature=self._temperature,
            scale_by_temperature_squared=True,
            target=batch.target_out,
            hard_weight=(1 - self._soft) / self._soft,
            ignore_index=PAD,
            impl=self.impl,
        )
