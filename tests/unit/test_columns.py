"""Rows of cells as aligned columns."""

from __future__ import annotations

from tcplat_core import columns


def test_each_column_is_as_wide_as_its_widest_cell() -> None:
    assert list(columns([("NAME", "KIND"), ("a", "probe"), ("abcdef", "")])) == [
        "NAME    KIND",
        "a       probe",
        "abcdef",
    ]


def test_numbers_are_aligned_to_the_right() -> None:
    assert list(columns([("NAME", "N"), ("a", "100"), ("b", "1")], right={1}, gap=1)) == [
        "NAME   N",
        "a    100",
        "b      1",
    ]


def test_empty_table_has_no_lines() -> None:
    assert list(columns([])) == []
