"""Published profiles: read in order, what crosses a cut, and errors that name line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.errors import PlanError
from autopar.search.stages.profile import Profile, parse_profile, read_profile

CHAIN = """\
node1 -- Input -- forward_compute_time=1.0, backward_compute_time=0.000, activation_size=80.0, parameter_size=0.000
node2 -- Conv2d(3, 8, kernel_size=(3, 3)) -- forward_compute_time=2.0, backward_compute_time=4.0, activation_size=[10.0; 6.0], parameter_size=5
node3 -- Loss -- forward_compute_time=0.5, backward_compute_time=0.5, activation_size=2, parameter_size=0 -- stage_id=1

	node1 -- node2
	node2 -- node3
"""  # noqa: E501


def line(name: str, forward: float = 1, backward: float = 2, activation: float = 8, parameters: float = 4) -> str:
    return (
        f"{name} -- {name.upper()} -- forward_compute_time={forward}, backward_compute_time={backward}, "
        f"activation_size={activation}, parameter_size={parameters}\n"
    )


def graph(layers: list[str], edges: list[str]) -> Profile:
    return parse_profile("".join(layers) + "".join(f"\t{edge[0]} -- {edge[1]}\n" for edge in edges), 1, "graph")


def test_units_are_of_one_sample() -> None:
    profile = parse_profile(CHAIN, 4, "chain")
    conv = profile.layers[1]
    assert conv.name == "Conv2d(3, 8, kernel_size=(3, 3))"
    assert (conv.forward_s, conv.backward_s) == (0.0005, 0.001)
    assert (conv.activation_bytes, conv.parameter_bytes) == (4.0, 5.0)  # several results are added up; parameters do not grow with samples
    assert profile.readers == ((1,), (2,), ())


def test_batch_is_in_the_name(tmp_path: Path) -> None:
    path = tmp_path / "toy-3-pbs-2.txt"
    path.write_text(CHAIN)
    profile = read_profile(path)
    assert profile.name == "toy-3-pbs-2"
    assert profile.layers[1].forward_s == 0.001
    assert read_profile(path, 4).layers[1].forward_s == 0.0005
    other = tmp_path / "toy.txt"
    other.write_text(CHAIN)
    with pytest.raises(PlanError, match="--profile-batch"):
        read_profile(other)


def test_layers_come_behind_what_they_read() -> None:
    profile = graph([line("d"), line("b"), line("a"), line("c")], ["ab", "bc", "cd", "ad"])
    assert [layer.name for layer in profile.layers] == ["A", "B", "C", "D"]
    assert profile.reads == ((), (0,), (1,), (0, 2))


def test_skips_cross_every_cut_up_to_their_reader() -> None:
    profile = graph([line(name) for name in "abcd"], ["ab", "bc", "cd", "ad"])
    assert [profile.crossing(cut) for cut in (1, 2, 3)] == [(0,), (0, 1), (0, 2)]


def test_inputs_do_not_cross_but_are_made_again() -> None:
    """A mask that all layers read takes no parameter and no gradient."""
    profile = graph([line("m", 1, 0, 8, 0), line("n", 1, 0, 8, 0), *(line(name) for name in "abc")], ["mn", "na", "ab", "nb", "bc", "nc"])
    assert profile.free == (True, True, False, False, False)
    assert profile.crossing(3) == (2,)
    assert profile.again(3, 5) == (0, 1)
    assert profile.again(1, 3) == (0,)
    assert profile.again(0, 5) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no layers"),
        ("hello", "profile:1: neither a layer"),
        (line("a") + line("a"), "profile:2: a second layer is called a"),
        (line("a") + "\ta -- b\n", "profile:2: an edge of b, which no line describes"),
        (line("a") + line("b") + "\ta -- b\n\tb -- a\n", "circle among a, b"),
        (line("a").replace("=1,", "=fast,"), "profile:1: layer A: forward_compute_time is 'fast'"),
        (line("a").replace("=1,", "=-1,"), "a number of at least 0"),
        (line("a").replace("=1,", "=nan,"), "a number of at least 0"),
        (line("a").replace("=1,", "=,"), "a number of at least 0"),
        (line("a").replace(", parameter_size=4", ""), "profile:1: layer A lacks parameter_size"),
        (line("a").replace("parameter_size", "colour"), "has a field 'colour'"),
    ],
)
def test_damage_is_named(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_profile(text, 1, "x")
    assert message in str(error.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"missing-pbs-1\.txt: cannot be read"):
        read_profile(tmp_path / "missing-pbs-1.txt")
    (tmp_path / "bytes-pbs-1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        read_profile(tmp_path / "bytes-pbs-1.txt")
