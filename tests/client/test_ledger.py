import json
import random
import sqlite3
import time

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.ledger import Ledger, payload
from sonofed_client.enclave.sent_bytes import DAY_SECONDS
from sonofed_client.enclave.verification import check
from sonofed_common.contract.errors import LedgerError
from sonofed_common.contract.records import Records
from sonofed_common.security import sha256

KEY = Ed25519PrivateKey.generate()
ENTRIES = 6


def entry(number, outcome="sent", study="trial"):
    return Entry(
        outcome=outcome, study=study, action="train.classifier", bytes=number, round=number
    )


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path, KEY)
    for number in range(ENTRIES):
        ledger.append(entry(number))
    return ledger


def spoil(folder, *statements):
    """Change the table as somebody would who can write the file."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.execute("DROP TRIGGER no_update")
    connection.execute("DROP TRIGGER no_delete")
    for statement in statements:
        connection.execute(*statement)
    connection.commit()
    connection.close()


def rows(folder):
    connection = sqlite3.connect(folder / "ledger.sqlite")
    found = connection.execute("SELECT * FROM entries ORDER BY number").fetchall()
    connection.close()
    return found


def test_a_ledger_that_cannot_be_used_names_no_file(ledger, tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no table" * 600)
    with pytest.raises(LedgerError, match=r"cannot be used \(SQLITE_NOTADB\)"):
        ledger.append(entry(7))


def test_a_sound_ledger_is_verified_and_goes_on_after_it_is_opened_again(ledger, tmp_path):
    assert ledger.verify() == ENTRIES
    again = Ledger(tmp_path, KEY)
    assert again.append(entry(7)) == ENTRIES + 1 == again.verify() == ledger.verify()
    assert [e["round"] for e in again.entries()] == [*range(ENTRIES), 7]
    assert Ledger(tmp_path, KEY).verify() == ENTRIES + 1


def test_an_empty_ledger_is_sound(tmp_path):
    assert Ledger(tmp_path, KEY).verify() == 0


def test_the_table_takes_no_change(ledger, tmp_path):
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    for statement in ("DELETE FROM entries", "UPDATE entries SET hash = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)


@pytest.mark.parametrize("number", [1, 3, ENTRIES])
def test_an_edit_is_named(ledger, tmp_path, number):
    body = json.loads(rows(tmp_path)[number - 1][1])
    changed = json.dumps(body | {"bytes": 10**6}, sort_keys=True)
    update = "UPDATE entries SET body = ?, hash = ? WHERE number = ?"
    spoil(tmp_path, (update, (changed, sha256(changed.encode()), number)))
    with pytest.raises(LedgerError, match=f"entry {number} .*edited"):
        ledger.verify()


def test_an_edit_that_leaves_the_hash_is_named(ledger, tmp_path):
    spoil(tmp_path, ("UPDATE entries SET body = 'no json' WHERE number = 2",))
    for opened in (ledger, Ledger(tmp_path, KEY)):
        with pytest.raises(LedgerError, match=r"entry 2 .*edited"):
            opened.verify()
        with pytest.raises(LedgerError, match="unreadable"):
            opened.entries()


@pytest.mark.parametrize("edit", ["upper(signature)", "' ' || signature", "signature || char(10)"])
def test_an_edit_of_a_signature_is_named_also_where_it_reads_the_same(ledger, tmp_path, edit):
    spoil(tmp_path, (f"UPDATE entries SET signature = {edit} WHERE number = 2",))
    with pytest.raises(LedgerError, match=r"entry 2 .*edited"):
        ledger.verify()


@pytest.mark.parametrize("number", [1, 4])
def test_a_deletion_is_named(ledger, tmp_path, number):
    spoil(tmp_path, ("DELETE FROM entries WHERE number = ?", (number,)))
    with pytest.raises(LedgerError, match=f"entry {number} .*deleted"):
        ledger.verify()


def test_a_deletion_with_new_numbers_is_named(ledger, tmp_path):
    renumber = "UPDATE entries SET number = number - 1 WHERE number = ?"
    later = [(renumber, (n,)) for n in range(4, ENTRIES + 1)]
    spoil(tmp_path, ("DELETE FROM entries WHERE number = 3",), *later)
    with pytest.raises(LedgerError, match=r"entry 3 .*not in its place.*as 4"):
        ledger.verify()


def test_a_move_is_named(ledger, tmp_path):
    move = "UPDATE entries SET number = ? WHERE number = ?"
    spoil(tmp_path, (move, (99, 2)), (move, (2, 3)), (move, (3, 99)))
    with pytest.raises(LedgerError, match=r"entry 2 .*not in its place.*as 3"):
        ledger.verify()


@pytest.mark.parametrize("left", [0, 1, ENTRIES - 1])
def test_a_cut_is_named_and_nothing_is_added_to_it(ledger, tmp_path, left):
    spoil(tmp_path, ("DELETE FROM entries WHERE number > ?", (left,)))
    with pytest.raises(LedgerError, match=f"entry {left + 1} .*cut off"):
        ledger.verify()
    for opened in (ledger, Ledger(tmp_path, KEY)):
        with pytest.raises(LedgerError, match="verify"):
            opened.append(entry(0))


def test_a_head_of_before_the_cut_does_not_fit_what_was_added_after_it(ledger, tmp_path):
    old = (tmp_path / "ledger.head").read_bytes()
    ledger.append(entry(9))
    (tmp_path / "ledger.head").write_bytes(old)
    assert ledger.verify() == ENTRIES + 1
    assert ledger.append(entry(10)) == ENTRIES + 2 == ledger.verify()


def test_a_head_that_is_gone_or_of_another_key_is_noticed(ledger, tmp_path):
    head = tmp_path / "ledger.head"
    values = json.loads(head.read_bytes())
    head.write_text(json.dumps(values | {"entries": 1, "hash": rows(tmp_path)[0][2]}))
    with pytest.raises(LedgerError, match="head was edited"):
        ledger.verify()
    for spoilt in ("{", "[1]", "5"):
        head.write_text(spoilt)
        with pytest.raises(LedgerError, match="unreadable"):
            ledger.append(entry(0))
    head.unlink()
    for opened in (ledger, Ledger(tmp_path, KEY)):
        with pytest.raises(LedgerError, match="no head"):
            opened.verify()
        with pytest.raises(LedgerError, match="no head"):
            opened.append(entry(0))


def test_an_entry_of_another_key_is_noticed(ledger, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    stranger = Ledger(other, Ed25519PrivateKey.generate())
    stranger.append(entry(0))
    row = rows(other)[0]
    update = "UPDATE entries SET body = ?, hash = ?, signature = ? WHERE number = 1"
    spoil(tmp_path, (update, row[1:]))
    with pytest.raises(LedgerError, match=r"entry 1 .*edited"):
        ledger.verify()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(folder, KEY)
    for number in range(ENTRIES):
        ledger.append(entry(number))
    return rows(folder), json.loads((folder / "ledger.head").read_bytes())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.lists(st.integers(0, ENTRIES - 1), max_size=ENTRIES + 2), renumbered=st.booleans())
def test_nothing_but_the_whole_ledger_in_its_order_is_sound(kept, order, renumbered):
    written, head = kept
    chosen = [written[n] for n in order]
    if renumbered:
        chosen = [(place, *row[1:]) for place, row in enumerate(chosen, start=1)]
    public_key = KEY.public_key().public_bytes_raw().hex()
    if order == list(range(ENTRIES)):
        assert check(chosen, head, public_key) == ENTRIES
    else:
        with pytest.raises(LedgerError, match=r"entry \d+ of the ledger"):
            check(chosen, head, public_key)


def test_totals_count_what_was_sent(ledger):
    ledger.append(entry(1000, "refused"))
    ledger.append(entry(500, study="other"))
    assert ledger.sent_bytes("trial") == sum(range(ENTRIES))
    assert ledger.sent_bytes("other") == 500 and ledger.sent_bytes("none") == 0
    assert ledger.sent_bytes() == sum(range(ENTRIES)) + 500


def test_totals_are_those_of_a_full_scan(tmp_path, monkeypatch):
    dice, clock = random.Random(0), [time.time()]
    monkeypatch.setattr("time.time", lambda: clock[0])
    ledgers = [Ledger(tmp_path, KEY), Ledger(tmp_path, KEY)]

    def scan(holds):
        found = ledgers[0].entries()
        return sum(e["bytes"] for e in found if e["outcome"] == "sent" and holds(e))

    for _ in range(40):
        clock[0] += dice.choice((0, 1, 3600, 20000))
        outcome, study = dice.choice(("sent", "sent", "refused")), dice.choice("abc")
        dice.choice(ledgers).append(entry(dice.randrange(10**6), outcome, study))
        for ledger in [*ledgers, Ledger(tmp_path, KEY)]:
            assert ledger.sent_bytes() == scan(lambda e: e["time"] >= clock[0] - DAY_SECONDS)
            assert ledger.sent_bytes(study) == scan(lambda e, study=study: e["study"] == study)


def test_totals_read_each_entry_once(ledger, tmp_path):
    assert ledger.sent_bytes() == sum(range(ENTRIES))
    spoil(tmp_path, ("UPDATE entries SET body = 'no json' WHERE number = 2",))
    ledger.append(entry(100))
    assert ledger.sent_bytes() == ledger.sent_bytes("trial") == sum(range(ENTRIES)) + 100
    with pytest.raises(LedgerError, match=r"entry 2 .*unreadable"):
        Ledger(tmp_path, KEY).sent_bytes()


def test_an_export_can_be_checked_without_the_site(ledger, tmp_path):
    out = tmp_path / "out.jsonl"
    assert ledger.export(out) == ENTRIES
    first, *lines = map(json.loads, out.read_text().splitlines())
    found = [(e["number"], e["body"], e["hash"], e["signature"]) for e in lines]
    assert check(found, first["head"], first["public_key"]) == ENTRIES


def test_the_payload_depends_on_all_that_leaves():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = Records({"a": array}, {"n": 1}, {"loss": 0.5})
    others = [
        Records({"b": array}, {"n": 1}, {"loss": 0.5}),
        Records({"a": array.reshape(3, 2)}, {"n": 1}, {"loss": 0.5}),
        Records({"a": array.astype(np.float64)}, {"n": 1}, {"loss": 0.5}),
        Records({"a": array + 1}, {"n": 1}, {"loss": 0.5}),
        Records({"a": array}, {"n": 2}, {"loss": 0.5}),
        Records({"a": array}, {"n": 1}, {"loss": 0.25}),
    ]
    assert len({payload(r)[1] for r in [base, *others]}) == len(others) + 1
    assert payload(base) == payload(
        Records({"a": np.asfortranarray(array)}, {"n": 1}, {"loss": 0.5})
    )
    size, _ = payload(Records({"a": np.zeros((0, 2)), "b": np.array(1)}, {}, {"x": float("nan")}))
    assert size >= 8
