"""Errors for mistakes of the user: message and hint, together and apart."""

from __future__ import annotations

import copy
import pickle

import pytest

from foredraft.core.errors import ModelError, UserError, UserTypeError, told, unknown_name
from foredraft.kernels.sets import SetError


@pytest.mark.parametrize(("kind", "base"), [(UserError, ValueError), (UserTypeError, TypeError), (ModelError, UserError)])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies_keep_both_parts(kind, base, duplicate):
    error = duplicate(kind("width is 0; it counts from 1", "give 1 (--width 1). Or leave it out"))
    assert type(error) is kind and isinstance(error, base)
    assert str(error) == "width is 0; it counts from 1. Give 1 (--width 1). Or leave it out"
    assert told(error) == ("width is 0; it counts from 1", "give 1 (--width 1). Or leave it out")


def test_an_error_without_a_hint():
    error = UserError("width is 0")
    assert (str(error), error.message, error.hint, told(error)) == ("width is 0", "width is 0", None, ("width is 0", None))
    assert told(ValueError("no. Parts; here")) == ("no. Parts; here", None)


def test_an_unknown_name():
    error = unknown_name("tree", "chian", ["chain", "topk"])
    assert told(error) == ("unknown tree 'chian'", "Did you mean 'chain'? Allowed: chain, topk")
    assert str(error) == "unknown tree 'chian'. Did you mean 'chain'? Allowed: chain, topk"


def test_an_error_of_the_kernels_has_the_same_parts():
    error = pickle.loads(pickle.dumps(copy.copy(SetError("no such set"))))
    assert told(error) == ("no such set", "give one of these, or unset the environment variable")
    assert str(error) == "no such set. Give one of these, or unset the environment variable"
