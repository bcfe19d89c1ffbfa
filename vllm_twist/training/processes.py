"""Training in several processes, by accelerate and its launcher."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

#: Where launchers say how many processes they started: torch.distributed's, and several of MPI.
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """This process among those that ``accelerate launch`` started, or alone."""

    def __init__(self) -> None:
        """Join the others.

        Raises:
            ValueError: there are others, but accelerate is not installed.
        """
        self._accelerator: Any = None
        if any(int(os.environ.get(name, "1")) > 1 for name in LAUNCHED):
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise ValueError(
                    "training in several processes needs accelerate, which is not installed: pip install "
                    "'vllm-twist[accelerate]'."
                ) from error
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.world: int = self._accelerator.num_processes if self._accelerator else 1
        self.rank: int = self._accelerator.process_index if self._accelerator else 0
        self.is_main = self.rank == 0
        self.device: torch.device = (
            self._accelerator.device
            if self._accelerator
            else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )

    def slots(self, update: int, count: int) -> Iterable[int]:
        """Return which ``count`` places in the endless round of prompts this process takes in an update."""
        first = (update * self.world + self.rank) * count
        return range(first, first + count)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace the gradients by their means over the processes."""
        if self._accelerator is None:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        vector = self._accelerator.reduce(parameters_to_vector(gradients), "mean")
        vector_to_parameters(vector, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the means over the processes."""
        if self._accelerator is None:
            return metrics
        values = torch.tensor(list(metrics.values()), device=self.device)
        return dict(zip(metrics, self._accelerator.reduce(values, "mean").tolist(), strict=True))

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
