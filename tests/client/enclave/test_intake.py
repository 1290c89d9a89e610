import shutil

import numpy as np
import pytest
from enclave_talk import COMMON, IMAGES, evaluation, forget_labels, install, rewrite

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.intake import take_in
from sonofed_client.enclave.store import Store
from sonofed_client.settings import read_site
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import (
    ConfigurationError,
    DataMissingError,
    DataUnreadableError,
    OneClassError,
    SiteEmptyError,
)
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_simulations.engines.inline import InlineGrid


def intake(site):
    InProcessEnclave(site)
    return Store(site.store)


def test_no_patient_is_on_both_sides(site):
    store = intake(site)
    pool, test = ({row.group for row in store.images(part)} for part in ("pool", "test"))
    assert pool and test and not pool & test
    assert {row.label for row in store.images("test")} == {0, 1}


def test_a_corrupt_image_is_skipped_and_reported_on_site_only(own, bundle):
    bad = sorted((own.data.path / "images").glob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:100])
    store = intake(own)
    assert len(store.images()) == IMAGES - 1
    assert f"images/{bad.name}" not in {row.name for row in store.images()}
    (skipped,) = store.get("intake").config["skipped"]
    assert skipped == {"name": f"images/{bad.name}", "reason": skipped["reason"]}
    assert skipped["reason"]


def test_intake_happens_once_and_again_for_other_settings(own):
    first = intake(own)
    rows = first.images()
    shutil.rmtree(own.data.path)
    assert intake(own).images() == rows
    other = own.model_copy(update={"data": own.data.model_copy(update={"split_seed": 1})})
    with pytest.raises(DataMissingError):
        intake(other)
    assert intake(own).images() == rows


def test_an_interrupted_intake_is_done_again(site, monkeypatch):
    rows = intake(site).images()
    other = site.model_copy(update={"data": site.data.model_copy(update={"split_seed": 1})})
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Store, "put_bytes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            intake(other)
    assert intake(site).images() == rows


def test_images_that_went_after_the_intake_are_missed(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    next((own.data.path / "images").glob("*.png")).unlink()
    with pytest.raises(DataUnreadableError, match="intake"):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))


def test_a_missing_folder(own):
    shutil.rmtree(own.data.path)
    with pytest.raises(DataMissingError) as error:
        intake(own)
    assert error.value.exit_code == 10


def test_a_site_without_usable_images(own):
    rewrite(own.data.path, lambda row: {**row, "label": "normal"})
    with pytest.raises(SiteEmptyError, match="north") as error:
        intake(own)
    assert error.value.exit_code == 11


def test_a_site_whose_scanner_has_no_images(own):
    data = own.data.model_copy(update={"devices": ("absent",)})
    with pytest.raises(SiteEmptyError):
        intake(own.model_copy(update={"data": data}))


def test_a_table_without_images(own):
    rewrite(own.data.path, lambda row: None)
    with pytest.raises(SiteEmptyError):
        intake(own)


def test_one_class(own):
    rewrite(own.data.path, lambda row: row if row["label"] == "0" else None)
    with pytest.raises(OneClassError, match="north") as error:
        intake(own)
    assert error.value.exit_code == 12


def test_a_class_of_one_patient_cannot_be_tested(own):
    malignant = iter([{"label": "1", "patient": "only"}])

    def one_malignant_patient(row):
        return row if row["label"] == "0" else next(({**row, **m} for m in malignant), None)

    rewrite(own.data.path, one_malignant_patient)
    with pytest.raises(OneClassError, match="two patients"):
        intake(own)


def test_unlabelled_images_join_the_pool_unless_their_patient_is_tested(own):
    lines = (own.data.path / "table.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    images = {}
    for row in rows:
        images.setdefault(row["patient"], []).append(row["image"])
    assert any(len(names) > 1 for names in images.values())
    forget_labels(own.data.path)
    store = intake(own)
    held = store.images("test")
    tested = {row.group for row in held}
    assert {row.label for row in held} == {0, 1}
    pool = store.images("pool")
    assert {row.label for row in pool} == {0, 1, None}
    assert not tested & {row.group for row in pool}
    excluded = store.get("intake").config["excluded"]
    assert sum(excluded.values()) == len(rows) - len(pool) - len(held)


def test_images_left_out_are_counted(own):
    first = iter(["normal"])
    rewrite(own.data.path, lambda row: {**row, "label": next(first, row["label"])})
    assert intake(own).get("intake").config["excluded"] == {"normal, without a lesion": 1}


def test_an_image_replaced_under_its_name_is_another_image(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    store = Store(own.store)
    before = {row.name: row.id for row in store.images()}
    name = store.images("test")[0].name
    other = next(n for n in before if n != name)
    (own.data.path / name).write_bytes((own.data.path / other).read_bytes())
    assert {row.name: row.id for row in intake(own).images()} == before
    take_in(own, store, again=True)
    after = {row.name: row.id for row in store.images()}
    assert {n for n in before if before[n] != after[n]} == {name}
    enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    assert len(store.names("job/")) == 2
    rows = {row.name: row.position for row in store.images()}
    kept = store.get("pixels/32").arrays["pixels"]
    assert np.array_equal(kept[rows[name]], kept[rows[other]])


def test_an_image_that_changed_without_an_intake_is_noticed(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    first, second, *_ = sorted((own.data.path / "images").glob("*.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataUnreadableError, match="intake"):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))


def test_a_site_that_cannot_be_opened_keeps_its_paths(tmp_path, monkeypatch):
    missing = tmp_path / "secret-ward.toml"
    monkeypatch.setenv(SITES_VARIABLE, str(missing))
    grid = InlineGrid(1)
    content = to_recorddict(request(actions.Annotations(**COMMON)))
    (node,) = grid.get_node_ids()
    message = grid.create_message(content, "query.annotations", node, "0")
    (reply,) = grid.send_and_receive([message])
    assert from_recorddict(reply.content).config == {
        "error": "configuration",
        "message": "this site is not ready; its own log says why",
    }


def test_settings_are_read_strictly(tmp_path, site):
    path = tmp_path / "site.toml"
    text = f"""
name = "north"
store = "{site.store}"
coordinator_key = "{site.coordinator_key}"
auto_approve = ["{site.coordinator_key}"]
oracle = true
threads = 1
[data]
kind = "table"
path = "{site.data.path}"
test_fraction = 0.4
"""
    path.write_text(text)
    assert read_site(path) == site
    path.write_text(text.replace("test_fraction", "test_fractoin"))
    with pytest.raises(ConfigurationError, match="did you mean 'test_fraction'"):
        read_site(path)
    path.write_text(f'image_key = "secret"\n{text}')
    with pytest.raises(ConfigurationError, match="image_key"):
        read_site(path)
