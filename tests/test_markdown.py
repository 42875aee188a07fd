"""Tables and names as Markdown shows them, and lists cut short."""

from cellseg.markdown import code, count_text, escape, first_few, first_lines, table


def test_a_table_has_a_line_for_header_rule_and_each_row():
    rows = [("a", "1"), ("", "-")]
    assert table(("", "x"), rows) == "| | x |\n|---|---|\n| a | 1 |\n| | - |"
    assert table(["file", "n"], [], flush_right=(1,)) == "| file | n |\n|---|---:|"


def test_a_name_stays_in_its_cell_and_is_shown_as_it_is():
    assert escape("a|b\n") == "a&#124;b&#10;"
    assert escape("train_1") == "train_1"
    assert escape("__a_b_ (_c)") == "&#95;&#95;a_b&#95; (&#95;c)"
    assert code("a_b (2).json") == "`a_b (2).json`"
    assert code("a`b") == "<code>a&#96;b</code>"


def test_a_noun_follows_its_number():
    assert [count_text(n, "cell") for n in (0, 1, 2, 1204)] == [
        "0 cells", "1 cell", "2 cells", "1,204 cells",
    ]  # fmt: skip


def test_the_rest_of_a_long_list_is_counted():
    assert first_few("abc", 3) == "a, b, c"
    assert first_few(["x"] * 2003, 2, "; ") == "x; x and 2,001 more"
    assert first_few([], 2) == ""
    assert first_lines(["a", "b"], 2) == ["a", "b"]
    assert first_lines(["a", "b", "c"], 2) == ["a", "b", "and 1 more"]
