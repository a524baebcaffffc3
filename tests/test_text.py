"""Bytes, seconds, lists and tables as people read them."""

import csv
import io

import pytest

from coldtap.text import a_few, csv_cell, printable, show_bytes, show_seconds, text_table


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (7680, "7.68 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (999_600_000, "1 GB"),
        (1.4e13, "14 TB"),
        (1.2345e15, "1234 TB"),
    ],
)
def test_bytes_are_shown_in_three_digits_of_a_unit_that_suits(n_bytes, shown):
    assert show_bytes(n_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.123, "0.12 s"), (9.97, "10 s"), (45.2, "45 s"), (600, "10 min"), (12000, "3 h 20 min")],
)
def test_seconds_are_shown_in_what_people_count_in(seconds, shown):
    assert show_seconds(seconds) == shown


def test_a_long_list_is_cut_and_says_by_how_much():
    assert a_few([1, 2]) == "1, 2"
    assert a_few("abcdefg") == "a, b, c, d, e … and 2 more"


def test_a_table_leaves_out_empty_columns_and_puts_numbers_to_the_right_where_asked():
    lines = [("one", "", "1"), ("fourteen", "", "22")]
    assert text_table(("name", "none", "n"), lines) == "name      n\none       1\nfourteen  22"
    assert text_table(("name", "none", "n"), lines, numbers_right=True) == ("name       n\none        1\nfourteen  22")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 你好, é, \u00a0 \u2003", "plain, 你好, é, \u00a0 \u2003"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\r\ttab", r"two\nlines\r\ttab"),
        ("\x9b2J\x7f\x00", r"\x9b2J\x7f\x00"),
        ("safe\u202egpj.exe", r"safe\u202egpj.exe"),
        ("line\u2028end", r"line\u2028end"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\udce9"),
    ],
)
def test_what_moves_the_cursor_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    assert text_table(["a"], [[text]]).splitlines()[1] == shown.rstrip()


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "'quoted", '=HYPERLINK("http://a")'])
def test_no_cell_is_a_formula_and_every_text_can_be_had_again(text):
    cell = csv_cell(text)
    assert cell == f"'{text}"
    assert cell.removeprefix("'") == text


@pytest.mark.parametrize("text", ["-0.5", "+3", "1e-3", "", "a=b", "train/cat/0.png", "-inf"])
def test_numbers_and_other_texts_are_cells_as_they_are(text):
    assert csv_cell(text) == text


def test_a_row_of_csv_stays_one_line_with_its_cells():
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(map(csv_cell, ["a\nb", "=x", 'c"d', "\x1b]0;t\x07"]))
    assert len(file.getvalue().splitlines()) == 1
    assert next(csv.reader([file.getvalue()])) == [r"a\nb", "'=x", 'c"d', r"\x1b]0;t\x07"]
