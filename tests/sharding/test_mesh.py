import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.errors import MeshError
from jaxmoe.sharding.devices import virtual_devices
from jaxmoe.sharding.mesh import MeshSpec, make_mesh, slots_for
from jaxmoe.sharding.rules import Rules


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("dp=2,ep=4", MeshSpec(2, 4)),
        ("tp=2, ep = 4", MeshSpec(1, 4, 2)),
        ("ep=16", MeshSpec(ep=16)),
        ("", MeshSpec()),
        ("dp=1,", MeshSpec()),
    ],
)
def test_a_mesh_is_read_in_any_order_and_an_absent_axis_is_one(text, spec):
    assert MeshSpec.parse(text) == spec


@pytest.mark.parametrize("spec", [MeshSpec(), MeshSpec(2, 4), MeshSpec(1, 2, 3)])
def test_a_mesh_reads_back_what_it_prints(spec):
    assert MeshSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pp=2", "mesh 'pp=2': 'pp=2' is not one of dp=N, ep=N, tp=N; write for example dp=2,ep=4"),
        ("8", "'8' is not one of dp=N, ep=N, tp=N"),
        ("dp", "'dp' is not one of dp=N, ep=N, tp=N"),
        ("dp=2;ep=4", "mesh 'dp=2;ep=4': dp=2;ep=4 must be a whole number of at least 1"),
        ("dp=2,dp=4", "mesh 'dp=2,dp=4': axis dp is given twice"),
        ("dp=0", "dp=0 must be a whole number of at least 1"),
        ("dp=-1", "dp=-1 must be a whole number of at least 1"),
        ("dp=2.5", "dp=2.5 must be a whole number of at least 1"),
        ("dp=", "dp= must be a whole number of at least 1"),
        ("dp=\u0664", "must be a whole number of at least 1"),
    ],
)
def test_a_mesh_that_does_not_parse_is_told_with_its_text(text, told):
    with pytest.raises(MeshError) as error:
        MeshSpec.parse(text)
    assert told in str(error.value)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", None])
def test_a_size_that_is_no_whole_number_is_refused(size):
    with pytest.raises(MeshError, match=r"mesh axis ep=.* must be a whole number of at least 1"):
        MeshSpec(ep=size)


def test_every_dp_and_ep_coordinate_is_an_attention_rank():
    spec = MeshSpec(2, 4, 3)
    assert (spec.num_devices, spec.num_ranks) == (24, 8)


def test_a_mesh_has_the_shape_of_its_spec_and_explicit_axes():
    mesh = make_mesh(MeshSpec(2, 2, 2))
    assert mesh.shape == {"dp": 2, "ep": 2, "tp": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_a_mesh_takes_the_first_devices_and_leaves_the_rest():
    assert make_mesh(MeshSpec(ep=3)).devices.flatten().tolist() == jax.devices()[:3]


def test_a_mesh_larger_than_the_machine_is_told_with_what_to_do():
    with pytest.raises(MeshError) as error:
        make_mesh(MeshSpec(4, 4))
    assert "mesh dp=4,ep=4 needs 16 devices and 8 cpu are here" in str(error.value)
    assert "jaxmoe.virtual_devices(16)" in str(error.value)
    assert "use a mesh of at most 8" in str(error.value)


def test_virtual_devices_asked_for_too_late_are_told():
    assert len(jax.devices()) == 8
    virtual_devices(8)
    with pytest.raises(MeshError, match="16 devices are needed and JAX already runs with 8"):
        virtual_devices(16)


@pytest.mark.parametrize(
    ("experts", "ep", "redundant", "slots"),
    [(8, 1, 0, 8), (8, 4, 0, 8), (6, 4, 0, 8), (4, 8, 0, 8), (8, 4, 1, 12), (60, 16, 4, 64), (1, 1, 0, 1)],
)
def test_slots_fill_every_device_and_hold_every_expert(experts, ep, redundant, slots):
    assert slots_for(experts, MeshSpec(ep=ep), redundant) == slots


def test_experts_over_both_axes_fill_all_devices_but_those_of_tp():
    spec = MeshSpec.parse("dp=3,ep=4,tp=2", "dp,ep")
    assert (spec.expert_devices, spec.axes_of_experts, slots_for(8, spec)) == (12, "dp,ep", 12)
    assert MeshSpec.parse("dp=3,ep=4,tp=2").expert_devices == 4


def test_other_axes_for_experts_are_told():
    with pytest.raises(MeshError, match="expert axes 'ep,dp' are not supported; use ep or dp,ep"):
        MeshSpec.parse("dp=2,ep=4", "ep,dp")


def test_tp_splits_what_it_divides_and_leaves_the_rest_whole():
    rules = Rules.fit(MeshSpec(tp=4), heads=8, kv_heads=2, expert_width=6)
    assert rules.split == {"heads"}
    assert (rules.parts("heads"), rules.parts("kv_heads")) == (4, 1)
    assert rules.partition("heads", None, "kv_heads") == P("tp", None, None)
    assert Rules.fit(MeshSpec(ep=4), heads=8).partition("heads") == P(None)


def test_a_tp_that_divides_nothing_is_told_with_what_would_work():
    with pytest.raises(MeshError) as error:
        Rules.fit(MeshSpec(tp=5), heads=12, kv_heads=2, expert_width=6)
    assert str(error.value) == "tp=5 divides none of heads=12, kv_heads=2, expert_width=6; use tp in 1, 2, 3, 4, 6, 12"


def test_an_axis_is_split_by_what_it_means():
    rules = Rules.fit(MeshSpec(tp=2), expert_width=6)
    assert rules.partition(None, "slots", "expert_width") == P(None, "ep", "tp")
    assert rules.partition("ranks") == P(("dp", "ep"))
    assert Rules(MeshSpec.parse("dp=2,ep=4", "dp,ep")).partition("slots") == P(("dp", "ep"))
    with pytest.raises(KeyError):
        rules.partition("no such meaning")
    with pytest.raises(ValueError, match="are not among heads, kv_heads"):
        Rules(split=frozenset({"width"}))
