from __future__ import annotations

import pytest

from utils.arguments import Parser


@pytest.mark.parametrize("declared", ["--some_option-x", "--some-option_x"])
@pytest.mark.parametrize("given", ["--some_option_x", "--some-option-x", "--some_option-x"])
def test_options_are_taken_with_dashes_and_underscores(declared, given):
    parser = Parser()
    parser.add_argument_group("more").add_argument(declared, dest="value")
    parser.add_argument("names", nargs="*")
    assert parser.parse_args([given, "a_b-c"]).value == "a_b-c"
    assert parser.parse_args([f"{given}=a-b_c"]).value == "a-b_c"
    assert parser.parse_args(["--", given]).names == [given]


def test_what_is_not_declared_is_named_as_it_was_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        Parser().parse_args(["--no_such-option=1"])
    assert "--no_such-option=1" in capsys.readouterr().err
