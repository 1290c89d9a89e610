"""Forecast: what a study will ask of a site, and what of it the site's policy would refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sonofed_client.enclave.labelling import most_marked
from sonofed_client.enclave.ledger import payload
from sonofed_client.enclave.policy import Policy, policy_of_all
from sonofed_client.enclave.questions import ANY_BUNDLE, Question, questions
from sonofed_client.enclave.release import release
from sonofed_client.enclave.rules import ActionRule, ArrayRule, Kind
from sonofed_common.contract import actions
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.errors import PolicyError
from sonofed_common.contract.names import (
    BUFFERS,
    CLASSES,
    DECLINABLE,
    RECEIVED_LOSS,
    TRAINED_LOSS,
)
from sonofed_common.contract.records import Array, Json, Records, grouped, is_named
from sonofed_common.contract.study import Study

if TYPE_CHECKING:
    from torch import nn

Rounded = actions.Embed | actions.TrainClassifier | actions.Pretrain | actions.TrainSegmenter
GOES_ON = "the policy would refuse this, and the site would take part all the same"
MANY = 10**6
_SAMPLES: Mapping[Kind, Json] = {
    "count": MANY,
    "counts": [MANY],
    "digest": ANY_BUNDLE,
    "digests": [ANY_BUNDLE],
    "text": "any",
    "texts": {"any": "any"},
}


def refusals(study: Study, policy: Policy) -> list[str]:
    """Return, in words, what a policy would refuse of a study; empty where nothing is known.

    Replies are made up as `policy_of_all` describes them, which names all that actions answer; a
    study's classifiers, embeddings and clusters have their true size, in requests too. Counts of
    a small site and segmenters, whose size is known once their bundle is here, may still be
    refused.
    """
    found: dict[str, None] = {}
    total, asked = 0, Counter[str]()
    for question in questions(study):
        try:
            size = _bytes_of(question, study, policy)
        except PolicyError as error:
            if question.action not in DECLINABLE:
                found[_told(question, error)] = None
            continue
        total += size
        asked[question.action] += question.times or 1
    largest, marking = study.selection.budgets[-1], policy.actions.get("train.select")
    if "select" in study.phases and marking and largest > marking.marked_share:
        found[
            f"train.select: labels of {largest:.0%} of the pool are asked for, above "
            f"marked_share = {marking.marked_share:g}"
        ] = None
    for action, times in asked.items():
        most = policy.actions[action].releases
        if most is not None and times > most and action not in DECLINABLE:
            found[f"{action}: asked {times} times, above releases = {most}"] = None
    for name, most in (("study_bytes", policy.study_bytes), ("day_bytes", policy.day_bytes)):
        if total > most:
            within = " if all of it were within a day" * (name == "day_bytes")
            found[f"{total} bytes or more would leave, above {name} = {most}{within}"] = None
    return list(found)


def declines(study: Study, policy: Policy) -> list[str]:
    """Return, in words, what a policy would refuse of a study that goes on without it."""
    found = []
    for question in questions(study):
        if question.action in DECLINABLE:
            try:
                _bytes_of(question, study, policy)
            except PolicyError as error:
                found.append(_told(question, error))
    return found


def _bytes_of(question: Question, study: Study, policy: Policy) -> int:
    """How many bytes would leave, where the policy lets all of it happen."""
    brought = Records(_brought(question.parameters, study))
    for parameters in _asked(question):
        policy.admit(parameters, question.action, brought)
    return sum(
        times * _size(policy, question.action, reply) for times, reply in _replies(question, study)
    )


def _told(question: Question, error: PolicyError) -> str:
    return f"{question.action}: {error.message} (rule {error.rule})"


def asks(study: Study, policy: Policy, pool: int) -> list[str]:
    """Return, in words, what a study asks of a site of so many images and what of it leaves."""
    budgets = ", ".join(f"{share:.0%}" for share in study.selection.budgets)
    lines = [f"phases: {', '.join(study.phases)}"]
    if "annotate" in study.phases:
        lines.append(f"labels asked of the experts: {budgets} of the pool")
    if "select" in study.phases and (marking := policy.actions.get("train.select")):
        most = most_marked(study.selection, marking.marked_share, pool)
        lines.append(
            f"images to label at most, whatever the coordinator asks: {most} of this site's {pool}"
        )
    lines.append("what leaves, and how often at most where that is known:")
    asked: dict[str, list[int | None]] = {}
    for question in questions(study):
        asked.setdefault(question.action, []).append(question.times)
    for action, times in asked.items():
        rule, total = policy.actions.get(action), sum(number or 0 for number in times)
        often = "" if None in times else f" ({total} time{'s' * (total > 1)})"
        lines.append(f"- {action}{often}: {_leaves(rule) if rule else 'refused'}")
    found = refusals(study, policy)
    lines += ["the policy would refuse:", *(f"- {line}" for line in found)] if found else []
    spared = declines(study, policy)
    lines += [f"{GOES_ON}:", *(f"- {line}" for line in spared)] if spared else []
    return lines


def explain(policy: Policy) -> list[str]:
    """Return, in words, what a policy lets in and out."""
    lines = [
        f"policy '{policy.name}', digest {policy.digest()}",
        f"coordinators: {', '.join(policy.coordinators) or 'the one of the site settings'}",
        f"a request may bring {policy.received_bytes} bytes, a reply {policy.message_bytes}",
        f"a study may take {policy.study_bytes} bytes away, all studies {policy.day_bytes} a day",
        "these actions are done, and this may leave; nothing else:",
    ]
    for action, rule in policy.actions.items():
        lines.append(f"- {action}: {_leaves(rule)}")
        for path, limit in rule.parameters.items():
            words = [f"at least {limit.least:g}"] if limit.least is not None else []
            words += [f"at most {limit.most:g}"] if limit.most is not None else []
            words += [f"one of {', '.join(map(str, limit.values))}"] if limit.values else []
            lines.append(f"    only with {path} {' and '.join(words)}")
    refused = [action for action in actions.ACTIONS if action not in policy.actions]
    lines.append(f"refused: {', '.join(refused) or 'no action that this version knows'}")
    return lines


def _leaves(rule: ActionRule) -> str:
    parts = [_array(array, rule.min_count) for array in rule.arrays]
    if rule.marked_share < 1:
        parts.append(f"marks at most {rule.marked_share:.0%} of the pool for a study")
    facts = [f"{name} ({kind})" for name, kind in rule.config.items()]
    facts += [f"{name} (count)" for name in rule.counted]
    parts += [f"facts {', '.join(facts)}"] if facts else []
    parts += [f"metrics {', '.join(rule.metrics)}"] if rule.metrics else []
    if rule.min_count > 1:
        parts.append(f"no count from 1 to {rule.min_count - 1}")
    if rule.releases is not None:
        parts.append(f"at most {rule.releases} replies with noise for a study")
    if rule.secure_aggregation:
        parts.append("by secure aggregation only")
    if rule.message_bytes is not None:
        parts.append(f"at most {rule.message_bytes} bytes")
    return "; ".join(parts) or "an empty answer"


def _array(rule: ArrayRule, least: int) -> str:
    text = f"{rule.key} ({' or '.join(rule.dtypes)}, at most {rule.numbers} numbers"
    if rule.clip is not None:
        text += f", change clipped to {rule.clip:g}, noise {rule.noise or 0:g} times that"
    if rule.counts and rule.small == "zero" and least > 1:
        text += ", small counts set to zero"
    return text + ")"


def _asked(question: Question) -> Iterator[Parameters]:
    """Yield a question's parameters, with each value that a coordinator may choose of a few."""
    parameters = question.parameters
    yield parameters
    if isinstance(parameters, Rounded):
        yield parameters.model_copy(update={"round": parameters.settings.rounds - 1})
    for name, choice in question.choices.items():
        listed = isinstance(getattr(parameters, name), tuple)
        for value in choice or ():
            yield parameters.model_copy(update={name: (value,) if listed else value})


def _size(policy: Policy, action: str, reply: Records) -> int:
    """Bytes of what a policy lets out of a reply."""
    released = release(policy, action, reply, reply.arrays.copy)
    size, _ = payload(released.records)
    policy.check_bytes(action, size, 0, 0)
    return size


def _replies(question: Question, study: Study) -> Iterator[tuple[int, Records]]:
    """Make up all that an action may answer, and how often it does."""
    times, parameters = question.times or 1, question.parameters
    reply = _sample(question.action)
    if isinstance(parameters, actions.Cluster):
        clusters, dimension = study.clustering.clusters, parameters.settings.dimension
        moments = {"sum": np.zeros(dimension), "second": np.zeros((dimension, dimension))}
        sums = {"sums": np.zeros((clusters, dimension)), "counts": np.full(clusters, MANY)}
        yield 1, Records(moments, reply.config, reply.metrics)
        yield times - 1, Records(sums)
    elif isinstance(parameters, actions.TrainClassifier | actions.Embed):
        unasked = () if _strategy(parameters) == "feddg_ga" else (RECEIVED_LOSS, TRAINED_LOSS)
        metrics = {name: value for name, value in reply.metrics.items() if name not in unasked}
        yield times, Records(_network(parameters), reply.config, metrics)
    elif isinstance(parameters, actions.Synthesise):
        count, size = len(CLASSES) * study.synthesis.per_class, study.synthesis.image_size
        images = np.zeros((count, size, size), dtype=np.uint8)
        labels = np.zeros(count, dtype=np.int64)
        yield times, Records({"images": images, "labels": labels}, reply.config)
    else:
        yield times, reply


def _sample(action: str) -> Records:
    """Make up a reply of all that the widest policy names."""
    rule = policy_of_all().actions[action]
    # The exact selection asks until a bin holds one image.
    count = 1 if action == "query.histogram" else MANY
    arrays: dict[str, Array] = {}
    for own in rule.arrays:
        name = own.key.replace("*", "any")
        arrays[name] = np.full(1, count if own.counts else 0, dtype=own.dtypes[0])
    config = {name: _SAMPLES[kind] for name, kind in rule.config.items()}
    metrics = dict.fromkeys(rule.metrics, 0.5) | dict.fromkeys(rule.counted, MANY)
    return Records(arrays, config, metrics)


def _brought(parameters: Parameters, study: Study) -> dict[str, Array]:
    """Make up the arrays of the largest request, where the study says how large they are."""
    if isinstance(parameters, actions.Score) and study.selection.strategy == "dual_score":
        return {"centroids": np.zeros((study.clustering.clusters, parameters.settings.dimension))}
    if isinstance(parameters, actions.Cluster):
        return {n: a for n, a in _network(parameters).items() if is_named(n, "student/*")}
    if isinstance(parameters, actions.EvaluateClassifier):
        return _network(parameters)
    if isinstance(parameters, actions.TrainClassifier | actions.Embed):
        # First rounds start from what every site has.
        return _network(parameters) if parameters.settings.rounds > 1 else {}
    return {}


def _network(
    parameters: actions.TrainClassifier | actions.EvaluateClassifier | actions.Encode,
) -> dict[str, Array]:
    """Weights as they travel: of a classifier, or of the student and predictor made from one."""
    if isinstance(parameters, actions.Encode):
        return _weights(parameters.classifier, parameters.settings.dimension)
    arrays = _weights(parameters.classifier, None)
    if _strategy(parameters) == "scaffold":
        trained = {n: a for n, a in arrays.items() if not n.endswith(BUFFERS)}
        return arrays | grouped("control", Records(trained).group("weights"))
    return arrays


def _strategy(parameters: Parameters) -> str:
    if isinstance(parameters, actions.TrainClassifier):
        return parameters.aggregation.strategy
    return "fedavg"


@lru_cache(maxsize=2)
def _weights(classifier: str, dimension: int | None) -> dict[str, Array]:
    from sonofed_common.models.classifiers import build_classifier
    from sonofed_common.models.encoder import HypersphereEncoder, Predictor

    backbone = build_classifier(classifier, pretrained=False)
    networks: dict[str, nn.Module] = {"weights": backbone}
    if dimension is not None:
        networks = {
            "student": HypersphereEncoder(backbone, dimension, 0),
            "predictor": Predictor(dimension, 0),
        }
    arrays: dict[str, Array] = {}
    for group, network in networks.items():
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        arrays |= grouped(group, state)
    return arrays
