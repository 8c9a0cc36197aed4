"""Ranks are put together by host, or it is said that they cannot be."""

import pytest

from hvd_qgenx.transports.hosts import Place, check_hosts, group


def _places(hosts):
    """What Horovod tells each rank, of hosts given as lists of ranks."""
    places = {}
    for host in hosts:
        for local, rank in enumerate(host):
            alike = [other for other in hosts if len(other) > local]
            places[rank] = Place(local, len(host), alike.index(host))
    return [places[rank] for rank in sorted(places)]


@pytest.mark.parametrize(
    "hosts",
    [
        [[0]],
        [[0, 1, 2]],
        [[0], [1], [2]],
        [[0, 1], [2, 3]],
        [[0], [1, 2, 3]],
        [[0, 1, 2], [3], [4, 5]],
        [[0, 2], [1, 3]],
        [[0, 3], [1, 4], [2, 5]],
        [[0, 3], [1, 2]],
        [[0, 2], [1]],
        [[0, 1, 3], [2]],
    ],
)
def test_ranks_of_a_host_are_found(hosts):
    assert sorted(group(_places(hosts))) == hosts


@pytest.mark.parametrize("hosts", [[[0, 3], [1, 2, 4]], [[0], [1, 3], [2]]])
def test_unequal_hosts_whose_ranks_are_mixed_are_refused_by_name(hosts):
    with pytest.raises(ValueError, match="hierarchical=True cannot tell which ranks share a host"):
        group(_places(hosts))


def test_a_division_into_hosts_is_accepted():
    pair, alone = ([0, 2], [0, 5]), ([5], [0, 5])
    check_hosts([0, 2, 5], [pair, pair, alone])


@pytest.mark.parametrize(
    "described",
    [
        [([0], [0, 1]), ([1], [0, 1]), ([1], [0, 1])],  # rank 2 is not of its host
        [([0, 1], [0, 2]), ([1], [0, 2]), ([2], [0, 2])],  # 0 and 1 differ
        [([0, 1], [0]), ([0, 1], [0]), ([2], [0])],  # a host without a leader
        [([0, 1], [1, 2]), ([0, 1], [1, 2]), ([2], [1, 2])],  # a leader that is not the first
        [([0, 1], [0, 2]), ([0, 1], [0, 2]), ([2, 3], [0, 2])],  # a stranger
    ],
)
def test_what_is_no_division_into_hosts_is_refused(described):
    with pytest.raises(ValueError, match="hierarchical must be two process sets"):
        check_hosts([0, 1, 2], described)
