"""Redaction: secrets go, everything else stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.errors import UserError, is_secret_name, redact, redact_values

NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "HF_TOKEN",
    "hub.token",
    "PGPASSWORD",
    "db_password",
    "apiKey",
]
PLAIN = ["optimizer.learning_rate", "tokenizer", "max_tokens", "PWD", "model.monkey", "tracking.uri", "keyboard"]
secrets = st.text(st.characters(min_codepoint=48, max_codepoint=122, categories=("Lu", "Ll", "Nd")), min_size=12)


@pytest.mark.parametrize("name", NAMES)
@given(secret=secrets)
def test_a_value_under_a_secret_name_is_hidden(name, secret):
    for text in (f"{name}={secret} x", f'{{"{name}": "{secret}"}}', f"{name}: {secret}"):
        assert secret not in redact(text)
    assert redact_values({name: secret}) == {name: "***"}


@given(
    user=st.sampled_from(["", "me"]), secret=secrets, scheme=st.sampled_from(["http", "postgresql+psycopg2", "s3"])
)
def test_the_password_of_a_uri_is_hidden(user, secret, scheme):
    assert redact(f"cannot reach {scheme}://{user}:{secret}@host:5000/x?y=1") == (
        f"cannot reach {scheme}://***@host:5000/x?y=1"
    )


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_names_stay(name):
    assert not is_secret_name(name)
    assert redact(f"{name}=0.1, val/accuracy: 0.99") == f"{name}=0.1, val/accuracy: 0.99"


@given(st.text(st.characters(exclude_characters="=:@"), max_size=60))
def test_redacting_twice_changes_nothing(text):
    assert redact(redact(text)) == redact(text)


def test_values_keep_their_types():
    given = {"a": 1, "b": None, "c": [1, "x"], "d": True, "empty_token": "", "e": 0.5}
    assert redact_values(given) == given


def test_an_error_never_shows_a_secret():
    assert str(UserError("cannot open https://me:hunter2hunter2@host/")) == "cannot open https://***@host/"
