import pytest

from lightning_dualpipe.parallel.ownership import Piece, slices, whole

SIZES = {"embedding": 1000, "nothing": 0, "norm": 7, "up": 640, "down": 321}


def elements(owned):
    return {(piece.name, index) for piece in owned for index in range(piece.start, piece.stop)}


@pytest.mark.parametrize("cut", [slices, whole])
@pytest.mark.parametrize("num_owners", [1, 2, 3, 8, 300])
def test_every_element_has_one_owner(cut, num_owners):
    owned = cut(SIZES, num_owners)
    assert len(owned) == num_owners
    parts = [elements(pieces) for pieces in owned]
    assert set().union(*parts) == {(name, index) for name, size in SIZES.items() for index in range(size)}
    assert sum(map(len, parts)) == sum(SIZES.values())
    for pieces in owned:
        assert len({piece.name for piece in pieces}) == len(pieces), "one piece of a parameter at most"


def test_slices_are_one_line_in_equal_parts():
    assert slices({"a": 48, "b": 80}, 2) == ((Piece("a", 0, 48), Piece("b", 0, 16)), (Piece("b", 16, 80),))
    sizes = [sum(map(len, pieces)) for pieces in slices({"a": 10_000, "b": 3, "c": 77_001}, 8)]
    assert max(sizes) - min(sizes) <= 8 * 16  # a share is rounded up to 16, the last gets what is left


def test_whole_parameters_go_to_whoever_has_least():
    owned = whole({"a": 5, "b": 8, "c": 4, "d": 5}, 2)
    assert owned == ((Piece("b", 0, 8), Piece("c", 0, 4)), (Piece("a", 0, 5), Piece("d", 0, 5)))


def test_nothing_to_own():
    assert slices({}, 3) == whole({}, 3) == ((), (), ())
