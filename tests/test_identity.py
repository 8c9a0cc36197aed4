"""Identities: by words, and by place among those alive with equal words."""

import gc

from hvd_qgenx.identity import identify, label_of


class Owner:
    pass


def test_equal_words_are_one_number_in_every_process_and_other_words_another():
    first, second = Owner(), Owner()
    assert identify(first, ["a", "b"], "it").number == identify(first, ["a", "b"], "it").number
    assert identify(first, ["a", "b"], "it").number != identify(second, ["a", "c"], "it").number
    # Recorded: other processes of a job must find the same.
    assert identify(Owner(), ["w (3,)"], "it").number == 3496882644


def test_two_with_equal_words_are_told_apart_while_both_are_alive():
    first, second = Owner(), Owner()
    one, two = (identify(owner, ["twins"], "the twin") for owner in (first, second))
    assert one.number != two.number and one.line == "the exchange of the twin"
    assert two.line == "the exchange of the twin (number 2 of those with its names and shapes)"
    assert label_of(two.number) in two.line
    del first
    gc.collect()
    assert identify(Owner(), ["twins"], "the twin") == one, "as on a rank that never made the first"


def test_a_number_from_elsewhere_has_a_label_too():
    assert label_of(255) == "one that is not known here (000000ff)"
