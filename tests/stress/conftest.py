"""Options of `make abuse`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", type=float, default=1.0, help="share of the trials; 0.05: quick")
    parser.addoption("--seed", type=int, default=0, help="decides every random choice")
    parser.addoption("--results", default="", help="a file for the rows")
