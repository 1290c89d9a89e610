"""Policies of one rule, and the studies that are held to them."""

import numpy as np
from hypothesis import strategies as st

from sonofed_client.enclave.policy import Policy, read_policy
from sonofed_common.contract.study import ACTIVE_LEARNING, Study

STANDARD = read_policy(None)
COMMON = {"study": "trial", "seed": 3}
LIMITS = {
    "name": "test",
    "received_bytes": 10**6,
    "message_bytes": 10**6,
    "study_bytes": 10**6,
    "day_bytes": 10**6,
}
WEIGHTS = {"key": "weights/*", "dtypes": ["float32", "int64"], "numbers": 10}
SMALL = {"key": "counts", "dtypes": ["int64"], "numbers": 9, "counts": True, "small": "zero"}


def policy(action="train.classifier", limits=LIMITS, **rule):
    return Policy.model_validate({**limits, "actions": {action: rule}})


def study(**values):
    values = {"phases": ACTIVE_LEARNING, "classifiers": (), **values}
    if "classifier" in values["phases"]:
        values["classifiers"] = ("shufflenet_v2",)
    return Study(name="trial", seed=3, cohort={"sites": ["north", "south"]}, **values)


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
)
arrays = st.builds(
    lambda dtype, shape: np.ones(shape, dtype=dtype),
    st.sampled_from(["float32", "int64", "float64", "uint8", "bool", "float16"]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)
