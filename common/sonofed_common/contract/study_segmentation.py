"""Sections of a study that say how segmenters are adapted."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sonofed_common.contract.configuration import Model


class Pretraining(Model):
    """Target-informed pretraining of the segmenter's encoder, without labels."""

    form: Literal["simmim", "mae"] = Field(default="simmim", description="mae: encoder 'vit' only")
    start: Literal["pretrained", "source"] = Field(
        default="pretrained",
        description="pretrained: ImageNet weights or random ones; source: the shipped segmenter's",
    )
    patch_size: int = Field(default=16, ge=2, le=64, description="masked squares, pixels (simmim)")
    mask_ratio: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the patches inside the ultrasound sector; default 0.6, mae 0.75",
    )
    contrastive: Literal["nt_xent", "byol", "none"] = "nt_xent"
    temperature: float = Field(default=0.2, gt=0, le=10, description="of NT-Xent")
    contrastive_weight: float = Field(default=1.0, ge=0, description="lambda, after its warm-up")
    warmup: float = Field(default=0.1, ge=0, le=1, description="share of all steps")
    rounds: int = Field(default=2, ge=1, le=1000)
    local_epochs: int = Field(default=2, ge=1, le=1000)
    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    batch_size: int = Field(default=16, ge=2)

    @property
    def masked_share(self) -> float:
        """``mask_ratio``, or what the form's own paper takes."""
        if self.mask_ratio is not None:
            return self.mask_ratio
        return 0.75 if self.form == "mae" else 0.6


class Supervision(Model):
    """Branch B: trained like the source's own segmenter, but from the target-informed encoder."""

    branches: Literal["shared", "per_site"] = Field(
        default="shared", description="one from the averaged encoder, or one from each site's"
    )
    style_augmentation: bool | None = Field(
        default=None, description="default: as the source's own segmenter was trained"
    )


SiteNorm = Literal["site", "mixed"]
"""A site's own normalisation statistics, or their mean with those of the weights."""

Strategy = Literal["apl", "threshold", "cbst", "mrnet", "batch_norm", "tent", "dpl", "upl_sfda"]
"""Source-free adaptation strategies."""

LABELLING: tuple[Strategy, ...] = ("apl", "threshold", "cbst", "mrnet", "dpl", "upl_sfda")
"""Strategies that learn from a teacher's labels."""

READ_BY: dict[str, tuple[Strategy, ...]] = {
    "consistency": ("apl",),
    "self_training": ("apl",),
    "relevance": ("apl",),
    "disagreement": ("apl",),
    "class_mean_confidence": ("apl",),
    "class_prior": ("apl",),
    "prior_shares": ("apl",),
    "teacher_momentum": LABELLING,
    "threshold": ("threshold", "dpl", "upl_sfda"),
    "quantile": ("cbst",),
    "passes": ("dpl",),
    "perturbed_heads": ("upl_sfda",),
}
"""Strategies that read a setting of pseudo-labelling; all others are of the loop they share."""

PART_OF = {
    "relevance": "consistency",
    "class_mean_confidence": "self_training",
    "prior_shares": "class_prior",
}
"""Settings of APL that are read only where another one is switched on."""

TEACHER_MOMENTUM = 0.99
"""Of pseudo-labelling's teacher."""


class PseudoLabels(Model):
    """Source-free adaptation of the segmenters on unlabelled images.

    Notes
    -----
    Over rounds the federation's average is the teacher: each round labels with the weights that
    came. Within a round the teacher is an average of the student over its steps, which labels anew
    before each further local epoch; with one local epoch there is none, and nothing to set.
    """

    strategy: Strategy = "apl"
    consistency: bool = Field(default=False, description="APL's L_con, minimised over the heads")
    self_training: bool = Field(default=True, description="APL's L_ssl, over the encoder")
    relevance: Literal["none", "count", "inverse"] = Field(
        default="none", description="APL's W: weights of class pairs in L_con"
    )
    disagreement: float = Field(
        default=0.0, ge=0, description="weight of the symmetric KL of the two heads beside L_con"
    )
    class_mean_confidence: bool = Field(
        default=True, description="confidence over its class mean, so that small lesions count"
    )
    class_prior: float = Field(
        default=10.0, ge=0, description="weight of the KL to the expected class shares (apl)"
    )
    prior_shares: Literal["labels", "source"] = Field(
        default="labels", description="expected of an image by its pseudo-label, or of all images"
    )
    teacher_momentum: float = Field(
        default=TEACHER_MOMENTUM,
        ge=0,
        le=1,
        description="EMA that labels anew before each further local epoch of a round",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="least probability of a pseudo-label (threshold, dpl, upl_sfda); default 0.9, "
        "dpl 0.75",
    )
    quantile: float = Field(
        default=0.5, gt=0, le=1, description="most confident share of each class (cbst)"
    )
    passes: int = Field(default=10, ge=2, le=100, description="dropout passes (dpl)")
    perturbed_heads: int = Field(default=4, ge=2, le=16, description="copies of a head (upl_sfda)")
    rounds: int = Field(default=2, ge=1, le=1000)
    local_epochs: int = Field(default=1, ge=1, le=1000)
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    batch_size: int = Field(default=8, ge=2)

    @model_validator(mode="after")
    def _heeded(self) -> Self:
        if self.teacher_momentum != TEACHER_MOMENTUM and self.local_epochs == 1:
            raise ValueError(
                f"teacher_momentum = {self.teacher_momentum:g} would do nothing: with one local "
                "epoch a round the federation's average is the teacher; raise local_epochs, or "
                "leave teacher_momentum out"
            )
        if self.disagreement and not self.consistency:
            raise ValueError(
                f"disagreement = {self.disagreement:g} would do nothing: it stands beside L_con; "
                "set consistency = true, or leave disagreement out"
            )
        return self

    @property
    def idle(self) -> dict[str, str]:
        """Settings, not at their default, that change nothing; each with the reason.

        They are no error here: a site gets settings in full, with what the study's preset set for
        another strategy than the study's own.
        """
        found: dict[str, str] = {}
        for name, readers in READ_BY.items():
            if getattr(self, name) == type(self).model_fields[name].default:
                continue
            whole = PART_OF.get(name)
            if self.strategy not in readers:
                found[name] = f"it is of strategy {' or '.join(map(repr, readers))}"
            elif whole is not None and not getattr(self, whole):
                found[name] = f"it is part of {whole}, which is off"
        return found

    @property
    def least_probability(self) -> float:
        """``threshold``, or what is usual: DPL's paper takes another than the rest."""
        if self.threshold is not None:
            return self.threshold
        return 0.75 if self.strategy == "dpl" else 0.9


class Infusion(Model):
    """The confidence-aware ensemble of all branches."""

    rule: Literal["entropy", "maxprob", "gate", "mean"] = "entropy"
    tau: float = Field(default=0.1, gt=0, description="softness of the weights (entropy, maxprob)")
    calibration: Literal["source", "consensus", "none"] = Field(
        default="source",
        description="temperatures from held-out source labels, or from the branches' consensus",
    )
    mirrored: bool = Field(
        default=False,
        description="a branch's prediction is its mean over an image and the mirrored image; only "
        "where classes have no side",
    )


PLAIN_MEAN = Infusion(rule="mean", calibration="none")
"""All branches weigh the same, as they are: nothing to fit."""
