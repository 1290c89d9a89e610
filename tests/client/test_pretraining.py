from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sonofed_client.adaptation.masked_modelling import draw_masks, pixels_of
from sonofed_client.adaptation.pretraining import (
    PretrainingModel,
    contrastive_weight,
    pretrain_round,
)
from sonofed_common.contract.errors import ConfigurationError, SiteEmptyError
from sonofed_common.contract.study_segmentation import Pretraining
from sonofed_common.models.encoders import ENCODERS, build_encoder
from sonofed_common.runtime import Events

torch.set_num_threads(1)

SIZE = 32
COUNT = 7
EPOCHS = 8
GROUPS = list("aabbcde")


def settings(**changes):
    values = {"patch_size": 8, "rounds": 1, "local_epochs": 1, "batch_size": 4}
    return Pretraining(**values | changes)


def model(wanted, name="unet", seed=0):
    return PretrainingModel(build_encoder(name, pretrained=False, seed=1), wanted, SIZE, seed)


def images(count=COUNT, seed=1):
    """Smooth blobs under speckle, in a padded sector."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    return (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1) * sector(
        count
    )


def sector(count=COUNT):
    inside = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.bool)
    inside[:, :, :, 8:] = True
    inside[1::2, :, :16] = False
    return inside


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def train(checkpoint=None, events=None, **changes):
    wanted = settings(**{"contrastive": "byol", "local_epochs": EPOCHS} | changes)
    trained = model(wanted)
    report = pretrain_round(
        trained,
        images(),
        sector(),
        GROUPS,
        wanted,
        0,
        5,
        checkpoint,
        events or Events(),
    )
    return trained, report


FORMS = [("unet", "simmim"), ("vit", "mae")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_loss_sees_masked_pixels_of_the_sector_only(name, form):
    network = model(settings(form=form, contrastive="none"), name).eval()
    where = []

    class Recorder(torch.nn.Module):
        patch_size = network.modelling.patch_size

        def forward(self, encoder, x, masks):
            where.append(pixels_of(masks, self.patch_size, SIZE) & sector())
            self.errors = torch.rand(x.shape, generator=generator(3), requires_grad=True)
            return self.errors

    network.modelling = Recorder()
    loss = network.mim(images(), sector(), generator())
    loss.backward()
    errors, (counted,) = network.modelling.errors, where
    assert loss.item() == pytest.approx(errors[counted].mean().item(), rel=1e-5)
    assert counted.any() and not counted.all()
    assert torch.equal(errors.grad != 0, counted)


@pytest.mark.parametrize(("name", "form"), [*FORMS, ("vit", "simmim")])
def test_what_a_masked_patch_holds_is_hidden_from_the_network(name, form):
    network = model(settings(form=form), name).eval()
    masks = draw_masks(sector(), network.modelling.patch_size, 0.5, generator())
    hidden = pixels_of(masks, network.modelling.patch_size, SIZE)
    other = torch.where(hidden, torch.rand(images().shape), images())
    with torch.no_grad():
        before = network.modelling(network.encoder, images(), masks)
        after = network.modelling(network.encoder, other, masks)
    assert torch.equal(before[~hidden], after[~hidden])
    assert not torch.equal(before[hidden], after[hidden])


def test_mae_predicts_each_image_as_if_alone():
    network = model(settings(form="mae"), "vit").eval()
    inside = sector()
    inside[0] = True
    masks = draw_masks(inside, 16, 0.5, generator())
    assert len(set(masks.sum(dim=(1, 2)).tolist())) > 1
    with torch.no_grad():
        together = network.modelling(network.encoder, images(), masks)
        alone = [
            network.modelling(network.encoder, images()[i : i + 1], masks[i : i + 1])
            for i in range(COUNT)
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_mae_with_nothing_masked_encodes_as_the_encoder_itself():
    network = model(settings(form="mae"), "vit").eval()
    with torch.no_grad():
        unmasked = torch.zeros(COUNT, 4, dtype=torch.bool)
        tokens, place = network.modelling._encode(network.encoder, images(), unmasked)
        deepest = network.encoder(images())[-1]
    assert torch.equal(place, torch.arange(4).expand(COUNT, 4))
    assert torch.allclose(tokens[:, 1:].transpose(1, 2), deepest.flatten(2), atol=1e-5)


def test_lambda_rises_over_its_share_of_all_steps():
    wanted = settings(contrastive_weight=2.0, warmup=0.25)
    found = [contrastive_weight(wanted, step, 40) for step in range(40)]
    assert found[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert set(found[10:]) == {2.0}
    assert contrastive_weight(settings(warmup=0.0), 0, 40) == 1.0


def test_a_round_shows_each_image_with_its_own_sector_and_patient():
    wanted = settings(local_epochs=2)
    network, all_images, own = model(wanted), images(), sector()
    mim, contrastive = network.mim, network.contrastive
    shown = []

    def numbers(batch):
        return [next(i for i, x in enumerate(all_images) if torch.equal(x, y)) for y in batch]

    def seen_by_mim(batch, sectors, generator):
        assert torch.equal(sectors, own[numbers(batch)])
        return mim(batch, sectors, generator)

    def seen_by_contrast(batch, groups, generator):
        found = numbers(batch)
        alike = [[GROUPS[i] == GROUPS[j] for j in found] for i in found]
        assert (groups[:, None] == groups[None, :]).tolist() == alike
        shown.extend(found)
        return contrastive(batch, groups, generator)

    network.mim, network.contrastive = seen_by_mim, seen_by_contrast
    pretrain_round(network, all_images, own, GROUPS, wanted, 0, 0)
    assert sorted(shown) == sorted([*range(COUNT), *range(COUNT)])


def test_images_of_one_patient_alone_teach_no_contrast():
    wanted = settings()
    reports = [
        pretrain_round(model(wanted), images(), sector(), groups, wanted, 0, 0)
        for groups in (["a"] * COUNT, list("abcdefg"))
    ]
    # Without a negative the partner is the only choice, whose cross-entropy is 0.
    assert reports[0]["contrastive"] == 0 < reports[1]["contrastive"]


def test_the_contrast_is_weighed_by_a_lambda_that_rises_over_all_rounds():
    wanted = settings(rounds=2, local_epochs=2, contrastive_weight=2.0, warmup=1.0)
    network = model(wanted)
    network.contrastive = lambda *_: torch.ones(())
    # Two steps an epoch, eight in all: a round's last epoch has its third and its fourth.
    for round, steps in ((0, (2, 3)), (1, (6, 7))):
        report = pretrain_round(network, images(8), sector(8), list("abcdefgh"), wanted, round, 0)
        expected = sum(2 * step / 8 for step in steps) / 2
        assert report["loss"] - report["mim"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("contrastive", ["nt_xent", "byol", "none"])
def test_every_contrastive_form_trains(contrastive):
    wanted = settings(contrastive=contrastive, local_epochs=2)
    network = model(wanted)
    before = copy.deepcopy(network)
    report = pretrain_round(network, images(), sector(), GROUPS, wanted, 0, 0)
    assert report.keys() == {"loss", "mim", "contrastive"}
    assert (report["contrastive"] == 0) == (contrastive == "none")
    moved = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, weight in network.named_parameters()
        if not torch.equal(weight, before.get_parameter(name))
    }
    parts = {"encoder.backbone", "modelling.value", "modelling.head"}
    parts |= {"contrast.projector"} if contrastive != "none" else set()
    if contrastive == "byol":
        parts |= {"contrast.predictor", "contrast.target_encoder", "contrast.target_projector"}
    assert moved == parts


@pytest.mark.parametrize("name", ENCODERS)
def test_simmim_trains_every_encoder(name):
    wanted = settings()
    report = pretrain_round(model(wanted, name), images(4), sector(4), list("abcd"), wanted, 0, 0)
    assert all(math.isfinite(value) for value in report.values())


def test_mae_trains_the_encoders_own_vit():
    wanted = settings(form="mae", mask_ratio=0.75)
    network = model(wanted, "vit")
    before = copy.deepcopy(network.encoder)
    pretrain_round(network, images(), sector(), GROUPS, wanted, 0, 0)
    still = {
        name
        for name, weight in network.encoder.named_parameters()
        if torch.equal(weight, before.get_parameter(name))
    }
    # Only what follows the deepest map is not pretrained; a key's bias cancels in the softmax.
    assert all(".finer." in name or name.endswith("key.bias") for name in still)
    build_encoder("vit", pretrained=False).load_state_dict(network.encoder.state_dict())


def test_the_loss_falls():
    first, last = (
        train(local_epochs=epochs, learning_rate=3e-3, contrastive="nt_xent", warmup=0.0)[1]
        for epochs in (1, 15)
    )
    assert last["mim"] < 0.7 * first["mim"]
    assert last["contrastive"] < first["contrastive"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    wanted = settings(contrastive="byol", local_epochs=2)
    trained = []
    for seed in (3, 3, 4):
        network = model(wanted)
        pretrain_round(network, images(), sector(), GROUPS, wanted, 0, seed)
        trained.append(network)
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])


def test_normalisation_statistics_are_those_of_whole_images():
    wanted = settings()
    network = model(wanted)
    pretrain_round(network, images(), sector(), GROUPS, wanted, 0, 0)
    stage = network.encoder.backbone[0]
    norm = stage.conv_0.adn.N
    with torch.no_grad():
        maps = stage.conv_0.conv((images() - network.encoder.mean) / network.encoder.std)
    assert torch.allclose(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, maps.var(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_the_start_is_the_same_at_every_site():
    wanted = settings(contrastive="byol")
    torch.manual_seed(1)
    one = model(wanted)
    torch.manual_seed(2)
    assert same(one, model(wanted))
    assert not same(one, model(wanted, seed=1))


def test_what_cannot_be_pretrained_is_refused():
    with pytest.raises(ConfigurationError, match="needs the encoder 'vit'"):
        model(settings(form="mae"), "resnet18")
    with pytest.raises(ConfigurationError, match="multiple of 16"):
        PretrainingModel(build_encoder("unet", pretrained=False), settings(), 40)
    for count in (0, 1):
        with pytest.raises(SiteEmptyError, match="two images"):
            pretrain_round(
                model(settings()), images(count), sector(count), ["a"] * count, settings(), 0, 0
            )


@pytest.mark.slow
def test_a_round_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path):
    checkpoint = tmp_path / "round.safetensors"
    script = (
        "import runpy, sys, pathlib;runpy.run_path(sys.argv[1])['train'](pathlib.Path(sys.argv[2]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__)), str(checkpoint)], env=environment
    )
    try:
        deadline = time.monotonic() + 400
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with safe_open(checkpoint, framework="pt") as file:
        done = file.metadata()["losses"].count(",") + 1
    assert 1 <= done < EPOCHS
    epochs = []
    events = Events(listeners=[lambda event: epochs.append(event["epoch"])])
    resumed, report = train(checkpoint, events)
    assert min(epochs) == done + 1
    whole, expected = train()
    assert same(resumed, whole)
    assert report == expected
    assert train(checkpoint)[1] == expected
