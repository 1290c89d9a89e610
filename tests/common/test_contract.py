import contextlib
import json
import struct
import tracemalloc
from typing import get_args

import numpy as np
import pytest
import tomli_w
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load

from sonofed_common.contract.actions import (
    ACTIONS,
    Annotations,
    Describe,
    Embed,
    EvaluateClassifier,
    Histogram,
    TrainClassifier,
    parse,
    request,
)
from sonofed_common.contract.errors import (
    CATALOGUE,
    ConfigurationError,
    ParameterError,
    SonoFedError,
    UnknownActionError,
    error_from_code,
)
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import (
    HEADER_BYTES,
    Records,
    from_bytes,
    grouped,
    read_config,
    to_bytes,
)
from sonofed_common.contract.study import (
    ACTIVE_LEARNING,
    PRESETS,
    ClassifierName,
    Embedding,
    Finetuning,
    Reconstruction,
    Study,
    read_study,
)
from sonofed_common.models.classifiers import CLASSIFIERS

MINIMAL = {"name": "trial", "cohort": {"sites": ["north", "south"]}}


def study(tmp_path, **values):
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(MINIMAL | values))
    return read_study(path)


def refused(tmp_path, **values):
    with pytest.raises(ConfigurationError) as error:
        study(tmp_path, **values)
    assert error.value.exit_code == 20
    assert "study.toml" in error.value.message and "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"fases": ["enrol"]}, "fases", "phases"),
        ({"selection": {"uncertanty": "margin"}}, "selection.uncertanty", "uncertainty"),
        ({"cohort": {"sites": ["a"], "quorun": 1}}, "cohort.quorun", "quorum"),
        ({"embedding": {"teacher_momentun": 0.9}}, "embedding.teacher_momentun", "momentum"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, values, unknown, nearest):
    message = refused(tmp_path, **values)
    assert f"unknown key '{unknown}'" in message
    assert nearest in message.split("did you mean")[1]


def test_a_key_that_resembles_none_lists_the_known_ones(tmp_path):
    assert "iterations" in refused(tmp_path, clustering={"xyzzy": 1})


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"cohort": {"sites": ["a", "b"], "quorum": 3}}, "quorum 3 exceeds the 2 sites"),
        ({"cohort": {"sites": ["a", "a"]}}, "each site once"),
        ({"cohort": {"sites": []}}, "cohort.sites"),
        (
            {"cohort": {"sites": ["a", "Königs Klinik/1"]}},
            "'Königs Klinik/1' is no plain site name",
        ),
        ({"cohort": {"sites": ["a", ".."]}}, "'..' is no plain site name"),
        ({"classifiers": ["resnet999"]}, "classifiers.0"),
        ({"classifiers": ["resnet18", "resnet18"]}, "each classifier once"),
        ({"embedding": {"dimension": 2}, "clustering": {"clusters": 5}}, "twice embedding.dimens"),
        ({"selection": {"budgets": [0.4, 0.2]}}, "ascending"),
        ({"selection": {"budgets": [0.2, 0.2]}}, "ascending"),
        ({"selection": {"budgets": [0.0]}}, "ascending"),
        ({"selection": {"budgets": [0.2, 1.1]}}, "ascending"),
        ({"selection": {"budgets": []}}, "selection.budgets"),
        ({"clustering": {"clusters": 65}}, "clustering.clusters"),
        ({"image_size": 36}, "image_size"),
        ({"finetuning": {"learning_rate": float("nan")}}, "finetuning.learning_rate"),
        ({"reconstruction": {"init": "magic"}}, "reconstruction.init"),
        ({"name": "../x"}, "name"),
        ({"phases": ["enrol", "select"]}, "source weights"),
        ({"phases": ["enrol", "ship", "embed", "select"]}, "centroids"),
        ({"phases": ["enrol", "ship", "cluster"]}, "embeddings"),
        ({"phases": ["ship", "enrol"]}, "cohort"),
        ({"phases": ["enrol", "enrol"]}, "each phase once"),
        (
            {"phases": ["enrol", "ship", "embed"], "embedding": {"pairs": "reconstruction"}},
            "reconstructions",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(tmp_path, values, hint):
    assert hint in refused(tmp_path, **values)


def test_a_study_names_the_classifiers_that_can_be_built():
    assert set(get_args(ClassifierName)) == set(CLASSIFIERS)


@pytest.mark.parametrize("text", ["name = ", "\xff", "= 1"])
def test_what_is_no_toml_is_refused(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        read_study(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_study(tmp_path / "absent.toml")


def test_the_shortest_study_runs_every_phase(tmp_path):
    read = study(tmp_path)
    assert read.phases == ACTIVE_LEARNING
    assert read.pairs == "reconstruction" and read.cohort.smallest == 2


def test_phases_may_be_left_out(tmp_path):
    read = study(tmp_path, phases=["enrol", "ship", "embed", "cluster", "select", "annotate"])
    assert read.pairs == "augmentation"
    study(tmp_path, phases=["enrol", "ship", "select"], selection={"strategy": "random"})


def test_the_paper_preset_sets_its_values_and_yields_to_the_file(tmp_path):
    paper = study(tmp_path, preset="paper")
    for section, expected in PRESETS["paper"].items():
        assert {k: getattr(getattr(paper, section), k) for k in expected} == expected
    assert (paper.reconstruction.steps, paper.reconstruction.guidance) == (50, 9.0)
    assert (paper.selection.uncertainty, paper.finetuning.rounds) == ("range", 14)
    own = study(tmp_path, preset="paper", finetuning={"rounds": 2}, reconstruction={"steps": 5})
    assert own.finetuning.rounds == 2 and own.finetuning.local_epochs == 10
    assert own.reconstruction.steps == 5 and own.reconstruction.init == "noise"
    assert own.digest() != paper.digest() != study(tmp_path).digest()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_out_study_reads_back_with_the_same_digest(tmp_path, preset):
    read = study(tmp_path, preset=preset, selection={"omega": 0.1 + 0.2})
    assert study(tmp_path, **read.model_dump(mode="json", exclude_none=True)) == read
    assert Study.model_validate(read.model_dump(mode="json")).digest() == read.digest()


DTYPES = ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?"]
numbers = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=3))
)
names = st.text("abc/.0", min_size=1, max_size=8)
metrics = st.dictionaries(st.text(max_size=5), st.integers(-(2**60), 2**60) | st.floats())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
records = st.builds(
    Records,
    st.dictionaries(names, numbers, max_size=3),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    metrics,
)


def same(first, second):
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        other = second.arrays[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert array.tobytes() == other.tobytes()
    # repr tells NaN from a number and -0.0 from 0.0, which == does not.
    assert repr((first.config, first.metrics)) == repr((second.config, second.metrics))
    assert first.digest() == second.digest()


@given(records)
def test_the_codec_gives_back_what_it_took_and_repeats_its_bytes(given_records):
    data = to_bytes(given_records)
    same(from_bytes(data), given_records)
    assert to_bytes(from_bytes(data)) == data


@given(records)
def test_the_library_of_the_format_reads_the_same_arrays(given_records):
    data = to_bytes(given_records)
    found = load(data)
    assert found.keys() == given_records.arrays.keys()
    for name, array in given_records.arrays.items():
        assert found[name].shape == array.shape and found[name].tobytes() == array.tobytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, array in given_records.arrays.items():
        assert header[name]["data_offsets"][0] % array.dtype.itemsize == 0


def test_values_of_another_byte_order_are_the_same_numbers():
    array = np.arange(5, dtype=">i4")
    assert np.array_equal(from_bytes(to_bytes(Records({"a": array}))).arrays["a"], array)


@settings(max_examples=50)
@given(records)
def test_flower_carries_the_same_records(given_records):
    same(from_recorddict(to_recorddict(given_records)), given_records)


def test_arrays_that_are_not_contiguous_are_copied_in_order():
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    assert np.array_equal(from_bytes(to_bytes(Records({"a": array}))).arrays["a"], array)
    assert Records({"a": array}).digest() == Records({"a": array.copy()}).digest()


def test_digest_tells_name_dtype_shape_and_content_apart():
    variants = [
        {"a": np.zeros(4, "f4")},
        {"b": np.zeros(4, "f4")},
        {"a": np.zeros(4, "i4")},
        {"a": np.zeros((2, 2), "f4")},
        {"a": np.ones(4, "f4")},
        {},
    ]
    assert len({Records(v).digest() for v in variants}) == len(variants)


def test_groups_are_flat_names():
    flat = grouped("student", {"w": np.ones(1)}) | {"students/w": np.zeros(1)}
    assert list(Records(flat).group("student")) == ["w"]


@given(
    st.binary(max_size=64)
    | records.map(to_bytes).flatmap(
        lambda data: st.integers(0, len(data) - 1).map(lambda n: data[:n])
    )
)
def test_bytes_that_are_no_records_are_refused(data):
    with pytest.raises(ParameterError):
        from_bytes(data)


@given(records.map(to_bytes), st.data())
def test_a_changed_byte_is_refused_or_read_never_anything_else(data, draw):
    position = draw.draw(st.integers(0, len(data) - 1))
    changed = data[:position] + bytes([draw.draw(st.integers(0, 255))]) + data[position + 1 :]
    with contextlib.suppress(ParameterError):
        assert isinstance(from_bytes(changed), Records)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": None},
        {"__metadata__": {"records": "null"}},
        {"__metadata__": {"records": "[1]"}},
        {"__metadata__": {"records": '{"config": 1, "metrics": {}}'}},
        {"__metadata__": {"records": '{"config": {}}'}},
        {"__metadata__": {"records": DEEP}},
        [1],
    ],
)
def test_a_header_of_another_form_is_refused(header, tmp_path):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text
    with pytest.raises(ParameterError):
        from_bytes(data)
    with pytest.raises(ParameterError):
        read_config(written(tmp_path, data))


def written(folder, data):
    file = folder / "records.safetensors"
    file.write_bytes(data)
    return file


def test_the_configuration_is_read_without_the_arrays(tmp_path):
    data = to_bytes(Records({"w": np.ones(10**6)}, {"done": ["enrol"]}, {"m": 1.0}))
    # Those that are not there cannot be read.
    assert read_config(written(tmp_path, data[: -7 * 10**6])) == {"done": ["enrol"]}
    for damaged in (b"", b"\xff" * 100, data[:20]):
        with pytest.raises(ParameterError):
            read_config(written(tmp_path, damaged))


def packed(data):
    array = Array("uint8", (len(data),), "safetensors", data)
    return RecordDict({"records": ArrayRecord({"records": array})})


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY\1\0\xff\xff", b"\x80\x04N."])
def test_a_message_of_another_form_is_refused(data):
    for content in (RecordDict(), RecordDict({"records": ArrayRecord({})}), packed(data)):
        with pytest.raises(ParameterError):
            from_recorddict(content)


def test_a_message_of_much_text_is_refused_before_it_is_read():
    text = json.dumps({"config": {"lists": [[]] * (HEADER_BYTES // 4)}, "metrics": {}})
    header = json.dumps({"__metadata__": {"records": text}}).encode()
    message = packed(len(header).to_bytes(8, "little") + header)
    tracemalloc.start()
    try:
        with pytest.raises(ParameterError, match="text of the records is too long"):
            from_recorddict(message)
        assert tracemalloc.get_traced_memory()[1] < HEADER_BYTES
    finally:
        tracemalloc.stop()


def test_a_message_is_one_array_however_many_it_carries():
    whole = to_recorddict(Records({f"w{n}": np.ones(3, "f4") for n in range(300)}))
    assert [len(record) for record in whole.array_records.values()] == [1]
    assert len(whole) == 1


def test_arrays_of_text_cannot_be_sent():
    with pytest.raises(ParameterError, match="holds no numbers"):
        to_recorddict(Records({"w": np.array(["patient 7"])}))


COMMON = {"study": "trial", "seed": 0}


def test_an_action_of_no_site_is_refused():
    for action in ("query.pixels", "", "train", "x" * 1000):
        with pytest.raises(UnknownActionError) as error:
            parse(action, Records(config=COMMON))
        assert error.value.exit_code == 40 and "query.describe" in error.value.message
        assert len(error.value.message) < 500


@pytest.mark.parametrize(
    ("action", "config", "key"),
    [
        ("query.annotations", {"study": "trial"}, "seed"),
        ("query.annotations", {**COMMON, "path": "/"}, "path"),
        ("query.annotations", {"study": "../x", "seed": 0}, "study"),
        ("query.annotations", {"study": "trial", "seed": -1}, "seed"),
        ("query.histogram", {**COMMON, "column": "label", "split": 2}, "column"),
        ("query.histogram", {**COMMON, "column": "identity", "split": 2**20}, "split"),
        ("train.select", {**COMMON, "stage": "undo"}, "stage"),
        ("train.embed", COMMON, "bundle"),
    ],
)
def test_parameters_that_do_not_validate_are_refused(action, config, key):
    with pytest.raises(ParameterError) as error:
        parse(action, Records(config=config))
    assert error.value.exit_code == 41
    assert action in error.value.message and f"'{key}'" in error.value.message


POOLED = {**COMMON, "bundle": "0" * 64, "image_size": 32}
ENCODE = {
    **POOLED,
    "classifier": "resnet18",
    "pairs": "augmentation",
    "settings": {},
    "reconstruction": {},
}
MASKS = {**POOLED, "branches": ["source"]}


@pytest.mark.parametrize(
    ("action", "config", "read", "unread"),
    [
        ("train.embed", {**ENCODE, "round": 1}, ["student/w", "predictor/w"], []),
        ("train.embed", {**ENCODE, "round": 1}, [], ["predictor/w"]),
        ("query.cluster", ENCODE, ["student/w"], []),
        ("query.cluster", ENCODE, ["centroids"], ["student/w"]),
        ("train.score", {**ENCODE, "selection": {}}, ["centroids"], []),
        ("train.score", {**ENCODE, "selection": {"strategy": "random"}}, [], ["centroids"]),
        ("train.score", {**ENCODE, "selection": {"strategy": "entropy"}}, [], ["centroids"]),
        ("train.score", {**ENCODE, "selection": {"strategy": "typiclust"}}, [], ["centroids"]),
        ("train.select", {**COMMON, "stage": "rank"}, ["ranks/u/starts"], ["cuts"]),
        ("train.select", {**COMMON, "stage": "mark"}, ["cuts"], ["ranks/u/starts"]),
        ("evaluate.segmenter", {**MASKS, "infusion": {"rule": "gate"}}, ["gate/w"], []),
        ("evaluate.segmenter", {**MASKS, "infusion": {}}, ["temperatures"], ["gate/w"]),
    ],
)
def test_an_array_that_nobody_reads_makes_no_new_question(action, config, read, unread):
    arrays = {name: np.zeros(1) for name in read}
    assert parse(action, Records(arrays, config)).study == "trial"
    for name in unread:
        with pytest.raises(ParameterError, match="does not take"):
            parse(action, Records({**arrays, name: np.zeros(1)}, config))


def test_a_request_is_parsed_to_the_parameters_it_was_made_of():
    for action, parameters, sent in (
        ("query.annotations", Annotations(**COMMON), {}),
        (
            "query.histogram",
            Histogram(**COMMON, column="identity", split=4, tied=2**64 - 1),
            {"edges": np.zeros((1, 2))},
        ),
        (
            "evaluate.classifier",
            EvaluateClassifier(
                **COMMON, bundle="0" * 64, image_size=32, classifier="x", batch_norm="site"
            ),
            {"weights/w": np.ones(2)},
        ),
    ):
        message = request(parameters, **sent)
        carried = from_bytes(to_bytes(message))
        assert parse(action, carried) == parameters
        assert carried.arrays.keys() == sent.keys()


def test_an_array_that_the_action_does_not_take_is_refused():
    message = request(Annotations(**COMMON), weights={"w": np.ones(2)})
    with pytest.raises(ParameterError, match="takes none"):
        parse("query.annotations", message)


def test_every_action_forbids_what_it_does_not_know():
    assert {category for category, _, _ in (a.partition(".") for a in ACTIONS)} == {
        "query",
        "train",
        "evaluate",
    }
    for action in ACTIONS:
        with pytest.raises(ParameterError):
            parse(action, Records(config={**COMMON, "shell": "ls"}))


def test_codes_and_exit_codes_are_unique():
    assert len({error.exit_code for error in CATALOGUE.values()}) == len(CATALOGUE)
    assert all(code == error.code for code, error in CATALOGUE.items())
    assert all(0 < error.exit_code < 126 for error in CATALOGUE.values())
    assert set(SonoFedError.__subclasses__()) <= set(CATALOGUE.values())


@pytest.mark.parametrize("code", CATALOGUE)
def test_an_error_crosses_a_border(code):
    error = error_from_code(code, "what, where")
    assert type(error) is CATALOGUE[code]
    assert (error.message, str(error)) == ("what, where", f"what, where [{code}]")


def test_an_unknown_code_gives_the_base_class():
    assert type(error_from_code("from-the-future", "what")) is SonoFedError


def test_a_key_from_the_wire_is_cut_and_escaped():
    with pytest.raises(ParameterError) as error:
        parse("query.annotations", Records(config={"study": "t", "seed": 0, "a\n" + "b" * 200: 1}))
    assert "unknown key 'a\\nbbb" in error.value.message and "\n" not in error.value.message
    assert "b" * 62 in error.value.message and "b" * 63 not in error.value.message


def test_a_round_beyond_the_study_and_a_digest_that_is_none_are_refused():
    common = {"study": "trial", "seed": 0}
    pooled = {**common, "bundle": "0" * 64, "image_size": 32, "classifier": "resnet18"}
    embed = {**pooled, "pairs": "augmentation", "reconstruction": Reconstruction()}
    for make in (
        lambda number: Embed(**embed, settings=Embedding(rounds=2), round=number),
        lambda number: TrainClassifier(
            **pooled, settings=Finetuning(rounds=2), budget=0, round=number
        ),
    ):
        assert make(1).round == 1
        with pytest.raises(ValueError, match="round 2 is not one of the study's 2"):
            make(2)
    with pytest.raises(ValueError, match="study_digest"):
        Describe(**common, study_digest="/etc/passwd")
