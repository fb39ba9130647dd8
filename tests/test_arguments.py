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


@pytest.mark.parametrize("words, said, fix", [
    (["--bacth_size", "8"], "unknown option --bacth_size", "; did you mean --batch_size?"),
    (["--no_such-option=1"], "unknown option --no_such-option", ""),
    (["--kind=SSD_HarDNet68", "/"], "/ is a folder", "; give --root /"),
    (["-kind", "a"], "unknown option -kind", "; did you mean --kind?"),
    (["--kind", "ssd_hardnet\x1b86"], r"'ssd_hardnet\x1b86'", "; did you mean SSD_HarDNet85?")])
def test_the_nearest_name_of_a_misspelt_one_is_told_in_a_line(words, said, fix, capsys):
    parser = Parser(prog="it")
    parser.add_argument("--batch_size", "--batch", type=int)
    parser.add_argument("--root")
    parser.add_argument("--kind", choices=["SSD_HarDNet68", "SSD_HarDNet85"], required=True)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert error.endswith(f"{fix}; it --help explains the options\n")
