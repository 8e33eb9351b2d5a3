"""Optimisers and running averages."""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# --- optimisation ---------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Jordan, 2024), scaled to AdamW's size.

    `torch.optim.Muon` computes the same in bfloat16, one matrix at a time.  A CPU without bfloat16
    arithmetic emulates that thirty times slower.  This class batches equal shapes, in float32.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                momenta = []
                for parameter in parameters:
                    gradient = parameter.grad
                    if gradient is None:
                        gradient = torch.zeros_like(parameter)
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(gradient, 0.05)
                    momenta.append(gradient.lerp(momentum, 0.95))
                updates = orthogonalise(torch.stack(momenta))
                scale = 0.2 * math.sqrt(max(rows, columns))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=group["lr"] * scale)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices (n, rows, columns) towards one (Newton-Schulz)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Optimisers:
    """Muon for the matrices of layers, AdamW for everything else, one schedule for both."""

    def __init__(
        self, modules: Iterable[nn.Module], lr: float, steps: int, fall: float = 0.4
    ) -> None:
        named = [item for module in modules for item in module.named_parameters()]
        named = [(name, p) for name, p in named if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and _in_a_layer(name)]
        others = [p for name, p in named if not (p.ndim == 2 and _in_a_layer(name))]
        self.parameters = matrices + others
        self.lr, self.steps, self.fall, self.done = lr, steps, fall, 0
        adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts: list[torch.optim.Optimizer] = [adam]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr))

    def step(self, loss: Tensor) -> None:
        """One update; the rate rises over 2 % of the steps and falls over the last share `fall`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = self.done / self.steps
        factor = min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / self.fall)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """State from which `load_state_dict` continues."""
        return {"done": self.done, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps that `state_dict` recorded."""
        self.done = state["done"]
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _in_a_layer(name: str) -> bool:
    """Whether a parameter belongs to a layer of an encoder or a decoder."""
    return "layers." in name or "blocks." in name


class Meter:
    """Means of figures by name, printed and reset every `every` steps."""

    def __init__(self, stage: str, every: int = 50) -> None:
        self.stage, self.every, self.start = stage, every, time.monotonic()
        self.sums: dict[str, list[float]] = {}
        self.last: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.detach().float().sum())
        total[1] += values.numel()

    def tick(self, step: int, steps: int) -> None:
        if (step + 1) % self.every and step + 1 < steps:
            return
        self.last = {name: s / n for name, (s, n) in self.sums.items() if n}
        self.sums.clear()
        figures = "  ".join(f"{name} {value:.3f}" for name, value in self.last.items())
        seconds = time.monotonic() - self.start
        print(f"{self.stage} {step + 1}/{steps}  {seconds:.0f} s  {figures}", flush=True)
