from __future__ import annotations

import pytest
import zmq

from curve_kernel import keys
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.keys.source import SECRETKEY_VARIABLE, EnvironmentSecret


def test_rfc_test_vector():
    # Bob's and Alice's pairs from https://rfc.zeromq.org/spec/26/ and libzmq's test_security_curve.
    secret = keys.parse("JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6", "x")
    assert KeyPair.from_secret(secret).public_key == b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def test_generated_pairs_are_pairs_and_differ():
    pairs = [KeyPair.generate() for _ in range(20)]
    assert len({pair.secret_key for pair in pairs}) == 20
    assert all(KeyPair.from_secret(pair.secret_key) == pair for pair in pairs)


def test_no_form_of_a_pair_shows_its_secret():
    pair = KeyPair.generate()
    secret = pair.secret_key.decode()
    for text in (repr(pair), str(pair), f"{pair}", f"{[pair]}", f"{pair!a}"):
        assert secret not in text
        assert pair.public_key.decode() in text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "null"),
        (7, "type int"),
        ([], "type list"),
        ({"a": 1}, "type dict"),
        (True, "type bool"),
        ("", "0 characters"),
        ("a" * 39, "39 characters"),
        ("a" * 41, "41 characters"),
        ("a" * 39 + "~", "Z85"),
        ("a" * 39 + " ", "Z85"),
        ("a" * 39 + "\n", "Z85"),
        ("é" + "a" * 39, "Z85"),
        ("\udcff" + "a" * 39, "Z85"),
        ("#####" + "0" * 35, "Z85"),
        (b"\xff" * 40, "Z85"),
    ],
)
def test_what_is_no_key_is_refused_by_name_and_not_repeated(value, says):
    with pytest.raises(CurveKernelError) as caught:
        keys.parse(value, "the thing")
    assert caught.value.message.startswith("the thing ")
    assert says in caught.value.message
    assert "40 characters of Z85" in caught.value.hint
    if isinstance(value, str) and len(value) > 10:
        assert value not in str(caught.value)


def test_parse_agrees_with_libzmq_on_the_largest_group():
    # "%nSc0" is 2**32 - 1 in Z85, "%nSc1" overflows; libzmq sets an error for the latter.
    assert keys.parse("%nSc0" * 8, "x")
    with pytest.raises(CurveKernelError):
        keys.parse("%nSc1" * 8, "x")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.curve_serverkey = b"%nSc0" * 8
        with pytest.raises(zmq.ZMQError):
            socket.curve_serverkey = b"%nSc1" * 8


def test_the_environment_is_emptied_and_its_repr_is_mute(monkeypatch):
    pair = KeyPair.generate()
    monkeypatch.setenv(SECRETKEY_VARIABLE, pair.secret_key.decode())
    secret = EnvironmentSecret()
    assert SECRETKEY_VARIABLE not in __import__("os").environ
    assert pair.secret_key.decode() not in repr(secret)
    assert secret.pair() == (pair, "$JUPYTER_CURVE_SECRETKEY")
    assert EnvironmentSecret().pair() is None
