"""Bytes, seconds, lists and tables as people read them."""

import pytest

from coldtap.text import a_few, show_bytes, show_seconds, text_table


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
