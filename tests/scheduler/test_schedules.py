"""The penalty's schedules: their values, and what is refused by name, by type and by result."""

import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_dual_ticket._rst.schedule import SCHEDULES, resolve


@given(st.floats(0, 1))
def test_powers(progress):
    for name, power in (("linear", 1), ("quadratic", 2), ("cubic", 3)):
        assert resolve(name)(progress) == progress**power


@pytest.mark.parametrize("name", SCHEDULES)
def test_names_rise_from_0_to_1(name):
    schedule = resolve(name)
    values = [schedule(step / 100) for step in range(101)]
    assert (values[0], values[-1]) == (0, 1)
    assert values == sorted(values)


def test_functions_are_called_and_give_floats():
    assert resolve(lambda progress: 1 - progress)(0.25) == 0.75
    for value in (0, 1, 2, -1, Fraction(1, 2)):
        result = resolve(lambda progress, value=value: value)(0.5)
        assert type(result) is float
        assert result == value


def test_names_survive_pickling():
    assert pickle.loads(pickle.dumps(resolve("cubic")))(0.5) == 0.125


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(
        ValueError, match=r"unknown schedule 'cosine'; allowed are 'linear', 'quadratic', 'cubic' or a func"
    ):
        resolve("cosine")
    with pytest.raises(ValueError, match=r"'Linear' \(did you mean 'linear'\?\)"):
        resolve("Linear")


@pytest.mark.parametrize("value", [None, 1, 0.5, ["linear"]])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="must be a name or a function, got"):
        resolve(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_results_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=rf"returned {value} at progress 0.5; it must return a finite float"):
        resolve(lambda progress: value)(0.5)


@pytest.mark.parametrize("value", [None, True, "0.5", 1j, torch.tensor(0.5)], ids=repr)
def test_results_that_are_not_numbers_are_refused(value):
    with pytest.raises(TypeError, match=r"at progress 0.5; it must return a finite float"):
        resolve(lambda progress: value)(0.5)


def test_an_error_in_the_function_is_its_own():
    with pytest.raises(ZeroDivisionError):
        resolve(lambda progress: 1 / progress)(0.0)
