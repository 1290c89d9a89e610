"""The confidence-aware infusion head: one prediction from the branches', pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, grouped
from sonofed_common.contract.study_segmentation import Infusion

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
GATE_CHANNELS = 8
_TINY = 1e-8


class InfusionHead(nn.Module):
    """Mixes calibrated branches: ``p = sum_b w_b softmax(log p_b / T_b)``.

    Our reading of the infusion head that arXiv 2605.29122 names in its abstract. The weights w of a
    pixel are a softmax over the branches of

    - ``entropy``: ``-H(p_b) / tau``, with the entropy H over ``log C``, in [0, 1];
    - ``maxprob``: ``max_c p_b / tau``;
    - ``gate``: what a small convolutional network, the same for every branch, makes of the
      branch's probabilities and entropy; equal weights until it is trained (`gate_loss`);
    - ``mean``: 0, which makes them equal.

    No rule depends on the order of the branches.

    Parameters
    ----------
    branches : int
        K, at least 1.
    settings : Infusion
        Rule and tau; how the temperatures were found does not matter here.
    classes : int
        C, background included.
    seed : int
        Of the gate's random weights.

    Attributes
    ----------
    temperatures : Tensor (K,)
        T of each branch, float64; 1 until `load` brings others.
    """

    temperatures: Tensor

    def __init__(self, branches: int, settings: Infusion, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("temperatures", torch.ones(branches, dtype=torch.float64))
        self.gate: nn.Sequential | None = None
        if settings.rule == "gate":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                last = nn.Conv2d(GATE_CHANNELS, 1, 3, padding=1)
                self.gate = nn.Sequential(
                    nn.Conv2d(classes + 1, GATE_CHANNELS, 3, padding=1), nn.ReLU(), last
                )
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Infuse the branches.

        Parameters
        ----------
        probabilities : Tensor (K, B, C, H, W)
            Class probabilities of each branch.

        Returns
        -------
        p : Tensor (B, C, H, W)
            Infused class probabilities.
        weights : Tensor (K, B, H, W)
            Weight of each branch, sum 1 over K.
        """
        calibrated = self._calibrated(probabilities)
        weights = self._scores(calibrated).softmax(dim=0)
        return (weights[:, :, None] * calibrated).sum(dim=0), weights

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Take over ``temperatures`` (K,), 1 where there are none, and ``gate/...``.

        Raises
        ------
        ParameterError
            The temperatures are not K numbers in [0.05, 20], or a gate's weights do not fit.
        """
        count = len(self.temperatures)
        t = np.asarray(arrays.get("temperatures", np.ones(count)), dtype=np.float64)
        # The comparison is false of NaN.
        if t.shape != (count,) or not np.all(
            (t >= LOWEST_TEMPERATURE) & (t <= HIGHEST_TEMPERATURE)
        ):
            raise ParameterError(
                f"the temperatures do not fit; send one in [{LOWEST_TEMPERATURE:g}, "
                f"{HIGHEST_TEMPERATURE:g}] for each of the {count} branches"
            )
        gate = {} if self.gate is None else self.gate.state_dict()
        sent = {name: arrays.get(f"gate/{name}") for name in gate}
        weights = {n: torch.from_numpy(np.array(a)) for n, a in sent.items() if a is not None}
        if any(
            name not in weights
            or weights[name].shape != own.shape
            or not bool(torch.isfinite(weights[name]).all())
            for name, own in gate.items()
        ):
            raise ParameterError(
                "the gate's weights do not fit; send those of a gate that was trained for as many "
                "classes, or choose another rule"
            )
        self.temperatures.copy_(torch.from_numpy(t))
        if self.gate is not None:
            self.gate.load_state_dict(weights)

    def arrays(self) -> dict[str, Array]:
        """Return what `load` takes."""
        gate = {} if self.gate is None else self.gate.state_dict()
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in gate.items()}
        return {"temperatures": self.temperatures.cpu().numpy(), **grouped("gate", weights)}

    def _calibrated(self, probabilities: Tensor) -> Tensor:
        temperatures = self.temperatures.to(probabilities.dtype).view(-1, 1, 1, 1, 1)
        return (probabilities.clamp(min=_TINY).log() / temperatures).softmax(dim=2)

    def _scores(self, calibrated: Tensor) -> Tensor:
        rule, tau = self.settings.rule, self.settings.tau
        if rule == "entropy":
            return -normalised_entropy(calibrated) / tau
        if rule == "maxprob":
            return calibrated.amax(dim=2) / tau
        if self.gate is None:
            return torch.zeros_like(calibrated[:, :, 0])
        seen = torch.cat([calibrated, normalised_entropy(calibrated)[:, :, None]], dim=2)
        scores: Tensor = self.gate(seen.flatten(0, 1))[:, 0]
        return scores.reshape(calibrated[:, :, 0].shape)


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Entropy over ``log C``, in [0, 1], of probabilities (K, B, C, H, W): (K, B, H, W)."""
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=2)
    return entropy / math.log(probabilities.shape[2])


def confidence(probabilities: Tensor) -> Tensor:
    """Largest less second largest probability, in [0, 1], of (B, C, H, W): (B, H, W)."""
    first, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
    return first - second


def lattice(maps: Tensor, side: int = 32) -> Tensor:
    """Evenly spaced pixels (..., h, w) of maps (..., H, W), about ``side`` in each direction."""
    step = max(1, maps.shape[-1] // side)
    return maps[..., step // 2 :: step, step // 2 :: step]


def fit_temperature(log_probabilities: Tensor, targets: Tensor) -> float:
    """Find the temperature that minimises the negative log-likelihood (Guo et al., ICML 2017).

    Parameters
    ----------
    log_probabilities : Tensor (N, C)
        Of N pixels (see `lattice`: neighbours tell little new); finite.
    targets : Tensor (N,)
        True classes, 0 to C - 1.

    Returns
    -------
    float
        T in [0.05, 20]; 1 without any pixel.
    """
    from scipy.optimize import minimize_scalar

    logits = log_probabilities.detach().double()
    if not len(logits):
        return 1.0
    index = targets.to(logits.device).long()

    def loss(log_temperature: float) -> float:
        scaled = (logits / math.exp(log_temperature)).log_softmax(dim=1)
        return float(nll_loss(scaled, index))

    # Convex in 1 / T, so there is one minimum.
    bounds = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(np.clip(math.exp(found.x), LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE))


def gate_loss(head: InfusionHead, probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the infused probability: what a gate is trained on.

    Parameters
    ----------
    head : InfusionHead
        With the rule ``gate``.
    probabilities : Tensor (K, B, C, H, W)
        Of the frozen branches.
    targets : Tensor (B, 1, H, W)
        True classes.

    Notes
    -----
    On source images the source's own branch is at home; a gate that saw them without strong style
    augmentation learns to trust that branch everywhere.
    """
    infused, _ = head(probabilities)
    loss: Tensor = nll_loss(infused.clamp(min=_TINY).log(), targets[:, 0].long())
    return loss
