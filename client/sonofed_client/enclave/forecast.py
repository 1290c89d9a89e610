"""Forecast: what a study will ask of a site, and what of it the site's policy would refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sonofed_client.enclave.ledger import payload
from sonofed_client.enclave.policy import Policy, read_policy
from sonofed_client.enclave.questions import ANY_BUNDLE, Question, questions
from sonofed_client.enclave.release import release
from sonofed_client.enclave.rules import ActionRule, ArrayRule, Kind
from sonofed_common.contract import actions
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.errors import PolicyError
from sonofed_common.contract.records import Array, Json, Records, grouped
from sonofed_common.contract.study import Study

if TYPE_CHECKING:
    from torch import nn

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

    Replies are made up as the standard policy describes them, which names all that actions answer;
    a study's classifiers have their true size. Counts of a small site and segmenters, whose size is
    known once their bundle is here, may still be refused.
    """
    found: dict[str, None] = {}
    total, asked = 0, Counter[str]()
    for question in questions(study):
        try:
            policy.admit(question.parameters, question.action, Records())
            reply = _sample(question, study)
            released = release(policy, question.action, reply, reply.arrays.copy)
            size, _ = payload(released.records)
            policy.check_bytes(question.action, size, 0, 0)
        except PolicyError as error:
            found[f"{question.action}: {error.message} (rule {error.rule})"] = None
            continue
        total += size * (question.times or 1)
        asked[question.action] += question.times or 1
    for action, times in asked.items():
        most = policy.actions[action].releases
        if most is not None and times > most:
            found[f"{action}: asked {times} times, above releases = {most}"] = None
    if total > policy.study_bytes:
        found[f"{total} bytes or more would leave, above study_bytes = {policy.study_bytes}"] = None
    return list(found)


def asks(study: Study, policy: Policy) -> list[str]:
    """Return, in words, what a study asks of a site and what of it leaves under a policy."""
    budgets = ", ".join(f"{share:.0%}" for share in study.selection.budgets)
    lines = [f"phases: {', '.join(study.phases)}"]
    if "annotate" in study.phases:
        lines.append(f"labels asked of the experts: {budgets} of the pool")
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


def _sample(question: Question, study: Study) -> Records:
    """Make up a reply of all that an action may answer."""
    rule = read_policy(None).actions[question.action]
    # The exact selection asks until a bin holds one image.
    count = 1 if question.action == "query.histogram" else MANY
    arrays: dict[str, Array] = {}
    for own in rule.arrays:
        name = own.key.replace("*", "any")
        arrays[name] = np.full(1, count if own.counts else 0, dtype=own.dtypes[0])
    arrays = _weights(question.parameters) or arrays
    config = {name: _SAMPLES[kind] for name, kind in rule.config.items()}
    metrics = dict.fromkeys(rule.metrics, 0.5) | dict.fromkeys(rule.counted, MANY)
    return Records(arrays, config, metrics)


def _weights(parameters: Parameters) -> dict[str, Array]:
    """Weights of the size that a reply has, where the study says which network it is."""
    if not isinstance(parameters, actions.TrainClassifier | actions.Embed):
        return {}
    from sonofed_common.models.classifiers import build_classifier
    from sonofed_common.models.encoder import HypersphereEncoder, Predictor

    backbone = build_classifier(parameters.classifier, pretrained=False)
    networks: dict[str, nn.Module] = {"weights": backbone}
    if isinstance(parameters, actions.Embed):
        dimension = parameters.settings.dimension
        networks = {
            "student": HypersphereEncoder(backbone, dimension, 0),
            "predictor": Predictor(dimension, 0),
        }
    arrays: dict[str, Array] = {}
    for group, network in networks.items():
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        arrays |= grouped(group, state)
    return arrays
